"""Metrics of a run, step by step: always a JSONL file, and trackers when asked. Knows no metric by name.

A tracker is whatever shows a run elsewhere: TensorBoard, wandb, trackio. Each gets the settings, numbers by step and
links to what was made; a run that is resumed goes on as the same run there. A tracker whose package is missing is an
error at the start; one that fails later is left out with a line on stderr, and the run goes on.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

from sememe.errors import ResourceError

__all__ = ["IDS", "Log", "Tracker", "read_log"]

Tracker = Literal["tensorboard", "wandb", "trackio"]
IDS = "tracking.json"
"""Beside the log: what the run is called in each tracker."""
PROJECT = "sememe"


class Log:
    """Appends to a JSONL file and to trackers. On resume, lines after the checkpoint's step are cut off.

    Args:
        path: The JSONL file.
        trackers: tensorboard (beside the file), wandb, trackio.
        name: The run's name in the trackers.
        config: What the trackers show as its settings.
        resume_step: Keep only lines up to this step, and go on as the same run; None starts anew.

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
        self.sinks: dict[str, _Sink] = {}
        if trackers:
            self._open(trackers, name, config or {}, resume_step)
        self.file = self.path.open("a", encoding="utf-8")

    def _open(
        self, trackers: tuple[Tracker, ...], name: str, config: dict[str, Any], resume_step: int | None
    ) -> None:
        file = self.path.with_name(IDS)
        known = {} if resume_step is None else _ids(file)
        ids = {tracker: known.get(tracker) or uuid.uuid4().hex[:8] for tracker in trackers}
        file.write_text(json.dumps(ids), encoding="utf-8")
        for tracker in trackers:
            resumed = resume_step if tracker in known else None
            about = _About(self.path.parent, name, config, ids[tracker], resumed)
            try:
                self.sinks[tracker] = SINKS[tracker](about)
            except ImportError as error:
                raise ResourceError(
                    f"tracking with {tracker} needs its package",
                    str(error),
                    f"pip install {tracker}, or leave --track out.",
                ) from None
            except Exception as error:  # whatever a tracker raises: no account, no network, a full disk
                _left_out(tracker, error)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; trackers get its numbers."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        numbers = {name: v for name, v in values.items() if isinstance(v, (int, float))}
        self._tell(lambda sink: sink.write(step, numbers))

    def link(self, name: str, target: str | Path) -> None:
        """Tell the trackers where something that belongs to the run is: a folder, a page, a picture."""
        self._tell(lambda sink: sink.link(name, str(target)))

    def _tell(self, what: Callable[[_Sink], None]) -> None:
        """Every tracker, but those that fail."""
        for tracker, sink in list(self.sinks.items()):
            try:
                what(sink)
            except Exception as error:  # a run of days must not end because a page about it cannot be reached
                del self.sinks[tracker]
                _left_out(tracker, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self._tell(lambda sink: sink.close())


def _left_out(tracker: str, error: Exception) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"tracking with {tracker} has ended, the run goes on: {text}", file=sys.stderr, flush=True)


def _ids(file: Path) -> dict[str, str]:
    """What the run was called before; nothing if that is not known."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _step_of(line: str, resume_step: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return resume_step + 1  # a line cut short by the interruption


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# -- trackers ----------------------------------------------------------------------------------------------


class _About(NamedTuple):
    """What a tracker is told of a run."""

    folder: Path
    name: str
    config: dict[str, Any]
    id: str
    resumed: int | None
    """The step it goes on from; None if it begins."""


@runtime_checkable
class _Sink(Protocol):
    """What every tracker does."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def link(self, name: str, target: str) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files beside the log; what was written after the checkpoint is marked as not to be shown."""

    def __init__(self, about: _About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = about.folder / "tensorboard"
        if about.resumed is None:
            shutil.rmtree(place, ignore_errors=True)  # of a run that was killed before its first checkpoint
            self.writer = SummaryWriter(str(place))
            self.writer.add_text("config", json.dumps(about.config, indent=1))
        else:
            self.writer = SummaryWriter(str(place), purge_step=about.resumed + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def link(self, name: str, target: str) -> None:
        self.writer.add_text(f"links/{name}", target)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A wandb run, by its id the same one after a resume."""

    def __init__(self, about: _About) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project=PROJECT, name=about.name, config=about.config, id=about.id, resume="allow"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def link(self, name: str, target: str) -> None:
        self.run.summary[name] = target

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """A trackio run. It knows runs by their names, so the id is part of the name; it has no place for links but the
    last step's metrics."""

    def __init__(self, about: _About) -> None:
        self.module = importlib.import_module("trackio")
        self.module.init(
            project=PROJECT,
            name=f"{about.name}-{about.id}",
            config=about.config,
            resume="never" if about.resumed is None else "must",
        )
        self.step = about.resumed or 0

    def write(self, step: int, values: dict[str, float]) -> None:
        self.step = step
        self.module.log(values, step=step)

    def link(self, name: str, target: str) -> None:
        self.module.log({name: target}, step=self.step)

    def close(self) -> None:
        self.module.finish()


SINKS: dict[str, Callable[[_About], _Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
