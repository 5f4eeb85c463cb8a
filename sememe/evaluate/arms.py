"""What is put in the place of the activations: the dictionary, nulls at its l0, the mean. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import dictionaries, metrics, text
from sememe.capture import captured_rows
from sememe.dictionaries.base import Dictionary, Site, Sites
from sememe.dictionaries.ica import ICA, ICAConfig
from sememe.dictionaries.identity import Identity, IdentityConfig
from sememe.dictionaries.part import Part
from sememe.dictionaries.pca import PCA, Moments, PCAConfig
from sememe.dictionaries.random_directions import RandomDirections, RandomDirectionsConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import TextError
from sememe.evaluate.config import EvaluateConfig
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.store import Store
from sememe.text import TokenPolicy

__all__ = ["Arms", "join", "make_arms"]

N_SAMPLE_ROWS = 8192
"""Rows from which the untrained null is initialised and the dictionary's l0 is estimated."""


class Arms(NamedTuple):
    """What is put in the place of the activations."""

    dictionaries: dict[str, Dictionary]
    mean: Float[Tensor, " d_out"]
    parts: tuple[str, ...] = ()
    """Those of the names that are parts of the dictionary, and no nulls."""


def _fit_rows(
    config: EvaluateConfig, lm: LanguageModel, sites: Sites, policy: TokenPolicy, store: Store | None
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


def make_arms(
    config: EvaluateConfig,
    lm: LanguageModel,
    dictionary: Dictionary,
    sites: Sites,
    policy: TokenPolicy,
    store: Store | None,
) -> tuple[Arms, dict[str, Any]]:
    """The dictionary and its nulls at its l0, and the mean of the training rows."""
    moments, sample_x, sample_target, n_sampled = Moments(), [], [], 0
    for_ica: list[Tensor] = []
    with track("fit nulls", config.n_fit_rows, "rows") as progress:
        for activations in _fit_rows(config, lm, sites, policy, store):
            left = config.n_fit_rows - moments.n
            target = join(activations, sites.outputs)[:left].to(lm.device, torch.float32)
            if "ica" in config.nulls:
                for_ica.append(target.cpu())
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
    x, target = torch.cat(sample_x), torch.cat(sample_target)
    found = metrics.Sparsity(dictionary.d_sae)
    with torch.inference_mode():
        for part in torch.split(x, 2048):
            found.update(dictionary.encode(part))
    k = max(1, round(found.compute()["l0"].value))
    nulls: dict[str, Dictionary] = {}
    for name in config.nulls:
        if name == "ica":
            options = ICAConfig(k=min(k, dictionary.d_in), seed=config.seed)
            nulls[name] = ICA.fit(torch.cat(for_ica), options, sites).to(lm.device)
        else:
            nulls[name] = _null(name, k, config, dictionary, sites, moments, x, target)
    parts = _parts(config, dictionary, found.density())
    arms = Arms({"dictionary": dictionary, **parts, **nulls}, moments.mean().float(), tuple(parts))
    configs = {name: {**null.config.resolved(), "d_sae": null.d_sae} for name, null in nulls.items()}
    if "ica" in nulls:
        configs["ica"]["converged"] = bool(nulls["ica"].converged)
    return arms, configs


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


def _null(
    name: str,
    k: int,
    config: EvaluateConfig,
    dictionary: Dictionary,
    sites: Sites,
    moments: Moments,
    x: Float[Tensor, "rows d_in"],
    target: Float[Tensor, "rows d_out"],
) -> Dictionary:
    width = {"untrained": dictionary.d_sae, "random_directions": dictionary.d_sae}.get(name, dictionary.d_in)
    k = min(k, width)
    if name == "pca":
        return PCA.from_moments(moments, PCAConfig(k=k), sites)
    if name == "identity":
        return Identity.from_mean(moments.mean(), IdentityConfig(k=k), sites)
    if name == "random_directions":
        options = RandomDirectionsConfig(k=k, d_sae=width, seed=config.seed)
        return RandomDirections.from_mean(moments.mean(), options, sites)
    untrained = dictionaries.build(TopKConfig(k=k, d_sae=width), dictionary.d_in, dictionary.d_out, sites)
    untrained.initialise(x.cpu(), target.cpu(), torch.Generator().manual_seed(config.seed))
    return untrained.fold().eval().to(x.device)


def join(activations: dict[str, Tensor], sites: tuple[Site, ...]) -> Tensor:
    parts = [activations[site.hookpoint] for site in sites]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
