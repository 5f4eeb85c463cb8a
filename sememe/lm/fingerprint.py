"""A hash that tells models apart, quick even for models of many gigabytes. Knows files and tensors.

Of each weight file it takes the size, the head and 64 blocks of 4 KB spread evenly: two trainings differ in
nearly all of them. It tells versions apart; it does not prove that no bit flipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sememe.config import sha256_of

__all__ = ["of_files", "of_module"]

_BLOCK, _N_BLOCKS, _HEAD = 4096, 64, 1 << 20
# What differs between equal models: who saved them, where from, in which dtype they are run.
_VOLATILE = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
    "use_cache",
)


def of_files(weights: Sequence[Path], config: Path | None, tokenizers: Sequence[Path]) -> str:
    """Of a model on disk: its config, its tokenizer's files, and samples of each weight file."""
    settings = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
    return sha256_of(
        {
            "config": _config(settings),
            "tokenizer": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tokenizers},
            "weights": {file.name: _sample(file) for file in weights},
        }
    )


def of_module(module: nn.Module, config: Any, tokenizer: Any) -> str:
    """Of a model in memory: config, tokenizer, and up to 1,024 values of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in module.state_dict().items():
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), 1024), dtype=torch.float64)
        values = flat[at.long().to(flat.device)].double().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    weights = digest.hexdigest()
    return sha256_of(
        {"config": _config(config.to_dict()), "tokenizer": _tokenizer(tokenizer), "weights": weights}
    )


def _sample(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        # safetensors keeps names, shapes and dtypes at the head, GGUF its metadata.
        digest.update(handle.read(min(_HEAD, size)))
        for i in range(_N_BLOCKS):
            handle.seek(max(size - _BLOCK, 0) * i // (_N_BLOCKS - 1))
            digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def _config(settings: dict[str, Any]) -> str:
    values = {k: v for k, v in settings.items() if k not in _VOLATILE}
    return hashlib.sha256(repr(sorted((k, repr(v)) for k, v in values.items())).encode()).hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = repr(sorted(tokenizer.get_vocab().items())) if tokenizer is not None else ""
    else:
        text = backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()
