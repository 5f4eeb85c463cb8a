"""What the formats share: the map they all describe, from weights to one of our dictionaries and back.

Every format stores `acts = f((x - b_pre) W_enc + b_enc)`, `recon = acts W_dec + b_dec (+ x W_skip)`; they differ in
names, in which way a matrix lies, in what b_pre is, and in which f they have. Knows no format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries import TRAINABLE
from sememe.dictionaries.base import Dictionary
from sememe.dictionaries.gated import Gated
from sememe.dictionaries.jumprelu import JumpReLU
from sememe.dictionaries.linear import Linear
from sememe.dictionaries.matryoshka import Matryoshka
from sememe.dictionaries.row_norm import RowNorm
from sememe.dictionaries.selection import BatchSelection
from sememe.errors import FormatError

__all__ = ["Foreign", "Parts", "assemble", "has_own_outputs", "normed", "parts_of", "require_kinds"]

SELECTING = ("topk", "batch_topk", "matryoshka", "group_max", "abs_topk")
"""Kinds that keep k latents."""
SAME_MAP = {"multi_topk": "topk", "p_anneal": "relu", "tied": "relu"}
"""Kinds that differ from another one in how they are trained only."""
KINDS = ("relu", "jumprelu", "gated", *SELECTING)
UNLIKE, ALIKE = 0.1, 0.3
"""Mean cosine of encoder and decoder directions below which a square matrix is suspected of lying the other way, and
the one from which, turned, it is found to. A trained dictionary's are alike; of unrelated directions it is about 0."""


class Foreign(NamedTuple):
    """A dictionary from another tool, and what its files say about where it belongs."""

    dictionary: Dictionary
    model: str | None
    """The model's name as written there."""
    hookpoint: str | None
    """The hookpoint in our words, where theirs has an equal; of a transcoder, what it reads."""
    config: dict[str, Any]
    """Their config, as it was."""
    hookpoint_out: str | None = None
    """What a transcoder writes, likewise; None for an autoencoder."""


class Parts(NamedTuple):
    """The map that all formats describe, in raw units, float32, on the CPU."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    b_pre: Float[Tensor, " d_in"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    kind: str = "relu"
    """Which f: one of KINDS. batch_topk and matryoshka, as they are used: everything above the threshold."""
    k: int | None = None
    """Latents kept per row, of kinds that keep a number."""
    threshold: Float[Tensor, " d_sae"] | None = None
    """What a pre-activation has to exceed, >= 0, of jumprelu, batch_topk and matryoshka; one for all of the latter."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """Of gated: logarithm of the magnitudes' scale."""
    b_mag: Float[Tensor, " d_sae"] | None = None
    """Of gated: the magnitudes' bias; b_enc is the gates'."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """A linear map of the input that is added to the reconstruction."""
    ends: tuple[int, ...] = ()
    """Of matryoshka: one past each nested dictionary's last latent."""

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def without_centre(self) -> Parts:
        """The same map when nothing is subtracted from the input."""
        return self.about(torch.zeros_like(self.b_pre))

    def with_centre(self) -> Parts:
        """The same map when b_dec is subtracted from the input. Needs inputs as wide as outputs."""
        return self.about(self.b_dec)

    def about(self, centre: Float[Tensor, " d_in"]) -> Parts:
        """The same map about another centre: what it changes in pre-activations goes into the biases, in float64."""
        if torch.equal(self.b_pre, centre):
            return self
        shift = (centre.double() - self.b_pre.double()) @ self.W_enc.double()
        b_mag = self.b_mag
        if b_mag is not None and self.r_mag is not None:
            b_mag = (b_mag.double() + shift * self.r_mag.double().exp()).float()
        return self._replace(b_pre=centre, b_enc=(self.b_enc.double() + shift).float(), b_mag=b_mag)

    def latents_scaled(self, factor: Float[Tensor, " d_sae"] | float) -> Parts:
        """The same reconstructions with activations that are `factor` times as large."""
        scale = torch.as_tensor(factor, dtype=torch.float32)
        return self._replace(
            W_enc=self.W_enc * scale,
            b_enc=self.b_enc * scale,
            W_dec=self.W_dec / scale[..., None],
            threshold=None if self.threshold is None else self.threshold * scale,
            b_mag=None if self.b_mag is None else self.b_mag * scale,
        )


def assemble(parts: Parts, path: Path) -> Dictionary:
    """Our dictionary with these weights, in eval mode.

    Args:
        parts: The weights.
        path: The file to name in errors.

    Raises:
        FormatError: k or the nested dictionaries do not fit the number of latents, or a square matrix is transposed.
    """
    assert parts.kind in KINDS, parts.kind
    if parts.d_in == parts.d_sae == parts.d_out:
        _check_not_turned(parts, path)
    options: dict[str, Any] = {"kind": parts.kind, "d_sae": parts.d_sae, "skip": parts.W_skip is not None}
    if parts.kind in SELECTING:
        if parts.k is None or not 1 <= parts.k <= parts.d_sae:
            raise FormatError(f"k in {path} must be in [1, d_sae={parts.d_sae}]", parts.k, "Mend the file.")
        options["k"] = parts.k
    if parts.kind == "group_max" and parts.d_sae % (parts.k or 1):
        raise FormatError(
            f"k in {path} must divide d_sae={parts.d_sae} into equal groups", parts.k, "Mend the file."
        )
    if parts.kind == "matryoshka":
        ends = parts.ends
        if not ends or ends[-1] != parts.d_sae or list(ends) != sorted(set(ends)) or ends[0] < 1:
            raise FormatError(
                f"the nested dictionaries in {path} must end at rising latents, the last at {parts.d_sae}",
                ", ".join(map(str, ends)) or "none",
                "Mend the file.",
            )
        options["prefixes"] = tuple(end / parts.d_sae for end in ends)
    made = TRAINABLE[parts.kind].rebuild(options, parts.d_in, parts.d_out, parts.d_sae, None)
    assert isinstance(made, Linear)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_pre", "W_dec", "b_dec"):
            getattr(made, name).copy_(getattr(parts, name))
        if parts.W_skip is not None:
            made.W_skip.copy_(parts.W_skip)
        if isinstance(made, Gated):
            assert parts.r_mag is not None and parts.b_mag is not None
            made.r_mag.copy_(parts.r_mag)
            made.b_mag.copy_(parts.b_mag)
        if isinstance(made, JumpReLU):
            assert parts.threshold is not None
            made.relative_threshold.copy_(parts.threshold.clamp_min(0))
        if isinstance(made, BatchSelection):
            assert parts.threshold is not None
            made.threshold.copy_(parts.threshold[0].clamp_min(0))
    return made.eval()


def _check_not_turned(parts: Parts, path: Path) -> None:
    """Shapes cannot tell a square matrix from its transpose; what a latent reads is like what it writes, though.

    With both turned it is, too; then what should be the decoder's rows of norm 1, where it has such, are its columns.

    Raises:
        FormatError: it is so only once one of the two is turned, or columns have norm 1 and rows do not.
    """
    encoder, decoder = parts.W_enc.T, parts.W_dec
    if _unit(decoder.T) and not _unit(decoder):
        raise FormatError(
            f"the square matrices in {path} must not be transposed: directions have norm 1",
            "a decoder whose columns have norm 1 and whose rows, the directions, do not",
            "Transpose it in the file, or fetch the file again.",
        )
    if _alike(encoder, decoder) >= UNLIKE:
        return
    turned = {"the encoder": _alike(encoder.T, decoder), "the decoder": _alike(encoder, decoder.T)}
    which = max(turned, key=lambda name: turned[name])
    if turned[which] >= ALIKE:
        raise FormatError(
            f"the square matrices in {path} must not be transposed: latents would write what they read only with "
            f"{which} turned (mean cosine {turned[which]:.2f})",
            f"{_alike(encoder, decoder):.2f} as they lie",
            "Transpose it in the file, or fetch the file again.",
        )


def _unit(rows: Float[Tensor, "n d"]) -> bool:
    """Whether all of them have norm 1, as far as half precision goes."""
    return bool((rows.float().norm(dim=1) - 1).abs().max() < 5e-3)


def _alike(read: Float[Tensor, "d_sae d"], written: Float[Tensor, "d_sae d"]) -> float:
    """Mean cosine of rows; those of zeros count as 0."""
    return float(torch.nn.functional.cosine_similarity(read.float(), written.float(), dim=1).mean())


def normed(parts: Parts, norm: str, path: Path) -> Dictionary:
    """Our dictionary with these weights for rows that are normalised one by one.

    Raises:
        FormatError: as `assemble`, or widths differ.
    """
    if parts.d_in != parts.d_out:
        raise FormatError(
            f"a dictionary of normalised rows in {path} must write where it reads",
            f"{parts.d_in} to {parts.d_out}",
            "A transcoder's outputs have no norm of their inputs.",
        )
    return RowNorm.around(assemble(parts, path), norm).eval()


def parts_of(dictionary: Dictionary, format_name: str) -> Parts:
    """The weights of one of our dictionaries, folded.

    Raises:
        FormatError: it is not of the family that the formats describe.
    """
    folded = dictionary.fold()
    kind = SAME_MAP.get(folded.kind, folded.kind)
    if kind not in KINDS or not isinstance(folded, Linear):
        raise FormatError(
            f"a dictionary must be one of {', '.join(sorted((*KINDS, *SAME_MAP)))} to be written as {format_name}",
            folded.kind,
            "Keep it in Sememe's own format.",
        )

    def plain(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32).contiguous()

    parts = Parts(
        plain(folded.W_enc),
        plain(folded.b_enc),
        plain(folded.b_pre),
        plain(folded.W_dec),
        plain(folded.b_dec),
        kind,
    )
    if folded.config.skip:
        parts = parts._replace(W_skip=plain(folded.W_skip))
    if kind in SELECTING:
        parts = parts._replace(k=folded.config.k_in_use())
    if isinstance(folded, Gated):
        parts = parts._replace(r_mag=plain(folded.r_mag), b_mag=plain(folded.b_mag))
    if isinstance(folded, JumpReLU):
        parts = parts._replace(threshold=plain(folded.threshold))
    if isinstance(folded, BatchSelection):
        parts = parts._replace(threshold=plain(folded.threshold.expand(folded.d_sae)))
    if isinstance(folded, Matryoshka):
        parts = parts._replace(ends=folded.ends)
    return parts


def has_own_outputs(dictionary: Dictionary, parts: Parts) -> bool:
    """Whether it is a transcoder: writes elsewhere than it reads, or has a skip connection, which only those have."""
    sites = dictionary.sites
    elsewhere = sites is not None and sites.inputs != sites.outputs
    return parts.d_in != parts.d_out or elsewhere or parts.W_skip is not None


def require_kinds(parts: Parts, kinds: tuple[str, ...], what: str, remedy: str) -> None:
    """Raise a FormatError unless a dictionary is of a kind that can be written.

    Args:
        parts: Its weights.
        kinds: The kinds.
        what: What it is to be written as.
        remedy: What else to do with it.
    """
    if parts.kind not in kinds:
        raise FormatError(
            f"a dictionary must be {' or '.join(kinds)} to be written as {what}", parts.kind, remedy
        )
