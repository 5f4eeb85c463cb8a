"""The verb that measures a dictionary on held-out documents, beside ablations and nulls.

Opens what it needs, checks that it belongs together, measures, and writes the report; the pass is `measure/`, the
numbers are `metrics/`, the pages are `figures/`. One pass: per batch one unedited forward, and per arm only the
layers above the hookpoint.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sememe import artifact, dictionaries, figures, metrics, text
from sememe import lm as language_models
from sememe.dictionaries.base import Dictionary, Sites
from sememe.dictionaries.part import Part
from sememe.errors import ConfigError
from sememe.figures import Report
from sememe.foreign import opens
from sememe.lm import LanguageModel
from sememe.measure import (
    NULLS,
    Arms,
    MeasureConfig,
    Measured,
    check_documents,
    check_twins,
    fit,
    make_null,
    open_twins,
    run,
    twin_groups,
)
from sememe.measure.checks import (
    check_model,
    check_nulls,
    check_parts,
    check_same_place,
    check_store,
    check_text,
    describe,
    models_of,
    open_models,
    policy_of,
    sites_of,
    splicer_for,
)
from sememe.splice import SeveralModels
from sememe.store import Store, open_store
from sememe.text import TokenPolicy

__all__ = ["NULLS", "EvaluateConfig", "evaluate", "powers_below"]

VERSION = 9


class EvaluateConfig(MeasureConfig):
    """Which dictionary, on what, against what."""

    not_identity: ClassVar[frozenset[str]] = MeasureConfig.not_identity | {"dictionary", "matched_in"}

    _opens = opens("dictionary", "matched_in")

    dictionary: Path
    """The dictionary to measure."""
    out: Path = Path("artifacts/report")
    """The folder to make."""
    leave_out_above: tuple[float, ...] = ()
    """Measure the dictionary, too, without its latents of more than this density; dense latents flatter it."""
    top_latents: tuple[int, ...] = ()
    """Measure, too, so many of its latents of largest density alone, and the rest of them alone."""
    matched_in: Path | None = None
    """Another dictionary: measure, too, the latents whose directions it has alone, and the rest of them alone."""
    matched_above: float = Field(default=0.9, gt=0, le=1)
    """Cosine from which a direction counts as there."""
    within: float | None = Field(default=None, gt=0)
    """Find how few latents keep the perplexity within this share of the unedited model's: two arms per power of 2, the
    latents that write most and as many drawn at random."""

    @model_validator(mode="after")
    def _matched_above_has_an_effect(self) -> Self:
        if self.matched_in is None and self.matched_above != type(self).model_fields["matched_above"].default:
            raise ConfigError(
                "matched_above must be left out without matched_in: it has no effect then",
                self.matched_above,
                "Drop it, or pass --matched-in.",
            )
        return self

    @field_validator("leave_out_above")
    @classmethod
    def _densities(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for density in value:
            if not 0 < density < 1:
                raise ConfigError("leave_out_above must be densities in (0, 1)", f"{density:g}", "Change it.")
        return value

    @field_validator("top_latents")
    @classmethod
    def _numbers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for n in value:
            if n < 1:
                raise ConfigError("top_latents must be at least 1", n, "Raise it.")
        return value


def evaluate(config: EvaluateConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> Report:
    """Measure a dictionary and write a report, or open it if it is there.

    Args:
        config: Which dictionary, on what, against what.
        lm: The model, if it is loaded already; else it is loaded from config.model. Those of a dictionary of several
            models are loaded by the names that it knows them by.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: a null is unknown, or cannot be made for this dictionary.
        MismatchError: dictionary, store, model and policy do not belong together; or another report stands at
            config.out.
        TextError: the held-out text is shorter than one context, or too few documents for intervals.
        ActivationError: an activation is NaN or infinite; the error says in which document.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    dictionary = dictionaries.load(config.dictionary)
    sites = sites_of(dictionary, config.dictionary, several=True)
    several = len(models_of(sites)) > 1
    check_nulls(config.nulls, sites)
    check_parts(config.top_latents, dictionary.d_sae)
    if several and config.store is not None:
        raise ConfigError(
            "store must be left out for a dictionary of several models, which was trained on several stores",
            config.store,
            "Drop it: activations of the training documents are then computed anew.",
        )
    store = None if config.store is None else open_store(config.store)
    policy = policy_of(config.policy, saved, store)
    if store is not None:
        check_store(store, saved, sites)
    notices = check_text(saved, store, config.text)
    twins = open_twins(config)
    notices += check_twins(config, twins, policy, [sites])
    if several:
        parents = {f"model.{number}": fingerprint for number, fingerprint in enumerate(models_of(sites))}
    else:
        parents = {"model": lm.fingerprint if lm else language_models.fingerprint_of(config.model)}
        check_model(sites, parents["model"])
    text.fetch(config.text)
    parents |= {"dictionary": saved.fingerprint, "text": text.fingerprint(config.text)}
    if store is not None:
        parents["store"] = store.fingerprint
    parents |= {name: twin.saved.fingerprint for name, twin in twins.items()}
    other = None
    if config.matched_in is not None:
        parents["matched_in"] = artifact.load(config.matched_in, "dictionary").fingerprint
        other = dictionaries.load(config.matched_in)
        check_same_place(dictionary, other, config.matched_in)
    identity = artifact.identity_of("report", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "report", identity):
        return figures.open_report(config.out)
    running = open_models(config.model, sites) if several else lm or language_models.load(config.model)
    splicer = splicer_for(running, sites)
    check_documents(config, running, policy)
    with artifact.building(
        config.out, kind="report", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        since = time.monotonic()
        measured = Measured(config, running, splicer, sites, policy)
        arms, null_configs = make_arms(
            config, running, dictionary.to(running.device), sites, policy, store, other
        )
        beside = twin_groups(config, twins, policy)
        stopped = run(config, {"dictionary": (measured, arms), **beside}, since)
        null_configs |= {
            name: describe(twin.saved, twin.dictionary, twin.sites)["config"]
            | {"d_sae": twin.dictionary.d_sae}
            for name, twin in twins.items()
        }
        data = measured.report(arms, {name: one for name, (one, _) in beside.items()}) | {
            "dictionary": describe(saved, dictionary, sites),
            "null_configs": null_configs,
            "text": measured.describe_text(parents["text"]),
            "store": None if store is None else {"path": str(config.store), "fingerprint": store.fingerprint},
            "notices": [
                *notices,
                *measured.cheats("dictionary", dictionary),
            ],
            "stopped": stopped,
            **_smallest_within(config, measured, arms),
            "training": figures.read_curves(saved),
            "watched": figures.read_watched(saved),
            "attributions": [a._asdict() for a in text.attributions(config.text)],
        }
        artifact.write_json(work.path / figures.REPORT, data)
        drawn = {name: measured.drawn(name) for name in arms.dictionaries}
        drawn |= {name: one.drawn(name) for name, (one, _) in beside.items()}
        figures.write_draws(work.path, drawn)
        figures.write_pages(work.path, {saved.path.name: data})
        work.extra = {
            name: data["metrics"][name]["value"] for name in figures.HEADLINE if name in data["metrics"]
        }
    return figures.open_report(config.out)


def make_arms(
    config: EvaluateConfig,
    lm: LanguageModel | SeveralModels,
    dictionary: Dictionary,
    sites: Sites,
    policy: TokenPolicy,
    store: Store | None,
    other: Dictionary | None = None,
) -> tuple[Arms, dict[str, Any]]:
    """The dictionary, parts of it and its nulls at its l0, and the mean of the training rows."""
    fitted = fit(config, lm, sites, policy, store)
    found = fitted.sparsity_of(dictionary)
    k = max(1, round(found.compute()["l0"].value))
    nulls: dict[str, Dictionary] = {}
    configs: dict[str, Any] = {}
    for name in config.nulls:
        nulls[name], configs[name] = make_null(name, k, dictionary.d_sae, config.seed, sites, fitted)
    parts = _parts(config, dictionary, found.density())
    if other is not None:
        theirs = other.decoder_directions().to(lm.device)
        signs = dictionary.signed or other.signed  # then those of directions mean nothing
        there = metrics.mcs(dictionary.decoder_directions(), theirs, absolute=signs)
        matched = there >= config.matched_above
        parts |= {"matched": Part(dictionary, matched), "unmatched": Part(dictionary, ~matched)}
    if config.within is not None:
        order = _energy(dictionary, fitted.x).argsort(descending=True, stable=True)
        numbers = torch.Generator().manual_seed(config.seed)
        drawn = torch.randperm(dictionary.d_sae, generator=numbers).to(order.device)
        for n in powers_below(dictionary.d_sae):
            kept = torch.zeros_like(order, dtype=torch.bool)
            kept[order[:n]] = True
            parts[f"{STRONGEST}{n}"] = Part(dictionary, kept)
            by_chance = torch.zeros_like(kept)
            by_chance[drawn[:n]] = True
            parts[f"{DRAWN}{n}"] = Part(dictionary, by_chance)
    made = {"dictionary": dictionary, **parts, **nulls}
    return Arms(made, fitted.mean, tuple(parts), tuple(nulls)), configs


STRONGEST = "strongest_"
DRAWN = "drawn_"
"""Arms of the latents that write most, and of as many drawn at random; how many."""


def powers_below(d_sae: int) -> list[int]:
    """How many latents the arms of `within` keep: 1, 2, 4, 8 ... fewer than all."""
    return [2**i for i in range(d_sae.bit_length()) if 2**i < d_sae]


@torch.inference_mode()
def _energy(dictionary: Dictionary, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_sae"]:
    """How much each latent writes: the sum of squares of its activations times its direction's."""
    total = x.new_zeros(dictionary.d_sae)
    for part in torch.split(x, 2048):
        encoded = dictionary.encode(part)
        total.index_add_(0, encoded.indices.long(), encoded.acts.square())
    return total * dictionary.decoder_directions().square().sum(1)


def _smallest_within(config: EvaluateConfig, measured: Measured, arms: Arms) -> dict[str, Any]:
    """How few of the latents that write most keep the perplexity within a share of the unedited model's.

    Beside it, as a null of that choice: how few drawn at random do.
    """
    if config.within is None:
        return {}
    base = measured.loss.compute("base")["perplexity"].value
    all_of_them = {next(iter(arms.dictionaries.values())).d_sae: "dictionary"}

    def fewest(prefix: str) -> dict[str, Any]:
        sizes = {int(name.removeprefix(prefix)): name for name in arms.parts if name.startswith(prefix)}
        return _fewest(config, measured, base, sizes | all_of_them)

    return {
        "smallest_within": {
            "share": config.within,
            **fewest(STRONGEST),
            "perplexity_base": base if math.isfinite(base) else None,
            "random": fewest(DRAWN),
        }
    }


def _fewest(config: EvaluateConfig, measured: Measured, base: float, sizes: dict[int, str]) -> dict[str, Any]:
    """The smallest of some sets of latents that keeps the perplexity, with its interval over documents.

    Sizes between were not tried: the answer is more than `more_than`, the size before, and at most `n_latents`.
    """
    assert config.within is not None
    found = {n: measured.loss.compute(name)["perplexity"].value for n, name in sorted(sizes.items())}
    enough = [n for n, perplexity in found.items() if perplexity <= (1 + config.within) * base]
    known = all(math.isfinite(perplexity) for perplexity in (base, *found.values()))
    cause = "not even all latents keep it" if known else "a perplexity is NaN or infinite"
    enough = enough if known else []
    smallest = min(enough) if enough else None
    low, high = _drawn_within(config, measured, sizes) if enough else (None, None)
    return {
        "n_latents": smallest,
        "more_than": None if smallest is None else max((n for n in found if n < smallest), default=0),
        "low": low,
        "high": high,
        "perplexity": None if smallest is None else found[smallest],
        **({} if enough else {"cause": cause}),
    }


def _drawn_within(
    config: EvaluateConfig, measured: Measured, sizes: dict[int, str]
) -> tuple[int | None, int | None]:
    """Between which numbers of latents the answer lies in 95% of the draws of documents; None beyond all of them."""
    if config.n_bootstrap == 0 or config.within is None:
        return None, None
    options = {"n": config.n_bootstrap, "seed": config.seed, "n_units": len(measured.units.tags)}
    most = (1 + config.within) * measured.loss.drawn("base", **options)["perplexity"][1:]
    fewest = np.full(config.n_bootstrap, np.inf)
    for n in sorted(sizes, reverse=True):
        fewest[measured.loss.drawn(sizes[n], **options)["perplexity"][1:] <= most] = n
    ends = np.quantile(fewest, [0.025, 0.975], method="inverted_cdf")
    low, high = (int(end) if math.isfinite(end) else None for end in ends)
    return low, high


def _parts(
    config: EvaluateConfig, dictionary: Dictionary, density: Float[Tensor, " d_sae"]
) -> dict[str, Dictionary]:
    """Parts of the dictionary by name; densities are those on training rows."""
    made: dict[str, Dictionary] = {}
    for limit in config.leave_out_above:
        made[f"without_above_{limit!r}"] = Part(dictionary, density <= limit)
    for n in config.top_latents:
        top = torch.zeros_like(density, dtype=torch.bool)
        top[density.argsort(descending=True, stable=True)[:n]] = True
        made[f"top_{n}"], made[f"rest_{n}"] = Part(dictionary, top), Part(dictionary, ~top)
    return made
