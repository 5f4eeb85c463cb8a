"""Ways to choose candidates for the k largest latents of a row, in time and in what they lose.

    make bench-selection        # on the demo's dictionary and activations; `make demo` makes them

Each way names candidates, which float32 settles. Time is that of one bfloat16 encoder product in the same run; lost is
the share of the true active latents that is not among the candidates; `fvu_cost` is by how much the reconstruction's
fvu grows, relative, when they are left out.

- `bfloat16`, `int8`: what the CPU path does.
- `sketch`: rows and weights in the r directions in which the rows vary most, in bfloat16; the largest there.
- `groups`: latents in groups of alike directions (spherical k-means, not timed); those of the groups whose mean
  direction answers most.

`trained_KIND` trains from start to end with each kind of product (`--steps` steps of 2,048 rows of the same store,
the same order and seed) and gives the fvu on documents held out, over that of a training in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import finish, interleaved, ratio, row
from torch import Tensor

from sememe import dictionaries, kernels, metrics
from sememe.dictionaries.topk import TopKConfig
from sememe.kernels.cpu import encode, loops, pool, rough
from sememe.source import StoreSource
from sememe.store import Store, open_store
from sememe.train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
UNIT = "x one bfloat16 product"
Candidates = Callable[[], np.ndarray]


def settled(
    x: Tensor, weights: Tensor, bias: Tensor, candidates: np.ndarray, k: int
) -> tuple[Tensor, Tensor]:
    """Activations and indices of the k largest candidates, in float32."""
    acts, indices = torch.empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32)
    parts = (x.numpy(), weights.numpy(), bias.numpy(), candidates, k, acts.numpy(), indices.numpy())

    def some(start: int, stop: int) -> None:
        mine = slice(start, stop)
        loops.rescore(parts[0][mine], *parts[1:3], parts[3][mine], k, False, parts[5][mine], parts[6][mine])

    pool.run(some, len(x), 256)
    return acts, indices


def sketched(x: Tensor, weights: Tensor, bias: Tensor, rank: int, n: int) -> Candidates:
    """The n largest in a sketch of the rows; its directions stand for several steps, the projections are timed."""
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -rank:].contiguous()
    return lambda: encode.candidates_of(rough.Wide(x @ directions, weights @ directions), len(x), bias, n)


def grouped(x: Tensor, weights: Tensor, n_groups: int, n: int) -> Candidates:
    """The latents of the groups that answer most, about n of them."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(weights, dim=1)
    centres = unit[torch.randperm(len(unit), generator=generator)[:n_groups]]
    for _ in range(10):
        group = (unit @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, group, unit)
        centres = torch.nn.functional.normalize(
            torch.where(sums.norm(dim=1, keepdim=True) > 0, sums, centres), dim=1
        )
    group = (unit @ centres.T).argmax(1)
    sizes = torch.bincount(group, minlength=n_groups)
    members = torch.full((n_groups, int(sizes.max())), -1, dtype=torch.int32)
    for g in range(n_groups):
        own = torch.nonzero(group == g).view(-1)
        members[g, : len(own)] = own.int()
    n_taken = max(1, round(n * n_groups / len(weights)))

    def choose() -> np.ndarray:
        taken = (x.bfloat16() @ centres.bfloat16().T).topk(n_taken, dim=1, sorted=False).indices
        flat = members[taken].view(len(x), -1)
        return flat.sort(dim=1, descending=True).values.contiguous().numpy()  # -1 must come last

    return choose


@contextlib.contextmanager
def products_in(kind: str) -> Iterator[None]:
    """As on a CPU whose fastest product is of this kind."""
    before = rough.native_int8, rough.native_bfloat16
    rough.native_int8 = lambda: kind == "int8"  # type: ignore[assignment]
    rough.native_bfloat16 = lambda: kind != "float32"  # type: ignore[assignment]
    try:
        yield
    finally:
        rough.native_int8, rough.native_bfloat16 = before


def trained_fvu(kind: str, store: Store, d_sae: int, k: int, steps: int) -> float:
    """What a dictionary that was trained with one kind of product leaves unexplained on held-out documents."""
    source = StoreSource(store, seed=0)
    held, measured = source.hold_out(16_384), metrics.Reconstruction()
    with products_in(kind), tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            out=Path(folder) / "d",
            architecture=TopKConfig(d_sae=d_sae, k=k),
            n_tokens=steps * 2048,
            watch_rows=0,
            checkpoint_every_seconds=1e9,
        )
        dictionary = train(config, source=source)
    with torch.no_grad(), products_in("float32"):
        for x in held.x.split(2048):
            measured.update(x, dictionary(x))
    return measured.compute()["fvu"].value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dictionary", type=Path, default=ROOT / "artifacts/demo/dictionary")
    parser.add_argument("--store", type=Path, default=ROOT / "artifacts/demo/store")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=600, help="Of each training; 0 trains none.")
    arguments = parser.parse_args()
    dictionary, store = dictionaries.load(arguments.dictionary), open_store(arguments.store)
    name = next(iter(store.info.hookpoints))
    x = torch.cat([store.read(i, (name,)).activations[name].float() for i in range(len(store.info.shards))])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    norms = x.norm(dim=1)
    raw = x[norms < 5 * norms.median()][: arguments.rows]
    weights, bias, k = (
        dictionary.W_enc.detach().T.contiguous(),
        dictionary.b_enc.detach(),
        dictionary.config.k,
    )
    x = raw - dictionary.b_pre
    d_sae, spare = len(weights), max(encode.SPARE, k // 4)

    with torch.no_grad(), kernels.threads(None):
        exact = (x.double() @ weights.double().T + bias.double()).relu()
        truth = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, exact.topk(k, 1).indices, True) & (
            exact > 0
        )

        def fvu(acts: Tensor, indices: Tensor) -> float:
            recon = kernels.decode(acts, indices, dictionary.W_dec.detach(), dictionary.b_dec.detach())
            return float((raw - recon).double().square().sum() / (raw - raw.mean(0)).double().square().sum())

        ways: dict[str, Candidates] = {
            "bfloat16": lambda: encode.candidates_of(rough.Wide(x, weights), len(x), bias, k + spare),
            "int8": lambda: encode.candidates_of(
                rough.Int8(x, weights), len(x), bias, k + spare + spare // 2
            ),
        }
        for rank in (64, 128, 256):
            for n in (2 * k, 8 * k):
                ways[f"sketch_{rank}_{n}"] = sketched(x, weights, bias, rank, n)
        for n_groups in (64, 256):
            for share in (8, 4):
                ways[f"groups_{n_groups}_{d_sae // share}"] = grouped(x, weights, n_groups, d_sae // share)

        left, right = x.bfloat16(), weights.bfloat16().T
        out = torch.empty(len(x), d_sae, dtype=torch.bfloat16)
        figures, best = [], fvu(*settled(x, weights, bias, exact.topk(k, 1).indices.int().numpy(), k))
        for way, choose in ways.items():
            candidates = choose()
            places = torch.from_numpy(candidates).long()
            kept = torch.zeros(len(x), d_sae + 1, dtype=torch.bool)
            kept.scatter_(1, torch.where(places < 0, d_sae, places), True)
            lost = float((truth & ~kept[:, :d_sae]).sum() / truth.sum())
            cost = fvu(*settled(x, weights, bias, candidates, k)) / best - 1
            times = interleaved(
                {
                    "product": lambda: torch.mm(left, right, out=out),
                    "way": lambda choose=choose: settled(x, weights, bias, choose(), k),  # type: ignore[misc]
                },
                arguments.rounds,
                warmup=2,
            )
            figures.append(
                row(way, ratio(times, "way", "product"), "", UNIT, lost=f"{lost:.1e}", fvu_cost=f"{cost:.1e}")
            )
            print(f"{way:20s} {figures[-1]['value']:7.3f}  lost {lost:.1e}  fvu {cost:+.1e}", flush=True)
    if arguments.steps:
        in_float32 = trained_fvu("float32", store, d_sae, k, arguments.steps)
        for kind in ("bfloat16", "int8"):
            value = trained_fvu(kind, store, d_sae, k, arguments.steps)
            about = {"fvu": round(value, 6), "fvu_float32": round(in_float32, 6), "steps": arguments.steps}
            figures.append(
                row(f"trained_{kind}", value / in_float32, "<= 1.005", "x the fvu of float32", **about)
            )
    finish("selection", figures)


if __name__ == "__main__":
    main()
