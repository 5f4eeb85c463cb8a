"""What can be chosen about the view of a prompt. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.lm import ModelConfig

__all__ = ["PromptConfig", "PromptsConfig"]


class PromptConfig(Config):
    """Which text, which dictionary, and how much is shown."""

    _opens = opens("dictionary")

    prompt: str
    """The text."""
    dictionary: Path = Path("artifacts/dictionary")
    """The dictionary's folder."""
    model: ModelConfig = ModelConfig()
    """The language model, the one the dictionary was trained on."""
    atlas: Path | None = None
    """An atlas of the dictionary: says how strong an activation is for its latent, and how often that fires at all."""
    explanations: Path | None = None
    """Explanations of the atlas, for the latents' labels."""
    latents: tuple[int, ...] = ()
    """Show only these latents, wherever they fire."""
    n_latents: int = Field(default=5, ge=1)
    """Latents shown at each token: those that write most, by activation times the decoder direction's norm."""
    every: bool = False
    """Every latent that fires, at each token."""
    ablate: bool = True
    """Run the model again without each latent that is shown, at its token."""
    n_after: int | None = Field(default=None, ge=0)
    """Predictions after the token's own whose change of loss is summed; all up to the prompt's end if not given."""
    n_shown: int = Field(default=3, ge=1)
    """Output tokens named at each end: those that rise most and fall most."""
    n_likeliest: int = Field(default=50, ge=1)
    """Only the so many likeliest tokens before the ablation and after it are named."""
    out: Path | None = None
    """Write the rows into this .json file as well."""
    page: Path | None = None
    """Write a page into this .html file as well; it needs no other file."""

    @field_validator("out", "page")
    @classmethod
    def _named_for_what_it_is(cls, path: Path | None, info: object) -> Path | None:
        name = getattr(info, "field_name", "")
        suffix = {"out": ".json", "page": ".html"}[name]
        if path is not None and path.suffix != suffix:
            raise ConfigError(f"{name} must be a {suffix} file", path, f"End its name in {suffix}.")
        return path

    @model_validator(mode="after")
    def _no_inert_option(self) -> PromptConfig:
        if self.latents:
            self.check_inert("n_latents", "every", without="latents are named")
        if self.every:
            self.check_inert("n_latents", without="every latent is shown")
        if not self.ablate:
            self.check_inert("n_after", "n_shown", "n_likeliest", without="nothing is ablated")
        if self.explanations is not None and self.atlas is None:
            raise ConfigError(
                "explanations must go with the atlas they are of", self.explanations, "Pass --atlas as well."
            )
        return self


class PromptsConfig(Config):
    """Which dictionary some twenty chosen texts, or your own, are run through."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "dictionary", "atlas"})

    _opens = opens("dictionary")

    out: Path = Path("artifacts/prompts")
    """The folder to make."""
    dictionary: Path = Path("artifacts/dictionary")
    """The dictionary's folder."""
    model: ModelConfig = ModelConfig()
    """The language model, the one the dictionary was trained on."""
    atlas: Path | None = None
    """An atlas of the dictionary: says how strong an activation is for its latent."""
    texts: tuple[str, ...] = ()
    """Your own texts. None: the chosen ones, in several languages, with code, numbers, dates and quotations."""
