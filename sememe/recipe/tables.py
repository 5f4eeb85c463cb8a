"""A recipe's file: which tables there may be, what a scale changes, and the names of parts. Builds no config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sememe.config import read_toml
from sememe.errors import ConfigError, nearest

__all__ = ["ASKED", "TWIN", "Recipe", "Table", "read_recipe"]

Table = dict[str, Any]

SHARED = ("model", "text", "policy")
PER_DICTIONARY = ("evaluate", "interpret", "prompts", "effects", "explain", "export")
ON_DEMAND = ("prompts", "effects", "explain")
"""Of those, what happens only where its table is there."""
ASKED = ("circuit", "concepts", "erase", "intervene", "patch", "scrub", "steer", "trace")
"""Verbs that ask something of finished dictionaries: a table for each, if this version has the verb."""
ENDINGS = ("compare", "geometry", "toy", "grid", "publish", "expected", *ASKED)
"""With one of these, everything happens only where its table is there."""
MAKING = ("harvest", "train", "fit", "toy", "grid")
STAGES = ("pretrain", "harvest", "train", "fit", *PER_DICTIONARY, *ENDINGS)
TWIN, SCALE = "twin", "scale"
FIT_LIKE_THIS = 'Write [fit.pca] with baseline = {kind = "pca"}.'
OPTIONS = {
    "harvest": ("model", "text", "policy"),
    "compare": ("model", "text", "policy"),
    "geometry": ("model",),
    **dict.fromkeys(ASKED, ("model", "text", "policy")),
}
"""Options of a stage that are tables themselves: every other table inside is a part with a name."""


class Recipe(NamedTuple):
    """A recipe's tables as plain data, those of its scale laid over the others.

    Where there may be several of a kind, they are by name, and "" is the only one.
    """

    name: str
    scale: str
    """Which of its scales; "" where there are none."""
    model: Table
    text: Table
    policy: Table
    pretrain: Table | None
    harvests: dict[str, Table]
    dictionaries: dict[str, Table]
    """Train tables."""
    baselines: dict[str, Table]
    """Fit tables."""
    evaluate: Table | None
    interpret: Table | None
    prompts: Table | None
    effects: Table | None
    explain: Table | None
    export: Table | None
    comparisons: dict[str, Table]
    geometries: dict[str, Table]
    toys: dict[str, Table]
    grids: dict[str, Table]
    asked: dict[str, dict[str, Table]]
    """Tables of verbs about one dictionary, by verb and then by name."""
    publish: Table | None
    expected: Table | None
    twin: Table | None


def read_recipe(path: str | Path, scale: str | None = None) -> Recipe:
    """Read and check a recipe's shape; each verb checks its own options when its turn comes, or `run` before.

    Args:
        path: The TOML file.
        scale: Which of its scales; the first one if not given.

    Raises:
        ConfigError: the file is missing, not TOML, holds a table that no stage knows, or lacks the scale.
    """
    data = read_toml(path)
    _check_tables(data, path, ("name", SCALE, TWIN, *SHARED, *STAGES))
    data, scale = _at_scale(data, path, scale)
    name = data.get("name", Path(path).stem)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            "a recipe's name must be letters, digits, '.', '-' and '_'", repr(name), "Change name."
        )
    dictionaries = _marked(data["train"], "architecture") if "train" in data else {}
    stored = not all(table.get("live") for table in dictionaries.values())
    if ("harvest" not in data and stored) or not ({"train", "toy", "grid"} & set(data)):
        raise ConfigError(
            f"the recipe {path} must have the tables [harvest] and [train], or [toy] or [grid] instead",
            ", ".join(data) or "nothing",
            "Add them.",
        )
    baselines = _baselines_of(data["fit"]) if "fit" in data else {}
    if TWIN in dictionaries or TWIN in baselines:
        raise ConfigError(
            "a dictionary must not be named twin", f"[train.{TWIN}] or [fit.{TWIN}]", "Name it otherwise."
        )
    for baseline in baselines:
        if baseline in dictionaries:
            raise ConfigError(
                "a [fit.NAME] must have a name that no [train.NAME] has", repr(baseline), "Name it otherwise."
            )
    named = {stage: _parts(data[stage], OPTIONS[stage]) for stage in OPTIONS if stage in data}
    toys = {stage: _all_named(data[stage], stage) for stage in ("toy", "grid") if stage in data}
    _check_names(
        [*dictionaries, *baselines, *(part for parts in (*named.values(), *toys.values()) for part in parts)]
    )
    absent = PER_DICTIONARY if set(ENDINGS) & set(data) else ON_DEMAND
    return Recipe(
        name=name,
        scale=scale,
        model=data.get("model", {}),
        text=data.get("text", {}),
        policy=data.get("policy", {}),
        pretrain=data.get("pretrain"),
        harvests=named.get("harvest", {}),
        dictionaries=dictionaries,
        baselines=baselines,
        **{stage: data.get(stage, None if stage in absent else {}) for stage in PER_DICTIONARY},
        comparisons=named.get("compare", {}),
        geometries=named.get("geometry", {}),
        toys=toys.get("toy", {}),
        grids=toys.get("grid", {}),
        asked={verb: named[verb] for verb in ASKED if verb in named},
        publish=data.get("publish"),
        expected=data.get("expected"),
        twin=_twin_of(data, dictionaries),
    )


def _check_tables(data: Table, path: str | Path, known: tuple[str, ...]) -> None:
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"a table of the recipe {path} must be known", repr(key), nearest(key, known))
        if key != "name" and not isinstance(value, dict):
            raise ConfigError(f"{key} must be a table of the recipe {path}", repr(value), f"Write [{key}].")


def _at_scale(data: Table, path: str | Path, scale: str | None) -> tuple[Table, str]:
    """What is the same at all scales, with the tables of one laid over it; and which one that is."""
    scales = data.pop(SCALE, {})
    if scale is not None and scale not in scales:
        raise ConfigError(
            f"scale must be one that the recipe {path} has",
            repr(scale),
            nearest(scale, scales) if scales else "Leave it out: the recipe has none.",
        )
    if not scales:
        return data, ""
    _check_names(scales)
    for one, tables in scales.items():
        if not isinstance(tables, dict):
            raise ConfigError(
                f"[scale.{one}] of the recipe {path} must hold tables", repr(tables), "Write them."
            )
        _check_tables(tables, f"{path}, in [scale.{one}],", (TWIN, *SHARED, *STAGES))
    scale = next(iter(scales)) if scale is None else scale
    return merged(data, scales[scale]), scale


def merged(table: Table, over: Table) -> Table:
    """A table with another laid over it: tables are merged key by key, everything else is replaced."""
    out = dict(table)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def _parts(table: Table, options: tuple[str, ...]) -> dict[str, Table]:
    """A table's named parts, each laid over what all share; the table itself as "" if there are none."""
    named = {key: value for key, value in table.items() if isinstance(value, dict) and key not in options}
    common = {key: value for key, value in table.items() if key not in named}
    return {key: merged(common, value) for key, value in named.items()} if named else {"": table}


def _marked(table: Table, mark: str) -> dict[str, Table]:
    """The same, where a part is a table that holds `mark`."""
    others = tuple(key for key, value in table.items() if not (isinstance(value, dict) and mark in value))
    return _parts(table, others)


def _all_named(table: Table, stage: str) -> dict[str, Table]:
    """[toy.NAME] or [grid.NAME] tables: those that say how to train, or what to fit."""
    parts = {
        key: value
        for key, value in table.items()
        if isinstance(value, dict) and key not in ("planted", "train", "fit")
    }
    common = {key: value for key, value in table.items() if key not in parts}
    if not parts:
        raise ConfigError(
            f"[{stage}] must hold named tables",
            _keys(table),
            f"Write [{stage}.relu] with a table train of its own.",
        )
    return {key: merged(common, value) for key, value in parts.items()}


def _check_names(names: Iterable[str]) -> None:
    """Names become folders."""
    for name in names:
        if name and not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(
                "the name of a table must be letters, digits, '.', '+', '-' and '_'", repr(name), "Change it."
            )


def _baselines_of(table: Table) -> dict[str, Table]:
    for name, value in table.items():
        if isinstance(value, dict) and "baseline" not in value and name != "baseline":
            raise ConfigError(f"[fit.{name}] must have a baseline", _keys(value), FIT_LIKE_THIS)
    found = _marked(table, "baseline")
    if "" in found:
        raise ConfigError("[fit] must hold named baselines", _keys(table), FIT_LIKE_THIS)
    return found


def _twin_of(data: Table, dictionaries: dict[str, Table]) -> Table | None:
    """[twin], checked: which dictionary it is of, and what is shuffled."""
    if TWIN not in data:
        return None
    table = {"of": next(iter(dictionaries), ""), "randomise": "layers", **data[TWIN]}
    for key in table:
        if key not in ("of", "randomise"):
            raise ConfigError(
                "an option of [twin] must be known", repr(key), nearest(key, ("of", "randomise"))
            )
    if table["of"] not in dictionaries or "sweep" in dictionaries[table["of"]]:
        raise ConfigError(
            "[twin] must be of a single dictionary that the recipe trains",
            repr(table["of"]),
            "Set of to the NAME of a [train.NAME] without a sweep.",
        )
    if "compare" not in data and "evaluate" not in data:
        raise ConfigError(
            "[twin] must be left out where nothing is measured: it has no effect then",
            ", ".join(data),
            "Add [compare] or [evaluate].",
        )
    return table


def _keys(table: Table) -> str:
    return ", ".join(table) or "an empty table"
