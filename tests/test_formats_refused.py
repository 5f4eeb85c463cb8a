"""Every way in which another tool's file can lie: refused, with the reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_files import (
    D,
    K,
    N,
    ours,
    rand,
    write_dictionary_learning,
    write_sae_lens,
    write_sparsify,
)
from safetensors.torch import save_file

from sememe import formats
from sememe.errors import FormatError

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
    "an architecture without an equal": (
        {"architecture": "phase_multiplexed"},
        None,
        "must be one of standard, .*, got 'phase_multiplexed'. It encodes several times, .*whatever its batch",
    ),
    "a pursuit with another end": (
        {"architecture": "matching_pursuit"},
        None,
        "got 'matching_pursuit'. It goes on until .* residual_threshold .* k steps along rows of norm 1",
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
    write_dictionary_learning(tmp_path / "e", "AutoEncoder", {"encoder_power": 2})
    with pytest.raises(FormatError, match=r"config.json must hold known fields only, got 'encoder_power'\. "):
        formats.read(tmp_path / "e")
    (tmp_path / "e" / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}, "bufer": {}}')
    with pytest.raises(FormatError, match=r"known fields only, got 'bufer'\. Did you mean 'buffer'"):
        formats.read(tmp_path / "e")
    (tmp_path / "d" / "config.json").unlink()
    with pytest.raises(FormatError, match=r"must hold config.json, got no such file. Name the whole folder"):
        formats.read(tmp_path / "d")
    (tmp_path / "d" / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="must be a JSON object, got list"):
        formats.read(tmp_path / "d")


def test_whitened_inputs_are_refused(tmp_path: Path) -> None:
    write_sae_lens(tmp_path, {})
    edit_json(tmp_path / "cfg.json", None, normalize_activations="expected_average_only_in")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 2.0, "has_whitening": true}')
    with pytest.raises(FormatError, match=r"must scale inputs by one factor, got whitening\. Fold it"):
        formats.read(tmp_path)


@pytest.mark.parametrize(
    ("turned", "unit", "message"),
    [
        ("W_enc", False, "with the encoder turned"),
        ("W_dec", False, "with the decoder turned"),
        ("W_enc W_dec", True, "columns have norm 1"),
    ],
)
def test_transposed_square_weights_are_found_by_what_latents_read_and_write(
    tmp_path: Path, turned: str, unit: bool, message: str
) -> None:
    """As many latents as dimensions: shapes say nothing. Encoders of trained dictionaries look like their decoders."""
    decoder = torch.nn.functional.normalize(rand(D, D), dim=1) * (1 if unit else 1 + rand(D, 1).abs())
    encoder = (decoder + 0.1 * rand(D, D, seed=3)).T
    tensors = {"W_enc": encoder, "W_dec": decoder, "b_enc": rand(D), "b_dec": rand(D)}
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": D, "d_sae": D}))
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "sae_weights.safetensors")
    assert formats.read(tmp_path).dictionary.d_sae == D
    tensors |= {name: tensors[name].T for name in turned.split()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(FormatError, match=rf"must not be transposed: .*{message}"):
        formats.read(tmp_path)


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


# -- values of another type --------------------------------------------------------------------------

OTHER_TYPES: list[tuple[str, dict[str, object], str]] = [
    ("dictionary_learning", {"dict_size": None}, "dict_size in .*config.json must be of type int, got None"),
    ("dictionary_learning", {"dict_size": "8k"}, "dict_size in .*config.json must be of type int, got '8k'"),
    (
        "dictionary_learning",
        {"submodule_name": ["a"]},
        r"submodule_name in .* must be of type str, got \['a'\]",
    ),
    ("dictionary_learning", {"lm_name": 5}, "lm_name in .* must be of type str, got 5. Mend the file"),
    ("sae_lens", {"metadata": "x"}, "metadata in .*cfg.json must be of type dict, got 'x'"),
    ("sae_lens", {"hook_name": ["blocks.0.hook_resid_post"]}, "hook_name in .* must be of type str, got "),
    ("sae_lens", {"metadata": {"hook_name": 5}}, "hook_name in .* must be of type str, got 5"),
    ("sae_lens", {"architecture": ["topk"]}, r"architecture in .* must be of type str, got \['topk'\]"),
    ("sae_lens", {"activation_fn": 3}, "activation_fn in .* must be of type str, got 3"),
    ("sae_lens", {"activation_fn_str": "topk", "activation_fn_kwargs": "k"}, "must be of type dict, got 'k'"),
    ("sae_lens", {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input in .* must be of type bool"),
    ("sae_lens", {"normalize_activations": ["none"]}, "normalize_activations in .* must be of type str"),
    (
        "sae_lens",
        {"architecture": "batchtopk", "k": float("nan")},
        "must be a dictionary as sae_lens writes it, .*",
    ),
    ("sparsify", {"activation": ["topk"]}, r"activation in .* must be of type str, got \['topk'\]"),
    ("sparsify", {"transcode": "no"}, "transcode in .* must be of type bool, got 'no'"),
]


@pytest.mark.parametrize(("name", "changes", "message"), OTHER_TYPES)
def test_a_value_of_another_type_is_refused(
    tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    if name == "dictionary_learning":
        write_dictionary_learning(tmp_path, "AutoEncoder", changes)
    elif name == "sae_lens":
        write_sae_lens(tmp_path, changes)
    else:
        write_sparsify(tmp_path, **changes)
    with pytest.raises(FormatError, match=message):
        formats.read(tmp_path)


def test_widths_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    config: dict[str, object] = {
        "architecture": "matryoshka_batchtopk",
        "k": 3,
        "matryoshka_widths": ["4", 8],
    }
    write_sae_lens(tmp_path, config, topk_threshold=torch.tensor(0.5))
    with pytest.raises(
        FormatError, match=r"matryoshka_widths in .* must be whole numbers, got \['4', 8\]\. Mend"
    ):
        formats.read(tmp_path)


def test_what_a_reader_trips_over_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trip(folder: Path) -> formats.Foreign:
        raise KeyError("norm")

    write_sparsify(tmp_path)
    monkeypatch.setitem(formats.READERS, "sparsify", trip)
    with pytest.raises(
        FormatError,
        match=r"must be a dictionary as sparsify writes it, got .*KeyError: 'norm'.* Look for a value",
    ) as caught:
        formats.read(tmp_path)
    assert str(tmp_path) in str(caught.value) and isinstance(caught.value.__cause__, KeyError)
