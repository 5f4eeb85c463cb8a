"""Object storage: addresses such as s3://bucket/store, a local mirror of each, and what is sent there and fetched.

Speaks to any storage that fsspec knows. Knows files and one file that comes last; what they are is `artifact`'s.

    made in the mirror -> every file -> the last one, whose presence says that all are there
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sememe.errors import CorruptError, ResourceError
from sememe.paths import cache_dir

__all__ = ["PROTOCOLS", "SENDING", "address", "fetch", "mirror", "names", "read", "remove", "send"]

PROTOCOLS = ("s3", "gs", "gcs", "az", "abfs", "memory")
"""Storages that artifacts may lie on; the last is for tests."""
ADDRESS = re.compile(rf"({'|'.join(PROTOCOLS)}):/{{1,2}}([^/].*?)/*")
SENDING = ".sending.json"
"""There while files are sent: of what, so that it goes on where it was cut off."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def address(path: str | Path) -> str | None:
    """The URL that a path on object storage means; None for one on a disk.

    A `Path` folds the two slashes of s3://bucket/name into one; both are read.
    """
    match = ADDRESS.fullmatch(str(path))
    return None if match is None else f"{match[1]}://{match[2]}"


def mirror(url: str) -> Path:
    """Where on this machine what lies at a URL is kept, and made before it is sent."""
    place = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_dir() / "remote" / place / PurePosixPath(url).name


def read(url: str, name: str) -> bytes | None:
    """A small file's content; None if it is not there.

    Raises:
        ResourceError: the storage cannot be reached, or its package is missing.
    """
    with _talking(url) as (fs, root):
        fs.invalidate_cache()
        try:
            content: bytes = fs.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None
        return content


def names(url: str) -> list[str]:
    """The files that lie at a URL, at any depth, by their names there.

    Raises:
        ResourceError: the storage cannot be reached, or there is no such bucket.
    """
    with _talking(url) as (fs, root):
        return sorted(_listed(fs, root))


def fetch(url: str, name: str, target: Path) -> None:
    """Bring one file, aside and then renamed.

    Raises:
        CorruptError: its name would leave the folder, or it is not there.
        ResourceError: the storage cannot be reached.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise CorruptError(f"{url} must hold files inside its own folder", repr(name), "Do not use it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".tmp")
    with _talking(url) as (fs, root):
        try:
            fs.get_file(f"{root}/{name}", str(aside))
        except FileNotFoundError:
            raise CorruptError(
                f"{url} must hold {name}", "no such file", "Delete it there and make it again."
            ) from None
    aside.replace(target)


def send(url: str, folder: Path, names: Sequence[str], last: str, token: str) -> None:
    """Send files, and one last. What else lies at the URL goes first; files that an interrupted call sent stay. No
    folder is made: storages have none, and asking for one may make the bucket of a mistyped address.

    Args:
        url: Where to.
        folder: Where the files are.
        names: Which, without the last.
        last: The one whose presence says that all are there.
        token: What is sent, by its fingerprint.

    Raises:
        ResourceError: the storage cannot be reached, or does not let us write.
    """
    note = json.dumps({"sending": token}).encode()
    going_on = read(url, SENDING) == note and read(url, last) is None
    with _talking(url) as (fs, root):
        if not going_on:
            for leftover in [last, *_listed(fs, root)]:  # what says "complete" goes first
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(f"{root}/{leftover}")
            fs.pipe_file(f"{root}/{SENDING}", note)
        there = _listed(fs, root) if going_on else {}
        for name in names:
            if there.get(name) != (folder / name).stat().st_size:
                fs.put_file(str(folder / name), f"{root}/{name}")
        fs.put_file(str(folder / last), f"{root}/{last}")
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{SENDING}")


def remove(url: str) -> None:
    """Delete what lies at a URL, and its mirror."""
    with _talking(url) as (fs, root):
        fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            fs.rm(root, recursive=True)
    shutil.rmtree(mirror(url), ignore_errors=True)


def _listed(fs: Any, root: str) -> dict[str, int]:
    """Sizes of the files at a place, by name."""
    fs.invalidate_cache()
    base = root.strip("/") + "/"
    return {
        path.strip("/").removeprefix(base): int(about["size"])
        for path, about in fs.find(root, detail=True).items()
    }


@contextlib.contextmanager
def _talking(url: str) -> Iterator[tuple[Any, str]]:
    """The storage and the place in it, with whatever its client raises in our words."""
    import fsspec

    protocol = url.split(":", 1)[0]
    try:
        yield fsspec.core.url_to_fs(url)
    except (FileNotFoundError, CorruptError) as error:
        if isinstance(error, CorruptError):
            raise
        raise ResourceError(
            f"the bucket of {url} must be there", error, "Make the bucket, or correct its name."
        ) from None
    except ImportError as error:
        raise ResourceError(
            f"{protocol}:// needs its package", error, f"pip install {PACKAGES.get(protocol, 'fsspec')}"
        ) from None
    except Exception as error:  # every storage's client has classes of its own
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResourceError(
            f"{url} must be reachable, and let us read and write there",
            text,
            "Check the network, the credentials and the bucket; what was made here is kept, so run it again.",
        ) from error
