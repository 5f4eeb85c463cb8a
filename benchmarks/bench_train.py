"""Training steps against one encoder product of the same shape, in the same run.

    make bench-train

A step reads new rows from a source in memory, scales them, and does all that `train` does: encode, select, decode,
gradients, optimiser, bookkeeping of dead latents. Data changes from step to step. The product is in bfloat16 where the
CPU multiplies it natively, else in float32, as the kernels are.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import finish, interleaved, ratio, row

from sememe import dictionaries, kernels
from sememe.dictionaries import Architecture, Trainable
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.jumprelu import JumpReLU, JumpReLUConfig
from sememe.dictionaries.matryoshka import MatryoshkaConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.kernels.cpu import rough
from sememe.optimiser import Adam
from sememe.source import TensorSource
from sememe.train import TrainConfig
from sememe.train.crew import Crew
from sememe.train.member import Spec

D_IN, K = 512, 32
UNIT = "x one encoder product"


def step_of(
    config: Architecture,
    batch: int,
    source: TensorSource,
    prepare: Callable[[Any], None] = lambda dictionary: None,
    before: Callable[[Any], None] = lambda dictionary: None,
    transcoder: bool = False,
) -> tuple[Callable[[], None], Trainable]:
    """A training step, and what it trains.

    Args:
        config: The architecture.
        batch: Rows per step.
        source: Where they come from.
        prepare: Done once after initialisation.
        before: Done before each step, and timed with it.
        transcoder: Reconstruct other rows than those that are encoded.
    """
    dictionary = dictionaries.build(config, D_IN, D_IN)
    sample = source.sample(8192)
    dictionary.initialise(
        sample.x, sample.x.roll(1, 0) if transcoder else sample.target, torch.Generator().manual_seed(0)
    )
    prepare(dictionary)
    optimiser = Adam(dictionary)

    def step() -> None:
        before(dictionary)
        rows = source.next_batch(batch)
        x = rows.x * dictionary.scale_in
        loss = dictionary.loss(x, x.roll(1, 0) if transcoder else x, 0.5)
        loss.total.backward()
        optimiser.step(1e-4)
        dictionary.after_step(loss.encoded)

    return step, dictionary


def product_of(d_sae: int, batch: int, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    """One encoder product."""
    dtype = torch.bfloat16 if rough.native_bfloat16() else torch.float32
    x, weights = torch.randn(batch, D_IN, generator=generator).to(dtype), torch.randn(d_sae, D_IN).to(dtype)
    out = torch.empty(batch, d_sae, dtype=dtype)
    return lambda: torch.mm(x, weights.T, out=out)


@contextlib.contextmanager
def only_float32() -> Iterator[None]:
    """As on a CPU that multiplies nothing narrower natively."""
    before = rough.native_int8, rough.native_bfloat16
    rough.native_int8 = rough.native_bfloat16 = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        rough.native_int8, rough.native_bfloat16 = before


def with_l0(share: float, source: TensorSource) -> Callable[[Any], None]:
    """Biases at which a share of the latents is active, whatever the latent."""

    def prepare(dictionary: Any) -> None:
        rows = source.sample(2048).x
        with torch.no_grad():
            pre_acts = (rows - dictionary.b_pre) @ dictionary.W_enc
            dictionary.b_enc.copy_(-pre_acts.kthvalue(round((1 - share) * rows.shape[0]), dim=0).values)

    return prepare


def at_l0(l0: float, source: TensorSource) -> Callable[[Any], None]:
    """Thresholds at which so many latents are active."""

    def prepare(dictionary: JumpReLU) -> None:
        rows = source.sample(2048).x
        with torch.no_grad():
            pre_acts = (rows - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc
            rank = round((1 - l0 / dictionary.d_sae) * rows.shape[0])
            dictionary.relative_threshold.copy_(
                pre_acts.kthvalue(rank, dim=0).values / dictionary.threshold_unit
            )

    return prepare


def kill(dictionary: Any) -> None:
    """5% of the latents have not fired for long."""
    dictionary.tokens_since_fired[::20] = 10**9


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


def memory_mb(what: str) -> float:
    """VmRSS (now) or VmHWM (at most so far) of this process; `ru_maxrss` would remember the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**10


def growth_mb(batch: int) -> float:
    """By how much training makes a process grow that has imported everything and built the dictionary."""
    source = TensorSource(torch.randn(65_536, D_IN).bfloat16(), seed=0)
    dictionary = dictionaries.build(TopKConfig(k=K, d_sae=8192), D_IN, D_IN)
    with torch.no_grad():
        for parameter in dictionary.parameters():  # zeros are no memory until they are written
            parameter.fill_(1.0)
    before = memory_mb("VmRSS")
    sample = source.sample(8192)
    dictionary.initialise(sample.x, sample.target, torch.Generator().manual_seed(0))
    optimiser = Adam(dictionary)
    for _ in range(5):
        rows = source.next_batch(batch)
        loss = dictionary.loss(rows.x, rows.x, 0.5)
        loss.total.backward()
        optimiser.step(1e-4)
        dictionary.after_step(loss.encoded)
    return memory_mb("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only figures whose name holds this")
    parser.add_argument("--growth", type=int, metavar="BATCH", help="print the growth in MB, nothing else")
    arguments = parser.parse_args()
    if arguments.growth:
        with kernels.threads(None):
            print(growth_mb(arguments.growth))
        return
    generator = torch.Generator().manual_seed(0)
    source = TensorSource(torch.randn(65_536, D_IN, generator=generator).bfloat16(), seed=0)
    topk = TopKConfig(k=K, d_sae=8192, auxk_coefficient=0.0)
    wide = TopKConfig(k=K, d_sae=16384, auxk_coefficient=0.0)
    jumprelu = JumpReLUConfig(d_sae=8192, target_l0=float(K))
    cases: list[tuple[str, str, Architecture, int, dict[str, Any]]] = [
        ("topk_8192_b2048", "<= 1.7", topk, 2048, {}),
        ("topk_8192_b4096", "<= 1.5", topk, 4096, {}),
        ("topk_16384_b4096", "<= 1.5", wide, 4096, {}),
        ("topk_8192_b4096_float32", "<= 1.5", topk, 4096, {}),
        ("topk_8192_b4096_auxk", "<= 2", TopKConfig(k=K, d_sae=8192), 4096, {"before": kill}),
        ("batch_topk_8192_b4096", "<= 2.5", BatchTopKConfig(k=K, d_sae=8192), 4096, {}),
        ("matryoshka_8192_b4096", "<= 2.5", MatryoshkaConfig(k=K, d_sae=8192), 4096, {}),
        ("jumprelu_8192_b4096", "<= 2.5", jumprelu, 4096, {"prepare": at_l0(K, source)}),
        ("transcoder_8192_b4096", "<= 2.5", topk, 4096, {"transcoder": True}),
        (
            "relu_8192_b4096_sparse",
            "<= 3",
            ReLUConfig(d_sae=8192),
            4096,
            {"prepare": with_l0(0.01, source)},
        ),
        (
            "relu_8192_b4096_l0_4_percent",
            "",
            ReLUConfig(d_sae=8192),
            4096,
            {"prepare": with_l0(0.04, source)},
        ),
        ("relu_8192_b4096_dense", "", ReLUConfig(d_sae=8192, start_density=0), 4096, {}),
    ]
    figures = []
    with kernels.threads(None):
        for name, must, config, batch, options in cases:
            if arguments.only not in name:
                continue
            rounds = 5 if name.endswith("dense") else arguments.rounds
            with only_float32() if name.endswith("float32") else contextlib.nullcontext():
                step, dictionary = step_of(config, batch, source, **options)
                product = product_of(config.width(D_IN), batch, generator)
                times = interleaved({"product": product, "step": step}, rounds, warmup=3)
            with torch.no_grad():
                l0 = float(dictionary.encode(source.next_batch(1024).x).l0().float().mean())
            figures.append(
                row(
                    name,
                    ratio(times, "step", "product"),
                    must,
                    UNIT,
                    step_ms=round(1e3 * sorted(times["step"])[rounds // 2], 1),
                    product_ms=round(1e3 * sorted(times["product"])[rounds // 2], 1),
                    l0_after=round(l0, 1),
                )
            )
        if arguments.only in "sweep_8_over_one":
            steps = {"one": crew_step(1, 2048, source), "eight": crew_step(8, 2048, source)}
            times = interleaved(steps, arguments.rounds)
            figures.append(row("sweep_8_over_one", ratio(times, "eight", "one"), "<= 8", "x a step of one"))
    if arguments.only in "train_growth_mb":
        grown = float(subprocess.check_output([sys.executable, __file__, "--growth", "8192"], text=True))
        state = 3 * 2 * D_IN * 8192 * 4 / 2**20  # gradients and two moments of two matrices
        figures.append(
            row(
                "train_growth_mb",
                grown,
                f"<= {state + 300:.0f}",
                "MB",
                batch=8192,
                gradients_and_moments=state,
            )
        )
    finish("train", figures)


if __name__ == "__main__":
    main()
