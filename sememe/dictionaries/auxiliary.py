"""Auxiliary losses that give dead latents a gradient: AuxK and ghost gradients. Know no selection rule, no penalty.

Dense over the dead subset only; where that is large, over some rows at a time, which are computed again for the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.linear import Linear
from sememe.recompute import recomputed

__all__ = ["auxk_loss", "auxk_loss_of", "ghost_loss"]

LARGE = 2**20
"""Pre-activations of dead latents from which on products are taken in bfloat16, where that is native."""

GROUP_ENTRIES = 2**24
"""Pre-activations of dead latents held at a time: 64 MB in float32."""


def auxk_loss(
    dictionary: Linear,
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    dead: Int[Tensor, " n_dead"],
    k: int | None,
    *,
    signed: bool = False,
) -> Float[Tensor, ""]:
    """How badly the strongest dead latents reconstruct what the live ones leave over, in [0, 1] or so.

    Args:
        dictionary: Whose encoder and decoder.
        x: Inputs.
        residual: What the live latents left over; detached here.
        dead: Ids of the dead latents, at least one.
        k: Dead latents used per row; d_in / 2 if not given.
        signed: Strongest by absolute value, and activations keep their signs.

    Source: Gao et al. 2024, arXiv:2406.04093, appendix A.2. Differs: divided by the residual's mean square, so
    that its weight does not depend on the scale; where there is much to multiply, products are in bfloat16.
    """
    reads, W_dec = dictionary.pre_acts_of(dead), dictionary.W_dec.index_select(0, dead)
    return auxk_loss_of(reads, W_dec, x, residual, k or max(dictionary.d_in // 2, 1), signed=signed)


def auxk_loss_of(
    reads: Callable[[Tensor], Tensor],
    W_dec: Float[Tensor, "n_dead d_out"],
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    k: int,
    *,
    signed: bool = False,
) -> Float[Tensor, ""]:
    """As `auxk_loss`, given the dead latents themselves.

    Args:
        reads: Gives their pre-activations, as a new tensor.
        W_dec: Their decoder rows.
        x: Inputs.
        residual: What the live latents left over; detached here.
        k: Dead latents used per row, at most.
        signed: Strongest by absolute value.
    """
    residual, n_dead = residual.detach(), W_dec.shape[0]
    k = min(k, n_dead)
    fast = kernels.native_bfloat16(x) and x.shape[0] * n_dead >= LARGE

    def squared_error(x: Tensor, residual: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=fast):
            pre_acts = reads(x)
            recon = pre_acts.mul_(kernels.largest(pre_acts, k, signed=signed)) @ W_dec
        error: Tensor = (residual - recon).square().sum()
        return error

    error = _over_rows(squared_error, x, residual, n_dead) / residual.numel()
    return error / residual.square().mean().clamp_min(1e-12)


def ghost_loss(
    dictionary: Linear,
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    dead: Int[Tensor, " n_dead"],
) -> Float[Tensor, ""]:
    """The mean squared error once more: as what dead latents, made active by an exponential, leave of the residual.

    Their output `exp(pre_acts) W_dec` is scaled row by row to half the residual's norm, and the loss to the mean
    squared error; both factors are constants, so that the value says nothing and the gradient is what counts.

    Args:
        dictionary: Whose encoder and decoder.
        x: Inputs.
        residual: What the live latents left over; detached here.
        dead: Ids of the dead latents, at least one.

    Source: Jermyn & Templeton 2024 (Anthropic's Circuits Updates, January 2024, "Ghost Grads"). Differs: each
    row's largest exponent is subtracted first, which the row's factor undoes exactly and which cannot overflow.
    """
    residual = residual.detach()
    reads, W_dec = dictionary.pre_acts_of(dead), dictionary.W_dec[dead]

    def squared_error(x: Tensor, residual: Tensor) -> Tensor:
        pre_acts = reads(x)
        largest = pre_acts.detach().amax(dim=1, keepdim=True)
        output = pre_acts.sub_(largest).exp_() @ W_dec
        norms = output.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
        output = output * (residual.norm(dim=1, keepdim=True) / (2 * norms))
        error: Tensor = (residual - output).square().sum()
        return error

    error = _over_rows(squared_error, x, residual, dead.numel()) / residual.numel()
    scaled: Tensor = error * (residual.square().mean() / error.detach().clamp_min(1e-30))
    return scaled


def _over_rows(
    part: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    n_dead: int,
) -> Float[Tensor, ""]:
    """The sum of a function over groups of rows; with several, each is computed again for its gradient."""
    n_rows = max(1, GROUP_ENTRIES // n_dead)
    if n_rows >= x.shape[0]:
        return part(x, residual)
    sums = [
        recomputed(part, *group)
        for group in zip(torch.split(x, n_rows), torch.split(residual, n_rows), strict=True)
    ]
    return torch.stack(sums).sum()
