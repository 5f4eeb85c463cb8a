"""Language models of every architecture the tests know, tiny and with random weights: real modules, no download."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sememe.lm import LanguageModel, wrap

VOCAB, D_MODEL, N_LAYERS, CONTEXT = 301, 32, 3, 48

_TEXT = [
    "The cat sat on the mat.",
    "  def f(x):\n    return x + 10\n",
    "Ça coûte 12 €, déjà vu",
    "日本語 и русский",
]


class Architecture(NamedTuple):
    """A model type of transformers, its small configuration, and where layer 1 has what, set by hand.

    `parts` maps an alias to (module path, side).
    """

    kind: str
    config: dict[str, Any]
    parts: dict[str, tuple[str, str]]


_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED = _BASE | {"num_key_value_heads": 2}


def _parts(layer: str, attention: str, last: str, mlp: str, down: str) -> dict[str, tuple[str, str]]:
    return {
        "resid_pre": (layer, "in"),
        "attn_z": (f"{layer}.{attention}.{last}", "in"),
        "attn_out": (f"{layer}.{attention}", "out"),
        "mlp_in": (f"{layer}.{mlp}", "in"),
        "mlp_act": (f"{layer}.{mlp}.{down}", "in"),
        "mlp_out": (f"{layer}.{mlp}", "out"),
        "resid_post": (layer, "out"),
    }


_LLAMA_PARTS = _parts("model.layers.1", "self_attn", "o_proj", "mlp", "down_proj")
_NEOX_PARTS = _parts("gpt_neox.layers.1", "attention", "dense", "mlp", "dense_4h_to_h")
_OPT_PARTS = {
    "resid_pre": ("model.decoder.layers.1", "in"),
    "attn_z": ("model.decoder.layers.1.self_attn.out_proj", "in"),
    "attn_out": ("model.decoder.layers.1.self_attn", "out"),
    "mlp_in": ("model.decoder.layers.1.fc1", "in"),
    "mlp_act": ("model.decoder.layers.1.fc2", "in"),
    "mlp_out": ("model.decoder.layers.1.fc2", "out"),
    "resid_post": ("model.decoder.layers.1", "out"),
}
_OPT = {key: _BASE[key] for key in _BASE if key != "intermediate_size"} | {"ffn_dim": 48, "pad_token_id": 1}

# What the project promises.
ARCHITECTURES = {
    "gpt2": Architecture(
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": CONTEXT}
        | {"bos_token_id": 0, "eos_token_id": 0},
        _parts("transformer.h.1", "attn", "c_proj", "mlp", "c_proj"),
    ),
    "gpt_neox": Architecture("gpt_neox", _BASE, _NEOX_PARTS),
    "gpt_neox_sequential": Architecture("gpt_neox", _BASE | {"use_parallel_residual": False}, _NEOX_PARTS),
    "llama": Architecture("llama", _GROUPED, _LLAMA_PARTS),
    "mistral": Architecture("mistral", _GROUPED | {"sliding_window": 4}, _LLAMA_PARTS),
    "qwen3": Architecture("qwen3", _GROUPED | {"head_dim": 8}, _LLAMA_PARTS),
    "gemma3": Architecture(
        "gemma3_text",
        _GROUPED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
        _LLAMA_PARTS,
    ),
    "opt": Architecture("opt", _OPT | {"word_embed_proj_dim": D_MODEL}, _OPT_PARTS),
    "opt_post_norm": Architecture(
        "opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, _OPT_PARTS
    ),
    "phi": Architecture("phi", _BASE, _parts("model.layers.1", "self_attn", "dense", "mlp", "fc2")),
    "mamba": Architecture(
        "mamba",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "state_size": 4}
        | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        {"resid_pre": ("backbone.layers.1", "in"), "resid_post": ("backbone.layers.1", "out")},
    ),
}

# Others that do something of their own: add in place (Falcon), add the residual inside a block (BLOOM), scale or
# cap the logits (Cohere, Granite, Gemma 2), route tokens (Mixtral).
MORE = {
    "falcon": Architecture(
        "falcon",
        {key: _BASE[key] for key in _BASE if key not in ("intermediate_size", "max_position_embeddings")},
        _parts("transformer.h.1", "self_attention", "dense", "mlp", "dense_4h_to_h"),
    ),
    "bloom": Architecture(
        "bloom",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}
        | {"bos_token_id": 0, "eos_token_id": 0},
        _parts("transformer.h.1", "self_attention", "dense", "mlp", "dense_4h_to_h")
        | {
            "attn_out": ("transformer.h.1.self_attention.dense", "out"),
            "mlp_out": ("transformer.h.1.mlp.dense_4h_to_h", "out"),
        },
    ),
    "gemma2": Architecture("gemma2", _GROUPED | {"head_dim": 8}, _LLAMA_PARTS),
    "cohere": Architecture("cohere", _GROUPED, _LLAMA_PARTS),
    "granite": Architecture("granite", _GROUPED | {"logits_scaling": 4.0}, _LLAMA_PARTS),
    "mixtral": Architecture(
        "mixtral",
        _GROUPED | {"num_local_experts": 4},
        {alias: place for alias, place in _LLAMA_PARTS.items() if alias != "mlp_act"},
    ),
}


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with one special token, <|end|>, of id 0."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


def tiny_hf(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A Hugging Face model with weights large enough that every part matters."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    architecture = (ARCHITECTURES | MORE)[name]
    config = AutoConfig.for_model(architecture.kind, **(architecture.config | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in hf.named_parameters():
            if not parameter_name.endswith(("A_log", "dt_proj.bias")):
                torch.nn.init.normal_(parameter, std=0.2)
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.data.add_(1.0)
    return hf.to(dtype).eval()


def tiny_lm(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> LanguageModel:
    """The same as a LanguageModel."""
    return wrap(tiny_hf(name, dtype, seed, **changes), tiny_tokenizer(), name)
