"""The truth: every kernel in plain PyTorch, readable and slow. Gradients come from autograd."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.encoded import Counts, Encoded

__all__ = [
    "adam_step",
    "counts",
    "decode",
    "decode_dense",
    "encode_abs_topk",
    "encode_batch_topk",
    "encode_every",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "fired",
    "fit",
    "matching_pursuit",
    "signum_step",
]


DENSE_TILE = 2**22
"""Numbers of batch x d_sae that a CPU holds at once in a dense product: 16 MB."""


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


def encode_abs_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k pre-activations of each row that are furthest from 0, signed; ties go to the lower index."""
    pre_acts = (x - b_pre) @ W_enc + b_enc
    order = torch.sort(pre_acts.detach().abs(), dim=1, descending=True, stable=True).indices[:, :k]
    return pre_acts.gather(1, order), order.to(torch.int32)


def encode_group_max(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    n_groups: int,
) -> tuple[Float[Tensor, "batch n_groups"], Int[Tensor, "batch n_groups"]]:
    """The largest positive pre-activation of each group of consecutive latents; ties go to the lower index."""
    pre_acts = (x - b_pre) @ W_enc + b_enc
    groups = pre_acts.view(x.shape[0], n_groups, W_enc.shape[1] // n_groups)
    first = _first_largest(groups.detach())
    indices = first + groups.shape[2] * torch.arange(n_groups, device=x.device)
    return torch.relu(pre_acts.gather(1, indices)), indices.to(torch.int32)


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"] | None,
) -> Encoded:
    """Every pre-activation above its latent's threshold (0 if None), in the order of the latents."""
    pre_acts = (x - b_pre) @ W_enc + b_enc
    above = ~(
        pre_acts.detach() <= (0.0 if threshold is None else threshold.detach())
    )  # so written, NaN is kept
    columns = torch.nonzero(above)[:, 1]
    counts = above.sum(1)
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # masked_select and not indexing: the gradient of indexing adds up serially, this one copies
    return Encoded(pre_acts.masked_select(above), columns.to(torch.int32), row_ptr, W_enc.shape[1])


def encode_every(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"] | None,
) -> Encoded:
    """As `encode_threshold`, with every latent listed."""
    pre_acts = (x - b_pre) @ W_enc + b_enc
    below = pre_acts.detach() <= (0.0 if threshold is None else threshold.detach())
    return Encoded.of_every(pre_acts.masked_fill(below, 0.0), ~below)


def fit(encoded: Encoded, capacity: int) -> Encoded:
    """The same entries in a buffer of fixed capacity; the last ones are left out if there are more."""
    n = encoded.acts.shape[0]
    missing = max(capacity - n, 0)
    return Encoded(
        torch.cat([encoded.acts[:capacity], encoded.acts.new_zeros(missing)]),
        torch.cat([encoded.indices[:capacity], encoded.indices.new_zeros(missing)]),
        encoded.row_ptr.clamp(max=capacity),
        encoded.d_sae,
        None,
        torch.tensor(n > capacity, device=encoded.acts.device),
    )


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    n_kept: int,
) -> tuple[Encoded, Float[Tensor, ""]]:
    """The n_kept largest positive pre-activations of the batch; a stable sort gives ties to the earlier place."""
    d_sae = W_enc.shape[1]
    pre_acts = ((x - b_pre) @ W_enc + b_enc).reshape(-1)
    order = torch.sort(pre_acts.detach(), descending=True, stable=True).indices[:n_kept]
    places = order.sort().values
    starts = torch.arange(x.shape[0] + 1, device=x.device) * d_sae
    encoded = Encoded(
        torch.relu(pre_acts[places]),
        (places % d_sae).to(torch.int32),
        torch.searchsorted(places, starts),
        d_sae,
    )
    return encoded, encoded.acts.detach().min()


def matching_pursuit(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b_pre: Float[Tensor, " d_in"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"], Float[Tensor, "batch d_in"]]:
    """k greedy steps; the choice has no gradient, what is done with it has."""
    residual, acts, indices = x - b_pre, [], []
    for _ in range(k):
        chosen = _first_largest((residual @ W.T).detach())
        directions = W[chosen]
        act = torch.relu((residual * directions).sum(1))
        residual = residual - act[:, None] * directions
        acts.append(act)
        indices.append(chosen)
    return torch.stack(acts, dim=1), torch.stack(indices, dim=1).to(torch.int32), residual


def _first_largest(values: Float[Tensor, "*n places"]) -> Int[Tensor, "*n"]:
    """The lowest place of the largest value along the last axis; NaN is larger than all.

    Not argmax: which of several equal values it names is left open.
    """
    is_largest = (values == values.amax(dim=-1, keepdim=True)) | values.isnan()
    places = torch.arange(values.shape[-1], device=values.device)
    return torch.where(is_largest, places, values.shape[-1]).amin(dim=-1)


def decode(
    acts: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
) -> Float[Tensor, "batch d_out"]:
    """The weighted sum of decoder rows, as a dense product."""
    dense = acts.new_zeros(acts.shape[0], W_dec.shape[0]).scatter_add(1, indices.long(), acts)
    return dense @ W_dec.to(acts.dtype) + b_dec.to(acts.dtype)


def largest(values: Float[Tensor, "batch n"], k: int, signed: bool) -> Bool[Tensor, "batch n"]:
    """A mask of the k largest positive values per row, or of the k furthest from 0; ties go to the lower index."""
    strength = values.detach().abs() if signed else values.detach()
    columns = strength.sort(dim=1, descending=True, stable=True).indices[:, :k]
    marks: Tensor = torch.zeros_like(values, dtype=torch.bool).scatter_(1, columns, True)
    return marks & ~(strength <= 0)


def decode_dense(
    encoded: Encoded, W_dec: Float[Tensor, "d_sae d_out"], b_dec: Float[Tensor, " d_out"]
) -> Float[Tensor, "batch d_out"]:
    """The weighted sum of decoder rows, as a dense product, for rows of any length; on a CPU some rows at a time."""
    size = max(1, DENSE_TILE // max(1, encoded.d_sae))
    if encoded.n_rows > size and encoded.acts.device.type == "cpu":
        starts = range(0, encoded.n_rows, size)
        parts = [encoded.slice_rows(start, min(start + size, encoded.n_rows)) for start in starts]
        return torch.cat([decode_dense(part, W_dec, b_dec) for part in parts])
    places = encoded.row_ids() * encoded.d_sae + encoded.indices.long()
    flat = encoded.acts.new_zeros(encoded.n_rows * encoded.d_sae).scatter_add(0, places, encoded.acts)
    return flat.view(encoded.n_rows, -1) @ W_dec.to(flat.dtype) + b_dec.to(flat.dtype)


def counts(encoded: Encoded) -> Counts:
    """Entries that are not 0."""
    active = (encoded.acts.detach() != 0).long()
    per_row, per_latent = active.new_zeros(encoded.n_rows), active.new_zeros(encoded.d_sae)
    per_row.index_add_(0, encoded.row_ids(), active)
    per_latent.index_add_(0, encoded.indices.long(), active)
    return Counts(per_row, per_latent)


def fired(encoded: Encoded) -> Bool[Tensor, " d_sae"]:
    """Latents with an entry that is not 0."""
    counts = torch.zeros(encoded.d_sae, dtype=torch.int32, device=encoded.acts.device)
    counts.index_add_(0, encoded.indices.long(), (encoded.acts.detach() != 0).to(torch.int32))
    return counts > 0


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float | Tensor,
    unit_norm: bool,
    frozen: Tensor | None,
) -> None:
    """Adam with bias correction; projection before and renormalisation after, if asked."""
    before = _copies((param, exp_avg, exp_avg_sq), frozen)
    grad = grad * grad_scale
    if unit_norm:
        grad = grad - (grad * param).sum(1, keepdim=True) * param
    exp_avg.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    param.sub_(exp_avg / denominator, alpha=lr / (1 - betas[0] ** step))
    if unit_norm:
        _renormalise(param)
    _put_back((param, exp_avg, exp_avg_sq), before, frozen)


def signum_step(
    param: Tensor,
    grad: Tensor,
    base: Tensor,
    average: Tensor,
    weight: Tensor,
    lr: float,
    momentum: float,
    unit_norm: bool,
    frozen: Tensor | None,
) -> None:
    """A step of the base by the gradient's sign, the average after it, the parameter between the two."""
    before = _copies((param, base, average), frozen)
    if unit_norm:
        grad = grad - (grad * param).sum(1, keepdim=True) * param
    base.sub_(torch.where(grad.isnan(), grad, grad.sign()), alpha=lr)  # a NaN's sign is 0, and would be lost
    if unit_norm:
        _renormalise(base)
    average.add_(weight[:, None] * (base - average))
    param.copy_(base).lerp_(average, momentum)
    if unit_norm:
        _renormalise(param)
    _put_back((param, base, average), before, frozen)


def _renormalise(rows: Tensor) -> None:
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))


def _copies(tensors: tuple[Tensor, ...], frozen: Tensor | None) -> tuple[Tensor, ...]:
    return () if frozen is None else tuple(tensor.clone() for tensor in tensors)


def _put_back(now: tuple[Tensor, ...], before: tuple[Tensor, ...], frozen: Tensor | None) -> None:
    """Frozen rows are what they were."""
    if frozen is not None:
        for tensor, old in zip(now, before, strict=True):
            tensor.copy_(torch.where(frozen[:, None], old, tensor))
