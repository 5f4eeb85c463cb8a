"""What was published, and where our numbers are: tables, claims, choices. Reads no file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError, nearest

__all__ = ["CHOICE", "Choice", "Claim", "Column", "ResultsConfig", "Row", "Setting", "Table"]

CHOICE = "CHOICE"
"""What stands for a file where a number is that of a choice."""


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
