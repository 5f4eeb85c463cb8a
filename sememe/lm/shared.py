"""Rows that go on from the same contexts, over one copy of each context's keys. Knows attention; nothing of layers.

Where many rows of a batch go on from few contexts, copying a context's keys and values for each of them takes longer
than the products of attention. Here the queries of all rows of a context stand side by side in one attention, over
that context's keys and then the new keys of all those rows; a mask leaves each query its own row's past.

Only for attention that is a softmax over all earlier tokens and asks transformers for an implementation of it, as
most models' is. `supports` and a trial (`LanguageModel.shares`) tell; other models go on from copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Plan", "attending", "plan_of", "supports"]

NAME = "sememe_shared"
"""What transformers knows this attention by."""
OTHER = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Arguments of an attention that is more than a softmax over all earlier tokens."""
PACKED = 4
"""Queries of a context side by side, in tokens of its past, up to which one attention is quicker than copies."""


class Plan:
    """Which row stands where.

    Args:
        rows: The context of each row.
        lengths: The tokens of it that stand before each row's first new one.
        n_new: New tokens of each row.
    """

    def __init__(self, rows: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"], n_new: int) -> None:
        self.contexts, self.context = torch.unique(rows, return_inverse=True)
        counts = torch.bincount(self.context)
        self.n_slots, self.n_new, self.n_before = int(counts.max()), n_new, int(lengths.max())
        # A row's place among those of its context: its place in the order by context, from the context's first on.
        order = torch.argsort(self.context, stable=True)
        first = torch.cumsum(counts, 0) - counts
        self.slot = torch.empty_like(self.context)
        self.slot[order] = torch.arange(len(rows)) - first[self.context[order]]
        self.lengths = lengths
        self._biases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def mask(self) -> Bool[Tensor, "contexts queries keys"]:
        """What each query may look at: its row's past, and its row's new tokens up to itself."""
        n_contexts = len(self.contexts)
        past = torch.zeros(n_contexts, self.n_slots, self.n_before, dtype=torch.bool)
        past[self.context, self.slot] = torch.arange(self.n_before) < self.lengths[:, None]
        past = past.repeat_interleave(self.n_new, dim=1)
        # Places without a row see themselves: a softmax over nothing is no number.
        own = torch.ones(self.n_new, self.n_new, dtype=torch.bool).tril()
        new = torch.kron(torch.eye(self.n_slots, dtype=torch.bool), own).expand(n_contexts, -1, -1)
        return torch.cat([past, new], dim=2)

    def bias(self, n_groups: int, like: Tensor) -> Float[Tensor, "contexts 1 grouped_queries keys"]:
        """The mask as what is added, once for each of the query heads that share a head of keys."""
        about = (n_groups, like.dtype, like.device)
        if about not in self._biases:
            mask = self.mask()
            bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).to(like.device, like.dtype)
            self._biases[about] = bias.repeat(1, n_groups, 1)[:, None]
        return self._biases[about]

    def packed(
        self, past: Float[Tensor, "batch heads seq d"], new: Float[Tensor, "rows heads new d"]
    ) -> Float[Tensor, "contexts heads keys d"]:
        """Keys or values: those of each context, then the new ones of all its rows."""
        _, n_heads, _, d = past.shape
        n_queries = self.n_slots * self.n_new
        found = past.new_zeros(len(self.contexts), n_heads, self.n_before + n_queries, d)
        found[:, :, : self.n_before] = past[self.contexts.to(past.device), :, : self.n_before]
        slots = found[:, :, self.n_before :].view(-1, n_heads, self.n_slots, self.n_new, d)
        slots[self.context.to(past.device), :, self.slot.to(past.device)] = new
        return found

    def attend(
        self,
        query: Float[Tensor, "rows heads new d"],
        keys: Float[Tensor, "contexts key_heads keys d"],
        values: Float[Tensor, "contexts key_heads keys d_value"],
        scale: float | None,
    ) -> Float[Tensor, "rows new heads d_value"]:
        """Softmax attention of every row's new tokens; keys and values are packed."""
        n_rows, n_heads, n_new, d = query.shape
        n_contexts, key_heads = keys.shape[:2]
        n_groups = n_heads // key_heads
        context, slot = self.context.to(query.device), self.slot.to(query.device)
        side = query.new_zeros(n_contexts, key_heads, n_groups, self.n_slots, n_new, d)
        side[context, :, :, slot] = query.view(n_rows, key_heads, n_groups, n_new, d)
        out = torch.nn.functional.scaled_dot_product_attention(
            side.flatten(2, 4), keys, values, attn_mask=self.bias(n_groups, query), scale=scale
        )
        out = out.view(n_contexts, key_heads, n_groups, self.n_slots, n_new, -1)[context, :, :, slot]
        return out.flatten(1, 2).transpose(1, 2).contiguous()


def plan_of(rows: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"], n_new: int) -> Plan | None:
    """A plan; None where so many new tokens would stand side by side that copies are quicker."""
    if not len(rows):
        return None
    plan = Plan(rows, lengths, n_new)
    return plan if plan.n_slots * n_new <= PACKED * max(plan.n_before, 1) else None


def supports(config: Any) -> bool:
    """Whether a model's attention looks at all earlier tokens, as far as its config tells."""
    kinds = getattr(config, "layer_types", None) or ()
    if any(kind != "full_attention" for kind in kinds):
        return False
    limited = ("attention_chunk_size",) if kinds else ("attention_chunk_size", "sliding_window")
    return not any(getattr(config, name, None) for name in limited)


_running: list[Plan] = []
"""The plan of the forward that runs, last; attention is told of nothing that it could be passed in."""


@contextlib.contextmanager
def attending(config: Any, plan: Plan) -> Iterator[None]:
    """Inside the context a model's attention follows the plan; its cache gives packed keys and values."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)  # not for masks: none is made then
    before = config._attn_implementation
    config._attn_implementation = NAME
    _running.append(plan)
    try:
        yield
    finally:
        _running.pop()
        config._attn_implementation = before


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it."""
    other = [name for name in OTHER if more.get(name) is not None]
    if other or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(other) or 'a mask'}")
    return _running[-1].attend(query, key, value, scaling), None
