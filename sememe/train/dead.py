"""What is done about latents that no longer fire, once before each step. Knows one member and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sememe.source import Source

if TYPE_CHECKING:
    from sememe.train.member import Member

__all__ = ["revive"]

N_BATCHES = 8
"""Batches among whose rows the new directions are drawn."""


def revive(member: Member, source: Source) -> None:
    """Resample the member's silent latents if its plan says so for this step."""
    if member.step in member.plan.resample_steps and member.step > 0 and member.resampled_at != member.step:
        resample(member, source)


@torch.no_grad()
def resample(member: Member, source: Source) -> None:
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
    rows, losses = [], []
    for _ in range(N_BATCHES):
        x, target = member.scaled(source.next_batch(member.config.batch_size))
        encoded = dictionary.encode(x)
        losses.append((target - dictionary.decode(encoded, x)).square().sum(1))
        rows.append(target)
    weights = torch.cat(losses).square()
    ids = ids[: weights.shape[0]]
    picked = torch.multinomial(weights, ids.shape[0], replacement=False, generator=member.generator)
    centre = getattr(dictionary, "b_dec", 0.0)
    dictionary.reset_latents(ids, torch.cat(rows)[picked] - centre)
    member.optimiser.forget(ids)
