"""Members on several devices, a process for each device, fed from the one stream that this process reads.

Knows how batches and states travel, and what to do when a process dies; knows nothing of how a dictionary learns.
Batches lie in a ring of shared slots that every process maps: while one is trained on, the next is read. Orders and
answers go through pipes, in order. On CPUs the members' bits do not depend on how they are spread.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.errors import ResourceError, SememeError
from sememe.source import Batch
from sememe.train.crew import Crew, device_of
from sememe.train.dead import rows_wanted
from sememe.train.member import Spec
from sememe.train.schedule import Plan

__all__ = ["Workers"]

N_SLOTS = 2
SECONDS_TO_LEAVE = 5.0


class _Ring(NamedTuple):
    """Batches in a file that several processes map into their memory: slot after slot, x and then the target."""

    path: str
    batch_size: int
    d_in: int
    d_out: int
    """0 where the target is x itself."""

    def slots(self) -> list[Batch]:
        """Every slot as tensors over the mapped file."""
        width = self.d_in + self.d_out
        whole = torch.from_numpy(
            np.memmap(self.path, np.float32, "r+", shape=(N_SLOTS, width * self.batch_size))
        )
        found = []
        for row in whole:
            x = row[: self.batch_size * self.d_in].view(self.batch_size, self.d_in)
            rest = row[self.batch_size * self.d_in :].view(self.batch_size, self.d_out)
            found.append(Batch(x, rest if self.d_out else x))
        return found


class _Worker(NamedTuple):
    device: str
    process: BaseProcess
    pipe: Connection


class Workers:
    """Members spread over devices in turn: the first to the first device, and so on.

    Args:
        specs: What to make.
        n_steps: Length of the run.
        devices: One process for each.
        threads: CPU threads of each process.
        batch_size: Rows of a batch.
        folder: Where the shared slots are kept if shared memory has no room for them.
    """

    def __init__(
        self,
        specs: list[Spec],
        n_steps: int,
        devices: tuple[str, ...],
        threads: int,
        batch_size: int,
        folder: Path,
    ) -> None:
        self.homes = {spec.name: index % len(devices) for index, spec in enumerate(specs)}
        self.batch_size, self.folder = batch_size, folder
        self.n_sent = 0
        self.n_done = [0] * len(devices)
        self.ring: _Ring | None = None
        self.slots: list[Batch] = []
        self.workers: list[_Worker] = []
        try:
            for index, device in enumerate(devices):
                device_of(device)
                own = [spec for spec in specs if self.homes[spec.name] == index]
                self.workers.append(_start(device, own, n_steps, threads))
            started = [self._answer(worker) for worker in self.workers]
        except BaseException:
            self._leave()
            raise
        self.kinds: tuple[str, ...] = tuple(sorted({kind for kinds, _ in started for kind in kinds}))
        plans: dict[str, Plan] = {name: plan for _, own in started for name, plan in own.items()}
        self.plans = [(spec.config, plans[spec.name]) for spec in specs]

    # -- the loop's side -------------------------------------------------------------------------------

    def initialise(self, sample: Batch) -> None:
        """Start from rows of the stream."""
        self._all("initialise", _packed(sample))

    def rows_wanted(self, step: int) -> int:
        """The most that any member wants."""
        return max(rows_wanted(config, plan, step) for config, plan in self.plans)

    def train_step(
        self, batch: Batch, ahead: Batch | None, logging: bool
    ) -> dict[str, dict[str, float]] | None:
        """Hand a batch to every process; waits for them only for numbers, or for a free slot."""
        if self.ring is None:
            self._make_ring(batch)
        while self.n_sent - min(self.n_done) >= N_SLOTS:
            self._step_answers(self.n_sent - N_SLOTS + 1)
        place = self.n_sent % N_SLOTS
        slot = self.slots[place]
        slot.x.copy_(batch.x)
        if slot.target is not slot.x:
            slot.target.copy_(batch.target)
        packed = None if ahead is None else _packed(ahead)
        for worker in self.workers:
            self._send(worker, "train_step", place, packed, logging)
        self.n_sent += 1
        if not logging:
            return None
        values: dict[str, dict[str, float]] = {}
        for answer in self._step_answers(self.n_sent):
            values |= answer
        return {name: values[name] for name in self.homes if name in values}

    def finished(self) -> bool:
        """Whether all members are."""
        return all(self._all("finished"))

    def check(self) -> None:
        """Look at every member."""
        self._all("check")

    def state_dict(self) -> dict[str, Any]:
        """Each member's state."""
        states: dict[str, Any] = {}
        for packed in self._all("state_dict"):
            states |= _unpacked(packed)
        return {name: states[name] for name in self.homes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for index, worker in enumerate(self.workers):
            own = {name: state[name] for name, home in self.homes.items() if home == index}
            self._ask(worker, "load_state_dict", _packed(own))

    def look(self, rows: Batch) -> dict[str, dict[str, Any]]:
        """Each in its own process."""
        found: dict[str, dict[str, Any]] = {}
        for answer in self._all("look", _packed(rows)):
            found |= answer
        return {name: found[name] for name in self.homes}

    def reconstruct(self, name: str, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """In its own process."""
        self._step_answers(self.n_sent)
        worker = self.workers[self.homes[name]]
        recon: Tensor = _unpacked(self._ask(worker, "reconstruct", name, _packed(x)))
        return recon

    def write(self, name: str, folder: Path, probe_rows: Batch, n_rows: int | None) -> dict[str, Any]:
        """Write one of them, in its own process."""
        self._step_answers(self.n_sent)
        worker = self.workers[self.homes[name]]
        about: dict[str, Any] = self._ask(worker, "write", name, folder, _packed(probe_rows), n_rows)
        return about

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    # -- messages ------------------------------------------------------------------------------------

    def _all(self, order: str, *arguments: Any) -> list[Any]:
        """Give an order to every process when all have taken their steps; their answers."""
        self._step_answers(self.n_sent)
        for worker in self.workers:
            self._send(worker, order, *arguments)
        return [self._answer(worker) for worker in self.workers]

    def _ask(self, worker: _Worker, order: str, *arguments: Any) -> Any:
        self._send(worker, order, *arguments)
        return self._answer(worker)

    def _step_answers(self, until: int) -> list[Any]:
        """Wait until every process has taken that many steps; what each said last."""
        last = []
        for index, worker in enumerate(self.workers):
            answer = None
            while self.n_done[index] < until:
                answer = self._answer(worker)
                self.n_done[index] += 1
            last.append(answer)
        return last

    def _send(self, worker: _Worker, order: str, *arguments: Any) -> None:
        try:
            worker.pipe.send((order, *arguments))
        except OSError:
            self._answer(worker)  # what it said before it died, if anything, tells more
            raise _dead(worker) from None

    def _answer(self, worker: _Worker) -> Any:
        """The next thing a process says.

        Raises:
            SememeError: what it met.
            ResourceError: it died.
        """
        wait([worker.pipe, worker.process.sentinel])
        try:
            if not worker.pipe.poll():
                raise EOFError
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            raise _dead(worker) from None
        if kind == "error":
            raise value
        assert kind == "done", f"in the process for {worker.device}:\n{value}"
        return value

    def _make_ring(self, batch: Batch) -> None:
        """Slots for batches like this one, mapped by all; the file's name goes at once, so that nothing is left."""
        d_out = 0 if batch.target is batch.x else batch.target.shape[1]
        n_bytes = 4 * N_SLOTS * self.batch_size * (batch.x.shape[1] + d_out)
        memory = Path("/dev/shm")
        roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * n_bytes
        with tempfile.NamedTemporaryFile(dir=memory if roomy else self.folder, suffix=".tmp") as file:
            file.truncate(n_bytes)
            self.ring = _Ring(file.name, self.batch_size, batch.x.shape[1], d_out)
            self.slots = self.ring.slots()
            self._all("map", self.ring)

    def _leave(self) -> None:
        """End the processes: a closed pipe tells them; one that is busy for too long is killed."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join(SECONDS_TO_LEAVE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _dead(worker: _Worker) -> ResourceError:
    worker.process.join(SECONDS_TO_LEAVE)
    code = worker.process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return ResourceError(
        f"the process that trains on {worker.device} must live to the end of the run",
        f"its end by {how} (process {worker.process.pid})",
        "Run the same command again: it goes on from the last checkpoint. (SIGKILL often means too little memory.)",
    )


# -- the other processes' side ---------------------------------------------------------------------------


def _start(device: str, specs: list[Spec], n_steps: int, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_work, args=(theirs, device, specs, n_steps, threads), name=f"sememe {device}", daemon=True
    )
    with _deaf():
        process.start()
    theirs.close()
    return _Worker(device, process, ours)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A process started here ignores Ctrl-C from its first moment: the one that started it decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, device: str, specs: list[Spec], n_steps: int, threads: int) -> None:
    """One process: obeys until its pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        with kernels.threads(threads):
            crew = Crew(specs, n_steps, device_of(device))
            pipe.send(("done", (crew.kinds, {name: member.plan for name, member in crew.members.items()})))
            slots: list[Batch] = []
            while True:
                order, *arguments = pipe.recv()
                pipe.send(("done", _obey(crew, slots, order, arguments)))
    except (EOFError, OSError):
        return  # whoever gave the orders is gone, or has closed the pipe
    except SememeError as error:
        pipe.send(("error", error))
    except BaseException:
        pipe.send(("crash", traceback.format_exc()))


def _obey(crew: Crew, slots: list[Batch], order: str, arguments: list[Any]) -> Any:
    if order == "train_step":
        place, ahead, logging = arguments
        return crew.train_step(slots[place], None if ahead is None else _unpacked(ahead), logging)
    if order == "map":
        slots[:] = arguments[0].slots()
        return None
    if order == "state_dict":
        return _packed(crew.state_dict())
    if order == "reconstruct":
        return _packed(crew.reconstruct(arguments[0], _unpacked(arguments[1])))
    return getattr(crew, order)(*map(_unpacked, arguments))


class _Packed(NamedTuple):
    """A tensor as plain bytes: pipes carry copies, so that no process sees another's memory change."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


class _PackedBatch(NamedTuple):
    x: _Packed
    target: _Packed | None


def _packed(value: Any) -> Any:
    """Tensors, in batches and dictionaries too, as bytes; the rest as it is."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return _Packed(str(flat.dtype).removeprefix("torch."), tuple(value.shape), _bytes(flat))
    if isinstance(value, Batch):
        return _PackedBatch(_packed(value.x), None if value.target is value.x else _packed(value.target))
    return {name: _packed(item) for name, item in value.items()} if isinstance(value, dict) else value


def _bytes(flat: Tensor) -> bytes:
    return flat.view(torch.uint8).numpy().tobytes()


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Packed):
        flat = torch.frombuffer(bytearray(value.content), dtype=getattr(torch, value.dtype))
        return flat.view(value.shape)
    if isinstance(value, _PackedBatch):
        x = _unpacked(value.x)
        return Batch(x, x if value.target is None else _unpacked(value.target))
    return {name: _unpacked(item) for name, item in value.items()} if isinstance(value, dict) else value
