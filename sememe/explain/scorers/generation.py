"""Generation: do texts that a judge writes from the explanation make the latent fire? Knows texts and activations.

Who asks runs the texts through the model and the dictionary between the two functions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sememe.explain.prompts import without_thoughts
from sememe.explain.scorers.base import Score
from sememe.explain.scorers.embedding import auroc
from sememe.judge import Judge, Question
from sememe.judge.base import Message

__all__ = ["N_TEXTS", "contrasted", "generation", "texts_in", "write_texts"]

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
    answer = without_thoughts(answer)
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

    `auroc` is 2 AUROC - 1 of its largest activation in each text. `activation` is the mean of that activation in its
    own texts minus that in the other's, as a share of its largest activation in the atlas. A text that was asked for
    and not written counts as what a guess would get: as one of the other's, so it ties with them and adds nothing. The
    other's that were not written are no answer about this latent, and leave both scores as they are.

    NaN where there are own texts and none of another latent to hold them against.

    Args:
        own: Its largest absolute activation in each of the texts written for it.
        other: The same in texts written for another latent; see `contrasted`.
        largest: Its largest activation in the atlas.
        n: Texts that were asked for.
    """
    ordered = share = 0.0
    if own.size and not other.size:
        ordered = share = math.nan
    elif own.size:
        ordered = (2 * auroc(own, other) - 1) * own.size / n
        share = (float(own.mean()) - float(other.mean())) / largest * own.size / n if largest > 0 else 0.0
    return [
        Score("generation", variant, None, score, n, n - own.size)
        for variant, score in (("auroc", ordered), ("activation", share))
    ]


def contrasted(n_texts: Sequence[int], i: int) -> int | None:
    """Whose texts those of the i-th latent are held against: the nearest before it that has any, the last before the
    first; None where no other has."""
    return next(
        (j % len(n_texts) for j in range(i - 1, i - len(n_texts), -1) if n_texts[j % len(n_texts)]), None
    )
