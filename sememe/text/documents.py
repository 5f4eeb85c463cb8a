"""What a document is, how it is cut, and on which side of a split it lies. Knows nothing about its origin."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

__all__ = [
    "Attribution",
    "Document",
    "DocumentInfo",
    "RawDocument",
    "cut",
    "key_of",
    "side_of",
    "split_of",
    "whole_id",
]

Side = Literal["train", "heldout"]


class DocumentInfo(NamedTuple):
    """Everything about a document but its text."""

    id: int
    source: str
    language: str | None
    title: str | None
    tags: dict[str, str]
    key: str


class Document(NamedTuple):
    """A piece of text that belongs together.

    `id` is the same in every pass over the same config, whatever the split, the seed or the number of tokens.
    `key` decides on which side of a split it lies; pieces of one document share it. `messages` is the
    conversation, with chat templates; `text` is then its JSON.
    """

    id: int
    text: str
    source: str
    language: str | None
    title: str | None
    tags: dict[str, str]
    key: str
    messages: Any = None

    @property
    def info(self) -> DocumentInfo:
        """The same without the text."""
        return DocumentInfo(self.id, self.source, self.language, self.title, self.tags, self.key)


class RawDocument(NamedTuple):
    """A document as a source gives it, before it has an id."""

    text: str
    language: str | None = None
    title: str | None = None
    tags: dict[str, str] = {}  # noqa: RUF012 - never written to
    key: str = ""
    messages: Any = None


class Attribution(NamedTuple):
    """Whom a corpus's licence asks to name."""

    source: str
    title: str
    licence: str
    url: str
    notice: str


def key_of(text: str) -> str:
    """A hash of the text without the white space around it: equal documents have equal keys."""
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def whole_id(key: str) -> int:
    """A number of 64 bits for a key, the same for all pieces of one document."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def side_of(key: str, heldout_fraction: float) -> Side:
    """The side on which a key lies. What is held out at a small fraction is held out at every larger one."""
    return "heldout" if int(key[:13], 16) / 16**13 < heldout_fraction else "train"


def split_of(text: str, fraction: float) -> Side:
    """The side on which a document with this text lies when `fraction` of the documents are held out."""
    return side_of(key_of(text), fraction)


_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_BLANK_LINES = re.compile(r"(?:[ \t]*\n)+")
_STOPS = (". ", "! ", "? ", ": ", "。", "．")


def cut(text: str, max_chars: int) -> Iterator[str]:
    """Pieces of at most `max_chars` characters, cut between paragraphs if possible, else lines, sentences, words.

    No piece is empty, and all together they hold every character of the text but white space at the cuts. Pieces
    are about equally long, so that no stump is left at the end.
    """
    start, stop = 0, len(text.rstrip())
    blank = _BLANK_LINES.match(text)
    start = blank.end() if blank else 0
    while max_chars and stop - start > max_chars:
        n_pieces = -(-(stop - start) // max_chars)
        even = (stop - start) // n_pieces
        at = start + _cut_point(text, start, start + min(max_chars, even + even // 4 + 1))
        if piece := text[start:at].rstrip():  # more blanks than a piece may have characters are no piece
            yield piece
        blank = _BLANK_LINES.match(text, at)
        start = (
            blank.end()
            if blank
            else at + (len(text[at : at + max_chars]) - len(text[at : at + max_chars].lstrip(" ")))
        )
    if start < stop:
        yield text[start:stop]


def _cut_point(text: str, start: int, stop: int) -> int:
    """How many characters after start to cut: late, at the strongest boundary in the last two thirds of the span."""
    window = text[start : stop + 1]  # one more, for a boundary right at the end
    least = (stop - start) // 3
    paragraphs = [match.start() for match in _PARAGRAPH.finditer(window, least)]
    sentence = max(window.rfind(mark, least) + len(mark.rstrip()) for mark in _STOPS)
    for at in (
        paragraphs[-1] if paragraphs else -1,
        window.rfind("\n", least),
        sentence,
        window.rfind(" ", least),
    ):
        if least < at <= stop - start and window[:at].strip():
            return at
    return stop - start
