"""How long a run is, and the learning rate of each of its steps. Knows no data and no optimiser."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from sememe.dictionaries import Trainable
from sememe.errors import ConfigError
from sememe.train.config import TrainConfig, learning_rate

__all__ = ["Plan", "count_steps", "make_plan"]


class Plan(NamedTuple):
    """What follows from the config and the length of the run."""

    n_steps: int
    lr: float
    resample_steps: tuple[int, ...]
    rewarmup_steps: int

    def rate(self, step: int, config: TrainConfig, since_resample: int | None) -> float:
        """The learning rate of a step (counted from 0)."""
        rise = min(1.0, (step + 1) / max(1.0, config.warmup * self.n_steps))
        fall = min(1.0, (self.n_steps - step) / max(1.0, config.decay_share * self.n_steps))
        again = 1.0
        if since_resample is not None and self.rewarmup_steps:
            again = min(1.0, (since_resample + 1) / self.rewarmup_steps)
        return self.lr * min(rise, fall) * again


def count_steps(config: TrainConfig, n_rows: int | None) -> int:
    """Steps of a run over a source of n_rows (None: without an end).

    Raises:
        ConfigError: the source has no end and n_tokens is not given, or n_tokens is less than a batch.
    """
    n_tokens = config.n_tokens
    if n_tokens is None:
        if n_rows is None:
            raise ConfigError(
                "n_tokens must be given for a stream without an end", "nothing", "Pass --n-tokens."
            )
        n_tokens = int((config.epochs or 1.0) * n_rows)
        if config.epochs is not None and n_tokens < config.batch_size:
            raise ConfigError(
                f"epochs must make at least batch_size={config.batch_size} rows of the source's {n_rows:,}",
                f"{config.epochs:g}, which makes {n_tokens:,}",
                "Raise epochs or lower batch_size.",
            )
    elif n_tokens < config.batch_size:
        raise ConfigError(
            f"n_tokens must be at least batch_size={config.batch_size}",
            n_tokens,
            "Raise n_tokens or lower batch_size.",
        )
    return max(1, n_tokens // config.batch_size)


def make_plan(config: TrainConfig, dictionary: Trainable, n_steps: int) -> Plan:
    """The rates and the events of one dictionary's training."""
    resampling = dictionary.resampling()
    at = () if resampling is None else tuple(int(share * n_steps) for share in resampling.at)
    rewarmup_steps = resampling.rewarmup_steps if resampling else 0
    if at:  # the rate is back before it would start over, and before the run ends
        moments = sorted({*at, n_steps})
        gaps = [after - before for before, after in itertools.pairwise(moments)]
        rewarmup_steps = min([rewarmup_steps, *gaps])
    return Plan(n_steps, learning_rate(config, dictionary.d_sae), at, rewarmup_steps)
