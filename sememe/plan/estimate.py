"""What is known of one stage, as numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from sememe.needs import Bytes, Knob
from sememe.plan.machine import Speed
from sememe.recipe import Stage
from sememe.train import TrainConfig, variants

__all__ = ["Estimate", "members_of"]


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
