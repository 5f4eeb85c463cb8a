"""Keys and values that a forward left behind, and forwards that go on from them. Knows caches and nothing of layers.

A row that goes on after the first n tokens of a context reads that context's keys and values instead of computing
its n tokens again. Rows of one batch may go on after different numbers of tokens: the shorter are padded at the
front, as in batched generation (`Prefix`). Or several continuations of a context lie one after the other in a row, and
a mask says what each sees (`Packed`): its keys are then copied once for all of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Packed", "Past", "Prefix"]


class Prefix(NamedTuple):
    """What the rows of one batch go on from."""

    cache: Any
    """The model's cache object."""
    lengths: Int[Tensor, " rows"]
    """Tokens before each row's first new one."""
    n_padded: int
    """Those of the longest: the width of the cache."""

    def mask(self, n_new: int) -> Bool[Tensor, "rows padded_plus_new"] | None:
        """False at the padding in front; None where there is none."""
        if bool((self.lengths == self.n_padded).all()):
            return None
        before = torch.arange(self.n_padded) >= (self.n_padded - self.lengths)[:, None]
        return torch.cat([before, torch.ones(before.shape[0], n_new, dtype=torch.bool)], dim=1)

    def positions(self, n_new: int, context_length: int | None) -> Int[Tensor, "rows new"]:
        """Of the new tokens; what fills a row up may lie past the model's context and gets its last position."""
        found = self.lengths[:, None] + torch.arange(n_new)
        return found if context_length is None else found.clamp(max=context_length - 1)


class Packed(NamedTuple):
    """What the rows of one batch go on from where each holds several continuations of a context.

    A new token sees the first tokens of the context, up to where its own continuation goes on, and of the new ones
    those of that continuation up to itself.
    """

    cache: Any
    """The model's cache object."""
    lengths: Int[Tensor, "rows new"]
    """Tokens of the context before each new token's continuation."""
    first: Int[Tensor, "rows new"]
    """Where in the row that continuation begins."""
    n_context: int
    """Tokens of the contexts that are kept: the width of the cache."""

    def mask(self, n_new: int) -> Float[Tensor, "rows 1 new context_plus_new"]:
        """What is added to attention's scores: 0 at what is seen, minus infinity elsewhere."""
        own = torch.arange(n_new)
        before = torch.arange(self.n_context) < self.lengths[:, :, None]
        among = (own >= self.first[:, :, None]) & (own <= own[:, None])
        seen = torch.cat([before, among], dim=2)[:, None]
        return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    def positions(self, n_new: int, context_length: int | None) -> Int[Tensor, "rows new"]:
        """Of the new tokens; as for `Prefix`."""
        found = self.lengths + torch.arange(n_new) - self.first
        return found if context_length is None else found.clamp(max=context_length - 1)


class Past:
    """Keys and values of one forward, layer by layer."""

    def __init__(self) -> None:
        self.cache: Any = _empty()

    def forget(self) -> None:
        """Begin anew: another forward is about to leave its keys here."""
        self.cache = _empty()

    def keys_and_values(self) -> list[tuple[Float[Tensor, "batch heads seq d"], ...]]:
        """Of each layer."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def prefix(
        self, rows: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"], n_new: int, first_layer: int = 0
    ) -> Prefix:
        """What a batch goes on from.

        Args:
            rows: The row of the forward that each goes on from.
            lengths: After how many of its tokens.
            n_new: Room for so many new tokens.
            first_layer: The lowest layer that will run; those below are not copied.
        """
        n_padded = int(lengths.max()) if len(lengths) else 0
        at = _places(rows, lengths, n_padded, n_new)
        layers = []
        for number, tensors in enumerate(self.keys_and_values()):
            if number < first_layer:
                layers.append(_layer_class()(None, None, n_padded))
                continue
            keys, values = (_lefts(x, at) for x in tensors)
            layers.append(_layer_class()(keys, values, n_padded))
        cache = _empty()
        cache.layers = layers
        return Prefix(cache, lengths, n_padded)

    def packed(
        self,
        rows: Int[Tensor, " rows"],
        lengths: Int[Tensor, "rows new"],
        first: Int[Tensor, "rows new"],
        first_layer: int = 0,
    ) -> Packed:
        """What a batch goes on from whose rows hold several continuations each. Ask `LanguageModel.packs` first.

        Args:
            rows: The row of the forward that each row goes on from.
            lengths: After how many of its tokens each new token's continuation begins.
            first: Where in the new row it begins.
            first_layer: The lowest layer that will run; those below are not copied.
        """
        n_context, n_new = int(lengths.max()), lengths.shape[1]
        layers = []
        for number, tensors in enumerate(self.keys_and_values()):
            if number < first_layer:
                layers.append(_layer_class()(None, None, n_context))
                continue
            keys, values = (_with_room(x, rows, n_context, n_new) for x in tensors)
            layers.append(_layer_class()(keys, values, n_context))
        cache = _empty()
        cache.layers = layers
        return Packed(cache, lengths, first, n_context)


def _empty() -> Any:
    """A cache without layers. transformers is loaded when it is needed: training from a store needs none of it."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


@functools.cache
def _layer_class() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[misc]
        """A layer's keys and values with room for the new ones behind them, so that nothing is copied again."""

        def __init__(self, keys: Tensor | None, values: Tensor | None, n_padded: int) -> None:
            super().__init__()
            self.n_padded = n_padded
            if keys is not None and values is not None:
                self.dtype, self.device = keys.dtype, keys.device
                self.keys, self.values = keys, values
                self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            end = self.n_padded + key_states.shape[-2]
            self.keys[:, :, self.n_padded : end] = key_states
            self.values[:, :, self.n_padded : end] = value_states
            return self.keys[:, :, :end], self.values[:, :, :end]

        def get_seq_length(self, *_: Any) -> int:
            return self.n_padded

    return Layer


def _with_room(
    x: Float[Tensor, "batch heads seq d"], rows: Int[Tensor, " rows"], n_context: int, n_new: int
) -> Float[Tensor, "rows heads context_plus_new d"]:
    """The first tokens of some rows, and room for new ones behind them."""
    found = x.new_empty(len(rows), x.shape[1], n_context + n_new, x.shape[3])
    found[:, :, :n_context] = x[rows.to(x.device), :, :n_context]
    return found


def _places(
    rows: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"], n_padded: int, n_new: int
) -> tuple[Int[Tensor, "rows 1"], Int[Tensor, "rows padded_plus_new"]]:
    """Which row, and which of its tokens, belongs at each place of a batch whose rows end together.

    The places in front, and those for new tokens, name a row's first token: what is masked has a weight of 0, which
    leaves nothing of a number, but all of a NaN that unwritten memory may hold.
    """
    column = torch.arange(n_padded + n_new) - (n_padded - lengths)[:, None]
    column[:, n_padded:] = 0
    return rows[:, None], column.clamp(min=0)


def _lefts(
    x: Float[Tensor, "batch heads seq d"],
    at: tuple[Int[Tensor, "rows 1"], Int[Tensor, "rows padded_plus_new"]],
) -> Float[Tensor, "rows heads padded_plus_new d"]:
    """The first tokens of some rows at their places, all by one copy."""
    _, n_heads, n_seq, d = x.shape
    row, column = at
    flat = (row[:, :, None] * n_heads + torch.arange(n_heads)[None, :, None]) * n_seq + column[:, None, :]
    found = x.reshape(-1, d).index_select(0, flat.flatten().to(x.device))
    return found.view(*flat.shape, d)
