"""Random numbers that training steps draw, so that a resumed run draws the same. Knows no architecture.

A generator's own state cannot lie among tensors that a checkpoint copies back in place, and drawing moves it. Here
the state is two numbers, a seed and a step, and each step's generator is made from them: the loss of a step is the
same however often it is asked for.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["RandomState"]


class RandomState:
    """A seed and a step. `state` belongs into `training_buffers`; it stays on the CPU, so reading it waits for nothing.

    Example:
        >>> numbers = RandomState()
        >>> numbers.start(torch.Generator().manual_seed(0))
        >>> a, b = (torch.rand(2, generator=numbers.generator(torch.device("cpu"))) for _ in range(2))
        >>> torch.equal(a, b)  # until next_step()
        True
    """

    state: Int[Tensor, " 2"]

    def __init__(self) -> None:
        self.state = torch.zeros(2, dtype=torch.int64)

    def start(self, generator: torch.Generator) -> None:
        """Draw a seed; step 0."""
        self.state[0] = torch.randint(2**62, (), generator=generator)
        self.state[1] = 0

    def next_step(self) -> None:
        """Other numbers from now on."""
        self.state[1] += 1

    def generator(self, device: torch.device, part: int = 0) -> torch.Generator:
        """This step's generator, always at its start; one of its own for each part of a step that is done in parts."""
        seed, step = self.state.tolist()
        # a CPU generator reads only the low 32 bits of its seed: neighbouring numbers have to be mixed first
        digest = hashlib.sha256(f"{seed} {step} {part}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
