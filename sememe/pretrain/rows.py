"""From a text to a tokenizer and rows of token ids on disk, and what counting alone makes of them.

Knows text and tokenizers; knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer

from sememe.errors import TextError
from sememe.lm.build import load_tokenizer, train_tokenizer
from sememe.pretrain.config import PretrainConfig
from sememe.text import TokenPolicy, documents, token_blocks

__all__ = ["Baselines", "baselines", "rows_of", "tokenizer_of"]

N_BASELINE_TOKENS = 20_000_000
"""Tokens counted for the n-gram baselines: their counts must fit in memory."""


def tokenizer_of(config: PretrainConfig, scratch: Path) -> Any:
    """The tokenizer of this run: trained once, then read back."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    folder = scratch / "tokenizer"
    if not folder.is_dir():
        aside = scratch / "tokenizer.tmp"
        trained = train_tokenizer(_some_texts(config), config.n_bpe)
        trained.save_pretrained(aside)
        aside.rename(folder)
    return load_tokenizer(str(folder))


def _some_texts(config: PretrainConfig) -> Iterator[str]:
    left = config.tokenizer_chars or 20_000_000
    for document in documents(config.text, split="train"):
        if left <= 0:
            return
        yield document.text[:left]
        left -= len(document.text)


def rows_of(
    config: PretrainConfig, tokenizer: Any, split: Literal["train", "heldout"], n_tokens: int, path: Path
) -> Integer[np.ndarray, "n ctx"]:
    """Rows of token ids, memory-mapped from a file that is complete or absent."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    if not path.is_file():
        policy = TokenPolicy(context_length=config.context_length, drop_positions=0)
        aside = path.with_suffix(".tmp")
        with aside.open("wb") as file:
            for block in token_blocks(config.text, tokenizer, policy, split=split, n_tokens=n_tokens):
                full = block.attention_mask.all(axis=1)  # the last row of a corpus may not be full
                file.write(np.ascontiguousarray(block.ids[full], dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    if path.stat().st_size == 0:
        raise TextError(
            f"the {split} text must fill a row of {config.context_length} tokens",
            "less",
            "Give more text or lower context_length.",
        )
    return np.memmap(path, dtype, mode="r").reshape(-1, config.context_length)


class Baselines(NamedTuple):
    """Losses in nats per token of models that know next to nothing."""

    unigram: float
    """Each token by its frequency (one is added to every count)."""
    bigram: float
    """Each token by the one before it, smoothed by Witten and Bell's rule."""


def baselines(
    train_rows: Integer[np.ndarray, "n_train ctx"],
    heldout_rows: Integer[np.ndarray, "n_heldout heldout_ctx"],
    vocab_size: int,
) -> Baselines:
    """N-gram losses on the held-out rows, on the same predictions as the model's: all but a row's first token.

    Source: Witten & Bell 1991, method C: p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) is the number
    of different tokens seen after a.
    """
    rows = train_rows[: max(1, N_BASELINE_TOKENS // train_rows.shape[1])].astype(np.int64)
    test = heldout_rows.astype(np.int64)
    counts = np.bincount(rows[:, 1:].ravel(), minlength=vocab_size) + 1
    unigram = counts / counts.sum()
    pairs, pair_counts = np.unique(
        rows[:, :-1].ravel() * vocab_size + rows[:, 1:].ravel(), return_counts=True
    )
    first = pairs // vocab_size
    n_after = np.bincount(first, weights=pair_counts, minlength=vocab_size)
    n_types = np.bincount(first, minlength=vocab_size)
    before, after = test[:, :-1].ravel(), test[:, 1:].ravel()
    keys = before * vocab_size + after
    place = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
    seen = np.where(pairs[place] == keys, pair_counts[place], 0)
    base = unigram[after]
    weight = n_after[before] + n_types[before]
    bigram = np.where(weight > 0, (seen + n_types[before] * base) / np.maximum(weight, 1), base)
    return Baselines(float(-np.log(base).mean()), float(-np.log(bigram).mean()))
