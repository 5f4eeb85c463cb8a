"""A planted dictionary with the statistics of real activations, and where it still differs from them.

The features are a trained dictionary's decoder rows; how often each is active, and how strongly (log-normal, of
its own mean and mean square), is counted on real rows; what the dictionary leaves over becomes Gaussian noise of the
same mean and covariance. Features are independent of one another: what differs then is what their company means.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import metrics
from sememe.dictionaries.base import Dictionary
from sememe.encoded import Encoded
from sememe.errors import ConfigError, ShapeError
from sememe.toy.stream import PlantedBatch, Stream

__all__ = ["Fitted", "FittedSource", "differences", "statistics"]

N_AT_ONCE = 1024
LEAST_ROWS = 1000


class Fitted:
    """A generator fitted to rows.

    Args:
        dictionary: Learned from such rows; folded, with positive activations.
        x: The rows, in raw units.

    Raises:
        ShapeError: rows of another width.
        ConfigError: too few rows, or activations with signs.
    """

    @torch.no_grad()
    def __init__(self, dictionary: Dictionary, x: Float[Tensor, "rows d"]) -> None:
        dictionary, x = copy.deepcopy(dictionary).cpu(), x.cpu()
        n_rows, d = x.shape
        if d != dictionary.d_in or dictionary.d_in != dictionary.d_out:
            raise ShapeError(
                f"rows must have d={dictionary.d_in}, and the dictionary must reconstruct what it reads",
                f"{d} to {dictionary.d_out}",
                "Fit with a dictionary of these rows' hookpoint.",
            )
        if n_rows < LEAST_ROWS:
            raise ConfigError(f"a fit must have at least {LEAST_ROWS} rows", n_rows, "Give it more.")
        directions = dictionary.decoder_directions().detach().float()
        scale = directions.norm(dim=1)
        counts = torch.zeros(dictionary.d_sae, dtype=torch.float64)
        sums, squares = torch.zeros_like(counts), torch.zeros_like(counts)
        rest = []
        for part in torch.split(x.float(), N_AT_ONCE):
            encoded = dictionary.encode(part)
            rest.append(part - dictionary.decode(encoded, part))
            active = encoded.acts != 0
            acts, latents = encoded.acts[active], encoded.indices[active].long()
            if bool((acts < 0).any()):
                raise ConfigError(
                    "a fit must be made with activations >= 0", "a negative one", "Take another architecture."
                )
            sizes = (acts * scale[latents]).double()
            counts += torch.bincount(latents, minlength=dictionary.d_sae)
            sums.index_add_(0, latents, sizes)
            squares.index_add_(0, latents, sizes.square())
        alive = counts > 1
        self.features = directions[alive] / directions[alive].norm(dim=1, keepdim=True)
        self.rates = (counts[alive] / n_rows).float()
        mean = sums[alive] / counts[alive]
        spread = (squares[alive] / counts[alive] / mean.square()).log().clamp_min(0)
        self.log_mean = (mean.log() - spread / 2).float()
        self.log_std = spread.sqrt().float()
        silent = Encoded.from_topk(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32), dictionary.d_sae)
        self.centre = dictionary.decode(silent, torch.zeros(1, d))[0]
        left = torch.cat(rest).double()
        self.rest_mean = left.mean(0).float()
        values, vectors = torch.linalg.eigh(torch.cov(left.T))
        self.rest_root = (vectors * values.clamp_min(0).sqrt()).T.float()

    def batch(self, n: int, generator: torch.Generator) -> PlantedBatch:
        """n rows."""
        shape = (n, self.features.shape[0])
        active = torch.rand(shape, generator=generator) < self.rates
        acts = (self.log_mean + self.log_std * torch.randn(shape, generator=generator)).exp()
        codes = torch.where(active, acts, 0.0)
        noise = torch.randn(n, self.rest_root.shape[0], generator=generator) @ self.rest_root
        return PlantedBatch(
            codes @ self.features + self.centre + self.rest_mean + noise, Encoded.from_dense(codes)
        )


class FittedSource(Stream):
    """An endless stream of a fitted generator's rows."""

    def __init__(self, fitted: Fitted, seed: int = 0) -> None:
        super().__init__(fitted, fitted.features.shape[1], seed)


@torch.no_grad()
def differences(
    real: Float[Tensor, "rows d"], made: Float[Tensor, "rows d"], dictionary: Dictionary
) -> list[tuple[str, float, float]]:
    """What is told about rows: (name, of the real ones, of the made ones)."""
    ours, theirs = (statistics(rows.float(), dictionary) for rows in (real, made))
    return [(name, value, theirs[name]) for name, value in ours.items()]


@torch.no_grad()
def statistics(x: Float[Tensor, "rows d"], dictionary: Dictionary) -> dict[str, float]:
    """What is told about rows, by name: norms, spectrum, tails, and what the dictionary does with them."""
    norms = x.norm(dim=1)
    centred = (x - x.mean(0)).double()
    variances = torch.linalg.eigvalsh(centred.T @ centred / x.shape[0]).flip(0).clamp_min(0)
    total = variances.sum()
    unit = centred / centred.norm(dim=1, keepdim=True)
    half = unit.shape[0] // 2
    varying = centred[:, centred.square().mean(0) > 0]
    fourth = varying.pow(4).mean(0) / varying.square().mean(0).square()
    reconstruction = metrics.Reconstruction()
    l0 = 0.0
    for part in torch.split(x, N_AT_ONCE):
        encoded = dictionary.encode(part)
        reconstruction.update(part, dictionary.decode(encoded, part))
        l0 += float(encoded.l0().sum())
    return {
        "mean norm": float(norms.mean()),
        "standard deviation of norms / mean": float(norms.std() / norms.mean()),
        "norm of the mean / mean norm": float(x.mean(0).norm() / norms.mean()),
        "effective dimensions (participation ratio)": float(total.square() / variances.square().sum()),
        "share of variance in the first direction": float(variances[0] / total),
        "share of variance in the first ten": float(variances[:10].sum() / total),
        "kurtosis, mean over dimensions": float(fourth.mean()),
        "kurtosis, largest": float(fourth.max()),
        "mean squared cosine of two centred rows": float(
            (unit[:half] * unit[half : 2 * half]).sum(1).square().mean()
        ),
        "l0 of the dictionary": l0 / x.shape[0],
        "fvu of the dictionary": reconstruction.compute()["fvu"].value,
    }
