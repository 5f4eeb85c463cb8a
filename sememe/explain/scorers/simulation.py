"""Simulation: what would a neuron with this explanation do at each token? OpenAI's protocol on local log-probabilities.

Knows windows and a judge. Source: Bills et al. 2023, "Language models can explain neurons in language models". All
positions of an excerpt stand in one prompt with "unknown" for their activation; at each, the model's distribution over
0 to 10, renormalised over what is known of it, gives an expected value; the score is the Pearson correlation of these
with the activations over the excerpts' concatenated tokens. Differs: line breaks and tabs inside tokens are written
out; the few examples in the prompt are our own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sememe.explain.examples import Window, excerpt
from sememe.explain.prompts import MAX_LEVEL, shown
from sememe.explain.scorers.base import Evidence, Score
from sememe.judge import Judge, SlotQuestion

__all__ = ["CHOICES", "EXCERPT", "N_EXCERPTS", "expected_level", "prompt", "simulation"]

CHOICES = tuple(str(i) for i in range(MAX_LEVEL + 1))
UNKNOWN = "unknown"
EXCERPT, LEAD = 64, 40
"""Most tokens of an excerpt, and most of them before the peak."""
N_EXCERPTS = 5
"""Top excerpts, and as many random ones."""

HEAD = """We're studying neurons in a neural network.
Each neuron looks for some particular thing in a short document.
Look at summary of what the neuron does, and try to predict how it will fire on each token.

The activation format is token<tab>activation, activations go from 0 to 10, "unknown" indicates an unknown \
activation. Most activations will be 0.
"""
FEW: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = (
    (
        "numbers, in digits or in words",
        (
            ("They", 0),
            (" sold", 0),
            (" 12", 10),
            (" boats", 0),
            (" and", 0),
            (" seven", 8),
            (" oars", 0),
            (".", 0),
        ),
    ),
    (
        "opening brackets, and words inside brackets",
        (
            ("The", 0),
            (" river", 0),
            (" (", 10),
            ("which", 6),
            (" floods", 5),
            (")", 2),
            (" is", 0),
            (" wide", 0),
        ),
    ),
)


async def simulation(explanation: str, evidence: Evidence, judge: Judge) -> list[Score]:
    """Pearson correlation over concatenated tokens, in five named variants.

    `top_only`: the latent's strongest excerpts, one per document. `random_only`: as many drawn from the text whether
    it fires in them or not, as OpenAI does; `top_and_random`: both. `random_only_activating` and
    `top_and_random_activating`: the same with random excerpts in which it fires, as Cunningham et al. 2023 do.

    A latent with fewer such excerpts than asked for is scored on those it has; how many are missing stands beside.

    A place whose distribution names none of the numbers counts as 0, malformed. Predictions that are all equal
    correlate 0; NaN where the activations themselves are all equal, as in random excerpts without any.
    """
    top = _apart(evidence.top, N_EXCERPTS, set())
    used = {window.document for window in top}
    random = _unfiltered(evidence, used)
    activating = _activating(evidence, used, "activating", N_EXCERPTS)
    windows = list(dict.fromkeys([*top, *random, *activating]))
    found = dict(
        zip(windows, await asyncio.gather(*(_simulate(explanation, w, judge) for w in windows)), strict=True)
    )
    sets = {
        "top_only": top,
        "random_only": random,
        "top_and_random": [*top, *random],
        "random_only_activating": activating,
        "top_and_random_activating": [*top, *activating],
    }
    out = []
    for variant, chosen in sets.items():
        truth = np.array([act for window in chosen for act in excerpt(window, EXCERPT, LEAD).acts])
        said = [value for window in chosen for value in found[window]]
        guess = np.array([0.0 if value is None else value for value in said])
        n_bad = sum(value is None for value in said)
        wanted = 2 * N_EXCERPTS if variant.startswith("top_and") else N_EXCERPTS
        n_missing = wanted - len(chosen)
        out.append(
            Score("simulation", variant, None, _correlation(guess, truth), len(said), n_bad, n_missing)
        )
    return out


def prompt(explanation: str, tokens: Sequence[str]) -> SlotQuestion:
    """The question: some neurons with their activations, then this one with unknown ones."""
    parts = [HEAD]
    for number, (words, pairs) in enumerate(FEW, 1):
        lines = "".join(f"{token}\t{value}\n" for token, value in pairs)
        parts.append(_about(number, words) + f"\nActivations: \n<start>\n{lines}<end>\n")
    parts.append(_about(len(FEW) + 1, explanation.strip()) + "\nActivations: \n<start>\n")
    text, slots = "".join(parts), []
    for token in tokens:
        text += f"{shown(token)}\t"
        slots.append(len(text))
        text += f"{UNKNOWN}\n"
    return SlotQuestion(text + "<end>\n", tuple(slots), CHOICES)


def expected_level(log_probs: Mapping[str, float]) -> float | None:
    """Expected value over 0 to 10 from what is known of a distribution, renormalised; None if nothing is.

    Raises:
        AssertionError: a log-probability is NaN.
    """
    known = {
        int(choice): value for choice, value in log_probs.items() if choice in CHOICES and value > -math.inf
    }
    if not known:
        return None
    largest = max(known.values())
    weights = {number: math.exp(value - largest) for number, value in known.items()}
    total = sum(weights.values())
    assert not math.isnan(total)
    return sum(number * weight for number, weight in weights.items()) / total


def _about(number: int, words: str) -> str:
    head = f"\n\nNeuron {number}\nExplanation of neuron {number} behavior:"
    return f"{head} the main thing this neuron does is find {words}"


async def _simulate(explanation: str, window: Window, judge: Judge) -> list[float | None]:
    piece = excerpt(window, EXCERPT, LEAD)
    answer = await judge.slots(prompt(explanation, piece.tokens))
    found = [expected_level(log_probs) for log_probs in answer.log_probs]
    assert len(found) == len(piece.tokens)
    return found


def _apart(windows: Sequence[Window], n: int, used: set[str]) -> list[Window]:
    """The first n from documents that differ from each other and from those used."""
    out: list[Window] = []
    taken = set(used)
    for window in windows:
        if len(out) < n and window.document not in taken:
            out.append(window)
            taken.add(window.document)
    return out


def _activating(evidence: Evidence, used: set[str], what: str, n: int) -> list[Window]:
    """Random excerpts among those in which the latent fires.

    Windows of deciles come from a uniform sample of activations, so one in which the latent fires m times is m times
    as likely to be there; drawing by 1 / m undoes that.
    """
    windows = evidence.active
    if not windows:
        return []
    weights = np.array([1 / max(excerpt(window, EXCERPT, LEAD).n_active, 1) for window in windows])
    # Exponential races: the order of a weighted draw without replacement.
    order = np.argsort(evidence.rng(what).exponential(size=len(windows)) / weights)
    return _apart([windows[i] for i in order], n, used)


def _unfiltered(evidence: Evidence, used: set[str]) -> list[Window]:
    """Excerpts as a blind draw gives them: each is one that fires with the probability that one of the text does.

    That probability is tokens x density / mean number of active tokens in an excerpt that has any. The atlas keeps
    excerpts that fire and excerpts that do not; the draw between the two is made here.
    """
    rng = evidence.rng("unfiltered")
    windows = evidence.active
    counts = np.array([max(excerpt(window, EXCERPT, LEAD).n_active, 1) for window in windows], float)
    # Of excerpts that fire, each once: the harmonic mean of counts that are there in proportion to themselves.
    mean_count = counts.size / np.sum(1 / counts) if counts.size else 1.0
    share = min(1.0, EXCERPT * evidence.density / mean_count)
    n_firing = int(rng.binomial(N_EXCERPTS, share))
    firing = _activating(evidence, used, "unfiltered: firing", n_firing)
    silent = evidence.silent
    order = [silent[i] for i in rng.permutation(len(silent))]
    return [*firing, *_apart(order, N_EXCERPTS - n_firing, used | {window.document for window in firing})]


def _correlation(guess: np.ndarray, truth: np.ndarray) -> float:
    if truth.size == 0 or np.all(truth == truth[0]):
        return math.nan
    if np.all(guess == guess[0]):
        return 0.0
    return float(np.corrcoef(guess, truth)[0, 1])
