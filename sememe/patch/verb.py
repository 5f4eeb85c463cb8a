"""Opens dictionaries, patches them and the baselines in every order, and writes numbers, plots and a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from sememe import artifact, figures, measure
from sememe import lm as language_models
from sememe.config import sha256_of
from sememe.dictionaries.base import Sites
from sememe.dictionaries.folders import Opened, open_all
from sememe.edits import check
from sememe.errors import ConfigError, MismatchError, TextError
from sememe.frontier import interval
from sememe.lm import LanguageModel
from sememe.measure.checks import check_model, check_store, describe, policy_of, sites_of
from sememe.metrics.sums import drawn
from sememe.pairs import Pair, ioi_pairs, read_pairs
from sememe.patch.arms import Arm, baseline, of_dictionary
from sememe.patch.config import BASELINES, FITTED, Baseline, PatchConfig
from sememe.patch.orders import Curve, Point, acdc, along, attribution, sizes, thresholds
from sememe.patch.runs import Runs
from sememe.progress import Progress, track
from sememe.store import Store, open_store
from sememe.text import TokenPolicy, attributions, fetch, fingerprint

__all__ = ["PATCHING", "patch"]

VERSION = 1
PATCHING = "patch.json"
N_NAMED = 50
"""First latents of an order that are written down."""
LEAST_RIGHT = 0.75
"""Share of prompts below which the page says that the model does not do what it is asked."""

Draws = Float64[np.ndarray, " draws"]


def patch(config: PatchConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> artifact.Artifact:
    """Patch latents from one run into another, or open what was found if it is there.

    Args:
        config: Which dictionaries, on which prompts.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.
    Returns:
        The folder, with patch.json, patch.md, patch.html and two plots.
    Raises:
        ConfigError: too few names are single tokens of the tokenizer, prompts of a pair are of different length, or an
            option has no effect.
        MismatchError: a dictionary belongs to another model or hookpoint; or something else stands at config.out.
        TextError: the file of pairs cannot be read, or the text to fit baselines to is too short.
        ActivationError: activations or predictions are NaN or infinite.
    """
    opened = open_all(config.dictionaries)
    baselines = _baselines(config, opened)
    model_print = lm.fingerprint if lm is not None else language_models.fingerprint_of(config.model)
    for one in opened.values():
        check_model(sites_of(one.dictionary, one.saved.path), model_print)
    parents = {f"dictionary: {name}": one.saved.fingerprint for name, one in opened.items()}
    parents["model"] = model_print
    if config.pairs is not None:
        parents["pairs"] = sha256_of(_bytes_of(config))
    store = _sources(config, opened, baselines, parents)
    identity = artifact.identity_of("patching", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "patching", identity, config, parents)):
        return done
    lm = lm if lm is not None else language_models.load(config.model)
    for one in opened.values():
        check(one.dictionary.to(lm.device), lm)
    with artifact.building(
        config.out, kind="patching", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        data = _measured(config, lm, opened, baselines, store)
        artifact.write_json(work.path / PATCHING, data)
        figures.write_patching(work.path, data)
        work.extra = {"dictionaries": list(opened)}
    return artifact.load(config.out, "patching")


# -- what belongs together -----------------------------------------------------------------------------------------


def _baselines(config: PatchConfig, opened: dict[str, Opened]) -> tuple[Baseline, ...]:
    """Those that are measured; checks that all dictionaries are of one place."""
    places = {}
    for name, one in opened.items():
        sites = sites_of(one.dictionary, one.saved.path)
        places[name] = tuple(tuple(site.hookpoint for site in side) for side in (sites.inputs, sites.outputs))
    first = next(iter(places))
    for name, place in places.items():
        if place != places[first]:
            raise MismatchError(
                f"the dictionaries must be of one hookpoint, {_words(places[first])} like {first}",
                f"{_words(place)} of {name}",
                "Leave it out, or patch it in a run of its own.",
            )
    inputs, outputs = places[first]
    if config.baselines is None:
        return BASELINES if inputs == outputs else ()
    if config.baselines and inputs != outputs:
        raise ConfigError(
            "baselines are of dictionaries that reconstruct what they read",
            f"dictionaries from {_words(places[first])}",
            "Leave --baselines out.",
        )
    return config.baselines


def _words(place: tuple[tuple[str, ...], ...]) -> str:
    inputs, outputs = (" + ".join(side) for side in place)
    return inputs if inputs == outputs else f"{inputs} to {outputs}"


def _bytes_of(config: PatchConfig) -> str:
    assert config.pairs is not None
    try:
        return config.pairs.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            "pairs must be a file of JSON lines", f"{config.pairs}: {error}", "Name a .jsonl file."
        ) from None


def _sources(
    config: PatchConfig, opened: dict[str, Opened], baselines: Sequence[Baseline], parents: dict[str, str]
) -> Store | None:
    """What baselines are fitted to, among the parents; the store, if it is one."""
    if not FITTED & set(baselines):
        return None
    if config.store is None:
        fetch(config.text)
        parents["text"] = fingerprint(config.text)
        return None
    store = open_store(config.store)
    first = next(iter(opened.values()))
    check_store(store, first.saved, sites_of(first.dictionary, first.saved.path))
    parents["store"] = store.fingerprint
    return store


# -- measuring -----------------------------------------------------------------------------------------------------


def _measured(
    config: PatchConfig,
    lm: LanguageModel,
    opened: dict[str, Opened],
    baselines: Sequence[Baseline],
    store: Store | None,
) -> dict[str, Any]:
    first = next(iter(opened.values()))
    policy = policy_of(None, first.saved, store)
    pairs = _pairs(config, lm, bos=policy.bos)
    sites = sites_of(first.dictionary, first.saved.path)
    runs = Runs(lm, pairs, sites, restore=config.direction == "restore", batch_rows=config.batch_rows)
    fits = bool(FITTED & set(baselines))
    material = _material(config, lm, sites, policy, store, baselines) if fits else None
    found: list[tuple[Arm, dict[str, Curve]]] = []
    with track("patch", len(opened) + len(baselines), "arms") as progress:
        for name, one in opened.items():
            arm = of_dictionary(name, one.dictionary, runs, describe(one.saved, one.dictionary, sites))
            found.append((arm, _curves(config, arm, runs, progress)))
            progress.advance()
        l0 = found[0][0].about["l0"]
        for name in baselines:
            arm = baseline(name, runs, first.dictionary, l0, material, config.seed)
            found.append((arm, _curves(config, arm, runs, progress)))
            progress.advance()
    target, reference = _reference(config, found)
    return {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "hookpoints": list(sites.hookpoints),
        "direction": config.direction,
        "corruption": None if config.pairs is not None else config.corruption,
        "attribution": config.attribution,
        "attribution_steps": config.attribution_steps,
        "prompts": _about_pairs(runs),
        "reference": reference,
        "arms": [
            {
                "name": arm.name,
                "is_dictionary": arm.is_dictionary,
                "about": arm.about,
                "n_latents": arm.n_latents,
                "n_candidates": len(arm.latents),
                "orders": {order: _described(config, curve, target) for order, curve in curves.items()},
            }
            for arm, curves in found
        ],
        "attributions": [a._asdict() for a in attributions(config.text)] if fits and store is None else [],
    }


def _material(
    config: PatchConfig,
    lm: LanguageModel,
    sites: Sites,
    policy: TokenPolicy,
    store: Store | None,
    baselines: Sequence[Baseline],
) -> measure.Material:
    """The rows that baselines are fitted to."""
    options = measure.MeasureConfig(
        out=config.out,
        model=config.model,
        text=config.text,
        n_fit_rows=config.n_fit_rows,
        nulls=("ica",) if "ica" in baselines else ("pca",),
        seed=config.seed,
    )
    return measure.fit(options, lm, sites, policy, store)


def _pairs(config: PatchConfig, lm: LanguageModel, *, bos: bool) -> list[Pair]:
    if config.pairs is not None:
        pairs = read_pairs(config.pairs, lm.tokenizer, bos=bos)
    else:
        pairs = ioi_pairs(
            lm.tokenizer, config.n_pairs, corruption=config.corruption, names=config.names, bos=bos, seed=config.seed
        )  # fmt: skip
    asks = {"attribution", "acdc"} & set(config.orders) and config.attribution == "logit_difference"
    if asks and all(pair.answer is None or pair.wrong is None for pair in pairs):
        raise ConfigError(
            "an attribution of the logit difference must know what is right and what is wrong",
            "pairs without answer and wrong",
            "Add them to the pairs, or pass --attribution kl.",
        )
    return pairs


def _curves(config: PatchConfig, arm: Arm, runs: Runs, progress: Progress) -> dict[str, Curve]:
    """The arm in each of the orders asked for."""
    m = len(arm.latents)
    found: dict[str, Curve] = {}
    ranked: list[int] = []
    spent = 0, 0
    if {"attribution", "acdc"} & set(config.orders):
        before = runs.n_forwards, runs.n_backwards
        ranked = (
            attribution(arm, runs, config.attribution, config.attribution_steps).argsort(stable=True).tolist()
        )
        spent = runs.n_forwards - before[0], runs.n_backwards - before[1]
    for order in config.orders:
        progress.note = f"{arm.name}, {order}"
        if order == "acdc":
            found[order] = _by_acdc(config, arm, runs, ranked[: config.acdc_limit], spent)
            continue
        chosen = ranked
        if order == "random":
            generator = torch.Generator().manual_seed(config.seed)
            chosen = torch.randperm(m, generator=generator).tolist()
        points = list(along(arm, runs, chosen, sizes(m, config.reference)))
        cost = spent if order == "attribution" else (0, 0)
        found[order] = Curve(points, m, *cost, [arm.latents[i] for i in chosen[:N_NAMED]])
    return found


def _by_acdc(config: PatchConfig, arm: Arm, runs: Runs, start: list[int], spent: tuple[int, int]) -> Curve:
    before = runs.n_forwards

    def kl(chosen: Sequence[int]) -> float:
        return float(runs.measure(arm.moves(chosen)).kl.mean())

    kept = list(acdc(kl, start, thresholds(config.n_thresholds), config.seed))
    n_forwards = spent[0] + runs.n_forwards - before
    different = {
        one.chosen: one.threshold for one in reversed(kept)
    }  # the smallest threshold that leaves a set
    different.setdefault(tuple(sorted(start)), 0.0)
    different.setdefault((), math.inf)
    points = [
        Point(len(chosen), runs.measure(arm.moves(chosen)), threshold if math.isfinite(threshold) else None)
        for chosen, threshold in sorted(different.items(), key=lambda item: len(item[0]))
    ]
    last = next((one.chosen for one in reversed(kept) if one.chosen), ())
    return Curve(points, len(start), n_forwards, spent[1], [arm.latents[i] for i in last[:N_NAMED]])


# -- numbers -------------------------------------------------------------------------------------------------------


def _drawn(config: PatchConfig, points: Sequence[Point]) -> dict[str, Float64[np.ndarray, "draws points"]]:
    """Means over all pairs, and over each draw of them; draws are the same for every arm."""
    values = {
        name: np.stack([getattr(point.measured, name).double().numpy() for point in points], axis=1)
        for name in ("kl", "edit", "logit_difference")
    }
    known = np.isfinite(values["logit_difference"])
    values["logit_difference"] = np.where(known, values["logit_difference"], 0.0)
    n_pairs = values["kl"].shape[0]
    sums = {**values, "n": np.ones(n_pairs), "known": known.astype(np.float64)}
    return drawn(
        sums,
        {
            "kl": lambda t: t["kl"] / t["n"][:, None],
            "edit": lambda t: t["edit"] / t["n"][:, None],
            "logit_difference": lambda t: t["logit_difference"] / t["known"],
        },
        n=config.n_bootstrap,
        seed=config.seed,
        n_units=n_pairs,
    )


def _reference(
    config: PatchConfig, found: Sequence[tuple[Arm, dict[str, Curve]]]
) -> tuple[Draws | None, dict[str, Any] | None]:
    """The divergence that all arms have to reach: that of PCA with so many directions, by attribution."""
    own = next((curves for arm, curves in found if arm.name == "pca" and not arm.is_dictionary), {})
    if "attribution" not in own:
        return None, None
    counts = [point.n for point in own["attribution"].points]
    n = min(config.reference, counts[-1])
    kl = _drawn(config, own["attribution"].points)["kl"][:, counts.index(n)]
    return kl, {"arm": "pca", "order": "attribution", "n": n, "kl": _statistic(kl)}


def needed(
    counts: list[int],
    kl: Float64[np.ndarray, "draws points"],
    edit: Float64[np.ndarray, "draws points"],
    target: Draws,
) -> tuple[Draws, Draws]:
    """How many patches, and how large an edit, bring the divergence down to a target; infinite where nothing does.

    Between two numbers of patches that were tried it is interpolated in a straight line.
    """
    n_needed, edit_needed = (np.full(kl.shape[0], math.inf) for _ in range(2))
    for row in range(kl.shape[0]):
        reached = np.flatnonzero(kl[row] <= target[row] + 1e-12)
        if not reached.size:
            continue
        at = int(reached[0])
        before = max(at - 1, 0)
        fall = kl[row, before] - kl[row, at]
        share = (
            float((target[row] - kl[row, at]) / fall) if fall > 0 else 0.0
        )  # of the way back to the one before
        n_needed[row] = counts[at] - share * (counts[at] - counts[before])
        edit_needed[row] = edit[row, at] - share * (edit[row, at] - edit[row, before])
    return n_needed, edit_needed


def _described(config: PatchConfig, curve: Curve, target: Draws | None) -> dict[str, Any]:
    draws, counts = _drawn(config, curve.points), [point.n for point in curve.points]
    points = []
    for column, point in enumerate(curve.points):
        points.append(
            {
                "n": point.n,
                "threshold": point.threshold,
                **{name: _statistic(draws[name][:, column]) for name in ("kl", "edit", "logit_difference")},
            }
        )
    least = int(draws["kl"][0].argmin())
    out: dict[str, Any] = {
        "n_candidates": curve.n_candidates,
        "n_forwards": curve.n_forwards,
        "n_backwards": curve.n_backwards,
        "first": curve.first,
        "points": points,
        "least": points[least],
    }
    if target is not None:
        found = needed(counts, draws["kl"], draws["edit"], target)
        out |= {
            name: _statistic(values) for name, values in zip(("n_needed", "edit_needed"), found, strict=True)
        }
    return out


def _statistic(draws: Draws) -> dict[str, Any]:
    value = float(draws[0])
    out: dict[str, Any] = {"value": value if math.isfinite(value) else None}
    low, high = interval(draws)
    out |= {name: end if math.isfinite(end) else None for name, end in (("low", low), ("high", high))}
    if math.isinf(value):
        out["cause"] = "never reached"
    elif np.isinf(draws).any():
        out["cause"] = f"not reached in {np.isinf(draws).mean():.0%} of the draws"
    return out


def _about_pairs(runs: Runs) -> dict[str, Any]:
    lengths = [len(pair.clean) for pair in runs.pairs]
    known = runs.known
    told: dict[str, Any] = {
        "n": len(runs.pairs),
        "n_known": int(known.sum()),
        "least_tokens": min(lengths),
        "most_tokens": max(lengths),
        "n_lengths": len(set(lengths)),
        "examples": [list(pair.texts) for pair in runs.pairs[:3]],
    }
    if bool(known.any()):
        told["share_right"] = float(runs.right[known].double().mean())
        told["does_it"] = told["share_right"] >= LEAST_RIGHT
        for name, values in zip(("clean", "corrupted"), runs.base, strict=True):
            told[f"logit_difference_{name}"] = float(values[known].double().mean())
    return told
