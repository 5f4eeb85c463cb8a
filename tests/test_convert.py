"""Conversion in both directions: the same map comes out, and what cannot be converted says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sememe import artifact, dictionaries, formats
from sememe.convert import ConvertConfig, convert, probe_rows
from sememe.dictionaries import ReLU, ReLUConfig, TopK, TopKConfig
from sememe.errors import ConfigError, FormatError, MismatchError

D, N, K = 10, 32, 4


def ours(path: Path, kind: str = "topk", seed: int = 0) -> artifact.Artifact:
    """A dictionary of ours on disk, random in every part."""
    dictionary: TopK | ReLU
    if kind == "topk":
        dictionary = TopK(TopKConfig(k=K, d_sae=N), D, D, N)
    else:
        dictionary = ReLU(ReLUConfig(d_sae=N), D, D, N)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (
            dictionary.W_enc,
            dictionary.b_enc,
            dictionary.W_dec,
            dictionary.b_dec,
            dictionary.b_pre,
        ):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return dictionary.save(path, torch.randn(16, D, generator=generator))


@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("to", ["sae_lens", "dictionary_learning", "sparsify"])
def test_there_and_back(tmp_path: Path, to: str, kind: str) -> None:
    source = ours(tmp_path / "ours", kind)
    out = ConvertConfig.build({"source": tmp_path / "ours", "out": tmp_path / "theirs", "to": to})
    if to == "sparsify" and kind == "relu":
        with pytest.raises(FormatError, match="to be written as sparsify, got relu"):
            convert(out)
        assert not (tmp_path / "theirs").exists()
        return
    export = convert(out)
    assert export.kind == "export" and export.meta["parents"] == {"dictionary": source.fingerprint}
    assert formats.detect(tmp_path / "theirs") == to
    back = convert(ConvertConfig(source=tmp_path / "theirs", out=tmp_path / "back"))
    assert back.extra["origin"]["format"] == to
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(9))
    first, last = dictionaries.load(tmp_path / "ours"), dictionaries.load(tmp_path / "back")
    torch.testing.assert_close(last(x), first(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.encode(x).to_dense(), first.encode(x).to_dense(), rtol=1e-5, atol=1e-5)


def test_a_second_run_reuses_the_first_and_another_source_is_a_mismatch(tmp_path: Path) -> None:
    ours(tmp_path / "a")
    config = ConvertConfig(source=tmp_path / "a", out=tmp_path / "out", to="sae_lens")
    first = convert(config)
    before = (tmp_path / "out" / "cfg.json").stat().st_mtime_ns
    assert convert(config).fingerprint == first.fingerprint
    assert (tmp_path / "out" / "cfg.json").stat().st_mtime_ns == before
    ours(tmp_path / "b", seed=1)
    with pytest.raises(MismatchError, match=r"Delete .*out, write elsewhere, or pass --fresh"):
        convert(config.replace(source=tmp_path / "b"))
    assert convert(config.replace(source=tmp_path / "b"), fresh=True).fingerprint != first.fingerprint


def test_the_probe_makes_latents_of_every_scale_fire(tmp_path: Path) -> None:
    ours(tmp_path / "ours", "relu")
    dictionary = dictionaries.load(tmp_path / "ours")
    acts = dictionary.encode(probe_rows(dictionary)).to_dense()
    assert bool((acts > 0).any(dim=1)[-8:].all())


def test_a_foreign_dictionary_is_tied_to_a_model_only_when_it_is_named(tmp_path: Path) -> None:
    ours(tmp_path / "ours")
    convert(ConvertConfig(source=tmp_path / "ours", out=tmp_path / "theirs", to="sae_lens"))
    convert(ConvertConfig(source=tmp_path / "theirs", out=tmp_path / "back"))
    assert dictionaries.load(tmp_path / "back").sites is None
    with pytest.raises(ConfigError, match=r"hookpoint must go with model, got resid_post.1. Name the model"):
        convert(ConvertConfig(source=tmp_path / "theirs", out=tmp_path / "b", hookpoint="resid_post.1"))
    with pytest.raises(
        ConfigError, match=r"model must go with a foreign source, got one of ours, .* Leave model out"
    ):
        convert(ConvertConfig(source=tmp_path / "ours", out=tmp_path / "b", to="sae_lens", model="m"))
    with pytest.raises(ConfigError, match=r"hookpoint must be given, as .* does not say it, got nothing"):
        convert(ConvertConfig(source=tmp_path / "theirs", out=tmp_path / "b", model="m"))


def test_directions_without_meaning_are_refused(tmp_path: Path) -> None:
    ours(tmp_path / "ours")
    with pytest.raises(
        ConfigError, match=r"another format than the source's, got sememe. Choose one of dictionary_l"
    ):
        convert(ConvertConfig(source=tmp_path / "ours", out=tmp_path / "b"))
    convert(ConvertConfig(source=tmp_path / "ours", out=tmp_path / "theirs", to="sae_lens"))
    with pytest.raises(ConfigError, match=r"to must be sememe when .* got sparsify. Convert to sememe first"):
        convert(ConvertConfig(source=tmp_path / "theirs", out=tmp_path / "b", to="sparsify"))
    with pytest.raises(FormatError, match="must be a folder with a dictionary, got nothing there"):
        convert(ConvertConfig(source=tmp_path / "nowhere", out=tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"to must be one of 'sememe', .* Did you mean 'sae_lens'"):
        ConvertConfig.build({"source": "a", "out": "b", "to": "saelens"})


def test_a_damaged_source_leaves_nothing_behind(tmp_path: Path) -> None:
    ours(tmp_path / "ours")
    convert(ConvertConfig(source=tmp_path / "ours", out=tmp_path / "theirs", to="sae_lens"))
    config = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(config | {"d_in": D + 1}))
    with pytest.raises(FormatError, match=r"W_enc in .* must have shape \(11, 32\), got \(10, 32\)"):
        convert(ConvertConfig(source=tmp_path / "theirs", out=tmp_path / "back"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]
