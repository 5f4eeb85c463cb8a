"""What a scorer is given, and what it gives back. Asks nobody.

Every score is corrected for chance: 0 is what guessing gets, 1 is perfect. An answer that cannot be read counts as
what a guess would get on average, so it pulls a score towards 0 and never helps; how many there were stands beside it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sememe.explain.examples import Window, excerpt

__all__ = ["LENGTH", "Asked", "Evidence", "Score", "contrast", "cropped"]

LENGTH = 32
"""Tokens of a window that detection, fuzzing, intruder and embedding show."""


class Score(NamedTuple):
    """How well one explanation does by one scorer."""

    scorer: str
    variant: str
    decile: int | None
    """Of the activations that had to be found; None: of all of them."""
    score: float
    """0 is guessing, 1 is perfect. NaN where it is not defined: see the scorer."""
    n: int
    """Things asked: windows, tokens or texts."""
    n_malformed: int
    """Of these, how many had an answer that could not be read."""
    n_missing: int = 0
    """Excerpts that the scorer asks for and the latent does not have."""


class Evidence(NamedTuple):
    """A latent's examples from the documents on the scoring side, and nothing else about it."""

    latent: int
    windows: tuple[Window, ...]
    density: float
    """Share of the text's tokens on which it is active."""
    seed: int

    @property
    def top(self) -> list[Window]:
        """Its largest activations, one per document, the largest first."""
        return [window for window in self.windows if window.kind == "top"]

    @property
    def active(self) -> list[Window]:
        """Windows from every tenth of its activations."""
        return [window for window in self.windows if window.kind == "decile"]

    @property
    def silent(self) -> list[Window]:
        """Windows in which it is verified silent."""
        return [window for window in self.windows if window.kind == "random"]

    def rng(self, what: str) -> np.random.Generator:
        """Random numbers of this latent, different for every use."""
        return np.random.default_rng([self.seed, self.latent, zlib.crc32(what.encode())])


class Asked(NamedTuple):
    """One thing that a judge had to say yes or no to."""

    positive: bool
    decile: int | None
    said: float
    """1 yes, 0 no, 0.5 if the answer could not be read."""
    malformed: bool


def contrast(scorer: str, variant: str, asked: Sequence[Asked]) -> list[Score]:
    """Hit rate minus false-alarm rate (balanced accuracy, corrected for chance): whole, then by decile.

    Each decile's hits are held against all false alarms. NaN where there is nothing to find or nothing to resist.
    """
    no = [a for a in asked if not a.positive]
    yes = [a for a in asked if a.positive]
    alarms = float(np.mean([a.said for a in no])) if no else math.nan
    out = []
    for decile in (None, *sorted({a.decile for a in yes if a.decile is not None})):
        found = yes if decile is None else [a for a in yes if a.decile == decile]
        score = float(np.mean([a.said for a in found])) - alarms if found else math.nan
        n_bad = sum(a.malformed for a in found) + sum(a.malformed for a in no)
        out.append(Score(scorer, variant, decile, score, len(found) + len(no), n_bad))
    return out


def cropped(window: Window, rng: np.random.Generator, length: int = LENGTH) -> Window:
    """A stretch of at most `length` tokens with the peak anywhere in it, each place as likely as the window allows."""
    return excerpt(window, length, int(rng.integers(0, length)))
