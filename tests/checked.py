"""Checks every annotated shape and type of the package at each call. Only for tests: users pay nothing.

Knows modules' names and annotations, nothing of what they do. Programs that a test starts run unchecked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Self

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

__all__ = ["UNCHECKED", "check", "install"]

UNCHECKED = {
    "sememe.collect.loops",
    "sememe.collect.pair_loops",
    "sememe.explain.lexical.loops",
    "sememe.kernels.cpu.loops",
    "sememe.kernels.cpu.sparse_loops",
    "sememe.kernels.cpu.steps",
    "sememe.kernels.gpu.optimiser",
    "sememe.kernels.gpu.selection",
    "sememe.kernels.gpu.signum",
    "sememe.kernels.gpu.sparse",
    "sememe.kernels.pursuit",
    "sememe.metrics.loops",
}
"""numba and Triton compile a function's source, which a checked function no longer is."""

_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484


class Unchecked:
    """Finds the modules that the hook must leave alone; asked before the hook."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path, target) if name in UNCHECKED else None


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype's check of one function's arguments and result.

    `Self` counts as anything: jaxtyping hands over functions without their class, and beartype refuses it then.
    """
    hints = function.__annotations__
    hints.update({name: Any for name, hint in hints.items() if hint is Self})
    return _typed(function)  # type: ignore[no-any-return]


def install() -> None:
    """Check what is imported of the package from now on."""
    install_import_hook("sememe", f"{__name__}.check")
    sys.meta_path.insert(0, Unchecked)
