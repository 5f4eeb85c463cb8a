"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, versions 3 to 6.

    W_enc (d_in, d_sae)   b_enc (d_sae)   W_dec (d_sae, d_in)   b_dec (d_in)
    acts = f((x - b_dec * apply_b_dec_to_input) W_enc + b_enc),  recon = acts W_dec + b_dec

    standard, topk        f = ReLU, or ReLU of the k largest
    jumprelu              threshold (d_sae)
    gated                 b_gate, r_mag, b_mag (d_sae) in place of b_enc
    (jumprelu_)(skip_)transcoder    W_dec (d_sae, d_out), b_dec (d_out); W_skip (d_out, d_in); x as it is
    batchtopk, matryoshka_batchtopk   a training run's own; topk_threshold (); afterwards they are written as jumprelu

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
from sememe.errors import FormatError, nearest
from sememe.formats.base import Foreign, Parts, assemble, has_own_outputs, normed, parts_of, require_kinds
from sememe.formats.files import (
    read_json,
    read_safetensors,
    require_fields,
    require_tensors,
    take,
    take_if_there,
)
from sememe.formats.names import from_transformer_lens, only_site, to_transformer_lens

__all__ = ["AS_VERSION", "CONFIG", "WEIGHTS", "read", "write"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
AS_VERSION = "6.0.0"
"""The version whose layout is written; without one SAELens takes a file for an older one and drops its metadata."""
SCALER = "activation_scaler.json"
"""Beside the weights of a checkpoint whose inputs are scaled: by how much (version 6)."""
STORE = "activations_store_state.safetensors"
"""The same before version 6, as `estimated_norm_scaling_factor`."""

TRANSCODERS = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
    **TRANSCODERS,
}
"""What each of theirs is here."""
_WHY_NOT = {
    "temporal": "It reads whole sequences through attention; dictionaries here read one position at a time.",
    "matching_pursuit": "It goes on until a row's residual is below residual_threshold or its latents stay the same, "
    "along decoder rows of any length; matching_pursuit here takes k steps along rows of norm 1.",
    "phase_multiplexed": "It encodes several times, each time what was left over, by a TopK over other latents, and "
    "may stop by what a whole batch left over; dictionaries here encode a row once, whatever its batch.",
}

# what decides the map
_EFFECT = {
    "architecture", "d_in", "d_sae", "d_out", "dtype", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "k", "rescale_acts_by_decoder_norm", "activation_fn", "activation_fn_str",
    "activation_fn_kwargs", "finetuning_scaling_factor", "matryoshka_widths",
}  # fmt: skip
# what describes where the dictionary belongs or how it was trained
_NOTES = {
    "metadata", "meta", "device", "model_name", "model_class_name", "hook_name", "hook_layer", "hook_head_index",
    "hook_name_out", "hook_layer_out", "hook_head_index_out", "hook_eval", "hook_point", "hook_point_layer",
    "hook_point_head_index", "prepend_bos", "context_size", "dataset_path", "dataset_trust_remote_code",
    "sae_lens_training_version", "sae_lens_version", "neuronpedia_id", "model_from_pretrained_kwargs",
    "model_kwargs", "seqpos_slice", "exclude_special_tokens", "lp_norm", "l1_coefficient", "l0_coefficient",
    "use_ghost_grads", "normalize_sae_decoder", "noise_scale", "decoder_orthogonal_init", "decoder_heuristic_init",
    "decoder_heuristic_init_norm", "decoder_init_norm", "init_encoder_as_decoder_transpose",
    "mse_loss_normalization", "scale_sparsity_penalty_by_decoder_norm", "aux_loss_coefficient", "l1_warm_up_steps",
    "l0_warm_up_steps", "use_sparse_activations", "jumprelu_init_threshold", "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "pre_act_loss_coefficient", "topk_threshold_lr",
    "use_matryoshka_aux_loss", "training_architecture", "training_architecture_details",
    # whole runs' configs, as early releases have them
    "is_dataset_tokenized", "streaming", "use_cached_activations", "cached_activations_path", "n_batches_in_buffer",
    "total_training_tokens", "training_tokens", "finetuning_tokens", "finetuning_method", "store_batch_size",
    "store_batch_size_prompts", "train_batch_size", "train_batch_size_tokens", "eval_batch_size_prompts",
    "n_eval_batches", "tokens_per_buffer", "seed", "b_dec_init_method", "expansion_factor", "from_pretrained_path",
    "lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles", "adam_beta1",
    "adam_beta2", "mse_loss_type", "autocast", "autocast_lm", "compile_llm", "compile_sae", "llm_compilation_mode",
    "sae_compilation_mode", "act_store_device", "feature_sampling_window", "feature_sampling_method",
    "resample_batches", "feature_reinit_scale", "dead_feature_window", "dead_feature_estimation_method",
    "dead_feature_threshold", "log_to_wandb", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb",
    "wandb_project", "wandb_entity", "wandb_id", "wandb_log_frequency", "eval_every_n_wandb_logs", "n_checkpoints",
    "checkpoint_path", "run_name", "unique_id", "verbose", "save_final_checkpoint",
}  # fmt: skip


def read(folder: Path) -> Foreign:
    """Read a SAELens folder; run-time options that can be folded into the weights are.

    Raises:
        FormatError: a file is missing or damaged, or the dictionary is of a kind that has no equal here.
    """
    path, weights_path = folder / CONFIG, folder / WEIGHTS
    config = read_json(path)
    require_fields(config, _EFFECT | _NOTES, path)
    architecture, kind, k = _architecture(config, path)
    d_in, d_sae = take(config, "d_in", int, path), take(config, "d_sae", int, path)
    own_outputs = architecture in TRANSCODERS
    d_out = (take_if_there(config, "d_out", int, path) if own_outputs else None) or d_in
    tensors = read_safetensors(weights_path)
    shapes = _shapes(architecture, kind, d_in, d_sae, d_out)
    if "log_threshold" in tensors and "threshold" in shapes:  # a training run's, before 6.5x
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors:  # written by old versions, used only after finetuning
        shapes["scaling_factor"] = (d_sae,)
    require_tensors(tensors, shapes, weights_path)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    parts = _parts(config, path, kind, k, weights, own_outputs)
    if kind == "matryoshka":
        widths = take(config, "matryoshka_widths", list, path)
        if not all(type(width) is int for width in widths):
            raise FormatError(
                f"matryoshka_widths in {path} must be whole numbers", repr(widths), "Mend the file."
            )
        parts = parts._replace(ends=tuple(widths if widths[-1:] == [d_sae] else [*widths, d_sae]))
    if take_if_there(config, "rescale_acts_by_decoder_norm", bool, path):
        threshold = parts.threshold  # compared with activations that are scaled already
        parts = parts.latents_scaled(parts.W_dec.norm(dim=1))._replace(threshold=threshold)
    if take_if_there(config, "finetuning_scaling_factor", bool, path):
        if "scaling_factor" not in weights:
            raise FormatError(
                f"{weights_path} must hold scaling_factor",
                ", ".join(sorted(tensors)),
                "Fetch the file again.",
            )
        parts = parts._replace(W_dec=parts.W_dec * weights["scaling_factor"][:, None])
    dictionary = _normalised(parts, config, folder, own_outputs)
    metadata = take_if_there(config, "metadata", dict, path) or {}
    names = {
        name: take_if_there(metadata, name, str, path) or take_if_there(config, name, str, path)
        for name in ("model_name", "hook_name", "hook_name_out", "hook_point")
    }
    reads, writes = names["hook_name"] or names["hook_point"], names["hook_name_out"]
    return Foreign(
        dictionary,
        names["model_name"],
        from_transformer_lens(reads),
        config,
        from_transformer_lens(writes) if own_outputs else None,
    )


def _architecture(config: dict[str, Any], path: Path) -> tuple[str, str, int | None]:
    """Theirs, ours, and k. The architecture was a string beside an activation function before version 6."""
    architecture = take({"architecture": "standard", **config}, "architecture", str, path)
    named = (take_if_there(config, name, str, path) for name in ("activation_fn_str", "activation_fn"))
    activation = next(filter(None, named), "relu")
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif activation != "relu" and architecture != "topk":
        raise FormatError(
            f"activation_fn in {path} must be relu or, where the architecture is standard, topk",
            f"{architecture} with {activation!r}",
            "Such dictionaries are not read.",
        )
    if architecture not in ARCHITECTURES:
        reason = _WHY_NOT.get(architecture) or nearest(str(architecture), sorted(ARCHITECTURES))
        raise FormatError(
            f"architecture in {path} must be one of {', '.join(ARCHITECTURES)}", repr(architecture), reason
        )
    kind = ARCHITECTURES[architecture]
    if kind in ("batch_topk", "matryoshka"):
        return architecture, kind, round(take(config, "k", float, path))
    if kind != "topk":
        return architecture, kind, None
    if "k" in config:
        return architecture, kind, take(config, "k", int, path)
    options = take_if_there(config, "activation_fn_kwargs", dict, path) or {}
    return architecture, kind, take(options, "k", int, path)


def _shapes(architecture: str, kind: str, d_in: int, d_sae: int, d_out: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if kind == "gated":
        shapes |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), (d_sae,))
    else:
        shapes["b_enc"] = (d_sae,)
    if kind == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if kind in ("batch_topk", "matryoshka"):
        shapes["topk_threshold"] = ()
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def _parts(
    config: dict[str, Any],
    path: Path,
    kind: str,
    k: int | None,
    weights: dict[str, Tensor],
    own_outputs: bool,
) -> Parts:
    W_enc, b_dec = weights["W_enc"], weights["b_dec"]
    centred = not own_outputs and take(
        {"apply_b_dec_to_input": True, **config}, "apply_b_dec_to_input", bool, path
    )
    threshold = weights.get("threshold")
    if "topk_threshold" in weights:
        threshold = weights["topk_threshold"].expand(W_enc.shape[1])
    return Parts(
        W_enc,
        weights["b_gate" if kind == "gated" else "b_enc"],
        b_dec if centred else torch.zeros(W_enc.shape[0]),
        weights["W_dec"],
        b_dec,
        kind,
        k,
        threshold,
        weights.get("r_mag"),
        weights.get("b_mag"),
        weights["W_skip"].T if "W_skip" in weights else None,
    )


def _normalised(parts: Parts, config: dict[str, Any], folder: Path, own_outputs: bool) -> Dictionary:
    """The dictionary for inputs as they are: one factor for all of them is folded, a norm per row stays."""
    path = folder / CONFIG
    how = config.get("normalize_activations") or "none"
    if how is True:  # before version 4
        how = "expected_average_only_in"
    take({"normalize_activations": how}, "normalize_activations", str, path)
    if how == "none":
        return assemble(parts, path)
    if own_outputs:
        raise FormatError(
            f"normalize_activations of a transcoder in {path} must be none",
            repr(how),
            "SAELens normalises what a transcoder reads and not what it writes; fold it there and save again.",
        )
    if how == "expected_average_only_in":
        factor = _scaling_factor(folder)
        return assemble(
            parts._replace(
                W_enc=parts.W_enc * factor,
                b_pre=parts.b_pre / factor,
                W_dec=parts.W_dec / factor,
                b_dec=parts.b_dec / factor,
            ),
            path,
        )
    norms = {"layer_norm": "layer", "constant_norm_rescale": "length"}
    if how not in norms:
        raise FormatError(
            f"normalize_activations in {path} must be none, expected_average_only_in, {' or '.join(norms)}",
            repr(how),
            "Fold it into the weights with SAELens and save again.",
        )
    return normed(parts, norms[how], path)


def _scaling_factor(folder: Path) -> float:
    """What inputs are multiplied by, from what a checkpoint has beside its weights."""
    if (folder / SCALER).is_file():
        scaler = read_json(folder / SCALER)
        if scaler.get("has_whitening"):
            raise FormatError(
                f"{folder / SCALER} must scale inputs by one factor",
                "whitening",
                "Fold it into the weights with SAELens and save again.",
            )
        factor = take(scaler, "scaling_factor", float, folder / SCALER)
    elif (folder / STORE).is_file():
        tensors = read_safetensors(folder / STORE)
        factor = float(tensors.get("estimated_norm_scaling_factor", torch.zeros(())))
    else:
        raise FormatError(
            f"{folder} must say by which factor inputs are scaled, as {CONFIG} has "
            "normalize_activations expected_average_only_in",
            f"neither {SCALER} nor {STORE}",
            f'Write {{"scaling_factor": ...}} into {SCALER}, or fold it with SAELens and save again.',
        )
    if not 0 < factor < float("inf"):
        raise FormatError(
            f"the scaling factor in {folder} must be positive", f"{factor:g}", "Fetch the folder again."
        )
    return float(factor)


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a dictionary as SAELens 6 does. It has one bias for both ends, so ours folds into b_enc.

    Batch-wise kinds are written as they are used: jumprelu, with one threshold for all latents.

    Raises:
        FormatError: the architecture has no place in the format.
    """
    parts = parts_of(dictionary, "sae_lens")
    own_outputs = has_own_outputs(dictionary, parts)
    kept = "Keep it in Sememe's own format."
    kinds: tuple[str, ...]
    if own_outputs:
        kinds = ("relu", "jumprelu", "batch_topk", "matryoshka")
        require_kinds(
            parts, kinds, "a transcoder of sae_lens", f"Write it as sparsify, or {kept[0].lower()}{kept[1:]}"
        )
    else:
        kinds = ("relu", "topk", "jumprelu", "batch_topk", "matryoshka", "gated")
        require_kinds(parts, kinds, "sae_lens", kept)
    centred = not own_outputs and torch.equal(parts.b_pre, parts.b_dec)
    parts = parts if centred else parts.without_centre()
    jumps = parts.threshold is not None
    tensors: dict[str, Tensor] = {"W_enc": parts.W_enc, "W_dec": parts.W_dec, "b_dec": parts.b_dec}
    if parts.r_mag is not None and parts.b_mag is not None:
        tensors |= {"b_gate": parts.b_enc, "r_mag": parts.r_mag, "b_mag": parts.b_mag}
    else:
        tensors["b_enc"] = parts.b_enc
    if parts.threshold is not None:
        tensors["threshold"] = parts.threshold
    if parts.W_skip is not None:
        tensors["W_skip"] = parts.W_skip.T
    site, target = only_site(dictionary), only_site(dictionary, "outputs")
    metadata: dict[str, Any] = {
        "sae_lens_version": AS_VERSION,
        "model_name": site.model if site else None,
        "hook_name": to_transformer_lens(site.hookpoint) if site else None,
    }
    if own_outputs:
        skips = "skip_" if parts.W_skip is not None else ""
        architecture = f"{'jumprelu_' if jumps else ''}{skips}transcoder"
        metadata["hook_name_out"] = to_transformer_lens(target.hookpoint) if target else None
    else:
        own = {"relu": "standard", "topk": "topk", "gated": "gated"}
        architecture = "jumprelu" if jumps else own[parts.kind]
    config = {
        "architecture": architecture,
        "d_in": parts.d_in,
        "d_sae": parts.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if own_outputs:
        config["d_out"] = parts.d_out
    if architecture == "topk":
        config |= {"k": parts.k, "rescale_acts_by_decoder_norm": False}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
