"""Several atlases on one page: what each is, and what the page is told of all of them.

Knows what an atlas is called; knows neither HTTP nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sememe.browse.data import Data, Json
from sememe.browse.notes import NotesFile
from sememe.errors import SememeError

__all__ = ["Served", "name_of", "session"]


class Served(NamedTuple):
    """One atlas that is shown."""

    data: Data | SememeError
    """What it holds, or why it cannot be shown: then that is what every question about it gets."""
    notes: NotesFile | None = None
    """What people say of its latents; None: nothing, and nothing is kept."""
    dictionary: Path | None = None
    """The folder of its dictionary, if that is known."""
    name: str = ""
    """What it is called where there are several."""


def name_of(path: Path) -> str:
    """What an atlas is called among several: `artifacts/demo/atlas` is "demo/atlas"."""
    return "/".join(Path(path).resolve().parts[-2:])


def session(served: Sequence[Served], *, live: bool = False) -> Json:
    """What is shown: the atlases by number, whether notes may be written, whether a model answers."""
    return {
        "atlases": [_called(one) for one in served],
        "write": any(one.notes is not None and one.notes.write for one in served),
        "live": live,
    }


def _called(one: Served) -> Json:
    """What the page needs to know of an atlas to offer it."""
    if isinstance(one.data, SememeError):
        return {"name": one.name, "error": str(one.data), "write": False}
    atlas = one.data.atlas
    about = atlas.meta.get("dictionary", {})
    return {
        "name": one.name or about.get("name") or "",
        "fingerprint": atlas.artifact.fingerprint,
        "dictionary": str(atlas.artifact.meta["parents"].get("dictionary") or ""),
        "model": about.get("model"),
        "hookpoint": about.get("hookpoint"),
        "kind": about.get("kind"),
        "write": one.notes is not None and one.notes.write,
    }
