"""What the child process loads. Knows options; loads nothing."""

from __future__ import annotations

from pathlib import Path

from sememe.config import Config
from sememe.foreign import opens

__all__ = ["LiveConfig"]


class LiveConfig(Config):
    """Whose latents, in which model."""

    _opens = opens("dictionary")

    atlas: Path
    """The atlas that is shown: says how strong an activation is for its latent."""
    dictionary: Path
    """The folder of its dictionary."""
    model: str | None = None
    """The language model. None: the one that the atlas was made with."""
