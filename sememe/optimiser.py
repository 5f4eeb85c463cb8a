"""Adam for dictionaries: parameters seen latent by latent, constraints kept in the same pass. Knows no data."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Trainable

__all__ = ["Adam"]


class Adam:
    """Adam over a dictionary's parameters, with one moment row per latent where a parameter has a latent axis.

    A parameter of shape (d_in, d_sae) is stored and updated latent by latent (see
    `dictionaries.initial.latent_major`), so that its gradient and moments are too.

    Args:
        dictionary: Whose parameters.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.

    Source: Kingma & Ba 2015, arXiv:1412.6980.
    """

    def __init__(
        self, dictionary: Trainable, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.betas, self.eps, self.step_count = betas, eps, 0
        self.parameters = dict(dictionary.named_parameters())
        self.unit_norm = frozenset(dictionary.constraints().unit_norm)
        self.d_sae = dictionary.d_sae
        self.moments = {
            name: (torch.zeros_like(self._rows(p.detach())), torch.zeros_like(self._rows(p.detach())))
            for name, p in self.parameters.items()
        }

    def _rows(self, tensor: Tensor) -> Float[Tensor, "rows columns"]:
        """A contiguous two-dimensional view, one row per latent where there is a latent axis."""
        if tensor.dim() == 1:
            return tensor.contiguous().view(-1, 1) if tensor.shape[0] == self.d_sae else tensor.view(1, -1)
        return tensor if tensor.is_contiguous() else tensor.T

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient, and forget the gradients."""
        self.step_count += 1
        for name, param in self.parameters.items():
            if param.grad is None:
                continue
            rows = self._rows(param.detach())
            grad = (
                param.grad if rows.shape == param.shape else param.grad.T if param.dim() == 2 else param.grad
            )
            kernels.adam_step(
                rows,
                grad.reshape(rows.shape),
                *self.moments[name],
                step=self.step_count,
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                grad_scale=1.0,
                unit_norm=name in self.unit_norm,
            )
            param.grad = None

    def forget(self, ids: Int[Tensor, " n"]) -> None:
        """Zero the moments of some latents: encoder, decoder and bias."""
        for first, second in self.moments.values():
            if first.shape[0] == self.d_sae:
                first[ids] = 0.0
                second[ids] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Moments and step count."""
        state: dict[str, Any] = {"step_count": self.step_count}
        for name, (first, second) in self.moments.items():
            state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"] = first, second
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step_count = state["step_count"]
        for name, (first, second) in self.moments.items():
            first.copy_(state[f"exp_avg.{name}"])
            second.copy_(state[f"exp_avg_sq.{name}"])
