"""Reports as pages: Markdown with plots beside it, and one HTML file that needs no other."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from sememe.figures.comparison import comparison_sections
from sememe.figures.data import Data, number, stopped
from sememe.figures.frame import attributions, credit, page
from sememe.figures.plots import frontier_plot, plots, svg
from sememe.figures.tables import (
    BETTER,
    DENSITIES,
    MEANINGS,
    density_table,
    group_table,
    headline_table,
    html_table,
    markdown_table,
)

__all__ = ["write_pages"]


def write_pages(
    folder: Path, reports: Mapping[str, Data], compared: Data | None = None, notes: Sequence[str] = ()
) -> None:
    """report.md with its plots beside it, and report.html, which holds everything itself.

    Args:
        folder: Where to write.
        reports: report.json by title; one or several.
        compared: `frontier.summary` of them, where they are of the same documents.
        notes: What a reader has to know of all of them.
    """
    (folder / "figures").mkdir(exist_ok=True)
    several = len(reports) > 1
    table = headline_table(reports)
    heading = "Dictionaries compared on held-out text" if several else f"Report: {next(iter(reports))}"
    markdown, body = [f"# {heading}", ""], []
    for note in notes:
        markdown += [f"> {note}", ""]
        body.append(f"<p class='legend'>{html.escape(note)}</p>")
    markdown += [markdown_table(table), ""]
    body.append(html_table(table))
    markdown += [_LEGEND, ""]
    body.append(f"<p class='legend'>{html.escape(_LEGEND)}</p>")
    if several:
        drawn = svg(frontier_plot(reports), "frontier")
        (folder / "figures" / "frontier.svg").write_text(drawn, encoding="utf-8")
        markdown += ["![Reconstruction against sparsity](figures/frontier.svg)", ""]
        body.append(f"<figure>{drawn}</figure>")
    for heading_of, in_markdown, in_html in comparison_sections(compared, folder) if compared else ():
        markdown += [*([f"## {heading_of}", ""] if heading_of else []), in_markdown, ""]
        body += [*([f"<h2>{html.escape(heading_of)}</h2>"] if heading_of else []), in_html]
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
        active = density_table(
            {arm if arm == "dictionary" else f"null: {arm}": own for arm, own in data["density"].items()}
        )
        if active is not None:
            markdown += ["**How often latents are active**", "", markdown_table(active), "", DENSITIES, ""]
            body.append(f"<h3>How often latents are active</h3>{html_table(active)}")
            body.append(f"<p class='legend'>{html.escape(DENSITIES)}</p>")
        grouped = {what: data[f"by_{what}"] for what in ("language", "source")}
        for what, groups in (*grouped.items(), *data.get("by_tag", {}).items()):
            if len(groups) > 1:
                markdown += [f"**By {what}**", "", markdown_table(group_table(groups)), ""]
                body.append(f"<h3>By {html.escape(what)}</h3>{html_table(group_table(groups))}")
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
        *([("stopped", stopped(data["stopped"]))] if (data.get("stopped") or {}).get("spent") else []),
        *(("notice", text) for text in data.get("notices", ())),
    ]
