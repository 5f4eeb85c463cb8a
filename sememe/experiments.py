"""What toy models show, as tables and plots: superposition, who computes what in a stack, a generator beside real rows.

    superposition  how many of n sparse features a network carries in d < n dimensions, by d and by how sparse they are
    layers         which MLP of a stack computes a feature: one each, or all of them together
    likeness       how far rows of a generator fitted to a store are from the store's own

Each is an artifact: the table as JSON and CSV, and a plot where there is something to draw. Where a number is
missing it is null, with its cause in the last column. Knows `toy`, stores and dictionaries; trains no dictionary and
runs no language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from sememe import artifact, dictionaries, figures
from sememe.config import Config
from sememe.errors import HookpointError, MismatchError
from sememe.foreign import opens
from sememe.source import StoreSource
from sememe.store import open_store
from sememe.toy import (
    Fitted,
    FittedSource,
    Layered,
    LayeredConfig,
    Superposed,
    SuperposedConfig,
    Superposition,
    layered,
    statistics,
    superpose,
)
from sememe.toy.layered import UNLEARNED

__all__ = [
    "LayersConfig",
    "LikenessConfig",
    "SuperpositionConfig",
    "layers",
    "likeness",
    "superposition",
]

VERSION = 2
NO_STATISTIC = "no number of {}: rows that do not vary, or on which no latent is active"
TABLE = "table.json"


class SuperpositionConfig(Config):
    """Which networks, and where the result goes."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out"})

    out: Path = Path("artifacts/superposition")
    """The folder to make."""
    networks: SuperposedConfig = SuperposedConfig()
    """The networks: one for each width and density."""


class LayersConfig(Config):
    """Which stack, and where the result goes."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out"})

    out: Path = Path("artifacts/layers")
    """The folder to make."""
    stack: LayeredConfig = LayeredConfig()
    """The stack of MLPs."""


class LikenessConfig(Config):
    """Which store a generator is fitted to, with which dictionary."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "store", "dictionary"})
    _opens = opens("dictionary")

    store: Path
    """The store whose rows are imitated."""
    dictionary: Path
    """A dictionary of that hookpoint: its decoder rows become the planted features."""
    out: Path = Path("artifacts/likeness")
    """The folder to make."""
    n_rows: int = Field(default=16_384, ge=2000)
    """Rows of the store, half to fit the generator and half to compare with; all are held in memory."""
    seed: int = Field(default=0, ge=0)
    """Of the made rows."""


def superposition(config: SuperpositionConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Train the networks and measure what each carries, or open the result if it is there.

    Args:
        config: Which networks.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: a width or a density is outside its range.
        MismatchError: something else stands at config.out.
    """
    config.networks.check()

    def made() -> tuple[list[dict[str, Any]], dict[str, str]]:
        lines = [_superposition_line(*found) for found in superpose(config.networks)]
        return lines, figures.superposition_plot(lines, config.networks.n_features)

    return _written(config, "superposition", {}, made, fresh)


def layers(config: LayersConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Train the stack and measure by ablation which layer computes which feature, or open the result.

    Args:
        config: Which stack.
        fresh: Replace whatever stands at config.out.

    Raises:
        MismatchError: something else stands at config.out.
    """

    def made() -> tuple[list[dict[str, Any]], dict[str, str]]:
        found = layered(config.stack)
        lines = [_layers_line(found, feature) for feature in range(config.stack.n_features)]
        return lines, figures.layers_plot(lines, config.stack.n_layers)

    return _written(config, "layers", {}, made, fresh)


def likeness(config: LikenessConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Fit a generator to half of the rows and tabulate how its rows differ from the other half.

    Beside each statistic stands that of the first half of the real rows: by how much chance alone moves it.

    Args:
        config: Which store, which dictionary.
        fresh: Replace whatever stands at config.out.

    Raises:
        HookpointError: the store does not hold the dictionary's hookpoint.
        MismatchError: the dictionary is of another model; or something else stands at config.out.
        ShapeError: the dictionary does not reconstruct what it reads.
        ConfigError: too few rows, or activations with signs.
    """
    store = open_store(config.store)
    parents = {
        "store": store.fingerprint,
        "dictionary": artifact.load(config.dictionary, "dictionary").fingerprint,
    }

    def made() -> tuple[list[dict[str, Any]], dict[str, str]]:
        dictionary = dictionaries.load(config.dictionary)
        hookpoint = _hookpoint(dictionary, config, store.info.model_fingerprint, tuple(store.info.hookpoints))
        source = StoreSource(store, (hookpoint,))
        half = min(config.n_rows, source.n_rows) // 2
        first, second = (source.next_batch(half).x.float() for _ in range(2))
        generated = FittedSource(Fitted(dictionary, first), config.seed).hold_out(half).x
        real, again, fitted = (statistics(rows, dictionary) for rows in (second, first, generated))
        sides = {"real": real, "real_again": again, "fitted": fitted}
        lines = []
        for name in real:
            numbers = {side: _number(values[name]) for side, values in sides.items()}
            none = ", ".join(side for side, value in numbers.items() if value is None)
            lines.append({"statistic": name, **numbers, "cause": NO_STATISTIC.format(none) if none else ""})
        return lines, {}

    return _written(config, "likeness", parents, made, fresh)


def _hookpoint(
    dictionary: dictionaries.Dictionary, config: LikenessConfig, model: str, held: tuple[str, ...]
) -> str:
    """The one hookpoint that the dictionary reads, which the store must hold."""
    if dictionary.sites is None:
        if len(held) == 1:
            return held[0]
        raise HookpointError(
            "a dictionary without a hookpoint needs a store that holds one only",
            ", ".join(held),
            "Train it from a store.",
        )
    site = dictionary.sites.inputs[0]
    if site.model_fingerprint != model:
        raise MismatchError(
            f"the dictionary {config.dictionary} must be of the store's model (fingerprint {model[:16]})",
            f"{site.model} ({site.model_fingerprint[:16]})",
            "Name the store that it was trained on.",
        )
    if site.hookpoint not in held:
        raise HookpointError(
            f"the store must hold {site.hookpoint}, which the dictionary reads",
            ", ".join(held),
            "Name the store that it was trained on.",
        )
    return site.hookpoint


def _superposition_line(measured: Superposition, network: Superposed) -> dict[str, Any]:
    """A network's numbers, and why one is missing."""
    numbers = {
        name: _number(value) if isinstance(value, float) else value
        for name, value in measured._asdict().items()
    }
    causes = []
    if not bool(network.W.isfinite().all() and network.b.isfinite().all()):
        causes.append("the training diverged: weights are NaN or infinite (lower lr)")
    else:
        if measured.n_carried == 0:
            causes.append("interference: no feature is carried")
        if numbers["dimensions_per_feature"] is None:
            causes.append("dimensions_per_feature: all weights are 0, or their squares are infinite")
        if numbers["loss"] is None:
            causes.append("loss: no feature is active in any test row, or the error is infinite")
    return {**numbers, "cause": "; ".join(causes)}


def _layers_line(found: Layered, feature: int) -> dict[str, Any]:
    """A feature's numbers, and why they are missing."""
    fvu, effective = _number(found.fvu[feature]), _number(found.effective_layers[feature])
    cause = ""
    if fvu is None:
        cause = "the feature is active in no test row, or the training diverged"
    elif fvu > UNLEARNED:
        cause = f"not learned: fvu above {UNLEARNED:g}"
    elif effective is None:
        cause = "its error does not grow without any one layer"
    return {
        "feature": feature,
        "fvu": fvu,
        "effective_layers": effective,
        **{f"share_{layer}": _number(share) for layer, share in enumerate(found.shares[feature])},
        "cause": cause,
    }


def _number(value: torch.Tensor | float) -> float | None:
    """A number, or None where it is NaN or infinite, which JSON cannot say."""
    return float(value) if math.isfinite(value) else None


def _written(
    config: SuperpositionConfig | LayersConfig | LikenessConfig,
    kind: str,
    parents: Mapping[str, str],
    made: Any,
    fresh: bool,
) -> artifact.Artifact:
    """The artifact with its table and plots; nothing is made where it is there."""
    identity = artifact.identity_of(kind, VERSION, config, parents)
    there = None if fresh else artifact.find(config.out, kind, identity)
    if there is not None:
        return there
    with artifact.building(
        config.out, kind=kind, version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        lines, plots = made()
        artifact.write_json(work.path / TABLE, {"format_version": 1, "rows": lines})
        (work.path / "table.csv").write_text(figures.csv_of(lines), encoding="utf-8")
        for name, picture in plots.items():
            (work.path / f"{name}.svg").write_text(picture, encoding="utf-8")
    return artifact.load(config.out, kind)
