"""The truth: every kernel in plain PyTorch, readable and slow. Gradients come from autograd."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["adam_step", "decode", "encode_topk"]


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest positive pre-activations of each row; a stable sort gives ties to the lower index."""
    pre_acts = (x - b_pre) @ W_enc + b_enc
    values, indices = torch.sort(pre_acts, dim=1, descending=True, stable=True)
    return torch.relu(values[:, :k]), indices[:, :k].to(torch.int32)


def decode(
    acts: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
) -> Float[Tensor, "batch d_out"]:
    """The weighted sum of decoder rows, as a dense product."""
    dense = acts.new_zeros(acts.shape[0], W_dec.shape[0]).scatter_add(1, indices.long(), acts)
    return dense @ W_dec.to(acts.dtype) + b_dec.to(acts.dtype)


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float,
    unit_norm: bool,
) -> None:
    """Adam with bias correction; projection before and renormalisation after, if asked."""
    grad = grad * grad_scale
    if unit_norm:
        grad = grad - (grad * param).sum(1, keepdim=True) * param
    exp_avg.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    param.sub_(exp_avg / denominator, alpha=lr / (1 - betas[0] ** step))
    if unit_norm:
        param.div_(param.norm(dim=1, keepdim=True).clamp_min(1e-12))
