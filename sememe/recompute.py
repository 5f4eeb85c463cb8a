"""Functions whose inner tensors are not kept for the gradient but computed again. Knows tensors, nothing of ours.

What `torch.utils.checkpoint` does without its first call, which imports PyTorch's compiler: 150 MB, and seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["recomputed"]

_T = TypeVar("_T")
_DEVICES = "cpu", "cuda"


def recomputed(function: Callable[..., _T], *args: object) -> _T:
    """`function(*args)`, holding of its graph only the arguments and what it closes over.

    The way back calls it once more, under the autocast of now. It must do the same again: what it draws at random, from
    a generator that it makes itself. For gradients of the first order, through all of its outputs or some.

    Args:
        function: What to compute.
        args: What is handed to it.
    """
    again: dict[int, Tensor] = {}
    n_saved, autocast = 0, _autocast_of_now()

    def pack(_: Tensor) -> int:
        nonlocal n_saved
        n_saved += 1
        return n_saved - 1

    def unpack(number: int) -> Tensor:
        if number not in again:
            kept: list[Tensor] = []
            with (
                torch.enable_grad(),
                autocast(),
                saved_tensors_hooks(lambda tensor: kept.append(tensor.detach()), _refuse),
            ):
                function(*args)
            again.update(enumerate(kept))
        return again.pop(number)

    with saved_tensors_hooks(pack, unpack):
        return function(*args)


def _autocast_of_now() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What enters the state of autocast again that holds now: the way back has none."""
    states = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in _DEVICES
    ]

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in states:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            yield

    return again


def _refuse(_: object) -> Tensor:
    raise AssertionError("a function that is computed again must not go back inside")
