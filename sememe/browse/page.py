"""The page's own files, as they lie in static/. Knows their names and content types, not what they do."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

__all__ = ["CONTENT_TYPES", "fingerprint", "index_html", "static_files"]

STATIC = Path(__file__).parent / "static"

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


@cache
def static_files() -> dict[str, bytes]:
    """Every file the page is made of, by its path below static/; index.html is not among them."""
    files = sorted(path for path in STATIC.rglob("*") if path.is_file() and path.suffix in CONTENT_TYPES)
    return {p.relative_to(STATIC).as_posix(): p.read_bytes() for p in files if p.name != "index.html"}


def index_html(mode: str) -> str:
    """The page, told where its data is: "served" (from /api) or "static" (from scripts in data/)."""
    text = (STATIC / "index.html").read_text(encoding="utf-8")
    assert text.count('data-mode="served"') == 1
    return text.replace('data-mode="served"', f'data-mode="{mode}"')


def fingerprint() -> str:
    """SHA-256 of the page's files: a site made by an older page is made again."""
    digest = hashlib.sha256(index_html("static").encode())
    for name, content in static_files().items():
        digest.update(f"\0{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
