"""Edits that take a concept out of rows of activations. Knows rows and latents; knows no model and no text.

All of them are affine in a row and its latents' activations, so that they commute with means over positions: what is
fitted and probed on a text's pooled row is what is done at each of its positions.
"""

from __future__ import annotations

import abc
import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "AffineErasure",
    "Arm",
    "Erasure",
    "LatentErasure",
    "class_directions",
    "leace",
    "project_out",
    "random_basis",
]


class Erasure(abc.ABC):
    """An edit of rows."""

    latents: tuple[int, ...] = ()
    """Latents whose activations it has to know."""

    @abc.abstractmethod
    def rows(self, x: Float[Tensor, "rows d"], acts: Float[Tensor, "rows n"]) -> Float[Tensor, "rows d"]:
        """The rows without the concept.

        Args:
            x: Activations, raw, at the dictionary's outputs.
            acts: Of `latents` on them, in that order.
        """


class LatentErasure(Erasure):
    """Latents set to a value, what the dictionary does not reconstruct kept: x + (value - f) D.

    Args:
        latents: Which.
        values: What each is set to.
        directions: What each writes.
    """

    def __init__(
        self, latents: tuple[int, ...], values: Float[Tensor, " n"], directions: Float[Tensor, "n d"]
    ) -> None:
        self.latents, self.values, self.directions = latents, values, directions

    def rows(self, x: Float[Tensor, "rows d"], acts: Float[Tensor, "rows n"]) -> Float[Tensor, "rows d"]:
        """As the class says."""
        moved: Tensor = (self.values.to(x) - acts.to(x)) @ self.directions.to(x)
        return x + moved


class AffineErasure(Erasure):
    """A few directions taken out about a centre, which stays: x - (x - centre) right^T left^T.

    Args:
        left: What is taken out.
        right: How much of it a row holds.
        centre: The row that is left as it is.
    """

    def __init__(
        self, left: Float[Tensor, "d rank"], right: Float[Tensor, "rank d"], centre: Float[Tensor, " d"]
    ) -> None:
        self.left, self.right, self.centre = left, right, centre

    def rows(self, x: Float[Tensor, "rows d"], acts: Float[Tensor, "rows n"]) -> Float[Tensor, "rows d"]:
        """As the class says; `acts` does not matter."""
        held: Tensor = (x - self.centre.to(x)) @ self.right.to(x).T
        return x - held @ self.left.to(x).T


class Arm(NamedTuple):
    """One way to erase."""

    kind: str
    n: int
    """Latents, or directions."""
    draw: int | None
    """Which of several random ones."""
    erasure: Erasure

    @property
    def name(self) -> str:
        """Of this arm alone."""
        return f"{self.kind}/{self.n}" + ("" if self.draw is None else f"/{self.draw}")


def project_out(basis: Float[Tensor, "rank d"], centre: Float[Tensor, " d"]) -> AffineErasure:
    """Leaves nothing along orthonormal directions but the centre's share."""
    return AffineErasure(basis.T, basis, centre)


def class_directions(x: Float[Tensor, "n d"], labels: Int[np.ndarray, " n"]) -> Float[Tensor, "rank d"]:
    """An orthonormal basis of the differences between class means, the widest apart first; of two classes, their
    difference alone.

    Source: mean projection, Haghighatkhah et al. 2022, arXiv:2212.04273.
    """
    means = torch.stack(
        [x[torch.from_numpy(labels == c)].double().mean(0) for c in range(int(labels.max()) + 1)]
    )
    _, sizes, basis = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    apart: Tensor = basis[: len(means) - 1][sizes[: len(means) - 1] > 1e-9 * sizes[0].clamp_min(1e-30)]
    return apart


def random_basis(rank: int, d: int, seed: int) -> Float[Tensor, "rank d"]:
    """Orthonormal directions, evenly distributed."""
    drawn = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made: Tensor = torch.linalg.qr(drawn).Q
    return made.T


def leace(x: Float[Tensor, "n d"], labels: Int[np.ndarray, " n"]) -> AffineErasure:
    """No linear probe tells the labels of the rows it was fitted to, at the least change of them.

    Source: Belrose et al. 2023, arXiv:2306.03819; the `concept-erasure` package with its defaults, in float64.
    """
    with warnings.catch_warnings():  # it asks torch for a compiler that has a successor
        warnings.simplefilter("ignore", DeprecationWarning)
        from concept_erasure import LeaceEraser

    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long()).double()
    found = LeaceEraser.fit(x.double(), one_hot)
    assert found.bias is not None
    return AffineErasure(found.proj_left, found.proj_right, found.bias)
