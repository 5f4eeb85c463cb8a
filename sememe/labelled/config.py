"""What can be chosen about labelled texts. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from sememe.config import Config

__all__ = ["LabelledConfig"]


class LabelledConfig(Config):
    """Which texts, and where their labels are."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"labelled", "corpus"})

    labelled: tuple[Path, ...] = ()
    """JSONL files, an object with a text and a label on each line."""
    corpus: tuple[str, ...] = ()
    """Instead: documents of these corpora, labelled by what is known of them (--label-field language, source, or a tag
    such as topic); those of which it is not known are left out."""
    text_field: str = "text"
    """Where a line's text is."""
    label_field: str = "label"
    """Where its label is: a text, a number or true/false."""
    max_per_class: int = Field(default=200, ge=20)
    """At most so many texts of a class, and as many others beside it."""
    max_classes: int | None = Field(default=None, ge=2)
    """So many of the most frequent classes are taken; 12, if not given."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of every draw."""
