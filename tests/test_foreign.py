"""Foreign dictionaries where a verb takes one: brought in once, tied to the model in use. Ids: test_foreign_hub.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sememe import artifact, dictionaries
from sememe.config import Config
from sememe.convert import ConvertConfig, convert
from sememe.dictionaries import TopKConfig
from sememe.errors import FormatError, MismatchError
from sememe.foreign import opens, own
from sememe.intervene import InterveneConfig

D, N = 8, 24
FINGERPRINTS = {"gpt2": "a" * 64, "other": "b" * 64}


def sparsify(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"encoder.weight": rand(N, D), "encoder.bias": rand(N), "W_dec": rand(N, D), "b_dec": rand(D)}
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": 3}))
    return folder


def sae_lens(folder: Path, model: str = "gpt2-small") -> Path:
    dictionary = dictionaries.build(TopKConfig(k=3, d_sae=N), D, D)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    dictionary.save(folder.parent / "ours", x, fresh=True)
    convert(ConvertConfig(source=folder.parent / "ours", out=folder, to="sae_lens"), fresh=True)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {"model_name": model, "hook_name": "blocks.5.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from sememe import lm

    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm, "fingerprint_of", lambda model: FINGERPRINTS[getattr(model, "model", model)])
    return tmp_path / "cache" / "dictionaries"


class Look(Config):
    """A verb's."""

    dictionary: Path
    """One."""
    others: tuple[Path, ...] = ()
    """Several."""
    model: str = "other"
    """A model."""
    _opens = opens("dictionary", "others")


def test_a_path_that_is_no_foreign_dictionary_is_left_alone(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none", tmp_path / "folder"):
        assert Look(dictionary=path).dictionary == path == own(path)
    saved = dictionaries.build(TopKConfig(k=3, d_sae=N), D, D).save(tmp_path / "ours", torch.zeros(1, D))
    assert own(saved.path) == saved.path
    assert not cache.exists()


def test_a_foreign_dictionary_is_brought_in_once(tmp_path: Path, cache: Path) -> None:
    source = sparsify(tmp_path / "layers.3")
    first = Look(dictionary=source, others=(source, tmp_path / "none"))
    assert first.dictionary.parent == cache and first.others == (first.dictionary, tmp_path / "none")
    assert artifact.load(first.dictionary, "dictionary").extra["origin"]["hookpoint"] == "resid_post.3"
    assert dictionaries.load(first.dictionary).sites is None, "nobody named a model"
    before = (first.dictionary / "meta.json").stat().st_mtime_ns
    assert Look(dictionary=source).dictionary == first.dictionary
    assert (first.dictionary / "meta.json").stat().st_mtime_ns == before
    assert first.replace(model="gpt2").dictionary == first.dictionary, "what is ours stays"
    sparsify(source, seed=1)
    assert Look(dictionary=source).dictionary != first.dictionary, "the files changed"


def test_it_belongs_to_the_model_that_it_is_used_with(tmp_path: Path) -> None:
    source = sparsify(tmp_path / "layers.3")
    sites = dictionaries.load(Look(dictionary=source, model="gpt2").dictionary).sites
    assert sites is not None and sites.inputs == sites.outputs
    assert sites.inputs[0].resolved() | {"max_norm": None} == {
        "model": "gpt2", "model_fingerprint": "a" * 64, "hookpoint": "resid_post.3", "start": 0, "stop": D,
        "max_norm": None,
    }  # fmt: skip
    config = InterveneConfig.build(
        {"dictionary": source, "model": {"model": "gpt2"}}
    )  # as the command line has it
    sites = dictionaries.load(config.dictionary).sites
    assert sites is not None and sites.inputs[0].model_fingerprint == "a" * 64


def test_files_that_name_a_model_are_held_to_it(tmp_path: Path) -> None:
    source = sae_lens(tmp_path / "theirs")
    assert dictionaries.load(Look(dictionary=source).dictionary).sites is None, "the default is another one"
    sites = dictionaries.load(Look(dictionary=source, model="gpt2").dictionary).sites
    assert sites is not None and sites.inputs[0].hookpoint == "resid_post.5"
    with pytest.raises(
        MismatchError,
        match=r"must be used with the model that its files name, gpt2-small, got other. Pass --model",
    ):
        Look(dictionary=source, model="other")


def test_a_damaged_foreign_dictionary_says_so_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    source = sparsify(tmp_path / "layers.3")
    (source / "cfg.json").write_text("{")
    with pytest.raises(FormatError, match=r"must be JSON, got .* Fetch the file again"):
        Look(dictionary=source)
    assert not list(cache.glob("*"))
