"""Rules in words and as JSON. Knows what a rule's numbers mean; finds and scores none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sememe.explain.lexical.classes import CLASSES
from sememe.explain.lexical.loops import PAIR, PREVIOUS

__all__ = ["Rule", "as_json", "in_words"]

N_SHOWN = 4
WHICH = ("current", "previous", "recent")


class Rule(NamedTuple):
    """A yes-or-no rule over a token and those before it; see docs/explain.md.

    It says yes where the token is one of `items` (tokens, previous tokens, or pairs, by `family`) or of class
    `base`, and every condition (which token, class, negated) holds. Without items and base, the conditions alone.
    """

    family: int
    items: tuple[int, ...]
    base: int
    conditions: tuple[tuple[int, int, bool], ...]

    @property
    def empty(self) -> bool:
        """Whether it never says yes."""
        return not self.items and self.base < 0 and not self.conditions


def as_json(rule: Rule, tokens: Mapping[int, str]) -> dict[str, Any] | None:
    """The rule as plain data, tokens as text beside their ids; None for the empty rule."""
    if rule.empty:
        return None
    out: dict[str, Any] = {}
    if rule.items:
        if rule.family == PAIR:
            pairs = [(item >> 32, item & 0xFFFFFFFF) for item in rule.items]
            out["pairs"] = [{"ids": list(pair), "text": [tokens[i] for i in pair]} for pair in pairs]
        else:
            name = "previous" if rule.family == PREVIOUS else "tokens"
            out[name] = [{"id": item, "text": tokens[item]} for item in rule.items]
    if rule.base >= 0:
        out["class"] = CLASSES[rule.base]
    if rule.conditions:
        out["conditions"] = [
            {"token": WHICH[which], "class": CLASSES[number], "not": negated}
            for which, number, negated in rule.conditions
        ]
    return out


def in_words(rule: Rule, tokens: Mapping[int, str]) -> str | None:
    """The rule as a person would say it; None for the empty rule."""
    if rule.empty:
        return None
    parts = [] if rule.base < 0 else [CLASSES[rule.base]]
    if rule.family == PAIR:
        pairs = ((_quoted(tokens[item & 0xFFFFFFFF]), _quoted(tokens[item >> 32])) for item in rule.items)
        parts += [f"{token} after {before}" for token, before in pairs]
    else:
        parts += [_quoted(tokens[item]) for item in rule.items]
    hidden = len(parts) - N_SHOWN
    if hidden > 1:
        parts = [*parts[:N_SHOWN], f"{hidden} more"]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1] if parts else ""
    if rule.family == PREVIOUS and rule.items:
        text = f"after {text}"
    said = [_condition(*condition, alone=not text and i == 0) for i, condition in enumerate(rule.conditions)]
    return ", ".join([text, *said] if text else said)


def _condition(which: int, number: int, negated: bool, *, alone: bool) -> str:
    name = CLASSES[number]
    if which == 0:
        if alone:
            return f"anything but {name}" if negated else name
        return f"not {name}" if negated else f"being {name}"
    place = "after" if which == 1 else "soon after"
    return f"{'not ' if negated else ''}{place} {name}"


def _quoted(text: str) -> str:
    return "“" + text.replace("\n", "⏎").replace("\t", "⇥") + "”"
