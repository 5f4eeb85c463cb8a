"""Where downloads are kept between runs. Knows nothing about what is kept there."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """$SEMEME_CACHE, else $XDG_CACHE_HOME/sememe, else ~/.cache/sememe. Created if absent."""
    named = os.environ.get("SEMEME_CACHE")
    base = (
        Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sememe"
    )
    base = base.expanduser()
    base.mkdir(parents=True, exist_ok=True)
    return base
