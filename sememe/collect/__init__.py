"""What a pass over a text leaves behind for each latent, in memory that does not grow with the text.

Knows numpy and numba, sparse activations and token rows; no model, no dictionary, no file. `interpret.py` feeds
it one batch after the other.

A batch arrives row by row and is turned latent by latent (a counting sort), so that each latent's entries are
handled by one thread in the order of the text: the result does not depend on the number of threads, nor on how
the rows were cut into batches. Random choices are hashes of (seed, latent, count), not a stream of numbers.

A document that was cut is several pieces with ids of their own; a window never leaves its piece, but of all pieces
together there is one example of a kind: `whole_ids` says which belong together.

Kept per latent, with n = n_top + n_reservoir slots of 36 bytes:

- count, sum and largest of its activations;
- a histogram of N_FINE equal bins from 0 to a power of two that is doubled (neighbours merged) when it is exceeded;
- the activation mass and count by token, in a table of N_TOKENS entries. When it is three quarters full the smaller
  half is dropped: a token's mass is then too small by at most `token_lost`, which is 0 for most latents;
- count and sum by position, in N_PLACES bands of the token row;
- the n_top largest activations, one per document, exactly;
- a uniform sample of n_reservoir activations (Vitter's algorithm R);
- n_random windows in which it is silent, one per document;
- for each slot, the latent's activations in the window around it, 6 bytes each, in a pool that is compacted.

So the bound is d_sae x (4 N_FINE + 16 N_TOKENS + 12 N_PLACES + 36 n + 22 n_random + 60) bytes, and for the pool twice
6 x (n slots x their mean number of activations per window, at most before + after + 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from sememe.collect import loops
from sememe.collect.loops import N_DECILES
from sememe.errors import ConfigError

__all__ = ["N_DECILES", "N_FINE", "N_PLACES", "N_TOKENS", "Collector", "Examples", "TopTokens"]

N_FINE = 1024
"""Bins of the histogram kept during the pass; at least half of them lie below the largest activation."""
N_TOKENS = 256
"""Entries of a latent's table of tokens; exact while no more than 3/4 of that many tokens were seen."""
N_PLACES = 16
"""Bands of the position in a token row, equally long, by which activations are counted and summed."""


class Examples(NamedTuple):
    """Kept examples, one row each, ordered by latent, kind (top, decile, random) and rank."""

    latent: np.ndarray
    kind: np.ndarray
    """0 top, 1 decile, 2 random."""
    decile: np.ndarray
    """0 to 9, or -1."""
    rank: np.ndarray
    row: np.ndarray
    """Which token row of the pass."""
    position: np.ndarray
    start: np.ndarray
    """The window within the row is [start, stop), clipped to the document."""
    stop: np.ndarray
    document: np.ndarray
    act: np.ndarray
    offsets: np.ndarray
    """Entry i's activations are positions[offsets[i]:offsets[i + 1]] and acts[...]."""
    positions: np.ndarray
    acts: np.ndarray


class TopTokens(NamedTuple):
    """(d_sae, n) each; -1 and 0 beyond a latent's last."""

    tokens: np.ndarray
    mass: np.ndarray
    """Sum of strengths on the token."""
    n_active: np.ndarray
    """On how many of its occurrences the latent is active."""


class Collector:
    """Statistics and examples of every latent, fed batch by batch.

    Args:
        d_sae: Number of latents.
        n_top: Largest activations kept, one per whole document.
        n_reservoir: Size of the uniform sample of activations.
        n_random: Silent windows kept.
        before: Window tokens before the peak.
        after: Window tokens after it.
        seed: Of the random choices.

    Activations may be signed: strength, by which everything is ranked and summed, is their absolute value.
    """

    _ARRAYS = (
        "n_active", "total", "largest", "hist", "exponents", "token_keys", "token_mass", "token_count", "token_used",
        "token_lost", "place_n", "place_mass", "place_tokens", "occurrences", "filled", "act", "row", "pos", "doc",
        "whole", "start", "stop", "off", "length", "n_silent", "silent_row", "silent_pos", "silent_doc", "silent_whole",
        "silent_start", "silent_stop",
    )  # fmt: skip

    def __init__(
        self,
        d_sae: int,
        *,
        n_top: int,
        n_reservoir: int,
        n_random: int,
        before: int,
        after: int,
        seed: int = 0,
    ) -> None:
        self.d_sae, self.n_top, self.n_reservoir, self.n_random = d_sae, n_top, n_reservoir, n_random
        self.before, self.after, self.seed = before, after, seed
        n_slots = n_top + n_reservoir
        self.n_rows = 0
        self.n_tokens = 0
        self.n_active = np.zeros(d_sae, np.int64)
        self.total = np.zeros(d_sae, np.float64)
        self.largest = np.zeros(d_sae, np.float32)
        self.hist = np.zeros((d_sae, N_FINE), np.uint32)
        self.exponents = np.full(d_sae, loops.NO_EXPONENT, np.int32)
        self.token_keys = np.full((d_sae, N_TOKENS), -1, np.int32)
        self.token_mass = np.zeros((d_sae, N_TOKENS), np.float64)
        self.token_count = np.zeros((d_sae, N_TOKENS), np.uint32)
        self.token_used = np.zeros(d_sae, np.int32)
        self.token_lost = np.zeros(d_sae, np.float64)
        self.place_n = np.zeros((d_sae, N_PLACES), np.uint32)
        self.place_mass = np.zeros((d_sae, N_PLACES), np.float64)
        self.place_tokens = np.zeros(N_PLACES, np.int64)
        self.occurrences = np.zeros(0, np.int64)
        self.filled = np.zeros(d_sae, np.int32)
        self.act = np.zeros((d_sae, n_slots), np.float32)
        self.row = np.full((d_sae, n_slots), -1, np.int32)
        self.pos = np.zeros((d_sae, n_slots), np.uint16)
        self.doc = np.full((d_sae, n_slots), -1, np.int32)
        self.whole = np.full((d_sae, n_slots), -1, np.int64)
        self.start = np.zeros((d_sae, n_slots), np.uint16)
        self.stop = np.zeros((d_sae, n_slots), np.uint16)
        self.off = np.zeros((d_sae, n_slots), np.int64)
        self.length = np.zeros((d_sae, n_slots), np.uint16)
        self.n_silent = np.zeros(d_sae, np.int64)
        self.silent_row = np.full((d_sae, n_random), -1, np.int32)
        self.silent_pos = np.zeros((d_sae, n_random), np.uint16)
        self.silent_doc = np.full((d_sae, n_random), -1, np.int32)
        self.silent_whole = np.full((d_sae, n_random), -1, np.int64)
        self.silent_start = np.zeros((d_sae, n_random), np.uint16)
        self.silent_stop = np.zeros((d_sae, n_random), np.uint16)
        self.pool_pos = np.zeros(0, np.uint16)
        self.pool_act = np.zeros(0, np.float32)
        self.pool_used = 0

    def add(
        self,
        indices: Int[np.ndarray, " nnz"],
        acts: Float32[np.ndarray, " nnz"],
        row_ptr: Int[np.ndarray, " n_kept_plus_1"],
        keep: Bool[np.ndarray, "rows ctx"],
        ids: Int32[np.ndarray, "rows ctx"],
        doc_ids: Int32[np.ndarray, "rows ctx"],
        whole_ids: Int64[np.ndarray, "rows ctx"] | None = None,
    ) -> None:
        """Take in a batch of token rows and the activations at its kept positions.

        Args:
            indices: Latent of each entry.
            acts: Activation of each entry; finite.
            row_ptr: Where each kept position's entries start: one row per True of `keep`, in order.
            keep: Which positions were encoded.
            ids: Token ids.
            doc_ids: Document of each token.
            whole_ids: The same for all pieces of one document, if documents may be pieces.
        """
        n_rows, ctx = ids.shape
        if ctx > np.iinfo(np.uint16).max:
            raise ConfigError("context_length must be <= 65535", ctx, "Use shorter contexts.")
        kept = np.flatnonzero(keep).astype(np.int32)
        assert row_ptr.shape[0] == kept.shape[0] + 1, "one encoded row per kept position"
        kept_ptr = np.searchsorted(kept, np.arange(n_rows + 1) * ctx)
        flat_ids, docs = np.ascontiguousarray(ids).ravel(), np.ascontiguousarray(doc_ids).ravel()
        wholes = np.ascontiguousarray(doc_ids if whole_ids is None else whole_ids, np.int64).ravel()
        first, last = np.empty(docs.shape, np.int32), np.empty(docs.shape, np.int32)
        loops.runs(docs, ctx, first, last)
        ptr, stops, where, value = loops.by_latent(indices, acts, row_ptr, kept, self.d_sae)
        need = np.zeros(self.d_sae, np.int64)
        loops.absorb(
            ptr, stops, where, value, flat_ids, docs, wholes, first, last, ctx, self.n_rows, self.before, self.after,
            self.seed, self.n_top, self.n_active, self.total, self.largest, self.hist, self.exponents,
            self.token_keys, self.token_mass, self.token_count, self.token_used, self.token_lost, self.place_n,
            self.place_mass, self.filled, self.act, self.row, self.pos, self.doc, self.whole, self.start, self.stop,
            self.off, self.length, need,
        )  # fmt: skip
        offsets = np.concatenate(([0], np.cumsum(need)))
        self._make_room(int(offsets[-1]))
        offsets += self.pool_used
        loops.store(
            ptr, stops, where, value, first, last, ctx, self.before, self.after, offsets, self.off,
            self.pool_pos, self.pool_act,
        )  # fmt: skip
        self.pool_used = int(offsets[-1])
        if self.n_random:
            loops.silent(
                ptr, stops, where, docs, wholes, first, last, ctx, self.n_rows, self.before, self.after,
                self.seed + 1, kept, kept_ptr, self.n_silent, self.silent_row, self.silent_pos, self.silent_doc,
                self.silent_whole, self.silent_start, self.silent_stop,
            )  # fmt: skip
        self.place_tokens += np.bincount(kept % ctx * N_PLACES // ctx, minlength=N_PLACES)
        seen = np.bincount(flat_ids[kept], minlength=self.occurrences.shape[0])
        seen[: self.occurrences.shape[0]] += self.occurrences
        self.occurrences = seen
        self.n_rows += n_rows
        self.n_tokens += kept.shape[0]

    def _make_room(self, need: int) -> None:
        """Room for `need` more entries at the end of the pool; at most twice what is referred to."""
        if self.pool_used + need <= self.pool_act.shape[0]:
            return
        live = int(np.where(self.off >= 0, self.length, 0).sum(dtype=np.int64))
        size = max(2 * (live + need), 4096)
        pos, act = np.zeros(size, np.uint16), np.zeros(size, np.float32)
        self.pool_used = loops.compact(self.off, self.length, self.pool_pos, self.pool_act, pos, act)
        self.pool_pos, self.pool_act = pos, act

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""
        arrays = [getattr(self, name) for name in self._ARRAYS]
        return sum(a.nbytes for a in (*arrays, self.pool_pos, self.pool_act))

    def state(self) -> dict[str, Any]:
        """Everything, as arrays, to be saved; `restore` takes it back. The arrays are shared, not copied."""
        out: dict[str, Any] = {name: getattr(self, name) for name in self._ARRAYS}
        out["pool_pos"] = self.pool_pos[: self.pool_used]
        out["pool_act"] = self.pool_act[: self.pool_used]
        out["counts"] = np.array([self.n_rows, self.n_tokens], np.int64)
        return out

    def restore(self, state: Any) -> None:
        """Take back what `state` gave, into a collector made with the same arguments."""
        for name in self._ARRAYS:
            mine, saved = getattr(self, name), state[name]
            grows = name == "occurrences"  # as long as the largest token id seen
            assert (grows or mine.shape == saved.shape) and mine.dtype == saved.dtype, name
            setattr(self, name, np.ascontiguousarray(saved))
        self.pool_pos, self.pool_act = np.array(state["pool_pos"]), np.array(state["pool_act"])
        self.pool_used = self.pool_act.shape[0]
        self.n_rows, self.n_tokens = (int(n) for n in state["counts"])

    def mean(self) -> np.ndarray:
        """Mean strength over each latent's active tokens; 0 where it never was active."""
        return np.divide(self.total, self.n_active, out=np.zeros(self.d_sae), where=self.n_active > 0)

    def histogram(self, n_bins: int) -> np.ndarray:
        """Counts in n_bins equal bins between 0 and each latent's largest activation: (d_sae, n_bins) int64.

        A value is counted in a neighbouring bin only if it is within largest / N_FINE of their common edge;
        the counts always add up to `n_active`.
        """
        out = np.zeros((self.d_sae, n_bins), np.int64)
        loops.coarsen(self.hist, self.exponents, self.largest, out)
        return out

    def top_tokens(self, n: int) -> TopTokens:
        """The n tokens that hold most of each latent's mass; ties go to the lower token.

        Each mass is a lower bound, short by at most `token_lost` of the latent; so is each count.
        """
        keys = self.token_keys.astype(np.int64)
        order = np.lexsort((np.where(keys < 0, np.iinfo(np.int64).max, keys), -self.token_mass), axis=1)[
            :, :n
        ]
        arrays = (self.token_keys, self.token_mass, self.token_count)
        return TopTokens(*(np.take_along_axis(array, order, axis=1) for array in arrays))

    def by_place(self) -> tuple[np.ndarray, np.ndarray]:
        """Density and mean strength (silent tokens counted as 0) in each band of positions: (d_sae, N_PLACES) each.

        NaN for a band without a kept token.
        """
        with np.errstate(invalid="ignore"):
            return self.place_n / self.place_tokens, self.place_mass / self.place_tokens

    def examples(self, n_decile: int) -> Examples:
        """The examples to keep: all top ones, up to n_decile from each decile, and the silent windows.

        A latent that never was active has none.

        Deciles are those of the reservoir: the whole set of activations while there are at most n_reservoir.
        """
        decile = np.full((self.d_sae, self.n_reservoir), -1, np.int8)
        if n_decile and self.n_reservoir:
            loops.deciles(
                self.act,
                self.row,
                self.pos,
                self.whole,
                self.n_top,
                self.n_active,
                n_decile,
                self.seed + 2,
                decile,
            )
        slots = np.arange(self.n_top + self.n_reservoir)
        is_top = slots[None, : self.n_top] < self.filled[:, None]
        shown = np.concatenate((is_top, decile >= 0), axis=1)
        latent, slot = np.nonzero(shown)
        kind = (slot >= self.n_top).astype(np.int8)
        decile_of = np.concatenate((np.full((self.d_sae, self.n_top), -1, np.int8), decile), axis=1)[
            latent, slot
        ]
        row, position = self.row[latent, slot], self.pos[latent, slot].astype(np.int32)
        act = self.act[latent, slot]
        order = np.lexsort((position, row, -np.abs(act), -decile_of, kind, latent))
        latent, slot, kind, decile_of = latent[order], slot[order], kind[order], decile_of[order]
        length = self.length[latent, slot].astype(np.int64)
        offsets = np.concatenate(([0], np.cumsum(length)))
        positions, acts = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
        loops.gather(self.off[latent, slot], length, self.pool_pos, self.pool_act, offsets, positions, acts)

        quiet = (np.arange(self.n_random)[None, :] < self.n_silent[:, None]) & (self.n_active > 0)[:, None]
        q_latent, q_slot = np.nonzero(quiet)
        n_quiet = q_latent.shape[0]
        latent_all = np.concatenate((latent, q_latent))
        kind_all = np.concatenate((kind, np.full(n_quiet, 2, np.int8)))
        back = np.lexsort((np.arange(latent_all.shape[0]), kind_all, latent_all))

        def both(fired: np.ndarray, silent: np.ndarray) -> np.ndarray:
            return np.concatenate((fired, silent))[back]

        lengths = both(length, np.zeros(n_quiet, np.int64))
        latent_all, kind_all = latent_all[back], kind_all[back]
        decile_all = both(decile_of, np.full(n_quiet, -1, np.int8))
        return Examples(
            latent=latent_all.astype(np.int32),
            kind=kind_all,
            decile=decile_all,
            rank=_rank_within(latent_all, kind_all, decile_all),
            row=both(row[order], self.silent_row[q_latent, q_slot]),
            position=both(position[order], self.silent_pos[q_latent, q_slot].astype(np.int32)),
            start=both(self.start[latent, slot], self.silent_start[q_latent, q_slot]).astype(np.int32),
            stop=both(self.stop[latent, slot], self.silent_stop[q_latent, q_slot]).astype(np.int32),
            document=both(self.doc[latent, slot], self.silent_doc[q_latent, q_slot]),
            act=both(act[order], np.zeros(n_quiet, np.float32)),
            offsets=np.concatenate(([0], np.cumsum(lengths))),
            positions=positions,  # the silent ones add nothing, so the order of these is already right
            acts=acts,
        )


def _rank_within(latent: np.ndarray, kind: np.ndarray, decile: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal (latent, kind, decile)."""
    n = latent.shape[0]
    new = np.ones(n, bool)
    new[1:] = (latent[1:] != latent[:-1]) | (kind[1:] != kind[:-1]) | (decile[1:] != decile[:-1])
    starts = np.flatnonzero(new)
    return (np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))).astype(np.int32)
