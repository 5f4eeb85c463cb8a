"""Asks the real TransformerLens and nnsight, where they are installed, for what sememe.source reads from them.

A tiny Llama with random weights, on this machine alone: each library's rows must be what the model itself computes at
that place, and a dictionary must train on them. Neither package is needed by `make test`, so they have an environment
of their own, which sees Sememe's packages behind its own ones:

    make wrappers-check
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sememe.source import IteratorSource, nnsight_rows, transformer_lens_rows
from sememe.train import TrainConfig, train

D, LAYER, VOCABULARY = 32, 1, 97
IDS = torch.randint(3, VOCABULARY, (40, 4, 16), generator=torch.Generator().manual_seed(0))


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def expected(hf: LlamaForCausalLM) -> Tensor:
    """After the layer, without position 0, by the model's own account."""
    states = [hf(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1] for ids in IDS]
    return torch.cat([state[:, 1:].reshape(-1, D) for state in states])


def from_transformer_lens(hf: LlamaForCausalLM) -> Iterator[Tensor]:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(
        copy.deepcopy(hf),
        "LlamaForCausalLM",
        hf_config=copy.deepcopy(hf.config),
        tokenizer=None,
        device="cpu",
    )
    bridge.enable_compatibility_mode(no_processing=True)  # the hooks' old names, the weights as they are
    return transformer_lens_rows(bridge.eval(), IDS, f"blocks.{LAYER}.hook_resid_post")


def from_nnsight(hf: LlamaForCausalLM) -> Iterator[Tensor]:
    from nnsight import NNsight

    return nnsight_rows(NNsight(hf), IDS, f"model.layers.{LAYER}")


def check(package: str, rows: Callable[[LlamaForCausalLM], Iterator[Tensor]]) -> bool:
    """Whether the package was there and gave what the model gives."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        print(f"{package}: not installed")
        return False
    hf = model()
    wanted, found = expected(hf), torch.cat(list(rows(hf)))
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    with tempfile.TemporaryDirectory() as place:
        config = TrainConfig.build(
            {
                "out": Path(place) / "dictionary",
                "architecture": {"kind": "topk", "k": 4, "d_sae": 64},
                "n_tokens": 8192,
                "batch_size": 128,
            }
        )
        dictionary = train(config, source=IteratorSource(lambda: rows(hf), buffer_rows=2048))
        with torch.no_grad():
            recon = dictionary(wanted)
        fvu = float((recon - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    ok = difference < 1e-5 and fvu < 0.9
    print(
        f"{package} {importlib.metadata.version(package)}: {tuple(found.shape)} rows, largest relative difference "
        f"{difference:.1e}, fvu of a dictionary trained on them {fvu:.3f}: {'as it should be' if ok else 'WRONG'}"
    )
    return ok


if __name__ == "__main__":
    results = [check("transformer-lens", from_transformer_lens), check("nnsight", from_nnsight)]
    sys.exit(0 if all(results) else 1)
