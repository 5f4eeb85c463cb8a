"""What a training run is told: its options, and which of them go together. Knows no dictionary and no data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from sememe.config import Config
from sememe.dictionaries import Architecture
from sememe.dictionaries.topk import TopKConfig
from sememe.end_to_end import EndToEndConfig
from sememe.errors import ConfigError
from sememe.lm import ModelConfig
from sememe.optimiser import AdamConfig, OptimiserConfig
from sememe.options import changed
from sememe.text import TextConfig, TokenPolicy
from sememe.tracking import Tracker

__all__ = ["TrainConfig", "learning_rate"]


OF_LIVE_RUNS = ("buffer_mb", "batch_rows", "positions_per_context", "model", "text", "policy", "end_to_end")
"""Options that have no effect on a store, which brings its own."""
FEW_TOKENS = 512
"""On which a live run watches cross-entropy unless told otherwise. On SmolLM2 a third of a second each time, and the
share that is recovered varies by 0.012 from one set of so many tokens to the next."""


class TrainConfig(Config):
    """What to train, on what, and for how long."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {
            *("store", "join", "out", "checkpoint_every_seconds", "track", "log_every", "threads", "devices"),
            *("watch_every", "watch_ce_tokens"),
        }
    )
    shared: ClassVar[frozenset[str]] = frozenset(
        {
            *("store", "join", "out", "n_tokens", "epochs", "batch_size", "data_seed", "log_every"),
            *("checkpoint_every_seconds", "track", "threads", "devices", "sweep"),
            *("live", *OF_LIVE_RUNS),
            *("watch_rows", "watch_every", "watch_ce_tokens"),
        }
    )
    """Options that all dictionaries of a sweep have in common: they say what the one stream is, or how it runs."""

    store: Path = Path("artifacts/store")
    """The store to train on."""
    join: tuple[Path, ...] = ()
    """Stores of other models over the same text, whose rows are joined to the store's: a crosscoder of models."""
    out: Path = Path("artifacts/dictionary")
    """The folder to make."""
    architecture: Architecture = TopKConfig()
    """Which dictionary, with its options."""
    inputs: tuple[str, ...] | None = None
    """Hookpoints whose concatenation is encoded; the store's only one if not given. Of joined stores, all that have
    it; `resid_post.8@1` is the second store's."""
    outputs: tuple[str, ...] | None = None
    """Hookpoints whose concatenation is reconstructed; the inputs if not given (an autoencoder)."""
    n_tokens: int | None = Field(default=None, ge=1)
    """Rows to train on; `epochs` passes over the store if not given."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the store; 1 if n_tokens is not given either."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows per step."""
    optimiser: OptimiserConfig = AdamConfig()
    """How parameters are updated: adam, signum or muon."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate; if not given, what the optimiser's rule says for the width and the architecture."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the run over which the learning rate rises from 0."""
    decay: float | None = Field(default=None, ge=0, le=1)
    """Share of the run, at its end, over which the learning rate falls to 0; 0.3 if not given, with signum 0."""
    freeze_above: float | None = Field(default=None, gt=0, le=1)
    """Freeze latents whose decoder row has at least this cosine to what it was one comparison ago."""
    freeze_every_tokens: int | None = Field(default=None, ge=1)
    """Training rows between comparisons; a tenth of the run if not given."""
    keep_checkpoints: bool = False
    """Keep the dictionary as it is after 1, 2, 4, 8, ... steps, in its folder's checkpoints/."""
    keep_every_tokens: int | None = Field(default=None, ge=1)
    """Keep it after every so many training rows, too."""
    scale: bool = True
    """Divide activations by their root mean square distance from the mean while training; folded back after."""
    seed: int = 0
    """Of the initial weights, and of the data's order unless data_seed is given."""
    data_seed: int | None = None
    """Of the data's order."""
    log_every: int = Field(default=50, ge=1)
    """Steps between lines of metrics.jsonl."""
    watch_rows: int = Field(default=4096, ge=0)
    """Rows held out of training, and measured while it goes on; never more than one in twenty. 0 watches none."""
    watch_every: int = Field(default=50_000, ge=1)
    """Tokens between two measurements on them."""
    watch_ce_tokens: int | None = Field(default=None, ge=0)
    """Tokens of held-out documents on which ce_recovered_zero is watched; needs the language model. If not given, 512
    in a live run, which has it at hand, and none in a run from a store, which would have to load it."""
    checkpoint_every_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock time between checkpoints."""
    track: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb, trackio."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if not given. With several devices: of each process."""
    devices: tuple[str, ...] = ()
    """Where to train: cpu, cuda, cuda:1, mps. Several share the dictionaries of a sweep, a process for each."""
    sweep: tuple[str, ...] = ()
    """A dictionary per combination, all from one stream: k=16,32 seed=0,1. Lists are joined by +; globs in inputs."""
    live: bool = False
    """Train straight from the language model, through a shuffle buffer in memory, instead of from a store."""
    buffer_mb: int = Field(default=512, ge=1)
    """Memory of the shuffle buffer of a live run."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward of a live run."""
    positions_per_context: int | None = Field(default=None, ge=1)
    """Of a live run, at most this many of a context's positions, at random; all that the policy keeps if not given."""
    model: ModelConfig = ModelConfig()
    """The language model of a live run."""
    text: TextConfig = TextConfig()
    """The corpus of a live run."""
    policy: TokenPolicy = TokenPolicy()
    """Which positions a live run keeps."""
    end_to_end: EndToEndConfig = EndToEndConfig()
    """What a live run is trained for besides the dictionary's own loss."""

    @field_validator("sweep", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        """A table of a recipe, option = [values], as the texts of the command line."""
        if not isinstance(value, dict):
            return value
        return tuple(
            f"{name}={','.join(_text(v) for v in (values if isinstance(values, list | tuple) else [values]))}"
            for name, values in value.items()
        )

    @field_validator("devices")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for device in value:
            if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
                raise ConfigError(
                    "a device must be cpu, mps, cuda or cuda:N", repr(device), "Change --devices."
                )
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.n_tokens is not None and self.epochs is not None:
            raise ConfigError(
                "n_tokens and epochs both say how long to train: only one may be given",
                f"{self.n_tokens} and {self.epochs:g}",
                "Drop one of them.",
            )
        if self.warmup + self.decay_share > 1:
            raise ConfigError(
                "warmup + decay must be <= 1", f"{self.warmup:g} + {self.decay_share:g}", "Lower one of them."
            )
        return self

    @property
    def ce_tokens(self) -> int:
        """`watch_ce_tokens`, or what is cheap: nothing where no model is at hand, or nothing else is watched."""
        if self.watch_ce_tokens is not None:
            return self.watch_ce_tokens
        return FEW_TOKENS if self.live and self.watch_rows and self.text.heldout_fraction else 0

    @property
    def decay_share(self) -> float:
        """`decay`, or what the optimiser wants."""
        return self.optimiser.default_decay if self.decay is None else self.decay

    @model_validator(mode="after")
    def _snapshots_have_an_effect(self) -> TrainConfig:
        if self.freeze_every_tokens is not None and self.freeze_above is None:
            raise ConfigError(
                "freeze_every_tokens must be left out unless freeze_above is given",
                self.freeze_every_tokens,
                "Drop it, or pass --freeze-above.",
            )
        if self.keep_every_tokens is not None and not self.keep_checkpoints:
            raise ConfigError(
                "keep_every_tokens must be left out unless keep_checkpoints is set",
                self.keep_every_tokens,
                "Drop it, or pass --keep-checkpoints.",
            )
        return self

    @model_validator(mode="after")
    def _something_is_watched(self) -> TrainConfig:
        if not self.watch_rows and not self.watch_ce_tokens:
            default = type(self).model_fields["watch_every"].default
            if self.watch_every != default:
                raise ConfigError(
                    "watch_every must be left out when nothing is watched",
                    self.watch_every,
                    "Drop it, or raise watch_rows.",
                )
        return self

    @model_validator(mode="after")
    def _no_inert_option(self) -> TrainConfig:
        if self.live:
            for name in ("store", "join"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ConfigError(
                        f"{name} must be left out when live",
                        getattr(self, name),
                        "A live run reads the model itself; drop one.",
                    )
            if self.n_tokens is None:
                raise ConfigError(
                    "n_tokens must be given when live",
                    "nothing",
                    "A live stream has no end: pass --n-tokens.",
                )
            swept = any(re.match(r"-*inputs\s*=", entry) for entry in self.sweep)
            if self.inputs is None and not swept:
                raise ConfigError(
                    "inputs must be given when live", "nothing", "Name a hookpoint: --inputs resid_post.8."
                )
        else:
            for name, value in changed(self, *OF_LIVE_RUNS):
                raise ConfigError(
                    f"{name} must be left out unless live is set", value, "A store brings its own; drop it."
                )
        if self.end_to_end.objective != "local":
            self._check_end_to_end()
        return self

    def _check_end_to_end(self) -> None:
        for name in ("buffer_mb", "batch_rows", "positions_per_context", "data_seed"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"{name} must be left out when the objective is {self.end_to_end.objective}",
                    getattr(self, name),
                    "Whole contexts go straight into a step, in the text's own order; drop it.",
                )
        if len(self.devices) > 1:
            raise ConfigError(
                "devices must be one when trained end to end: the language model is there",
                ", ".join(self.devices),
                "Name one.",
            )


def _text(value: Any) -> str:
    """A value of a recipe's sweep as it would be typed."""
    if isinstance(value, list | tuple):
        return "+".join(_text(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def learning_rate(config: TrainConfig, d_sae: int) -> float:
    """The peak learning rate: as given, or by the optimiser's rule for the width and, with Adam, the architecture."""
    if config.lr is not None:
        return config.lr
    factor = config.architecture.rate_factor if config.optimiser.kind == "adam" else 1.0
    return factor * config.optimiser.learning_rate(d_sae)
