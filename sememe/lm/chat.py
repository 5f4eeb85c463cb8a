"""Conversations with a language model, and what it would say at chosen places of a text.

Knows chat templates and caches of keys and values; nothing about what is asked, or why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sememe.errors import ModelError
from sememe.lm.model import LanguageModel

__all__ = ["Completion", "chat_ids", "choice_log_probs", "complete"]


class Completion(NamedTuple):
    """What a model went on with."""

    text: str
    finish: str
    """stop: it ended by itself, or one of the stop texts came; length: it was cut off."""
    n_tokens: int


def chat_ids(model: LanguageModel, messages: Sequence[tuple[str, str]]) -> list[int]:
    """A conversation as the model was taught to read it, up to where it answers.

    Where a template knows no system's turn (Gemma), its text goes before the first user's.

    Args:
        model: One with a chat template.
        messages: (role, content) of each turn.
    Raises:
        ModelError: the model has no chat template, or it refuses this order of turns.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "a language model must have a chat template to be asked in words",
            f"none in {model.name}",
            "Name one that was tuned to instructions.",
        )
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        return _rendered(tokenizer, turns)
    except Exception as error:  # templates are programs, and raise what they like
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if len(turns) > 1 and turns[0]["role"] == "system" and turns[1]["role"] == "user":
            joined = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
            try:
                return _rendered(tokenizer, [joined, *turns[2:]])
            except Exception:
                pass
        raise ModelError(
            f"the chat template of {model.name} must accept the turns",
            f"{', '.join(turn['role'] for turn in turns)} ({first})",
            "Let user and assistant take turns, after at most one system message.",
        ) from None


def _rendered(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [int(i) for i in found["input_ids"]]


def complete(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    given_up: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """What the model goes on with after each prompt, all at a time, with a cache of keys and values.

    Sums over padded rows are rounded otherwise than over single ones, so an answer can depend on its neighbours where
    two tokens are nearly as likely; with a temperature it does, since they share the seed.

    Args:
        model: The model.
        prompts: Token ids of each.
        max_new_tokens: Most tokens to add to each.
        temperature: 0 takes the likeliest token; above 0 samples.
        seed: Of the sampling.
        stop: Texts at which an answer ends; they are not part of it.
        given_up: Asked after each token; True ends all rows.
    Raises:
        ModelError: a prompt and its continuation do not fit the model's context.
    """
    tokenizer, longest = model.tokenizer, max(len(prompt) for prompt in prompts)
    ends = _ends(model)
    ids = torch.full((len(prompts), longest), ends[0] if ends else 0)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True

    def decoded(row: Tensor) -> str:
        return str(tokenizer.decode(row, skip_special_tokens=True))

    def until(so_far: Int[Tensor, "batch seq_so_far"]) -> Bool[Tensor, " batch"]:
        if given_up():
            return torch.ones(so_far.shape[0], dtype=torch.bool, device=so_far.device)
        texts = [decoded(row) for row in so_far[:, longest:]] if stop else [""] * so_far.shape[0]
        done = [any(end in text for end in stop) for text in texts]
        return torch.tensor(done, device=so_far.device)

    made = model.generate(
        ids, max_new_tokens, mask=mask, temperature=temperature, seed=seed, ends=ends, until=until
    )
    found = []
    for row in made[:, longest:].cpu():
        ended = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero().flatten().tolist()
        kept = row[: ended[0]] if ended else row
        text = decoded(kept)
        cuts = [at for end in stop if (at := text.find(end)) >= 0]
        finish = "stop" if ended or cuts else "length"
        found.append(Completion(text[: min(cuts)] if cuts else text, finish, len(kept) + bool(ended)))
    return found


def _ends(model: LanguageModel) -> tuple[int, ...]:
    """Every token that ends an answer: chat models have their own beside the tokenizer's."""
    told = getattr(model.hf.generation_config, "eos_token_id", None)
    listed = told if isinstance(told, list) else [told]
    return tuple(dict.fromkeys(i for i in [model.tokenizer.eos_token_id, *listed] if i is not None))


@torch.no_grad()
def choice_log_probs(
    model: LanguageModel, text: str, places: Sequence[int], choices: Sequence[str]
) -> list[dict[str, float]]:
    """How likely each choice is to stand at each place, given the text before it.

    A choice may be several tokens ("10" where digits are single tokens); its probability is that of all of them. One
    that begins another ("1") has that other's probability taken off, so that no more than 1 is shared out.

    Args:
        model: The model.
        text: The text; one forward over it serves all places.
        places: Offsets of characters into it.
        choices: What may stand there.
    Returns:
        Natural logarithms, one dictionary per place.
    Raises:
        ModelError: the text does not fit the model's context, or a place is inside a token of the tokenizer.
    """
    if not places:
        return []
    ids, starts = _tokens_from(model, text, places)
    if min(starts) == 0:
        raise ModelError(
            "something must stand before a place whose distribution is asked for", "nothing", "Begin later."
        )
    encoded = [_choice_ids(model, text[place - 1 : place], choices) for place in places]
    longer = any(len(tokens) > 1 for of_place in encoded for tokens in of_place.values())
    cache = _new_cache(model) if longer else None
    row = torch.tensor([ids])
    before = torch.tensor(starts) - 1
    hidden = model.hidden(row, cache=cache)[0, before.to(model.device)]
    cache = cache if cache is not None and _can_be_cut(cache, 2 * len(ids)) else None
    firsts = [part.cpu() for part in _log_softmax(model, hidden)]
    found: list[dict[str, float]] = [{} for _ in places]
    # From the last place to the first: a cache can be cut, not lengthened.
    for at in sorted(range(len(places)), key=lambda i: -starts[i]):
        start = starts[at]
        joint = {
            tokens: float(firsts[at][tokens[0]])
            + (_rest(model, ids[:start], tokens, cache) if len(tokens) > 1 else 0.0)
            for tokens in encoded[at].values()
        }
        for choice, tokens in encoded[at].items():
            extended = [
                joint[other] for other in joint if len(other) > len(tokens) and other[: len(tokens)] == tokens
            ]
            found[at][choice] = _less(joint[tokens], extended)
    return [{choice: of_place[choice] for choice in choices} for of_place in found]


def _rest(model: LanguageModel, before: list[int], tokens: tuple[int, ...], cache: Any) -> float:
    """Log-probability of a choice's tokens after its first."""
    head = list(tokens[:-1])
    if cache is not None:
        surplus = int(cache.get_seq_length()) - len(before)
        if surplus > 0:
            cache.crop(-surplus)
        return _picked(model, model.hidden(torch.tensor([head]), cache=cache)[0], tokens)
    hidden = model.hidden(torch.tensor([before + head]))[0, len(before) :]
    return _picked(model, hidden, tokens)


def _picked(model: LanguageModel, hidden: Tensor, tokens: tuple[int, ...]) -> float:
    log_probs = _log_softmax(model, hidden)
    return float(log_probs.gather(1, torch.tensor(tokens[1:], device=log_probs.device)[:, None]).sum())


def _log_softmax(model: LanguageModel, hidden: Tensor) -> Tensor:
    return model.logits(hidden).float().log_softmax(-1)


def _less(joint: float, extended: Sequence[float]) -> float:
    """log(exp(joint) - sum of exp(extended))."""
    left = 1.0 - sum(math.exp(other - joint) for other in extended)
    return joint + math.log(max(left, 1e-12))


def _new_cache(model: LanguageModel) -> Any:
    """An empty cache of keys and values; None for models that keep a state instead."""
    from transformers import DynamicCache

    if getattr(model.hf, "_is_stateful", False):
        return None
    return DynamicCache(config=model.hf.config)


def _can_be_cut(cache: Any, length: int) -> bool:
    """Whether every layer keeps all that it has seen, up to a length; a sliding window or a state does not."""
    return all(
        type(layer).__name__ == "DynamicLayer" or (getattr(layer, "sliding_window", None) or 0) > length
        for layer in cache.layers
    )


def _tokens_from(model: LanguageModel, text: str, places: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of a text, and which token begins at each place."""
    tokenizer = model.tokenizer
    found = tokenizer(text, return_offsets_mapping=True)
    ids = [int(i) for i in found["input_ids"]]
    begins: dict[int, int] = {}
    for index, (start, stop) in enumerate(found["offset_mapping"]):
        if stop > start:
            begins.setdefault(int(start), index)
    missing = [place for place in places if place not in begins]
    if missing:
        at = missing[0]
        raise ModelError(
            "a token must begin at each place whose distribution is asked for",
            f"{text[max(at - 8, 0) : at + 8]!r}, where none of {model.name} begins after {text[max(at - 8, 0) : at]!r}",
            "Put a tab or a line break before the place.",
        )
    return ids, [begins[place] for place in places]


def _choice_ids(model: LanguageModel, before: str, choices: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """Token ids of each choice after a character."""
    tokenizer = model.tokenizer
    lead = tokenizer(before, add_special_tokens=False).input_ids
    found = {}
    for choice in choices:
        both = tokenizer(before + choice, add_special_tokens=False).input_ids
        if both[: len(lead)] != lead or len(both) == len(lead):
            raise ModelError(
                "a choice must begin a token of its own",
                f"{choice!r} after {before!r} for {model.name}",
                "Put a tab or a line break before the place.",
            )
        found[choice] = tuple(int(i) for i in both[len(lead) :])
    return found
