"""The optimisers of several dictionaries of one shape, for a GPU: Adam's in one pass, others in turn. Knows no data.

The optimisers stay what they are: moments and frozen latents become parts of the stack's, so that resets, freezing
and checkpoints go through each of them as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.optimiser.adam import Adam
from sememe.optimiser.base import Optimiser, renormalise

__all__ = ["AdamStack", "InTurn"]


class AdamStack:
    """One update of all; every dictionary has a learning rate of its own.

    Args:
        optimisers: One for each dictionary, with equal options, after equally many steps.
        parameters: Those of all by name, with a leading axis, laid out as each dictionary's.
    """

    def __init__(self, optimisers: Sequence[Adam], parameters: Mapping[str, Tensor]) -> None:
        self.optimisers, self.parameters = list(optimisers), dict(parameters)
        first = self.optimisers[0]
        self.config, self.latents, self.unit_norm = first.config, first.latents, first.unit_norm
        self.non_negative = first.non_negative
        assert all(one.config == first.config for one in self.optimisers)
        assert all(
            (one.unit_norm, one.non_negative) == (self.unit_norm, self.non_negative)
            for one in self.optimisers
        )
        self.frozen = torch.stack([one.frozen for one in self.optimisers])
        for one, part in zip(self.optimisers, self.frozen, strict=True):
            one.frozen = part
        self.slots: dict[str, dict[str, Tensor]] = {}
        for name in self.parameters:
            self.slots[name] = {}
            for slot in first.slots[name]:
                stacked = torch.stack([one.slots[name][slot] for one in self.optimisers])
                self.slots[name][slot] = stacked
                for one, part in zip(self.optimisers, stacked, strict=True):
                    one.slots[name][slot] = part

    def _rows(self, name: str, tensor: Tensor) -> Float[Tensor, "n rows columns"]:
        """A three-dimensional view, one row per latent where there is a latent axis."""
        rows, columns = self.slots[name]["exp_avg"].shape[1:]
        tensor = tensor.detach()
        stored = tensor if tensor.is_contiguous() else tensor.mT
        return stored.reshape(-1, rows, columns)

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Update every dictionary's parameters, and forget the gradients. Never waits for the device.

        Args:
            rates: Each dictionary's learning rate.
        """
        for one in self.optimisers:
            one.step_count += 1
        lr = kernels.to_device(rates, torch.float64, self.frozen.device)
        scale = self._scale()
        any_frozen = any(one.any_frozen for one in self.optimisers)
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            of = self.latents[name]
            slots, config = self.slots[name], self.config
            rows = self._rows(name, parameter)
            frozen = self.frozen[:, of] if any_frozen and of is not None else None
            kernels.adam_step(
                rows,
                self._rows(name, parameter.grad),
                slots["exp_avg"],
                slots["exp_avg_sq"],
                step=self.optimisers[0].step_count,
                lr=lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                grad_scale=scale,
                unit_norm=name in self.unit_norm,
                frozen=frozen,
            )
            if name in self.non_negative:
                rows.clamp_(min=0)
                if name in self.unit_norm:
                    renormalise(rows, frozen)
            parameter.grad = None

    def _scale(self) -> float | Float[Tensor, " n"]:
        """What each dictionary's gradient is multiplied by so that its norm is at most `clip`."""
        if self.config.clip is None:
            return 1.0
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        axes = [tuple(range(1, grad.dim())) for grad in grads]
        own = [torch.linalg.vector_norm(grad, dim=dim) for grad, dim in zip(grads, axes, strict=True)]
        norms: Tensor = torch.stack(own).norm(dim=0)
        scale: Tensor = (self.config.clip / norms.clamp_min(1e-12)).clamp_max(1.0)
        return scale


class InTurn:
    """Optimisers of which each takes its own step, from gradients that came for all at once.

    Args:
        optimisers: One for each dictionary.
        parameters: Those of all by name, with a leading axis, of which each dictionary's are parts.
    """

    def __init__(self, optimisers: Sequence[Optimiser], parameters: Mapping[str, Tensor]) -> None:
        self.optimisers, self.parameters = list(optimisers), dict(parameters)

    def step(self, rates: Sequence[float]) -> None:
        """Update every dictionary's parameters, and forget the gradients. Never waits for the device.

        Args:
            rates: Each dictionary's learning rate.
        """
        for i, (one, rate) in enumerate(zip(self.optimisers, rates, strict=True)):
            for name, parameter in self.parameters.items():
                one.parameters[name].grad = None if parameter.grad is None else parameter.grad[i]
            one.step(rate)
        for parameter in self.parameters.values():
            parameter.grad = None
