"""Watching a run: what a dictionary does on rows that it is never trained on, every so many tokens.

Knows a dictionary as it stands and fixed rows; probes that need more, such as a language model, are handed in.

    held-out rows -> fvu, l0, frac_dead, the histogram of densities     } -> watched.jsonl
    probes (`probes.py`)                                                }
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries import Trainable
from sememe.source import Batch

if TYPE_CHECKING:
    from sememe.train.crew import Team

__all__ = ["WATCHED", "Probe", "Watch", "density_edges", "measure", "reconstruct"]

WATCHED = "watched.jsonl"
FINER = ((12, 2.0), (48, 2.0**0.5), (float("inf"), 2.0**0.25))
"""Up to so many rows, bins of such a factor: at the rare end finer ones would lie between two counts."""

Reconstruct = Callable[[Float[Tensor, "rows d_in"]], Float[Tensor, "rows d_out"]]


@runtime_checkable
class Probe(Protocol):
    """Something to be measured while training goes on."""

    def __call__(self, reconstruct: Reconstruct, /) -> Mapping[str, float]:
        """Numbers for the log.

        Args:
            reconstruct: The dictionary as it stands, in raw units and on the CPU.
        """
        ...


def density_edges(n_rows: int) -> list[float]:
    """Logarithmic bins of densities that can be told apart on so many rows: from 3/4 of a row to all of them."""
    edges = [0.75 / n_rows]
    while edges[-1] < 1.0:
        factor = next(factor for most, factor in FINER if edges[-1] * n_rows < 0.99 * most)
        edges.append(edges[-1] * factor)
    return [*edges[:-1], 1.0]


@torch.no_grad()
def reconstruct(dictionary: Trainable, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
    """A dictionary's map as it stands, in raw units."""
    dictionary.eval()
    scaled = x * dictionary.scale_in
    return dictionary.decode(dictionary.encode(scaled), scaled) / dictionary.scale_out


@torch.no_grad()
def measure(dictionary: Trainable, rows: Batch, n: int) -> dict[str, Any]:
    """fvu, l0, frac_dead and `density`, the latents in each of `density_edges`. Sums over the whole set first.

    Args:
        dictionary: As it stands; left in eval mode.
        rows: In raw units, on its device.
        n: Rows encoded at once.
    """
    dictionary.eval()
    n_rows = rows.x.shape[0]
    error = torch.zeros((), dtype=torch.float64)
    active = torch.zeros(dictionary.d_sae, dtype=torch.int64)
    for start in range(0, n_rows, n):
        part = slice(start, start + n)
        scaled = rows.x[part] * dictionary.scale_in
        encoded = dictionary.encode(scaled)
        recon = dictionary.decode(encoded, scaled) / dictionary.scale_out
        error += (rows.target[part] - recon).double().square().sum().cpu()
        fired = encoded.indices[encoded.acts != 0].long()
        active += torch.bincount(fired, minlength=dictionary.d_sae).cpu()
    spread = (rows.target.double() - rows.target.double().mean(0)).square().sum()
    density = (active.double() / n_rows).clamp(max=1.0).numpy()
    counts, _ = np.histogram(density, bins=density_edges(n_rows))
    return {
        "fvu": float(error) / max(float(spread), 1e-30),
        "l0": float(active.sum()) / n_rows,
        "frac_dead": float((active == 0).double().mean()),
        "density": counts.tolist(),
    }


class Watch:
    """What is measured of every dictionary of a run, and when.

    Args:
        rows: Held-out rows of the stream, in raw units; None to measure none.
        probes: What else to measure of each dictionary, by name.
        every: Tokens between two measurements.
        batch_size: Rows per step of the run.
    """

    def __init__(
        self, rows: Batch | None, probes: Mapping[str, Sequence[Probe]], every: int, batch_size: int
    ) -> None:
        self.rows, self.probes, self.every, self.batch_size = rows, probes, every, batch_size

    @property
    def on(self) -> bool:
        """Whether there is anything to measure."""
        return self.rows is not None or any(self.probes.values())

    def due(self, step: int, n_steps: int) -> bool:
        """Whether to measure after this many steps: before the first, after the last, and where `every` is passed."""
        before, now = ((s * self.batch_size) // self.every for s in (step - 1, step))
        return self.on and (step in (0, n_steps) or now > before)

    def look(self, team: Team, step: int) -> dict[str, dict[str, Any]]:
        """Every dictionary's numbers by name; the first time also the bins of its densities."""
        found: dict[str, dict[str, Any]] = {name: {} for name in self.probes}
        if self.rows is not None:
            found = team.look(self.rows)
        for name, probes in self.probes.items():
            for probe in probes:
                found[name] |= probe(lambda x, name=name: team.reconstruct(name, x))  # type: ignore[misc]
        about: dict[str, Any] = {"tokens": step * self.batch_size}
        if step == 0 and self.rows is not None:
            about["edges"] = density_edges(self.rows.x.shape[0])
        return {name: about | values for name, values in found.items()}
