"""Choices that a tokenizer spells with several tokens: "10" as "1", then "0". Knows answers; no server, no cache.

A server names single tokens, so where digits are tokens of their own "1" bears what "1" and "10" have together, and
"10" is not named. One more question for each such place tells them apart: how likely is "0" after the "1"?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sememe.errors import JudgeError
from sememe.judge.base import SlotQuestion

__all__ = ["Spelling", "at_most", "rounds", "spellings", "told_apart"]


class Spelling(NamedTuple):
    """A choice at a place, and the question that tells it from the shorter one it begins with."""

    place: int
    """Which of the question's places."""
    choice: str
    begins: str
    question: SlotQuestion
    """What comes after `begins`: the rest of the choice, or its first characters."""

    @property
    def rest(self) -> str:
        """What is left of the choice after its beginning."""
        return self.choice.removeprefix(self.begins)


def rounds(question: SlotQuestion, found: Sequence[Mapping[str, float]]) -> list[str]:
    """Choices that no place names and that begin with another choice, the shorter ones first.

    A choice that some place names is one token; where it is absent it is only unlikely.
    """
    named = {choice for log_probs in found for choice in log_probs}
    return [choice for choice in _extending(question.choices) if choice not in named]


def spellings(question: SlotQuestion, joint: Sequence[Mapping[str, float]], choice: str) -> list[Spelling]:
    """What to ask about a choice: at each place that names a beginning of it, what comes after that.

    Args:
        question: The question.
        joint: Of each place, log-probabilities that a choice stands there or begins what stands there.
        choice: One of `rounds`.
    """
    out = []
    for index, (slot, known) in enumerate(zip(question.slots, joint, strict=True)):
        beginnings = [other for other in known if other != choice and choice.startswith(other)]
        if beginnings:
            out.append(_spelling(question, index, slot, choice, max(beginnings, key=len)))
    return out


def at_most(question: SlotQuestion) -> list[SlotQuestion]:
    """All that may be asked besides."""
    return [
        _spelling(question, index, slot, choice, max(_beginnings(choice, question.choices), key=len)).question
        for choice in _extending(question.choices)
        for index, slot in enumerate(question.slots)
    ]


def told_apart(
    spelled: Sequence[Spelling],
    after: Sequence[Mapping[str, float]],
    joint: Sequence[dict[str, float]],
    left: Sequence[dict[str, float]],
) -> None:
    """Enter a choice where it was found, and take it from the one it begins with.

    Args:
        spelled: What was asked.
        after: The answers: log-probabilities of the rest, or of its first characters.
        joint: Of each place, log-probabilities that a choice stands there or begins what stands there; changed.
        left: The same for the choice alone; changed.
    Raises:
        JudgeError: the rest is several tokens itself.
    """
    for one, known in zip(spelled, after, strict=True):
        rest = known.get(one.rest)
        if rest is None:
            if known:
                raise JudgeError(
                    "each choice must be at most one token longer than another that it begins with",
                    f"{one.choice!r}, of which {one.begins!r} and then {max(known, key=len)!r} are tokens",
                    "Name choices of fewer tokens, or ask a local model: it spells them out.",
                )
            continue  # less likely than everything that the server names there
        whole = joint[one.place][one.begins] + min(rest, 0.0)
        joint[one.place][one.choice] = left[one.place][one.choice] = whole
        shorter = math.exp(left[one.place][one.begins]) - math.exp(whole)
        if shorter > 0:
            left[one.place][one.begins] = math.log(shorter)
        else:
            del left[one.place][one.begins]


def _extending(choices: Sequence[str]) -> list[str]:
    return sorted((choice for choice in choices if _beginnings(choice, choices)), key=len)


def _beginnings(choice: str, choices: Sequence[str]) -> list[str]:
    return [other for other in choices if other and other != choice and choice.startswith(other)]


def _spelling(question: SlotQuestion, index: int, slot: int, choice: str, begins: str) -> Spelling:
    before, rest = question.text[:slot] + begins, choice.removeprefix(begins)
    heads = tuple(rest[:length] for length in range(1, len(rest) + 1))
    return Spelling(index, choice, begins, SlotQuestion(before, (len(before),), heads))
