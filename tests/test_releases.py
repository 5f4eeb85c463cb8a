"""Releases that are read and not written: Gemma Scope, OpenAI's, Llama Scope; whole trees; and what is not one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sememe import formats
from sememe.convert import ConvertConfig, convert, convert_all
from sememe.dictionaries.row_norm import RowNorm
from sememe.errors import ConfigError, FormatError

D, N, K = 8, 24, 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 100 * len(shape)))


X = rand(40, D, seed=50)


def keep_top(acts: Tensor, k: int) -> Tensor:
    values, indices = acts.topk(k, dim=1)
    return torch.zeros_like(acts).scatter(1, indices, values)


def assert_means(foreign: formats.Foreign, acts: Tensor, recon: Tensor, x: Tensor = X) -> None:
    """What was read gives what the release's own definition, written out beside it, gives."""
    assert 0 < int((acts != 0).sum()) < acts.numel()
    torch.testing.assert_close(foreign.dictionary.encode(x).to_dense(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(foreign.dictionary(x), recon, rtol=1e-5, atol=1e-5)


# -- Gemma Scope -------------------------------------------------------------------------------------


def gemma(folder: Path, **changes: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": rand(D, N),
        "W_dec": rand(N, D),
        "b_enc": rand(N),
        "b_dec": rand(D),
        "threshold": rand(N, seed=1).abs(),
    }
    np.savez(folder / "params.npz", **{k: t.numpy() for k, t in (tensors | changes).items()})
    return folder


@pytest.mark.parametrize(
    ("repo", "model", "reads", "writes"),
    [
        ("gemma-scope-2b-pt-res", "google/gemma-2-2b", "resid_post.20", None),
        ("gemma-scope-9b-it-res", "google/gemma-2-9b-it", "resid_post.20", None),
        ("gemma-scope-2b-pt-mlp", "google/gemma-2-2b", "mlp_out.20", None),
        ("gemma-scope-2b-pt-att", "google/gemma-2-2b", "attn_z.20", None),
        ("gemma-scope-2b-pt-transcoders", "google/gemma-2-2b", None, "mlp_out.20"),
    ],
)
def test_gemma_scope(tmp_path: Path, repo: str, model: str, reads: str | None, writes: str | None) -> None:
    folder = gemma(tmp_path / repo / "layer_20" / "width_16k" / "average_l0_71")
    assert formats.detect(folder) == "gemma_scope"
    foreign = formats.read(folder)
    z = X @ rand(D, N) + rand(N)
    acts = torch.relu(z) * (z > rand(N, seed=1).abs())
    assert_means(foreign, acts, acts @ rand(N, D) + rand(D))
    assert (foreign.model, foreign.hookpoint, foreign.hookpoint_out) == (model, reads, writes)


def test_gemma_scope_2_has_another_file_and_skip_connections(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2-1b-pt" / "transcoder" / "layer_7_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    skip = rand(D, D, seed=3)
    tensors = {"w_enc": rand(D, N), "w_dec": rand(N, D), "b_enc": rand(N), "b_dec": rand(D)}
    save_file(
        tensors | {"threshold": rand(N, seed=1).abs(), "affine_skip_connection": skip},
        folder / "params.safetensors",
    )
    foreign = formats.read(folder)
    z = X @ rand(D, N) + rand(N)
    acts = torch.relu(z) * (z > rand(N, seed=1).abs())
    assert_means(foreign, acts, acts @ rand(N, D) + rand(D) + X @ skip)
    assert (foreign.model, foreign.hookpoint_out) == ("google/gemma-3-1b-pt", "mlp_out.7")
    other = tmp_path / "gemma-scope-2-4b-it" / "resid_post" / "layer_9_width_65k_l0_big"
    other.mkdir(parents=True)
    save_file(tensors | {"threshold": rand(N).abs()}, other / "params.safetensors")
    assert formats.read(other)[1:3] == ("google/gemma-3-4b-it", "resid_post.9")


def test_gemma_scope_files_that_lie(tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "encoder": (
            {"W_enc": rand(N, D)},
            r"W_enc in .* shape \(8, 24\), got \(24, 8\), its transpose. Trans",
        ),
        "decoder": (
            {"W_dec": rand(D, N)},
            r"W_dec in .* shape \(24, 8\), got \(8, 24\), its transpose. Trans",
        ),
        "threshold": ({"threshold": rand(N - 1)}, r"threshold in .* shape \(24,\), got \(23,\). Correct"),
        "nan": ({"b_enc": torch.full((N,), float("nan"))}, "b_enc in .* must be finite, got NaN"),
        "unknown": ({"gain": rand(D)}, "known tensors only, got 'gain'. Known"),
        "layers": ({"W_enc": rand(3, D, N)}, "W_enc in .* must have 2 dimensions, got .* Cross-layer"),
    }
    for name, (changes, message) in cases.items():
        with pytest.raises(FormatError, match=message):
            formats.read(gemma(tmp_path / name, **changes))
    folder = gemma(tmp_path / "whole")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(folder / "params.npz")  # mislabelled
    with pytest.raises(FormatError, match=r"must be a whole \.npz file"):
        formats.read(folder)
    gemma(folder)
    data = (folder / "params.npz").read_bytes()
    for length in (0, 10, len(data) // 2):
        (folder / "params.npz").write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"must be a whole \.npz file, got .*Fetch the file again"):
            formats.read(folder)
    np.savez(folder / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError, match=r"must hold numbers and no code, got a pickle. Ask its author"):
        formats.read(folder)
    np.savez(folder / "params.npz", W_enc=np.array(["a"]))
    with pytest.raises(FormatError, match=r"W_enc in .* must be an array of numbers, got <U1"):
        formats.read(folder)
    np.savez(folder / "params.npz", W_enc=np.zeros((2, 2)))
    with pytest.raises(FormatError, match=r"must hold the tensor b_enc, got W_enc. Fetch the file again"):
        formats.read(folder)


# -- OpenAI's ----------------------------------------------------------------------------------------


def openai(path: Path, activation: str = "TopK", drop: str | None = None, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, object] = {
        "pre_bias": rand(D),
        "latent_bias": rand(N),
        "encoder.weight": rand(N, D),
        "decoder.weight": rand(D, N),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
        "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.zeros(N),
        "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }
    state |= changes
    state.pop(drop or "", None)
    torch.save(state, path)
    return path


def test_openai_top_k_normalises_rows_and_relu_does_not(tmp_path: Path) -> None:
    path = openai(tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt")
    assert formats.detect(path) == "openai"
    foreign = formats.read(path)
    x = 5 + 3 * X
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    z = ((x - mean) / (std + 1e-5) - rand(D)) @ rand(N, D).T + rand(N)
    theirs = keep_top(torch.relu(z), K)
    recon = (theirs @ rand(D, N).T + rand(D)) * std + mean
    assert isinstance(foreign.dictionary, RowNorm)
    assert_means(foreign, theirs * std, recon, x)
    assert (foreign.model, foreign.hookpoint) == ("gpt2", "resid_post.8")

    path = openai(tmp_path / "gpt2-small" / "mlp_post_act" / "autoencoders" / "3.pt", "ReLU")
    foreign = formats.read(path)
    acts = torch.relu((X - rand(D)) @ rand(N, D).T + rand(N))
    assert_means(foreign, acts, acts @ rand(D, N).T + rand(D))
    assert foreign.hookpoint == "mlp_act.3"
    tied = openai(tmp_path / "tied.pt", "ReLU", "decoder.weight", **{"decoder.linear.weight": rand(N, D)})
    assert_means(formats.read(tied), acts, acts @ rand(N, D) + rand(D))


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_openai_files_that_lie(tmp_path: Path) -> None:
    path = openai(tmp_path / "0.pt", decoder=3)
    with pytest.raises(FormatError, match=r"must hold named tensors, got 'decoder' of type int"):
        formats.read(path)
    for changes, message in (
        ({"activation": "Identity"}, "activation in .* must be ReLU or TopK, got 'Identity'"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn in .* must be ReLU, got"),
        ({"activation_state_dict": {}}, "must hold k, got no such field"),
        ({"activation_state_dict": {"k": N + 1}}, r"k in .* must be in \[1, d_sae=24\], got 25"),
        ({"decoder.weight": rand(N, D)}, r"decoder.weight in .*, got \(24, 8\), its transpose"),
    ):
        with pytest.raises(FormatError, match=message):
            formats.read(openai(tmp_path / "1.pt", **changes))
    torch.save({"weight": rand(3)}, tmp_path / "2.pt")
    with pytest.raises(
        FormatError, match=r"or a .pt file of openai/sparse_autoencoder, got a file. Name the f"
    ):
        formats.read(tmp_path / "2.pt")
    target = tmp_path / "touched"
    for save in (torch.save, lambda value, place: place.write_bytes(pickle.dumps(value))):
        save({"pre_bias": Payload(target)}, tmp_path / "3.pt")
        with pytest.raises(FormatError, match=r"must hold tensors and no code, got a pickle that"):
            formats.read(tmp_path / "3.pt")
        assert not target.exists()


# -- Llama Scope -------------------------------------------------------------------------------------

HYPERPARAMETERS = {
    "d_model": D, "d_sae": N, "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
    "act_fn": "jumprelu", "jump_relu_threshold": 0.6, "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 4.0, "out": 2.0}, "sparsity_include_decoder_norm": True, "top_k": 4,
    "hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out",
}  # fmt: skip


def llama(folder: Path, **changes: object) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps(HYPERPARAMETERS | changes))
    tensors = {
        "encoder.weight": rand(N, D),
        "encoder.bias": rand(N),
        "decoder.weight": rand(D, N),
        "decoder.bias": rand(D),
    }
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "relu", "centred"])
def test_llama_scope(tmp_path: Path, kind: str) -> None:
    changes: dict[str, object] = {"act_fn": "relu" if kind == "centred" else kind}
    if kind == "centred":
        changes["apply_decoder_bias_to_pre_encoder"] = True
    folder = llama(tmp_path / "Llama3_1-8B-Base-L8TC-8x", **changes)
    assert formats.detect(folder) == "llama_scope"
    foreign = formats.read(folder)
    s_in, s_out = D**0.5 / 4.0, D**0.5 / 2.0
    norms = rand(D, N).norm(dim=0)
    z = (X * s_in - (rand(D) if kind == "centred" else 0)) @ rand(N, D).T + rand(N)
    if kind == "jumprelu":  # the one threshold is in units of the model, decoder and all
        theirs = z * (z / s_in * norms * s_in / s_out > 0.6)
    elif kind == "topk":
        theirs = keep_top(torch.relu(z * norms), K) / norms
    else:
        theirs = torch.relu(z)
    recon = (theirs @ rand(D, N).T + rand(D)) / s_out
    assert_means(foreign, theirs / s_in * (norms if kind == "topk" else 1), recon)
    assert (foreign.hookpoint, foreign.hookpoint_out) == ("mlp_in.8", "mlp_out.8")


def test_the_first_release_says_how_it_was_trained_too(tmp_path: Path) -> None:
    """The fields that its folders have beside those that decide the map."""
    more = {
        "device": "cuda:0", "seed": 42, "dtype": "torch.bfloat16", "expansion_factor": 3, "use_glu_encoder": False,
        "bias_init_method": "all_zero", "decoder_exactly_fixed_norm": False, "init_decoder_norm": 0.5,
        "init_encoder_norm": None, "init_encoder_with_decoder_transpose": True, "lp": 1, "l1_coefficient": 8e-05,
        "l1_coefficient_warmup_steps": 78125, "k_warmup_steps": 78125, "use_batch_norm_mse": True,
        "use_ghost_grads": False, "tp_size": 1, "ddp_size": 1,
    }  # fmt: skip
    assert formats.read(llama(tmp_path, **more)).dictionary.kind == "jumprelu"


def test_later_llama_scopes_learn_their_thresholds_and_keep_norms_among_the_tensors(tmp_path: Path) -> None:
    place = "blocks.3.hook_resid_post"
    config = {
        "sae_type": "sae", "d_model": D, "expansion_factor": 3, "act_fn": "jumprelu", "hook_point_in": place,
        "hook_point_out": place, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    log_threshold = rand(N, seed=2) - 1
    tensors = {
        "W_E": rand(D, N),
        "b_E": rand(N),
        "W_D": rand(N, D),
        "b_D": rand(D),
        "activation_function.log_jumprelu_threshold": log_threshold,
        f"dataset_average_activation_norm.{place}": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    assert formats.detect(tmp_path) == "llama_scope"
    foreign = formats.read(tmp_path)
    s = D**0.5 / 4.0
    z = X * s @ rand(D, N) + rand(N)
    theirs = z * (z * rand(N, D).norm(dim=1) > log_threshold.exp())
    assert_means(foreign, theirs / s, (theirs @ rand(N, D) + rand(D)) / s)
    assert (foreign.hookpoint, foreign.hookpoint_out) == ("resid_post.3", None)


def test_llama_scope_folders_that_lie(tmp_path: Path) -> None:
    for changes, message in (
        (
            {"act_fn": "batchtopk"},
            "act_fn in .* must be one of relu, topk, jumprelu, got 'batchtopk'. It keeps",
        ),
        (
            {"use_glu_encoder": True},
            "use_glu_encoder in .* must be False, got True. An encoder with a second",
        ),
        (
            {"norm_activation": "token-wise"},
            "must be dataset-wise or inference, got 'token-wise'. A norm per r",
        ),
        (
            {"dataset_average_activation_norm": {"in": 0.0}},
            "must hold dataset_average.* a positive number, got",
        ),
        ({"d_sae": N + 1}, r"encoder.weight in .* must have shape \(25, 8\), got \(24, 8\). Correct"),
        ({"act_fn": 3}, "act_fn in .* must be of type str, got 3"),
        (
            {"jump_relu_treshold": 7},
            r"known fields only, got 'jump_relu_treshold'\. Did you mean 'jump_relu_thr",
        ),
    ):
        with pytest.raises(FormatError, match=message):
            formats.read(llama(tmp_path, **changes))


# -- whole trees -------------------------------------------------------------------------------------


def autoencoder(folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": rand(N, D, seed=seed),
        "encoder.bias": rand(N),
        "decoder.weight": rand(D, N),
        "bias": rand(D),
    }
    torch.save(tensors, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"buffer": {"ctx_len": 128}}))
    (folder / "checkpoints").mkdir(exist_ok=True)
    torch.save(tensors, folder / "checkpoints" / "ae_1000.pt")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The layout of Marks & Mueller's: MODEL/SUBMODULE_layerN/RUN."""
    tree = tmp_path / "pythia-70m-deduped"
    for seed, place in enumerate(("embed", "attn_out_layer0", "mlp_out_layer0", "resid_out_layer1")):
        autoencoder(tree / place / "10_24", seed)
    autoencoder(tree / "mlp_out_layer0" / "1_64", 9)
    return tree


def test_a_releases_tree_is_named_and_read_as_a_whole(release: Path, tmp_path: Path) -> None:
    names = ["attn_out_layer0/10_24", "embed/10_24", "mlp_out_layer0/10_24", "mlp_out_layer0/1_64"]
    names.append("resid_out_layer1/10_24")
    assert list(formats.find(release)) == names
    with pytest.raises(
        FormatError,
        match=r"must be one dictionary, got a folder of 5: attn_out_layer0/10_24, .*--select '\*'",
    ):
        convert(ConvertConfig(source=release, out=tmp_path / "out"))
    made = convert_all(ConvertConfig(source=release, out=tmp_path / "out", select="mlp_out_*"))
    assert list(made) == ["mlp_out_layer0/10_24", "mlp_out_layer0/1_64"]
    for name, saved in made.items():
        assert saved.path == tmp_path / "out" / name
        origin = saved.extra["origin"]
        assert (origin["model"], origin["hookpoint"]) == ("pythia-70m-deduped", "mlp_out.0")
    assert made["mlp_out_layer0/1_64"].fingerprint != made["mlp_out_layer0/10_24"].fingerprint
    last = convert(ConvertConfig(source=release, out=tmp_path / "all", select="*"))
    assert last.extra["origin"]["hookpoint"] == "resid_post.1"
    (kept,) = convert_all(
        ConvertConfig(source=release, out=tmp_path / "kept", select="embed/*/checkpoints/*")
    )
    assert kept == "embed/10_24/checkpoints/ae_1000.pt"
    assert (tmp_path / "kept" / "embed" / "10_24" / "checkpoints" / "ae_1000" / "meta.json").is_file()


def test_a_selection_has_to_make_sense(release: Path, tmp_path: Path) -> None:
    config = ConvertConfig(source=release, out=tmp_path / "out", select="resid_post*")
    with pytest.raises(
        FormatError, match=r"must match a foreign .*, got 'resid_post\*'. There are attn_out_"
    ):
        convert(config)
    with pytest.raises(
        ConfigError, match=r"hookpoint must be left out with select: .* got mlp_out.0. Drop it"
    ):
        convert(config.replace(model="m", hookpoint="mlp_out.0"))
    with pytest.raises(ConfigError, match=r"select must be given to convert several .* got select None"):
        convert_all(config.replace(select=None))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"must match a foreign dictionary below .* There is none"):
        convert(config.replace(source=tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_trees_of_the_other_tools(tmp_path: Path) -> None:
    gemma(tmp_path / "g" / "layer_0" / "width_16k" / "average_l0_9")
    llama(tmp_path / "l" / "L0R-8x")
    openai(tmp_path / "o" / "autoencoders" / "0.pt", "ReLU")
    (tmp_path / "o" / "notes.pt").write_text("")
    assert list(formats.find(tmp_path)) == [
        "g/layer_0/width_16k/average_l0_9",
        "l/L0R-8x",
        "o/autoencoders/0.pt",
    ]
    made = convert_all(ConvertConfig(source=tmp_path, out=tmp_path / "ours", select="*"))
    assert [one.path.relative_to(tmp_path / "ours").as_posix() for one in made.values()][
        -1
    ] == "o/autoencoders/0"
    assert list(formats.find(tmp_path)) == list(made), "what is ours is not another tool's"
