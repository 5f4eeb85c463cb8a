"""The fast path on CUDA devices, in Triton. No atomics on floats, no waiting for the device: same bits every time.

Each function has the contract of its namesake in `reference.py`. `sparse` holds sums over entries and the
transposed index; `selection` encodes and keeps k latents per row without ever holding batch x d_sae, `groups`
the largest of each group, `varying` a number per batch or all above a threshold; `optimiser` is Adam in one pass,
`signum` sign descent. Encoding, decoding and Adam take several dictionaries of one shape at once. The same source
runs on a CPU under Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested where there is no such device.
"""

from __future__ import annotations

from sememe.kernels.gpu.groups import encode_group_max
from sememe.kernels.gpu.optimiser import adam_step
from sememe.kernels.gpu.selection import encode_abs_topk, encode_topk
from sememe.kernels.gpu.signum import signum_step
from sememe.kernels.gpu.sparse import decode, decode_encoded, of_entries
from sememe.kernels.gpu.varying import encode_batch_topk, encode_threshold

__all__ = [
    "adam_step",
    "decode",
    "decode_encoded",
    "encode_abs_topk",
    "encode_batch_topk",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "of_entries",
    "signum_step",
]
