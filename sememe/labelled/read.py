"""Texts and their labels: from JSONL files, a corpus, or words by their first letter. Knows no model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sememe import text
from sememe.errors import TextError
from sememe.labelled.config import LabelledConfig

__all__ = ["Labelled", "choose", "first_letters", "named", "read_labelled"]

LEAST = 20
"""Different texts that a class must have."""
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
    groups: tuple[str, ...]
    """What each text is of: texts of one group are never split. The text itself, if nothing else is said."""

    def units(self) -> Int[np.ndarray, " n"]:
        """The groups as numbers, in the order of their first texts."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(group, len(numbers)) for group in self.groups], dtype=np.int64)


def read_labelled(
    config: LabelledConfig, *, spurious_field: str | None = None, group_field: str | None = None
) -> Labelled:
    """Read the files, or the corpora's documents.

    Args:
        config: Which.
        spurious_field: Where a second, binary label is.
        group_field: Where it stands what a text is of: a document's name, a person's.

    Raises:
        TextError: a file is missing or no JSONL; a corpus is unknown, cannot be had, or knows no such label; a text or
            a label is missing, empty or NaN; there are fewer than two classes; a class is too small; the second label,
            or the first beside it, has not two classes.
    """
    fields = [name for name in (config.label_field, spurious_field, group_field) if name is not None]
    texts: list[str] = []
    found: dict[str, list[str]] = {name: [] for name in fields}
    for where, line in _documents(config, fields) if config.corpus else _all_lines(config):
        texts.append(_text(line, config.text_field, where))
        for name in dict.fromkeys(fields):
            found[name].append(_label(line, name, where))
    labels, groups = found[config.label_field], found[group_field] if group_field is not None else texts
    if spurious_field is None:
        return choose(config, texts, labels, groups)
    spurious = found[spurious_field]
    for name, values in ((config.label_field, set(labels)), (spurious_field, set(spurious))):
        if len(values) != 2:
            raise TextError(
                f"with spurious_field, {name} must have two classes",
                ", ".join(sorted(values)[:5]) or "none",
                "Leave spurious_field out, or keep lines of two classes.",
            )
    together = Counter((label, other) for _, label, other in set(zip(texts, labels, spurious, strict=True)))
    least = min(together.values()) if len(together) == 4 else 0
    if least < LEAST:
        raise TextError(
            f"with spurious_field, each combination of the two labels must have {LEAST} different texts",
            f"{least}",
            "Give more labelled texts, or leave spurious_field out.",
        )
    return choose(config, texts, labels, groups, spurious=spurious)


def named(config: LabelledConfig) -> list[str]:
    """The names of files, or of corpora with what their documents are labelled by."""
    return [path.name for path in config.labelled] or [
        f"{name}: {config.label_field}" for name in config.corpus
    ]


def _all_lines(config: LabelledConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of every file, and where it stands."""
    for path in config.labelled:
        for number, line in _lines(path):
            yield f"line {number} of {path}", line


def _documents(config: LabelledConfig, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents whose labels are known, held out or not: nothing was ever trained on a label."""
    about = text.TextConfig(corpus=config.corpus)
    text.fetch(about)
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


def first_letters(config: LabelledConfig, tokenizer: Any) -> Labelled:
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
    texts = [f"The word is{word}" for word in words]
    return choose(config, texts, [word[1] for word in words], words, most=None)


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


def choose(
    config: LabelledConfig,
    texts: Sequence[str],
    labels: Sequence[str],
    groups_of: Sequence[str],
    *,
    spurious: Sequence[str] | None = None,
    most: int | None = MAX_CLASSES,
) -> Labelled:
    """The most frequent classes, at most `max_per_class` texts each, drawn at random, in the order they are given in.

    Args:
        config: How many of each, and of which seed.
        texts: All of them.
        labels: A label each.
        groups_of: What each is of.
        spurious: A second label each; as many are then taken of each combination.
        most: Classes that are taken if the config does not say.

    Raises:
        TextError: fewer than two classes are large enough.
    """
    counts = Counter(labels)
    different = Counter(label for _, label in set(zip(texts, labels, strict=True)))
    big = [name for name, _ in counts.most_common() if different[name] >= LEAST]
    if len(big) < 2:
        found = ", ".join(f"{name} {count}" for name, count in different.most_common(5))
        raise TextError(
            f"labels must have at least two classes of {LEAST} different texts or more",
            found or "no labels",
            "Give more labelled texts.",
        )
    classes = tuple(big[: config.max_classes or most])
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
        tuple(groups_of[i] for i in kept),
    )
