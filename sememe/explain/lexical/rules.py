"""Every latent's rule, found on one side of the documents and scored on the other, and its nulls.

Knows examples as arrays and numba loops over them; of words only how a rule is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sememe.explain.examples import Examples
from sememe.explain.lexical import loops
from sememe.explain.lexical.classes import CLASSES, NOTHING, POSITIONS, SPECIAL, classes_of
from sememe.explain.lexical.words import Rule, as_json, in_words
from sememe.progress import track

__all__ = ["Lexical", "Measured", "find_rules", "kind_of"]

N_RECENT = 8
N_CONDITIONS = 2
CHUNK = 256
N_DECILES = 10


class Measured(NamedTuple):
    """How well rules tell active tokens from silent ones: an array entry per latent."""

    gain: np.ndarray
    """Hit rate minus false-alarm rate: 2 AUROC - 1. NaN where the held-out documents leave nothing to score on."""
    correlation: np.ndarray
    """Of the rule's yes or no with the activation. NaN as above; 0 for a rule that says the same everywhere."""
    n_on: np.ndarray
    """Active tokens scored on."""


class Lexical(NamedTuple):
    """Rules and their scores: an entry per latent."""

    words: list[str | None]
    rules: list[str | None]
    """As JSON."""
    kinds: list[str]
    train_gain: np.ndarray
    n_train: np.ndarray
    """Active tokens that a rule was found on."""
    found: Measured
    shuffled: Measured
    other: Measured
    deciles: tuple[Measured, ...]
    """`found` with the active windows of one decile alone, the lowest first."""

    @property
    def scored(self) -> np.ndarray:
        """Which latents have a score: those active on both sides."""
        answer: np.ndarray = ~np.isnan(self.found.gain) & (self.n_train > 0)
        return answer


def find_rules(examples: Examples, *, max_tokens: int, min_gain: float, seed: int) -> Lexical:
    """Find every latent's rule and score it, with two nulls: shuffled activations, and another latent's rule.

    Args:
        examples: Of an atlas.
        max_tokens: Most tokens, or pairs, in one rule.
        min_gain: What each part of a rule must add to hit rate minus false-alarm rate.
        seed: Of the shuffled null, and of who is whose other latent.
    """
    own = np.arange(examples.d_sae)
    places = _places(examples)
    rules, train_gain, n_train = _fit(examples, places, max_tokens, min_gain, -1, "explain")
    shuffled_rules, _, _ = _fit(examples, places, max_tokens, min_gain, seed, "explain: shuffled")
    rows = [rules.rule(latent) for latent in range(examples.d_sae)]
    return Lexical(
        words=[in_words(rule, examples.texts) for rule in rows],
        rules=[_json(rule, examples.texts) for rule in rows],
        kinds=[kind_of(rule) for rule in rows],
        train_gain=train_gain,
        n_train=n_train,
        found=_score(examples, places, rules, own),
        shuffled=_score(examples, places, shuffled_rules, own, seed + 1),
        other=_score(
            examples, places, rules, _strangers((n_train > 0) & [not rule.empty for rule in rows], seed)
        ),
        deciles=tuple(_score(examples, places, rules, own, decile=d) for d in range(N_DECILES)),
    )


class _Places(NamedTuple):
    """Positions of the stored contexts, one entry each; classes as the bits of three numbers."""

    ctx: int
    skip: int
    usable: np.ndarray
    current: np.ndarray
    previous: np.ndarray
    classes: np.ndarray


def _places(examples: Examples) -> _Places:
    """Each place's token, the one before it in the same document, and the classes of both and of the last few."""
    ids, docs = examples.context_ids, examples.context_docs
    known = np.array(sorted(examples.raw))
    classes = np.array([classes_of(examples.raw[i]) for i in known.tolist()], np.int64)
    current_bits = classes[np.searchsorted(known, ids)]
    same = np.zeros(ids.shape, bool)
    same[:, 1:] = docs[:, 1:] == docs[:, :-1]
    previous = np.full(ids.shape, -1, np.int32)
    previous[:, 1:] = np.where(same[:, 1:], ids[:, :-1], -1)
    previous_bits = np.full(ids.shape, 1 << NOTHING, np.int64)
    previous_bits[:, 1:] = np.where(same[:, 1:], current_bits[:, :-1], 1 << NOTHING)
    recent_bits = np.zeros(ids.shape, np.int64)
    for back in range(1, N_RECENT + 1):
        near = docs[:, back:] == docs[:, :-back]
        recent_bits[:, back:] |= np.where(near, current_bits[:, :-back], 0)
    usable = docs >= 0
    if examples.drop_special:
        usable &= (current_bits >> SPECIAL & 1) == 0
    for name, end in POSITIONS.items():
        current_bits[:, :end] |= 1 << CLASSES.index(name)  # of the place: those before it have none
    bits = np.stack([current_bits.ravel(), previous_bits.ravel(), recent_bits.ravel()], axis=1)
    return _Places(
        ids.shape[1], examples.skip, usable.ravel(), ids.astype(np.int32).ravel(), previous.ravel(), bits
    )


class _Rules(NamedTuple):
    family: np.ndarray
    items: np.ndarray
    n_items: np.ndarray
    base: np.ndarray
    conditions: np.ndarray

    @classmethod
    def empty(cls, n: int, max_tokens: int) -> _Rules:
        conditions = np.full((n, N_CONDITIONS, 3), -1, np.int64)
        zeros = np.zeros(n, np.int64)
        return cls(
            zeros, np.zeros((n, max_tokens), np.int64), zeros.copy(), np.full(n, -1, np.int64), conditions
        )

    def rule(self, latent: int) -> Rule:
        items = tuple(int(item) for item in self.items[latent, : self.n_items[latent]])
        conditions = tuple(
            (int(w), int(c), bool(n)) for w, c, n in self.conditions[latent].tolist() if w >= 0
        )
        return Rule(int(self.family[latent]), items, int(self.base[latent]), conditions)


def _window_arrays(examples: Examples) -> tuple[Any, ...]:
    """What the loops call a window: contexts, starts, stops, offsets, positions, acts, whether it is silent."""
    return (
        examples.contexts, examples.starts, examples.stops, examples.offsets, examples.positions, examples.acts,
        examples.is_random,
    )  # fmt: skip


def _fit(
    examples: Examples, places: _Places, max_tokens: int, min_gain: float, shuffle_seed: int, name: str
) -> tuple[_Rules, np.ndarray, np.ndarray]:
    """Every latent's rule, its gain on the documents it was found on, and how many active tokens those held."""
    rules = _Rules.empty(examples.d_sae, max_tokens)
    gain, n_on = np.zeros(examples.d_sae), np.zeros(examples.d_sae, np.int64)
    windows = _window_arrays(examples)
    with track(name, examples.d_sae, "latents") as progress:
        for start in range(0, examples.d_sae, CHUNK):
            part = slice(start, min(start + CHUNK, examples.d_sae))
            # Latents of one chunk are seeded by their place in it; the chunk's own number keeps them apart.
            seed = -1 if shuffle_seed < 0 else (shuffle_seed + 104_729 * start) % (1 << 30)
            loops.fit(
                examples.latent_ptr[part.start : part.stop + 1], *windows, examples.side, examples.document,
                *places, max_tokens, min_gain, seed, *(array[part] for array in rules), gain[part], n_on[part],
            )  # fmt: skip
            progress.advance(part.stop - part.start)
    return rules, gain, n_on


def _score(
    examples: Examples,
    places: _Places,
    rules: _Rules,
    rule_of: np.ndarray,
    shuffle_seed: int = -1,
    decile: int | None = None,
) -> Measured:
    gain, correlation = np.full(examples.d_sae, np.nan), np.full(examples.d_sae, np.nan)
    n_on = np.zeros(examples.d_sae, np.int64)
    side = examples.side
    if decile is not None:
        side = np.where(examples.is_random | (examples.decile == decile), side, -1).astype(np.int8)
    loops.score(
        examples.latent_ptr, *_window_arrays(examples), side, *places, shuffle_seed, rule_of, *rules, gain,
        correlation, n_on,
    )  # fmt: skip
    return Measured(gain, correlation, n_on)


def _json(rule: Rule, tokens: Mapping[int, str]) -> str | None:
    data = as_json(rule, tokens)
    return None if data is None else json.dumps(data, ensure_ascii=False)


def _strangers(has_rule: np.ndarray, seed: int) -> np.ndarray:
    """For each latent another one, chosen at random among those with a rule; itself if there is no other."""
    out = np.arange(has_rule.shape[0])
    ids = np.flatnonzero(has_rule)
    rng = np.random.default_rng(seed)
    order = rng.permutation(ids)
    out[order] = np.roll(order, 1)
    if ids.size:
        out[~has_rule] = rng.choice(ids, int((~has_rule).sum()))
    return out


def kind_of(rule: Rule) -> str:
    """What a rule is about: the class it names, else what its tokens are."""
    if rule.base >= 0:
        return CLASSES[rule.base]
    if not rule.items:
        at = [CLASSES[number] in POSITIONS for which, number, _ in rule.conditions if which == 0]
        return "a position" if any(at) else "a context"
    many = "a token" if len(rule.items) == 1 else "several tokens"
    return {1: many, 2: f"{many} before", 3: "a pair of tokens"}[rule.family]
