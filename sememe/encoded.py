"""Sparse activations: the one type that flows from encoder to page. Knows no dictionary and no model.

Flat `acts` and `indices` and a `row_ptr`, as in a compressed sparse row matrix: row r holds the entries
`row_ptr[r]:row_ptr[r + 1]`, in no particular order. Acts may be signed. Duplicate indices in a row add.

Where the number of active latents varies and nothing may wait to learn it, `acts` and `indices` are a buffer of
fixed capacity: what lies past `row_ptr[-1]` has activation 0 and index 0 and belongs to no row, the count stays on
the device as `row_ptr[-1]`, and `overflow`, a flag on the device, says whether entries had to be left out.

Where a large share of all latents is active, rows may list every latent, in order, so that `acts` is a dense matrix
whose products are fast; `mask` says which of them are entries, and the others have activation 0. `Counts` is what is
left to say of activations that nobody holds any more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.errors import ShapeError

__all__ = ["Counts", "Encoded", "TopKView"]


class TopKView(NamedTuple):
    """The (batch, k) view of an Encoded whose rows all hold k entries."""

    acts: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


class Counts(NamedTuple):
    """How many latents were active, by row and by latent: of a batch whose activations were let go of."""

    per_row: Int[Tensor, " batch"]
    """Active latents of each row."""
    per_latent: Int[Tensor, " d_sae"]
    """Rows in which each latent is active."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.per_row.shape[0]

    @property
    def overflow(self) -> None:
        """None: no entry was left out."""

    def l0(self) -> Int[Tensor, " batch"]:
        """Active latents per row."""
        return self.per_row


class Encoded:
    """Sparse latent activations of a batch of rows.

    Args:
        acts: The activations, all rows one after the other.
        indices: Which latent each belongs to, in [0, d_sae).
        row_ptr: Where each row starts; `row_ptr[-1]` is the number of entries.
        d_sae: Number of latents.
        k: Entries per row, if every row holds the same number.
        overflow: Given where acts and indices are a buffer that may be longer than `row_ptr[-1]`: whether there
            were more entries than it could take; of several dictionaries in one, each one's own.
        mask: Given where every row lists every latent, in their order: which of them are entries. The others have
            activation 0.
    """

    __slots__ = ("acts", "d_sae", "indices", "k", "mask", "overflow", "row_ptr")

    def __init__(
        self,
        acts: Float[Tensor, " nnz"],
        indices: Int[Tensor, " nnz"],
        row_ptr: Int[Tensor, " batch_plus_1"],
        d_sae: int,
        k: int | None = None,
        overflow: Bool[Tensor, "*n"] | None = None,
        mask: Bool[Tensor, " nnz"] | None = None,
    ) -> None:
        if acts.shape != indices.shape or acts.dim() != 1 or row_ptr.dim() != 1:
            raise ShapeError(
                "acts and indices must be flat and equally long, row_ptr flat",
                f"{tuple(acts.shape)}, {tuple(indices.shape)}, {tuple(row_ptr.shape)}",
                "Use Encoded.from_topk or Encoded.from_dense.",
            )
        self.acts, self.indices, self.row_ptr, self.d_sae, self.k = acts, indices, row_ptr, d_sae, k
        self.overflow, self.mask = overflow, mask

    @classmethod
    def from_topk(
        cls, acts: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], d_sae: int
    ) -> Encoded:
        """From a fixed number of entries per row; the (batch, k) tensors are shared, not copied."""
        batch, k = acts.shape
        row_ptr = torch.arange(0, batch * k + 1, k, device=acts.device) if k else _zeros(batch + 1, acts)
        return cls(acts.reshape(-1), indices.reshape(-1), row_ptr, d_sae, k)

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "batch d_sae"]) -> Encoded:
        """From a dense matrix: its non-zero entries, differentiably."""
        rows, columns = torch.nonzero(dense.detach(), as_tuple=True)
        counts = torch.bincount(rows, minlength=dense.shape[0])
        row_ptr = torch.cat([_zeros(1, rows), counts.cumsum(0)])
        return cls(dense[rows, columns], columns.to(torch.int32), row_ptr, dense.shape[1])

    @classmethod
    def of_every(cls, acts: Float[Tensor, "batch d_sae"], mask: Bool[Tensor, "batch d_sae"]) -> Encoded:
        """Rows that list every latent: the matrix is shared, not copied.

        Args:
            acts: Activations, 0 where the mask is false.
            mask: Which of them are entries.
        """
        n_rows, d_sae = acts.shape
        encoded = cls.from_topk(acts, _every(n_rows, d_sae, acts.device), d_sae)
        encoded.mask = mask.reshape(-1)
        return encoded

    @classmethod
    def cat(cls, parts: Sequence[Encoded]) -> Encoded:
        """Rows of several batches, one after the other."""
        parts = [part.compact() for part in parts]
        ks = {part.k for part in parts}
        counts = torch.cat([part.row_counts() for part in parts])
        row_ptr = torch.cat([_zeros(1, counts), counts.cumsum(0)])
        return cls(
            torch.cat([part.acts for part in parts]),
            torch.cat([part.indices for part in parts]),
            row_ptr,
            parts[0].d_sae,
            ks.pop() if len(ks) == 1 else None,
        )

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.row_ptr.shape[0] - 1

    def row_counts(self) -> Int[Tensor, " batch"]:
        """Stored entries per row, zeros included."""
        return self.row_ptr[1:] - self.row_ptr[:-1]

    def row_ids(self) -> Int[Tensor, " nnz"]:
        """Which row each entry belongs to; the last one for what fills a buffer up. Never waits for the device."""
        if self.k is not None:
            return torch.arange(self.acts.shape[0], device=self.row_ptr.device) // max(self.k, 1)
        if self.overflow is not None:
            places = torch.arange(self.acts.shape[0], device=self.row_ptr.device)
            return torch.searchsorted(self.row_ptr[1:], places, right=True).clamp_(max=self.n_rows - 1)
        rows = torch.arange(self.n_rows, device=self.row_ptr.device)
        return torch.repeat_interleave(rows, self.row_counts(), output_size=self.acts.shape[0])

    def stored(self) -> Bool[Tensor, " nnz"]:
        """Where entries are, and not what fills a buffer or a matrix up. Never waits for the device."""
        if self.mask is not None:
            return self.mask
        return torch.arange(self.acts.shape[0], device=self.row_ptr.device) < self.row_ptr[-1]

    def only_stored(self, values: Float[Tensor, " nnz"], fill: float = 0.0) -> Float[Tensor, " nnz"]:
        """A value for each place; `fill` for what fills a buffer or a matrix up and is no entry."""
        if self.overflow is None and self.mask is None:
            return values
        return torch.where(self.stored(), values, fill)

    def compact(self) -> Encoded:
        """Without what fills a buffer or a matrix up; waits for the device to learn how much that is.

        Raises:
            ShapeError: entries had to be left out.
        """
        if self.mask is not None:
            counts = self.mask.view(self.n_rows, -1).sum(1)
            row_ptr = torch.cat([_zeros(1, counts), counts.cumsum(0)])
            return Encoded(self.acts[self.mask], self.indices[self.mask], row_ptr, self.d_sae)
        if self.overflow is None:
            return self
        if bool(self.overflow.any()):
            raise ShapeError(
                f"the entries must fit their buffer of {self.acts.shape[0]}", "more", "Raise its capacity."
            )
        n = int(self.row_ptr[-1])
        return Encoded(self.acts[:n], self.indices[:n], self.row_ptr, self.d_sae, self.k)

    def l0(self) -> Int[Tensor, " batch"]:
        """Non-zero entries per row."""
        nonzero = self.acts.detach() != 0
        if nonzero.device.type == "cpu" and bool(nonzero.all()):
            return self.row_counts()  # the usual case, without 16 bytes for each entry
        active = nonzero.to(torch.int64)
        if self.k is not None:
            return active.reshape(self.n_rows, -1).sum(1)
        return _zeros(self.n_rows, active).index_add_(0, self.row_ids(), active)

    def topk_view(self) -> TopKView:
        """The (batch, k) tensors, without a copy.

        Raises:
            ShapeError: the rows hold different numbers of entries.
        """
        if self.k is None:
            raise ShapeError(
                "a (batch, k) view needs the same number of entries in every row",
                "rows of different lengths",
                "Use acts, indices and row_ptr, or padded().",
            )
        return TopKView(self.acts.view(-1, self.k), self.indices.view(-1, self.k))

    def padded(self) -> TopKView:
        """(batch, longest row) tensors; what is missing has activation 0 and index 0."""
        if self.k is not None:
            return self.topk_view()
        if self.overflow is not None:
            return self.compact().padded()
        counts = self.row_counts()
        width = int(counts.max()) if self.n_rows else 0
        rows = self.row_ids()
        columns = torch.arange(self.acts.shape[0], device=rows.device) - self.row_ptr[:-1][rows]
        acts = self.acts.new_zeros(self.n_rows, width).index_put((rows, columns), self.acts)
        indices = self.indices.new_zeros(self.n_rows, width)
        indices[rows, columns] = self.indices
        return TopKView(acts, indices)

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        """A dense matrix; duplicates add. Only for tests and small batches: it holds batch x d_sae."""
        dense = self.acts.new_zeros(self.n_rows, self.d_sae)
        return dense.index_put((self.row_ids(), self.indices.long()), self.acts, accumulate=True)

    def columns(self, latents: Sequence[int]) -> Float[Tensor, "batch n"]:
        """The activations of a few latents, dense; duplicates add."""
        slots = torch.full((self.d_sae,), -1, dtype=torch.long, device=self.indices.device)
        slots[list(latents)] = torch.arange(len(latents), device=slots.device)
        slot = slots[self.indices.long()]
        wanted = slot >= 0
        dense = self.acts.new_zeros(self.n_rows, len(latents))
        return dense.index_put((self.row_ids()[wanted], slot[wanted]), self.acts[wanted], accumulate=True)

    def slice_rows(self, start: int, stop: int) -> Encoded:
        """Rows start to stop; waits for the device to learn where they lie."""
        first, last = int(self.row_ptr[start]), int(self.row_ptr[stop])
        row_ptr = self.row_ptr[start : stop + 1] - first
        mask = None if self.mask is None else self.mask[first:last]
        part = self.acts[first:last], self.indices[first:last]
        return Encoded(*part, row_ptr, self.d_sae, self.k, mask=mask)

    def select_rows(self, keep: Bool[Tensor, " batch"]) -> Encoded:
        """Only the rows where `keep` is true."""
        if self.overflow is not None or self.mask is not None:
            return self.compact().select_rows(keep)
        counts = self.row_counts()
        entries = torch.repeat_interleave(keep, counts)
        row_ptr = torch.cat([_zeros(1, counts), counts[keep].cumsum(0)])
        return Encoded(self.acts[entries], self.indices[entries], row_ptr, self.d_sae, self.k)

    def select_latents(self, keep: Bool[Tensor, " d_sae"]) -> Encoded:
        """Only the entries of latents where `keep` is true; latent ids and rows stay, and so does a buffer's length."""
        if self.mask is not None:
            return self.compact().select_latents(keep)
        entries = keep[self.indices.long()]
        if self.overflow is not None:
            return self._moved_up(entries)
        counts = _zeros(self.n_rows, self.row_ptr).index_add_(0, self.row_ids(), entries.to(torch.int64))
        row_ptr = torch.cat([_zeros(1, counts), counts.cumsum(0)])
        return Encoded(self.acts[entries], self.indices[entries], row_ptr, self.d_sae)

    def _moved_up(self, entries: Bool[Tensor, " nnz"]) -> Encoded:
        """Only some entries of a buffer, in their order; never waits for the device."""
        entries = entries & self.stored()
        order = torch.sort((~entries).to(torch.int8), stable=True).indices
        kept = entries[order]
        counted = torch.cat([_zeros(1, self.row_ptr), entries.cumsum(0)])
        return Encoded(
            torch.where(kept, self.acts.gather(0, order), 0.0),
            torch.where(kept, self.indices[order], 0),
            counted[self.row_ptr],
            self.d_sae,
            None,
            self.overflow,
        )

    def with_acts(self, acts: Float[Tensor, " nnz"]) -> Encoded:
        """The same pattern with other activations."""
        return Encoded(acts, self.indices, self.row_ptr, self.d_sae, self.k, self.overflow, self.mask)

    def detach(self) -> Encoded:
        """Cut from the autograd graph."""
        return self.with_acts(self.acts.detach())

    def to(self, device: torch.device | str) -> Encoded:
        """On another device."""
        overflow = None if self.overflow is None else self.overflow.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        return Encoded(
            self.acts.to(device),
            self.indices.to(device),
            self.row_ptr.to(device),
            self.d_sae,
            self.k,
            overflow,
            mask,
        )

    def __repr__(self) -> str:
        return f"Encoded(n_rows={self.n_rows}, nnz={self.acts.shape[0]}, d_sae={self.d_sae}, k={self.k})"


@functools.lru_cache(maxsize=2)
def _every(n_rows: int, d_sae: int, device: torch.device) -> Int[Tensor, "n_rows d_sae"]:
    """All latents in each row; kept for the next rows, as many and of as many latents."""
    return torch.arange(d_sae, dtype=torch.int32, device=device).repeat(n_rows, 1)


def _zeros(n: int, like: Tensor) -> Int[Tensor, " n"]:
    return torch.zeros(n, dtype=torch.int64, device=like.device)
