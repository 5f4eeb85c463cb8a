"""What can be chosen about explanations. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.judge import EndpointConfig, LocalConfig
from sememe.lm import ModelConfig
from sememe.options import changed

__all__ = ["ASKING", "SCORERS", "ExplainConfig", "LexicalConfig", "Scorer"]

Scorer = Literal["simulation", "detection", "fuzzing", "intruder", "embedding", "generation", "effect"]
SCORERS: tuple[Scorer, ...] = (
    "simulation", "detection", "fuzzing", "intruder", "embedding", "generation", "effect",
)  # fmt: skip
ASKING = frozenset(SCORERS) - {"embedding"}
"""Scorers that ask a language model."""
DEFAULT: tuple[Scorer, ...] = ("detection", "fuzzing")


class LexicalConfig(Config):
    """No language model: rules over tokens alone."""

    kind: Literal["lexical"] = "lexical"


class ExplainConfig(Config):
    """Which atlas, who explains, and how explanations are scored."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "atlas", "nulls", "effects", "dictionary"})

    _opens = opens("dictionary", model="subject")

    out: Path = Path("artifacts/explanations")
    """The folder to make."""
    atlas: Path = Path("artifacts/atlas")
    """The atlas whose latents are explained."""
    nulls: tuple[Path, ...] | None = None
    """Atlases of nulls, explained and scored in the same way. Left out: every folder null-* inside the atlas's."""
    explainer: Annotated[
        LexicalConfig | EndpointConfig | LocalConfig, pydantic.Field(discriminator="kind")
    ] = LexicalConfig()
    """Who explains. lexical: rules, no language model; endpoint: a server that speaks OpenAI's protocol; local: a
    language model in this process. Every latent gets its rule in any case."""
    scorers: tuple[Scorer, ...] | None = None
    """How words are scored beside the rules' own scores. Left out: detection and fuzzing where a model is asked."""
    n_latents: int = Field(default=100, ge=1)
    """Latents that scorers and the model are asked about, at random: one from each of as many strata of density."""
    latents: tuple[int, ...] = ()
    """These latents instead."""
    style: Literal["activations", "highlights"] = "activations"
    """How a model is shown examples: OpenAI's list of tokens with activations, or text with marked words."""
    show_deciles: bool = False
    """Show the explainer weak examples too, from every tenth of the activations."""
    effects: Path | None = None
    """Effects of this atlas (`sememe effects`): tell the explainer which context tokens an activation depends on."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Of the explanations; 0 always gives the same one. Scorers always ask at 0."""
    categories: bool = True
    """Ask the model which kind of thing each latent stands for."""
    dictionary: Path | None = None
    """For the scorer `generation`: the atlas's dictionary, through which the texts are run."""
    subject: ModelConfig = ModelConfig()
    """For the scorer `generation`: the model that the dictionary reads."""
    test_fraction: float = Field(default=0.4, gt=0, lt=1)
    """Share of the documents on which explanations are scored and not found. The same documents for every latent."""
    max_tokens: int = Field(default=8, ge=1, le=64)
    """Most tokens, or pairs of tokens, that one rule may list."""
    min_gain: float = Field(default=0.02, ge=0, le=1)
    """What each further token or condition must add to hit rate minus false-alarm rate on the training documents."""
    label_score: float = Field(default=0.4, ge=0, le=1)
    """Words that score less on the held-out documents are kept, but do not become the latent's label: rules by their
    own score, a model's words by the first of the scorers that reads them (simulation's top_and_random, generation's
    auroc)."""
    n_bootstrap: int = Field(default=1000, ge=1)
    """Resamplings of the latents behind each confidence interval."""
    seed: int = Field(default=0, ge=0)
    """Of the split of the documents, the choice of latents, what scorers draw, the nulls, and the bootstrap."""

    @property
    def used_scorers(self) -> tuple[Scorer, ...]:
        """The scorers chosen, in a fixed order."""
        chosen = self.scorers
        if chosen is None:
            chosen = () if isinstance(self.explainer, LexicalConfig) else DEFAULT
        return tuple(name for name in SCORERS if name in chosen)

    @model_validator(mode="after")
    def _no_inert_option(self) -> ExplainConfig:
        if isinstance(self.explainer, LexicalConfig):
            asking = sorted(ASKING.intersection(self.used_scorers))
            if asking:
                raise ConfigError(
                    "scorers that ask a language model need one as explainer",
                    f"{', '.join(asking)} with explainer lexical",
                    "Pass --explainer endpoint or --explainer local, or drop them.",
                )
            self.check_inert(
                "style",
                "show_deciles",
                "effects",
                "temperature",
                "categories",
                without="explainer is lexical",
            )
            if not self.used_scorers:
                self.check_inert(
                    "n_latents", "latents", without="rules alone are scored: they are for all latents"
                )
        if self.latents:
            self.check_inert("n_latents", without="latents are named")
            if len(set(self.latents)) < len(self.latents) or min(self.latents) < 0:
                raise ConfigError(
                    "latents must be different numbers from 0",
                    " ".join(map(str, self.latents)),
                    "Name each once.",
                )
        if "generation" in self.used_scorers:
            if self.dictionary is None:
                raise ConfigError(
                    "the scorer generation needs the dictionary",
                    "none",
                    "Pass --dictionary, or drop the scorer.",
                )
            n_latents = len(self.latents) if self.latents else self.n_latents
            if n_latents < 2:
                raise ConfigError(
                    "the scorer generation needs two latents or more: texts for one are held against those for another",
                    n_latents,
                    "Name more latents, raise n_latents, or drop the scorer.",
                )
        else:
            self.check_inert("dictionary", without="generation is not among the scorers")
            for name, value in changed(self, "subject"):
                raise ConfigError(
                    f"{name} must be left out without the scorer generation: it has no effect then",
                    value,
                    "Drop it.",
                )
        return self
