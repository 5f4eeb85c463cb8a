"""The processes that train one model together, started by `torchrun`; or this process alone. Knows no model.

Every process holds the whole model and reads its part of each batch. The first one writes everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sememe.errors import ConfigError

__all__ = ["Group", "joined"]


class Group:
    """This process among others.

    Args:
        rank: Its number, from 0.
        size: How many there are.
        device: Where it computes.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def told(self, value: Any) -> Any:
        """What the first process says; the others' own value is ignored. Waits for all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def anyone(self, value: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return value
        return float(self.total(torch.tensor(float(value), device=self.device))) > 0

    def shared(self, model: nn.Module) -> nn.Module:
        """The model as all processes train it: gradients are averaged over them in the backward."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def quiet(self, model: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
        """Backwards whose gradients are not yet exchanged: all but a step's last one."""
        if self.size == 1 or unless:
            return nullcontext()
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        return model.no_sync()


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that `torchrun` started, joined and left again; a group of one without it.

    Args:
        device: auto, cpu or cuda; with several processes each takes a CUDA device of its own.

    Raises:
        ConfigError: cuda is asked for and not there, or not for every process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    local = int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0
    where = _device(device, local, size)
    if size == 1:
        yield Group(0, 1, where)
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), size, where)
    finally:
        dist.destroy_process_group()


def _device(device: str, local: int, size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device must be one that torch finds here", "cuda", "Use cpu or auto.")
    if size == 1:
        return torch.device("cuda")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"each process must have a CUDA device of its own, of {torch.cuda.device_count()}",
            f"process {local + 1} on this machine",
            "Lower torchrun's --nproc-per-node, or pass --device cpu.",
        )
    return torch.device("cuda", local)
