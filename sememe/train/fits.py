"""Whether a training fits in the memory that is free, asked before anything is made. Knows shapes, no rows."""

from __future__ import annotations

from collections.abc import Sequence

from sememe import needs
from sememe.source import Buffers, Source
from sememe.train.config import TrainConfig
from sememe.train.member import Spec

__all__ = ["check_fits"]


def check_fits(config: TrainConfig, specs: Sequence[Spec], source: Source) -> None:
    """Refuse what cannot fit, by the numbers that `sememe plan` has too.

    Args:
        config: What all share.
        specs: The dictionaries to be trained side by side.
        source: Where rows come from.

    Raises:
        ResourceError: more memory is needed than is free, here or on a device; says which number would fit.
    """
    sizes = [needs.size_of(spec.config.architecture, spec.d_in, spec.d_out, spec.sites) for spec in specs]
    buffer = source.buffer_bytes if isinstance(source, Buffers) else 0.0
    wanted, knobs = needs.training(sizes, config.batch_size, buffer, config.devices)
    # what this process has already is part of what it needs: imports, a language model
    free = needs.memory_free() + min(needs.resident(), needs.BASE)
    needs.refuse("train", "memory", free, wanted, knobs, lambda bytes_: bytes_.memory)
    for device in config.devices:
        on_device = needs.gpu_free(device)
        if on_device is not None:
            needs.refuse("train", "memory of the GPU", on_device, wanted, knobs, lambda bytes_: bytes_.gpu)
