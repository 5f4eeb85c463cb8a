"""What the TopK family shares: sparsity set by a count, no penalty, AuxK for the dead. Knows no selection rule."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.auxiliary import auxk_loss
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.initial import geometric_median
from sememe.dictionaries.levels import levels
from sememe.dictionaries.linear import Linear, LinearConfig, check_crosscoder
from sememe.encoded import Counts, Encoded
from sememe.errors import ConfigError

__all__ = ["BatchSelection", "BatchSelectionConfig", "Selection", "SelectionConfig", "unweighed"]

N_THRESHOLD_ROWS = 1024
"""Rows of the sample that set a first threshold: it holds their pre-activations densely."""
N_SETTLE_ROWS, SETTLED = 4096, 0.25
"""Rows that set the biases of latents pointed anew; and on how many of them each is positive, as a share of those that
a latent is kept on if all are kept alike."""


class SelectionConfig(LinearConfig):
    """Options of every architecture that keeps a number of latents."""

    rate_factor: ClassVar[float] = 10 / 3
    """Without a penalty that silences latents, larger steps lose none (docs/optimisers.md has the measurements)."""

    k: int = 32
    """Latents kept per row."""
    b_dec_init: Literal["geometric_median", "mean"] = "geometric_median"
    """Where the decoder bias starts: the sample's geometric median (robust) or its mean."""
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the auxiliary loss by which dead latents model the residual; 0 turns it off."""
    auxk: int | None = Field(default=None, ge=1)
    """Dead latents used per row in the auxiliary loss; d_in / 2 if not given."""
    dead_after_tokens: int = Field(default=10_000_000, ge=1)
    """A latent that has not been kept for this many training rows counts as dead."""
    site_norms: Literal["l2", "l1"] = "l2"
    """With several outputs, what an activation is weighed by when latents are chosen: l1, the sum of its decoder
    norms at each (a crosscoder); l2, the norm of the whole row, which is 1."""

    @model_validator(mode="after")
    def _auxk_has_an_effect(self) -> Self:
        if self.auxk_coefficient == 0:
            self.check_inert("auxk", "dead_after_tokens", without="auxk_coefficient is 0")
        return self


class BatchSelectionConfig(SelectionConfig):
    """Options of every architecture that keeps a number of latents per batch; k is the average per row."""

    threshold_decay: float = Field(default=0.9, ge=0, lt=1)
    """Share of the threshold that a step keeps: it averages over about 1 / (1 - decay) steps. One that lags behind
    keeps more or fewer latents than k on single rows; of a batch's many entries the smallest kept is known well."""


class Selection(Linear, abc.ABC):
    """A linear dictionary that keeps a number of latents."""

    config: SelectionConfig

    def __init__(
        self, config: SelectionConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        check_crosscoder(config.site_norms, sites)
        super().__init__(config, d_in, d_out, d_sae, sites)
        if not 1 <= config.k <= d_sae:
            raise ConfigError(f"k must be in [1, d_sae={d_sae}]", config.k, "Lower k or raise d_sae.")
        self.dead = DeadLatents()

    @property
    def competes(self) -> bool:
        """For k places in each row, or in a batch."""
        return True

    def after_step(self, encoded: Encoded | Counts) -> None:
        """The bookkeeping, and the number of dead latents on its way for the next step's AuxK."""
        super().after_step(encoded)
        if self.config.auxk_coefficient > 0:
            self.dead.send(self.tokens_since_fired, self.config.dead_after_tokens)

    def _weights(self) -> Float[Tensor, " d_sae"] | None:
        """What activations are weighed by when latents are chosen; None for 1. Gradients do not flow through it."""
        if self.config.site_norms == "l2":
            return None
        return self.site_norms().sum(1).detach().clamp_min(1e-12)

    def _choosing(
        self, weights: Float[Tensor, " d_sae"] | None
    ) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
        """Encoder weights and bias whose pre-activations are weighed."""
        if weights is None:
            return self.W_enc, self.b_enc
        return self.W_enc * weights, self.b_enc * weights

    def _select(self, choose: Callable[..., kernels.TopK], x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k latents per row that a kernel chooses."""
        self.check_input(x)
        weights = self._weights()
        acts, indices = choose(x, *self._choosing(weights), self.b_pre, self.config.k)
        return unweighed(Encoded.from_topk(acts, indices, self.d_sae), weights)

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """Mean squared error, and AuxK over dead latents (Gao et al. 2024, appendix A.2)."""
        encoded = self.kept(x)
        mse, _, error = self._reconstruct(encoded, x, target)
        return self._with_auxk(x, error, mse, {"mse": mse}, encoded)

    def fold(self) -> Self:
        """As every linear dictionary; the weights of the choice go into encoder and decoder."""
        folded = super().fold()
        weights = self._weights()
        if weights is not None:
            with torch.no_grad():
                folded.W_enc.mul_(weights)
                folded.b_enc.mul_(weights)
                folded.W_dec.div_(weights[:, None])
            folded.config = self.config.replace(site_norms="l2")
        return folded

    def _centre(self) -> Callable[[Tensor], Tensor]:
        return geometric_median if self.config.b_dec_init == "geometric_median" else _mean

    def _with_auxk(
        self,
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
        total: Float[Tensor, ""],
        terms: dict[str, Tensor],
        encoded: Encoded,
    ) -> Loss:
        """The loss, with AuxK over dead latents added if there are any.

        Args:
            x: Inputs.
            error: What the kept latents reconstruct minus the target.
            total: The objective without AuxK.
            terms: Its parts.
            encoded: The latents that were kept.
        """
        config = self.config
        if config.auxk_coefficient > 0:
            dead = self.dead.ids(self.tokens_since_fired, config.dead_after_tokens)
            if dead.numel() > 0:
                auxk = auxk_loss(self, x, -error.detach(), dead, config.auxk, signed=self.signed)
                terms = terms | {"auxk": auxk}
                total = total + config.auxk_coefficient * auxk
        return Loss(total, {name: term.detach() for name, term in terms.items()}, encoded.detach(), error)


class BatchSelection(Selection, abc.ABC):
    """Selection over the whole batch while training, and by a threshold otherwise, so that rows stand alone."""

    latent_units = ("b_enc", "threshold")
    config: BatchSelectionConfig
    threshold: Tensor

    def __init__(
        self, config: BatchSelectionConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Every pre-activation above the threshold, in training mode too: only the loss looks at the batch."""
        self.check_input(x)
        weights = self._weights()
        threshold = self.threshold.expand(self.d_sae) if weights is None else self.threshold / weights
        return kernels.encode_threshold(x, self.W_enc, self.b_enc, self.b_pre, threshold)

    def kept(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k x batch largest positive pre-activations of the batch."""
        self.check_input(x)
        n_kept = self.config.k * x.shape[0]
        weights = self._weights()
        weighed = kernels.encode_batch_topk(x, *self._choosing(weights), self.b_pre, n_kept).encoded
        return unweighed(weighed, weights)

    def settle(self, ids: Int[Tensor, " n"], x: Float[Tensor, "rows d_in"]) -> None:
        """Biases at which each is positive on few rows. No row has a number of places of its own: hundreds of latents
        pointed at the longest rows would take all of a batch, and their sum on such a row overshoots."""
        with torch.no_grad():
            share = min(0.5, SETTLED * self.config.k / self.d_sae)
            found = levels(x[:N_SETTLE_ROWS] - self.b_pre, self.W_enc[:, ids], None, share)
            self.b_enc[ids] = -found.clamp_min(0)

    def _smallest(self, encoded: Encoded) -> Float[Tensor, ""]:
        """The smallest activation that was chosen, as it was weighed."""
        acts, weights = encoded.acts.detach(), self._weights()
        return (acts if weights is None else acts * weights.index_select(0, encoded.indices)).min()

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """As every linear dictionary; the threshold starts as what the sample's first rows would set it to."""
        super().initialise(x, target, generator)
        with torch.no_grad():
            self.threshold.copy_(self._smallest(self.kept(x[:N_THRESHOLD_ROWS])))

    def after_step(self, encoded: Encoded | Counts) -> None:
        """The threshold follows the batch's smallest kept activation."""
        super().after_step(encoded)
        assert isinstance(encoded, Encoded)  # a batch is chosen as a whole
        self.threshold.lerp_(self._smallest(encoded), 1 - self.config.threshold_decay)


def unweighed(encoded: Encoded, weights: Float[Tensor, " d_sae"] | None) -> Encoded:
    """The same entries with the weights of the choice taken out again."""
    if weights is None:
        return encoded
    return encoded.with_acts(encoded.acts / weights.index_select(0, encoded.indices))


def _mean(x: Tensor) -> Tensor:
    return x.mean(0)
