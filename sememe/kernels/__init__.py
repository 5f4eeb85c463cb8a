"""Operations on sparse activations, each with a slow truth and a fast path. Knows tensors, no dictionary.

`reference` is plain PyTorch and defines the answer; `cpu` (numba) and `gpu` (Triton) are faster and are tested
against it, values and gradients. Which one runs is decided here, per call, by where the tensors are.

    with kernels.use("reference"):      # force the slow truth, e.g. to check a result
        ...
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.encoded import Counts, Encoded
from sememe.errors import ConfigError
from sememe.kernels import reference
from sememe.kernels.several import (
    apart,
    each,
    each_batch_topk,
    each_encoded,
    each_threshold,
    each_topk,
    to_device,
    together,
)

__all__ = [
    "BatchTopK",
    "Pursuit",
    "Reconstruction",
    "TopK",
    "adam_step",
    "apart",
    "counts",
    "decode",
    "decode_encoded",
    "decode_prefixes",
    "encode_abs_topk",
    "encode_batch_topk",
    "encode_every",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "fired",
    "in_large_pages",
    "is_dense",
    "kind_for",
    "largest",
    "matching_pursuit",
    "native_bfloat16",
    "of_entries",
    "path_for",
    "reconstruct",
    "signum_step",
    "threads",
    "to_device",
    "together",
    "use",
]

Path = Literal["reference", "cpu", "gpu"]

DENSE_SHARE = 0.05
"""Above this share of active latents a dense product decodes faster than a sum over entries."""

PURSUED_ROWS = 1024
"""Rows of a pursuit whose steps are compared with each other at once."""

_forced: list[Literal["reference"]] = []


class TopK(NamedTuple):
    """k entries per row, unordered. Rows with fewer positive pre-activations hold entries of activation 0."""

    acts: Float[Tensor, "*n batch k"]
    indices: Int[Tensor, "*n batch k"]


class BatchTopK(NamedTuple):
    """What a batch keeps, and the smallest activation among it (0 if fewer were positive than could be kept)."""

    encoded: Encoded
    threshold: Float[Tensor, "*n"]


class Reconstruction(NamedTuple):
    """How far a batch's reconstruction is from its target."""

    mse: Float[Tensor, ""]
    """Mean square over batch and features (and prefixes); differentiable in all that made it."""
    mses: Float[Tensor, " prefixes"]
    """That of each prefix; without gradient."""
    error: Float[Tensor, "batch d_out"]
    """Reconstruction from all latents minus target; differentiable too."""


class Pursuit(NamedTuple):
    """k entries per row, in the order in which they were taken, and what they leave over.

    A latent that was taken again adds to its first entry; the later one has activation 0.
    """

    acts: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]
    residual: Float[Tensor, "batch d_in"]


@contextlib.contextmanager
def use(path: Literal["auto", "reference"]) -> Iterator[None]:
    """Force the reference path, or leave the choice to the devices."""
    if path not in ("auto", "reference"):
        raise ConfigError("a kernel path must be 'auto' or 'reference'", repr(path), "Use one of them.")
    if path == "auto":
        yield
        return
    _forced.append("reference")
    try:
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def threads(n: int | None) -> Iterator[int]:
    """Run torch and our own loops on n CPU threads (all that torch uses now, if not given); yields the number."""
    from sememe.kernels import cpu

    before = torch.get_num_threads()
    n = before if n is None else n
    cpu.set_threads(n)  # first: when numba starts its OpenMP layer, it sets torch's number too
    torch.set_num_threads(n)
    try:
        yield n
    finally:
        cpu.set_threads(before)
        torch.set_num_threads(before)


def path_for(x: Tensor) -> Path:
    """Which implementation serves a tensor: by device and dtype, or the reference if forced."""
    if _forced or x.dtype != torch.float32:
        return "reference"
    if x.device.type == "cpu":
        return "cpu"
    if x.device.type == "cuda" and _has_triton():
        return "gpu"
    return "reference"


def kind_for(x: Tensor) -> str:
    """The path that serves a tensor, and in what it multiplies while training: what bits depend on."""
    path = path_for(x)
    if path != "cpu":
        return path
    from sememe.kernels import cpu

    return f"cpu, {'int8' if cpu.native_int8() else 'bfloat16' if cpu.native_bfloat16() else 'float32'}"


def in_large_pages(tensor: Tensor) -> Tensor:
    """The same values where kernels reach them fastest; possibly the same tensor."""
    from sememe.kernels import cpu

    return cpu.in_large_pages(tensor)


def native_bfloat16(x: Tensor) -> bool:
    """Whether the fast path multiplies bfloat16 natively where a tensor is; never when the reference is forced."""
    path = path_for(x)
    if path == "cpu":
        from sememe.kernels import cpu

        return cpu.native_bfloat16()
    return path == "gpu"


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def encode_topk(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    k: int,
    own_k: Int[Tensor, "*n"] | None = None,
) -> TopK:
    """The k largest of `relu((x - b_pre) @ W_enc + b_enc)` per row; ties go to the lower index.

    Differentiable in x, W_enc and b_enc (b_pre is a constant). The fast path selects candidates in bfloat16
    where the CPU multiplies it natively and scores them again in float32.

    Args:
        x: Inputs; with a leading axis, those of several dictionaries of one shape, as are all that follow.
        W_enc: Encoder weights.
        b_enc: Their biases.
        b_pre: Subtracted from the inputs; a constant.
        k: Latents per row.
        own_k: What each of several dictionaries keeps, at most k; entries beyond have activation 0.
    """
    path = path_for(x)
    if path == "gpu":
        from sememe.kernels import gpu

        acts, indices = gpu.encode_topk(x, W_enc, b_enc, b_pre, k, own_k)
    elif x.dim() == 3:
        acts, indices = each_topk(encode_topk, k, own_k, x, W_enc, b_enc, b_pre)
    elif path == "cpu":
        from sememe.kernels import cpu

        acts, indices = cpu.encode_topk(x, W_enc, b_enc, b_pre, k)
    else:
        acts, indices = reference.encode_topk(x, W_enc, b_enc, b_pre, k)
    return TopK(acts, indices)


def encode_abs_topk(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    k: int,
    own_k: Int[Tensor, "*n"] | None = None,
) -> TopK:
    """The k of `(x - b_pre) @ W_enc + b_enc` furthest from 0 per row, signed; ties go to the lower index.

    Differentiable in x, W_enc and b_enc. Of several dictionaries as in `encode_topk`.
    """
    path = path_for(x)
    if path == "gpu":
        from sememe.kernels import gpu

        return TopK(*gpu.encode_abs_topk(x, W_enc, b_enc, b_pre, k, own_k))
    if x.dim() == 3:
        return TopK(*each_topk(encode_abs_topk, k, own_k, x, W_enc, b_enc, b_pre))
    if path == "cpu":
        from sememe.kernels import cpu

        return TopK(*cpu.encode_topk(x, W_enc, b_enc, b_pre, k, signed=True))
    return TopK(*reference.encode_abs_topk(x, W_enc, b_enc, b_pre, k))


def encode_group_max(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    n_groups: int,
) -> TopK:
    """The largest of `relu((x - b_pre) @ W_enc + b_enc)` in each of n_groups runs of d_sae / n_groups latents.

    Ties go to the lower index. Differentiable in x, W_enc and b_enc. With a leading axis, of several dictionaries of
    one shape.
    """
    path = path_for(x)
    if path == "gpu":
        from sememe.kernels import gpu

        return TopK(*gpu.encode_group_max(x, W_enc, b_enc, b_pre, n_groups))
    if x.dim() == 3:
        return TopK(*each_topk(encode_group_max, n_groups, None, x, W_enc, b_enc, b_pre))
    if path == "cpu":
        from sememe.kernels import cpu

        return TopK(*cpu.encode_group_max(x, W_enc, b_enc, b_pre, n_groups))
    return TopK(*reference.encode_group_max(x, W_enc, b_enc, b_pre, n_groups))


def encode_threshold(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    threshold: Float[Tensor, "*n d_sae"] | None,
    capacity: int | Sequence[int] | None = None,
    *,
    dense: bool | None = None,
) -> Encoded:
    """Every `(x - b_pre) @ W_enc + b_enc` that is above its latent's threshold (0 if None); acts may be negative
    where a threshold is.

    Differentiable in x, W_enc and b_enc; the threshold only selects. With a leading axis, of several dictionaries of
    one shape, in one `Encoded` (see `together`): entries of all one after the other, and what fills a buffer up last.

    Args:
        x: Inputs.
        W_enc: Encoder weights.
        b_enc: Their biases.
        b_pre: Subtracted from the inputs; a constant.
        threshold: What a latent has to exceed.
        capacity: Entries to have room for; of several dictionaries, for each. With it, nothing waits for the device to
            learn how many there are (see `Encoded`), and a GPU holds no batch x d_sae; if there are more, some are
            left out and `overflow` is set.
        dense: What `is_dense` says of a batch that these rows are of; asked of these rows if not given.
    """
    path = path_for(x)
    if path == "gpu" and capacity is not None:
        from sememe.kernels import gpu

        return gpu.encode_threshold(x, W_enc, b_enc, b_pre, threshold, capacity)
    if x.dim() == 3:
        assert not isinstance(capacity, int), "several dictionaries have a capacity each"
        of_one = functools.partial(encode_threshold, dense=dense)
        return each_threshold(of_one, threshold, capacity, x, W_enc, b_enc, b_pre)
    assert capacity is None or isinstance(capacity, int)
    if path == "cpu":
        from sememe.kernels import cpu

        encoded = cpu.encode_threshold(x, W_enc, b_enc, b_pre, threshold, dense)
    else:
        encoded = reference.encode_threshold(x, W_enc, b_enc, b_pre, threshold)
    return encoded if capacity is None else reference.fit(encoded, capacity)


def encode_every(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"] | None,
) -> Encoded:
    """As `encode_threshold`, with every latent listed (see `Encoded`): for a few rows of which many are above.

    It holds batch x d_sae, and its gradients are dense products.

    Args:
        x: Inputs.
        W_enc: Encoder weights.
        b_enc: Their biases.
        b_pre: Subtracted from the inputs; a constant.
        threshold: What a latent has to exceed.
    """
    if path_for(x) == "cpu":
        from sememe.kernels import cpu

        return cpu.encode_every(x, W_enc, b_enc, b_pre, threshold)
    return reference.encode_every(x, W_enc, b_enc, b_pre, threshold)


def is_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"] | None,
) -> bool:
    """Whether `encode_threshold` will take a dense product on a CPU, because too many latents are active. Elsewhere,
    where that is not asked, false."""
    if path_for(x) != "cpu" or x.shape[0] == 0:
        return False
    from sememe.kernels import cpu

    return cpu.is_dense(x, W_enc, b_enc, b_pre, threshold)


def encode_batch_topk(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    n_kept: int,
) -> BatchTopK:
    """The n_kept largest of `relu((x - b_pre) @ W_enc + b_enc)` of the whole batch.

    Always n_kept entries (so that nothing waits to learn how many): where fewer are positive, the rest have
    activation 0. Ties go to the lower row, then to the lower latent. Differentiable in x, W_enc and b_enc.

    With a leading axis, n_kept of each of several dictionaries of one shape, in one `Encoded` (see `together`).

    On a GPU the positive ones come first and the rest belongs to no row (of several dictionaries, to the last row of
    each). There the result has an `overflow`, one for each dictionary: set if a row was kept from having more than 16
    times the average.
    """
    path = path_for(x)
    if path == "gpu":
        from sememe.kernels import gpu

        return BatchTopK(*gpu.encode_batch_topk(x, W_enc, b_enc, b_pre, n_kept))
    if x.dim() == 3:
        of_one = functools.partial(encode_batch_topk, n_kept=n_kept)
        return BatchTopK(*each_batch_topk(of_one, x, W_enc, b_enc, b_pre))
    if path == "cpu":
        from sememe.kernels import cpu

        return BatchTopK(*cpu.encode_batch_topk(x, W_enc, b_enc, b_pre, n_kept))
    return BatchTopK(*reference.encode_batch_topk(x, W_enc, b_enc, b_pre, n_kept))


def largest(values: Float[Tensor, "batch n"], k: int, *, signed: bool = False) -> Bool[Tensor, "batch n"]:
    """Where the k largest positive values of each row are; with `signed`, the k that are furthest from 0.

    Ties go to the lower index, NaN counts as the largest. Not differentiable.
    """
    if not _forced and values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16):
        from sememe.kernels import cpu

        return cpu.largest(values, k, signed)
    return reference.largest(values, k, signed)


def matching_pursuit(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b_pre: Float[Tensor, " d_in"], k: int
) -> Pursuit:
    """k times: the row of W that correlates most with what is left of x - b_pre (ties to the lower one), and its part
    of it taken away; nothing once no correlation is positive.

    Differentiable in all three through every step. Rows of W must have norm 1.

    Args:
        x: Rows.
        W: Directions.
        b_pre: Subtracted from the rows.
        k: Steps.
    """
    if path_for(x) == "cpu":
        from sememe.kernels import pursuit

        steps, indices, residual = pursuit.matching_pursuit(x, W, b_pre, k)
    else:
        steps, indices, residual = reference.matching_pursuit(x, W, b_pre, k)
    first = torch.cat([_first_taken(some) for some in torch.split(indices, PURSUED_ROWS)])
    return Pursuit(torch.zeros_like(steps).scatter_add(1, first, steps), indices, residual)


def _first_taken(indices: Int[Tensor, "rows k"]) -> Int[Tensor, "rows k"]:
    """At which step each step's latent was taken first."""
    k = indices.shape[1]
    again = indices[:, :, None] == indices[:, None, :]
    return torch.where(again, torch.arange(k, device=indices.device), k).amin(dim=2)


def decode(
    acts: Float[Tensor, "*n batch k"],
    indices: Int[Tensor, "*n batch k"],
    W_dec: Float[Tensor, "*n d_sae d_out"],
    b_dec: Float[Tensor, "*n d_out"],
) -> Float[Tensor, "*n batch d_out"]:
    """`sum_i acts[:, i] * W_dec[indices[:, i]] + b_dec`, differentiable in acts, W_dec and b_dec.

    With a leading axis, of several dictionaries of one shape.
    """
    path = path_for(acts)
    if path == "gpu":
        from sememe.kernels import gpu

        return gpu.decode(acts, indices, W_dec, b_dec)
    if acts.dim() == 3:
        return each(decode, acts, indices, W_dec, b_dec)
    if path == "cpu":
        from sememe.kernels import cpu

        return cpu.decode(Encoded.from_topk(acts, indices, W_dec.shape[0]), W_dec, b_dec)
    return reference.decode(acts, indices, W_dec, b_dec)


def decode_encoded(
    encoded: Encoded, W_dec: Float[Tensor, "*n d_sae d_out"], b_dec: Float[Tensor, "*n d_out"]
) -> Float[Tensor, "rows d_out"]:
    """As `decode`, for rows of any length; dense once more than 5% of the latents are active.

    Parameters with a leading axis are those of several dictionaries, whose rows are one after the other.
    """
    if W_dec.dim() == 3 and path_for(encoded.acts) != "gpu":
        return each_encoded(decode_encoded, encoded, W_dec, b_dec)
    if W_dec.dim() == 2 and encoded.mask is not None:
        return torch.addmm(b_dec, encoded.acts.view(-1, encoded.d_sae), W_dec)
    if W_dec.dim() == 2 and _is_dense(encoded):
        return reference.decode_dense(encoded, W_dec, b_dec)
    if path_for(encoded.acts) == "cpu":
        from sememe.kernels import cpu

        return cpu.decode(encoded, W_dec, b_dec)
    if path_for(encoded.acts) == "gpu":
        from sememe.kernels import gpu

        return gpu.decode_encoded(encoded, W_dec, b_dec)
    view = encoded.padded()
    return decode(view.acts, view.indices, W_dec, b_dec)


def decode_prefixes(
    encoded: Encoded,
    W_dec: Float[Tensor, "*n d_sae d_out"],
    b_dec: Float[Tensor, "*n d_out"],
    ends: Sequence[int],
) -> list[Float[Tensor, "rows d_out"]]:
    """For each end, the reconstruction from the latents below it: each latent's row is added once.

    Args:
        encoded: Activations of any latents.
        W_dec: Decoder rows; of several dictionaries as in `decode_encoded`.
        b_dec: Bias, in every reconstruction.
        ends: Rising numbers of latents, as each dictionary counts them.
    """
    recons: list[Tensor] = []
    latents = torch.arange(encoded.d_sae, device=encoded.indices.device) % W_dec.shape[-2]
    bias, start = b_dec, 0
    for end in ends:
        part = decode_encoded(encoded.select_latents((latents >= start) & (latents < end)), W_dec, bias)
        recons.append(recons[-1] + part if recons else part)
        bias, start = torch.zeros_like(b_dec), end
    return recons


def of_entries(values: Float[Tensor, " d_sae"], encoded: Encoded) -> Float[Tensor, " nnz"]:
    """For each entry its latent's value, differentiable in the values: their gradients are summed over entries in a
    fixed order."""
    if path_for(values) == "gpu":
        from sememe.kernels import gpu

        return gpu.of_entries(values, encoded.indices)
    return values.index_select(0, encoded.indices)


def reconstruct(
    encoded: Encoded,
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    target: Float[Tensor, "batch d_out"],
    ends: Sequence[int] | None = None,
) -> Reconstruction:
    """The mean squared error of a batch's reconstruction, with its gradients taken in the same pass.

    Args:
        encoded: Activations of any latents.
        W_dec: Decoder rows.
        b_dec: Bias.
        target: What is to be reconstructed.
        ends: Rising numbers of latents up to d_sae; if given, the error is the mean of those of the reconstructions
            from the latents below each.
    """
    whole = (encoded.d_sae,) if ends is None else tuple(ends)
    if path_for(encoded.acts) == "cpu" and not _is_dense(encoded):
        from sememe.kernels import cpu

        return Reconstruction(*cpu.reconstruct(encoded, W_dec, b_dec, target, whole))
    recons = (
        [decode_encoded(encoded, W_dec, b_dec)]
        if ends is None
        else decode_prefixes(encoded, W_dec, b_dec, whole)
    )
    mses = torch.stack([(recon - target).square().mean() for recon in recons])
    return Reconstruction(mses.mean(), mses.detach(), recons[-1] - target)


def counts(encoded: Encoded) -> Counts:
    """How many entries are not 0, by row and by latent."""
    if path_for(encoded.acts) == "cpu":
        from sememe.kernels import cpu

        return cpu.counts(encoded)
    return reference.counts(encoded)


def fired(encoded: Encoded | Counts) -> Bool[Tensor, " d_sae"]:
    """Which latents are active in any row: an entry of activation 0 is not. Never waits for the device."""
    if isinstance(encoded, Counts):
        return encoded.per_latent > 0
    if path_for(encoded.acts) == "cpu" and encoded.indices.dtype == torch.int32:
        from sememe.kernels import cpu

        return cpu.fired(encoded)
    return reference.fired(encoded)


def _is_dense(encoded: Encoded) -> bool:
    if encoded.k is not None:
        return encoded.mask is not None
    return encoded.acts.shape[0] > DENSE_SHARE * encoded.n_rows * encoded.d_sae


def adam_step(
    param: Float[Tensor, "*n rows columns"],
    grad: Float[Tensor, "*n rows columns"],
    exp_avg: Float[Tensor, "*n rows columns"],
    exp_avg_sq: Float[Tensor, "*n rows columns"],
    *,
    step: int,
    lr: float | Float[Tensor, "*n"],
    betas: tuple[float, float],
    eps: float,
    grad_scale: float | Float[Tensor, "*n"],
    unit_norm: bool,
    frozen: Bool[Tensor, "*n rows"] | None = None,
) -> None:
    """One Adam step in place, in one pass over the memory.

    Args:
        param: Updated; with a leading axis, those of several dictionaries, as are all that follow.
        grad: Its gradient, as autograd gave it.
        exp_avg: First moments; updated.
        exp_avg_sq: Second moments; updated.
        step: How many steps this makes, counted from 1.
        lr: Learning rate; a tensor in float64, one for each, where there are several dictionaries.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        grad_scale: What the gradient is multiplied by first; a tensor is not waited for.
        unit_norm: Every row keeps Euclidean norm 1: the gradient's component along the row is removed before
            the step and the row is divided by its norm after it.
        frozen: Rows that stay as they are, moments included.

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; projection: Bricken et al. 2023, appendix.
    """
    options = (betas, eps, grad_scale, unit_norm, frozen)
    path = path_for(param)
    if path == "gpu":
        from sememe.kernels import gpu

        gpu.adam_step(param, grad, exp_avg, exp_avg_sq, step, lr, *options)
    elif isinstance(lr, Tensor):
        for i, own_lr in enumerate(lr.tolist()):
            of_one = (param[i], grad[i], exp_avg[i], exp_avg_sq[i])
            scale = grad_scale[i] if isinstance(grad_scale, Tensor) else grad_scale
            own_frozen = None if frozen is None else frozen[i]
            adam_step(
                *of_one, step=step, lr=own_lr, betas=betas, eps=eps, grad_scale=scale,
                unit_norm=unit_norm, frozen=own_frozen,
            )  # fmt: skip
    elif path == "cpu":
        from sememe.kernels import cpu

        cpu.adam_step(param, grad, exp_avg, exp_avg_sq, step, lr, *options)
    else:
        reference.adam_step(param, grad, exp_avg, exp_avg_sq, step, lr, *options)


def signum_step(
    param: Float[Tensor, "rows columns"],
    grad: Float[Tensor, "rows columns"],
    base: Float[Tensor, "rows columns"],
    average: Float[Tensor, "rows columns"],
    weight: Float[Tensor, " rows"],
    *,
    lr: float,
    momentum: float,
    unit_norm: bool,
    frozen: Bool[Tensor, " rows"] | None = None,
) -> None:
    """One step of schedule-free sign descent in place, in one pass over the memory.

    `base -= lr sign(grad)`, `average += weight (base - average)`, `param = base + momentum (average - base)`.

    Args:
        param: Where gradients are taken; updated.
        grad: Its gradient.
        base: Where sign descent stands; updated.
        average: What is exported; updated.
        weight: Share of this step in each row's average.
        lr: Length of the step in every coordinate whose gradient is not 0.
        momentum: How near to the average the next gradient is taken.
        unit_norm: Rows of `base` and `param` keep Euclidean norm 1: the gradient's component along the row is
            removed before the sign is taken. Rows of the average are means of unit rows, and so shorter.
        frozen: Rows that stay as they are.

    Source: Defazio et al. 2024, arXiv:2405.15682, eqs. 1-3; Bernstein et al. 2018, arXiv:1802.04434.
    """
    options = (lr, momentum, unit_norm, frozen)
    if path_for(param) == "cpu":
        from sememe.kernels import cpu

        cpu.signum_step(param, grad, base, average, weight, *options)
    elif path_for(param) == "gpu":
        from sememe.kernels import gpu

        gpu.signum_step(param, grad, base, average, weight, *options)
    else:
        reference.signum_step(param, grad, base, average, weight, *options)
