"""Each format against its own definition, written out here in plain products; and every way a file can lie."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sememe import dictionaries, formats
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.base import Dictionary
from sememe.dictionaries.row_norm import RowNorm
from sememe.errors import FormatError

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


# -- reading what the others define ------------------------------------------------------------------


def write_sae_lens(
    folder: Path, config: dict[str, object], drop: str | None = None, **tensors: Tensor
) -> None:
    folder.mkdir(exist_ok=True)
    base = {"d_in": D, "d_sae": N, "architecture": "standard", "dtype": "float32", "device": "cpu"}
    (folder / "cfg.json").write_text(json.dumps(base | config))
    weights = {"W_enc": rand(D, N), "b_enc": rand(N), "W_dec": rand(N, D), "b_dec": rand(D)} | tensors
    weights.pop(drop or "", None)
    save_file(weights, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("config", "k"),
    [
        ({"metadata": {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_post"}}, None),
        ({"architecture": "topk", "k": K}, K),
        (
            {
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": K},
                "hook_name": "blocks.1.mlp.hook_post",
            },
            K,
        ),
    ],
    ids=["standard", "topk", "topk-before-6"],
)
def test_sae_lens_means_what_it_says(
    tmp_path: Path, config: dict[str, object], k: int | None, centred: bool
) -> None:
    write_sae_lens(tmp_path, config | {"apply_b_dec_to_input": centred})
    assert formats.detect(tmp_path) == "sae_lens"
    foreign = formats.read(tmp_path)
    x = rand(30, D, seed=5)
    acts = torch.relu((x - rand(D) if centred else x) @ rand(D, N) + rand(N))
    acts = acts if k is None else keep_top(acts, k)
    assert_means(foreign, x, acts, acts @ rand(N, D) + rand(D))
    expected = {"metadata": "resid_post.3", "hook_name": "mlp_act.1"}
    assert foreign.hookpoint == next((expected[key] for key in expected if key in config), None)
    assert foreign.model == ("tiny" if "metadata" in config else None)


def test_sae_lens_jumps_and_gates(tmp_path: Path) -> None:
    x = rand(30, D, seed=5)
    z = (x - rand(D)) @ rand(D, N) + rand(N)
    threshold = rand(N, seed=4)  # a negative one counts as 0, as in the package
    write_sae_lens(tmp_path / "jump", {"architecture": "jumprelu"}, threshold=threshold)
    acts = torch.relu(z) * (z > threshold.relu())
    assert_means(formats.read(tmp_path / "jump"), x, acts, acts @ rand(N, D) + rand(D))

    parts = {"b_gate": rand(N, seed=6), "r_mag": rand(N, seed=7, scale=0.3), "b_mag": rand(N, seed=8)}
    write_sae_lens(tmp_path / "gate", {"architecture": "gated"}, drop="b_enc", **parts)
    z = (x - rand(D)) @ rand(D, N)
    acts = (z + parts["b_gate"] > 0) * torch.relu(z * parts["r_mag"].exp() + parts["b_mag"])
    assert_means(formats.read(tmp_path / "gate"), x, acts, acts @ rand(N, D) + rand(D))


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("jumps", [False, True])
def test_sae_lens_transcoders(tmp_path: Path, jumps: bool, skips: bool) -> None:
    d_out, x = 9, rand(30, D, seed=5)
    threshold, W_skip, b_dec = rand(N, seed=4).abs(), rand(d_out, D, seed=9), rand(d_out)
    more = ({"threshold": threshold} if jumps else {}) | ({"W_skip": W_skip} if skips else {})
    names = {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
    architecture = f"{'jumprelu_' if jumps else ''}{'skip_' if skips else ''}transcoder"
    write_sae_lens(
        tmp_path,
        {"architecture": architecture, "d_out": d_out, "apply_b_dec_to_input": False, "metadata": names},
        W_dec=rand(N, d_out),
        b_dec=b_dec,
        **more,
    )
    foreign = formats.read(tmp_path)
    z = x @ rand(D, N) + rand(N)
    acts = torch.relu(z) * (z > threshold if jumps else 1)
    assert_means(foreign, x, acts, acts @ rand(N, d_out) + b_dec + (x @ W_skip.T if skips else 0))
    assert (foreign.hookpoint, foreign.hookpoint_out) == ("mlp_in.2", "mlp_out.2")


def test_sae_lens_run_time_scales_are_folded(tmp_path: Path) -> None:
    x, norms = rand(30, D, seed=5), rand(N, D).norm(dim=1)
    write_sae_lens(
        tmp_path / "a",
        {
            "architecture": "topk",
            "k": K,
            "rescale_acts_by_decoder_norm": True,
            "normalize_activations": "none",
        },
    )
    acts = keep_top(torch.relu(((x - rand(D)) @ rand(D, N) + rand(N)) * norms), K)
    assert_means(formats.read(tmp_path / "a"), x, acts, (acts / norms) @ rand(N, D) + rand(D))

    scaling = rand(N, seed=8).abs()
    write_sae_lens(tmp_path / "b", {"finetuning_scaling_factor": True}, scaling_factor=scaling)
    acts = torch.relu((x - rand(D)) @ rand(D, N) + rand(N))
    assert_means(formats.read(tmp_path / "b"), x, acts, (acts * scaling) @ rand(N, D) + rand(D))
    write_sae_lens(tmp_path / "c", {}, scaling_factor=scaling)  # present, but not in use
    assert_means(formats.read(tmp_path / "c"), x, acts, acts @ rand(N, D) + rand(D))


def test_sae_lens_checkpoints_scale_their_inputs(tmp_path: Path) -> None:
    x, s = rand(30, D, seed=5), 0.4
    acts = torch.relu((x * s - rand(D)) @ rand(D, N) + rand(N))
    recon = (acts @ rand(N, D) + rand(D)) / s
    write_sae_lens(tmp_path / "six", {"normalize_activations": "expected_average_only_in"})
    (tmp_path / "six" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
    assert_means(formats.read(tmp_path / "six"), x, acts, recon)
    write_sae_lens(tmp_path / "five", {"normalize_activations": "expected_average_only_in"})
    state = {"estimated_norm_scaling_factor": torch.tensor(s)}
    save_file(state, tmp_path / "five" / "activations_store_state.safetensors")
    assert_means(formats.read(tmp_path / "five"), x, acts, recon)
    write_sae_lens(tmp_path / "none", {"normalize_activations": "expected_average_only_in"})
    with pytest.raises(
        FormatError, match=r"must say by which factor .* got neither activation_scaler.json .*Write \{"
    ):
        formats.read(tmp_path / "none")


def test_sae_lens_training_runs_are_read_by_their_threshold(tmp_path: Path) -> None:
    x, norms = rand(30, D, seed=5), rand(N, D).norm(dim=1)
    for name, more in (("batchtopk", {}), ("matryoshka_batchtopk", {"matryoshka_widths": [10, N]})):
        config = {"architecture": name, "k": 4.6, "rescale_acts_by_decoder_norm": True, **more}
        write_sae_lens(tmp_path / name, config, topk_threshold=torch.tensor(2.0, dtype=torch.float64))
        foreign = formats.read(tmp_path / name)
        acts = torch.relu(((x - rand(D)) @ rand(D, N) + rand(N)) * norms)
        acts = acts * (acts > 2.0)
        assert_means(foreign, x, acts, (acts / norms) @ rand(N, D) + rand(D))
        assert foreign.dictionary.config.k == 5
    assert foreign.dictionary.ends == (10, N)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_norms_per_row_stay_an_operation(tmp_path: Path, norm: str) -> None:
    write_sae_lens(tmp_path / "theirs", {"normalize_activations": norm, "architecture": "topk", "k": K})
    foreign = formats.read(tmp_path / "theirs")
    x = 3.0 + rand(30, D, seed=5, scale=2.0)
    if norm == "layer_norm":
        mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        rows = (x - mean) / (spread + 1e-5)
    else:
        mean, spread = torch.zeros(30, 1), x.norm(dim=1, keepdim=True) / D**0.5
        rows = x / spread
    acts = keep_top(torch.relu((rows - rand(D)) @ rand(D, N) + rand(N)), K)
    recon = (acts @ rand(N, D) + rand(D)) * spread + mean
    assert_means(foreign, x, acts * spread, recon)  # in units of the rows as they are

    assert isinstance(foreign.dictionary, RowNorm)
    saved = foreign.dictionary.save(tmp_path / "ours", x)
    loaded = dictionaries.load(saved.path)
    torch.testing.assert_close(loaded(x), recon, rtol=1e-5, atol=1e-4)
    one = loaded.encode(x).to_dense()
    at = one.nonzero()[0]  # a latent adds its activation times its direction
    less = one.clone()
    less[at[0], at[1]] = 0
    without = loaded.decode(dictionaries.base.Encoded.from_dense(less), x)
    moved = one[at[0], at[1]] * loaded.decoder_directions()[at[1]]
    torch.testing.assert_close((loaded(x) - without)[at[0]], moved, rtol=1e-4, atol=1e-4)
    with pytest.raises(FormatError, match=r"must be one of .* to be written as sae_lens, got row_norm"):
        formats.write(loaded, tmp_path, "sae_lens")


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


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("how", ["topk", "groupmax", "signed"])
def test_sparsify_means_what_it_says(tmp_path: Path, how: str, skip: bool, transcode: bool) -> None:
    folder = tmp_path / "layers.8.mlp"
    config = {"signed": True} if how == "signed" else {"activation": how}
    write_sparsify(folder, transcode=transcode, skip_connection=skip, **config)
    assert formats.detect(folder) == "sparsify"
    if how == "signed" and transcode:
        with pytest.raises(FormatError, match=r"transcode in .* must be False, got True"):
            formats.read(folder)
        return
    foreign = formats.read(folder)
    x = rand(30, D, seed=5)
    z = (x if transcode else x - rand(D)) @ rand(N, D).T + rand(N)
    if how == "topk":
        acts = keep_top(torch.relu(z), K)
    elif how == "signed":
        acts = z * (keep_top(z.abs(), K) > 0)
    else:
        groups = torch.relu(z).unflatten(1, (K, -1))
        acts = (groups * (groups == groups.max(dim=2, keepdim=True).values)).flatten(1)
    recon = acts @ rand(N, D, seed=3) + rand(D) + (x @ rand(D, D, seed=4).T if skip else 0)
    assert_means(foreign, x, acts, recon)
    expected = ("mlp_in.8", "mlp_out.8") if transcode else ("mlp_out.8", None)
    assert (foreign.hookpoint, foreign.hookpoint_out) == expected


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


CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
)


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning_means_what_it_says(tmp_path: Path, name: str) -> None:
    write_dictionary_learning(tmp_path, name)
    assert formats.detect(tmp_path) == "dictionary_learning"
    foreign = formats.read(tmp_path)
    x = rand(30, D, seed=5)
    plain = name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
    W_enc, W_dec = (rand(D, N), rand(N, D)) if plain else (rand(N, D).T, rand(D, N).T)
    z = (x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - rand(D)) @ W_enc
    if name == "GatedAutoEncoder":
        magnitudes = torch.relu(z * rand(N, seed=7, scale=0.3).exp() + rand(N, seed=8))
        acts = (z + rand(N, seed=6) > 0) * magnitudes
    else:
        acts = torch.relu(z + rand(N))
    if name == "AutoEncoderTopK":
        acts = keep_top(acts, K)
    elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        acts = acts * (acts > 0.7)
    elif name == "JumpReluAutoEncoder":
        acts = acts * (acts > rand(N, seed=4))
    assert_means(foreign, x, acts, acts @ W_dec + rand(D))
    assert (foreign.model, foreign.hookpoint) == ("tiny", "resid_post.4")


def test_dictionary_learning_crosscoders_and_the_identity(tmp_path: Path) -> None:
    n, d = 3, 4
    enc, dec, b_enc, b_dec = rand(n, d, N), rand(n, N, d, seed=1), rand(N), rand(n, d)
    tensors = {"encoder.weight": enc, "encoder.bias": b_enc, "decoder.weight": dec, "decoder.bias": b_dec}
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "ae.pt")
    trainer = {"dict_class": "CrossCoder", "activation_dim": d, "dict_size": N}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    x = rand(30, n, d, seed=5)
    acts = torch.relu(torch.einsum("bld,ldD->bD", x, enc) + b_enc)
    recon = torch.einsum("bD,lDd->bld", acts, dec) + b_dec
    assert_means(formats.read(tmp_path), x.flatten(1), acts, recon.flatten(1))

    torch.save({}, tmp_path / "ae.pt")
    trainer = {"dict_class": "IdentityDict", "activation_dim": D}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    found = formats.read(tmp_path).dictionary
    assert found.kind == "identity" and torch.equal(found(rand(5, D)), rand(5, D))


def test_an_old_release_without_a_trainer_is_read_by_its_tensors(tmp_path: Path) -> None:
    run = tmp_path / "pythia-70m" / "mlp_out_layer0" / "10_40"
    write_dictionary_learning(run, "AutoEncoder")
    (run / "config.json").write_text("{}")
    foreign = formats.read(run)
    assert foreign.dictionary.kind == "relu"
    assert (foreign.model, foreign.hookpoint) == ("pythia-70m", "mlp_out.0")
    # what the run kept on the way goes with its config
    (run / "checkpoints").mkdir()
    (run / "ae.pt").rename(run / "checkpoints" / "ae_100.pt")
    assert formats.read(run / "checkpoints" / "ae_100.pt").hookpoint == "mlp_out.0"
    # two classes share their tensors: the config has to tell
    write_dictionary_learning(run, "BatchTopKSAE")
    (run / "config.json").write_text(json.dumps({"trainer": {"k": K}}))
    with pytest.raises(
        FormatError, match=r"must hold dict_class .* got AutoEncoderTopK or BatchTopKSAE. Write"
    ):
        formats.read(run)


# -- there and back ----------------------------------------------------------------------------------


class Case(NamedTuple):
    """What one of our kinds becomes elsewhere; None where the format has no place for it."""

    kind: str
    sae_lens: str | None
    dictionary_learning: str | None
    sparsify: str | None


CASES = [
    Case("relu", "standard", "AutoEncoder", None),
    Case("tied", "standard", "AutoEncoder", None),
    Case("p_anneal", "standard", "AutoEncoder", None),
    Case("topk", "topk", "AutoEncoderTopK", "topk"),
    Case("multi_topk", "topk", "AutoEncoderTopK", "topk"),
    Case("batch_topk", "jumprelu", "BatchTopKSAE", None),
    Case("matryoshka", "jumprelu", "MatryoshkaBatchTopKSAE", None),
    Case("jumprelu", "jumprelu", "JumpReluAutoEncoder", None),
    Case("gated", "gated", "GatedAutoEncoder", None),
    Case("group_max", None, None, "groupmax"),
    Case("abs_topk", None, None, None),
]


def named(folder: Path, name: str) -> str:
    """What the files that were written call the architecture."""
    if name == "dictionary_learning":
        return str(json.loads((folder / "config.json").read_text())["trainer"]["dict_class"])
    config = json.loads((folder / "cfg.json").read_text())
    return str(config["architecture" if name == "sae_lens" else "activation"])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_a_round_trip_gives_the_same_map(tmp_path: Path, name: str, case: Case, centred: bool) -> None:
    dictionary = ours(case.kind, centred=centred, where=sites())
    folder = tmp_path / "layers.3"
    folder.mkdir()
    expected = getattr(case, name)
    if expected is None:
        kind = {"tied": "relu", "p_anneal": "relu"}.get(case.kind, case.kind)
        with pytest.raises(FormatError, match=rf"written as {name}, got {kind}\. (Write|Keep) it"):
            formats.write(dictionary, folder, name)
        assert list(folder.iterdir()) == []
        return
    formats.write(dictionary, folder, name)
    assert formats.detect(folder) == name and named(folder, name) == expected
    foreign = formats.read(folder)
    assert_same(dictionary, foreign.dictionary)
    assert foreign.hookpoint == "resid_post.3" and foreign.hookpoint_out is None
    assert foreign.model == (None if name == "sparsify" else "tiny")
    if name == "sae_lens":  # without a version it would be read as a file of before version 6
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata["sae_lens_version"].startswith("6.")
        assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    if centred and expected != "JumpReluAutoEncoder":  # nothing to fold: not one bit may change
        x = rand(20, D, seed=6)
        assert torch.equal(foreign.dictionary(x), dictionary(x))


def test_transcoders_go_where_there_is_a_place_for_them(tmp_path: Path) -> None:
    where = sites("mlp_in.3", "mlp_out.3")
    for kind, skip in (("topk", False), ("topk", True), ("group_max", True)):
        formats.write(ours(kind, where=where, skip=skip), tmp_path, "sparsify")
        assert json.loads((tmp_path / "cfg.json").read_text())["transcode"] is True
        assert_same(ours(kind, where=where, skip=skip), formats.read(tmp_path).dictionary)
    narrow = sites("mlp_in.3", "mlp_out.3", 9)
    for number, (kind, d_out, skip) in enumerate(
        (("relu", 9, False), ("relu", D, True), ("jumprelu", 9, True), ("batch_topk", 9, False))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        dictionary = ours(kind, where=narrow if d_out == 9 else where, d_out=d_out, skip=skip)
        formats.write(dictionary, folder, "sae_lens")
        foreign = formats.read(folder)
        assert_same(dictionary, foreign.dictionary)
        assert (foreign.hookpoint, foreign.hookpoint_out) == ("mlp_in.3", "mlp_out.3")
        for name in ("sparsify", "dictionary_learning"):
            with pytest.raises(FormatError, match=rf"to be written as {name}, got .*\. (Keep|Write) it"):
                formats.write(dictionary, tmp_path, name)
    with pytest.raises(
        FormatError, match=r"to be written as a transcoder of sae_lens, got topk. Write it as sp"
    ):
        formats.write(ours("topk", where=where), tmp_path, "sae_lens")
    with pytest.raises(FormatError, match="to be written as sparsify, got topk from 12 to 9"):
        formats.write(ours("topk", where=narrow, d_out=9), tmp_path, "sparsify")
    with pytest.raises(FormatError, match=r"from one place to another. Keep it"):
        formats.write(ours("topk", where=where), tmp_path, "dictionary_learning")


def test_half_precision_weights_are_read(tmp_path: Path) -> None:
    write_sparsify(tmp_path)
    weights = load_file(tmp_path / "sae.safetensors")
    save_file({key: value.bfloat16() for key, value in weights.items()}, tmp_path / "sae.safetensors")
    dictionary = formats.read(tmp_path).dictionary
    assert torch.equal(dictionary.decoder_directions(), weights["W_dec"].bfloat16().float())


# -- files that lie ----------------------------------------------------------------------------------


class Payload:
    """Would create a file if its pickle were executed."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.target,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path, "AutoEncoder")
    target = tmp_path / "touched"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"bias": Payload(target)}, tmp_path / "ae.pt")
        with pytest.raises(
            FormatError, match=r"must hold tensors and no code, got a pickle that .*Ask its author"
        ):
            formats.read(tmp_path)
        assert not target.exists()


def truncate(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:n])


@pytest.mark.parametrize("length", [0, 3, 100, 1500])
def test_truncated_files_are_refused(tmp_path: Path, length: int) -> None:
    write_sparsify(tmp_path / "a")
    truncate(tmp_path / "a" / "sae.safetensors", length)
    write_dictionary_learning(tmp_path / "b", "AutoEncoder")
    truncate(tmp_path / "b" / "ae.pt", length)
    write_sae_lens(tmp_path / "c", {})
    truncate(tmp_path / "c" / "cfg.json", min(length, 20))
    for name, rule in (
        ("a", "whole safetensors file"),
        ("b", "whole PyTorch file|tensors and no code"),
        ("c", "JSON"),
    ):
        with pytest.raises(FormatError, match=f"must (be|hold) (a )?({rule})"):
            formats.read(tmp_path / name)


def edit_json(path: Path, drop: str | None = None, **changes: object) -> None:
    value = json.loads(path.read_text())
    value.pop(drop, None)
    path.write_text(json.dumps(value | changes))


SAE_LENS_CASES: dict[str, tuple[dict[str, object], str | None, str]] = {
    "unknown field": (
        {"normalise_activations": "none"},
        None,
        "known fields only, got 'normalise_activations'. Did you mean 'normalize",
    ),
    "missing width": ({}, "d_in", "must hold d_in, got no such field. Fetch the file again"),
    "a width that is no number": (
        {"d_sae": "many"},
        None,
        "d_sae in .*cfg.json must be of type int, got 'many'",
    ),
    "topk without k": ({"architecture": "topk"}, None, "must hold k, got no such field"),
    "k too large": ({"architecture": "topk", "k": 99}, None, r"k in .* must be in \[1, d_sae=40\], got 99"),
    "another architecture": (
        {"architecture": "temporal"},
        None,
        "must be one of standard, .*, got 'temporal'. It reads whole sequences",
    ),
    "an architecture that is almost one": (
        {"architecture": "jump_relu"},
        None,
        "must be one of .*, got 'jump_relu'. Did you mean 'jumprelu'",
    ),
    "another activation": ({"activation_fn_str": "tanh-relu"}, None, "got standard with 'tanh-relu'"),
    "another norm": (
        {"normalize_activations": "whiten"},
        None,
        "must be none, .* got 'whiten'. Fold it",
    ),
    "a transcoder whose outputs have no norm": (
        {"architecture": "transcoder", "normalize_activations": "layer_norm"},
        None,
        "of a transcoder in .* must be none, got 'layer_norm'. SAELens normalises",
    ),
    "lost thresholds": ({"architecture": "jumprelu"}, None, "must hold the tensor threshold, got W_dec"),
    "a run that lost its threshold": (
        {"architecture": "matryoshka_batchtopk", "k": 3, "matryoshka_widths": [9, 9]},
        None,
        "must hold the tensor topk_threshold",
    ),
    "lost scaling": ({"finetuning_scaling_factor": True}, None, "must hold scaling_factor, got W_dec"),
    "another width": (
        {"d_sae": 41},
        None,
        r"W_enc in .* must have shape \(12, 41\), got \(12, 40\). Correct the config",
    ),
}


@pytest.mark.parametrize(("changes", "drop", "message"), SAE_LENS_CASES.values(), ids=SAE_LENS_CASES)
def test_a_sae_lens_config_that_lies(
    tmp_path: Path, changes: dict[str, object], drop: str | None, message: str
) -> None:
    write_sae_lens(tmp_path, {})
    edit_json(tmp_path / "cfg.json", drop, **changes)
    with pytest.raises(FormatError, match=message):
        formats.read(tmp_path)


def test_tensors_that_lie(tmp_path: Path) -> None:
    bad = {
        "transposed": (
            {"W_dec": rand(D, N)},
            r"W_dec in .* shape \(40, 12\), got \(12, 40\), its transpose. Transpose it",
        ),
        "unknown": ({"W_dek": rand(N, D)}, "known tensors only, got 'W_dek'. Did you mean 'W_dec'"),
        "nan": (
            {"b_enc": rand(N).fill_(float("nan"))},
            "b_enc in .* must be finite, got NaN or infinity. Fetch or train",
        ),
    }
    for name, (tensors, message) in bad.items():
        write_sae_lens(tmp_path / name, {}, **tensors)
        with pytest.raises(FormatError, match=message):
            formats.read(tmp_path / name)
    write_sae_lens(tmp_path / "missing", {})
    save_file({"W_enc": rand(D, N)}, tmp_path / "missing" / "sae_weights.safetensors")
    with pytest.raises(FormatError, match=r"must hold the tensor W_dec, got W_enc. Fetch"):
        formats.read(tmp_path / "missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation in .* must be topk or groupmax, got 'relu'. Known"),
        ({"activation": "groupmax", "k": 7}, "k in .* must divide d_sae=40 into equal groups, got 7. Mend"),
        ({"embed_skip": True}, "embed_skip in .* must be False, got True. It adds a map of the embeddings"),
        ({"kk": 3}, "known fields only, got 'kk'. Did you mean 'k'|Known:"),
        ({"num_latents": 0}, r"encoder.weight in .* must have shape \(384, 12\), got \(40, 12\)"),
    ],
)
def test_a_sparsify_config_that_lies(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_sparsify(tmp_path, **changes)
    with pytest.raises(FormatError, match=message):
        formats.read(tmp_path)


def test_a_dictionary_learning_folder_that_lies(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path / "a", "AutoEncoder", {"dict_class": "GatedAutoEncoder"})
    with pytest.raises(FormatError, match=r"dict_class in .* must be AutoEncoder, .* got 'GatedAutoEncoder'"):
        formats.read(tmp_path / "a")
    write_dictionary_learning(tmp_path / "b", "AutoEncoderTopK", {"k": K + 1})
    with pytest.raises(FormatError, match=r"k in .* must be 5, as in ae.pt, got 6"):
        formats.read(tmp_path / "b")
    write_dictionary_learning(tmp_path / "c", "AutoEncoderNew")
    torch.save({"encoder.weight": rand(N, D), "r_mag": rand(N)}, tmp_path / "c" / "ae.pt")
    with pytest.raises(FormatError, match="tensors of one of AutoEncoder, AutoEncoderNew"):
        formats.read(tmp_path / "c")
    torch.save([rand(3)], tmp_path / "c" / "ae.pt")
    with pytest.raises(FormatError, match=r"must hold named tensors, got list. Save the module's state_dict"):
        formats.read(tmp_path / "c")
    write_dictionary_learning(tmp_path / "d", "AutoEncoder", {"activation_dim": N, "dict_size": D})
    with pytest.raises(FormatError, match=r"encoder.weight in .* got \(40, 12\), its transpose"):
        formats.read(tmp_path / "d")
    (tmp_path / "d" / "config.json").unlink()
    with pytest.raises(FormatError, match=r"must hold config.json, got no such file. Name the whole folder"):
        formats.read(tmp_path / "d")
    (tmp_path / "d" / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="must be a JSON object, got list"):
        formats.read(tmp_path / "d")


def test_detect_says_what_it_found(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="must be a folder with a dictionary, got nothing there"):
        formats.detect(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match=r"got a file. Name the folder"):
        formats.detect(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"or a dictionary of ours, got an empty folder"):
        formats.detect(tmp_path / "empty")
    write_sparsify(tmp_path / "both")
    write_dictionary_learning(tmp_path / "both", "AutoEncoder")
    with pytest.raises(
        FormatError, match=r"one format, got dictionary_learning and sparsify. Split the folder"
    ):
        formats.detect(tmp_path / "both")
    ours("topk").save(tmp_path / "ours", rand(4, D))
    assert formats.detect(tmp_path / "ours") == "sememe"
    with pytest.raises(FormatError, match="must be another tool's folder, got one of ours"):
        formats.read(tmp_path / "ours")
    with pytest.raises(FormatError, match=r"a format must be known, got 'saelens'. Did you mean 'sae_lens'"):
        formats.write(ours("topk"), tmp_path, "saelens")
