"""What can be chosen about a measurement on held-out text. Knows options and their ranges; measures nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.lm import ModelConfig
from sememe.text import TextConfig, TokenPolicy

__all__ = ["AUTOENCODER_NULLS", "NULLS", "ROWS_NULLS", "MeasureConfig"]

AUTOENCODER_NULLS = ("ica", "identity", "neurons", "nmf", "pca", "random_directions", "rica")
NULLS = (*AUTOENCODER_NULLS, "untrained")
ROWS_NULLS = frozenset({"ica", "neurons", "nmf", "rica"})
"""Nulls that are fitted to rows in memory."""
UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


class MeasureConfig(Config):
    """On what, against what, and for how long."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "store", "batch_rows", "twins"})

    out: Path
    """The folder to make."""
    model: ModelConfig = ModelConfig()
    """The language model that was trained on."""
    text: TextConfig = TextConfig()
    """The corpus; its held-out documents are used."""
    policy: TokenPolicy | None = None
    """The token policy, for dictionaries that do not say which they were trained with."""
    store: Path | None = None
    """The store that was trained on. Nulls and the mean are fitted on its rows; without it, on
    activations of the training documents, computed here."""
    n_tokens: int = Field(default=65_536, ge=1)
    """Held-out tokens."""
    n_fit_rows: int = Field(default=65_536, ge=2)
    """Training rows from which nulls and the mean are fitted."""
    nulls: tuple[str, ...] = ("pca", "untrained")
    """Controls measured alongside, at the same l0: pca, untrained, random_directions, identity,
    neurons, ica, rica, nmf."""
    twins: tuple[Path, ...] = ()
    """Dictionaries trained on the model with its weights shuffled, or folders that hold such: each is measured on that
    model, as a null."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward."""
    budget: str | None = None
    """Stop after so long (90s, 5min, 1h), or before that once the intervals are narrow enough."""
    narrow_enough: float = Field(default=0.01, gt=0, lt=1)
    """With a budget: half the width of fvu's and ce_increase's intervals over their values, at which to stop."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of documents for the 95% intervals; 0 gives none."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the bootstrap and of nulls that are drawn."""

    @field_validator("budget")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds_of(value)
        return value

    @model_validator(mode="after")
    def _narrow_enough_has_an_effect(self) -> Self:
        if self.budget is None:
            self.check_inert("narrow_enough", without="there is no budget")
        return self

    def budget_seconds(self) -> float | None:
        """The budget as a number."""
        return None if self.budget is None else seconds_of(self.budget)


def seconds_of(duration: str) -> float:
    """The seconds in a duration such as 90s, 5min or 1h.

    Raises:
        ConfigError: it is none, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)\s*", duration)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            "a budget must be a number above 0 and s, min or h", repr(duration), "Write --budget 5min."
        )
    return float(found[1]) * UNITS[found[2]]
