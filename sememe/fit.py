"""The verb that fits a baseline or a sparse coder to a store's rows: PCA, ICA, NMF, K-SVD, OMP over a dictionary ...

What comes out is a dictionary like any other: evaluated, compared, interpreted by the same code. Knows rows and
dictionaries; runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sememe import artifact, dictionaries
from sememe.config import Config
from sememe.dictionaries.base import Dictionary, Sites
from sememe.dictionaries.ica import ICA, ICAConfig
from sememe.dictionaries.identity import Identity, IdentityConfig
from sememe.dictionaries.neurons import Neurons, NeuronsConfig
from sememe.dictionaries.nmf import NMF, NMFConfig
from sememe.dictionaries.pca import PCA, PCAConfig
from sememe.dictionaries.random_directions import RandomDirections, RandomDirectionsConfig
from sememe.dictionaries.rica import RICA, RICAConfig
from sememe.dictionaries.sparse_coder import KSVDConfig, SparseCoderConfig, ksvd, sparse_coder_over
from sememe.errors import ConfigError, HookpointError, MismatchError, ShapeError
from sememe.foreign import opens
from sememe.progress import track
from sememe.source import Source, StoreSource, upcoming
from sememe.store import Store, open_store

__all__ = ["KINDS", "STREAMED", "STREAMED_ROWS", "FitConfig", "fit"]

VERSION = 2
N_PROBE_ROWS = 16
STREAMED_ROWS = 8192
STREAMED = ("identity", "nmf", "pca", "random_directions", "rica")
"""Kinds that hold a batch of rows at a time: a sum over rows is enough, or they go through them again and again."""

KINDS: dict[str, type[Config]] = {
    "ica": ICAConfig,
    "identity": IdentityConfig,
    "ksvd": KSVDConfig,
    "neurons": NeuronsConfig,
    "nmf": NMFConfig,
    "pca": PCAConfig,
    "random_directions": RandomDirectionsConfig,
    "rica": RICAConfig,
    "sparse_coder": SparseCoderConfig,
}
"""What can be fitted, each with its options."""

Baseline = Annotated[
    ICAConfig
    | IdentityConfig
    | KSVDConfig
    | NeuronsConfig
    | NMFConfig
    | PCAConfig
    | RandomDirectionsConfig
    | RICAConfig
    | SparseCoderConfig,
    Field(discriminator="kind"),
]


class FitConfig(Config):
    """What to fit, and to which rows."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"store", "out", "over"})
    _opens = opens("over")

    store: Path = Path("artifacts/store")
    """The store whose rows are read."""
    out: Path = Path("artifacts/baseline")
    """The folder to make."""
    baseline: Baseline = PCAConfig()
    """What to fit, and its options."""
    hookpoint: str | None = None
    """Which of the store's; may be left out where it holds one."""
    over: Path | None = None
    """Of sparse_coder: the dictionary over whose directions codes are searched for."""
    n_rows: int = Field(default=16_384, ge=16)
    """Rows, drawn from the store. pca, nmf, rica, identity and random_directions stream them; others hold them all.
    sparse_coder takes directions as they are, and none."""

    @model_validator(mode="after")
    def _over_what(self) -> Self:
        if (self.baseline.kind == "sparse_coder") != (self.over is not None):
            raise ConfigError(
                "over must name a dictionary with sparse_coder, and nothing else has one",
                self.over,
                "Pass --over DICTIONARY." if self.over is None else "Drop --over.",
            )
        if self.over is not None:
            self.check_inert("n_rows", without="codes are searched for over given directions")
        return self


def fit(
    config: FitConfig,
    *,
    source: Source | None = None,
    parents: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Dictionary:
    """Fit a baseline or a sparse coder, or open it if it is there.

    Args:
        config: What, and to which rows.
        source: Where rows come from; the store at config.store if not given.
        parents: Fingerprints of what the source is made from; the store's if the source is not given.
        extra: More to remember in the dictionary's meta.json, for a given source.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: an option is out of range for the rows' width.
        HookpointError: the store does not hold the hookpoint.
        ShapeError: too few rows.
        MismatchError: the dictionary of a coder is of another hookpoint; or something else stands at config.out.
        ActivationError: a row is NaN or infinite.
    """
    store = open_store(config.store) if source is None else None
    known = dict(parents or {}) if store is None else {"store": store.fingerprint}
    if config.over is not None:
        known["over"] = artifact.load(config.over, "dictionary").fingerprint
    identity = artifact.identity_of("dictionary", VERSION, config, known)
    if not fresh and artifact.find(config.out, "dictionary", identity) is not None:
        return dictionaries.load(config.out)
    about = dict(extra or {})
    if store is not None:
        source = _rows_of(store, config.hookpoint)
        about = {
            "policy": store.info.policy.resolved(),
            "store": store.info.resolved(),
            "separation": store.separation,
        }
    assert source is not None
    n_rows = config.n_rows if source.n_rows is None else min(config.n_rows, source.n_rows)
    with artifact.building(
        config.out, kind="dictionary", version=VERSION, config=config, parents=known, fresh=fresh
    ) as work:
        probe = upcoming(source, N_PROBE_ROWS).x.float()
        made = _fitted(config, source, n_rows)
        work.extra = {**about, **made.write(work.path, probe)}
    return dictionaries.load(config.out)


def _rows_of(store: Store, hookpoint: str | None) -> StoreSource:
    if hookpoint is None and len(store.info.hookpoints) > 1:
        raise HookpointError(
            "a hookpoint must be chosen when the store holds several",
            ", ".join(store.info.hookpoints),
            "Pass --hookpoint with one of them.",
        )
    return StoreSource(store, None if hookpoint is None else (hookpoint,))


def _fitted(config: FitConfig, source: Source, n_rows: int) -> Dictionary:
    """The dictionary. Where a sum over rows is enough they are streamed; else they are held."""
    baseline, sites = config.baseline, source.sites
    d_sae, k = baseline.width(source.d_in), baseline.k_in_use()
    if k is not None and k > d_sae and config.over is None:
        raise ConfigError(f"k must be in [1, d_sae={d_sae}]", k, "Lower k.")
    if isinstance(baseline, PCAConfig):
        return PCA.fit(_stream(source, n_rows), baseline, sites)
    if isinstance(baseline, IdentityConfig | RandomDirectionsConfig):
        mean = (
            sum((rows.double().sum(0) for rows in _stream(source, n_rows)), torch.zeros(source.d_in)) / n_rows
        )
        if isinstance(baseline, IdentityConfig):
            return Identity.from_mean(mean.float(), baseline, sites)
        return RandomDirections.from_mean(mean.float(), baseline, sites)
    if isinstance(baseline, RICAConfig):
        return RICA.fit_stream(_passes(source, n_rows), baseline, sites)
    if isinstance(baseline, NMFConfig):
        return NMF.fit_stream(_passes(source, n_rows), n_rows, baseline, sites)
    if config.over is None:
        x = source.next_batch(n_rows).x.float()
        if isinstance(baseline, ICAConfig):
            return ICA.fit(x, baseline, sites)
        if isinstance(baseline, NeuronsConfig):
            return Neurons.fit(x, baseline, sites)
        assert isinstance(baseline, KSVDConfig)
        return ksvd(x, baseline, sites).coder
    assert isinstance(baseline, SparseCoderConfig)
    over = dictionaries.load(config.over)
    if over.sites is not None and sites is not None and _places(over.sites) != _places(sites):
        raise MismatchError(
            f"the dictionary {config.over} must be of the store's model and hookpoint, {_places(sites)}",
            _places(over.sites),
            "Name another store, hookpoint or dictionary.",
        )
    if over.d_out != source.d_out:
        raise ShapeError(
            f"the dictionary {config.over} must write rows as wide as the store's, {source.d_out}",
            over.d_out,
            "Name another store, hookpoint or dictionary.",
        )
    over.sites = over.sites or sites
    return sparse_coder_over(over, baseline)


def _stream(source: Source, n_rows: int) -> Iterator[Float[Tensor, "rows d"]]:
    """So many rows, a batch at a time."""
    with track("read rows", n_rows, "rows") as progress:
        for start in range(0, n_rows, STREAMED_ROWS):
            rows = source.next_batch(min(STREAMED_ROWS, n_rows - start)).x.float()
            progress.advance(rows.shape[0])
            yield rows


def _passes(source: Source, n_rows: int) -> Callable[[int], Iterator[Float[Tensor, "rows d"]]]:
    """The first so many rows in batches, the same ones whenever it is called."""
    start = source.state_dict()

    def one(size: int) -> Iterator[Float[Tensor, "rows d"]]:
        source.load_state_dict(start)
        for first in range(0, n_rows, size):
            yield source.next_batch(min(size, n_rows - first)).x.float()

    return one


def _places(sites: Sites) -> str:
    return ", ".join(
        f"{site.hookpoint} of {site.model} ({site.model_fingerprint[:16]})" for site in sites.outputs
    )
