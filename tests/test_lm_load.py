"""Loading: folders, the hub's cache, fingerprints; and what goes wrong with each."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_hf, tiny_lm, tiny_tokenizer

from sememe.errors import ConfigError, CorruptError, ModelError, ResourceError
from sememe.lm import ModelConfig, fingerprint_of, load, wrap
from sememe.lm.load import native_dtype

IDS = torch.tensor([[5, 9, 200, 3, 77]])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def save(folder: Path, name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    tiny_hf(name, dtype, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "llama")


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- folders --------------------------------------------------------------------------------------------------


def test_a_folder(folder: Path, no_network: None) -> None:
    lm = load(ModelConfig(model=str(folder), dtype="float32"))
    assert (lm.name, lm.dtype) == (str(folder), torch.float32)
    assert not lm.hf.training
    assert not any(p.requires_grad for p in lm.hf.parameters())
    assert torch.equal(lm.hidden(IDS), tiny_lm("llama").hidden(IDS))
    assert lm.tokenizer("The cat").input_ids == tiny_tokenizer()("The cat").input_ids


def test_dtypes(folder: Path) -> None:
    assert load(ModelConfig(model=str(folder))).dtype == native_dtype("cpu")
    for name in ("bfloat16", "float16"):
        assert load(ModelConfig(model=str(folder), dtype=name)).dtype == getattr(torch, name)


def test_auto_is_bfloat16_where_the_processor_has_it() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "flags" not in cpuinfo.read_text():
        pytest.skip("needs Linux on x86")
    flags = cpuinfo.read_text().split()
    expected = torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(flags) else torch.float32
    assert native_dtype("cpu") == expected
    assert native_dtype("meta") == torch.float32


def test_device_map_is_passed_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    real, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options.get("device_map"))
        return real(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched)
    load(ModelConfig(model=str(folder), dtype="float32"))
    lm = load(ModelConfig(model=str(folder), dtype="float32", device_map="cpu"))
    assert asked == [None, "cpu"]
    assert torch.equal(lm.hidden(IDS), tiny_lm("llama").hidden(IDS))


def test_layers_on_a_device_map_are_skipped_and_restored() -> None:
    """accelerate puts a forward of its own on every module it places."""
    accelerate = pytest.importorskip("accelerate")
    hf = tiny_hf("llama")
    accelerate.dispatch_model(hf, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    for layer in hf.model.layers:
        accelerate.hooks.add_hook_to_module(
            layer, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
        )
    lm, plain = wrap(hf, tiny_tokenizer(), "placed"), tiny_lm("llama")
    own = [layer.__dict__["forward"] for layer in lm._layers]
    with torch.no_grad():
        residual = lm.capture(IDS, "resid_post.1")["resid_post.1"]
        assert torch.equal(lm.hidden_from(1, residual * 2, IDS), plain.hidden_from(1, residual * 2, IDS))
        assert lm._can_skip == {1: True}
        assert torch.equal(lm.logits(lm.hidden(IDS)), plain.hf(IDS).logits)
    assert [layer.__dict__["forward"] for layer in lm._layers] == own


def test_device_map_without_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="device_map needs the package accelerate, got none installed"):
        load(ModelConfig(model=str(folder), device_map="auto"))


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'device must be one that torch finds here, got .* Use "cpu" or "auto"'
    ):
        load(ModelConfig(model=str(folder), device="warp:3"))
    with pytest.raises(ConfigError, match="device must be auto when device_map is given"):
        load(ModelConfig(model=str(folder), device="cpu", device_map="auto"))


def test_the_device_is_no_part_of_a_models_identity() -> None:
    assert ModelConfig(device="cpu").identity() == ModelConfig().identity()
    assert ModelConfig(dtype="float32").identity() != ModelConfig().identity()


# ---- fingerprints ---------------------------------------------------------------------------------------------


def test_fingerprints_tell_models_apart(folder: Path, tmp_path: Path) -> None:
    first = fingerprint_of(str(folder))
    assert load(str(folder)).fingerprint == first
    assert fingerprint_of(str(copy(folder, tmp_path))) == first
    others = {
        "weights": save(tmp_path / "weights", seed=1),
        "architecture": save(tmp_path / "architecture", "mistral"),
        "dtype": save(tmp_path / "dtype", dtype=torch.bfloat16),
        "config": copy(folder, tmp_path / "config"),
        "tokenizer": copy(folder, tmp_path / "tokenizer"),
    }
    config = json.loads((others["config"] / "config.json").read_text())
    (others["config"] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    tokens = (others["tokenizer"] / "tokenizer.json").read_text().replace("<|end|>", "<|END|>")
    (others["tokenizer"] / "tokenizer.json").write_text(tokens)
    found = [first, *(fingerprint_of(str(path)) for path in others.values())]
    assert len(set(found)) == len(found)
    # Who saved it is no part of it.
    (others["config"] / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert fingerprint_of(str(others["config"])) == first


def test_fingerprints_of_models_in_memory() -> None:
    hf, tokenizer = tiny_hf("gpt2"), tiny_tokenizer()
    first = wrap(hf, tokenizer, "one").fingerprint
    assert wrap(tiny_hf("gpt2"), tokenizer, "two").fingerprint == first
    hf.transformer.h[1].mlp.c_fc.weight.data.mul_(1.01)
    assert wrap(hf, tokenizer, "one").fingerprint != first
    assert wrap(tiny_hf("gpt2"), None, "one").fingerprint != first


# ---- what is no model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smollm2-135M",
            "or owner/name on the Hugging Face hub, got 'smollm2-135M'. Did you mean 'smollm2-135m'?",
        ),
        ("gpt2-mini", "Did you mean 'gpt2"),
        ("nonsense", "got 'nonsense'. Known: smollm2-135m, gemma-3-270m"),
        ("./nowhere", "a model's folder or file must exist, got ./nowhere."),
        ("weights.gguf", "a model's folder or file must exist, got weights.gguf."),
        ("a/b/c", "a model's folder or file must exist, got a/b/c."),
    ],
)
def test_unknown_models(name: str, message: str, no_network: None) -> None:
    for call in (load, fingerprint_of):
        with pytest.raises(ModelError) as error:
            call(name)
        assert message in str(error.value)


def test_a_near_path_is_suggested(folder: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(str(folder) + "s")
    assert f"Did you mean {str(folder)!r}?" in str(error.value)


def test_folders_that_are_no_models(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(ModelError, match=r"must be a Hugging Face model folder, got no config\.json"):
        load(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"a model file must be GGUF, got .*notes\.txt"):
        load(str(tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"must hold weights, got no \.safetensors or \.bin file"):
        load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="must hold a causal language model and its tokenizer"):
        load(str(tmp_path))


def test_a_truncated_and_an_incomplete_weight_file(folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CorruptError, match=r"must be complete safetensors.*Delete the folder and download"):
        load(str(broken))
    from safetensors.torch import load as parse
    from safetensors.torch import save_file

    tensors = parse(whole)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CorruptError, match=r"1 missing, model\.layers\.1\.mlp\.up_proj\.weight first"):
        load(str(broken))


def test_a_folder_without_a_tokenizer(tmp_path: Path, no_network: None) -> None:
    tiny_hf("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="must hold a causal language model and its tokenizer"):
        load(str(tmp_path / "bare"))


# ---- the hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no way to the hub itself."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_model_that_cannot_be_reached(hub: Path, no_network: None) -> None:
    for name in ("owner/model", "gpt2"):
        with pytest.raises(ModelError) as error:
            load(name)
        assert f"{name} must be in the local cache or the Hugging Face hub must be reachable" in str(
            error.value
        )
        assert "use the embedded model: smollm2-135m" in str(error.value)


def test_a_hub_that_does_not_answer(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(ModelError, match=r"must be reachable, got (?!Got)\w+: .*Check the network"):
        load("owner/model")


def test_a_hub_model_in_the_cache(hub: Path, folder: Path, no_network: None) -> None:
    home = hub / "models--owner--model"
    shutil.copytree(folder, home / "snapshots" / "abc")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    lm = load(ModelConfig(model="owner/model", dtype="float32"))
    assert lm.name == "owner/model"
    assert lm.fingerprint == fingerprint_of(str(folder))
    with pytest.raises(ModelError, match="owner/model must be in the local cache"):
        load(ModelConfig(model="owner/model", revision="other"))
    # An interrupted download lacks a shard.
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (home / "snapshots" / "abc" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"owner/model must be whole in the local cache or .* an unfinished download"
    ):
        load("owner/model")


# ---- randomised weights ---------------------------------------------------------------------------------------


def test_randomised_layers_keep_their_entries_and_lose_their_order(folder: Path) -> None:
    config = ModelConfig(model=str(folder), dtype="float32", randomise="layers", randomise_seed=3)
    shuffled, again = load(config), load(config)
    plain = load(ModelConfig(model=str(folder), dtype="float32"))
    embedding = plain.hf.get_input_embeddings().weight
    n_shuffled = 0
    for (name, before), (_, after) in zip(
        plain.hf.named_parameters(), shuffled.hf.named_parameters(), strict=True
    ):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values), name
        moved = not torch.equal(before, after)
        n_shuffled += moved
        assert moved == (before.dim() >= 2 and "embed" not in name and "lm_head" not in name), name
    assert n_shuffled > 4 and torch.equal(embedding, shuffled.hf.get_input_embeddings().weight)
    assert torch.equal(shuffled.hidden(IDS), again.hidden(IDS))
    assert not torch.allclose(shuffled.hidden(IDS), plain.hidden(IDS))
    everything = load(config.replace(randomise="all"))
    assert not torch.equal(everything.hf.get_input_embeddings().weight, embedding)
    marks = {fingerprint_of(one) for one in (str(folder), config, config.replace(randomise="all"))}
    marks.add(fingerprint_of(config.replace(randomise_seed=4)))
    assert len(marks) == 4 and shuffled.fingerprint == fingerprint_of(config)
    assert shuffled.name == f"{folder} (randomised: layers, seed 3)"


def test_a_seed_without_shuffles_is_refused() -> None:
    with pytest.raises(ConfigError, match="randomise_seed must be left out when nothing is randomised"):
        ModelConfig.build({"randomise_seed": 3})
