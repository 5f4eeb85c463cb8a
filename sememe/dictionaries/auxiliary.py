"""AuxK: how dead latents get a gradient in architectures without a penalty. Knows no selection rule."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.dictionaries.linear import Linear

__all__ = ["auxk_loss"]


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

    Dense over the dead subset only.

    Args:
        dictionary: Whose encoder and decoder.
        x: Inputs.
        residual: What the live latents left over; detached here.
        dead: Ids of the dead latents, at least one.
        k: Dead latents used per row; d_in / 2 if not given.
        signed: Strongest by absolute value, and activations keep their signs.

    Source: Gao et al. 2024, arXiv:2406.04093, appendix A.2. Differs: divided by the residual's mean square, so
    that its weight does not depend on the scale.
    """
    residual = residual.detach()
    k = min(k or max(dictionary.d_in // 2, 1), dead.numel())
    pre_acts = dictionary.pre_acts(x, dead)
    strength = pre_acts.detach().abs() if signed else pre_acts.detach()
    columns = strength.topk(k, dim=1, sorted=False).indices
    values = pre_acts.gather(1, columns)
    sparse = torch.zeros_like(pre_acts).scatter(1, columns, values if signed else torch.relu(values))
    recon = sparse @ dictionary.W_dec[dead]
    return (residual - recon).square().mean() / residual.square().mean().clamp_min(1e-12)
