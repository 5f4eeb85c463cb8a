"""Every answer that was ever paid for, on disk. Knows keys and JSON; no server, no model, no price.

One SQLite file in its default journal: a process that is killed at any moment leaves whole answers only, and several
processes may share it, on one machine. A key is a hash of the model's fingerprint, the prompt and the settings, so
the file serves any number of models and runs. It holds answers, never prompts and never keys of servers.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sememe.config import canonical_json, sha256_of
from sememe.errors import CorruptError, LockError, ResourceError
from sememe.judge.base import Answer, Question, SlotQuestion, Slots, Usage

__all__ = ["AnswerCache", "key_of"]

VERSION = 1
_WAIT_SECONDS = 60.0


def key_of(fingerprint: str, question: Question | SlotQuestion) -> str:
    """What an answer is found by. Without a temperature the seed has no effect, and is left out."""
    asked = question._asdict()
    if isinstance(question, Question) and question.temperature == 0:
        del asked["seed"]
    return sha256_of([VERSION, fingerprint, type(question).__name__, asked])


class AnswerCache:
    """Answers by key.

    Args:
        path: The file; made with its folders when the first answer is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def get(self, key: str) -> Answer | Slots | None:
        """An answer, marked as coming from here; None if it was never given.

        Raises:
            CorruptError: the file is no SQLite database, or damaged.
            LockError: another process has held the file for a minute.
        """
        if self._connection is None and not self.path.exists():
            return None
        with self._open() as connection:
            row = connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._read(row[0])

    def put(self, key: str, answer: Answer | Slots) -> None:
        """Keep an answer. On disk when this returns.

        Raises:
            CorruptError: the file is no SQLite database, or damaged.
            LockError: another process has held the file for a minute.
            ResourceError: it cannot be written.
        """
        with self._open() as connection, connection:
            connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, _written(answer), int(time.time()))
            )

    def close(self) -> None:
        """Let go of the file; it is opened again when needed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Used by one thread at a time; which one may change between runs.
                connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, check_same_thread=False)
                try:
                    connection.execute("PRAGMA synchronous = FULL")
                    with connection:
                        connection.execute(
                            "CREATE TABLE IF NOT EXISTS answers "
                            "(key TEXT PRIMARY KEY, answer TEXT NOT NULL, answered_at INTEGER NOT NULL) WITHOUT ROWID"
                        )
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
            yield self._connection
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise LockError(
                    f"the file of answers {self.path} must be free within {_WAIT_SECONDS:.0f} seconds",
                    str(error),
                    "Stop the process that holds it, or name another file with answers.",
                ) from None
            if "no such" in str(error):
                raise self._damaged(error) from None  # another program's database
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> ResourceError:
        return ResourceError(
            f"the file of answers {self.path} must be writable",
            str(error),
            "Free disk space or mend its rights, or name another file with answers.",
        )

    def _read(self, text: str) -> Answer | Slots:
        try:
            data: dict[str, Any] = json.loads(text)
            n_prompt, n_completion, n_calls = data["usage"]
            usage = Usage(n_prompt, n_completion, from_cache=True, n_calls=n_calls)
            if "text" in data:
                return Answer(data["text"], data["finish"], usage)
            return Slots(tuple(data["log_probs"]), usage)
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(
                f"an answer without {error}" if isinstance(error, KeyError) else error
            ) from None

    def _damaged(self, found: object) -> CorruptError:
        return CorruptError(
            f"{self.path} must be a file of answers", found, "Delete it, or name another file with answers."
        )


def _written(answer: Answer | Slots) -> str:
    cost = answer.usage
    usage = [cost.n_prompt_tokens, cost.n_completion_tokens, cost.n_calls]
    if isinstance(answer, Answer):
        return canonical_json({"text": answer.text, "finish": answer.finish, "usage": usage})
    return canonical_json({"log_probs": [dict(slot) for slot in answer.log_probs], "usage": usage})
