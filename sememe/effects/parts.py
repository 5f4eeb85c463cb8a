"""What was found so far, in files that a killed run leaves whole; and at the end as two tables. Runs no model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sememe.atlas import EFFECTS, REMOVALS
from sememe.effects.group import Found

__all__ = ["PARTS", "Parts", "summary_of", "write_tables"]

PARTS = "part-*"
"""Whole ones, and one that a kill left half-written aside."""


class Parts:
    """Numbered files of a work folder: `part-FIRST-LAST.npz` holds what the contexts FIRST to LAST - 1 gave.

    Args:
        folder: Where.
        seconds: How often one is written.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.paths = sorted(folder.glob(f"{PARTS}.npz"))
        self.n_done = int(self.paths[-1].stem.split("-")[2]) if self.paths else 0
        """Contexts of the parts on disk."""
        self.n_done_examples = sum(len(_read(path).effects["latent"]) for path in self.paths)
        self.waiting: list[Found] = []
        self.n_waiting = 0
        self.saved_at: float | None = None

    def add(self, found: Found, n_contexts: int, now: float) -> None:
        """Keep what some contexts gave, and write what is waiting if it is time to."""
        self.waiting.append(found)
        self.n_waiting += n_contexts
        if self.saved_at is None:
            self.saved_at = now
        if now - self.saved_at >= self.seconds:
            self.save()
            self.saved_at = now

    def save(self) -> None:
        """Write what is waiting. Whole or not at all."""
        if not self.waiting:
            return
        last = self.n_done + self.n_waiting
        path = self.folder / f"part-{self.n_done:09d}-{last:09d}.npz"
        aside = path.with_suffix(".tmp")
        found = Found.cat(self.waiting)
        columns: dict[str, Any] = {
            f"{i}.{name}": values for i, part in enumerate(found) for name, values in part.items()
        }
        with aside.open("wb") as out:
            np.savez(out, **columns)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(path)
        self.paths.append(path)
        self.n_done, self.n_waiting, self.waiting = last, 0, []

    def all(self) -> Found:
        """Everything that was written."""
        return Found.cat([_read(path) for path in self.paths])


def _read(path: Path) -> Found:
    columns: tuple[dict[str, np.ndarray], ...] = ({}, {}, {})
    with np.load(path) as saved:
        for key in saved.files:
            number, name = key.split(".")
            columns[int(number)][name] = saved[key]
    return Found(*columns)


def write_tables(folder: Path, found: Found, text_of: Callable[[int], str], n_after: int) -> None:
    """effects.parquet and removals.parquet, ordered by latent; see `sememe.atlas.EFFECTS_SCHEMA`."""
    effects, removals = found.effects, found.removals
    order = np.lexsort((effects["rank"], effects["decile"], effects["kind"], effects["latent"]))
    effects = {name: values[order] for name, values in effects.items()}
    unscored = ~effects["scored"]
    none_after = np.full(len(order), n_after == 0) | unscored
    table = {
        "latent": effects["latent"].astype(np.int32),
        "kind": np.array(["top", "decile"])[effects["kind"].astype(np.int64)],
        "decile": pa.array(effects["decile"].astype(np.int8), mask=effects["decile"] < 0),
        **{name: effects[name].astype(np.int32) for name in ("rank", "context", "position")},
        "act": effects["act"].astype(np.float32),
        "loss": pa.array(effects["loss"], mask=unscored),
        "loss_change": pa.array(effects["loss_change"], mask=unscored),
        "loss_change_after": pa.array(effects["loss_change_after"], mask=none_after),
        "n_after": effects["n_after"].astype(np.int32),
        "kl": effects["kl"],
        "logit_change": pa.array(effects["logit_change"], mask=unscored),
        **{
            name: _named(effects[name], effects[f"{name}_by"], sign, text_of)
            for name, sign in (("raised", 1), ("lowered", -1))
        },
    }
    pq.write_table(pa.table(table), folder / EFFECTS)
    order = np.lexsort((removals["removed"], removals["rank"], removals["latent"]))
    whole = ("latent", "rank", "context", "position", "removed", "token")
    columns: dict[str, Any] = {name: removals[name][order].astype(np.int32) for name in whole}
    columns |= {name: removals[name][order].astype(np.float32) for name in ("act", "act_without")}
    pq.write_table(pa.table(columns), folder / REMOVALS)


def _named(tokens: np.ndarray, changes: np.ndarray, sign: int, text_of: Callable[[int], str]) -> pa.Array:
    """A column of lists of {token, text, change}; only of those that change in the direction of the sign."""
    there = changes * sign > 0
    known = {token: text_of(token) for token in np.unique(tokens[there]).tolist()}
    flat = tokens[there]
    items = pa.StructArray.from_arrays(
        [
            pa.array(flat.astype(np.int32)),
            pa.array([known[token] for token in flat.tolist()], pa.string()),
            pa.array(changes[there].astype(np.float32)),
        ],
        names=["token", "text", "change"],
    )
    ends = np.append(0, there.sum(axis=1).cumsum())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), items)


def summary_of(found: Found, n_after: int) -> dict[str, Any]:
    """Counts, means over the ablations, and the root mean square of the controls' changes."""
    effects, controls = found.effects, found.controls
    scored = effects["scored"]
    summary: dict[str, Any] = {
        "n_latents": int(np.unique(effects["latent"]).size),
        "n_ablations": int(scored.size),
        "n_scored": int(scored.sum()),
        "n_removals": int(found.removals["latent"].size),
        "loss_change": _mean(effects["loss_change"][scored]),
        "loss_change_after": _mean(effects["loss_change_after"][scored]) if n_after else None,
        "kl": _mean(effects["kl"]),
        "noise": _rms(controls["loss_change"][controls["scored"]]),
        "noise_after": _rms(controls["loss_change_after"][controls["scored"]]) if n_after else None,
    }
    return summary


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if values.size else None


def _rms(values: np.ndarray) -> float | None:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else None
