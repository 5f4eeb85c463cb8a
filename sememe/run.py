"""A recipe: several verbs in order, each skipped when its result is there. Knows which verb feeds which.

A recipe is a TOML file with a `name`, the shared tables `[model]`, `[text]` and `[policy]`, and one table per
stage: `[harvest]`, `[train]`, `[evaluate]`, `[interpret]`, `[explain]`, `[export]`. A stage's table holds its verb's
options; where it reads and writes follows from the name:

    artifacts/NAME/{store, dictionary, report, atlas, explanations, site}

Several dictionaries are `[train.NAME]` tables with an architecture each, or come from a `[train.sweep]`; their
results lie one folder deeper: `dictionary/NAME`, `report/NAME`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sememe.config import read_toml
from sememe.errors import ArtifactError, ConfigError, nearest

__all__ = ["Recipe", "StageResult", "print_report", "read_recipe", "run"]

SHARED = ("model", "text", "policy")
STAGES = ("harvest", "train", "evaluate", "interpret", "explain", "export")


class Recipe(NamedTuple):
    """A recipe's tables as plain data. `dictionaries` maps a name to a train table; "" is the only one."""

    name: str
    model: dict[str, Any]
    text: dict[str, Any]
    policy: dict[str, Any]
    harvest: dict[str, Any]
    dictionaries: dict[str, dict[str, Any]]
    evaluate: dict[str, Any] | None
    interpret: dict[str, Any] | None
    explain: dict[str, Any] | None
    export: dict[str, Any] | None


class StageResult(NamedTuple):
    """What a stage did: its artifact, how long it took, how much memory it reached."""

    stage: str
    path: Path
    reused: bool
    seconds: float
    peak_gb: float


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe's shape; each verb checks its own options when its turn comes, or `run` before.

    Raises:
        ConfigError: the file is missing, not TOML, or holds a table that no stage knows.
    """
    data = read_toml(path)
    known = ("name", *SHARED, *STAGES)
    for key in data:
        if key not in known:
            raise ConfigError(f"a table of the recipe {path} must be known", repr(key), nearest(key, known))
    name = data.get("name", Path(path).stem)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            "a recipe's name must be letters, digits, '.', '-' and '_'", repr(name), "Change name."
        )
    for key in (*SHARED, *STAGES):
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
    train = data["train"]
    named = {
        key: value for key, value in train.items() if isinstance(value, dict) and "architecture" in value
    }
    common = {key: value for key, value in train.items() if key not in named}
    dictionaries = {key: common | value for key, value in named.items()} if named else {"": train}
    return Recipe(
        name,
        data.get("model", {}),
        data.get("text", {}),
        data.get("policy", {}),
        data["harvest"],
        dictionaries,
        *(data.get(stage, {} if stage != "explain" else None) for stage in STAGES[2:]),
    )


def run(path: str | Path, *, out: str | Path | None = None, fresh: bool = False) -> list[StageResult]:
    """Run a recipe.

    Args:
        path: The TOML file.
        out: Folder of the results; artifacts/NAME if not given.
        fresh: Make everything again.

    Raises:
        SememeError: a stage failed; what is finished stays, and the same call goes on from there.
    """
    recipe = read_recipe(path)
    base = Path(out) if out is not None else Path("artifacts") / recipe.name
    started = time.monotonic()
    results = []
    for stage, folder, function in _stages(recipe, base, fresh):
        _reset_peak()
        stage_started = time.monotonic()
        before = _made_at(folder)
        function()
        results.append(
            StageResult(
                stage,
                folder,
                before is not None and before == _made_at(folder),
                time.monotonic() - stage_started,
                _peak_gb(),
            )
        )
    _print_results(recipe, base, results, time.monotonic() - started)
    return results


def _made_at(folder: Path) -> float | None:
    meta = folder / "meta.json"
    return meta.stat().st_mtime if meta.is_file() else None


def _stages(recipe: Recipe, base: Path, fresh: bool) -> list[tuple[str, Path, Callable[[], object]]]:
    """Every stage as (name, artifact, what to call). All configs are built, and so checked, before anything runs."""
    from sememe.harvest import HarvestConfig, harvest
    from sememe.train import TrainConfig, swept_names, train, train_sweep

    shared = {"model": recipe.model, "text": recipe.text}
    where = f"the recipe {recipe.name}"
    store = base / "store"
    harvest_config = HarvestConfig.build(
        {**shared, "policy": recipe.policy, **recipe.harvest, "out": store}, where
    )
    stages: list[tuple[str, Path, Callable[[], object]]] = [
        ("harvest", store, lambda: harvest(harvest_config, fresh=fresh))
    ]
    for name, table in recipe.dictionaries.items():
        out = base / "dictionary" / name
        config = TrainConfig.build({**table, "store": store, "out": out}, where)
        verb = train_sweep if config.sweep else train
        label = f" {name}" if name else ""
        stages.append((f"train{label}", out, partial(verb, config, fresh=fresh)))
        for member in swept_names(config):
            place = Path(name) / member
            paths = {
                kind: base / kind / place
                for kind in ("dictionary", "report", "atlas", "explanations", "site")
            }
            label = "" if place == Path() else f" {place}"
            stages += _after_training(recipe, shared, store, paths, label, where, fresh)
    return stages


def _after_training(
    recipe: Recipe,
    shared: dict[str, Any],
    store: Path,
    paths: dict[str, Path],
    label: str,
    where: str,
    fresh: bool,
) -> list[tuple[str, Path, Callable[[], object]]]:
    stages: list[tuple[str, Path, Callable[[], object]]] = []
    if recipe.evaluate is not None:
        from sememe.evaluate import EvaluateConfig, evaluate

        evaluate_config = EvaluateConfig.build(
            {
                **shared,
                **recipe.evaluate,
                "dictionary": paths["dictionary"],
                "store": store,
                "out": paths["report"],
            },
            where,
        )
        stages.append((f"evaluate{label}", paths["report"], lambda: evaluate(evaluate_config, fresh=fresh)))
    if recipe.interpret is not None:
        from sememe.interpret import InterpretConfig, interpret

        # Over the store's own text, whose activations need no second forward, unless the recipe asks for another.
        elsewhere = {"n_tokens", "split", "text"} & set(recipe.interpret)
        origin = shared if elsewhere else {"model": recipe.model, "store": store}
        interpret_config = InterpretConfig.build(
            {**origin, **recipe.interpret, "dictionary": paths["dictionary"], "out": paths["atlas"]}, where
        )
        stages.append(
            (f"interpret{label}", paths["atlas"], lambda: interpret(interpret_config, fresh=fresh).close())
        )
        if recipe.explain is not None:
            from sememe.explain import ExplainConfig, explain

            explain_config = ExplainConfig.build(
                {**recipe.explain, "atlas": paths["atlas"], "out": paths["explanations"]}, where
            )
            stages.append(
                (f"explain{label}", paths["explanations"], lambda: explain(explain_config, fresh=fresh))
            )
        if recipe.export is not None:
            from sememe.browse import ExportConfig, export

            beside = {
                "report": paths["report"] if recipe.evaluate is not None else None,
                "explanations": paths["explanations"] if recipe.explain is not None else None,
            }
            export_config = ExportConfig.build(
                {**recipe.export, **beside, "atlas": paths["atlas"], "out": paths["site"]}, where
            )
            stages.append((f"export{label}", paths["site"], lambda: export(export_config, fresh=fresh)))
    return stages


# -- what is printed -----------------------------------------------------------------------------------------------


def _reset_peak() -> None:
    """Let the kernel measure this process's peak memory anew (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_gb() -> float:
    """Peak resident memory since the last reset, in gigabytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found.group(1)) / 2**20 if found else float("nan")


def _print_results(recipe: Recipe, base: Path, results: list[StageResult], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for result in results:
        if result.stage.startswith("evaluate"):
            print_report(result.path)
    table = Table(title=f"{recipe.name}: {seconds:.0f} s in all")
    for column in ("stage", "result", "seconds", "peak GB", ""):
        table.add_column(column, justify="right" if column in ("seconds", "peak GB") else "left")
    for result in results:
        table.add_row(
            result.stage,
            str(result.path),
            f"{result.seconds:.1f}",
            f"{result.peak_gb:.2f}",
            "was there" if result.reused else "made",
        )
    console.print(table)
    for result in results:
        if result.stage.startswith("export"):
            console.print(f"Open {(result.path / 'index.html').resolve()}", soft_wrap=True, highlight=False)


def print_report(path: str | Path) -> None:
    """A report's headline as a table: the dictionary beside its nulls."""
    from rich.console import Console
    from rich.table import Table

    file = Path(path) / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} must be a report", "no report.json", "Run `sememe evaluate`.") from None
    columns = {"dictionary": report["metrics"], **report["nulls"]}
    table = Table(title=f"{path}: on held-out documents (95% intervals over documents)")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in report["metrics"]:
        table.add_row(metric, *(_shown(values.get(metric)) for values in columns.values()))
    Console().print(table)


def _shown(entry: dict[str, Any] | None) -> str:
    if entry is None or entry.get("value") is None:
        return "–"
    text = f"{entry['value']:.4g}"
    if entry.get("low") is not None:
        text += f"  [{entry['low']:.4g}, {entry['high']:.4g}]"
    return text
