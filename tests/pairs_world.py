"""A tiny random model whose tokenizer knows some names, a text, and dictionaries: what patching and scrubbing share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from edited_models import D, random_topk, sites

from sememe import lm as language_models
from sememe.dictionaries.base import Dictionary
from sememe.lm import LanguageModel
from sememe.lm.build import LlamaShape, build_causal_lm, train_tokenizer
from sememe.pairs import NAMES, PLACES, TEMPLATES, THINGS
from sememe.text import TextConfig, TokenPolicy

CTX = 24
SOME_NAMES = NAMES[:8]


def sentences(n: int = 150) -> list[str]:
    rng = random.Random(0)
    found = []
    for number in range(n):
        a, b = rng.sample(SOME_NAMES, 2)
        words = {"a": a, "b": b, "again": a, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        found.append(TEMPLATES[number % len(TEMPLATES)].format(**words) + f" {b}.")
    return found


def people_lm(seed: int = 0) -> LanguageModel:
    tokenizer = train_tokenizer(sentences(), 600)
    shape = LlamaShape(n_layers=3, d_model=D, n_heads=4)
    hf = build_causal_lm(
        shape, vocab_size=len(tokenizer), context_length=64, end_of_text=tokenizer.eos_token_id, seed=seed
    )
    with torch.no_grad():  # sharper than at initialisation, so that prompts differ
        for parameter in hf.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return language_models.wrap(hf, tokenizer, "tiny")


def spaced_tokenizer() -> Any:
    """Another kind: spaces become marks that begin a word, as SentencePiece has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>"], show_progress=False)
    backend.train_from_iterator(sentences(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def corpus_of(folder: Path) -> TextConfig:
    path = folder / "people.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences()))
    return TextConfig(corpus=(str(path),))


def save(
    lm: LanguageModel,
    path: Path,
    hookpoint: str = "resid_post.1",
    seed: int = 0,
    max_norm: float | None = None,
) -> Path:
    """A random TopK dictionary as an artifact."""
    return save_one(random_topk(sites(lm, hookpoint, max_norm=max_norm), seed), path)


def save_one(dictionary: Dictionary, path: Path) -> Path:
    policy = TokenPolicy(context_length=CTX).resolved()
    dictionary.save(
        path, torch.randn(16, D, generator=torch.Generator().manual_seed(1)), extra={"policy": policy}
    )
    return path
