"""What can be chosen about steering. Knows options and their ranges; steers nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.labelled import LabelledConfig
from sememe.lm import ModelConfig
from sememe.text import TextConfig, TokenPolicy

__all__ = ["SteerConfig", "Style"]

Style = Literal["add", "orthogonal", "clamp", "cap"]


class SteerConfig(LabelledConfig):
    """Which latents to turn up and how far, beside what, and what to look for in the text that comes out."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "dictionary", "labelled", "corpus", "batch_rows"}
    )

    _opens = opens("dictionary")

    dictionary: Path
    """The dictionary whose latents."""
    latents: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Which; several are turned up together, each in multiples of its own largest activation."""
    out: Path = Path("artifacts/steering")
    """The folder to make."""
    model: ModelConfig = ModelConfig()
    """The language model that the dictionary belongs to."""
    policy: TokenPolicy | None = None
    """The token policy, for dictionaries that do not say which they were trained with."""
    style: Style = "add"
    """add: the direction, to every position. orthogonal: the same, once what lies along it is taken out. clamp: a
    latent's activation is set. cap: what lies along it is raised to at least the dose (lowered, for a dose below 0)."""
    strengths: tuple[float, ...] = Field(default=(-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)
    """Doses, in multiples of the latent's largest activation on the text."""
    prompts: tuple[str, ...] = Field(
        default=("The", "I think that", "This is a story about", "Yesterday we", "My favourite"),
        min_length=1,
    )
    """Texts that the model goes on from."""
    before: str | None = None
    """A text put before each prompt instead of steering: what a prompt alone does."""
    n_random: int = Field(default=2, ge=0)
    """Random directions of the same length, beside the latents'."""
    towards: str | None = None
    """With labelled texts: the label to steer to; the most frequent, if not given."""
    new_tokens: int = Field(default=40, ge=1)
    """Tokens of each continuation."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the continuations; 0 takes the likeliest token."""
    n_samples: int = Field(default=4, ge=1)
    """Continuations of each prompt at each dose; 1 at temperature 0."""
    target_tokens: tuple[str, ...] = ()
    """Look for: the probability that the steered model gives the first token of each of these."""
    words: tuple[str, ...] = ()
    """Look for: the share of words that are among these."""
    pattern: str | None = None
    """Look for: the share of continuations in which this regular expression is found."""
    text: TextConfig = TextConfig()
    """Where the latents' largest activations are looked for: its held-out documents."""
    n_tokens: int = Field(default=20_000, ge=1)
    """Of that text."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of prompts for the 95% intervals; 0 gives none."""

    @property
    def has_labels(self) -> bool:
        """Whether there are labelled texts."""
        return bool(self.labelled or self.corpus)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.labelled and self.corpus:
            raise ConfigError(
                "labels must come from files or from corpora", "labelled and corpus", "Drop one of them."
            )
        if self.corpus:
            self.check_inert("text_field", without="texts are a corpus's documents")
        if not self.has_labels:
            inert = ("text_field", "label_field", "max_per_class", "max_classes", "towards")
            self.check_inert(*inert, without="there are no labelled texts")
        if len(set(self.latents)) != len(self.latents):
            raise ConfigError("each latent must be named once", self.latents, "Leave the repeats out.")
        if len(set(self.strengths)) != len(self.strengths):
            raise ConfigError("strengths must be different", self.strengths, "Leave the repeats out.")
        for name in ("prompts", "words", "target_tokens"):
            if not all(one.strip() for one in getattr(self, name)):
                raise ConfigError(f"{name} must not be empty", getattr(self, name), f"Change {name}.")
        if self.before is not None and not self.before.strip():
            raise ConfigError("before must not be empty", repr(self.before), "Leave it out, or write a text.")
        if self.temperature == 0:
            self.check_inert("n_samples", without="temperature is 0")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ConfigError(
                    "pattern must be a regular expression", f"{self.pattern!r}: {error}", "Mend it."
                ) from None
        return self

    def samples(self) -> int:
        """Continuations of each prompt at each dose."""
        return self.n_samples if self.temperature > 0 else 1
