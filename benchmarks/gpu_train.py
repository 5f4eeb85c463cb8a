"""A TopK training step on a GPU against one encoder product and one pass over weights and moments, in the same run.

    python benchmarks/gpu_train.py

Both limits are measured: the product in bfloat16 into memory that is there already, and the pass as an in-place
multiplication of both weights and their moments. A step takes new rows, scales them, and does all that `train`
does. Without a CUDA device it says so and measures nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import finish, row

from sememe import dictionaries
from sememe.dictionaries.topk import TopKConfig
from sememe.optimiser import Adam

__all__ = ["figures"]

D_IN, D_SAE, K, BATCH = 2304, 65_536, 64, 8192
N_ROWS = 65_536
"""Rows that steps draw from: on the device, and not counted as the step's memory."""
GB = 2**30


def figures(rounds: int = 15) -> list[dict[str, Any]]:
    """The rows `topk_gpu_65536_b8192` and `topk_gpu_extra_gb`; none, and a line on stderr, without a CUDA device.

    Args:
        rounds: Of each measurement, taken in turn.
    """
    if not torch.cuda.is_available():
        print("gpu_train: NOT MEASURED, there is no CUDA device", file=sys.stderr)
        return []
    data = torch.randn(N_ROWS, D_IN, device="cuda", dtype=torch.bfloat16)
    held_before = torch.cuda.memory_allocated()
    step, kept = _step(data)
    for _ in range(3):  # compiles the kernels
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    extra = torch.cuda.max_memory_allocated() - held_before - sum(t.nbytes for t in kept)
    x, weights = data[:BATCH], torch.randn(D_SAE, D_IN, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(BATCH, D_SAE, device="cuda", dtype=torch.bfloat16)

    def both_limits() -> None:
        torch.mm(x, weights.T, out=out)
        for tensor in kept:
            tensor.mul_(1.0)

    times = _timed({"limit": both_limits, "step": step}, rounds)
    context = {
        "step_ms": round(median(times["step"]), 2),
        "product_and_pass_ms": round(median(times["limit"]), 2),
        "device": torch.cuda.get_device_name(),
    }
    ratio = median(a / b for a, b in zip(times["step"], times["limit"], strict=True))
    return [
        row("topk_gpu_65536_b8192", ratio, "<= 1.5", "x (one encoder product + one pass)", **context),
        row("topk_gpu_extra_gb", extra / GB, "<= 2", "GB beyond weights and moments", **context),
    ]


def _step(data: torch.Tensor) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A training step, and the weights and moments that it updates."""
    dictionary = dictionaries.build(TopKConfig(k=K, d_sae=D_SAE), D_IN, D_IN).cuda()
    sample = data[:8192].float()
    dictionary.initialise(sample, sample, torch.Generator().manual_seed(0))
    optimiser = Adam(dictionary)

    def step() -> None:
        rows = data[torch.randint(N_ROWS, (BATCH,), device="cuda")]
        x = rows.float() * dictionary.scale_in
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
        optimiser.step(1e-4)
        dictionary.after_step(loss.encoded)

    weights = [parameter.detach() for parameter in dictionary.parameters()]
    state = optimiser.state_dict().values()
    return step, [*weights, *(moment for moment in state if isinstance(moment, torch.Tensor))]


def _timed(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each on the device, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            function()
            ended.record()
            ended.synchronize()
            times[name].append(started.elapsed_time(ended))
    return times


if __name__ == "__main__":
    measured = figures()
    if not measured:
        sys.exit(0)
    finish("train_gpu", measured)
