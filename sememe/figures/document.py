"""A page twice: Markdown with its plots beside it, and one HTML file that needs no other. Knows no numbers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path

from sememe.figures.data import Data
from sememe.figures.frame import attributions, credit, page
from sememe.figures.tables import Table, html_table, markdown_table

__all__ = ["Document"]


class Document:
    """Written piece by piece, in both forms at once.

    Args:
        folder: Where its files will lie; plots go into `figures/`.
        title: Its heading.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self._markdown, self._body = [f"# {title}", ""], list[str]()

    def text(self, text: str) -> None:
        """A paragraph."""
        self._markdown += [text, ""]
        self._body.append(f"<p>{html.escape(text)}</p>")

    def legend(self, text: str) -> None:
        """How to read what stands above."""
        self._markdown += [text, ""]
        self._body.append(f"<p class='legend'>{html.escape(text)}</p>")

    def heading(self, text: str) -> None:
        """Of a section."""
        self._markdown += [f"## {text}", ""]
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def plots(self, drawn: Mapping[str, str]) -> None:
        """SVG by name, side by side."""
        (self.folder / "figures").mkdir(exist_ok=True)
        for name, text in drawn.items():
            (self.folder / "figures" / f"{name}.svg").write_text(text, encoding="utf-8")
        self._markdown += [f"![{name}](figures/{name}.svg)\n" for name in drawn]
        figures = "".join(f"<figure>{text}</figure>" for text in drawn.values())
        self._body.append(f"<div class='plots'>{figures}</div>")

    def table(self, table: Table, *, written: bool = False) -> None:
        """A table; of `written` texts, whose lines are broken."""
        self._markdown += [markdown_table(table), ""]
        shown = html_table(table)
        self._body.append(f"<div class='written'>{shown}</div>" if written else shown)

    def items(self, heading: str, lines: Iterable[str]) -> None:
        """Lines under a word of what they are."""
        lines = list(lines)
        self._markdown += [f"{heading}:", "", *(f"- {line}" for line in lines), ""]
        listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        self._body.append(f"<h3>{html.escape(heading)}</h3><ul>{listed}</ul>")

    def credits(self, data: Data, heading: str) -> None:
        """Whom the texts' licences ask to name, if anybody."""
        found = attributions([data])
        if found:
            self._markdown += [f"## {heading}", "", *(f"- {text} {url}".rstrip() for text, url in found), ""]
            listed = "".join(credit(text, url) for text, url in found)
            self._body.append(f"<h3>{html.escape(heading)}</h3><ul class='credits'>{listed}</ul>")

    def write(self, stem: str) -> None:
        """As `stem.md` and `stem.html`."""
        (self.folder / f"{stem}.md").write_text("\n".join(self._markdown), encoding="utf-8")
        whole = page(self.title, "\n".join(self._body))
        (self.folder / f"{stem}.html").write_text(whole, encoding="utf-8")
