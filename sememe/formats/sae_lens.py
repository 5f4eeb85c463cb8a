"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, architectures standard and topk, versions 3 to 6.

    W_enc (d_in, d_sae)   b_enc (d_sae)   W_dec (d_sae, d_in)   b_dec (d_in)
    acts = f((x - b_dec * apply_b_dec_to_input) W_enc + b_enc),  recon = acts W_dec + b_dec

Knows nothing about the other formats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sememe.artifact import write_json
from sememe.dictionaries.base import Dictionary
from sememe.errors import FormatError
from sememe.formats.base import (
    Foreign,
    Parts,
    assemble,
    parts_of,
    read_json,
    read_safetensors,
    require_fields,
    require_tensors,
    take,
    translate,
)

__all__ = ["AS_VERSION", "CONFIG", "WEIGHTS", "read", "write"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
AS_VERSION = "6.0.0"
"""The version whose layout is written; without one SAELens takes a file for an older one and drops its metadata."""

# what decides the map
_EFFECT = {
    "architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "k", "rescale_acts_by_decoder_norm", "activation_fn", "activation_fn_str", "activation_fn_kwargs",
    "finetuning_scaling_factor",
}  # fmt: skip
# what describes where the dictionary belongs or how it was trained
_NOTES = {
    "metadata", "meta", "device", "model_name", "model_class_name", "hook_name", "hook_layer", "hook_head_index",
    "hook_point", "hook_point_layer", "hook_point_head_index", "prepend_bos", "context_size", "dataset_path",
    "dataset_trust_remote_code", "sae_lens_training_version", "sae_lens_version", "neuronpedia_id",
    "model_from_pretrained_kwargs", "model_kwargs", "seqpos_slice", "exclude_special_tokens", "lp_norm",
    "l1_coefficient", "use_ghost_grads", "normalize_sae_decoder", "noise_scale", "decoder_orthogonal_init",
    "decoder_heuristic_init", "decoder_init_norm", "init_encoder_as_decoder_transpose", "mse_loss_normalization",
    "scale_sparsity_penalty_by_decoder_norm", "aux_loss_coefficient", "l1_warm_up_steps", "use_sparse_activations",
}  # fmt: skip

_FROM_THEIRS = {
    r"blocks\.(\d+)\.hook_resid_(pre|post)": "resid_{1}.{0}",
    r"blocks\.(\d+)\.hook_mlp_out": "mlp_out.{0}",
    r"blocks\.(\d+)\.mlp\.hook_post": "mlp_act.{0}",
    r"blocks\.(\d+)\.ln2\.hook_normalized": "mlp_in.{0}",
    r"blocks\.(\d+)\.attn\.hook_z": "attn_z.{0}",
    r"blocks\.(\d+)\.hook_attn_out": "attn_out.{0}",
}
_FROM_OURS = {
    r"resid_(pre|post)\.(\d+)": "blocks.{1}.hook_resid_{0}",
    r"mlp_out\.(\d+)": "blocks.{0}.hook_mlp_out",
    r"mlp_act\.(\d+)": "blocks.{0}.mlp.hook_post",
    r"mlp_in\.(\d+)": "blocks.{0}.ln2.hook_normalized",
    r"attn_z\.(\d+)": "blocks.{0}.attn.hook_z",
    r"attn_out\.(\d+)": "blocks.{0}.hook_attn_out",
}


def read(folder: Path) -> Foreign:
    """Read a SAELens folder; run-time options that can be folded into the weights are.

    Raises:
        FormatError: a file is missing or damaged, or the dictionary is of a kind that has no equal here.
    """
    path = folder / CONFIG
    config = read_json(path)
    require_fields(config, _EFFECT | _NOTES, path)
    k = _k(config, path)
    d_in, d_sae = take(config, "d_in", int, path), take(config, "d_sae", int, path)
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", None, False):
        raise FormatError(
            f"normalize_activations in {path} must be none",
            repr(normalised),
            "Fold the norm into the weights with SAELens and save again; norms per row have no equal here.",
        )
    tensors = read_safetensors(folder / WEIGHTS)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)
    }  # fmt: skip
    if "scaling_factor" in tensors:  # written by old versions, used only after finetuning
        shapes["scaling_factor"] = (d_sae,)
    require_tensors(tensors, shapes, folder / WEIGHTS)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    W_enc, b_enc, W_dec = weights["W_enc"], weights["b_enc"], weights["W_dec"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    if config.get("finetuning_scaling_factor"):
        if "scaling_factor" not in weights:
            raise FormatError(
                f"{folder / WEIGHTS} must hold scaling_factor",
                ", ".join(sorted(tensors)),
                "Fetch the file again.",
            )
        W_dec = W_dec * weights["scaling_factor"][:, None]
    centred = bool(config.get("apply_b_dec_to_input", True))
    b_pre = weights["b_dec"] if centred else torch.zeros(d_in)
    parts = Parts(W_enc, b_enc, b_pre, W_dec, weights["b_dec"], k)
    notes: dict[str, Any] = {**config, **(config.get("meta") or {}), **(config.get("metadata") or {})}
    return Foreign(
        assemble(parts, path),
        notes.get("model_name"),
        translate(notes.get("hook_name") or notes.get("hook_point"), _FROM_THEIRS),
        config,
    )


def _k(config: dict[str, Any], path: Path) -> int | None:
    """None for ReLU; the architecture was a string beside an activation function before version 6."""
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if architecture == "topk":
        k: int = take(config, "k", int, path) if "k" in config else _k_argument(config, path)
        return k
    if architecture == "standard" and activation == "topk":
        return _k_argument(config, path)
    if architecture == "standard" and activation == "relu":
        return None
    found = repr(architecture) if architecture != "standard" else f"standard with {activation!r}"
    raise FormatError(
        f"architecture in {path} must be standard (relu) or topk",
        found,
        "Other architectures are not read yet.",
    )


def _k_argument(config: dict[str, Any], path: Path) -> int:
    k: int = take(config.get("activation_fn_kwargs") or {}, "k", int, path)
    return k


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a dictionary as SAELens 6 does. It has one bias for both ends, so ours folds into b_enc.

    Raises:
        FormatError: the architecture, or a transcoder, has no place in the format.
    """
    parts = parts_of(dictionary, "sae_lens")
    d_in, d_sae = parts.W_enc.shape
    if parts.W_dec.shape[1] != d_in or (
        dictionary.sites and dictionary.sites.inputs != dictionary.sites.outputs
    ):
        raise FormatError(
            "a dictionary must have equal inputs and outputs to be written as sae_lens",
            f"a transcoder from {d_in} to {parts.W_dec.shape[1]}",
            "Write it as sparsify, or keep it in Sememe's own format.",
        )
    centred = torch.equal(parts.b_pre, parts.b_dec)
    tensors: dict[str, Tensor] = {
        "W_enc": parts.W_enc,
        "b_enc": parts.b_enc if centred else parts.bias_without_centre(),
        "W_dec": parts.W_dec,
        "b_dec": parts.b_dec,
    }
    site = dictionary.sites.inputs[0] if dictionary.sites and len(dictionary.sites.inputs) == 1 else None
    config = {
        "architecture": "standard" if parts.k is None else "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": AS_VERSION,
            "model_name": site.model if site else None,
            "hook_name": (translate(site.hookpoint, _FROM_OURS) or site.hookpoint) if site else None,
        },
    }
    if parts.k is not None:
        config["k"] = parts.k
        config["rescale_acts_by_decoder_norm"] = False
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
