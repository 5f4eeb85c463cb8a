"""Conversations, and how likely choices are at places of a text, against full forwards on every architecture."""

import math

import pytest
import torch
from tiny_models import ARCHITECTURES, MORE, tiny_lm

from sememe import lm
from sememe.errors import ModelError

NUMBERS = tuple(str(i) for i in range(11))
TEXT = "a\t?\nb\t?\ncat\t?\n"
PLACES = (2, 6, 12)
TEMPLATE = """{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def talking(template=TEMPLATE, name="llama", **changes):
    model = tiny_lm(name, **changes)
    model.tokenizer.chat_template = template
    return model


@torch.no_grad()
def by_full_forwards(model, before, choices):
    """Each choice by a forward of its own, the longer ones taken off those that begin them."""
    joint = {}
    lead = model.tokenizer(before).input_ids
    for choice in choices:
        ids = lead + model.tokenizer(choice).input_ids
        log_probs = model.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        joint[choice] = sum(float(log_probs[i - 1, ids[i]]) for i in range(len(lead), len(ids)))
    return {
        choice: math.log(
            math.exp(value)
            - sum(math.exp(joint[other]) for other in choices if other != choice and other.startswith(choice))
        )
        for choice, value in joint.items()
    }


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_choices_are_as_likely_as_full_forwards_say(name):
    model = tiny_lm(name)
    assert len(model.tokenizer("10").input_ids) == 2, "a choice of two tokens, which another one begins"
    found = lm.choice_log_probs(model, TEXT, PLACES, NUMBERS)
    for place, of_place in zip(PLACES, found, strict=True):
        assert of_place == pytest.approx(by_full_forwards(model, TEXT[:place], NUMBERS), abs=1e-4)


def test_places_and_choices_come_in_the_order_asked():
    model = tiny_lm("llama")
    one = lm.choice_log_probs(model, TEXT, PLACES, ("3", "10", "1"))
    other = lm.choice_log_probs(model, TEXT, PLACES[::-1], ("3", "10", "1"))
    assert one == [pytest.approx(found, abs=1e-5) for found in other[::-1]]
    assert [list(found) for found in one] == [["3", "10", "1"]] * 3
    assert lm.choice_log_probs(model, TEXT, (), NUMBERS) == []


def test_a_window_that_has_moved_on_changes_nothing():
    text = "a\t?\n" * 10
    places = tuple(i + 1 for i in range(len(text)) if text[i] == "\t")
    model = tiny_lm("mistral")
    assert model.hf.config.sliding_window < len(text)
    found = lm.choice_log_probs(model, text, places, NUMBERS)
    assert found[-1] == pytest.approx(by_full_forwards(model, text[: places[-1]], NUMBERS), abs=1e-4)


def test_nothing_stays_behind():
    model = tiny_lm("llama")
    ids = torch.tensor([model.tokenizer(TEXT).input_ids])
    before = model.hidden(ids)
    lm.choice_log_probs(model, TEXT, PLACES, NUMBERS)
    assert torch.equal(model.hidden(ids), before)


def test_what_cannot_be_asked_is_named():
    model = tiny_lm("llama")
    with pytest.raises(ModelError, match="something must stand before a place"):
        lm.choice_log_probs(model, TEXT, (0,), NUMBERS)
    offsets = model.tokenizer("The cat", return_offsets_mapping=True).offset_mapping
    wide = next((start, stop) for start, stop in offsets if stop - start > 1)
    with pytest.raises(ModelError, match="a token must begin at each place"):
        lm.choice_log_probs(model, "The cat", (wide[0] + 1,), ("0",))
    with pytest.raises(ModelError, match="context of 48 tokens"):
        lm.choice_log_probs(model, "a\t?\n" * 30, (2,), ("0",))
    with pytest.raises(ModelError, match="a choice must begin a token of its own, got '' after"):
        lm.choice_log_probs(model, TEXT, PLACES, ("",))


def test_a_conversation_is_written_as_the_template_has_it():
    model = talking()
    ids = lm.chat_ids(model, [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")])
    assert model.tokenizer.decode(ids) == "<system>s\n<user>u\n<assistant>a\n<user>v\n<assistant>"


def test_a_template_without_systems_turn_has_it_before_the_users():
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    model = talking(refusing)
    ids = lm.chat_ids(model, [("system", "s"), ("user", "u")])
    assert model.tokenizer.decode(ids) == "<user>s\n\nu\n<assistant>"
    with pytest.raises(ModelError, match=r"must accept the turns, got system \(no system\)"):
        lm.chat_ids(model, [("system", "s")])


def test_a_model_without_a_template_is_named():
    with pytest.raises(ModelError, match="must have a chat template"):
        lm.chat_ids(tiny_lm("llama"), [("user", "u")])


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_answers_together_are_those_one_by_one_without_a_cache(name):
    model = tiny_lm(name)
    prompts = [model.tokenizer(text).input_ids for text in ("The cat", "def f(x): return", "a")]
    together = lm.complete(model, prompts, 6)
    for prompt, found in zip(prompts, together, strict=True):
        slow = model.generate(torch.tensor([prompt]), 6, use_cache=False)[0, len(prompt) :]
        assert found.text == model.tokenizer.decode(slow, skip_special_tokens=True)


def test_an_answer_ends_at_the_models_own_end_and_at_stop_texts():
    model = tiny_lm("llama")
    prompt = model.tokenizer("mat.").input_ids
    [whole] = lm.complete(model, [prompt], 8)
    made = model.generate(torch.tensor([prompt]), 8)[0, len(prompt) :].tolist()
    assert whole == (model.tokenizer.decode(made), "length", 8), (
        "a prompt whose answer does not end by itself"
    )
    end = made[-1]
    model.hf.generation_config.eos_token_id = [end, 0]
    first = made.index(end)
    assert lm.complete(model, [prompt], 8) == [(model.tokenizer.decode(made[:first]), "stop", first + 1)]
    model.hf.generation_config.eos_token_id = None
    stop = "et"
    [cut] = lm.complete(model, [prompt], 8, stop=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop"
    assert cut.n_tokens <= 8


def test_giving_up_ends_at_the_next_token():
    model = tiny_lm("llama")
    asked = []

    def given_up():
        asked.append(True)
        return len(asked) == 3

    [found] = lm.complete(model, [[5, 6]], 20, given_up=given_up)
    assert found.n_tokens == 3
