"""Other tools' dictionaries as files, made as their definitions say, and ours to write: what their tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sememe import dictionaries, formats
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.base import Dictionary

D, N, K = 12, 40, 5


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape)))


def keep_top(acts: Tensor, k: int) -> Tensor:
    values, indices = acts.topk(k, dim=1)
    return torch.zeros_like(acts).scatter(1, indices, values)


def sites(inputs: str = "resid_post.3", outputs: str | None = None, d_out: int = D) -> Sites:
    def site(hookpoint: str, width: int) -> Site:
        return Site(model="tiny", model_fingerprint="f" * 64, hookpoint=hookpoint, start=0, stop=width)

    return Sites(inputs=(site(inputs, D),), outputs=(site(outputs or inputs, d_out),))


def ours(
    kind: str,
    *,
    centred: bool = False,
    where: Sites | None = None,
    seed: int = 0,
    d_out: int = D,
    skip: bool = False,
) -> Dictionary:
    """One of our dictionaries with random weights, scales other than 1, and centres that differ or agree."""
    options: dict[str, Any] = {"kind": kind, "d_sae": N}
    if kind in ("topk", "batch_topk", "matryoshka", "group_max", "abs_topk", "multi_topk"):
        options["k"] = K
    if kind == "matryoshka":
        options["prefixes"] = (0.25, 1.0)
    if skip:
        options["skip"] = True
    made = dictionaries.TRAINABLE[kind].rebuild(options, D, d_out, N, where)
    with torch.no_grad():
        for place, name in enumerate(
            ("W_enc", "W_dec", "b_enc", "b_dec", "b_pre", "r_mag", "b_mag", "W_skip")
        ):
            tensor = made.__dict__.get("_parameters", {}).get(name, made.__dict__["_buffers"].get(name))
            if tensor is not None:
                tensor.copy_(rand(*tensor.shape, seed=seed + place, scale=0.3 if name == "r_mag" else 1.0))
        if centred:
            made.b_pre.copy_(made.b_dec)
        if kind == "jumprelu":
            made.relative_threshold.copy_(rand(N, seed=seed + 9).abs())
        if kind in ("batch_topk", "matryoshka"):
            made.threshold.fill_(0.8)
        made.scale_in.fill_(1.0 if centred else 1.7)
        made.scale_out.fill_(1.0 if centred else 1.7)
    return made.eval()


def assert_same(a: Dictionary, b: Dictionary, *, acts: bool = True) -> None:
    x = rand(64, D, seed=77, scale=2.0)
    left, right = a.fold(), b.fold()
    if acts:
        torch.testing.assert_close(
            left.encode(x).to_dense(),
            right.encode(x).to_dense(),
            rtol=1e-5,
            atol=1e-6 * float(x.abs().max()) * D,
        )
    torch.testing.assert_close(left(x), right(x), rtol=1e-5, atol=2e-5)


def assert_means(foreign: formats.Foreign, x: Tensor, acts: Tensor, recon: Tensor) -> None:
    """A dictionary that was read gives what its format's own definition gives."""
    torch.testing.assert_close(foreign.dictionary.encode(x).to_dense(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(foreign.dictionary(x), recon, rtol=1e-5, atol=1e-4)
    assert bool((acts != 0).any()) and bool((acts == 0).any()), "the case must tell active from silent"


def write_sae_lens(
    folder: Path, config: dict[str, object], drop: str | None = None, **tensors: Tensor
) -> None:
    folder.mkdir(exist_ok=True)
    base = {"d_in": D, "d_sae": N, "architecture": "standard", "dtype": "float32", "device": "cpu"}
    (folder / "cfg.json").write_text(json.dumps(base | config))
    weights = {"W_enc": rand(D, N), "b_enc": rand(N), "W_dec": rand(N, D), "b_dec": rand(D)} | tensors
    weights.pop(drop or "", None)
    save_file(weights, folder / "sae_weights.safetensors")


def write_sparsify(folder: Path, **config: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        "activation": "topk",
        "expansion_factor": 32,
        "num_latents": N,
        "k": K,
        "d_in": D,
        "multi_topk": False,
    }
    (folder / "cfg.json").write_text(json.dumps(base | config))
    weights = {
        "encoder.weight": rand(N, D),
        "encoder.bias": rand(N),
        "W_dec": rand(N, D, seed=3),
        "b_dec": rand(D),
    }
    if config.get("skip_connection"):
        weights["W_skip"] = rand(D, D, seed=4)
    save_file(weights, folder / "sae.safetensors")


def write_dictionary_learning(folder: Path, name: str, config: dict[str, object] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    counted = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
    linear = {"encoder.weight": rand(N, D), "encoder.bias": rand(N), "decoder.weight": rand(D, N)}
    plain = {"W_enc": rand(D, N), "b_enc": rand(N), "W_dec": rand(N, D), "b_dec": rand(D)}
    tensors: dict[str, dict[str, Tensor]] = {
        "AutoEncoder": linear | {"bias": rand(D)},
        "AutoEncoderNew": linear | {"decoder.bias": rand(D)},
        "AutoEncoderTopK": linear | {"b_dec": rand(D)} | counted,
        "BatchTopKSAE": linear | {"b_dec": rand(D)} | counted,
        "MatryoshkaBatchTopKSAE": plain | counted | {"group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": plain | {"threshold": rand(N, seed=4)},
        "GatedAutoEncoder": {
            "encoder.weight": rand(N, D),
            "decoder.weight": rand(D, N),
            "decoder_bias": rand(D),
            "gate_bias": rand(N, seed=6),
            "r_mag": rand(N, seed=7, scale=0.3),
            "mag_bias": rand(N, seed=8),
        },
    }
    trainer: dict[str, object] = {"dict_class": name, "activation_dim": D, "dict_size": N}
    if "k" in tensors[name]:
        trainer["k"] = K
    torch.save(tensors[name], folder / "ae.pt")
    trainer |= {"lm_name": "tiny", "submodule_name": "resid_post_layer_4"}
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer | (config or {}), "buffer": {"ctx_len": 128}})
    )
