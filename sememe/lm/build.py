"""New language models and tokenizers: from a few numbers to standard Hugging Face objects, and onto disk.

Knows which shapes there are and how they are spelt in Hugging Face configurations, so that every tool loads
what comes out. Knows nothing about how a model is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError, ModelError
from sememe.lm.load import _quiet

__all__ = [
    "PRESETS",
    "GPT2Shape",
    "LlamaShape",
    "Shape",
    "build_causal_lm",
    "load_tokenizer",
    "save_causal_lm",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"


def _check_heads(d_model: int, n_heads: int) -> None:
    if d_model % n_heads:
        raise ConfigError(f"n_heads must divide d_model={d_model}", n_heads, "Change n_heads or d_model.")


class GPT2Shape(Config):
    """GPT-2's blocks: LayerNorm, learned positions, an MLP with one non-linearity."""

    kind: Literal["gpt2"] = "gpt2"
    """Name of the shape."""
    n_layers: int = Field(default=1, ge=1)
    """Blocks."""
    d_model: int = Field(default=256, ge=1)
    """Width of the residual stream."""
    n_heads: int = Field(default=4, ge=1)
    """Attention heads; they share d_model evenly."""
    d_mlp: int | None = Field(default=None, ge=1)
    """Neurons of each MLP; 4 x d_model if not given."""
    activation: Literal["gelu", "relu"] = "gelu"
    """The MLP's non-linearity."""
    tied: bool = True
    """One matrix for embedding and unembedding."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.d_model, self.n_heads)
        return self


class LlamaShape(Config):
    """Llama's blocks: RMSNorm, rotary positions, a gated SwiGLU MLP."""

    kind: Literal["llama"] = "llama"
    """Name of the shape."""
    n_layers: int = Field(default=1, ge=1)
    """Blocks."""
    d_model: int = Field(default=256, ge=1)
    """Width of the residual stream."""
    n_heads: int = Field(default=4, ge=1)
    """Attention heads; they share d_model evenly."""
    n_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads; as many as n_heads if not given."""
    d_mlp: int | None = Field(default=None, ge=1)
    """Neurons of each MLP; 8/3 x d_model, rounded up to a multiple of 32, if not given."""
    tied: bool = True
    """One matrix for embedding and unembedding."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.d_model, self.n_heads)
        if self.d_model // self.n_heads % 2:
            raise ConfigError(
                "d_model / n_heads must be even for rotary positions",
                self.d_model // self.n_heads,
                "Change d_model or n_heads.",
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_kv_heads must divide n_heads={self.n_heads}", self.n_kv_heads, "Change n_kv_heads."
            )
        return self


Shape = Annotated[GPT2Shape | LlamaShape, Field(discriminator="kind")]
"""The shape of a new model, told apart by `kind`."""

PRESETS: dict[str, GPT2Shape | LlamaShape] = {
    "bricken": GPT2Shape(n_layers=1, d_model=128, n_heads=4, d_mlp=512, activation="relu"),
    "shehper": GPT2Shape(n_layers=1, d_model=128, n_heads=4, d_mlp=512, activation="gelu"),
    "nanda": GPT2Shape(n_layers=1, d_model=512, n_heads=8, d_mlp=2048, activation="gelu", tied=False),
}
"""The one-layer models of earlier work: "Towards Monosemanticity", its replication by shehper, and gelu-1l."""


def build_causal_lm(
    shape: GPT2Shape | LlamaShape, *, vocab_size: int, context_length: int, end_of_text: int | None, seed: int
) -> Any:
    """A Hugging Face causal language model with random float32 weights; the global random state is left alone.

    Args:
        shape: Its layers.
        vocab_size: Tokens, the tokenizer's specials included.
        context_length: Most positions.
        end_of_text: The token between documents, stored as beginning and end of sequence.
        seed: Of the weights.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": shape.tied,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(shape, GPT2Shape):
            return GPT2LMHeadModel(
                GPT2Config(
                    n_layer=shape.n_layers,
                    n_embd=shape.d_model,
                    n_head=shape.n_heads,
                    n_inner=shape.d_mlp or 4 * shape.d_model,
                    n_positions=context_length,
                    activation_function="gelu_new" if shape.activation == "gelu" else "relu",
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    **common,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=shape.n_layers,
                hidden_size=shape.d_model,
                num_attention_heads=shape.n_heads,
                num_key_value_heads=shape.n_kv_heads or shape.n_heads,
                intermediate_size=shape.d_mlp or -(-8 * shape.d_model // 3 // 32) * 32,
                max_position_embeddings=context_length,
                **common,
            )
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer: every text has tokens, and decoding gives it back byte for byte.

    Args:
        texts: What to learn merges from; read once.
        vocab_size: Tokens in all, the 256 bytes and the end-of-text token included. Little text may give fewer.
    Raises:
        ConfigError: vocab_size has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ConfigError(
            "vocab_size must be >= 257 (256 bytes and the end-of-text token)", vocab_size, "Raise vocab_size."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer from a folder or the hub.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            "a tokenizer must be a folder or a name on the Hugging Face hub",
            f"{name!r} ({str(error).splitlines()[0]})",
            "Check the name, or leave it out to train a tokenizer on the corpus.",
        ) from None


def save_causal_lm(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a Hugging Face folder with safetensors and the tokenizer."""
    with _quiet():
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
