"""Sentences, a tokenizer and shorthands: what the tests of the text package stand on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sememe.errors import SememeError
from sememe.text import (
    TextConfig,
    TokenBlock,
    TokenPolicy,
    cache,
    token_blocks,
)

WORDS = tuple(
    """the quick brown fox jumps over a lazy dog while seven wizards boil green frogs in Oslo and Kyoto""".split()  # noqa: SIM905
)


def make_tokenizer(eos: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with 512 tokens, trained here."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    named: dict[str, Any] = ({"eos_token": "<|end|>"} if eos else {}) | (
        {"bos_token": "<|start|>"} if bos else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


TOKENIZER = make_tokenizer()
VERSION = f"v{cache.EXTRACTION}"


def sentence(n: int, words: int = 12) -> str:
    """A sentence that depends on n alone and differs for different n."""
    picked = [WORDS[int(hashlib.md5(f"{n} {i}".encode()).hexdigest(), 16) % len(WORDS)] for i in range(words)]
    return f"{n} " + " ".join(picked) + "."


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def config(*names: object, **options: Any) -> TextConfig:
    return TextConfig(corpus=tuple(map(str, names)), **options)


def blocks(
    text: TextConfig, policy: TokenPolicy | None = None, tokenizer: Any = TOKENIZER, **options: Any
) -> list[TokenBlock]:
    return list(token_blocks(text, tokenizer, policy or TokenPolicy(context_length=16), **options))


def gathered(found: list[TokenBlock]) -> dict[int, dict[int, int]]:
    """document -> position -> token, of every token with a position; fails on a repeat."""
    out: dict[int, dict[int, int]] = {}
    for block in found:
        for row, column in zip(*np.nonzero(block.doc_positions >= 0), strict=True):
            places = out.setdefault(int(block.doc_ids[row, column]), {})
            position = int(block.doc_positions[row, column])
            assert position not in places
            places[position] = int(block.ids[row, column])
    return out


def message(error: pytest.ExceptionInfo[SememeError]) -> str:
    text = str(error.value)
    assert "\n" not in text and ", got " in text and text.endswith((".", "?")), text
    return text
