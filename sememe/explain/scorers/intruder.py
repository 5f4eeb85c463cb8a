"""Intruder: which of these texts does not belong? No explanation is shown, so it scores the latent, not the words.

Knows windows and a judge. Source: Chang et al. 2009 for topic models; delphi for latents. Differs: as `fuzzing`, the
intruder's marks are those of one of the others, moved.
"""

from __future__ import annotations

import asyncio
import math

from sememe.explain.prompts import highlighted, number_in
from sememe.explain.scorers.base import Evidence, Score
from sememe.explain.scorers.fuzzing import marked
from sememe.judge import Judge, Question
from sememe.judge.base import Message

__all__ = ["N_TEXTS", "intruder"]

N_TEXTS = 5
"""Texts in one question, the intruder among them."""

SYSTEM = (
    "You are shown numbered short texts in which some words are marked <<like this>>. In all texts but one the marked "
    "words share something. Find the text that does not belong. Answer with its number and nothing else."
)


async def intruder(evidence: Evidence, judge: Judge) -> list[Score]:
    """(share right - 1 / n) / (1 - 1 / n), n being the texts in a question; one question per silent window.

    NaN where there are fewer than two active windows or no silent one that fits.
    """
    rng = evidence.rng("intruder")
    windows = marked(evidence, rng)
    members = [item for item in windows if item[0].kind != "random"]
    strangers = [item for item in windows if item[0].kind == "random"]
    n_members = min(N_TEXTS - 1, len(members))
    if n_members < 2 or not strangers:
        return [Score("intruder", "marked", None, math.nan, 0, 0)]
    questions, truths = [], []
    for stranger in strangers:
        texts = [members[i] for i in rng.choice(len(members), n_members, replace=False)]
        place = int(rng.integers(n_members + 1))
        texts.insert(place, stranger)
        listed = "\n\n".join(
            f"{i}. {highlighted(w.tokens, places)}" for i, (w, places) in enumerate(texts, 1)
        )
        messages = (Message("system", SYSTEM), Message("user", f"{listed}\n\nThe number of the text:"))
        questions.append(Question(messages, max_tokens=8))
        truths.append(place + 1)
    answers = await asyncio.gather(*(judge.ask(question) for question in questions))
    chance = 1 / (n_members + 1)
    said = [number_in(answer.text, n_members + 1) for answer in answers]
    right = [chance if s is None else float(s == truth) for s, truth in zip(said, truths, strict=True)]
    score = (sum(right) / len(right) - chance) / (1 - chance)
    return [Score("intruder", "marked", None, score, len(right), sum(s is None for s in said))]
