"""Stacks of dictionaries that a penalty makes sparse, so that the number of active latents varies: the ReLU family."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Trainable
from sememe.dictionaries.gated import Gated
from sememe.dictionaries.jumprelu import Jump, JumpReLU
from sememe.dictionaries.p_anneal import PAnneal, power
from sememe.dictionaries.penalised import Penalised
from sememe.dictionaries.relu import ReLU
from sememe.dictionaries.room import Room
from sememe.dictionaries.stacked.base import Stack, StackLoss
from sememe.dictionaries.steered import Steered
from sememe.dictionaries.tied import Tied
from sememe.encoded import Encoded

__all__ = ["GatedStack", "JumpReLUStack", "PAnnealStack", "ReLUStack", "TiedStack"]


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


class _SteeredStack(_PenalisedStack, abc.ABC):
    """Those whose penalty has a weight that may be steered to an l0; it and its steering may differ."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        self.steered = [one for one in self.dictionaries if isinstance(one, Steered)]
        self.coefficients = self._numbers([one.config.l1_coefficient for one in self.steered])
        self.log_factor, self.l0_average = self._shared("log_factor"), self._shared("l0_average")
        self.progress = 0.0

    def _weights(self, progress: float) -> tuple[Float[Tensor, " n"], dict[str, dict[int, Tensor]]]:
        """What the penalty is multiplied by, and for the log what steering makes of it."""
        self.progress = progress
        factors = self.log_factor.exp()
        warmed = self._numbers([one.warmed(progress) for one in self.steered])
        steered = {i: factors[i] for i, one in enumerate(self.steered) if one.config.target_l0 is not None}
        return warmed * factors * self.coefficients, {"steered_factor": steered}

    @torch.no_grad()
    def after_step(self, loss: StackLoss) -> None:
        """As every stack; and steering, where there is a target."""
        super().after_step(loss)
        steered = [i for i, one in enumerate(self.steered) if one.steers(self.progress)]
        if steered:
            acts = loss.encoded.acts
            l0 = self._per_row((acts != 0).to(acts.dtype), loss.encoded)
            for i in steered:
                self.steered[i].steer(l0[i], self.progress)


@final
class ReLUStack(_SteeredStack):
    """ReLU under L1."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        first = self.dictionaries[0]
        self.norm_weighted = isinstance(first, ReLU) and first.config.norm_weighted

    @staticmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """As of JumpReLU, and whether activations are weighed; None for one with another penalty than L1, or noise."""
        if not isinstance(dictionary, ReLU) or dictionary.config.site_norms != "l2":
            return None
        alike = _only_l1(dictionary)
        return None if alike is None else (alike, dictionary.config.norm_weighted)

    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss (see `ReLU.loss`)."""
        encoded = self._above(x, None)
        error = self._error(encoded, target)
        norms = None
        if self.norm_weighted:
            norms = self.seen * self.parameters["W_dec"].norm(dim=2, keepdim=True)
        mses, l1 = error.square().mean((1, 2)), self._per_row(encoded.acts, encoded, norms)
        weights, of_some = self._weights(progress)
        terms = {"mse": mses.detach(), "l1": l1.detach()}
        return StackLoss(mses + weights * l1, terms, of_some, encoded.detach(), error.detach())


@final
class TiedStack(_SteeredStack):
    """Tied weights under L1; the decay of biases may differ."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        self.decay = self._numbers(
            [one.config.bias_decay for one in self.dictionaries if isinstance(one, Tied)]
        )

    @staticmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """As of JumpReLU; None for one with another penalty than L1, or noise."""
        return _only_l1(dictionary) if isinstance(dictionary, Tied) else None

    def _inputs(self, x: Float[Tensor, "n batch d_in"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x, self.parameters["W_dec"].mT, self.parameters["b_enc"], self.b_pre

    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss (see `Tied.loss`)."""
        encoded = self._above(x, None)
        error = self._error(encoded, target)
        mses, l1 = error.square().mean((1, 2)), self._per_row(encoded.acts, encoded)
        weights, of_some = self._weights(progress)
        totals = mses + weights * l1 + self.decay * self.parameters["b_enc"].norm(dim=1)
        terms = {"mse": mses.detach(), "l1": l1.detach()}
        return StackLoss(totals, terms, of_some, encoded.detach(), error.detach())


@final
class GatedStack(_SteeredStack):
    """Gated; its decoders are frozen in the auxiliary error, as in `Gated`."""

    @staticmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """As of JumpReLU."""
        return _penalised_alike(dictionary) if isinstance(dictionary, Gated) else None

    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss (see `Gated.loss`)."""
        gates = self._above(x, None)
        b_enc, r_mag, b_mag = (
            kernels.of_entries(self.parameters[name].view(-1), gates) for name in ("b_enc", "r_mag", "b_mag")
        )
        acts = torch.relu((gates.acts - b_enc) * r_mag.exp() + b_mag)
        encoded = gates.with_acts(gates.only_stored(acts))
        error = self._error(encoded, target)
        frozen = kernels.decode_encoded(gates, self.parameters["W_dec"].detach(), self.b_dec.detach())
        auxiliary = (frozen.view(target.shape) - target).square().mean((1, 2))
        mses, l1 = error.square().mean((1, 2)), self._per_row(gates.acts, gates)
        weights, of_some = self._weights(progress)
        terms = {"mse": mses.detach(), "l1": l1.detach(), "auxiliary": auxiliary.detach()}
        return StackLoss(mses + weights * l1 + auxiliary, terms, of_some, encoded.detach(), error.detach())


@final
class PAnnealStack(_SteeredStack):
    """P-anneal; exponents and their course may differ."""

    def __init__(self, dictionaries: Sequence[Trainable]) -> None:
        super().__init__(dictionaries)
        self.members = [one for one in self.dictionaries if isinstance(one, PAnneal)]
        self.p, self.penalty_scale = self._shared("p"), self._shared("penalty_scale")
        self.next: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def alike(dictionary: Trainable) -> Hashable | None:
        """As of JumpReLU."""
        return _penalised_alike(dictionary) if isinstance(dictionary, PAnneal) else None

    def loss(
        self, x: Float[Tensor, "n batch d_in"], target: Float[Tensor, "n batch d_out"], progress: float
    ) -> StackLoss:
        """Each dictionary's own loss (see `PAnneal.loss`)."""
        p = self._numbers([one.exponent(progress) for one in self.members])
        encoded = self._above(x, None)
        error, of = self._error(encoded, target), encoded.indices // self.d_sae
        penalty = self._per_row(power(encoded.acts, p.index_select(0, of)), encoded)
        with torch.no_grad():
            before = self._per_row(power(encoded.acts, self.p.index_select(0, of)), encoded)
            scale = self.penalty_scale * torch.where(penalty > 0, before / penalty, 1.0)
            l1 = self._per_row(encoded.acts, encoded)
        self.next = p, scale
        mses, (weights, of_some) = error.square().mean((1, 2)), self._weights(progress)
        terms = {"mse": mses.detach(), "penalty": penalty.detach(), "l1": l1}
        totals = mses + weights * scale * penalty
        return StackLoss(totals, terms, of_some, encoded.detach(), error.detach())

    @torch.no_grad()
    def after_step(self, loss: StackLoss) -> None:
        """What the step used becomes what the next one starts from, too."""
        super().after_step(loss)
        if self.next is not None:
            self.p.copy_(self.next[0])
            self.penalty_scale.copy_(self.next[1])


def _only_l1(dictionary: ReLU | Tied) -> Hashable | None:
    config = dictionary.config
    if config.sqrt_coefficient or config.entropy_coefficient or config.noise:
        return None
    return _penalised_alike(dictionary)


def _penalised_alike(dictionary: Penalised) -> Hashable | None:
    """What decides which parameters there are and what keeps them true; None if there is more to a step."""
    config = dictionary.config
    if config.skip or config.ghost_after_tokens is not None:
        return None
    return config.decoder_bias, config.non_negative_decoder
