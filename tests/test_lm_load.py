"""Loading: folders, GGUF files, embedded models out of wheels, the hub's cache; and what goes wrong with each."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import socket
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import tiny_hf, tiny_lm, tiny_tokenizer

from sememe.errors import ConfigError, CorruptError, ModelError, ResourceError
from sememe.lm import EMBEDDED, ModelConfig, embedded, fetch, fingerprint_of, load, wrap
from sememe.lm.gguf import read_gguf
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


def test_device_map_is_passed_through(folder: Path) -> None:
    pytest.importorskip("accelerate")
    lm = load(ModelConfig(model=str(folder), dtype="float32", device_map="cpu"))
    assert hasattr(lm.hf, "hf_device_map") or lm.device.type == "cpu"
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


# ---- GGUF -----------------------------------------------------------------------------------------------------

_CODES = ["digits 123 4567, and\n        0 indented", "  two  spaces", "Ça coûte 12 €", "I'll see y'all"]


def write_gguf(
    path: Path, name: str, pre: str = "smollm", quant: Any = gguf.GGMLQuantizationType.F32, **more: Any
) -> Path:
    """A tiny model as llama.cpp's converter writes it."""
    kind = {"gemma3": "gemma3"}.get(name, name)
    changes = {"final_logit_softcapping": None, "query_pre_attn_scalar": 8} if name == "gemma3" else {}
    hf, tokenizer = tiny_hf(name, tie_word_embeddings=name == "gemma3", **changes), tiny_tokenizer()
    config = hf.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokenizer) - 1), *[4] * (config.vocab_size - len(tokenizer))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    for key, value in more.items():
        writer.add_string(f"{kind}.{key}", value) if isinstance(value, str) else writer.add_uint32(
            f"{kind}.{key}", value
        )
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm" if name == "gemma3" else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        **{f"{p}_proj": f"attn_{p}" for p in "qkv"},
        **{f"{p}_norm": f"attn_{p}_norm" for p in "qk"},
        "o_proj": "attn_output",
        **{f"{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
    }
    for key, value in hf.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = key.split(".")
        target = f"blk.{parts[2]}.{inner[parts[-2]]}" if "layers" in parts else names[parts[-2]]
        weight = value
        if name == "llama" and parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            weight = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        if name == "gemma3" and parts[-2].endswith("norm"):
            weight = value + 1
        array = weight.numpy().astype(np.float32)
        if array.ndim == 2 and array.shape[1] % 32 == 0 and quant != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{target}.{parts[-1]}", gguf.quants.quantize(array, quant), raw_dtype=quant)
        else:
            writer.add_tensor(f"{target}.{parts[-1]}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_gguf_gives_the_same_logits(name: str, tmp_path: Path, no_network: None) -> None:
    path = write_gguf(tmp_path / "model.gguf", name)
    lm = load(ModelConfig(model=str(path), dtype="float32"))
    changes = {"final_logit_softcapping": None, "query_pre_attn_scalar": 8} if name == "gemma3" else {}
    expected = tiny_hf(name, tie_word_embeddings=name == "gemma3", **changes)
    with torch.no_grad():
        # Gemma's weights went through + 1 and - 1.
        same = torch.allclose if name == "gemma3" else torch.equal
        assert same(lm.hf(IDS).logits, expected(IDS).logits)
    assert lm.fingerprint == fingerprint_of(str(path))
    assert lm.context_length == expected.config.max_position_embeddings
    assert lm.tokenizer.eos_token_id == 0
    # A folder with one GGUF file and no config is that file.
    assert load(str(tmp_path)).fingerprint == lm.fingerprint


def test_gguf_quantised(tmp_path: Path) -> None:
    exact = tiny_hf("llama", tie_word_embeddings=False).model.embed_tokens.weight
    for quant, most in ((gguf.GGMLQuantizationType.Q8_0, 0.01), (gguf.GGMLQuantizationType.Q4_1, 0.1)):
        hf, _ = read_gguf(write_gguf(tmp_path / f"{quant}.gguf", "llama", quant=quant), torch.float32)
        assert 0 < (hf.model.embed_tokens.weight - exact).abs().max() < most


def test_gguf_pre_tokenizers(tmp_path: Path) -> None:
    """Digits are split from the spaces before them, which GPT-2's pattern does not do."""

    def pieces(pre: str) -> list[str]:
        _, tokenizer = read_gguf(write_gguf(tmp_path / f"{pre}.gguf", "llama", pre), torch.float32)
        for text in _CODES:
            assert tokenizer.decode(tokenizer(text).input_ids) == text
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\n   12 345 it's")
        return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in split]

    assert pieces("gpt-2") == ["\n  ", " 12", " 345", " it", "'s"]
    assert pieces("smollm") == ["\n   ", "1", "2", " ", "3", "4", "5", " it", "'s"]
    assert pieces("llama-bpe") == ["\n", "  ", " ", "12", " ", "345", " it", "'s"]
    assert pieces("qwen2") == ["\n", "  ", " ", "1", "2", " ", "3", "4", "5", " it", "'s"]


def test_gguf_specials_and_extras(tmp_path: Path) -> None:
    _, tokenizer = read_gguf(write_gguf(tmp_path / "model.gguf", "llama"), torch.float32)
    ids = tokenizer("a<|end|><unused0>").input_ids
    assert ids[1:] == [0, 300]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<unused0>"


def test_gguf_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(tmp_path / "model.gguf", "llama")
    for content in (whole.read_bytes()[:-1000], whole.read_bytes()[:500], b"not a model", b""):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(content)
        with pytest.raises(
            CorruptError, match=r"broken\.gguf must be a complete GGUF file, got .*Download it again"
        ):
            load(str(broken))
    for key, value, what in (
        ("rope.scaling.type", "yarn", "scaled positions"),
        ("expert_count", 8, "a mixture of experts"),
    ):
        path = write_gguf(tmp_path / f"{key}.gguf", "llama", **{key: value})
        with pytest.raises(
            ModelError, match=f"must be a dense model with plain rotary positions, got {what}"
        ):
            load(str(path))
    with pytest.raises(ModelError, match=r"the pre-tokenizer of .* must be a known one, got 'martian'"):
        load(str(write_gguf(tmp_path / "martian.gguf", "llama", "martian")))
    with pytest.raises(
        ModelError, match=r"must be a Hugging Face model folder, got \d gguf files|\d \.gguf files"
    ):
        load(str(tmp_path))


def test_gguf_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "martian")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="must be a GGUF file that transformers reads, got 'martian'"):
        load(str(path))
    monkeypatch.setattr("sememe.lm.gguf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="'martian' needs the package accelerate, got none installed"):
        load(str(path))


# ---- embedded models: a tiny one, in a real wheel, fetched with a real pip from a folder --------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> embedded.Embedded:
    weights = write_gguf(tmp_path / "tiny.gguf", "llama")
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "sememe_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(weights, "sememe_tiny/tiny.gguf")
        archive.writestr("sememe_tiny/TERMS.html", "the terms")
        info = "sememe_tiny-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sememe-tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    model = embedded.Embedded(
        name="tiny",
        wheels=(
            embedded.Wheel(
                "sememe-tiny==1.0",
                hashlib.sha256(wheel.read_bytes()).hexdigest(),
                ("sememe_tiny/tiny.gguf",),
                ("sememe_tiny/TERMS.html",),
            ),
        ),
        gguf_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        hub="owner/tiny",
        licence="none",
        about="a test",
        notice="These are the terms.",
    )
    monkeypatch.setitem(embedded.MODELS, "tiny", model)
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return model


def test_an_embedded_model_is_fetched_once(
    tiny: embedded.Embedded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch("tiny")
    said = capsys.readouterr().err
    assert said.index("These are the terms.") < said.index("downloading sememe-tiny==1.0")
    made = list((tmp_path / "cache" / "models").glob("tiny-*"))
    assert len(made) == 1
    assert (made[0] / "TERMS.html").read_text() == "the terms"
    assert not list((tmp_path / "cache" / "downloads").iterdir())
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    lm = load(ModelConfig(model="tiny", dtype="float32"))
    expected = tiny_hf("llama", tie_word_embeddings=False)
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        assert torch.equal(lm.hf(IDS).logits, expected(IDS).logits)
    assert (
        lm.tokenizer("a 12").input_ids
        == read_gguf(tmp_path / "tiny.gguf", torch.float32)[1]("a 12").input_ids
    )
    assert lm.name == "tiny"


def test_a_damaged_cache(tiny: embedded.Embedded, tmp_path: Path) -> None:
    fetch("tiny")
    folder = next((tmp_path / "cache" / "models").glob("tiny-*"))
    weights = folder / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-7] ^= 1
    weights.write_bytes(whole)
    with pytest.raises(CorruptError) as error:
        load("tiny")
    assert str(weights) in str(error.value)
    assert "The file was changed or damaged; delete the folder and make it again." in str(error.value)
    weights.unlink()
    with pytest.raises(CorruptError, match=r"must hold model\.safetensors, got no such file"):
        fingerprint_of("tiny")
    shutil.rmtree(folder)
    assert load("tiny").name == "tiny"


def test_a_wheel_that_was_changed(
    tiny: embedded.Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next((tmp_path / "index").iterdir())
    whole = wheel.read_bytes()
    wheel.write_bytes(whole + b"!")
    with pytest.raises(
        CorruptError, match=r"sememe-tiny==1\.0 must have SHA-256 .* got another file. The download is"
    ):
        load("tiny")
    # A wheel as published, whose content is not what was pinned.
    wheel.write_bytes(whole)
    monkeypatch.setitem(embedded.MODELS, "tiny", tiny._replace(gguf_sha256="0" * 64))
    with pytest.raises(CorruptError, match="the weights of tiny must have SHA-256 0000000000000000"):
        load("tiny")
    broken = tiny.wheels[0]._replace(weights=("sememe_tiny/absent.gguf",))
    monkeypatch.setitem(embedded.MODELS, "tiny", tiny._replace(wheels=(broken,)))
    with pytest.raises(CorruptError, match=r"must be a complete wheel, got KeyError"):
        load("tiny")
    assert not list((tmp_path / "cache" / "models").glob("*")) or not list(
        (tmp_path / "cache" / "models").glob("tiny*")
    )
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def test_no_registry_and_no_hub(tiny: embedded.Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(ModelError) as error:
        load("tiny")
    assert "tiny must be in the package registry or on the Hugging Face hub, got neither (" in str(
        error.value
    )
    assert "Check the network, or give the folder of a model that you have." in str(error.value)


def test_no_registry_but_a_hub(
    tiny: embedded.Embedded, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from_registry = fingerprint_of("tiny")
    monkeypatch.setenv("SEMEME_CACHE", str(folder.parent / "other-cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    # A folder stands where the hub's name would.
    monkeypatch.setitem(embedded.MODELS, "tiny", tiny._replace(hub=str(folder)))
    lm = load("tiny")
    said = capsys.readouterr().err
    assert "the package registry must provide sememe-tiny==1.0" in said
    assert f"Trying {folder} on the Hugging Face hub instead." in said
    assert lm.fingerprint != from_registry
    assert load("tiny").fingerprint == lm.fingerprint
    assert not capsys.readouterr().err


def test_a_cache_that_cannot_be_written(
    tiny: embedded.Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ResourceError, match=r"the cache folder must be writable .* got Not a directory"):
        load("tiny")
    if Path("/dev/full").exists():
        monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(embedded.tempfile, "TemporaryDirectory", _Full)
        with pytest.raises(ResourceError, match=r"got No space left on device.* set SEMEME_CACHE"):
            load("tiny")


class _Full:
    """A temporary folder in which every model file is /dev/full."""

    def __init__(self, dir: Path) -> None:
        self.path = dir / "full"

    def __enter__(self) -> str:
        self.path.mkdir(parents=True)
        (self.path / "tiny.gguf").symlink_to("/dev/full")
        return str(self.path)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path)


def test_no_pip(tiny: embedded.Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.sys, "executable", "/bin/false")
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=r"got neither \(none here;"):
        load("tiny")


def test_what_is_embedded() -> None:
    assert next(iter(EMBEDDED)) == "smollm2-135m" == ModelConfig().model
    assert "not an open licence" in EMBEDDED["gemma-3-270m"]
    assert embedded.MODELS["gemma-3-270m"].notice.startswith("Gemma is provided under")
    with pytest.raises(ModelError, match="a model to fetch must be an embedded one, got 'smollm'"):
        fetch("smollm")
    with pytest.raises(ConfigError, match="revision must be left out for an embedded model"):
        load(ModelConfig(revision="main"))


# ---- the default model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> Any:
    return load("smollm2-135m")


@pytest.mark.model
def test_the_default_model_knows_paris(smollm: Any) -> None:
    ids = smollm.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = smollm.logits(smollm.hidden(ids))
        assert torch.equal(logits, smollm.hf(ids).logits)
    assert smollm.token_text(int(logits[0, -1].argmax())) == " Paris"
    assert (smollm.n_layers, smollm.d_model, smollm.vocab_size, smollm.context_length) == (
        30,
        576,
        49152,
        8192,
    )
    assert smollm.dtype == native_dtype("cpu")
    assert smollm.tokenizer.decode(smollm.generate(ids, 2)[0]) == "The capital of France is Paris."


@pytest.mark.model
def test_the_default_tokenizer_splits_digits_first(smollm: Any) -> None:
    ids = smollm.tokenizer("x\n         0").input_ids
    assert smollm.tokenizer.convert_ids_to_tokens(ids)[-2:] == ["Ċ" + "Ġ" * 9, "0"]
    for text in _CODES:
        encoded = smollm.tokenizer(text).input_ids
        assert b"".join(smollm.token_bytes(i) for i in encoded) == text.encode()
    assert smollm.token_text(1) == "<|im_start|>"
    assert smollm.tokenizer.chat_template
    # No token is put before a text.
    assert smollm.tokenizer.convert_ids_to_tokens(smollm.tokenizer("Hello").input_ids) == ["Hello"]


@pytest.mark.model
def test_the_default_model_has_a_sink_at_position_0(smollm: Any) -> None:
    text = "Marie Curie was a physicist and chemist who conducted pioneering research on radioactivity."
    ids = smollm.tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        norms = smollm.capture(ids, "resid_post.15")["resid_post.15"][0].float().norm(dim=-1)
    assert norms[0] > 10_000
    assert norms[1:].median() < 1_000


@pytest.mark.model
def test_the_default_model_continues_from_the_middle(smollm: Any) -> None:
    ids = torch.randint(0, 49152, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        residual = smollm.capture(ids, "resid_post.8")["resid_post.8"]
        assert torch.equal(smollm.hidden_from(8, residual, ids), smollm.hidden(ids))
        assert smollm._can_skip[8]


@pytest.mark.model
def test_the_default_models_fingerprint_is_the_same_everywhere(smollm: Any) -> None:
    assert smollm.fingerprint == fingerprint_of("smollm2-135m")
    assert smollm.fingerprint.startswith("61a7594d")


@pytest.mark.model
def test_direct_logits_of_the_default_model(smollm: Any) -> None:
    """The last residual, read as a direction, promotes what the model says next."""
    ids = smollm.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        direction = smollm.capture(ids, "resid_post.29")["resid_post.29"][0, -1:].float()
    for dtype in (torch.float32, torch.bfloat16):
        logits = next(smollm.direct_logits(direction, dtype=dtype))[0]
        assert smollm.token_text(int(logits.argmax())) == " Paris"


@pytest.mark.slow
@pytest.mark.model
def test_gemma() -> None:
    """240 MB and about a minute, once."""
    lm = load(ModelConfig(model="gemma-3-270m", dtype="float32"))
    ids = lm.tokenizer("Berlin is the capital of", return_tensors="pt").input_ids
    assert ids[0, 0] == lm.tokenizer.bos_token_id
    with torch.inference_mode():
        logits = lm.logits(lm.hidden(ids))
        assert torch.equal(logits, lm.hf(ids).logits)
    assert lm.token_text(int(logits[0, -1].argmax())) == " Germany"
    for text in _CODES:
        encoded = lm.tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(lm.token_bytes(i) for i in encoded) == text.encode()
