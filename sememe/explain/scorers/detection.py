"""Detection: which of these windows does the explanation fit? Knows windows and a judge.

Source: EleutherAI's delphi. Differs: documents are disjoint from the explainer's, silent windows are verified, the
score is corrected for chance, an answer that cannot be read counts as a guess, short last questions are asked too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from sememe.explain.examples import Window
from sememe.explain.prompts import flags_in
from sememe.explain.scorers.base import Asked, Evidence, Score, contrast, cropped
from sememe.judge import Judge, Question
from sememe.judge.base import Message

__all__ = ["Shown", "ask_flags", "detection"]

SYSTEM = (
    "You are shown a description of a feature of text and several short texts. Say for each text whether it contains "
    "what is described. Answer with a JSON list of one number per text, 1 if it does and 0 if it does not, and nothing "
    "else."
)
Shown = tuple[str, tuple[tuple[str, int], ...]]
"""A description, and texts with their right answers."""
SHOWN: Shown = (
    "words about rain and snow",
    (
        (" the boats came home before dark and were tied up", 0),
        (" by dawn the rain had stopped and the road was", 1),
        (" of the committee, which met twice in the spring", 0),
        (" fields lay white under the first snow of the", 1),
        (" three of them were sold, and nobody asked why", 0),
    ),
)


async def detection(explanation: str, evidence: Evidence, judge: Judge, *, batch: int = 5) -> list[Score]:
    """Hit rate minus false-alarm rate over windows in which the latent fires and in which it does not.

    Args:
        explanation: Words.
        evidence: The latent's examples on the scoring side.
        judge: Who is asked.
        batch: Windows in one question.
    """
    rng = evidence.rng("detection")
    windows = [cropped(window, rng) for window in (*evidence.active, *evidence.silent)]
    windows = [windows[i] for i in rng.permutation(len(windows))]
    texts = [window.text for window in windows]
    asked = await ask_flags(judge, SYSTEM, explanation, windows, texts, batch, SHOWN)
    return contrast("detection", "windows", asked)


async def ask_flags(
    judge: Judge,
    system: str,
    explanation: str,
    windows: Sequence[Window],
    texts: Sequence[str],
    batch: int,
    shown: Shown,
) -> list[Asked]:
    """Ask yes or no about every text, some in each question; those of kind "random" should get a no."""
    parts = [range(start, min(start + batch, len(texts))) for start in range(0, len(texts), batch)]
    answers = await asyncio.gather(
        *(judge.ask(_question(system, explanation, [texts[i] for i in part], shown)) for part in parts)
    )
    out = []
    for part, answer in zip(parts, answers, strict=True):
        flags = flags_in(answer.text, len(part))
        for place, i in enumerate(part):
            said = 0.5 if flags is None else float(flags[place])
            window = windows[i]
            out.append(Asked(window.kind != "random", window.decile, said, flags is None))
    return out


def _question(system: str, explanation: str, texts: Sequence[str], shown: Shown) -> Question:
    """With one example that was answered before, in the form that is asked for."""
    words, pairs = shown
    messages = (
        Message("system", system),
        Message("user", _asked(words, [text for text, _ in pairs])),
        Message("assistant", json.dumps([answer for _, answer in pairs])),
        Message("user", _asked(explanation, texts)),
    )
    return Question(messages, max_tokens=8 + 4 * len(texts))


def _asked(explanation: str, texts: Sequence[str]) -> str:
    listed = "\n\n".join(f"Text {i}: {text}" for i, text in enumerate(texts, 1))
    return f"Description: {explanation}\n\n{listed}\n\nAnswer with {len(texts)} numbers."
