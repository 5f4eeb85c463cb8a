"""The Hugging Face hub, by id: `hf://OWNER/REPO[@REVISION][/FOLDER]`; what lies there comes into the client's cache.

Knows ids, the client, and that an artifact is all that lies in a folder with a meta.json. What other tools'
dictionaries are made of is `formats.hub`'s. Never loads torch.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sememe.errors import FormatError

__all__ = ["Id", "asking", "cached", "download", "is_id", "listed", "of_the_network", "parse", "published"]

SCHEME = re.compile(r"^hf:/{1,2}")  # a path keeps one slash of two
META, CARD = "meta.json", ("README.md", "LICENSE")
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

    def inside(self, name: str) -> str:
        """A name in the folder, as it is in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


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
    if ".." in parts or any("\\" in part or "\0" in part for part in parts):
        raise FormatError("an id must stay inside its repository", text, "Name the folder without ..")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]+(@[\w.-]+)?", part) for part in parts[:2]):
        raise FormatError(
            "an id must be hf://OWNER/REPO/FOLDER",
            text,
            "E.g. hf://google/gemma-scope-2b-pt-res/layer_20/...",
        )
    name, _, revision = parts[1].partition("@")
    return Id(f"{parts[0]}/{name}", "/".join(parts[2:]), revision or None)


def listed(place: Id) -> list[str]:
    """The files of a repository, without those whose names would leave it.

    Raises:
        FormatError: there is no such repository or revision, or the hub cannot be reached.
    """
    import huggingface_hub

    with asking(place):
        names = huggingface_hub.HfApi().list_repo_files(place.repo, revision=place.revision)
    return [name for name in names if ".." not in PurePosixPath(name).parts and not name.startswith("/")]


def download(place: Id, files: Sequence[str], last: Sequence[str]) -> Path:
    """Files of a repository, into the client's cache; gives the folder there that stands for the repository.

    Args:
        place: Which repository, at which revision.
        files: Their names in it.
        last: Those by which the whole is known to be there: they come when all others are.

    Raises:
        FormatError: the hub cannot be reached; what has come stays, and the same call goes on from there.
    """
    import huggingface_hub

    base = ""
    for names in (files, last):
        if names:
            patterns = [glob.escape(name) for name in names]
            with asking(place):
                base = huggingface_hub.snapshot_download(
                    place.repo, revision=place.revision, allow_patterns=patterns
                )
    missing = [name for name in (*files, *last) if not (Path(base) / name).is_file()]
    if missing:
        raise FormatError(f"{place} must arrive whole", f"no {missing[0]}", "Ask for it again: it goes on.")
    return Path(base)


def cached(place: Id, name: str) -> Path | None:
    """The folder that stands for the repository in the client's cache, if a file of it is there; nothing is asked."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):
        found = try_to_load_from_cache(place.repo, name, revision=place.revision)
        if isinstance(found, str):
            return Path(found.removesuffix(name))
    return None


def published(source: str | Path, kind: str | None) -> Path:
    """The folder on disk of an artifact of ours: the one that is named, or, in a release, the one of a kind.

    Args:
        source: Its id.
        kind: What is wanted: "atlas", "report", "dictionary".

    Raises:
        FormatError: there is none, or the hub cannot be reached and it is not in the cache.
    """
    place = parse(source)
    places = [place._replace(folder=place.inside(kind)), place] if kind else [place]
    for one in places:
        base = cached(one, one.inside(META))
        if base is not None:
            return base / one.folder
    names = set(listed(place))
    if kind not in (None, "release") and {place.inside(name) for name in CARD} <= names:
        places = places[:1]  # the folder itself is a release
    found = next((one for one in places if one.inside(META) in names), None)
    if found is None:
        kinds = sorted({str(PurePosixPath(name).parent) for name in names if name.endswith(f"/{META}")})
        raise FormatError(
            f"{place} must hold the {kind or 'artifact'} that is asked for",
            "a folder without it",
            f"There are {', '.join(kinds[:N_NAMED])}." if kinds else "The repository holds nothing of ours.",
        )
    prefix = found.inside("")
    files = sorted(name for name in names if name.startswith(prefix) and name != found.inside(META))
    return download(found, files, [found.inside(META)]) / found.folder


@contextlib.contextmanager
def asking(place: Id) -> Iterator[None]:
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
    except (
        Exception
    ) as error:  # the client lets its network library's own errors through, which are no OSErrors
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


def _known(place: Id) -> str:
    """What the cache holds, for an error: the folders of this repository, else which repositories."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    found: dict[str, set[str]] = {}
    with contextlib.suppress(CacheNotFound, OSError, ValueError):
        for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos:
            for revision in repo.revisions:
                for file in revision.files:
                    name = file.file_path.relative_to(revision.snapshot_path)
                    found.setdefault(repo.repo_id, set()).add(name.parent.as_posix())
    folders = sorted(found.get(place.repo, set()) - {"."})
    if folders:
        return f"The cache holds of it: {', '.join(folders[:N_NAMED])}."
    if not found:
        return "The cache holds nothing."
    return f"The cache holds parts of: {', '.join(sorted(found)[:N_NAMED])}."
