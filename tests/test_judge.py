"""Servers and local models that are asked in words: every reply a server can give, limits, the cache, Ctrl-C."""

import asyncio
import itertools
import json
import logging
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pydantic
import pytest
from judge_server import HTML, JudgeServer, Reply, last_user

from sememe.config import Config
from sememe.errors import (
    ConfigError,
    CorruptError,
    JudgeError,
    LimitError,
    LockError,
    ResourceError,
)
from sememe.judge import (
    Answer,
    EndpointConfig,
    Judge,
    JudgeConfig,
    LocalConfig,
    Message,
    Question,
    SlotQuestion,
    Slots,
    Usage,
    ask_all,
    cache,
    open_judge,
    run_each,
)
from sememe.judge.budget import Budget, Prices
from sememe.judge.endpoint import Endpoint, _retry_after

HERE = Path(__file__).parent
SECRET = "sk-very-secret-0123456789"


def question(text="how many?", **changes):
    return Question((Message("user", text),), **changes)


def questions(n):
    return [question(f"question {i}") for i in range(n)]


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """A judge for a server, quick to try again, with its answers in a folder of the test."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def make(server, **options):
        defaults = {
            "base_url": server.url,
            "model": "small",
            "answers": tmp_path / "answers.sqlite",
            "backoff_seconds": 0.01,
            "timeout_seconds": 10,
        }
        return open_judge(EndpointConfig(**(defaults | options)))

    return make


def failing(judge, asked=None):
    """The error of a question."""
    with pytest.raises(JudgeError) as caught:
        ask_all(judge, [asked or question()])
    return str(caught.value)


# -- what is sent, and what comes back ---------------------------------------------------------------


def test_a_question_is_sent_as_it_is_and_its_answer_comes_back(endpoint):
    asked = Question(
        (Message("system", "Be brief."), Message("user", "2 + 2?")),
        max_tokens=7,
        temperature=0.5,
        seed=3,
        stop=("\n",),
    )
    with JudgeServer(chat=lambda request: "4") as server:
        judge = endpoint(server)
        assert isinstance(judge, Judge)
        assert isinstance(judge.judge, Judge)
        [answer] = ask_all(judge, [asked])
    assert answer == Answer("4", "stop", Usage(10, 1))
    assert server.seen[0].body == {
        "model": "small",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["\n"],
    }


def test_without_a_temperature_no_seed_is_sent_and_fields_can_be_left_out(endpoint):
    with JudgeServer() as server:
        ask_all(endpoint(server, leave_out=("temperature", "stop")), [question(stop=("x",), seed=4)])
    assert set(server.seen[0].body) == {"model", "messages", "max_tokens"}


@pytest.mark.parametrize(
    ("choice", "text", "finish"),
    [
        (
            {"message": {"role": "assistant", "content": '{"a": [1, '}, "finish_reason": "length"},
            '{"a": [1, ',
            "length",
        ),
        ({"message": {"role": "assistant", "content": ""}}, "", "stop"),
        ({"message": {"role": "assistant", "content": None}, "finish_reason": "length"}, "", "length"),
        ({"message": {"role": "assistant", "content": None, "refusal": "I cannot."}}, "I cannot.", "stop"),
        ({"message": {"role": "assistant", "content": "ok"}, "finish_reason": None}, "ok", "unknown"),
        ({"message": {"role": "assistant", "content": "not \ud83d\ude00 json"}}, "not 😀 json", "stop"),
    ],
    ids=["cut off", "empty", "null", "refused", "no reason", "words"],
)
def test_what_is_no_good_answer_is_carried_not_swallowed(endpoint, choice, text, finish):
    with JudgeServer(chat=lambda request: choice) as server:
        [answer] = ask_all(endpoint(server), [question()])
        assert (answer.text, answer.finish) == (text, finish)
        assert server.n_requests == 1
        [again] = ask_all(endpoint(server), [question()])
    assert again == answer._replace(usage=answer.usage._replace(from_cache=True))


def test_a_server_that_does_not_say_what_it_cost_is_estimated(endpoint):
    with JudgeServer(chat=lambda request: "x" * 40, usage=False) as server:
        [answer] = ask_all(endpoint(server), [question("y" * 80)])
    assert answer.usage == Usage(20 + 4 + 3, 10)


def test_newer_models_limit_under_another_name(endpoint):
    def chat(request):
        if "max_tokens" in request:
            told = (
                "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            )
            return Reply(400, {"error": {"message": told}})
        return "fine"

    with JudgeServer(chat=chat) as server:
        judge = endpoint(server, concurrency=1)
        assert [answer.text for answer in ask_all(judge, questions(3))] == ["fine"] * 3
        assert ["max_tokens" in seen.body for seen in server.seen] == [True, False, False, False]
        several = ask_all(endpoint(server), [question(f"another {i}") for i in range(8)])
        assert [answer.text for answer in several] == ["fine"] * 8


# -- a busy, ill or silent server -------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_busy_or_ill_server_is_asked_again(endpoint, status):
    with JudgeServer(script=[Reply(status), Reply(status)]) as server:
        judge = endpoint(server)
        assert ask_all(judge, [question()])[0].text == "yes"
    assert server.n_requests == 3
    assert judge.tally.n_retries == 2
    assert judge.tally.n_calls == 1


def test_a_server_that_stays_ill_is_named_with_its_own_words(endpoint):
    ill = Reply(500, {"error": {"message": "CUDA out of memory"}})
    with JudgeServer(script=[ill] * 10) as server:
        told = failing(endpoint(server, max_retries=3))
    assert server.n_requests == 4
    assert "HTTP 500: CUDA out of memory (tried 4 times)" in told
    assert "every answer so far is kept" in told


def test_waits_grow_and_differ_from_run_to_run_by_nothing():
    config = EndpointConfig(backoff_seconds=0.5, max_wait_seconds=20)
    from sememe.judge.endpoint import _Again

    def waits():
        judge = Endpoint(config)
        return [judge._wait_after(_Again(JudgeError("a", "b", "c")), i) for i in range(6)]

    first, factors = waits(), random.Random(0)
    assert first == waits()
    assert first == [min(0.5 * 2**i, 20) * factors.uniform(0.5, 1.0) for i in range(6)]


def test_retry_after_is_obeyed_by_every_question(endpoint):
    busy = Reply(429, None, {"retry-after": "0.7"})
    with JudgeServer(script=[busy]) as server:
        judge = endpoint(server, concurrency=1)
        ask_all(judge, questions(3))
        waited = server.seen[1].at - server.seen[0].at
    assert 0.65 < waited < 3
    with JudgeServer(script=[busy]) as server:
        judge = endpoint(server, concurrency=4)

        async def late(i):
            while i > 0 and judge.tally.n_retries == 0:
                await asyncio.sleep(0.01)
            return await judge.ask(question(f"late {i}"))

        run_each(judge, late, range(3), description="ask", unit="questions")
        starts = [seen.at - server.seen[0].at for seen in server.seen]
    assert len(starts) > 3
    assert all(start > 0.6 for start in starts[1:]), "nobody asks before the server is ready again"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert _retry_after(headers) == seconds


def test_a_date_to_wait_for_is_in_seconds_from_now():
    import email.utils

    told = _retry_after({"retry-after": email.utils.formatdate(time.time() + 100, usegmt=True)})
    assert 97 < told <= 100


def test_a_wait_of_hours_and_an_empty_account_end_at_once(endpoint):
    with JudgeServer(script=[Reply(429, None, {"retry-after": "86400"})]) as server:
        told = failing(endpoint(server))
        assert "asks to wait 86400 seconds" in told
        assert "max_wait_seconds" in told
        assert server.n_requests == 1
    body = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with JudgeServer(script=[Reply(429, body)]) as server:
        told = failing(endpoint(server))
        assert "must have credit" in told
        assert server.n_requests == 1


def test_a_silent_server_is_asked_again_and_then_named(endpoint):
    with JudgeServer(script=[Reply(body={}, seconds=5)]) as server:
        judge = endpoint(server, timeout_seconds=0.3)
        assert ask_all(judge, [question()])[0].text == "yes"
        assert judge.tally.n_retries == 1
    with JudgeServer(chat=lambda request: Reply(body={}, seconds=5)) as server:
        told = failing(endpoint(server, timeout_seconds=0.2, max_retries=1), question("again"))
    assert "must answer within timeout_seconds = 0.2" in told
    assert "raise timeout_seconds" in told


GARBAGE = {
    "html": (Reply(200, HTML), "JSON must stand", "text/html, '<!doctype html>"),
    "nothing": (Reply(200, ""), "JSON must stand", "nothing"),
    "half": (Reply(200, '{"choices": [{"mess'), "JSON must stand", '{"choices"'),
    "other": (Reply(body={"answer": "yes"}), "choices must stand", '{"answer": "yes"}'),
    "a list": (Reply(body=["yes"]), "choices must stand", '["yes"]'),
    "no choice": (Reply(body={"choices": []}), "choices[0] must stand", "[]"),
    "no object": (Reply(body={"choices": ["yes"]}), "choices[0] must be an object", '"yes"'),
    "no message": (
        Reply(body={"choices": [{"text": "yes"}]}),
        "choices[0].message must stand",
        '{"text": "yes"}',
    ),
    "no content": (Reply(body={"choices": [{"message": {}}]}), "choices[0].message.content must stand", "{}"),
    "a number": (
        Reply(body={"choices": [{"message": {"content": 4}}]}),
        "choices[0].message.content must be a text",
        "got 4",
    ),
    "an error": (
        Reply(body={"error": {"message": "model is loading"}}),
        "choices must stand",
        "model is loading",
    ),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_reply_of_another_format_is_asked_for_again_and_then_named(endpoint, name):
    reply, rule, value = GARBAGE[name]
    with JudgeServer(script=[reply]) as server:
        assert ask_all(endpoint(server), [question()])[0].text == "yes"
        assert server.n_requests == 2
    with JudgeServer(chat=lambda request: reply) as server:
        told = failing(endpoint(server, max_retries=2), question("again"))
        assert server.n_requests == 3
        assert f"{rule} in the answer of {server.url}/chat/completions" in told
    assert value in told
    assert "base_url" in told


def test_a_format_that_changes_midway_keeps_what_came_before(endpoint):
    seen = itertools.count()

    def chat(request):
        return "fine" if next(seen) < 5 else Reply(200, HTML)

    with JudgeServer(chat=chat) as server:
        with pytest.raises(JudgeError, match="JSON must stand"):
            ask_all(endpoint(server, max_retries=1, concurrency=1), questions(9))
        server.chat = lambda request: "mended"
        before = server.n_requests
        answers = ask_all(endpoint(server), questions(9))
        assert [answer.text for answer in answers] == ["fine"] * 5 + ["mended"] * 4
        assert server.n_requests == before + 4


# -- a server that is down, or refuses --------------------------------------------------------------


def test_a_server_that_is_down_is_named_in_a_second(endpoint):
    with JudgeServer() as server:
        pass
    judge = endpoint(server, backoff_seconds=30, max_retries=8)
    started = time.monotonic()
    with pytest.raises(JudgeError) as caught:
        ask_all(judge, questions(40))
    assert time.monotonic() - started < 5, "a second, on a machine with nothing else to do"
    assert judge.tally.n_retries <= 16, "one more try for each request under way"
    assert caught.value.rule == f"a server must be reachable at {server.url}"
    assert caught.value.remedy == "Start it, or mend base_url."


def test_a_server_that_goes_down_midway_is_waited_for(endpoint):
    with JudgeServer() as server:
        judge = endpoint(server, concurrency=1, max_retries=3, backoff_seconds=0.1)
        ask_all(judge, questions(2))
    with pytest.raises(JudgeError, match=r"tried 4 times"):
        ask_all(judge, questions(3))
    assert ask_all(judge, questions(2))[1].usage.from_cache


def test_what_is_hopeless_for_one_question_is_asked_for_none_after_it(endpoint):
    with JudgeServer(chat=lambda request: Reply(401)) as server:
        judge = endpoint(server, concurrency=2)
        with pytest.raises(JudgeError, match="HTTP 401"):
            ask_all(judge, questions(50))
        assert server.n_requests <= 2
        server.chat = lambda request: "mended"
        assert ask_all(judge, questions(2))[0].text == "mended", "the next run tries again"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_named_at_once_and_never_shown(
    endpoint, monkeypatch, caplog, capfd, tmp_path, status
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    refusal = Reply(
        status, {"error": {"message": f"Incorrect API key provided: {SECRET}. Or Bearer {SECRET}"}}
    )
    with JudgeServer(chat=lambda request: refusal) as server:
        judge = endpoint(server, max_retries=8)
        started = time.monotonic()
        told = failing(judge)
        assert time.monotonic() - started < 1
        assert server.n_requests == 1
        assert server.seen[0].headers["authorization"] == f"Bearer {SECRET}"
    assert (
        f"must accept the key in OPENAI_API_KEY, got HTTP {status}: Incorrect API key provided: [key]" in told
    )
    printed = capfd.readouterr()
    everything = [
        told,
        caplog.text,
        printed.out,
        printed.err,
        judge.name,
        json.dumps(judge.judge.config.resolved()),
    ]
    everything += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("secret" in text for text in everything)


def test_an_error_that_quotes_the_key_in_a_page_does_not(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "plain-word-as-key")
    with JudgeServer(chat=lambda request: Reply(200, "<p>plain-word-as-key</p>")) as server:
        told = failing(endpoint(server, max_retries=0))
    assert "plain-word" not in told
    assert "[key]" in told


def test_a_key_that_is_not_set_is_said_where_one_is_needed(endpoint, monkeypatch):
    with JudgeServer(key=SECRET) as server:
        assert "(OPENAI_API_KEY is not set)" in failing(endpoint(server))
        monkeypatch.setenv("MY_KEY", f" {SECRET}\n")
        assert ask_all(endpoint(server, key_variable="MY_KEY"), [question()])[0].text == "yes"
        monkeypatch.delenv("MY_KEY")
        told = failing(endpoint(server, key_variable="MY_KEY"), question("new"))
        assert "the environment variable MY_KEY must hold the server's key, got nothing" in told
        monkeypatch.setenv("MY_KEY", "two\nlines-of-secret")
        told = failing(endpoint(server, key_variable="MY_KEY"), question("new"))
        assert "one word of printable ASCII" in told
        assert "secret" not in told


def test_an_unknown_model_and_a_wrong_address_are_told_apart(endpoint):
    with JudgeServer(models=["small-2", "large"]) as server:
        told = failing(endpoint(server, model="small"))
        assert "must serve the model small" in told
        assert "Did you mean 'small-2'?" in told
        assert server.n_requests == 1
        told = failing(endpoint(server, base_url=server.url.removesuffix("/v1")))
        assert "must be the root of an OpenAI-compatible interface" in told
        assert "/v1" in told


def test_a_prompt_too_long_is_not_sent_twice(endpoint):
    body = {"error": {"message": "This model's maximum context length is 4096 tokens."}}
    with JudgeServer(chat=lambda request: Reply(400, body)) as server:
        told = failing(endpoint(server))
        assert server.n_requests == 1
    assert "HTTP 400: This model's maximum context length is 4096 tokens." in told
    assert "a shorter prompt" in told


def test_the_package_that_is_missing_is_named(endpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with JudgeServer() as server, pytest.raises(ResourceError, match=r"pip install 'sememe\[llm\]'"):
        ask_all(endpoint(server), [question()])


def test_half_a_character_is_refused_before_anything_is_sent(endpoint):
    with JudgeServer() as server:
        assert "valid Unicode" in failing(endpoint(server), question("a\ud800b"))
        assert server.n_requests == 0


# -- many at a time -----------------------------------------------------------------------------------


def test_no_more_requests_at_a_time_than_allowed(endpoint):
    with JudgeServer(
        chat=lambda r: Reply(body={"choices": [{"message": {"content": "x"}}]}, seconds=0.05)
    ) as server:
        answers = ask_all(endpoint(server, concurrency=3), questions(12))
        assert server.most_at_once == 3
    assert len(answers) == 12


def test_answers_come_in_the_order_of_the_questions(endpoint):
    def chat(request):
        number = int(last_user(request).split()[1])
        return Reply(body={"choices": [{"message": {"content": str(number)}}]}, seconds=0.02 * (number % 3))

    with JudgeServer(chat=chat) as server:
        answers = ask_all(endpoint(server), questions(15))
    assert [answer.text for answer in answers] == [str(i) for i in range(15)]


def test_the_same_question_at_the_same_time_is_sent_once(endpoint):
    with JudgeServer(chat=lambda request: "same") as server:
        judge = endpoint(server)
        answers = ask_all(judge, [question()] * 10)
        assert server.n_requests == 1
    assert sum(answer.usage.from_cache for answer in answers) == 9
    assert judge.tally.n_questions == 10
    assert judge.tally.n_from_cache == 9


def test_a_judge_is_opened_again_on_another_loop_and_inside_a_running_one(endpoint):
    with JudgeServer() as server:
        judge = endpoint(server)
        ask_all(judge, questions(2))

        async def notebook():
            return ask_all(judge, questions(4))

        assert len(asyncio.run(notebook())) == 4
        assert server.n_requests == 4

        async def failing_notebook():
            server.chat = lambda request: Reply(401)
            return ask_all(judge, [question("other")])

        with pytest.raises(JudgeError, match="HTTP 401"):
            asyncio.run(failing_notebook())


def test_a_failure_of_ones_own_ends_the_others(endpoint):
    with JudgeServer(chat=lambda request: Reply(body={}, seconds=30)) as server:
        judge = endpoint(server)

        async def one(i):
            if i == 2:
                raise ValueError("mine")
            return await judge.ask(question(str(i)))

        started = time.monotonic()
        with pytest.raises(ValueError, match="mine"):
            run_each(judge, one, range(5), description="ask", unit="questions")
        assert time.monotonic() - started < 6


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
    ]
    fingerprint = open_judge(base).fingerprint
    assert {open_judge(base.replace(**change)).fingerprint for change in same} == {fingerprint}
    assert len({fingerprint, *(open_judge(base.replace(**change)).fingerprint for change in others)}) == 6
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


def slowly(request):
    return Reply(body={"choices": [{"message": {"content": last_user(request)}}]}, seconds=0.01)


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
        out, err = program.communicate(timeout=30)
        assert time.monotonic() - stopped_at < 5
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


# -- costs --------------------------------------------------------------------------------------------


def test_what_is_spent_and_what_would_be():
    prices = Prices(2.0, 10.0)
    assert prices.of(Usage(500_000, 100_000)) == pytest.approx(1.0 + 1.0)


def test_the_tally_counts_tokens_and_price(endpoint):
    with JudgeServer(chat=lambda request: "one two three") as server:
        judge = endpoint(server, prompt_price=2.0, completion_price=10.0)
        ask_all(judge, questions(4))
        ask_all(judge, questions(6))
    tally = judge.tally
    # "question 3" is three tokens of the server's, "one two three" five.
    assert tally._asdict() == {
        "n_questions": 10,
        "n_from_cache": 4,
        "n_calls": 6,
        "n_retries": 0,
        "n_failed": 0,
        "n_prompt_tokens": 18,
        "n_completion_tokens": 30,
        "price": pytest.approx((18 * 2 + 30 * 10) / 1e6),
    }


def test_a_preview_asks_nothing_and_leaves_out_what_is_known(endpoint):
    with JudgeServer() as server:
        judge = endpoint(server, prompt_price=2.0, completion_price=10.0)
        wanted = [
            question("x" * 400, max_tokens=50),
            question("y" * 400, max_tokens=50),
            question("x" * 400, max_tokens=50),
        ]
        preview = judge.preview(wanted)
        assert server.n_requests == 0
        assert preview[:5] == (3, 1, 2, 2 * 107, 100)
        assert preview.price == pytest.approx((2 * 107 * 2 + 100 * 10) / 1e6)
        ask_all(judge, wanted[:1])
        assert judge.preview(wanted)[:5] == (3, 2, 1, 107, 50)
        assert endpoint(server, max_calls=1).preview(wanted).price is None


def test_a_preview_needs_no_server_key_or_package(endpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with JudgeServer() as server:
        pass
    assert endpoint(server, key_variable="NOT_SET").preview(questions(3)).n_calls == 3


def test_max_calls_stops_cleanly_and_a_new_run_goes_on(endpoint):
    with JudgeServer(chat=slowly) as server:
        with pytest.raises(LimitError) as caught:
            ask_all(endpoint(server, max_calls=7), questions(20))
        assert server.n_requests == 7
        assert "at most max_calls = 7 questions may be sent, got 7 sent" in str(caught.value)
        assert "run again to go on from here" in str(caught.value)
        answers = ask_all(endpoint(server, max_calls=13), questions(20))
        assert server.n_requests == 20
    assert sum(answer.usage.from_cache for answer in answers) == 7


def test_max_price_is_never_passed_and_uses_what_answers_leave_over(endpoint):
    # An answer may cost 100 tokens and costs 1: at 1 per token each question may cost about 107 and costs 4.
    with JudgeServer(chat=slowly) as server:
        judge = endpoint(server, prompt_price=1e6, completion_price=1e6, max_price=250, concurrency=16)
        with pytest.raises(LimitError, match=r"at most max_price = 250 may be spent"):
            ask_all(judge, [question(f"q {i}", max_tokens=100) for i in range(200)])
        spent = judge.tally.price
    assert 250 - 110 < spent <= 250
    assert judge.tally.n_calls == server.n_requests > 2


def test_an_answer_under_way_is_kept_when_the_limit_comes(endpoint):
    def chat(request):
        return Reply(body={"choices": [{"message": {"content": "late"}}]}, seconds=3.0)

    with JudgeServer(chat=chat) as server:
        judge = endpoint(server, max_calls=2)
        with pytest.raises(LimitError):
            ask_all(judge, questions(4))
        assert judge.tally.n_questions == 2
        assert len(ask_all(endpoint(server, max_calls=1), questions(2))) == 2


def test_a_budget_waits_for_room_rather_than_refuse():
    async def both():
        budget = Budget(Prices(1e6, 0.0), max_price=10)
        order = []

        async def one(name, costs):
            async with budget.spending(Usage(6)) as paid:
                order.append(f"{name} begins")
                await asyncio.sleep(0.05)
                paid.append(Usage(costs))
            order.append(f"{name} ends")

        await asyncio.gather(one("a", 1), one("b", 6))
        with pytest.raises(LimitError):
            await one("c", 1)
        return order, budget.tally.price

    assert asyncio.run(both()) == (["a begins", "a ends", "b begins", "b ends"], 7)


# -- distributions at places of a text ----------------------------------------------------------------

TEXT = "Rate each:\nthe\tunknown\ncat\tunknown\n12\tunknown\n"
PLACES = tuple(i for i in range(len(TEXT)) if TEXT.startswith("unknown", i))
CHOICES = tuple(str(i) for i in range(11))


def rated(prompt, token, before):
    """A distribution that knows where it is: what stands before the tab decides."""
    word = before.rstrip("\t").rsplit("\n", 1)[-1]
    peak = {"the": 0, "cat": 4, "12": 10}.get(word, 5)
    weights = {str(i): math.exp(-abs(i - peak)) for i in range(11)} | {"unknown": 3.0}
    whole = sum(weights.values())
    return {choice: math.log(weight / whole) for choice, weight in weights.items()}


def expected_slots(n=15):
    """By hand, for each place."""
    found = []
    for place in PLACES:
        top = rated(TEXT, "unknown", TEXT[:place])
        kept = sorted(top, key=lambda token: -top[token])[:n]
        found.append({choice: top[choice] for choice in CHOICES if choice in kept})
    return tuple(found)


@pytest.mark.parametrize(
    ("served", "options", "n_requests"),
    [
        ({}, {}, 1),
        ({"first_token": "<s>"}, {}, 1),
        ({}, {"n_log_probs": 5}, 1),
        ({"echo": False}, {"slots": "one_by_one"}, 3),
        ({"echo": False, "shape": "chat"}, {"slots": "one_by_one"}, 3),
    ],
    ids=["echo", "a token before", "five", "one by one", "llama.cpp"],
)
def test_distributions_stand_where_they_were_asked_for(endpoint, served, options, n_requests):
    asked = SlotQuestion(TEXT, PLACES, CHOICES)
    with JudgeServer(top=rated, **served) as server:
        judge = endpoint(server, **options)
        [slots] = ask_all(judge, [asked])
        assert server.n_requests == n_requests
        assert judge.tally.n_calls == n_requests
        [again] = ask_all(endpoint(server, **options), [asked])
        assert server.n_requests == n_requests
    assert isinstance(slots, Slots)
    wanted = expected_slots(options.get("n_log_probs", 15))
    assert [list(found) for found in slots.log_probs] == [list(found) for found in wanted]
    for found, hand in zip(slots.log_probs, wanted, strict=True):
        assert dict(found) == pytest.approx(hand)
    assert again.log_probs == slots.log_probs
    assert again.usage.from_cache


def test_what_a_distribution_is_asked_with(endpoint):
    with JudgeServer(top=rated) as server:
        ask_all(endpoint(server), [SlotQuestion(TEXT, PLACES, CHOICES)])
    assert server.seen[0].path == "/v1/completions"
    assert server.seen[0].body == {
        "model": "small",
        "prompt": TEXT,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 15,
        "echo": True,
    }


def without_log_probs(body):
    return {"choices": [{"text": body["prompt"] + "0", "logprobs": None, "finish_reason": "length"}]}


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (
            Reply(400, {"error": {"message": "Only no echo is supported"}}),
            "HTTP 400: Only no echo is supported",
        ),
        (
            Reply(500, {"error": {"message": "Only no echo is supported"}}),
            "HTTP 500: Only no echo is supported",
        ),
        (Reply(404, "404 page not found"), "HTTP 404: 404 page not found"),
        (Reply(body={"choices": [{"text": "a"}]}), "got none"),
        (
            Reply(body={"choices": [{"text": "a", "logprobs": {"content": [{"token": "a"}]}}]}),
            "log-probabilities with content only",
        ),
        (
            Reply(
                body={
                    "choices": [
                        {
                            "text": "0",
                            "logprobs": {"tokens": ["0"], "text_offset": [43], "top_logprobs": [{"0": -1.0}]},
                        }
                    ]
                }
            ),
            "log-probabilities of the answer alone",
        ),
    ],
    ids=["no echo", "llama.cpp", "chats only", "none", "other shape", "answer alone"],
)
def test_a_server_without_log_probabilities_of_prompts_is_named_at_once(endpoint, reply, told):
    with JudgeServer(script=[reply] * 9, models=["small"]) as server:
        message = failing(endpoint(server), SlotQuestion(TEXT, PLACES, CHOICES))
        assert server.n_requests == 1
    assert "must tell log-probabilities of a prompt (echo and logprobs of /completions)" in message
    assert told in message
    assert "slots = 'one_by_one'" in message


def test_a_server_without_any_log_probabilities_is_named(endpoint):
    with JudgeServer(script=[Reply(body={"choices": [{"text": "a", "logprobs": None}]})] * 9) as server:
        message = failing(
            endpoint(server, slots="one_by_one", concurrency=1), SlotQuestion(TEXT, PLACES, CHOICES)
        )
    assert "must tell log-probabilities of the next token" in message


@pytest.mark.parametrize(
    ("log_probs", "rule"),
    [
        ({"tokens": ["a"], "text_offset": [0, 1], "top_logprobs": [None]}, "lists of one length"),
        ({"tokens": "ab", "text_offset": [0], "top_logprobs": [None]}, "must hold lists"),
        (
            {"tokens": ["a", TEXT], "text_offset": [0, 40], "top_logprobs": [None, {"a": "b"}]},
            "must hold numbers",
        ),
        (
            {"tokens": ["a", TEXT], "text_offset": [0, 40], "top_logprobs": [None, {"a": math.nan}]},
            "must hold numbers",
        ),
        ({"tokens": ["a", TEXT], "text_offset": [0, 40], "top_logprobs": [None, {"a": 3.0}]}, "at most 0"),
        ("none", "must be an object"),
    ],
    ids=["lengths", "no lists", "no numbers", "nan", "probabilities", "a text"],
)
def test_log_probabilities_of_another_format_are_named(endpoint, log_probs, rule):
    reply = Reply(body={"choices": [{"text": TEXT, "logprobs": log_probs}]})
    with JudgeServer(script=[reply] * 9) as server:
        message = failing(endpoint(server, max_retries=1), SlotQuestion(TEXT, PLACES, CHOICES))
        assert server.n_requests == 2
    assert "choices[0].logprobs" in message
    assert rule in message


def test_a_place_inside_a_token_is_named(endpoint):
    with JudgeServer() as server:
        message = failing(endpoint(server), SlotQuestion(TEXT, (PLACES[0] + 2,), CHOICES))
    assert "a token must begin at each place" in message
    assert "one_by_one" in message


# -- config -------------------------------------------------------------------------------------------


class Verb(Config):
    judge: JudgeConfig = EndpointConfig()


def test_a_judge_is_chosen_by_its_kind():
    assert isinstance(Verb.build({"judge": {"kind": "local"}}).judge, LocalConfig)
    assert Verb.build({"judge": {"kind": "endpoint", "model": "m"}}).judge.model == "m"
    with pytest.raises(ConfigError, match="must be one of 'endpoint', 'local'"):
        Verb.build({"judge": {"kind": "oracle"}})
    with pytest.raises(ConfigError, match="must be a known option"):
        Verb.build({"judge": {"kind": "local", "base_url": "http://x"}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8080"}, "base_url must begin with http:// or https://"),
        ({"base_url": "https://me:secret@host/v1"}, "must hold no user, password or query"),
        ({"base_url": "https://host/v1?key=secret"}, "must hold no user, password or query"),
        ({"key_variable": "sk-secret-1"}, "must be the name of an environment variable"),
        ({"key_variable": "sk_secret"}, "must be the name of an environment variable"),
        ({"max_price": 3}, "max_price needs prompt_price and completion_price"),
        ({"max_price": 3, "prompt_price": 1}, "without one of them"),
        ({"prompt_price": 1}, "must be given together"),
        ({"concurrency": 0}, "must be >= 1"),
        ({"leave_out": ["model"]}, "must be one of"),
        ({"model": ""}, "model"),
    ],
)
def test_bad_options_are_refused_without_showing_secrets(options, message):
    with pytest.raises(ConfigError) as caught:
        Verb.build({"judge": {"kind": "endpoint", **options}})
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_address_loses_its_last_slash():
    assert EndpointConfig(base_url="http://host:1/v1/").base_url == "http://host:1/v1"


def test_every_option_is_explained():
    for config in (EndpointConfig, LocalConfig):
        for name, field in config.model_fields.items():
            assert name == "kind" or field.description
    assert pydantic.TypeAdapter(JudgeConfig).json_schema()["discriminator"]["propertyName"] == "kind"
