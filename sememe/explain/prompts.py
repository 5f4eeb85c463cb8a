"""How tokens, activations and highlights are written in prompts, and how answers are read. Asks nobody."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence

from sememe.explain.examples import Window

__all__ = [
    "MAX_LEVEL",
    "flags_in",
    "highlighted",
    "level",
    "number_in",
    "records",
    "shown",
    "without_thoughts",
]

MAX_LEVEL = 10
"""Prompts tell activations as whole numbers from 0 to this one."""


def shown(token: str) -> str:
    """A token in a prompt that has one to a line: its own line breaks and tabs are written out.

    Differs from OpenAI's prompts, which leave them in, where they break the format.
    """
    return token.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def level(act: float, largest: float) -> int:
    """An activation on the scale of prompts: min(10, floor(10 * relu(act) / largest)); 0 if nothing is active.

    Source: Bills et al. 2023, `normalize_activations`.
    """
    return 0 if largest <= 0 else min(MAX_LEVEL, math.floor(MAX_LEVEL * max(act, 0.0) / largest))


def records(windows: Sequence[Window], largest: float, *, omit_zeros: bool = False) -> str:
    """Excerpts with one `token<tab>activation` to a line, each between <start> and <end>."""
    parts = []
    for window in windows:
        levels = [level(act, largest) for act in window.acts]
        lines = [
            f"{shown(token)}\t{value}"
            for token, value in zip(window.tokens, levels, strict=True)
            if value or not omit_zeros
        ]
        parts.append("\n<start>\n" + "".join(line + "\n" for line in lines) + "<end>\n")
    return "".join(parts)


def highlighted(tokens: Sequence[str], places: Collection[int]) -> str:
    """A text in which the tokens at some places stand between << and >>; neighbours share one pair."""
    parts = []
    for i, token in enumerate(tokens):
        opens = "<<" if i in places and i - 1 not in places else ""
        closes = ">>" if i in places and i + 1 not in places else ""
        parts.append(f"{opens}{token}{closes}")
    return "".join(parts)


def without_thoughts(answer: str) -> str:
    """What a thinking model says when it has thought: what follows its last </think>.

    Nothing if it was cut off while it thought. Some models' prompts end with <think>, so that answers only close it.
    """
    said = answer.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def flags_in(answer: str, n: int) -> list[bool] | None:
    """The last JSON list of n zeros and ones in an answer; None if there is none, or none of that length."""
    for text in reversed(re.findall(r"\[[^\[\]]*\]", without_thoughts(answer))):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if len(found) == n and all(type(item) in (int, bool) and item in (0, 1) for item in found):
            return [bool(item) for item in found]
    return None


def number_in(answer: str, n: int) -> int | None:
    """The only whole number from 1 to n that an answer names; None if it names none, or several."""
    found = {int(text) for text in re.findall(r"(?<![\d.])\d+(?![\d]|\.\d)", without_thoughts(answer))}
    return found.pop() if len(found) == 1 and next(iter(found)) in range(1, n + 1) else None
