"""A language model without its weights: how large it is, and how much a forward multiplies.

Builds the model of a config that is at hand on torch's meta device. Never downloads and never reads weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sememe.errors import SememeError
from sememe.lm import embedded
from sememe.lm.build import GPT2Shape, LlamaShape, build_causal_lm
from sememe.lm.gguf import read_gguf_config
from sememe.lm.hookpoints import Hookpoints
from sememe.lm.load import ModelConfig, native_dtype

__all__ = ["Outline", "outline", "outline_of"]


class Outline:
    """Sizes of a causal language model.

    Args:
        hf: The Hugging Face model; on the meta device it takes no memory.
        dtype: Of the weights when it is loaded.
        device: Where it will run.
    """

    def __init__(self, hf: Any, dtype: torch.dtype, device: str) -> None:
        config = hf.config.get_text_config()
        self.dtype, self.device = dtype, device
        self._points = Hookpoints(hf)
        self.n_layers = len(self._points.layers)
        self.d_model = int(config.hidden_size)
        self.n_parameters = sum(int(parameter.numel()) for parameter in hf.parameters())
        self.vocab_size = int(hf.get_input_embeddings().weight.shape[0])
        self.head_flops = 2 * self.vocab_size * self.d_model
        n_experts = next(
            (getattr(config, n) for n in ("num_local_experts", "num_experts") if getattr(config, n, 0)), 1
        )
        active = getattr(config, "num_experts_per_tok", None) or 1
        share = min(1.0, active / n_experts)
        self._layer_flops = [
            sum(
                2 * parameter.numel() * (share if "experts" in name.split(".") else 1.0)
                for name, parameter in layer.named_parameters()
                if parameter.dim() > 1
            )
            for layer in self._points.layers
        ]

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights once loaded."""
        return self.n_parameters * self.dtype.itemsize

    @property
    def d_inner(self) -> int:
        """The widest thing a layer makes: the MLP's inner width."""
        name = f"mlp_act.{self.n_layers - 1}"
        return self.width(name) if name in self._points.table else 4 * self.d_model

    def expand(self, patterns: str | Iterable[str]) -> tuple[str, ...]:
        """Names and globs to names, as the loaded model would.

        Raises:
            HookpointError: one matches nothing.
        """
        return self._points.expand(patterns)

    def width(self, hookpoint: str) -> int:
        """Number of features at a hookpoint: a projection's own width, elsewhere the residual's."""
        place = self._points.resolve(hookpoint)
        module = self._points.module(place)
        if isinstance(module, nn.Linear):
            return int(module.in_features if place.side == "in" else module.out_features)
        weight = getattr(module, "weight", None)
        if hasattr(module, "nf") and weight is not None:  # transformers' Conv1D holds its weight transposed
            return int(weight.shape[0 if place.side == "in" else 1])
        return self.d_model

    def n_layers_read(self, hookpoints: Iterable[str]) -> int:
        """Layers that run until the last of the hookpoints was reached."""
        last = 0
        for name in hookpoints:
            place = self._points.resolve(name)
            before = place.name.startswith("resid_pre.")
            last = max(last, min(place.layer + (0 if before else 1), self.n_layers))
        return last

    def n_layers_above(self, hookpoints: Iterable[str]) -> int:
        """Layers that run again when the hookpoints are spliced."""
        return self.n_layers - 1 - min(self._points.resolve(name).start for name in hookpoints)

    def flops(self, first: int, last: int, context_length: int) -> float:
        """Floating-point operations per token of layers first to last - 1: their matrices, and attention.

        Two per weight and token, and 4 x context x width of the heads for attention's two products.
        """
        total = float(sum(self._layer_flops[first:last]))
        for layer in range(first, last):
            if f"attn_z.{layer}" in self._points.table:
                total += 4 * context_length * self.width(f"attn_z.{layer}")
        return total


def outline(config: ModelConfig) -> Outline | None:
    """The sizes of a model whose config is at hand; None if it would have to be fetched, or cannot be read.

    Args:
        config: Which model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    found = _config_file(config)
    if found is None:
        return None
    try:
        if found.suffix == ".gguf":
            hf_config = read_gguf_config(found)
        else:
            hf_config = AutoConfig.from_pretrained(found.parent, local_files_only=True)
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(hf_config)
    except (OSError, ValueError, KeyError, SememeError):
        return None  # what is wrong with it, the stage that loads it will say
    return _outlined(hf, config)


def outline_of(
    shape: GPT2Shape | LlamaShape, vocab_size: int, context_length: int, config: ModelConfig
) -> Outline | None:
    """The sizes of a model that is still to be made.

    Args:
        shape: Its layers.
        vocab_size: Its tokens.
        context_length: Most positions.
        config: How it will be run.
    """
    with torch.device("meta"):
        hf = build_causal_lm(
            shape, vocab_size=vocab_size, context_length=context_length, end_of_text=0, seed=0
        )
    return _outlined(hf, config)


def _outlined(hf: Any, config: ModelConfig) -> Outline | None:
    """None where the device is not there."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        return None
    dtype = native_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    return Outline(hf, dtype, device)


def _config_file(config: ModelConfig) -> Path | None:
    """config.json or a GGUF file on this machine; None if there is none."""
    if config.model in embedded.MODELS:
        return embedded.config_at_hand(embedded.MODELS[config.model])
    path = Path(config.model).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        file = path / "config.json"
        return file if file.is_file() else ggufs[0] if len(ggufs) == 1 else None
    if path.is_absolute() or config.model.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    return Path(cached) if isinstance(cached, str) else None
