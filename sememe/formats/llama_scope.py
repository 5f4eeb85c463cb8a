"""Llama Scope and OpenMOSS' Language-Model-SAEs (lm_saes, llamascopium): a JSON config and safetensors.

    hyperparams.json, checkpoints/final.safetensors     the first release
    config.json, sae_weights.safetensors                later ones

    encoder.weight (d_sae, d)   encoder.bias (d_sae)   decoder.weight (d, d_sae)   decoder.bias (d)
    or  W_E (d, d_sae)   b_E (d_sae)   W_D (d_sae, d)   b_D (d)

    z = s_in x W_enc + b_enc,  acts = z where f keeps z * |W_dec|,  recon = (acts W_dec + b_dec) / s_out

f is relu, topk, or jumprelu with one threshold or log_jumprelu_threshold (d_sae); the decoder's norms count where
sparsity_include_decoder_norm is set. s is sqrt(d) over the data's average norm where norm_activation is
dataset-wise, else 1. Folded as their `standardize_parameters_of_dataset_norm` does: activations come out divided by
s_in, in units of the model. The first release's one threshold is in these units (its authors' repair of SAELens,
pull request 483), a learned one in those of training. Knows nothing about the other formats.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sememe.errors import FormatError, nearest
from sememe.formats.base import Foreign, Parts, assemble
from sememe.formats.files import (
    read_json,
    read_safetensors,
    require_fields,
    require_plain,
    require_tensors,
    take,
    take_if_there,
)
from sememe.formats.names import from_transformer_lens

__all__ = ["CHECKPOINT", "CONFIG", "CONFIG_2", "WEIGHTS", "read"]

CONFIG, CONFIG_2 = "hyperparams.json", "config.json"
CHECKPOINT, WEIGHTS = "checkpoints/final.safetensors", "sae_weights.safetensors"

_NORM = "dataset_average_activation_norm"
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_KINDS = {"relu": "relu", "topk": "topk", "jumprelu": "jumprelu"}
_RENAMED = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight", "b_D": "decoder.bias"}
_SWITCHES = {
    "apply_decoder_bias_to_pre_encoder": False,
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
}
"""What decides the map, and what holds where a config does not say it."""
_PLAIN = {"use_glu_encoder": False, "sae_type": "sae"}
_EFFECT = {
    "sae_type", "hook_point_in", "hook_point_out", "d_model", "d_sae", "expansion_factor", "use_decoder_bias",
    "use_glu_encoder", "act_fn", "jump_relu_threshold", "apply_decoder_bias_to_pre_encoder", "norm_activation",
    "sparsity_include_decoder_norm", "top_k", _NORM, "model_name",
}  # fmt: skip
"""What decides the map, and where it belongs."""
_NOTES = {
    "device", "seed", "dtype", "sae_pretrained_name_or_path", "strict_loading", "use_triton_kernel",
    "sparsity_threshold_for_triton_spmm_kernel", "sparsity_threshold_for_csr", "promote_act_fn_dtype",
    "force_unit_decoder_norm", "decoder_exactly_fixed_norm", "jumprelu_threshold_window",
    "jumprelu_threshold_grad_scale", "bias_init_method", "init_decoder_norm", "init_encoder_norm",
    "init_encoder_with_decoder_transpose", "init_search", "lp", "l1_coefficient", "l1_coefficient_warmup_steps",
    "sparsity_loss_type", "tanh_stretch_coefficient", "p", "initial_k", "k_warmup_steps", "use_batch_norm_mse",
    "use_ghost_grads", "tp_size", "ddp_size", "run_name", "exp_name", "version",
}  # fmt: skip
"""What describes the training: fields of their configs over the versions, first release to last."""
_WHY_NOT = {
    "use_glu_encoder": "An encoder with a second, multiplicative path has no equal here.",
    "sae_type": "Only autoencoders and transcoders of one place each are read.",
}


def read(folder: Path) -> Foreign:
    """Read a folder of theirs.

    Raises:
        FormatError: a file is missing or damaged, or the dictionary is of a kind that has no equal here.
    """
    first = (folder / CONFIG).is_file()
    path, weights_path = (
        (folder / CONFIG, folder / CHECKPOINT) if first else (folder / CONFIG_2, folder / WEIGHTS)
    )
    stated = read_json(path)
    config = _SWITCHES | stated
    for switch in _SWITCHES:
        take(config, switch, bool, path)
    require_plain(config, _PLAIN, path, _WHY_NOT)
    require_fields(config, _EFFECT | _NOTES, path)
    d, d_sae = take(config, "d_model", int, path), _d_sae(config, path)
    act_fn = str(take(config, "act_fn", str, path)).lower()
    if act_fn not in _KINDS:
        reason = (
            "It keeps a number of latents per batch and has no threshold to use it with."
            if act_fn == "batchtopk"
            else nearest(act_fn, _KINDS)
        )
        raise FormatError(f"act_fn in {path} must be one of {', '.join(_KINDS)}", repr(act_fn), reason)
    tensors, norms = _tensors(read_safetensors(weights_path), config, d, d_sae, weights_path)
    places = {side: take_if_there(config, f"hook_point_{side}", str, path) for side in ("in", "out")}
    s_in, s_out = (_scale(config, norms, places[side], side, d, path) for side in ("in", "out"))
    W_dec, b_dec = tensors["decoder.weight"].T, tensors["decoder.bias"]
    lengths = W_dec.norm(dim=1) if config["sparsity_include_decoder_norm"] else torch.ones(d_sae)
    parts = Parts(
        tensors["encoder.weight"].T,
        tensors["encoder.bias"] / s_in,
        b_dec / s_in if config["apply_decoder_bias_to_pre_encoder"] else torch.zeros(d),
        W_dec * (s_in / s_out),
        b_dec / s_out,
    )
    if act_fn == "topk":
        # the k largest of what the decoder's norms weigh: activations take up the norms, as the choice does
        parts = parts._replace(kind="topk", k=take(config, "top_k", int, path)).latents_scaled(lengths)
    elif act_fn == "jumprelu":
        threshold = _threshold(config, tensors, lengths, s_in, s_out, d_sae, path)
        parts = parts._replace(kind="jumprelu", threshold=threshold)
    transcodes = places["in"] != places["out"]
    return Foreign(
        assemble(parts, path),
        take_if_there(config, "model_name", str, path),
        from_transformer_lens(places["in"]),
        stated,
        from_transformer_lens(places["out"]) if transcodes else None,
    )


def _d_sae(config: dict[str, Any], path: Path) -> int:
    if config.get("d_sae") is not None:
        found: int = take(config, "d_sae", int, path)
        return found
    width: int = take(config, "d_model", int, path)
    factor: float = take(config, "expansion_factor", float, path)
    return round(width * factor)


def _tensors(
    found: dict[str, Tensor], config: dict[str, Any], d: int, d_sae: int, path: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors under the first release's names, the way they lie there; and the norms kept among them."""
    norms = {
        name.removeprefix(f"{_NORM}."): float(tensor)
        for name, tensor in found.items()
        if name.startswith(_NORM)
    }
    tensors = {}
    for name, tensor in found.items():
        if name.startswith(_NORM):
            continue
        turned = tensor.T if name in ("W_E", "W_D") and tensor.dim() == 2 else tensor
        tensors["log_threshold" if name in _THRESHOLDS else _RENAMED.get(name, name)] = turned
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d, d_sae),
    }
    if config["use_decoder_bias"]:
        shapes["decoder.bias"] = (d,)
    if "log_threshold" in tensors:
        shapes["log_threshold"] = (d_sae,)
    require_tensors(tensors, shapes, path)
    return {"decoder.bias": torch.zeros(d)} | {
        name: tensor.float() for name, tensor in tensors.items()
    }, norms


def _scale(
    config: dict[str, Any], norms: dict[str, float], place: str | None, side: str, d: int, path: Path
) -> float:
    """What the activations of one side are multiplied by."""
    how = config.get("norm_activation", "dataset-wise")
    if how == "inference":
        return 1.0
    if how != "dataset-wise":
        raise FormatError(
            f"norm_activation in {path} must be dataset-wise or inference",
            repr(how),
            "A norm per row or batch of what is written is not known when it is used.",
        )
    stated = config.get(_NORM)
    stated = stated if isinstance(stated, dict) else {}
    norm = stated.get(side, norms.get(place or "", 0.0))
    if not isinstance(norm, (int, float)) or not 0 < norm < float("inf"):
        raise FormatError(
            f"{path}, or the weights, must hold {_NORM} of {place or side}, a positive number",
            repr(norm),
            "Fetch the folder again.",
        )
    return math.sqrt(d) / norm


def _threshold(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    lengths: Tensor,
    s_in: float,
    s_out: float,
    d_sae: int,
    path: Path,
) -> Tensor:
    """What a pre-activation in units of the model has to exceed."""
    if "log_threshold" in tensors:
        return tensors["log_threshold"].exp() / lengths / s_in
    one: float = take(config, "jump_relu_threshold", float, path)
    standardised = lengths * (s_in / s_out if config["sparsity_include_decoder_norm"] else 1.0)
    return torch.full((d_sae,), one).clamp_min(0) / standardised
