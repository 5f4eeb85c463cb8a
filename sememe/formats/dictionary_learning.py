"""dictionary_learning folders: `ae.pt` (a pickled state_dict, read without running it) and `config.json`.

    AutoEncoder       bias (d_in)   encoder.weight (d_sae, d_in)   encoder.bias (d_sae)   decoder.weight (d_in, d_sae)
                      acts = relu((x - bias) encoder.weight^T + encoder.bias),  recon = acts decoder.weight^T + bias
    AutoEncoderNew    as above, but nothing is subtracted from x, and decoder.bias (d_in) in place of bias
    AutoEncoderTopK   as AutoEncoder with b_dec in place of bias, the k largest kept; buffers k and threshold

Which of the three it is follows from the names of the tensors. Knows nothing about the other formats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sememe.artifact import write_json
from sememe.dictionaries.base import Dictionary
from sememe.errors import FormatError, nearest
from sememe.formats.base import (
    Foreign,
    Parts,
    assemble,
    parts_of,
    read_json,
    read_pickle,
    require_tensors,
    take,
    translate,
)

__all__ = ["CONFIG", "WEIGHTS", "read", "write"]

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_CLASSES = {
    "AutoEncoder": _LINEAR | {"bias"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias"},
    "AutoEncoderTopK": _LINEAR | {"b_dec", "k"},
}
_OPTIONAL = {"threshold"}

_FROM_THEIRS = {
    r"resid_(pre|post)_layer_?(\d+)": "resid_{0}.{1}",
    r"(mlp|attn)_out_layer_?(\d+)": "{0}_out.{1}",
}


def read(folder: Path) -> Foreign:
    """Read a dictionary_learning folder.

    Raises:
        FormatError: a file is missing or damaged, holds code, or is of a class that has no equal here.
    """
    path, weights_path = folder / CONFIG, folder / WEIGHTS
    config = read_json(path)
    tensors = read_pickle(weights_path)
    name = _class_of(tensors, weights_path)
    trainer: dict[str, Any] = config.get("trainer") or {}
    stated = trainer.get("dict_class", name)
    if stated != name:
        raise FormatError(
            f"dict_class in {path} must be {name}, as the tensors in {WEIGHTS} say",
            repr(stated),
            "Name the folder in which both files belong together.",
        )
    matrix = tensors["encoder.weight"]
    d_sae = int(trainer.get("dict_size", matrix.shape[0]))
    d_in = int(trainer.get("activation_dim", matrix.shape[-1]))
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae),
        "bias": (d_in,), "decoder.bias": (d_in,), "b_dec": (d_in,), "k": (), "threshold": (),
    }  # fmt: skip
    require_tensors(tensors, {key: shapes[key] for key in tensors}, weights_path)
    k = None
    if name == "AutoEncoderTopK":
        k = int(tensors["k"])
        if take(trainer, "k", int, path) != k:
            raise FormatError(f"k in {path} must be {k}, as in {WEIGHTS}", trainer["k"], "Mend the file.")
    b_dec = tensors[next(key for key in ("bias", "decoder.bias", "b_dec") if key in tensors)].float()
    b_pre = torch.zeros(d_in) if name == "AutoEncoderNew" else b_dec
    parts = Parts(
        tensors["encoder.weight"].float().T,
        tensors["encoder.bias"].float(),
        b_pre,
        tensors["decoder.weight"].float().T,
        b_dec,
        k,
    )
    hookpoint = translate(trainer.get("submodule_name") or folder.name, _FROM_THEIRS)
    return Foreign(assemble(parts, path), trainer.get("lm_name"), hookpoint, config)


def _class_of(tensors: dict[str, Tensor], path: Path) -> str:
    for name, keys in _CLASSES.items():
        if keys <= set(tensors) <= keys | _OPTIONAL:
            return name
    best = min(_CLASSES, key=lambda name: len(_CLASSES[name] ^ set(tensors)))
    missing, unknown = (
        sorted(_CLASSES[best] - set(tensors)),
        sorted(set(tensors) - _CLASSES[best] - _OPTIONAL),
    )
    hint = (
        nearest(unknown[0], sorted(_CLASSES[best]))
        if unknown
        else f"Fetch the file again: {missing[0]} is missing."
    )
    raise FormatError(
        f"{path} must hold the tensors of one of {', '.join(_CLASSES)}", ", ".join(sorted(tensors)), hint
    )


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a dictionary as AutoEncoder or AutoEncoderTopK. Both centre by b_dec, so ours folds into the bias.

    Raises:
        FormatError: the architecture, or unequal widths, have no place in the format.
    """
    parts = parts_of(dictionary, "dictionary_learning")
    d_in, d_sae = parts.W_enc.shape
    if parts.W_dec.shape[1] != d_in:
        raise FormatError(
            "a dictionary must have d_in = d_out to be written as dictionary_learning",
            f"{d_in} to {parts.W_dec.shape[1]}",
            "Keep it in Sememe's own format.",
        )
    tensors = {
        "encoder.weight": parts.W_enc.T.contiguous(),
        "encoder.bias": parts.bias_with_centre(),
        "decoder.weight": parts.W_dec.T.contiguous(),
    }
    trainer: dict[str, Any] = {"activation_dim": d_in, "dict_size": d_sae}
    if parts.k is None:
        tensors["bias"] = parts.b_dec
        trainer |= {"trainer_class": "StandardTrainer", "dict_class": "AutoEncoder"}
    else:
        tensors |= {
            "b_dec": parts.b_dec,
            "k": torch.tensor(parts.k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),
        }
        trainer |= {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "k": parts.k}
    site = dictionary.sites.inputs[0] if dictionary.sites and len(dictionary.sites.inputs) == 1 else None
    if site is not None:
        alias, _, layer = site.hookpoint.rpartition(".")
        numbered = bool(alias) and layer.isdigit()
        trainer["lm_name"] = site.model
        trainer["layer"] = int(layer) if numbered else None
        trainer["submodule_name"] = f"{alias}_layer_{layer}" if numbered else site.hookpoint
    torch.save(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, {"trainer": trainer})
