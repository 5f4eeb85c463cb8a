"""Every reply a server can give: busy, ill, silent, down, refusing, garbled; and its log-probabilities."""

import asyncio
import functools
import itertools
import json
import logging
import math
import random
import sys
import time

import pytest
from judge_server import HTML, JudgeServer, Reply
from judge_world import CHOICES, PLACES, TEXT, endpoint_for, failing, question, questions

from sememe.errors import (
    JudgeError,
    LimitError,
    ResourceError,
)
from sememe.judge import (
    EndpointConfig,
    SlotQuestion,
    Slots,
    ask_all,
    run_each,
)
from sememe.judge.endpoint import Endpoint, _retry_after

SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def endpoint(tmp_path):
    """A judge for a server of the test."""
    return functools.partial(endpoint_for, folder=tmp_path)


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
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
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


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(endpoint, monkeypatch):
    with JudgeServer() as gone:
        pass
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, gone.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with JudgeServer() as server:
        assert ask_all(endpoint(server), [question()])[0].text == "yes"


def test_an_unknown_model_and_a_wrong_address_are_told_apart(endpoint):
    with JudgeServer(models=["small-2", "large"]) as server:
        told = failing(endpoint(server, model="small"))
        assert "must serve the model small" in told
        assert "Did you mean 'small-2'?" in told
        assert server.n_requests == 1
        server.models = []
        assert "Load one there first." in failing(endpoint(server, model="small"))
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


# -- distributions at places of a text ----------------------------------------------------------------


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


def rated_in_digits(prompt, token, before):
    """The same where each digit is a token: "1" stands for itself and for the beginning of "10"."""
    if before.endswith("\t1"):
        whole = rated(prompt, token, before.removesuffix("1"))
        one, ten = math.exp(whole["1"]), math.exp(whole["10"])
        return {"0": math.log(ten / (one + ten)), "\n": math.log(one / (one + ten))}
    top = rated(prompt, token, before)
    top["1"] = math.log(math.exp(top["1"]) + math.exp(top.pop("10")))
    return top


@pytest.mark.parametrize("slots", ["echo", "one_by_one"])
def test_ten_is_told_from_one_where_each_digit_is_a_token(endpoint, slots):
    asked = SlotQuestion(TEXT, PLACES, CHOICES)
    with JudgeServer(top=rated_in_digits, split_digits=True, echo=slots == "echo") as server:
        judge = endpoint(server, slots=slots)
        preview = judge.preview([asked])
        assert preview.n_calls == (4 if slots == "echo" else 6), "at most one more for each place"
        [found] = ask_all(judge, [asked])
        assert server.n_requests == judge.tally.n_calls == found.usage.n_calls == preview.n_calls
        bodies = [seen.body for seen in server.seen[-3:]]
        assert sorted(body["prompt"] for body in bodies) == sorted(TEXT[:place] + "1" for place in PLACES)
        assert not any("echo" in body for body in bodies)
        [again] = ask_all(endpoint(server, slots=slots), [asked])
        assert server.n_requests == preview.n_calls, "the second questions are kept too"
        assert judge.preview([asked]).n_calls == 0
    assert again.usage.from_cache and again.log_probs == found.log_probs
    for of_place, hand in zip(found.log_probs, expected_slots(), strict=True):
        assert dict(of_place) == pytest.approx(hand)
        assert list(of_place) == list(hand)


def test_ten_that_is_a_token_is_not_asked_for_where_it_is_only_unlikely(endpoint):
    with JudgeServer(top=rated) as server:
        [found] = ask_all(endpoint(server, n_log_probs=5), [SlotQuestion(TEXT, PLACES, CHOICES)])
        assert server.n_requests == 1
    assert "10" not in found.log_probs[0] and "1" in found.log_probs[0]


def test_choices_longer_by_several_tokens(endpoint):
    # "100" is reached through "10"; "1" alone, "10" alone and "100" share what "1" bears.
    after = {"\t": {"1": 0.8, "2": 0.2}, "\t1": {"0": 0.5, "x": 0.5}, "\t10": {"0": 0.25, "x": 0.75}}

    def top(prompt, token, before):
        found = after.get(before.removeprefix("Rate:\na"), {"x": 1.0})
        return {choice: math.log(p) for choice, p in found.items()}

    text = "Rate:\na\tunknown\n"
    asked = SlotQuestion(text, (text.index("unknown"),), ("100", "1", "10", "2"))
    with JudgeServer(top=top, split_digits=True) as server:
        [found] = ask_all(endpoint(server), [asked])
        assert {choice: math.exp(p) for choice, p in found.log_probs[0].items()} == pytest.approx(
            {"100": 0.1, "1": 0.4, "10": 0.3, "2": 0.2}
        )
        message = failing(endpoint(server), asked._replace(choices=("1", "100")))
    assert "at most one token longer than another that it begins with, got '100'" in message
    assert "'1' and then '0' are tokens" in message and "local model" in message
    after["\t1"] = {"0": 1.0}
    with JudgeServer(top=top, split_digits=True) as server:
        asked = asked._replace(choices=("1", "10", "2"), text=text + " ")
        [found] = ask_all(endpoint(server), [asked])
    assert set(found.log_probs[0]) == {"10", "2"}, "nothing is left for 1 alone"


def test_places_read_one_by_one_are_kept_and_counted_one_by_one(endpoint):
    asked = SlotQuestion(TEXT, PLACES, CHOICES)
    with JudgeServer(top=rated, echo=False) as server:
        judge = endpoint(server, slots="one_by_one", max_calls=2)
        assert judge.preview([asked, asked])[:3] == (12, 6, 6), "'10' may need three more"
        with pytest.raises(LimitError):
            ask_all(judge, [asked])
        assert server.n_requests == 2
        assert judge.preview([asked])[:3] == (6, 2, 4)
        [slots] = ask_all(judge := endpoint(server, slots="one_by_one"), [asked])
        assert server.n_requests == 3
        assert judge.tally[:3] == (3, 2, 1)
        assert slots.usage.n_calls == 3
        assert not slots.usage.from_cache
        directly = asyncio.run(closing(judge.judge, asked))
    assert directly.log_probs == slots.log_probs


async def closing(judge, asked):
    found = await judge.slots(asked)
    await judge.close()
    return found


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
