"""What all stacks share: parameters and counters of which each dictionary's are parts. Knows no objective."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Loss, Trainable
from sememe.encoded import Encoded

__all__ = ["Stack", "StackLoss"]


class StackLoss(NamedTuple):
    """What a step of all leaves; everything on the device."""

    totals: Float[Tensor, " n"]
    """Each dictionary's loss. Their sum gives each its own gradients: none depends on another's parameters."""
    terms: dict[str, Float[Tensor, " n"]]
    """Its parts, without gradient; `mse` among them."""
    of_some: dict[str, dict[int, Float[Tensor, ""]]]
    """Parts that some have, by name and place."""
    encoded: Encoded
    """Of all, see `kernels.together`; detached."""
    error: Float[Tensor, "n batch d_out"]
    """Reconstruction minus target; detached."""


class Stack(abc.ABC):
    """Dictionaries of one shape on one device.

    Args:
        dictionaries: Of one architecture, alike as `alike` says; their parameters and counters are parts of this
            stack's from now on.
    """

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        self.dictionaries = list(dictionaries)
        first = self.dictionaries[0]
        self.n, self.d_in, self.d_sae, self.device = (
            len(self.dictionaries),
            first.d_in,
            first.d_sae,
            first.scale_in.device,
        )
        self.parameters: dict[str, Tensor] = {}
        for name in dict(first.named_parameters()):
            own = [dictionary.get_parameter(name) for dictionary in self.dictionaries]
            self.parameters[name] = _side_by_side(own).requires_grad_()
            for parameter, part in zip(own, self.parameters[name].detach(), strict=True):
                parameter.data = part
        self.tokens_since_fired = self._shared("tokens_since_fired")
        self.overflow_steps = self._shared("overflow_steps")
        self.b_pre = self._copied("b_pre")
        self.b_dec = self.parameters["b_dec"] if "b_dec" in self.parameters else self._copied("b_dec")
        self.scale_in = torch.stack([one.scale_in.expand(one.d_in) for one in self.dictionaries])[:, None]
        self.scale_out = torch.stack([one.scale_out.expand(one.d_out) for one in self.dictionaries])[:, None]

    def _copied(self, name: str) -> Tensor:
        """What no step changes, of all."""
        return torch.stack([getattr(one, name) for one in self.dictionaries])

    def _shared(self, name: str) -> Tensor:
        """A buffer of all, of which each one's is a part from now on."""
        whole = self._copied(name)
        for one, part in zip(self.dictionaries, whole, strict=True):
            setattr(one, name, part)
        return whole

    def _numbers(self, numbers: Sequence[float]) -> Float[Tensor, " n"]:
        """One for each, on the device."""
        return kernels.to_device(numbers, torch.float32, self.device)

    @staticmethod
    @abc.abstractmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """What dictionaries of one architecture and shape must have in common beside that to be one stack; None for
        one that can be part of none."""

    def ready(self, n_rows: int) -> bool:
        """Whether the next step, of n_rows each, can be taken as one; else each has to take it by itself. To be asked
        once before each step."""
        return True

    @abc.abstractmethod
    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss on its own rows, in its training units.

        Args:
            x: Inputs.
            target: Targets.
            progress: From 0 to 1 over the run.
        """

    def _inputs(self, x: Float[Tensor, "n batch d_in"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every encoder reads."""
        return x, self.parameters["W_enc"], self.parameters["b_enc"], self.b_pre

    def _error(
        self, encoded: Encoded, target: Float[Tensor, "n batch d_out"]
    ) -> Float[Tensor, "n batch d_out"]:
        """Reconstruction minus target."""
        recon = kernels.decode_encoded(encoded, self.parameters["W_dec"], self.b_dec)
        return recon.view(target.shape) - target

    @torch.no_grad()
    def after_step(self, loss: StackLoss) -> None:
        """As the dictionaries' own, for all at once."""
        encoded = loss.encoded
        self.tokens_since_fired += encoded.n_rows // self.n
        self.tokens_since_fired.masked_fill_(kernels.fired(encoded).view(self.n, -1), 0)
        if encoded.overflow is not None:
            self.overflow_steps += encoded.overflow

    def loss_of(self, loss: StackLoss, i: int) -> Loss:
        """What the i-th would have given alone, without gradient; waits for the device."""
        terms = {name: values[i] for name, values in loss.terms.items()}
        terms |= {name: of_some[i] for name, of_some in loss.of_some.items() if i in of_some}
        own = self._apart(loss.encoded, i)
        if loss.encoded.overflow is not None:
            own.overflow = loss.encoded.overflow[i]
        return Loss(loss.totals[i].detach(), terms, own, loss.error[i])

    def _apart(self, encoded: Encoded, i: int) -> Encoded:
        """The i-th one's own entries."""
        return kernels.apart(encoded, self.n, i)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor with a leading axis, each part laid out in memory as the tensor it is made of."""
    if tensors[0].dim() == 2 and not tensors[0].is_contiguous():
        return torch.stack([tensor.detach().T for tensor in tensors]).mT
    return torch.stack([tensor.detach() for tensor in tensors])
