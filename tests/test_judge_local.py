"""A local model that is asked in words: batches, seeds, ends, Ctrl-C; and what SmolLM2 really says."""

import asyncio
import math
import os
import signal
import threading

import pytest
import torch
from judge_world import CHOICES, PLACES, TEXT, failing, question
from tiny_models import tiny_lm

from sememe import lm
from sememe.errors import JudgeError, ModelError, ResourceError
from sememe.judge import (
    Answer,
    Judge,
    LocalConfig,
    SlotQuestion,
    ask_all,
    open_judge,
    run_each,
)
from sememe.judge.local import LocalJudge


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A local judge of a tiny model with random weights, and how often its model was run."""
    model = tiny_lm("llama", max_position_embeddings=256)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    monkeypatch.setattr(lm, "fingerprint_of", lambda config: model.fingerprint)
    monkeypatch.setattr(lm, "load", lambda config: model)

    def make(**options):
        return open_judge(
            LocalConfig(**({"model": "tiny", "answers": tmp_path / "answers.sqlite"} | options))
        )

    make.model = model
    return make


def test_a_local_model_answers_in_batches_as_it_would_one_by_one(tiny, tmp_path):
    asked = [
        question(text, max_tokens=9) for text in ("The cat", "def f(x):", "a", "日本語 и русский", "12 €")
    ]
    judge = tiny(batch_size=3)
    assert isinstance(judge.judge, Judge)
    together = ask_all(judge, asked)
    alone = ask_all(tiny(batch_size=1, answers=tmp_path / "other.sqlite"), asked)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    model = tiny.model
    for one, answer in zip(asked, together, strict=True):
        ids = lm.chat_ids(model, one.messages)
        assert model.tokenizer.decode(ids) == f"user: {one.messages[0].content}\nassistant: "
        slow = model.generate(torch.tensor([ids]), 9, use_cache=False)[0, len(ids) :]
        assert answer.text == model.tokenizer.decode(slow, skip_special_tokens=True)
        assert answer.usage[:2] == (len(ids), len(slow))


def test_a_local_models_sampled_answers_depend_on_their_seed_alone(tiny, tmp_path):
    asked = [question("The cat", max_tokens=12, temperature=1.5, seed=seed) for seed in range(4)]
    first = ask_all(tiny(), asked)
    again = ask_all(tiny(answers=tmp_path / "other.sqlite"), asked[::-1])[::-1]
    assert [answer.text for answer in first] == [answer.text for answer in again]
    assert len({answer.text for answer in first}) > 1


def test_a_local_models_answer_ends_at_a_stop_text(tiny):
    [whole] = ask_all(tiny(), [question("The cat", max_tokens=20)])
    end = whole.text[8:10]
    [cut] = ask_all(tiny(), [question("The cat", max_tokens=20, stop=(end, "never there"))])
    assert cut.text == whole.text[: whole.text.index(end)]
    assert (whole.finish, cut.finish) == ("length", "stop")
    assert cut.usage.n_completion_tokens < 20


def test_what_a_local_model_refuses_does_not_harm_its_neighbours(tiny):
    judge = tiny()
    long = question("cat " * 200, max_tokens=5)
    good = question("The cat", max_tokens=5)

    async def outcome(asked):
        try:
            return await judge.ask(asked)
        except JudgeError as error:
            return str(error)

    found = run_each(judge, outcome, [good, long], description="ask", unit="questions")
    assert isinstance(found[0], Answer)
    assert "prompt and answer must fit the context of 256 tokens" in found[1]
    tiny.model.tokenizer.chat_template = None
    assert "must have a chat template to be asked in words, got none in llama" in failing(
        judge, question("new")
    )
    wide = tiny.model.tokenizer("The cat sat", return_offsets_mapping=True).offset_mapping
    inside = next(start + 1 for start, stop in wide if stop - start > 1)
    told = failing(judge, SlotQuestion("The cat sat", (inside,), ("0",)))
    assert "a token must begin at each place" in told


def test_a_local_model_stops_at_ctrl_c(tiny):
    """A generation under way ends at its next token, not at its last."""
    judge = tiny()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ask_all(judge, [question(f"{i}", max_tokens=200) for i in range(2000)])
    kept = ask_all(judge, [question("new", max_tokens=2)])
    assert kept[0].usage.n_completion_tokens == 2


def test_a_device_that_is_full_is_named(tiny, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")

    monkeypatch.setattr(lm, "complete", full)
    with pytest.raises(
        ResourceError, match=r"got CUDA out of memory\. Tried to allocate 2 GiB\. Lower batch_size"
    ):
        ask_all(tiny(), [question(max_tokens=5)])


def test_a_local_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="folder or file must exist"):
        open_judge(LocalConfig(model=str(tmp_path / "nowhere" / "model.gguf")))


def test_a_local_models_fingerprint_follows_its_weights_and_dtype(tiny):
    fingerprint = tiny().fingerprint
    assert tiny(batch_size=2, max_calls=3, device="cpu").fingerprint == fingerprint
    assert tiny(dtype="float32").fingerprint != fingerprint


@pytest.mark.model
def test_smollm2_answers_and_says_how_likely_numbers_are(tmp_path):
    judge = open_judge(LocalConfig(dtype="float32", answers=tmp_path / "answers.sqlite"))
    asked = [
        question("What is the capital of France? One word.", max_tokens=12),
        SlotQuestion(TEXT, PLACES, CHOICES),
    ]
    answer, slots = ask_all(judge, asked)
    assert "Paris" in answer.text
    assert answer.finish == "stop"
    assert judge.count_tokens("12") == 2
    assert slots.usage.n_prompt_tokens == judge.count_tokens(TEXT)
    for place, found in zip(PLACES, slots.log_probs, strict=True):
        assert dict(found) == pytest.approx(by_full_forwards(judge.judge._model, TEXT[:place]), abs=1e-3)
        assert sum(math.exp(value) for value in found.values()) <= 1


def by_full_forwards(model, before):
    """Log-probabilities of 0 to 10, each by a forward of its own: 10 is two tokens, and 1 means no 10."""
    found = {}
    for choice in CHOICES:
        ids = model.tokenizer(before + choice).input_ids
        n = len(ids) - len(model.tokenizer(before).input_ids)
        assert n == len(choice)
        with torch.no_grad():
            log_probs = model.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found[choice] = sum(float(log_probs[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))
    found["1"] = math.log(math.exp(found["1"]) - math.exp(found["10"]))
    return found


def test_a_local_judge_is_closed_with_nobody_waiting(tiny):
    async def ask_and_leave():
        judge = LocalJudge(LocalConfig(model="tiny"))
        tasks = [asyncio.create_task(judge.ask(question(str(i), max_tokens=50))) for i in range(30)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await judge.close()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return [type(one) for one in done]

    assert asyncio.CancelledError in asyncio.run(ask_and_leave())
