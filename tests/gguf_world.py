"""A tiny model as a GGUF file, and the forms of text that pre-tokenizers cut differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import tiny_hf, tiny_tokenizer

CODES = ["digits 123 4567, and\n        0 indented", "  two  spaces", "Ça coûte 12 €", "I'll see y'all"]


def write_gguf(
    path: Path, name: str, pre: str = "smollm", quant: Any = gguf.GGMLQuantizationType.F32, **more: Any
) -> Path:
    """A tiny model as llama.cpp's converter writes it."""
    kind = {"gemma3": "gemma3"}.get(name, name)
    changes = {"final_logit_softcapping": None, "query_pre_attn_scalar": 8} if name == "gemma3" else {}
    hf, tokenizer = tiny_hf(name, tie_word_embeddings=name == "gemma3", **changes), tiny_tokenizer()
    config = hf.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokenizer) - 1), *[4] * (config.vocab_size - len(tokenizer))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    for key, value in more.items():
        writer.add_string(f"{kind}.{key}", value) if isinstance(value, str) else writer.add_uint32(
            f"{kind}.{key}", value
        )
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm" if name == "gemma3" else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        **{f"{p}_proj": f"attn_{p}" for p in "qkv"},
        **{f"{p}_norm": f"attn_{p}_norm" for p in "qk"},
        "o_proj": "attn_output",
        **{f"{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
    }
    for key, value in hf.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = key.split(".")
        target = f"blk.{parts[2]}.{inner[parts[-2]]}" if "layers" in parts else names[parts[-2]]
        weight = value
        if name == "llama" and parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            weight = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        if name == "gemma3" and parts[-2].endswith("norm"):
            weight = value + 1
        array = weight.numpy().astype(np.float32)
        if array.ndim == 2 and array.shape[1] % 32 == 0 and quant != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{target}.{parts[-1]}", gguf.quants.quantize(array, quant), raw_dtype=quant)
        else:
            writer.add_tensor(f"{target}.{parts[-1]}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
