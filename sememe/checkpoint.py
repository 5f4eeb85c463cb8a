"""Exact training state in one file, complete or absent. Knows tensors and numbers, not what they mean.

A checkpoint is a safetensors file whose metadata holds the numbers as JSON, and whose name holds its own hash:
`checkpoint-000600-1a2b3c4d5e6f7a8b.safetensors`. The newest replaces the one before it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sememe.artifact import file_sha256
from sememe.errors import CorruptError

__all__ = ["load_checkpoint", "save_checkpoint"]


def _flatten(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in state.items():
        name = prefix + key
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().contiguous()
        elif isinstance(value, dict):
            inner_tensors, inner_numbers = _flatten(value, name + "/")
            tensors |= inner_tensors
            numbers |= inner_numbers
        else:
            numbers[name] = value
    return tensors, numbers


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, key = name.split("/")
        target = state
        for group in groups:
            target = target.setdefault(group, {})
        target[key] = value
    return state


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state, then remove older checkpoints.

    Args:
        folder: Where.
        step: Training steps done.
        state: Nested dictionaries of tensors, numbers and strings; keys without "/".
    """
    folder = Path(folder)
    aside = folder / "checkpoint.tmp"
    tensors, numbers = _flatten(state)
    save_file(tensors, aside, metadata={"numbers": json.dumps(numbers)})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    path = folder / f"checkpoint-{step:09}-{file_sha256(aside)[:16]}.safetensors"
    older = [p for p in folder.glob("checkpoint-*.safetensors") if p != path]
    aside.replace(path)
    for old in older:
        old.unlink()
    return path


def load_checkpoint(folder: str | Path) -> dict[str, Any] | None:
    """The newest state in a folder, or None.

    Raises:
        CorruptError: the file is truncated or was changed.
    """
    paths = sorted(Path(folder).glob("checkpoint-*.safetensors"))
    if not paths:
        return None
    path = paths[-1]
    expected = path.stem.rsplit("-", 1)[-1]
    found = file_sha256(path)[:16]
    if found != expected:
        raise CorruptError(
            f"the checkpoint {path} must have SHA-256 {expected}",
            found,
            "It was truncated or changed; delete it to start this training again.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            flat: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            flat |= json.loads(file.metadata()["numbers"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"{path} must be a checkpoint", str(error), "Delete it to start this training again."
        ) from None
    return _unflatten(flat)
