"""Documents to rows of tokens: the token policy at work. Knows tokenizers by their methods, not where they are from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from numpy.typing import NDArray

from sememe.errors import ConfigError, TextError
from sememe.text.config import TextConfig, TokenPolicy
from sememe.text.documents import Document, DocumentInfo
from sememe.text.mixture import Split, interleave, nothing_on_side, streams

__all__ = ["TokenBlock", "token_blocks"]

WINDOW_TOKENS = 1 << 18  # rows are drawn at random from this many tokens
BATCH_DOCUMENTS = 64
BATCH_CHARS = 500_000


class TokenBlock(NamedTuple):
    """Rows of tokens, and where each token is from.

    `doc_ids` is -1 at padding; `doc_positions` is the token's offset in its document, an end-of-sequence token
    after it counted, and -1 for padding and beginning-of-sequence tokens (whose `doc_ids` is that of the token
    that follows). `keep` marks the positions that the token policy keeps; `attention_mask` all but padding.
    `documents` has every document in the block.
    """

    ids: Int32[np.ndarray, "rows ctx"]
    doc_ids: Int32[np.ndarray, "rows ctx"]
    doc_positions: Int32[np.ndarray, "rows ctx"]
    keep: Bool[np.ndarray, "rows ctx"]
    attention_mask: Bool[np.ndarray, "rows ctx"]
    documents: dict[int, DocumentInfo]


class _Row(NamedTuple):
    """ids, doc_ids and positions of one row, and its documents."""

    tokens: NDArray[np.int32]  # (3, ctx)
    documents: tuple[DocumentInfo, ...]


def token_blocks(
    config: TextConfig,
    tokenizer: Any,
    policy: TokenPolicy,
    *,
    split: Split = "train",
    n_tokens: int | None = None,
    block_rows: int = 512,
) -> Iterator[TokenBlock]:
    """Rows of tokens, in a random order that depends on the seed alone; memory does not grow with the text.

    The corpora's shares are shares of tokens. The rows are the first ones that hold `n_tokens` (whatever the
    block size), shuffled through a window of about 260,000 tokens.

    Args:
        config: Which text.
        tokenizer: A Hugging Face tokenizer.
        policy: How documents become rows.
        split: "train", "heldout", or "all".
        n_tokens: Stop after the row in which this many tokens (padding not counted) are reached; None: all of the
            text. A last row that is not full is left out when packing.
        block_rows: Rows per block; the last may have fewer.

    Raises:
        ConfigError: the policy asks for a token or template that the tokenizer does not have.
        TextError: the text is empty, unreadable, or shorter than one row.
    """
    if n_tokens is not None and n_tokens < 1:
        raise ConfigError("n_tokens must be >= 1", n_tokens, "Raise n_tokens.")
    if block_rows < 1:
        raise ConfigError("block_rows must be >= 1", block_rows, "Raise block_rows.")
    _check_tokenizer(config, tokenizer, policy)
    special = np.asarray(tokenizer.all_special_ids, dtype=np.int32)
    parts = [(weight, _encoded(items, config, tokenizer)) for weight, items in streams(config, split)]
    tokenized = interleave(parts, config.seed)
    rows = (
        _packed(tokenized, tokenizer, policy)
        if policy.packing
        else _one_per_row(tokenized, tokenizer, policy)
    )
    waiting: list[_Row] = []
    n_rows = 0
    for row in _shuffled(_limited(rows, n_tokens), policy.context_length, config.seed):
        n_rows += 1
        waiting.append(row)
        if len(waiting) == block_rows:
            yield _block(waiting, policy, special)
            waiting = []
    if waiting:
        yield _block(waiting, policy, special)
    if not n_rows:
        n_found = rows.n_tokens
        if not n_found:
            raise nothing_on_side(config, split)
        raise TextError(
            f"the {split} split of {', '.join(config.corpus)} must hold at least one row of "
            f"context_length={policy.context_length} tokens",
            f"{n_found} tokens",
            "Give more text, lower context_length, or set packing to false.",
        )


def _check_tokenizer(config: TextConfig, tokenizer: Any, policy: TokenPolicy) -> None:
    if policy.bos and tokenizer.bos_token_id is None:
        raise ConfigError(
            "bos needs a tokenizer with a beginning-of-sequence token", "one without", "Set bos to false."
        )
    if config.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "chat_template needs a tokenizer with a chat template",
            "one without",
            "Use an instruct model, or leave it out.",
        )


# -- documents to tokens ---------------------------------------------------------------------------


def _encoded(
    items: Iterator[Document], config: TextConfig, tokenizer: Any
) -> Iterator[tuple[int, tuple[DocumentInfo, NDArray[np.int32]]]]:
    """(number of tokens, (document, tokens)), tokenized in batches."""
    batch: list[Document] = []
    chars, size = 0, 4  # small batches first: a short run takes few documents of each corpus
    for document in items:
        batch.append(document)
        chars += len(document.text)
        if len(batch) >= size or chars >= BATCH_CHARS:
            yield from _encode(batch, config, tokenizer)
            batch, chars, size = [], 0, min(2 * size, BATCH_DOCUMENTS)
    if batch:
        yield from _encode(batch, config, tokenizer)


def _encode(
    batch: list[Document], config: TextConfig, tokenizer: Any
) -> Iterator[tuple[int, tuple[DocumentInfo, NDArray[np.int32]]]]:
    if config.chat_template:
        texts = [str(tokenizer.apply_chat_template(d.messages, tokenize=False)) for d in batch]
    else:
        texts = [document.text for document in batch]
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        fast.no_padding()
        fast.no_truncation()
        encodings = [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encodings = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for document, ids in zip(batch, encodings, strict=True):
        if ids:
            yield len(ids), (document.info, np.asarray(ids, dtype=np.int32))


# -- tokens to rows --------------------------------------------------------------------------------


class _Rows:
    """An iterator of rows that counts the tokens it was given."""

    n_tokens = 0

    def __init__(
        self, tokenized: Iterator[tuple[DocumentInfo, NDArray[np.int32]]], tokenizer: Any, policy: TokenPolicy
    ) -> None:
        self.tokenized, self.policy = tokenized, policy
        self.bos: int | None = tokenizer.bos_token_id if policy.bos else None
        self.eos: int | None = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else (self.eos if self.eos is not None else 0)
        self.room = policy.context_length - (self.bos is not None)

    def row(self, tokens: NDArray[np.int32], documents: tuple[DocumentInfo, ...]) -> _Row:
        """A row of (3, n <= room) tokens: beginning-of-sequence token before, padding after."""
        out = np.full((3, self.policy.context_length), -1, dtype=np.int32)
        out[0] = self.pad
        start = int(self.bos is not None)
        out[:, start : start + tokens.shape[1]] = tokens
        if self.bos is not None:
            out[:2, 0] = self.bos, tokens[1, 0]
        return _Row(out, documents)


class _packed(_Rows):
    """Documents one after the other, end-of-sequence tokens between them, cut into full rows."""

    def __iter__(self) -> Iterator[_Row]:
        pending: list[NDArray[np.int32]] = []
        infos: list[DocumentInfo] = []
        length = 0
        for info, ids in self.tokenized:
            if self.eos is not None and ids[-1] != self.eos:
                ids = np.append(ids, np.int32(self.eos))
            self.n_tokens += len(ids)
            pending.append(np.stack([ids, np.full_like(ids, info.id), np.arange(len(ids), dtype=np.int32)]))
            infos.append(info)
            length += len(ids)
            if length < self.room:
                continue
            tokens = np.concatenate(pending, axis=1) if len(pending) > 1 else pending[0]
            known = {i.id: i for i in infos}
            at = 0
            while length - at >= self.room:
                piece = tokens[:, at : at + self.room]
                yield self.row(piece, tuple(known[i] for i in np.unique(piece[1]).tolist()))
                at += self.room
            length -= at
            pending, infos = ([tokens[:, at:]], [info]) if length else ([], [])


class _one_per_row(_Rows):
    """Each row holds tokens of one document; a long document goes on in further rows."""

    def __iter__(self) -> Iterator[_Row]:
        for info, ids in self.tokenized:
            self.n_tokens += len(ids)
            positions = np.arange(len(ids), dtype=np.int32)
            tokens = np.stack([ids, np.full_like(ids, info.id), positions])
            for start in range(0, len(ids), self.room):
                yield self.row(tokens[:, start : start + self.room], (info,))


def _limited(rows: _Rows, n_tokens: int | None) -> Iterator[_Row]:
    """The first rows, until they hold n_tokens."""
    found = 0
    for row in rows:  # type: ignore[attr-defined]
        yield row
        found += int((row.tokens[1] >= 0).sum())
        if n_tokens is not None and found >= n_tokens:
            return


def _shuffled(rows: Iterator[_Row], context_length: int, seed: int) -> Iterator[_Row]:
    """Rows drawn at random from a window that is kept full."""
    rng = random.Random(f"rows {seed}")
    size = max(WINDOW_TOKENS // context_length, 64)
    window: list[_Row] = []
    for row in rows:
        if len(window) < size:
            window.append(row)
            continue
        at = rng.randrange(size)
        drawn, window[at] = window[at], row
        yield drawn
    rng.shuffle(window)
    yield from window


def _block(rows: list[_Row], policy: TokenPolicy, special: NDArray[np.int32]) -> TokenBlock:
    stacked = np.stack([row.tokens for row in rows], axis=1)
    ids, doc_ids, positions = (np.ascontiguousarray(part) for part in stacked)
    mask = doc_ids >= 0
    keep = mask.copy()
    keep[:, : policy.drop_positions] = False
    if policy.drop_special:
        keep &= ~np.isin(ids, special)
    documents = {info.id: info for row in rows for info in row.documents}
    return TokenBlock(ids, doc_ids, positions, keep, mask, documents)
