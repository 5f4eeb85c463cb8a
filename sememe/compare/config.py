"""What can be chosen about a comparison. Knows options and their ranges; compares nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.measure import MeasureConfig

__all__ = ["CompareConfig"]


OF_TEXT = (
    *("model", "text", "policy", "store", "n_tokens", "n_fit_rows", "nulls", "twins", "batch_rows"),
    *("budget", "narrow_enough"),
)
"""What only a comparison on text reads."""


class CompareConfig(MeasureConfig):
    """Which dictionaries, on what, against what."""

    not_identity: ClassVar[frozenset[str]] = MeasureConfig.not_identity | {"dictionaries"}

    _opens = opens("dictionaries")

    dictionaries: tuple[Path, ...]
    """Dictionaries, sweeps, or folders that hold such; at least two dictionaries in all."""
    out: Path = Path("artifacts/comparison")
    """The folder to make."""
    directions_only: bool = False
    """Compare decoder directions and run no language model."""
    together: bool = False
    """Besides, splice all of them in at once, each reading what those below it left; they must write to different
    hookpoints."""
    n_nearest: int = Field(default=5, ge=1)
    """Of two dictionaries: nearest latents stored per latent, both ways."""
    n_shown: int = Field(default=20, ge=0)
    """Of two dictionaries: best and worst matches listed on the page."""

    @model_validator(mode="after")
    def _together_is_measured(self) -> Self:
        if self.together and self.directions_only:
            raise ConfigError(
                "together must be left out with directions_only: no language model runs then",
                self.together,
                "Drop one of the two.",
            )
        if self.directions_only:
            self.check_inert(*OF_TEXT, without="no language model runs (directions_only)")
        return self
