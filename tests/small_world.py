"""A small corpus and a small model on disk, for tests that go through several rooms."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_models import tiny_hf, tiny_tokenizer

from sememe import lm as language_models
from sememe.lm import LanguageModel, ModelConfig
from sememe.text import TextConfig, TokenPolicy

WORDS = tuple("the cat sat on a mat and saw its tail while rain fell over grey hills near old towns".split())  # noqa: SIM905
POLICY = TokenPolicy(context_length=32)
RECIPE = """
name = "small"
[model]
model = "{place}/model"
dtype = "float32"
[text]
corpus = ["{place}/corpus.jsonl"]
heldout_fraction = 0.3
[policy]
context_length = 32
[harvest]
hookpoints = ["resid_post.0"]
n_tokens = 6000
batch_rows = 8
[train]
batch_size = 64
epochs = 3
[train.architecture]
kind = "topk"
d_sae = 48
k = 4
[evaluate]
n_tokens = 1500
n_bootstrap = 50
"""


def write_corpus(path: Path, n_documents: int = 200, seed: int = 0) -> Path:
    """A .jsonl file of short documents, all different."""
    rng = random.Random(seed)
    lines = (
        json.dumps({"text": f"{number}: " + " ".join(rng.choices(WORDS, k=rng.randint(10, 60))) + "."})
        for number in range(n_documents)
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_model(folder: Path, seed: int = 0) -> Path:
    """A tiny Llama with random weights, as a Hugging Face folder."""
    tiny_hf("llama", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_model(folder: Path) -> LanguageModel:
    """Loaded in float32."""
    return language_models.load(ModelConfig(model=str(folder), dtype="float32"))


def text_of(path: Path, **changes: object) -> TextConfig:
    """The corpus, a fifth of it held out."""
    return TextConfig.build({"corpus": (str(path),), "heldout_fraction": 0.2, **changes})


def write_recipe(place: Path, last_stages: str) -> Path:
    """`small.toml` over the corpus and the model there, with the stages that come after evaluation."""
    path = place / "small.toml"
    path.write_text(RECIPE.format(place=place) + last_stages, encoding="utf-8")
    return path
