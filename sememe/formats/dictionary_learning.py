"""dictionary_learning folders: `ae.pt` (a pickled state_dict, read without running it) and `config.json`.

    AutoEncoder       bias (d_in)   encoder.weight (d_sae, d_in)   encoder.bias (d_sae)   decoder.weight (d_in, d_sae)
                      acts = relu((x - bias) encoder.weight^T + encoder.bias),  recon = acts decoder.weight^T + bias
    AutoEncoderNew    as above, but nothing is subtracted from x, and decoder.bias (d_in) in place of bias
    AutoEncoderTopK   as AutoEncoder with b_dec in place of bias, the k largest kept; buffers k and threshold
    BatchTopKSAE      the same tensors, but everything above threshold is kept (all that is positive, if it is -1)
    MatryoshkaBatchTopKSAE   W_enc (d_in, d_sae), b_enc, W_dec, b_dec, k, threshold, group_sizes; x - b_dec is read
    JumpReluAutoEncoder      W_enc, b_enc, W_dec, b_dec, threshold (d_sae); x is read as it is
    GatedAutoEncoder  encoder.weight, decoder.weight, decoder_bias (d_in), gate_bias, r_mag, mag_bias (d_sae)
    CrossCoder        encoder.weight (layers, d, d_sae), encoder.bias, decoder.weight (layers, d_sae, d), decoder.bias
                      (layers, d): ReLU; here the layers' activations stand one after the other
    IdentityDict      no tensors

Which it is follows from the names of the tensors, and for the two that share them from dict_class in the config.
A checkpoint, `RUN/checkpoints/ae_1000.pt`, goes with the config of its run. Knows nothing about the other formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sememe.artifact import write_json
from sememe.dictionaries.base import Dictionary
from sememe.dictionaries.identity import Identity, IdentityConfig
from sememe.errors import FormatError, nearest
from sememe.formats.base import Foreign, Parts, assemble, has_own_outputs, parts_of
from sememe.formats.files import check_shapes, read_json, read_pickle, require_fields, take, take_if_there
from sememe.formats.names import folder_name, only_site, translate

__all__ = ["CHECKPOINTS", "CLASSES", "CONFIG", "WEIGHTS", "read", "write"]

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "ae.pt", "checkpoints"

_LINEAR = frozenset({"encoder.weight", "encoder.bias", "decoder.weight"})
_PLAIN = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
CLASSES: dict[str, frozenset[str]] = {
    "AutoEncoder": _LINEAR | {"bias"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias"},
    "AutoEncoderTopK": _LINEAR | {"b_dec", "k"},
    "BatchTopKSAE": _LINEAR | {"b_dec", "k"},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"k", "threshold", "group_sizes"},
    "JumpReluAutoEncoder": _PLAIN | {"threshold"},
    "GatedAutoEncoder": frozenset(
        {"encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "r_mag", "mag_bias"}
    ),
    "CrossCoder": _LINEAR | {"decoder.bias"},
    "IdentityDict": frozenset(),
}
"""The tensors of each of their classes."""
_OPTIONAL = {"threshold"}
_TABLES = {"trainer", "buffer"}
"""A run's config: what was trained, and what it was fed with, which changes nothing about the map."""
_TRAINER = {
    "trainer_class", "dict_class", "activation_dim", "dict_size", "k", "group_sizes", "layer", "lm_name",
    "submodule_name", "wandb_name", "device", "seed", "steps", "lr", "warmup_steps", "decay_start",
    "sparsity_warmup_steps", "resample_steps", "l1_penalty", "sparsity_penalty", "sparsity_function", "p_start",
    "p_end", "anneal_start", "anneal_end", "n_sparsity_updates", "sparsity_queue_length", "target_l0", "bandwidth",
    "auxk_alpha", "top_k_aux", "threshold_beta", "threshold_start_step", "k_anneal_steps", "group_fractions",
    "group_weights", "ghost_threshold",
}  # fmt: skip
"""Fields of their trainers' configs; all but the first six describe the place or the training."""
_CENTRED = {"AutoEncoder": "bias", "AutoEncoderTopK": "b_dec", "BatchTopKSAE": "b_dec"}
"""Which tensor is both ends' bias."""
_FROM_OURS = {
    "relu": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}

_FROM_THEIRS = {
    r"resid_(pre|post)_layer_?(\d+)": "resid_{0}.{1}",
    r"resid_out_layer_?(\d+)": "resid_post.{0}",
    r"(mlp|attn)_out_layer_?(\d+)": "{0}_out.{1}",
}


def read(folder: Path) -> Foreign:
    """Read a dictionary_learning folder, or one .pt file of its checkpoints.

    Raises:
        FormatError: a file is missing or damaged, holds code, or is of a class that has no equal here.
    """
    weights_path = folder / WEIGHTS if folder.is_dir() else folder
    run = weights_path.parent
    if run.name == CHECKPOINTS and not (run / CONFIG).is_file():
        run = run.parent
    path = run / CONFIG
    config = read_json(path)
    trainer = config.get("trainer") or {}
    if not isinstance(trainer, dict):
        raise FormatError(f"trainer in {path} must be an object", repr(trainer), "Fetch the file again.")
    if "trainer" in config:  # the first releases' configs have none, and nothing that is read
        require_fields(config, _TABLES, path)
    require_fields(trainer, _TRAINER, path)
    tensors, _ = read_pickle(weights_path)
    if "_orig_mod.encoder.weight" in tensors:  # saved while compiled
        tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    name = _class_of(tensors, trainer, path, weights_path)
    matrix = next((tensors[key] for key in ("encoder.weight", "W_enc") if key in tensors), None)
    if matrix is not None and matrix.dim() != (3 if name == "CrossCoder" else 2):
        raise FormatError(
            f"the encoder in {weights_path} must be a matrix", tuple(matrix.shape), "Fetch the file again."
        )
    hookpoint, model = _place(trainer, run, path)
    if name == "IdentityDict":
        d_in = take(trainer, "activation_dim", int, path)
        made: Dictionary = Identity(IdentityConfig(), d_in, d_in, d_in).eval()
    else:
        made = assemble(_PARTS[name](tensors, trainer, path, weights_path), path)
    return Foreign(made, model, hookpoint, config)


def _place(trainer: Mapping[str, Any], run: Path, path: Path) -> tuple[str | None, str | None]:
    """Hookpoint and model: what the config says, else the folders' names, `MODEL/SUBMODULE_layerN/RUN`."""
    model = take_if_there(trainer, "lm_name", str, path)
    hookpoint = translate(take_if_there(trainer, "submodule_name", str, path), _FROM_THEIRS)
    for place in (run, run.parent):
        if hookpoint is None and (hookpoint := translate(place.name, _FROM_THEIRS)) is not None:
            model = model or folder_name(place.parent)
    return hookpoint, model


# -- which class -----------------------------------------------------------------------------------


def _class_of(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], path: Path, weights: Path) -> str:
    """The class that the tensors' names belong to; of several, the one that the config names."""
    stated = trainer.get("dict_class")
    match = re.search(r"(\w+)\W*$", str(stated)) if stated is not None else None
    said = match[1] if match else None
    fitting = [
        name
        for name, keys in CLASSES.items()
        if keys <= set(tensors) <= keys | _OPTIONAL and _fits(name, tensors)
    ]
    if not fitting:
        raise _no_class(tensors, weights)
    if said in fitting:
        return said
    if said is not None:
        raise FormatError(
            f"dict_class in {path} must be {' or '.join(fitting)}, as the tensors in {weights.name} say",
            repr(stated),
            "Name the folder in which both files belong together.",
        )
    if len(fitting) > 1:
        raise FormatError(
            f"{path} must hold dict_class where the tensors in {weights.name} fit several",
            " or ".join(fitting),
            'Write {"trainer": {"dict_class": ...}} with the one it was trained as.',
        )
    return fitting[0]


def _fits(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """A crosscoder's matrices have a layer axis; otherwise its tensors are AutoEncoderNew's."""
    layered = "encoder.weight" in tensors and tensors["encoder.weight"].dim() == 3
    return layered == (name == "CrossCoder")


def _no_class(tensors: Mapping[str, Tensor], path: Path) -> FormatError:
    best = min(CLASSES, key=lambda name: len(CLASSES[name] ^ set(tensors)))
    missing = sorted(CLASSES[best] - set(tensors))
    unknown = sorted(set(tensors) - CLASSES[best] - _OPTIONAL)
    hint = (
        nearest(unknown[0], sorted(CLASSES[best]))
        if unknown
        else f"Fetch the file again: {', '.join(missing) or 'something'} is missing."
    )
    return FormatError(
        f"{path} must hold the tensors of one of {', '.join(CLASSES)}",
        ", ".join(sorted(tensors)) or "none",
        hint,
    )


# -- each class's weights --------------------------------------------------------------------------


def _sizes(trainer: Mapping[str, Any], d_sae: int, d_in: int, path: Path) -> tuple[int, int]:
    """What the config says, else what the encoder's shape says."""
    stated = {"dict_size": d_sae, "activation_dim": d_in, **trainer}
    return take(stated, "dict_size", int, path), take(stated, "activation_dim", int, path)


def _check(tensors: Mapping[str, Tensor], d_sae: int, d_in: int, path: Path) -> dict[str, Tensor]:
    by_latent = ("encoder.bias", "b_enc", "gate_bias", "r_mag", "mag_bias")
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae), "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in), "bias": (d_in,), "decoder.bias": (d_in,), "decoder_bias": (d_in,), "b_dec": (d_in,),
        "k": (), "threshold": (d_sae,) if "k" not in tensors else (), **dict.fromkeys(by_latent, (d_sae,)),
    }  # fmt: skip
    check_shapes(tensors, {name: shapes[name] for name in tensors if name in shapes}, path)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _k(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], path: Path, weights: Path) -> int:
    k = int(tensors["k"])
    if take(trainer, "k", int, path) != k:
        raise FormatError(f"k in {path} must be {k}, as in {weights.name}", trainer["k"], "Mend the file.")
    return k


def _linear(
    tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], path: Path, weights: Path, name: str
) -> Parts:
    matrix = tensors["encoder.weight"]
    d_sae, d_in = _sizes(trainer, matrix.shape[0], matrix.shape[-1], path)
    found = _check(tensors, d_sae, d_in, weights)
    b_dec = found[_CENTRED.get(name, "decoder.bias")]
    parts = Parts(
        found["encoder.weight"].T,
        found["encoder.bias"],
        b_dec if name in _CENTRED else torch.zeros(d_in),
        found["decoder.weight"].T,
        b_dec,
    )
    if name == "AutoEncoderTopK":
        return parts._replace(kind="topk", k=_k(tensors, trainer, path, weights))
    if name == "BatchTopKSAE":
        threshold = found.get("threshold", torch.tensor(-1.0)).expand(d_sae)
        return parts._replace(
            kind="batch_topk", k=_k(tensors, trainer, path, weights), threshold=threshold.clamp_min(0)
        )
    return parts


def _autoencoder(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    return _linear(t, c, path, weights, "AutoEncoder")


def _new(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    return _linear(t, c, path, weights, "AutoEncoderNew")


def _topk(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    return _linear(t, c, path, weights, "AutoEncoderTopK")


def _batch_topk(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    return _linear(t, c, path, weights, "BatchTopKSAE")


def _matryoshka(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    d_sae, d_in = _sizes(c, t["W_enc"].shape[-1], t["W_enc"].shape[0], path)
    found = _check(t, d_sae, d_in, weights)
    return Parts(
        found["W_enc"],
        found["b_enc"],
        found["b_dec"],
        found["W_dec"],
        found["b_dec"],
        "matryoshka",
        _k(t, c, path, weights),
        found["threshold"].clamp_min(0).expand(d_sae),
        ends=tuple(accumulate(int(size) for size in t["group_sizes"].flatten())),
    )


def _jumprelu(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    d_sae, d_in = _sizes(c, t["W_enc"].shape[-1], t["W_enc"].shape[0], path)
    found = _check(t, d_sae, d_in, weights)
    return Parts(
        found["W_enc"],
        found["b_enc"],
        torch.zeros(d_in),
        found["W_dec"],
        found["b_dec"],
        "jumprelu",
        threshold=found["threshold"].clamp_min(0),
    )


def _gated(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    d_sae, d_in = _sizes(c, t["encoder.weight"].shape[0], t["encoder.weight"].shape[-1], path)
    found = _check(t, d_sae, d_in, weights)
    return Parts(
        found["encoder.weight"].T,
        found["gate_bias"],
        found["decoder_bias"],
        found["decoder.weight"].T,
        found["decoder_bias"],
        "gated",
        r_mag=found["r_mag"],
        b_mag=found["mag_bias"],
    )


def _crosscoder(t: Mapping[str, Tensor], c: Mapping[str, Any], path: Path, weights: Path) -> Parts:
    n, d, d_sae = t["encoder.weight"].shape
    d_sae, d = _sizes(c, d_sae, d, path)
    shapes = {
        "encoder.weight": (n, d, d_sae),
        "encoder.bias": (d_sae,),
        "decoder.weight": (n, d_sae, d),
        "decoder.bias": (n, d),
    }
    check_shapes(t, shapes, weights)
    return Parts(
        t["encoder.weight"].float().reshape(n * d, d_sae),
        t["encoder.bias"].float(),
        torch.zeros(n * d),
        t["decoder.weight"].float().transpose(0, 1).reshape(d_sae, n * d),
        t["decoder.bias"].float().reshape(n * d),
    )


_PARTS = {
    "AutoEncoder": _autoencoder,
    "AutoEncoderNew": _new,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
    "GatedAutoEncoder": _gated,
    "CrossCoder": _crosscoder,
}


# -- writing ---------------------------------------------------------------------------------------


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a dictionary as the class that it is there.

    All but JumpReluAutoEncoder centre by the decoder bias, so ours folds into the encoder's.

    Raises:
        FormatError: the architecture, or a transcoder, has no place in the format.
    """
    parts = parts_of(dictionary, "dictionary_learning")
    if parts.d_out != parts.d_in or parts.W_skip is not None:
        raise FormatError(
            "a dictionary must have d_in = d_out and no skip connection to be written as dictionary_learning",
            f"{parts.d_in} to {parts.d_out}{', with W_skip' if parts.W_skip is not None else ''}",
            "Keep it in Sememe's own format.",
        )
    if parts.kind not in _FROM_OURS or has_own_outputs(dictionary, parts):
        raise FormatError(
            f"a dictionary must be an autoencoder of {', '.join(sorted(_FROM_OURS))} to be written as "
            "dictionary_learning",
            f"{parts.kind}{' from one place to another' if parts.kind in _FROM_OURS else ''}",
            "Keep it in Sememe's own format.",
        )
    name = _FROM_OURS[parts.kind]
    parts = parts.without_centre() if parts.kind == "jumprelu" else parts.with_centre()
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[name],
        "dict_class": name,
        "activation_dim": parts.d_in,
        "dict_size": parts.d_sae,
    }
    if parts.k is not None:
        trainer["k"] = parts.k
    if parts.ends:
        trainer["group_sizes"] = _group_sizes(parts)
    site = only_site(dictionary)
    if site is not None:
        alias, _, layer = site.hookpoint.rpartition(".")
        numbered = bool(alias) and layer.isdigit()
        trainer["lm_name"] = site.model
        trainer["layer"] = int(layer) if numbered else None
        trainer["submodule_name"] = f"{alias}_layer_{layer}" if numbered else site.hookpoint
    torch.save({key: tensor.contiguous() for key, tensor in _tensors(parts).items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, {"trainer": trainer})


def _group_sizes(parts: Parts) -> list[int]:
    return [end - start for start, end in zip((0, *parts.ends), parts.ends, strict=False)]


def _tensors(parts: Parts) -> dict[str, Tensor]:
    if parts.kind in ("jumprelu", "matryoshka"):
        tensors = {"W_enc": parts.W_enc, "b_enc": parts.b_enc, "W_dec": parts.W_dec, "b_dec": parts.b_dec}
    else:
        tensors = {"encoder.weight": parts.W_enc.T, "decoder.weight": parts.W_dec.T}
    if parts.r_mag is not None and parts.b_mag is not None:
        return tensors | {
            "decoder_bias": parts.b_dec,
            "gate_bias": parts.b_enc,
            "r_mag": parts.r_mag,
            "mag_bias": parts.b_mag,
        }
    if parts.kind in ("relu", "topk", "batch_topk"):
        tensors["encoder.bias"] = parts.b_enc
        tensors["bias" if parts.kind == "relu" else "b_dec"] = parts.b_dec
    if parts.k is not None:
        tensors["k"] = torch.tensor(parts.k, dtype=torch.int)
        one = torch.tensor(-1.0) if parts.threshold is None else parts.threshold[0]
        tensors["threshold"] = one
    elif parts.threshold is not None:
        tensors["threshold"] = parts.threshold
    if parts.ends:
        tensors["group_sizes"] = torch.tensor(_group_sizes(parts))
    return tensors
