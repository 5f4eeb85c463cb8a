"""What a direction of the residual stream does to the logits by the direct path. Knows modules, not models.

The final norm divides by the length of what it gets, which depends on the text; here that division is left out,
and what remains is linear: centre (where the norm does), scale by the norm's weight, project, unembed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sememe.lm.hookpoints import attach

__all__ = ["Readout", "affine_of", "between_stack_and_head"]


class Readout(NamedTuple):
    """The linear part of the way from the last layer's output to the logits.

    `projections` are matrices after the norm; OPT-350m has one.
    """

    scale: Float[Tensor, " d_model"]
    centred: bool
    projections: tuple[Tensor, ...]
    unembedding: Float[Tensor, "vocab d"]

    @classmethod
    def of(cls, between: Sequence[nn.Module], unembedding: Float[Tensor, "vocab d"], d_model: int) -> Readout:
        """From the modules between the last layer and the unembedding."""
        device = unembedding.device
        scale, centred, projections = torch.ones(d_model, device=device), False, list[Tensor]()
        for module in between:
            if isinstance(module, nn.Linear):
                projections.append(module.weight.detach().float().to(device))
                continue
            scale, _, centred = affine_of(module, d_model, device)
        return cls(scale, centred, tuple(projections), unembedding)

    def logits(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """Float32 logits minus their mean over the vocabulary, of products in the unembedding's dtype."""
        with torch.no_grad():
            x = directions.to(self.unembedding.device, torch.float32)
            x = (x - x.mean(1, keepdim=True) if self.centred else x) * self.scale
            for projection in self.projections:
                x = x @ projection.T
            logits = (x.to(self.unembedding.dtype) @ self.unembedding.T).float()
            return logits.sub_(logits.mean(1, keepdim=True))


def affine_of(
    norm: nn.Module, d_model: int, device: torch.device
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"], bool]:
    """A norm's gain and bias, and whether it centres, from what it does: architectures differ in how the stored weight
    enters (Gemma adds 1)."""
    x = torch.ones(d_model, device=device)
    x[1::2] = -1
    if d_model % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0])
    x /= x.square().mean().sqrt()
    norm = copy.deepcopy(norm).float().to(device)
    # Mean zero and mean square one, and far above the norm's epsilon.
    with torch.no_grad():
        plus, minus, flat = norm(torch.stack([x, -x, torch.ones_like(x)])[None] * 1e4)[0].float()
    scale, bias = (plus - minus) / (2 * x), (plus + minus) / 2
    return scale, bias, bool(torch.allclose(flat, bias, atol=1e-3 * float(scale.abs().max())))


def between_stack_and_head(
    hf: nn.Module, layers: Sequence[nn.Module], head: nn.Module, forward: Callable[[], Any]
) -> list[nn.Module]:
    """The norms and projections that run after the last layer and before the unembedding, seen in one forward."""
    ran: list[nn.Module] = []
    inside = {id(module) for layer in layers for module in layer.modules()}

    def saw(module: nn.Module, *_: Any) -> None:
        ran.append(module)

    with contextlib.ExitStack() as hooks:
        hooks.callback(attach(layers[-1], "out", lambda _: ran.clear()).remove)
        for module in hf.modules():
            leaf = not any(True for _ in module.children())
            counts = isinstance(module, nn.Linear) or "Norm" in type(module).__name__
            if leaf and counts and id(module) not in inside and module is not head:
                hooks.callback(module.register_forward_hook(saw).remove)
        forward()
    return ran
