"""What edits cost, how few passes trace a number to all latents, and how well that predicts real ablations.

    python benchmarks/bench_intervene.py [--dictionaries artifacts/all_layers/dictionary/*/] [--model smollm2-135m]
        [--n-tokens 120000] [--d-sae 2048] [--rounds 15] [--ways] [--only edit|passes|correlation|ioi]

edit_over_plain: forwards of 16 x 128 tokens with one latent of 4,608 ablated at resid_post.8, over the same forwards
without, taken in turns; beside it, adding a latent, which needs no encoding. The dictionary is an untrained TopK one: a
trained one of the same shape costs the same. edit_drop_over_plain: the same latent with the error dropped, where every
row is encoded and decoded; edit_patch_over_plain: it is what it is in another run; edit_many_over_plain: 256 latents
are ablated; edit_several_over_plain: one latent each of several dictionaries, at every quarter of the layers, at once.

attribution_passes: forwards, each with its backward, that give the effects of all latents and errors of all layers
on the loss of a 64-token text, counted by a hook in the model, beside the peak of memory over what the model and the
dictionaries (untrained, 32 of 2,048 active, at every layer) hold.

ig_exact_correlation: integrated gradients (10 passes for all layers together) against really ablating the 200 largest
nodes, one at a time: mean over the prompts below and over 64-token texts, for dictionaries that were trained (given, or
made here from --n-tokens tokens at every third layer). Ablated is to the mean, as `sememe trace` does it. --ways prints
how other paths do.

ioi_patches_over_pca: how many latents `sememe patch` has to take from the clean run, in the order of attribution, until
the model says what it says with 100 principal components taken, over these 100: of the dictionary that needs fewest.
Of the dictionaries given (or made) those at the hookpoint in the middle are patched. A dictionary that never gets there
counts with all of its candidates, and the row says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from common import finish, interleaved, ratio, row

from sememe import dictionaries, text
from sememe import lm as language_models
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.base import Dictionary
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.edits import Intervention, LatentEdit, editing
from sememe.lm import LanguageModel, ModelConfig
from sememe.patch import PATCHING, PatchConfig, patch
from sememe.text import TextConfig, TokenPolicy, token_blocks
from sememe.trace import (
    Inputs,
    Metric,
    Placed,
    Setting,
    agreement,
    at_places,
    attribute,
    exact_effects,
    inputs_of,
    integrate,
    logit_difference,
    loss,
    of_logits,
    prepare,
)
from sememe.trace.places import Means, means_of

N_NODES, N_TEXT_TOKENS = 200, 64
PAIRS = (
    ("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    ("Then, Anna and Paul had a long talk, and Paul said to", " Anna", " Paul"),
    ("The keys to the old cabinet in the corner", " are", " is"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionaries", type=Path, nargs="*", default=[])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--n-tokens", type=int, default=120_000, help="of training, if no dictionaries are given"
    )
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ways", action="store_true", help="print how other paths do, too")
    parser.add_argument(
        "--ablation",
        choices=("mean", "zero"),
        default="mean",
        help="of the correlation, as `sememe trace` has it",
    )
    parser.add_argument("--only", choices=("edit", "passes", "correlation", "ioi"), default=None)
    options = parser.parse_args()
    figures = []
    if options.only in (None, "edit"):
        figures += edit_figures(options)
    if options.only != "edit":
        lm = language_models.load(ModelConfig(model=options.model, dtype="float32"))
        with tempfile.TemporaryDirectory() as folder:
            figures += traced_figures(options, lm, Path(folder))
    finish("intervene", figures)


def traced_figures(options: argparse.Namespace, lm: LanguageModel, folder: Path) -> list[dict[str, Any]]:
    figures = []
    if options.only in (None, "passes"):
        figures.append(passes_figure(options, lm, some_texts(lm, 1)[0]))
    if options.only in (None, "correlation", "ioi"):
        paths = options.dictionaries or train(options, folder)
        if options.only != "ioi":
            figures.append(correlation_figure(options, lm, paths, some_texts(lm, 3)))
        if options.only != "correlation":
            figures.append(ioi_figure(options, lm, paths, folder))
    return figures


def untrained(lm: LanguageModel, hookpoint: str, d_sae: int, seed: int = 0) -> TopK:
    width = lm.width(hookpoint)
    site = Site(model=lm.name, model_fingerprint=lm.fingerprint, hookpoint=hookpoint, start=0, stop=width)
    dictionary = TopK(
        TopKConfig(k=32, d_sae=d_sae), width, width, d_sae, Sites(inputs=(site,), outputs=(site,))
    )
    generator = torch.Generator().manual_seed(seed)
    dictionary.initialise(*[torch.randn(1024, width, generator=generator)] * 2, generator)
    return dictionary.eval()


def some_texts(lm: LanguageModel, n: int) -> list[Inputs]:
    """Held-out texts of 64 tokens."""
    config = TextConfig()
    text.fetch(config)
    block = next(
        iter(token_blocks(config, lm.tokenizer, TokenPolicy(context_length=N_TEXT_TOKENS), split="heldout"))
    )
    return [
        Inputs(torch.from_numpy(block.ids[i : i + 1]).long(), torch.ones(1, N_TEXT_TOKENS, dtype=torch.bool))
        for i in range(n)
    ]


# -- edits ---------------------------------------------------------------------------------------------


def edit_figures(options: argparse.Namespace) -> list[dict[str, Any]]:
    lm = language_models.load(ModelConfig(model=options.model))
    generator = torch.Generator().manual_seed(0)
    ids, others = (torch.randint(0, lm.vocab_size, (16, 128), generator=generator) for _ in range(2))
    dictionary = untrained(lm, "resid_post.8", 4608)
    layers = range(2, lm.n_layers, max(lm.n_layers // 4, 1))
    several = {f"resid_post.{layer}": untrained(lm, f"resid_post.{layer}", 4608, layer) for layer in layers}
    zero = [LatentEdit(latents=(7,))]
    with torch.inference_mode():
        other = lm.capture(others, "resid_post.8")
        # made before the clock runs: a patch encodes the other run once, however many forwards it serves
        edits: dict[str, list[Intervention]] = {
            "ablate": [Intervention(dictionary, zero)],
            "add": [Intervention(dictionary, [LatentEdit(latents=(7,), how="add", value=1.0)])],
            "drop": [Intervention(dictionary, zero, error="drop")],
            "patch": [Intervention(dictionary, [LatentEdit(latents=(7,), how="patch")], other=other)],
            "many": [Intervention(dictionary, [LatentEdit(latents=tuple(range(256)))])],
            "several": [Intervention(one, zero) for one in several.values()],
        }

    def forward() -> None:
        with torch.inference_mode():
            lm.logits(lm.hidden(ids))

    def edited(name: str) -> None:
        with editing(lm, *edits[name]):
            forward()

    ways = {name: (lambda name=name: edited(name)) for name in edits}
    times = interleaved({"plain": forward, **ways}, options.rounds)
    costs = {name: round(ratio(times, name, "plain"), 4) for name in edits}
    about = {"tokens": ids.numel(), "d_sae": 4608, "dtype": str(lm.dtype)}
    more = {"many": {"latents": 256}, "several": {"hookpoints": list(several)}}
    figures = [row("edit_over_plain", costs["ablate"], "<= 1.1", "ratio", **about, **costs)]
    for name in ("drop", "patch", "many", "several"):
        figures.append(
            row(f"edit_{name}_over_plain", costs[name], "<= 1.1", "ratio", **about, **more.get(name, {}))
        )
    return figures


# -- passes --------------------------------------------------------------------------------------------


def passes_figure(options: argparse.Namespace, lm: LanguageModel, inputs: Inputs) -> dict[str, Any]:
    hookpoints = lm.expand("resid_post.*")
    places = at_places(lm, {name: untrained(lm, name, options.d_sae, i) for i, name in enumerate(hookpoints)})
    metric = loss(lm, inputs)
    lm.hidden(inputs.ids)
    can_reset = reset_peak()
    before = resident("VmRSS")
    began = time.perf_counter()
    found = prepare(lm, places, inputs, metric)
    plain = attribute(found.passes, found.table, found.base)
    seconds = time.perf_counter() - began
    grown = (resident("VmHWM") - before) / 1024 if can_reset else None
    ten = integrate(found.passes, found.table, found.base)
    assert plain.n_forwards == plain.n_backwards
    context = {
        "ig_passes": ten.n_forwards,
        "ig_backwards": ten.n_backwards,
        "layers": len(places),
        "nodes": found.table.n_nodes,
        "seconds": round(seconds, 2),
        "grown_mb": None if grown is None else round(grown, 1),
        "dense_mb_would_be": round(len(places) * N_TEXT_TOKENS * options.d_sae * 4 / 2**20, 1),
    }
    return row("attribution_passes", plain.n_forwards, "<= 4", "passes", **context)


def reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> int:
    """A figure of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


# -- correlation ---------------------------------------------------------------------------------------


def train(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Small dictionaries at every third layer, from a live model."""
    from sememe.train import TrainConfig, train_sweep

    lm = language_models.load(ModelConfig(model=options.model))
    layers = range(2, lm.n_layers, 3)
    sweep = "inputs=" + ",".join(f"resid_post.{layer}" for layer in layers)
    config = TrainConfig.build(
        {
            "live": True,
            "model": {"model": options.model},
            "n_tokens": options.n_tokens,
            "batch_size": 1024,
            "sweep": (sweep,),
            "architecture": {"kind": "topk", "k": 32, "d_sae": options.d_sae},
            "out": folder / "dictionaries",
        }
    )
    train_sweep(config)
    return sorted(path.parent for path in (folder / "dictionaries").glob("*/meta.json"))


def settings_of(
    lm: LanguageModel,
    places: tuple[Placed, ...],
    texts: list[Inputs],
    ablation: Literal["mean", "zero"],
    means: Sequence[Means] | None,
) -> dict[str, Setting]:
    """Numbers to trace: logit differences of prompts; of the likeliest two tokens after texts; a text's loss."""
    metrics: dict[str, tuple[Inputs, Metric]] = {}
    for prompt, answer, wrong in PAIRS:
        inputs = inputs_of(lm, [prompt], bos=places[0].policy.bos)
        metrics[prompt[-24:]] = inputs, logit_difference(lm, inputs, [answer], [wrong])
    for i, inputs in enumerate(texts):
        with torch.no_grad():
            first, second = lm.logits(lm.hidden(inputs.ids)[:, -1:])[0, 0].topk(2).indices.tolist()
        metrics[f"text {i}"] = inputs, of_logits(inputs, lambda z, a=first, b=second: z[:, a] - z[:, b])
    metrics["loss of text 0"] = texts[0], loss(lm, texts[0])
    return {
        name: prepare(lm, places, inputs, metric, ablation=ablation, means=means)
        for name, (inputs, metric) in metrics.items()
    }


def correlation_figure(
    options: argparse.Namespace, lm: LanguageModel, paths: list[Path], texts: list[Inputs]
) -> dict[str, Any]:
    loaded: dict[str, Dictionary] = {str(path): dictionaries.load(path) for path in paths}
    places = at_places(lm, loaded, policies={name: TokenPolicy() for name in loaded})
    found: dict[str, dict[str, float | None]] = {}
    means = means_of(lm, places, TextConfig()) if options.ablation == "mean" else None
    for name, setting in settings_of(lm, places, texts, options.ablation, means).items():
        found[name] = correlations(setting, ways=options.ways)
        print(
            name,
            {way: round(value, 3) for way, value in found[name].items() if value is not None},
            file=sys.stderr,
        )
    ways = list(next(iter(found.values())))
    over_all = {way: mean([one[way] for one in found.values()]) for way in ways}
    for way, value in over_all.items():
        print(f"{way:<24}{value:.4f}", file=sys.stderr)
    own = {name: one["groups"] for name, one in found.items()}
    return row(
        "ig_exact_correlation",
        over_all["groups"],
        ">= 0.9",
        "Pearson's r",
        nodes=N_NODES,
        places=[placed.writes for placed in places],
        smallest=min(v for v in own.values() if v is not None),
        ablation=options.ablation,
        gradient=over_all["gradient"],
        spearman=over_all["groups, ranks"],
        by_prompt=own,
    )


def mean(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there)


def correlations(setting: Setting, *, ways: bool) -> dict[str, float | None]:
    """Of each way's effects with real ablations of its own 200 largest nodes."""
    passes, table, base = setting.passes, setting.table, setting.base
    effects = {
        "gradient": attribute(passes, table, base).effects,
        "groups": integrate(passes, table, base).effects,
    }
    if ways:
        for n_grouped in (128, 512, 1024):
            effects[f"groups, {n_grouped}"] = integrate(passes, table, base, n_grouped=n_grouped).effects
        for n_steps in (4, 7):
            effects[f"groups, {n_steps} passes"] = integrate(passes, table, base, n_steps=n_steps).effects
        for reach in (1.0, 0.25):
            effects[f"layers, reach {reach}"] = integrate(
                passes, table, base, path="layers", n_steps=5, reach=reach
            ).effects
    known: dict[int, float] = {}
    out: dict[str, float | None] = {}
    for way, values in effects.items():
        largest = values.abs().argsort(descending=True, stable=True)[:N_NODES].tolist()
        missing = [node for node in largest if node not in known]
        known |= dict(zip(missing, exact_effects(passes, table, base, missing).tolist(), strict=True))
        found = agreement(values[largest].tolist(), [known[node] for node in largest])
        out[way] = found.correlation
        if way == "groups":
            out["groups, ranks"] = found.spearman
            out["groups, slope"] = found.slope
    return out


# -- patches -------------------------------------------------------------------------------------------


def ioi_figure(
    options: argparse.Namespace, lm: LanguageModel, paths: list[Path], folder: Path
) -> dict[str, Any]:
    by_place: dict[str, list[Path]] = {}
    for path in paths:
        sites = dictionaries.load(path).sites
        assert sites is not None
        by_place.setdefault(" ".join(sites.hookpoints), []).append(path)
    places = sorted(by_place, key=lambda name: lm.written_layer(name.split()[-1]))
    place = places[len(places) // 2]
    config = PatchConfig(
        dictionaries=tuple(by_place[place]),
        model=ModelConfig(model=options.model, dtype="float32"),
        out=folder / "patching",
        orders=("attribution",),
        baselines=("pca",),
    )
    found = json.loads((patch(config, lm=lm).path / PATCHING).read_text(encoding="utf-8"))
    reference = found["reference"]
    arms = {arm["name"]: arm for arm in found["arms"] if arm["is_dictionary"]}
    needed = {name: arm["orders"]["attribution"]["n_needed"] for name, arm in arms.items()}
    counts = {
        name: arm["n_candidates"] if needed[name]["value"] is None else needed[name]["value"]
        for name, arm in arms.items()
    }
    best = min(counts, key=lambda name: counts[name])
    return row(
        "ioi_patches_over_pca",
        counts[best] / reference["n"],
        "<= 0.5",
        "ratio",
        hookpoint=place,
        dictionary=best,
        needed=needed[best],
        kl_of_pca=reference["kl"],
        least_kl=arms[best]["orders"]["attribution"]["least"]["kl"],
        share_right=found["prompts"].get("share_right"),
        n_pairs=found["prompts"]["n"],
    )


if __name__ == "__main__":
    main()
