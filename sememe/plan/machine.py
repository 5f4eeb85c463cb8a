"""How fast this machine multiplies, and what it has. Knows no recipe and no stage."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from sememe.kernels.cpu import native_bfloat16

__all__ = ["Machine", "Speed", "measure"]

ROWS = 2048
LARGEST = 2048
"""Widths of the products that are timed are cut to this, so that a slow machine is done in time."""
SECONDS = 0.35
"""Time for each of the measurements; there are at most six."""


class Speed(NamedTuple):
    """How fast this machine is, in one number per kind of work."""

    encoder: float
    """Floating-point operations per second of an encoder product, in the dtype in which latents are selected."""
    dense: float
    """The same in float32, in which gradients of dense dictionaries are computed."""
    model: float
    """The same of the language model's products, in its dtype and on its device."""
    bandwidth: float
    """Bytes per second that a copy in memory reads and writes."""


class Machine(NamedTuple):
    """What is free, in bytes."""

    memory: int
    disk: int
    gpu: int | None
    """None without a GPU."""


def measure(
    d_in: int, d_sae: int, model: tuple[int, int, torch.dtype, str] | None, threads: int | None = None
) -> Speed:
    """Time a few matrix products and a copy: under three seconds in all.

    Args:
        d_in: Width of the dictionary's input.
        d_sae: Number of its latents.
        model: Width, inner width, dtype and device of the language model, if there is one.
        threads: CPU threads; torch's own number if not given.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        native = torch.bfloat16 if native_bfloat16() else torch.float32
        encoder = _product(d_in, d_sae, native, "cpu")
        dense = encoder if native is torch.float32 else _product(d_in, d_sae, torch.float32, "cpu")
        forward = encoder if model is None else _product(*model)
        return Speed(encoder, dense, forward, _copy())
    finally:
        torch.set_num_threads(before)


def _product(d_from: int, d_to: int, dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of (rows, d_from) @ (d_from, d_to)."""
    d_from, d_to = min(d_from, LARGEST), min(d_to, 2 * LARGEST)
    x = torch.ones(ROWS, d_from, dtype=dtype, device=device)
    weights = torch.ones(d_to, d_from, dtype=dtype, device=device)
    out = torch.empty(ROWS, d_to, dtype=dtype, device=device)

    def once() -> float:
        started = time.perf_counter()
        torch.mm(x, weights.T, out=out)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return 2.0 * ROWS * d_from * d_to / _median(once)


def _copy() -> float:
    source = torch.ones(2**24)  # 64 MB: beyond most caches
    target = torch.empty_like(source)

    def once() -> float:
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started

    return 2.0 * source.numel() * source.itemsize / _median(once)


def _median(once: object) -> float:
    assert callable(once)
    once()  # the first call also makes what later ones find
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < SECONDS and len(times) < 200):
        times.append(once())
    return statistics.median(times)
