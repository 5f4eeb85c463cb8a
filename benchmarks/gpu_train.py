"""Training steps on a GPU against their limits, in the same run: what the project's figures ask for, in one script.

    python -m pytest -q -p no:xdist -m gpu tests    # first: do the kernels agree with the reference on this device
    python benchmarks/gpu_train.py                  # under four minutes on one device, most of it compiling kernels

`topk_gpu_65536_b8192`: a TopK step (d_in 2304, d_sae 65,536, k 64, batch 8192) over one encoder product in bfloat16 and
one read-and-write pass over weights and moments. `topk_gpu_extra_gb`: its peak memory beyond weights and moments.
`sweep_gpu_8_over_one`: 8 dictionaries of one shape on one stream, as `train --sweep` steps them, over one (d_in 512,
d_sae 8192, k 32, batch 2048: the shape of the CPU's figure). Without targets: the same 8 stepped one after the other, 8
large ones (d_in 2304, d_sae 16,384, batch 4096), JumpReLU and BatchTopK over the product, Signum's step over Adam's;
and the large TopK step on rows that `train` reads in the host's memory over the same on rows that lie on the device.

All are measured as wall-clock time of several steps between two waits for the device, in turns, on changing rows. A
figure that fails does not take the others with it. Without a CUDA device it says so and measures nothing;
`--small cpu` runs the same code on tiny shapes on a CPU, to see that it works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from common import finish, row

from sememe import dictionaries
from sememe.dictionaries import Architecture, Trainable
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.optimiser import AdamConfig, Optimiser, OptimiserConfig, SignumConfig, make
from sememe.source import Batch
from sememe.train import TrainConfig, crew
from sememe.train.member import Spec

__all__ = ["figures"]

GB = 2**30
STEPS = 5
"""Between two waits for the device: as while training, the host runs ahead."""


class Shape(NamedTuple):
    """Of a dictionary and its batches."""

    d_in: int
    d_sae: int
    k: int
    batch: int

    def small(self) -> Shape:
        """For a CPU."""
        return Shape(16, 64, 4, 32)


LARGE = Shape(2304, 65_536, 64, 8192)
SWEPT = Shape(512, 8192, 32, 2048)
WIDE = Shape(2304, 16_384, 64, 4096)
Step = Callable[[], object]


class Bench:
    """One device, and whether shapes are tiny."""

    def __init__(self, device: str, small: bool, rounds: int) -> None:
        self.device, self.small, self.rounds = torch.device(device), small, rounds

    def shape(self, shape: Shape) -> Shape:
        """As asked for, or a tiny one."""
        return shape.small() if self.small else shape

    def rows(self, shape: Shape) -> torch.Tensor:
        """What steps draw from: on the device, and not counted as a step's memory."""
        n = 256 if self.small else 65_536
        return torch.randn(n, shape.d_in, device=self.device, dtype=torch.bfloat16)

    def drawn(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        """Some of them, other ones each time."""
        return rows[torch.randint(rows.shape[0], (n,), device=rows.device)].float()

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, functions: dict[str, Step]) -> dict[str, list[float]]:
        """Milliseconds of one call of each, taken in turn; the first round, which compiles, is left out."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(self.rounds + 1):
            for name, function in functions.items():
                self.wait()
                started = time.perf_counter()
                for _ in range(STEPS):
                    function()
                self.wait()
                if turn:
                    times[name].append(1000 * (time.perf_counter() - started) / STEPS)
        return times

    def training(
        self, config: Architecture, shape: Shape, rows: torch.Tensor, optimiser: OptimiserConfig
    ) -> tuple[Step, Trainable, Optimiser]:
        """A step, and what it trains."""
        dictionary = dictionaries.build(config, shape.d_in, shape.d_in).to(self.device)
        sample = rows[:8192].float()
        dictionary.initialise(sample, sample, torch.Generator().manual_seed(0))
        made = make(optimiser, dictionary)
        dictionary.train()

        def step() -> None:
            x = self.drawn(rows, shape.batch) * dictionary.scale_in
            loss = dictionary.loss(x, x, 0.5)
            loss.total.backward()
            made.step(1e-4)
            dictionary.after_step(loss.encoded)

        return step, dictionary, made

    def product(self, shape: Shape, rows: torch.Tensor) -> Step:
        """One encoder product in bfloat16, into memory that is there."""
        x = rows[:1].expand(shape.batch, -1).contiguous()
        weights = torch.randn(shape.d_sae, shape.d_in, device=self.device, dtype=torch.bfloat16)
        out = torch.empty(shape.batch, shape.d_sae, device=self.device, dtype=torch.bfloat16)
        return lambda: torch.mm(x, weights.T, out=out)

    def crew(self, n: int, shape: Shape, rows: torch.Tensor, stacked: bool) -> Step:
        """What `train --sweep` does in a step of n dictionaries of one shape on one stream."""
        architecture = TopKConfig(k=shape.k, d_sae=shape.d_sae)
        specs = [
            Spec(
                f"seed{seed}",
                TrainConfig(architecture=architecture, seed=seed),
                *2 * (shape.d_in,),
                None,
                None,
            )
            for seed in range(n)
        ]
        plain = crew.stacks_on
        if not stacked:
            crew.stacks_on = lambda _: False
        elif self.small:
            crew.stacks_on = lambda _: True
        try:
            team = crew.Crew(specs, 100_000, self.device)
            sample = rows[:8192].float().cpu()
            team.initialise(Batch(sample, sample))
        finally:
            crew.stacks_on = plain
        assert bool(team.stacks) == (stacked and n > 1)

        def step() -> None:
            x = self.drawn(rows, shape.batch)
            team.train_step(Batch(x, x), None, False)

        return step


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the round-by-round ratios."""
    return median(a / b for a, b in zip(times[over], times[under], strict=True))


def large_step(bench: Bench) -> list[dict[str, Any]]:
    """The TopK step and its memory."""
    shape = bench.shape(LARGE)
    rows = bench.rows(shape)
    cuda = bench.device.type == "cuda"
    held_before = torch.cuda.memory_allocated() if cuda else 0
    step, dictionary, optimiser = bench.training(
        TopKConfig(k=shape.k, d_sae=shape.d_sae), shape, rows, AdamConfig()
    )
    kept = [parameter.detach() for parameter in dictionary.parameters()]
    kept += [slot for slots in optimiser.slots.values() for slot in slots.values()]
    for _ in range(3):  # compiles the kernels
        step()
    bench.wait()
    extra = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        extra = torch.cuda.max_memory_allocated() - held_before - sum(tensor.nbytes for tensor in kept)
    product = bench.product(shape, rows)

    def both_limits() -> None:
        product()
        for tensor in kept:
            tensor.mul_(1.0)

    times = bench.timed({"limit": both_limits, "product": product, "step": step})
    context = {f"{name}_ms": round(median(found), 3) for name, found in times.items()}
    unit = "x (one encoder product + one pass)"
    return [
        row("topk_gpu_65536_b8192", ratio(times, "step", "limit"), "<= 1.5", unit, **context),
        row("topk_gpu_extra_gb", extra / GB, "<= 2", "GB beyond weights and moments"),
    ]


def swept(bench: Bench, name: str, shape: Shape, must: str) -> list[dict[str, Any]]:
    """Eight dictionaries over one, as one and one after the other."""
    shape = bench.shape(shape)
    rows = bench.rows(shape)
    crews = {
        "one": bench.crew(1, shape, rows, True),
        "eight": bench.crew(8, shape, rows, True),
        "in_turn": bench.crew(8, shape, rows, False),
    }
    times = bench.timed(crews)
    context = {f"{key}_ms": round(median(found), 3) for key, found in times.items()}
    return [
        row(name, ratio(times, "eight", "one"), must, "x one step", **context),
        row(f"{name}_in_turn", ratio(times, "in_turn", "one"), "", "x one step, not batched", **context),
    ]


def others(bench: Bench) -> list[dict[str, Any]]:
    """Architectures whose number of active latents varies, and another optimiser; no targets."""
    shape = bench.shape(SWEPT)
    rows = bench.rows(shape)
    steps: dict[str, Step] = {"product": bench.product(shape, rows)}
    configs: dict[str, Architecture] = {
        "topk": TopKConfig(k=shape.k, d_sae=shape.d_sae),
        "batch_topk": BatchTopKConfig(k=shape.k, d_sae=shape.d_sae),
        "jumprelu": JumpReLUConfig(target_l0=float(shape.k), d_sae=shape.d_sae),
    }
    for name, config in configs.items():
        steps[name] = bench.training(config, shape, rows, AdamConfig())[0]
    steps["signum"] = bench.training(configs["topk"], shape, rows, SignumConfig())[0]
    times = bench.timed(steps)
    context = {f"{key}_ms": round(median(found), 3) for key, found in times.items()}
    return [
        row(f"{name}_gpu_8192_b2048", ratio(times, name, "product"), "", "x one encoder product", **context)
        for name in steps
        if name != "product"
    ]


def fed(bench: Bench) -> list[dict[str, Any]]:
    """What the way from the host's memory costs: drawing rows there, and the copy."""
    shape = bench.shape(LARGE)
    rows = bench.rows(shape)
    steps = {
        "resident": bench.crew(1, shape, rows, False),
        "from_host": bench.crew(1, shape, rows.cpu(), False),
    }
    times = bench.timed(steps)
    context = {f"{key}_ms": round(median(found), 3) for key, found in times.items()}
    unit = "x the step on rows that lie on the device"
    return [row("topk_gpu_from_host", ratio(times, "from_host", "resident"), "", unit, **context)]


def figures(bench: Bench) -> list[dict[str, Any]]:
    """Every figure that could be measured, the ones with a target first."""
    found: list[dict[str, Any]] = []
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: large_step(bench),
        lambda: swept(bench, "sweep_gpu_8_over_one", SWEPT, "<= 4"),
        lambda: swept(bench, "sweep_gpu_8_wide_over_one", WIDE, ""),
        lambda: others(bench),
        lambda: fed(bench),
    ]
    for part in parts:
        started = time.monotonic()
        try:
            found += part()
        except Exception:  # what was measured before is not lost
            traceback.print_exc()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"gpu_train: {len(found)} figures, {time.monotonic() - started:.0f} s", file=sys.stderr)
    for figure in found:
        figure["context"]["device"] = (
            torch.cuda.get_device_name() if bench.device.type == "cuda" else "a CPU, tiny shapes"
        )
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--small", metavar="DEVICE", help="tiny shapes, to see that it runs")
    given = parser.parse_args()
    if given.small is None and not torch.cuda.is_available():
        print("gpu_train: NOT MEASURED, there is no CUDA device", file=sys.stderr)
        return
    found = figures(Bench(given.small or "cuda", given.small is not None, given.rounds))
    finish("train_gpu_small" if given.small else "train_gpu", found)


if __name__ == "__main__":
    main()
