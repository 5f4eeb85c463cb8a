"""Twins: dictionaries trained on the model with its weights shuffled, each measured on that model, as nulls.

Whatever a metric still finds there was not learned by the model. Knows which shuffle a dictionary was trained on and
checks that it is the same model's; reads the same text as the dictionaries beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.dictionaries.base import Dictionary, Sites
from sememe.dictionaries.folders import paths_in
from sememe.errors import MismatchError
from sememe.lm import LanguageModel, ModelConfig
from sememe.measure.arms import Arms, fit
from sememe.measure.checks import check_text, policy_of, sites_of, splicer_for
from sememe.measure.config import MeasureConfig
from sememe.measure.measured import Measured
from sememe.text import TokenPolicy

__all__ = ["Twin", "check_twins", "open_twins", "twin_groups"]

NAME = "randomised: {}"
N_FIT_ROWS = 8192
"""Rows of the shuffled model of which the mean is taken, for its mean ablation."""
MARK = re.compile(r" \(randomised: (\w+), seed (\d+)\)$")


class Twin(NamedTuple):
    """A dictionary of the shuffled model."""

    saved: artifact.Artifact
    dictionary: Dictionary
    sites: Sites
    model: ModelConfig
    """The model's config, with its weights shuffled as they were when the twin was trained."""


def open_twins(config: MeasureConfig) -> dict[str, Twin]:
    """Every twin in the folders of config.twins, by the name that it has among the arms.

    Raises:
        MismatchError: one was trained on anything but config.model with its weights shuffled.
        ArtifactError: a folder is not a dictionary.
    """
    found = {}
    for name, path in (paths_in(config.twins) if config.twins else {}).items():
        saved, dictionary = artifact.load(path, "dictionary"), dictionaries.load(path)
        sites = sites_of(dictionary, path)
        model = _shuffled(config.model, sites, path)
        found[NAME.format(name)] = Twin(saved, dictionary, sites, model)
    return found


def _shuffled(model: ModelConfig, sites: Sites, path: Path) -> ModelConfig:
    site = sites.inputs[0]
    mark = MARK.search(site.model)
    shuffled = None if mark is None else model.replace(randomise=mark[1], randomise_seed=int(mark[2]))
    if shuffled is None or language_models.fingerprint_of(shuffled) != site.model_fingerprint:
        raise MismatchError(
            f"a twin must be trained on the model {model.model} with its weights shuffled",
            f"{path}, of {site.model} (fingerprint {site.model_fingerprint[:16]})",
            "Harvest with --randomise layers, and train on that store.",
        )
    return shuffled


def check_twins(
    config: MeasureConfig, twins: Mapping[str, Twin], policy: TokenPolicy, beside: Iterable[Sites]
) -> list[str]:
    """Whether twins read the same places and positions, and never the held-out documents; what a reader has to know.

    Args:
        config: What is measured.
        twins: As `open_twins` gives them.
        policy: That of the dictionaries.
        beside: Where the dictionaries read and write.

    Raises:
        MismatchError: one reads or writes where no dictionary does, has another token policy, or was trained on what is
            held out.
    """
    notices, known = [], [_places(sites) for sites in beside]
    for name, twin in twins.items():
        if _places(twin.sites) not in known:
            raise MismatchError(
                "a twin must read and write where a dictionary beside it does, "
                + " or ".join(sorted(set(known))),
                f"{_places(twin.sites)} of {name}",
                "Train one there on the shuffled model, or leave it out.",
            )
        own = policy_of(config.policy, twin.saved, None)
        if own != policy:
            raise MismatchError(
                f"a twin must have the dictionary's token policy, {policy.resolved()}",
                f"{own.resolved()} of {name}",
                "Harvest for it with the same policy.",
            )
        notices += [f"{name}: {notice}" for notice in check_text(twin.saved, None, config.text)]
    return notices


def _places(sites: Sites) -> str:
    """Where a dictionary reads and writes, whatever the model."""
    read, written = ([site.hookpoint for site in side] for side in (sites.inputs, sites.outputs))
    return ", ".join(read) if read == written else f"{', '.join(read)} -> {', '.join(written)}"


def twin_groups(
    config: MeasureConfig, twins: Mapping[str, Twin], policy: TokenPolicy
) -> dict[str, tuple[Measured, Arms]]:
    """What `run` measures beside the rest: a group for each twin, all of one shuffle with the same model in memory."""
    models: dict[ModelConfig, LanguageModel] = {}
    groups = {}
    for name, twin in twins.items():
        if twin.model not in models:
            models[twin.model] = language_models.load(twin.model)
        lm = models[twin.model]
        few = config.replace(nulls=(), n_fit_rows=min(config.n_fit_rows, N_FIT_ROWS))
        mean = fit(few, lm, twin.sites, policy, None).mean
        measured = Measured(config, lm, splicer_for(lm, twin.sites), twin.sites, policy)
        groups[name] = measured, Arms({name: twin.dictionary.to(lm.device)}, mean, (), (name,))
    return groups
