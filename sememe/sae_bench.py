"""A dictionary as SAEBench takes one: dense `encode` and `decode`, unit decoder rows, and its `cfg`.

Imports nothing of SAEBench: it asks for attributes, not for a class. Knows dictionaries; knows no language model.
Checked against the real package by scripts/check_sae_bench.py (docs/sae_bench.md).

    from sememe.sae_bench import BenchSAE
    sae = BenchSAE(dictionaries.load("my/dictionary"))
    multiple_evals(selected_saes=[("mine", sae)], ...)      # sae_bench.evals.core.main
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sememe.dictionaries.base import Dictionary, Site
from sememe.dictionaries.row_norm import RowNorm
from sememe.errors import FormatError
from sememe.foreign import probe_rows
from sememe.formats.names import to_transformer_lens

__all__ = ["BenchConfig", "BenchSAE"]

RTOL = 1e-4
"""By how much a reconstruction may differ from the dictionary's own, of its length."""


@dataclasses.dataclass
class BenchConfig:
    """The fields that SAEBench reads or writes into its results, under its names."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = False
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepend_bos: bool = False
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    sae_lens_version: str | None = None
    neuronpedia_id: str | None = None

    @property
    def architecture_str(self) -> str:
        """What later versions of the evaluation call `architecture`."""
        return self.architecture

    def to_dict(self) -> dict[str, Any]:
        """Every field, for the evaluation's results."""
        return dataclasses.asdict(self)


class BenchSAE(nn.Module):
    """One of our dictionaries behind SAEBench's interface.

    `acts = encode(x)` are dense, (..., d_sae), in units in which every decoder row has norm 1; `recon = decode(acts)`.
    `W_enc` and `b_enc` are of the map before selection, `pre_acts = x W_enc + b_enc`: nothing is subtracted first.

    Args:
        dictionary: An autoencoder with one linear encoder and decoder.
        model_name: What TransformerLens calls the model; what the dictionary says if not given.
        hook_name: What it calls the place; from the dictionary's hookpoint if not given.
        context_size: Tokens per text that the dictionary was trained on, if the evaluation shall know.
        prepend_bos: Whether texts began with a beginning-of-sequence token.
        device: Where to compute.
        dtype: What `W_dec` and results are in; encoding is in float32.

    Raises:
        ShapeError: the dictionary is a transcoder.
        FormatError: its encoder is not linear, it has a skip connection or a norm per row, model and place are not
            known, or `acts @ W_dec + b_dec` is not what it reconstructs.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        model_name: str | None = None,
        hook_name: str | None = None,
        *,
        context_size: int | None = None,
        prepend_bos: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        dictionary.check_autoencoder()
        folded = dictionary.fold().eval().requires_grad_(False)
        encoder, decoder = folded.encoder_directions(), folded.decoder_directions()
        if encoder is None or getattr(folded.config, "skip", False):
            raise FormatError(
                "a dictionary must be a linear encoder and a linear decoder for SAEBench",
                f"{folded.kind}{' with a skip connection' if encoder is not None else ''}",
                "Evaluate it with sememe evaluate.",
            )
        if isinstance(folded, RowNorm):
            raise FormatError(
                "a dictionary must read rows as they are for SAEBench, which decodes acts @ W_dec + b_dec",
                f"{folded.kind}, which normalises each row and adds its own centre and spread again",
                "Evaluate it with sememe evaluate.",
            )
        site = _only_site(folded)
        model_name = model_name or (site.model if site else None)
        hook_name = hook_name or (_hook_of(site.hookpoint) if site else None)
        layer = re.search(r"\d+", hook_name or "")
        if model_name is None or hook_name is None or layer is None:
            raise FormatError(
                "model_name and hook_name must be known to SAEBench",
                f"{model_name} and {hook_name}",
                "Pass them, e.g. pythia-70m-deduped and blocks.3.hook_resid_post.",
            )
        norms = decoder.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        zeros = torch.zeros(folded.d_sae)
        b_enc, b_pre = getattr(folded, "b_enc", zeros), getattr(folded, "b_pre", torch.zeros(folded.d_in))
        self.W_enc = nn.Parameter(encoder.T * norms, requires_grad=False)
        self.b_enc = nn.Parameter((b_enc - encoder @ b_pre) * norms, requires_grad=False)
        self.W_dec = nn.Parameter(decoder / norms[:, None], requires_grad=False)
        self.b_dec = nn.Parameter(
            getattr(folded, "b_dec", torch.zeros(folded.d_out)).clone(), requires_grad=False
        )
        self._held = (folded, norms)  # in a tuple, so that a cast of this module does not cast what encodes
        self.cfg = BenchConfig(
            model_name=model_name,
            d_in=folded.d_in,
            d_sae=folded.d_sae,
            hook_layer=int(layer[0]),
            hook_name=hook_name,
            context_size=context_size,
            architecture=folded.kind,
            activation_fn_str=folded.kind,
            prepend_bos=prepend_bos,
        )
        self._check_same(folded)
        self.to(device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """What its weights and results are in."""
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> BenchSAE:
        """As every module, and `cfg` says so."""
        super().to(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Latent activations, densely."""
        folded, norms = self._held
        encoded = folded.to(x.device).encode(x.reshape(-1, self.cfg.d_in).float())
        acts = encoded.to_dense() * norms.to(x.device)
        return acts.to(self.dtype).reshape(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, acts: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_in"]:
        """The reconstruction."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """decode(encode(x))."""
        return self.decode(self.encode(x))

    def _check_same(self, folded: Dictionary) -> None:
        """Raise a FormatError unless what is decoded here is what the dictionary reconstructs."""
        x = probe_rows(folded)
        with torch.no_grad():
            own, here = folded(x), self(x)
        difference = float(((here - own).norm(dim=1) / own.norm(dim=1).clamp_min(1e-12)).max())
        if not difference <= RTOL:
            raise FormatError(
                f"acts @ W_dec + b_dec must be what a dictionary reconstructs, to {RTOL:g}, for SAEBench",
                f"{folded.kind}, which differs by {difference:.3g} of a row's length",
                "Evaluate it with sememe evaluate.",
            )


def _only_site(dictionary: Dictionary) -> Site | None:
    """Where it reads, if that is known and one place."""
    sites = () if dictionary.sites is None else dictionary.sites.inputs
    return sites[0] if len(sites) == 1 else None


def _hook_of(hookpoint: str) -> str | None:
    """TransformerLens' name of a hookpoint; None where it has none."""
    name = to_transformer_lens(hookpoint)
    return None if name == hookpoint else name
