"""Tiny models whose circuits are known, and dictionaries in them: what the tests of traces share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny_models import D_MODEL, tiny_hf, tiny_tokenizer
from torch import nn

from sememe import artifact, atlas
from sememe import lm as language_models
from sememe.config import Config
from sememe.dictionaries import ReLU, ReLUConfig, Site, Sites, TopK, TopKConfig
from sememe.lm import LanguageModel
from sememe.text import TokenPolicy
from sememe.trace import (
    Setting,
    at_places,
    inputs_of,
    of_logits,
    prepare,
)
from sememe.trace.places import Placed

N, K = 96, 8
POLICY = TokenPolicy(context_length=32, drop_positions=0, drop_special=False)
PROMPT, OTHER = "The cat sat on", "The mat sat on"


# -- worlds ------------------------------------------------------------------------------------------


def linear_lm(seed: int = 0) -> LanguageModel:
    """A Llama whose norms are gone, whose attention looks at all earlier tokens alike, and whose MLPs are matrices."""
    hf = tiny_hf("llama", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in hf.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.mlp = nn.Linear(D_MODEL, D_MODEL, bias=False)
        with torch.no_grad():
            layer.mlp.weight.copy_(0.2 * torch.randn(D_MODEL, D_MODEL, generator=generator))
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
    hf.model.norm = nn.Identity()
    return language_models.wrap(hf.eval(), tiny_tokenizer(), f"linear {seed}")


def by_hand() -> LanguageModel:
    """Token "a" writes 1 into dimension 0; layer 0 adds twice that to dimension 1, layer 1 thrice that to dimension 2,
    from which the logit of token 5 is read. All other tokens write into dimension 3, which nothing reads."""
    lm = linear_lm()
    hf, a = lm.hf, lm.tokenizer("a").input_ids[0]
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        hf.get_input_embeddings().weight[:, 3] = 1.0
        hf.get_input_embeddings().weight[a] = torch.eye(D_MODEL)[0]
        hf.model.layers[0].mlp.weight[1, 0] = 2.0
        hf.model.layers[1].mlp.weight[2, 1] = 3.0
        hf.get_output_embeddings().weight[5, 2] = 1.0
    return language_models.wrap(hf, lm.tokenizer, "by hand")


def sites(lm: LanguageModel, reads: str, writes: str | None = None, max_norm: float | None = None) -> Sites:
    def site(name: str) -> Site:
        return Site(
            model=lm.name,
            model_fingerprint=lm.fingerprint,
            hookpoint=name,
            start=0,
            stop=lm.width(name),
            max_norm=max_norm,
        )

    return Sites(inputs=(site(reads),), outputs=(site(writes or reads),))


def random_topk(
    lm: LanguageModel, reads: str, writes: str | None = None, seed: int = 0, n: int = N, k: int = K
) -> TopK:
    dictionary = TopK(TopKConfig(k=k, d_sae=n), D_MODEL, D_MODEL, n, sites(lm, reads, writes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (dictionary.W_enc, dictionary.W_dec, dictionary.b_dec):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / D_MODEL**0.5)
    return dictionary.eval()


def unit(lm: LanguageModel, hookpoint: str) -> ReLU:
    """Latent i is dimension i where it is positive."""
    dictionary = ReLU(ReLUConfig(d_sae=D_MODEL), D_MODEL, D_MODEL, D_MODEL, sites(lm, hookpoint))
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(D_MODEL))
        dictionary.W_enc.copy_(torch.eye(D_MODEL))
    return dictionary.eval()


def at(lm: LanguageModel, *hookpoints: str, **options: Any) -> tuple[Placed, ...]:
    found = {name: random_topk(lm, name, seed=i, **options) for i, name in enumerate(hookpoints)}
    return at_places(lm, found, policies=dict.fromkeys(hookpoints, POLICY))


def setting(
    lm: LanguageModel,
    places: tuple[Placed, ...],
    ablation: Any = "zero",
    *,
    by_position: bool = True,
    **more: Any,
) -> Setting:
    inputs, patched = inputs_of(lm, [PROMPT], bos=False), inputs_of(lm, [OTHER], bos=False)
    metric = more.pop("metric", None) or of_logits(inputs, lambda z: z[:, 7] - z[:, 9])
    return prepare(
        lm,
        places,
        inputs,
        metric,
        ablation=ablation,
        patched=patched if ablation == "patch" else None,
        by_position=by_position,
        **more,
    )


def write_atlas(path: Path, dictionary: Path, labels: dict[int, str]) -> tuple[Path, Path]:
    """An atlas of nothing, and explanations of it: what graphs take labels from. Written anew where they are there."""
    parents = {"dictionary": artifact.load(dictionary).fingerprint}
    about: dict[str, Any] = {"version": 1, "config": Config(), "fresh": True}
    with artifact.building(path, kind="atlas", parents=parents, **about) as work:
        database = atlas.create(work.path / atlas.DATABASE)
        atlas.set_meta(database, {"labels": list(labels.values())})
        database.close()
    parents = {"atlas": artifact.load(path).fingerprint}
    told = path.with_name(f"{path.name}_told")
    with artifact.building(told, kind="explanations", parents=parents, **about) as work:
        columns = {"latent": pa.array(list(labels), pa.int32()), "label": list(labels.values())}
        pq.write_table(pa.table(columns), work.path / atlas.EXPLANATIONS)
    return path, told
