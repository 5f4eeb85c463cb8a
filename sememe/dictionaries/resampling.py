"""Which latents are pointed anew during training, where to, and when: the options. Knows no dictionary.

`train/dead.py` does it, for any architecture whose config derives from this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from sememe.dictionaries.base import ArchitectureConfig, Resampling
from sememe.errors import ConfigError

__all__ = ["LAST_SHARE", "ResamplingConfig"]

LAST_SHARE = 0.8
"""No latent is pointed anew later than this share of the run: late ones end up dense, and half trained."""


class ResamplingConfig(ArchitectureConfig):
    """Options of every architecture whose latents the trainer can point anew.

    `resample` is one of: none; loss (silent latents, to rows drawn in proportion to their squared loss); worst
    (silent latents, to the worst reconstructed rows); random (silent latents, to random directions); mcs (latents
    whose largest cosine to a second dictionary's is low, to rows as with loss).
    """

    not_identity = frozenset({"resample_against"})  # its fingerprint is one of the result's parents

    resample: Literal["none", "loss", "worst", "random", "mcs"] = "none"
    """Which latents are pointed anew, and where to: none, loss, worst, random or mcs."""
    resample_at: tuple[float, ...] = (0.25, 0.5, 0.75)
    """When latents are pointed anew, as shares of the run."""
    resample_after_tokens: int = Field(default=100_000, ge=1)
    """A latent that has not fired for this many training rows is pointed anew."""
    resample_against: Path | None = None
    """The second dictionary of resample mcs."""
    resample_below: float = Field(default=0.5, gt=0, le=1)
    """With resample mcs, a latent whose largest cosine to the second dictionary's is lower is pointed anew."""
    rewarmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate climbs back after latents were pointed anew."""

    @model_validator(mode="after")
    def _resampling_has_an_effect(self) -> Self:
        if self.resample == "none":
            names = ("resample_at", "resample_after_tokens", "rewarmup_steps")
            self.check_inert(*names, without="resample is none")
        if self.resample != "mcs":
            self.check_inert("resample_against", "resample_below", without="resample is not mcs")
        elif self.resample_against is None:
            raise ConfigError(
                "resample mcs needs a second dictionary", "none", "Name its folder: --resample-against."
            )
        else:
            self.check_inert("resample_after_tokens", without="resample is mcs")
        if not self.resample_at:
            raise ConfigError(
                "resample_at must hold at least one share of the run",
                "none",
                "Set resample to none, or give one.",
            )
        if not all(0 < share <= LAST_SHARE for share in self.resample_at):
            raise ConfigError(
                f"resample_at must hold shares of the run in (0, {LAST_SHARE:g}], none close to its end",
                self.resample_at,
                "Change resample_at.",
            )
        return self

    def resampling(self) -> Resampling | None:
        """What the trainer is to do; None if nothing."""
        if self.resample == "none":
            return None
        return Resampling(
            self.resample_at,
            self.resample_after_tokens,
            self.rewarmup_steps,
            self.resample,
            self.resample_against,
            self.resample_below,
        )
