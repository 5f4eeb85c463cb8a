"""A source of tensors in memory. Knows no store and no model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.dictionaries.base import Batch, Sites
from sememe.errors import ConfigError, ShapeError
from sememe.source.base import HELD_SALT, MOST_HELD, Cursor, permutation

__all__ = ["TensorSource"]


class TensorSource:
    """Batches from one tensor in memory, in a new random order at each pass.

    Args:
        x: The rows.
        seed: Of the order.
        target: What to reconstruct; x itself if not given.
        sites: Where in which model the rows come from.
        max_norm_ratio: Leave out rows of x whose Euclidean norm is more than this many times the median
            (attention sinks; the token policy of stores and live runs takes 5). All rows are kept if not given.
    """

    def __init__(
        self,
        x: Float[Tensor, "rows d_in"],
        seed: int = 0,
        target: Float[Tensor, "rows d_out"] | None = None,
        sites: Sites | None = None,
        max_norm_ratio: float | None = None,
    ) -> None:
        if x.dim() != 2 or x.shape[0] == 0:
            raise ShapeError("x must have shape (rows, d_in) with rows >= 1", tuple(x.shape), "Flatten it.")
        if max_norm_ratio is not None:
            if max_norm_ratio < 1:
                raise ConfigError(
                    "max_norm_ratio must be >= 1: half of the rows lie above the median",
                    max_norm_ratio,
                    "Raise it.",
                )
            sites, kept = _without_outliers(x, sites, max_norm_ratio)
            x, target = x[kept], None if target is None else target[kept]
        self.x, self.target, self.seed, self.sites = x, target, seed, sites
        self.d_in, self.n_rows = x.shape[1], int(x.shape[0])
        self.d_out = self.d_in if target is None else target.shape[1]
        self._cursor = Cursor(seed, 1)
        self._order: tuple[int, Tensor] | None = None
        self._kept: Int[Tensor, " n_rows"] | None = None

    def hold_out(self, n: int) -> Batch:
        """Rows at random."""
        order = permutation(self.n_rows, self.seed, HELD_SALT)
        n = min(n, self.n_rows // MOST_HELD)
        held = self._rows(order[:n])
        self._kept = order[n:].sort().values
        self.n_rows -= n
        return held

    def next_batch(self, n: int) -> Batch:
        """The next n rows; a pass may end within a batch."""
        picked = []
        while n > 0:
            if self._order is None or self._order[0] != self._cursor.epoch:
                self._order = (
                    self._cursor.epoch,
                    permutation(self.n_rows, self.seed, self._cursor.epoch, 0),
                )
            take = self._order[1][self._cursor.offset : self._cursor.offset + n]
            picked.append(take)
            n -= len(take)
            self._cursor.advance(len(take), self.n_rows)
        return self._rows(torch.cat(picked))

    def _rows(self, rows: Int[Tensor, " n"]) -> Batch:
        if self._kept is not None:
            rows = self._kept[rows]
        x = self.x[rows].float()
        return Batch(x, x if self.target is None else self.target[rows].float())

    def sample(self, n: int) -> Batch:
        """Rows of the first pass's order."""
        return self._rows(permutation(self.n_rows, self.seed, 0, 0)[:n])

    def state_dict(self) -> dict[str, Any]:
        """Pass and offset."""
        return self._cursor.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._cursor.load(state)


def _without_outliers(
    x: Float[Tensor, "rows d_in"], sites: Sites | None, ratio: float
) -> tuple[Sites | None, Bool[Tensor, " rows"]]:
    """Sites that know their largest norm, and which rows exceed it at none of them."""
    kept = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    inputs = []
    for site in (None,) if sites is None else sites.inputs:
        part = x if site is None else x[:, site.start : site.stop]
        norms = torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)
        max_norm = ratio * float(norms.median())
        kept &= norms <= max_norm
        if site is not None:
            inputs.append(site.replace(max_norm=max_norm))
    if sites is None:
        return None, kept
    outputs = tuple(inputs) if sites.outputs == sites.inputs else sites.outputs
    return Sites(inputs=tuple(inputs), outputs=outputs), kept
