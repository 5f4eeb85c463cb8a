"""Dictionaries of one shape as one, for a GPU: parameters with a leading axis, one step for all.

Knows kernels and dictionaries; knows no optimiser and no data. The dictionaries stay what they are: their parameters
and counters become parts of the stack's, so that whatever is done to one of them is done here.

`base` holds what all stacks share, `counted` those that keep a number of latents, `penalised` those whose number
varies. What is not here steps by itself: architectures with a skip connection or weights in their choice, with noise,
with l_1/2 or an entropy penalty, with ghost gradients; pursuits, LISTA, variational and cross-layer dictionaries.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sememe.dictionaries.base import Trainable
from sememe.dictionaries.stacked.base import Stack, StackLoss
from sememe.dictionaries.stacked.counted import CountedStack
from sememe.dictionaries.stacked.penalised import (
    GatedStack,
    JumpReLUStack,
    PAnnealStack,
    ReLUStack,
    TiedStack,
)

__all__ = ["Stack", "StackLoss", "stack_of", "stackable"]

_STACKS: tuple[type[Stack], ...] = (
    CountedStack,
    JumpReLUStack,
    ReLUStack,
    TiedStack,
    GatedStack,
    PAnnealStack,
)


def stackable(dictionary: Trainable) -> Hashable | None:
    """What dictionaries that can be one stack have in common; None for one that can be part of none."""
    for kind in _STACKS:
        alike = kind.alike(dictionary)
        if alike is not None:
            shape = dictionary.d_in, dictionary.d_out, dictionary.d_sae
            return kind, dictionary.kind, shape, alike
    return None


def stack_of(dictionaries: Sequence[Trainable]) -> Stack:
    """Dictionaries as one.

    Args:
        dictionaries: On one device, alike as `stackable` says; their parameters and counters are parts of the stack's
            from now on.
    """
    kind = next(kind for kind in _STACKS if kind.alike(dictionaries[0]) is not None)
    return kind(dictionaries)
