"""Which latents are dead, without making a GPU run dry. Knows no loss."""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["DeadLatents"]


class DeadLatents:
    """Ids of the latents that have been silent for long.

    How many there are decides shapes, so the host has to learn it. On a GPU the number sets off for the host when a
    step ends and is read when the next step asks: by then that step's encoder product is queued behind it, and the
    device has work while the host waits for the step before. A number that a reset or a resumed run has overtaken
    is not used, but counted anew.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, torch.cuda.Event, int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()  # a copy's number is not on its way

    def send(self, silent: Int[Tensor, "*n d_sae"], after: int | Int[Tensor, "n 1"]) -> None:
        """Let the number of dead latents set off; nothing to do on a CPU.

        Args:
            silent: Rows since each latent fired; with a leading axis, those of several dictionaries.
            after: A latent that has been silent for more is dead; one number for each dictionary, or for all.
        """
        if silent.device.type != "cuda":
            return
        numbers = torch.empty(silent.shape[:-1], dtype=torch.int64, pin_memory=True)
        numbers.copy_((silent > after).sum(-1), non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(silent.device))
        self._sent = (numbers, arrived, silent._version)

    def ids(self, silent: Int[Tensor, " d_sae"], after: int) -> Int[Tensor, " n_dead"]:
        """Ids of the dead latents, rising; arguments as in `send`."""
        return self.ids_of_each(silent[None], after)[0]

    def ids_of_each(
        self, silent: Int[Tensor, "n d_sae"], after: int | Int[Tensor, "n 1"]
    ) -> list[Int[Tensor, " n_dead"]]:
        """Ids of each dictionary's dead latents, rising; arguments as in `send`."""
        sent, self._sent = self._sent, None
        dead = silent > after
        if sent is None or sent[2] != silent._version:
            return [torch.nonzero(row).view(-1) for row in dead]
        numbers, arrived, _ = sent
        arrived.synchronize()
        order = torch.sort(dead.to(torch.int8), dim=1, descending=True, stable=True).indices
        return [row[:number] for row, number in zip(order, numbers.view(-1).tolist(), strict=True)]
