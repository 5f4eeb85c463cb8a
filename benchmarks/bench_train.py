"""Training steps against one encoder product of the same shape, in the same run.

    make bench-train
    python benchmarks/bench_train.py --store artifacts/demo/store       # real rows, of that store's width

A step is what `train` does in one: new rows from the source, and `Crew.train_step` on them: scaling, encoding,
selection, decoding, gradients, schedule, optimiser, bookkeeping of dead latents. Rows are Gaussian, from a source in
memory, or a store's; data changes from step to step. The product is in bfloat16 where the CPU multiplies it natively,
else in float32, as the kernels are.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import finish, interleaved, ratio, row

from sememe import kernels
from sememe.dictionaries import Architecture, Trainable
from sememe.dictionaries.abs_topk import AbsTopKConfig
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.cross_layer import CrossLayerConfig
from sememe.dictionaries.gated import GatedConfig
from sememe.dictionaries.group_max import GroupMaxConfig
from sememe.dictionaries.jumprelu import JumpReLU, JumpReLUConfig
from sememe.dictionaries.lista import LISTAConfig
from sememe.dictionaries.matching_pursuit import MatchingPursuitConfig
from sememe.dictionaries.matryoshka import MatryoshkaConfig
from sememe.dictionaries.mlp_encoder import MLPEncoderConfig
from sememe.dictionaries.multi_topk import MultiTopKConfig
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.tied import TiedConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.dictionaries.variational import VariationalConfig
from sememe.kernels.cpu import rough
from sememe.needs import size_of
from sememe.source import Batch, Source, StoreSource, TensorSource
from sememe.store import open_store
from sememe.train import TrainConfig
from sememe.train.crew import Crew
from sememe.train.member import Spec

D_IN, K = 512, 32
FEWEST = 10
"""Steps whose median is a figure, at least."""
UNIT = "x one encoder product"
N_STEPS, AT = 1_000_000, 510_000
"""Length of the run that steps are taken from, and the first of them: past warm-up and annealing, no resampling."""


class Step(NamedTuple):
    """A training step, and what it trains."""

    take: Callable[[], object]
    dictionaries: list[Trainable]


class Case(NamedTuple):
    """A figure."""

    name: str
    must: str
    architecture: Architecture
    batch: int = 4096
    prepare: Callable[[Any, Source], None] = lambda dictionary, source: None
    """Done once after initialisation."""
    before: Callable[[Any], None] = lambda dictionary: None
    """Done before each step, and timed with it."""
    transcoder: bool = False
    """Reconstruct other rows than those that are encoded."""


def crew_of(case: Case, source: Source, n: int = 1) -> Crew:
    """What `train` trains: n dictionaries on one stream, not yet initialised."""
    specs = [
        Spec(
            f"seed{seed}",
            TrainConfig(architecture=case.architecture, seed=seed, lr=1e-4, batch_size=case.batch),
            source.d_in,
            source.d_out,
            source.sites,
            None,
        )
        for seed in range(n)
    ]
    return Crew(specs, N_STEPS, torch.device("cpu"))


def step_of(case: Case, source: Source, n: int = 1, crew: Crew | None = None) -> Step:
    """A step of n dictionaries on one stream.

    Args:
        case: Which.
        source: Where rows come from.
        n: How many.
        crew: The dictionaries, if they are made already.
    """
    crew = crew or crew_of(case, source, n)

    def rows(batch: Batch) -> Batch:
        return Batch(batch.x, batch.x.roll(1, 0)) if case.transcoder else batch

    crew.initialise(rows(source.sample(8192)))
    for member in crew.members.values():
        case.prepare(member.dictionary, source)
        member.step = AT
    made = [member.dictionary for member in crew.members.values()]

    def take() -> None:
        for dictionary in made:
            case.before(dictionary)
        crew.train_step(rows(source.next_batch(case.batch)), None, False)

    return Step(take, made)


def product_of(d_in: int, d_sae: int, batch: int) -> Callable[[], torch.Tensor]:
    """One encoder product."""
    dtype = torch.bfloat16 if rough.native_bfloat16() else torch.float32
    x, weights = torch.randn(batch, d_in).to(dtype), torch.randn(d_sae, d_in).to(dtype)
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


def quantile_of(rows: torch.Tensor, W_enc: torch.Tensor, rank: int) -> torch.Tensor:
    """The rank-th smallest of each latent's products, some latents at a time: the memory measured is training's."""
    return torch.cat([(rows @ part).kthvalue(rank, dim=0).values for part in W_enc.split(256, dim=1)])


def with_l0(share: float) -> Callable[[Any, Source], None]:
    """Biases at which a share of the latents is active, whatever the latent."""

    def prepare(dictionary: Any, source: Source) -> None:
        rows = source.sample(2048).x * dictionary.scale_in
        rank = round((1 - share) * rows.shape[0])
        with torch.no_grad():
            dictionary.b_enc.copy_(-quantile_of(rows - dictionary.b_pre, dictionary.W_enc, rank))

    return prepare


def at_l0(l0: float) -> Callable[[Any, Source], None]:
    """Thresholds at which so many latents are active."""

    def prepare(dictionary: JumpReLU, source: Source) -> None:
        rows = source.sample(2048).x * dictionary.scale_in
        rank = round((1 - l0 / dictionary.d_sae) * rows.shape[0])
        with torch.no_grad():
            level = quantile_of(rows - dictionary.b_pre, dictionary.W_enc, rank) + dictionary.b_enc
            dictionary.relative_threshold.copy_(level / dictionary.threshold_unit)

    return prepare


def kill(dictionary: Any) -> None:
    """5% of the latents have not fired for long."""
    dictionary.tokens_since_fired[::20] = 10**9


TOPK = TopKConfig(k=K, d_sae=8192, auxk_coefficient=0.0)
JUMPRELU = JumpReLUConfig(d_sae=8192, target_l0=float(K))
DENSE = ReLUConfig(d_sae=8192, start_density=0, resample="none")
SPARSE = ReLUConfig(d_sae=8192, resample="none")
CASES = [
    Case("topk_8192_b2048", "<= 1.7", TOPK, 2048),
    Case("topk_8192_b4096", "<= 1.5", TOPK),
    Case("topk_16384_b4096", "<= 1.5", TopKConfig(k=K, d_sae=16384, auxk_coefficient=0.0)),
    Case("topk_8192_b4096_float32", "<= 1.5", TOPK),
    Case("topk_8192_b4096_auxk", "<= 2", TopKConfig(k=K, d_sae=8192), before=kill),
    Case("batch_topk_8192_b4096", "<= 2.5", BatchTopKConfig(k=K, d_sae=8192)),
    Case("matryoshka_8192_b4096", "<= 2.5", MatryoshkaConfig(k=K, d_sae=8192)),
    Case("jumprelu_8192_b4096", "<= 2.5", JUMPRELU, prepare=at_l0(K)),
    Case("transcoder_8192_b4096", "<= 2.5", TOPK, transcoder=True),
    Case("relu_8192_b4096_sparse", "<= 3", SPARSE, prepare=with_l0(0.01)),
    Case("relu_8192_b4096_l0_320", "<= 3", SPARSE, prepare=with_l0(320 / 8192)),
    Case("relu_8192_b4096_l0_408", "<= 3", SPARSE, prepare=with_l0(408 / 8192)),
    Case("relu_8192_b4096_dense", "", DENSE),
    Case("group_max_8192_b4096", "", GroupMaxConfig(k=K, d_sae=8192, auxk_coefficient=0.0)),
]
GROWTH = {
    "": Case("", "", TOPK),
    "_batch_topk": Case("", "", BatchTopKConfig(k=K, d_sae=8192)),
    "_matryoshka": Case("", "", MatryoshkaConfig(k=K, d_sae=8192)),
    "_jumprelu": Case("", "", JUMPRELU, prepare=at_l0(K)),
    "_relu_sparse": Case("", "", SPARSE, prepare=with_l0(0.01)),
    "_relu_dense": Case("", "", DENSE),
    "_group_max": Case("", "", GroupMaxConfig(k=K, d_sae=8192, auxk_coefficient=0.0)),
    "_multi_topk": Case("", "", MultiTopKConfig(k=K, d_sae=8192)),
    "_abs_topk": Case("", "", AbsTopKConfig(k=K, d_sae=8192)),
    "_matching_pursuit": Case("", "", MatchingPursuitConfig(k=K, d_sae=8192)),
    "_mlp_encoder": Case("", "", MLPEncoderConfig(k=K, d_sae=8192)),
    "_cross_layer": Case("", "", CrossLayerConfig(k=K, d_sae=8192, n_layers=4)),
    "_gated": Case("", "", GatedConfig(d_sae=8192, resample="none")),
    "_tied": Case("", "", TiedConfig(d_sae=8192, resample="none")),
    "_p_anneal": Case("", "", PAnnealConfig(d_sae=8192, resample="none")),
    "_lista": Case("", "", LISTAConfig(d_sae=8192, resample="none")),
    "_variational": Case("", "", VariationalConfig(d_sae=8192, resample="none")),
}
"""Of which training's memory is measured, by the end of the figure's name."""


def memory_mb(what: str) -> float:
    """VmRSS (now) or VmHWM (at most so far) of this process; `ru_maxrss` would remember the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**10


def growth_mb(name: str, batch: int) -> tuple[float, float]:
    """By how much training makes a process grow that has imported everything and built the dictionary.

    Imported is what is loaded once, whatever is trained: compiled loops from numba's cache, parts of numba and torch
    that load with the first call. Three steps of a tiny dictionary load it.

    Args:
        name: One of GROWTH.
        batch: Rows per step.
    Returns:
        The growth in MB, and what was loaded before.
    """
    before = memory_mb("VmRSS")
    step = step_of(tiny(GROWTH[name]), TensorSource(torch.randn(256, 16).bfloat16(), seed=0))
    for _ in range(3):
        step.take()
    loaded = memory_mb("VmRSS") - before
    case = GROWTH[name]._replace(batch=batch)
    source = TensorSource(torch.randn(65_536, D_IN).bfloat16(), seed=0)
    crew = crew_of(case, source)
    with torch.no_grad():
        for member in crew.members.values():
            for parameter in member.dictionary.parameters():  # zeros are no memory until they are written
                parameter.fill_(1.0)
    before = memory_mb("VmRSS")
    step = step_of(case, source, crew=crew)
    for _ in range(5):
        step.take()
    return memory_mb("VmHWM") - before, loaded


def tiny(case: Case) -> Case:
    """The same architecture with few latents."""
    few = {"d_sae": 64} | ({"k": 4} if hasattr(case.architecture, "k") else {})
    return case._replace(architecture=case.architecture.replace(**few), batch=32, prepare=lambda *_: None)


def growths(batch: int, only: str) -> list[dict[str, Any]]:
    """How much memory training adds: the median of three processes, which differ by up to 60 MB."""
    figures = []
    for end, case in GROWTH.items():
        # gradients and two moments of all parameters
        state = 3 * size_of(case.architecture, D_IN, D_IN).n_bytes / 2**20
        name = f"train_growth_mb{end}"
        if only not in name:
            continue
        command = [sys.executable, __file__, "--growth", str(batch), "--of", end]
        runs = [subprocess.check_output(command, text=True).split() for _ in range(3)]
        grown, loaded = (statistics.median(map(float, column)) for column in zip(*runs, strict=True))
        print(f"{name}: {grown:.0f} MB, {loaded:.0f} MB loaded before", file=sys.stderr, flush=True)
        figures.append(
            row(
                name,
                grown,
                f"<= {state + 300:.0f}",
                "MB",
                batch=batch,
                gradients_and_moments=state,
                loaded_before=round(loaded),
            )
        )
    return figures


def timed(case: Case, source: Source, rounds: int) -> dict[str, Any]:
    """A step over a product, taken in turn."""
    rounds = FEWEST if case.name.endswith("dense") else max(rounds, FEWEST)
    with only_float32() if case.name.endswith("float32") else contextlib.nullcontext():
        step = step_of(case, source)
        product = product_of(source.d_in, case.architecture.width(source.d_in), case.batch)
        times = interleaved({"product": product, "step": step.take}, rounds, warmup=3)
    dictionary = step.dictionaries[0].eval()
    with torch.no_grad():
        rows = source.next_batch(1024).x * dictionary.scale_in
        l0 = float(dictionary.encode(rows).l0().float().mean())
    return row(
        case.name,
        ratio(times, "step", "product"),
        case.must,
        UNIT,
        step_ms=round(1e3 * sorted(times["step"])[rounds // 2], 1),
        product_ms=round(1e3 * sorted(times["product"])[rounds // 2], 1),
        l0_after=round(l0, 1),
        d_in=source.d_in,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only figures whose name holds this")
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="rows of this store, instead of Gaussian ones"
    )
    parser.add_argument("--growth", type=int, metavar="BATCH", help="print the growth in MB, nothing else")
    parser.add_argument(
        "--of", default="", help="with --growth, the end of the figure's name", choices=GROWTH
    )
    arguments = parser.parse_args()
    if arguments.growth:
        with kernels.threads(None):
            print(*growth_mb(arguments.of, arguments.growth))
        return
    source: Source
    if arguments.store:
        source = StoreSource(open_store(arguments.store))
    else:
        rows = torch.randn(65_536, D_IN, generator=torch.Generator().manual_seed(0))
        source = TensorSource(rows.bfloat16(), seed=0)
    figures = []
    with kernels.threads(None):
        for case in CASES:
            if arguments.only in case.name:
                figures.append(timed(case, source, arguments.rounds))
                print(f"{case.name}: {figures[-1]['value']}", file=sys.stderr, flush=True)
        if arguments.only in "sweep_8_over_one":
            case = Case("", "", TOPK, 2048)
            steps = {"one": step_of(case, source).take, "eight": step_of(case, source, 8).take}
            times = interleaved(steps, max(arguments.rounds, FEWEST))
            figures.append(row("sweep_8_over_one", ratio(times, "eight", "one"), "<= 8", "x a step of one"))
    if not arguments.store:
        figures += growths(8192, arguments.only)
    finish("train_store" if arguments.store else "train", figures)
    if torch.cuda.is_available() and not arguments.store:
        subprocess.run([sys.executable, str(Path(__file__).with_name("gpu_train.py"))], check=True)


if __name__ == "__main__":
    main()
