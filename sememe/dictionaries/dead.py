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

    def send(self, silent: Int[Tensor, " d_sae"], after: int) -> None:
        """Let the number of dead latents set off; nothing to do on a CPU.

        Args:
            silent: Rows since each latent fired.
            after: A latent that has been silent for more is dead.
        """
        if silent.device.type != "cuda":
            return
        number = torch.empty((), dtype=torch.int64, pin_memory=True)
        number.copy_((silent > after).sum(), non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(silent.device))
        self._sent = (number, arrived, silent._version)

    def ids(self, silent: Int[Tensor, " d_sae"], after: int) -> Int[Tensor, " n_dead"]:
        """Ids of the dead latents, rising; arguments as in `send`."""
        sent, self._sent = self._sent, None
        if sent is None or sent[2] != silent._version:
            return torch.nonzero(silent > after).view(-1)
        number, arrived, _ = sent
        arrived.synchronize()
        return torch.sort((silent > after).to(torch.int8), descending=True, stable=True).indices[
            : int(number)
        ]
