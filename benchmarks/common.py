"""What the benchmarks share: medians, a table on the terminal, rows in artifacts/bench/NAME.json."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

OPERATORS: dict[str, Callable[[float, float], bool]] = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}


def row(name: str, value: float, must: str, unit: str, **context: Any) -> dict[str, Any]:
    """One figure: `must` is a string such as "<= 1.5", or "" where there is no target."""
    return {"name": name, "value": round(value, 4), "must": must, "unit": unit, "context": context}


def met(figure: dict[str, Any]) -> bool | None:
    """Whether a figure meets its target; None without one."""
    if not figure["must"]:
        return None
    operator, bound = figure["must"].split()
    return OPERATORS[operator](figure["value"], float(bound))


def interleaved(
    functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, taken in turn so that all of them meet the machine's moods alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the round-by-round ratios."""
    return median(a / b for a, b in zip(times[over], times[under], strict=True))


def finish(name: str, figures: list[dict[str, Any]]) -> None:
    """Print the table and write artifacts/bench/NAME.json."""
    from sememe.kernels.cpu import native_bfloat16

    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "native_bfloat16": native_bfloat16(),
        "torch": torch.__version__,
    }
    for figure in figures:
        figure["context"] |= machine
    path = Path("artifacts/bench") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"bench-{name}: {machine}")
    for column in ("figure", "value", "must", "unit", ""):
        table.add_column(column)
    for figure in figures:
        verdict = {True: "met", False: "missed", None: ""}[met(figure)]
        table.add_row(figure["name"], f"{figure['value']:.4g}", figure["must"], figure["unit"], verdict)
    Console().print(table)
    print(path)
