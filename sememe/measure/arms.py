"""What is put in the place of the activations: dictionaries, nulls at their l0, the mean. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import dictionaries, metrics, text
from sememe.capture import captured_rows
from sememe.dictionaries.base import Dictionary, Site, Sites
from sememe.dictionaries.fitted import Fitted
from sememe.dictionaries.ica import ICA, ICAConfig
from sememe.dictionaries.identity import Identity, IdentityConfig
from sememe.dictionaries.neurons import Neurons, NeuronsConfig
from sememe.dictionaries.nmf import NMF, NMFConfig
from sememe.dictionaries.pca import PCA, Moments, PCAConfig
from sememe.dictionaries.random_directions import RandomDirections, RandomDirectionsConfig
from sememe.dictionaries.rica import RICA, RICAConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import TextError
from sememe.lm import LanguageModel
from sememe.measure.config import ROWS_NULLS, MeasureConfig
from sememe.progress import track
from sememe.splice import SeveralModels
from sememe.store import Store
from sememe.text import TokenPolicy

__all__ = ["Arms", "Material", "fit", "join", "make_null"]

N_SAMPLE_ROWS = 8192
"""Rows from which the untrained null is initialised and a dictionary's l0 is estimated."""


N_NULL_ROWS = 16_384
"""Rows that ICA, RICA and NMF are fitted on: 28 per component at a width of 576."""


class Arms(NamedTuple):
    """What is put in the place of the activations."""

    dictionaries: dict[str, Dictionary]
    mean: Float[Tensor, " d_out"]
    parts: tuple[str, ...] = ()
    """Those of the names that are parts of the dictionary, and no nulls."""
    controls: tuple[str, ...] = ()
    """Those that are nulls."""


def _fit_rows(
    config: MeasureConfig,
    lm: LanguageModel | SeveralModels,
    sites: Sites,
    policy: TokenPolicy,
    store: Store | None,
) -> Iterator[dict[str, Tensor]]:
    """Kept training rows per hookpoint: from the store, or from the model on the training documents."""
    names = sites.hookpoints
    if store is not None:
        for index in range(len(store.info.shards)):
            yield store.read(index, names).activations
        return
    limits = {site.hookpoint: site.max_norm for site in (*sites.inputs, *sites.outputs)}
    block_rows = max(config.batch_rows, 64)
    blocks = text.token_blocks(
        config.text,
        lm.tokenizer,
        policy,
        split="train",
        n_tokens=2 * config.n_fit_rows,
        block_rows=block_rows,
    )
    for rows in captured_rows(lm, blocks, names, config.batch_rows, limits):
        yield rows.activations


class Material(NamedTuple):
    """What nulls are made from: training rows of the dictionaries' sites."""

    moments: Moments
    x: Float[Tensor, "rows d_in"]
    target: Float[Tensor, "rows d_out"]
    """The first of them."""
    rows: list[Float[Tensor, "rows d_out"]]
    """More of them, where a null is fitted to rows."""
    found: dict[str, Fitted]
    """Nulls of these rows, once they were needed: their directions do not hang on k, and finding them takes minutes."""

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        """Of the targets."""
        return self.moments.mean().float()

    def sparsity_of(self, dictionary: Dictionary) -> metrics.Sparsity:
        """Which of a dictionary's latents are active on the first rows."""
        found = metrics.Sparsity(dictionary.d_sae)
        with torch.inference_mode():
            for part in torch.split(self.x, 2048):
                found.update(dictionary.encode(part))
        return found


def fit(
    config: MeasureConfig,
    lm: LanguageModel | SeveralModels,
    sites: Sites,
    policy: TokenPolicy,
    store: Store | None,
) -> Material:
    """Read training rows.

    Raises:
        TextError: there are fewer than two.
    """
    moments, sample_x, sample_target, n_sampled = Moments(), [], [], 0
    rows: list[Tensor] = []
    with track("fit nulls", config.n_fit_rows, "rows") as progress:
        for activations in _fit_rows(config, lm, sites, policy, store):
            left = config.n_fit_rows - moments.n
            target = join(activations, sites.outputs)[:left].to(lm.device, torch.float32)
            if ROWS_NULLS & set(config.nulls) and moments.n < N_NULL_ROWS:
                rows.append(target[: N_NULL_ROWS - moments.n].cpu())
            if n_sampled < N_SAMPLE_ROWS:
                x = join(activations, sites.inputs)[:left].to(lm.device, torch.float32)
                sample_x.append(x[: N_SAMPLE_ROWS - n_sampled])
                sample_target.append(target[: N_SAMPLE_ROWS - n_sampled])
                n_sampled += sample_x[-1].shape[0]
            moments.update(target)
            progress.advance(target.shape[0])
            if moments.n >= config.n_fit_rows:
                break
    if moments.n < 2:
        raise TextError(
            "nulls and the mean need at least two training rows",
            moments.n,
            "Give more text, or name a store.",
        )
    return Material(moments, torch.cat(sample_x), torch.cat(sample_target), rows, {})


def make_null(
    name: str, k: int, d_sae: int, seed: int, sites: Sites, fitted: Material
) -> tuple[Dictionary, dict[str, Any]]:
    """A control with k active latents, and what describes it.

    Args:
        name: One of NULLS.
        k: Active latents per row; fewer where it has fewer in all.
        d_sae: Latents of those nulls that may have any number.
        seed: Of those that are drawn.
        sites: Where it reads and writes.
        fitted: What it is made from.
    """
    d_in = fitted.x.shape[1]
    device = fitted.x.device
    k = min(k, d_sae if name in ("untrained", "random_directions") else d_in)
    extra: dict[str, Any] = {}
    null: Dictionary
    if name in ROWS_NULLS:
        null = _of_rows(name, seed, sites, fitted).keeping(k)
        if isinstance(null, (ICA, NMF)):
            extra = {"converged": bool(null.converged)}
    elif name == "pca":
        null = PCA.from_moments(fitted.moments, PCAConfig(k=k), sites)
    elif name == "identity":
        null = Identity.from_mean(fitted.moments.mean(), IdentityConfig(k=k), sites)
    elif name == "random_directions":
        options = RandomDirectionsConfig(k=k, d_sae=d_sae, seed=seed)
        null = RandomDirections.from_mean(fitted.moments.mean(), options, sites)
    else:
        untrained = dictionaries.build(TopKConfig(k=k, d_sae=d_sae), d_in, fitted.target.shape[1], sites)
        untrained.initialise(fitted.x.cpu(), fitted.target.cpu(), torch.Generator().manual_seed(seed))
        null = untrained.fold().eval().to(device)
    return null, {**null.config.resolved(), "d_sae": null.d_sae, **extra}


def _of_rows(name: str, seed: int, sites: Sites, fitted: Material) -> Fitted:
    """A null that is fitted to rows in memory, before any k is kept; made once."""
    if name not in fitted.found:
        rows = torch.cat(fitted.rows)
        made: Fitted
        if name == "ica":
            made = ICA.fit(rows, ICAConfig(seed=seed), sites)
        elif name == "rica":
            made = RICA.fit(rows, RICAConfig(d_sae=rows.shape[1], seed=seed), sites)
        elif name == "nmf":
            made = NMF.fit(rows, NMFConfig(seed=seed), sites)
        else:
            made = Neurons.fit(rows, NeuronsConfig(seed=seed), sites)
        fitted.found[name] = made.to(fitted.x.device)
    return fitted.found[name]


def join(activations: dict[str, Tensor], sites: tuple[Site, ...]) -> Tensor:
    parts = [activations[site.hookpoint] for site in sites]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
