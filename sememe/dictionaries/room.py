"""How long a buffer a training step's entries need, known without waiting for the device. Knows no penalty.

Where the number of active latents varies, a GPU writes them into a buffer of fixed capacity (`encoded`). Here the
capacity follows the number of entries of the step before: that number sets off for the host as soon as it is counted,
and is read when the next step begins, when the device still has that step's gradients and update to do.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from sememe import kernels
from sememe.encoded import Encoded

__all__ = ["Room"]

SPARE = 1.25
"""Capacity per entry of the step before: l0 moves by a few percent from step to step."""
LONGEST_ROW = 4096
"""Entries that a row may hold in the kernels' registers; where rows get longer, the dense product serves."""
ROW_SHARE = 16
"""What a row may hold, as a multiple of its share of the capacity (see `kernels.encode_threshold`)."""


class Room:
    """The capacity of the next step's buffer, of one dictionary or of several that step as one.

    `entries`, a tensor of the dictionary's, holds what the step before needed, -1 before the first. It is part of a
    checkpoint: so a resumed run takes the same path, and no bit hangs on when a number arrived.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, torch.cuda.Event, int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()  # a copy's number is not on its way

    def capacity(self, entries: Int[Tensor, ""], n_rows: int, d_sae: int) -> int | None:
        """Entries to have room for; None where nothing is known yet, or where a dense product is faster."""
        return self.capacities(entries.view(1), n_rows, d_sae)[0]

    def capacities(self, entries: Int[Tensor, " n"], n_rows: int, d_sae: int) -> list[int | None]:
        """The same of several dictionaries, each with n_rows and d_sae of its own."""
        return [_capacity(n, n_rows, d_sae) for n in self._arrived(entries)]

    def note(
        self, entries: Int[Tensor, "*n"], encoded: Encoded, capacities: Int[Tensor, "*n"] | None = None
    ) -> None:
        """Remember what a step needed: twice its buffer if that was too small.

        Args:
            entries: Where it is remembered; with an axis, that of several dictionaries.
            encoded: What was encoded, of all in one (see `kernels.encode_threshold`).
            capacities: What each had room for; what `encoded` has if not given.
        """
        ends = encoded.row_ptr[:: encoded.n_rows // entries.numel()]
        needed = (ends[1:] - ends[:-1]).view(entries.shape)
        if encoded.overflow is not None:
            doubled = 2 * encoded.acts.shape[0] if capacities is None else 2 * capacities
            needed = torch.where(encoded.overflow, doubled, needed)
        entries.copy_(needed)
        if entries.device.type == "cuda":
            numbers = torch.empty(entries.shape, dtype=torch.int64, pin_memory=True)
            numbers.copy_(entries, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(entries.device))
            self._sent = (numbers, arrived, entries._version)

    def _arrived(self, entries: Int[Tensor, " n"]) -> list[int]:
        sent, self._sent = self._sent, None
        if sent is None or sent[2] != entries._version:  # the first step, or the first after a resume
            return [int(number) for number in entries.tolist()]
        sent[1].synchronize()
        return [int(number) for number in sent[0].view(-1).tolist()]


def _capacity(n: int, n_rows: int, d_sae: int) -> int | None:
    """For n entries in the step before, -1 if there was none."""
    if n < 0:
        return None
    wanted = max(int(SPARE * n), n_rows)
    step = 1 << max(0, wanted.bit_length() - 3)  # few lengths, so that memory is used again
    capacity = -(-wanted // step) * step
    longest = min(d_sae, ROW_SHARE * -(-capacity // n_rows))
    if capacity > kernels.DENSE_SHARE * n_rows * d_sae or longest > LONGEST_ROW:
        return None
    return capacity
