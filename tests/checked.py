"""Checks every annotated shape and type of the package. Only for tests: users pay nothing.

A check takes longer than most of what it checks, so in each test a function's first calls are checked, and of those
that follow one in so many: what is wrong with a shape is wrong from the start, in the test that is about it.

Knows modules' names and annotations, nothing of what they do. Programs that a test starts run unchecked.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, FunctionType, ModuleType
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, beartype

__all__ = ["EVERY", "FIRST", "UNCHECKED", "begin", "check", "install"]

FIRST = 25
"""Calls of a function that are checked in each test, at least."""
EVERY = 25
"""Of those that follow, one in so many is checked, too."""

UNCHECKED = {
    "sememe.collect.loops",
    "sememe.collect.pair_loops",
    "sememe.explain.lexical.loops",
    "sememe.kernels.cpu.loops",
    "sememe.kernels.cpu.sparse_loops",
    "sememe.kernels.cpu.steps",
    "sememe.kernels.gpu.groups",
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


_test = 0


def begin() -> None:
    """A test begins."""
    global _test
    _test += 1


class Turns:
    """Whether it is a call's turn to be checked."""

    def __init__(self) -> None:
        self.test, self.n = -1, 0

    def next(self) -> bool:
        """Of one more call."""
        if self.test != _test:
            self.test, self.n = _test, 0
        self.n += 1
        return self.n <= FIRST or self.n % EVERY == 0


_within: defaultdict[CodeType, Turns] = defaultdict(Turns)
"""Of functions that are defined within others, and anew each time."""


def in_part(function: FunctionType, wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    """Some calls of a function go through its checks; all others are as a user's."""
    if "<locals>" in function.__qualname__ and not _within[function.__code__].next():
        return function  # its checks would be written and compiled for each
    checked, turns = wrap(function), Turns()

    @functools.wraps(checked)
    def called(*arguments: Any, **options: Any) -> Any:
        return (checked if turns.next() else function)(*arguments, **options)

    return called


def install() -> None:
    """Check what is imported of the package from now on."""
    of_all = jaxtyping.jaxtyped

    def of_some(*, typechecker: Any) -> Callable[[Any], Any]:
        """What the hook puts around each function and class."""

        def around(made: Any) -> Any:
            wrap = of_all(typechecker=typechecker)
            plain = inspect.isfunction(made) and not inspect.iscoroutinefunction(made)
            return in_part(made, wrap) if plain else wrap(made)

        return around

    jaxtyping.jaxtyped = of_some
    jaxtyping.install_import_hook("sememe", f"{__name__}.check")
    sys.meta_path.insert(0, Unchecked)
