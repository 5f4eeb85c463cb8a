"""The verb that says what a recipe will take, before anything starts: memory, disk and time per stage.

Knows recipes and shapes. Loads no model, downloads nothing, makes no artifact. `sememe run` asks `check` first.

    machine.py   what is free, and how fast this machine multiplies
    costs.py     bytes and seconds of each stage, from its sizes; making.py and fitting.py of those that came later
    estimate.py  one stage, one dictionary, as numbers
    rows.py      a recipe's model, rows and dictionaries
    scratch.py   stages that read no store
    stages.py    an estimate of each stage
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sememe.errors import ResourceError
from sememe.needs import Bytes, disk_free, gpu_free, largest, memory_free
from sememe.needs import refuse as refuse_bytes
from sememe.plan.machine import Machine, Speed, measure
from sememe.plan.stages import Estimate, estimates
from sememe.recipe import Stage, place_of, read_recipe, stages
from sememe.train import TrainConfig

__all__ = ["Machine", "Plan", "check", "plan", "print_plan", "refuse"]

GB = 1e9


class Plan(NamedTuple):
    """What each stage takes, on this machine."""

    name: str
    estimates: list[Estimate]
    machine: Machine
    speed: Speed

    def seconds(self, estimate: Estimate) -> float | None:
        """How long a stage will take; None if that is not known."""
        return None if estimate.seconds_at is None else estimate.seconds_at(self.speed)


def plan(
    path: str | Path, *, out: str | Path | None = None, fresh: bool = False, scale: str | None = None
) -> Plan:
    """What a recipe will take. Times a few matrix products: under three seconds.

    Args:
        path: The TOML file.
        out: Folder of the results; artifacts/NAME if not given.
        fresh: Count everything as to be made again.
        scale: Which of the recipe's scales; its first one if not given.

    Raises:
        ConfigError: an option of a stage is unknown, out of range, or without effect.
    """
    recipe = read_recipe(path, scale)
    base = place_of(recipe, out)
    found = estimates(stages(recipe, base), fresh)
    speed = measure(*found.shapes)
    return Plan(recipe.name, found.stages, _machine(found.stages, base), speed)


def check(found: Sequence[Stage], base: Path, fresh: bool = False) -> None:
    """Refuse a run that cannot fit. Measures no speed.

    Args:
        found: The recipe's stages.
        base: The folder of its results.
        fresh: Whether everything will be made again.

    Raises:
        ResourceError: a stage needs more memory or disk than is free; says which number would fit.
    """
    known = estimates(found, fresh).stages
    _refuse_all(known, _machine(known, base))


def _machine(found: Sequence[Estimate], base: Path) -> Machine:
    asked: set[str] = set()
    for estimate in found:
        if estimate.needs is not None and estimate.needs.gpu:
            config = estimate.stage.config
            asked |= set(config.devices) if isinstance(config, TrainConfig) else {"cuda"}
    free = [bytes_ for bytes_ in map(gpu_free, asked) if bytes_ is not None]
    return Machine(memory_free(), disk_free(base), min(free, default=None))


# -- refusing --------------------------------------------------------------------------------------


def refuse(found: Plan) -> None:
    """Refuse a plan that cannot fit.

    Raises:
        ResourceError: a stage needs more memory or disk than is free; says which number would fit.
    """
    _refuse_all(found.estimates, found.machine)


def _refuse_all(found: Sequence[Estimate], machine: Machine) -> None:
    """Raise for the first stage that cannot fit: in memory stage by stage, on the disk all of them together."""
    known = [estimate for estimate in found if estimate.needs is not None]
    for estimate in known:
        _refuse(estimate, "memory", machine.memory, lambda needs: needs.memory)
        if machine.gpu is not None:
            _refuse(estimate, "memory of the GPU", machine.gpu, lambda needs: needs.gpu)
    harvest = next((estimate for estimate in known if estimate.stage.verb == "harvest"), None)
    if harvest is not None and not harvest.done and harvest.knobs:
        n_tokens = harvest.knobs[0].value
        fits = largest(lambda n: _disk(known, n) <= machine.disk, n_tokens)
        if fits and _disk(known, n_tokens) > machine.disk:
            raise ResourceError(
                f"all stages together must fit in the disk that is free, {machine.disk / GB:.1f} GB",
                f"about {_disk(known, n_tokens) / GB:.1f} GB (n_tokens={n_tokens:,})",
                f"Lower the harvest's n_tokens to at most {fits:,}.",
            )
    written = 0.0
    for estimate in known:
        _refuse(estimate, "disk", machine.disk - written, lambda needs: needs.disk)
        written += estimate.needs.disk if estimate.needs else 0.0


def _disk(found: Sequence[Estimate], n_tokens: int) -> float:
    """Bytes that all stages write when the harvest reads so many tokens."""
    total = 0.0
    for estimate in found:
        knob = next((knob for knob in estimate.knobs if knob.name == "n_tokens"), None)
        needs = estimate.needs if knob is None else knob.bytes_at(n_tokens)
        total += needs.disk if needs is not None else 0.0
    return total


def _refuse(estimate: Estimate, what: str, free: float, of: Callable[[Bytes], float]) -> None:
    if estimate.needs is not None:
        refuse_bytes(estimate.stage.label, what, free, estimate.needs, estimate.knobs, of)


# -- what is printed -------------------------------------------------------------------------------


def print_plan(found: Plan) -> None:
    """The table, and what the machine has."""
    from rich.console import Console
    from rich.table import Table

    seconds = [found.seconds(estimate) for estimate in found.estimates]
    known = [value for value in seconds if value is not None]
    total = _time(sum(known)) + (" and what is not known" if len(known) < len(seconds) else "")
    table = Table(title=f"{found.name}: about {total}")
    columns = ["stage", "result", "time", "memory GB", "disk GB"]
    columns += ["GPU GB"] if found.machine.gpu is not None else []
    for column in (*columns, ""):
        table.add_column(column, justify="left" if column in ("stage", "result", "") else "right")
    for estimate, value in zip(found.estimates, seconds, strict=True):
        needs = estimate.needs
        numbers = ["–"] * 3 if needs is None else [_gb(number) for number in needs]
        cells = [
            estimate.stage.label,
            str(estimate.stage.path),
            "–" if value is None else _time(value),
            *numbers,
        ]
        table.add_row(*cells[: len(columns)], "is there" if estimate.done else estimate.note)
    console = Console()
    console.print(table)
    machine, speed = found.machine, found.speed
    gpu = "" if machine.gpu is None else f", {machine.gpu / GB:.1f} GB of GPU memory"
    console.print(
        f"Free: {machine.memory / GB:.1f} GB of memory, {machine.disk / GB:.0f} GB of disk{gpu}. Measured: "
        f"{speed.encoder / 1e9:,.0f} GFLOP/s in encoder products, {speed.dense / 1e9:,.0f} in float32, "
        f"{speed.model / 1e9:,.0f} in the model's; {speed.bandwidth / 1e9:.0f} GB/s.",
        highlight=False,
    )


def _gb(number: float) -> str:
    return f"{number / GB:.2f}" if number else "0"


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
