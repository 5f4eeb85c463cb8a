"""The dictionary as it was: copies that are kept beside it, and comparisons by which latents are frozen.

Knows a plan and one member at a time; knows neither the loop nor the data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sememe import artifact
from sememe.train.config import TrainConfig

if TYPE_CHECKING:
    from sememe.train.member import Member

__all__ = ["FOLDER", "compares", "freeze", "keep", "keeps"]

FOLDER = "checkpoints"
"""Where copies are kept, in the dictionary's folder."""
N_COMPARISONS = 10
"""Comparisons in a run, if the config does not say how often."""


def keeps(config: TrainConfig, step: int) -> bool:
    """Whether a copy is kept after so many steps: a power of two, or a multiple of keep_every_tokens passed."""
    if not config.keep_checkpoints:
        return False
    every = config.keep_every_tokens
    return step & (step - 1) == 0 or (every is not None and _passed(config, step, every))


def keep(config: TrainConfig, step: int, folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Keep a copy as `checkpoints/step-000001024/`: a dictionary like any other.

    Args:
        config: Of the dictionary.
        step: Steps done.
        folder: The dictionary's.
        write: Writes its files into a folder, and returns what meta.json shall remember.
    """
    path = folder / FOLDER / f"step-{step:09}"
    path.parent.mkdir(parents=True, exist_ok=True)
    # fresh: a run that was killed and goes on comes by here a second time
    with artifact.building(path, kind="dictionary", version=1, config=config, parents={}, fresh=True) as work:
        work.extra = write(work.path) | {"step": step, "tokens": step * config.batch_size}


def compares(config: TrainConfig, n_steps: int, step: int) -> bool:
    """Whether latents are compared with what they were, after so many steps."""
    if config.freeze_above is None:
        return False
    return _passed(config, step, _rows_between(config, n_steps))


def _rows_between(config: TrainConfig, n_steps: int) -> float:
    return config.freeze_every_tokens or n_steps * config.batch_size / N_COMPARISONS


def _passed(config: TrainConfig, step: int, rows: float) -> bool:
    """Whether the last step reached a multiple of a number of training rows."""
    n = config.batch_size
    return step * n // rows > (step - 1) * n // rows


@torch.no_grad()
def freeze(member: Member) -> None:
    """Freeze latents that fire and whose decoder row is nearly what it was at the last comparison.

    The member is finished once every latent that fired since then is frozen, unless latents are still to be
    pointed anew.

    Source: the authors of Cunningham et al. 2023, who froze features with a self-similarity of 0.9 between two
    mini-runs. Differs: parameters keep every bit, where theirs had their gradients masked.
    """
    config, optimiser = member.config, member.optimiser
    assert config.freeze_above is not None
    with optimiser.exported():
        directions = member.dictionary.decoder_directions().detach()
        units = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if member.compared is not None:
        fires = member.dictionary.tokens_since_fired < _rows_between(config, member.plan.n_steps)
        optimiser.freeze(fires & ((units * member.compared).sum(1) >= config.freeze_above))
        to_come = any(step >= member.step for step in member.plan.resample_steps)
        left = fires & ~optimiser.frozen
        member.finished = not to_come and bool(optimiser.frozen.any() & ~left.any())
    member.compared = units
