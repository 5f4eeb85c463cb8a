"""The finding that docs/intervene.md walks through: a latent, the circuit it is in, and what turning it up does.

    sememe run runs/all_layers.toml
    python scripts/finding.py [--dictionaries artifacts/all_layers/dictionary] [--out artifacts/finding]
        [--images docs/images] [--n-tokens 200000]

Which latents make SmolLM2 say "are" after a plural subject? Traced on four pairs of sentences (finding), and held
against eight others (testing) that had no part in the choice. Prints the page's tables as Markdown, writes them to
OUT/finding.md and finding.json, and draws finding_effects.svg and finding_steering.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from sememe import dictionaries
from sememe import lm as language_models
from sememe.atlas import labels, open_atlas
from sememe.dictionaries.base import Dictionary
from sememe.downstream import prompt_ids
from sememe.edits import Intervention, LatentEdit
from sememe.explain import ExplainConfig, explain
from sememe.figures.plots import STYLE, svg
from sememe.graph import Graph, GraphNode, read_graph
from sememe.interpret import InterpretConfig, interpret
from sememe.lm import LanguageModel, ModelConfig
from sememe.steer import SteerConfig, steer
from sememe.trace import TraceConfig, trace

FINDING = (
    ("The {} to the old cabinet in the corner", "key"),
    ("The {} on the small table by the window", "book"),
    ("The {} near the big house on the hill", "car"),
    ("The {} behind the long fence in the garden", "dog"),
)
"""Sentences that latents are chosen on; a singular subject, which gets an s in the plural."""
TESTING = (
    ("The {} in front of the white church", "tree"),
    ("The {} from the other side of town", "student"),
    ("The {} under the wooden bridge", "boat"),
    ("The {} with the red hat", "friend"),
    ("The {} beside the narrow road", "house"),
    ("The {} above the dark forest", "bird"),
    ("The {} of the famous writer", "letter"),
    ("The {} next to the main door", "picture"),
)
ANSWER, WRONG = " are", " is"
DOSES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
N_RANDOM, N_OTHERS, N_BOOTSTRAP = 5, 20, 2000


class Found(NamedTuple):
    """The latent of the finding, and its dictionary."""

    node: GraphNode
    name: str
    dictionary: Dictionary
    bos: bool
    """Whether prompts begin with a BOS token, as the dictionary's text did."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionaries", type=Path, default=Path("artifacts/all_layers/dictionary"))
    parser.add_argument("--out", type=Path, default=Path("artifacts/finding"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--n-tokens", type=int, default=200_000, help="of the atlas")
    options = parser.parse_args()
    folders = sorted(
        (meta.parent for meta in options.dictionaries.glob("*/meta.json")),
        key=lambda folder: place_of(folder).rsplit(".", 1)[-1].zfill(3),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    lm = language_models.load(ModelConfig(dtype="float32"))

    graph = traced(folders, options.out / "trace")
    found = chosen(graph, folders)
    page = [f"The latent: {found.name} {found.node.latent}", ""]
    page += about(found, folders, options.out, options.n_tokens)
    page += circuit(graph, found)
    effects = ablations(found, lm)
    page += effects.pop("page")
    doses = dose_response(found, lm)
    page += doses.pop("page")
    facts = {"latent": found.node.latent, "place": found.name, "ablations": effects, "doses": doses}
    (options.out / "finding.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (options.out / "finding.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page), flush=True)
    options.images.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in (("effects", effects_plot(graph)), ("steering", steering_plot(doses))):
            path = options.images / f"finding_{name}.svg"
            path.write_text(svg(figure, f"finding-{name}"), encoding="utf-8")
            print(path)
    written(found, folders, options.out)
    print(options.out / "steering" / "steering.md")


# -- from the number to latents ----------------------------------------------------------------------------


def plural(sentence: str, noun: str) -> str:
    return sentence.format(noun + "s")


def traced(folders: Sequence[Path], out: Path) -> Graph:
    """The difference between the answers' logits, traced back: what latents are when the subject is plural."""
    made = trace(
        TraceConfig(
            dictionaries=tuple(folders),
            prompts=tuple(plural(*one) for one in FINDING),
            patched=tuple(sentence.format(noun) for sentence, noun in FINDING),
            answers=(ANSWER,),
            wrong=(WRONG,),
            ablation="patch",
            out=out,
        )
    )
    return read_graph(made.path)


def chosen(graph: Graph, folders: Sequence[Path]) -> Found:
    """Of the latents at the subject that really make at least half as much as the strongest, the deepest."""
    at = subject(graph)
    latents = [n for n in graph.nodes if n.kind == "latent" and n.exact is not None and n.position == at]
    strongest = min(node.exact or 0.0 for node in latents)
    node = max((node for node in latents if (node.exact or 0.0) <= strongest / 2), key=lambda one: one.layer)
    number = node.dictionary or 0
    ref = graph.dictionaries[number]
    return Found(node, ref.hookpoints[-1], dictionaries.load(folders[number]).eval(), at == 2)


def subject(graph: Graph) -> int:
    """The position of the noun: 1, or 2 after a BOS."""
    return next(i for i, token in enumerate(graph.tokens) if token.strip() in ("keys", "key"))


def about(found: Found, folders: Sequence[Path], out: Path, n_tokens: int) -> list[str]:
    """What the latent is, seen from its activations on text."""
    folder = next(one for one in folders if place_of(one) == found.name)
    made = interpret(InterpretConfig(dictionaries=(folder,), n_tokens=n_tokens, out=out / "atlas"))
    path = made.artifact.path
    made.close()
    explain(ExplainConfig(atlas=path, out=out / "explanations"))
    latent = found.node.latent or 0
    with contextlib.closing(open_atlas(path)) as atlas:
        (facts,) = atlas.query("SELECT density, max_act FROM latents WHERE id = ?", latent)
        tokens = atlas.query(
            "SELECT text FROM top_tokens JOIN tokens ON id = token WHERE latent = ? ORDER BY rank LIMIT 12",
            latent,
        )
    label = labels(out / "explanations").get(latent, "none")
    return [
        f"It fires on {facts['density']:.2%} of tokens, at most {facts['max_act']:.3g}. Its rule: {label}.",
        f"Tokens it fires on most often: {json.dumps([one['text'] for one in tokens], ensure_ascii=False)}",
        "",
    ]


def place_of(folder: Path) -> str:
    sites = dictionaries.load(folder).sites
    assert sites is not None
    return sites.inputs[0].hookpoint


def circuit(graph: Graph, found: Found) -> list[str]:
    """What the latent gets and gives, and how much of the number the largest nodes make together."""
    nodes = {node.id: node for node in graph.nodes}
    page = ["| edge | other node | token | weight |", "|---|---|---|---:|"]
    for title, mine, other in (("from", "target", "source"), ("to", "source", "target")):
        edges = [edge for edge in graph.edges if getattr(edge, mine) == found.node.id]
        for edge in sorted(edges, key=lambda one: -abs(one.weight))[:6]:
            node = nodes[getattr(edge, other)]
            token = graph.tokens[node.position].strip()
            page.append(f"| {title} | {node.id} {node.kind} | {token} | {edge.weight:+.3f} |")
    curves = graph.scores.get("curves") or {}
    page += [
        "",
        json.dumps({k: v for k, v in curves.items() if isinstance(v, list)}),
        json.dumps(dict(graph.checks)),
        "",
    ]
    return page


# -- what the latent does, on sentences that had no part in choosing it --------------------------------------


class Case(NamedTuple):
    """A sentence's tokens, and where its subject is."""

    ids: Tensor
    subject: int


def cases(lm: LanguageModel, found: Found, are_plural: bool, pairs: Sequence[tuple[str, str]]) -> list[Case]:
    texts = [plural(sentence, noun) if are_plural else sentence.format(noun) for sentence, noun in pairs]
    return [Case(prompt_ids(lm, text, found.bos), found.node.position) for text in texts]


def difference(lm: LanguageModel, case: Case) -> float:
    """logit(are) - logit(is) at the end."""
    with torch.inference_mode():
        logits = lm.logits(lm.hidden(case.ids)[:, -1:])[0, 0].float()
    are, is_ = (lm.tokenizer.encode(token, add_special_tokens=False)[0] for token in (ANSWER, WRONG))
    return float(logits[are] - logits[is_])


def ablations(found: Found, lm: LanguageModel) -> dict[str, Any]:
    """The latent taken out at the subject, beside each of the other latents that are active there."""
    latent, sums = found.node.latent or 0, []
    others: list[float] = []
    generator = torch.Generator().manual_seed(0)
    for case in cases(lm, found, True, TESTING):
        plain = difference(lm, case)
        acts = found.dictionary.encode(lm.capture(case.ids, (found.name,))[found.name][0].float())
        active = acts.select_rows(at(case, len(case.ids[0]))).compact()
        rest = [int(i) for i, act in zip(active.indices, active.acts, strict=True) if act > 0 and i != latent]
        drawn = torch.randperm(len(rest), generator=generator)[:N_OTHERS].tolist()
        with Intervention(found.dictionary, [LatentEdit(latents=(latent,))], positions=[case.subject]).on(lm):
            sums.append(difference(lm, case) - plain)
        for i in drawn:
            edit = LatentEdit(latents=(rest[i],))
            with Intervention(found.dictionary, [edit], positions=[case.subject]).on(lm):
                others.append(difference(lm, case) - plain)
    own, null = interval(sums), interval(others)
    page = [
        "| taken out at the subject | change of logit(are) - logit(is), 95% interval |",
        "|---|---:|",
        f"| the latent | {own} |",
        f"| one of {len(others)} other active latents | {null} |",
        "",
    ]
    return {"own": sums, "others": others, "page": page}


def at(case: Case, n: int) -> Tensor:
    return torch.arange(n) == case.subject


def interval(values: Sequence[float]) -> str:
    """Mean, and a 95% interval by drawing values again."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (N_BOOTSTRAP, len(values))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{np.mean(values):+.2f} ({low:+.2f} to {high:+.2f})"


def dose_response(found: Found, lm: LanguageModel) -> dict[str, Any]:
    """Singular sentences, and the latent added at their subject, beside other directions of the same length."""
    latent, name = found.node.latent or 0, found.name
    own = found.dictionary.decoder_directions()[latent].detach().float() * found.node.act
    means = [
        torch.stack([lm.capture(case.ids, (name,))[name][0, case.subject].float() for case in made]).mean(0)
        for made in (cases(lm, found, True, FINDING), cases(lm, found, False, FINDING))
    ]
    generator = torch.Generator().manual_seed(0)
    arms = {"the latent": own, "difference in means": means[0] - means[1]}
    arms |= {
        f"random direction {i}": torch.randn(own.shape, generator=generator) for i in range(1, N_RANDOM + 1)
    }
    singular, curves = cases(lm, found, False, TESTING), {}
    for arm, direction in arms.items():
        v = direction / direction.norm() * own.norm()
        curves[arm] = [[pushed(lm, case, name, dose * v) for case in singular] for dose in DOSES]
    plurals = [difference(lm, case) for case in cases(lm, found, True, TESTING)]
    page = ["| dose | " + " | ".join(arms) + " |", "|---:|" + "---:|" * len(arms)]
    page += [
        f"| {dose:g} | " + " | ".join(f"{np.mean(curves[arm][i]):+.2f}" for arm in arms) + " |"
        for i, dose in enumerate(DOSES)
    ]
    page += [
        "",
        f"With a plural subject, nothing pushed: {interval(plurals)}. The latent at dose 1: "
        f"{interval(curves['the latent'][DOSES.index(1.0)])}.",
        "",
    ]
    return {"doses": DOSES, "curves": curves, "plural": plurals, "page": page}


def pushed(lm: LanguageModel, case: Case, name: str, v: Float[Tensor, " d"]) -> float:
    def push(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, case.subject] += v.to(x)
        return x

    with lm.edit({name: push}):
        return difference(lm, case)


def written(found: Found, folders: Sequence[Path], out: Path) -> None:
    """What the model writes on with the latent turned up everywhere, dose by dose."""
    folder = next(one for one in folders if place_of(one) == found.name)
    steer(
        SteerConfig(
            dictionary=folder,
            latents=(found.node.latent or 0,),
            strengths=(0.0, 0.5, 1.0, 2.0),
            prompts=tuple(sentence.format(noun) for sentence, noun in TESTING),
            words=("are", "were", "have", "they", "their"),
            target_tokens=(ANSWER,),
            new_tokens=12,
            n_samples=2,
            n_random=1,
            out=out / "steering",
        )
    )


# -- pictures ------------------------------------------------------------------------------------------------


def effects_plot(graph: Graph, n: int = 12) -> Figure:
    """The nodes that were really put to their counterpart's activation: predicted and real."""
    nodes = [node for node in graph.nodes if node.kind in ("latent", "error") and node.exact is not None][:n]
    figure = Figure(figsize=(7, 0.32 * len(nodes) + 1.1), layout="constrained")
    axes = figure.subplots()
    y = np.arange(len(nodes))[::-1]
    axes.barh(y + 0.18, [node.effect for node in nodes], 0.34, label="predicted", color="#8c959f")
    axes.barh(y - 0.18, [node.exact or 0.0 for node in nodes], 0.34, label="real", color="#1f6feb")
    names = [
        f"layer {node.layer}, {node.latent or 'error'}, “{graph.tokens[node.position].strip()}”"
        for node in nodes
    ]
    axes.set_yticks(y, names)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of logit(are) - logit(is) when set to its value under a singular subject")
    axes.legend(frameon=False)
    return figure


def steering_plot(doses: dict[str, Any]) -> Figure:
    """Dose and response on the sentences that had no part in the choice."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm, values in doses["curves"].items():
        random = arm.startswith("random")
        colour = "#8c959f" if random else "#1f6feb" if arm == "the latent" else "#d1730b"
        named = {
            "random direction 1": "random directions",
            "difference in means": "difference in means, as long",
        }
        label = named.get(arm, None if random else arm)
        axes.plot(
            doses["doses"],
            np.mean(values, axis=1),
            color=colour,
            marker="." if random else "o",
            label=label,
            linewidth=1 if random else 2,
        )
    axes.axhline(
        float(np.mean(doses["plural"])),
        color="#1a7f37",
        linestyle="--",
        label="a plural subject, nothing pushed",
    )
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("dose at a singular subject (1: what the latent had at a plural one)")
    axes.set_ylabel("logit(are) - logit(is)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    main()
