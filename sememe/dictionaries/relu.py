"""ReLU autoencoders and transcoders: L1, or another penalty on activations."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.activation_penalty import ActivationPenalty, ActivationPenaltyConfig
from sememe.dictionaries.base import Constraints, Loss, Sites
from sememe.dictionaries.chunks import Chunk, Rows
from sememe.dictionaries.linear import check_crosscoder
from sememe.errors import ConfigError

__all__ = ["ReLU", "ReLUConfig"]


class ReLUConfig(ActivationPenaltyConfig):
    """Options of a ReLU dictionary."""

    kind: Literal["relu"] = "relu"
    """Name of the architecture."""
    norm_weighted: bool = False
    """Weigh each activation by the norm of its decoder row in the penalty, and leave those norms free."""
    site_norms: Literal["l2", "l1"] = "l2"
    """With several outputs, that norm: l1, the sum of the norms at each (a crosscoder); l2, that of the whole row."""

    @model_validator(mode="after")
    def _norms_have_an_effect(self) -> ReLUConfig:
        if not self.norm_weighted:
            self.check_inert("site_norms", without="norm_weighted is not set")
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
    `norm_weighted`: Conerly et al. 2024 (Anthropic's Circuits Updates, April 2024), and with several outputs and
    `site_norms` l1 the crosscoder of Lindsey et al. 2024 (Sparse Crosscoders for Cross-Layer Features and Model
    Diffing). Differs: b_pre is set once from the sample and kept, instead of tied to b_dec or absent (b_enc can learn
    whatever it would).
    """

    kind = "relu"
    config_class = ReLUConfig
    fires_only_above_zero = True
    config: ReLUConfig

    def __init__(
        self, config: ReLUConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        check_crosscoder(config.site_norms, sites)
        super().__init__(config, d_in, d_out, d_sae, sites)

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mean (target - recon)^2 + l1_coefficient * mean_rows sum_i acts_i` (times ||W_dec_i||, if weighted).

        And the other parts of the penalty, if they have a weight.
        """
        factor = self._factor(progress)
        lowest = self._lowest(factor)

        def of_rows(rows: Rows) -> Chunk:
            encoded = self._encode_noisy(rows, lowest, factor)
            mse, _, error = self._reconstruct(encoded, rows.x, rows.target)
            acts = encoded.acts
            if self.config.norm_weighted:
                norms = self.W_dec.norm(dim=1) if self.config.site_norms == "l2" else self.site_norms().sum(1)
                acts = acts * kernels.of_entries(norms, encoded)
            return Chunk({"mse": mse, **self._penalty(acts, encoded)}, encoded.detach(), error)

        return self._loss_of(self._in_chunks(of_rows, x, target, lowest), factor)

    def constraints(self) -> Constraints:
        """Decoder rows keep norm 1, unless the penalty weighs their norms."""
        kept = super().constraints()
        return kept._replace(unit_norm=()) if self.config.norm_weighted else kept
