"""What is done about latents that no longer fire, once before each step. Knows one member and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sememe.source import Batch
from sememe.train.config import TrainConfig
from sememe.train.schedule import Plan

if TYPE_CHECKING:
    from sememe.train.member import Member

__all__ = ["revive", "rows_wanted"]

N_BATCHES = 8
"""Batches among whose rows the new directions are drawn."""


def rows_wanted(config: TrainConfig, plan: Plan, step: int) -> int:
    """How many of the rows that come next `revive` looks at before a step: known from the plan alone.

    They stay in the stream: what one member does must not change what another is trained on.
    """
    return N_BATCHES * config.batch_size if step > 0 and step in plan.resample_steps else 0


def revive(member: Member, rows: Batch | None) -> None:
    """Do what the member's plan says about silent latents before this step.

    Args:
        member: Between two steps.
        rows: As many rows as it wants (raw units, on its device); None if it wants none.
    """
    if rows is not None:
        resample(member, rows)


@torch.no_grad()
def resample(member: Member, rows: Batch) -> None:
    """Point silent latents at rows drawn in proportion to their squared loss.

    Source: Bricken et al. 2023, appendix "Neuron Resampling". Differs: on 8 batches instead of 819,200 rows.
    """
    dictionary = member.dictionary
    resampling = dictionary.resampling()
    assert resampling is not None
    member.resampled_at = member.step
    ids = torch.nonzero(dictionary.tokens_since_fired > resampling.after_tokens).view(-1)
    if ids.numel() == 0:
        return
    losses, targets = [], []
    n = member.config.batch_size
    for start in range(0, rows.x.shape[0], n):
        part = member.scaled(Batch(rows.x[start : start + n], rows.target[start : start + n]))
        encoded = dictionary.encode(part.x)
        losses.append((part.target - dictionary.decode(encoded, part.x)).square().sum(1))
        targets.append(part.target)
    weights = torch.cat(losses).square().cpu()  # drawn on the CPU, where the member's generator is
    ids = ids[: weights.shape[0]]
    picked = torch.multinomial(weights, ids.shape[0], replacement=False, generator=member.generator)
    centre = getattr(dictionary, "b_dec", 0.0)
    dictionary.reset_latents(ids, torch.cat(targets)[picked.to(ids.device)] - centre)
    member.optimiser.forget(ids)
