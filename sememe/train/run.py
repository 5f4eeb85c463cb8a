"""The loop: a team of dictionaries on one source, from checkpoint to checkpoint.

Knows when to read, log, save and stop; knows nothing of how a dictionary learns, nor in which process.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.end_to_end import ContextBatch
from sememe.errors import ActivationError, MismatchError
from sememe.interrupt import stop_requests
from sememe.progress import track
from sememe.source import Batch, Source, upcoming
from sememe.tracking import Log
from sememe.train.config import TrainConfig
from sememe.train.crew import Team
from sememe.train.member import ALONE
from sememe.train.snapshots import compares, keep, keeps
from sememe.train.watch import WATCHED, Watch

__all__ = ["LOG", "LOGS", "N_PROBE_ROWS", "Run"]

LOG = "metrics.jsonl"
LOGS = "logs"
"""Where the logs and copies of a sweep's members are kept until each gets a folder of its own."""
N_PROBE_ROWS = 16
N_SAMPLE_ROWS = 8192
"""Rows that set the scale and the biases: enough for a stable mean at any width met here."""


class Run:
    """A training run.

    Args:
        config: What all members share.
        n_steps: Its length.
        team: The dictionaries.
        configs: Each member's own config, by name; empty for a dictionary that is trained alone.
        source: Where batches come from.
        folder: Where checkpoints and logs are kept.
        threads: CPU threads in use.
        watch: What is measured on the way.
    """

    def __init__(
        self,
        config: TrainConfig,
        n_steps: int,
        team: Team,
        configs: dict[str, TrainConfig],
        source: Source,
        folder: Path,
        threads: int,
        watch: Watch,
    ) -> None:
        self.watch = watch
        self.config, self.n_steps, self.team, self.configs = config, n_steps, team, configs
        self.source, self.folder, self.threads = source, folder, threads
        self.step = 0
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.latest: dict[str, dict[str, float]] = {}
        saved = load_checkpoint(folder)
        if saved is None:
            team.initialise(source.sample(N_SAMPLE_ROWS))
        else:
            self._restore(saved)

    # -- state -------------------------------------------------------------------------------------

    def _setting(self) -> dict[str, Any]:
        """What the bits depend on besides the state."""
        return {"threads": self.threads, "kernels": list(self.team.kinds), "torch": torch.__version__}

    def _save(self) -> None:
        self.team.check()
        state = {
            "members": self.team.state_dict(),
            "source": self.source.state_dict(),
            "run": {"step": self.step, "seconds": self._seconds()},
            "setting": self._setting(),
        }
        save_checkpoint(self.folder, self.step, state)

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["setting"] != self._setting():
            raise MismatchError(
                f"a checkpoint must go on with the threads, kernels and torch it was made with ({saved['setting']})",
                str(self._setting()),
                "Set them as they were (--threads), or pass --fresh to start again.",
            )
        self.team.load_state_dict(saved["members"])
        self.source.load_state_dict(saved["source"])
        self.step, self.seconds_before = saved["run"]["step"], saved["run"]["seconds"]

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    # -- the loop ----------------------------------------------------------------------------------

    def go(self) -> None:
        """Train to the end; checkpoints by wall clock, and once more when interrupted.

        Raises:
            ActivationError: the source ended before n_tokens, or a loss is NaN or infinite.
        """
        config = self.config
        count = f" ({len(self.configs)} dictionaries)" if self.configs else ""
        n_rows = self.n_steps * config.batch_size
        with (
            ExitStack() as stack,
            track(
                f"train {config.architecture.kind}{count}",
                n_rows,
                "rows",
                done=self.step * config.batch_size,
            ) as progress,
            stop_requests() as stop,
        ):
            whole, logs = self._open_logs(stack)
            watched = self._open_watched(stack) if self.watch.on else {}
            if self.step == 0:
                self._look(watched, self.n_steps)
            saved_at = time.monotonic()
            finished = self._may_finish() and self.team.finished()
            while self.step < self.n_steps and not finished:
                values = self._one_step()
                if values is not None:
                    progress.note = self._write(whole, logs, values)
                progress.advance(config.batch_size)
                self._keep()
                finished = self._compares() and self.team.finished()
                self._look(watched, self.step if finished else self.n_steps)
                if stop.is_set() or time.monotonic() - saved_at >= config.checkpoint_every_seconds:
                    self._save()
                    saved_at = time.monotonic()
                    if stop.is_set():
                        raise KeyboardInterrupt
            self.team.check()
            whole.link("dictionaries" if self.configs else "dictionary", config.out)

    def _one_step(self) -> dict[str, dict[str, float]] | None:
        """Every member's next step; their numbers by name at the steps that are logged."""
        wanted = self.team.rows_wanted(self.step)
        ahead = upcoming(self.source, wanted) if wanted else None
        batch = self._next_batch()
        self.step += 1
        # a comparison may be the run's end, whose numbers must be there
        logging = self.step % self.config.log_every == 0 or self.step == self.n_steps or self._compares()
        values = self.team.train_step(batch, ahead, logging)
        if logging:
            self.team.check()
        return values

    def _members(self) -> dict[str, TrainConfig]:
        """Each member's config."""
        return self.configs or {ALONE: self.config}

    def _may_finish(self) -> bool:
        return any(config.freeze_above is not None for config in self._members().values())

    def _compares(self) -> bool:
        """Whether a member was compared with what it was, after the last step."""
        return any(compares(config, self.n_steps, self.step) for config in self._members().values())

    def _keep(self) -> None:
        """Keep copies of those members that want it after this step; none of one that has gone wrong."""
        if any(keeps(config, self.step) for config in self._members().values()):
            self.team.check()
        for name, config in self._members().items():
            if keeps(config, self.step):
                folder = self.folder / LOGS / name if self.configs else self.folder
                rows = self.source.sample(N_PROBE_ROWS)
                write = partial(self.team.write, name, probe_rows=rows, n_rows=self.source.n_rows)
                keep(config, self.step, folder, write)

    def _next_batch(self) -> Batch:
        n = self.config.batch_size
        batch = self.source.next_batch(n)
        found = batch.x.shape[0]
        if found < n and not isinstance(
            batch, ContextBatch
        ):  # which holds what the policy keeps of its contexts
            rows = self.step * n + found
            raise ActivationError(
                f"the source must give the {self.n_steps * n:,} rows of this run (n_tokens)",
                f"{rows:,}: it ended at step {self.step + 1} of {self.n_steps}",
                f"Train on fewer (--n-tokens {rows // n * n}) or give it more; checkpoints made before are kept.",
            )
        return batch

    # -- logs --------------------------------------------------------------------------------------

    def _open_logs(self, stack: ExitStack) -> tuple[Log, dict[str, Log]]:
        """The run's own log, which the trackers follow, and one for each member of a sweep."""
        resume_step = self.step if self.step else None
        whole = Log(
            self.folder / LOG,
            self.config.track,
            name=self.config.out.name,
            config=self.config.resolved(),
            resume_step=resume_step,
        )
        stack.enter_context(whole)
        logs = {}
        for name in self.configs:
            place = self.folder / LOGS / name
            place.mkdir(parents=True, exist_ok=True)
            logs[name] = stack.enter_context(Log(place / LOG, resume_step=resume_step))
        return whole, logs

    def _open_watched(self, stack: ExitStack) -> dict[str, Log]:
        """A log of what is measured of each dictionary, beside its own."""
        places = {name: self.folder / LOGS / name for name in self.configs} or {ALONE: self.folder}
        resume_step = self.step if self.step else None
        return {
            name: stack.enter_context(Log(place / WATCHED, resume_step=resume_step))
            for name, place in places.items()
        }

    def _look(self, watched: dict[str, Log], last: int) -> None:
        """Measure the dictionaries as they stand, if it is time or this step is the last."""
        if self.watch.due(self.step, last):
            for name, values in self.watch.look(self.team, self.step).items():
                watched[name].write(self.step, values)

    def _write(self, whole: Log, logs: dict[str, Log], values: dict[str, dict[str, float]]) -> str:
        """Log a step; what the progress bar says of it."""
        place = {"tokens": self.step * self.config.batch_size, "seconds": self._seconds()}
        for name, log in logs.items():
            if name in values:  # those that are finished have no numbers
                log.write(self.step, values[name] | place)
        if logs:
            flat = {f"{name}/{key}": value for name, own in values.items() for key, value in own.items()}
            whole.write(self.step, flat | place)
            fvus = [own["fvu"] for own in values.values()]
            return f"fvu {min(fvus):.3f} to {max(fvus):.3f}"
        (own,) = values.values()
        whole.write(self.step, own | place)
        return f"fvu {own['fvu']:.3f}  l0 {own['l0']:.0f}"
