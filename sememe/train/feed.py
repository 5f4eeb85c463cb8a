"""Batches on their way to a device. Knows devices and streams; knows neither where batches come from nor what becomes
of them.

A copy from ordinary memory makes the host wait until it is done, and the device with it. Here the rows go into
page-locked memory, and from there on a stream of their own: the copy of a batch runs while the device still works on
the batch before, and the host goes on to read the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sememe.source import Batch

__all__ = ["Feed"]

N_SLOTS = 3
"""Batches on their way at once: one being read, one being copied, one that the device works on."""


class Feed:
    """The way to one device.

    Args:
        device: Where batches go. Only a CUDA device has page-locked memory; to others they go as `Batch.to` says.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pins = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self.pins else None  # type: ignore[no-untyped-call]
        self._slots: list[_Slot] = [_Slot() for _ in range(N_SLOTS)]
        self._n_sent = 0

    def send(self, batch: Batch) -> Batch:
        """The batch on the device, its bits as they are; returns at once, and the batch's memory may be written to.

        Args:
            batch: Anywhere. The target stays x where it is, and whatever else it carries stays where that is.
        """
        if not self.pins or batch.x.device.type != "cpu":
            return batch.to(self.device)
        slot = self._slots[self._n_sent % N_SLOTS]
        self._n_sent += 1
        slot.wait()  # for a copy of N_SLOTS batches ago
        parts = [batch.x] if batch.target is batch.x else [batch.x, batch.target]
        locked = [slot.hold(place, part) for place, part in enumerate(parts)]
        with torch.cuda.stream(self._stream):
            moved = [tensor.to(self.device, non_blocking=True) for tensor in locked]
            slot.leave(self._stream)
        working = torch.cuda.current_stream(self.device)
        working.wait_event(slot.event)
        for tensor in moved:
            tensor.record_stream(working)  # its memory is not given away while a step still reads it
        return batch.of_rows(moved[0], moved[-1])


class _Slot:
    """Page-locked memory for one batch, used again and again."""

    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}
        self.event: Any = None

    def hold(self, place: int, rows: Tensor) -> Tensor:
        """A copy of rows in this slot's memory, which grows if they are more than before."""
        n = rows.numel()
        if (
            place not in self.memory
            or self.memory[place].numel() < n
            or self.memory[place].dtype != rows.dtype
        ):
            self.memory[place] = torch.empty(n, dtype=rows.dtype, pin_memory=True)
        return self.memory[place][:n].view(rows.shape).copy_(rows)

    def leave(self, stream: Any) -> None:
        """Remember the copy that has just been queued."""
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        """Until the last copy from here is done."""
        if self.event is not None:
            self.event.synchronize()
