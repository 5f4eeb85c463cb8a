"""What every page has: its frame and style, and whom the texts' licences ask to name. Knows no numbers."""

from __future__ import annotations

import html
from collections.abc import Iterable

from sememe.figures.data import Data

__all__ = ["attributions", "credit", "page"]


def attributions(reports: Iterable[Data]) -> list[tuple[str, str]]:
    """What the texts' licences ask to be said, each once, and where it links to."""
    lines = {}
    for data in reports:
        for item in data.get("attributions", ()):
            parts = [
                item.get("title") or item.get("source") or "",
                item.get("licence") or "",
                item.get("notice") or "",
            ]
            lines[". ".join(str(part).rstrip(".") for part in parts if part) + "."] = item.get("url") or ""
    return list(lines.items())


def credit(text: str, url: str) -> str:
    """One of them as a list item."""
    safe = url if url.startswith(("https://", "http://")) else ""
    link = f" <a href='{html.escape(safe)}'>{html.escape(safe)}</a>" if safe else ""
    return f"<li>{html.escape(text)}{link}</li>"


def page(title: str, body: str) -> str:
    """A whole HTML page that needs no other file."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 2rem auto; padding: 0 1.2rem;
  max-width: 1180px; }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem }} h3 {{ font-size: 1rem; margin-top: 1.8rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; white-space: nowrap;
  vertical-align: top }}
th {{ font-weight: 600; color: #424a53 }} th:first-child, td:first-child {{ text-align: left }}
td small {{ display: block; color: #6e7781; font-size: .75rem }}
tr.null td {{ color: #57606a }} tr:not(.null) td:first-child {{ font-weight: 600 }}
.plots {{ display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; margin-top: 1.2rem }}
figure {{ margin: 0; flex: 1 1 460px; max-width: 560px }} figure svg {{ width: 100%; height: auto }}
.legend, dl, .credits {{ color: #57606a; font-size: .85rem }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem }}
dt {{ font-weight: 600 }} dd {{ margin: 0 }}
.written th, .written td {{ white-space: normal; text-align: left; min-width: 6rem }}
</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""
