"""A source that runs a language model and shuffles its activations through a buffer. Knows no store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sememe.capture import PositionChoice, Rows, captured_rows, first_norms, heldout_rows, sites_along
from sememe.dictionaries.base import Batch, Sites
from sememe.errors import ConfigError, TextError
from sememe.source.buffer import ShuffleBuffer
from sememe.text import Split, TextConfig, TokenPolicy, token_blocks

if TYPE_CHECKING:
    from sememe.lm import LanguageModel

__all__ = ["LiveSource"]


class LiveSource:
    """Batches straight from a language model, through a shuffle buffer that is refilled when half empty.

    The buffer is allocated once. Its unread rows, the random state and the number of forwards are the state; on
    resume the text is read again up to that forward (tokenising only).

    Args:
        lm: The language model.
        text: The corpus.
        policy: Which positions are kept.
        inputs: Hookpoints whose concatenation is x.
        outputs: Hookpoints whose concatenation is the target; the inputs if not given.
        seed: Of the order.
        buffer_mb: Memory of the buffer (bfloat16).
        batch_rows: Contexts per forward.
        split: Which documents.
        max_norms: Largest norm kept, per hookpoint; measured on the first contexts if not given.
        positions_per_context: At most this many of a context's kept positions, at random; all if not given.
    """

    def __init__(
        self,
        lm: LanguageModel,
        text: TextConfig,
        policy: TokenPolicy,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...] | None = None,
        *,
        seed: int = 0,
        buffer_mb: int = 512,
        batch_rows: int = 16,
        split: Split = "train",
        max_norms: dict[str, float | None] | None = None,
        positions_per_context: int | None = None,
    ) -> None:
        self.lm, self.text, self.policy, self.split = lm, text, policy, split
        self.inputs, self.outputs = lm.expand(inputs), lm.expand(outputs or inputs)
        self.batch_rows, self.n_rows = batch_rows, None
        self.names = tuple(dict.fromkeys((*self.inputs, *self.outputs)))
        self.widths = {name: lm.width(name) for name in self.names}
        self.capacity = buffer_mb * 2**20 // (2 * sum(self.widths.values()))
        if self.capacity < 2 * batch_rows * policy.context_length:
            raise ConfigError(
                f"buffer_mb must hold at least two forwards ({2 * batch_rows * policy.context_length} rows)",
                f"{buffer_mb} MB ({self.capacity} rows)",
                "Raise buffer_mb or lower batch_rows.",
            )
        self._choice = PositionChoice(positions_per_context, seed=seed)
        self._buffer = ShuffleBuffer(self.widths, self.capacity, seed)
        self._n_forwards = 0  # in this pass over the text
        self._forwards: Iterator[Rows] | None = None
        self.max_norms = max_norms if max_norms is not None else self._measure_norms()
        self.sites = Sites(
            inputs=sites_along(self.lm, self.inputs, self.max_norms),
            outputs=sites_along(self.lm, self.outputs, self.max_norms),
        )
        self.d_in, self.d_out = self.sites.inputs[-1].stop, self.sites.outputs[-1].stop

    def _measure_norms(self) -> dict[str, float | None]:
        medians = first_norms(self.lm, self.text, self.policy, self.names, self.batch_rows, self.split)
        ratio = self.policy.max_norm_ratio
        return {name: None if ratio is None else ratio * median for name, median in medians.items()}

    @property
    def buffer_bytes(self) -> float:
        """The buffer."""
        return 2.0 * self.capacity * sum(self.widths.values())

    def hold_out(self, n: int) -> Batch:
        """The first rows of the documents that are held out of the stream's split.

        Raises:
            ConfigError, TextError: there are none, as `heldout_rows` says.
        """
        rows = heldout_rows(
            self.lm, self.text, self.policy, self.names, n, self.batch_rows, self.max_norms, self.split
        )
        x, target = (
            torch.cat([rows[name] for name in names], 1).float() for names in (self.inputs, self.outputs)
        )
        return Batch(x, x if self.inputs == self.outputs else target)

    def _next_forward(self) -> dict[str, Tensor]:
        """Kept rows of the next forward; the text starts over when it ends."""
        while True:
            if self._forwards is None:
                blocks = token_blocks(
                    self.text, self.lm.tokenizer, self.policy, split=self.split, n_tokens=None
                )
                self._forwards = captured_rows(
                    self.lm,
                    blocks,
                    self.names,
                    self.batch_rows,
                    self.max_norms,
                    skip=self._n_forwards,
                    choice=self._choice,
                )
            rows = next(self._forwards, None)
            if rows is not None:
                self._n_forwards += 1
                return rows.activations
            if self._n_forwards == 0:
                raise TextError("the text must hold at least one context", "none", "Give more text.")
            self._n_forwards, self._forwards = 0, None

    def _refill(self) -> None:
        self._buffer.fill(self._next_forward, self.batch_rows * self.policy.context_length)

    def next_batch(self, n: int) -> Batch:
        """The next n rows from the end of the buffer."""
        if n > self.capacity // 2:
            raise ConfigError(
                f"batch_size must be <= half the buffer ({self.capacity // 2} rows)", n, "Raise buffer_mb."
            )
        if self._buffer.n_left - n < self.capacity // 2:
            self._refill()
        batch = self._rows(self._buffer.last(n))
        self._buffer.n_left -= n
        return batch

    def _rows(self, take: slice) -> Batch:
        def join(names: tuple[str, ...]) -> Tensor:
            return torch.cat([self._buffer.rows[name][take] for name in names], dim=1).float()

        x = join(self.inputs)
        return Batch(x, x if self.inputs == self.outputs else join(self.outputs))

    def sample(self, n: int) -> Batch:
        """The rows that come next, as many as the buffer holds; it is filled only where it is empty."""
        if self._buffer.n_left == 0:
            self._refill()
        return self._rows(self._buffer.last(n))

    def state_dict(self) -> dict[str, Any]:
        """The buffer's unread rows, the random state, and how much text was read."""
        return self._buffer.state_dict() | {"n_forwards": self._n_forwards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._buffer.load_state_dict(state)
        self._n_forwards, self._forwards = state["n_forwards"], None
