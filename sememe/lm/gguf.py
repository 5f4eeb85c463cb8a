"""Read a GGUF file as a Hugging Face model. Knows the file format; never downloads anything.

Llama, Qwen2, Qwen3 and Gemma 3 files are read here, with the pre-tokenizer that the file names (transformers
takes GPT-2's for every byte-level vocabulary, which splits digits differently). Other architectures go through
transformers' own reader, which needs accelerate.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from sememe.errors import CorruptError, ModelError, ResourceError

__all__ = ["read_gguf", "read_gguf_config"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How each pre-tokenizer named in GGUF files splits text: digits one by one, or by a pattern, or as GPT-2 does.
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
_AS_GPT2 = ("gpt-2", "default", "phi-2", "olmo", "jina-en", "mpt", "exaone")

# The names of a layer's tensors there and here.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma 3 has a norm before and one after each block.
_LAYER_OF_GEMMA = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_KINDS = ("llama", "qwen2", "qwen3", "gemma3")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NORMAL, _CONTROL = 1, 3


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and the tokenizer of a GGUF file, dequantised.

    Raises:
        CorruptError: the file is not GGUF, or is truncated.
        ModelError: the architecture, or a variant of it, cannot be read faithfully.
        ResourceError: the architecture needs accelerate, which is not installed.
    """
    reader = _open(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    kind = str(fields.get("general.architecture"))
    if kind not in _KINDS:
        return _through_transformers(path, kind, dtype)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_variant(path, kind, fields, tensors)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _hf_config(fields, kind, tensors)
    state = {}
    for name, tensor in tensors.items():
        weight = _dequantised(tensor)
        if kind == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
            # llama.cpp interleaves the two halves of each rotary pair.
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            weight = weight.view(heads, -1, 2, weight[0].numel()).transpose(1, 2).reshape(weight.shape)
        if kind == "gemma3" and name.endswith("norm.weight"):
            # llama.cpp stores what the norm multiplies by, which is 1 + the model's weight.
            weight = weight - 1
        state[_name(name, path, _LAYER_OF_GEMMA if kind == "gemma3" else _LAYER)] = weight.to(dtype)
    hf, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise ModelError(
            f"{path} must hold exactly the tensors of a {kind} model",
            f"missing or unexpected: {', '.join(sorted(wrong)[:3])}",
            "Load the Hugging Face folder of this model.",
        )
    return hf.eval(), _tokenizer(path, fields)


def read_gguf_config(path: Path) -> Any:
    """The model's config alone; no tensor is read.

    Raises:
        CorruptError: the file is not GGUF, or is truncated.
        ModelError: its architecture is not one of those read here.
    """
    reader = _open(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if "tokens" not in key}
    kind = str(fields.get("general.architecture"))
    if kind not in _KINDS:
        raise ModelError(
            f"the config of {path} must be of a known architecture", repr(kind), "Give the model's folder."
        )
    return _hf_config(fields, kind, {tensor.name: tensor for tensor in reader.tensors})


def _hf_config(fields: dict[str, Any], kind: str, tensors: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model("gemma3_text" if kind == "gemma3" else kind, **_config(fields, kind, tensors))


def _check_variant(path: Path, kind: str, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    scaled = "rope_freqs.weight" in tensors or fields.get(f"{kind}.rope.scaling.type", "none") != "none"
    experts = fields.get(f"{kind}.expert_count", 0)
    if scaled or experts:
        raise ModelError(
            f"{path} must be a dense model with plain rotary positions",
            "a mixture of experts" if experts else "scaled positions",
            "Load the Hugging Face folder of this model.",
        )


def _open(path: Path) -> Any:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        if reader.tensors and end <= path.stat().st_size:
            return reader
        found = f"{path.stat().st_size} bytes"
    except Exception as error:  # the reader raises whatever it stumbles over
        found = f"{type(error).__name__}: {error}"
    raise CorruptError(f"{path} must be a complete GGUF file", found, "Download it again.")


def _config(fields: dict[str, Any], kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{kind}.{key}", default)

    heads, width = int(get("attention.head_count")), int(get("embedding_length"))
    token = {f"{n}_token_id": fields.get(f"tokenizer.ggml.{g}_token_id") for n, g in _SPECIALS.items()}
    head_dim = int(get("attention.key_length", width // heads))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10000.0))}
    more: dict[str, Any] = {}
    if kind == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(get("rope.local.freq_base", 10000.0))}
        rope = {"full_attention": rope, "sliding_attention": local}
        more = {"sliding_window": int(get("attention.sliding_window")), "query_pre_attn_scalar": head_dim}
    return {
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        **{k: int(v) for k, v in token.items() if v is not None and k != "unk_token_id"},
        **more,
    }


_SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _dequantised(tensor: Any) -> Tensor:
    import gguf

    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(
        np.array(values, dtype=np.float32).reshape(tuple(reversed(tensor.shape.tolist())))
    )


def _name(name: str, path: Path, layer_names: dict[str, str]) -> str:
    head, _, rest = name.partition(".")
    if head == "blk":
        layer, part, end = rest.split(".")
        if part in layer_names:
            return f"model.layers.{layer}.{layer_names[part]}.{end}"
    elif head in _TOP:
        return f"{_TOP[head]}.{rest}"
    raise ModelError(
        f"{path} must hold only tensors that are known", name, "Load the Hugging Face folder of this model."
    )


def _tokenizer(path: Path, fields: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    pre = fields.get("tokenizer.ggml.pre", "default")
    known = pre in (*_DIGITS_FIRST, *_PATTERNS, *_AS_GPT2)
    if fields.get("tokenizer.ggml.model") != "gpt2" or not known:
        if fields.get("tokenizer.ggml.model") == "gpt2":
            raise ModelError(
                f"the pre-tokenizer of {path} must be a known one",
                repr(pre),
                "Load the Hugging Face folder of this model.",
            )
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)
    if pre in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    elif pre in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of])
    else:
        backend.pre_tokenizer = bytes_of
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    backend.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind not in (_NORMAL, _CONTROL)
        ]
    )
    special = {
        f"{ours}_token": tokens[int(fields[f"tokenizer.ggml.{theirs}_token_id"])]
        for ours, theirs in _SPECIALS.items()
        if f"tokenizer.ggml.{theirs}_token_id" in fields
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=int(fields[f"{fields['general.architecture']}.context_length"]),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _through_transformers(path: Path, kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if importlib.util.find_spec("accelerate") is None:
        raise ResourceError(
            f"reading a GGUF file of the architecture {kind!r} needs the package accelerate",
            "none installed",
            "pip install accelerate, or load the Hugging Face folder of this model.",
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        hf = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **where)
        return hf.eval(), AutoTokenizer.from_pretrained(path.parent, **where)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(
            f"{path} must be a GGUF file that transformers reads",
            f"{kind!r} ({error})",
            "Load the Hugging Face folder of this model.",
        ) from error
