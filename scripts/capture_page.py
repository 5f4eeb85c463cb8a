"""The pictures in README, taken from an exported site: `python scripts/capture_page.py SITE LATENT [FOLDER]`.

With a FOLDER, the pictures go there, and there are more: every kind of page, light and dark, wide and narrow.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

if __name__ == "__main__":
    site, latent = Path(sys.argv[1]).resolve(), sys.argv[2]
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    images = folder or Path(__file__).parent.parent / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    states = {"list": "#/", "latent": f"#/latent/{latent}"}
    if folder is not None:
        states |= {"groups": "#/?color=cluster&sort=score", "text": "#/text/0?at=3"}
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark") if folder else ("light",):
            for width in (1280, 360) if folder else (1280,):
                for name, state in states.items():
                    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                    page.goto(f"{(site / 'index.html').as_uri()}{state}")
                    page.wait_for_timeout(1500)
                    file = f"{name}-{scheme}-{width}.png" if folder else f"{name}.png"
                    page.screenshot(path=images / file, full_page=folder is not None)
                    page.close()
        browser.close()
