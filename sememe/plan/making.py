"""What pretraining, planted features, geometry and patching take, in bytes and seconds. Pure arithmetic, as `costs.py`.

Counted from shapes; unlike most of costs.py, none of it was fitted to measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from sememe.lm import Outline
from sememe.needs import BASE, Bytes, Dictionary, train_bytes
from sememe.plan import costs
from sememe.plan.costs import MODEL_START, START, TEXT_SECONDS
from sememe.plan.machine import Speed

__all__ = [
    "Patching",
    "Pretraining",
    "geometry_bytes",
    "geometry_seconds",
    "patch_bytes",
    "patch_seconds",
    "planted_bytes",
    "planted_seconds",
    "pretrain_bytes",
    "pretrain_seconds",
]

BACKWARD = 3.0
"""A step over a forward."""
PLANTED_SECONDS = 1.5e-8
"""Of drawing a row of planted features, per feature."""
MATCHING_SECONDS = 2e-11
"""Of the one-to-one matching of two dictionaries, over the cube of the smaller one's latents."""
LATENT_BYTES = 200
"""On disk, per latent of a geometry."""


class Pretraining(NamedTuple):
    """A training of a language model, as numbers."""

    n_tokens: int
    n_validated: int
    """Tokens of all validations together."""
    micro_tokens: int
    """Tokens of one forward."""
    context_length: int


def pretrain_bytes(lm: Outline, work: Pretraining) -> Bytes:
    """Weights, gradients, two moments; a forward's activations, kept. On disk a checkpoint and rows."""
    weights = 4.0 * lm.n_parameters
    per_token = 4.0 * lm.n_layers * (8 * lm.d_model + 3 * lm.d_inner) + 4.0 * 3 * lm.vocab_size
    held = 4 * weights + work.micro_tokens * per_token
    disk = 4 * weights + 4.0 * (work.n_tokens + work.n_validated)
    return Bytes(BASE + held, disk) if lm.device == "cpu" else Bytes(BASE + 2 * weights, disk, held)


def pretrain_seconds(lm: Outline, speed: Speed, work: Pretraining) -> float:
    """Three forwards a token, one for each that is validated."""
    forward = costs.forward_seconds(lm, speed, 0, lm.n_layers, work.context_length) + costs.head_seconds(
        lm, speed
    )
    forwards = BACKWARD * work.n_tokens + work.n_validated
    return MODEL_START + forwards * forward + work.n_tokens * TEXT_SECONDS


def planted_bytes(sizes: Sequence[Dictionary], batch_size: int, n_features: int) -> Bytes:
    """One dictionary after the other, or side by side; and a batch's codes, held densely."""
    made = train_bytes(sizes, batch_size, 0.0)
    return made._replace(memory=made.memory + 12.0 * batch_size * n_features)


def planted_seconds(
    sizes: Sequence[Dictionary],
    speed: Speed,
    batch_size: int,
    n_steps: int,
    n_features: int,
    *,
    one_stream: bool,
) -> float:
    """Drawing rows and training on them. Args: one_stream: whether all dictionaries read the same batches."""
    n_streams = 1 if one_stream else len(sizes)
    drawn = n_streams * n_steps * batch_size * n_features
    products = 2.0 * drawn * max((size.d_in for size in sizes), default=0)
    starts = START * max(0, n_streams - 1)
    seconds = costs.train_seconds(sizes, speed, batch_size, n_steps) + starts
    return seconds + drawn * PLANTED_SECONDS + products / speed.dense


def geometry_bytes(sizes: Sequence[Dictionary], n_rows: int) -> Bytes:
    """Directions of all, and of the widest the activations of a part of the rows."""
    found = costs.directions_bytes(sizes)
    rows = 4.0 * n_rows * max(size.d_in for size in sizes)
    disk = found.disk + LATENT_BYTES * sum(size.d_sae for size in sizes)
    return found._replace(memory=found.memory + rows, disk=disk)


def geometry_seconds(sizes: Sequence[Dictionary], speed: Speed, n_rows: int) -> float:
    """Every pair's cosines and matching; rows encoded three times, with random directions once more."""
    seconds = costs.directions_seconds(sizes, speed)
    seconds += sum(MATCHING_SECONDS * min(a.d_sae, b.d_sae) ** 3 for a, b in combinations(sizes, 2))
    return seconds + 3 * costs.watch_seconds(sizes, speed, n_rows)


PROMPT_TOKENS = 16
"""Of a sentence in which somebody gives something to somebody."""
ACDC_SHARE = 0.2
"""Of the candidates ACDC begins with, asked about again at each threshold: on SmolLM2 285 forwards in the middle of 48
candidates at 26 thresholds, 107 of 32 at 10."""
SCORED = 22
"""Numbers of patches at which an order is scored, of a thousand candidates or so."""


class Patching(NamedTuple):
    """A patching, as numbers."""

    n_arms: int
    n_pairs: int
    n_orders: int
    acdc_limit: int
    """0 without that order."""
    n_thresholds: int
    fits: tuple[float, ...]
    """Seconds of fitting each baseline that is fitted."""


def patch_bytes(lm: Outline, sizes: Sequence[Dictionary], n_pairs: int) -> Bytes:
    """The model, all dictionaries, both runs of every pair, and what latents change in them.

    Args:
        lm: The model.
        sizes: The dictionaries.
        n_pairs: Pairs of prompts.
    """
    rows = n_pairs * PROMPT_TOKENS
    runs = 2 * 4.0 * rows * lm.d_model * (lm.n_layers + 2) + 4.0 * n_pairs * 6 * lm.vocab_size
    codes = 3 * 4.0 * rows * max(size.d_sae for size in sizes)
    held = sum(size.n_bytes for size in sizes) + runs + codes
    host = BASE + lm.n_bytes
    return (
        Bytes(host + held, 2e6)
        if lm.device == "cpu"
        else Bytes(BASE + 0.2 * lm.n_bytes, 2e6, lm.n_bytes + held)
    )


def patch_seconds(lm: Outline, speed: Speed, work: Patching, n_above: int) -> float:
    """For each arm a forward of every pair, above the hookpoint, for every number of patches and every set ACDC tries.

    Args:
        lm: The model.
        speed: The machine's.
        work: What is asked for.
        n_above: Layers above the hookpoint.
    """
    forward = costs.forward_seconds(lm, speed, lm.n_layers - n_above, lm.n_layers, PROMPT_TOKENS)
    measured = work.n_pairs * (0.5 * PROMPT_TOKENS * forward + costs.head_seconds(lm, speed))
    searched = work.acdc_limit * (1 + ACDC_SHARE * work.n_thresholds)
    n_forwards = work.n_orders * SCORED + searched
    return MODEL_START + sum(work.fits) + work.n_arms * n_forwards * measured
