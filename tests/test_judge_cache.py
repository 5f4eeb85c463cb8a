"""The file of answers: keys, interruptions, several processes, damage."""

import functools
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_server import JudgeServer
from judge_world import endpoint_for, question, questions, slowly

from sememe.errors import (
    CorruptError,
    LockError,
    ResourceError,
)
from sememe.judge import (
    Answer,
    EndpointConfig,
    Message,
    Question,
    SlotQuestion,
    Usage,
    ask_all,
    cache,
    open_judge,
)

HERE = Path(__file__).parent


@pytest.fixture
def endpoint(tmp_path):
    """A judge for a server of the test."""
    return functools.partial(endpoint_for, folder=tmp_path)


# -- the cache ----------------------------------------------------------------------------------------


def test_seeds_matter_with_a_temperature_only(endpoint):
    with JudgeServer() as server:
        judge = endpoint(server)
        ask_all(judge, [question(seed=i) for i in range(3)])
        assert server.n_requests == 1
        ask_all(judge, [question(seed=i, temperature=1.0) for i in range(3)])
        assert server.n_requests == 4
        ask_all(judge, [question(seed=i, temperature=1.0) for i in range(3)])
        assert server.n_requests == 4


def test_every_setting_that_changes_an_answer_changes_its_key():
    base = Question((Message("user", "a"),))
    variants = [
        base,
        Question((Message("system", "a"),)),
        Question((Message("user", "b"),)),
        Question((Message("user", "a"), Message("user", "a"))),
        base._replace(max_tokens=3),
        base._replace(temperature=0.1),
        base._replace(temperature=0.1, seed=1),
        base._replace(stop=("x",)),
        SlotQuestion("a", (1,), ("0",)),
        SlotQuestion("a", (2,), ("0",)),
        SlotQuestion("a", (1,), ("0", "1")),
    ]
    keys = {cache.key_of("f", variant) for variant in variants} | {cache.key_of("g", base)}
    assert len(keys) == len(variants) + 1


def test_a_judges_fingerprint_follows_its_model_and_not_its_speed():
    base = EndpointConfig()
    same = [
        {"concurrency": 2},
        {"timeout_seconds": 1},
        {"max_retries": 0},
        {"max_calls": 1},
        {"key_variable": "X"},
        {"prompt_price": 1.0, "completion_price": 1.0, "max_price": 1.0},
        {"answers": Path("x")},
    ]
    others = [
        {"model": "x"},
        {"base_url": "http://localhost:1/v1"},
        {"leave_out": ("seed",)},
        {"slots": "one_by_one"},
        {"n_log_probs": 3},
        {"extra_body": '{"top_k": 3}'},
    ]
    fingerprint = open_judge(base).fingerprint
    assert {open_judge(base.replace(**change)).fingerprint for change in same} == {fingerprint}
    assert len({fingerprint, *(open_judge(base.replace(**change)).fingerprint for change in others)}) == 7
    assert "extra_body" not in base.identity(), (
        "answers that were kept before it was an option are found again"
    )
    touched = {name for change in [*same, *others] for name in change}
    assert touched | {"kind", "backoff_seconds", "max_wait_seconds"} == set(EndpointConfig.model_fields)


PROGRAM = """
import sys
from pathlib import Path
from sememe.judge import EndpointConfig, Message, Question, ask_all, open_judge

url, answers, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
judge = open_judge(EndpointConfig(base_url=url, model="small", answers=answers, concurrency=4))
questions = [Question((Message("user", f"question {i}"),)) for i in range(first, last)]
print("begins", flush=True)
ask_all(judge, questions)
print("ends", flush=True)
"""


def started(server, answers, first=0, last=150):
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, server.url, str(answers), str(first), str(last)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=HERE.parent,
    )
    assert program.stdout.readline() == "begins\n"
    return program


def n_kept(path):
    with sqlite3.connect(path) as connection:
        (n,) = connection.execute("SELECT count(*) FROM answers").fetchone()
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    return n


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "ctrl-c", "term"]
)
def test_interrupted_at_any_moment_every_answer_is_found_again(endpoint, tmp_path, how):
    path = tmp_path / "answers.sqlite"
    with JudgeServer(chat=slowly) as server:
        program = started(server, path)
        while server.n_requests < 40:
            assert program.poll() is None, program.stderr.read()
            time.sleep(0.005)
        stopped_at = time.monotonic()
        program.send_signal(how)
        out, err = program.communicate(timeout=60)
        assert time.monotonic() - stopped_at < 15
        assert "ends" not in out
        if how != signal.SIGKILL:
            assert "KeyboardInterrupt" in err
        asked, kept = server.n_requests, n_kept(path)
        assert asked - kept <= 4, "only what was under way is lost"
        answers = ask_all(endpoint(server), questions(150))
        assert server.n_requests - asked == 150 - kept
    assert [answer.text for answer in answers] == [f"question {i}" for i in range(150)]


def test_several_processes_share_the_file(endpoint, tmp_path):
    path = tmp_path / "answers.sqlite"
    with JudgeServer() as server:
        programs = [started(server, path, first, first + 60) for first in (0, 30)]
        for program in programs:
            out, err = program.communicate(timeout=60)
            assert program.returncode == 0, err
            assert out == "ends\n"
        before = server.n_requests
        assert n_kept(path) == 90
        ask_all(endpoint(server), questions(90))
        assert server.n_requests == before


def test_a_file_that_holds_no_answers_is_refused(endpoint, tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"This is a letter, not a database. " * 100)
    with JudgeServer() as server, pytest.raises(CorruptError, match="must be a file of answers"):
        ask_all(endpoint(server), [question()])
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE answers (key TEXT, other TEXT)")
    connection.close()
    with JudgeServer() as server, pytest.raises(CorruptError, match="must be a file of answers"):
        ask_all(endpoint(server, answers=tmp_path / "other.sqlite"), [question()])


def test_a_damaged_answer_is_refused(endpoint, tmp_path):
    with JudgeServer() as server:
        judge = endpoint(server)
        ask_all(judge, [question()])
        with sqlite3.connect(tmp_path / "answers.sqlite") as connection:
            connection.execute("UPDATE answers SET answer = '{}'")
        connection.close()
        with pytest.raises(CorruptError, match="must be a file of answers"):
            ask_all(judge, [question()])


def test_a_file_that_cannot_be_written_or_is_held_is_named(endpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with JudgeServer() as server, pytest.raises(ResourceError, match="must be writable"):
        ask_all(endpoint(server, answers=tmp_path / "file" / "answers.sqlite"), [question()])
    monkeypatch.setattr(cache, "_WAIT_SECONDS", 0.2)
    holder = sqlite3.connect(tmp_path / "answers.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with JudgeServer() as server, pytest.raises(LockError, match="database is locked"):
        ask_all(endpoint(server), [question()])
    holder.close()


def test_a_full_disk_is_named(tmp_path):
    kept = cache.AnswerCache(tmp_path / "answers.sqlite")
    kept.put("a", Answer("short"))
    kept._connection.execute("PRAGMA max_page_count = 1")  # SQLite says the same as on a full disk
    with pytest.raises(
        ResourceError, match=r"must be writable, got database or disk is full\. Free disk space"
    ):
        kept.put("b", Answer("long" * 10_000))
    assert kept.get("a") == Answer("short", "stop", Usage(from_cache=True))
    assert kept.get("b") is None
    kept.close()
