"""What can be chosen about interventions. Knows options and their ranges; changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.lm import ModelConfig
from sememe.text import TextConfig

__all__ = ["InterveneConfig"]


class InterveneConfig(Config):
    """Which latents to ablate and to steer with, on what text."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "dictionary", "batch_rows"})

    _opens = opens("dictionary")

    out: Path = Path("artifacts/effects")
    """The folder to make."""
    dictionary: Path = Path("artifacts/dictionary")
    """The dictionary's folder."""
    latents: tuple[int, ...] = Field(default=(0,), min_length=1)
    """The latents to look at."""
    model: ModelConfig = ModelConfig()
    """The language model, the one the dictionary was trained on."""
    ablation: Literal["zero", "mean"] = "zero"
    """What an ablated latent is set to: zero, or its mean over the text."""
    error: Literal["keep", "drop"] = "keep"
    """keep: what the dictionary does not reconstruct stays in the model. drop: only the reconstruction does."""
    text: TextConfig = TextConfig()
    """Where latents are looked for."""
    split: Literal["train", "heldout", "all"] = "heldout"
    """Which documents: train, heldout, or all."""
    n_tokens: int = Field(default=200_000, ge=1)
    """Tokens in which each latent's contexts are looked for."""
    n_contexts: int = Field(default=32, ge=1)
    """Contexts per latent in which it is ablated: those with its largest activations, one per document."""
    n_shown: int = Field(default=10, ge=1)
    """Tokens and examples shown at each end."""
    prompts: tuple[str, ...] = ("The", "I think that", "This is a story about")
    """Texts that the steered model goes on from; none turns steering off."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """How much is added when steering, as multiples of the latent's largest activation on the text."""
    new_tokens: int = Field(default=40, ge=1)
    """Tokens of each continuation."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the continuations; 0 takes the likeliest token."""
    seed: int = Field(default=0, ge=0)
    """Of sampling and of the random directions that ablations are compared with."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.latents)) != len(self.latents):
            raise ConfigError("each latent must be named once", self.latents, "Leave the repeats out.")
        if self.prompts and not self.strengths:
            raise ConfigError(
                "strengths must not be empty with prompts", "none", "Give strengths, or no prompts."
            )
        if not all(math.isfinite(s) for s in self.strengths) or not all(self.prompts):
            raise ConfigError(
                "strengths must be finite and prompts not empty",
                (self.strengths, self.prompts),
                "Change them.",
            )
        return self
