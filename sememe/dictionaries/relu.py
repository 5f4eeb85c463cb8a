"""ReLU autoencoders and transcoders with an L1 penalty."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.base import Constraints, Loss
from sememe.dictionaries.penalised import Penalised, PenalisedConfig

__all__ = ["ReLU", "ReLUConfig"]


class ReLUConfig(PenalisedConfig):
    """Options of a ReLU dictionary."""

    kind: Literal["relu"] = "relu"
    """Name of the architecture."""
    l1_coefficient: float = 1e-3
    """Weight of the mean over rows of the sum of activations, against the mean squared error per dimension."""
    norm_weighted: bool = False
    """Weigh each activation by the norm of its decoder row in the penalty, and leave those norms free."""


@final
class ReLU(Penalised):
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
        """`mean (target - recon)^2 + l1_coefficient * mean_rows sum_i acts_i` (times ||W_dec_i||, if weighted)."""
        encoded = self.encode(x)
        mse = (target - self.decode(encoded, x)).square().mean()
        acts = encoded.acts
        if self.config.norm_weighted:
            acts = acts * self.W_dec.norm(dim=1).index_select(0, encoded.indices)
        l1 = acts.sum() / encoded.n_rows
        total = mse + self.config.l1_coefficient * l1
        return Loss(total, {"mse": mse.detach(), "l1": l1.detach()}, encoded.detach())

    def constraints(self) -> Constraints:
        """Decoder rows keep norm 1, unless the penalty weighs their norms."""
        return Constraints() if self.config.norm_weighted else super().constraints()
