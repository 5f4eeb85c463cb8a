"""The model's process: its answers on a tiny real model against the verbs', the protocol, and all the ways it ends."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from atlas_fixture import World
from json_schema import complaints, unnamed
from live_world import child_of, make_live_world

from sememe import dictionaries
from sememe.atlas import open_atlas
from sememe.browse import openapi
from sememe.browse.live import CANCELLED, Child, LiveError
from sememe.edits import Intervention, LatentEdit
from sememe.errors import ConfigError
from sememe.live import LiveConfig, Session, serve
from sememe.live.session import ARGUMENTS
from sememe.prompt import PromptConfig, prompt

TEXT = "the river runs past the old town <b>ü"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_live_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def session(world: World) -> Session:
    config = LiveConfig(atlas=world.root / "atlas", dictionary=world.dictionary)
    return Session(config, lm=world.lm)


def ask(session: Session, verb: str, **arguments: Any) -> dict[str, Any]:
    answer = session.answer(verb, arguments, lambda done, of: None)
    answer = json.loads(json.dumps(answer, allow_nan=False))
    documented = next(end for end in openapi.ENDPOINTS if end.path == f"/api/live/{verb}")
    assert complaints(arguments, documented.body or {}) == complaints(answer, documented.answer) == []
    assert unnamed(answer, documented.answer) == []
    return dict(answer)


def test_the_document_s_limits_are_the_arguments_own() -> None:
    bodies = {end.path: end.body for end in openapi.ENDPOINTS if end.body is not None}
    for verb, arguments in ARGUMENTS.items():
        body = bodies[f"/api/live/{verb}"]
        assert set(body["properties"]) == {*arguments.model_fields, "job"}
        own = arguments.model_json_schema()["properties"]
        for name, schema in body["properties"].items():
            for word in ("maxItems", "minimum", "maxLength", "default"):
                if name in own and word in schema:
                    assert schema[word] == own[name].get(word), (verb, name, word)
    assert ARGUMENTS["generate"].model_json_schema()["properties"]["seed"]["exclusiveMaximum"] == 2**31


def strongest(world: World) -> tuple[int, float]:
    atlas = open_atlas(world.root / "atlas")
    row = atlas.query("SELECT id, max_act FROM latents ORDER BY max_act DESC LIMIT 1")[0]
    atlas.close()
    return row["id"], row["max_act"]


# ---- answers


def test_a_prompt_s_latents_are_those_of_the_verb(world: World, session: Session) -> None:
    found = ask(session, "prompt", text=TEXT, n_latents=3, ablate=True)
    config = PromptConfig(
        prompt=TEXT, dictionary=world.dictionary, atlas=world.root / "atlas", n_latents=3, model=world.model
    )
    view = prompt(config, lm=world.lm)
    assert [token["token"] for token in found["tokens"]] == [token.token for token in view.tokens]
    assert sum(len(token["latents"]) for token in found["tokens"]) == len(view.rows) > 10
    for row in view.rows:
        shown = next(r for r in found["tokens"][row.position]["latents"] if r["latent"] == row.latent)
        for name in ("act", "quantile", "density", "loss_change", "kl"):
            value = getattr(row, name)
            assert shown[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-9)), name
    raw = b"".join(
        bytes.fromhex(token["bytes"]) if "bytes" in token else token["text"].encode()
        for token in found["tokens"]
    )
    assert raw.decode() == TEXT, "tokens carry their exact bytes"


def test_steered_text_is_what_an_intervention_writes(world: World, session: Session) -> None:
    (latent, largest), other = strongest(world), 3
    steer = [{"latent": latent, "strength": 3.0}, {"latent": other, "strength": -1.0}]
    found = ask(session, "generate", prompt=TEXT, steer=steer, n_tokens=12)
    ids = torch.tensor([world.lm.tokenizer(TEXT, add_special_tokens=False).input_ids])
    plain = world.lm.generate(ids, 12, stop_at_eos=False)[0, ids.shape[1] :].tolist()
    assert [token["token"] for token in found["unsteered"]["tokens"]] == plain
    atlas = open_atlas(world.root / "atlas")
    most = atlas.query("SELECT max_act FROM latents WHERE id = ?", other)[0]["max_act"]
    atlas.close()
    edits = [
        LatentEdit(latents=(latent,), how="add", value=3 * largest),
        LatentEdit(latents=(other,), how="add", value=-most),
    ]
    with Intervention(dictionaries.load(world.dictionary), edits).on(world.lm):
        steered = world.lm.generate(ids, 12, stop_at_eos=False)[0, ids.shape[1] :].tolist()
    assert [token["token"] for token in found["steered"]["tokens"]] == steered != plain
    assert [row["added"] for row in found["added"]] == [pytest.approx(3 * largest), pytest.approx(-most)]
    with torch.no_grad():
        whole = torch.cat([ids, torch.tensor([plain])], dim=1)
        chances = world.lm.logits(world.lm.hidden(whole)).float().log_softmax(-1)[0, ids.shape[1] - 1 : -1]
    expected = float(torch.exp(-chances[range(12), plain].mean()))
    assert found["unsteered"]["perplexity"] == pytest.approx(expected, rel=1e-3)


def test_a_seed_gives_the_same_text_and_another_another(session: Session) -> None:
    asked = {"prompt": TEXT, "n_tokens": 20, "temperature": 1.0}
    one, same, other = (ask(session, "generate", **asked, seed=seed)["unsteered"] for seed in (1, 1, 2))
    assert one == same and one["text"] != other["text"]
    assert ask(session, "generate", **asked, seed=1)["steered"] is None


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("prompt", {"text": ""}, "must have at least one token"),
        ("prompt", {"text": TEXT, "latents": [48]}, r"a latent must be in \[0, 47\], got 48"),
        ("prompt", {"text": TEXT, "n_latents": 0}, "n_latents must be >= 1, got 0. Raise it."),
        ("prompt", {"text": TEXT, "dictionary": "/etc"}, "dictionary must be a known option"),
        ("generate", {"prompt": TEXT, "steer": [{"latent": 99, "strength": 1}]}, r"\[0, 47\], got 99"),
        ("generate", {"prompt": TEXT, "n_tokens": 1000}, "must fit the context"),
        ("generate", {"prompt": TEXT, "steer": [{"latent": 1, "strength": 1e9}]}, "<= 100"),
        ("eval", {}, "a question must be one of prompt, generate, embed, got eval"),
    ],
)
def test_what_cannot_be_answered_says_so(
    session: Session, verb: str, arguments: dict[str, Any], message: str
) -> None:
    from sememe.errors import SememeError

    with pytest.raises(SememeError, match=message):
        ask(session, verb, **arguments)


def test_a_latent_that_never_fired_has_no_unit_to_steer_by(session: Session, monkeypatch: Any) -> None:
    loaded = session._get()
    known = loaded.known._replace(latents=loaded.known.latents | {5: (0.0, 0.0, loaded.known.latents[5][2])})
    monkeypatch.setattr(session, "_loaded", loaded._replace(known=known))
    with pytest.raises(ConfigError, match=r"must have fired on the atlas's text.*latent 5, which did not"):
        ask(session, "generate", prompt=TEXT, steer=[{"latent": 5, "strength": 1}])


# ---- lines


class _Steps:
    """Answers after so many steps, and says each."""

    def prepare(self, say: Any) -> None:
        say({"state": "ready"})

    def answer(self, verb: str, arguments: dict[str, Any], progress: Any) -> dict[str, Any]:
        if verb == "boom":
            raise ZeroDivisionError("x" * 3)
        for i in range(arguments["steps"]):
            progress(i, arguments["steps"])
        return {"verb": verb}


def test_questions_are_answered_in_turn_and_what_goes_wrong_is_an_error_not_an_end() -> None:
    questions = [
        {"id": 1, "verb": "a", "arguments": {"steps": 2}},
        {"id": 2, "verb": "boom", "arguments": {}},
        {"id": 3, "verb": "b", "arguments": {}},  # not understood
        {"id": 4, "verb": "c", "arguments": {"steps": 0}},
    ]
    out: list[bytes] = []
    serve(_Steps(), [json.dumps(q).encode() + b"\n" for q in questions], out.append)
    lines = [json.loads(line) for line in out]
    assert lines[:4] == [
        {"state": "loading"},
        {"state": "ready"},
        {"id": 1, "done": 0, "of": 2},
        {"id": 1, "done": 1, "of": 2},
    ]
    assert lines[4] == {"id": 1, "answer": {"verb": "a"}}
    assert [line["id"] for line in lines[5:]] == [2, 3, 4]
    assert lines[5]["error"]["value"] == "ZeroDivisionError: xxx" and "KeyError" in lines[6]["error"]["value"]
    assert lines[7]["answer"] == {"verb": "c"}


# ---- the process


def script(body: str) -> list[str]:
    """A child that is not ours: says it is ready, and does `body` with each question."""
    code = (
        "import json, sys, time, os\n"
        "def say(m): print(json.dumps(m), flush=True)\n"
        "say({'state': 'ready', 'about': {'model': 'm'}})\n"
        "for line in sys.stdin:\n"
        "    q = json.loads(line)\n"
        f"    {body}\n"
    )
    return [sys.executable, "-c", code]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_thread(call: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except LiveError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_a_real_child_loads_answers_reports_progress_is_cancelled_and_leaves(world: World) -> None:
    child = child_of(world)
    assert child.status()["state"] == "off"
    child.start()
    assert child.status()["state"] in ("loading", "ready")
    try:
        found = child.ask("prompt", {"text": TEXT, "n_latents": 2})
        assert len(found["tokens"]) > 5 and found["tokens"][3]["latents"][0]["quantile"] is not None
        status = child.status()
        assert status["state"] == "ready" and status["about"]["n_latents"] == 48 and status["job"] is None
        with pytest.raises(LiveError, match=r"a latent must be in \[0, 47\], got 99") as refused:
            child.ask("prompt", {"text": TEXT, "latents": [99]})
        assert refused.value.refusal.status == 422
        process = child._process
        thread, answers = in_thread(
            lambda: child.ask("generate", {"prompt": "the", "n_tokens": 62, "temperature": 1.0}, "long")
        )
        wait_for(lambda: (child.status()["job"] or {}).get("done", 0) > 0 or answers)
        child.cancel("long")
        thread.join(30)
        assert isinstance(answers[0], LiveError) and answers[0].refusal.value == CANCELLED
        assert child._process is process, "cancelling does not cost the model"
        assert child.ask("generate", {"prompt": "the", "n_tokens": 2})["unsteered"]["text"]
        assert process is not None and process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0, "it leaves when the server does"
    finally:
        child.close()
    with pytest.raises(LiveError, match="it was closed"):
        child.ask("prompt", {"text": TEXT})


def test_a_child_that_ends_is_reported_and_the_next_question_starts_another(tmp_path: Path) -> None:
    flag = tmp_path / "once"
    body = (
        f"p = {str(flag)!r}; there = os.path.exists(p); open(p, 'w').close(); "
        "(say({'id': q['id'], 'answer': {'pid': os.getpid()}}) if there else os._exit(3))"
    )
    child = Child(script(body))
    with pytest.raises(
        LiveError, match=r"must live until it has answered, got exit code 3\. Ask again"
    ) as died:
        child.ask("prompt", {})
    assert died.value.refusal.status == 502
    wait_for(lambda: child.status()["state"] == "failed")
    assert "ended with code 3" in child.status()["reason"]
    assert child.ask("prompt", {})["pid"] != 0 and child.status()["state"] == "ready"
    child.close()


def test_a_child_that_does_not_answer_in_time_is_ended() -> None:
    child = Child(script("time.sleep(60)"), timeout_s=0.5)
    with pytest.raises(LiveError, match=r"must answer within 0\.5 seconds, got no answer") as slow:
        child.ask("prompt", {})
    assert slow.value.refusal.status == 504
    wait_for(lambda: child._process is None or child._process.poll() is not None)
    child.close()


def test_a_child_that_ignores_cancelling_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sememe.browse.live.CANCEL_S", 0.3)
    child = Child(script("time.sleep(60)"))
    thread, found = in_thread(lambda: child.ask("prompt", {}, "mine"))
    wait_for(lambda: child.status()["job"])
    assert child.cancel("mine") and not child.cancel("another") and not child.cancel("")
    thread.join(20)
    assert found[0].refusal.status == 409
    child.close()


def test_cancelling_while_the_model_loads_does_not_cost_the_loading(tmp_path: Path) -> None:
    flag = tmp_path / "loaded"
    code = (
        "import json, os, sys, time\n"
        "def say(m): print(json.dumps(m), flush=True)\n"
        "say({'state': 'loading'})\n"
        f"while not os.path.exists({str(flag)!r}): time.sleep(0.02)\n"
        "say({'state': 'ready'})\n"
        "for line in sys.stdin:\n"
        "    q = json.loads(line)\n"
        "    if 'id' in q: say({'id': q['id'], 'answer': {'pid': os.getpid()}})\n"
    )
    child = Child([sys.executable, "-c", code])
    thread, found = in_thread(lambda: child.ask("prompt", {}, "mine"))
    wait_for(lambda: child.status()["job"])
    assert child.cancel("mine")
    thread.join(5)
    assert not thread.is_alive() and found[0].refusal.value == CANCELLED
    process = child._process
    flag.touch()
    assert process is not None and child.ask("prompt", {}) == {"pid": process.pid}
    child.close()


def test_closing_answers_those_who_wait() -> None:
    child = Child(script("time.sleep(60)"))
    thread, found = in_thread(lambda: child.ask("prompt", {}, "mine"))
    wait_for(lambda: child.status()["job"])
    process = child._process
    child.close()
    thread.join(5)
    assert not thread.is_alive() and "it was closed" in str(found[0])
    assert process is not None and process.poll() is not None, "closing ends it"


def test_one_at_a_time_and_only_so_many_wait() -> None:
    child = Child(script("time.sleep(0.6); say({'id': q['id'], 'answer': q['arguments']})"), max_waiting=1)
    first = in_thread(lambda: child.ask("prompt", {"n": 1}, "one"))
    wait_for(lambda: child.status()["state"] == "busy")
    second = in_thread(lambda: child.ask("prompt", {"n": 2}, "two"))
    wait_for(lambda: child.status()["waiting"] == 1)
    with pytest.raises(LiveError, match="at most 1 questions may wait") as full:
        child.ask("prompt", {})
    assert full.value.refusal.status == 429
    assert child.cancel("two"), "a job that waits can be cancelled"
    first[0].join(20)
    second[0].join(20)
    assert first[1] == [{"n": 1}] and second[1][0].refusal.value == CANCELLED
    child.close()


@pytest.mark.parametrize("ended_by", ["deadline", "cancel", "close"])
def test_a_child_that_never_reads_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, ended_by: str) -> None:
    monkeypatch.setattr("sememe.browse.live.CANCEL_S", 0.2)
    timeout = 0.5 if ended_by == "deadline" else 30.0
    child = Child([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=timeout)
    thread, found = in_thread(lambda: child.ask("prompt", {"text": "x" * 1_000_000}, "mine"))
    wait_for(lambda: child._jobs and child._jobs[0].running)
    started = time.monotonic()
    assert child.status()["job"]["name"] == "mine" and not child.cancel("another")
    if ended_by == "cancel":
        assert child.cancel("mine")
    assert time.monotonic() - started < 0.3, "neither waits for the pipe"
    if ended_by == "close":
        child.close()
    thread.join(10)
    assert (
        not thread.is_alive()
        and found[0].refusal.status == {"deadline": 504, "cancel": 409, "close": 502}[ended_by]
    )
    child.close()


def test_a_child_that_closes_its_input_takes_no_question() -> None:
    code = 'import os, time; os.close(0); print(\'{"state": "ready"}\', flush=True); time.sleep(60)'
    child = Child([sys.executable, "-c", code], timeout_s=30.0)
    child.start()
    wait_for(lambda: child.status()["state"] == "ready")
    with pytest.raises(LiveError, match="it took no question"):
        child.ask("prompt", {})
    child.close()


def test_a_job_that_is_cancelled_before_it_runs_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(script("say({'id': q['id'], 'answer': {}})"))
    still_wanted = child._still_wanted

    def then_cancelled(job: Any, deadline: float) -> None:
        still_wanted(job, deadline)
        job.cancel()

    monkeypatch.setattr(child, "_still_wanted", then_cancelled)
    with pytest.raises(LiveError) as refused:
        child.ask("prompt", {}, "mine")
    assert refused.value.refusal.value == CANCELLED and child.status()["state"] == "off"
    child.close()


def test_a_command_that_is_not_there_and_a_child_that_talks_nonsense() -> None:
    with pytest.raises(LiveError, match="No such file"):
        Child(["/nowhere/sememe"]).ask("prompt", {})
    child = Child(
        script("print('not json'); print('[1]'); say({'id': 99}); say({'id': q['id'], 'answer': {}})")
    )
    assert child.ask("prompt", {}) == {}
    child.close()


def test_a_model_that_cannot_be_loaded_is_a_state_with_a_reason(world: World) -> None:
    about = {
        "atlas": str(world.root / "atlas"),
        "dictionary": str(world.dictionary),
        "model": str(world.root / "nothing"),
    }
    child = Child([sys.executable, "-m", "sememe.live", json.dumps(about)])
    child.start()
    try:
        wait_for(lambda: child.status()["state"] == "failed")
        assert "nothing" in child.status()["reason"]
        with pytest.raises(LiveError, match="nothing") as failed:
            child.ask("prompt", {"text": TEXT})
        assert failed.value.refusal.status == 422
    finally:
        child.close()
