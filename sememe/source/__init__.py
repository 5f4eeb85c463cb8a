"""A stream of activations for training: from a store, from a language model as it runs, or from any tensors.

Knows how to shuffle and to resume; knows no dictionary and no optimiser. Every source gives the same `Batch`es
in raw units, and a state from which it goes on with the same bits.

    base.py       the contract; one dictionary's columns of a shared stream; shuffled orders
    tensors.py    tensors in memory
    stored.py     a store, shard group by shard group
    live.py       a language model as it runs, through a shuffle buffer
    iterator.py   any iterator of tensors, through the same buffer
    wrappers.py   such iterators from TransformerLens and nnsight
    buffer.py     the buffer
"""

from __future__ import annotations

from sememe.dictionaries.base import Batch
from sememe.source.base import MOST_HELD, Buffers, Columns, HoldsOut, Source
from sememe.source.iterator import IteratorSource
from sememe.source.live import LiveSource
from sememe.source.stored import StoreSource
from sememe.source.tensors import TensorSource
from sememe.source.wrappers import nnsight_rows, transformer_lens_rows

__all__ = [
    "MOST_HELD",
    "Batch",
    "Buffers",
    "Columns",
    "HoldsOut",
    "IteratorSource",
    "LiveSource",
    "Source",
    "StoreSource",
    "TensorSource",
    "nnsight_rows",
    "transformer_lens_rows",
    "upcoming",
]


def upcoming(source: Source, n: int) -> Batch:
    """Up to n of the rows that come next; the stream stays where it is."""
    if isinstance(source, (LiveSource, IteratorSource)):
        return source.sample(n)  # its state is its buffer: too large to be taken and put back
    state = source.state_dict()
    batch = source.next_batch(n)
    source.load_state_dict(state)
    return batch
