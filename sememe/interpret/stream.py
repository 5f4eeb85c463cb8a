"""One streaming pass over a text: forward, encode, collect; snapshots, and going on from them. Writes no atlas."""

from __future__ import annotations

import collections
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Int64

from sememe.dictionaries import Dictionary
from sememe.errors import TextError
from sememe.interpret.config import InterpretConfig
from sememe.interpret.followed import Followed, Seen, not_finite
from sememe.interrupt import stop_requests
from sememe.lm import LanguageModel
from sememe.progress import Progress, track
from sememe.store import Store, open_store
from sememe.text import Split, TextConfig, TokenBlock, TokenPolicy, token_blocks, whole_id

__all__ = ["DOCUMENTS", "ROWS", "SNAPSHOT", "Pass", "enough_documents"]

SNAPSHOT, ROWS, DOCUMENTS = "snapshot.npz", "rows.bin", "documents.jsonl"
BLOCK_ROWS = 512
READ_AHEAD = 1 << 20
"""At most so many tokens are read before the first forward, to see whether there are documents enough."""


class _StoredBlock:
    """One shard of a store, by document and position: a shard holds what one block of the text became."""

    def __init__(self, store: Store, index: int, hookpoints: list[str]) -> None:
        shard = store.read(index, hookpoints)
        self.activations = shard.activations
        keys = _keys(shard.doc_ids.numpy(), shard.positions.numpy())
        self.order = np.argsort(keys)
        self.keys = keys[self.order]

    def find(self, part: TokenBlock) -> Int64[np.ndarray, "rows ctx"]:
        """The shard's row of each position, or -1."""
        keys = _keys(part.doc_ids, part.doc_positions)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.order[at], -1)


def _keys(doc_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return (doc_ids.astype(np.int64) << 32) | (positions.astype(np.int64) & 0xFFFFFFFF)


def _text_of(config: InterpretConfig) -> tuple[TextConfig, Split, int, int]:
    """Corpus, split, number of tokens, and rows per block; a store's own, so that its shards and the blocks agree."""
    if config.store is None:
        return config.text, config.split, config.n_tokens, BLOCK_ROWS
    made = open_store(config.store).artifact.meta["config"]
    return TextConfig.build(made["text"]), made["split"], int(made["n_tokens"]), int(made["shard_contexts"])


def _n_documents_wanted(config: InterpretConfig) -> int:
    return max(config.n_top, config.n_random)


def enough_documents(config: InterpretConfig, n_documents: int) -> None:
    """That there are as many documents as examples are asked for; pieces of one count together.

    Raises:
        TextError: there are fewer.
    """
    wanted = _n_documents_wanted(config)
    if n_documents < wanted:
        raise TextError(
            f"the text must have at least {wanted} documents, as {wanted} examples of a latent come from as many",
            n_documents,
            "Give more text, raise n_tokens, or lower n_top and n_random; for one long file, set split_by to piece.",
        )


class Pass:
    """One streaming pass: the dictionaries it follows, and the token rows and documents on disk.

    Args:
        config: The verb's config.
        lm: The model.
        followed: Dictionaries that read it, by name.
        policy: Which positions are kept.
        folder: Where rows, documents and snapshots are written.
        store: Activations of the text; the model runs over it if not given.
        identities: What each dictionary's atlas will be: only a pass for the same ones goes on from a snapshot.
    """

    def __init__(
        self,
        config: InterpretConfig,
        lm: LanguageModel,
        followed: Mapping[str, Dictionary],
        policy: TokenPolicy,
        folder: Path,
        store: Store | None = None,
        identities: Sequence[str] = (),
    ) -> None:
        self.config, self.lm, self.policy, self.folder = config, lm, policy, folder
        self.store, self.identities = store, list(identities)
        self.stored: _StoredBlock | None = None
        self.text, self.split, self.n_tokens, self.block_rows = _text_of(config)
        self.followed = [
            Followed(config, dictionary.to(lm.device), name, str(number), folder, self.n_tokens)
            for number, (name, dictionary) in enumerate(followed.items())
        ]
        self.hookpoints = list(dict.fromkeys(site.hookpoint for one in self.followed for site in one.sites))
        self.n_rows = 0
        self.n_read = 0

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> None:
        """Go over the text, from the last snapshot if there is one."""
        n_done = self._restore() if resume else 0
        if not self.n_rows:
            self.open()
        with (
            (self.folder / ROWS).open("r+b" if n_done else "wb") as rows,
            (self.folder / DOCUMENTS).open("r+b" if n_done else "wb") as documents,
            track("interpret", self.n_tokens, "tokens", done=self.n_read) as progress,
        ):
            rows.seek(self.n_rows * 8 * self.policy.context_length)
            rows.truncate()
            documents.seek(n_done)
            documents.truncate()
            self._loop(rows, documents, progress)

    def open(self) -> None:
        """Begin the files of pairs."""
        for one in self.followed:
            one.open()

    def close(self) -> None:
        """Close them."""
        for one in self.followed:
            one.pairs.close()

    def _loop(self, rows: IO[bytes], documents: IO[bytes], progress: Progress) -> None:
        every = self.config.snapshot_seconds
        next_snapshot = time.monotonic() + every
        with stop_requests() as stop:
            for part in self.parts(documents):
                progress.advance(self.step(part, rows))
                if stop.is_set():
                    self._save(rows, documents)
                    raise KeyboardInterrupt
                if time.monotonic() >= next_snapshot:
                    began = time.monotonic()
                    self._save(rows, documents)
                    took = time.monotonic() - began
                    # A large collector takes seconds to write; that is never more than a twentieth of the time.
                    next_snapshot = time.monotonic() + max(every, 20 * took * (every > 0 and took > 0.5))
        rows.flush()
        documents.flush()
        for one in self.followed:
            one.pairs.flush()

    def step(self, part: TokenBlock, rows: IO[bytes]) -> int:
        """One forward: encode, collect, and keep the token rows. Returns how many tokens were read."""
        seen = self._seen(part)
        with torch.inference_mode():
            for one in self.followed:
                one.take(seen)
        np.stack((part.ids, part.doc_ids), axis=1).tofile(rows)
        n_tokens = int(part.attention_mask.sum())
        self.n_rows += part.ids.shape[0]
        self.n_read += n_tokens
        return n_tokens

    def parts(self, documents: IO[bytes]) -> Iterator[TokenBlock]:
        """What is left of the text, one forward after the other."""
        blocks = token_blocks(
            self.text,
            self.lm.tokenizer,
            self.policy,
            split=self.split,
            n_tokens=self.n_tokens,
            block_rows=self.block_rows,
        )
        done, first = self.n_rows, 0
        for index, block in enumerate(self._once_enough(blocks)):
            n_rows = block.ids.shape[0]
            if first + n_rows > done:
                if self.store is not None:
                    self.stored = _StoredBlock(self.store, index, self.hookpoints)
                if first >= done:
                    _write_documents(documents, block)
                for start in range(max(done - first, 0), n_rows, self.config.batch_rows):
                    yield _slice(block, slice(start, start + self.config.batch_rows))
            first += n_rows

    def _once_enough(self, blocks: Iterator[TokenBlock]) -> Iterator[TokenBlock]:
        """The blocks, once those read ahead hold as many documents as examples need: no forward is in vain."""
        ahead: collections.deque[TokenBlock] = collections.deque()
        seen: set[str] = set()
        n_tokens = 0
        for block in blocks:
            ahead.append(block)
            seen |= {document.key for document in block.documents.values()}
            n_tokens += block.ids.size
            if len(seen) >= _n_documents_wanted(self.config) or n_tokens >= READ_AHEAD:
                break
        else:
            enough_documents(self.config, len(seen))
        while ahead:
            yield ahead.popleft()
        yield from blocks

    @torch.inference_mode()
    def _seen(self, part: TokenBlock) -> Seen:
        """Activations at the positions that are kept: of one forward, or what the store holds of it."""
        wholes = _whole_ids(part)
        if self.stored is not None:
            rows = self.stored.find(part).reshape(-1)
            wanted = np.flatnonzero(part.keep.reshape(-1) & (rows >= 0))
            found = {
                name: values[rows[wanted]].to(self.lm.device, torch.float32)
                for name, values in self.stored.activations.items()
            }
            n_missing = int(part.keep.sum()) - wanted.shape[0]
            return Seen(part, self.n_rows, torch.from_numpy(wanted), wholes, found, {}, n_missing)
        ids = torch.from_numpy(part.ids).to(self.lm.device, torch.int64)
        mask = None if part.attention_mask.all() else torch.from_numpy(part.attention_mask).to(self.lm.device)
        captured = self.lm.capture(ids, self.hookpoints, mask)
        places = torch.from_numpy(np.flatnonzero(part.keep))
        activations, norms = {}, {}
        for name in self.hookpoints:
            values = captured[name].flatten(0, 1)
            values = values[places.to(values.device)].float().to(self.lm.device)
            norms[name] = torch.linalg.vector_norm(values, dim=1).cpu()
            if not bool(torch.isfinite(norms[name]).all()):
                not_finite(part, int(places[~torch.isfinite(norms[name])][0]), f"activations at {name}")
            activations[name] = values
        return Seen(part, self.n_rows, places, wholes, activations, norms)

    # -- snapshots ---------------------------------------------------------------------------------

    def _save(self, rows: IO[bytes], documents: IO[bytes]) -> None:
        """The collectors' states, after the files they refer to: a kill at any moment leaves it whole."""
        for file in (rows, documents, *(file for one in self.followed for file in one.pairs.files)):
            file.flush()
            os.fsync(file.fileno())
        aside = self.folder / f"{SNAPSHOT}.tmp"
        counts = np.array([self.n_rows, self.n_read, documents.tell()], np.int64)
        states = {key: value for one in self.followed for key, value in one.state().items()}
        with aside.open("wb") as out:
            np.savez(out, pass_counts=counts, identities=np.array(self.identities, str), **states)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(self.folder / SNAPSHOT)

    def _restore(self) -> int:
        """Take back the last snapshot; returns how much of the documents' file belongs to it."""
        path = self.folder / SNAPSHOT
        if not path.is_file():
            return 0
        with np.load(path) as state:
            if state["identities"].tolist() != self.identities:
                return 0  # begun with other dictionaries
            for one in self.followed:
                one.open(one.restore(state))
            self.n_rows, self.n_read, n_bytes = (int(n) for n in state["pass_counts"])
        return n_bytes

    # -- afterwards --------------------------------------------------------------------------------

    def check(self) -> None:
        """That there is text enough to show.

        Raises:
            TextError: the text has fewer documents than examples are asked for.
        """
        wholes = np.fromiter((whole_id(document["key"]) for document in self.documents()), np.int64)
        enough_documents(self.config, np.unique(wholes).shape[0])

    def rows(self) -> np.ndarray:
        """Every token row on disk: (n_rows, 2, context_length), ids and documents."""
        shape = (self.n_rows, 2, self.policy.context_length)
        return np.memmap(self.folder / ROWS, np.int32, mode="r", shape=shape)

    def documents(self) -> Iterator[dict[str, Any]]:
        """Every document of the pass; one that lies in several blocks comes several times."""
        with (self.folder / DOCUMENTS).open("rb") as file:
            for line in file:
                yield json.loads(line)

    def document_ids(self) -> np.ndarray:
        """The ids of all documents, each once."""
        return np.unique(np.fromiter((document["id"] for document in self.documents()), np.int64))


def _whole_ids(part: TokenBlock) -> Int64[np.ndarray, "rows ctx"]:
    """For each token a number that all pieces of its document share; -1 at padding."""
    ids, place = np.unique(part.doc_ids, return_inverse=True)
    numbers = [whole_id(part.documents[i].key) if i >= 0 else -1 for i in ids.tolist()]
    return np.array(numbers, np.int64)[place].reshape(part.doc_ids.shape)


def _slice(block: TokenBlock, part: slice) -> TokenBlock:
    return block._replace(
        ids=block.ids[part],
        doc_ids=block.doc_ids[part],
        doc_positions=block.doc_positions[part],
        keep=block.keep[part],
        attention_mask=block.attention_mask[part],
    )


def _write_documents(file: IO[bytes], block: TokenBlock) -> None:
    for document_id, document in sorted(block.documents.items()):
        row = {
            "id": document_id,
            "source": document.source,
            "language": document.language,
            "title": document.title,
            "tags": json.dumps(document.tags, ensure_ascii=False, sort_keys=True),
            "key": document.key,
        }
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
