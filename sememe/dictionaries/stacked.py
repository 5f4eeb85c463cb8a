"""Several TopK dictionaries of one shape as one, for a GPU: every parameter with a leading axis, one step for all.

Knows kernels and dictionaries; knows no optimiser and no data. The dictionaries stay what they are: their parameters
and counters become parts of the stack's, so that whatever is done to one of them is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.auxiliary import auxk_loss_of
from sememe.dictionaries.base import Loss, Trainable
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.topk import TopK
from sememe.encoded import Encoded

__all__ = ["Stack", "StackLoss", "side_by_side", "stackable"]

NEVER = 2**62
"""Rows after which a latent counts as dead where nothing is done for dead ones."""


class StackLoss(NamedTuple):
    """What a step of all leaves; everything on the device."""

    totals: Float[Tensor, " n"]
    """Each dictionary's loss. Their sum gives each its own gradients: none depends on another's parameters."""
    mses: Float[Tensor, " n"]
    auxk: dict[int, Float[Tensor, ""]]
    """By place, of those that have dead latents."""
    acts: Float[Tensor, "n batch k"]
    indices: Int[Tensor, "n batch k"]
    error: Float[Tensor, "n batch d_out"]


def stackable(dictionary: Trainable) -> bool:
    """Whether a dictionary can be part of a stack: TopK, without a skip connection or weights in its choice."""
    return (
        isinstance(dictionary, TopK)
        and not dictionary.config.skip
        and dictionary.config.site_norms == "l2"
        and dictionary.decoder_bias
    )


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor with a leading axis, each part laid out in memory as the tensor it is made of."""
    if tensors[0].dim() == 2 and not tensors[0].is_contiguous():
        return torch.stack([tensor.detach().T for tensor in tensors]).mT
    return torch.stack([tensor.detach() for tensor in tensors])


class Stack:
    """TopK dictionaries of one shape on one device; k and the options of AuxK may differ.

    Args:
        dictionaries: Which; their parameters and counters are parts of this stack's from now on.
    """

    def __init__(self, dictionaries: Sequence[TopK]) -> None:
        self.configs = [dictionary.config for dictionary in dictionaries]
        first = dictionaries[0]
        self.d_in, self.d_sae, device = first.d_in, first.d_sae, first.W_dec.device
        self.parameters: dict[str, Tensor] = {}
        for name in dict(first.named_parameters()):
            own = [dictionary.get_parameter(name) for dictionary in dictionaries]
            self.parameters[name] = side_by_side(own).requires_grad_()
            for parameter, part in zip(own, self.parameters[name].detach(), strict=True):
                parameter.data = part
        self.tokens_since_fired = torch.stack([one.tokens_since_fired for one in dictionaries])
        for dictionary, part in zip(dictionaries, self.tokens_since_fired, strict=True):
            dictionary.tokens_since_fired = part
        self.b_pre = torch.stack([one.b_pre for one in dictionaries])
        self.scale_in = torch.stack([one.scale_in.expand(one.d_in) for one in dictionaries])[:, None]
        self.scale_out = torch.stack([one.scale_out.expand(one.d_out) for one in dictionaries])[:, None]
        ks = [config.k for config in self.configs]
        self.k = max(ks)
        self.own_k = None if len(set(ks)) == 1 else torch.tensor(ks, device=device)
        after = [config.dead_after_tokens if config.auxk_coefficient else NEVER for config in self.configs]
        self.dead_after = torch.tensor(after, device=device)[:, None]
        self.dead = DeadLatents()

    def loss(self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"]) -> StackLoss:
        """Each dictionary's own loss (see `TopK.loss`) on its own rows, in its training units."""
        W_enc, b_enc = self.parameters["W_enc"], self.parameters["b_enc"]
        acts, indices = kernels.encode_topk(x, W_enc, b_enc, self.b_pre, self.k, self.own_k)
        error = kernels.decode(acts, indices, self.parameters["W_dec"], self.parameters["b_dec"]) - target
        mses = error.square().mean((1, 2))
        auxk = self._auxk(x, -error.detach())
        extra = [
            config.auxk_coefficient * auxk[i] if i in auxk else mses.new_zeros(())
            for i, config in enumerate(self.configs)
        ]
        totals = mses + torch.stack(extra) if auxk else mses
        parts = {i: value.detach() for i, value in auxk.items()}
        return StackLoss(totals, mses.detach(), parts, acts.detach(), indices, error.detach())

    def _auxk(
        self, x: Float[Tensor, "n batch d_in"], residual: Float[Tensor, "n batch d_out"]
    ) -> dict[int, Float[Tensor, ""]]:
        """AuxK of those that have dead latents. All dead ones are taken out at once: so is their gradient put back."""
        if all(config.auxk_coefficient == 0 for config in self.configs):
            return {}
        dead = self.dead.ids_of_each(self.tokens_since_fired, self.dead_after)
        counts = [ids.numel() for ids in dead]
        if not any(counts):
            return {}
        places = torch.cat([ids + i * self.d_sae for i, ids in enumerate(dead)])
        parts = [
            rows.index_select(0, places).split(counts)
            for rows in (
                self.parameters["W_enc"].mT.flatten(0, 1),
                self.parameters["b_enc"].flatten(),
                self.parameters["W_dec"].flatten(0, 1),
            )
        ]
        found = {}
        for i, (W_enc, b_enc, W_dec) in enumerate(zip(*parts, strict=True)):
            if counts[i]:
                centre = self.b_pre[i]

                def reads(
                    rows: Tensor, W: Tensor = W_enc, b: Tensor = b_enc, centre: Tensor = centre
                ) -> Tensor:
                    return torch.addmm(b, rows - centre, W.T)

                k = self.configs[i].auxk or max(self.d_in // 2, 1)
                found[i] = auxk_loss_of(reads, W_dec, x[i], residual[i], k)
        return found

    @torch.no_grad()
    def after_step(self, loss: StackLoss) -> None:
        """As `Trainable.after_step`, for all at once."""
        n, batch, _ = loss.acts.shape
        fired = torch.zeros(n * self.d_sae, dtype=torch.int32, device=loss.acts.device)
        firsts = torch.arange(n, device=fired.device)[:, None, None] * self.d_sae
        fired.index_add_(0, (loss.indices + firsts).view(-1), (loss.acts != 0).to(torch.int32).view(-1))
        self.tokens_since_fired += batch
        self.tokens_since_fired.masked_fill_(fired.view(n, -1) > 0, 0)
        if any(config.auxk_coefficient for config in self.configs):
            self.dead.send(self.tokens_since_fired, self.dead_after)

    def loss_of(self, loss: StackLoss, i: int) -> Loss:
        """What the i-th would have given alone, without gradient."""
        terms = {"mse": loss.mses[i]} | ({"auxk": loss.auxk[i]} if i in loss.auxk else {})
        k = self.configs[i].k
        encoded = Encoded.from_topk(loss.acts[i, :, :k], loss.indices[i, :, :k], self.d_sae)
        return Loss(loss.totals[i].detach(), terms, encoded, loss.error[i])
