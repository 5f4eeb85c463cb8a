"""The pictures in README, taken from an exported site: `python scripts/capture_page.py SITE LATENT`."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

if __name__ == "__main__":
    site, latent = Path(sys.argv[1]).resolve(), sys.argv[2]
    images = Path(__file__).parent.parent / "docs" / "images"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, state in (("list", "#/"), ("latent", f"#/latent/{latent}")):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{(site / 'index.html').as_uri()}{state}")
            page.wait_for_timeout(1500)
            page.screenshot(path=images / f"{name}.png")
        browser.close()
