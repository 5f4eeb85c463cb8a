"""The view of a prompt: its rows, and how they are shown in a terminal and on a page. Computes nothing."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from sememe.figures.frame import page

__all__ = ["LatentRow", "OutputToken", "PromptView", "TokenRow", "print_prompt"]


class OutputToken(NamedTuple):
    """A token of the vocabulary, and how its log-probability changes."""

    token: int
    text: str
    change: float


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One token of the prompt."""

    position: int
    token: int
    text: str
    kept: bool
    """Whether the dictionary is asked: not at positions that its token policy drops."""
    n_active: int | None
    """Latents that fire here, shown or not."""
    loss_of_next: float | None
    """The unedited model's loss of the token after this one, in nats."""
    bytes: str | None = None
    """Its bytes as hex, where they are no text by themselves: half a Japanese letter."""


@dataclasses.dataclass(frozen=True)
class LatentRow:
    """One latent at one token."""

    position: int
    text: str
    """The token."""
    latent: int
    act: float
    writes: float
    """Norm of what it adds to the model's activations."""
    share_of_max: float | None = None
    """Its activation over its largest in the atlas."""
    quantile: float | None = None
    """Share of its activations in the atlas that are smaller."""
    density: float | None = None
    """Share of the atlas's tokens on which it fires."""
    label: str | None = None
    loss_change: float | None = None
    """Of the next token's loss when it is taken out here; above 0 where it helps."""
    loss_change_after: float | None = None
    """Of the losses of the n_after tokens after that, summed."""
    n_after: int | None = None
    kl: float | None = None
    """From the unedited prediction of the next token to the ablated one."""
    raised: tuple[OutputToken, ...] = ()
    """Output tokens that become likelier without it."""
    lowered: tuple[OutputToken, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptView:
    """What a dictionary's latents do on one text."""

    prompt: str
    model: str
    hookpoints: tuple[str, ...]
    dictionary: str
    tokens: tuple[TokenRow, ...]
    rows: tuple[LatentRow, ...]
    ablated: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        data = dataclasses.asdict(self)
        for token in data["tokens"]:
            if token["bytes"] is None:
                del token["bytes"]
        for row in data["rows"]:
            for end in ("raised", "lowered"):
                row[end] = [OutputToken(*item)._asdict() for item in row[end]]
        return data

    def by_token(self) -> Iterator[tuple[TokenRow, list[LatentRow]]]:
        """Each token with its latents."""
        found = {at: list(rows) for at, rows in itertools.groupby(self.rows, lambda row: row.position)}
        for token in self.tokens:
            yield token, found.get(token.position, [])

    def columns(self, brief: bool = False) -> list[str]:
        """What is shown of each latent: what there is, and the most useful of it where room is short."""
        known = any(row.density is not None for row in self.rows)
        columns = ["latent", "act", *(["quantile"] if known else [])]
        columns += ["of max", "density"] if known and not brief else []
        labelled = any(row.label for row in self.rows)
        if self.ablated:
            columns += ["loss", *([] if brief else ["after", "KL"])]
            columns += [] if brief and labelled else ["without it"]
        return columns + (["label"] if labelled else [])

    def page(self) -> str:
        """A page that needs no other file."""
        columns = self.columns()
        head = "<th>token</th><th></th>" + "".join(
            f"<th{'' if name in WIDTHS else WORDS}>{html.escape(name)}</th>" for name in columns
        )
        body = []
        for token, rows in self.by_token():
            first = f"<td><code>{html.escape(visible(token.text))}</code></td><td><small>{_about(token)}</small></td>"
            empty = f"<td colspan='{len(columns)}'></td>"
            lines = [
                "".join(
                    f"<td{'' if name in WIDTHS else WORDS}>{html.escape(cell)}</td>"
                    for name, cell in zip(columns, _cells(row, columns), strict=True)
                )
                for row in rows
            ]
            for i, line in enumerate(lines or [empty]):
                body.append(f"<tr>{first if i == 0 else '<td></td><td></td>'}{line}</tr>")
        about = f"{self.dictionary} at {', '.join(self.hookpoints)} of {self.model}"
        text = (
            f"<p>{html.escape(about)}</p><p class='legend'>{html.escape(LEGEND if self.ablated else '')}</p>"
        )
        return page(
            "Prompt", f"<pre style='white-space:pre-wrap'>{html.escape(self.prompt)}</pre>{text}"
            f"<div class='wide'><table><tr>{head}</tr>{''.join(body)}</table></div>"
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return self.page()


WIDTHS = {
    "latent": 6,
    "act": 6,
    "quantile": 8,
    "of max": 6,
    "density": 7,
    "loss": 6,
    "after": 6,
    "KL": 6,
}
WORDS = " style='text-align:left;white-space:normal'"
TOKEN_WIDTH = 13

LEGEND = (
    "next: the model's loss of the next token, in nats. loss: by how much that rises when the latent is taken out at "
    "this token. after: the same, summed over the later tokens. without it: likely tokens that become likelier (↑) and "
    "less likely (↓). quantile: share of the latent's activations in the atlas that are smaller."
)


def visible(text: str) -> str:
    """A token on one line, its white space to be seen."""
    signs = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"}
    return "".join(signs.get(sign, sign if sign.isprintable() else "�") for sign in text)


def _about(token: TokenRow) -> str:
    if not token.kept:
        return "not looked at"
    loss = "" if token.loss_of_next is None else f", loss {token.loss_of_next:.2f}"
    return f"{token.n_active} fire{loss}"


def _cells(row: LatentRow, columns: list[str]) -> list[str]:
    """A latent's columns as text."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = {
        "latent": str(row.latent),
        "act": f"{row.act:.3g}",
        "quantile": number(row.quantile, ".1%"),
        "of max": number(row.share_of_max, ".0%"),
        "density": number(row.density, ".2%"),
        "loss": number(row.loss_change, "+.3f"),
        "after": number(row.loss_change_after, "+.3f") if row.n_after else "",
        "KL": number(row.kl, ".3f"),
        "without it": " ".join(
            f"{sign}{visible(item.text)}"
            for pair in itertools.zip_longest(row.raised, row.lowered)
            for sign, item in zip("↑↓", pair, strict=True)
            if item is not None
        ),
        "label": row.label or "",
    }
    return [cells[name] for name in columns]


def print_prompt(view: PromptView) -> None:
    """The view as a table in the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    columns = view.columns(brief=console.width < 110)
    title = f"{view.dictionary} at {', '.join(view.hookpoints)} of {view.model}"
    table = Table(title=title, title_justify="left")
    numbers = [name for name in columns if name in WIDTHS]
    words = [name for name in columns if name not in WIDTHS]
    room = console.width - TOKEN_WIDTH - 4 - sum(WIDTHS[name] + 3 for name in numbers)
    table.add_column("token", no_wrap=True, width=TOKEN_WIDTH)
    for name in columns:
        width = WIDTHS.get(name) or max(room // len(words) - 3, 10)
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True, width=width)
    for token, rows in view.by_token():
        loss = "" if token.loss_of_next is None else f"next {token.loss_of_next:.2f}"
        beside = [escape(visible(token.text)), f"[dim]{loss if token.kept else 'not looked at'}[/dim]"]
        lines = [[escape(cell) for cell in _cells(row, columns)] for row in rows]
        lines += [["" for _ in columns] for _ in range(len(beside) - len(lines))]
        for i, line in enumerate(lines):
            table.add_row(beside[i] if i < len(beside) else "", *line)
        table.add_section()
    console.print(table)
    if view.ablated:
        console.print(LEGEND, style="dim")
