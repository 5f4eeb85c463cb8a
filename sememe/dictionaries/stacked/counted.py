"""Stacks of dictionaries that keep a number of latents: the TopK family, with AuxK for the dead."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.abs_topk import AbsTopK
from sememe.dictionaries.auxiliary import auxk_loss_of
from sememe.dictionaries.base import Trainable
from sememe.dictionaries.batch_topk import BatchTopK
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.group_max import GroupMax
from sememe.dictionaries.matryoshka import Matryoshka
from sememe.dictionaries.mlp_encoder import MLPEncoder
from sememe.dictionaries.multi_topk import MultiTopK
from sememe.dictionaries.selection import BatchSelection, Selection
from sememe.dictionaries.stacked.base import Stack, StackLoss
from sememe.dictionaries.topk import TopK
from sememe.encoded import Encoded

__all__ = ["CountedStack"]

NEVER = 2**62
"""Rows after which a latent counts as dead where nothing is done for dead ones."""


@final
class CountedStack(Stack):
    """TopK, MultiTopK, AbsTopK, GroupMax, BatchTopK, Matryoshka, or TopK behind a hidden layer. The options of AuxK may
    differ; k too, where it is counted row by row and is no number of groups."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        members = [one for one in self.dictionaries if isinstance(one, Selection)]
        self.first, self.configs = members[0], [one.config for one in members]
        self.thresholds: Tensor | None = None
        batched = [one for one in members if isinstance(one, BatchSelection)]
        if batched:
            self.thresholds = self._shared("threshold")
            self.follows = self._numbers([1 - one.config.threshold_decay for one in batched])
        self.ks = [config.k for config in self.configs]
        self.own_k = self._own_k(self.ks)
        multi = [one.config for one in members if isinstance(one, MultiTopK)]
        if multi:
            self.wide_ks = [min(config.k * config.multiple, self.d_sae) for config in multi]
            self.own_wide_k = self._own_k(self.wide_ks)
            self.multi_coefficients = self._numbers([config.multi_coefficient for config in multi])
        after = [config.dead_after_tokens if config.auxk_coefficient else NEVER for config in self.configs]
        self.dead_after = torch.tensor(after, device=self.device)[:, None]
        self.dead = DeadLatents()

    @staticmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """k, where all have to keep as many; the ends of prefixes."""
        if not isinstance(dictionary, Selection):
            return None
        if dictionary.config.skip or dictionary.config.site_norms != "l2":
            return None
        if isinstance(dictionary, (TopK, MultiTopK, AbsTopK)):
            return ()
        if isinstance(dictionary, MLPEncoder):
            return dictionary.b_in.shape
        if isinstance(dictionary, (GroupMax, BatchTopK)):
            return dictionary.config.k
        if isinstance(dictionary, Matryoshka):
            return dictionary.config.k, dictionary.ends
        return None

    def _own_k(self, ks: Sequence[int]) -> Int[Tensor, " n"] | None:
        """What each keeps; None if all keep the same."""
        return None if len(set(ks)) == 1 else torch.tensor(ks, device=self.device)

    def _inputs(self, x: Float[Tensor, "n batch d_in"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As every stack; behind a hidden layer what it makes of rows, which nothing is subtracted from."""
        inputs = super()._inputs(x)
        if not isinstance(self.first, MLPEncoder):
            return inputs
        return self._hidden(x, slice(None)), *inputs[1:3], torch.zeros_like(self.b_pre)

    def _hidden(self, x: Float[Tensor, "m batch d_in"], which: slice) -> Float[Tensor, "m batch d_in"]:
        """What encoders behind a hidden layer read of rows."""
        W_in, b_in, W_out = (self.parameters[name][which] for name in ("W_in", "b_in", "W_out"))
        centred = x - self.b_pre[which, None]
        return centred + torch.relu(torch.baddbmm(b_in[:, None], centred, W_in)) @ W_out

    def _encode(self, x: Float[Tensor, "n batch d_in"]) -> Encoded:
        """What training keeps of each dictionary's rows."""
        inputs, k = self._inputs(x), max(self.ks)
        if self.thresholds is not None:
            return kernels.encode_batch_topk(*inputs, k * x.shape[1]).encoded
        if isinstance(self.first, GroupMax):
            chosen = kernels.encode_group_max(*inputs, k)
        elif self.first.signed:
            chosen = kernels.encode_abs_topk(*inputs, k, self.own_k)
        else:
            chosen = kernels.encode_topk(*inputs, k, self.own_k)
        return kernels.together(chosen.acts, chosen.indices, self.d_sae)

    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss (see `Selection.loss`, and those of MultiTopK and Matryoshka)."""
        if isinstance(self.first, MultiTopK):
            encoded, wide = self._encode_twice(x)
            error = self._error(encoded, target)
            mses, multi = error.square().mean((1, 2)), self._error(wide, target).square().mean((1, 2))
            totals = mses + self.multi_coefficients * multi
            terms = {"mse": mses, "mse_multi": multi}
        elif isinstance(self.first, Matryoshka):
            encoded = self._encode(x)
            recons = kernels.decode_prefixes(encoded, self.parameters["W_dec"], self.b_dec, self.first.ends)
            errors = [recon.view(target.shape) - target for recon in recons]
            of_prefixes = torch.stack([error.square().mean((1, 2)) for error in errors])
            error, totals = errors[-1], of_prefixes.mean(0)
            terms = {"mse": of_prefixes[-1], "prefixes": totals}
        else:
            encoded = self._encode(x)
            error = self._error(encoded, target)
            totals = error.square().mean((1, 2))
            terms = {"mse": totals}
        auxk = self._auxk(x, -error.detach())
        if auxk:
            extra = [
                config.auxk_coefficient * auxk[i] if i in auxk else totals.new_zeros(())
                for i, config in enumerate(self.configs)
            ]
            totals = totals + torch.stack(extra)
        return StackLoss(
            totals,
            {name: values.detach() for name, values in terms.items()},
            {"auxk": {i: value.detach() for i, value in auxk.items()}},
            encoded.detach(),
            error.detach(),
        )

    def _encode_twice(self, x: Float[Tensor, "n batch d_in"]) -> tuple[Encoded, Encoded]:
        """Of MultiTopK: what k keeps, and what its multiple keeps."""
        k = max(self.ks)
        acts, indices = kernels.encode_topk(*self._inputs(x), max(self.wide_ks), self.own_wide_k)
        columns = acts.detach().topk(k, dim=2).indices
        few = acts.gather(2, columns)
        if self.own_k is not None:  # the largest come first
            few = torch.where(torch.arange(k, device=self.device) < self.own_k[:, None, None], few, 0.0)
        encoded = kernels.together(few, indices.gather(2, columns), self.d_sae)
        return encoded, kernels.together(acts, indices, self.d_sae)

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

                def reads(rows: Tensor, W: Tensor = W_enc, b: Tensor = b_enc, i: int = i) -> Tensor:
                    if isinstance(self.first, MLPEncoder):
                        return torch.addmm(b, self._hidden(rows[None], slice(i, i + 1))[0], W.T)
                    return torch.addmm(b, rows - self.b_pre[i], W.T)

                k = self.configs[i].auxk or max(self.d_in // 2, 1)
                found[i] = auxk_loss_of(reads, W_dec, x[i], residual[i], k, signed=self.first.signed)
        return found

    @torch.no_grad()
    def after_step(self, loss: StackLoss) -> None:
        """As every stack; thresholds follow what was kept, and the numbers of dead latents set off."""
        super().after_step(loss)
        if self.thresholds is not None:
            self.thresholds.lerp_(loss.encoded.acts.view(self.n, -1).amin(1), self.follows)
        if any(config.auxk_coefficient for config in self.configs):
            self.dead.send(self.tokens_since_fired, self.dead_after)

    def _apart(self, encoded: Encoded, i: int) -> Encoded:
        """As every stack; with k per row, as many as the i-th keeps."""
        own = super()._apart(encoded, i)
        if own.k is None:
            return own
        view, k = own.topk_view(), self.ks[i]
        return Encoded.from_topk(view.acts[:, :k], view.indices[:, :k], self.d_sae)
