"""A tiny random language model, its corpus and store, and dictionaries of it: what the tests of `evaluate` stand on."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sememe import dictionaries
from sememe import lm as language_models
from sememe.dictionaries.base import Site, Sites
from sememe.dictionaries.identity import Identity, IdentityConfig
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.evaluate import EvaluateConfig
from sememe.harvest import HarvestConfig, harvest
from sememe.lm import LanguageModel, ModelConfig
from sememe.text import TextConfig, TokenPolicy

WORDS = {
    "english": "the cat sat on a mat while seven old ships sailed home and nobody knew why it rained",
    "german": "der Hund lief durch einen dunklen Wald und niemand wusste warum es so still war",
}
POLICY = TokenPolicy(context_length=16, drop_positions=1, max_norm_ratio=5.0)
D = 24
HOOKPOINT = "resid_post.1"


class World(NamedTuple):
    """Folders and the model of everything below."""

    place: Path
    corpus: Path
    lm: LanguageModel
    store: Path


def make_world(place: Path) -> World:
    """The corpus, the model and a store of it, below a folder."""
    corpus = _corpus(place)
    lm = language_models.load(ModelConfig(model=_model(place, corpus), dtype="float32"))
    return World(place, corpus, lm, _store(place, corpus, lm))


def _corpus(place: Path) -> Path:
    rng = random.Random(0)
    path = place / "corpus.jsonl"
    lines = []
    for number in range(240):
        language = ("english", "german")[number % 3 == 0]
        words = rng.choices(WORDS[language].split(), k=rng.randint(20, 60))
        lines.append(json.dumps({"text": " ".join(words) + f" {number}.", "language": language}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _model(place: Path, corpus: Path) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(corpus)], trainer)
    folder = place / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def text_config(corpus: Path, **changes: object) -> TextConfig:
    return TextConfig.build({"corpus": (str(corpus),), "heldout_fraction": 0.3, **changes})


def _store(place: Path, corpus: Path, lm: LanguageModel) -> Path:
    config = HarvestConfig(
        out=place / "store",
        model=ModelConfig(model="unused"),
        text=text_config(corpus),
        policy=POLICY,
        hookpoints=(HOOKPOINT, "mlp_in.2", "mlp_out.2"),
        n_tokens=3000,
        batch_rows=8,
        shard_contexts=64,
    )
    harvest(config, lm=lm)
    return place / "store"


def site(
    lm: LanguageModel, hookpoint: str = HOOKPOINT, max_norm: float | None = None, start: int = 0
) -> Site:
    width = lm.width(hookpoint)
    return Site(
        model=lm.name,
        model_fingerprint=lm.fingerprint,
        hookpoint=hookpoint,
        start=start,
        stop=start + width,
        max_norm=max_norm,
    )


def autoencoder(lm: LanguageModel, hookpoint: str = HOOKPOINT, max_norm: float | None = None) -> Sites:
    sites = (site(lm, hookpoint, max_norm),)
    return Sites(inputs=sites, outputs=sites)


def save(dictionary: dictionaries.Dictionary, path: Path, **extra: object) -> Path:
    rows = torch.randn(16, dictionary.d_in, generator=torch.Generator().manual_seed(0))
    dictionary.save(path, rows, extra={"policy": POLICY.resolved(), **extra})
    return path


def identity(lm: LanguageModel, path: Path, sites: Sites | None = None) -> Path:
    sites = sites or autoencoder(lm)
    d = sites.inputs[-1].stop
    return save(Identity.rebuild(IdentityConfig().resolved(), d, d, d, sites), path)


def zeros(
    lm: LanguageModel, path: Path, sites: Sites | None = None, bias: torch.Tensor | None = None
) -> Path:
    """A TopK dictionary that reconstructs everything as its bias."""
    sites = sites or autoencoder(lm)
    dictionary = TopK(TopKConfig(k=2, d_sae=8), sites.inputs[-1].stop, sites.outputs[-1].stop, 8, sites)
    if bias is not None:
        dictionary.b_dec.data.copy_(bias)
    return save(dictionary, path)


def config_for(dictionary: Path, corpus: Path, out: Path, **changes: object) -> EvaluateConfig:
    return EvaluateConfig.build(
        {
            "dictionary": dictionary,
            "out": out,
            "model": {"model": "unused"},
            "text": text_config(corpus),
            "n_tokens": 1200,
            "n_fit_rows": 1000,
            "batch_rows": 4,
            "n_bootstrap": 50,
            **changes,
        }
    )
