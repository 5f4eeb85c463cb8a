"""Other tools' dictionaries, read and written as ours: one file per format, and the table of them.

Knows which formats there are and how to tell them apart; how each is laid out is in its own file and in
docs/formats.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sememe.dictionaries.base import Dictionary
from sememe.errors import FormatError, nearest
from sememe.formats import dictionary_learning, sae_lens, sparsify
from sememe.formats.base import Foreign

__all__ = ["READERS", "SEMEME", "WRITERS", "Foreign", "detect", "read", "write"]

SEMEME = "sememe"

READERS: dict[str, Callable[[Path], Foreign]] = {
    "dictionary_learning": dictionary_learning.read,
    "sae_lens": sae_lens.read,
    "sparsify": sparsify.read,
}
"""From a folder to a dictionary, by the name of the format."""

WRITERS: dict[str, Callable[[Dictionary, Path], None]] = {
    "dictionary_learning": dictionary_learning.write,
    "sae_lens": sae_lens.write,
    "sparsify": sparsify.write,
}
"""From a dictionary into an existing folder, by the name of the format."""

_WEIGHTS = {
    dictionary_learning.WEIGHTS: "dictionary_learning",
    sae_lens.WEIGHTS: "sae_lens",
    sparsify.WEIGHTS: "sparsify",
}


def detect(path: str | Path) -> str:
    """Which format a folder holds: a key of READERS, or "sememe" for one of our own dictionaries.

    Raises:
        FormatError: there is no folder, or none of the formats, or several.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(
            f"{path} must be a folder with a dictionary",
            "a file" if path.exists() else "nothing there",
            "Name the folder that holds the weights.",
        )
    if _is_own(path / "meta.json"):
        return SEMEME
    found = [name for weights, name in _WEIGHTS.items() if (path / weights).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(
            f"{path} must hold a dictionary in one format", " and ".join(sorted(found)), "Split the folder."
        )
    names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "an empty folder"
    raise FormatError(
        f"{path} must hold {', '.join(_WEIGHTS)}, or a dictionary of ours",
        names,
        "Name the folder that holds the weights themselves, not one above it.",
    )


def _is_own(meta: Path) -> bool:
    try:
        return bool(json.loads(meta.read_text(encoding="utf-8"))["kind"] == "dictionary")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read(path: str | Path) -> Foreign:
    """Read a folder of another tool's, whichever of READERS it is.

    Raises:
        FormatError: it is none of them, or damaged.
    """
    name = detect(path)
    if name == SEMEME:
        raise FormatError(
            f"{path} must be another tool's folder", "one of ours", "Load it with sememe.dictionaries.load."
        )
    return READERS[name](Path(path))


def write(dictionary: Dictionary, folder: str | Path, name: str) -> None:
    """Write a dictionary into an existing folder in a format of WRITERS.

    Raises:
        FormatError: the format is unknown, or has no place for this dictionary.
    """
    if name not in WRITERS:
        raise FormatError("a format must be known", repr(name), nearest(name, sorted(WRITERS)))
    WRITERS[name](dictionary, Path(folder))
