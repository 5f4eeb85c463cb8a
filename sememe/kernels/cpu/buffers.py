"""Memory for large arrays: used again once nobody holds it, in large pages. Knows no kernel.

A step needs the same arrays as the one before (gradients, errors). Taken from the system each time, every page of
theirs is mapped, zeroed and given back again, which costs as much as what is computed in them (docs/log.md).
"""

from __future__ import annotations

import math
import sys
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["aligned", "empty", "in_large_pages"]

SMALLEST = 2**18
"""Numbers below which an array is simply made."""
N_SHAPES = 8
"""Shapes that are remembered; those used longest ago are forgotten first."""

LARGE = 2**22
"""Bytes from which numpy asks the system for large pages."""
LINE = 64
"""Bytes of a cache line."""

_kept: OrderedDict[tuple[int, ...], list[NDArray[np.float32]]] = OrderedDict()
_lock = threading.Lock()


def empty(*shape: int) -> NDArray[np.float32]:
    """An array whose contents are left over from before.

    It is free again when the array, its views and tensors made from it are gone.
    """
    n = math.prod(shape)
    if n < SMALLEST:
        return np.empty(shape, np.float32)
    with _lock:
        owners = _kept.setdefault(shape, [])
        _kept.move_to_end(shape)
        while len(_kept) > N_SHAPES:
            _kept.popitem(last=False)
        index = _first_idle(owners)
        if index is None:
            owners.append(np.empty(n + LINE // 4, np.float32))
            index = len(owners) - 1
        start = _to_line(owners[index]) // 4
        return owners[index][start : start + n].reshape(
            shape
        )  # its base is the owner, which is what is counted


def in_large_pages(tensor: Tensor) -> Tensor:
    """The same values and strides in memory that is whole cache lines and, where the system gives them, large pages.

    Rows are read in no order while training: of 4 KB pages there are more than the processor remembers the places of.
    Small tensors, and those of other devices, are returned as they are.
    """
    n_bytes = tensor.numel() * tensor.element_size()
    dense = tensor.is_contiguous() or (tensor.dim() == 2 and tensor.T.is_contiguous())
    if tensor.device.type != "cpu" or n_bytes < LARGE or not dense:
        return tensor
    moved = aligned(tensor.numel(), tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return moved.copy_(tensor)


def aligned(n: int, dtype: torch.dtype) -> Tensor:
    """n numbers from the start of a cache line on, in large pages where the system gives them."""
    n_bytes = n * dtype.itemsize
    owner = np.empty(n_bytes + LINE, np.uint8)
    start = _to_line(owner)
    return torch.from_numpy(owner[start : start + n_bytes]).view(dtype)


def _to_line(owner: NDArray[Any]) -> int:
    """Bytes until the next cache line starts."""
    return int(-owner.ctypes.data % LINE)


def _first_idle(arrays: list[NDArray[np.float32]]) -> int | None:
    for index in range(len(arrays)):
        if sys.getrefcount(arrays[index]) == _IDLE:
            return index
    return None


def _count_of_idle() -> int:
    """How many references Python counts to an array that only a list holds, asked as above."""
    arrays = [np.empty(1, np.float32)]
    return sys.getrefcount(arrays[0])


_IDLE = _count_of_idle()
