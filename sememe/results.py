"""The published numbers beside ours: a page of tables and claims, read from what a recipe's stages made.

A number is named by where it is, `FILE#PATH`: a JSON file in the recipe's folder, and the way to a value in it.

    report/small/report.json#metrics/l0                the statistic with its interval
    geometry/geometry.json#rows/name=small/numbers/top_1    the entry of a list whose `name` is "small"
    grid/relu/plots/grid.json#dictionaries/max:recall/penalty    of the entry with the largest recall
    comparison/comparison.json#rows/name=small~1k16/metrics/fvu    a / inside a name is written ~1
    atlas/small#SELECT count(*) FROM latents WHERE n_active > 0    an atlas, asked in SQL; effects and explanations
                                                                   of the same name are opened with it
    CHOICE#best penalty                                the option that a [[expected.choices]] of this name finds best

A number that is not there stands as missing, with its cause; nothing is guessed. Knows artifacts' files and no verb.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import duckdb
from pydantic import Field, model_validator
from scipy.stats import spearmanr

from sememe import artifact, figures
from sememe.config import Config
from sememe.errors import ConfigError, MismatchError, SememeError, nearest

__all__ = ["RESULTS", "ResultsConfig", "results"]

VERSION = 2
RESULTS = "results.json"
SQL = "SELECT "
CHOICE = "CHOICE"
"""What stands for a file where a number is that of a choice."""
NEVER = "never reached"
"""The cause of a number that was measured and has no end: more than any other."""
NOT_ALWAYS = "not reached in"
"""How the cause begins of a number whose interval has no upper end."""
Verdict = Literal["holds", "does not hold", "undecided", "not measured"]


class Setting(Config):
    """A difference between the published experiment and this one."""

    what: str
    """Model, text, width, steps ..."""
    published: str
    """What they had."""
    here: str
    """What this scale has."""


class Column(Config):
    """A published metric, and where ours is."""

    name: str
    """What stands above the column."""
    value: str
    """The way to the number in the table's file, `metrics/l0`; or a whole FILE#PATH. `{at}` is the row's."""


class Row(Config):
    """A row of a published table."""

    name: str
    """What stands before it."""
    at: str = ""
    """What `{at}` stands for in the table's file and the columns' values."""
    published: tuple[float | str, ...] = ()
    """A number for each column; "" where none was published, a text where it was said in words."""


class Table(Config):
    """A published table."""

    title: str
    """Its heading."""
    source: str = ""
    """Where it was published."""
    note: str = ""
    """What a reader has to know: other definitions, corrections."""
    file: str = ""
    """The file of its numbers, `report/{at}/report.json`."""
    plot: bool = False
    """Draw it, too: a line for each row, a panel for each column."""
    columns: tuple[Column, ...] = Field(min_length=1)
    """Its metrics."""
    rows: tuple[Row, ...] = Field(min_length=1)
    """Its rows."""

    @model_validator(mode="after")
    def _as_many_numbers(self) -> Self:
        for row in self.rows:
            if row.published and len(row.published) != len(self.columns):
                raise ConfigError(
                    f"{self.title}, {row.name}: a number must be published for each of {len(self.columns)} columns",
                    len(row.published),
                    'Write "" for those that are missing, or leave all of them out.',
                )
        return self

    def reference(self, row: Row, column: Column) -> str:
        """Where a cell's number is."""
        value = column.value.replace("{at}", row.at)
        return value if "#" in value else f"{self.file.replace('{at}', row.at)}#{value}"


class Choice(Config):
    """Which of several numbers, options of one another, is the largest: a best penalty."""

    name: str
    """How columns and claims call it: CHOICE#NAME."""
    among: dict[str, str] = Field(min_length=2)
    """The options, numbers, each with the FILE#PATH of what it is judged by."""

    @model_validator(mode="after")
    def _options_are_numbers(self) -> Self:
        for option in self.among:
            try:
                float(option)
            except ValueError:
                raise ConfigError(
                    f"an option of the choice {self.name!r} must be a number",
                    repr(option),
                    "Write it as one.",
                ) from None
        return self


class Claim(Config):
    """A sentence that was published, as a relation of numbers."""

    claim: str
    """The sentence."""
    source: str = ""
    """Where it was published."""
    published: str = ""
    """Their numbers."""
    values: tuple[str, ...] = Field(min_length=1)
    """Our numbers, each a FILE#PATH."""
    relation: Literal["above", "below", "rising", "falling", "near", "apart"]
    """above, below, near, apart: the first value and `than`, or the second value. rising, falling: all, in order."""
    than: float | None = None
    """What the only value is compared with."""
    within: float | None = Field(default=None, gt=0)
    """Of near and apart: how far away is near."""

    @model_validator(mode="after")
    def _enough_values(self) -> Self:
        series = self.relation in ("rising", "falling")
        n = len(self.values) + (self.than is not None)
        if (n < 3 or self.than is not None) if series else n != 2:
            raise ConfigError(
                f"the claim {self.claim!r} must have {'at least 3 values and no than' if series else 'two numbers'}",
                n,
                "Add values." if series else "Give two values, or one and than.",
            )
        if (self.relation in ("near", "apart")) != (self.within is not None):
            raise ConfigError(
                f"the claim {self.claim!r} must say within if and only if its relation is near or apart",
                self.within,
                "Set within, or take another relation." if self.within is None else "Drop within.",
            )
        return self


class ResultsConfig(Config):
    """What was published, and where our numbers are."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"base", "out"})

    base: Path
    """The folder of the recipe's results."""
    out: Path = Path("artifacts/results")
    """The folder to make."""
    name: str = ""
    """The recipe's name."""
    scale: str = ""
    """The recipe's scale."""
    title: str
    """What was published, by whom."""
    conversion: str = ""
    """How published coefficients were converted to this package's loss."""
    settings: tuple[Setting, ...] = ()
    """Differences between the published experiment and this one."""
    tables: tuple[Table, ...] = ()
    """Published tables."""
    claims: tuple[Claim, ...] = ()
    """Published sentences."""
    choices: tuple[Choice, ...] = ()
    """Numbers that are options: which of them is best."""

    @model_validator(mode="after")
    def _something_is_expected(self) -> Self:
        if not self.tables and not self.claims:
            raise ConfigError("[expected] must hold tables or claims", "neither", "Add [[expected.tables]].")
        for reference in self.references():
            file, mark, path = reference.partition("#")
            if not mark or not file or not path or ".." in Path(file).parts or Path(file).is_absolute():
                raise ConfigError(
                    "a number must be named by a file in the recipe's folder and the way to it, FILE#PATH",
                    repr(reference),
                    "Write for example report/report.json#metrics/l0.",
                )
        return self

    def references(self) -> list[str]:
        """Every number's FILE#PATH."""
        cells = [t.reference(row, column) for t in self.tables for row in t.rows for column in t.columns]
        found = [*cells, *(value for claim in self.claims for value in claim.values)]
        return list(dict.fromkeys(one for reference in found for one in self._read(reference)))

    def _read(self, reference: str) -> list[str]:
        """What has to be read for a number: itself, or all that a choice is among."""
        file, mark, name = reference.partition("#")
        if file != CHOICE or not mark:
            return [reference]
        chosen = next((choice for choice in self.choices if choice.name == name), None)
        if chosen is None:
            known = [choice.name for choice in self.choices]
            raise ConfigError(
                "a choice must be one of [[expected.choices]]", repr(name), nearest(name, known)
            )
        return list(chosen.among.values())

    def files(self) -> list[str]:
        """Every file that a number is read from."""
        return list(dict.fromkeys(reference.partition("#")[0] for reference in self.references()))


def results(config: ResultsConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Write the page, or open it if it is there.

    The artifact holds results.json, results.md with its plots, and results.html.

    Args:
        config: What was published, and where our numbers are.
        fresh: Replace whatever stands at config.out.

    Raises:
        MismatchError: something that is no artifact stands at config.out.
    """
    parents = _parents(config)
    identity = artifact.identity_of("results", VERSION, config, parents)
    with contextlib.suppress(MismatchError):  # a page of other numbers: written again, it takes no time
        there = None if fresh else artifact.find(config.out, "results", identity)
        if there is not None:
            return there
    with (
        _Reader(config.base, config.choices) as reader,
        artifact.building(
            config.out, kind="results", version=VERSION, config=config, parents=parents, fresh=True
        ) as work,
    ):
        data = _data(config, reader)
        artifact.write_json(work.path / RESULTS, data)
        figures.write_results(work.path, data)
        work.extra = {
            "verdicts": {claim["claim"]: claim["verdict"] for claim in data["claims"]},
            "n_missing": data["n_missing"],
        }
    return artifact.load(config.out, "results")


def _parents(config: ResultsConfig) -> dict[str, str]:
    """The artifacts that numbers are read from; those that are not there are left out, and made results differ."""
    found = {}
    for file in config.files():
        folder = config.base / file
        while not (folder / artifact.META).is_file() and folder != config.base:
            folder = folder.parent
        if folder != config.base:
            place = folder.relative_to(config.base)
            found[str(place)] = artifact.load(folder).fingerprint
            if place.parts[0] == "atlas":
                found |= {
                    str(path.relative_to(config.base)): artifact.load(path).fingerprint
                    for path in _beside(config.base, place)
                }
    return found


def _beside(base: Path, atlas: Path) -> list[Path]:
    """Explanations and effects of an atlas, as far as they are there."""
    places = (base / kind / Path(*atlas.parts[1:]) for kind in ("explanations", "effects"))
    return [place for place in places if (place / artifact.META).is_file()]


def _data(config: ResultsConfig, reader: _Reader) -> dict[str, Any]:
    tables: list[dict[str, Any]] = []
    for table in config.tables:
        rows: list[dict[str, Any]] = []
        for row in table.rows:
            cells = [reader.statistic(table.reference(row, column)) for column in table.columns]
            published = row.published or ("",) * len(table.columns)
            rows.append({"name": row.name, "published": list(published), "here": cells})
        about = {"title": table.title, "source": table.source, "note": table.note, "plot": table.plot}
        tables.append({**about, "columns": [column.name for column in table.columns], "rows": rows})
    claims: list[dict[str, Any]] = []
    for claim in config.claims:
        values = [reader.statistic(reference) for reference in claim.values]
        claims.append(
            {
                "claim": claim.claim,
                "source": claim.source,
                "published": claim.published,
                "relation": claim.relation,
                "than": claim.than,
                "within": claim.within,
                "here": values,
                "verdict": _verdict(claim, values),
            }
        )
    cells = [cell for table in tables for row in table["rows"] for cell in row["here"]]
    cells += [value for claim in claims for value in claim["here"]]
    return {
        "format_version": 1,
        "name": config.name,
        "scale": config.scale,
        "title": config.title,
        "conversion": config.conversion,
        "settings": [setting.resolved() for setting in config.settings],
        "tables": tables,
        "claims": claims,
        "n_missing": sum(map(_missing, cells)),
    }


# -- claims --------------------------------------------------------------------------------------------------------


def _verdict(claim: Claim, values: Sequence[dict[str, Any]]) -> Verdict:
    """Whether our numbers are as was said; undecided where the intervals of the two overlap."""
    if any(_missing(value) for value in values):
        return "not measured"
    values = [_endless(value) for value in values]
    numbers = [value["value"] for value in values]
    if all(math.isinf(number) for number in numbers) and claim.than is None:
        return "undecided"
    if claim.relation in ("rising", "falling"):
        rho = _rank_correlation(numbers)
        return _word(rho >= RISING if claim.relation == "rising" else rho <= -RISING)
    left = values[0]
    right = {"value": claim.than} if claim.than is not None else values[1]
    if claim.relation in ("near", "apart"):
        assert claim.within is not None
        near = abs(left["value"] - right["value"]) <= claim.within
        return _word(near == (claim.relation == "near"))
    if _low(left) <= _high(right) and _low(right) <= _high(left) and left["value"] != right["value"]:
        return "undecided"
    above = left["value"] > right["value"]
    return _word(above if claim.relation == "above" else left["value"] < right["value"])


def _missing(statistic: dict[str, Any]) -> bool:
    """Whether there is no number because none was measured."""
    return statistic["value"] is None and statistic.get("cause") != NEVER


def _endless(statistic: dict[str, Any]) -> dict[str, Any]:
    """The same with the ends that JSON cannot hold: what is never reached is above everything that is."""
    cause = str(statistic.get("cause", ""))
    if cause == NEVER:
        low = statistic.get("low")
        return {"value": math.inf, "low": math.inf if low is None else low, "high": math.inf}
    return {**statistic, "high": math.inf} if cause.startswith(NOT_ALWAYS) else statistic


RISING = 0.5
"""Rank correlation of numbers with their places, from which they count as rising."""


def _word(held: bool) -> Verdict:
    return "holds" if held else "does not hold"


def _low(statistic: dict[str, Any]) -> float:
    low = statistic.get("low")
    return float(statistic["value"] if low is None else low)


def _high(statistic: dict[str, Any]) -> float:
    high = statistic.get("high")
    return float(statistic["value"] if high is None else high)


def _rank_correlation(numbers: Sequence[float]) -> float:
    """Spearman's, of numbers with their places; ties share a rank. 0 where all numbers are the same."""
    if len(set(numbers)) < 2:
        return 0.0
    return float(spearmanr(range(len(numbers)), numbers).statistic)


# -- reading -------------------------------------------------------------------------------------------------------


class _Missing(NamedTuple):
    """Why a number is not there."""

    cause: str


class _Reader:
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
            if _missing(statistic):
                return {"value": None, "cause": f"{option}: {statistic['cause']}"}
        best = max(found, key=lambda option: _endless(found[option])["value"])
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
            beside = {path.relative_to(self.base).parts[0]: path for path in _beside(self.base, place)}
            try:
                atlas = open_atlas(self.base / place, **beside)
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
