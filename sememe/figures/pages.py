"""Reports as pages: Markdown with plots beside it, and one HTML file that needs no other."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path

from sememe.figures.data import Data, number
from sememe.figures.plots import frontier_plot, plots, svg
from sememe.figures.tables import BETTER, MEANINGS, group_table, headline_table, html_table, markdown_table

__all__ = ["attributions", "credit", "page", "write_pages"]


def write_pages(folder: Path, reports: Mapping[str, Data]) -> None:
    """report.md with its plots beside it, and report.html, which holds everything itself.

    Args:
        folder: Where to write.
        reports: report.json by title; one or several.
    """
    (folder / "figures").mkdir(exist_ok=True)
    several = len(reports) > 1
    table = headline_table(reports)
    heading = "Dictionaries compared on held-out text" if several else f"Report: {next(iter(reports))}"
    markdown, body = [f"# {heading}", "", markdown_table(table), ""], [html_table(table)]
    markdown += [_LEGEND, ""]
    body.append(f"<p class='legend'>{html.escape(_LEGEND)}</p>")
    if several:
        drawn = svg(frontier_plot(reports), "frontier")
        (folder / "figures" / "frontier.svg").write_text(drawn, encoding="utf-8")
        markdown += ["![Reconstruction against sparsity](figures/frontier.svg)", ""]
        body.append(f"<figure>{drawn}</figure>")
    for index, (title, data) in enumerate(reports.items()):
        prefix = f"{index}-" if several else ""
        if several:
            markdown += [f"## {title}", ""]
            body.append(f"<h2>{html.escape(title)}</h2>")
        body.append("<div class='plots'>")
        for name, figure in plots(data).items():
            drawn = svg(figure, prefix + name)
            (folder / "figures" / f"{prefix}{name}.svg").write_text(drawn, encoding="utf-8")
            markdown += [f"![{name}](figures/{prefix}{name}.svg)", ""]
            body.append(f"<figure>{drawn}</figure>")
        body.append("</div>")
        for what in ("language", "source"):
            groups = data[f"by_{what}"]
            if len(groups) > 1:
                markdown += [f"**By {what}**", "", markdown_table(group_table(groups)), ""]
                body.append(f"<h3>By {what}</h3>{html_table(group_table(groups))}")
        facts = _facts(data)
        markdown += [f"- {name}: {value}" for name, value in facts] + [""]
        body.append(
            "<dl>"
            + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts)
            + "</dl>"
        )
    lines = attributions(reports.values())
    if lines:
        markdown += ["**Text**", "", *(f"- {text} {url}".rstrip() for text, url in lines), ""]
        body.append("<h3>Text</h3><ul class='credits'>" + "".join(credit(*line) for line in lines) + "</ul>")
    (folder / "report.md").write_text("\n".join(markdown), encoding="utf-8")
    (folder / "report.html").write_text(page(heading, "\n".join(body)), encoding="utf-8")


_LEGEND = (
    "Beside or under each number: its 95% bootstrap interval over documents. Nulls are measured at the "
    "dictionary's l0. "
    + " ".join(
        f"{name}: {meaning}{f' ({BETTER[name]} is better)' if name in BETTER else ''}."
        for name, meaning in MEANINGS.items()
    )
)


def _facts(data: Data) -> list[tuple[str, str]]:
    dictionary, text, policy = data["dictionary"], data["text"], data["text"]["policy"]
    places = "+".join(dictionary["inputs"])
    if dictionary["outputs"] != dictionary["inputs"]:
        places += " to " + "+".join(dictionary["outputs"])
    base = data["metrics"].get("ce_base", {}).get("value")
    return [
        (
            "dictionary",
            f"{dictionary['kind']}, {dictionary['d_sae']:,} latents, fingerprint {dictionary['fingerprint'][:16]}",
        ),
        ("model", f"{dictionary['model']} at {places}, fingerprint {dictionary['model_fingerprint'][:16]}"),
        (
            "held-out text",
            f"{text['n_tokens']:,} tokens of {text['n_documents']:,} documents; {text['n_rows_kept']:,} kept rows, "
            f"{text['n_norm_outliers']:,} left out for their norm; {text['n_predictions']:,} predictions",
        ),
        ("token policy", ", ".join(f"{name}={value}" for name, value in policy.items())),
        ("unedited model", f"cross-entropy {number(base)} nats per token"),
        (
            "nulls fitted on",
            "the training store" if data.get("store") else "activations of the training documents",
        ),
        *(("notice", text) for text in data.get("notices", ())),
    ]


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
</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""
