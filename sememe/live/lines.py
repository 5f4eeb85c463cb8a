"""Questions in and answers out, as lines of JSON; what is cancelled stops at its next token.

Knows lines and threads; what an answer is, a session knows. Questions are answered in the order in which they come,
in the main thread; another reads ahead, so that a job that runs can be cancelled.
"""

from __future__ import annotations

import json
import queue
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from sememe.errors import SememeError

__all__ = ["CANCELLED", "Answers", "Cancelled", "serve"]

CANCELLED = "cancelled"

Json = dict[str, Any]
Progress = Callable[[int, int], None]


class Cancelled(Exception):
    """The job is not wanted any more."""


@runtime_checkable
class Answers(Protocol):
    """What `serve` needs of a session."""

    def prepare(self, say: Callable[[Json], None]) -> None:
        """Load what is needed, and say how that goes."""
        ...

    def answer(self, verb: str, arguments: Json, progress: Progress) -> Json:
        """An answer, plain data; `progress` raises `Cancelled` once the job is not wanted any more."""
        ...


def serve(session: Answers, questions: Iterable[bytes], write: Callable[[bytes], object]) -> None:
    """Answer until the questions end.

    Args:
        session: Who answers.
        questions: Lines, as `sememe.browse.live` writes them.
        write: Takes the lines that it reads, one at a time.
    """
    lock = threading.Lock()

    def say(message: Json) -> None:
        line = json.dumps(message, allow_nan=False).encode() + b"\n"
        with lock:
            write(line)

    waiting: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
    cancelled: set[int] = set()

    def read() -> None:
        for line in questions:
            message = json.loads(line)
            if "cancel" in message:
                cancelled.add(int(message["cancel"]))
            else:
                waiting.put(message)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    say({"state": "loading"})
    session.prepare(say)
    while (message := waiting.get()) is not None:
        number = int(message["id"])

        def progress(done: int, of: int, number: int = number) -> None:
            if number in cancelled:
                raise Cancelled
            say({"id": number, "done": done, "of": of})

        say({"id": number} | _answered(session, message, progress))
        cancelled.discard(number)


def _answered(session: Answers, message: Json, progress: Progress) -> Json:
    try:
        return {"answer": session.answer(str(message["verb"]), message["arguments"], progress)}
    except Cancelled:
        return {"error": {"kind": CANCELLED, "rule": "", "value": "", "remedy": ""}}
    except SememeError as error:
        kind = type(error).__name__
        return {
            "error": {"kind": kind, "rule": error.rule, "value": str(error.value), "remedy": error.remedy}
        }
    except Exception as error:
        traceback.print_exc()
        rule = "the model's process must understand the question"
        value = f"{type(error).__name__}: {error}"
        return {
            "error": {
                "kind": "Exception",
                "rule": rule,
                "value": value,
                "remedy": "See the server's terminal.",
            }
        }
