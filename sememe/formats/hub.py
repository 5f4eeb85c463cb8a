"""Dictionaries on the Hugging Face hub, by id: what of a repository each format is made of.

Knows names of files; ids and the client are `sememe.hub`'s, and what a fetched folder is, the formats find out. Nothing
is fetched but what an id names, and what is there already is used without asking the network.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sememe import hub
from sememe.errors import FormatError, nearest
from sememe.hub import Id

__all__ = ["fetch", "names_below"]

KNOWN_BY = (
    "ae.pt",
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "meta.json",
    "checkpoints/final.safetensors",
)
"""The file in its folder that a dictionary is known by; of openai's it is the file itself."""
WEIGHTS = re.compile(rf"(?:^|/)(?:{'|'.join(map(re.escape, KNOWN_BY))}|autoencoders/\d+\.pt)$")
PUBLISHED = "dictionary"
"""Where a release of ours has its dictionary, or its dictionaries."""
RELEASED = "dictionaries.json"
"""In a release of several of ours."""
N_NAMED = 6


def fetch(source: str | Path) -> Path:
    """The folder on disk of an id's dictionary, downloaded if it is not there.

    Files that have arrived are not fetched again when it is asked for again.

    Raises:
        FormatError: the id is malformed, there is no such repository, revision or dictionary in it, or it is not in the
            cache and the hub cannot be reached.
    """
    place = hub.parse(source)
    there = _cached(place)
    if there is not None:
        return there
    names = hub.listed(place)
    place = _published(place, set(names))
    base = hub.download(place, *_files(place, names))
    return base / place.folder if place.folder else base


def names_below(source: str | Path, select: str = "*") -> list[str]:
    """Other tools' dictionaries below an id, by their paths there; nothing is downloaded.

    Args:
        source: The id of a repository, or of a folder in it.
        select: A glob that the path has to match; `*` goes over slashes.

    Raises:
        FormatError: as `fetch`.
    """
    place = hub.parse(source)
    prefix = place.inside("")
    weights = [name for name in hub.listed(place) if WEIGHTS.search(name) and not name.endswith("meta.json")]
    inner = sorted({_folder_of(name).removeprefix(prefix) for name in weights if name.startswith(prefix)})
    return [name for name in inner if name != "." and fnmatch.fnmatchcase(name, select)]


def _published(place: Id, names: set[str]) -> Id:
    """The dictionary in a release of ours, whose folder has the report and the atlas, too."""
    inside = place._replace(folder=place.inside(PUBLISHED))
    return inside if inside.inside("meta.json") in names else place


def _files(place: Id, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of a repository's files the dictionary at a place is made of; apart, what it is known by."""
    if place.folder in names:  # a file: what lies beside it goes with it
        folder = str(PurePosixPath(place.folder).parent)
        return [name for name in names if name == f"{folder}/config.json"], [place.folder]
    prefix = place.inside("")
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    weights = {name for name in below if WEIGHTS.search(name)}
    if RELEASED in below:  # several of ours, none of them at this place
        weights = {name for name in weights if name.startswith(f"{PUBLISHED}/")}
    here = weights & set(KNOWN_BY)
    if here:
        flat = {name for name in below if "/" not in name}
        # one of ours is all that lies in its folder
        whole = set(below) if "meta.json" in here else flat | here
        return [prefix + name for name in sorted(whole - here)], [prefix + name for name in sorted(here)]
    folders = sorted({_folder_of(prefix + name) for name in weights})
    if folders:
        raise FormatError(
            f"{place} must be one dictionary",
            f"{len(folders)} below it: {', '.join(folders[:N_NAMED])}{', ...' if len(folders) > N_NAMED else ''}",
            "Name one of them, or convert all: sememe convert ... --select '*'.",
        )
    known = sorted({_folder_of(name) for name in names if WEIGHTS.search(name)})
    raise FormatError(
        f"{place} must be a dictionary in the repository",
        "no files of one" if below else "no such folder",
        nearest(place.folder, known) if known else "The repository holds no dictionary in a known format.",
    )


def _folder_of(name: str) -> str:
    folder = name.removesuffix("/checkpoints/final.safetensors")
    if folder != name or re.search(r"autoencoders/\d+\.pt$", name):
        return folder
    return str(PurePosixPath(name).parent)


def _cached(place: Id) -> Path | None:
    """The place in the local cache, if what comes last of a download is there: then all of it is."""
    wanted = [
        (one, one.inside(name))
        for one in (place._replace(folder=place.inside(PUBLISHED)), place)
        for name in KNOWN_BY
    ]
    if place.folder.endswith(".pt"):
        wanted.append((place, place.folder))
    for one, name in wanted:
        base = hub.cached(one, name)
        if base is not None:
            return base / one.folder
    return None
