"""What a training takes in memory, what this machine has free, and the number that fits. Knows no recipe and no data.

machine.py    what is free
refusal.py    what cannot fit, refused with the number that does
training.py   bytes of dictionaries in training, from their shapes
"""

from __future__ import annotations

from sememe.needs.machine import disk_free, gpu_free, memory_free, resident
from sememe.needs.refusal import Bytes, Knob, largest, refuse
from sememe.needs.training import (
    BASE,
    FAST,
    FLOAT32,
    SPARSE,
    Dictionary,
    size_of,
    store_buffer,
    train_bytes,
    training,
)

__all__ = [
    "BASE",
    "FAST",
    "FLOAT32",
    "SPARSE",
    "Bytes",
    "Dictionary",
    "Knob",
    "disk_free",
    "gpu_free",
    "largest",
    "memory_free",
    "refuse",
    "resident",
    "size_of",
    "store_buffer",
    "train_bytes",
    "training",
]
