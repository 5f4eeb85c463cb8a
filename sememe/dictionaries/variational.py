"""Variational sparse coding: each latent is off with some probability, and what it is when on is uncertain too."""

from __future__ import annotations

import functools
import math
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.chunks import Counted, Whole, empty
from sememe.dictionaries.initial import latent_major, median_of_others
from sememe.dictionaries.penalised import Penalised, PenalisedConfig
from sememe.dictionaries.random_state import RandomState
from sememe.dictionaries.spike_slab import Posterior, Shared, Weights, prior_of, sampled
from sememe.encoded import Counts, Encoded
from sememe.errors import ConfigError

__all__ = ["Variational", "VariationalConfig"]

CHUNK_ENTRIES = 1 << 19
"""Latents x rows that are worked on at a time: about a hundred dense arrays of that size (2 MB each) exist at once on
the way back, and none larger."""
START_LOG_VAR = -2.0
"""The slab's logarithmic variance at the start, in training units."""
START_SPIKE = -2.0, 2.0
"""The spike's bias and length at the start: a row at a latent's bias is rarely on, one two units along it is."""


class VariationalConfig(PenalisedConfig):
    """Options of a variational sparse coding dictionary."""

    kind: Literal["variational"] = "variational"
    """Name of the architecture."""
    prior_l0: float = Field(default=32.0, gt=0)
    """Active latents per row that the prior expects on average."""
    decoder_variance: float = Field(default=0.3, gt=0)
    """Variance per dimension of what the reconstruction leaves over, as a share of the data's: the larger, the
    more a nat of information costs."""
    n_pseudo_inputs: int = Field(default=16, ge=1)
    """Learned inputs whose posteriors make up the prior."""
    sharpness_start: float = Field(default=10.0, gt=0)
    """Slope of the smooth step that turns a uniform number into a sampled spike, at the start."""
    sharpness: float = Field(default=50.0, gt=0)
    """The same, once warm."""
    sharpness_warmup: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the slope grows."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> VariationalConfig:
        if self.sharpness_warmup == 0:
            self.check_inert("sharpness_start", without="sharpness_warmup is 0")
        elif self.sharpness_start == self.sharpness:
            raise ConfigError(
                "sharpness_start must differ from sharpness: it has no effect else",
                self.sharpness_start,
                "Change one of them, or set sharpness_warmup to 0.",
            )
        if self.constant_latent:
            raise ConfigError(
                "constant_latent must be false: one latent cannot be told apart from the others' prior",
                "true",
                "Keep the decoder bias.",
            )
        if self.unpenalised_latents:
            raise ConfigError(
                "unpenalised_latents must be 0: the prior is of all latents together",
                self.unpenalised_latents,
                "Drop it, or use relu.",
            )
        if self.ghost_after_tokens is not None:
            raise ConfigError(
                "ghost_after_tokens must be left out: a dead latent's mean is not what keeps its spike off",
                self.ghost_after_tokens,
                "Drop it; resample points dead latents anew, spike and all.",
            )
        return self


@final
class Variational(Penalised):
    """`q(acts_i | x) = spike_i N(mean_i, var_i) + (1 - spike_i) delta_0`, `recon = acts W_dec + b_dec`.

    `mean = relu((x - b_pre) W_enc + b_enc)`, `spike = sigmoid((x - b_pre) W_spike + b_spike)`,
    `log var = (x - b_pre) W_var + b_var`. `encode` gives the mode: the mean of every latent whose spike exceeds 1/2.

    Source: Tonolini, Jensen & Murray-Smith 2019, arXiv:1806.08464, and the authors' code. Differs: linear maps and
    a linear decoder of unit rows instead of networks; slabs have non-negative means; spikes are sigmoids; the
    variance of the data given the latents is an option, and the bound is divided so that the squared error has
    weight 1 per dimension; instead of one pseudo-input, a row is compared with all, by weights that a linear
    classifier gives it (as the code has it); the spike's sharpness grows, and the slab is learned from the start:
    without a mean it carries nothing through a linear decoder; resampling as Bricken et al. 2023.
    """

    kind = "variational"
    config_class = VariationalConfig
    config: VariationalConfig
    shared = Penalised.shared | {"pseudo_inputs", "W_choice", "b_choice"}

    def __init__(
        self, config: VariationalConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        if not config.prior_l0 < d_sae:
            raise ConfigError(
                f"prior_l0 must be less than d_sae={d_sae}", config.prior_l0, "Lower prior_l0 or raise d_sae."
            )
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.W_spike = nn.Parameter(latent_major(d_in, d_sae))
        self.b_spike = nn.Parameter(torch.zeros(d_sae))
        self.W_var = nn.Parameter(latent_major(d_in, d_sae))
        self.b_var = nn.Parameter(torch.zeros(d_sae))
        self.pseudo_inputs = nn.Parameter(torch.zeros(config.n_pseudo_inputs, d_in))
        self.W_choice = nn.Parameter(torch.zeros(d_in, config.n_pseudo_inputs))
        self.b_choice = nn.Parameter(torch.zeros(config.n_pseudo_inputs))
        self._noise = RandomState()

    def encoder_directions(self) -> None:
        """None: one direction decides whether a latent is active, another how much."""

    # -- the posterior -----------------------------------------------------------------------------

    def _weights(self) -> Weights:
        return Weights(*(getattr(self, name) for name in Weights._fields))

    def _posterior(self, x: Float[Tensor, "rows d_in"]) -> Posterior:
        return self._weights().posterior(x)

    def _chunks(self, n_rows: int) -> range:
        return range(0, n_rows, max(1, CHUNK_ENTRIES // self.d_sae))

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The mean of every latent that is more likely on than off, where it is positive."""
        self.check_input(x)
        chunks = self._chunks(x.shape[0])
        parts = [self._mode(x[start : start + chunks.step]) for start in chunks]
        return Encoded.cat(parts) if parts else Encoded.from_dense(x.new_zeros(0, self.d_sae))

    def _mode(self, x: Float[Tensor, "rows d_in"]) -> Encoded:
        centred = x - self.b_pre
        mean = torch.relu(torch.addmm(self.b_enc, centred, self.W_enc))
        on = torch.addmm(self.b_spike, centred, self.W_spike) > 0
        return Encoded.from_dense(mean * on)

    @torch.no_grad()
    def _every_mode(self, x: Float[Tensor, "rows d_in"]) -> Encoded:
        """As `_mode`, with every latent listed."""
        centred, shape = x - self.b_pre, (x.shape[0], self.d_sae)
        acts = torch.addmm(self.b_enc, centred, self.W_enc, out=empty(*shape, like=x)).relu_()
        logit = torch.addmm(self.b_spike, centred, self.W_spike, out=empty(*shape, like=x))
        acts.masked_fill_(logit <= 0, 0.0)
        return Encoded.of_every(acts, acts != 0)

    # -- training ----------------------------------------------------------------------------------

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mean (target - recon)^2 + (2 decoder_variance / d_out) * (kl + kl_prior)`, recon from one sample per row.

        `kl` is the mean over rows of the divergence of q(acts | x) from those of the pseudo-inputs, weighed by the
        row's classifier; `kl_prior` is d_sae times that of the pseudo-inputs' mean spike from prior_l0 / d_sae. Terms
        are of the mode, `mse`, and of the sample, `mse_sampled`.
        """
        self.check_input(x)
        config, n_rows = self.config, x.shape[0]
        shared = Shared(self._weights())
        pseudo = shared.posterior(self.pseudo_inputs)
        choice = torch.softmax((x - self.b_pre) @ self.W_choice + self.b_choice, dim=1)
        sharpness = config.sharpness
        if config.sharpness_warmup:
            warm = min(1.0, progress / config.sharpness_warmup)
            sharpness = config.sharpness_start + warm * (config.sharpness - config.sharpness_start)
        chunks, whole, prior = self._chunks(n_rows), Whole(target), prior_of(pseudo)
        divergences: list[Tensor] = []
        for start, chosen in zip(chunks, torch.split(choice, chunks.step), strict=True):
            rows = x[start : start + chunks.step]
            noise = functools.partial(self._noise.generator, x.device, start)
            recon, divergence = sampled(rows, chosen, shared, prior, sharpness, noise)
            whole.place(self._with_skip(recon, rows), start)
            divergences.append(divergence)
            del recon
        error = whole.joined().sub_(target)
        mse_sampled = error.square().mean()
        kl = torch.stack(divergences).sum() / n_rows
        mean_spike = (choice.mean(0) @ torch.sigmoid(pseudo.logit)).mean()
        kl_prior = self.d_sae * _bernoulli_kl(mean_spike, config.prior_l0 / self.d_sae)
        price = self.warmed(progress) * 2 * config.decoder_variance / self.d_out
        total = mse_sampled + price * (kl + kl_prior)
        with torch.no_grad():
            mse, counts = self._of_mode(x, target)
        terms = {"mse": mse, "mse_sampled": mse_sampled, "kl": kl, "kl_prior": kl_prior}
        return Loss(total, {name: term.detach() for name, term in terms.items()}, counts, error)

    def _of_mode(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]
    ) -> tuple[Float[Tensor, ""], Counts]:
        """The mean squared error of the mode, and what is active in it; chunk by chunk."""
        squares, counted = x.new_zeros(()), Counted(x.shape[0], self.d_sae, x.device)
        chunks = self._chunks(x.shape[0])
        for start in chunks:
            rows = slice(start, start + chunks.step)
            encoded = self._every_mode(x[rows])
            squares += (target[rows] - self.decode(encoded, x[rows])).square().sum()
            counted.add(kernels.counts(encoded), start)
        return squares / target.numel(), counted.counts

    def after_step(self, encoded: Encoded | Counts) -> None:
        """Other noise for the next step, beside the bookkeeping."""
        super().after_step(encoded)
        self._noise.next_step()

    def training_buffers(self) -> dict[str, Tensor]:
        """Where the noise is, too."""
        return {**super().training_buffers(), "noise": self._noise.state}

    # -- state -------------------------------------------------------------------------------------

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """As every penalised dictionary; spikes read what means read, and pseudo-inputs are rows of the sample."""
        super().initialise(x, target, generator)
        with torch.no_grad():
            rows = torch.randint(x.shape[0], (self.config.n_pseudo_inputs,), generator=generator)
            self.pseudo_inputs.copy_(x[rows])
            self.W_choice.copy_((self.pseudo_inputs - self.b_pre).T / self.d_in)
            self.b_choice.zero_()
            bias, length = START_SPIKE
            self.W_spike.copy_(self.W_enc * length)
            self.b_spike.fill_(bias)
            self.W_var.zero_()
            self.b_var.fill_(START_LOG_VAR)
        self._noise.start(generator)

    def _reset_encoder(self, ids: Int[Tensor, " n"], units: Float[Tensor, "n d_in"]) -> None:
        """Mean, spike and slab as at the start, along the new direction."""
        super()._reset_encoder(ids, units)
        bias, length = START_SPIKE
        self.W_spike[:, ids] = units.T * length
        self.b_spike[ids] = bias
        self.W_var[:, ids] = 0.0
        self.b_var[ids] = START_LOG_VAR

    def weaken(self, ids: Int[Tensor, " n"], factor: float) -> None:
        """The slab's mean, and its spread with it; spikes stay as they are."""
        super().weaken(ids, factor)
        with torch.no_grad():
            self.b_var[ids] += 2 * math.log(factor)

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        return median_of_others(norms, ids)

    def _fold_encoder(self, s_in: Tensor, unit: Tensor) -> None:
        """Spikes and relative variances stay what they are: their weights grow as the input shrinks."""
        super()._fold_encoder(s_in, unit)
        for weights in (self.W_spike, self.W_var, self.W_choice):
            weights.mul_(s_in[:, None] if s_in.dim() > 0 else s_in)
        self.b_var.sub_(2 * torch.log(unit))
        self.pseudo_inputs.div_(s_in)


def _bernoulli_kl(p: Float[Tensor, ""], q: float) -> Float[Tensor, ""]:
    return torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))
