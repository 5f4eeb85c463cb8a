"""Reading out: directions as logits, and tokens as bytes and text."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    D_MODEL,
    MORE,
    VOCAB,
    tiny_hf,
    tiny_lm,
    tiny_tokenizer,
)

from sememe.errors import ShapeError
from sememe.lm import LanguageModel, wrap

ALL = {**ARCHITECTURES, **MORE}


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


def some_ids(seed: int = 1, batch: int = 2, seq: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- directions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in sorted(ALL) if n != "opt_post_norm"])
def test_direct_logits_are_the_logits_without_the_norms_division(name: str) -> None:
    """A final residual read as a direction gives its own logits, but for the length that the norm divides by."""
    exact = name not in ("mixtral", "mamba")
    hf = tiny_hf(
        name,
        torch.float64 if exact else torch.float32,
        **({"final_logit_softcapping": None} if name.startswith("gemma") else {}),
    )
    for parameter_name, parameter in hf.named_parameters():
        if parameter_name.endswith("bias") and (
            "norm" in parameter_name or "ln_f" in parameter_name or "head" in parameter_name
        ):
            parameter.data.zero_()
    lm = wrap(hf, tiny_tokenizer(), name)
    with torch.no_grad():
        residual = lm.capture(some_ids(), "resid_post.2")["resid_post.2"][0]
        expected = lm.logits(lm.hidden(some_ids()))[0]
        got = torch.cat(list(lm.direct_logits(residual, chunk=3))).to(expected.dtype)
    expected = expected - expected.mean(1, keepdim=True)
    length = (got * expected).sum(1, keepdim=True) / expected.square().sum(1, keepdim=True)
    assert torch.allclose(got, expected * length, rtol=1e-4, atol=1e-4 * float(got.abs().max()))
    centred = name in ("gpt2", "gpt_neox", "gpt_neox_sequential", "opt", "phi", "falcon", "bloom", "cohere")
    spread = residual - residual.mean(1, keepdim=True) if centred else residual
    scale = 1 / hf.config.logits_scaling if name == "granite" else getattr(hf.config, "logit_scale", 1.0)
    assert torch.allclose(length[:, 0] * scale, spread.square().mean(1).sqrt(), rtol=1e-3)


def test_direct_logits_without_a_norm_and_with_a_projection() -> None:
    lm = tiny_lm("opt_post_norm")
    directions = noise(5, D_MODEL)
    with torch.no_grad():
        expected = lm.hf.lm_head(lm.hf.model.decoder.project_out(directions))
        got = torch.cat(list(lm.direct_logits(directions)))
    assert torch.allclose(got, expected - expected.mean(1, keepdim=True), atol=1e-5)


def test_direct_logits_chunks_and_dtypes(llama: LanguageModel) -> None:
    directions = noise(10, D_MODEL).requires_grad_()
    chunks = list(llama.direct_logits(directions, chunk=4))
    assert [tuple(chunk.shape) for chunk in chunks] == [(4, VOCAB), (4, VOCAB), (2, VOCAB)]
    whole = torch.cat(chunks)
    assert whole.dtype == torch.float32 and not whole.requires_grad
    assert whole.mean(1).abs().max() < 1e-5
    low = torch.cat(list(llama.direct_logits(directions, dtype=torch.bfloat16)))
    assert low.dtype == torch.float32
    assert (low - whole).abs().max() < 0.03 * whole.abs().max()
    with pytest.raises(ShapeError, match=r"directions must be \(n, d_model=32\), got \(3, 31\)"):
        next(llama.direct_logits(noise(3, 31)))


def test_direct_logits_of_an_odd_width() -> None:
    lm = tiny_lm("mamba", torch.float64, hidden_size=31)
    with torch.no_grad():
        got = next(lm.direct_logits(torch.eye(31))).double()
        expected = (lm.hf.backbone.norm_f.weight * lm.hf.lm_head.weight).T
    assert torch.allclose(got, expected - expected.mean(1, keepdim=True), atol=1e-5)


# ---- tokens ---------------------------------------------------------------------------------------------------

_STRINGS = [
    "Hello, world!",
    "  indented\n\n\ttabs ",
    "Ça coûte 12 €",
    "日本語 русский עברית",
    "🎈 emoji\x00\x7f",
    "▁Ġ<0x0A>",
]


def test_byte_level_tokens_give_back_the_text(llama: LanguageModel) -> None:
    rng = random.Random(0)
    texts = [
        *_STRINGS,
        "".join(
            chr(rng.choice([rng.randrange(32, 0x3000), rng.randrange(0x1F300, 0x1F600)])) for _ in range(300)
        ),
    ]
    for text in texts:
        ids = llama.tokenizer(text).input_ids
        assert b"".join(llama.token_bytes(i) for i in ids) == text.encode()


def test_token_texts(llama: LanguageModel) -> None:
    tokens = {llama.token_text(i): i for i in range(VOCAB)}
    assert llama.token_text(0) == "<|end|>" and llama.token_bytes(0) == b"<|end|>"
    assert " " in tokens and "\n" in tokens and "a" in tokens
    assert llama.token_bytes(tokens["\\xe6"]) == b"\xe6"
    assert (llama.token_bytes(VOCAB - 1), llama.token_text(VOCAB - 1)) == (b"", "")


def test_sentencepiece_tokens_give_back_the_text() -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁the",
        "c",
        "a",
        "t",
        "▁▁",
        "é",
    ]
    backend = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    lm = wrap(tiny_hf("llama"), tokenizer, "pieces")
    for text in ("cat the cat", " é\n日本", "<s>a"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(lm.token_bytes(i) for i in ids) == text.encode()
    assert lm.token_bytes(pieces.index("▁the")) == b" the"
    assert lm.token_bytes(pieces.index("<0x0A>")) == b"\n"
    assert lm.token_bytes(pieces.index("▁▁")) == b"  "
    assert lm.token_text(pieces.index("<0xE6>")) == "\\xe6"
    assert lm.token_text(1) == "<s>"
