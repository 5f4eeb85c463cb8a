"""Metrics of a run, step by step: always a JSONL file, and trackers when asked. Knows no metric by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sememe.errors import ResourceError

__all__ = ["Log", "Tracker", "read_log"]

Tracker = Literal["tensorboard", "wandb", "trackio"]


class Log:
    """Appends to a JSONL file and to trackers. On resume, lines after the checkpoint's step are cut off.

    Args:
        path: The JSONL file.
        trackers: tensorboard (beside the file), wandb, trackio.
        name: The run's name in the trackers.
        config: What the trackers show as its settings.
        resume_step: Keep only lines up to this step; None starts anew.

    Raises:
        ResourceError: a tracker's package is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        trackers: tuple[Tracker, ...] = (),
        name: str = "sememe",
        config: dict[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(path)
        kept: list[str] = []
        if resume_step is not None and self.path.is_file():
            kept = [
                line
                for line in self.path.read_text().splitlines()
                if _step_of(line, resume_step) <= resume_step
            ]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept))
        aside.replace(self.path)
        self.sinks = [_sink(tracker, self.path.parent, name, config or {}) for tracker in trackers]
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.write(step, {k: v for k, v in values.items() if isinstance(v, (int, float))})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        for sink in self.sinks:
            sink.close()


def _step_of(line: str, resume_step: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return resume_step + 1  # a line cut short by the interruption


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class _TensorBoard:
    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", json.dumps(config, indent=1))

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _RunTracker:
    """wandb, and trackio, which speaks the same language."""

    def __init__(self, module: Any, name: str, config: dict[str, Any]) -> None:
        self.module = module
        module.init(project="sememe", name=name, config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


def _sink(tracker: Tracker, folder: Path, name: str, config: dict[str, Any]) -> _TensorBoard | _RunTracker:
    try:
        if tracker == "tensorboard":
            return _TensorBoard(folder, name, config)
        import importlib

        return _RunTracker(importlib.import_module(tracker), name, config)
    except ImportError as error:
        raise ResourceError(
            f"tracking with {tracker} needs its package",
            str(error),
            f"pip install {tracker}, or leave --track out.",
        ) from None
