"""Language models that are asked in words: questions and answers, many at a time, costs, options."""

import asyncio
import functools
import json
import sys
import time

import pydantic
import pytest
from judge_server import JudgeServer, Reply, last_user
from judge_world import endpoint_for, question, questions, slowly

from sememe.config import Config
from sememe.errors import (
    ConfigError,
    JudgeError,
    LimitError,
)
from sememe.judge import (
    Answer,
    EndpointConfig,
    Judge,
    JudgeConfig,
    LocalConfig,
    Message,
    Question,
    Usage,
    ask_all,
    run_each,
)
from sememe.judge.budget import Budget, Prices, tokens_at_most
from sememe.options import flags_of


@pytest.fixture
def endpoint(tmp_path):
    """A judge for a server of the test."""
    return functools.partial(endpoint_for, folder=tmp_path)


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


def test_further_fields_are_sent_with_every_question(endpoint):
    wanted = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 20}
    for given in (wanted, json.dumps(wanted)):  # a recipe's table, a flag's text
        with JudgeServer() as server:
            ask_all(endpoint(server, extra_body=given), [question()])
        assert server.seen[0].body | wanted == server.seen[0].body
        assert server.seen[0].body["messages"][0]["content"] == "how many?"


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


def test_what_is_spent_is_told_at_the_end(endpoint, capsys):
    with JudgeServer() as server:
        judge = endpoint(server, prompt_price=1e6, completion_price=0.0)
        ask_all(judge, questions(3), description="explain")
        ask_all(judge, questions(5), description="explain")
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("explain: 5 questions")
    assert told[-1].endswith("5 calls, 3 from the cache, 15 spent")


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


def test_tokens_are_counted_so_that_they_are_not_too_few():
    assert tokens_at_most("") == 0
    assert tokens_at_most(" cat\t0\n") == 5
    assert tokens_at_most("wonderful") == 3
    assert tokens_at_most("10, (x)") == 7
    assert tokens_at_most("é") == 2
    assert tokens_at_most("    \ud800") == 2


EXCERPTS = {
    "English": "The rest of the harbour, which nobody had visited since 1987, lay under thirty feet of snow. ",
    "code": "for i in range(10):\n    self._x[i] += np.sum(y, axis=-1)  # shape (n, 3)\n",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. Всё это было давно. ",
    "Japanese": "私は昨日、東京で友達と会いました。天気がとても良かったです。",
    "numbers": "3.14159 2,718 10:45 (1999-2024) x_1 = [0, 1, 2]; ",
    "names": "Krzysztof Szczebrzeszyn Nguyễn Gwrhyd Llanfairpwllgwyngyll aAbBcC ",
}


@pytest.mark.model
@pytest.mark.parametrize("kind", EXCERPTS)
def test_a_preview_is_not_too_low_for_real_prompts(endpoint, kind):
    from sememe.explain.examples import Window
    from sememe.explain.explainers import explanation_question
    from sememe.explain.scorers.simulation import prompt
    from sememe.lm import embedded
    from sememe.lm.build import load_tokenizer

    tokenizer = load_tokenizer(str(embedded.obtain(embedded.MODELS["smollm2-135m"]).path))
    tokens = tuple(tokenizer.decode([i]) for i in tokenizer(EXCERPTS[kind] * 20).input_ids)
    windows = [
        Window("top", None, f"d{i}", tokens[i : i + 32], tuple(3.0 * (j % 7 == 0) for j in range(32)), 0)
        for i in range(0, 160, 32)
    ]
    asked = [explanation_question(windows, style=style) for style in ("activations", "highlights")]
    asked += [prompt("words of one kind", tokens[:64])]
    with JudgeServer() as server:
        judge = endpoint(server)
    for one in asked:
        if isinstance(one, Question):
            turns = [message._asdict() for message in one.messages]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = one.text
        real = len(tokenizer(text, add_special_tokens=False).input_ids)
        assert real <= judge.estimate(one).n_prompt_tokens <= 3 * real


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
    # An answer may cost 100 tokens and costs 1: at 1 per token each question may cost about 111 and costs 4.
    with JudgeServer(chat=slowly) as server:
        judge = endpoint(server, prompt_price=1e6, completion_price=1e6, max_price=250, concurrency=16)
        with pytest.raises(LimitError, match=r"at most max_price = 250 may be spent"):
            ask_all(judge, [question(f"q {i}", max_tokens=100) for i in range(200)])
        spent = judge.tally.price
    assert 250 - 112 < spent <= 250
    assert judge.tally.n_calls == server.n_requests > 2


def test_tries_that_gave_no_answer_are_paid_for(endpoint):
    told = {"usage": {"prompt_tokens": 30, "completion_tokens": 20}, "choices": []}
    costs = {"prompt_price": 1e6, "completion_price": 1e6}
    with JudgeServer(script=[Reply(body=told), Reply(200, "<html>"), Reply(500)]) as server:
        judge = endpoint(server, **costs)
        ask_all(judge, [question("q", max_tokens=5)])
        # What the first said, what the second may have cost (8 and 5), nothing for the third, and 1 + 1.
        assert judge.tally[5:] == (30 + 8 + 1, 20 + 5 + 1, 65)
    with JudgeServer(chat=lambda request: Reply(body=told)) as server:
        judge = endpoint(server, max_price=60, **costs)
        with pytest.raises(LimitError, match="at most max_price = 60 may be spent, got 50 spent"):
            ask_all(judge, [question("other", max_tokens=5)])
        assert server.n_requests == 1


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
        (
            {"extra_body": "{thinking: off}"},
            "extra_body must be a JSON object, got '{thinking: off}'. For instance",
        ),
        ({"extra_body": "[1]"}, "extra_body must be a JSON object"),
        ({"extra_body": {"model": "x", "top_k": 3}}, "a scorer sets, got model. Drop them"),
    ],
)
def test_bad_options_are_refused_without_showing_secrets(options, message):
    with pytest.raises(ConfigError) as caught:
        Verb.build({"judge": {"kind": "endpoint", **options}})
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_every_option_has_a_flag_of_its_own():
    flags = {flag.name: flag for flag in flags_of(Verb)}
    assert flags["judge"].path == ("judge", "kind")
    assert flags["judge"].default == "endpoint"
    assert flags["max_price"].path == ("judge", "max_price")
    assert flags["batch_size"].path == ("judge", "batch_size")
    assert set(flags) == {"judge"} | (set(EndpointConfig.model_fields) | set(LocalConfig.model_fields)) - {
        "kind"
    }


def test_an_address_loses_its_last_slash():
    assert EndpointConfig(base_url="http://host:1/v1/").base_url == "http://host:1/v1"


def test_every_option_is_explained():
    for config in (EndpointConfig, LocalConfig):
        for name, field in config.model_fields.items():
            assert name == "kind" or field.description
    assert pydantic.TypeAdapter(JudgeConfig).json_schema()["discriminator"]["propertyName"] == "kind"
