"""What a judge is asked so that it explains a latent, its effect, its category or a cluster. Knows prompts.

Explanations are asked for with examples of the explaining side alone; the largest activation that scales them is
theirs too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from sememe.explain.examples import Window, excerpt
from sememe.explain.prompts import highlighted, level, records, shown, without_thoughts
from sememe.judge import Question
from sememe.judge.base import Message

__all__ = [
    "CATEGORIES",
    "N_RECORDS",
    "Style",
    "category_in",
    "category_question",
    "cluster_question",
    "effect_question",
    "explanation_in",
    "explanation_question",
]

Style = Literal["activations", "highlights"]
N_RECORDS = 5
"""Strongest examples shown, and as many of the deciles where those are shown too."""
EXCERPT, LEAD = 64, 40
SPARSE = 0.2
"""Below this share of active tokens, the active ones are repeated without the zeros."""
MARKED_FROM = 0.3
"""Share of an excerpt's largest activation from which a token is marked in the style of highlights."""
MAX_ANSWER = 60
"""Tokens of an explanation, as in OpenAI's protocol."""
PREFIX = "the main thing this neuron does is find"
MARKS = " \t\"'*:"
"""What stands around an explanation and is none of it."""
PREAMBLE = re.compile(
    r"((sure|certainly|of course|okay|ok|absolutely|understood)( thing)?\s*([!.:*]+|,(?=\s*here\b))\s*)?"
    r"(here('s|’s| is| are)\b[^:]*:\s*)?((explanation|summary|answer)( of neuron \d+ behavior)?\s*:\s*)?",
    re.IGNORECASE,
)
"""Before an explanation, on its line."""
ANNOUNCED = re.compile(r"here('s|’s| is| are)\b.*\b(explanation|summary|sentence|answer)\b", re.IGNORECASE)
"""A sentence that only says that the explanation follows."""

SYSTEM = {
    "activations": (
        "We're studying neurons in a neural network. Each neuron looks for some particular thing in a short document. "
        "Look at the parts of the document the neuron activates for and summarize in a single sentence what the neuron "
        "is looking for. Don't list examples of words.\n\nThe activation format is token<tab>activation. Activation "
        "values range from 0 to 10. A neuron finding what it's looking for is represented by a non-zero activation "
        "value. The higher the activation value, the stronger the match."
    ),
    "highlights": (
        "We're studying neurons in a neural network. Each neuron looks for some particular thing in a short text. In "
        "the texts below, the words that it activates for are marked <<like this>>; how strongly, from 0 to 10, "
        "stands below each text. Summarize in a single sentence what the neuron is looking for. Don't list examples "
        "of words."
    ),
}
FEW: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    (
        "words about rain and snow",
        (("All", 0), (" night", 0), (" the", 0), (" rain", 10), (" fell", 2), (",", 0), (" and", 0), (" by", 0),
         (" dawn", 0), (" it", 0), (" was", 0), (" snow", 9), (".", 0)),
    ),
    (
        "the end of a question",
        (("“", 0), ("Who", 0), (" keeps", 0), (" the", 0), (" bees", 0), ("?”", 10), (" she", 0), (" asked", 1),
         (".", 0)),
    ),
)  # fmt: skip

CATEGORIES = (
    "one word or token",
    "a group of related words",
    "a part of a word",
    "punctuation or formatting",
    "numbers, dates or quantities",
    "names of people or places",
    "grammar or sentence structure",
    "a language or script",
    "code or mathematics",
    "a topic or kind of text",
    "a position in the text",
    "no clear pattern",
)
"""What kind of thing a latent stands for."""


def explanation_question(
    windows: Sequence[Window],
    *,
    style: Style = "activations",
    deciles: bool = False,
    removals: Mapping[tuple[int, int], Sequence[tuple[str, float]]] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Question:
    """Ask what a latent looks for.

    Args:
        windows: Its examples on the explaining side, the strongest first.
        style: `activations`, OpenAI's `token<tab>activation`; or `highlights`, running text with marked words.
        deciles: Show examples from the deciles beside the strongest, weak ones included.
        removals: For the places of some windows, context tokens and by what share the activation changes without each.
        temperature: Of the answer.
        seed: Of the answer.
    Source: Bills et al. 2023 (prompt and rescaling); delphi (highlights). Differs: the examples of other neurons are
        our own; line breaks and tabs inside tokens are written out.
    """
    chosen = _chosen(windows, deciles)
    largest = max((act for window in chosen for act in window.acts), default=0.0)
    messages = [Message("system", SYSTEM[style])]
    for number, (words, pairs) in enumerate(FEW, 1):
        window = Window("top", None, "", tuple(t for t, _ in pairs), tuple(float(a) for _, a in pairs), 0)
        messages.append(Message("user", _neuron(number, [window], 10.0, style, {})))
        messages.append(Message("assistant", f"{words}."))
    messages.append(Message("user", _neuron(len(FEW) + 1, chosen, largest, style, removals or {})))
    return Question(tuple(messages), max_tokens=MAX_ANSWER, temperature=temperature, seed=seed)


def _chosen(windows: Sequence[Window], deciles: bool) -> list[Window]:
    """The strongest; with deciles also some spread over them, from strong to the weakest. Nothing twice.

    Of different documents, as long as there are enough.
    """
    found = _mixed([w for w in windows if w.kind == "top"])[:N_RECORDS]
    if deciles or not found:
        # From the weakest on, so that it is the one of its document that stays.
        weak_first = _mixed(sorted((w for w in windows if w.kind == "decile"), key=lambda w: w.decile or 0))
        spread = sorted(weak_first, key=lambda w: -(w.decile or 0))
        places = np.linspace(0, len(spread) - 1, min(N_RECORDS, len(spread))).round().astype(int)
        found += [spread[place] for place in places]
    return list(dict.fromkeys(excerpt(w, EXCERPT, LEAD) for w in found))


def _mixed(windows: Sequence[Window]) -> list[Window]:
    """The first window of each document; then as many more as are missing from N_RECORDS."""
    first: dict[str, Window] = {}
    for window in windows:
        first.setdefault(window.document, window)
    chosen = list(first.values())
    more = [window for window in windows if window is not first[window.document]]
    return chosen + more[: max(0, N_RECORDS - len(chosen))]


def _neuron(
    number: int,
    windows: Sequence[Window],
    largest: float,
    style: Style,
    removals: Mapping[tuple[int, int], Sequence[tuple[str, float]]],
) -> str:
    if style == "activations":
        text = f"Neuron {number}\nActivations:{records(windows, largest)}"
        acts = [act for window in windows for act in window.acts]
        if sum(level(act, largest) > 0 for act in acts) < SPARSE * len(acts):
            zeros_out = records(windows, largest, omit_zeros=True)
            text += f"\nSame activations, but with all zeros filtered out:{zeros_out}"
    else:
        text = f"Neuron {number}\n"
        for i, window in enumerate(windows, 1):
            places = _strong(window)
            said = ", ".join(
                f'"{shown(window.tokens[p])}": {level(window.acts[p], largest)}' for p in sorted(places)
            )
            text += f"\nText {i}: {highlighted(window.tokens, places)}\nActivations: {said}\n"
    lines = [
        f'In text {i}, without "{shown(token)}" the activation changes by {share:+.0%}.'
        for i, window in enumerate(windows, 1)
        for token, share in removals.get(window.place, ())
    ]
    if lines:
        text += "\nWhat the activation depends on:\n" + "\n".join(lines) + "\n"
    return f"{text}\nExplanation of neuron {number} behavior: {PREFIX}"


def _strong(window: Window) -> set[int]:
    """The places that are marked."""
    least = MARKED_FROM * max(window.acts, default=0.0)
    return {p for p, act in enumerate(window.acts) if act > 0 and act >= least}


def explanation_in(answer: str) -> str | None:
    """The explanation in an answer: its first sentence without the prompt's beginning or full stop; None if empty.

    What a model thinks, and what it says before it begins ("Sure! Here is a summary:"), are no part of it.
    """
    for line in without_thoughts(answer).splitlines():
        said = PREAMBLE.sub("", line.strip().lstrip(MARKS), count=1)
        for sentence in re.split(r"(?<=\w{3}[.!?])\s+(?=[A-Z])", said):
            text = sentence.strip(MARKS)
            if ANNOUNCED.match(text):
                continue
            if text.lower().startswith(PREFIX):
                text = text[len(PREFIX) :]
            text = text.strip(MARKS).removesuffix(".").strip()
            if any(letter.isalnum() for letter in text):
                return text
    return None


def effect_question(promoted: Sequence[str], demoted: Sequence[str]) -> Question:
    """Ask what the output tokens that a latent makes likelier have in common."""
    system = (
        "We're studying parts of a language model. Each makes some output tokens more likely and others less likely. "
        "Summarize in a single sentence what the tokens that it makes more likely have in common."
    )
    more = ", ".join(f'"{shown(token)}"' for token in promoted)
    less = ", ".join(f'"{shown(token)}"' for token in demoted)
    user = f"More likely: {more}\nLess likely: {less}\n\nIt makes more likely"
    return Question((Message("system", system), Message("user", user)), max_tokens=MAX_ANSWER)


def category_question(explanation: str, windows: Sequence[Window]) -> Question:
    """Ask which of CATEGORIES a latent belongs to."""
    listed = "\n".join(f"{i}. {name}" for i, name in enumerate(CATEGORIES, 1))
    chosen = _chosen(windows, deciles=False)[:3]
    texts = "\n\n".join(highlighted(window.tokens, _strong(window)) for window in chosen)
    system = (
        "You sort features of text into categories. Answer with the number of one category and nothing else."
    )
    user = f"Feature: {explanation}\n\nTexts in which it is marked:\n\n{texts}\n\nCategories:\n{listed}\n\nThe number:"
    return Question((Message("system", system), Message("user", user)), max_tokens=6)


def category_in(number: int | None) -> str | None:
    """The category of a number from an answer."""
    return None if number is None else CATEGORIES[number - 1]


def cluster_question(explanations: Sequence[str]) -> Question:
    """Ask what the latents of a cluster have in common."""
    system = "We're studying groups of neurons in a neural network. Summarize in a few words what a group is about."
    listed = "\n".join(f"- {text}" for text in explanations)
    user = f"The neurons of one group look for:\n{listed}\n\nWhat they have in common:"
    return Question((Message("system", system), Message("user", user)), max_tokens=MAX_ANSWER)
