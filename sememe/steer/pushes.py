"""What is added to the activations while a model writes, and how. Knows a dictionary's sites; knows no text.

With v what a dose of 1 adds, u its direction, s the dose and p what of a row x lies along u:

    add          x + s v
    orthogonal   x - p u + s v          the dose, whatever was there
    cap          x + (max(p, s |v|) - p) u  for s > 0; min for s < 0; x for s = 0
    clamp        the latent's activation becomes s times its largest, and x moves by the difference along what it
                 writes; a direction that is no latent's has no activation, and is set as in orthogonal

Sources: add, Turner et al. 2023, arXiv:2308.10248; clamp, Templeton et al. 2024, "Scaling Monosemanticity"; orthogonal
and cap as Neuronpedia's steering has them. Where a dictionary writes to several hookpoints, each has its own part of v.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.base import Dictionary, Site
from sememe.edits import Intervention, LatentEdit, check
from sememe.errors import ActivationError
from sememe.lm import LanguageModel
from sememe.steer.config import Style

__all__ = ["Push", "latents_push", "like", "pushing", "random_push", "steered"]


class Push(NamedTuple):
    """A direction to steer along."""

    kind: str
    draw: int | None
    """Which of several random ones."""
    vector: Float[Tensor, " d_out"]
    """What a dose of 1 adds, over all outputs."""
    largest: tuple[tuple[int, float], ...] = ()
    """Of the latents' own: each with its largest activation."""


def latents_push(dictionary: Dictionary, largest: Sequence[tuple[int, float]]) -> Push:
    """What the latents write at their largest activations, all together."""
    directions = dictionary.decoder_directions().detach().float().cpu()
    vector = torch.stack([act * directions[latent] for latent, act in largest]).sum(0)
    return Push("latents", None, vector, tuple(largest))


def like(vector: Float[Tensor, " d_out"], push: Push, kind: str, draw: int | None = None) -> Push:
    """Another direction, as long as a push: equal doses move the activations equally far."""
    return Push(kind, draw, vector * (push.vector.norm() / vector.norm()))


def random_push(push: Push, draw: int, seed: int) -> Push:
    """A random direction of the same length: what any push of this size does."""
    generator = torch.Generator().manual_seed(seed + draw)
    return like(torch.randn(push.vector.shape, generator=generator), push, "random direction", draw)


def steered(
    x: Float[Tensor, "*rows d"], vector: Float[Tensor, " d"], strength: float, style: Style
) -> Float[Tensor, "*rows d"]:
    """Rows moved along a direction, as the module says; clamp as orthogonal."""
    if style == "add":
        return x + strength * vector
    size: Tensor = vector.norm()
    unit: Tensor = vector / size.clamp_min(torch.finfo(vector.dtype).tiny)
    along: Tensor = (x @ unit)[..., None]
    if style != "cap":
        return x - along * unit + strength * vector
    if strength == 0:
        return x
    dose = float(strength * size)
    wanted = along.clamp(min=dose) if strength > 0 else along.clamp(max=dose)
    return x + (wanted - along) * unit


@contextlib.contextmanager
def pushing(
    lm: LanguageModel, dictionary: Dictionary, push: Push | None, strength: float, style: Style
) -> Iterator[None]:
    """Every forward inside the context is steered, KV-cached generation included; None steers nothing.

    Rows whose norm is over the dictionary's limit (attention sinks) are left as they are.

    Raises:
        MismatchError: the dictionary belongs to another model.
        ActivationError: (in the forward) the dose drives activations to NaN or infinity, there or in the last layer.
    """
    if push is None:
        yield
        return
    check(dictionary, lm)
    with contextlib.ExitStack() as stack:
        if style == "clamp" and push.largest:
            edits = [
                LatentEdit(latents=(latent,), how="clamp", value=strength * act)
                for latent, act in push.largest
            ]
            stack.enter_context(Intervention(dictionary, edits).on(lm))
        else:
            assert dictionary.sites is not None
            hooks = {
                site.hookpoint: _hook(site, push.vector[site.start : site.stop], strength, style)
                for site in dictionary.sites.outputs
            }
            stack.enter_context(lm.edit(hooks))
        last = f"resid_post.{lm.n_layers - 1}"
        stack.enter_context(lm.edit({last: lambda x: _finite(x, last)}))
        yield


def _hook(
    site: Site, vector: Float[Tensor, " d"], strength: float, style: Style
) -> Callable[[Tensor], Tensor]:
    def hook(x: Tensor) -> Tensor:
        rows = x.float()
        new = steered(rows, vector.to(x.device), strength, style)
        new = torch.where(site.admits(rows)[..., None], new, rows)
        return _finite(new.to(x.dtype), site.hookpoint)

    return hook


def _finite(x: Tensor, where: str) -> Tensor:
    # the norm and not the entries: layer norms square what they get, and give zeros when that overflows
    if not bool(torch.isfinite(x.float().norm(dim=-1)).all()):
        raise ActivationError(
            f"steering must leave the activations at {where} of finite norm",
            "NaN or infinity",
            "Lower --strengths.",
        )
    return x
