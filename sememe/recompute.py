"""Functions whose inner tensors are not kept for the gradient but computed again. Knows tensors, nothing of ours.

What `torch.utils.checkpoint` does without its first call, which imports PyTorch's compiler: 150 MB, and seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["recomputed"]

_T = TypeVar("_T")


def recomputed(function: Callable[..., _T], *args: object) -> _T:
    """`function(*args)`, holding of its graph only the arguments and what it closes over.

    The way back calls it once more. It must do the same again: what it draws at random, from a generator that it
    makes itself. For gradients of the first order, through all of its outputs or some.

    Args:
        function: What to compute.
        args: What is handed to it.
    """
    again: dict[int, Tensor] = {}
    n_saved = 0

    def pack(_: Tensor) -> int:
        nonlocal n_saved
        n_saved += 1
        return n_saved - 1

    def unpack(number: int) -> Tensor:
        if number not in again:
            kept: list[Tensor] = []
            with (
                torch.enable_grad(),
                saved_tensors_hooks(lambda tensor: kept.append(tensor.detach()), _refuse),
            ):
                function(*args)
            again.update(enumerate(kept))
        return again.pop(number)

    with saved_tensors_hooks(pack, unpack):
        return function(*args)


def _refuse(_: object) -> Tensor:
    raise AssertionError("a function that is computed again must not go back inside")
