"""Which dictionaries are meant by some folders, and what they are called. Reads folders; measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from sememe import artifact, dictionaries
from sememe.dictionaries.base import Dictionary, Sites
from sememe.errors import ConfigError, ShapeError

__all__ = ["CHECKPOINTS", "Opened", "checkpoints_in", "last_step", "open_all", "paths_in"]

KINDS = ("dictionary", "sweep")
CHECKPOINTS, TRAINING_LOG = "checkpoints", "metrics.jsonl"
RESERVED = ("base", "mean", "zero")
"""What the unedited model and the ablations are called among the arms."""


class Opened(NamedTuple):
    """A dictionary with the artifact it came from."""

    saved: artifact.Artifact
    dictionary: Dictionary

    @property
    def sites(self) -> Sites | None:
        """Where it reads and writes; None if it was trained on bare tensors."""
        return self.dictionary.sites


def open_all(folders: tuple[Path, ...], *, at_least: int = 1) -> dict[str, Opened]:
    """Open every dictionary in the folders, under the shortest names that tell them apart.

    Args:
        folders: Dictionaries, sweeps, or folders that hold such.
        at_least: How many there have to be.

    Raises:
        ArtifactError: a folder is not a dictionary, and holds none.
        ConfigError: there are fewer, or two are the same.
        ShapeError: they write outputs of different widths at the same place.
    """
    found = {}
    for name, path in paths_in(folders, at_least=at_least).items():
        apart = name if name not in RESERVED else f"{name} (dictionary)"
        found[apart] = Opened(artifact.load(path, "dictionary"), dictionaries.load(path))
    _check_widths(found)
    return found


def paths_in(folders: tuple[Path, ...], *, at_least: int = 1) -> dict[str, Path]:
    """Where the dictionaries in some folders are, under the shortest names that tell them apart; none is opened.

    Raises:
        ArtifactError: a sweep's folder is damaged.
        ConfigError: there are fewer than at_least, or two are the same.
    """
    paths = [path for folder in folders for path in _dictionaries_in(folder)]
    if len(paths) < at_least:
        raise ConfigError(
            "at least two dictionaries must be named" if at_least > 1 else "a dictionary must be named",
            ", ".join(map(str, paths)) or "none",
            "Name another, or a folder that holds several.",
        )
    found = dict(_named(paths))
    _check_different(found)
    return found


def checkpoints_in(folder: Path) -> list[Path]:
    """Dictionaries kept while the one in the folder was trained, the earliest first; none is the last step's."""
    folder = artifact.here(folder)
    kept = {
        int(artifact.load(place.parent, "dictionary").extra["step"]): place.parent
        for place in (folder / CHECKPOINTS).glob(f"step-*/{artifact.META}")
    }
    last = last_step(folder)
    return [kept[step] for step in sorted(kept) if last is None or step < last]


def last_step(folder: Path) -> int | None:
    """The step that the training's log ends with; None without a log."""
    try:
        lines = (folder / TRAINING_LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return int(json.loads(lines[-1])["step"]) if lines else None


def _dictionaries_in(folder: Path) -> list[Path]:
    """The folder itself, or those below it: a sweep's, or a recipe's."""
    kind = artifact.kind_of(folder)
    if kind == "sweep":
        return artifact.below(folder)
    if kind is not None:
        return [folder]  # whatever else it is, opening it says so
    inner = [path for path in artifact.below(folder) if artifact.kind_of(path) in KINDS]
    return [found for path in inner for found in _dictionaries_in(path)] or [folder]


def _named(paths: list[Path]) -> list[tuple[str, Path]]:
    """Each by as few of the last parts of its path as tell all apart, or by its number besides."""
    whole = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-n:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{number}: {path.name}" for number, path in enumerate(paths, 1)]
    return list(zip(names, paths, strict=True))


def _check_different(found: dict[str, Path]) -> None:
    by_path: dict[Path, str] = {}
    for name, path in found.items():
        first = by_path.setdefault(path.resolve(), name)
        if first != name:
            raise ConfigError(
                "each dictionary must be named once",
                f"{first} and {name}, which are the same",
                "Leave one out.",
            )


def _check_widths(found: dict[str, Opened]) -> None:
    first_name, first = next(iter(found.items()))
    for name, one in found.items():
        if one.dictionary.d_out != first.dictionary.d_out:
            raise ShapeError(
                f"the dictionaries must write outputs of one width, {first.dictionary.d_out} like {first_name}",
                f"{one.dictionary.d_out} of {name}",
                "Compare dictionaries of one hookpoint, or of hookpoints of one width.",
            )
