"""What can be chosen about text and tokens. Knows options and their ranges; reads nothing."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import pydantic

from sememe.config import Config
from sememe.errors import ConfigError

__all__ = ["TextConfig", "TokenPolicy"]


class TokenPolicy(Config):
    """How documents become rows of tokens, and which positions count. Stored in every artifact that depends on it."""

    context_length: int = pydantic.Field(default=128, ge=2)
    """Tokens per row."""
    bos: bool = False
    """Start every row with the tokenizer's beginning-of-sequence token."""
    packing: bool = True
    """Documents one after the other, end-of-sequence tokens between them. If false, a row holds tokens of one document
    only, padded at its end; a document longer than a row goes on in further rows."""
    drop_positions: int = pydantic.Field(default=1, ge=0)
    """Leading positions of each row that are not kept (the first is an attention sink whatever stands there)."""
    drop_special: bool = True
    """Do not keep special tokens (beginning and end of sequence, turns of a chat)."""
    max_norm_ratio: float | None = pydantic.Field(default=5.0, gt=0)
    """Rows of activations whose norm exceeds this times the median are dropped, by whoever has the activations."""

    @pydantic.model_validator(mode="after")
    def _some_position_is_kept(self) -> Self:
        if self.drop_positions >= self.context_length:
            raise ConfigError(
                f"drop_positions must be below context_length={self.context_length}",
                self.drop_positions,
                "Lower drop_positions or raise context_length.",
            )
        return self


class TextConfig(Config):
    """Which text, mixed and split how."""

    corpus: tuple[str, ...] = ("default",)
    """Names of embedded corpora, files (.txt, .jsonl, .parquet, also .gz), folders, globs, fsspec URLs, or data sets
    as hf://owner/name[@revision][:config][/split]."""
    weights: tuple[float, ...] | None = None
    """Share of the tokens from each corpus, in any unit; equal shares if not given. When a corpus runs out, the others
    go on in their proportions."""
    text_field: str = "text"
    """The field of a .jsonl line, a .parquet column or a data set that holds the text."""
    title_field: str = "title"
    """The field that holds a document's title, where there is one."""
    language_field: str = "language"
    """The field that holds a document's language, where there is one."""
    tag_fields: tuple[str, ...] = ()
    """Further fields to carry along as tags."""
    chat_template: bool = False
    """The documents are conversations: lists of {role, content} that the tokenizer's chat template turns into text."""
    messages_field: str = "messages"
    """The field that holds a conversation, with chat_template."""
    max_document_chars: int = pydantic.Field(default=20_000, ge=0)
    """Longer documents are cut at paragraph boundaries into documents of at most this many characters; 0: never.
    Embedded corpora come cut to 3,000 bytes."""
    heldout_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Share of the documents that are held out, chosen by a hash of the document's text."""
    split_by: Literal["document", "piece"] = "document"
    """What is held out together: whole documents as they were before cutting, or single pieces (for one long file)."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Order of the documents and rows. Does not change what is held out."""
    shuffle_documents: int = pydantic.Field(default=10_000, ge=1)
    """Size of the buffer from which documents of files are drawn at random (embedded corpora are shuffled whole)."""

    def separation(self, split: str) -> dict[str, Any]:
        """What decides which documents are read and which are held out: remembered by what is made from them."""
        return {
            "split": split,
            "heldout_fraction": self.heldout_fraction,
            "split_by": self.split_by,
            "max_document_chars": self.max_document_chars,
        }

    @pydantic.model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if not self.corpus or not all(name.strip() for name in self.corpus):
            raise ConfigError(
                "corpus must name at least one corpus", repr(self.corpus), "Leave it out for the default one."
            )
        if len(set(self.corpus)) != len(self.corpus):
            raise ConfigError(
                "corpus must name each corpus once", repr(self.corpus), "Use weights to give one more room."
            )
        if self.weights is not None:
            if len(self.weights) != len(self.corpus):
                raise ConfigError(
                    f"weights must have one number for each of the {len(self.corpus)} corpora",
                    f"{len(self.weights)} numbers",
                    "Give as many weights as corpora.",
                )
            if not all(math.isfinite(w) and w > 0 for w in self.weights):
                raise ConfigError(
                    "weights must be > 0", repr(self.weights), "Leave a corpus out instead of giving it 0."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _no_option_without_effect(self) -> Self:
        if self.weights is not None and len(self.corpus) == 1:
            raise ConfigError(
                "weights must go with several corpora", repr(self.weights), "Leave weights out."
            )
        if not self.chat_template and self.messages_field != "messages":
            raise ConfigError(
                "messages_field must go with chat_template", repr(self.messages_field), "Set chat_template."
            )
        if self.chat_template and self.text_field != "text":
            raise ConfigError(
                "text_field must not go with chat_template",
                repr(self.text_field),
                "Set messages_field instead.",
            )
        if self.split_by == "piece" and not self.max_document_chars:
            raise ConfigError(
                "split_by='piece' must go with max_document_chars > 0", 0, "Raise max_document_chars."
            )
        return self
