"""How a dictionary's latents lie to each other, to its neurons, and to other dictionaries. Knows weights, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe import artifact, dictionaries, metrics
from sememe.dictionaries import Dictionary
from sememe.dictionaries.folders import checkpoints_in
from sememe.progress import track

__all__ = ["History", "Neighbours", "Relations", "relations"]

N_NEURONS = 3
ROWS_AT_ONCE = 2048


class Neighbours(NamedTuple):
    """The nearest directions of each latent among some."""

    kind: str
    """decoder or encoder."""
    dictionary: str | None
    """The other dictionary; None for this one."""
    cosines: np.ndarray
    """(d_sae, n), the largest first."""
    others: np.ndarray


class History(NamedTuple):
    """Each latent's decoder direction at the checkpoints that training kept, the earliest first."""

    steps: np.ndarray
    """(n,): after how many steps each was kept."""
    cosines: np.ndarray
    """(n, d_sae): of the direction then to that of the finished dictionary."""
    norms: np.ndarray
    """(n, d_sae)"""


class Relations(NamedTuple):
    """What the weights alone say of each latent; NaN where there is nothing to say."""

    columns: dict[str, np.ndarray]
    """By column of the atlas's latents."""
    neighbours: list[Neighbours]
    neurons: np.ndarray
    """(d_sae, n): the dimensions each writes to most."""
    weights: np.ndarray
    """Of the unit direction, at those."""
    history: History
    outliers: np.ndarray
    """Dimensions that hold far more of the directions' square than others, most first."""


@torch.no_grad()
def relations(
    dictionary: Dictionary, n_neighbours: int, others: Mapping[str, Dictionary], folder: Path | None
) -> Relations:
    """Everything that hangs on the weights.

    Args:
        dictionary: In raw units.
        n_neighbours: Nearest directions kept, of each kind and dictionary.
        others: Dictionaries that write to the same place; their decoder directions are looked at too, and their
            encoder directions where they also read the same place.
        folder: Where the dictionary came from: checkpoints kept there tell which latents have settled.

    Raises:
        ActivationError: a decoder row is NaN or infinite.
    """
    W_dec = dictionary.decoder_directions().detach().float().cpu()
    d_sae = W_dec.shape[0]
    metrics.check_finite(W_dec, "decoder rows")
    n = min(n_neighbours, d_sae - 1)
    W_enc = dictionary.encoder_directions()
    read = None if W_enc is None else W_enc.detach().float().cpu()
    unknown = np.full(d_sae, np.nan, np.float32)
    columns = dict.fromkeys(("bias", "encoder_decoder_cosine", "max_cos", "mcs", "self_similarity"), unknown)
    found: list[Neighbours] = []
    if n:
        found += _among_own("decoder", W_dec, n)
        columns["max_cos"] = found[0].cosines[:, 0]
        found += _among_own("encoder", read, n) if read is not None and not _tied(read, W_dec) else []
    for name, other in others.items():
        rows = other.decoder_directions().detach().float().cpu()
        nearest = metrics.nearest_directions(W_dec, rows, min(n_neighbours, rows.shape[0]))
        found.append(Neighbours("decoder", name, nearest.cosines.numpy(), nearest.indices.numpy()))
        columns["mcs"] = np.fmax(columns["mcs"], found[-1].cosines[:, 0])
        theirs = _read_alike(dictionary, other)
        if read is not None and theirs is not None and not (_tied(read, W_dec) and _tied(theirs, rows)):
            nearest = metrics.nearest_directions(read, theirs, min(n_neighbours, theirs.shape[0]))
            found.append(Neighbours("encoder", name, nearest.cosines.numpy(), nearest.indices.numpy()))
    b_enc = getattr(dictionary, "b_enc", None)
    if isinstance(b_enc, Tensor) and b_enc.shape == (d_sae,):
        columns["bias"] = b_enc.detach().float().cpu().numpy()
    sites = dictionary.sites
    if read is not None and read.shape == W_dec.shape and sites is not None and sites.inputs == sites.outputs:
        columns["encoder_decoder_cosine"] = metrics.encoder_decoder_cosine(read.T, W_dec).numpy()
    history = _history(W_dec, [] if folder is None else checkpoints_in(folder))
    if history.steps.size:
        columns["self_similarity"] = history.cosines[-1]
    columns |= _shape(W_dec)
    neurons, weights = _neurons(W_dec)
    columns["top_neuron_share"] = weights[:, 0] ** 2
    return Relations(columns, found, neurons, weights, history, metrics.outlier_dimensions(W_dec).numpy())


def _history(W_dec: Float[Tensor, "d_sae d"], checkpoints: Sequence[Path]) -> History:
    """One checkpoint is in memory at a time."""
    d_sae = W_dec.shape[0]
    cosines = np.zeros((len(checkpoints), d_sae), np.float32)
    norms = np.zeros_like(cosines)
    for i, path in enumerate(checkpoints):
        before = dictionaries.load(path).decoder_directions().detach().float().cpu()
        cosines[i] = torch.nn.functional.cosine_similarity(before, W_dec, dim=1).numpy()
        norms[i] = before.norm(dim=1).numpy()
    steps = [artifact.load(path, "dictionary").extra["step"] for path in checkpoints]
    return History(np.array(steps, np.int64), cosines, norms)


def _among_own(kind: str, rows: Float[Tensor, "d_sae d"], n: int) -> list[Neighbours]:
    """Each latent's nearest others: one more is looked for, and the latent itself is left out."""
    d_sae = rows.shape[0]
    cosines, indices = [], []
    with track(f"nearest, {kind}", d_sae, "latents") as progress:
        for start in range(0, d_sae, ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            nearest = metrics.nearest_directions(part, rows, n + 1)
            own = nearest.indices == torch.arange(start, start + part.shape[0])[:, None]
            # Where others coincide with a latent it may not be among its own nearest: then the last goes.
            own[~own.any(1), -1] = True
            kept = ~own
            cosines.append(nearest.cosines[kept].view(part.shape[0], n))
            indices.append(nearest.indices[kept].view(part.shape[0], n))
            progress.advance(part.shape[0])
    return [Neighbours(kind, None, torch.cat(cosines).numpy(), torch.cat(indices).numpy())]


def _read_alike(dictionary: Dictionary, other: Dictionary) -> Float[Tensor, "d_sae d"] | None:
    """The other's encoder directions, if it has any and reads the same place; there alone can they be compared."""
    places = [
        None if one.sites is None else [(site.model_fingerprint, site.hookpoint) for site in one.sites.inputs]
        for one in (dictionary, other)
    ]
    W_enc = other.encoder_directions()
    if W_enc is None or places[0] is None or places[0] != places[1]:
        return None
    return W_enc.detach().float().cpu()


def _tied(read: Tensor, W_dec: Tensor) -> bool:
    """Whether encoder and decoder directions are the same, so that one table says it all."""
    return read.shape == W_dec.shape and torch.allclose(read, W_dec)


def _shape(W_dec: Float[Tensor, "d_sae d"]) -> dict[str, np.ndarray]:
    """How each direction's entries are spread."""
    moments = metrics.moments(W_dec)
    outliers = metrics.outlier_dimensions(W_dec)
    square = W_dec.square()
    share = square[:, outliers].sum(1) / square.sum(1)
    return {
        "skew": moments.skew.float().numpy(),
        "kurtosis": moments.kurtosis.float().numpy(),
        "n_effective_neurons": metrics.effective_neurons(W_dec).float().numpy(),
        "outlier_share": share.numpy(),
    }


def _neurons(W_dec: Float[Tensor, "d_sae d"]) -> tuple[np.ndarray, np.ndarray]:
    unit = metrics.unit_rows(W_dec)
    neurons = unit.abs().topk(min(N_NEURONS, unit.shape[1]), dim=1).indices
    return neurons.numpy(), unit.gather(1, neurons).numpy()
