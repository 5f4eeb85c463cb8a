"""Stores of several models over the same text, joined row by row: what a crosscoder of two models reads.

Knows stores; knows no dictionary and no language model. A joined store is read like a store. Its hookpoints are
named `resid_post.8@0` (of the first store), `resid_post.8@1` (of the second), and `resid_post.8` stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sememe.errors import ConfigError, HookpointError, MismatchError, nearest
from sememe.store import HookpointInfo, Shard, Store, StoreInfo, open_store

__all__ = ["JoinedStore", "open_stores"]


class _Place(NamedTuple):
    """Where a joined hookpoint is."""

    store: int
    hookpoint: str


class JoinedStore:
    """Two or more stores as one whose rows hold the activations of every model at the same token.

    Rows are matched by document and position. A row that one model's harvest left out for its norm is left out.

    Args:
        stores: Harvested with the same text, tokenizer, policy and shard size.

    Raises:
        MismatchError: they were not: another text or policy, other tokens, or rows that are missing without a norm
            to explain it.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = tuple(stores)
        self._check_alike()
        self._rows = [self._match(index) for index in range(len(self.stores[0].info.shards))]
        self._check_missing()
        self._places = {
            f"{name}@{number}": _Place(number, name)
            for number, store in enumerate(self.stores)
            for name in store.info.hookpoints
        }
        first = self.stores[0].info
        shard_rows = tuple(int(rows[0].shape[0]) for rows in self._rows)
        self.info = StoreInfo.build(
            first.resolved()
            | {
                "model": " + ".join(store.info.model for store in self.stores),
                "model_fingerprint": " + ".join(store.info.model_fingerprint for store in self.stores),
                "hookpoints": {name: self._about(name).resolved() for name in self._places},
                "n_rows": sum(shard_rows),
                "n_norm_outliers": first.n_rows + first.n_norm_outliers - sum(shard_rows),
                "shard_rows": shard_rows,
            }
        )

    @property
    def name(self) -> str:
        """Where they are, for errors."""
        return " + ".join(store.name for store in self.stores)

    @property
    def parents(self) -> dict[str, str]:
        """The fingerprint of each store."""
        return {f"store.{number}": store.fingerprint for number, store in enumerate(self.stores)}

    @property
    def separation(self) -> dict[str, Any] | None:
        """Which documents they hold: those of the first, whose text is everyone's."""
        return self.stores[0].separation

    def _about(self, name: str) -> HookpointInfo:
        place = self._places[name]
        return self.stores[place.store].info.hookpoints[place.hookpoint]

    def expand(self, names: Iterable[str]) -> tuple[str, ...]:
        """Full names: one without a store's number stands for that hookpoint of every store that holds it.

        Raises:
            HookpointError: no store holds one of them.
        """
        out: list[str] = []
        for name in names:
            found = [full for full, place in self._places.items() if name in (full, place.hookpoint)]
            if not found:
                raise HookpointError(
                    "a hookpoint must be in one of the joined stores", repr(name), nearest(name, self._places)
                )
            out += found
        return tuple(dict.fromkeys(out))

    def origin(self, name: str) -> tuple[StoreInfo, str]:
        """What is known about the store that a full name belongs to, and the hookpoint's name there."""
        place = self._places[name]
        return self.stores[place.store].info, place.hookpoint

    def read(self, index: int, hookpoints: Iterable[str]) -> Shard:
        """One shard: the rows that every store holds, in the first store's order.

        Raises:
            CorruptError: a file is truncated or was changed.
            ActivationError: a row is NaN or infinite.
        """
        names = tuple(hookpoints)
        rows = self._rows[index]
        activations: dict[str, Tensor] = {}
        for number, store in enumerate(self.stores):
            wanted = [name for name in names if self._places[name].store == number]
            if wanted:
                shard = store.read(index, [self._places[name].hookpoint for name in wanted])
                for name in wanted:
                    values = shard.activations[self._places[name].hookpoint]
                    activations[name] = values.index_select(0, rows[number])
        return Shard(activations, *self.columns(index))

    def columns(self, index: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Token ids, document ids and positions of a shard's joined rows."""
        tokens, documents, positions = (
            column.index_select(0, self._rows[index][0]) for column in self.stores[0].columns(index)
        )
        return tokens, documents, positions

    def documents(self) -> list[dict[str, Any]]:
        """The table of documents, the same in all stores."""
        return self.stores[0].documents()

    # -- matching ----------------------------------------------------------------------------------

    def _check_alike(self) -> None:
        if len(self.stores) < 2:
            raise ConfigError("a join needs at least two stores", len(self.stores), "Name another store.")
        first = self.stores[0]
        for other in self.stores[1:]:
            for what, ours, theirs in (
                ("text", first.info.text_fingerprint[:16], other.info.text_fingerprint[:16]),
                ("token policy", _differing(first, other), _differing(other, first)),
                ("number of shards", len(first.info.shards), len(other.info.shards)),
            ):
                if ours != theirs:
                    raise MismatchError(
                        f"stores that are joined must have one {what}, that of {first.artifact.path} ({ours})",
                        f"{theirs} in {other.artifact.path}",
                        "Harvest both models with the same text, policy, tokens and shard size.",
                    )

    def _match(self, index: int) -> tuple[Int[Tensor, " rows"], ...]:
        """For each store, which of the shard's rows are joined, in the first store's order."""
        columns = [store.columns(index) for store in self.stores]
        # a beginning-of-sequence token has no position in its document, and so no partner
        keys = [
            torch.where(c[2] >= 0, (c[1].long() << 32) + c[2].long(), -1 - number)
            for number, c in enumerate(columns)
        ]
        order = [key.argsort() for key in keys]
        ordered = [key[places] for key, places in zip(keys, order, strict=True)]
        found = torch.ones_like(keys[0], dtype=torch.bool)
        at = []
        for key, places in zip(ordered, order, strict=True):
            slot = torch.searchsorted(key, keys[0]).clamp_max(max(key.shape[0] - 1, 0))
            found &= key[slot] == keys[0]
            at.append(places[slot])
        found &= keys[0] >= 0
        rows = tuple(places[found] for places in at)
        for number in range(1, len(columns)):
            same = columns[0][0][rows[0]] == columns[number][0][rows[number]]
            if not bool(same.all()):
                row = int(torch.nonzero(~same)[0])
                where = [int(column[rows[0][row]]) for column in columns[0]]
                raise MismatchError(
                    f"stores that are joined must hold the same tokens: {self.stores[0].artifact.path} has token "
                    f"{where[0]} in document {where[1]} at position {where[2]}",
                    f"token {int(columns[number][0][rows[number][row]])} in {self.stores[number].artifact.path}",
                    "Harvest both models with the same tokenizer and text.",
                )
        return rows

    def _check_missing(self) -> None:
        """Rows without a partner must be explained by the norms that the other harvests left out."""
        n_joined = sum(rows[0].shape[0] for rows in self._rows)
        for number, store in enumerate(self.stores):
            n_own = sum(int((store.columns(index)[2] >= 0).sum()) for index in range(len(store.info.shards)))
            explained = sum(other.info.n_norm_outliers for other in self.stores if other is not store)
            if n_own - n_joined > explained:
                raise MismatchError(
                    f"stores that are joined must hold the same documents and positions, but for the {explained:,} "
                    "rows that the other harvests left out for their norm",
                    f"{n_own - n_joined:,} of {n_own:,} rows only in {self.stores[number].artifact.path}",
                    "Harvest both models with the same text, policy, tokens and seed.",
                )


def _differing(one: Store, other: Store) -> str:
    """The fields of one store's policy that differ from the other's."""
    ours: dict[str, Any] = one.info.policy.resolved()
    theirs = other.info.policy.resolved()
    return ", ".join(f"{name}={value}" for name, value in ours.items() if theirs[name] != value)


def open_stores(paths: Sequence[Any]) -> Store | JoinedStore:
    """One store, or several joined.

    Raises:
        ArtifactError: a folder is not a store.
        MismatchError: they do not belong together.
    """
    stores = [open_store(path) for path in paths]
    return stores[0] if len(stores) == 1 else JoinedStore(stores)
