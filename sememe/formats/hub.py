"""Dictionaries on the Hugging Face hub, by id: `hf://OWNER/REPO/FOLDER`, fetched into the hub client's own cache.

Knows ids, names of files and the client; what a fetched folder is, the formats find out. Nothing is fetched but what
an id names, and what is there already is used without asking the network.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sememe.errors import FormatError, nearest

__all__ = ["Id", "fetch", "is_id", "names_below", "of_the_network", "parse"]

SCHEME = re.compile(r"^hf:/{1,2}")  # a path keeps one slash of two
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


class Id(NamedTuple):
    """A place on the hub."""

    repo: str
    folder: str
    """Inside the repository, "" for the whole of it."""
    revision: str | None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{at}{'/' + self.folder if self.folder else ''}"


def is_id(source: str | Path) -> bool:
    """Whether something names a place on the hub, not on disk."""
    return SCHEME.match(str(source)) is not None


def parse(source: str | Path) -> Id:
    """An id's parts: `hf://OWNER/REPO[@REVISION][/FOLDER]`.

    Raises:
        FormatError: it names no repository, or its folder would lie outside.
    """
    text = str(source)
    parts = SCHEME.sub("", text).strip("/").split("/")
    _check_inside(parts, text)
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]+(@[\w.-]+)?", part) for part in parts[:2]):
        raise FormatError(
            "an id must be hf://OWNER/REPO/FOLDER",
            text,
            "E.g. hf://google/gemma-scope-2b-pt-res/layer_20/...",
        )
    name, _, revision = parts[1].partition("@")
    return Id(f"{parts[0]}/{name}", "/".join(parts[2:]), revision or None)


def _check_inside(parts: list[str], text: str) -> None:
    if ".." in parts or any("\\" in part or "\0" in part for part in parts):
        raise FormatError("an id must stay inside its repository", text, "Name the folder without ..")


def fetch(source: str | Path) -> Path:
    """The folder on disk of an id's dictionary, downloaded if it is not there.

    A download that was cut off goes on where it was when it is asked for again.

    Raises:
        FormatError: the id is malformed, there is no such repository, revision or dictionary in it, or it is not in the
            cache and the hub cannot be reached.
    """
    import huggingface_hub

    place = parse(source)
    there = _cached(place)
    if there is not None:
        return there
    with _asking(place):
        names = huggingface_hub.HfApi().list_repo_files(place.repo, revision=place.revision)
    place = _published(place, set(names))
    rest, last = _files(place, names)
    base = ""
    for files in (rest, last):  # what the cache knows a dictionary by comes when all else is there
        if files:
            patterns = [glob.escape(name) for name in files]
            with _asking(place):
                base = huggingface_hub.snapshot_download(
                    place.repo, revision=place.revision, allow_patterns=patterns
                )
    missing = [name for name in (*rest, *last) if not (Path(base) / name).is_file()]
    if missing:
        raise FormatError(f"{place} must arrive whole", f"no {missing[0]}", "Ask for it again: it goes on.")
    return Path(base) / place.folder if place.folder else Path(base)


def names_below(source: str | Path, select: str = "*") -> list[str]:
    """Other tools' dictionaries below an id, by their paths there; nothing is downloaded.

    Args:
        source: The id of a repository, or of a folder in it.
        select: A glob that the path has to match; `*` goes over slashes.

    Raises:
        FormatError: as `fetch`.
    """
    import huggingface_hub

    place = parse(source)
    with _asking(place):
        names = huggingface_hub.HfApi().list_repo_files(place.repo, revision=place.revision)
    prefix = f"{place.folder}/" if place.folder else ""
    found = {_folder_of(name) for name in _safe(names) if WEIGHTS.search(name) and not name.endswith("meta.json")}
    inner = sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))
    return [name for name in inner if name != "." and fnmatch.fnmatchcase(name, select)]


@contextlib.contextmanager
def _asking(place: Id) -> Iterator[None]:
    """What the hub's client raises, in our words."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise FormatError(
            f"{place.repo} must be open to you on the hub",
            "a gated repository",
            f"Accept its terms at https://huggingface.co/{place.repo} and log in with `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise FormatError(
            f"{place.repo} must be a repository on the hub",
            "no such repository",
            f"Check its name. {_known(place)}",
        ) from error
    except RevisionNotFoundError as error:
        raise FormatError(
            f"{place.repo} must have the revision {place.revision}",
            "no such branch, tag or commit",
            f"Check what follows the @. {_known(place)}",
        ) from error
    except Exception as error:  # the client lets its network library's own errors through, which are no OSErrors
        if not isinstance(error, ValueError) and not of_the_network(error):
            raise
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{place} must be in the local cache, or the hub must be reachable",
            text,
            f"Check the network. {_known(place)}",
        ) from error


def of_the_network(error: BaseException) -> bool:
    """Whether the hub's client raised an error because of the network, or of the hub behind it."""
    network = ("httpx", "httpcore", "requests", "urllib3")  # also the names with a number behind
    return isinstance(error, OSError) or type(error).__module__.startswith(network)


def _published(place: Id, names: set[str]) -> Id:
    """The dictionary in a release of ours, whose folder has the report and the atlas, too."""
    inside = f"{place.folder}/{PUBLISHED}" if place.folder else PUBLISHED
    return place._replace(folder=inside) if f"{inside}/meta.json" in names else place


def _files(place: Id, names: list[str]) -> tuple[list[str], list[str]]:
    """Which of a repository's files the dictionary at a place is made of; apart, what it is known by."""
    safe = _safe(names)
    if place.folder in safe:  # a file: what lies beside it goes with it
        folder = str(PurePosixPath(place.folder).parent)
        return [name for name in safe if name == f"{folder}/config.json"], [place.folder]
    prefix = f"{place.folder}/" if place.folder else ""
    below = [name.removeprefix(prefix) for name in safe if name.startswith(prefix)]
    weights = {name for name in below if WEIGHTS.search(name)}
    if RELEASED in below:  # several of ours, none of them at this place
        weights = {name for name in weights if name.startswith(f"{PUBLISHED}/")}
    here = weights & set(KNOWN_BY)
    if here:
        flat = {name for name in below if "/" not in name}
        whole = (
            set(below) if "meta.json" in flat else flat | here
        )  # one of ours is all that lies in its folder
        return [prefix + name for name in sorted(whole - here)], [prefix + name for name in sorted(here)]
    folders = sorted({_folder_of(prefix + name) for name in weights})
    if folders:
        raise FormatError(
            f"{place} must be one dictionary",
            f"{len(folders)} below it: {', '.join(folders[:N_NAMED])}{', ...' if len(folders) > N_NAMED else ''}",
            "Name one of them, or convert all: sememe convert ... --select '*'.",
        )
    known = sorted({_folder_of(name) for name in safe if WEIGHTS.search(name)})
    raise FormatError(
        f"{place} must be a dictionary in the repository",
        "no files of one" if below else "no such folder",
        nearest(place.folder, known) if known else "The repository holds no dictionary in a known format.",
    )


def _safe(names: list[str]) -> list[str]:
    """Those names that stay inside their repository."""
    return [name for name in names if ".." not in PurePosixPath(name).parts and not name.startswith("/")]


def _folder_of(name: str) -> str:
    folder = name.removesuffix("/checkpoints/final.safetensors")
    if folder != name or re.search(r"autoencoders/\d+\.pt$", name):
        return folder
    return str(PurePosixPath(name).parent)


def _cached(place: Id) -> Path | None:
    """The place in the local cache, if what comes last of a download is there: then all of it is."""
    from huggingface_hub import try_to_load_from_cache

    published = f"{place.folder}/{PUBLISHED}".lstrip("/")
    wanted = [(folder, f"{folder}/{name}".lstrip("/")) for folder in (published, place.folder) for name in KNOWN_BY]
    if place.folder.endswith(".pt"):
        wanted.append((place.folder, place.folder))
    for folder, name in wanted:
        with contextlib.suppress(ValueError):
            found = try_to_load_from_cache(place.repo, name, revision=place.revision)
            if isinstance(found, str):
                return Path(found.removesuffix(name)) / folder
    return None


def _known(place: Id) -> str:
    """What the cache holds, for an error: of this repository, else which repositories with dictionaries."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    found: dict[str, set[str]] = {}
    with contextlib.suppress(CacheNotFound, OSError, ValueError):
        for repo in scan_cache_dir().repos:
            for revision in repo.revisions:
                for file in revision.files:
                    name = file.file_path.relative_to(revision.snapshot_path).as_posix()
                    if WEIGHTS.search(name):
                        found.setdefault(repo.repo_id, set()).add(_folder_of(name))
    if not found:
        return "The cache holds no dictionary."
    if place.repo in found:
        folders = sorted(found[place.repo])
        return f"The cache holds of it: {', '.join(folders[:N_NAMED])}."
    return f"The cache holds dictionaries of: {', '.join(sorted(found)[:N_NAMED])}."
