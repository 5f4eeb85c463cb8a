"""Other tools' dictionaries, read and written as ours: one file per format, and the table of them.

Knows which formats there are, how to tell them apart, and how to find the dictionaries of a release; how each is
laid out is in its own file and in docs/formats.md.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path

from sememe.dictionaries.base import Dictionary
from sememe.errors import FormatError, nearest
from sememe.formats import dictionary_learning, gemma_scope, llama_scope, openai, sae_lens, sparsify
from sememe.formats.base import Foreign

__all__ = [
    "READERS",
    "SEMEME",
    "WRITERS",
    "Foreign",
    "detect",
    "files_of",
    "find",
    "is_foreign",
    "read",
    "write",
]

SEMEME = "sememe"

READERS: dict[str, Callable[[Path], Foreign]] = {
    "dictionary_learning": dictionary_learning.read,
    "gemma_scope": gemma_scope.read,
    "llama_scope": llama_scope.read,
    "openai": openai.read,
    "sae_lens": sae_lens.read,
    "sparsify": sparsify.read,
}
"""From a folder (of openai, a file) to a dictionary, by the name of the format."""

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
    gemma_scope.WEIGHTS: "gemma_scope",
    gemma_scope.WEIGHTS_2: "gemma_scope",
    llama_scope.CHECKPOINT: "llama_scope",
}
N_NAMED = 8
"""Dictionaries of a release that an error names."""


def detect(path: str | Path) -> str:
    """Which format a folder or file holds: a key of READERS, or "sememe" for one of our own dictionaries.

    Raises:
        FormatError: there is nothing, or none of the formats, or several, or several dictionaries.
    """
    path = Path(path)
    if path.is_file():
        return _detect_file(path)
    if not path.is_dir():
        raise FormatError(
            f"{path} must be a folder with a dictionary",
            "nothing there",
            "Name the folder that holds the weights.",
        )
    if _is_own(path / "meta.json"):
        return SEMEME
    found = _formats_in(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(
            f"{path} must hold a dictionary in one format", " and ".join(found), "Split the folder."
        )
    below = find(path)
    if below:
        raise FormatError(
            f"{path} must be one dictionary",
            f"a folder of {len(below)}: {_some(list(below))}",
            "Name one of them, or convert all: sememe convert ... --select '*'.",
        )
    names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "an empty folder"
    raise FormatError(
        f"{path} must hold {', '.join(_WEIGHTS)}, a .pt file of openai/sparse_autoencoder, or a dictionary of ours",
        names,
        "Name the folder that holds the weights themselves, or one with such folders below it.",
    )


def _formats_in(folder: Path) -> list[str]:
    """Formats whose weights lie in a folder; two tools call them by one name and differ in the config beside."""
    found = {name for weights, name in _WEIGHTS.items() if (folder / weights).is_file()}
    openmoss = any((folder / config).is_file() for config in (llama_scope.CONFIG, llama_scope.CONFIG_2))
    if "sae_lens" in found and openmoss and not (folder / sae_lens.CONFIG).is_file():
        found = (found - {"sae_lens"}) | {"llama_scope"}
    return sorted(found)


def is_foreign(path: Path) -> bool:
    """Whether a path is another tool's dictionary, by its files' names; nothing is opened."""
    return bool(_formats_in(path)) if path.is_dir() else path.suffix == openai.SUFFIX and path.is_file()


def _detect_file(path: Path) -> str:
    if path.suffix == openai.SUFFIX:
        if path.name != dictionary_learning.WEIGHTS and openai.is_it(path):
            return "openai"
        for folder in (path.parent, path.parent.parent):
            if (folder / dictionary_learning.CONFIG).is_file():
                return "dictionary_learning"
    raise FormatError(
        f"{path} must be a folder with a dictionary, or a .pt file of openai/sparse_autoencoder",
        "a file",
        f"Name the folder that holds it, {path.parent}.",
    )


def _is_own(meta: Path) -> bool:
    try:
        return bool(json.loads(meta.read_text(encoding="utf-8"))["kind"] == "dictionary")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _some(names: list[str]) -> str:
    more = len(names) - N_NAMED
    return ", ".join(names[:N_NAMED]) + (f" and {more} more" if more > 0 else "")


def find(folder: str | Path, select: str = "*") -> dict[str, Path]:
    """The dictionaries below a folder, a release's whole tree, by their paths in it; ours are not among them.

    Nothing is opened. Files that a run kept on the way, in its `checkpoints`, count where they are asked for.

    Args:
        folder: Where to look, any depth. Links to folders are not followed.
        select: A glob that the path has to match; `*` goes over slashes.

    Example:
        >>> find("pythia-70m-deduped", "mlp_out_*")  # doctest: +SKIP
    """
    folder = Path(folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            if path.is_symlink() or not _formats_in(path):
                continue
        elif path.suffix != openai.SUFFIX or path.name == dictionary_learning.WEIGHTS:
            continue
        elif dictionary_learning.CHECKPOINTS in path.parts[len(folder.parts) :]:
            if dictionary_learning.CHECKPOINTS not in select:
                continue
        elif not path.stem.isdigit():
            continue  # openai's are called by their layer
        if fnmatch.fnmatchcase(name, select):
            found[name] = path
    return found


def files_of(path: Path) -> dict[str, Path]:
    """The files that a dictionary is read from, by their names: what a conversion depends on."""
    if path.is_file():
        near = [folder / dictionary_learning.CONFIG for folder in (path.parent, path.parent.parent)]
        return {file.name: file for file in (path, *near[::-1]) if file.is_file()}
    files = {file.name: file for file in sorted(path.iterdir()) if file.is_file()}
    if (path / llama_scope.CHECKPOINT).is_file():
        files[llama_scope.CHECKPOINT] = path / llama_scope.CHECKPOINT
    return files


def read(path: str | Path) -> Foreign:
    """Read a folder or file of another tool's, whichever of READERS it is.

    Raises:
        FormatError: it is none of them, or damaged.
    """
    name = detect(path)
    if name == SEMEME:
        raise FormatError(
            f"{path} must be another tool's folder", "one of ours", "Load it with sememe.dictionaries.load."
        )
    try:
        return READERS[name](Path(path))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise FormatError(
            f"{path} must be a dictionary as {name} writes it",
            f"one that could not be read ({type(error).__name__}: {error})",
            "Look for a value of the wrong type in its config, or fetch it again.",
        ) from error


def write(dictionary: Dictionary, folder: str | Path, name: str) -> None:
    """Write a dictionary into an existing folder in a format of WRITERS.

    Raises:
        FormatError: the format is unknown, or has no place for this dictionary.
    """
    if name not in WRITERS:
        raise FormatError("a format must be known", repr(name), nearest(name, sorted(WRITERS)))
    WRITERS[name](dictionary, Path(folder))
