"""What is known of one stage, and of one dictionary that is still to be trained, as numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from sememe import dictionaries
from sememe.dictionaries import Architecture
from sememe.dictionaries.penalised import Penalised
from sememe.plan.costs import Bytes, Dictionary
from sememe.plan.machine import Speed
from sememe.recipe import Stage
from sememe.train import TrainConfig, variants

__all__ = ["Estimate", "Knob", "members_of", "size_of"]

SETTLES = 0.3
"""Share of a run over which a penalty's l0 is taken to settle, where nothing says it: that of JumpReLU's annealing."""
TYPICAL_L0 = 64
"""Active latents per row where the architecture fixes no number."""


class Knob(NamedTuple):
    """An option that changes what a stage takes."""

    name: str
    value: int
    bytes_at: Callable[[int], Bytes]


class Estimate(NamedTuple):
    """One stage. `needs` and `seconds_at` are None where something is not known; `note` says what."""

    stage: Stage
    done: bool
    needs: Bytes | None
    seconds_at: Callable[[Speed], float] | None
    knobs: tuple[Knob, ...] = ()
    note: str = ""


@functools.lru_cache(maxsize=64)  # asked for by every stage about every one of them
def members_of(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """A config for each dictionary that one train stage makes."""
    return tuple(member.config for member in variants(config)) if config.sweep else (config,)


def size_of(architecture: Architecture, d_in: int, d_out: int) -> Dictionary:
    """A dictionary as numbers."""
    with torch.device("meta"):
        built = dictionaries.build(architecture, d_in, d_out)
    given = (getattr(architecture, name, None) for name in ("k", "target_l0"))
    l0 = next((int(value) for value in given if value), TYPICAL_L0)
    n_parameters = sum(parameter.numel() for parameter in built.parameters())
    size = Dictionary(architecture.kind, d_in, d_out, built.d_sae, n_parameters, min(l0, built.d_sae))
    if not isinstance(built, Penalised):
        return size
    share = getattr(architecture, "l0_anneal", SETTLES)
    return size._replace(start_l0=built.start_l0(), settles=share)
