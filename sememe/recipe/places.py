"""What a recipe's parts are called and where they lie. Knows names and paths; builds no config of a verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sememe import remote
from sememe.config import Config
from sememe.errors import ConfigError, nearest
from sememe.recipe.tables import TWIN, Recipe, Table

__all__ = ["Places", "Stage", "Trained", "place_of"]


class Stage(NamedTuple):
    """One verb of a recipe, with all its options."""

    verb: str
    """harvest, train, compare, ... or results: the published numbers beside ours."""
    name: str
    """The dictionary it is about, or its table's name; "" for the only one."""
    path: Path
    """The artifact it makes."""
    config: Config
    """The verb's own config."""

    @property
    def label(self) -> str:
        """What people call it: "train", "train small"."""
        return f"{self.verb} {self.name}".rstrip()


class Trained(NamedTuple):
    """A dictionary that the recipe trains."""

    place: Path
    """Inside the folder of each kind of result: dictionary/PLACE, report/PLACE."""
    store: Path | None
    """The store it is trained on; None if it is trained live."""
    table: Table
    """Its train table."""


def place_of(recipe: Recipe, out: str | Path | None) -> Path:
    """The folder of a recipe's results: artifacts/NAME, or artifacts/NAME/SCALE, if none is given.

    Raises:
        ConfigError: it is on object storage.
    """
    if out is not None and (url := remote.address(out)) is not None:
        raise ConfigError(
            "a recipe's results must lie on a disk",
            url,
            "Run it here; then `sememe publish ... --out` with that address, or verb by verb.",
        )
    return Path(out) if out is not None else Path("artifacts") / recipe.name / recipe.scale


class Places:
    """A recipe in a folder.

    Args:
        recipe: Its tables.
        base: The folder of its results.
    """

    def __init__(self, recipe: Recipe, base: Path) -> None:
        self.recipe, self.base = recipe, base
        self.where = f"the recipe {recipe.name}"
        model = recipe.model
        if recipe.pretrain is not None:
            if "model" in model:
                raise ConfigError(
                    "[model] must not name a model where [pretrain] makes one",
                    repr(model["model"]),
                    "Drop model there, or drop [pretrain].",
                )
            model = {**model, "model": str(base / "model")}
        self.model = model
        self.shared: dict[str, Any] = {"model": model, "text": recipe.text}
        self.stores = {name: base / "store" / name for name in recipe.harvests}
        """Where each harvest goes, by its name."""
        self.trained: dict[str, Trained] = {}
        """By label: "small", "small/k16" of a sweep, or "" for the only one. Filled when train stages are made."""

    def harvest_of(self, table: Table) -> str:
        """Which of the recipe's harvests a table is about: the first, if it does not say."""
        name = table.get("store", next(iter(self.stores), None))
        if name is None:
            raise ConfigError(
                f"a stage that reads a store must have a harvest in the recipe {self.recipe.name}",
                "none",
                "Add [harvest], or train live.",
            )
        if name not in self.stores:
            raise ConfigError(
                f"store must name a harvest of the recipe {self.recipe.name}",
                repr(name),
                nearest(str(name), self.stores) if any(self.stores) else "Leave it out: there is one store.",
            )
        return str(name)

    def dictionary(self, label: str) -> Path:
        """Where a trained dictionary or a fitted baseline lies."""
        if label in self.recipe.baselines:
            return self.base / "baseline" / label
        return self.base / "dictionary" / self.trained[label].place

    def store_of(self, label: str) -> Path | None:
        """The store that a trained dictionary or a fitted baseline comes from; None if it was trained live."""
        if label in self.recipe.baselines:
            return self.stores[self.harvest_of(self.recipe.baselines[label])]
        return self.trained[label].store

    def named(self, key: str, value: Any, *, baselines: bool = False) -> list[str]:
        """The dictionaries that an option names: "small", "small/k16" of a sweep, or all of that as "small".

        Args:
            key: The option, for the error.
            value: A name or several.
            baselines: Whether fitted ones may be named, too.

        Raises:
            ConfigError: the recipe makes none of that name.
        """
        known = [*self.trained, *(self.recipe.baselines if baselines else ())]
        found = []
        for wanted in [value] if isinstance(value, str) else list(value):
            here = [name for name in known if name == wanted or name.startswith(f"{wanted}/")]
            if not here:
                raise ConfigError(
                    f"{key} must name dictionaries that the recipe {self.recipe.name} trains",
                    repr(wanted),
                    nearest(str(wanted), known),
                )
            found += here
        return list(dict.fromkeys(found))

    def about(self, stage: str, table: Table) -> tuple[list[str], Table]:
        """The trained dictionaries that a stage is about, all if its table does not say, and the rest of the table."""
        rest = {key: value for key, value in table.items() if key != "dictionaries"}
        if "dictionaries" not in table:
            return list(self.trained), rest
        return self.named(f"dictionaries of [{stage}]", table["dictionaries"]), rest

    def twins_beside(self, label: str) -> dict[str, Any]:
        """The option that puts [twin]'s beside a dictionary that reads and writes what it does."""
        twin = self.recipe.twin
        if twin is None:
            return {}
        own, of = self.trained[label].table, self.recipe.dictionaries[twin["of"]]
        same = all(own.get(side) == of.get(side) for side in ("inputs", "outputs"))
        return {"twins": (self.twin_path(),)} if same else {}

    def twin_path(self) -> Path:
        """Where [twin]'s dictionary lies."""
        assert self.recipe.twin is not None
        return self.base / TWIN / (self.recipe.twin["of"] or "dictionary")
