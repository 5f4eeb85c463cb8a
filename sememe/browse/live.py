"""What the page asks of a language model, and the child process that answers; this side never loads torch.

Knows a protocol and processes; knows no model. One line of JSON each way, over the child's own pipes:

    to the child     {"id": 3, "verb": "generate", "arguments": {...}}      {"cancel": 3}
    from the child   {"state": "ready", "about": {...}}                     what it is doing when nobody has asked
                     {"id": 3, "done": 7, "of": 40}                         how far it has come
                     {"id": 3, "answer": {...}}
                     {"id": 3, "error": {"kind": "ConfigError", "rule": ..., "value": ..., "remedy": ...}}

The child does one thing at a time; a few more may wait. A job that takes too long, or that does not stop when told
to, ends the child; the next question starts another.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sememe.errors import SememeError

__all__ = ["CANCELLED", "VERBS", "Child", "Live", "LiveError", "Refusal"]

VERBS = ("prompt", "generate", "embed")
CANCELLED = "cancelled"
MAX_WAITING = 4
TIMEOUT_S = 300.0
CANCEL_S = 10.0
MAX_LINE_BYTES = 64 << 20

Json = dict[str, Any]


class Refusal(NamedTuple):
    """Why there is no answer: for people in three parts, for programs as an HTTP status."""

    status: int
    rule: str
    value: str
    remedy: str


class LiveError(SememeError):
    """A question that was not answered.

    Args:
        refusal: Why.
    """

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.rule, refusal.value, refusal.remedy)

    def __reduce__(self) -> tuple[type, tuple[Refusal]]:  # type: ignore[override]
        return type(self), (self.refusal,)


@runtime_checkable
class Live(Protocol):
    """Somebody who answers what needs a model."""

    def status(self) -> Json:
        """`state`: off, loading, ready, busy, failed; `reason` if it failed; `about` the model; `job`; `waiting`."""
        ...

    def ask(self, verb: str, arguments: Json, job: str = "") -> Json:
        """The answer, once it is there.

        Args:
            verb: One of `VERBS`.
            arguments: Plain data, see docs/browse_live.md.
            job: A name by which it can be cancelled.
        Raises:
            LiveError: refused, cancelled, too slow, or the child ended.
        """
        ...

    def cancel(self, job: str) -> bool:
        """Stop a job, running or waiting; false if there is none of this name."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class _Job:
    """A question on its way."""

    def __init__(self, number: int, name: str, verb: str) -> None:
        self.number, self.name, self.verb = number, name, verb
        self.done, self.of = 0, 0
        self.running = False
        self.over = threading.Event()
        self.answer: Json | None = None
        self.refusal: Refusal | None = None
        self.cancelled_at: float | None = None

    def fail(self, refusal: Refusal) -> None:
        if not self.over.is_set():
            self.refusal = refusal
            self.over.set()

    def cancel(self) -> None:
        self.cancelled_at = self.cancelled_at or time.monotonic()


def _cancelled() -> Refusal:
    return Refusal(409, "a job must run to its end to have an answer", CANCELLED, "Ask again.")


class Child:
    """`Live` by a child process.

    Args:
        command: What to run; it speaks the protocol above on its standard input and output.
        timeout_s: The longest a job may take, loading included.
        max_waiting: How many jobs may wait for the one that runs.
    """

    def __init__(
        self, command: Sequence[str], *, timeout_s: float = TIMEOUT_S, max_waiting: int = MAX_WAITING
    ) -> None:
        self.command = list(command)
        self.timeout_s, self.max_waiting = timeout_s, max_waiting
        self._process: subprocess.Popen[bytes] | None = None
        self._letters: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # to this process; None: no more
        self._lock = threading.RLock()  # of everything below; never held while anything is waited for
        self._closing = threading.Lock()
        self._turn = threading.Lock()  # held by the job that runs
        self._jobs: list[_Job] = []
        self._number = 0
        self._state: Json = {"state": "off"}
        self._closed = False

    # ---- asked by the server ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the child now, so that the model is there when the first question comes."""
        with self._lock:
            self._started()

    def status(self) -> Json:
        with self._lock:
            found = dict(self._state)
            running = next((job for job in self._jobs if job.running), None)
            if running is not None and found["state"] == "ready":
                found["state"] = "busy"
            found["job"] = running and {
                "name": running.name,
                "verb": running.verb,
                "done": running.done,
                "of": running.of,
            }
            found["waiting"] = sum(not job.running for job in self._jobs)
            return found

    def ask(self, verb: str, arguments: Json, job: str = "") -> Json:
        mine = self._enter(verb, job)
        try:
            deadline = time.monotonic() + self.timeout_s
            while not self._turn.acquire(timeout=0.1):
                self._still_wanted(mine, deadline)
            try:
                self._still_wanted(mine, deadline)
                self._run(mine, arguments, deadline)
            finally:
                self._turn.release()
        finally:
            with self._lock:
                self._jobs.remove(mine)
        if mine.refusal is not None:
            raise LiveError(mine.refusal)
        assert mine.answer is not None
        return mine.answer

    def cancel(self, job: str) -> bool:
        with self._lock:
            found = [one for one in self._jobs if one.name == job and job]
            for one in found:
                one.cancel()
                if one.running:
                    self._send({"cancel": one.number})
            return bool(found)

    def close(self) -> None:
        with self._closing:  # whoever closes it again waits as well
            with self._lock:
                self._closed = True
                process = self._let_go()
            _ended_process(process)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _enter(self, verb: str, name: str) -> _Job:
        with self._lock:
            if self._closed:
                raise LiveError(_ended("it was closed"))
            if len(self._jobs) > self.max_waiting:
                raise LiveError(
                    Refusal(
                        429,
                        f"at most {self.max_waiting} questions may wait for the model",
                        f"{len(self._jobs)} before this one",
                        "Wait for an answer, or cancel one.",
                    )
                )
            self._number += 1
            job = _Job(self._number, name, verb)
            self._jobs.append(job)
            return job

    def _still_wanted(self, job: _Job, deadline: float) -> None:
        if job.cancelled_at is not None:
            raise LiveError(_cancelled())
        if time.monotonic() > deadline:
            raise LiveError(self._too_slow())

    def _too_slow(self) -> Refusal:
        return Refusal(
            504,
            f"the model must answer within {self.timeout_s:g} seconds",
            "no answer",
            "Ask for fewer tokens, or wait until it is less busy.",
        )

    def _run(self, job: _Job, arguments: Json, deadline: float) -> None:
        with self._lock:
            if self._closed:
                raise LiveError(_ended("it was closed"))
            if job.cancelled_at is not None:  # just now: from here on, a cancel is sent
                raise LiveError(_cancelled())
            self._started()
            job.running = True
            self._send({"id": job.number, "verb": job.verb, "arguments": arguments})
        while not job.over.wait(0.1):
            now = time.monotonic()
            if job.cancelled_at is not None and self._state["state"] == "loading":
                job.fail(_cancelled())  # it drops the question when it comes to it; the loading is not lost
            elif job.cancelled_at is not None and now > job.cancelled_at + CANCEL_S:
                job.fail(_cancelled())
                self._kill()
            elif now > deadline:
                job.fail(self._too_slow())
                self._kill()

    def _started(self) -> None:
        """A child that runs: the one there is, or a new one."""
        if self._process is not None and self._process.poll() is None:
            return
        self._let_go()  # it has ended: nothing to wait for
        try:
            process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            self._state = {"state": "failed", "reason": str(error)}
            raise LiveError(_ended(str(error))) from None
        self._process, self._letters = process, queue.SimpleQueue()
        self._state = {"state": "loading"}
        for work in (self._write, self._read):
            threading.Thread(target=work, args=(process, self._letters), daemon=True).start()

    def _send(self, message: Json) -> None:
        """Leave a message for the child; never waits for it to be read."""
        self._letters.put(json.dumps(message).encode() + b"\n")

    def _write(self, process: subprocess.Popen[bytes], letters: queue.SimpleQueue[bytes | None]) -> None:
        """Give a child what is left for it; runs in a thread of its own, as a pipe that nobody reads is soon full.

        Whoever kills the child frees this thread: the pipe breaks.
        """
        assert process.stdin is not None
        try:
            while (letter := letters.get()) is not None:
                process.stdin.write(letter)
                process.stdin.flush()
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
                return  # it has ended; who reads it says how
            with self._lock:
                if process is self._process:
                    self._fail_running(_ended("it took no question"))
            process.kill()  # nobody can ask it any more: the next question starts another
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _read(self, process: subprocess.Popen[bytes], letters: queue.SimpleQueue[bytes | None]) -> None:
        """Take what a child says until it ends; runs in a thread of its own."""
        assert process.stdout is not None
        while line := process.stdout.readline(MAX_LINE_BYTES):
            try:
                message = json.loads(line)
            except ValueError:
                continue  # not ours: a library that prints
            if isinstance(message, dict):
                with self._lock:
                    if process is self._process:
                        self._heard(message)
        process.stdout.close()
        code = process.wait()
        letters.put(None)
        with self._lock:
            if process is not self._process:
                return
            if not self._closed:
                reason = f"the model's process ended with code {code}; see the server's terminal"
                self._state = {"state": "failed", "reason": reason}
            for job in self._jobs:
                if job.running:
                    job.fail(_cancelled() if job.cancelled_at is not None else _ended(f"exit code {code}"))

    def _heard(self, message: Json) -> None:
        if "state" in message:
            self._state = {key: message[key] for key in ("state", "reason", "about") if key in message}
            return
        job = next((one for one in self._jobs if one.number == message.get("id")), None)
        if job is None:
            return
        if "answer" in message:
            job.answer = message["answer"]
            job.over.set()
        elif "error" in message:
            error = message["error"]
            if error.get("kind") == CANCELLED:
                job.fail(_cancelled())
            else:
                job.fail(Refusal(422, error["rule"], str(error["value"]), error["remedy"]))
        else:
            job.done, job.of = int(message.get("done", 0)), int(message.get("of", 0))

    def _kill(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def _fail_running(self, refusal: Refusal) -> None:
        for job in self._jobs:
            if job.running:
                job.fail(refusal)

    def _let_go(self) -> subprocess.Popen[bytes] | None:
        """Have nothing to do with the child any more; it is returned, to be waited for without the lock."""
        process, self._process = self._process, None
        self._letters.put(None)  # its input ends, which tells it to leave
        self._fail_running(_ended("it was closed"))
        if process is not None:
            self._state = {"state": "off"}
        return process


def _ended_process(process: subprocess.Popen[bytes] | None) -> None:
    """Wait for a child to leave now that its input has ended, or make it."""
    if process is None:
        return
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ended(how: str) -> Refusal:
    return Refusal(
        502,
        "the model's process must live until it has answered",
        how,
        "Ask again: another is started. If that fails too, see the server's terminal.",
    )
