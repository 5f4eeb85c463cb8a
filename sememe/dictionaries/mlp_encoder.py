"""MLP encoder: a hidden layer between the input and the latents, beside the direct path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries.base import Sites
from sememe.dictionaries.initial import unit_rows
from sememe.dictionaries.selection import Selection, SelectionConfig, unweighed
from sememe.encoded import Encoded
from sememe.recompute import recomputed

__all__ = ["MLPEncoder", "MLPEncoderConfig"]

START = 0.1
"""Norm of the hidden layer's output weights at the start, per hidden unit: the direct path leads."""

HIDDEN_ENTRIES = 2**20
"""Units x rows of the hidden layer that are held at once: 4 MB, a few times over."""


class MLPEncoderConfig(SelectionConfig):
    """Options of a TopK dictionary with a hidden layer before the latents."""

    kind: Literal["mlp_encoder"] = "mlp_encoder"
    """Name of the architecture."""
    d_hidden: int | None = Field(default=None, ge=1)
    """Units of the hidden layer; 2 x d_in if not given."""


@final
class MLPEncoder(Selection):
    """`h = (x - b_pre) + relu((x - b_pre) W_in + b_in) W_out`, `acts = top_k(relu(h W_enc + b_enc))`, decoder as TopK.

    Source: the semilinear MLP encoder of the code beside Cunningham et al. 2023, arXiv:2309.08600; O'Neill et al.
    2025, arXiv:2411.13117, on what an encoder that is one product cannot infer. Differs: a direct path beside the
    hidden layer, whose weights start small, so that training starts close to a TopK dictionary; TopK selection and
    AuxK instead of a penalty.
    """

    kind = "mlp_encoder"
    config_class = MLPEncoderConfig
    config: MLPEncoderConfig
    latent_units = ("b_enc", "b_in")
    shared = Selection.shared | {"W_in", "b_in", "W_out"}

    def __init__(
        self, config: MLPEncoderConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        d_hidden = 2 * d_in if config.d_hidden is None else config.d_hidden
        self.W_in = nn.Parameter(torch.zeros(d_in, d_hidden))
        self.b_in = nn.Parameter(torch.zeros(d_hidden))
        self.W_out = nn.Parameter(torch.zeros(d_hidden, d_in))

    def encoder_directions(self) -> None:
        """None: the encoder is not linear."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k largest positive pre-activations of each row; fewer if fewer are positive (then acts are 0)."""
        self.check_input(x)
        hidden, no_centre, weights = self._hidden(x), torch.zeros_like(self.b_pre), self._weights()
        acts, indices = kernels.encode_topk(hidden, *self._choosing(weights), no_centre, self.config.k)
        return unweighed(Encoded.from_topk(acts, indices, self.d_sae), weights)

    def _hidden(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the encoder reads; of some rows at a time, as units are computed again for the gradient."""
        parts = torch.split(x, max(1, HIDDEN_ENTRIES // self.b_in.shape[0])) if x.shape[0] else (x,)
        return torch.cat([recomputed(self._hidden_of, part) for part in parts])

    def _hidden_of(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        centred = x - self.b_pre
        return centred + torch.relu(centred @ self.W_in + self.b_in) @ self.W_out

    def pre_acts_of(self, ids: Int[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
        """What gives the pre-activations of some latents, densely, from inputs."""
        W_enc, b_enc = self.W_enc[:, ids], self.b_enc[ids]
        return lambda x: torch.addmm(b_enc, self._hidden(x), W_enc)

    def _start_encoder(self, centre: Float[Tensor, " d_in"], generator: torch.Generator) -> None:
        """As TopK, and a hidden layer of random directions that adds little."""
        super()._start_encoder(centre, generator)
        d_hidden = self.b_in.shape[0]
        self.W_in.copy_(unit_rows(d_hidden, self.d_in, generator).T)
        self.b_in.zero_()
        self.W_out.copy_(unit_rows(d_hidden, self.d_in, generator) * (START / d_hidden**0.5))

    def _fold_encoder(self, s_in: Tensor, unit: Tensor) -> None:
        """As every linear encoder; with a scale per dimension the hidden layer gives raw units, as its input has."""
        super()._fold_encoder(s_in, unit)
        if s_in.dim() > 0:
            self.W_in.mul_((s_in / unit)[:, None])
            self.W_out.mul_(unit / s_in)
