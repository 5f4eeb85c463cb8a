"""What can be chosen about effects. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.lm import ModelConfig

__all__ = ["EffectsConfig"]


class EffectsConfig(Config):
    """Which latents of which atlas, and how much of their effects is kept."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "atlas", "dictionary", "batch_rows", "snapshot_seconds"}
    )

    _opens = opens("dictionary")

    out: Path = Path("artifacts/latent_effects")
    """The folder to make."""
    atlas: Path = Path("artifacts/atlas")
    """The atlas whose examples are looked at."""
    dictionary: Path | None = None
    """The dictionary's folder; if not given, the one the atlas was made from, or `dictionary` beside the atlas."""
    model: ModelConfig = ModelConfig()
    """The language model, the one the dictionary was trained on."""
    latents: tuple[int, ...] = ()
    """Which latents; if none are named, n_latents of those that fire."""
    n_latents: int = Field(default=256, ge=1)
    """That many, spread evenly over the latents that fire in the order of their density; all if there are fewer."""
    every: bool = False
    """Every latent that fires."""
    n_top: int = Field(default=20, ge=1)
    """Examples of each latent that are ablated: its strongest in the atlas."""
    deciles: bool = False
    """The atlas's examples from each tenth of a latent's activations as well."""
    n_after: int = Field(default=2, ge=0)
    """Predictions after the position's own whose change of loss is summed."""
    n_shown: int = Field(default=5, ge=1)
    """Output tokens named at each end: those that rise most and fall most."""
    n_likeliest: int = Field(default=50, ge=1)
    """Only the so many likeliest tokens before the ablation and after it are named."""
    n_removals: int = Field(default=2, ge=0)
    """Of each latent's strongest examples, so many are read again without each token of the window before the peak."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts that go through the model at once."""
    snapshot_seconds: float = Field(default=60.0, ge=0)
    """How often what was found is saved, so that a killed run loses no more than that."""

    @model_validator(mode="after")
    def _one_choice_of_latents(self) -> EffectsConfig:
        if self.latents:
            self.check_inert("n_latents", "every", without="latents are named")
        if self.every:
            self.check_inert("n_latents", without="every latent is asked for")
        for latent in self.latents:
            if latent < 0:
                raise ConfigError("a latent must be >= 0", latent, "Change --latents.")
        if len(set(self.latents)) < len(self.latents):
            raise ConfigError(
                "each latent must be named once", " ".join(map(str, self.latents)), "Drop the repetition."
            )
        return self
