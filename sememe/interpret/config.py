"""What can be chosen about an atlas. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sememe.atlas import RANDOMISED
from sememe.config import Config
from sememe.errors import ConfigError, nearest
from sememe.foreign import opens
from sememe.lm import ModelConfig
from sememe.measure.config import NULLS
from sememe.options import changed
from sememe.text import TextConfig

__all__ = ["RANDOMISED", "InterpretConfig"]

KNOWN = (*NULLS, RANDOMISED)


class InterpretConfig(Config):
    """Which dictionary, over which text, and how many examples to keep."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "dictionaries", "against", "store", "lens", "nulls", "batch_rows", "snapshot_seconds"}
    )

    _opens = opens("dictionaries", "against")

    out: Path = Path("artifacts/atlas")
    """The folder to make; of several dictionaries, the folder that holds an atlas of each."""
    dictionaries: tuple[Path, ...] = (Path("artifacts/dictionary"),)
    """One or several dictionaries, or folders of such (a sweep's, say): one forward serves them all."""
    against: tuple[Path, ...] = ()
    """Other dictionaries of the same hookpoint among whose latents the nearest are looked for, too."""
    nulls: tuple[str, ...] = ()
    """Controls of which atlases are made as well, in null-NAME inside each atlas's folder: pca, ica, rica, nmf,
    identity, neurons, random_directions, untrained (each with as many latents active), and randomised: the
    dictionary itself, on the model with its weights shuffled."""
    n_fit_rows: int = Field(default=65_536, ge=2)
    """Training rows that nulls are fitted to."""
    model: ModelConfig = ModelConfig()
    """The language model, the one the dictionary was trained on."""
    store: Path | None = None
    """Go over the text of this store and read its activations, instead of running the model over `text`."""
    text: TextConfig = TextConfig()
    """The corpus."""
    split: Literal["train", "heldout", "all"] = "all"
    """Which documents: train, heldout, or all."""
    n_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens that go through the model; a little fewer are kept."""
    n_top: int = Field(default=20, ge=1)
    """Largest activations shown of each latent, one per document, of whose pieces the strongest counts."""
    n_decile: int = Field(default=3, ge=0)
    """Examples shown from each tenth of a latent's activations, one per document."""
    n_random: int = Field(default=20, ge=0)
    """Windows shown in which the latent is silent, one per document."""
    n_reservoir: int = Field(default=200, ge=10)
    """Uniform sample of each latent's activations from which the examples of the tenths are drawn."""
    n_logits: int = Field(default=15, ge=1)
    """Output tokens shown at each end of a latent's direct effect."""
    n_top_tokens: int = Field(default=10, ge=1, le=128)
    """Tokens shown that hold most of a latent's activation, with its mean on each."""
    n_neighbours: int = Field(default=14, ge=1)
    """Nearest directions kept of each latent, of every kind."""
    n_coactive: int = Field(default=10, ge=1)
    """Latents kept with which a latent is active most, of the whole dictionary."""
    coactive_tokens: int = Field(default=1_000_000, ge=1)
    """Pairs of latents are counted on all tokens up to so many, and on a sample of about so many of a longer text."""
    map: bool = True
    """Lay the directions out on a map (UMAP) and find groups on it (HDBSCAN)."""
    lens: Path | None = None
    """A tuned lens of the model, as `sememe lens` trains it: what each latent writes is read through it, too."""
    n_bins: int = Field(default=40, ge=2)
    """Bars of the histogram of activations."""
    before: int = Field(default=40, ge=0)
    """Tokens of an example's window before the peak."""
    after: int = Field(default=24, ge=0)
    """Tokens of an example's window after the peak."""
    seed: int = Field(default=0, ge=0)
    """Of the random choices."""
    batch_rows: int = Field(default=64, ge=1)
    """Contexts per forward."""
    snapshot_seconds: float = Field(default=60.0, ge=0)
    """How often the state is saved, so that an interrupted run loses no more than that."""

    @field_validator("dictionaries", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("nulls")
    @classmethod
    def _known_nulls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in KNOWN:
                raise ConfigError("a null must be a known one", repr(name), nearest(name, KNOWN))
        if len(set(value)) != len(value):
            raise ConfigError("each null must be named once", ", ".join(value), "Leave the repeats out.")
        return value

    @model_validator(mode="after")
    def _no_inert_option(self) -> InterpretConfig:
        if not set(self.nulls) - {RANDOMISED}:
            self.check_inert("n_fit_rows", without="no null is fitted to rows")
        if RANDOMISED in self.nulls and self.model.randomise != "none":
            raise ConfigError(
                "the null randomised shuffles a model's weights, which must not be shuffled already",
                f"--randomise {self.model.randomise}",
                "Drop one of the two.",
            )
        if self.store is not None:
            for name, value in changed(self, "text", "split", "n_tokens"):
                raise ConfigError(
                    f"{name} must be left out when store is given",
                    value,
                    "A store brings its own text; drop one of the two.",
                )
        return self
