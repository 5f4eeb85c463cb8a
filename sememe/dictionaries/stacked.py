"""TopK or BatchTopK dictionaries of one shape as one, for a GPU: parameters with a leading axis, one step for all.

Knows kernels and dictionaries; knows no optimiser and no data. The dictionaries stay what they are: their parameters
and counters become parts of the stack's, so that whatever is done to one of them is done here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.auxiliary import auxk_loss_of
from sememe.dictionaries.base import Loss, Trainable
from sememe.dictionaries.batch_topk import BatchTopK
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
    encoded: Encoded
    """Of all, see `kernels.together`."""
    error: Float[Tensor, "n batch d_out"]


def stackable(dictionary: Trainable) -> Hashable | None:
    """What dictionaries that can be one stack have in common; None for one that can be part of none.

    TopK and BatchTopK (of one k), without a skip connection or weights in their choice.
    """
    if not isinstance(dictionary, (TopK, BatchTopK)) or dictionary.config.skip:
        return None
    if dictionary.config.site_norms != "l2":
        return None
    kept = dictionary.config.k if isinstance(dictionary, BatchTopK) else None
    return dictionary.kind, kept, dictionary.d_in, dictionary.d_out, dictionary.d_sae


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor with a leading axis, each part laid out in memory as the tensor it is made of."""
    if tensors[0].dim() == 2 and not tensors[0].is_contiguous():
        return torch.stack([tensor.detach().T for tensor in tensors]).mT
    return torch.stack([tensor.detach() for tensor in tensors])


class Stack:
    """Dictionaries of one shape on one device; the options of AuxK may differ, and k of TopK.

    Args:
        dictionaries: Alike as `stackable` says; their parameters and counters are parts of this stack's from now on.
    """

    def __init__(self, dictionaries: Sequence[TopK | BatchTopK]) -> None:
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
        self.overflow_steps = torch.stack([one.overflow_steps for one in dictionaries])
        for dictionary, part in zip(dictionaries, self.overflow_steps, strict=True):
            dictionary.overflow_steps = part
        self.thresholds: Tensor | None = None
        batched = [one for one in dictionaries if isinstance(one, BatchTopK)]
        if batched:
            self.thresholds = torch.stack([one.threshold for one in batched])
            for one, part in zip(batched, self.thresholds, strict=True):
                one.threshold = part
            follows = [1 - one.config.threshold_decay for one in batched]
            self.follows = torch.tensor(follows, device=device)
        self.b_pre = torch.stack([one.b_pre for one in dictionaries])
        self.scale_in = torch.stack([one.scale_in.expand(one.d_in) for one in dictionaries])[:, None]
        self.scale_out = torch.stack([one.scale_out.expand(one.d_out) for one in dictionaries])[:, None]
        ks = [config.k for config in self.configs]
        self.k = max(ks)
        self.own_k = None if len(set(ks)) == 1 else torch.tensor(ks, device=device)
        after = [config.dead_after_tokens if config.auxk_coefficient else NEVER for config in self.configs]
        self.dead_after = torch.tensor(after, device=device)[:, None]
        self.dead = DeadLatents()

    def _encode(self, x: Float[Tensor, "n batch d_in"]) -> Encoded:
        """What training keeps of each dictionary's rows."""
        W_enc, b_enc = self.parameters["W_enc"], self.parameters["b_enc"]
        if self.thresholds is not None:
            n_kept = self.k * x.shape[1]
            return kernels.encode_batch_topk(x, W_enc, b_enc, self.b_pre, n_kept).encoded
        acts, indices = kernels.encode_topk(x, W_enc, b_enc, self.b_pre, self.k, self.own_k)
        return kernels.together(acts, indices, self.d_sae)

    def loss(self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"]) -> StackLoss:
        """Each dictionary's own loss (see `Selection.loss`) on its own rows, in its training units."""
        encoded = self._encode(x)
        recon = kernels.decode_encoded(encoded, self.parameters["W_dec"], self.parameters["b_dec"])
        error = recon.view(target.shape) - target
        mses = error.square().mean((1, 2))
        auxk = self._auxk(x, -error.detach())
        extra = [
            config.auxk_coefficient * auxk[i] if i in auxk else mses.new_zeros(())
            for i, config in enumerate(self.configs)
        ]
        totals = mses + torch.stack(extra) if auxk else mses
        parts = {i: value.detach() for i, value in auxk.items()}
        return StackLoss(totals, mses.detach(), parts, encoded.detach(), error.detach())

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
            torch.split(rows.index_select(0, places), counts)
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
        """As the dictionaries' own, for all at once."""
        encoded, n = loss.encoded, len(self.configs)
        fired = torch.zeros(n * self.d_sae, dtype=torch.int32, device=encoded.acts.device)
        fired.index_add_(0, encoded.indices.long(), (encoded.acts != 0).to(torch.int32))
        self.tokens_since_fired += encoded.n_rows // n
        self.tokens_since_fired.masked_fill_(fired.view(n, -1) > 0, 0)
        if encoded.overflow is not None:
            self.overflow_steps += encoded.overflow
        if self.thresholds is not None:
            self.thresholds.lerp_(encoded.acts.view(n, -1).amin(1), self.follows)
        if any(config.auxk_coefficient for config in self.configs):
            self.dead.send(self.tokens_since_fired, self.dead_after)

    def loss_of(self, loss: StackLoss, i: int) -> Loss:
        """What the i-th would have given alone, without gradient."""
        terms = {"mse": loss.mses[i]} | ({"auxk": loss.auxk[i]} if i in loss.auxk else {})
        return Loss(loss.totals[i].detach(), terms, self._apart(loss.encoded, i), loss.error[i])

    def _apart(self, encoded: Encoded, i: int) -> Encoded:
        """The i-th one's own entries: of TopK as many as it keeps."""
        own = kernels.apart(encoded, len(self.configs), i)
        if encoded.k is None:
            own.overflow = None if encoded.overflow is None else encoded.overflow[i]
            return own
        view, k = own.topk_view(), self.configs[i].k
        return Encoded.from_topk(view.acts[:, :k], view.indices[:, :k], self.d_sae)
