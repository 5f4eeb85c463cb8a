"""What can be chosen about explanations. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from sememe.config import Config

__all__ = ["ExplainConfig"]


class ExplainConfig(Config):
    """Which atlas, and how rules are found and scored."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "atlas"})

    out: Path = Path("artifacts/explanations")
    """The folder to make."""
    atlas: Path = Path("artifacts/atlas")
    """The atlas whose latents are explained."""
    test_fraction: float = Field(default=0.4, gt=0, lt=1)
    """Share of the documents on which rules are scored and not found. The same documents for every latent."""
    max_tokens: int = Field(default=8, ge=1, le=64)
    """Most tokens, or pairs of tokens, that one rule may list."""
    min_gain: float = Field(default=0.02, ge=0, le=1)
    """What each further token or condition must add to hit rate minus false-alarm rate on the training documents."""
    label_score: float = Field(default=0.4, ge=0, le=1)
    """Rules that score less on the held-out documents are kept, but do not become the latent's label."""
    n_bootstrap: int = Field(default=1000, ge=1)
    """Resamplings of the latents behind each confidence interval."""
    seed: int = Field(default=0, ge=0)
    """Of the split of the documents, the shuffled null, and the bootstrap."""
