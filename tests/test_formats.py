"""Each format against its own definition, written out in plain products; there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from foreign_files import (
    D,
    K,
    N,
    assert_means,
    assert_same,
    keep_top,
    ours,
    rand,
    sites,
    write_dictionary_learning,
    write_sae_lens,
    write_sparsify,
)
from safetensors.torch import load_file, save_file

from sememe import dictionaries, formats
from sememe.dictionaries.row_norm import RowNorm
from sememe.errors import FormatError

# -- reading what the others define ------------------------------------------------------------------


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
