"""Activations on disk: shards of bfloat16 rows, each traceable to a document and a position in it.

Knows how a store is laid out; does not know how activations are made (`harvest.py`) or used (`source`).

A store is an artifact of kind "store":

    shard-00000.safetensors     one bfloat16 tensor (rows, width) per hookpoint, and int32 token_ids, doc_ids,
                                positions (token offset within the document), all of the same length
    documents.parquet           id, source, language, title, tags of every document
    meta.json                   extra: what `StoreInfo` holds

Rows are shuffled within each shard, and each shard draws on contexts from all over the corpus.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sememe import artifact
from sememe.config import Config
from sememe.errors import ActivationError, CorruptError, HookpointError, nearest
from sememe.text import TextConfig, TokenPolicy

__all__ = [
    "HeldOut",
    "HookpointInfo",
    "Shard",
    "Shards",
    "Store",
    "StoreInfo",
    "hold_out",
    "open_store",
    "write_documents",
    "write_shard",
]

DOCUMENTS = "documents.parquet"


class HookpointInfo(Config):
    """What a store knows about one hookpoint."""

    width: int
    """Features per row."""
    median_norm: float
    """Median Euclidean norm of the kept rows of the first contexts."""
    max_norm: float | None
    """Rows with a larger norm at any hookpoint were left out; None if the policy keeps all."""


class StoreInfo(Config):
    """What a store remembers about where its rows come from."""

    model: str
    """Name of the language model."""
    model_fingerprint: str
    """Its fingerprint."""
    hookpoints: dict[str, HookpointInfo]
    """Where the activations were read."""
    policy: TokenPolicy
    """Which positions were kept."""
    text_fingerprint: str
    """Fingerprint of the corpus."""
    n_rows: int
    """Rows in all shards."""
    n_tokens_read: int
    """Tokens that went through the model."""
    n_norm_outliers: int
    """Rows left out for their norm."""
    shards: tuple[str, ...]
    """File names, in the order in which they were written."""
    shard_rows: tuple[int, ...]
    """Rows in each."""


class Shard(NamedTuple):
    """The rows of one shard, in memory."""

    activations: dict[str, Tensor]
    token_ids: Int[Tensor, " rows"]
    doc_ids: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]


class HeldOut(NamedTuple):
    """Rows set aside, and what is left of each shard without their documents."""

    activations: dict[str, Tensor]
    documents: Int[Tensor, " documents"]
    shard_rows: tuple[int, ...]


def write_shard(path: str | Path, shard: Shard) -> None:
    """Write one shard aside and rename it."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    tensors = {name: value.contiguous() for name, value in shard.activations.items()}
    save_file(
        tensors
        | {
            "token_ids": shard.token_ids,
            "doc_ids": shard.doc_ids,
            "positions": shard.positions,
        },
        aside,
    )
    with aside.open("rb") as file:
        os.fsync(file.fileno())  # a harvest that goes on after a power cut does not look at it again
    aside.replace(path)


def write_documents(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the table of documents."""
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("source", pa.string()),
            ("language", pa.string()),
            ("title", pa.string()),
            ("tags", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


class Store:
    """A finished store, open for reading."""

    def __init__(self, folder: artifact.Artifact) -> None:
        self.artifact = folder
        self.info = StoreInfo.build(folder.extra, where=str(folder.path))
        self._verified: set[str] = set()

    @property
    def fingerprint(self) -> str:
        """The artifact's fingerprint."""
        return self.artifact.fingerprint

    def check_hookpoints(self, names: Iterable[str]) -> None:
        """Raise a HookpointError if the store lacks one of the hookpoints."""
        for name in names:
            if name not in self.info.hookpoints:
                raise HookpointError(
                    f"a hookpoint must be in the store {self.artifact.path}",
                    repr(name),
                    nearest(name, self.info.hookpoints),
                )

    def read(self, index: int, hookpoints: Iterable[str]) -> Shard:
        """One shard. Its hash is checked the first time, and its activations must be finite.

        Raises:
            CorruptError: the file is truncated or was changed.
            ActivationError: a row is NaN or infinite.
        """
        name = self.info.shards[index]
        path = self.artifact.file(name, verify=name not in self._verified)
        try:
            with safe_open(path, framework="pt") as file:
                activations = {hookpoint: file.get_tensor(hookpoint) for hookpoint in hookpoints}
                rest = [file.get_tensor(key) for key in ("token_ids", "doc_ids", "positions")]
        except SafetensorError as error:
            raise CorruptError(
                f"{path} must be a shard of activations", str(error), "Delete the store and harvest again."
            ) from None
        if name not in self._verified:
            for hookpoint, values in activations.items():
                _check_finite(path, hookpoint, values, rest[1], rest[2])
            self._verified.add(name)
        return Shard(activations, *rest)

    def columns(self, index: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Token ids, document ids and positions of a shard's rows, without its activations.

        Raises:
            CorruptError: the file is truncated.
        """
        path = self.artifact.file(self.info.shards[index])
        try:
            with safe_open(path, framework="pt") as file:
                tokens, documents, positions = (
                    file.get_tensor(key) for key in ("token_ids", "doc_ids", "positions")
                )
        except SafetensorError as error:
            raise CorruptError(
                f"{path} must be a shard of activations", str(error), "Delete the store and harvest again."
            ) from None
        return tokens, documents, positions

    def expand(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names, which must be in the store.

        Raises:
            HookpointError: one is not.
        """
        names = tuple(names)
        self.check_hookpoints(names)
        return names

    def origin(self, name: str) -> tuple[StoreInfo, str]:
        """What is known about the model a hookpoint belongs to, and the hookpoint's name there."""
        return self.info, name

    @property
    def name(self) -> str:
        """Where it is, for errors."""
        return str(self.artifact.path)

    @property
    def parents(self) -> dict[str, str]:
        """The fingerprint, by its role for what is made from the store."""
        return {"store": self.fingerprint}

    @property
    def separation(self) -> dict[str, Any] | None:
        """Which documents of its text it holds, see `TextConfig.separation`; None if it does not say."""
        made = self.artifact.meta["config"]
        return TextConfig.build(made["text"]).separation(made["split"]) if "text" in made else None

    @property
    def n_documents(self) -> int:
        """How many documents there are, from the table's footer alone."""
        return int(pq.read_metadata(self.artifact.file(DOCUMENTS, verify=True)).num_rows)

    def documents(self) -> list[dict[str, Any]]:
        """The table of documents: id, source, language, title, tags (JSON)."""
        rows: list[dict[str, Any]] = pq.read_table(self.artifact.file(DOCUMENTS, verify=True)).to_pylist()
        return rows

    def _repr_html_(self) -> str:
        points = ", ".join(f"{name} ({point.width})" for name, point in self.info.hookpoints.items())
        return (
            f"<table><caption>Sememe store</caption><tr><th>model</th><td>{self.info.model}</td></tr>"
            f"<tr><th>hookpoints</th><td>{points}</td></tr><tr><th>rows</th><td>{self.info.n_rows:,}</td></tr></table>"
        )


@runtime_checkable
class Shards(Protocol):
    """What holds activations shard by shard: a store, or several joined."""

    info: StoreInfo

    def read(self, index: int, hookpoints: Iterable[str]) -> Shard:
        """One shard."""

    def columns(self, index: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Token ids, document ids and positions of a shard's rows."""

    def documents(self) -> list[dict[str, Any]]:
        """The table of documents."""


def hold_out(store: Shards, hookpoints: Iterable[str], n: int, seed: int) -> HeldOut:
    """About n rows of documents at random, pieces of one title together, from as few shards as hold enough.

    Args:
        store: Where from; its hookpoints by their full names.
        hookpoints: What to read.
        n: Rows wanted; fewer where a tenth of all rows would belong to the documents.
        seed: Of the choice.
    """
    generator, names = torch.Generator().manual_seed(seed), tuple(hookpoints)
    n_shards, left = len(store.info.shards), store.info.n_rows // 10
    title_of = {d["id"]: (d["source"], d["title"]) if d["title"] else d["id"] for d in store.documents()}
    alike: dict[Any, list[int]] = {}
    for number, title in title_of.items():
        alike.setdefault(title, []).append(number)
    totals = collections.Counter[int]()
    for index in range(n_shards):
        numbers, counts = torch.unique(store.columns(index)[1], return_counts=True)
        totals.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    chosen: set[int] = set()
    held, n_held = torch.empty(0, dtype=torch.int32), 0
    parts = [
        {name: torch.empty(0, store.info.hookpoints[name].width, dtype=torch.bfloat16) for name in names}
    ]
    for index in torch.randperm(n_shards, generator=generator).tolist():
        if n_held >= n:
            break
        shard = store.read(index, names)
        numbers, counts = torch.unique(shard.doc_ids, return_counts=True)
        wanted = n - n_held
        for place in torch.randperm(len(numbers), generator=generator).tolist():
            if wanted <= 0:
                break
            whole = alike[title_of[int(numbers[place])]]
            leaving = sum(totals[other] for other in whole if other not in chosen)
            if 0 < leaving <= left:
                chosen.update(whole)
                left -= leaving
                wanted -= int(counts[place])
        held = torch.tensor(sorted(chosen), dtype=torch.int32)
        mine = torch.isin(shard.doc_ids, held)
        parts.append({name: values[mine] for name, values in shard.activations.items()})
        n_held += int(mine.sum())
    activations = {name: torch.cat([part[name] for part in parts]) for name in names}
    shard_rows = tuple(int((~torch.isin(store.columns(i)[1], held)).sum()) for i in range(n_shards))
    return HeldOut(activations, held, shard_rows)


def _check_finite(path: Path, hookpoint: str, values: Tensor, doc_ids: Tensor, positions: Tensor) -> None:
    finite = torch.isfinite(values).all(dim=1)
    if not bool(finite.all()):
        row = int(torch.nonzero(~finite)[0])
        raise ActivationError(
            f"activations in {path} must be finite",
            f"NaN or infinity at {hookpoint}, row {row} (document {int(doc_ids[row])}, position {int(positions[row])})",
            "Harvest again; in bfloat16 or float32 if the model overflows float16.",
        )


def open_store(path: str | Path) -> Store:
    """Open a finished store.

    Raises:
        ArtifactError: the folder is not a store.
        CorruptError: a shard is missing or truncated.
    """
    return Store(artifact.load(path, "store"))
