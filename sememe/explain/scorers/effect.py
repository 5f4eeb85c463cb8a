"""Effect: given words about what a latent writes, which output tokens does it promote? Knows tokens and a judge.

A latent's promoted tokens are split like documents: the explainer sees some, the judge is asked about the others.
Spellings that differ only in case and white space lie on the same side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from sememe.explain.examples import SCORE, side_of
from sememe.explain.prompts import flags_in, shown
from sememe.explain.scorers.base import Asked, Score, contrast
from sememe.judge import Judge, Question
from sememe.judge.base import Message

__all__ = ["effect", "on_side"]

SYSTEM = (
    "You are shown a description of the words that a part of a language model makes more likely, and a list of "
    "tokens (words or pieces of words). Say for each token whether it is one of them. Answer with a JSON list of one "
    "number per token, 1 if it is and 0 if it is not, and nothing else."
)


def on_side(tokens: Sequence[str], side: int, test_fraction: float, seed: int) -> list[str]:
    """Those of a latent's tokens that lie on one side of the split, in their order."""
    return [t for t in tokens if side_of(f"token:{t.strip().casefold()}", test_fraction, seed) == side]


async def effect(
    explanation: str,
    promoted: Sequence[str],
    others: Sequence[str],
    judge: Judge,
    rng: np.random.Generator,
    *,
    test_fraction: float,
    seed: int,
    batch: int = 10,
) -> list[Score]:
    """Hit rate minus false-alarm rate over promoted tokens and as many that other latents promote.

    Args:
        explanation: Words about the effect.
        promoted: The latent's promoted tokens, both sides; only those of the scoring side are asked about.
        others: Tokens promoted by other latents, to choose from; only those of the scoring side are asked about, so
            nothing that an explainer was shown, promoted or demoted.
        judge: Who is asked.
        rng: Of the choice and the order.
        test_fraction: As in the split of the documents.
        seed: As in the split of the documents.
        batch: Tokens in one question.
    """
    yes = on_side(promoted, SCORE, test_fraction, seed)
    own = {token.strip().casefold() for token in promoted}
    candidates = on_side(list(dict.fromkeys(others)), SCORE, test_fraction, seed)
    pool = [t for t in candidates if t.strip().casefold() not in own]
    no = [pool[i] for i in rng.permutation(len(pool))[: len(yes)]]
    chosen = [*((token, True) for token in yes), *((token, False) for token in no)]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    parts = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    answers = await asyncio.gather(
        *(judge.ask(_question(explanation, [token for token, _ in part])) for part in parts)
    )
    asked = []
    for part, answer in zip(parts, answers, strict=True):
        flags = flags_in(answer.text, len(part))
        for place, (_, positive) in enumerate(part):
            asked.append(Asked(positive, None, 0.5 if flags is None else float(flags[place]), flags is None))
    return contrast("effect", "promoted", asked)


def _question(explanation: str, tokens: Sequence[str]) -> Question:
    listed = "\n".join(f"{i}. '{shown(token)}'" for i, token in enumerate(tokens, 1))
    user = f"Description: {explanation}\n\n{listed}\n\nAnswer with {len(tokens)} numbers."
    return Question((Message("system", SYSTEM), Message("user", user)), max_tokens=8 + 4 * len(tokens))
