"""What dictionaries take in training, in bytes, from their shapes. Pure arithmetic: opens no file, asks no machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sememe import dictionaries
from sememe.dictionaries import Architecture, Sites
from sememe.dictionaries.penalised import Penalised
from sememe.needs.refusal import Bytes, Knob

__all__ = [
    "BASE",
    "FAST",
    "FLOAT32",
    "SPARSE",
    "Dictionary",
    "size_of",
    "store_buffer",
    "train_bytes",
    "training",
]

BASE = 1_100_000_000
"""Memory of the process itself: the interpreter, torch, transformers, compiled loops, what earlier stages left."""
FAST = frozenset({"topk", "multi_topk", "abs_topk", "batch_topk", "matryoshka"})
"""Architectures whose selection runs in the encoder's dtype and whose gradients are sparse."""
FLOAT32 = frozenset({"group_max"})
"""The same, but that selection runs in float32."""
SPARSE = frozenset({"relu", "gated", "tied", "p_anneal", "jumprelu"})
"""Architectures that are as fast once few latents are active, and dense until then."""
DENSE_SHARE = 0.05
"""Share of active latents above which they are dense."""
N_MOMENTS = 50
"""Moments of a run at which its l0 is asked for."""
SETTLES = 0.3
"""Share of a run over which a penalty's l0 is taken to settle, where nothing says it: that of JumpReLU's annealing."""
TYPICAL_L0 = 64
"""Active latents per row where the architecture fixes no number."""

GROUP_BYTES = 2**30
"""What `StoreSource` holds in memory of a store."""
SHARDS_READ = 3
"""Times that a shard is there while it is read: its file, its rows, and those of them that are kept."""
SAMPLE_ROWS = 8192
"""Rows from which a dictionary starts."""
ENTRY_BYTES = 60.0
"""Of a step, per row and active latent: activations, indices, their gradients, their order by latent."""
STEP_BYTES = 2e8
"""Beside these: the threads' tiles of pre-activations, and those of dead latents."""
_DENSE = 24.0
"""Bytes per row and latent of a dense step."""
CHUNK = 2**20
"""Pre-activations of a dense step that are held at once, by architectures that are dense some rows at a time."""
CHUNKED = frozenset({"lista", "variational"})
"""Architectures that are dense some rows at a time however few latents are active."""
ENTRIES = frozenset({"mlp_encoder", "matching_pursuit"})
"""Architectures that take more than an encoder's product but hold only entries."""
GRAM_BYTES = 2**30
"""The largest Gram matrix, of 8 bits, that a pursuit keeps while it chooses."""
STACKED = frozenset({*FAST, *FLOAT32, *SPARSE, "mlp_encoder"})
"""Architectures of which several step as one on a GPU."""
TILE = 4096
"""Latents whose pre-activations a GPU holds at once, in bfloat16."""
CANDIDATE_BYTES = 100.0
"""Of a GPU's step, per row and kept latent: candidates with their spare ones, entries, their order by latent."""
ROW_SHARE = 16
"""Candidates of a row where their number varies, as a multiple of the average."""
GPU_BASE = 600_000_000
"""Memory of a GPU before anything is put there: context, libraries, workspace."""


class Dictionary(NamedTuple):
    """A dictionary to be trained, as numbers."""

    kind: str
    d_in: int
    d_out: int
    d_sae: int
    n_parameters: int
    l0: int
    """Active latents per row: k where there is one."""
    start_l0: float | None = None
    """Active latents per row at the start, where that is another number."""
    settles: float = 0.0
    """Share of the run over which l0 moves from there, by equal factors."""

    def l0s(self) -> list[float]:
        """l0 at equally spaced moments of the run."""
        if self.start_l0 is None or self.settles == 0:
            return [float(self.l0)]
        factor = self.l0 / self.start_l0
        moments = [(i + 0.5) / N_MOMENTS for i in range(N_MOMENTS)]
        return [self.start_l0 * factor ** min(1.0, moment / self.settles) for moment in moments]

    def dense(self, l0: float) -> bool:
        """Whether a step with so many active latents takes dense products."""
        if self.kind in SPARSE:
            return l0 > DENSE_SHARE * self.d_sae
        return self.kind not in FAST | FLOAT32

    @property
    def product(self) -> float:
        """Floating-point operations of one encoder product, per row."""
        return 2.0 * self.d_in * self.d_sae

    @property
    def n_bytes(self) -> float:
        """Its weights in float32."""
        return 4.0 * self.n_parameters

    def scaled(self, d_sae: int) -> Dictionary:
        """The same with another number of latents; parameters and the l0 of the start in proportion."""
        factor = d_sae / self.d_sae
        start = None if self.start_l0 is None else self.start_l0 * factor
        n_parameters = round(self.n_parameters * factor)
        return self._replace(d_sae=d_sae, n_parameters=n_parameters, start_l0=start)


def size_of(architecture: Architecture, d_in: int, d_out: int, sites: Sites | None = None) -> Dictionary:
    """A dictionary as numbers; none of its weights is made.

    Args:
        architecture: Its options.
        d_in: Width of the input.
        d_out: Width of the output.
        sites: Where inputs come from and outputs go, if known.
    """
    with torch.device("meta"):
        built = dictionaries.build(architecture, d_in, d_out, sites)
    given = (getattr(architecture, name, None) for name in ("k", "target_l0"))
    l0 = next((int(value) for value in given if value), TYPICAL_L0)
    n_parameters = sum(parameter.numel() for parameter in built.parameters())
    size = Dictionary(architecture.kind, d_in, d_out, built.d_sae, n_parameters, min(l0, built.d_sae))
    if not isinstance(built, Penalised):
        return size
    share = getattr(architecture, "l0_anneal", SETTLES)
    return size._replace(start_l0=built.start_l0(), settles=share)


def store_buffer(held: float, shard: float) -> float:
    """Bytes that reading a store takes.

    Args:
        held: Bytes of all its rows, at the hookpoints that are read.
        shard: Of its largest shard.
    """
    return min(held, max(GROUP_BYTES, shard)) + SHARDS_READ * shard


def train_bytes(
    sizes: Sequence[Dictionary], batch_size: int, buffer: float, devices: Sequence[str] = ()
) -> Bytes:
    """What training takes at its peak.

    Args:
        sizes: The dictionaries trained side by side.
        batch_size: Rows of a step.
        buffer: Bytes of the rows in memory at once.
        devices: What they are spread over in turn, the CPU if none is named. A GPU's bytes are those of the fullest.
    """
    devices = devices or ("cpu",)
    weights = sum(size.n_bytes for size in sizes)
    host, gpu = BASE + buffer, dict.fromkeys(devices, 0.0)
    for number, device in enumerate(devices):
        own = sizes[number :: len(devices)]
        rows = _row_bytes(own, max(batch_size, SAMPLE_ROWS))
        if device.startswith("cuda"):
            gpu[device] += GPU_BASE + 4 * sum(size.n_bytes for size in own) + _gpu_step_bytes(own, batch_size)
            host += rows
        else:
            # Weights, gradients, two moments; one step after the other, so that the largest counts once.
            host += 4 * sum(size.n_bytes for size in own) + rows
            host += max((_step_bytes(size, batch_size) for size in own), default=0.0)
        host += BASE if len(devices) > 1 else 0.0
    if any(gpu.values()):
        host += 3 * weights  # a checkpoint of weights and moments passes through
    # On the disk the dictionary and two such checkpoints.
    return Bytes(host, 7 * weights, max(gpu.values()))


def training(
    sizes: Sequence[Dictionary], batch_size: int, buffer: float, devices: Sequence[str] = ()
) -> tuple[Bytes, tuple[Knob, ...]]:
    """What training takes, and the options that change it; arguments as for `train_bytes`."""

    def needs(n: int, d_sae: int | None, batch_size: int) -> Bytes:
        wanted = sizes if d_sae is None else [size.scaled(d_sae) for size in sizes]
        return train_bytes(wanted[:n], batch_size, buffer, devices)

    n, widths = len(sizes), {size.d_sae for size in sizes}
    knobs = (
        [Knob("d_sae", widths.pop(), lambda d_sae: needs(n, d_sae, batch_size))] if len(widths) == 1 else []
    )
    knobs.append(Knob("batch_size", batch_size, lambda batch_size: needs(n, None, batch_size)))
    if n > 1:
        knobs.append(Knob("the dictionaries", n, lambda n: needs(n, None, batch_size)))
    return needs(n, None, batch_size), tuple(knobs)


def _row_bytes(sizes: Sequence[Dictionary], n_rows: int) -> float:
    """Rows, their targets, the reconstruction and its gradient."""
    return 4.0 * n_rows * 4 * max((size.d_in + size.d_out for size in sizes), default=0)


def _step_bytes(size: Dictionary, batch_size: int) -> float:
    """What a step on a CPU holds beside rows and parameters."""
    if size.kind not in FAST | FLOAT32 | SPARSE | CHUNKED | ENTRIES:
        return _DENSE * batch_size * size.d_sae
    most = max(float(size.l0), size.start_l0 or 0.0)
    if size.kind not in ENTRIES and size.dense(most):
        return _DENSE * min(CHUNK, batch_size * size.d_sae) + STEP_BYTES
    gram = float(size.d_sae**2) if size.kind == "matching_pursuit" and size.d_sae**2 <= GRAM_BYTES else 0.0
    return ENTRY_BYTES * batch_size * most + STEP_BYTES + gram


def _gpu_step_bytes(sizes: Sequence[Dictionary], batch_size: int) -> float:
    """Rows and what a step holds beside them: of all at once of those that step as one, else of the largest."""
    together, largest_alone = 0.0, 0.0
    for size in sizes:
        rows = _row_bytes([size], batch_size)
        kept = float(size.l0)
        if size.kind in SPARSE:  # a row may have many times its share, up to where a step is dense
            most = min(max(kept, size.start_l0 or 0.0), DENSE_SHARE * size.d_sae)
            kept = min(ROW_SHARE * most, size.d_sae)
        sparse = batch_size * (2.0 * min(size.d_sae, TILE) + CANDIDATE_BYTES * (kept + 8)) + rows
        if size.kind in STACKED:
            together += sparse
        # the first step of all others is dense, and taken one after the other
        dense = (
            0.0 if size.kind in FAST | FLOAT32 | {"mlp_encoder"} else _DENSE * size.d_sae * batch_size + rows
        )
        largest_alone = max(largest_alone, sparse, dense)
    return max(together, largest_alone)
