"""What every source is, and what they share: columns of a shared stream, shuffled orders. Knows no store, no model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sememe.dictionaries.base import Batch, Site, Sites

__all__ = ["HELD_SALT", "MOST_HELD", "Buffers", "Columns", "Cursor", "HoldsOut", "Source", "permutation"]

MOST_HELD = 20
"""At most one row in so many is held out."""

HELD_SALT = 7_919
"""Of the choice of what is held out."""


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


@runtime_checkable
class Buffers(Protocol):
    """A source that will hold rows it does not hold yet."""

    @property
    def buffer_bytes(self) -> float:
        """Bytes of them, at most, while they are read."""
        ...


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


class Cursor:
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


def permutation(n: int, seed: int, *salt: int) -> Tensor:
    """A random order that depends on the seed and the salt only."""
    mixed = seed
    for value in salt:
        mixed = (mixed * 1_000_003 + value + 1) % (2**63 - 1)
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
