"""Where a dictionary's directions lie: in the neuron basis, in one another's way, in a null space. Knows matrices."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.errors import ConfigError, ShapeError
from sememe.metrics.directions import check_finite, nearest_directions, unit_rows
from sememe.metrics.sums import Statistic, over_pairs

__all__ = [
    "Correlations",
    "Moments",
    "NeuronSparsity",
    "RandomBaseline",
    "capacity",
    "correlations",
    "effective_neurons",
    "moments",
    "neuron_sparsity",
    "null_space_share",
    "outlier_dimensions",
    "probe_rank",
    "random_moments",
    "random_rows",
    "token_match",
]

NULL = 0x6E756C6C
"""Sets the stream of random directions apart from all others of the same seed."""


class NeuronSparsity(NamedTuple):
    """How decoder rows lie in the basis of single dimensions (neurons)."""

    top_1: Float[Tensor, " d_sae"]
    """Share of each row's square that its largest dimension has."""
    next_9: Float[Tensor, " d_sae"]
    """Share that the nine after it have."""
    one_sparse: Bool[Tensor, " d_sae"]
    """top_1 > 0.35 and next_9 < 0.1."""
    ten_sparse: Bool[Tensor, " d_sae"]
    """Not that, and top_1 + next_9 > 0.35."""

    def shares(self) -> dict[str, float]:
        """Share of the latents in each class; the rest is dense."""
        one, ten = (float(part.double().mean()) for part in (self.one_sparse, self.ten_sparse))
        return {"one_sparse": one, "ten_sparse": ten, "dense": 1 - one - ten}


def neuron_sparsity(W_dec: Float[Tensor, "d_sae d"]) -> NeuronSparsity:
    """Which latents are a neuron, a few, or spread over many.

    Source: Nanda 2023: of the non-rare latents on a one-layer model's MLP 92.1% were dense, 3.9% ten-sparse, 4%
    one-sparse. Rows of length 0 are dense.

    Raises:
        ShapeError: fewer than ten dimensions.
        ActivationError: a row is NaN or infinite.
    """
    check_finite(W_dec, "decoder rows")
    if W_dec.shape[1] < 10:
        raise ShapeError(
            "neuron sparsity must be asked of at least 10 dimensions",
            W_dec.shape[1],
            "Take wider activations.",
        )
    largest = unit_rows(W_dec).square().topk(10, dim=1).values
    top_1, next_9 = largest[:, 0], largest[:, 1:].sum(1)
    one = (top_1 > 0.35) & (next_9 < 0.1)
    return NeuronSparsity(top_1, next_9, one, ~one & (top_1 + next_9 > 0.35))


class Moments(NamedTuple):
    """Standardised moments of each row's entries, about 0 or about their mean."""

    skew: Float[Tensor, " n"]
    kurtosis: Float[Tensor, " n"]


def moments(rows: Float[Tensor, "n d"], *, about_zero: bool = False) -> Moments:
    """Skew and kurtosis of each row's entries; 3 is the kurtosis of a normal distribution. NaN for constant rows.

    Args:
        rows: Directions, or anything else by row.
        about_zero: Not about the row's mean (as the sparse-coding project has it).
    """
    values = rows.detach().double()
    if not about_zero:
        values = values - values.mean(1, keepdim=True)
    square = values.square().mean(1)
    return Moments(values.pow(3).mean(1) / square.pow(1.5), values.pow(4).mean(1) / square.square())


def random_rows(n: int, d: int, seed: int = 0, stream: int = NULL) -> Float[Tensor, "n d"]:
    """Normal numbers: directions drawn uniformly from the sphere, of no norm in particular.

    Their stream is no training's: with a generator of the bare seed they would be the very rows that a dictionary of
    the same size and seed was started from, and still resembles. The random-directions baseline has another stream: a
    null has to be strange to it, too.
    """
    own = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.randn(n, d, generator=torch.Generator().manual_seed(int(own)))


class RandomBaseline(NamedTuple):
    """What directions drawn uniformly from the sphere have."""

    kurtosis: float
    skew: float
    kurtosis_std: float
    """Standard deviation over directions."""
    skew_std: float


def random_moments(n: int, d: int, seed: int = 0) -> RandomBaseline:
    """Moments of n random directions in d dimensions: what `moments` is to be compared with."""
    made = moments(random_rows(n, d, seed))
    return RandomBaseline(
        float(made.kurtosis.mean()),
        float(made.skew.mean()),
        float(made.kurtosis.std()),
        float(made.skew.std()),
    )


def effective_neurons(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """1 / sum of squared shares of each row's square: 1 for a single dimension, d for all alike (Simpson); NaN for
    rows of length 0."""
    shares = unit_rows(rows).square().double().square().sum(1)
    return torch.where(shares == 0, torch.nan, 1 / shares)


def capacity(W_dec: Float[Tensor, "d_sae d"], *, block: int = 1024) -> Float[Tensor, " d_sae"]:
    """`(w_i . w_i)^2 / sum_j (w_i . w_j)^2`: how much of a dimension each latent has to itself.

    Source: Scherlis et al. 2022, arXiv:2210.01892, eq. 3. Sums to at most d. 0 for rows of length 0. In blocks.
    """
    rows = W_dec.detach().double()
    own = rows.square().sum(1)
    shared = torch.cat([(part @ rows.T).square_().sum(1) for part in torch.split(rows, block)])
    return torch.where(own == 0, 0.0, own.square() / shared.clamp_min(1e-300))  # so written, NaN stays


def null_space_share(
    rows: Float[Tensor, "n d"], W_out: Float[Tensor, "d d_model"], tolerance: float = 1e-5
) -> Float[Tensor, " n"]:
    """Share of each row's square that an output projection maps to nothing.

    Source: Nanda 2023; with d = 4 d_model, 0.75 is what random directions have. NaN for rows of length 0.

    Args:
        rows: Directions in the projection's input.
        W_out: The projection, `x @ W_out`.
        tolerance: Singular values below this times the largest count as 0.

    Raises:
        ShapeError: the projection reads another width.
    """
    if rows.shape[1] != W_out.shape[0]:
        raise ShapeError(
            f"the projection must read the rows' width {rows.shape[1]}",
            W_out.shape[0],
            "Transpose it, perhaps.",
        )
    left, values, _ = torch.linalg.svd(W_out.detach().double(), full_matrices=False)
    seen = left[:, values > tolerance * values[0]]
    unit = unit_rows(rows).double()
    unseen: Tensor = 1 - (unit @ seen).square().sum(1)
    return torch.where(unit.any(1), unseen.clamp(0, 1), torch.nan)


def encoder_decoder_cosine(
    W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " d_sae"]:
    """How much each latent reads along what it writes: 1 for tied weights, 0 where either has no length.

    Source: Nanda 2023, among the analyses of that replication.

    Args:
        W_enc: Encoder columns.
        W_dec: Decoder rows, of the same width.
    """
    cosine: Tensor = (unit_rows(W_enc.T) * unit_rows(W_dec)).sum(1)
    return cosine


def outlier_dimensions(W_dec: Float[Tensor, "d_sae d"], times: float = 6.0) -> Int[Tensor, " n"]:
    """Dimensions whose mean square over all rows is more than `times` the median dimension's, largest first.

    Language models have a few dimensions of huge variance; latents that lie in them say little.

    Raises:
        ActivationError: a row is NaN or infinite.
    """
    check_finite(W_dec, "decoder rows")
    energy = unit_rows(W_dec).square().mean(0)
    found = torch.nonzero(energy > times * energy.median()).view(-1)
    return found[energy[found].argsort(descending=True)]


def token_match(
    W_dec: Float[Tensor, "d_sae d"], rows: Float[Tensor, "vocab d"], *, block: int = 4096
) -> tuple[Float[Tensor, " d_sae"], Int[Tensor, " d_sae"]]:
    """The (un)embedding row that is nearest to each latent: its cosine, its token.

    Source: asked by the sparse-coding project: is layer 0 just tokens? Rows are centred first, as they share a part.

    Raises:
        ActivationError: a row is NaN or infinite.
    """
    check_finite(W_dec, "decoder rows")
    check_finite(rows, "embedding rows")
    nearest = nearest_directions(W_dec, rows - rows.mean(0), block=block)
    return nearest.cosines[:, 0], nearest.indices[:, 0]


def probe_rank(
    W_dec: Float[Tensor, "d_sae d"], probe: Float[Tensor, " d"]
) -> tuple[Float[Tensor, " d_sae"], Int[Tensor, " d_sae"]]:
    """Latents by cosine to a probe's direction, largest first: the cosines, the latents.

    Raises:
        ConfigError: the probe is 0, NaN or infinite.
        ActivationError: a decoder row is NaN or infinite.
    """
    length = float(probe.norm())
    if not math.isfinite(length) or length == 0:
        raise ConfigError("a probe must be a direction", f"a vector of length {length:g}", "Fit it again.")
    check_finite(W_dec, "decoder rows")
    rows = unit_rows(W_dec)
    cosines = rows @ (probe / length).to(rows)
    order = cosines.argsort(descending=True, stable=True)
    return cosines[order], order


class Correlations(NamedTuple):
    """How much a few coordinates of the data go together."""

    mean_absolute: Statistic
    """Mean over pairs of |correlation|; NaN where a coordinate never changes."""
    share_small: Statistic
    """Share of the pairs with |correlation| below 0.05: how sparse the covariance is."""


def correlations(
    values: Float[Tensor, "rows k"], small: float = 0.05, *, n_bootstrap: int = 0, seed: int = 0
) -> Correlations:
    """How sparse the covariance of k coordinates is: of latents' activations, say, against as many neurons'.

    Source: asked by the sparse-coding project (is the covariance sparse in the basis of the top latents?); the
    measure, correlations, so that no coordinate's scale counts, is ours.

    Args:
        values: The coordinates of each row, at least two of each.
        small: Correlations below this count as none.
        n_bootstrap: Draws of coordinates for the intervals; 0 gives none.
        seed: Of the draws.

    Raises:
        ShapeError: fewer than two rows or coordinates.
    """
    n, k = values.shape
    if n < 2 or k < 2:
        raise ShapeError(
            "correlations must be asked of at least 2 rows and 2 coordinates", (n, k), "Take more of them."
        )
    centred = values.detach().double() - values.detach().double().mean(0)
    scaled = centred / centred.norm(dim=0)
    table = (scaled.T @ scaled).abs()
    below = torch.where(table.isfinite(), (table < small).double(), torch.nan)
    options: dict[str, Any] = {
        "n_bootstrap": n_bootstrap,
        "seed": seed,
        "cause": "a coordinate never changes, or is NaN or infinite",
    }
    return Correlations(over_pairs(table, **options), over_pairs(below, **options))
