"""One writer per artifact. Knows a path, and the file beside it that is locked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sememe.errors import LockError

__all__ = ["locked"]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the path alone. The lock file names its owner; the kernel frees it when the owner dies.

    Raises:
        LockError: another process holds it.
    """
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
