"""Progress of long work: a bar on a terminal, a line now and then elsewhere. Knows only counts and names."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Progress", "track"]


class Progress:
    """A running count. `advance` is cheap enough to call on every batch."""

    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.started_at, self.started_from = time.monotonic(), done
        self.note = ""

    def advance(self, n: int = 1) -> None:
        """Count n more units."""
        self.done += n
        self._show()

    def _show(self) -> None: ...

    def rate(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self.started_from) / max(time.monotonic() - self.started_at, 1e-9)

    def summary(self) -> str:
        """What was done, how fast, and how long it takes still."""
        left = max(self.total - self.done, 0) / max(self.rate(), 1e-9)
        share = 100 * self.done / max(self.total, 1)
        note = f"  {self.note}" if self.note else ""
        return (
            f"{self.description}: {share:3.0f}%  {self.done:,}/{self.total:,} {self.unit}"
            f"  {self.rate():,.0f} {self.unit}/s  {_clock(left)} left{note}"
        )


def _clock(seconds: float) -> str:
    seconds = int(seconds)
    return (
        f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        if seconds >= 3600
        else f"{seconds // 60}:{seconds % 60:02}"
    )


class _Lines(Progress):
    """For logs: at most one line every ten seconds."""

    next_at = 0.0

    def _show(self) -> None:
        now = time.monotonic()
        if now >= self.next_at:
            self.next_at = now + 10
            if now - self.started_at > 5:
                print(self.summary(), file=sys.stderr, flush=True)


@contextmanager
def track(description: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Count work: `with track("harvest", n, "tokens") as progress: progress.advance(512)`.

    Args:
        description: What is being done.
        total: Units in all.
        unit: Their name, in the plural.
        done: Units that an earlier, interrupted run has done already.
    """
    if not sys.stderr.isatty():
        lines = _Lines(description, total, unit, done)
        yield lines
        elapsed = time.monotonic() - lines.started_at
        last = f"{description}: {lines.done:,} {unit} in {_clock(elapsed)} ({lines.rate():,.0f} {unit}/s) {lines.note}"
        print(last.rstrip(), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, completed=done, rate="", note="")

        class _Bar(Progress):
            def _show(self) -> None:
                bars.update(
                    task,
                    completed=self.done,
                    total=max(self.total, self.done),
                    rate=f"{self.rate():,.0f} {unit}/s",
                    note=self.note,
                )

        yield _Bar(description, total, unit, done)
