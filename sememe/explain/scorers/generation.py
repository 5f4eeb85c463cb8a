"""Generation: do texts that a judge writes from the explanation make the latent fire? Knows texts and activations.

Who asks runs the texts through the model and the dictionary between the two functions.
"""

from __future__ import annotations

import json
import re

import numpy as np
from jaxtyping import Float

from sememe.explain.scorers.base import Score
from sememe.explain.scorers.embedding import auroc
from sememe.judge import Judge, Question
from sememe.judge.base import Message

__all__ = ["N_TEXTS", "generation", "texts_in", "write_texts"]

N_TEXTS = 5
"""Texts written for each latent."""

SYSTEM = (
    "You write short, varied texts as they occur in books, articles, letters and code. Each must clearly contain what "
    "is described. Answer with a JSON list of strings and nothing else."
)


async def write_texts(explanation: str, judge: Judge, *, n: int = N_TEXTS) -> list[str]:
    """At most n texts that should make a latent fire; fewer if the answer holds fewer."""
    user = f"Description: {explanation}\n\nWrite {n} texts of one or two sentences each."
    messages = (Message("system", SYSTEM), Message("user", user))
    answer = await judge.ask(Question(messages, max_tokens=80 * n))
    return texts_in(answer.text, n)


def texts_in(answer: str, n: int) -> list[str]:
    """The first n texts of an answer: a JSON list of strings, or one text to each numbered or dashed line."""
    start, stop = answer.find("["), answer.rfind("]")
    if 0 <= start < stop:
        try:
            found = json.loads(answer[start : stop + 1])
        except ValueError:
            found = None
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return [item for item in found if item.strip()][:n]
    lines = re.findall(r"^\s*(?:\d+[.)]|[-*])\s+(.+?)\s*$", answer, re.MULTILINE)
    return [line for line in lines if line][:n]


def generation(
    own: Float[np.ndarray, " n"], other: Float[np.ndarray, " m"], largest: float, *, n: int = N_TEXTS
) -> list[Score]:
    """How much more the latent fires in the texts written for it than in those written for another latent.

    `auroc` is 2 AUROC - 1 of its largest activation in each text; a text that was asked for and not written counts
    as a tie with every other. `activation` is the mean of that activation in its own texts minus that in the other's,
    as a share of its largest activation in the atlas; unwritten texts count as silent.

    Args:
        own: Its largest absolute activation in each of the texts written for it.
        other: The same in texts written for another latent.
        largest: Its largest activation in the atlas.
        n: Texts that were asked for.
    """
    missing, missing_other = n - own.size, n - other.size
    score = 0.0
    if own.size and other.size:
        score = (2 * auroc(own, other) - 1) * (own.size / n) * (other.size / n)
    n_bad = missing + missing_other
    share = (float(own.sum()) - float(other.sum())) / (n * largest) if largest > 0 else 0.0
    return [
        Score("generation", "auroc", None, score, 2 * n, n_bad),
        Score("generation", "activation", None, share, 2 * n, n_bad),
    ]
