"""A source that reads a store, shard group by shard group. Knows no model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sememe.dictionaries.base import Batch, Site, Sites
from sememe.errors import HookpointError
from sememe.join import JoinedStore
from sememe.needs import store_buffer
from sememe.source.base import MOST_HELD, Cursor, permutation
from sememe.store import Store, hold_out

__all__ = ["StoreSource"]


class StoreSource:
    """Batches from a store. Shards are grouped at random, and rows shuffled over each group in memory.

    Args:
        store: The store, or several joined.
        inputs: Hookpoints whose concatenation is x; the store's only one if not given.
        outputs: Hookpoints whose concatenation is the target; the inputs if not given.
        seed: Of the order.
        group_mb: Memory for one group of shards: the larger, the better the shuffle.
    """

    def __init__(
        self,
        store: Store | JoinedStore,
        inputs: tuple[str, ...] | None = None,
        outputs: tuple[str, ...] | None = None,
        seed: int = 0,
        group_mb: int = 1024,
    ) -> None:
        known = tuple(store.info.hookpoints)
        if inputs is None:
            if len({store.origin(name)[1] for name in known}) > 1:
                raise HookpointError(
                    "a hookpoint must be chosen when the store holds several",
                    ", ".join(known),
                    "Pass --inputs with one or more of them.",
                )
            inputs = known
        inputs = store.expand(inputs)
        outputs = inputs if outputs is None else store.expand(outputs)
        self.store, self.inputs, self.outputs, self.seed = store, inputs, outputs, seed
        self.sites = Sites(inputs=self._make_sites(self.inputs), outputs=self._make_sites(self.outputs))
        self.d_in, self.d_out = self.sites.inputs[-1].stop, self.sites.outputs[-1].stop
        self.n_rows = store.info.n_rows
        self._names = tuple(dict.fromkeys((*self.inputs, *self.outputs)))
        width = sum(store.info.hookpoints[name].width for name in self._names)
        shard_bytes = 2 * width * max(store.info.shard_rows)
        self.group_shards = max(1, group_mb * 2**20 // shard_bytes)
        n_groups = -(-len(store.info.shards) // self.group_shards)
        self._cursor = Cursor(seed, n_groups)
        self._held: Int[Tensor, " documents"] | None = None
        self._shard_rows = store.info.shard_rows
        self._loaded: tuple[tuple[int, int], dict[str, Tensor], Tensor] | None = None

    def _make_sites(self, names: tuple[str, ...]) -> tuple[Site, ...]:
        sites, start = [], 0
        for name in names:
            point = self.store.info.hookpoints[name]
            info, hookpoint = self.store.origin(name)
            sites.append(
                Site(
                    model=info.model,
                    model_fingerprint=info.model_fingerprint,
                    hookpoint=hookpoint,
                    start=start,
                    stop=start + point.width,
                    max_norm=point.max_norm,
                )
            )
            start += point.width
        return tuple(sites)

    @property
    def buffer_bytes(self) -> float:
        """A group of shards, and the one that is being read."""
        width = sum(self.store.info.hookpoints[name].width for name in self._names)
        return store_buffer(2.0 * width * self.n_rows, 2.0 * width * max(self._shard_rows))

    def hold_out(self, n: int) -> Batch:
        """Rows of whole documents; all their rows leave the stream, at most a tenth of it."""
        held = hold_out(self.store, self._names, min(n, self.n_rows // MOST_HELD), self.seed)
        self._held, self._shard_rows = held.documents, held.shard_rows
        self.n_rows = sum(self._shard_rows)
        return self._rows(held.activations, torch.arange(next(iter(held.activations.values())).shape[0]))

    def _group(self, epoch: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
        """The rows of a group and the order in which they are drawn."""
        if self._loaded is None or self._loaded[0] != (epoch, group):
            self._loaded = None  # the old group goes before the new one comes
            order = permutation(len(self.store.info.shards), self.seed, epoch)
            picked = order[group * self.group_shards : (group + 1) * self.group_shards].tolist()
            total = sum(self._shard_rows[index] for index in picked)
            rows = {
                name: torch.empty(total, self.store.info.hookpoints[name].width, dtype=torch.bfloat16)
                for name in self._names
            }
            start = 0
            for index in picked:
                shard = self.store.read(index, self._names)
                stop = start + self._shard_rows[index]
                keep = None if self._held is None else ~torch.isin(shard.doc_ids, self._held)
                for name, values in shard.activations.items():
                    rows[name][start:stop] = values if keep is None else values[keep]
                start = stop
            self._loaded = ((epoch, group), rows, permutation(total, self.seed, epoch, group))
        return self._loaded[1], self._loaded[2]

    def next_batch(self, n: int) -> Batch:
        """The next n rows; a group or a pass may end within a batch."""
        parts = []
        while n > 0:
            rows, order = self._group(self._cursor.epoch, self._cursor.group)
            take = order[self._cursor.offset : self._cursor.offset + n]
            parts.append(self._rows(rows, take))
            n -= len(take)
            self._cursor.advance(len(take), len(order))
        if len(parts) == 1:
            return parts[0]
        x = torch.cat([part.x for part in parts])
        same = self.inputs == self.outputs
        return Batch(x, x if same else torch.cat([part.target for part in parts]))

    def _rows(self, rows: dict[str, Tensor], take: Tensor) -> Batch:
        def join(names: tuple[str, ...]) -> Tensor:
            return torch.cat([rows[name].index_select(0, take) for name in names], dim=1).float()

        x = join(self.inputs)
        return Batch(x, x if self.inputs == self.outputs else join(self.outputs))

    def sample(self, n: int) -> Batch:
        """The first rows of the first group."""
        rows, order = self._group(0, 0)
        return self._rows(rows, order[:n])

    def state_dict(self) -> dict[str, Any]:
        """Pass, group and offset."""
        return self._cursor.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._cursor.load(state)
