"""Tiny random models and dictionaries on which edits are tried: what their tests share."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sememe import lm as language_models
from sememe.dictionaries import ReLU, ReLUConfig, Site, Sites, TopK, TopKConfig
from sememe.dictionaries.base import Dictionary
from sememe.lm import LanguageModel
from sememe.lm.build import LlamaShape, build_causal_lm, train_tokenizer

D, N, K, CTX = 32, 96, 8, 24
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "tree",
    "river",
    "stone",
    "walks",
    "sees",
    "finds",
    "old",
    "small",
    "red",
    "under",
    "over",
    "and",
    "then",
    "never",
]


def some_texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(20, 60))) + "." for _ in range(120)]


def make_lm(texts: list[str], dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    tokenizer = train_tokenizer(texts, 320)
    shape = LlamaShape(n_layers=3, d_model=D, n_heads=4)
    hf = build_causal_lm(
        shape, vocab_size=len(tokenizer), context_length=64, end_of_text=tokenizer.eos_token_id, seed=seed
    )
    with torch.no_grad():  # sharper than at initialisation, so that texts differ
        for parameter in hf.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return language_models.wrap(hf.to(dtype), tokenizer, "tiny")


def sites(lm: LanguageModel, inputs: str, outputs: str | None = None, max_norm: float | None = None) -> Sites:
    def site(name: str) -> Site:
        width = lm.width(name)
        return Site(
            model=lm.name,
            model_fingerprint=lm.fingerprint,
            hookpoint=name,
            start=0,
            stop=width,
            max_norm=max_norm,
        )

    return Sites(inputs=(site(inputs),), outputs=(site(outputs or inputs),))


def random_topk(where: Sites | None, seed: int = 0) -> TopK:
    dictionary = TopK(TopKConfig(k=K, d_sae=N), D, D, N, where)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (dictionary.W_enc, dictionary.W_dec, dictionary.b_dec):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / D**0.5)
    return dictionary.eval()


def identity(where: Sites) -> ReLU:
    """Latent i reads +x_i, latent D + i reads -x_i; the sum is x to the bit."""
    dictionary = ReLU(ReLUConfig(d_sae=2 * D), D, D, 2 * D, where)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    with torch.no_grad():
        dictionary.W_dec.copy_(both)
        dictionary.W_enc.copy_(both.T)
    return dictionary.eval()


def some_ids(lm: LanguageModel, texts: list[str], n: int = 3, length: int = 12) -> Tensor:
    return torch.tensor([lm.tokenizer(text).input_ids[:length] for text in texts[:n]])


def commonest(dictionary: Dictionary, x: Tensor) -> list[int]:
    """Latents by how often they fire on x."""
    counts = (dictionary.encode(x.reshape(-1, D)).to_dense() != 0).sum(0)
    return counts.argsort(descending=True).tolist()
