"""ReLU autoencoders and transcoders: L1, or another penalty on activations."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from sememe.dictionaries.activation_penalty import ActivationPenalty, ActivationPenaltyConfig
from sememe.dictionaries.base import Constraints, Loss
from sememe.errors import ConfigError

__all__ = ["ReLU", "ReLUConfig"]


class ReLUConfig(ActivationPenaltyConfig):
    """Options of a ReLU dictionary."""

    kind: Literal["relu"] = "relu"
    """Name of the architecture."""
    norm_weighted: bool = False
    """Weigh each activation by the norm of its decoder row in the penalty, and leave those norms free."""

    @model_validator(mode="after")
    def _norms_have_an_effect(self) -> ReLUConfig:
        if not any(self.weights().values()):
            self.check_inert("norm_weighted", without="every weight of the penalty is 0")
        if self.norm_weighted and self.noise:
            raise ConfigError(
                "norm_weighted must go without noise, which free decoder rows evade by becoming short",
                f"noise {self.noise:g}",
                "Drop one of them.",
            )
        return self


@final
class ReLU(ActivationPenalty):
    """`acts = relu((x - b_pre) W_enc + b_enc)`, `recon = acts W_dec + b_dec`, rows of W_dec of norm 1.

    Source: Bricken et al. 2023 (Towards Monosemanticity), appendix; Marks & Mueller's dictionaries. With
    `norm_weighted`: Conerly et al. 2024 (Anthropic's Circuits Updates, April 2024). Differs: b_pre is set once
    from the sample and kept, instead of tied to b_dec or absent (b_enc can learn whatever it would).
    """

    kind = "relu"
    config_class = ReLUConfig
    config: ReLUConfig

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mean (target - recon)^2 + l1_coefficient * mean_rows sum_i acts_i` (times ||W_dec_i||, if weighted).

        And the other parts of the penalty, if they have a weight.
        """
        factor = self._factor(progress)
        encoded = self._encode_noisy(x, factor)
        mse = (target - self.decode(encoded, x)).square().mean()
        acts = encoded.acts
        if self.config.norm_weighted:
            acts = acts * self.W_dec.norm(dim=1).index_select(0, encoded.indices)
        penalty, parts = self._penalty(acts, encoded)
        terms = {"mse": mse.detach(), **parts, **self._steering_terms()}
        return Loss(mse + factor * penalty, terms, encoded.detach())

    def constraints(self) -> Constraints:
        """Decoder rows keep norm 1, unless the penalty weighs their norms."""
        kept = super().constraints()
        return kept._replace(unit_norm=()) if self.config.norm_weighted else kept
