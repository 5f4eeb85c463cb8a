"""An artifact being built: a folder aside that becomes the artifact in its last step, or is gone on with later."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sememe import __version__, hub, remote
from sememe.artifact.files import META, beside_as_old, beside_as_partial, file_sha256, flush, write_json
from sememe.artifact.finished import find, send
from sememe.artifact.identity import FORMAT_VERSION, about, differences, identity_of, named
from sememe.artifact.lock import locked
from sememe.config import Config, sha256_of
from sememe.errors import ArtifactError, MismatchError, ResourceError, SememeError

__all__ = ["Work", "building"]

IDENTITY = ".identity.json"
"""In a partial folder: what it was begun as."""


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
        with locked(path):
            if not path.exists() and beside_as_old(path).exists():
                beside_as_old(path).rename(path)  # a replacement that was killed between its two renames
            if fresh:
                _check_replaceable(path)
                shutil.rmtree(beside_as_partial(path), ignore_errors=True)
            else:
                find(path, kind, identity, config, parents)
            work = _open_work(path, identity, about(config, parents), resumable, goes_on_from)
            try:
                yield work
            except BaseException:
                if not resumable or not _holds_work(work.path, leave_out, worth_keeping):
                    shutil.rmtree(work.path, ignore_errors=True)
                raise
            _finish(work, path, kind, version, config, parents, identity, leave_out)
        if url is not None:
            send(url)
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


def _open_work(
    path: Path, identity: str, about: dict[str, Any], resumable: bool, goes_on_from: tuple[str, ...]
) -> Work:
    partial = beside_as_partial(path)
    marker = partial / IDENTITY
    found = _marked(marker)
    other = found is not None and found["identity"] != identity
    if other and goes_on_from and not any(any(partial.glob(pattern)) for pattern in goes_on_from):
        found = None  # nothing is lost
    if resumable and found is not None and found["identity"] != identity:
        raise MismatchError(
            f"the unfinished work at {partial} must have been started with this config, these parents and this "
            f"version (identity {identity[:16]})",
            f"identity {found['identity'][:16]} ({named(differences(found['about'], about))})",
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
        flush(file)
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
    flush(work.path)
    if path.exists():
        old = beside_as_old(path)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        work.path.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        work.path.rename(path)
    flush(path.parent)
