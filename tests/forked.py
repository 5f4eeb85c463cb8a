"""Programs that a test stops, kills and starts again: forks of one process that has imported what they need.

Starting Python and importing torch takes longer than most of what such a program does before it is killed. Each is a
process of its own, with its own memory, signals and exit status, as with `subprocess`; but nothing in it has run before
except imports. Knows what to import, not what the programs do. They run unchecked, like all that a test starts.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["Program", "run", "start"]

IMPORTED = (
    "test_train_optimisers",
    "test_train_penalties",
    "test_train_sweep",
    "sememe.effects",
    "sememe.interpret",
    "sememe.lens",
    "sememe.pretrain",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
"""Modules that some program needs and that run nothing when they are imported."""

PARENT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import forked
code = forked.serve(int(sys.argv[1]))
exec(code)
forked.leave()
"""

_parent: Parent | None = None


class Parent:
    """The process that is forked, and the line to it. There is one, started when it is first needed."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", PARENT, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.line = ours
        self.answers = ours.makefile("r")

    def ask(self, question: dict[str, Any], *files: int) -> Any:
        """A question, and file descriptors with it; its answer."""
        message = (json.dumps(question) + "\n").encode()
        if files:
            socket.send_fds(self.line, [message[:1]], list(files))
            message = message[1:]
        self.line.sendall(message)
        answer = self.answers.readline()
        assert answer, f"the process that is forked must be there, got its end ({self.process.wait()})"
        return json.loads(answer)

    def close(self) -> None:
        self.answers.close()
        self.line.close()
        self.process.wait()


class Program:
    """A program under way; as `subprocess.Popen`, with both outputs piped, as text."""

    def __init__(self, code: str, arguments: tuple[str, ...]) -> None:
        global _parent
        if _parent is None:
            _parent = Parent()
            atexit.register(_parent.close)
        self._parent = _parent
        self.returncode: int | None = None
        read, write = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        asked = {"code": code, "arguments": arguments, "environment": dict(os.environ)}
        self.pid: int = _parent.ask(asked, write, self._errors.fileno())
        os.close(write)
        self.stdout = open(read)  # noqa: PTH123, SIM115

    def poll(self) -> int | None:
        """Its exit status, or the number of the signal that ended it below 0; None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """`poll`, when it has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the process itself."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it has written since, to its outputs, when it has ended."""
        with self.stdout:
            out = self.stdout.read()
        self.wait(timeout)
        with self._errors:
            self._errors.seek(0)
            return out, self._errors.read()


def start(code: str, *arguments: str) -> Program:
    """As `subprocess.Popen([sys.executable, "-c", code, *arguments])` with this environment."""
    return Program(code, arguments)


def run(code: str, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of it, with both outputs captured."""
    program = start(code, *arguments)
    out, errors = program.communicate()
    done = subprocess.CompletedProcess([code, *arguments], program.wait(), out, errors)
    if check:
        assert done.returncode == 0, errors
    return done


def serve(line: int) -> str:
    """In the process that is forked: answer questions; in a fork of it, the code that it is to run."""
    for name in IMPORTED:
        __import__(name)
    gc.freeze()  # what a collection does not walk through, a fork need not copy
    with socket.socket(fileno=line) as questions:
        while True:
            start, files, _, _ = socket.recv_fds(questions, 1, 2)
            if not start:
                os._exit(0)
            message = start
            while not message.endswith(b"\n"):
                message += (more := questions.recv(65536))
                assert more, "the end came within a question"
            question = json.loads(message)
            if "pid" in question:
                pid, status = os.waitpid(question["pid"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                answer = os.fork()
                if answer == 0:
                    break
                for file in files:
                    os.close(file)
            questions.sendall(f"{json.dumps(answer)}\n".encode())
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(question["environment"])
    sys.argv = ["-c", *question["arguments"]]
    return str(question["code"])


def leave() -> None:
    """End a program that came to its end, as Python does, but for taking a whole interpreter's modules apart."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)
