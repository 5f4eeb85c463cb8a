"""What this machine has free: memory, disk, a GPU's memory. Knows no stage."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

__all__ = ["disk_free", "gpu_free", "memory_free", "resident"]


def memory_free() -> int:
    """Bytes of memory that a new process can have: what the system calls available, within this group's limit."""
    free = [_available()]
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")):
            bound, now = _number(folder / limit), _number(folder / used)
            if bound is not None and now is not None:
                free.append(max(0, bound - now))
    return min(free)


def _available() -> int:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def disk_free(folder: Path) -> int:
    """Free bytes where a folder lies or would lie."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gpu_free(device: str) -> int | None:
    """Free bytes of a CUDA device; None for any other, and for one that is not there."""
    asked = torch.device(device)
    if asked.type != "cuda" or (asked.index or 0) >= torch.cuda.device_count():
        return None
    return torch.cuda.mem_get_info(asked)[0]


def resident() -> int:
    """Bytes of memory that this process has already; 0 where the system does not say."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else 0
