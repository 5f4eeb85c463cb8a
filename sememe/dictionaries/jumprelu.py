"""JumpReLU: a learned threshold per latent, and a penalty on how many latents are active."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries.base import Constraints, Loss, Sites
from sememe.dictionaries.chunks import Chunk, Rows
from sememe.dictionaries.initial import median_of_others
from sememe.dictionaries.levels import levels
from sememe.dictionaries.penalised import Penalised, PenalisedConfig, moved
from sememe.encoded import Encoded

__all__ = ["Jump", "JumpReLU", "JumpReLUConfig"]

N_THRESHOLD_ROWS = 1024
"""Rows of the sample that set the first thresholds."""


class JumpReLUConfig(PenalisedConfig):
    """Options of a JumpReLU dictionary."""

    kind: Literal["jumprelu"] = "jumprelu"
    """Name of the architecture."""
    target_l0: float | None = Field(default=32.0, gt=0)
    """Active latents per row that the penalty (l0 / target - 1)^2 steers to; without it the penalty is l0."""
    l0_coefficient: float | None = Field(default=None, gt=0)
    """Weight of the penalty; if not given, 1 with a target and 0.001 without one."""
    start_l0: float | None = Field(default=None, gt=0)
    """Active latents per row at the start; if not given, 4 x the target, or 5% of the latents without one."""
    l0_anneal: float = Field(default=0.3, gt=0, le=1)
    """Share of the run over which what l0 is steered to moves from start_l0 to the target, by equal factors."""
    bandwidth: float = Field(default=0.005, gt=0)
    """Width of the window about a threshold in which it gets gradients, in units of the rows' mean norm."""
    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the run over which the penalty's weight rises from 0."""

    @model_validator(mode="after")
    def _annealing_has_an_effect(self) -> JumpReLUConfig:
        if self.target_l0 is None:
            self.check_inert("l0_anneal", without="target_l0 is not given")
        if self.start_l0 == self.target_l0:
            self.check_inert("l0_anneal", without="start_l0 is the target")
        return self


@final
class JumpReLU(Penalised):
    """`acts = z * H(z - threshold)`, `z = (x - b_pre) W_enc + b_enc`, `recon = acts W_dec + b_dec`.

    Thresholds learn through a rectangle window. The parameter is `relative_threshold`, and
    `threshold = relative_threshold * threshold_unit`, where the unit is the mean norm of the centred rows:
    a step of Adam moves each weight of the encoder by about the learning rate, a pre-activation thereby by up to
    that times the norm of the row, and a threshold by that as well. A threshold in plain or logarithmic units
    moves tens of times more slowly than what it is compared with.

    Source: Rajamanoharan et al. 2024b, arXiv:2407.14435, eqs. 9-12, and appendix F for the target. Differs:
    the parametrisation above instead of log thresholds; thresholds start at quantiles of the sample, so that l0
    starts at 4 x the target (5% of the latents without one) instead of near all of them, and what it is steered
    to moves from there to the target; resampling; Adam's betas
    are the trainer's.
    """

    kind = "jumprelu"
    config_class = JumpReLUConfig
    fires_only_above_zero = True
    config: JumpReLUConfig
    latent_units = ("b_enc", "threshold_unit")
    threshold_unit: Tensor

    def __init__(
        self, config: JumpReLUConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.relative_threshold = nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("threshold_unit", torch.ones(()))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """What a pre-activation has to exceed."""
        return self.relative_threshold * self.threshold_unit

    def start_l0(self) -> float:
        """Active latents per row at the start: as asked for, or some times as many as at the end; at most half."""
        goal, start = self.config.target_l0, self.config.start_l0
        if start is None:
            start = 0.05 * self.d_sae if goal is None else 4 * goal
        return min(start, 0.5 * self.d_sae)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Every pre-activation above its latent's threshold."""
        self.check_input(x)
        return kernels.encode_threshold(x, self.W_enc, self.b_enc, self.b_pre, self.threshold.detach())

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """As every linear dictionary; thresholds are the quantile of the sample that gives the l0 to start at."""
        super().initialise(x, target, generator)
        with torch.no_grad():
            centred = x - self.b_pre
            self.threshold_unit.copy_(centred.norm(dim=1).mean().clamp_min(1e-12))
            share = self.start_l0() / self.d_sae
            lowest = levels(centred[:N_THRESHOLD_ROWS], self.W_enc, self.b_enc, share)
            self.relative_threshold.copy_((lowest / self.threshold_unit).clamp_min(0))
            if self.config.constant_latent:
                self.relative_threshold[0] = 0.0

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """Mean squared error, and `coefficient * l0` or `coefficient * (l0 / target - 1)^2`, l0 per row on average.

        Only pre-activations above the window's lower end are computed with: nothing else has a gradient.
        """
        config = self.config
        threshold, width = self.threshold, config.bandwidth * self.threshold_unit
        lower = (threshold.detach() - width / 2).clamp_min(0)

        def of_rows(rows: Rows) -> Chunk:
            near = self._encode_above(rows.x, lower, rows.dense)
            per_entry = near.only_stored(kernels.of_entries(threshold, near), torch.inf)
            acts, open_ = Jump.apply(near.acts, per_entry, width)  # type: ignore[no-untyped-call]
            encoded = near.with_acts(acts)
            mse, _, error = self._reconstruct(encoded, rows.x, rows.target)
            return Chunk({"mse": mse, "l0": self._per_row(open_, encoded)}, encoded.detach(), error)

        means, encoded, error = self._in_chunks(of_rows, x, target, lower)
        mse, l0 = means["mse"], means["l0"]
        goal = self.set_point(progress)
        penalty = l0 if goal is None else (l0 / goal - 1).square()
        total = mse + self.penalty_weight(progress) * penalty
        return Loss(total, {"mse": mse.detach(), "penalty": penalty.detach()}, encoded, error)

    def set_point(self, progress: float) -> float | None:
        """The l0 that is steered to at a share of the run; None without a target."""
        goal = self.config.target_l0
        return None if goal is None else moved(self.start_l0(), goal, progress / self.config.l0_anneal)

    def penalty_weight(self, progress: float) -> float:
        """The penalty's weight at a share of the run."""
        coefficient = self.config.l0_coefficient
        if coefficient is None:
            coefficient = 1e-3 if self.config.target_l0 is None else 1.0
        return coefficient * self.warmed(progress)

    def constraints(self) -> Constraints:
        """Thresholds stay >= 0, beside what every linear dictionary keeps."""
        kept = super().constraints()
        return kept._replace(non_negative=(*kept.non_negative, "relative_threshold"))

    def reset_latents(
        self,
        ids: Int[Tensor, " n"],
        directions: Float[Tensor, "n d_out"],
        inputs: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """The encoder at its usual length (a fifth would never reach a threshold), the threshold as is usual."""
        super().reset_latents(ids, directions, inputs)
        with torch.no_grad():
            self.relative_threshold[ids] = median_of_others(self.relative_threshold, ids)

    def weaken(self, ids: Int[Tensor, " n"], factor: float) -> None:
        """As every linear dictionary, thresholds included; not so far that all that is positive lies in the window."""
        with torch.no_grad():
            lowest = float(self.relative_threshold[ids].min())
            if lowest > self.config.bandwidth:
                factor = max(factor, self.config.bandwidth / lowest)
            super().weaken(ids, factor)
            self.relative_threshold[ids] *= factor

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        return median_of_others(norms, ids)


class Jump(torch.autograd.Function):
    """`z * H(z - threshold)` and `H(z - threshold)`, with gradients for the threshold through a rectangle of area 1.

    Source: Rajamanoharan et al. 2024b, eqs. 11 and 12: -(threshold / width) K and -(1 / width) K, where K is 1
    within half a width of the threshold.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Float[Tensor, " nnz"], threshold: Float[Tensor, " nnz"], width: Float[Tensor, "*nnz"]
    ) -> tuple[Float[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        above = z > threshold
        ctx.save_for_backward(above, (z - threshold).abs() < width / 2, threshold, width)
        return z * above, above.to(z.dtype)

    @staticmethod
    def backward(
        ctx: Any, grad_acts: Float[Tensor, " nnz"], grad_open: Float[Tensor, " nnz"]
    ) -> tuple[Float[Tensor, " nnz"], Float[Tensor, " nnz"], None]:
        above, window, threshold, width = ctx.saved_tensors
        grad_threshold = -(threshold * grad_acts + grad_open) * window / width
        return grad_acts * above, grad_threshold, None
