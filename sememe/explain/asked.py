"""A judge is asked about latents, one after the other and many at a time: explanations, effects, categories, scores.

Knows examples, prompts and scorers; writes nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sememe.explain.config import ExplainConfig, LexicalConfig, Scorer
from sememe.explain.examples import EXPLAIN, SCORE, Examples
from sememe.explain.explainers import (
    CATEGORIES,
    category_in,
    category_question,
    cluster_question,
    effect_question,
    explanation_in,
    explanation_question,
)
from sememe.explain.prompts import number_in
from sememe.explain.scorers import (
    Encode,
    Evidence,
    Score,
    detection,
    effect,
    embedding,
    fuzzing,
    intruder,
    on_side,
    simulation,
    write_texts,
)
from sememe.explain.scorers.generation import N_TEXTS
from sememe.judge import Judge, run_each

__all__ = ["MALFORMED", "VARIANTS", "Facts", "Found", "ask_about", "ask_clusters", "guessing"]

MALFORMED = "malformed"
"""The category of a latent for which the judge named none."""
VARIANTS: dict[Scorer, tuple[str, ...]] = {
    "simulation": (
        "top_only", "random_only", "top_and_random", "random_only_activating", "top_and_random_activating",
    ),
    "detection": ("windows",),
    "fuzzing": ("highlights",),
    "intruder": ("marked",),
    "embedding": ("cosine",),
    "generation": ("auroc", "activation"),
    "effect": ("promoted",),
}  # fmt: skip
"""What each scorer's scores are called."""
BY_DECILE: frozenset[Scorer] = frozenset({"detection", "fuzzing", "embedding"})
"""Scorers that give scores by decile too."""


class Facts(NamedTuple):
    """What is known of the latents that are asked about."""

    examples: Examples
    density: Mapping[int, float]
    promoted: Mapping[int, Sequence[str]]
    """Output tokens that each makes likelier, the strongest first."""
    demoted: Mapping[int, Sequence[str]]
    others: Sequence[str]
    """Output tokens that any latent of the atlas makes likelier."""
    rules: Mapping[int, str]
    """Each latent's rule in words."""
    removals: Mapping[int, Mapping[tuple[int, int], Sequence[tuple[str, float]]]] = {}
    """Of each latent's examples by place: context tokens, and by what share the activation changes without each."""


class Found(NamedTuple):
    """What was found out about one latent."""

    latent: int
    explanation: str | None = None
    """None: the judge gave none that can be read."""
    effect: str | None = None
    category: str | None = None
    scores: tuple[Score, ...] = ()
    texts: tuple[str, ...] = ()
    """Written for it, for the scorer `generation`."""


def guessing(scorer: Scorer, evidence: Evidence) -> list[Score]:
    """The scores of an explanation that could not be read: those of a guess, counted as malformed.

    Where a scorer gives scores by decile, there is a guess for each decile that the evidence has.
    """
    deciles: list[int | None] = [None]
    if scorer in BY_DECILE:
        deciles += sorted({window.decile for window in evidence.active if window.decile is not None})
    return [Score(scorer, variant, decile, 0.0, 1, 1) for variant in VARIANTS[scorer] for decile in deciles]


def ask_about(
    latents: Sequence[int], facts: Facts, config: ExplainConfig, judge: Judge | None, encode: Encode | None
) -> list[Found]:
    """Explain and score some latents.

    Args:
        latents: Which.
        facts: About them.
        config: Who explains, and which scorers.
        judge: Asked if the explainer is a model.
        encode: Needed by the scorer `embedding`.
    Raises:
        JudgeError: the judge cannot be reached, refuses, or costs too much.
    """
    if judge is None:
        assert isinstance(config.explainer, LexicalConfig)
        return [_by_rule(latent, facts, config, encode) for latent in latents]

    async def one(latent: int) -> Found:
        return await _one(latent, facts, config, judge, encode)

    return run_each(judge, one, latents, description=f"explain: {judge.name}", unit="latents", in_flight=32)


def _evidence(latent: int, facts: Facts, seed: int) -> Evidence:
    windows = tuple(facts.examples.windows(latent, SCORE))
    return Evidence(latent, windows, facts.density[latent], seed)


def _by_rule(latent: int, facts: Facts, config: ExplainConfig, encode: Encode | None) -> Found:
    """The rule's words, scored without asking anybody."""
    words = facts.rules.get(latent)
    scores: list[Score] = []
    if "embedding" in config.used_scorers:
        assert encode is not None
        evidence = _evidence(latent, facts, config.seed)
        scores = guessing("embedding", evidence) if words is None else embedding(words, evidence, encode)
    return Found(latent, scores=tuple(scores))


async def _one(
    latent: int, facts: Facts, config: ExplainConfig, judge: Judge, encode: Encode | None
) -> Found:
    shown = facts.examples.windows(latent, EXPLAIN)
    question = explanation_question(
        shown,
        style=config.style,
        deciles=config.show_deciles,
        removals=facts.removals.get(latent),
        temperature=config.temperature,
        seed=config.seed,
    )
    words = explanation_in((await judge.ask(question)).text)
    evidence = _evidence(latent, facts, config.seed)
    category, about_effect, texts = None, None, []
    if config.categories:
        answer = MALFORMED
        if words is not None:
            said = number_in((await judge.ask(category_question(words, shown))).text, len(CATEGORIES))
            answer = category_in(said) or MALFORMED
        category = answer
    scores: list[Score] = []
    for scorer in config.used_scorers:
        if scorer == "intruder":
            scores += await intruder(evidence, judge)
        elif scorer == "effect":
            about_effect, found = await _effect(latent, facts, config, judge)
            scores += found
        elif words is None:
            scores += guessing(scorer, evidence)
        elif scorer == "generation":
            texts = await write_texts(words, judge, n=N_TEXTS)
        elif scorer == "embedding":
            assert encode is not None
            # The encoder computes; on a thread of its own it does not hold up the answers of the others.
            scores += await asyncio.to_thread(embedding, words, evidence, encode)
        else:
            asks = {"simulation": simulation, "detection": detection, "fuzzing": fuzzing}[scorer]
            scores += await asks(words, evidence, judge)
    return Found(latent, words, about_effect, category, tuple(scores), tuple(texts))


async def _effect(
    latent: int, facts: Facts, config: ExplainConfig, judge: Judge
) -> tuple[str | None, list[Score]]:
    promoted = facts.promoted.get(latent, ())
    split = (config.test_fraction, config.seed)
    shown = on_side(promoted, EXPLAIN, *split)
    if not shown or len(shown) == len(promoted):
        return None, [Score("effect", "promoted", None, math.nan, 0, 0)]
    about = Evidence(latent, (), 0.0, config.seed)
    question = effect_question(shown, on_side(facts.demoted.get(latent, ()), EXPLAIN, *split))
    words = explanation_in((await judge.ask(question)).text)
    if words is None:
        return None, guessing("effect", about)
    rng = about.rng("effect")
    found = await effect(
        words, promoted, facts.others, judge, rng, test_fraction=config.test_fraction, seed=config.seed
    )
    return words, found


def ask_clusters(members: Mapping[int, Sequence[str]], judge: Judge) -> dict[int, str | None]:
    """What each cluster is about, from the explanations of its members; None where the answer could not be read."""

    async def one(cluster: int) -> str | None:
        return explanation_in((await judge.ask(cluster_question(members[cluster]))).text)

    clusters = sorted(members)
    said = run_each(judge, one, clusters, description="explain: clusters", unit="clusters")
    return dict(zip(clusters, said, strict=True))
