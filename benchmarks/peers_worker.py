"""One training run of one package, on rows that all of them are given in the same order.

Runs in the package's own environment and so imports nothing of sememe there, nor of the other benchmarks. Each
package is driven through its own trainer, or, where that wants a language model (sparsify), through its own modules
in the order in which its trainer calls them. Writes one JSON file:

    {"package", "version", "lr", "d_sae", "k", "batch", "steps", "seconds", "tokens_per_second", "fvu",
     "curve": [[seconds, step, fvu on the held-out rows], ...], "torch", "threads", "seed"}

Seconds are those of training, the reading of rows included and the measuring on held-out rows not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

DISTRIBUTIONS = {
    "sae_lens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
    "sememe": "sememe",
}


class Peer(NamedTuple):
    """A package in training: one step on a batch, and its reconstruction of rows, both in raw units."""

    step: Callable[[Tensor], None]
    reconstruct: Callable[[Tensor], Tensor]
    lr: float


class Rows:
    """The rows in their order, in memory as bfloat16; over again after the last."""

    def __init__(self, path: Path, batch: int, seed: int) -> None:
        with safe_open(path, framework="pt") as file:
            self.rows, self.heldout = file.get_tensor("rows"), file.get_tensor("heldout").float()
        self.batch, self.seed, self.epoch, self.at = batch, seed, 0, 0
        self.order = self._order()

    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(1_000 * self.seed + self.epoch)
        return torch.randperm(self.rows.shape[0], generator=generator)

    def next_batch(self) -> Tensor:
        """The next rows in float32."""
        if self.at + self.batch > self.rows.shape[0]:
            self.epoch, self.at = self.epoch + 1, 0
            self.order = self._order()
        take = self.order[self.at : self.at + self.batch]
        self.at += self.batch
        return self.rows.index_select(0, take).float()

    def sample(self, n: int) -> Tensor:
        """The first rows of the first order."""
        return self.rows.index_select(0, self.order[:n]).float()


def sae_lens(rows: Rows, options: argparse.Namespace) -> Peer:
    """TopKTrainingSAE under SAETrainer. Inputs scaled as by its "expected_average_only_in"; the last fifth decays."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = TopKTrainingSAEConfig(
        d_in=rows.rows.shape[1],
        d_sae=options.d_sae,
        k=options.k,
        normalize_activations="expected_average_only_in",
    )
    lr = options.lr or 3e-4
    trainer_config = SAETrainerConfig(
        total_training_samples=options.steps * options.batch,
        train_batch_size_samples=options.batch,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=options.steps // 5,
    )
    sae = TopKTrainingSAE(config)

    def none() -> Iterator[Tensor]:
        yield from ()

    trainer = SAETrainer(trainer_config, sae, none())
    sample = rows.sample(32 * options.batch)
    trainer.activation_scaler.estimate_scaling_factor(
        config.d_in, iter(torch.split(sample, options.batch)), min(32, -(-len(sample) // options.batch))
    )

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def reconstruct(x: Tensor) -> Tensor:
        scale = trainer.activation_scaler.scaling_factor
        sae.eval()
        return sae(x * scale) / scale

    return Peer(step, reconstruct, lr)


def dictionary_learning(rows: Rows, options: argparse.Namespace) -> Peer:
    """TopKTrainer's update. Inputs divided by their root mean square norm, as by normalize_activations."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    lr = options.lr or 2e-4 / (options.d_sae / 2**14) ** 0.5  # its own rule
    trainer = TopKTrainer(
        steps=options.steps,
        activation_dim=rows.rows.shape[1],
        dict_size=options.d_sae,
        k=options.k,
        layer=0,
        lm_name="rows",
        lr=lr,
        warmup_steps=max(1, min(1000, options.steps // 20)),  # its own 1,000 would outlast a short run
        decay_start=int(0.8 * options.steps),
        seed=options.seed,
        device="cpu",
    )
    norm = rows.sample(32 * options.batch).square().sum(1).mean().sqrt()
    at = iter(range(options.steps))

    def step(x: Tensor) -> None:
        trainer.update(next(at), x / norm)

    return Peer(step, lambda x: trainer.ae(x / norm) * norm, lr)


def sparsify(rows: Rows, options: argparse.Namespace) -> Peer:
    """SparseCoder with schedule-free Signum, its default, stepped as its trainer does."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

    torch.manual_seed(options.seed)
    config = SparseCoderConfig(num_latents=options.d_sae, k=options.k)
    coder = SparseCoder(rows.rows.shape[1], config, dtype=torch.float32)
    lr = options.lr or 5e-3 / (options.d_sae / 2**14) ** 0.5  # its own rule
    optimiser = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=lr), momentum=0.95)
    optimiser.train()
    started: list[bool] = []

    def step(x: Tensor) -> None:
        if not started:
            coder.b_dec.data = x.mean(0)
            started.append(True)
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    def reconstruct(x: Tensor) -> Tensor:
        optimiser.eval()
        found: Tensor = coder(x).sae_out
        optimiser.train()
        return found

    return Peer(step, reconstruct, lr)


PEERS = {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def fvu(reconstruct: Callable[[Tensor], Tensor], rows: Tensor, batch: int) -> float:
    """Squared error over the variance about the mean, sums over all rows first."""
    error = 0.0
    with torch.no_grad():
        for part in torch.split(rows, batch):
            error += float((part - reconstruct(part)).double().square().sum())
    return error / float((rows.double() - rows.double().mean(0)).square().sum())


def run_peer(name: str, rows: Rows, options: argparse.Namespace) -> dict[str, Any]:
    """Train for so many steps, and look at the held-out rows every now and then."""
    torch.manual_seed(options.seed)
    peer = PEERS[name](rows, options)
    seconds, times, curve = 0.0, [], []
    for step in range(1, options.steps + 1):
        started = time.perf_counter()
        peer.step(rows.next_batch())
        times.append(time.perf_counter() - started)
        seconds += times[-1]
        if step % options.look_every == 0 or step == options.steps:
            curve.append([round(seconds, 3), step, fvu(peer.reconstruct, rows.heldout, options.batch)])
    return _result(name, options, peer.lr, seconds, times, curve)


def run_sememe(rows: Rows, options: argparse.Namespace) -> dict[str, Any]:
    """`sememe.train` on the same rows; the curve comes from a probe, whose time is taken off."""
    import tempfile

    from sememe.source import Batch
    from sememe.train import TrainConfig, learning_rate, train

    times: list[float] = []
    curve: list[list[float]] = []
    aside = [0.0, 0.0]  # seconds spent measuring, and when the last batch was handed out

    class Stream:
        """The rows as a source."""

        d_in = d_out = rows.rows.shape[1]
        sites, n_rows = None, None

        def next_batch(self, n: int) -> Batch:
            now = time.perf_counter() - aside[0]
            if aside[1]:
                times.append(now - aside[1])
            aside[1] = now
            x = rows.next_batch()
            return Batch(x, x)

        def sample(self, n: int) -> Batch:
            x = rows.sample(n)
            return Batch(x, x)

        def state_dict(self) -> dict[str, Any]:
            return {"at": rows.at}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            rows.at = state["at"]

    def look(reconstruct: Callable[[Tensor], Tensor]) -> dict[str, float]:
        began = time.perf_counter()
        if aside[1]:
            value = fvu(reconstruct, rows.heldout, options.batch)
            at = began - aside[0] - aside[1] + sum(times)
            curve.append([round(at, 3), len(times) + 1, value])
        aside[0] += time.perf_counter() - began
        return {}

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.build(
            {
                "out": Path(folder) / "d",
                "architecture": {"kind": "topk", "d_sae": options.d_sae, "k": options.k},
                "n_tokens": options.steps * options.batch,
                "batch_size": options.batch,
                "watch_every": options.look_every * options.batch,
                "checkpoint_every_seconds": 1e9,
                "seed": options.seed,
                **({"lr": options.lr} if options.lr else {}),
            }
        )
        train(config, source=Stream(), probes=[look])
    lr = learning_rate(config, options.d_sae)
    return _result("sememe", options, lr, curve[-1][0], times, curve)


def _result(
    name: str,
    options: argparse.Namespace,
    lr: float,
    seconds: float,
    times: list[float],
    curve: list[list[float]],
) -> dict[str, Any]:
    return {
        "package": name,
        "version": importlib.metadata.version(DISTRIBUTIONS[name]),
        "lr": lr,
        "default_lr": options.lr is None,
        "d_sae": options.d_sae,
        "k": options.k,
        "batch": options.batch,
        "steps": options.steps,
        "seed": options.seed,
        "seconds": seconds,
        "tokens_per_second": options.batch / statistics.median(times),
        "fvu": curve[-1][2],
        "curve": curve,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", choices=sorted(DISTRIBUTIONS))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=None, help="The package's own default if not given.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--look-every", type=int, default=25, help="Steps between looks at held-out rows.")
    options = parser.parse_args()
    rows = Rows(options.rows, options.batch, options.seed)
    own = options.package == "sememe"
    result = run_sememe(rows, options) if own else run_peer(options.package, rows, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    aside = options.out.with_suffix(".tmp")
    aside.write_text(json.dumps(result) + "\n", encoding="utf-8")
    aside.replace(options.out)


if __name__ == "__main__":
    main()
