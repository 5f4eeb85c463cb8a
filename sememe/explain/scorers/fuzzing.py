"""Fuzzing: are these words of the text highlighted rightly? Knows windows and a judge.

Source: EleutherAI's delphi. Differs: each wrong highlighting is a right one's, moved onto a silent window of the same
length, so that neither places nor number of the marks tell which is which (delphi always marks one place).
"""

from __future__ import annotations

import numpy as np

from sememe.explain.examples import Window
from sememe.explain.prompts import highlighted
from sememe.explain.scorers.base import LENGTH, Evidence, Score, contrast, cropped
from sememe.explain.scorers.detection import Shown, ask_flags
from sememe.judge import Judge

__all__ = ["fuzzing", "marked"]

SYSTEM = (
    "You are shown a description of a feature of text and several short texts in which some words are marked "
    "<<like this>>. Say for each text whether the marked words are what is described. Answer with a JSON list of one "
    "number per text, 1 if they are and 0 if they are not, and nothing else."
)
SHOWN: Shown = (
    "words about rain and snow",
    (
        (" the boats came home before dark<< and>> were tied up", 0),
        (" by dawn the<< rain>> had stopped and the road was", 1),
        (" of the<< committee>>, which met twice in the spring", 0),
        (" fields lay white under the first<< snow>> of the", 1),
        (" three of them were<< sold>>, and nobody asked why", 0),
    ),
)


async def fuzzing(explanation: str, evidence: Evidence, judge: Judge, *, batch: int = 5) -> list[Score]:
    """Hit rate minus false-alarm rate over windows with right and with wrong highlights; arguments as `detection`."""
    rng = evidence.rng("fuzzing")
    chosen = marked(evidence, rng)
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    windows = [window for window, _ in chosen]
    texts = [highlighted(window.tokens, places) for window, places in chosen]
    asked = await ask_flags(judge, SYSTEM, explanation, windows, texts, batch, SHOWN)
    return contrast("fuzzing", "highlights", asked)


def marked(evidence: Evidence, rng: np.random.Generator) -> list[tuple[Window, frozenset[int]]]:
    """Windows with places to mark: active ones with their active tokens, silent ones with an active one's places.

    A silent window is cut as long as the active one whose places it takes. One that is too short for all is left out.
    """
    right = []
    for window in evidence.active:
        piece = cropped(window, rng)
        right.append((piece, frozenset(i for i, act in enumerate(piece.acts) if act > 0)))
    wrong = []
    for window in evidence.silent:
        donors = [(piece, places) for piece, places in right if len(piece.tokens) <= len(window.tokens)]
        if donors:
            piece, places = donors[int(rng.integers(len(donors)))]
            wrong.append((cropped(window, rng, min(len(piece.tokens), LENGTH)), places))
    return [*right, *wrong]
