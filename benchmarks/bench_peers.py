"""SAELens, sparsify and dictionary_learning beside sememe: the same rows in the same order, k, width and batch.

    make bench-peers                                     # everything: hours on two cores
    make bench-peers ARGS="--only sae_lens --lr 3e-4"    # a part; parts are collected
    make bench-peers ARGS="--report"                     # the table of what there is
    make bench-peers ARGS="--random-rows"                # held-out rows at random, as most packages do it
    make bench-peers ARGS="--random-rows --every-position"  # first positions and attention sinks among the rows

Each package runs in an environment of its own (.venv-peers-NAME), at a few learning rates around its own default;
sememe at its default. The rows are activations of the demo's store (artifacts/demo/store; harvested if it is not
there), a part of its documents held out. Every run leaves artifacts/bench/peers/NAME-lrLR-seedSEED.json, and all of
them together artifacts/bench/peers.json; other protocols leave theirs in a folder and a file of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from common import finish, row
from safetensors.torch import save_file

from sememe.harvest import HarvestConfig, harvest
from sememe.source import StoreSource
from sememe.store import open_store
from sememe.text import TokenPolicy

HERE = Path(__file__).parent
BENCH = Path("artifacts/bench")
STORE = Path("artifacts/demo/store")
WHOLE_STORE = Path("artifacts/bench/every_position/store")
"""The same text with every position: the first of each row and attention sinks, too."""
N_HELD_OUT = 16_384
LEARNING_RATES = {
    "sae_lens": (3e-4, 1e-3, 3e-3, 1e-2),
    "sparsify": (1e-3, 3e-3, 1e-2, 3e-2),
    "dictionary_learning": (4e-4, 1.2e-3, 3.6e-3, 1e-2),
    "sememe": (None,),
}
"""What is tried: for the peers their default (or, for sparsify, near it), and on until the best lies between others;
for us ours alone."""
FASTER = {"sae_lens": 10, "sparsify": 3}
"""How many times sooner than a peer's own run ends ours must have reached the best peer's final fvu."""


def python_of(name: str) -> Path:
    """The interpreter of a package's own environment."""
    return Path(sys.executable) if name == "sememe" else Path(f".venv-peers-{name}/bin/python")


class Protocol(NamedTuple):
    """Which rows are measured, and which there are."""

    random_rows: bool
    """Hold out rows at random, so that their neighbours are trained on; else whole documents."""
    every_position: bool
    """Keep first positions, special tokens and attention sinks."""

    @property
    def name(self) -> str:
        """What its files are called: `peers` is the usual one."""
        parts = ["random_rows"] * self.random_rows + ["every_position"] * self.every_position
        return "_".join(["peers", *parts])

    @property
    def results(self) -> Path:
        """Where its runs leave their results."""
        return BENCH / self.name


def whole_store() -> Path:
    """The store of every position, harvested if it is not there."""
    if not (WHOLE_STORE / "meta.json").is_file():
        policy = TokenPolicy(drop_positions=0, drop_special=False, max_norm_ratio=None)
        harvest(HarvestConfig(out=WHOLE_STORE, hookpoints=("resid_post.8",), n_tokens=600_000, policy=policy))
    return WHOLE_STORE


def prepare(path: Path, store: Path, n_rows: int | None, protocol: Protocol) -> None:
    """The rows as one file that needs none of our code to be read: some held out, the rest in random order."""
    if path.is_file():
        return
    if protocol.every_position:
        store = whole_store()
    elif not (store / "meta.json").is_file():
        harvest(HarvestConfig(out=store, hookpoints=("resid_post.8",), n_tokens=600_000))
    source = StoreSource(open_store(store), seed=0, group_mb=4096)
    held = source.next_batch(N_HELD_OUT) if protocol.random_rows else source.hold_out(N_HELD_OUT)
    left = source.n_rows - (N_HELD_OUT if protocol.random_rows else 0)
    rows = source.next_batch(min(left, n_rows or left)).x.bfloat16()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    save_file({"rows": rows, "heldout": held.x.bfloat16()}, aside)
    aside.replace(path)


def run(name: str, lr: float | None, seed: int, rows: Path, arguments: argparse.Namespace) -> None:
    """One run, unless its result is there."""
    label = "default" if lr is None else f"{lr:g}"
    out = rows.parent / f"{name}-lr{label}-seed{seed}.json"
    if out.is_file() and not arguments.fresh and json.loads(out.read_text())["steps"] == arguments.steps:
        print(f"{out} is there")
        return
    interpreter = python_of(name)
    if not interpreter.is_file():
        print(f"{name}: no {interpreter.parent.parent}; `make bench-peers` makes it")
        return
    command: list[str | Path] = [interpreter, HERE / "peers_worker.py", name, "--rows", rows, "--out", out]
    for option in ("steps", "d_sae", "k", "batch", "look_every"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    command += ["--seed", str(seed), *(["--lr", str(lr)] if lr is not None else [])]
    print(f"{name} at lr {label}, seed {seed}")
    if subprocess.run(command, check=False).returncode:
        print(f"{name} at lr {label} failed; the others go on", file=sys.stderr)


def results(folder: Path, steps: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Finished runs by package; the longest only, where there are several lengths."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    steps = steps or max((result["steps"] for result in found), default=0)
    by_package: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        if result["steps"] == steps:
            by_package.setdefault(result["package"], []).append(result)
    return by_package


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The learning rate with the lowest fvu; of several seeds their mean."""
    rates: dict[float, list[dict[str, Any]]] = {}
    for result in runs:
        rates.setdefault(result["lr"], []).append(result)
    chosen = min(rates.values(), key=lambda group: sum(r["fvu"] for r in group) / len(group))
    return chosen[0] | {
        "fvu": sum(r["fvu"] for r in chosen) / len(chosen),
        "seconds": sum(r["seconds"] for r in chosen) / len(chosen),
        "seeds": len(chosen),
        "tried": sorted(rates),
    }


def reached(curve: list[list[float]], fvu: float) -> tuple[float, int] | None:
    """Seconds and step at which a curve first lies at or below an fvu; None if it never does."""
    return next(((seconds, int(step)) for seconds, step, value in curve if value <= fvu), None)


def figures(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per package and number, and ours over theirs where both are there."""
    rows = []
    tops = {name: best(runs) for name, runs in found.items()}
    for name, top in tops.items():
        about = {key: top[key] for key in ("version", "lr", "tried", "seeds", "steps", "d_sae", "k", "batch")}
        rows.append(row(f"peers_{name}_tokens_per_second", top["tokens_per_second"], "", "tokens/s", **about))
        rows.append(row(f"peers_{name}_fvu", top["fvu"], "", "fvu on held-out documents", **about))
        rows.append(row(f"peers_{name}_seconds", top["seconds"], "", "s for the whole run", **about))
    ours, peers = tops.get("sememe"), {name: top for name, top in tops.items() if name != "sememe"}
    if ours is None or not peers:
        return rows
    winner = min(peers, key=lambda name: peers[name]["fvu"])
    target = peers[winner]["fvu"]
    rows.append(row("peers_fvu_over_best", ours["fvu"] / target, "<= 1.0", "x", best=winner))
    there = reached(ours["curve"], target)
    for name, top in peers.items():
        speed = ours["tokens_per_second"] / top["tokens_per_second"]
        rows.append(row(f"peers_speed_over_{name}", speed, "", "x its tokens/s"))
        must = f">= {FASTER[name]}" if name in FASTER else ""
        value = float("nan") if there is None else top["seconds"] / there[0]
        about = {
            "target_fvu": target,
            "best": winner,
            "ours_seconds": there and there[0],
            "theirs": top["seconds"],
        }
        rows.append(row(f"peers_time_over_{name}", value, must, "x sooner at the best peer's fvu", **about))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=sorted(LEARNING_RATES), help="One package; repeat."
    )
    parser.add_argument(
        "--lr", type=float, action="append", help="Instead of the learning rates listed here."
    )
    parser.add_argument("--rounds", type=int, default=1, help="Seeds per learning rate.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--look-every", type=int, default=25, help="Steps between looks at held-out rows.")
    parser.add_argument("--random-rows", action="store_true", help="Hold out rows, not documents.")
    parser.add_argument("--every-position", action="store_true", help="First positions and sinks, too.")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--n-rows", type=int, help="Only so many rows of the store.")
    parser.add_argument("--fresh", action="store_true", help="Run again what is there.")
    parser.add_argument("--report", action="store_true", help="Run nothing; the table of what is there.")
    arguments = parser.parse_args()
    protocol = Protocol(arguments.random_rows, arguments.every_position)
    few = "" if arguments.n_rows is None else f"-{arguments.n_rows}"
    rows = protocol.results / f"rows{few}.safetensors"
    if not arguments.report:
        prepare(rows, arguments.store, arguments.n_rows, protocol)
        for name in arguments.only or LEARNING_RATES:
            for lr in arguments.lr or LEARNING_RATES[name]:
                for seed in range(arguments.rounds):
                    run(name, lr, seed, rows, arguments)
    steps = None if arguments.report else arguments.steps
    finish(protocol.name, figures(results(protocol.results, steps)))


if __name__ == "__main__":
    main()
