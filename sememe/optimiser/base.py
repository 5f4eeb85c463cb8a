"""What every optimiser of a dictionary shares: parameters seen latent by latent, resets, frozen latents, clipping.

Knows a dictionary's constraints; knows no data, no loss and no schedule. One optimiser a file, each final.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe import kernels
from sememe.config import Config
from sememe.dictionaries.base import Trainable

__all__ = ["BaseConfig", "Optimiser", "renormalise"]


class BaseConfig(Config, abc.ABC):
    """What every optimiser's config shares. Subclasses add `kind` (the discriminator) and their options."""

    default_decay: ClassVar[float] = 0.3
    """Share of the run, at its end, over which the learning rate falls to 0, if the trainer is not told."""

    kind: str
    """Name of the optimiser."""

    @abc.abstractmethod
    def learning_rate(self, d_sae: int) -> float:
        """The peak learning rate for a width, if the trainer is not told."""


class Optimiser(abc.ABC):
    """Updates a dictionary's parameters and keeps its constraints while doing so.

    A parameter of shape (d_in, d_sae) is stored and updated latent by latent (see
    `dictionaries.initial.latent_major`), so that its gradient and its slots are too. `slots` are the tensors
    that the optimiser keeps for each parameter, by the parameter's name and then their own.

    Args:
        dictionary: Whose parameters.
        clip: Largest global Euclidean norm of the gradient; a longer one is scaled down to it.
    """

    slots: dict[str, dict[str, Tensor]]

    def __init__(self, dictionary: Trainable, clip: float | None = None) -> None:
        self.clip, self.step_count = clip, 0
        self.parameters = dict(dictionary.named_parameters())
        constraints = dictionary.constraints()
        self.unit_norm, self.non_negative = (
            frozenset(constraints.unit_norm),
            frozenset(constraints.non_negative),
        )
        self.d_sae = dictionary.d_sae
        self.latents = {name: dictionary.latents_of(name) for name in self.parameters}
        device = next(iter(self.parameters.values())).device
        self.frozen = torch.zeros(self.d_sae, dtype=torch.bool, device=device)
        self.any_frozen = False  # known here, so that nothing has to ask the device
        self.slots = {}
        for name, param in self.parameters.items():
            param.data = kernels.in_large_pages(param.data)
            slots = self._new_slots(name, self._rows(name, param))
            self.slots[name] = {slot: kernels.in_large_pages(tensor) for slot, tensor in slots.items()}

    @abc.abstractmethod
    def _new_slots(self, name: str, rows: Float[Tensor, "rows columns"]) -> dict[str, Tensor]:
        """The slots of a parameter, given it row by row."""

    @abc.abstractmethod
    def _update(
        self,
        name: str,
        rows: Float[Tensor, "rows columns"],
        grad: Float[Tensor, "rows columns"],
        lr: float,
        scale: float | Float[Tensor, ""],
        frozen: Bool[Tensor, " rows"] | None,
    ) -> None:
        """Update one parameter in place."""

    def _rows(self, name: str, tensor: Tensor) -> Float[Tensor, "rows columns"]:
        """A two-dimensional view, one row per latent where there is a latent axis."""
        tensor = tensor.detach()
        if tensor.dim() == 2:
            return tensor.T if self._latents_last(name) else tensor
        of = self.latents[name]
        return tensor.reshape(1 if of is None else of.stop - of.start, -1)

    def _latents_last(self, name: str) -> bool:
        """Whether a parameter of two dimensions has its latents along the second one."""
        param, of = self.parameters[name], self.latents[name]
        if of is None:
            return False
        n = of.stop - of.start
        # where both dimensions fit, the layout tells: latent-major means that columns are contiguous
        return param.shape[0] != n or (param.shape[1] == n and not param.is_contiguous())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient, and forget the gradients. Never waits for the device."""
        self.step_count += 1
        scale = self._scale()
        for name, param in self.parameters.items():
            if param.grad is None:
                continue
            of = self.latents[name]
            frozen = self.frozen[of] if self.any_frozen and of is not None else None
            rows = self._rows(name, param)
            self._update(name, rows, self._rows(name, param.grad), lr, scale, frozen)
            if name in self.non_negative:
                for tensor in (rows, *self._points(name)):
                    tensor.clamp_(min=0)
                for tensor in (rows, *self._unit_points(name)) if name in self.unit_norm else ():
                    renormalise(tensor, frozen)
            param.grad = None

    def _points(self, name: str) -> tuple[Tensor, ...]:
        """Slots that are places of the parameter, and so never below 0 where it is not."""
        return ()

    def _unit_points(self, name: str) -> tuple[Tensor, ...]:
        """Those of them whose rows have norm 1 where its rows have: not an average of such rows."""
        return ()

    def _scale(self) -> float | Float[Tensor, ""]:
        """What the gradient is multiplied by so that its norm is at most `clip`: one reduction, left on the device."""
        if self.clip is None:
            return 1.0
        grads = [param.grad for param in self.parameters.values() if param.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        scale: Tensor = (self.clip / norm.clamp_min(1e-12)).clamp_max(1.0)
        return scale

    def forget(self, ids: Int[Tensor, " n"]) -> None:
        """Begin anew for latents that were changed from outside: encoder, decoder and biases."""
        for name in self.parameters:
            own = self._own(name, ids)
            for slot in self.slots[name].values():
                slot[own] = 0.0

    def _own(self, name: str, ids: Int[Tensor, " n"]) -> Int[Tensor, " n_own"]:
        """The rows of a parameter that belong to some latents."""
        of = self.latents[name]
        return ids[:0] if of is None else ids[(ids >= of.start) & (ids < of.stop)] - of.start

    def freeze(self, latents: Bool[Tensor, " d_sae"]) -> None:
        """These latents, and those frozen before, keep every bit of their parameters from now on."""
        self.frozen |= latents
        self.any_frozen = True

    def frac_frozen(self) -> float:
        """Share of the latents that are frozen."""
        return float(self.frozen.float().mean())

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Inside, the dictionary has the weights that are meant to be used: for most optimisers, its own."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """Slots, frozen latents and step count."""
        state: dict[str, Any] = {
            "step_count": self.step_count,
            "any_frozen": self.any_frozen,
            "frozen": self.frozen,
        }
        for name, slots in self.slots.items():
            state |= {f"{slot}.{name}": tensor for slot, tensor in slots.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step_count, self.any_frozen = state["step_count"], state["any_frozen"]
        self.frozen.copy_(state["frozen"])
        for name, slots in self.slots.items():
            for slot, tensor in slots.items():
                tensor.copy_(state[f"{slot}.{name}"])


def renormalise(rows: Float[Tensor, "*n rows columns"], frozen: Bool[Tensor, "*n rows"] | None) -> None:
    """Give rows norm 1 in place. A frozen row keeps every bit: dividing it by a norm of nearly 1 would not."""
    norms = rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    rows.div_(norms if frozen is None else norms.masked_fill(frozen[..., None], 1.0))
