"""Large float32 arrays that are used again once nobody holds them. Knows no kernel.

A step needs the same arrays as the one before (gradients, errors). Taken from the system each time, every page of
theirs is mapped, zeroed and given back again, which costs as much as what is computed in them (docs/log.md).
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

__all__ = ["empty"]

SMALLEST = 2**18
"""Numbers below which an array is simply made."""
N_SHAPES = 8
"""Shapes that are remembered; those used longest ago are forgotten first."""

_kept: OrderedDict[tuple[int, ...], list[NDArray[np.float32]]] = OrderedDict()
_lock = threading.Lock()


def empty(*shape: int) -> NDArray[np.float32]:
    """An array whose contents are left over from before.

    It is free again when the array, its views and tensors made from it are gone.
    """
    if np.prod(shape) < SMALLEST:
        return np.empty(shape, np.float32)
    with _lock:
        arrays = _kept.setdefault(shape, [])
        _kept.move_to_end(shape)
        while len(_kept) > N_SHAPES:
            _kept.popitem(last=False)
        index = _first_idle(arrays)
        if index is None:
            arrays.append(np.empty(shape, np.float32))
            index = len(arrays) - 1
        return arrays[index]


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
