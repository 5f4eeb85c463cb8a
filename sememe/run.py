"""Runs a recipe (`recipe.py`): its verbs in order, each skipped when its result is there. Writes no file itself.

Every option is checked, and whether memory and disk are enough (`plan.py`), before the first stage starts.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sememe import artifact
from sememe.errors import ArtifactError
from sememe.plan import check
from sememe.recipe import Recipe, Stage, place_of, read_recipe, stages

__all__ = [
    "StageResult",
    "print_comparison",
    "print_geometry",
    "print_lens",
    "print_report",
    "print_results",
    "run",
]


WIDE = 140
"""Columns of a terminal from which a comparison's intervals fit in."""


MAX_NAMES = 8
"""Dictionaries up to which a matrix of them fits in."""


class StageResult(NamedTuple):
    """What a stage did: its artifact, how long it took, how much memory it reached."""

    stage: str
    path: Path
    reused: bool
    seconds: float
    peak_gb: float


def run(
    path: str | Path, *, out: str | Path | None = None, fresh: bool = False, scale: str | None = None
) -> list[StageResult]:
    """Run a recipe.

    Args:
        path: The TOML file.
        out: Folder of the results; artifacts/NAME, or artifacts/NAME/SCALE, if not given.
        fresh: Make everything again.
        scale: Which of the recipe's scales; its first one if not given.

    Raises:
        ResourceError: a stage cannot fit in the memory or the disk that is free; nothing was started.
        SememeError: a stage failed; what is finished stays, and the same call goes on from there.
    """
    recipe = read_recipe(path, scale)
    base = place_of(recipe, out)
    started = time.monotonic()
    to_do = stages(recipe, base)
    check(to_do, base, fresh)
    results = []
    for stage in to_do:
        _reset_peak()
        stage_started = time.monotonic()
        before = _made_at(stage.path)
        _do(stage, fresh)
        results.append(
            StageResult(
                stage.label,
                stage.path,
                before is not None and before == _made_at(stage.path),
                time.monotonic() - stage_started,
                _peak_gb(),
            )
        )
    _print_results(recipe, base, results, time.monotonic() - started)
    return results


def _made_at(folder: Path) -> float | None:
    meta = folder / "meta.json"
    return meta.stat().st_mtime if meta.is_file() else None


def _do(stage: Stage, fresh: bool) -> None:
    """Run one stage's verb."""
    from sememe.browse import export
    from sememe.compare import compare
    from sememe.effects import effects
    from sememe.evaluate import evaluate
    from sememe.explain import explain
    from sememe.fit import fit
    from sememe.geometry import geometry
    from sememe.grid import grid
    from sememe.harvest import harvest
    from sememe.interpret import interpret
    from sememe.pretrain import pretrain
    from sememe.prompt import prompts
    from sememe.recover import recover
    from sememe.results import results
    from sememe.train import TrainConfig, train, train_sweep

    verbs: dict[str, Callable[..., Any]] = {
        "harvest": harvest,
        "train": train,
        "fit": fit,
        "evaluate": evaluate,
        "interpret": interpret,
        "effects": effects,
        "explain": explain,
        "export": export,
        "compare": compare,
        "geometry": geometry,
        "grid": grid,
        "pretrain": pretrain,
        "prompts": prompts,
        "results": results,
        "toy": recover,
    }
    if isinstance(stage.config, TrainConfig) and stage.config.sweep:
        train_sweep(stage.config, fresh=fresh)
        return
    verb = verbs.get(stage.verb) or getattr(importlib.import_module(f"sememe.{stage.verb}"), stage.verb)
    result = verb(stage.config, fresh=fresh)
    if stage.verb == "interpret":
        result.close()


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
        if result.stage.startswith("compare"):
            print_comparison(result.path)
        if result.stage.startswith("geometry"):
            print_geometry(result.path)
        if result.stage == "results":
            print_results(result.path)
    at = f" at scale {recipe.scale}" if recipe.scale else ""
    table = Table(title=f"{recipe.name}{at}: {seconds:.0f} s in all")
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

    file = artifact.here(path) / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} must be a report", "no report.json", "Run `sememe evaluate`.") from None
    columns = {"dictionary": report["metrics"], **report.get("parts", {}), **report["nulls"]}
    table = Table(title=f"{path}: on held-out documents (95% intervals over documents)")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in report["metrics"]:
        table.add_row(metric, *(_shown(values.get(metric)) for values in columns.values()))
    console = Console()
    console.print(table)
    for notice in report.get("notices", ()):
        console.print(notice, soft_wrap=True, markup=False, highlight=False)


def print_comparison(path: str | Path) -> None:
    """A comparison's dictionaries and nulls as a table, and what is to be known of it."""
    from rich.console import Console
    from rich.table import Table

    data = json.loads((artifact.here(path) / "comparison.json").read_text(encoding="utf-8"))
    measured = [row for row in data["rows"] if row.get("metrics")]
    console = Console()
    if measured:
        columns = ("fvu", "l0", "ce_increase", "ce_recovered_mean", "perplexity")
        console.print(f"{path}: on the same held-out documents", soft_wrap=True, highlight=False)
        table = Table()
        table.add_column("")
        for name in columns:
            table.add_column(name, justify="right")
        for row in measured:
            name = f"null: {row['name']}" if row["null"] else row["name"]
            found = [row["metrics"].get(metric) for metric in columns]
            table.add_row(name, *(_shown(one, bounds=console.width >= WIDE) for one in found))
        console.print(table)
    if data["together"]:
        found = data["together"]["metrics"]
        console.print(
            f"all at once ({', '.join(data['together']['hookpoints'])}): "
            + ", ".join(
                f"{name} {_shown(found[name])}" for name in ("ce_increase", "ce_recovered_mean", "perplexity")
            ),
            soft_wrap=True,
            highlight=False,
        )
    directions = data["directions"]
    table = Table()
    table.add_column("")
    for name in directions["names"]:
        table.add_column(name, justify="right")
    table.add_column("random", justify="right")
    for name, values, random in zip(
        directions["names"], directions["mmcs"], directions["random"], strict=True
    ):
        table.add_row(name, *(f"{one['value']:.3f}" for one in (*values, random)))
    if len(directions["names"]) <= MAX_NAMES:
        console.print("mmcs: how much of the row is in the column", soft_wrap=True, highlight=False)
        console.print(table)
    for notice in data["notices"]:
        console.print(notice, soft_wrap=True, markup=False, highlight=False)


def print_geometry(path: str | Path) -> None:
    """Where latents lie, in short: the classes, and who has whose."""
    from rich.console import Console
    from rich.table import Table

    data = json.loads((artifact.here(path) / "geometry.json").read_text(encoding="utf-8"))
    console = Console()
    table = Table(title="means over latents, and of random directions")
    table.add_column("")
    for row in data["rows"]:
        for name in (row["name"], "random"):
            table.add_column(name, justify="right")
    for name in dict.fromkeys(name for row in data["rows"] for name in row["numbers"]):
        cells = []
        for row in data["rows"]:
            one = row["numbers"].get(name, {})
            cells += [_shown(one, bounds=False), _shown({"value": one.get("random")})]
        table.add_row(name, *cells)
    console.print(table)
    for pair in data["pairs"]:
        one = pair["matched_cosine"]
        console.print(
            f"{pair['small']} in {pair['large']}: one to one, mean cosine {one['value']:.3f} "
            f"(random {one['random']:.3f}), {one['share_above_0.9']['value']:.0%} above 0.9; "
            f"{pair['splits']['n']:,} latents split",
            soft_wrap=True,
            highlight=False,
        )
    for notice in data["notices"]:
        console.print(notice, soft_wrap=True, markup=False, highlight=False)


def print_results(path: str | Path) -> None:
    """Published claims and tables beside ours."""
    from rich.console import Console
    from rich.table import Table

    from sememe import figures

    data = json.loads((artifact.here(path) / "results.json").read_text(encoding="utf-8"))
    console = Console()
    titled = [
        *(
            (about["title"], table)
            for about, table in zip(data["tables"], figures.results_tables(data), strict=True)
        ),
        *([("what was said", figures.claims_table(data))] if data["claims"] else []),
    ]
    for title, found in titled:
        table = Table(title=title)
        for name in found.columns:
            table.add_column(name)
        for cells in found.rows:
            table.add_row(*cells)
        console.print(table)
    console.print(f"{data['title']}: {Path(path) / 'results.html'}", soft_wrap=True, highlight=False)


def print_lens(path: str | Path) -> None:
    """How near each layer's lens comes to what the model says, beside the logit lens."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{path}: divergence from the model on held-out documents, in nats (95% intervals)")
    for column in ("layer", "tuned lens", "logit lens"):
        table.add_column(column, justify="right")
    for layer, found in artifact.load(path, "lens").extra["measured"].items():
        table.add_row(layer, _shown(found["tuned"]["kl"]), _shown(found["logit"]["kl"]))
    Console().print(table)


def _shown(entry: dict[str, Any] | None, bounds: bool = True) -> str:
    if entry is None or entry.get("value") is None:
        return "–"
    text = f"{entry['value']:.4g}"
    if bounds and entry.get("low") is not None:
        text += f"  [{entry['low']:.4g}, {entry['high']:.4g}]"
    return text
