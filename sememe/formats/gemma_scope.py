"""Gemma Scope folders: `params.npz`, in `layer_20/width_16k/average_l0_71` of a release; Gemma Scope 2's safetensors.

    W_enc (d_in, d_sae)   b_enc (d_sae)   threshold (d_sae)   W_dec (d_sae, d_out)   b_dec (d_out)
    z = x W_enc + b_enc,  acts = z where z > threshold and z > 0,  recon = acts W_dec + b_dec

Gemma Scope 2 has `params.safetensors` with w_enc and w_dec, in `resid_post/layer_22_width_65k_l0_medium`; its
transcoders may have affine_skip_connection (d_in, d_out), and then recon has x affine_skip_connection besides.

Where a dictionary belongs is in the folders' names only. The first release's transcoders read what the norm before
the MLP gives before its weights are applied: a place without a name here. Knows nothing about the other formats.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sememe.errors import FormatError
from sememe.formats.base import Foreign, Parts, assemble
from sememe.formats.files import read_npz, read_safetensors, require_tensors

__all__ = ["WEIGHTS", "WEIGHTS_2", "read"]

WEIGHTS, WEIGHTS_2 = "params.npz", "params.safetensors"

SKIP = "affine_skip_connection"
_SITES = {"res": "resid_post.{}", "mlp": "mlp_out.{}", "att": "attn_z.{}"}
"""Of the first release's repositories, `gemma-scope-2b-pt-res`."""
_SITES_2 = {"resid_post": "resid_post.{}", "mlp_out": "mlp_out.{}", "attn_out": "attn_out.{}"}
"""Of the second's folders."""


class _Place(NamedTuple):
    model: str | None
    reads: str | None
    writes: str | None


def read(folder: Path) -> Foreign:
    """Read a folder of Gemma Scope or Gemma Scope 2.

    Raises:
        FormatError: the file is missing or damaged, or holds other tensors.
    """
    path = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / WEIGHTS_2
    found = read_npz(path) if path.name == WEIGHTS else read_safetensors(path)
    tensors = {re.sub("^w_", "W_", name): tensor for name, tensor in found.items()}
    d_in, d_sae, d_out = _sizes(tensors, path)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "threshold": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
    }
    if SKIP in tensors:
        shapes[SKIP] = (d_in, d_out)
    require_tensors(tensors, shapes, path)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    parts = Parts(
        weights["W_enc"],
        weights["b_enc"],
        torch.zeros(d_in),
        weights["W_dec"],
        weights["b_dec"],
        "jumprelu",
        threshold=weights["threshold"].clamp_min(0),
        W_skip=weights.get(SKIP),
    )
    place = _place(folder)
    return Foreign(assemble(parts, path), place.model, place.reads, {"file": path.name}, place.writes)


def _sizes(tensors: dict[str, Tensor], path: Path) -> tuple[int, int, int]:
    """Widths by the vectors: matrices may lie the wrong way round."""
    for name in ("W_enc", "b_enc", "b_dec"):
        if name not in tensors:
            raise FormatError(
                f"{path} must hold the tensor {name}",
                ", ".join(sorted(tensors)) or "none",
                "Fetch the file again, or name another folder.",
            )
    for name, n_dims in (("W_enc", 2), ("b_enc", 1), ("b_dec", 1)):
        if tensors[name].dim() != n_dims:
            raise FormatError(
                f"{name} in {path} must have {n_dims} dimension{'s' if n_dims > 1 else ''}",
                tuple(tensors[name].shape),
                "Cross-layer transcoders are not read; name another folder.",
            )
    d_sae, d_out = tensors["b_enc"].shape[0], tensors["b_dec"].shape[0]
    rows, columns = tensors["W_enc"].shape
    return (columns if rows == d_sae != columns else rows), d_sae, d_out


def _place(folder: Path) -> _Place:
    """Model and hookpoints, from the names of the folder and those above it."""
    parts = folder.resolve().parts
    layer = _last(r"layer_(\d+)", parts)
    second = _last(r"gemma-scope-2-(\w+)-(pt|it)", parts)
    if second is not None:
        model = f"google/gemma-3-{second[1]}-{second[2]}"
        site = _last("|".join((*_SITES_2, "transcoder")), parts)
        if layer is None or site is None:
            return _Place(model, None, None)
        if site[0] == "transcoder":
            return _Place(model, None, f"mlp_out.{layer[1]}")
        return _Place(model, _SITES_2[site[0]].format(layer[1]), None)
    first = _last(r"gemma-scope-(\w+)-(pt|it)-(\w+)", parts)
    if first is None:
        return _Place(None, None, None)
    model = f"google/gemma-2-{first[1]}{'-it' if first[2] == 'it' else ''}"
    if layer is None:  # of the embeddings
        return _Place(model, None, None)
    if first[3] == "transcoders":
        return _Place(model, None, f"mlp_out.{layer[1]}")
    return _Place(model, _SITES[first[3]].format(layer[1]) if first[3] in _SITES else None, None)


def _last(pattern: str, names: tuple[str, ...]) -> re.Match[str] | None:
    """The match in the innermost folder that has one."""
    matches = (re.search(pattern, name) for name in reversed(names))
    return next((match for match in matches if match is not None), None)
