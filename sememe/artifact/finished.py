"""Artifacts that are there: opened, found, listed and removed, on a disk, on object storage or on the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sememe import hub, remote
from sememe.artifact.files import META, beside_as_partial, file_sha256
from sememe.artifact.identity import FORMAT_VERSION, about, differences, named
from sememe.config import Config
from sememe.errors import ArtifactError, CorruptError, MismatchError

__all__ = ["Artifact", "below", "exists", "find", "here", "kind_of", "load", "remove", "send"]

LAZY = ("store", "sweep")
"""On object storage: what may be many times what is read of it, so files come when they are asked for."""


class Artifact:
    """A finished folder on disk. `meta` is its meta.json as plain data.

    `url` is where it lies on object storage, if it does; then `path` is its mirror here.
    """

    def __init__(self, path: Path, meta: dict[str, Any], url: str | None = None) -> None:
        self.path, self.meta, self.url = path, meta, url

    @property
    def place(self) -> Path:
        """Where it lies: its folder, or its address on object storage."""
        return self.path if self.url is None else Path(self.url)

    @property
    def kind(self) -> str:
        """What it is: "store", "dictionary", "report", "atlas", "site", ..."""
        return str(self.meta["kind"])

    @property
    def identity(self) -> str:
        """Kind, version, config and parents, hashed."""
        return str(self.meta["identity"])

    @property
    def fingerprint(self) -> str:
        """Identity and content, hashed."""
        return str(self.meta["fingerprint"])

    @property
    def extra(self) -> dict[str, Any]:
        """What the verb that made it wanted remembered."""
        extra: dict[str, Any] = self.meta["extra"]
        return extra

    def file(self, name: str, *, verify: bool = False) -> Path:
        """The path of one of its files, its size checked, and its hash if asked.

        Raises:
            CorruptError: the file is missing, truncated, or its content changed.
        """
        entry = self.meta["files"].get(name)
        path = self.path / name
        if entry is not None and self.url is not None and not path.is_file():
            remote.fetch(self.url, name, path)
        if entry is None or not path.is_file():
            raise CorruptError(
                f"the {self.kind} {self.path} must hold {name}",
                "no such file",
                "Delete the folder and make it again.",
            )
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CorruptError(
                f"{path} must be {entry['bytes']} bytes long",
                f"{size} bytes",
                "The file was truncated or changed; delete the folder and make it again.",
            )
        if verify and (found := file_sha256(path)) != entry["sha256"]:
            raise CorruptError(
                f"{path} must have SHA-256 {entry['sha256'][:16]}",
                found[:16],
                "The file was changed or damaged; delete the folder and make it again.",
            )
        return path

    def verify(self) -> None:
        """Check the hash of every file."""
        for name in self.meta["files"]:
            self.file(name, verify=True)


def load(path: str | Path, kind: str | None = None) -> Artifact:
    """Open a finished artifact; the sizes of its files are checked, hashes when each file is read.

    Args:
        path: A folder, an address on object storage, or an id on the hub, of the artifact or of a release that has it.
        kind: What it must be, if not just anything.

    Raises:
        FormatError: an id leads nowhere, or the hub cannot be reached.
        ArtifactError: there is no artifact at the path, or it is of another kind or a newer format.
        CorruptError: meta.json or a file is damaged.
    """
    if hub.is_id(path):
        path = hub.published(path, kind)
    what = kind or "artifact"
    url = remote.address(path)
    path = Path(path) if url is None else _mirrored(url, what)
    meta_path = path / META
    if not meta_path.is_file():
        partial = beside_as_partial(path).is_dir()
        raise ArtifactError(
            f"{path} must be a finished {what}",
            "an unfinished one"
            if partial
            else ("a folder without meta.json" if path.is_dir() else "nothing there"),
            "Run the command that makes it again; it goes on where it was."
            if partial
            else f"Name the folder of {_a(what)}.",
        )
    meta = _parsed(meta_path.read_bytes(), meta_path)
    version, found_kind = meta["format_version"], meta["kind"]
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} must have format_version <= {FORMAT_VERSION}", version, "Upgrade sememe to read it."
        )
    if kind is not None and found_kind != kind:
        raise ArtifactError(f"{path} must be {_a(kind)}", _a(found_kind), f"Name the folder of {_a(kind)}.")
    artifact = Artifact(path, meta, url)
    for name in meta["files"]:
        if url is None or found_kind not in LAZY:
            artifact.file(name)
    return artifact


def _parsed(content: bytes, where: Path | str) -> dict[str, Any]:
    """What a meta.json says."""
    try:
        meta: dict[str, Any] = json.loads(content)
        meta["format_version"], meta["kind"] = int(meta["format_version"]), str(meta["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{where} must be a sememe meta.json",
            f"{type(error).__name__}: {error}",
            "Delete the folder and make it again.",
        ) from None
    return meta


def exists(path: str | Path) -> bool:
    """Whether a finished artifact lies at a path or an address, whatever it is; nothing of it is checked. Of an id
    whoever opens it finds out."""
    if hub.is_id(path):
        return True
    url = remote.address(path)
    return (Path(path) / META).is_file() if url is None else remote.read(url, META) is not None


def kind_of(path: str | Path) -> str | None:
    """What the artifact at a path or an address is; None if there is none. Only its meta.json is read.

    Raises:
        CorruptError: that is damaged.
    """
    url, meta = remote.address(path), Path(path) / META
    if hub.is_id(path):
        return load(path).kind
    if url is not None:
        content = remote.read(url, META)
    else:
        content = meta.read_bytes() if meta.is_file() else None
    return None if content is None else str(_parsed(content, meta)["kind"])


def here(path: str | Path) -> Path:
    """The folder on this machine with an artifact's files: the path itself, or the mirror of an address.

    Raises:
        ArtifactError, CorruptError: as `load`, at an address.
    """
    return load(path).path if hub.is_id(path) or remote.address(path) is not None else Path(path)


def below(folder: str | Path) -> list[Path]:
    """The artifacts that lie in a folder or below an address, at any depth, k2 before k16; none inside another."""
    url = remote.address(folder)
    if url is None:
        children = Path(folder).iterdir() if Path(folder).is_dir() else ()
        inner = sorted(
            (c for c in children if c.is_dir() and c.name[0] != "."), key=lambda c: _natural(c.name)
        )
        return [found for child in inner for found in ([child] if exists(child) else below(child))]
    places = {PurePosixPath(name).parent for name in remote.names(url) if name.endswith(f"/{META}")}
    outermost = [place for place in places if places.isdisjoint(place.parents)]
    return [Path(url) / place for place in sorted(outermost, key=lambda place: [*map(_natural, place.parts)])]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """layer2 before layer10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _mirrored(url: str, what: str) -> Path:
    """The mirror of what lies at a URL, its meta.json as it is there now."""
    content = remote.read(url, META)
    if content is None:
        raise ArtifactError(
            f"{url} must be a finished {what}",
            f"nothing with {META} there",
            "Run the command that makes it again, or correct the address.",
        )
    place = remote.mirror(url)
    meta = place / META
    if not meta.is_file() or meta.read_bytes() != content:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        aside = place / f"{META}.tmp"
        aside.write_bytes(content)
        aside.replace(meta)
    return place


def send(url: str) -> None:
    """Send a finished artifact from its mirror."""
    finished = load(remote.mirror(url))
    remote.send(url, finished.path, list(finished.meta["files"]), META, finished.fingerprint)


def _unsent(url: str, kind: str, identity: str) -> bool:
    """Whether the mirror holds the whole of what would be made now: an upload was cut off."""
    try:
        return load(remote.mirror(url), kind).identity == identity
    except ArtifactError:
        return False


def find(
    path: str | Path,
    kind: str,
    identity: str,
    config: Config | None = None,
    parents: Mapping[str, str] | None = None,
) -> Artifact | None:
    """The artifact at the path if it is the one that would be made now; None if nothing is there.

    Args:
        path: Where.
        kind: What it must be.
        identity: What would be made now.
        config: The config behind that identity, if an error shall name the options that differ.
        parents: The parents behind it, likewise.

    Raises:
        MismatchError: something else is there, made from another config, parent or version.
    """
    url = remote.address(path)
    if url is not None and remote.read(url, META) is None:
        if not _unsent(url, kind, identity):
            return None
        send(url)
    path = Path(path)
    if url is None and not path.exists():
        return None
    artifact = load(path, kind)
    if artifact.identity != identity:
        why = ""
        if config is not None:
            there = {**artifact.meta["config"], "parents": artifact.meta["parents"]}
            why = f" ({named(differences(there, about(config, parents or {})))})"
        raise MismatchError(
            f"the {kind} at {url or path} must have been made with this config, these parents and this version "
            f"(identity {identity[:16]})",
            f"identity {artifact.identity[:16]}{why}",
            f"Delete {url or path}, write elsewhere, or pass --fresh to replace it.",
        )
    return artifact


def remove(path: str | Path) -> None:
    """Delete an artifact and any partial work beside it."""
    url = remote.address(path)
    if url is not None:
        remote.remove(url)
        path = remote.mirror(url)
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(beside_as_partial(path), ignore_errors=True)


def _a(kind: str) -> str:
    """The kind with its article."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
