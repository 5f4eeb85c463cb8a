"""What can be chosen about a model from scratch. Knows options and their ranges; trains nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sememe.config import Config
from sememe.errors import ConfigError, nearest
from sememe.lm.build import PRESETS, GPT2Shape, Shape
from sememe.text import TextConfig
from sememe.tracking import Tracker

__all__ = ["PROMPT_TOKENS", "PretrainConfig"]

PROMPT_TOKENS = 8
"""Tokens of a held-out row that a sample goes on from."""


class PretrainConfig(Config):
    """Which model to train, on what, and for how long."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "checkpoint_every_seconds", "track", "log_every", "threads"}
    )

    out: Path = Path("artifacts/model")
    """The folder to make."""
    architecture: Shape = GPT2Shape()
    """The model's layers, or the name of a preset: bricken, shehper or nanda."""
    text: TextConfig = TextConfig()
    """The corpus."""
    tokenizer: str | None = None
    """A tokenizer's folder or hub name; a byte-level BPE is trained on the corpus if not given."""
    vocab_size: int | None = Field(default=None, ge=257)
    """Tokens of the BPE, 8192 if not given; only without `tokenizer`."""
    tokenizer_chars: int | None = Field(default=None, ge=1)
    """Characters of the corpus from which the BPE is trained, 20,000,000 if not given; only without `tokenizer`."""
    context_length: int = Field(default=256, ge=2)
    """Tokens per row, and the model's longest context."""
    n_tokens: int = Field(default=20_000_000, ge=1)
    """Tokens to train on; the corpus is passed over as often as that takes, in a new order each time."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows per optimiser step."""
    micro_rows: int | None = Field(default=None, ge=1)
    """Rows per forward, whose gradients are added up to a step. If not given, batch_rows, and on a CPU as many as keep
    the logits below 32 MB."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    lr_floor: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    warmup: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the products (weights stay float32). auto: bfloat16 where the device multiplies it natively."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the CUDA device if there is one, else the CPU."""
    validation_tokens: int = Field(default=100_000, ge=1)
    """Held-out tokens on which the validation loss is measured."""
    n_validations: int = Field(default=5, ge=1)
    """Times the validation loss is measured, evenly over the run; the last is at its end."""
    n_samples: int = Field(default=4, ge=0)
    """Continuations of held-out texts to write down at the end."""
    sample_tokens: int = Field(default=64, ge=1)
    """Length of each."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the order of the rows, and the samples."""
    log_every: int = Field(default=20, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock time between checkpoints."""
    track: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb, trackio."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if not given."""

    @field_validator("architecture", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in PRESETS:
            raise ConfigError("a preset must be one that is there", repr(value), nearest(value, PRESETS))
        return PRESETS[value]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option in ("vocab_size", "tokenizer_chars"):
            if self.tokenizer is not None and getattr(self, option) is not None:
                raise ConfigError(
                    f"{option} must be left out with an existing tokenizer",
                    self.tokenizer,
                    f"Drop {option} or tokenizer.",
                )
        if self.micro_rows is not None and self.batch_rows % self.micro_rows:
            raise ConfigError(
                f"micro_rows must divide batch_rows={self.batch_rows}", self.micro_rows, "Change one of them."
            )
        if self.n_samples and PROMPT_TOKENS + self.sample_tokens > self.context_length:
            raise ConfigError(
                f"sample_tokens must be <= context_length - {PROMPT_TOKENS} = {self.context_length - PROMPT_TOKENS}",
                self.sample_tokens,
                "Lower sample_tokens, raise context_length, or set n_samples to 0.",
            )
        return self

    @property
    def n_bpe(self) -> int:
        """Tokens of the BPE that is trained where no tokenizer is given."""
        return self.vocab_size or 8192

    @property
    def n_steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.n_tokens // (self.batch_rows * self.context_length))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = self.warmup * self.n_steps
        if step < rise:
            return self.lr * (step + 1) / max(rise, 1.0)
        share = (step - rise) / max(self.n_steps - rise, 1.0)
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * share)))
