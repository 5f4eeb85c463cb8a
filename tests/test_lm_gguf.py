"""GGUF files: the same logits and tokens as the model they were made of; and what cannot be read."""

from __future__ import annotations

import socket
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_world import CODES, write_gguf
from tiny_models import tiny_hf

from sememe.errors import CorruptError, ModelError, ResourceError
from sememe.lm import ModelConfig, fingerprint_of, load
from sememe.lm.gguf import read_gguf

IDS = torch.tensor([[5, 9, 200, 3, 77]])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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
        for text in CODES:
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
