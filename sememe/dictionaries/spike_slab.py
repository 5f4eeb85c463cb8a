"""What rows add to a variational dictionary's loss: a sample's reconstructions, a divergence, and their gradients.

Written out: autograd would keep about a hundred arrays of rows x d_sae on the way back, where these are a dozen, in
memory that the next rows use again; and gradients of weights are summed in place over all rows. Knows no dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sememe.dictionaries.chunks import empty

__all__ = ["Posterior", "Prior", "Shared", "Weights", "prior_of", "sampled"]


LARGE = "W_spike", "W_enc", "W_var", "W_dec"
"""Parameters with a number for each latent and dimension."""

LINEAR = 40
"""Where the logarithm of 1 + exp(x) is x in any float."""


class Posterior(NamedTuple):
    """Spike and slab per row and latent."""

    logit: Float[Tensor, "rows d_sae"]
    mean: Float[Tensor, "rows d_sae"]
    log_var: Float[Tensor, "rows d_sae"]


class Weights(NamedTuple):
    """Parameters that a reconstruction hangs on."""

    b_pre: Float[Tensor, " d_in"]
    W_spike: Float[Tensor, "d_in d_sae"]
    b_spike: Float[Tensor, " d_sae"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_var: Float[Tensor, "d_in d_sae"]
    b_var: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]

    def posterior(
        self, x: Float[Tensor, "rows d_in"], new: Callable[[], Tensor | None] = lambda: None
    ) -> Posterior:
        """What rows make of spike and slab.

        Args:
            x: Rows.
            new: Gives memory for each; with none, the result is differentiable.
        """
        centred = x - self.b_pre
        logit = torch.addmm(self.b_spike, centred, self.W_spike, out=new())
        mean = torch.addmm(self.b_enc, centred, self.W_enc, out=new()).relu_()
        return Posterior(logit, mean, torch.addmm(self.b_var, centred, self.W_var, out=new()))


class Prior(NamedTuple):
    """What the pseudo-inputs' spikes and slabs are multiplied with in a divergence, and what is subtracted of it."""

    spike: Float[Tensor, "n_pseudo d_sae"]
    spread: Float[Tensor, "n_pseudo d_sae"]
    mean: Float[Tensor, "n_pseudo d_sae"]
    off: Float[Tensor, " n_pseudo"]


def prior_of(pseudo: Posterior) -> Prior:
    """Of the pseudo-inputs' spikes and slabs; differentiable."""
    precision = torch.exp(-pseudo.log_var)
    return Prior(
        (pseudo.log_var + pseudo.mean.square() * precision) / 2 - pseudo.logit,
        precision / 2,
        pseudo.mean * precision,
        logsigmoid(-pseudo.logit).sum(1),
    )


class Shared:
    """Parameters that several groups of rows hang on. Gradients of the large ones are summed in place, and reach the
    parameters once, when every group has gone back.

    Args:
        weights: The parameters.
    """

    def __init__(self, weights: Weights) -> None:
        self._sums: dict[str, Tensor] = {}
        aliases = cast(Any, _Gathered.apply)(self, *(getattr(weights, name) for name in LARGE))
        self.weights = weights._replace(**dict(zip(LARGE, aliases, strict=True)))

    def posterior(self, x: Float[Tensor, "rows d_in"]) -> Posterior:
        """What rows make of spike and slab; differentiable."""
        return Posterior(*cast(Any, _Posterior.apply)(self, x, *self.weights))

    def add(self, name: str, grad: Float[Tensor, "rows d_sae"], rows: Float[Tensor, "rows d"]) -> None:
        """To the gradient of a weight, `grad^T rows`: a latent's numbers side by side."""
        if not self._sums:  # what a pass leaves that does not reach the parameters is not the next one's
            torch.autograd.Variable._execution_engine.queue_callback(self._sums.clear)
        if name in self._sums:
            self._sums[name].addmm_(grad.T, rows)
        else:
            self._sums[name] = torch.mm(grad.T, rows, out=empty(grad.shape[1], rows.shape[1], like=rows))

    def take(self, name: str) -> Float[Tensor, "d_sae d"] | None:
        """The sum so far, of which the next one knows nothing."""
        return self._sums.pop(name, None)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Shared, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        sums = (ctx.shared.take(name) for name in LARGE)
        return None, *(
            total.T if total is not None and name != "W_dec" else total
            for name, total in zip(LARGE, sums, strict=True)
        )


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Shared, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        q = Weights(*tensors).posterior(x)
        ctx.shared = shared
        ctx.save_for_backward(x, q.mean, *tensors)
        return tuple(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, *tensors = ctx.saved_tensors
        logit, grad_mean, log_var = grads
        by_map = Posterior(logit, grad_mean.masked_fill(mean == 0, 0.0), log_var)
        grad_x, grad_weights = _back(ctx.shared, Weights(*tensors), x, by_map)
        return None, grad_x, *grad_weights


def _back(
    shared: Shared, weights: Weights, x: Tensor, grads: Posterior, **others: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """From the linear maps' gradients to that by x, and those by `Weights` that are not shared.

    Args:
        shared: Takes those of the large ones.
        weights: The parameters.
        x: Rows.
        grads: By what is linear in x: the logit, the mean before its relu, the logarithmic variance.
        others: Gradients that are known.
    """
    centred = x - weights.b_pre
    shared.add("W_spike", grads.logit, centred)
    shared.add("W_enc", grads.mean, centred)
    shared.add("W_var", grads.log_var, centred)
    grad_x = grads.logit @ weights.W_spike.T
    grad_x.addmm_(grads.mean, weights.W_enc.T).addmm_(grads.log_var, weights.W_var.T)
    names = ("b_spike", "b_enc", "b_var")
    others |= {name: grad.sum(0) for name, grad in zip(names, grads, strict=True)}
    others["b_pre"] = -grad_x.sum(0)
    return grad_x, tuple(others.get(name) for name in Weights._fields)


def sampled(
    x: Float[Tensor, "rows d_in"],
    choice: Float[Tensor, "rows n_pseudo"],
    shared: Shared,
    prior: Prior,
    sharpness: float,
    generator: Callable[[], torch.Generator],
) -> tuple[Float[Tensor, "rows d_out"], Float[Tensor, ""]]:
    """Reconstructions from one sample of the posterior, and the rows' divergences from the pseudo-inputs, by choice.

    A divergence is the closed form of Tonolini et al. 2019 (per latent, spike times that of two Gaussians, and that of
    two Bernoullis), with every product of something of the row and something of the pseudo-input as a matrix product.

    Args:
        x: Rows.
        choice: How much each pseudo-input counts for a row.
        shared: Parameters.
        prior: Of the pseudo-inputs.
        sharpness: Slope of the sampled spikes.
        generator: Gives the noise's generator at its start; it is asked once more for the gradient.
    Returns:
        The reconstructions, and `sum choice * divergence`.
    """
    found = cast(Any, _Sampled.apply)(shared, sharpness, generator, x, choice, *shared.weights, *prior)
    return cast("tuple[Tensor, Tensor]", found)


class _Sample(NamedTuple):
    """What values and gradients are both made of."""

    q: Posterior
    spike: Tensor
    on: Tensor
    """The sampled spike."""
    deviation: Tensor
    """Of the sampled slab from its mean."""
    acts: Tensor


def _draw(
    x: Tensor, weights: Weights, sharpness: float, generator: torch.Generator, new: Callable[[], Tensor]
) -> _Sample:
    q = weights.posterior(x, new)
    spike = torch.sigmoid(q.logit, out=new())
    on = new().uniform_(generator=generator)
    on.add_(spike).sub_(1).mul_(sharpness).sigmoid_()
    deviation = torch.div(q.log_var, 2, out=new()).exp_()
    noise = new().normal_(generator=generator)
    deviation.mul_(noise)
    return _Sample(q, spike, on, deviation, torch.add(q.mean, deviation, out=noise).mul_(on))


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shared: Shared, sharpness: float, generator: Callable[[], torch.Generator], *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        (x, choice), (weights, prior) = tensors[:2], _named(tensors)

        def new() -> Tensor:
            return empty(x.shape[0], weights.W_enc.shape[1], like=x)

        (logit, mean, log_var), spike, _, _, acts = _draw(x, weights, sharpness, generator(), new)
        recon = torch.addmm(weights.b_dec, acts, weights.W_dec)
        some = torch.neg(logit, out=acts)
        of_row = _log_sigmoid(some).mul_(1 - spike).sum(1)
        log_spike = _log_sigmoid(some.copy_(logit)).sub_(0.5).sub_(log_var, alpha=0.5)
        of_row += log_spike.mul_(spike).sum(1)
        divergence = of_row[:, None] - prior.off + spike @ prior.spike.T
        divergence -= torch.mul(spike, mean, out=some) @ prior.mean.T
        divergence += _spread(log_var, mean, some).mul_(spike) @ prior.spread.T
        ctx.shared, ctx.sharpness, ctx.generator = shared, sharpness, generator
        ctx.save_for_backward(*tensors, divergence)
        return recon, (choice * divergence).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, divergence = ctx.saved_tensors
        (x, choice), (weights, prior) = tensors[:2], _named(tensors)
        grad_recon, grad_kl = grads

        def new() -> Tensor:
            return empty(x.shape[0], weights.W_enc.shape[1], like=x)

        q, spike, on, deviation, acts = _draw(x, weights, ctx.sharpness, ctx.generator(), new)
        shared: Shared = ctx.shared
        shared.add("W_dec", acts, grad_recon)
        by_choice = grad_kl * choice
        per_row = by_choice.sum(1, keepdim=True)
        some, spread = acts, _spread(q.log_var, q.mean, new())
        grad_prior = Prior(
            by_choice.T @ spike,
            by_choice.T @ torch.mul(spread, spike, out=some),
            -(by_choice.T @ torch.mul(spike, q.mean, out=some)),
            -by_choice.sum(0),
        )
        # of the spike's probability: by the divergence of the row alone, by the products, by the sample
        grad_spike = torch.sub(q.logit, q.log_var, alpha=0.5, out=new()).sub_(0.5).mul_(per_row)
        grad_spike.addmm_(by_choice, prior.spike)
        grad_spread = torch.mm(by_choice, prior.spread, out=new())
        grad_spike.addcmul_(grad_spread, spread)
        grad_mean = torch.mm(by_choice, prior.mean, out=new()).neg_()
        grad_spike.addcmul_(grad_mean, q.mean)
        grad_acts = torch.mm(grad_recon, weights.W_dec.T, out=some)
        slope = torch.sub(1, on, out=new()).mul_(on).mul_(ctx.sharpness).mul_(grad_acts)
        grad_spike.addcmul_(slope, q.mean).addcmul_(slope, deviation)
        grad_logit = grad_spike.mul_(spike).mul_(torch.sub(1, spike, out=slope))
        # of the slab's mean and logarithmic variance: by the products, by the sample
        grad_acts.mul_(on)
        grad_spread.mul_(spike)
        grad_mean.mul_(spike).addcmul_(grad_spread, q.mean, value=2).add_(grad_acts)
        grad_mean.masked_fill_(q.mean == 0, 0.0)
        grad_log_var = grad_spread.mul_(torch.exp(q.log_var, out=slope))
        grad_log_var.addcmul_(grad_acts, deviation, value=0.5).addcmul_(spike, per_row, value=-0.5)
        grads_of_q = Posterior(grad_logit, grad_mean, grad_log_var)
        grad_x, grad_weights = _back(shared, weights, x, grads_of_q, b_dec=grad_recon.sum(0))
        return None, None, None, grad_x, grad_kl * divergence, *grad_weights, *grad_prior


def _named(tensors: Any) -> tuple[Weights, Prior]:
    n = 2 + len(Weights._fields)
    return Weights(*tensors[2:n]), Prior(*tensors[n : n + len(Prior._fields)])


def _log_sigmoid(x: Tensor) -> Tensor:
    """In place; linear far below 0, where an exponential would overflow."""
    return softplus(x.neg_(), 1, LINEAR, out=x).neg_()  # type: ignore[call-arg]


def _spread(log_var: Tensor, mean: Tensor, out: Tensor) -> Tensor:
    return torch.exp(log_var, out=out).addcmul_(mean, mean)
