"""What every dictionary with one linear encoder and one linear decoder shares. Knows no objective.

Abstract: which pre-activations become activations, and what they are trained for, is each architecture's own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries.base import Constraints, Resampling, Sites, Trainable
from sememe.dictionaries.initial import geometric_median, latent_major, median_of_others, unit_rows
from sememe.dictionaries.resampling import ResamplingConfig
from sememe.encoded import Encoded
from sememe.errors import ConfigError, ShapeError

__all__ = ["Linear", "LinearConfig", "check_crosscoder", "check_one_place"]


class LinearConfig(ResamplingConfig):
    """Options of every architecture with one linear decoder."""

    skip: bool = False
    """Add a linear map of the input to the reconstruction: a skip transcoder. Not where it could copy its input."""


class Linear(Trainable, abc.ABC):
    """`pre_acts = (x - b_pre) W_enc + b_enc`, `recon = acts W_dec + b_dec`, plus `x W_skip` if asked for.

    b_pre is a constant that the sample sets: b_enc can learn whatever it would. W_skip starts at 0 (Paulo, Shabalin
    & Belrose 2025, arXiv:2501.18823, section 3).

    Args:
        config: The architecture's options.
        d_in: Width of the input.
        d_out: Width of the output.
        d_sae: Number of latents.
        sites: Where inputs come from and outputs go.
        decoder_bias: Whether b_dec is learned; else it is 0, and neither a parameter nor saved.
    """

    config_class: ClassVar[type[LinearConfig]]
    config: LinearConfig
    weakens = True
    fires_only_above_zero: ClassVar[bool] = False
    """Whether a latent is active only where its own pre-activation is positive, whatever the others do."""
    latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers that are measured in latent activations, and so divide by scale_in when folded."""

    W_enc: Tensor
    b_pre: Tensor
    b_dec: Tensor

    def __init__(
        self,
        config: LinearConfig,
        d_in: int,
        d_out: int,
        d_sae: int,
        sites: Sites | None = None,
        *,
        decoder_bias: bool = True,
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self._add_encoder()
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.decoder_bias = decoder_bias
        if decoder_bias:
            self.b_dec = nn.Parameter(torch.zeros(d_out))
        else:
            self.register_buffer("b_dec", torch.zeros(d_out), persistent=False)
        if config.skip:
            _check_skip(sites)
            self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))

    def _add_encoder(self) -> None:
        """Make W_enc, b_enc and b_pre; an architecture that has them from its decoder makes fewer."""
        self.W_enc = nn.Parameter(latent_major(self.d_in, self.d_sae))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.register_buffer("b_pre", torch.zeros(self.d_in))

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(cls.config_class.build(config), d_in, d_out, d_sae, sites)

    def pre_acts_of(self, ids: Int[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
        """What gives the pre-activations of some latents, densely, from inputs; each result is a new tensor."""
        W_enc = self.W_enc.T.index_select(
            0, ids
        ).T  # rows of what is stored latent by latent, and so their gradient
        b_enc = self.b_enc[ids]
        return lambda x: torch.addmm(b_enc, x - self.b_pre, W_enc)

    def encode_latents(
        self, x: Float[Tensor, "batch d_in"], latents: Sequence[int]
    ) -> Float[Tensor, "batch n"]:
        """The activations of a few latents, dense. Rows in which none of them can fire are not encoded."""
        if self.training or not self.fires_only_above_zero or not latents:
            return super().encode_latents(x, latents)
        self.check_input(x)
        with torch.no_grad():
            pre_acts = self.pre_acts_of(torch.tensor(latents, device=x.device))(x)
        rows = torch.nonzero((pre_acts > 0).any(1))[:, 0]
        found = super().encode_latents(x[rows], latents)
        return found.new_zeros(len(x), len(latents)).index_put((rows,), found)

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """The weighted sum of decoder rows, plus the bias, plus the skip connection's part where there is one.

        Raises:
            ShapeError: there is a skip connection and no x.
        """
        return self._with_skip(kernels.decode_encoded(encoded, self.W_dec, self.b_dec), x)

    def _reconstruct(
        self,
        encoded: Encoded,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        ends: Sequence[int] | None = None,
    ) -> kernels.Reconstruction:
        """How far the reconstruction is from its target, in training; see `kernels.reconstruct`."""
        if self.config.skip:
            target = target - x @ self.W_skip
        return kernels.reconstruct(encoded, self.W_dec, self.b_dec, target, ends)

    def _with_skip(
        self, recon: Float[Tensor, "batch d_out"], x: Float[Tensor, "batch d_in"] | None
    ) -> Float[Tensor, "batch d_out"]:
        """What the latents reconstruct, plus `x W_skip` where there is a skip connection."""
        if not self.config.skip:
            return recon
        if x is None:
            raise ShapeError(
                "a dictionary with a skip connection needs the input beside the latents",
                "no x",
                "Pass decode(encoded, x).",
            )
        return recon + x @ self.W_skip

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """Rows of W_dec."""
        return self.W_dec

    def site_norms(self) -> Float[Tensor, "d_sae n_sites"]:
        """How long each latent's decoder row is at each output; one column if the outputs are not known."""
        if self.sites is None:
            norms: Tensor = self.W_dec.norm(dim=1, keepdim=True)
            return norms
        parts = [self.W_dec[:, site.start : site.stop].norm(dim=1) for site in self.sites.outputs]
        return torch.stack(parts, dim=1)

    def fold(self) -> Self:
        """Exact where selection does not depend on the scale: only what has a unit changes, and the decoder.

        The unit of latent activations becomes that of the inputs; of several inputs of different scales, that of
        the one with the largest scale, and the encoder's weights take up the ratios.
        """
        folded = self._copy_with_scales_one()
        s_in, s_out = self.scale_in, self.scale_out
        unit = s_in.max()
        with torch.no_grad():
            folded._fold_encoder(s_in, unit)
            folded.W_dec.mul_(unit / s_out)
            folded.b_dec.div_(s_out)
            if self.config.skip:
                folded.W_skip.mul_(s_in[:, None] / s_out if s_in.dim() > 0 else s_in / s_out)
        return folded

    def _fold_encoder(self, s_in: Tensor, unit: Tensor) -> None:
        """Make the encoder, in place, one of raw inputs.

        Args:
            s_in: What inputs were multiplied by: one number, or one per dimension.
            unit: The largest of them. Activations become that many times smaller.
        """
        self.b_pre.div_(s_in)
        if s_in.dim() > 0:
            self.W_enc.mul_((s_in / unit)[:, None])
        for name in self.latent_units:
            getattr(self, name).div_(unit)

    # -- training ----------------------------------------------------------------------------------

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """Random unit decoder rows; for an autoencoder the encoder starts as their transpose."""
        if self.config.skip and x.shape == target.shape and torch.equal(x, target):
            raise _trivial_skip("the targets are the inputs")
        with torch.no_grad():
            self.W_dec.copy_(unit_rows(self.d_sae, self.d_out, generator))
            centre = self._centre()
            if self.decoder_bias:
                self.b_dec.copy_(centre(target))
            self._start_encoder(centre(x), generator)

    def _start_encoder(self, centre: Float[Tensor, " d_in"], generator: torch.Generator) -> None:
        """Set the encoder, once the decoder is set."""
        tied = self.d_in == self.d_out
        self.W_enc.copy_((self.W_dec if tied else unit_rows(self.d_sae, self.d_in, generator)).T)
        self.b_enc.zero_()
        self.b_pre.copy_(centre)

    def _centre(self) -> Callable[[Tensor], Tensor]:
        """What b_pre and b_dec start from, given a sample."""
        return geometric_median

    def reset_latents(
        self,
        ids: Int[Tensor, " n"],
        directions: Float[Tensor, "n d_out"],
        inputs: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """Unit decoder rows along the directions; the encoder reads the inputs' directions; bias 0."""
        with torch.no_grad():
            self.W_dec[ids] = _units(directions)
            self._reset_encoder(ids, _units(directions if inputs is None else inputs))
            self.tokens_since_fired[ids] = 0

    def weaken(self, ids: Int[Tensor, " n"], factor: float) -> None:
        """Encoder and bias together."""
        with torch.no_grad():
            self.W_enc[:, ids] *= factor
            self.b_enc[ids] *= factor

    def _reset_encoder(self, ids: Int[Tensor, " n"], units: Float[Tensor, "n d_in"]) -> None:
        """Make some latents read directions of norm 1."""
        self.W_enc[:, ids] = (units * self._reset_norm(self.W_enc.norm(dim=0), ids)).T
        self.b_enc[ids] = 0.0

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """How long the encoder weights of a reset latent are: here, as long as is usual."""
        return median_of_others(norms, ids)

    def resampling(self) -> Resampling | None:
        """As the config says."""
        return self.config.resampling()

    def constraints(self) -> Constraints:
        """Decoder rows keep norm 1."""
        return Constraints(unit_norm=("W_dec",))


def check_one_place(config: LinearConfig, instead: str, d_in: int, d_out: int, sites: Sites | None) -> None:
    """Raise a ConfigError unless a dictionary reads and writes the same place, and has no skip connection.

    Args:
        config: Options of an architecture whose encoder and decoder share weights.
        instead: An architecture that can be a transcoder.
        d_in: Width of the input.
        d_out: Width of the output.
        sites: Where inputs come from and outputs go, if known.
    """
    name = config.kind.replace("_", " ")
    if config.skip:
        raise ConfigError(
            f"a {name} dictionary reconstructs what it reads, which a skip connection could copy",
            "skip",
            f"Drop skip, or use {instead} for a transcoder.",
        )
    if d_in != d_out or (sites is not None and sites.inputs != sites.outputs):
        raise ConfigError(
            f"a {name} dictionary must read and write the same place",
            f"d_in {d_in} and d_out {d_out}, or different sites",
            f"Use {instead} for a transcoder.",
        )


def _units(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    units: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return units


def check_crosscoder(site_norms: str, sites: Sites | None) -> None:
    """Raise a ConfigError if norms are asked for site by site where there is but one.

    Raises:
        ConfigError: site_norms is l1 and the outputs are not several.
    """
    if site_norms == "l1" and (sites is None or len(sites.outputs) < 2):
        raise ConfigError(
            "site_norms l1 needs several outputs: with one it has no effect",
            "one output" if sites is not None else "outputs that are not known",
            "Drop site_norms, or name several hookpoints (--inputs resid_post.4 resid_post.8).",
        )


def _check_skip(sites: Sites | None) -> None:
    """Raise a ConfigError if the skip connection could copy what is to be reconstructed."""
    if sites is None:
        return  # bare tensors: the sample will tell
    read = {(site.model_fingerprint, site.hookpoint) for site in sites.inputs}
    for site in sites.outputs:
        if (site.model_fingerprint, site.hookpoint) in read:
            raise _trivial_skip(f"{site.hookpoint} on both sides")


def _trivial_skip(value: str) -> ConfigError:
    return ConfigError(
        "a dictionary with a skip connection must write elsewhere than it reads: else it could copy its input",
        value,
        "Drop skip, or name other outputs (--outputs mlp_out.8 for --inputs mlp_in.8).",
    )
