"""What each token id stands for, byte by byte. Knows tokenizers; knows no model.

A byte-level tokenizer writes each byte as one printable character, a SentencePiece one writes spaces as '▁' and
lone bytes as '<0x0A>'. One token may be half a character, so its bytes are exact where its text cannot be.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

__all__ = ["TokenTable"]


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's map from bytes to printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenTable:
    """The bytes and the text of every token of a tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
        byte_level = '"ByteLevel"' in decoder
        pieces = "▁" in decoder or '"ByteFallback"' in decoder
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        n = max(vocab_size, len(tokenizer))
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        names += [None] * (n - len(names))
        self.bytes_of = [_bytes(name, added.get(i), byte_level, pieces) for i, name in enumerate(names)]

    def text(self, token: int) -> str:
        """Readable text; bytes that are no whole character show as `\\xe6`."""
        return self.bytes_of[token].decode("utf-8", errors="backslashreplace")


def _bytes(name: str | None, added: str | None, byte_level: bool, pieces: bool) -> bytes:
    if name is None:
        return b""
    if added is not None and not (pieces and set(added) == {"▁"}):
        return added.encode()
    if byte_level:
        table = byte_of_character()
        return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()
    if pieces:
        lone = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
        return bytes([int(lone[1], 16)]) if lone else name.replace("▁", " ").encode()
    return name.encode()
