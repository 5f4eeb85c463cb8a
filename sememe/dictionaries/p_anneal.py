"""p-anneal: the penalty starts as L1 and turns, over the run, into something close to counting."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.chunks import Chunk, Rows
from sememe.dictionaries.sparse_start import SparseStart, SparseStartConfig
from sememe.encoded import Counts, Encoded

__all__ = ["PAnneal", "PAnnealConfig", "power"]

SMALL = 1e-3
"""Added to activations before the power, whose slope at 0 is infinite for p < 1."""


class PAnnealConfig(SparseStartConfig):
    """Options of a p-annealed dictionary."""

    kind: Literal["p_anneal"] = "p_anneal"
    """Name of the architecture."""
    l1_coefficient: float = Field(default=1e-3, gt=0)
    """Weight of the penalty while p is 1; afterwards it changes so that the penalty's value stays continuous."""
    p_end: float = Field(default=0.2, gt=0, lt=1)
    """The last exponent."""
    anneal_from: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run at which p leaves 1."""
    anneal_until: float = Field(default=1.0, gt=0, le=1)
    """Share of the run at which p reaches its end."""

    @model_validator(mode="after")
    def _rises(self) -> PAnnealConfig:
        if self.anneal_from >= self.anneal_until:
            raise ValueError("anneal_from must be less than anneal_until")
        return self


@final
class PAnneal(SparseStart):
    """A ReLU dictionary with the penalty `mean_rows sum_i acts_i^p`, p falling linearly from 1 to p_end.

    Source: Karvonen et al. 2024, arXiv:2408.00113, section 4. Differs: p changes at every step; the weight is
    adapted on the step's own batch instead of a queue of batches; the power is (acts + s)^p - s^p with s = 0.001,
    whose slope at 0 is finite.
    """

    kind = "p_anneal"
    config_class = PAnnealConfig
    config: PAnnealConfig
    p: Tensor
    penalty_scale: Tensor

    def __init__(
        self, config: PAnnealConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.register_buffer("p", torch.ones(()), persistent=False)
        self.register_buffer("penalty_scale", torch.ones(()), persistent=False)
        self._next: tuple[Tensor, Tensor] | None = None

    def exponent(self, progress: float) -> float:
        """p at a share of the run."""
        config = self.config
        done = (progress - config.anneal_from) / (config.anneal_until - config.anneal_from)
        return 1 - (1 - config.p_end) * min(1.0, max(0.0, done))

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mean (target - recon)^2 + l1_coefficient * penalty_scale * mean_rows sum_i acts_i^p`.

        As p changes, `penalty_scale` is multiplied by the old penalty over the new one, on the same activations.
        """
        config = self.config
        p = torch.full_like(self.p, self.exponent(progress))

        def of_rows(rows: Rows) -> Chunk:
            encoded = self._encode_above(rows.x, None, rows.dense)
            mse, _, error = self._reconstruct(encoded, rows.x, rows.target)
            acts = encoded.acts
            with torch.no_grad():
                before = self._per_row(power(acts, self.p), encoded)
            means = {"mse": mse, "penalty": self._per_row(power(acts, p), encoded), "before": before}
            return Chunk(means | {"l1": self._per_row(acts.detach(), encoded)}, encoded.detach(), error)

        means, encoded, error = self._in_chunks(of_rows, x, target, None)
        penalty, before = means["penalty"], means.pop("before")
        with torch.no_grad():
            ratio = torch.where(penalty > 0, before / penalty, torch.ones_like(penalty))
            scale = self.penalty_scale * ratio
        self._next = p, scale
        total = means["mse"] + self._factor(progress) * config.l1_coefficient * scale * penalty
        terms = {name: mean.detach() for name, mean in means.items()} | self._steering_terms()
        return Loss(total, terms, encoded, error)

    def after_step(self, encoded: Encoded | Counts) -> None:
        """What the step used becomes what the next one starts from, beside the bookkeeping."""
        super().after_step(encoded)
        if self._next is not None:
            self.p.copy_(self._next[0])
            self.penalty_scale.copy_(self._next[1])

    def training_buffers(self) -> dict[str, Tensor]:
        """The exponent and the adapted weight, too."""
        return {**super().training_buffers(), "p": self.p, "penalty_scale": self.penalty_scale}


def power(acts: Float[Tensor, " nnz"], p: Float[Tensor, "*nnz"]) -> Float[Tensor, " nnz"]:
    """`acts^p`, moved by a small number so that its slope at 0 is finite; p is one, or one for each."""
    return (acts + SMALL).pow(p) - SMALL**p
