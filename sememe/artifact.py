"""Folders on disk that are complete or absent. Knows files and hashes, not what is in them; never loads torch.

An artifact is a folder: `meta.json` and files. It is built in `.NAME.partial` beside its final place, every
file is flushed to disk, and the folder is renamed as the last step: whatever is killed when, the final name
holds a whole artifact or nothing. A partial folder of the same identity is picked up again by the next run.

Two hashes tell artifacts apart. The *identity* is known before the work starts: kind, the verb's version, its
config, its parents' fingerprints. The *fingerprint* is known after: identity and the hash of each file.

A path may be an address on object storage (`remote.py`): the artifact is made in a mirror on this machine and sent
when it is whole, meta.json last; opened, its files are fetched into the mirror as they are needed. Or it is an id on
the hub (`hub.py`), to read from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from sememe import __version__, hub, remote
from sememe.config import Config, canonical_json, sha256_of
from sememe.errors import (
    ArtifactError,
    CorruptError,
    LockError,
    MismatchError,
    ResourceError,
    SememeError,
)

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "Work",
    "below",
    "building",
    "exists",
    "file_sha256",
    "find",
    "here",
    "identity_of",
    "kind_of",
    "load",
    "remove",
    "write_json",
]

FORMAT_VERSION = 1
META = "meta.json"
IDENTITY = ".identity.json"
"""In a partial folder: what it was begun as."""
LAZY = ("store", "sweep")
"""On object storage: what may be many times what is read of it, so files come when they are asked for."""


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """JSON written aside, flushed to disk and renamed, so that a reader never sees half of it."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def identity_of(kind: str, version: int, config: Config, parents: Mapping[str, str]) -> str:
    """The hash by which a finished artifact is recognised as the one that would be made now."""
    return sha256_of(
        {
            "format": FORMAT_VERSION,
            "kind": kind,
            "version": version,
            "config": config.identity(),
            "parents": dict(parents),
        }
    )


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
        partial = _partial(path).is_dir()
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


def _send(url: str) -> None:
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
        _send(url)
    path = Path(path)
    if url is None and not path.exists():
        return None
    artifact = load(path, kind)
    if artifact.identity != identity:
        why = ""
        if config is not None:
            there = {**artifact.meta["config"], "parents": artifact.meta["parents"]}
            why = f" ({_named(_differences(there, _about(config, parents or {})))})"
        raise MismatchError(
            f"the {kind} at {url or path} must have been made with this config, these parents and this version "
            f"(identity {identity[:16]})",
            f"identity {artifact.identity[:16]}{why}",
            f"Delete {url or path}, write elsewhere, or pass --fresh to replace it.",
        )
    return artifact


def _about(config: Config, parents: Mapping[str, str]) -> dict[str, Any]:
    """What goes into an identity, as JSON would give it back."""
    about: dict[str, Any] = json.loads(canonical_json({**config.identity(), "parents": dict(parents)}))
    return about


def remove(path: str | Path) -> None:
    """Delete an artifact and any partial work beside it."""
    url = remote.address(path)
    if url is not None:
        remote.remove(url)
        path = remote.mirror(url)
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(_partial(path), ignore_errors=True)


class Work:
    """An artifact being built: a folder to write into.

    `resumed` says that an interrupted run of the same identity left its files here. `extra` is stored in
    meta.json; `parents` and `config` are already known.
    """

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path, self.resumed = path, resumed
        self.extra: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}


@contextlib.contextmanager
def building(
    path: str | Path,
    *,
    kind: str,
    version: int,
    config: Config,
    parents: Mapping[str, str],
    resumable: bool = False,
    fresh: bool = False,
    leave_out: tuple[str, ...] = (),
    worth_keeping: tuple[str, ...] = (),
    goes_on_from: tuple[str, ...] = (),
) -> Iterator[Work]:
    """Build an artifact: yields the folder to write into, and puts it in place on a clean exit.

    Args:
        path: Its final place.
        kind: What it is.
        version: The verb's version, raised when its output changes.
        config: The verb's config.
        parents: Fingerprints of what it was made from, by role.
        resumable: Keep the partial folder when interrupted, and pick it up next time; unless nothing was recorded
            yet: then the next run may be another one.
        fresh: Replace whatever artifact stands at the path and forget partial work.
        leave_out: Names or globs inside the work folder (progress files) that do not belong to the finished artifact.
        worth_keeping: Those of files that are kept when a run fails, though no run can go on from them alone.
        goes_on_from: Those of files that a run goes on from. If given, partial work of another config that holds
            none of them (a run killed before its first checkpoint) is in nobody's way.

    Raises:
        LockError: another process is building the same artifact.
        MismatchError: something else stands at the path, and `fresh` was not asked for; or no artifact at all.
        ResourceError: the disk is full; or the object storage cannot be reached: then the next `find` sends it.
    """
    if hub.is_id(path):
        raise ArtifactError(
            f"the {kind} must be written to a folder or an address",
            f"the id {path}",
            "Write it to a folder, then upload it with sememe publish --repo.",
        )
    identity = identity_of(kind, version, config, parents)
    url = remote.address(path)
    if url is not None:
        if not fresh:
            find(path, kind, identity, config, parents)
        _check_free(url)
        path = remote.mirror(url)
        shutil.rmtree(path, ignore_errors=True)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if not path.exists() and _old(path).exists():
                _old(path).rename(path)  # a replacement that was killed between its two renames
            if fresh:
                _check_replaceable(path)
                shutil.rmtree(_partial(path), ignore_errors=True)
            else:
                find(path, kind, identity, config, parents)
            work = _open_work(path, identity, _about(config, parents), resumable, goes_on_from)
            try:
                yield work
            except BaseException:
                if not resumable or not _holds_work(work.path, leave_out, worth_keeping):
                    shutil.rmtree(work.path, ignore_errors=True)
                raise
            _finish(work, path, kind, version, config, parents, identity, leave_out)
        if url is not None:
            _send(url)
    except Exception as error:
        code = _errno_of(error)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"the disk must have room for the {kind} {path}",
                os.strerror(code),
                "Free some space or write elsewhere, then run again; finished work is kept.",
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise ResourceError(
                f"the folder of the {kind} {path} must be writable", os.strerror(code), "Write elsewhere."
            ) from error
        raise


def _errno_of(error: Exception) -> int | None:
    """The system's error number behind an exception. Safetensors and DuckDB raise classes of their own and only
    quote the system's words."""
    if isinstance(error, SememeError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return next((code for code in full if os.strerror(code) in text or f"os error {code})" in text), None)


def _a(kind: str) -> str:
    """The kind with its article."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _check_free(url: str) -> None:
    """Raise if there is something at an address that is no artifact, and no upload of one: it would be deleted."""
    names = remote.names(url)
    if names and not {META, remote.SENDING} & set(names):
        raise MismatchError(
            f"{url} must be an artifact, or nothing",
            f"{len(names)} files without {META}, {names[0]} among them",
            "Write elsewhere, or delete them yourself.",
        )


def _check_replaceable(path: Path) -> None:
    """Raise if there is something at the path that this package did not make."""
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not (path / META).is_file():
        raise MismatchError(
            f"{path} must be an artifact for --fresh to replace it",
            f"a {'folder' if path.is_dir() else 'file'} without {META}",
            "Write elsewhere, or delete it yourself.",
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One writer per artifact. The lock file names its owner; the kernel frees it when the owner dies."""
    lock_path = path.with_name(f".{path.name}.lock")
    file = _taken(lock_path, path)
    with file:
        file.seek(0)
        file.truncate()
        file.write(
            f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"
        )
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock_path.unlink()


def _taken(lock_path: Path, path: Path) -> TextIO:
    """The open, locked file. One that its owner deleted between our opening and locking it guards nothing."""
    while True:
        file = lock_path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock_path.exists() and os.path.samestat(os.fstat(file.fileno()), lock_path.stat()):
                return file
            file.close()
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise LockError(
                f"only one run may write {path}",
                f"a lock held by {owner}",
                "Wait for it, stop it, or write elsewhere.",
            ) from None
        except BaseException:
            file.close()
            raise


def _differences(there: Any, now: Any, place: str = "") -> list[str]:
    """What differs between two configs as plain data, option by option: "architecture.k 4 there, 5 now".

    Only options known now are looked at.
    """
    if isinstance(there, dict) and isinstance(now, dict) and there.get("kind") == now.get("kind"):
        return [
            line
            for name, value in now.items()
            for line in _differences(there.get(name), value, f"{place}.{name}" if place else name)
        ]
    return [] if there == now else [f"{place} {_short(there)} there, {_short(now)} now"]


def _short(value: Any) -> str:
    text = str(value["kind"]) if isinstance(value, dict) and "kind" in value else canonical_json(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _named(lines: list[str]) -> str:
    """The first few differences, for an error; what hides behind them is another version or parent."""
    if not lines:
        return "another version of sememe's verb"
    return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")


def _open_work(
    path: Path, identity: str, about: dict[str, Any], resumable: bool, goes_on_from: tuple[str, ...]
) -> Work:
    partial = _partial(path)
    marker = partial / IDENTITY
    found = _marked(marker)
    other = found is not None and found["identity"] != identity
    if other and goes_on_from and not any(any(partial.glob(pattern)) for pattern in goes_on_from):
        found = None  # nothing is lost
    if resumable and found is not None and found["identity"] != identity:
        raise MismatchError(
            f"the unfinished work at {partial} must have been started with this config, these parents and this "
            f"version (identity {identity[:16]})",
            f"identity {found['identity'][:16]} ({_named(_differences(found['about'], about))})",
            f"Finish it with its own config, write elsewhere, delete {partial}, or pass --fresh.",
        )
    resumed = resumable and found is not None
    if not resumed:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(marker, {"identity": identity, "about": about})
    return Work(partial, resumed)


def _holds_work(partial: Path, progress: tuple[str, ...], worth_keeping: tuple[str, ...]) -> bool:
    """Whether something of a run's progress is there (if none is named: anything), or something to look at."""
    found = (entry for pattern in progress or ("*",) for entry in partial.glob(pattern))
    kept = (file for pattern in worth_keeping for file in partial.glob(pattern))
    return any(any(entry.iterdir()) if entry.is_dir() else entry.name != IDENTITY for entry in found) or any(
        file.stat().st_size > 0 for file in kept
    )


def _marked(marker: Path) -> dict[str, Any] | None:
    """What a partial folder was begun as; None if nothing, or nothing whole, says so."""
    try:
        marked: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        return marked if {"identity", "about"} <= set(marked) else None
    except (OSError, ValueError, TypeError):
        return None


def _finish(
    work: Work,
    path: Path,
    kind: str,
    version: int,
    config: Config,
    parents: Mapping[str, str],
    identity: str,
    leave_out: tuple[str, ...],
) -> None:
    for pattern in (IDENTITY, *leave_out):
        for target in work.path.glob(pattern):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()
    files = {}
    for file in sorted(p for p in work.path.rglob("*") if p.is_file()):
        name = file.relative_to(work.path).as_posix()
        _fsync(file)
        files[name] = {"bytes": file.stat().st_size, "sha256": work.hashes.get(name) or file_sha256(file)}
    meta = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "identity": identity,
        "fingerprint": sha256_of({"identity": identity, "files": {n: f["sha256"] for n, f in files.items()}}),
        "verb_version": version,
        "code_version": __version__,
        "config": config.resolved(),
        "parents": dict(parents),
        "extra": work.extra,
        "files": files,
    }
    write_json(work.path / META, meta)
    _fsync(work.path)
    if path.exists():
        old = _old(path)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        work.path.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        work.path.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
