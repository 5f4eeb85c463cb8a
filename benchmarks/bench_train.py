"""Training steps against one bfloat16 encoder product of the same shape, in the same run.

    make bench-train

A step reads new rows from a source in memory, scales them, and does all that `train` does: encode, select, decode,
gradients, optimiser, bookkeeping of dead latents. Data changes from step to step.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable

import torch
from common import finish, interleaved, ratio, row

from sememe import dictionaries, kernels
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.optimiser import Adam
from sememe.source import TensorSource
from sememe.train import TrainConfig
from sememe.train.crew import Crew
from sememe.train.member import Spec

D_IN, K = 512, 32


def step_of(config: TopKConfig | ReLUConfig, batch: int, source: TensorSource) -> Callable[[], None]:
    dictionary = dictionaries.build(config, D_IN, D_IN)
    sample = source.sample(8192)
    dictionary.initialise(sample.x, sample.target, torch.Generator().manual_seed(0))
    optimiser = Adam(dictionary)

    def step() -> None:
        rows = source.next_batch(batch)
        x = rows.x * dictionary.scale_in
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
        optimiser.step(1e-4)
        dictionary.after_step(loss.encoded)

    return step


def crew_step(n: int, batch: int, source: TensorSource) -> Callable[[], object]:
    """What `train` does in a step of n dictionaries on one stream: checks, schedule and bookkeeping included."""
    architecture = TopKConfig(k=K, d_sae=8192, auxk_coefficient=0.0)
    specs = [
        Spec(f"seed{seed}", TrainConfig(architecture=architecture, seed=seed), D_IN, D_IN, None, None)
        for seed in range(n)
    ]
    crew = Crew(specs, 1000, torch.device("cpu"))
    crew.initialise(source.sample(8192))
    return lambda: crew.train_step(source.next_batch(batch), None, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    source = TensorSource(torch.randn(65_536, D_IN, generator=generator).bfloat16(), seed=0)
    figures = []
    with kernels.threads(None):
        for d_sae, batch, must in ((8192, 2048, "<= 4"), (8192, 4096, "<= 1.5"), (16384, 4096, "<= 1.5")):
            x = torch.randn(batch, D_IN, generator=generator).bfloat16()
            weights = torch.randn(d_sae, D_IN, generator=generator).bfloat16()
            out = torch.empty(batch, d_sae, dtype=torch.bfloat16)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            step = step_of(TopKConfig(k=K, d_sae=d_sae, auxk_coefficient=0.0), batch, source)
            times = interleaved(
                {"product": lambda x=x, w=weights, o=out: torch.mm(x, w.T, out=o), "step": step},
                arguments.rounds,
                warmup=3,
            )
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
            figures.append(
                row(
                    f"topk_{d_sae}_b{batch}",
                    ratio(times, "step", "product"),
                    must,
                    "x one bfloat16 encoder product",
                    step_ms=round(1e3 * sorted(times["step"])[len(times["step"]) // 2], 1),
                    product_ms=round(1e3 * sorted(times["product"])[len(times["product"]) // 2], 1),
                    grown_mb=round(grown),
                )
            )
        step = step_of(ReLUConfig(d_sae=8192), 4096, source)
        x = torch.randn(4096, D_IN, generator=generator).bfloat16()
        weights = torch.randn(8192, D_IN, generator=generator).bfloat16()
        out = torch.empty(4096, 8192, dtype=torch.bfloat16)
        times = interleaved({"product": lambda: torch.mm(x, weights.T, out=out), "step": step}, 5)
        figures.append(
            row(
                "relu_8192_b4096_dense", ratio(times, "step", "product"), "", "x one bfloat16 encoder product"
            )
        )
        steps = {"one": crew_step(1, 2048, source), "eight": crew_step(8, 2048, source)}
        times = interleaved(steps, arguments.rounds)
        figures.append(row("sweep_8_over_one", ratio(times, "eight", "one"), "<= 8", "x a step of one"))
    finish("train", figures)


if __name__ == "__main__":
    main()
