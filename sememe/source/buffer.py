"""A shuffle buffer: rows wait in it until they are drawn, in random order. Knows no source and no dictionary.

Allocated once. Unread rows lie at its start; they are shuffled together whenever new ones come, and drawn from the
end. Its state, from which it goes on with the same bits, is the unread rows and the random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["ShuffleBuffer"]


class ShuffleBuffer:
    """Rows of one or several tensors of equal length, by name.

    Args:
        widths: Features of each tensor.
        capacity: Rows it holds.
        seed: Of the order.
        dtype: What rows are kept in.
    """

    def __init__(
        self, widths: Mapping[str, int], capacity: int, seed: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.capacity, self.n_left = capacity, 0
        self.rows = {name: torch.empty(capacity, width, dtype=dtype) for name, width in widths.items()}
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def room(self) -> int:
        """Rows that could be put in."""
        return self.capacity - self.n_left

    def fill(self, next_rows: Callable[[], Mapping[str, Tensor] | None], most: int) -> None:
        """Put rows in while there is room, and shuffle.

        Args:
            next_rows: Gives up to `most` rows; None when there are no more.
            most: How much room is needed for another call.
        """
        while self.room >= most:
            rows = next_rows()
            if rows is None:
                break
            n = next(iter(rows.values())).shape[0]
            for name, values in rows.items():
                self.rows[name][self.n_left : self.n_left + n] = values
            self.n_left += n
        order = torch.randperm(self.n_left, generator=self.generator)
        for values in self.rows.values():
            values[: self.n_left] = values[: self.n_left][order]

    def last(self, n: int) -> slice:
        """Where the rows lie that come next: up to n."""
        return slice(max(0, self.n_left - n), self.n_left)

    def state_dict(self) -> dict[str, Any]:
        """The unread rows and the random state."""
        state: dict[str, Any] = {f"buffer.{n}": v[: self.n_left].clone() for n, v in self.rows.items()}
        return state | {"n_left": self.n_left, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.n_left = state["n_left"]
        self.generator.set_state(state["generator"])
        for name, values in self.rows.items():
            values[: self.n_left] = state[f"buffer.{name}"]
