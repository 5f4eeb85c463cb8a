"""Several dictionaries of one shape: what they encode as one, and kernels for one dictionary after the other.

As one `Encoded` they have their rows one after the other, and latents counted through all. Knows how results are laid
side by side; what is computed, it is handed. The GPU does all at once instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sememe.encoded import Encoded

__all__ = [
    "apart",
    "each",
    "each_batch_topk",
    "each_encoded",
    "each_threshold",
    "each_topk",
    "to_device",
    "together",
]


def together(acts: Float[Tensor, "n batch k"], indices: Int[Tensor, "n batch k"], d_sae: int) -> Encoded:
    """What dictionaries of d_sae latents encode with k entries per row, as one."""
    n, _, k = acts.shape
    firsts = torch.arange(n, dtype=indices.dtype, device=acts.device)[:, None, None] * d_sae
    return Encoded.from_topk(acts.reshape(-1, k), (indices + firsts).view(-1, k), n * d_sae)


def apart(encoded: Encoded, n: int, number: int) -> Encoded:
    """What one of n dictionaries encodes, as it names its latents; all have equally many rows. Waits for the device
    unless rows have a fixed number of entries."""
    if n == 1:
        return encoded
    d_sae, n_rows, k = encoded.d_sae // n, encoded.n_rows // n, encoded.k
    if k is None:
        part = encoded.slice_rows(number * n_rows, (number + 1) * n_rows)
        acts, indices, row_ptr = part.acts, part.indices, part.row_ptr
    else:
        own = slice(number * n_rows * k, (number + 1) * n_rows * k)
        acts, indices, row_ptr = encoded.acts[own], encoded.indices[own], encoded.row_ptr[: n_rows + 1]
    return Encoded(acts, indices - number * d_sae, row_ptr, d_sae, k)


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


def each_batch_topk(
    encode: Callable[..., tuple[Encoded, Tensor]], *stacked: Tensor
) -> tuple[Encoded, Tensor]:
    """What every dictionary keeps of a batch, as one, and each one's smallest; equally many entries of each."""
    parts = [encode(*of) for of in zip(*stacked, strict=True)]
    encoded = [part[0] for part in parts]
    size, d_sae = encoded[0].acts.shape[0], encoded[0].d_sae
    row_ptr = [part.row_ptr[:-1] + number * size for number, part in enumerate(encoded)]
    end = encoded[0].row_ptr.new_full((1,), len(parts) * size)
    whole = Encoded(
        torch.cat([part.acts for part in encoded]),
        torch.cat([part.indices + number * d_sae for number, part in enumerate(encoded)]),
        torch.cat([*row_ptr, end]),
        len(parts) * d_sae,
    )
    return whole, torch.stack([part[1] for part in parts])


def each_threshold(
    encode: Callable[..., Encoded],
    threshold: Tensor | None,
    capacities: Sequence[int] | None,
    *stacked: Tensor,
) -> Encoded:
    """What every dictionary has above its thresholds, as one; in a buffer if each has a capacity.

    Args:
        encode: Called with a dictionary's part of each stacked tensor, and its threshold.
        threshold: Those of each, or None.
        capacities: How many entries of each there is room for, if that is given.
        stacked: Inputs and parameters.
    """
    parts = [
        encode(*of, None if threshold is None else threshold[i])
        for i, of in enumerate(zip(*stacked, strict=True))
    ]
    overflow, missing = None, 0
    if capacities is not None:
        sizes = [part.acts.shape[0] for part in parts]
        cut = [part.row_ptr.clamp(max=most) for part, most in zip(parts, capacities, strict=True)]
        parts = [
            Encoded(part.acts[:most], part.indices[:most], row_ptr, part.d_sae)
            for part, most, row_ptr in zip(parts, capacities, cut, strict=True)
        ]
        over = [size > most for size, most in zip(sizes, capacities, strict=True)]
        overflow = torch.tensor(over, device=stacked[0].device)
        missing = sum(capacities) - sum(part.acts.shape[0] for part in parts)
    d_sae = parts[0].d_sae
    acts = torch.cat([part.acts for part in parts])
    indices = torch.cat([part.indices + number * d_sae for number, part in enumerate(parts)])
    counts = torch.cat([part.row_counts() for part in parts])
    return Encoded(
        pad(acts, (0, missing)),
        pad(indices, (0, missing)),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        len(parts) * d_sae,
        None,
        overflow,
    )


def each_encoded(
    decode: Callable[..., Tensor], encoded: Encoded, W_dec: Float[Tensor, "n d_sae d_out"], b_dec: Tensor
) -> Float[Tensor, "rows d_out"]:
    """What every dictionary reconstructs from its part, one after the other."""
    n = W_dec.shape[0]
    return torch.cat([decode(apart(encoded, n, i), W_dec[i], b_dec[i]) for i in range(n)])


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that the host knows, one for each dictionary, on a device; nothing waits."""
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
