"""What a dictionary is trained for: its own loss, or one that is handed to the trainer. Knows no language model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries import Loss, Trainable
from sememe.source import Batch

__all__ = ["Objective", "own_loss"]


@runtime_checkable
class Objective(Protocol):
    """A loss of one batch."""

    def __call__(
        self,
        dictionary: Trainable,
        batch: Batch,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        progress: float,
    ) -> Loss:
        """The loss; its terms hold `mse`.

        Args:
            dictionary: In training units and training mode.
            batch: As the source gave it, in raw units.
            x: Its inputs in training units.
            target: Its targets in training units.
            progress: From 0 to 1 over the run.
        """
        ...


def own_loss(
    dictionary: Trainable,
    batch: Batch,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    progress: float,
) -> Loss:
    """The loss of the dictionary's paper."""
    return dictionary.loss(x, target, progress)
