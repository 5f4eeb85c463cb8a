"""Penalties on activations, and noise that makes small ones worthless: for the architectures that may choose.

Parts add up: each has a weight of its own, and one of weight 0 is not computed. Knows no architecture.
"""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.chunks import Chunk, Rows
from sememe.dictionaries.random_state import RandomState
from sememe.dictionaries.sparse_start import SparseStart, SparseStartConfig
from sememe.encoded import Counts, Encoded

__all__ = ["ActivationPenalty", "ActivationPenaltyConfig", "entropy", "root_sum"]

NOISE_CUT = 4.0
"""Standard deviations beyond which noise is cut off: what lies further below 0 cannot fire and is not computed."""


class ActivationPenaltyConfig(SparseStartConfig):
    """Options of every architecture that may choose how its activations are made sparse."""

    sqrt_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the mean over rows of sum_i sqrt(acts_i + sqrt_eps) - sqrt(sqrt_eps): the l_1/2 penalty."""
    sqrt_eps: float = Field(default=1e-3, gt=0)
    """Added under the root, whose slope at 0 would be infinite."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the mean over rows of the entropy of acts / sum(acts), in nats."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on pre-activations while training: smaller activations are not worth it."""

    def weights(self) -> dict[str, float]:
        """The parts of the penalty, noise among them."""
        names = ("sqrt_coefficient", "entropy_coefficient", "noise")
        return super().weights() | {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _parts_have_an_effect(self) -> ActivationPenaltyConfig:
        if self.sqrt_coefficient == 0:
            self.check_inert("sqrt_eps", without="sqrt_coefficient is 0")
        return self


class ActivationPenalty(SparseStart, abc.ABC):
    """A dictionary with any of: L1, l_1/2, entropy, noise.

    Source: l_1/2, noise: tried in the discussions that led to Cunningham et al. 2023, arXiv:2309.08600, and found
    no better than L1; entropy: Marks & Mueller's code of 2023, as an experiment. Differs: noise is added before
    the ReLU, where an inactive latent does not feel it (after it, it would cost the same whatever is active), and
    is cut off at 4 standard deviations.
    """

    config: ActivationPenaltyConfig

    def __init__(
        self, config: ActivationPenaltyConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self._random = RandomState()

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """As every penalised dictionary; the noise gets a seed."""
        super().initialise(x, target, generator)
        if self.config.noise:
            self._random.start(generator)

    def _lowest(self, factor: float | Float[Tensor, ""]) -> Float[Tensor, " d_sae"] | None:
        """What a pre-activation must exceed to be able to fire, with noise of `noise * factor`; None for 0."""
        if not self.config.noise:
            return None
        return (-NOISE_CUT * self.config.noise * factor * self.b_enc.detach().new_ones(())).expand(self.d_sae)

    def _encode_noisy(
        self, rows: Rows, lowest: Float[Tensor, " d_sae"] | None, factor: float | Float[Tensor, ""]
    ) -> Encoded:
        """As `encode`, with noise of `noise * factor` on pre-activations above `lowest`; some entries may be 0."""
        near = self._encode_above(rows.x, lowest, rows.dense)
        if lowest is None:
            return near
        generator = self._random.generator(near.acts.device, rows.start)
        drawn = torch.randn(
            near.acts.shape, generator=generator, device=near.acts.device, dtype=near.acts.dtype
        )
        acts = torch.relu(near.acts + self.config.noise * factor * drawn.clamp(-NOISE_CUT, NOISE_CUT))
        return near.with_acts(near.only_stored(acts))

    def _penalty(self, acts: Float[Tensor, " nnz"], encoded: Encoded) -> dict[str, Float[Tensor, ""]]:
        """The parts of the penalty, for activations at the entries of `encoded`."""
        config = self.config
        acts = self._seen(acts, encoded)
        parts = {"l1": acts.sum() / encoded.n_rows}
        if config.sqrt_coefficient:
            parts["sqrt"] = root_sum(acts, encoded.n_rows, config.sqrt_eps)
        if config.entropy_coefficient:
            parts["entropy"] = entropy(encoded.with_acts(acts))
        return parts

    def _loss_of(self, chunk: Chunk, factor: float | Float[Tensor, ""]) -> Loss:
        """The error, and the weighted sum of the penalty's parts times a factor."""
        config, means = self.config, chunk.means
        penalty = config.l1_coefficient * means["l1"]
        if config.sqrt_coefficient:
            penalty = penalty + config.sqrt_coefficient * means["sqrt"]
        if config.entropy_coefficient:
            penalty = penalty + config.entropy_coefficient * means["entropy"]
        terms = {name: mean.detach() for name, mean in means.items()} | self._steering_terms()
        return Loss(means["mse"] + factor * penalty, terms, chunk.encoded, chunk.error)

    def after_step(self, encoded: Encoded | Counts) -> None:
        """New noise for the next step, beside the bookkeeping."""
        super().after_step(encoded)
        self._random.next_step()

    def training_buffers(self) -> dict[str, Tensor]:
        """The state of the noise too, where there is any."""
        return super().training_buffers() | ({"noise": self._random.state} if self.config.noise else {})


def root_sum(acts: Float[Tensor, " nnz"], n_rows: int, eps: float) -> Float[Tensor, ""]:
    """Mean over rows of `sum_i sqrt(acts_i + eps) - sqrt(eps)`: 0 for an inactive latent."""
    per_entry: Tensor = (acts + eps).sqrt() - eps**0.5
    return per_entry.sum() / n_rows


def entropy(encoded: Encoded) -> Float[Tensor, ""]:
    """Mean over rows of `-sum_i p_i log p_i` in nats, p = acts / sum(acts); 0 for a row without activations.

    Does not change when a row's activations are scaled: it asks for few, and not for small ones.
    """
    acts = encoded.acts
    ones, nothing = acts.new_ones(encoded.d_sae, 1), acts.new_zeros(1)

    def per_row(values: Tensor) -> Tensor:
        """A decoder of one column sums in a fixed order, on a GPU too, and so does its gradient."""
        return kernels.decode_encoded(encoded.with_acts(values), ones, nothing).view(-1)

    sums, weighted = per_row(acts), per_row(acts * torch.where(acts > 0, acts, 1.0).log())
    any_active = sums != 0  # of what is not a number, too
    total = torch.where(any_active, sums, 1.0)
    return torch.where(any_active, total.log() - weighted / total, 0.0).sum() / encoded.n_rows
