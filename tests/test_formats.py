"""Each format against its own definition, written out here in plain products; and every way a file can lie."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sememe import formats
from sememe.dictionaries import ReLU, ReLUConfig, Site, Sites, TopK, TopKConfig
from sememe.dictionaries.base import Dictionary
from sememe.errors import FormatError

D, N, K = 12, 40, 5


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape)))


def keep_top(acts: Tensor, k: int) -> Tensor:
    values, indices = acts.topk(k, dim=1)
    return torch.zeros_like(acts).scatter(1, indices, values)


def sites(inputs: str = "resid_post.3", outputs: str | None = None) -> Sites:
    def site(hookpoint: str) -> Site:
        return Site(model="tiny", model_fingerprint="f" * 64, hookpoint=hookpoint, start=0, stop=D)

    return Sites(inputs=(site(inputs),), outputs=(site(outputs or inputs),))


def ours(kind: str, *, centred: bool = False, where: Sites | None = None, seed: int = 0) -> Dictionary:
    """One of our dictionaries with random weights, scales other than 1, and centres that differ or agree."""
    dictionary: TopK | ReLU
    if kind == "topk":
        dictionary = TopK(TopKConfig(k=K, d_sae=N), D, D, N, where)
    else:
        dictionary = ReLU(ReLUConfig(d_sae=N), D, D, N, where)
    with torch.no_grad():
        dictionary.W_enc.copy_(rand(D, N, seed=seed))
        dictionary.W_dec.copy_(rand(N, D, seed=seed + 1))
        dictionary.b_enc.copy_(rand(N, seed=seed + 2))
        dictionary.b_dec.copy_(rand(D, seed=seed + 3))
        dictionary.b_pre.copy_(dictionary.b_dec if centred else rand(D, seed=seed + 4))
        dictionary.scale_in.fill_(1.0 if centred else 1.7)
        dictionary.scale_out.fill_(1.0 if centred else 1.7)
    return dictionary.eval()


def assert_same(a: Dictionary, b: Dictionary) -> None:
    x = rand(64, D, seed=77, scale=2.0)
    left, right = a.fold(), b.fold()
    torch.testing.assert_close(
        left.encode(x).to_dense(), right.encode(x).to_dense(), rtol=1e-5, atol=1e-6 * float(x.abs().max()) * D
    )
    torch.testing.assert_close(left(x), right(x), rtol=1e-5, atol=2e-5)


# -- reading what the others define ------------------------------------------------------------------


def write_sae_lens(folder: Path, config: dict[str, object], **tensors: Tensor) -> None:
    folder.mkdir(exist_ok=True)
    base = {"d_in": D, "d_sae": N, "architecture": "standard", "dtype": "float32", "device": "cpu"}
    (folder / "cfg.json").write_text(json.dumps(base | config))
    weights = {"W_enc": rand(D, N), "b_enc": rand(N), "W_dec": rand(N, D), "b_dec": rand(D)} | tensors
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
    W_enc, b_enc, W_dec, b_dec = rand(D, N), rand(N), rand(N, D), rand(D)
    acts = torch.relu((x - b_dec if centred else x) @ W_enc + b_enc)
    acts = acts if k is None else keep_top(acts, k)
    torch.testing.assert_close(foreign.dictionary.encode(x).to_dense(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(foreign.dictionary(x), acts @ W_dec + b_dec, rtol=1e-5, atol=1e-4)
    expected = {"metadata": "resid_post.3", "hook_name": "mlp_act.1"}
    assert foreign.hookpoint == next((expected[key] for key in expected if key in config), None)
    assert foreign.model == ("tiny" if "metadata" in config else None)


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
    found = formats.read(tmp_path / "a").dictionary
    torch.testing.assert_close(found.encode(x).to_dense(), acts, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found(x), (acts / norms) @ rand(N, D) + rand(D), rtol=1e-5, atol=1e-4)

    scaling = rand(N, seed=8).abs()
    write_sae_lens(tmp_path / "b", {"finetuning_scaling_factor": True}, scaling_factor=scaling)
    acts = torch.relu((x - rand(D)) @ rand(D, N) + rand(N))
    found = formats.read(tmp_path / "b").dictionary
    torch.testing.assert_close(found(x), (acts * scaling) @ rand(N, D) + rand(D), rtol=1e-5, atol=1e-4)
    write_sae_lens(tmp_path / "c", {}, scaling_factor=scaling)  # present, but not in use
    found = formats.read(tmp_path / "c").dictionary
    torch.testing.assert_close(found(x), acts @ rand(N, D) + rand(D), rtol=1e-5, atol=1e-4)


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
    save_file(weights, folder / "sae.safetensors")


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_means_what_it_says(tmp_path: Path, transcode: bool) -> None:
    folder = tmp_path / "layers.8.mlp"
    write_sparsify(folder, transcode=transcode)
    assert formats.detect(folder) == "sparsify"
    foreign = formats.read(folder)
    x = rand(30, D, seed=5)
    acts = keep_top(torch.relu((x if transcode else x - rand(D)) @ rand(N, D).T + rand(N)), K)
    torch.testing.assert_close(foreign.dictionary.encode(x).to_dense(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        foreign.dictionary(x), acts @ rand(N, D, seed=3) + rand(D), rtol=1e-5, atol=1e-4
    )
    assert foreign.hookpoint == (None if transcode else "mlp_out.8")


def write_dictionary_learning(folder: Path, name: str, config: dict[str, object] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"encoder.weight": rand(N, D), "encoder.bias": rand(N), "decoder.weight": rand(D, N)}
    trainer: dict[str, object] = {"dict_class": name, "activation_dim": D, "dict_size": N}
    if name == "AutoEncoder":
        tensors["bias"] = rand(D)
    elif name == "AutoEncoderNew":
        tensors["decoder.bias"] = rand(D)
    else:
        tensors |= {"b_dec": rand(D), "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        trainer["k"] = K
    torch.save(tensors, folder / "ae.pt")
    trainer |= {"lm_name": "tiny", "submodule_name": "resid_post_layer_4"}
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer | (config or {}), "buffer": {"ctx_len": 128}})
    )


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK"])
def test_dictionary_learning_means_what_it_says(tmp_path: Path, name: str) -> None:
    write_dictionary_learning(tmp_path, name)
    assert formats.detect(tmp_path) == "dictionary_learning"
    foreign = formats.read(tmp_path)
    x = rand(30, D, seed=5)
    acts = torch.relu((x if name == "AutoEncoderNew" else x - rand(D)) @ rand(N, D).T + rand(N))
    acts = keep_top(acts, K) if name == "AutoEncoderTopK" else acts
    torch.testing.assert_close(foreign.dictionary.encode(x).to_dense(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(foreign.dictionary(x), acts @ rand(D, N).T + rand(D), rtol=1e-5, atol=1e-4)
    assert (foreign.model, foreign.hookpoint) == ("tiny", "resid_post.4")


def test_an_old_release_without_a_trainer_is_read_by_its_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "mlp_out_layer0"
    write_dictionary_learning(folder, "AutoEncoder")
    (folder / "config.json").write_text("{}")
    foreign = formats.read(folder)
    assert foreign.dictionary.kind == "relu" and foreign.hookpoint == "mlp_out.0"


# -- there and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_a_round_trip_gives_the_same_map(tmp_path: Path, name: str, kind: str, centred: bool) -> None:
    dictionary = ours(kind, centred=centred, where=sites())
    folder = tmp_path / "layers.3"
    folder.mkdir()
    if name == "sparsify" and kind == "relu":
        with pytest.raises(
            FormatError, match=r"must be topk, .* written as sparsify, got relu from 12 to 12"
        ):
            formats.write(dictionary, folder, name)
        assert list(folder.iterdir()) == []
        return
    formats.write(dictionary, folder, name)
    assert formats.detect(folder) == name
    foreign = formats.read(folder)
    assert_same(dictionary, foreign.dictionary)
    assert foreign.hookpoint == "resid_post.3"
    assert foreign.model == (None if name == "sparsify" else "tiny")
    if name == "sae_lens":  # without a version it would be read as a file of before version 6
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata["sae_lens_version"].startswith("6.")
        assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    if centred:  # nothing to fold: not one bit may change
        x = rand(20, D, seed=6)
        assert torch.equal(foreign.dictionary(x), dictionary(x))


def test_a_transcoder_goes_to_sparsify_and_not_to_sae_lens(tmp_path: Path) -> None:
    dictionary = ours("topk", where=sites("mlp_in.3", "mlp_out.3"))
    formats.write(dictionary, tmp_path, "sparsify")
    assert json.loads((tmp_path / "cfg.json").read_text())["transcode"] is True
    assert_same(dictionary, formats.read(tmp_path).dictionary)
    with pytest.raises(FormatError, match="equal inputs and outputs to be written as sae_lens"):
        formats.write(dictionary, tmp_path, "sae_lens")
    wide = TopK(TopKConfig(k=2, d_sae=8), 4, 6, 8)
    for name in formats.WRITERS:
        with pytest.raises(FormatError, match=f"written as {name}, got .*4 to 6"):
            formats.write(wide, tmp_path, name)


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
        {"architecture": "jumprelu"},
        None,
        r"standard \(relu\) or topk, got 'jumprelu'",
    ),
    "another activation": ({"activation_fn_str": "tanh-relu"}, None, "got standard with 'tanh-relu'"),
    "norms per row": (
        {"normalize_activations": "layer_norm"},
        None,
        "must be none, got 'layer_norm'. Fold the norm",
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
    with pytest.raises(FormatError, match=r"must hold the tensor b_enc, got W_enc. Fetch"):
        formats.read(tmp_path / "missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation": "groupmax"},
            "activation in .* must be topk, got groupmax. Such coders are not read yet",
        ),
        ({"skip_connection": True}, "skip_connection in .* must be False, got True"),
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
