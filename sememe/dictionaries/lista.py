"""LISTA: an encoder that looks again at what its code leaves over, a fixed number of times."""

from __future__ import annotations

from typing import Any, Literal, cast, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries import chunks
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.chunks import Chunk, Rows, empty, in_chunks
from sememe.dictionaries.steered import Steered, SteeredConfig
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["LISTA", "LISTAConfig"]


N_POWERS = 50
"""Steps of the power iteration that finds the largest eigenvalue."""


class LISTAConfig(SteeredConfig):
    """Options of a dictionary with a LISTA encoder."""

    kind: Literal["lista"] = "lista"
    """Name of the architecture."""
    n_steps: int = Field(default=3, ge=1)
    """How often the code is refined after the first guess; each costs about as much as a ReLU encoder."""

    @model_validator(mode="after")
    def _no_latent_is_constant(self) -> LISTAConfig:
        if self.constant_latent:
            raise ConfigError(
                "constant_latent must be false: every step would add the constant again",
                "true",
                "Drop it, or use relu.",
            )
        return self


@final
class LISTA(Steered):
    """`acts_0 = relu(b)`, `acts_{t+1} = relu(b + acts_t S)`, `b = (x - b_pre) W_enc + b_enc`, `S = I - W_back W_enc`.

    That is, `acts_{t+1} = relu(acts_t + (x - b_pre - acts_t W_back) W_enc + b_enc)`: what the code leaves over of the
    input is encoded again and added. All steps share their weights.

    Source: Gregor & LeCun 2010, "Learning Fast Approximations of Sparse Coding". Differs: activations
    are non-negative; S is the identity less a product of two thin matrices (as in Chen et al. 2018, arXiv:1808.10038,
    whose second factor is the dictionary; here it is learned, so that a transcoder can have one), and nothing
    of size d_sae x d_sae exists; the encoder learns with the decoder from the reconstruction and an L1 penalty
    instead of from codes that were computed before.
    """

    kind = "lista"
    config_class = LISTAConfig
    config: LISTAConfig

    def __init__(
        self, config: LISTAConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.W_back = nn.Parameter(torch.zeros(d_sae, d_in))

    def encoder_directions(self) -> None:
        """None: what a latent reads depends on which others are active."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Every latent that is positive after the last step."""
        self.check_input(x)
        centred, no_bias = x - self.b_pre, torch.zeros_like(self.b_pre)
        places = torch.zeros(0, dtype=torch.int64, device=x.device)
        encoded = _step(centred, x.new_zeros(0), places, self.W_enc, self.b_enc)
        for _ in range(self.config.n_steps):
            left = centred - kernels.decode_encoded(encoded, self.W_back, no_bias)
            encoded = _step(left, encoded.acts, _places(encoded), self.W_enc, self.b_enc)
        return encoded

    def _encode_every(self, x: Float[Tensor, "rows d_in"]) -> Encoded:
        """As `encode`, in dense products, with every latent listed: for a few rows of which many are active."""
        parameters = self.W_enc, self.b_enc, self.W_back
        return Encoded.of_every(
            *cast(Any, _EveryStep.apply)(x - self.b_pre, *parameters, self.config.n_steps)
        )

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mean (target - recon)^2 + l1_coefficient * mean_rows sum_i acts_i`, of the last step's activations."""
        self.check_input(x)

        def of_rows(rows: Rows) -> Chunk:
            encoded = self._encode_every(rows.x) if rows.dense else self.encode(rows.x)
            error = self.decode(encoded, rows.x) - rows.target
            means = {"mse": error.square().mean(), "l1": self._per_row(encoded.acts, encoded)}
            return Chunk(means, encoded.detach(), error)

        dense = kernels.is_dense(x, self.W_enc, self.b_enc, self.b_pre, None)
        means, encoded, error = in_chunks(of_rows, x, target, self.d_sae, dense)
        total = means["mse"] + self._factor(progress) * self.config.l1_coefficient * means["l1"]
        terms = {name: mean.detach() for name, mean in means.items()} | self._steering_terms()
        return Loss(total, terms, encoded, error)

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """ISTA for the encoder that every penalised dictionary starts with: divided by its largest eigenvalue."""
        super().initialise(x, target, generator)
        with torch.no_grad():
            self.W_back.copy_(self.W_enc.T)
            vector = torch.ones_like(self.b_pre)
            for _ in range(N_POWERS):
                vector = self.W_enc @ (vector @ self.W_enc)
                largest = vector.norm()
                vector = vector / largest
            self.W_enc.div_(largest)

    def _reset_encoder(self, ids: Int[Tensor, " n"], units: Float[Tensor, "n d_in"]) -> None:
        """As every linear encoder; what is taken off the input is what the latent reads."""
        super()._reset_encoder(ids, units)
        self.W_back[ids] = units

    def _fold_encoder(self, s_in: Tensor, unit: Tensor) -> None:
        """As every linear encoder; what is taken off raw inputs is in raw units."""
        super()._fold_encoder(s_in, unit)
        self.W_back.mul_(unit / s_in)


def _places(encoded: Encoded) -> Int[Tensor, " nnz"]:
    """Where in a dense matrix the entries are, in rising order."""
    return encoded.row_ids() * encoded.d_sae + encoded.indices.long()


def _at(acts: Float[Tensor, " nnz"], places: Int[Tensor, " nnz"], n_rows: int, d_sae: int) -> Encoded:
    starts = torch.arange(n_rows + 1, device=places.device) * d_sae
    return Encoded(acts, (places % d_sae).to(torch.int32), torch.searchsorted(places, starts), d_sae)


def _step(
    left: Float[Tensor, "batch d_in"],
    acts: Float[Tensor, " nnz"],
    places: Int[Tensor, " nnz"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> Encoded:
    """`relu(acts at their places + left @ W_enc + b_enc)`, sparse."""
    kept, where = cast(Any, _Step.apply)(left, acts, places, W_enc, b_enc)
    return _at(kept, where, left.shape[0], W_enc.shape[1])


class _EveryStep(torch.autograd.Function):
    """All steps of a few rows, densely. Each parameter has one gradient that every step adds to: summed by autograd,
    two more of each would exist at a time. Large arrays are in memory that the next rows use again."""

    @staticmethod
    def forward(
        ctx: Any, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_back: Tensor, n_steps: int
    ) -> tuple[Tensor, Tensor]:
        shape = centred.shape[0], W_enc.shape[1]
        lefts, acts = [centred], [torch.addmm(b_enc, centred, W_enc, out=empty(*shape, like=centred)).relu_()]
        for _ in range(n_steps):
            lefts.append(torch.addmm(centred, acts[-1], W_back, alpha=-1))
            acts.append(
                torch.addmm(b_enc, lefts[-1], W_enc, out=empty(*shape, like=centred)).add_(acts[-1]).relu_()
            )
        ctx.save_for_backward(W_enc, W_back, *lefts, *acts)
        mask = acts[-1] != 0  # of what is not a number, too
        ctx.mark_non_differentiable(mask)
        return acts[-1], mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, W_back, *kept = ctx.saved_tensors
        lefts, acts = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        grad = empty(*acts[0].shape, like=W_enc).copy_(grads[0]).masked_fill_(acts[-1] == 0, 0.0)
        grad_rows, grad_back = (empty(*W_back.shape, like=W_back).zero_() for _ in range(2))
        grad_b, grad_centred = grad.new_zeros(grad.shape[1]), torch.zeros_like(lefts[0])
        for left, before in zip(reversed(lefts[1:]), reversed(acts[:-1]), strict=True):
            grad_rows.addmm_(grad.T, left)
            grad_b += grad.sum(0)
            grad_left = grad @ W_enc.T
            grad_centred += grad_left
            grad_back.addmm_(before.T, grad_left, alpha=-1)
            grad.addmm_(grad_left, W_back.T, alpha=-1).masked_fill_(before == 0, 0.0)
        grad_rows.addmm_(grad.T, lefts[0])
        grad_b += grad.sum(0)
        grad_centred.addmm_(grad, W_enc.T)
        return grad_centred, grad_rows.T, grad_b, grad_back, None


class _Step(torch.autograd.Function):
    """One step, dense only while it selects, some rows at a time: its gradients are those of the entries kept."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, acts: Tensor, places: Tensor, W_enc: Tensor, b_enc: Tensor
    ) -> tuple[Tensor, Tensor]:
        n_rows, d_sae = left.shape[0], W_enc.shape[1]
        size = max(1, chunks.ENTRIES // d_sae)
        starts = list(range(0, n_rows, size)) or [0]
        ends = [places.shape[0]]
        if len(starts) > 1:
            stops = torch.tensor(starts[1:], device=places.device) * d_sae
            ends = [*torch.searchsorted(places, stops).tolist(), *ends]
        kept, where, begin = [], [], 0
        for start, end in zip(starts, ends, strict=True):
            pre_acts = torch.addmm(b_enc, left[start : start + size], W_enc).view(-1)
            first = start * d_sae
            pre_acts[places[begin:end] - first] += acts[begin:end]
            own = torch.nonzero(pre_acts > 0).view(-1)
            kept.append(pre_acts[own])
            where.append(own + first)
            begin = end
        chosen = torch.cat(where)
        ctx.save_for_backward(left, places, chosen, W_enc)
        ctx.mark_non_differentiable(chosen)
        return torch.cat(kept), chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, places, chosen, W_enc = ctx.saved_tensors
        grad, d_sae = grads[0].contiguous(), W_enc.shape[1]
        kept = _at(grad, chosen, left.shape[0], d_sae)
        rows = W_enc.detach().T.requires_grad_()
        with torch.enable_grad():  # the sums over entries and over rows that a decoder and its gradient are
            grad_left = kernels.decode_encoded(kept, rows, torch.zeros_like(left[0]))
        (grad_rows,) = torch.autograd.grad(grad_left, rows, left)
        grad_b = grad.new_zeros(d_sae).index_add_(0, kept.indices.long(), grad)
        grad_acts = grad.new_zeros(places.shape[0])
        if chosen.numel() > 0:
            at = torch.searchsorted(chosen, places).clamp_(max=chosen.numel() - 1)
            grad_acts = torch.where(chosen[at] == places, grad[at], grad_acts)
        return grad_left.detach(), grad_acts, None, grad_rows.T, grad_b
