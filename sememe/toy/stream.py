"""A truth to learn from, and an endless stream of its rows that a trainer can read like any other."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.base import Batch, Sites
from sememe.encoded import Encoded
from sememe.errors import CorruptError

__all__ = ["PlantedBatch", "Stream", "Truth", "numbers"]


def numbers(purpose: str, seed: int) -> torch.Generator:
    """Random numbers of their own for each purpose: neighbouring seeds share nothing."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class PlantedBatch(NamedTuple):
    """Rows and the codes they were made from."""

    x: Float[Tensor, "n d"]
    codes: Encoded


@runtime_checkable
class Truth(Protocol):
    """Known directions, and rows made of them."""

    features: Float[Tensor, "n_features d"]
    """Unit directions."""

    def batch(self, n: int, generator: torch.Generator) -> PlantedBatch:
        """n rows."""
        ...


class Stream:
    """An endless stream of a truth's rows. Its state is the generator's, so it resumes exactly.

    Args:
        truth: What makes the rows.
        d: Their width.
        seed: Decides the stream.
    """

    sites: Sites | None = None
    n_rows: int | None = None

    def __init__(self, truth: Truth, d: int, seed: int) -> None:
        self.truth, self.seed = truth, seed
        self.d_in = self.d_out = d
        self._generator = numbers("rows", seed)

    def next_batch(self, n: int) -> Batch:
        """The next n rows."""
        x = self.truth.batch(n, self._generator).x
        return Batch(x, x)

    def sample(self, n: int) -> Batch:
        """n rows for initialisation, the same ones on every call; the stream does not advance."""
        x = self.truth.batch(n, numbers("sample", self.seed)).x
        return Batch(x, x)

    def hold_out(self, n: int) -> Batch:
        """n rows from random numbers of their own; the stream never gives them."""
        x = self.truth.batch(n, numbers("held out", self.seed)).x
        return Batch(x, x)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another stream of the same config was.

        Raises:
            CorruptError: the state is not a generator's.
        """
        try:
            self._generator.set_state(state["generator"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CorruptError(
                "the state of a planted stream must hold a generator's state",
                f"{type(error).__name__}: {str(error).splitlines()[0]}",
                "Delete the checkpoint and train again.",
            ) from None
