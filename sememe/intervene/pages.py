"""The measured effects as a Markdown page and its pictures. Knows the shape of effects.json and nothing else."""

from __future__ import annotations

from typing import Any

from sememe.figures import changes_plot

__all__ = ["page", "pictures"]


def pictures(data: dict[str, Any]) -> dict[str, str]:
    """A histogram of the logit changes for each latent that fires, as SVG, by the file's name in the folder."""
    return {
        _picture(latent): changes_plot(
            latent["histogram"]["edges"],
            latent["histogram"]["counts"],
            latent["true_logit_change"],
            str(latent["latent"]),
        )
        for latent in data["latents"]
        if "histogram" in latent
    }


def _picture(latent: dict[str, Any]) -> str:
    return f"figures/latent_{latent['latent']}.svg"


def page(data: dict[str, Any]) -> str:
    """One section per latent: what its ablation changes, and what steering with it gives."""
    about, error = data["dictionary"], "kept" if data["error"] == "keep" else "dropped"
    lines = [
        f"# Effects of {len(data['latents'])} latents of {about['name']}",
        "",
        f"{about['kind']} dictionary of {about['d_sae']:,} latents at {', '.join(about['hookpoints'])} of "
        f"{about['model']}; ablation to {data['ablation']}, error term {error}. "
        "Changes are those of logits (minus their mean over the vocabulary) and of log-probabilities in nats, "
        "averaged over the positions at which the latent fires in its strongest contexts.",
        "",
    ]
    for latent in data["latents"]:
        lines += _latent(latent)
    return "\n".join(lines)


def _latent(data: dict[str, Any]) -> list[str]:
    lines = [
        f"## Latent {data['latent']}",
        "",
        f"Density {data['density']:.3g} over {data['n_tokens']:,} tokens, largest activation {data['max_act']:.4g}.",
        "",
    ]
    if "note" in data:
        return [*lines, data["note"], ""]
    after = data["ce_increase_after"]
    lines += [
        "| measure | value |",
        "|---|---|",
        f"| positions | {data['n_positions']:,} in {data['n_contexts']} contexts |",
        f"| change of the true token's logit | {data['true_logit_change']:+.4f} |",
        f"| change of its log-probability | {data['true_log_prob_change']:+.4f} |",
        f"| KL to the unedited model | {data['kl']:.4f} |",
        f"| the same, as much taken out along a random direction | {data['kl_random_direction']:.4f} |",
        f"| cross-entropy increase at later positions | {'--' if after is None else f'{after:+.4f}'} |",
        "",
        f"![How the true token's logit changes, position by position]({_picture(data)})",
        "",
        "| lowered most | | raised most | |",
        "|---|---|---|---|",
    ]
    for low, high in zip(data["lowered"], data["raised"], strict=True):
        cells = (f"{_code(item['text'])} | {item['logit_change']:+.3f}" for item in (low, high))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| context | next token | activation | change of its log-probability |",
        "|---|---|---|---|",
    ]
    for example in (*data["examples_hurt"], *data["examples_helped"]):
        lines.append(
            f"| {_cell(example['before'])}**{_cell(example['token'])}** | {_code(example['next'])} | "
            f"{example['act']:.3g} | {example['log_prob_change']:+.3f} |"
        )
    for steered in data.get("steering", ()):
        lines += [
            "",
            f"Steered, after {_code(steered['prompt'])}:",
            "",
            "| strength | perplexity | text |",
            "|---|---|---|",
        ]
        for row in steered["continuations"]:
            lines.append(f"| {row['strength']:g} | {row['perplexity']:.4g} | {_cell(row['text'])} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Text that stays inside its table cell."""
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("*", "\\*"), ("<", "&lt;"), ("\n", " ⏎ "), ("\r", " ")):
        text = text.replace(old, new)
    return text


def _code(text: str) -> str:
    return "`" + text.replace("`", "´").replace("|", "\\|").replace("\n", "⏎").replace("\r", "␍") + "`"
