"""One dictionary: a number for each latent, their mean with its interval, and what random directions have.

Knows one dictionary, and rows of its hookpoints where they are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import metrics
from sememe.dictionaries.base import Dictionary
from sememe.geometry.config import GeometryConfig
from sememe.lm import LanguageModel
from sememe.metrics.sums import MAX_GROUPS
from sememe.progress import track
from sememe.source import StoreSource
from sememe.store import Store

__all__ = ["Activity", "Latents", "activity", "nearest_to_probe", "of_weights", "summarised"]

ROWS_AT_ONCE = 2048
RESIDUAL = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""Hookpoints whose basis is the embedding's."""
CLASSES = ("dense", "ten_sparse", "one_sparse")

Columns = dict[str, Tensor]


class Activity(NamedTuple):
    """What a dictionary does on rows of a store."""

    n_rows: int
    l0: metrics.Statistic
    """With its interval over groups of rows, which were drawn from all of the store."""
    density: Float[Tensor, " d_sae"]
    random_density: Float[Tensor, " d_sae"]
    """Of as many random directions, the largest projections of each row active, l0 of them."""
    correlations: dict[str, metrics.Correlations]
    """Of the latents that write most, of as many dimensions of the input, of as many random directions; none of fewer
    than two latents that fire."""


class Latents(NamedTuple):
    """A dictionary's columns, and those of random directions in its place."""

    columns: Columns
    random: Columns


# -- from the weights ----------------------------------------------------------------------------------------------


def of_weights(dictionary: Dictionary, lm: LanguageModel | None, seed: int) -> Latents:
    """Everything that hangs on the weights alone.

    Raises:
        ActivationError: a decoder row is NaN or infinite.
    """
    W_dec = dictionary.decoder_directions().detach().float().cpu()
    chance = metrics.random_rows(dictionary.d_sae, dictionary.d_out, seed)
    functions = _of_rows(dictionary, lm, W_dec.shape[1])
    columns, random = (_merged(function(rows) for function in functions) for rows in (W_dec, chance))
    columns["decoder_norm"] = W_dec.norm(dim=1)
    W_enc = dictionary.encoder_directions()
    one_place = dictionary.sites is None or dictionary.sites.inputs == dictionary.sites.outputs
    if W_enc is not None and W_enc.shape == W_dec.shape and one_place:
        read = W_enc.detach().float().cpu().T
        columns["encoder_decoder_cosine"] = metrics.encoder_decoder_cosine(read, W_dec)
        random["encoder_decoder_cosine"] = metrics.encoder_decoder_cosine(read, chance)
    return Latents(columns, random)


def _merged(parts: Iterable[Columns]) -> Columns:
    return {name: values for part in parts for name, values in part.items()}


def _of_rows(
    dictionary: Dictionary, lm: LanguageModel | None, d: int
) -> list[Callable[[Float[Tensor, "n d"]], Columns]]:
    """What can be asked of any directions in the dictionary's space."""

    def shape(rows: Tensor) -> Columns:
        found = metrics.moments(rows)
        return {
            "kurtosis": found.kurtosis,
            "skew": found.skew,
            "effective_neurons": metrics.effective_neurons(rows),
            "capacity": metrics.capacity(metrics.unit_rows(rows)),
        }

    def classes(rows: Tensor) -> Columns:
        found = metrics.neuron_sparsity(rows)
        return {
            "top_1": found.top_1,
            "next_9": found.next_9,
            "class": found.ten_sparse.int() + 2 * found.one_sparse.int(),
        }

    functions: list[Callable[[Tensor], Columns]] = [shape, *([classes] if d >= 10 else [])]
    outputs = dictionary.sites.outputs if dictionary.sites is not None else ()
    if lm is None or len(outputs) != 1:
        return functions
    in_residual = outputs[0].hookpoint.split(".")[0] in RESIDUAL
    for name, table in zip(("embedding", "unembedding"), lm.embeddings(), strict=True):
        if in_residual and table.shape[1] == d:
            functions.append(_nearest_token(name, table.float().cpu()))
    W_out = lm.output_projection(outputs[0].hookpoint)
    if W_out is not None:
        seen = W_out.cpu()
        functions.append(lambda rows: {"null_space_share": metrics.null_space_share(rows, seen)})
    return functions


def _nearest_token(name: str, table: Float[Tensor, "vocab d"]) -> Callable[[Float[Tensor, "n d"]], Columns]:
    def nearest(rows: Tensor) -> Columns:
        cosine, token = metrics.token_match(rows, table)
        return {f"{name}_cosine": cosine, f"{name}_token": token}

    return nearest


def summarised(latents: Latents, config: GeometryConfig) -> dict[str, Any]:
    """The mean of every column that has one, its interval over latents, and the mean of random directions."""
    found: dict[str, Any] = {}
    for name, values in latents.columns.items():
        if name.endswith("_token") or name == "class":
            continue
        statistic = metrics.over_latents(
            values.double(),
            n_bootstrap=config.n_bootstrap,
            seed=config.seed,
            cause="some latents' directions have length 0, or are constant",
        )
        chance = latents.random.get(name)
        found[name] = {
            **statistic.to_json(),
            "random": None if chance is None else float(chance.double().mean()),
        }
    if "class" in latents.columns:
        for number, name in enumerate(CLASSES):
            own, random = (side["class"] == number for side in (latents.columns, latents.random))
            statistic = metrics.over_latents(own, n_bootstrap=config.n_bootstrap, seed=config.seed)
            found[f"share_{name}"] = {**statistic.to_json(), "random": float(random.double().mean())}
    return found


def nearest_to_probe(
    W_dec: Float[Tensor, "d_sae d"], probe: Float[Tensor, " d"], config: GeometryConfig
) -> dict[str, Any]:
    """Latents by their cosine to a direction, and the largest cosine that as many random directions have."""
    cosines, order = metrics.probe_rank(W_dec, probe)
    chance, _ = metrics.probe_rank(metrics.random_rows(W_dec.shape[0], W_dec.shape[1], config.seed), probe)
    n = min(config.n_shown, order.numel())
    return {
        "nearest": [
            {"latent": int(latent), "cosine": float(cosine)}
            for latent, cosine in zip(order[:n], cosines[:n], strict=True)
        ],
        "random": float(chance[0]),
    }


# -- on rows of a store --------------------------------------------------------------------------------------------


@torch.inference_mode()
def activity(dictionary: Dictionary, store: Store, config: GeometryConfig, label: str) -> Activity:
    """Densities, and the correlations of the latents that write most. Encodes the rows twice, and holds few."""
    assert dictionary.sites is not None
    names = [
        tuple(site.hookpoint for site in side) for side in (dictionary.sites.inputs, dictionary.sites.outputs)
    ]
    source = StoreSource(store, names[0], names[1], config.seed)
    x = source.sample(min(config.n_rows, source.n_rows)).x
    parts = torch.split(x, ROWS_AT_ONCE)
    sparsity = metrics.Sparsity(dictionary.d_sae)
    written = torch.zeros(dictionary.d_sae, dtype=torch.float64)
    norms = dictionary.decoder_directions().detach().double().square().sum(1)
    with track(f"encode for {label}", 2 * x.shape[0], "rows") as progress:
        for part in parts:
            encoded = dictionary.encode(part.float())
            sparsity.update(encoded, None, (torch.arange(part.shape[0]) + sparsity.n_rows) % MAX_GROUPS)
            written.index_add_(0, encoded.indices.long(), encoded.acts.double().square())
            progress.advance(part.shape[0])
        k = min(config.n_correlated, int((written * norms > 0).sum()), x.shape[1])
        top = (written * norms).topk(k).indices
        place = torch.full((dictionary.d_sae,), -1, dtype=torch.int64).index_copy(0, top, torch.arange(k))
        acts = torch.zeros(x.shape[0], k)
        for number, part in enumerate(parts):
            encoded = dictionary.encode(part.float())
            where = place[encoded.indices.long()]
            rows = encoded.row_ids().long() + number * ROWS_AT_ONCE
            acts.index_put_((rows[where >= 0], where[where >= 0]), encoded.acts[where >= 0], accumulate=True)
            progress.advance(part.shape[0])
    values = x.float()
    widest = values.var(0).topk(k).indices
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "seed": config.seed}
    random = values @ metrics.unit_rows(metrics.random_rows(k, x.shape[1], config.seed)).T
    compared = {"latents": acts, "neurons": values[:, widest], "random_directions": random} if k > 1 else {}
    l0 = sparsity.compute(**options)["l0"]
    return Activity(
        x.shape[0],
        l0._replace(cause=l0.cause.replace("documents", "rows")),
        sparsity.density().cpu(),
        _random_density(values, dictionary.d_sae, l0.value, config.seed),
        {name: metrics.correlations(one, **options) for name, one in compared.items()},
    )


def _random_density(
    x: Float[Tensor, "rows d_in"], d_sae: int, l0: float, seed: int
) -> Float[Tensor, " d_sae"]:
    """How often random directions are active, the l0 largest projections of each row being so."""
    k = min(max(1, round(l0)), d_sae)
    directions = metrics.unit_rows(metrics.random_rows(d_sae, x.shape[1], seed)).T
    mean = x.mean(0)
    counts = torch.zeros(d_sae, dtype=torch.int64)
    for part in torch.split(x, ROWS_AT_ONCE):
        active = ((part - mean) @ directions).topk(k).indices
        counts += torch.bincount(active.view(-1), minlength=d_sae)
    return counts.double() / x.shape[0]
