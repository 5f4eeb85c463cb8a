"""What can be chosen about patching. Knows options and their ranges; runs no model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.lm import ModelConfig
from sememe.text import TextConfig

__all__ = ["BASELINES", "FITTED", "Baseline", "Order", "PatchConfig"]

Baseline = Literal["pca", "pca_signs", "ica", "random_rotation", "random_directions", "difference_in_means"]
Order = Literal["attribution", "acdc", "random"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
FITTED = frozenset({"pca", "pca_signs", "ica", "random_directions"})
"""Baselines that are fitted to rows of activations."""


class PatchConfig(Config):
    """Which dictionaries, on which prompts, in which order."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "dictionaries", "pairs", "store", "batch_rows"}
    )

    _opens = opens("dictionaries")

    dictionaries: tuple[Path, ...] = Field(min_length=1)
    """Dictionaries of one hookpoint, sweeps, or folders that hold such."""
    out: Path = Path("artifacts/patching")
    """The folder to make."""
    model: ModelConfig = ModelConfig()
    """The language model that the dictionaries belong to."""
    pairs: Path | None = None
    """Pairs of one's own, a JSON object a line: clean, corrupted, and perhaps answer and wrong. If not given, sentences
    in which one of two people gives something to the other are made for the model's tokenizer."""
    n_pairs: int = Field(default=50, ge=2)
    """So many are made."""
    corruption: Literal["third", "swap"] = "third"
    """In those, what stands where a name is named again: third, a name that was not named; swap, that of the other."""
    names: tuple[str, ...] = ()
    """In those, names to use instead of the built-in ones; each must be a single token after a space."""
    direction: Literal["restore", "corrupt"] = "restore"
    """restore: the corrupted run is edited until it says what the clean one says. corrupt: the other way."""
    baselines: tuple[Baseline, ...] | None = None
    """Beside the dictionaries; all if not given, none for transcoders. pca: principal components. pca_signs: both signs
    of each, so that codes are not negative. ica: independent components. random_rotation: an orthonormal basis drawn at
    random. random_directions: as many as the first dictionary has latents, as many active. difference_in_means: the one
    direction of the mean difference of the two runs."""
    orders: tuple[Order, ...] = ("attribution", "acdc", "random")
    """In which order latents are patched. attribution: by what the gradient promises of each. acdc: taken out of the
    whole set one by one as long as that costs less than a threshold. random: a control."""
    attribution: Literal["kl", "logit_difference"] = "kl"
    """What the gradient is of: the divergence from the other run, or the answer's logit less the wrong one's."""
    attribution_steps: int = Field(default=1, ge=1)
    """Points on the way from the unedited run to the one with everything patched at which gradients are taken and
    averaged; 1 takes it at the unedited run."""
    acdc_limit: int = Field(default=128, ge=1)
    """acdc begins with so many, those to which attribution gives most."""
    n_thresholds: int = Field(default=50, ge=2)
    """Of acdc, from 1e-5 to 1 nat in equal ratios."""
    reference: int = Field(default=100, ge=1)
    """What the arms have to reach: the divergence with so many principal components patched, by attribution."""
    store: Path | None = None
    """The store that was trained on; baselines are fitted to its rows. Without it, to activations of the training
    documents, computed here. Not read if no baseline is fitted: a recipe names its store whatever is asked."""
    text: TextConfig = TextConfig()
    """Those documents."""
    n_fit_rows: int = Field(default=8192, ge=2)
    """Rows that baselines are fitted to; ica takes at least twice as many as there are dimensions."""
    batch_rows: int = Field(default=64, ge=1)
    """Prompts per forward."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of pairs for the 95% intervals."""
    seed: int = Field(default=0, ge=0)
    """Of every draw."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pairs is not None:
            self.check_inert("n_pairs", "corruption", "names", without="pairs are given")
        for name in ("baselines", "orders"):
            given = getattr(self, name) or ()
            if len(set(given)) != len(given):
                raise ConfigError(
                    f"each of {name} must be named once", ", ".join(given), "Leave the repeats out."
                )
        if not self.orders:
            raise ConfigError("orders must name at least one", "none", "Name attribution.")
        if "acdc" not in self.orders:
            self.check_inert("acdc_limit", "n_thresholds", without="acdc is not among the orders")
        if not {"acdc", "attribution"} & set(self.orders):
            self.check_inert("attribution", "attribution_steps", without="nothing is ordered by attribution")
        if self.baselines is not None and not FITTED & set(self.baselines):
            self.check_inert("n_fit_rows", without="no baseline is fitted to rows")
        return self
