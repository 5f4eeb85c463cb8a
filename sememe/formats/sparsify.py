"""sparsify folders: `cfg.json` and `sae.safetensors`, named after the hookpoint.

    encoder.weight (d_sae, d_in)   encoder.bias (d_sae)   W_dec (d_sae, d_in)   b_dec (d_in)
    acts = top_k(relu((x - b_dec) encoder.weight^T + encoder.bias)),  recon = acts W_dec + b_dec
    with `transcode`, nothing is subtracted from x

Knows nothing about the other formats.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

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

__all__ = ["CONFIG", "WEIGHTS", "read", "write"]

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_KNOWN = {
    "activation", "d_in", "expansion_factor", "k", "multi_topk", "normalize_decoder", "num_latents", "signed",
    "skip_connection", "transcode",
}  # fmt: skip
# options under which the map is not the one above, and the value that leaves it as it is
_PLAIN = {"activation": "topk", "signed": False, "skip_connection": False}

_FROM_THEIRS = {
    r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)": "resid_post.{0}",
    r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.mlp": "mlp_out.{0}",
    r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(?:attention|self_attn|attn)": "attn_out.{0}",
}


def read(folder: Path) -> Foreign:
    """Read a sparsify folder.

    Raises:
        FormatError: a file is missing or damaged, or the coder has parts that have no equal here.
    """
    path = folder / CONFIG
    config = read_json(path)
    require_fields(config, _KNOWN, path)
    for name, plain in _PLAIN.items():
        if config.get(name, plain) != plain:
            raise FormatError(
                f"{name} in {path} must be {plain}", config[name], "Such coders are not read yet."
            )
    d_in, k = take(config, "d_in", int, path), take(config, "k", int, path)
    d_sae = config.get("num_latents") or d_in * take(config, "expansion_factor", int, path)
    tensors = read_safetensors(folder / WEIGHTS)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    require_tensors(tensors, shapes, folder / WEIGHTS)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    b_pre = torch.zeros(d_in) if config.get("transcode") else weights["b_dec"]
    parts = Parts(
        weights["encoder.weight"].T, weights["encoder.bias"], b_pre, weights["W_dec"], weights["b_dec"], k
    )
    hookpoint = None if config.get("transcode") else translate(folder.name, _FROM_THEIRS)
    return Foreign(assemble(parts, path), None, hookpoint, config)


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a TopK dictionary as sparsify does; a transcoder too, if it is as wide on both sides.

    Raises:
        FormatError: it is not TopK, or its input and output differ in width.
    """
    parts = parts_of(dictionary, "sparsify")
    d_in, d_sae = parts.W_enc.shape
    if parts.k is None or parts.W_dec.shape[1] != d_in:
        raise FormatError(
            "a dictionary must be topk, with d_in = d_out, to be written as sparsify",
            f"{dictionary.kind} from {d_in} to {parts.W_dec.shape[1]}",
            "Write it as sae_lens or dictionary_learning, or keep it in Sememe's own format.",
        )
    transcode = bool(dictionary.sites and dictionary.sites.inputs != dictionary.sites.outputs)
    tensors = {
        "encoder.weight": parts.W_enc.T.contiguous(),
        "encoder.bias": (parts.bias_without_centre() if transcode else parts.bias_with_centre()).contiguous(),
        "W_dec": parts.W_dec,
        "b_dec": parts.b_dec,
    }
    config = {
        "activation": "topk",
        "expansion_factor": d_sae // d_in,
        "normalize_decoder": True,
        "num_latents": d_sae,
        "k": parts.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": transcode,
        "d_in": d_in,
    }
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
