"""Files of openai/sparse_autoencoder, `autoencoders/8.pt`: a pickled state_dict with the activation's name in it.

    pre_bias (d)   encoder.weight (d_sae, d)   latent_bias (d_sae)   decoder.weight (d, d_sae)
    acts = f((x - pre_bias) encoder.weight^T + latent_bias),  recon = acts decoder.weight^T + pre_bias

    activation ReLU   f = ReLU, x as it is
    activation TopK   f = the k largest, ReLU of them (activation_state_dict: k, postact_fn); x is normalised row by
                      row, less its mean and over its standard deviation, and recon is scaled back: see `row_norm`

Three more tensors are statistics of training. Knows nothing about the other formats.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sememe.errors import FormatError
from sememe.formats.base import Foreign, Parts, assemble, normed
from sememe.formats.files import read_pickle, require_tensors, take, take_if_there
from sememe.formats.names import folder_name

__all__ = ["SUFFIX", "is_it", "read"]

SUFFIX = ".pt"

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_OTHERS = ("activation", "activation_state_dict")
_SITES = {
    "mlp_post_act": "mlp_act.{}",
    "resid_delta_attn": "attn_out.{}",
    "resid_delta_mlp": "mlp_out.{}",
    "resid_post_mlp": "resid_post.{}",
}
"""By the folder's name, `resid_post_mlp_v5_32k`. Theirs after attention, resid_post_attn, has no name here."""
_MODELS = {"gpt2-small": "gpt2"}


def is_it(path: Path) -> bool:
    """Whether a file is one of theirs, by the names of its tensors."""
    tensors, _ = read_pickle(path, _OTHERS)
    return {"pre_bias", "latent_bias"} <= set(tensors)


def read(path: Path) -> Foreign:
    """Read a file of theirs.

    Raises:
        FormatError: it is missing or damaged, holds code, or is of an activation that has no equal here.
    """
    tensors, others = read_pickle(path, _OTHERS)
    tied = "decoder.linear.weight" in tensors  # their name for the encoder once more
    if tied:
        tensors["decoder.weight"] = tensors.pop("decoder.linear.weight").T
    activation = others.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise FormatError(
            f"activation in {path} must be ReLU or TopK", repr(activation), "Such autoencoders are not read."
        )
    parts = _parts(tensors, path)
    config: dict[str, Any] = {"activation": activation, "tied": tied}
    if activation == "ReLU":
        dictionary = assemble(parts, path)
    else:
        state: dict[str, Any] = take_if_there(others, "activation_state_dict", dict, path) or {}
        after = state.get("postact_fn", "ReLU")
        if after != "ReLU":
            raise FormatError(
                f"postact_fn in {path} must be ReLU", repr(after), "Such autoencoders are not read."
            )
        k = state["k"] if isinstance(state.get("k"), Tensor) else take(state, "k", int, path)
        config["k"] = int(k)
        dictionary = normed(parts._replace(kind="topk", k=int(k)), "layer", path)
    model, hookpoint = _place(path)
    return Foreign(dictionary, model, hookpoint, config)


def _parts(tensors: dict[str, Tensor], path: Path) -> Parts:
    if not {"pre_bias", "latent_bias"} <= set(tensors):
        raise FormatError(
            f"{path} must hold the tensors of openai/sparse_autoencoder (pre_bias, latent_bias, encoder.weight, "
            "decoder.weight)",
            ", ".join(sorted(tensors)) or "none",
            "Name a file of theirs; of other tools, name the folder.",
        )
    d_in, d_sae = tensors["pre_bias"].numel(), tensors["latent_bias"].numel()
    shapes: dict[str, tuple[int, ...]] = {
        "pre_bias": (d_in,),
        "latent_bias": (d_sae,),
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
    }
    shapes |= {name: (d_sae,) for name in _STATISTICS if name in tensors}
    require_tensors(tensors, shapes, path)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    return Parts(
        weights["encoder.weight"].T,
        weights["latent_bias"],
        weights["pre_bias"],
        weights["decoder.weight"].T,
        weights["pre_bias"],
    )


def _place(path: Path) -> tuple[str | None, str | None]:
    """Model and hookpoint, from `gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt`."""
    # Not resolved: the hub client's cache has links to files of other names.
    names = [name for parent in path.absolute().parents if (name := folder_name(parent)) is not None]
    model = next((_MODELS[name] for name in names if name in _MODELS), None)
    for name in names:
        match = re.fullmatch(r"(\w+?)(?:_v\d+(?:_\w+)?)?", name)
        if match and match[1] in _SITES and path.stem.isdigit():
            return model, _SITES[match[1]].format(path.stem)
    return model, None
