"""What can be chosen about scrubbing. Knows options and their ranges; runs no model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.lm import ModelConfig
from sememe.text import Split, TextConfig

__all__ = ["Metric", "ScrubConfig"]

Metric = Literal["loss", "kl", "logit_difference"]


class ScrubConfig(Config):
    """Which circuit, on which inputs; whose downstream effects."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "dictionaries", "circuit", "pairs", "batch_rows"}
    )

    _opens = opens("dictionaries")

    dictionaries: tuple[Path, ...] = Field(min_length=1)
    """Dictionaries of one model, each of another hookpoint that it reads and writes."""
    out: Path = Path("artifacts/scrubbing")
    """The folder to make."""
    model: ModelConfig = ModelConfig()
    """The language model that the dictionaries belong to."""
    circuit: Path | None = None
    """The hypothesis to test, a .toml or .json file: latents by dictionary, or nodes and the edges between them.
    Without it only downstream effects are measured."""
    ioi: bool = False
    """Inputs are prompts in which one of two people gives something to the other, made for the model's tokenizer,
    instead of text."""
    pairs: Path | None = None
    """Inputs are the clean prompts of a file of pairs (as for `sememe patch`) instead of text."""
    n_prompts: int = Field(default=64, ge=2)
    """So many are made."""
    text: TextConfig = TextConfig()
    """The text whose contexts are inputs."""
    split: Split = "heldout"
    """Which of its documents: train, heldout, or all."""
    n_tokens: int = Field(default=8_192, ge=2)
    """Tokens of it."""
    metric: Metric | None = None
    """What the circuit is to recover. loss: cross-entropy of the next token. kl: divergence from the unedited model.
    logit_difference: of the answer from the wrong one, after the last token. If not given: loss on text,
    logit_difference on prompts."""
    error: Literal["keep", "resample"] = "keep"
    """What a dictionary does not reconstruct: keep leaves the input's own, resample takes it from the other input, too,
    as if it were no part of any circuit."""
    n_resamples: int = Field(default=10, ge=2)
    """How often every input is given another one to take activations from."""
    source: str | None = None
    """Whose latents' downstream effects are measured: a dictionary's name or hookpoint; the lowest if not given."""
    latents: tuple[int, ...] = ()
    """Those latents; if none are named, the n_latents that fire most often."""
    n_latents: int = Field(default=16, ge=0)
    """How many; 0 measures no downstream effects."""
    n_targets: int = Field(default=64, ge=1)
    """Of each later dictionary, so many latents are kept for each source: those that change most."""
    n_shown: int = Field(default=20, ge=1)
    """Edges listed on the page."""
    batch_rows: int = Field(default=16, ge=1)
    """Inputs per forward."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of resamples for the 95% intervals."""
    seed: int = Field(default=0, ge=0)
    """Of every draw."""

    @property
    def on_prompts(self) -> bool:
        """Whether inputs are prompts and not text."""
        return self.ioi or self.pairs is not None

    @property
    def metric_in_use(self) -> Metric:
        """What the circuit is to recover."""
        return self.metric or ("logit_difference" if self.on_prompts else "loss")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ioi and self.pairs is not None:
            raise ConfigError("prompts must be made or read", "ioi and pairs", "Drop one of the two.")
        if self.on_prompts:
            self.check_inert("split", "n_tokens", without="inputs are prompts")
        if not self.ioi:
            self.check_inert("n_prompts", without="no prompts are made (ioi)")
        if self.metric == "logit_difference" and not self.on_prompts:
            raise ConfigError(
                "the metric logit_difference must have prompts with answers",
                "text",
                "Pass --ioi or --pairs, or another metric.",
            )
        if self.metric == "loss" and self.on_prompts:
            raise ConfigError(
                "the metric loss is of text",
                "prompts",
                "Pass --metric kl or logit_difference, or drop --ioi and --pairs.",
            )
        if self.circuit is None:
            self.check_inert("metric", "error", "n_resamples", without="no circuit is tested")
            if not self.latents and not self.n_latents:
                raise ConfigError(
                    "a circuit to test or latents with downstream effects must be named",
                    "neither",
                    "Pass --circuit, or --n-latents above 0.",
                )
        if self.latents:
            self.check_inert("n_latents", without="latents are named")
            if len(set(self.latents)) < len(self.latents) or min(self.latents) < 0:
                raise ConfigError(
                    "latents must be numbers from 0 on, each named once",
                    ", ".join(map(str, self.latents)),
                    "Change --latents.",
                )
        elif not self.n_latents:
            self.check_inert("source", "n_targets", "n_shown", without="no downstream effects are measured")
        return self
