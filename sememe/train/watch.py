"""Watching a run: what a dictionary does on rows that it is never trained on, every so many tokens.

Knows a dictionary as it stands and fixed rows; probes that need more, such as a language model, are handed in.

    held-out rows -> fvu, l0, frac_dead, the histogram of densities     } -> watched.jsonl
    probes (`probes.py`)                                                }
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries import Trainable
from sememe.source import Batch

__all__ = ["WATCHED", "Probe", "Watch", "density_edges"]

WATCHED = "watched.jsonl"
OCTAVES = 4
"""Bins of a factor of two at the rare end, where densities are a few rows each; of its root above."""

Reconstruct = Callable[[Float[Tensor, "rows d_in"]], Float[Tensor, "rows d_out"]]


class Probe(Protocol):
    """Something to be measured while training goes on."""

    def __call__(self, reconstruct: Reconstruct) -> Mapping[str, float]:
        """Numbers for the log.

        Args:
            reconstruct: The dictionary as it stands, in raw units.
        """
        ...


def density_edges(n_rows: int) -> list[float]:
    """Logarithmic bins of densities that can be told apart on so many rows: from 3/4 of a row to all of them."""
    edges = [0.75 * 2.0**i / n_rows for i in range(OCTAVES + 1)]
    while edges[-1] * math.sqrt(2) < 1.0:
        edges.append(edges[-1] * math.sqrt(2))
    return [edge for edge in edges if edge < 1.0] + [1.0]


class Watch:
    """Measures one dictionary at a time.

    Args:
        rows: Held-out rows in raw units; none if they have no rows.
        probes: What else to measure.
        every: Tokens between two measurements.
        batch_size: Rows per step of the run, and rows encoded at once.
    """

    def __init__(self, rows: Batch | None, probes: Sequence[Probe], every: int, batch_size: int) -> None:
        self.rows, self.probes, self.every, self.batch_size = rows, tuple(probes), every, batch_size
        self.edges = [] if rows is None else density_edges(rows.x.shape[0])
        if rows is not None:
            centred = rows.target.double() - rows.target.double().mean(0)
            self._variance = float(centred.square().sum())

    @property
    def on(self) -> bool:
        """Whether there is anything to measure."""
        return self.rows is not None or bool(self.probes)

    def due(self, step: int, n_steps: int) -> bool:
        """Whether to measure after this many steps: before the first, after the last, and where `every` is passed."""
        before, now = ((s * self.batch_size) // self.every for s in (step - 1, step))
        return step in (0, n_steps) or now > before

    @torch.no_grad()
    def __call__(self, dictionary: Trainable) -> dict[str, Any]:
        """fvu, l0, frac_dead and `density` (latents per bin of `edges`) on the rows, and what the probes say."""
        dictionary.eval()

        def reconstruct(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
            scaled = x * dictionary.scale_in
            return dictionary.decode(dictionary.encode(scaled), scaled) / dictionary.scale_out

        values = {} if self.rows is None else self._on_rows(dictionary, self.rows)
        for probe in self.probes:
            values |= probe(reconstruct)
        return values

    def _on_rows(self, dictionary: Trainable, rows: Batch) -> dict[str, Any]:
        """Over the whole set: sums first, then divided."""
        n_rows = rows.x.shape[0]
        error = torch.zeros((), dtype=torch.float64)
        active = torch.zeros(dictionary.d_sae, dtype=torch.int64)
        for start in range(0, n_rows, self.batch_size):
            part = slice(start, start + self.batch_size)
            scaled = rows.x[part] * dictionary.scale_in
            encoded = dictionary.encode(scaled)
            recon = dictionary.decode(encoded, scaled) / dictionary.scale_out
            error += (rows.target[part] - recon).double().square().sum()
            active += torch.bincount(encoded.indices[encoded.acts != 0].long(), minlength=dictionary.d_sae)
        density = (active.double() / n_rows).clamp(max=1.0).numpy()
        counts, _ = np.histogram(density, bins=self.edges)
        return {
            "fvu": float(error) / max(self._variance, 1e-30),
            "l0": float(active.sum()) / n_rows,
            "frac_dead": float((active == 0).double().mean()),
            "density": counts.tolist(),
        }
