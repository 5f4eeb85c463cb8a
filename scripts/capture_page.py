"""The pictures in README and the docs, taken of real pages.

    python scripts/capture_page.py SITE LATENT [FOLDER]             list, latent, map, notes, rate; of two: compare
    python scripts/capture_page.py http://127.0.0.1:8000/ LATENT    the same, and try: of `sememe browse A B --live`

What a page cannot do (compare without a second atlas, try without a model) is left out and said. With a FOLDER, the
pictures go there, and there are more: every kind of page, light and dark, wide and narrow. A picture in docs/images
must stay under 200 KB: one that does not is said, and the script ends with exit code 1.
"""

import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Error, sync_playwright

MAX_BYTES = 200_000
TEXT = "In 44 BC, Caesar crossed the river and the city opened its gates."
PROMPT = "The weather today is"
MODEL_MS = 180_000
SHOWN = {
    "list": ".rows .row",
    "map": ".map canvas",
    "latent": ".example",
    "notes": ".tool",
    "rate": ".rate-examples .excerpt",
    "compare": ".card[aria-busy=false] .excerpt",
    "try": ".tool.try",
}


def states(latent: str, more: bool) -> dict[str, str]:
    """Pages by the name of their picture."""
    found = {
        "list": "#/",
        "map": "#/?color=cluster",
        "latent": f"#/latent/{latent}",
        "notes": "#/notes",
        "rate": "#/rate?n=20&seed=1",
        "compare": f"#/compare?latent={latent}",
        "try": f"#/try?text={quote(TEXT)}&prompt={quote(PROMPT)}&steer={latent}:4",
    }
    return found | ({"groups": "#/?color=cluster&sort=score", "text": "#/text/0?at=3"} if more else {})


def can(page: Any, name: str) -> bool:
    """Whether what is captured is there at all."""
    session = page.evaluate("Sememe.whenSession()")
    return {"compare": len(session["atlases"]) > 1, "try": bool(session["live"])}.get(name, True)


def prepare(page: Any, name: str, latent: str) -> None:
    """Do what a person would, so that there is something to see."""
    if name == "notes":
        page.evaluate(
            "id => Sememe.notes.write || Sememe.notes.set(id, { star: true, tags: ['example'], note: 'A look?' })",
            int(latent),
        )
    if name == "try":
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(".written", timeout=MODEL_MS)
    if name == "compare":
        page.locator(".card").first.evaluate("card => card.scrollIntoView({ block: 'center' })")
    if name == "map":
        page.locator(".map").evaluate("map => map.scrollIntoView({ block: 'start' })")


def capture(
    browser: Any, address: str, name: str, state: str, latent: str, file: Path, **options: Any
) -> bool:
    """One picture; false where the page cannot show this."""
    page = browser.new_page(
        viewport={"width": options.pop("width"), "height": 900}, color_scheme=options["scheme"]
    )
    page.goto(address + state)
    page.wait_for_timeout(500)
    try:
        if not can(page, name):
            print(f"{name}: left out, this page has no second atlas or no model")
            return False
        page.wait_for_selector(SHOWN.get(name, "main"), timeout=20_000)
        prepare(page, name, latent)
        page.wait_for_timeout(1500)
        page.screenshot(path=file, full_page=options["full"])
        Image.open(file).quantize(256).save(file, optimize=True)  # a third of the size; nobody sees it
    except Error as error:
        print(f"{name}: not taken: {str(error).splitlines()[0]}")
        return False
    finally:
        page.close()
    return True


def main() -> int:
    """Take them all; the number of pictures that are too large, or 0."""
    where, latent = sys.argv[1], sys.argv[2]
    address = where if where.startswith("http") else (Path(where).resolve() / "index.html").as_uri()
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    images = folder or Path(__file__).parent.parent / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    large = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark") if folder else ("light",):
            for width in (1280, 360) if folder else (1280,):
                for name, state in states(latent, folder is not None).items():
                    file = images / (f"{name}-{scheme}-{width}.png" if folder else f"{name}.png")
                    full = folder is not None or name == "try"  # its two halves stand below each other
                    if not capture(
                        browser, address, name, state, latent, file, width=width, scheme=scheme, full=full
                    ):
                        continue
                    if folder is None and file.stat().st_size > MAX_BYTES:
                        large += 1
                        print(f"{file}: {file.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
        browser.close()
    return min(large, 1)


if __name__ == "__main__":
    sys.exit(main())
