"""An atlas of a tiny real model, and the child process that looks through its dictionary."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from atlas_fixture import World, make_world

from sememe.browse import Child
from sememe.interpret import interpret

__all__ = ["child_of", "make_live_world"]


def make_live_world(root: Path) -> World:
    """A model on disk, a dictionary, and its atlas in `atlas`."""
    made = make_world(root)
    interpret(made.config("atlas"), lm=made.lm).close()
    return made


def child_of(world: World, **options: object) -> Child:
    """The process that answers about it, not started yet."""
    about = {"atlas": str(world.root / "atlas"), "dictionary": str(world.dictionary)}
    return Child([sys.executable, "-m", "sememe.live", json.dumps(about)], **options)  # type: ignore[arg-type]
