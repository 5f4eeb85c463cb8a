"""Compiles every Triton kernel of the package for a Hopper GPU; needs none. A program, run by test_kernels_gpu.py.

Prints a line per kernel. The interpreter takes Python that the compiler refuses: this is the check that it does not.
"""

from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sememe.kernels.gpu import groups, optimiser, selection, signum, sparse

ARGUMENTS = {
    "*fp32": """acts weights bias out rows totals offset row_margin column_margin scores param grad exp_avg exp_avg_sq
        grad_scale step_sizes base average average_weights""",
    "*i32": "indices keys latents used bounds dropped n_keeps",
    "*i64": "starts stops ptr entries entry_rows",
    "*i16": "tile",
    "*u8": "frozen",
    "i32": "width n_tile first_latent first_run n_runs length all_runs k n rows_each d_sae",
    "fp32": "step_size beta1 beta2 root_correction eps lr momentum",
}
TYPES = {name: kind for kind, names in ARGUMENTS.items() for name in names.split()}
BLOCKS = {"BLOCK": [sparse.BLOCK], "ENTRIES": [sparse.ENTRIES]}
BOTH = [False, True]
KERNELS = [
    (sparse._gather, BLOCKS, 4),
    (sparse._dots, BLOCKS | {"BIAS": BOTH}, 4),
    (sparse._scatter, BLOCKS, 4),
    (
        selection._merge,
        {"TILE": [selection.TILE], "SLOTS": [128, 1024], "SIGNED": BOTH, "MARGIN": BOTH, "LAST": BOTH},
        8,
    ),
    (groups._largest, {"RUNS": [1, 4], "SIZE": [1, 4096], "KEPT": [1, groups.KEPT]}, 8),
    (selection._keep, {"SLOTS": [1, 128], "SIGNED": BOTH}, 4),
    (optimiser._adam_flat, {"BLOCK": [optimiser.FLAT], "FROZEN": BOTH, "SEVERAL": BOTH}, 4),
    (optimiser._adam_rows, {"BLOCK": [1, 4096], "FROZEN": BOTH, "SEVERAL": BOTH}, 8),
    (signum._signum_flat, {"BLOCK": [optimiser.FLAT], "FROZEN": BOTH}, 4),
    (signum._signum_rows, {"BLOCK": [1, 4096], "FROZEN": BOTH}, 8),
]

for kernel, choices, warps in KERNELS:
    for values in product(*choices.values()):
        constants = dict(zip(choices, values, strict=True))
        signature = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        triton.compile(
            ASTSource(kernel, signature, places, {}),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps, **sparse.OPTIONS},
        )
    print(kernel.__name__)
