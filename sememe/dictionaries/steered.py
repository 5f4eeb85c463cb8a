"""What penalties with a weight share: the weight, and its steering to an l0 set point. Knows no penalty's form."""

from __future__ import annotations

import abc
from typing import Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sememe.dictionaries.base import Sites
from sememe.dictionaries.penalised import Penalised, PenalisedConfig, moved
from sememe.encoded import Counts, Encoded

__all__ = ["Steered", "SteeredConfig"]

L0_DECAY = 0.8
"""Share of the l0 average that a step keeps: single batches are noisy, but an old average steers too late."""
LARGEST_ERROR = 1.0
"""The error in log l0 beyond which steering is no faster, so that a far start does not overshoot."""
AHEAD = 2.0
"""Change of the weight's logarithm per change of log(l0 / set point): l0 follows the weight some 50 steps later, and
what only adds up errors is by then too far."""


class SteeredConfig(PenalisedConfig):
    """Options of every architecture whose penalty has a weight."""

    l1_coefficient: float = Field(default=1e-3, ge=0)
    """Weight of the mean over rows of the sum of activations, against the mean squared error per dimension."""
    target_l0: float | None = Field(default=None, gt=0)
    """Active latents per row that the penalty's weight is steered to; without it the weight stays as it is given."""
    start_l0: float | None = Field(default=None, gt=0)
    """Where the set point starts; without it, at the l0 of the first step, or at the target if that is larger."""
    l0_anneal: float = Field(default=0.3, gt=0, le=1)
    """Share of the run over which the set point moves from its start to the target, by equal factors."""
    steering: float = Field(default=0.03, gt=0, le=1)
    """Change of the weight's logarithm per step and unit of log(l0 / set point)."""

    def weights(self) -> dict[str, float]:
        """The weight of each part of the penalty, by the option's name; steering and warm-up scale all of them."""
        return {"l1_coefficient": self.l1_coefficient}

    @model_validator(mode="after")
    def _steering_has_an_effect(self) -> Self:
        if not any(self.weights().values()):
            names = ("target_l0", "sparsity_warmup", "unpenalised_latents")
            self.check_inert(*names, without="every weight of the penalty is 0")
        if self.target_l0 is None:
            self.check_inert("start_l0", "l0_anneal", "steering", without="target_l0 is not given")
        elif self.start_l0 == self.target_l0:
            self.check_inert("l0_anneal", without="start_l0 is the target")
        return self


class Steered(Penalised, abc.ABC):
    """A penalised dictionary whose penalty has a weight, fixed or steered so that l0 reaches a set point.

    With `target_l0`, the weight is multiplied by exp(log_factor), and after each step

        l0_average += (1 - 0.8) (l0 - l0_average)
        error       = clamp(log(l0_average / set point), -1, 1)
        log_factor += steering * error + 2 (error - error of the step before)

    l0 counts the active latents that the penalty sees. While the weight warms up, the factor rests. All of it stays
    on the device.
    """

    config: SteeredConfig
    log_factor: Tensor
    l0_average: Tensor
    first_l0: Tensor
    """l0 of the first step that was steered; -1 before."""
    l0_error: Tensor
    """The error of the step before."""

    def __init__(
        self, config: SteeredConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.register_buffer("log_factor", torch.zeros(()), persistent=False)
        self.register_buffer("l0_average", torch.full((), -1.0), persistent=False)
        self.register_buffer("first_l0", torch.full((), -1.0), persistent=False)
        self.register_buffer("l0_error", torch.zeros(()), persistent=False)
        self._progress = 0.0

    def set_point(self, progress: float) -> float | Float[Tensor, ""]:
        """The l0 to be reached at a share of the run. Only with a target."""
        config = self.config
        goal = config.target_l0
        assert goal is not None
        share = min(1.0, progress / config.l0_anneal)
        if config.start_l0 is not None:
            return moved(config.start_l0, goal, share)
        return goal * (self.first_l0.clamp_min(goal) / goal) ** (1 - share)

    def _factor(self, progress: float) -> float | Float[Tensor, ""]:
        """What every weight of the penalty is multiplied by, warm-up and steering together."""
        self._progress = progress
        warmed = self.warmed(progress)
        return warmed if self.config.target_l0 is None else warmed * self.log_factor.exp()

    def _steering_terms(self) -> dict[str, Tensor]:
        """For the log: what steering multiplies the weights by."""
        return {} if self.config.target_l0 is None else {"steered_factor": self.log_factor.exp()}

    def after_step(self, encoded: Encoded | Counts) -> None:
        """Steering, beside the bookkeeping."""
        super().after_step(encoded)
        if self.steers(self._progress):
            self.steer(self._l0(encoded), self._progress)

    def steers(self, progress: float) -> bool:
        """Whether a step moves the factor: not without a target, and not while the weight warms up."""
        return self.config.target_l0 is not None and progress >= self.config.sparsity_warmup

    @torch.no_grad()
    def steer(self, l0: Float[Tensor, ""], progress: float) -> None:
        """Move the factor, given the active latents per row of a step at a share of the run; only if it `steers`."""
        first = self.first_l0 < 0
        self.first_l0.copy_(torch.where(first, l0, self.first_l0))
        self.l0_average.copy_(torch.where(first, l0, torch.lerp(l0, self.l0_average, L0_DECAY)))
        # where nothing is active, the logarithm is cut and not infinite
        error = (self.l0_average.clamp_min(1e-6) / self.set_point(progress)).log()
        error.clamp_(-LARGEST_ERROR, LARGEST_ERROR)
        change = torch.where(first, 0.0, error - self.l0_error)
        self.log_factor.add_(self.config.steering * error + AHEAD * change)
        self.l0_error.copy_(error)

    def _l0(self, encoded: Encoded | Counts) -> Float[Tensor, ""]:
        """Active latents per row that the penalty sees."""
        if isinstance(encoded, Counts):
            seen = encoded.per_latent[self.config.n_unpenalised :].sum()
            return seen.to(self.l0_average.dtype) / encoded.n_rows
        if self.config.n_unpenalised == 0:
            return encoded.acts.count_nonzero().to(self.l0_average.dtype) / encoded.n_rows
        return self._per_row((encoded.acts != 0).to(self.l0_average.dtype), encoded)

    def training_buffers(self) -> dict[str, Tensor]:
        """The factor and what it follows from too, where there is a target."""
        names = ("log_factor", "l0_average", "first_l0", "l0_error")
        steered = {name: getattr(self, name) for name in names}
        return super().training_buffers() | (steered if self.config.target_l0 is not None else {})
