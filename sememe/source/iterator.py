"""A source of whatever gives tensors one after the other. Knows no store and no language model.

    blocks of rows -> shuffle buffer -> batches

Another library's activations become a source this way; `wrappers.py` has two such libraries.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.dictionaries.base import Batch, Sites
from sememe.errors import ActivationError, ConfigError, ShapeError
from sememe.source.base import HELD_SALT, MOST_HELD, permutation
from sememe.source.buffer import ShuffleBuffer

__all__ = ["Block", "Blocks", "IteratorSource"]

N_KEPT = 16
"""Rows kept of the first block, for whoever wants a sample once an iterator has ended; rows that tell blocks apart."""

Block = Tensor | tuple[Tensor, Tensor]
"""Rows of any number, (..., d_in), or such rows and their targets, (..., d_out)."""
Blocks = Callable[[], Iterable[Block]] | Iterable[Block]


class IteratorSource:
    """Batches from any iterator of tensors, through a shuffle buffer that is refilled when half empty.

    The buffer's unread rows, the random state and the number of blocks read are the state; on resume the blocks are
    read again up to there, so they must come in the same order each time.

    Args:
        blocks: A function that gives an iterator, or anything that can be iterated over anew (a list, a DataLoader):
            it starts over when it ends. An iterator ends the stream where it ends, and cannot be resumed.
        seed: Of the order.
        sites: Where in which model the rows come from.
        n_rows: Rows in one pass, if known.
        buffer_rows: Rows of the buffer, in the blocks' own precision.

    Raises:
        ActivationError: there is no block.
        ShapeError: a block has no row or another width than the first.

    Example:
        >>> source = IteratorSource(lambda: (torch.randn(100, 8) for _ in range(20)), buffer_rows=1000)
        >>> source.next_batch(32).x.shape
        torch.Size([32, 8])
    """

    def __init__(
        self,
        blocks: Blocks,
        seed: int = 0,
        sites: Sites | None = None,
        n_rows: int | None = None,
        buffer_rows: int = 65_536,
    ) -> None:
        self._blocks, self.seed, self.sites, self.n_rows = blocks, seed, sites, n_rows
        self.once = isinstance(blocks, Iterator)
        """Whether the blocks can be read only once."""
        self._open: Iterator[Block] | None = None
        self._ended = False
        self._n_blocks = self._offset = 0  # blocks read to their end in this pass, rows read of the one after
        self._begin = 0  # rows of this pass before the current block
        self._current: dict[str, Tensor] | None = None
        self._ahead: deque[dict[str, Tensor]] = deque()  # blocks read by `hold_out` that come next
        self._held: Int[Tensor, " n"] | None = None  # which rows of every pass the stream leaves out
        self._mark = 0  # of the block that was begun last
        self.paired, self.d_in, self.d_out = False, 0, 0
        first = self._next_block()
        if first is None:
            raise ActivationError(
                "blocks must hold at least one tensor", "none", "Check what the iterator is made from."
            )
        self.paired = "target" in first
        self.d_in, self.d_out = first["x"].shape[1], first["target" if self.paired else "x"].shape[1]
        self._current = first
        self._first = {name: values[:N_KEPT].clone() for name, values in first.items()}
        widths = {name: values.shape[1] for name, values in first.items()}
        self._buffer = ShuffleBuffer(widths, buffer_rows, seed, first["x"].dtype)

    # -- blocks ------------------------------------------------------------------------------------

    def _iterate(self) -> Iterator[Block]:
        return iter(self._blocks() if callable(self._blocks) else self._blocks)

    def _next_block(self) -> dict[str, Tensor] | None:
        """The next block; None if the blocks have ended."""
        return self._ahead.popleft() if self._ahead else self._read_block()

    @property
    def _n_seen(self) -> int:
        """Blocks of this pass that were read, to their end or not."""
        return self._n_blocks + (self._current is not None) + len(self._ahead)

    def _read_block(self) -> dict[str, Tensor] | None:
        """A block by name, checked; None if the blocks have ended."""
        if self._open is None:
            self._open = self._iterate()
        block = next(self._open, None)
        if block is None:
            return None
        x, target = block if isinstance(block, tuple) else (block, None)
        rows = {"x": _flat(x)} | ({} if target is None else {"target": _flat(target)})
        for name, values in rows.items():
            self._check(name, values, rows["x"].shape[0])
        if self.d_in and (target is not None) != self.paired:
            raise ShapeError(
                "blocks must all be tensors or all be pairs (x, target)",
                f"one of the other kind after {self._n_seen} blocks",
                "Give every block the same parts.",
            )
        return rows

    def _check(self, name: str, rows: Float[Tensor, "rows d"], n: int) -> None:
        known = {"x": self.d_in, "target": self.d_out if self.paired else 0}[name]
        if rows.shape[0] != n or n == 0 or (known and rows.shape[1] != known):
            raise ShapeError(
                f"the {name} of a block must have shape (rows >= 1, {known or 'd'}), as many rows as its x",
                f"{tuple(rows.shape)} after {self._n_seen} blocks",
                "Skip empty blocks, and read one place of one model.",
            )

    def _take(self) -> dict[str, Tensor] | None:
        """Rows that come next, no more than there is room for; a pass begins anew when one ends."""
        if self._current is None:
            self._current = self._next_block()
        if self._current is None and not self.once and self._n_blocks:
            self._open, self._n_blocks, self._offset, self._begin = None, 0, 0, 0
            self._current = self._next_block()
        if self._current is None:
            self._ended = True
            return None
        if self._offset == 0:
            self._mark = _mark_of(self._current["x"])
        n = self._current["x"].shape[0]
        stop = min(self._offset + self._buffer.room, n)
        rows = {name: values[self._offset : stop] for name, values in self._current.items()}
        if self._held is not None:
            keep = ~torch.isin(torch.arange(self._begin + self._offset, self._begin + stop), self._held)
            rows = {name: values[keep] for name, values in rows.items()}
        self._offset = stop
        if stop == n:
            self._current, self._offset, self._n_blocks = None, 0, self._n_blocks + 1
            self._begin += n
        return rows

    # -- the contract ------------------------------------------------------------------------------

    def hold_out(self, n: int) -> Batch:
        """Rows at random of the first `buffer_rows` of a pass, one in twenty of them at most; no pass gives them.

        The blocks that are read for it are kept until they are drawn from, so that an iterator that is read once
        can hold rows out too.
        """
        assert self._current is not None and self._offset == self._n_blocks == 0, (
            "called before anything else"
        )
        blocks = [self._current]
        n_found = self._current["x"].shape[0]
        while n_found < self._buffer.capacity and (block := self._read_block()) is not None:
            self._ahead.append(block)
            blocks.append(block)
            n_found += block["x"].shape[0]
        n = min(n, n_found // MOST_HELD)
        self._held = permutation(n_found, self.seed, HELD_SALT)[:n].sort().values
        if self.n_rows is not None:
            self.n_rows -= n
        parts: dict[str, list[Tensor]] = {name: [] for name in self._current}
        begin = 0
        for block in blocks:
            end = begin + block["x"].shape[0]
            own = self._held[(self._held >= begin) & (self._held < end)] - begin
            for name, values in block.items():
                parts[name].append(values[own].float())
            begin = end
        x = torch.cat(parts["x"])
        return Batch(x, torch.cat(parts["target"]) if self.paired else x)

    def next_batch(self, n: int) -> Batch:
        """The next n rows; fewer only where an iterator that is read once ends."""
        if n > self._buffer.capacity // 2:
            raise ConfigError(
                f"batch_size must be <= half of buffer_rows={self._buffer.capacity}", n, "Raise buffer_rows."
            )
        if not self._ended and self._buffer.n_left - n < self._buffer.capacity // 2:
            self._buffer.fill(self._take, 1)
        batch = self._rows(self._buffer.last(n))
        self._buffer.n_left -= batch.x.shape[0]
        return batch

    def _rows(self, take: slice) -> Batch:
        x = self._buffer.rows["x"][take].clone().float()
        return Batch(x, self._buffer.rows["target"][take].clone().float() if self.paired else x)

    def sample(self, n: int) -> Batch:
        """The rows that come next, as many as the buffer holds; it is filled only where it is empty.

        Once an iterator has ended and every row was drawn: a few of its first ones.
        """
        if self._buffer.n_left == 0 and not self._ended:
            self._buffer.fill(self._take, 1)
        if self._buffer.n_left == 0:
            x = self._first["x"][:n].float()
            return Batch(x, self._first["target"][:n].float() if self.paired else x)
        return self._rows(self._buffer.last(n))

    def state_dict(self) -> dict[str, Any]:
        """The buffer, how much was read, and a mark of the last block, by which another order is noticed."""
        read = {"n_blocks": self._n_blocks, "offset": self._offset, "mark": self._mark}
        return self._buffer.state_dict() | read

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ConfigError: the blocks can be read only once.
            ActivationError: there are fewer than there were, or others.
        """
        if self.once:
            raise ConfigError(
                "blocks must be a function or a list for a run to go on where it stopped",
                "an iterator, which is read only once",
                "Pass a function that gives a fresh one, or start again with fresh=True.",
            )
        self._buffer.load_state_dict(state)
        self._ahead.clear()
        self._open, self._current, self._n_blocks, self._begin = self._iterate(), None, 0, 0
        last: Block | None = None
        for _ in range(state["n_blocks"]):
            last = next(self._open, None)
            if last is None:
                raise ActivationError(
                    f"blocks must give the {state['n_blocks']} that were read before",
                    self._n_blocks,
                    "Give the same blocks in the same order, or start again with fresh=True.",
                )
            self._n_blocks += 1
            self._begin += _n_rows(last)
        self._offset = state["offset"]
        self._current = self._next_block() if self._offset else None
        x = self._current["x"] if self._current else None if last is None else _flat(_x_of(last))
        self._mark = 0 if x is None else _mark_of(x)
        if self._mark != state["mark"]:
            raise ActivationError(
                "blocks must come in the same order every time for a run to go on where it stopped",
                f"another one as block {self._n_blocks + bool(self._offset)}",
                "Shuffle with a fixed seed, made anew for each pass, or start again with fresh=True.",
            )


def _x_of(block: Block) -> Any:
    return block[0] if isinstance(block, tuple) else block


def _n_rows(block: Block) -> int:
    x = torch.as_tensor(_x_of(block))
    return x.numel() // x.shape[-1]


def _mark_of(x: Float[Tensor, "rows d"]) -> int:
    """A number that tells blocks apart, by their first rows."""
    content = x[:N_KEPT].contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big")


def _flat(block: Any) -> Float[Tensor, "rows d"]:
    """A block's rows, on the CPU."""
    tensor = torch.as_tensor(block).detach()
    if tensor.dim() < 2:
        raise ShapeError(
            "a block must have shape (..., d_in)", tuple(tensor.shape), "Give rows, not single numbers."
        )
    return tensor.reshape(-1, tensor.shape[-1]).to("cpu")
