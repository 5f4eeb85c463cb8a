"""A recipe as it is written: its tables, and the stages they stand for. Runs nothing.

A recipe is a TOML file with a `name`, the shared tables `[model]`, `[text]` and `[policy]`, and one table per
stage: `[harvest]`, `[train]`, `[fit]`, `[evaluate]`, `[interpret]`, `[effects]`, `[explain]`, `[export]`,
`[compare]`. A stage's table holds its verb's options; where it reads and writes follows from the name:

    artifacts/NAME/{store, dictionary, baseline, report, atlas, effects, explanations, site, comparison}

Several dictionaries are `[train.NAME]` tables with an architecture each, or come from a `[train.sweep]`; their
results lie one folder deeper: `dictionary/NAME`, `report/NAME`. `[fit.NAME]` tables, with a baseline each, add
baselines and sparse coders in `baseline/NAME`. A `[twin]` table with `of = "NAME"` harvests and trains that dictionary
once more on the model with its weights shuffled, in `twin/store` and `twin/NAME`: a null beside
all numbers. With a `[compare]` table all of them are compared at the end, and
`[evaluate]`, `[interpret]` and `[export]` happen only where their tables are there.

`[evaluate]` and `[interpret]` may name which of the `dictionaries` they are about (effects, explanations and pages
are of those interpreted), and `[interpret]` dictionaries of the recipe `against` which to look for near latents.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from sememe.config import Config, read_toml
from sememe.errors import ConfigError, nearest

__all__ = ["TWIN", "Recipe", "Stage", "place_of", "read_recipe", "stages"]

SHARED = ("model", "text", "policy")
STAGES = ("harvest", "train", "fit", "evaluate", "interpret", "effects", "explain", "export", "compare")
FIT_LIKE_THIS = 'Write [fit.pca] with baseline = {kind = "pca"}.'
TWIN = "twin"
OPTIONAL = ("effects", "explain", "compare")
"""Stages that happen only where their tables are there."""


class Recipe(NamedTuple):
    """A recipe's tables as plain data.

    `dictionaries` maps a name to a train table; "" is the only one. `baselines` maps a name to a fit table.
    """

    name: str
    model: dict[str, Any]
    text: dict[str, Any]
    policy: dict[str, Any]
    harvest: dict[str, Any]
    dictionaries: dict[str, dict[str, Any]]
    baselines: dict[str, dict[str, Any]]
    evaluate: dict[str, Any] | None
    interpret: dict[str, Any] | None
    effects: dict[str, Any] | None
    explain: dict[str, Any] | None
    export: dict[str, Any] | None
    compare: dict[str, Any] | None
    twin: dict[str, Any] | None = None


class Stage(NamedTuple):
    """One verb of a recipe, with all its options."""

    verb: str
    """harvest, train, fit, evaluate, interpret, effects, explain, export or compare."""
    name: str
    """The dictionary it is about; "" for the only one, and for harvest."""
    path: Path
    """The artifact it makes."""
    config: Config
    """The verb's own config."""

    @property
    def label(self) -> str:
        """What people call it: "train", "train small"."""
        return f"{self.verb} {self.name}".rstrip()


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe's shape; each verb checks its own options when its turn comes, or `run` before.

    Raises:
        ConfigError: the file is missing, not TOML, or holds a table that no stage knows.
    """
    data = read_toml(path)
    known = ("name", *SHARED, *STAGES, TWIN)
    for key in data:
        if key not in known:
            raise ConfigError(f"a table of the recipe {path} must be known", repr(key), nearest(key, known))
    name = data.get("name", Path(path).stem)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            "a recipe's name must be letters, digits, '.', '-' and '_'", repr(name), "Change name."
        )
    for key in (*SHARED, *STAGES, TWIN):
        if not isinstance(data.get(key, {}), dict):
            raise ConfigError(
                f"{key} must be a table of the recipe {path}", repr(data[key]), f"Write [{key}]."
            )
    if "harvest" not in data or "train" not in data:
        raise ConfigError(
            f"the recipe {path} must have the tables [harvest] and [train]",
            ", ".join(data) or "nothing",
            "Add them.",
        )
    dictionaries = _named(data["train"], "architecture")
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
    optional = STAGES[3:] if "compare" in data else OPTIONAL
    return Recipe(
        name,
        data.get("model", {}),
        data.get("text", {}),
        data.get("policy", {}),
        data["harvest"],
        dictionaries,
        baselines,
        **{stage: data.get(stage, None if stage in optional else {}) for stage in STAGES[3:]},
        twin=_twin_of(data, dictionaries),
    )


def _named(table: dict[str, Any], mark: str) -> dict[str, dict[str, Any]]:
    """A table's named parts, those that hold `mark`, each with what all share; the table itself as "" if none does."""
    named = {key: value for key, value in table.items() if isinstance(value, dict) and mark in value}
    common = {key: value for key, value in table.items() if key not in named}
    return {key: common | value for key, value in named.items()} if named else {"": table}


def _baselines_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and "baseline" not in value and name != "baseline":
            raise ConfigError(f"[fit.{name}] must have a baseline", _keys(value), FIT_LIKE_THIS)
    found = _named(table, "baseline")
    if "" in found:
        raise ConfigError("[fit] must hold named baselines", _keys(table), FIT_LIKE_THIS)
    return found


def _twin_of(data: dict[str, Any], dictionaries: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """[twin], checked: which dictionary it is of, and what is shuffled."""
    if TWIN not in data:
        return None
    table = {"of": next(iter(dictionaries)), "randomise": "layers", **data[TWIN]}
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


def _keys(table: dict[str, Any]) -> str:
    return ", ".join(table) or "an empty table"


def place_of(recipe: Recipe, out: str | Path | None) -> Path:
    """The folder of a recipe's results: artifacts/NAME if none is given."""
    return Path(out) if out is not None else Path("artifacts") / recipe.name


def stages(recipe: Recipe, base: Path) -> list[Stage]:
    """Every stage in order, its config built and so checked.

    Raises:
        ConfigError: an option of a stage is unknown, out of range, or without effect; or what is trained on is what
            is evaluated on.
    """
    from sememe.harvest import HarvestConfig
    from sememe.train import TrainConfig, swept_names

    where = f"the recipe {recipe.name}"
    store = base / "store"
    shared = {"model": recipe.model, "text": recipe.text}
    harvest = HarvestConfig.build({**shared, "policy": recipe.policy, **recipe.harvest, "out": store}, where)
    found = [Stage("harvest", "", store, harvest)]
    trained: dict[str, Path] = {}
    beside: dict[str, Any] = {}
    if recipe.twin is not None:
        beside = {"twins": (base / TWIN / (recipe.twin["of"] or "dictionary"),)}
        found += _twin(recipe, base / TWIN, harvest, where)
    for name, table in recipe.dictionaries.items():
        out = base / "dictionary" / name
        train = TrainConfig.build({**table, "store": store, "out": out}, where)
        found.append(Stage("train", name, out, train))
        for member in swept_names(train):
            place = Path(name) / member
            trained["" if place == Path() else str(place)] = place
    # All dictionaries before the first atlas, which may look into them.
    for label, place in trained.items():
        fitting = beside if _same_place(recipe, label) else {}
        found += _after_training(recipe, label, base, place, list(trained), fitting, where)
    found += _baselines(recipe, base, store, list(trained), where)
    if recipe.compare is not None:
        from sememe.compare import CompareConfig

        out = base / "comparison"
        training = [stage for stage in found if isinstance(stage.config, TrainConfig) and stage.name != TWIN]
        n_trained = sum(
            len(swept_names(stage.config)) for stage in training if isinstance(stage.config, TrainConfig)
        )
        if n_trained + len(recipe.baselines) < 2:
            raise ConfigError(
                f"a recipe that ends in [compare] must make at least two dictionaries ({recipe.name})",
                n_trained + len(recipe.baselines),
                "Add [train.NAME] or [fit.NAME] tables or a sweep, or drop [compare].",
            )
        compared = tuple(
            stage.path for stage in found if stage.verb in ("train", "fit") and stage.name != TWIN
        )
        about = {"dictionaries": compared, "store": store, "out": out, **beside}
        compare = CompareConfig.build({**shared, **recipe.compare, **about}, where)
        found.append(Stage("compare", "", out, compare))
    if harvest.split != "train" and any(stage.verb in ("evaluate", "compare") for stage in found):
        raise ConfigError(
            "a recipe that evaluates must harvest the train split, or no document is held out",
            repr(harvest.split),
            "Leave split out of [harvest].",
        )
    return found


def _same_place(recipe: Recipe, label: str) -> bool:
    """Whether a dictionary reads and writes what [twin]'s does, so that the twin is a null of its numbers."""
    if recipe.twin is None:
        return False
    tables = recipe.dictionaries
    own = tables.get(label) or tables.get(label.split("/")[0]) or tables.get("", {})
    of = tables[recipe.twin["of"]]
    return all(own.get(side) == of.get(side) for side in ("inputs", "outputs"))


def _twin(recipe: Recipe, base: Path, harvest: Config, where: str) -> list[Stage]:
    """A store of the shuffled model, and a dictionary trained on it as one of the recipe's is."""
    from sememe.harvest import HarvestConfig
    from sememe.train import TrainConfig

    assert recipe.twin is not None
    model = {**recipe.model, "randomise": recipe.twin["randomise"]}
    resolved = {**harvest.resolved(), "model": model, "out": base / "store"}
    out = base / (recipe.twin["of"] or "dictionary")
    train = {**recipe.dictionaries[recipe.twin["of"]], "store": base / "store", "out": out}
    return [
        Stage("harvest", TWIN, base / "store", HarvestConfig.build(resolved, where)),
        Stage("train", TWIN, out, TrainConfig.build(train, where)),
    ]


def _baselines(recipe: Recipe, base: Path, store: Path, trained: list[str], where: str) -> list[Stage]:
    """The fit stages. `over` is the name of one of the dictionaries trained: "small", or "small/k16" of a sweep."""
    if not recipe.baselines:
        return []
    from sememe.fit import FitConfig

    found = []
    for name, table in recipe.baselines.items():
        about: dict[str, Any] = {"store": store, "out": base / "baseline" / name}
        if "over" in table:
            over = str(table["over"])
            if over not in trained:
                raise ConfigError(
                    f"over must name a dictionary that the recipe {recipe.name} trains",
                    repr(over),
                    nearest(over, trained),
                )
            about["over"] = base / "dictionary" / over
        found.append(Stage("fit", name, about["out"], FitConfig.build({**table, **about}, where)))
    return found


def _after_training(
    recipe: Recipe,
    name: str,
    base: Path,
    place: Path,
    trained: list[str],
    beside: dict[str, Any],
    where: str,
) -> list[Stage]:
    """What happens to one dictionary, each result at `place` in the folder of its kind."""
    kinds = ("dictionary", "report", "atlas", "effects", "explanations", "site")
    paths = {kind: base / kind / place for kind in kinds}
    store = base / "store"
    shared = {"model": recipe.model, "text": recipe.text}
    found: list[Stage] = []
    reported, evaluate_table = _about(recipe, "evaluate", name, trained)
    if reported:
        from sememe.evaluate import EvaluateConfig

        about = {"dictionary": paths["dictionary"], "store": store, "out": paths["report"], **beside}
        evaluate = EvaluateConfig.build({**shared, **evaluate_table, **about}, where)
        found.append(Stage("evaluate", name, paths["report"], evaluate))
    interpreted, interpret_table = _about(recipe, "interpret", name, trained)
    if not interpreted:
        return found
    from sememe.interpret import InterpretConfig

    # Over the store's own text, whose activations need no second forward, unless the recipe asks for another.
    elsewhere = {"n_tokens", "split", "text"} & set(interpret_table)
    origin = shared if elsewhere else {"model": recipe.model, "store": store}
    made: dict[str, Any] = {"dictionaries": (paths["dictionary"],), "out": paths["atlas"]}
    if "against" in interpret_table:
        others = _trained(recipe, "against", interpret_table["against"], trained)
        made["against"] = tuple(base / "dictionary" / other for other in others if other != name)
    interpret = InterpretConfig.build({**origin, **interpret_table, **made}, where)
    found.append(Stage("interpret", name, paths["atlas"], interpret))
    if recipe.effects is not None:
        from sememe.effects import EffectsConfig

        read = {"atlas": paths["atlas"], "dictionary": paths["dictionary"], "out": paths["effects"]}
        effects = EffectsConfig.build({"model": recipe.model, **recipe.effects, **read}, where)
        found.append(Stage("effects", name, paths["effects"], effects))
    if recipe.explain is not None:
        from sememe.explain import ExplainConfig

        about = {"atlas": paths["atlas"], "out": paths["explanations"]}
        explain = ExplainConfig.build({**recipe.explain, **about}, where)
        found.append(Stage("explain", name, paths["explanations"], explain))
    if recipe.export is not None:
        from sememe.browse import ExportConfig

        beside = {
            "report": paths["report"] if reported else None,
            "explanations": paths["explanations"] if recipe.explain is not None else None,
        }
        about = {"atlas": paths["atlas"], "out": paths["site"]}
        export = ExportConfig.build({**recipe.export, **beside, **about}, where)
        found.append(Stage("export", name, paths["site"], export))
    return found


def _about(recipe: Recipe, stage: str, name: str, trained: list[str]) -> tuple[bool, dict[str, Any]]:
    """Whether a stage is about a dictionary, and its table without the key that says so."""
    table = getattr(recipe, stage)
    if table is None:
        return False, {}
    rest = {key: value for key, value in table.items() if key != "dictionaries"}
    if "dictionaries" not in table:
        return True, rest
    return name in _trained(recipe, f"dictionaries of [{stage}]", table["dictionaries"], trained), rest


def _trained(recipe: Recipe, key: str, value: Any, trained: list[str]) -> list[str]:
    """The recipe's dictionaries that an option names: "small", "small/k16" of a sweep, or all of that as "small"."""
    named = [value] if isinstance(value, str) else list(value)
    found = []
    for wanted in named:
        here = [name for name in trained if name == wanted or name.startswith(f"{wanted}/")]
        if not here:
            raise ConfigError(
                f"{key} must name dictionaries that the recipe {recipe.name} trains",
                repr(wanted),
                nearest(str(wanted), trained),
            )
        found += here
    return found
