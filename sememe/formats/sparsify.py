"""sparsify folders: `cfg.json` and `sae.safetensors`, named after the hookpoint.

    encoder.weight (d_sae, d_in)   encoder.bias (d_sae)   W_dec (d_sae, d_in)   b_dec (d_in)   W_skip (d_in, d_in)
    acts = f((x - b_dec) encoder.weight^T + encoder.bias),  recon = acts W_dec + b_dec (+ x W_skip^T)

    activation topk       f = ReLU of the k largest; with `signed` (old versions) the k furthest from 0
    activation groupmax   f = ReLU of the largest of each of k runs of d_sae / k latents
    with `transcode`, nothing is subtracted from x

Knows nothing about the other formats.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sememe.artifact import write_json
from sememe.dictionaries.base import Dictionary
from sememe.errors import FormatError, nearest
from sememe.formats.base import Foreign, Parts, assemble, has_own_outputs, parts_of, require_kinds
from sememe.formats.files import (
    read_json,
    read_safetensors,
    require_fields,
    require_plain,
    require_tensors,
    take,
    take_if_there,
)
from sememe.formats.names import from_module

__all__ = ["CONFIG", "WEIGHTS", "read", "write"]

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_KNOWN = {
    "activation", "d_in", "embed_skip", "expansion_factor", "gram_lookup", "gram_table_hash", "k",
    "lookup_max_order", "multi_topk", "normalize_decoder", "num_latents", "signed", "skip_connection", "transcode",
}  # fmt: skip
_PLAIN = {"embed_skip": False, "gram_lookup": False}
_WHY_NOT = {
    "embed_skip": "It adds a map of the embeddings, which a dictionary of one place does not see.",
    "gram_lookup": "It subtracts a mean per n-gram of tokens, which a dictionary of activations does not see.",
}
_KINDS = {"topk": "topk", "groupmax": "group_max"}


def read(folder: Path) -> Foreign:
    """Read a sparsify folder.

    Raises:
        FormatError: a file is missing or damaged, or the coder has parts that have no equal here.
    """
    path = folder / CONFIG
    config = read_json(path)
    require_fields(config, _KNOWN, path)
    require_plain(config, _PLAIN, path, _WHY_NOT)
    activation = take({"activation": "topk", **config}, "activation", str, path)
    if activation not in _KINDS:
        raise FormatError(
            f"activation in {path} must be topk or groupmax",
            repr(activation),
            nearest(activation, _KINDS),
        )
    kind = _KINDS[activation]
    if take_if_there(config, "signed", bool, path):
        require_plain(config, {"activation": "topk", "transcode": False}, path)
        kind = "abs_topk"
    d_in, k = take(config, "d_in", int, path), take(config, "k", int, path)
    d_sae = take_if_there(config, "num_latents", int, path) or d_in * take(
        config, "expansion_factor", int, path
    )
    tensors = read_safetensors(folder / WEIGHTS)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if take_if_there(config, "skip_connection", bool, path):
        shapes["W_skip"] = (d_in, d_in)
    require_tensors(tensors, shapes, folder / WEIGHTS)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    transcodes = bool(take_if_there(config, "transcode", bool, path))
    parts = Parts(
        weights["encoder.weight"].T,
        weights["encoder.bias"],
        torch.zeros(d_in) if transcodes else weights["b_dec"],
        weights["W_dec"],
        weights["b_dec"],
        kind,
        k,
        W_skip=weights["W_skip"].T if "W_skip" in weights else None,
    )
    return Foreign(
        assemble(parts, path),
        None,
        from_module(folder.name, reads=transcodes),
        config,
        from_module(folder.name) if transcodes else None,
    )


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a TopK or GroupMax dictionary as sparsify does; a transcoder too, if it is as wide on both sides.

    Raises:
        FormatError: it is of another kind, or its input and output differ in width.
    """
    parts = parts_of(dictionary, "sparsify")
    otherwise = "Write it as sae_lens or dictionary_learning, or keep it in Sememe's own format."
    require_kinds(parts, ("topk", "group_max"), "sparsify", otherwise)
    if parts.d_out != parts.d_in:
        raise FormatError(
            "a dictionary must have d_in = d_out to be written as sparsify",
            f"{dictionary.kind} from {parts.d_in} to {parts.d_out}",
            "Keep it in Sememe's own format.",
        )
    transcodes = has_own_outputs(dictionary, parts)
    parts = parts.without_centre() if transcodes else parts.with_centre()
    tensors = {
        "encoder.weight": parts.W_enc.T,
        "encoder.bias": parts.b_enc,
        "W_dec": parts.W_dec,
        "b_dec": parts.b_dec,
    }
    if parts.W_skip is not None:
        tensors["W_skip"] = parts.W_skip.T
    config = {
        "activation": "groupmax" if parts.kind == "group_max" else "topk",
        "expansion_factor": parts.d_sae // parts.d_in,
        "normalize_decoder": True,
        "num_latents": parts.d_sae,
        "k": parts.k,
        "multi_topk": False,
        "skip_connection": parts.W_skip is not None,
        "transcode": transcodes,
        "d_in": parts.d_in,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
