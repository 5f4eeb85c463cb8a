"""The fast path on CPUs: rough products choose, numba loops compute in float32, no atomics.

    loops      compiled loops over ranges of rows or latents
    pool       the threads that run them
    encode     selections: k per row, above a threshold, k per row on average
    sums       decoders and sparse gradients
    steps      parameter updates

The same bits twice, and with any number of threads.
"""

from __future__ import annotations

import numba

from sememe.kernels.cpu.buffers import in_large_pages
from sememe.kernels.cpu.encode import (
    encode_batch_topk,
    encode_every,
    encode_group_max,
    encode_threshold,
    encode_topk,
    is_dense,
    largest,
)
from sememe.kernels.cpu.pool import set_threads as _set_pool
from sememe.kernels.cpu.rough import native_bfloat16, native_int8
from sememe.kernels.cpu.steps import adam_step, signum_step
from sememe.kernels.cpu.sums import counts, decode, fired, reconstruct

__all__ = [
    "adam_step",
    "counts",
    "decode",
    "encode_batch_topk",
    "encode_every",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "fired",
    "in_large_pages",
    "is_dense",
    "largest",
    "native_bfloat16",
    "native_int8",
    "reconstruct",
    "set_threads",
    "signum_step",
]


def set_threads(n: int) -> None:
    """Let the kernels use n threads, and numba's own loops elsewhere too.

    numba's OpenMP layer would else set torch's number to its own.
    """
    numba.set_num_threads(max(1, min(n, numba.config.NUMBA_NUM_THREADS)))
    _set_pool(n)
