"""A stream of activations for training: from a store, from a language model as it runs, or from any tensor.

Knows how to shuffle and to resume; knows no dictionary and no optimiser. Every source gives the same `Batch`es
in raw units, and a state from which it goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.capture import Rows, captured_rows, first_norms
from sememe.dictionaries.base import Batch, Site, Sites
from sememe.errors import ConfigError, HookpointError, ShapeError, TextError
from sememe.join import JoinedStore
from sememe.store import Store, hold_out
from sememe.text import Split, TextConfig, TokenPolicy, token_blocks

if TYPE_CHECKING:
    from sememe.lm import LanguageModel

__all__ = ["Batch", "Columns", "HoldsOut", "LiveSource", "Source", "StoreSource", "TensorSource", "upcoming"]

MOST_HELD = 20
"""At most one row in so many is held out."""
_HELD = 7_919  # salts the choice of what is held out


@runtime_checkable
class Source(Protocol):
    """What the trainer needs of its data."""

    @property
    def d_in(self) -> int:
        """Features of x."""
        ...

    @property
    def d_out(self) -> int:
        """Features of the target."""
        ...

    @property
    def sites(self) -> Sites | None:
        """Where in which model the rows come from; None if from none."""
        ...

    @property
    def n_rows(self) -> int | None:
        """Rows in one pass; None if the stream has no end."""
        ...

    def next_batch(self, n: int) -> Batch:
        """The next n rows; fewer only where the stream ends."""
        ...

    def sample(self, n: int) -> Batch:
        """Up to n rows for initialisation and scaling, always the same; does not move the stream."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@runtime_checkable
class HoldsOut(Protocol):
    """A source that can set rows aside."""

    def hold_out(self, n: int) -> Batch:
        """About n rows that the stream never gives from now on, always the same for the same seed.

        Called before anything else. At most one row in twenty is held out, whole documents where the source
        knows them.
        """
        ...


def upcoming(source: Source, n: int) -> Batch:
    """Up to n of the rows that come next; the stream stays where it is."""
    if isinstance(source, LiveSource):
        return source.sample(n)  # its state is its buffer: too large to be taken and put back
    state = source.state_dict()
    batch = source.next_batch(n)
    source.load_state_dict(state)
    return batch


class Columns:
    """One dictionary's part of a stream that several share: which features of its rows are x and target.

    Args:
        shared: Where the stream's x comes from, site by site.
        inputs: Hookpoints whose concatenation is the dictionary's x, all of them in the stream.
        outputs: Hookpoints whose concatenation is its target; the inputs if not given.
    """

    def __init__(
        self, shared: Sites, inputs: tuple[str, ...], outputs: tuple[str, ...] | None = None
    ) -> None:
        self.spans = {site.hookpoint: slice(site.start, site.stop) for site in shared.inputs}
        self.inputs, self.outputs = inputs, outputs or inputs
        by_name = {site.hookpoint: site for site in shared.inputs}
        self.sites = Sites(
            inputs=_moved([by_name[name] for name in self.inputs]),
            outputs=_moved([by_name[name] for name in self.outputs]),
        )
        self.d_in, self.d_out = self.sites.inputs[-1].stop, self.sites.outputs[-1].stop

    def of(self, batch: Batch) -> Batch:
        """The dictionary's rows of a shared batch."""
        x = self._join(batch.x, self.inputs)
        return Batch(x, x if self.inputs == self.outputs else self._join(batch.x, self.outputs))

    def _join(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        return torch.cat([x[:, self.spans[name]] for name in names], dim=1)


def _moved(sites: list[Site]) -> tuple[Site, ...]:
    """Sites one after the other along a feature axis of their own."""
    moved, start = [], 0
    for site in sites:
        stop = start + site.stop - site.start
        moved.append(site.replace(start=start, stop=stop))
        start = stop
    return tuple(moved)


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
        self._cursor = _Cursor(seed, 1)
        self._order: tuple[int, Tensor] | None = None
        self._kept: Int[Tensor, " n_rows"] | None = None

    def hold_out(self, n: int) -> Batch:
        """Rows at random."""
        order = _permutation(self.n_rows, self.seed, _HELD)
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
                    _permutation(self.n_rows, self.seed, self._cursor.epoch, 0),
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
        return self._rows(_permutation(self.n_rows, self.seed, 0, 0)[:n])

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


class _Cursor:
    """Where a shuffled stream stands: pass, group within the pass, row within the group."""

    def __init__(self, seed: int, n_groups: int) -> None:
        self.seed, self.n_groups = seed, n_groups
        self.epoch = self.group = self.offset = 0

    def advance(self, n: int, group_rows: int) -> None:
        self.offset += n
        if self.offset >= group_rows:
            self.offset, self.group = 0, self.group + 1
        if self.group >= self.n_groups:
            self.group, self.epoch = 0, self.epoch + 1

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "group": self.group, "offset": self.offset}

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self.group, self.offset = state["epoch"], state["group"], state["offset"]


def _permutation(n: int, seed: int, *salt: int) -> Tensor:
    """A random order that depends on the seed and the salt only."""
    mixed = seed
    for value in salt:
        mixed = (mixed * 1_000_003 + value + 1) % (2**63 - 1)
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


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
        self._cursor = _Cursor(seed, n_groups)
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
            order = _permutation(len(self.store.info.shards), self.seed, epoch)
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
            self._loaded = ((epoch, group), rows, _permutation(total, self.seed, epoch, group))
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


class LiveSource:
    """Batches straight from a language model, through a shuffle buffer that is refilled when half empty.

    The buffer is allocated once. Its unread rows, the random state and the number of forwards are the state; on
    resume the text is read again up to that forward (tokenising only).

    Args:
        lm: The language model.
        text: The corpus.
        policy: Which positions are kept.
        inputs: Hookpoints whose concatenation is x.
        outputs: Hookpoints whose concatenation is the target; the inputs if not given.
        seed: Of the order.
        buffer_mb: Memory of the buffer (bfloat16).
        batch_rows: Contexts per forward.
        split: Which documents.
        max_norms: Largest norm kept, per hookpoint; measured on the first contexts if not given.
    """

    def __init__(
        self,
        lm: LanguageModel,
        text: TextConfig,
        policy: TokenPolicy,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...] | None = None,
        *,
        seed: int = 0,
        buffer_mb: int = 512,
        batch_rows: int = 16,
        split: Split = "train",
        max_norms: dict[str, float | None] | None = None,
    ) -> None:
        self.lm, self.text, self.policy, self.split = lm, text, policy, split
        self.inputs, self.outputs = lm.expand(inputs), lm.expand(outputs or inputs)
        self.batch_rows, self.n_rows = batch_rows, None
        self.names = tuple(dict.fromkeys((*self.inputs, *self.outputs)))
        self.widths = {name: lm.width(name) for name in self.names}
        self.capacity = buffer_mb * 2**20 // (2 * sum(self.widths.values()))
        if self.capacity < 2 * batch_rows * policy.context_length:
            raise ConfigError(
                f"buffer_mb must hold at least two forwards ({2 * batch_rows * policy.context_length} rows)",
                f"{buffer_mb} MB ({self.capacity} rows)",
                "Raise buffer_mb or lower batch_rows.",
            )
        self._buffer = {
            name: torch.empty(self.capacity, width, dtype=torch.bfloat16)
            for name, width in self.widths.items()
        }
        self._n_left = 0  # rows [0, n_left) of the buffer are unread, in random order
        self._generator = torch.Generator().manual_seed(seed)
        self._n_forwards = 0  # in this pass over the text
        self._forwards: Iterator[Rows] | None = None
        self.max_norms = max_norms if max_norms is not None else self._measure_norms()
        self.sites = Sites(inputs=self._make_sites(self.inputs), outputs=self._make_sites(self.outputs))
        self.d_in, self.d_out = self.sites.inputs[-1].stop, self.sites.outputs[-1].stop

    def _make_sites(self, names: tuple[str, ...]) -> tuple[Site, ...]:
        sites, start = [], 0
        for name in names:
            stop = start + self.widths[name]
            sites.append(
                Site(
                    model=self.lm.name,
                    model_fingerprint=self.lm.fingerprint,
                    hookpoint=name,
                    start=start,
                    stop=stop,
                    max_norm=self.max_norms[name],
                )
            )
            start = stop
        return tuple(sites)

    def _measure_norms(self) -> dict[str, float | None]:
        medians = first_norms(self.lm, self.text, self.policy, self.names, self.batch_rows, self.split)
        ratio = self.policy.max_norm_ratio
        return {name: None if ratio is None else ratio * median for name, median in medians.items()}

    def hold_out(self, n: int) -> Batch:
        """The first rows of the documents that are held out of the stream's split.

        Raises:
            ConfigError: none are.
        """
        if self.split != "train" or self.text.heldout_fraction == 0:
            raise ConfigError(
                "heldout_fraction must be > 0, and the split train, for rows to be held out",
                f"{self.text.heldout_fraction:g} and {self.split}",
                "Raise heldout_fraction, or watch no rows (--watch-rows 0).",
            )
        n_tokens = n + self.batch_rows * self.policy.context_length
        blocks = token_blocks(self.text, self.lm.tokenizer, self.policy, split="heldout", n_tokens=n_tokens)
        found = captured_rows(self.lm, blocks, self.names, self.batch_rows, self.max_norms)
        parts = [rows.activations for rows in found]
        if not parts:
            raise TextError("the held-out text must hold at least one context", "none", "Give more text.")
        rows = {name: torch.cat([part[name] for part in parts])[:n] for name in self.names}
        x, target = (
            torch.cat([rows[name] for name in names], 1).float() for names in (self.inputs, self.outputs)
        )
        return Batch(x, x if self.inputs == self.outputs else target)

    def _next_forward(self) -> dict[str, Tensor]:
        """Kept rows of the next forward; the text starts over when it ends."""
        while True:
            if self._forwards is None:
                blocks = token_blocks(
                    self.text, self.lm.tokenizer, self.policy, split=self.split, n_tokens=None
                )
                self._forwards = captured_rows(
                    self.lm, blocks, self.names, self.batch_rows, self.max_norms, skip=self._n_forwards
                )
            rows = next(self._forwards, None)
            if rows is not None:
                self._n_forwards += 1
                return rows.activations
            if self._n_forwards == 0:
                raise TextError("the text must hold at least one context", "none", "Give more text.")
            self._n_forwards, self._forwards = 0, None

    def _refill(self) -> None:
        while self.capacity - self._n_left >= self.batch_rows * self.policy.context_length:
            rows = self._next_forward()
            n = next(iter(rows.values())).shape[0]
            for name, values in rows.items():
                self._buffer[name][self._n_left : self._n_left + n] = values
            self._n_left += n
        order = torch.randperm(self._n_left, generator=self._generator)
        for values in self._buffer.values():
            values[: self._n_left] = values[: self._n_left][order]

    def next_batch(self, n: int) -> Batch:
        """The next n rows from the end of the buffer."""
        if n > self.capacity // 2:
            raise ConfigError(
                f"batch_size must be <= half the buffer ({self.capacity // 2} rows)", n, "Raise buffer_mb."
            )
        if self._n_left - n < self.capacity // 2:
            self._refill()
        batch = self._rows(slice(self._n_left - n, self._n_left))
        self._n_left -= n
        return batch

    def _rows(self, take: slice) -> Batch:
        def join(names: tuple[str, ...]) -> Tensor:
            return torch.cat([self._buffer[name][take] for name in names], dim=1).float()

        x = join(self.inputs)
        return Batch(x, x if self.inputs == self.outputs else join(self.outputs))

    def sample(self, n: int) -> Batch:
        """The rows that come next, as many as the buffer holds; it is filled only where it is empty."""
        if self._n_left == 0:
            self._refill()
        return self._rows(slice(max(0, self._n_left - n), self._n_left))

    def state_dict(self) -> dict[str, Any]:
        """The buffer's unread rows, the random state, and how much text was read."""
        state: dict[str, Any] = {f"buffer.{n}": v[: self._n_left].clone() for n, v in self._buffer.items()}
        return state | {
            "n_left": self._n_left,
            "n_forwards": self._n_forwards,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._n_left, self._n_forwards = state["n_left"], state["n_forwards"]
        self._generator.set_state(state["generator"])
        for name, values in self._buffer.items():
            values[: self._n_left] = state[f"buffer.{name}"]
        self._forwards = None
