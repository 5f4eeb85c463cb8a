"""What the ReLU family shares: sparsity from a penalty, which latents it sees, resampling. Knows no penalty."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.auxiliary import ghost_loss
from sememe.dictionaries.base import Constraints, Sites
from sememe.dictionaries.chunks import Chunk, Rows, in_chunks
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.initial import bricken_norm
from sememe.dictionaries.linear import Linear, LinearConfig
from sememe.dictionaries.room import Room
from sememe.encoded import Counts, Encoded
from sememe.errors import ConfigError

__all__ = ["Penalised", "PenalisedConfig", "moved"]

SMALLEST_CONSTANT = 1e-3
"""What a constant latent is at least, in training units: one of activation 0 would be silent and never learn."""


class PenalisedConfig(LinearConfig):
    """Options of every architecture that is made sparse by a penalty."""

    decoder_bias: bool = True
    """Learn a decoder bias; else it is 0, and latents have to carry the mean."""
    constant_latent: bool = False
    """Let latent 0 start as a constant that writes the sample's centre, and leave it out of the penalty."""
    unpenalised_latents: int = Field(default=0, ge=0)
    """Leave the first so many latents out of the penalty, the constant one among them; they start as all others do."""
    non_negative_decoder: bool = False
    """Keep every number of the decoder's rows >= 0; the decoder bias stays free."""
    sparsity_warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the run over which the penalty's weight rises from 0."""
    resample: Literal["none", "loss", "worst", "random", "mcs"] = "loss"
    """Which latents are pointed anew, and where to: none, loss, worst, random or mcs."""
    ghost_after_tokens: int | None = Field(default=None, ge=1)
    """A latent that has not fired for this many training rows gets ghost gradients; none does if not given."""

    @model_validator(mode="after")
    def _one_carries_the_mean(self) -> Self:
        if self.constant_latent and self.decoder_bias:
            raise ConfigError(
                "constant_latent must go without a decoder bias, which already is a constant",
                "decoder_bias true",
                "Set decoder_bias to false (--no-decoder-bias), or drop constant_latent.",
            )
        if self.constant_latent and self.unpenalised_latents == 1:
            raise ConfigError(
                "unpenalised_latents must be more than 1 beside constant_latent, which is the first of them",
                1,
                "Drop it, or raise it.",
            )
        return self

    @property
    def n_unpenalised(self) -> int:
        """How many latents the penalty does not see: the first ones."""
        return max(self.unpenalised_latents, int(self.constant_latent))


class Penalised(Linear, abc.ABC):
    """A linear dictionary made sparse by a penalty; unless it says otherwise, every positive latent is active.

    `penalised` is 1 for each latent that the penalty sees and 0 for the others.
    """

    config: PenalisedConfig
    penalised: Tensor
    entries: Int[Tensor, ""]
    """What the last training step's buffer had to hold, where kernels write into one; -1 before the first."""

    def __init__(
        self, config: PenalisedConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites, decoder_bias=config.decoder_bias)
        if config.unpenalised_latents >= d_sae:
            raise ConfigError(
                f"unpenalised_latents must be less than d_sae={d_sae}: the penalty would see none",
                config.unpenalised_latents,
                "Lower it, or raise d_sae.",
            )
        penalised = torch.ones(d_sae)
        penalised[: config.n_unpenalised] = 0.0
        self.register_buffer("penalised", penalised, persistent=False)
        self.register_buffer("entries", torch.full((), -1, dtype=torch.int64), persistent=False)
        self.dead, self.room = DeadLatents(), Room()

    def start_l0(self) -> float:
        """Active latents per row at the start, about: half of them, where biases are 0."""
        return 0.5 * self.d_sae

    def training_buffers(self) -> dict[str, Tensor]:
        """Where kernels write into a buffer, what it had to hold, too: how long the next one is follows from it."""
        of_buffer = {"entries": self.entries} if kernels.path_for(self.W_dec) == "gpu" else {}
        return super().training_buffers() | of_buffer

    def _in_chunks(
        self,
        of_rows: Callable[[Rows], Chunk],
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        threshold: Float[Tensor, " d_sae"] | None,
    ) -> Chunk:
        """What the rows of a batch make of the loss, at once or, while too many are above the threshold, in chunks."""
        self.check_input(x)
        dense = kernels.is_dense(x, self.W_enc, self.b_enc, self.b_pre, threshold)
        return in_chunks(of_rows, x, target, self.d_sae, dense)

    def _encode_above(
        self, x: Float[Tensor, "batch d_in"], threshold: Float[Tensor, " d_sae"] | None, dense: bool
    ) -> Encoded:
        """Every pre-activation above its latent's threshold (0 if None), in a training step.

        On a GPU in a buffer as long as the step before needed, and a quarter more, so that nothing waits for the
        device and nothing holds batch x d_sae; the first step, and those whose l0 is above 5% of d_sae or too much
        for the kernels, are dense, and wait. Elsewhere, where that is `dense`, rows list every latent.
        """
        self.check_input(x)
        if dense:
            return kernels.encode_every(x, self.W_enc, self.b_enc, self.b_pre, threshold)
        buffered = self.training and kernels.path_for(x) == "gpu"
        capacity = self.room.capacity(self.entries, x.shape[0], self.d_sae) if buffered else None
        encoded = kernels.encode_threshold(
            x, self.W_enc, self.b_enc, self.b_pre, threshold, capacity, dense=dense
        )
        if buffered:
            self.room.note(self.entries, encoded)
        return encoded

    def after_step(self, encoded: Encoded | Counts) -> None:
        """The bookkeeping, and the number of dead latents on its way for the next step's ghost gradients."""
        super().after_step(encoded)
        if self.config.ghost_after_tokens is not None:
            self.dead.send(self.tokens_since_fired, self.config.ghost_after_tokens)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Every positive pre-activation."""
        self.check_input(x)
        return kernels.encode_threshold(x, self.W_enc, self.b_enc, self.b_pre, None)

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """As every linear dictionary. A constant latent reads nothing, and writes the centre of the targets."""
        super().initialise(x, target, generator)
        positive = self.config.non_negative_decoder
        if positive:
            with torch.no_grad():
                self.W_dec.abs_()
                if self.d_in == self.d_out:
                    self.W_enc.copy_(self.W_dec.T)
        if self.config.constant_latent:
            with torch.no_grad():
                centre = self._centre()(target)
                centre = centre.clamp_min(0) if positive else centre
                norm = centre.norm()
                self.W_dec[0] = torch.where(norm > 0, centre / norm.clamp_min(1e-12), self.W_dec[0])
                self.W_enc[:, 0] = 0.0
                self.b_enc[0] = norm.clamp_min(SMALLEST_CONSTANT)

    def warmed(self, progress: float) -> float:
        """How much of its weight the penalty has, given the share of the run that is over."""
        warmup = self.config.sparsity_warmup
        return min(1.0, progress / warmup) if warmup else 1.0

    def _seen(self, values: Float[Tensor, " nnz"], encoded: Encoded) -> Float[Tensor, " nnz"]:
        """The values that belong to the entries of `encoded`, 0 for latents that the penalty does not see."""
        if self.config.n_unpenalised == 0:
            return values
        return values * self.penalised.index_select(0, encoded.indices)

    def _per_row(self, values: Float[Tensor, " nnz"], encoded: Encoded) -> Float[Tensor, ""]:
        """Mean over rows of the sum over the latents that the penalty sees."""
        return self._seen(values, encoded).sum() / encoded.n_rows

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """A fifth of what live latents have. Source: Bricken et al. 2023, appendix "Neuron Resampling"."""
        return bricken_norm(norms, ids)

    def revival_loss(
        self, x: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_out"]
    ) -> Float[Tensor, ""] | None:
        """Ghost gradients for latents that are silent for too long, if the config asks for them."""
        if self.config.ghost_after_tokens is None:
            return None
        dead = self.dead.ids(self.tokens_since_fired, self.config.ghost_after_tokens)
        if dead.numel() == 0:
            return None
        return ghost_loss(self, x, residual, dead)

    def constraints(self) -> Constraints:
        """What every linear dictionary keeps, and the decoder's sign if asked for."""
        kept = super().constraints()
        return kept._replace(non_negative=("W_dec",)) if self.config.non_negative_decoder else kept

    def reset_latents(
        self,
        ids: Int[Tensor, " n"],
        directions: Float[Tensor, "n d_out"],
        inputs: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """As every linear dictionary; of a direction that a non-negative decoder cannot write, the positive part."""
        if self.config.non_negative_decoder:
            positive = directions.clamp_min(0)
            directions = torch.where(positive.any(dim=1, keepdim=True), positive, directions.abs())
        super().reset_latents(ids, directions, inputs)


def moved(start: float, goal: float, share: float) -> float:
    """Where something is that moves from start to goal by equal factors, when a share of its time is over."""
    return float(goal * (start / goal) ** max(0.0, 1.0 - share))
