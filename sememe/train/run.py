"""The loop: members that share one source, trained side by side between their checkpoints.

Knows when to read, log, save and stop; knows nothing of how a member learns.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sememe import kernels
from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.errors import MismatchError
from sememe.interrupt import stop_requests
from sememe.progress import track
from sememe.source import Source
from sememe.tracking import Log
from sememe.train.config import TrainConfig
from sememe.train.dead import revive
from sememe.train.member import Member

__all__ = ["N_SAMPLE_ROWS", "Place", "Run"]

LOG = "metrics.jsonl"
N_SAMPLE_ROWS = 8192
"""Rows that set the scale and the biases: enough for a stable mean at any width met here."""


class Place(NamedTuple):
    """A member and the folder of its log."""

    member: Member
    folder: Path


class Run:
    """A training run.

    Args:
        config: What all members share.
        places: The members, all with equally many steps.
        source: Where their batches come from.
        folder: Where the checkpoint is kept.
        threads: CPU threads in use.
    """

    def __init__(
        self, config: TrainConfig, places: list[Place], source: Source, folder: Path, threads: int
    ) -> None:
        self.config, self.places, self.source, self.folder = config, places, source, folder
        self.members = [place.member for place in places]
        self.n_steps = self.members[0].plan.n_steps
        self.threads = threads
        self.step = 0
        self.seconds_before = 0.0
        self.started = time.monotonic()
        saved = load_checkpoint(folder)
        if saved is None:
            sample = source.sample(N_SAMPLE_ROWS)
            for member in self.members:
                member.initialise(sample)
        else:
            self._restore(saved)

    # -- state -------------------------------------------------------------------------------------

    def _setting(self) -> dict[str, Any]:
        """What the bits depend on besides the state."""
        parameter = next(self.members[0].dictionary.parameters())
        return {"threads": self.threads, "kernels": kernels.path_for(parameter), "torch": torch.__version__}

    def _state(self) -> dict[str, Any]:
        return {
            "members": {member.name: member.state_dict() for member in self.members},
            "source": self.source.state_dict(),
            "run": {"step": self.step, "seconds": self._seconds()},
            "setting": self._setting(),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["setting"] != self._setting():
            raise MismatchError(
                f"a checkpoint must go on with the threads, kernels and torch it was made with ({saved['setting']})",
                str(self._setting()),
                "Set them as they were (--threads), or pass --fresh to start again.",
            )
        for member in self.members:
            member.load_state_dict(saved["members"][member.name])
        self.source.load_state_dict(saved["source"])
        self.step, self.seconds_before = saved["run"]["step"], saved["run"]["seconds"]

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    # -- the loop ----------------------------------------------------------------------------------

    def go(self) -> None:
        """Train to the end; checkpoints by wall clock, and once more when interrupted."""
        config = self.config
        description = f"train {self.members[0].dictionary.kind}"
        n_rows = self.n_steps * config.batch_size
        with (
            ExitStack() as stack,
            track(description, n_rows, "rows", done=self.step * config.batch_size) as progress,
            stop_requests() as stop,
        ):
            logs = [stack.enter_context(self._log(place)) for place in self.places]
            saved_at = time.monotonic()
            while self.step < self.n_steps:
                progress.note = self._one_step(logs) or progress.note
                progress.advance(config.batch_size)
                if stop.is_set() or time.monotonic() - saved_at >= config.checkpoint_every_seconds:
                    self._check_weights()
                    save_checkpoint(self.folder, self.step, self._state())
                    saved_at = time.monotonic()
                    if stop.is_set():
                        raise KeyboardInterrupt
        self._check_weights()

    def _log(self, place: Place) -> Log:
        config = place.member.config
        return Log(
            place.folder / LOG,
            config.track,
            name=config.out.name,
            config=config.resolved(),
            resume_step=self.step if self.step else None,
        )

    def _one_step(self, logs: list[Log]) -> str:
        """Every member's next step; what the progress bar shows of it, if it was logged."""
        for member in self.members:
            revive(member, self.source)
        batch = self.source.next_batch(self.config.batch_size)
        self.step += 1
        logging = self.step % self.config.log_every == 0 or self.step == self.n_steps
        note = ""
        for member, log in zip(self.members, logs, strict=True):
            stepped = member.train_step(batch)
            if logging:
                values = member.metrics(stepped)
                place = {"tokens": self.step * self.config.batch_size, "seconds": self._seconds()}
                log.write(self.step, values | place)
                note = note or f"fvu {values['fvu']:.3f}  l0 {values['l0']:.0f}"
        return note

    def _check_weights(self) -> None:
        for member in self.members:
            member.check_weights()
