"""What every source gives to a target directly: one row of the graph per backward's row.

Knows the frozen model and the sources. A target is a direction at one position of what an MLP reads or the unembedding
sees: a latent's encoder row, or a token's unembedding minus the vocabulary's mean. Its gradient in the frozen model,
times what each source writes, is exact, since that model is affine: with what comes from biases the row adds up to the
target's own value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.circuit.sources import Sources
from sememe.lm import Frozen

__all__ = ["RowSet", "Rows", "Targets"]


class Targets(NamedTuple):
    """Directions whose value is explained. Layer n_layers is what the unembedding sees."""

    layer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    vector: Float[Tensor, "n d"]
    offset: Float[Tensor, " n"]
    """A constant of the target's own: an encoder's bias."""
    value: Float[Tensor, " n"]
    """What it is in the model's own forward."""


class RowSet(NamedTuple):
    """Rows of the graph."""

    weights: Float[Tensor, "n sources"]
    rest: Float[Tensor, " n"]
    """What comes from biases: the decoders', the model's own, the target's."""
    off: Float[Tensor, " n"]
    """How far weights and rest are from adding up to the target's value, as a share of the sum of their sizes."""


class Rows:
    """The frozen forward of as many equal rows as a backward has, kept for all backwards.

    Args:
        frozen: The model on the prompt.
        sources: What it adds up.
        batch: Rows of one backward.
    """

    def __init__(self, frozen: Frozen, sources: Sources, batch: int) -> None:
        self.sources, self.batch = sources, batch
        n_layers = sources.n_layers

        def leaf(x: Tensor) -> Tensor:
            return x.detach().expand(batch, *x.shape).clone().requires_grad_(True)

        with torch.enable_grad():
            self._embedding = leaf(frozen.embedding)
            self._out = [leaf(sources.leaf(layer)) for layer in range(n_layers)]
            run = frozen.run(self._embedding, [sources.put(i, x) for i, x in enumerate(self._out)])
        self._places = [*run.mlp_in, run.hidden]
        with torch.no_grad():
            nothing = torch.zeros_like(frozen.embedding)[None]
            zero = frozen.run(
                nothing, [sources.put(i, torch.zeros_like(x[:1])) for i, x in enumerate(self._out)]
            )
        self._constants = [x[0].float() for x in (*zero.mlp_in, zero.hidden)]

    def of(self, targets: Targets) -> RowSet:
        """The rows of at most `batch` targets."""
        n = len(targets.layer)
        assert 0 < n <= self.batch
        outputs, gradients = [], []
        rest = targets.offset.float().clone()
        for layer in sorted(set(targets.layer.tolist())):
            at = torch.nonzero(targets.layer == layer)[:, 0]
            place, positions, vectors = self._places[layer], targets.position[at], targets.vector[at].float()
            gradient = torch.zeros_like(place)
            gradient[at, positions] = vectors.to(place.dtype)
            outputs.append(place)
            gradients.append(gradient)
            rest[at] += (vectors * self._constants[layer][positions]).sum(1)
        found = torch.autograd.grad(
            outputs, [self._embedding, *self._out], gradients, retain_graph=True, allow_unused=True
        )
        embedding = torch.zeros_like(self._embedding) if found[0] is None else found[0]
        weights, bias = self.sources.collect(
            embedding[:n], [None if one is None else one[:n] for one in found[1:]]
        )
        rest = rest + bias
        size = weights.abs().sum(1) + rest.abs()
        off = (weights.sum(1) + rest - targets.value).abs() / size.clamp_min(1e-12)
        return RowSet(weights, rest, off)
