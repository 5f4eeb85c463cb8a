"""Activations from TransformerLens and nnsight, block by block, for `IteratorSource`.

Takes those libraries' model objects and imports neither: each function uses two or three of their methods.
Checked against the real packages by scripts/check_wrappers.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.errors import HookpointError, ShapeError, nearest

__all__ = ["nnsight_rows", "transformer_lens_rows"]


def transformer_lens_rows(
    model: Any, tokens: Iterable[Int[Tensor, "_ _"]], hook: str, *, drop: int = 1
) -> Iterator[Float[Tensor, "_ d_in"]]:
    """What a TransformerLens model computes at a hook, a block of rows for each block of token ids.

    Args:
        model: A HookedTransformer, or a TransformerBridge of later versions.
        tokens: Token ids.
        hook: The hook's name there, e.g. blocks.8.hook_resid_post. Heads are laid side by side.
        drop: Positions left out at the start of each text: attention sinks.

    Raises:
        HookpointError: the model has no such hook.

    Example:
        >>> source = IteratorSource(lambda: transformer_lens_rows(model, batches, "blocks.8.hook_resid_post"))
        >>> train(TrainConfig(n_tokens=1_000_000, out="my/dictionary"), source=source)  # doctest: +SKIP
    """
    if hook not in model.hook_dict:
        raise HookpointError("a hook must be one of the model's", repr(hook), nearest(hook, model.hook_dict))
    block = re.match(r"blocks\.(\d+)\.", hook)
    stop = {} if block is None else {"stop_at_layer": int(block[1]) + 1}  # the layers above are not needed
    for ids in tokens:
        with torch.no_grad():
            _, cache = model.run_with_cache(ids, names_filter=hook, return_type=None, **stop)
        yield _rows(cache[hook], ids, drop)


def nnsight_rows(
    model: Any,
    tokens: Iterable[Int[Tensor, "_ _"]],
    module: str,
    *,
    side: str = "output",
    drop: int = 1,
) -> Iterator[Float[Tensor, "_ d_in"]]:
    """What a model wrapped by nnsight computes at a module, a block of rows for each block of token ids.

    Args:
        model: An nnsight LanguageModel or NNsight.
        tokens: Token ids.
        module: The module's path in it, e.g. model.layers.8. Of a module that gives several tensors, the first.
        side: Its `output` or its `input`.
        drop: Positions left out at the start of each text: attention sinks.

    Raises:
        HookpointError: the model has no such module.

    Example:
        >>> source = IteratorSource(lambda: nnsight_rows(model, batches, "model.layers.8"))
        >>> train(TrainConfig(n_tokens=1_000_000, out="my/dictionary"), source=source)  # doctest: +SKIP
    """
    try:
        place = functools.reduce(
            lambda held, name: held[int(name)] if name.isdigit() else getattr(held, name),
            module.split("."),
            model,
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        raise HookpointError(
            "a module must be a path in the model", repr(module), "Print the model to see its modules."
        ) from None
    for ids in tokens:
        with torch.no_grad(), model.trace(ids):
            if side == "output":
                saved = place.output.save()
            else:
                saved = place.input.save()
        yield _rows(saved[0] if isinstance(saved, tuple) else saved, ids, drop)


def _rows(acts: Tensor, ids: Int[Tensor, "batch position"], drop: int) -> Float[Tensor, "rows d_in"]:
    if acts.shape[:2] != ids.shape:
        raise ShapeError(
            f"activations must have an axis for texts and one for positions, {tuple(ids.shape)}",
            tuple(acts.shape),
            "Read another place, or pass token ids of shape (texts, positions).",
        )
    rows = acts.flatten(2)[:, drop:]
    return rows.reshape(-1, rows.shape[-1])
