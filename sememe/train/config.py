"""What a training run is told: its options, and which of them go together. Knows no dictionary and no data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.dictionaries import Architecture
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.lm import ModelConfig
from sememe.text import TextConfig, TokenPolicy
from sememe.tracking import Tracker

__all__ = ["TrainConfig", "learning_rate"]


class TrainConfig(Config):
    """What to train, on what, and for how long."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"store", "out", "checkpoint_every_seconds", "track", "log_every", "threads"}
    )

    store: Path = Path("artifacts/store")
    """The store to train on."""
    out: Path = Path("artifacts/dictionary")
    """The folder to make."""
    architecture: Architecture = TopKConfig()
    """Which dictionary, with its options."""
    inputs: tuple[str, ...] | None = None
    """Hookpoints whose concatenation is encoded; the store's only one if not given."""
    outputs: tuple[str, ...] | None = None
    """Hookpoints whose concatenation is reconstructed; the inputs if not given (an autoencoder)."""
    n_tokens: int | None = Field(default=None, ge=1)
    """Rows to train on; `epochs` passes over the store if not given."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the store; 1 if n_tokens is not given either."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows per step."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate; 1.2e-3 / sqrt(d_sae / 4096) if not given."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the run over which the learning rate rises from 0."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Share of the run, at its end, over which the learning rate falls to 0."""
    scale: bool = True
    """Divide activations by their root mean square distance from the mean while training; folded back after."""
    seed: int = 0
    """Of the initial weights and the data's order."""
    log_every: int = Field(default=50, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock time between checkpoints."""
    track: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb, trackio."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if not given."""
    live: bool = False
    """Train straight from the language model, through a shuffle buffer in memory, instead of from a store."""
    buffer_mb: int = Field(default=512, ge=1)
    """Memory of the shuffle buffer of a live run."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward of a live run."""
    model: ModelConfig = ModelConfig()
    """The language model of a live run."""
    text: TextConfig = TextConfig()
    """The corpus of a live run."""
    policy: TokenPolicy = TokenPolicy()
    """Which positions a live run keeps."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.n_tokens is not None and self.epochs is not None:
            raise ConfigError(
                "n_tokens and epochs both say how long to train: only one may be given",
                f"{self.n_tokens} and {self.epochs:g}",
                "Drop one of them.",
            )
        if self.warmup + self.decay > 1:
            raise ConfigError(
                "warmup + decay must be <= 1", f"{self.warmup:g} + {self.decay:g}", "Lower one of them."
            )
        return self

    @model_validator(mode="after")
    def _no_inert_option(self) -> TrainConfig:
        if self.live:
            if self.store != type(self).model_fields["store"].default:
                raise ConfigError(
                    "store must be left out when live",
                    self.store,
                    "A live run reads the model itself; drop one.",
                )
            if self.n_tokens is None:
                raise ConfigError(
                    "n_tokens must be given when live",
                    "nothing",
                    "A live stream has no end: pass --n-tokens.",
                )
            if self.inputs is None:
                raise ConfigError(
                    "inputs must be given when live", "nothing", "Name a hookpoint: --inputs resid_post.8."
                )
        else:
            for name in ("buffer_mb", "batch_rows", "model", "text", "policy"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ConfigError(
                        f"{name} must be left out unless live is set",
                        getattr(self, name),
                        "A store brings its own; drop it.",
                    )
        return self


def learning_rate(config: TrainConfig, d_sae: int) -> float:
    """The peak learning rate. Source: the 1/sqrt(width) rule of Gao et al. 2024, appendix A.3."""
    return config.lr if config.lr is not None else 1.2e-3 / math.sqrt(d_sae / 4096)
