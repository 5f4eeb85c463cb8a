"""Files of an artifact's folder, their hashes and the two names beside it. Knows no artifact."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["META", "beside_as_old", "beside_as_partial", "file_sha256", "flush", "write_json"]

META = "meta.json"


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


def beside_as_partial(path: Path) -> Path:
    """Where the artifact of this path is built."""
    return path.with_name(f".{path.name}.partial")


def beside_as_old(path: Path) -> Path:
    """Where the one before it waits while it is replaced."""
    return path.with_name(f".{path.name}.old")


def flush(path: Path) -> None:
    """Have a file or folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
