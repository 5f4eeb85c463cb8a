"""A tiny real language model, a corpus and dictionaries of it: what the tests of `interpret` and `explain` stand on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch

from sememe import lm as language_models
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.interpret import InterpretConfig
from sememe.lm import LanguageModel, ModelConfig
from sememe.lm.build import LlamaShape, build_causal_lm, save_causal_lm, train_tokenizer
from sememe.text import TextConfig, TokenPolicy

ENGLISH = (
    "the river runs past the old town and the people sell bread , salt and 12 apples for 3 coins in the market . "
    "a house near the water is where they read many books about kings and ships in 1984"
)
GERMAN = (
    "der Fluss fließt an der alten Stadt vorbei und die Leute verkaufen Brot , Salz und 12 Äpfel für 3 Münzen . "
    "ein Haus am Wasser ist der Ort wo sie viele Bücher über Könige und Schiffe lesen in 1984"
)
POLICY = TokenPolicy(context_length=32)
D_MODEL = 32


class World(NamedTuple):
    """Folders and options of everything below."""

    root: Path
    model: ModelConfig
    lm: LanguageModel
    text: TextConfig
    dictionary: Path

    def config(self, out: str, **changes: object) -> InterpretConfig:
        """Options of a small atlas."""
        options: dict[str, object] = {
            "out": self.root / out,
            "dictionaries": self.dictionary,
            "model": self.model,
            "text": self.text,
            "n_tokens": 5000,
            "n_top": 5,
            "n_decile": 2,
            "n_random": 4,
            "n_reservoir": 40,
            "n_logits": 6,
            "before": 8,
            "after": 4,
            "batch_rows": 8,
            "map": False,
        }
        return InterpretConfig.build(options | changes)


def corpus(path: Path, n_documents: int = 80, seed: int = 0) -> Path:
    """Documents of random words in two languages."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n_documents):
            words = (ENGLISH, GERMAN)[i % 2].split()
            text = " ".join(rng.choice(words) for _ in range(rng.randint(20, 120))) + "\n"
            line = {"text": text, "title": f"Text {i}", "language": ("en", "de")[i % 2]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def sites(lm: LanguageModel, hookpoint: str = "resid_post.0", **changes: object) -> Sites:
    """One site, read and written."""
    fields: dict[str, object] = {
        "model": lm.name,
        "model_fingerprint": lm.fingerprint,
        "hookpoint": hookpoint,
        "start": 0,
        "stop": D_MODEL,
    }
    site = Site.build(fields | changes)
    return Sites(inputs=(site,), outputs=(site,))


def save_dictionary(
    path: Path,
    where: Sites | None,
    d_sae: int = 48,
    k: int = 4,
    silent: bool = False,
    policy: TokenPolicy = POLICY,
) -> Path:
    """A dictionary with random weights, saved with its policy."""
    dictionary = TopK(TopKConfig(k=k), D_MODEL, D_MODEL, d_sae, where)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, D_MODEL, generator=generator)
    dictionary.initialise(x, x, generator)
    with torch.no_grad():
        dictionary.b_pre.zero_()
        if silent:
            dictionary.b_enc.fill_(-1e9)
    dictionary.save(path, x, extra={"policy": policy.resolved(), "store": {}})
    return path


def make_world(root: Path) -> World:
    """A model on disk and loaded, its corpus, and a dictionary of its first layer."""
    text_path = corpus(root / "corpus.jsonl")
    lines = text_path.read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer((json.loads(line)["text"] for line in lines), 400)
    shape = LlamaShape(n_layers=2, d_model=D_MODEL, n_heads=4)
    model = build_causal_lm(
        shape, vocab_size=len(tokenizer), context_length=64, end_of_text=tokenizer.eos_token_id, seed=0
    )
    folder = root / "model"
    save_causal_lm(model, tokenizer, folder)
    config = ModelConfig(model=str(folder), dtype="float32")
    lm = language_models.load(config)
    dictionary = save_dictionary(root / "dictionary", sites(lm))
    return World(root, config, lm, TextConfig(corpus=(str(text_path),)), dictionary)
