"""Threads of our own for the CPU path: ranges of rows or latents side by side. Knows no kernel.

Neither torch's nor numba's: each of those keeps an OpenMP team that goes on spinning after its work, and two teams on
the same cores take them from each other (measured: docs/log.md). A worker runs torch on one thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from sememe.kernels.cpu.buffers import aligned

__all__ = ["n_threads", "run", "scratch", "set_threads"]

_T = TypeVar("_T")

_executor: ThreadPoolExecutor | None = None
_wanted: int | None = None
_local = threading.local()


def n_threads() -> int:
    """How many ranges run at once: as many as torch uses, if never set."""
    return _wanted or torch.get_num_threads()


def set_threads(n: int) -> None:
    """Run n ranges at once from now on."""
    global _wanted
    if n != _wanted:
        _forget()
        _wanted = n


def run(task: Callable[[int, int], _T], n_items: int, chunk: int) -> list[_T]:
    """task(start, stop) for every `chunk` items, in threads; results in order.

    The ranges depend on the numbers alone, so what is computed does not depend on the number of threads. The last
    chunks are smaller, so that no thread is left alone with a large one.
    """
    return list(_pool().map(lambda bounds: task(*bounds), _ranges(n_items, chunk)))


def _ranges(n_items: int, chunk: int) -> list[tuple[int, int]]:
    ranges, start = [], 0
    while start < n_items:
        left = n_items - start
        size = chunk if left > 3 * chunk else max(1, chunk // 2) if left > chunk else max(1, chunk // 4)
        stop = min(start + size, n_items)
        ranges.append((start, stop))
        start = stop
    return ranges


def scratch(purpose: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's own buffer of n elements, kept between calls; its contents are left over from before."""
    buffers: dict[tuple[str, torch.dtype], torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get((purpose, dtype))
    if buffer is None or buffer.numel() < n:
        buffer = buffers[purpose, dtype] = aligned(n, dtype)
    return buffer[:n]


def _pool() -> ThreadPoolExecutor:
    global _executor
    if _executor is None:
        n, of_torch = n_threads(), torch.get_num_threads()
        _executor = ThreadPoolExecutor(n, "sememe-kernels", initializer=_one_thread_of_torch)
        everyone = threading.Barrier(
            n
        )  # so that each worker has started, and set torch's threads, before we go on
        for waiting in [_executor.submit(everyone.wait) for _ in range(n)]:
            waiting.result()
        torch.set_num_threads(of_torch)  # a worker's setting became the default of later threads
    return _executor


def _one_thread_of_torch() -> None:
    torch.get_num_threads()  # torch copies its default into a thread when first asked there: not after our setting
    torch.set_num_threads(1)


def _forget() -> None:
    global _executor
    if _executor is not None:
        _executor.shutdown(wait=False)
    _executor = None


def _after_fork() -> None:
    global _executor
    _executor = None  # its threads stayed behind in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
