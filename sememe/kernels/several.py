"""Kernels over a leading dictionary axis, one dictionary after the other: for paths that have no batched kernel.

Knows how results are laid side by side; what is computed, it is handed. The GPU does all at once instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["each", "each_topk"]


def each(function: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
    """function(a[i], b[i], ...) for every i, stacked."""
    return torch.stack([function(*parts) for parts in zip(*stacked, strict=True)])


def each_topk(
    encode: Callable[..., Sequence[Tensor]], k: int, own_k: Tensor | None, *stacked: Tensor
) -> tuple[Tensor, Tensor]:
    """Activations and indices of every dictionary, k wide; one that keeps fewer ends in zeros.

    Args:
        encode: Called with a dictionary's part of each stacked tensor, and its k.
        k: The most that any keeps.
        own_k: What each keeps, if not k.
        stacked: Inputs and parameters.
    """
    ks = [k] * stacked[0].shape[0] if own_k is None else own_k.tolist()
    parts = [encode(*of, own) for of, own in zip(zip(*stacked, strict=True), ks, strict=True)]
    acts, indices = (
        torch.stack([pad(part[place], (0, k - part[place].shape[1])) for part in parts]) for place in (0, 1)
    )
    return acts, indices
