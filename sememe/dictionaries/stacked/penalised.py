"""Stacks of dictionaries that a penalty makes sparse, so that the number of active latents varies: JumpReLU, ReLU."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Trainable
from sememe.dictionaries.jumprelu import Jump, JumpReLU
from sememe.dictionaries.penalised import Penalised
from sememe.dictionaries.relu import ReLU
from sememe.dictionaries.room import Room
from sememe.dictionaries.stacked.base import Stack, StackLoss
from sememe.encoded import Encoded

__all__ = ["JumpReLUStack", "ReLUStack"]


class _PenalisedStack(Stack, abc.ABC):
    """On a GPU a step is one while all have room for their entries in a buffer; in a step in which one is dense, each
    takes it by itself."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        self.entries, self.room = self._shared("entries"), Room()
        self.capacities: list[int] | None = None
        self.seen = self._copied("penalised")[:, :, None]
        """Decoders of one column, whose reconstruction is a row's sum over what the penalty sees."""

    def ready(self, n_rows: int) -> bool:
        """Whether all know how many entries to have room for, and none has too many."""
        if kernels.path_for(self.b_pre) != "gpu":
            return True
        found = self.room.capacities(self.entries, n_rows, self.d_sae)
        self.capacities = [capacity for capacity in found if capacity is not None]
        return len(self.capacities) == self.n

    def _above(self, x: Float[Tensor, "n batch d_in"], threshold: Float[Tensor, "n d_sae"] | None) -> Encoded:
        """Every pre-activation above its latent's threshold; see `Penalised`."""
        encoded = kernels.encode_threshold(*self._inputs(x), threshold, self.capacities)
        if self.capacities is not None:
            capacities = kernels.to_device(self.capacities, torch.int64, self.device)
            self.room.note(self.entries, encoded, capacities)
        return encoded

    def _per_row(
        self,
        values: Float[Tensor, " nnz"],
        encoded: Encoded,
        weights: Float[Tensor, "n d_sae 1"] | None = None,
    ) -> Float[Tensor, " n"]:
        """Each one's mean over rows of the sum over the latents that the penalty sees, weighted if asked.

        Args:
            values: What is summed, an entry at a time.
            encoded: Which entries.
            weights: Of each latent; 1 for those that the penalty sees if not given.
        """
        weights = self.seen if weights is None else weights
        nothing = weights.new_zeros(self.n, 1)
        return kernels.decode_encoded(encoded.with_acts(values), weights, nothing).view(self.n, -1).mean(1)


@final
class JumpReLUStack(_PenalisedStack):
    """JumpReLU; all options of the penalty may differ."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        self.members = [one for one in self.dictionaries if isinstance(one, JumpReLU)]
        self.unit = self._copied("threshold_unit")[:, None]
        self.width = self._numbers([one.config.bandwidth for one in self.members])[:, None] * self.unit
        self.aims = torch.tensor(
            [one.config.target_l0 is not None for one in self.members], device=self.device
        )

    @staticmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """What decides which parameters there are, and what keeps them true."""
        return _penalised_alike(dictionary) if isinstance(dictionary, JumpReLU) else None

    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss (see `JumpReLU.loss`)."""
        threshold = self.parameters["relative_threshold"] * self.unit
        near = self._above(x, (threshold.detach() - self.width / 2).clamp_min(0))
        per_entry = near.only_stored(kernels.of_entries(threshold.view(-1), near), torch.inf)
        widths = self.width.view(-1).index_select(0, near.indices // self.d_sae)
        acts, open_ = Jump.apply(near.acts, per_entry, widths)  # type: ignore[no-untyped-call]
        encoded = near.with_acts(acts)
        error = self._error(encoded, target)
        mses, l0 = error.square().mean((1, 2)), self._per_row(open_, encoded)
        goals = self._numbers([one.set_point(progress) or 1.0 for one in self.members])
        penalties = torch.where(self.aims, (l0 / goals - 1).square(), l0)
        totals = mses + self._numbers([one.penalty_weight(progress) for one in self.members]) * penalties
        terms = {"mse": mses.detach(), "penalty": penalties.detach()}
        return StackLoss(totals, terms, {}, encoded.detach(), error.detach())


@final
class ReLUStack(_PenalisedStack):
    """ReLU under L1; its weight and its steering may differ."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        self.members = [one for one in self.dictionaries if isinstance(one, ReLU)]
        self.norm_weighted = self.members[0].config.norm_weighted
        self.coefficients = self._numbers([one.config.l1_coefficient for one in self.members])
        self.log_factor, self.l0_average = self._shared("log_factor"), self._shared("l0_average")
        self.progress = 0.0

    @staticmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """As of JumpReLU, and whether activations are weighed; None for one with another penalty than L1, or noise."""
        if not isinstance(dictionary, ReLU):
            return None
        config = dictionary.config
        if config.sqrt_coefficient or config.entropy_coefficient or config.noise or config.site_norms != "l2":
            return None
        alike = _penalised_alike(dictionary)
        return None if alike is None else (alike, config.norm_weighted)

    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss (see `ReLU.loss`)."""
        self.progress = progress
        encoded = self._above(x, None)
        error = self._error(encoded, target)
        weights = None
        if self.norm_weighted:
            weights = self.seen * self.parameters["W_dec"].norm(dim=2, keepdim=True)
        mses, l1 = error.square().mean((1, 2)), self._per_row(encoded.acts, encoded, weights)
        factors = self.log_factor.exp()
        warmed = self._numbers([one.warmed(progress) for one in self.members])
        totals = mses + warmed * factors * (self.coefficients * l1)
        steered = {i: factors[i] for i, one in enumerate(self.members) if one.config.target_l0 is not None}
        terms = {"mse": mses.detach(), "l1": l1.detach()}
        return StackLoss(totals, terms, {"steered_factor": steered}, encoded.detach(), error.detach())

    @torch.no_grad()
    def after_step(self, loss: StackLoss) -> None:
        """As every stack; and steering, where there is a target."""
        super().after_step(loss)
        steered = [i for i, one in enumerate(self.members) if one.steers(self.progress)]
        if steered:
            acts = loss.encoded.acts
            l0 = self._per_row((acts != 0).to(acts.dtype), loss.encoded)
            for i in steered:
                self.members[i].steer(l0[i], self.progress)


def _penalised_alike(dictionary: Penalised) -> Hashable | None:
    """What decides which parameters there are and what keeps them true; None if there is more to a step."""
    config = dictionary.config
    if config.skip or config.ghost_after_tokens is not None:
        return None
    return config.decoder_bias, config.non_negative_decoder
