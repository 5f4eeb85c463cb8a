"""Texts and their labels: from JSONL files, a corpus, or words by their first letter. Knows no model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sememe import text
from sememe.concepts.config import ConceptsConfig
from sememe.errors import TextError

__all__ = ["Labelled", "first_letters", "read_labelled"]

LEAST = 20
"""Texts that a class must have."""
MAX_CLASSES = 12
"""Classes that are taken from files, if nothing else is said."""


class Labelled(NamedTuple):
    """Texts of the classes that are asked about."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    spurious: tuple[str, ...] | None
    classes: tuple[str, ...]
    """By falling frequency."""
    left_out: dict[str, int]
    """Texts of classes that are not asked about."""


def read_labelled(config: ConceptsConfig) -> Labelled:
    """Read the files, or the corpora's documents.

    Raises:
        TextError: a file is missing or no JSONL; a corpus is unknown, cannot be had, or knows no such label; a text or
            a label is missing, empty or NaN; there are fewer than two classes; a class is too small; the second label,
            or the first beside it, has not two classes.
    """
    texts, labels, spurious = [], [], []
    for where, line in _documents(config) if config.corpus else _all_lines(config):
        texts.append(_text(line, config.text_field, where))
        labels.append(_label(line, config.label_field, where))
        if config.spurious_field is not None:
            spurious.append(_label(line, config.spurious_field, where))
    if config.spurious_field is None:
        return _chosen(config, texts, labels, None)
    for name, found in ((config.label_field, set(labels)), (config.spurious_field, set(spurious))):
        if len(found) != 2:
            raise TextError(
                f"with spurious_field, {name} must have two classes",
                ", ".join(sorted(found)[:5]) or "none",
                "Leave spurious_field out, or keep lines of two classes.",
            )
    together = Counter(zip(labels, spurious, strict=True))
    least = min(together.values()) if len(together) == 4 else 0
    if least < LEAST:
        raise TextError(
            f"with spurious_field, each combination of the two labels must have {LEAST} texts",
            f"{least}",
            "Give more labelled texts, or leave spurious_field out.",
        )
    return _chosen(config, texts, labels, spurious)


def _all_lines(config: ConceptsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of every file, and where it stands."""
    for path in config.labelled:
        for number, line in _lines(path):
            yield f"line {number} of {path}", line


def _documents(config: ConceptsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents whose labels are known, held out or not: nothing was ever trained on a label."""
    about = text.TextConfig(corpus=config.corpus)
    text.fetch(about)
    wanted = [name for name in (config.label_field, config.spurious_field) if name is not None]
    known: set[str] = set()
    n_found = 0
    for document in text.documents(about, "all"):
        line = {"language": document.language, "source": document.source, **document.tags}
        known |= {name for name, value in line.items() if value is not None}
        if all(line.get(name) is not None for name in wanted):
            n_found += 1
            yield f"document {document.id} of {document.source}", {**line, "text": document.text}
    if not n_found:
        raise TextError(
            f"documents of {', '.join(config.corpus)} must have {' and '.join(wanted)}",
            f"none, but {', '.join(sorted(known))}",
            "Set --label-field to one of these.",
        )


def first_letters(config: ConceptsConfig, tokenizer: Any) -> Labelled:
    """Words of the vocabulary (a space and three or more lower-case letters) in a sentence, by their first letter.

    Raises:
        TextError: the vocabulary has no such words.
    """
    words = sorted({tokenizer.decode([token]) for token in range(len(tokenizer))})
    words = [
        word
        for word in words
        if word[:1] == " " and len(word) > 3 and word[1:].isascii() and word[1:].islower()
    ]
    words = [word for word in words if word[1:].isalpha()]
    return _chosen(config, [f"The word is{word}" for word in words], [word[1] for word in words], None)


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            "labelled texts must be a JSONL file", f"{path}: {error}", "Name another file."
        ) from None
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise TextError(f"line {number} of {path} must be JSON", str(error), "Mend that line.") from None
        if not isinstance(data, dict):
            raise TextError(f"line {number} of {path} must be an object", repr(data)[:60], "Mend that line.")
        found.append((number, data))
    return found


def _text(line: dict[str, Any], field: str, where: str) -> str:
    value = line.get(field)
    if not isinstance(value, str) or not value.strip():
        raise TextError(
            f"{where} must have a text in {field!r}",
            repr(value)[:60],
            f"It has {', '.join(line)}: set text_field.",
        )
    return value


def _label(line: dict[str, Any], field: str, where: str) -> str:
    value = line.get(field)
    bad = (
        value is None
        or isinstance(value, (dict, list))
        or (isinstance(value, float) and not math.isfinite(value))
    )
    if bad or not str(value).strip():
        raise TextError(
            f"{where} must have a label in {field!r}",
            repr(value)[:60] if field in line else "none",
            f"It has {', '.join(line)}: set label_field, or mend the line.",
        )
    return str(value)


def _chosen(
    config: ConceptsConfig, texts: list[str], labels: list[str], spurious: list[str] | None
) -> Labelled:
    """The most frequent classes, at most `max_per_class` texts each, drawn at random, in the order of the files."""
    counts = Counter(labels)
    big = [name for name, count in counts.most_common() if count >= LEAST]
    if len(big) < 2:
        found = ", ".join(f"{name} {count}" for name, count in counts.most_common(5))
        raise TextError(
            f"labels must have at least two classes of {LEAST} texts or more",
            found or "no labels",
            "Give more labelled texts.",
        )
    default = None if config.first_letter else MAX_CLASSES
    classes = tuple(big[: config.max_classes or default])
    rng = np.random.default_rng(config.seed)
    kept: list[int] = []
    groups = (
        [(one, None) for one in classes]
        if spurious is None
        else sorted(set(zip(labels, spurious, strict=True)))
    )
    for one, other in groups:
        own = [
            i for i, label in enumerate(labels) if label == one and (spurious is None or spurious[i] == other)
        ]
        kept += rng.permutation(own)[: config.max_per_class].tolist()
    kept.sort()
    left = {name: count for name, count in counts.items() if name not in classes}
    return Labelled(
        tuple(texts[i] for i in kept),
        tuple(labels[i] for i in kept),
        None if spurious is None else tuple(spurious[i] for i in kept),
        classes,
        left,
    )
