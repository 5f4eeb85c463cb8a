"""Numbers by where they are, FILE#PATH: files walked, atlases asked, choices made. Knows no claim."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import duckdb

from sememe import artifact
from sememe.errors import SememeError, nearest
from sememe.results.config import CHOICE, Choice

__all__ = ["NEVER", "NOT_ALWAYS", "Reader", "beside", "endless", "missing"]

SQL = "SELECT "
NEVER = "never reached"
"""The cause of a number that was measured and has no end: more than any other."""
NOT_ALWAYS = "not reached in"
"""How the cause begins of a number whose interval has no upper end."""


def beside(base: Path, atlas: Path) -> list[Path]:
    """Explanations and effects of an atlas, as far as they are there."""
    places = (base / kind / Path(*atlas.parts[1:]) for kind in ("explanations", "effects"))
    return [place for place in places if (place / artifact.META).is_file()]


def missing(statistic: dict[str, Any]) -> bool:
    """Whether there is no number because none was measured."""
    return statistic["value"] is None and statistic.get("cause") != NEVER


def endless(statistic: dict[str, Any]) -> dict[str, Any]:
    """The same with the ends that JSON cannot hold: what is never reached is above everything that is."""
    cause = str(statistic.get("cause", ""))
    if cause == NEVER:
        low = statistic.get("low")
        return {"value": math.inf, "low": math.inf if low is None else low, "high": math.inf}
    return {**statistic, "high": math.inf} if cause.startswith(NOT_ALWAYS) else statistic


class _Missing(NamedTuple):
    """Why a number is not there."""

    cause: str


class Reader:
    """Files and atlases of a recipe's folder, each opened once."""

    def __init__(self, base: Path, choices: Sequence[Choice] = ()) -> None:
        self.base = base
        self.choices = {choice.name: choice for choice in choices}
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def statistic(self, reference: str) -> dict[str, Any]:
        """{"value", and "low" and "high" where there is an interval}; a value of None has its "cause"."""
        file, _, path = reference.partition("#")
        if file == CHOICE:
            return self._choose(self.choices[path])
        found = self._ask(file, path) if path.startswith(SQL) else self._walk(file, path)
        if isinstance(found, _Missing):
            return {"value": None, "cause": found.cause}
        if isinstance(found, dict) and not {"value", "mean"} & set(found):
            return {"value": None, "cause": f"{path} is no number"}
        if isinstance(found, dict):
            value = found.get("value", found.get("mean"))
            measured = value is not None or found.get("cause") == NEVER
            ends = ("low", "high") if measured else ()
            about = {k: found[k] for k in ends if found.get(k) is not None}
            cause = str(found.get("cause", "" if value is not None else "no number"))
            about |= {"cause": cause} if cause else {}
            return {"value": None if value is None else float(value)} | about
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            return {"value": None, "cause": f"{path} is no number"}
        return {"value": float(found)}

    def _choose(self, choice: Choice) -> dict[str, Any]:
        """The option with the largest number; of equal ones the first. All must be there."""
        found = {option: self.statistic(reference) for option, reference in choice.among.items()}
        for option, statistic in found.items():
            if missing(statistic):
                return {"value": None, "cause": f"{option}: {statistic['cause']}"}
        best = max(found, key=lambda option: endless(found[option])["value"])
        return {"value": float(best)}

    def _walk(self, file: str, path: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = json.loads((self.base / file).read_text(encoding="utf-8"))
            except OSError:
                self._files[file] = _Missing(f"no {file}")
        found = self._files[file]
        for part in path.split("/"):
            if isinstance(found, _Missing):
                return found
            found = _into(found, part.replace("~1", "/"))
        return found

    def _ask(self, file: str, query: str) -> Any:
        """The one number that a query of an atlas gives."""
        from sememe.atlas import open_atlas

        if file not in self._files:
            place = Path(file)
            views = {path.relative_to(self.base).parts[0]: path for path in beside(self.base, place)}
            try:
                atlas = open_atlas(self.base / place, **views)
                self._files[file] = self._stack.enter_context(contextlib.closing(atlas))
            except SememeError as error:
                self._files[file] = _Missing(str(error))
        found = self._files[file]
        if isinstance(found, _Missing):
            return found
        try:
            rows = found.query(query)
        except duckdb.Error as error:
            return _Missing(str(error).splitlines()[0])
        if len(rows) != 1 or len(rows[0]) != 1:
            return _Missing(f"{len(rows)} rows instead of one number")
        (value,) = rows[0].values()
        return _Missing("no row that it is about") if value is None else float(value)


def _into(found: Any, part: str) -> Any:
    """One step: a key, or of a list a place, `key=value`, `max:key`, `min:key` or `mean:key`."""
    if isinstance(found, dict):
        return found[part] if part in found else _Missing(f"no {part}; {nearest(part, found)}")
    if not isinstance(found, list):
        return _Missing(f"nothing below {part}")
    if part.lstrip("-").isdigit():
        place = int(part)
        return found[place] if -len(found) <= place < len(found) else _Missing(f"only {len(found)} entries")
    rule, colon, key = part.partition(":")
    if colon and rule in ("max", "min", "mean"):
        numbers = [(one[key], one) for one in found if isinstance(one, dict) and one.get(key) is not None]
        if not numbers:
            return _Missing(f"no entry has {key}")
        if rule == "mean":
            return sum(number for number, _ in numbers) / len(numbers)
        return (max if rule == "max" else min)(numbers, key=lambda pair: pair[0])[1]
    key, equals, value = part.partition("=")
    if equals:
        return next(
            (one for one in found if isinstance(one, dict) and _same(one.get(key), value)),
            _Missing(f"no entry with {part}"),
        )
    return _Missing(f"{part} must be a place, key=value, max:key, min:key or mean:key")


def _same(found: Any, text: str) -> bool:
    """Whether a value is what a path names: the text itself, or the same number."""
    if isinstance(found, int | float) and not isinstance(found, bool):
        with contextlib.suppress(ValueError):
            return math.isclose(found, float(text), rel_tol=1e-6)
    return str(found) == text
