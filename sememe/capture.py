"""From token blocks to rows of activations: one forward after the other, the policy's positions only.

What harvesting and live training share. Knows a language model's `capture` and the token policy's masks; knows
no file and no dictionary. Imports no model code itself, so that training from a store needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sememe.dictionaries.base import Site
from sememe.errors import ActivationError, ConfigError, TextError
from sememe.text import Split, TextConfig, TokenBlock, TokenPolicy, token_blocks

if TYPE_CHECKING:
    from sememe.lm import LanguageModel
    from sememe.splice import SeveralModels

__all__ = ["PositionChoice", "Rows", "captured_rows", "first_norms", "heldout_rows", "sites_along"]

N_FIRST_CONTEXTS = 128
"""Contexts from which the median norm is estimated: 16,384 tokens at a length of 128."""


class Rows(NamedTuple):
    """The kept rows of one forward."""

    activations: dict[str, Tensor]
    token_ids: Int[Tensor, " rows"]
    doc_ids: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    n_tokens: int
    n_outliers: int


class PositionChoice(NamedTuple):
    """Which of the positions that the policy keeps are used."""

    n_random: int | None = None
    """At most this many per context, at random."""
    chosen: tuple[int, ...] | None = None
    """Only these positions of the context."""
    seed: int = 0
    """Of the random choice."""

    def apply(
        self, keep: Bool[np.ndarray, "rows context"], first_row: int
    ) -> Bool[np.ndarray, "rows context"]:
        """A mask of the positions that are used; `first_row` makes the choice independent of the batching."""
        if self.chosen is not None:
            mask = np.zeros_like(keep)
            mask[:, list(self.chosen)] = True
            keep = keep & mask
        if self.n_random is not None:
            mask = np.zeros_like(keep)
            for row in range(keep.shape[0]):
                candidates = np.flatnonzero(keep[row])
                generator = np.random.default_rng((self.seed, first_row + row))
                picked = generator.choice(candidates, min(self.n_random, len(candidates)), replace=False)
                mask[row, picked] = True
            keep = mask
        return keep


def captured_rows(
    lm: LanguageModel | SeveralModels,
    blocks: Iterable[TokenBlock],
    hookpoints: Sequence[str],
    batch_rows: int,
    max_norms: dict[str, float | None],
    *,
    skip: int = 0,
    choice: PositionChoice | None = None,
) -> Iterator[Rows]:
    """Run the model over the blocks and yield, per forward, the rows that are kept, in bfloat16.

    Args:
        lm: The language model, or several that read the same tokens.
        blocks: Token rows.
        hookpoints: Where to read.
        batch_rows: Contexts per forward.
        max_norms: Largest norm kept at each hookpoint; a row over any of them is left out at all.
        skip: Forwards that were done by an earlier run and are not repeated.
        choice: Which of the kept positions are used; all if not given.

    Raises:
        ActivationError: an activation is NaN or infinite.
    """
    n_forwards = n_rows = 0
    for block in blocks:
        for start in range(0, block.ids.shape[0], batch_rows):
            part = slice(start, start + batch_rows)
            first_row, n_rows = n_rows, n_rows + block.ids[part].shape[0]
            n_forwards += 1
            if n_forwards <= skip:
                continue
            keep = block.keep[part]
            if choice is not None:
                keep = choice.apply(keep, first_row)
            yield _forward(lm, block, part, keep, hookpoints, max_norms)


@torch.inference_mode()
def _forward(
    lm: LanguageModel | SeveralModels,
    block: TokenBlock,
    part: slice,
    keep: Bool[np.ndarray, "rows context"],
    hookpoints: Sequence[str],
    max_norms: dict[str, float | None],
) -> Rows:
    ids = torch.from_numpy(block.ids[part]).to(lm.device, torch.int64)
    attention = block.attention_mask[part]
    mask = None if attention.all() else torch.from_numpy(attention).to(lm.device)
    captured = lm.capture(ids, hookpoints, mask)
    flat_keep = torch.from_numpy(keep.reshape(-1))
    doc_ids = torch.from_numpy(block.doc_ids[part].reshape(-1))
    positions = torch.from_numpy(block.doc_positions[part].reshape(-1))
    inside = torch.ones_like(flat_keep)
    flat = {}
    for name in hookpoints:
        values = captured[name].reshape(-1, captured[name].shape[-1])
        norms = values.float().norm(dim=1).cpu()  # a third of the time of norms in float32
        finite = torch.isfinite(norms) | ~flat_keep
        if not bool(finite.all()):
            row = int(torch.nonzero(~finite)[0])
            raise ActivationError(
                f"activations at {name} must be finite",
                f"NaN or infinity in document {int(doc_ids[row])}, position {int(positions[row])}",
                "Load the model in bfloat16 or float32 (--dtype), or check its weights.",
            )
        limit = max_norms.get(name)
        if limit is not None:
            inside &= norms <= limit
        flat[name] = values
    wanted = flat_keep & inside
    index = torch.nonzero(wanted).view(-1)
    return Rows(
        {
            name: values.index_select(0, index.to(values.device)).to("cpu", torch.bfloat16)
            for name, values in flat.items()
        },
        torch.from_numpy(block.ids[part].reshape(-1))[index],
        doc_ids[index],
        positions[index],
        int(attention.sum()),
        int((flat_keep & ~inside).sum()),
    )


def first_norms(
    lm: LanguageModel,
    text: TextConfig,
    policy: TokenPolicy,
    hookpoints: Sequence[str],
    batch_rows: int,
    split: Split,
) -> dict[str, float]:
    """Median Euclidean norm of the kept rows of the first contexts, per hookpoint."""
    n_tokens = N_FIRST_CONTEXTS * policy.context_length
    blocks = token_blocks(text, lm.tokenizer, policy, split=split, n_tokens=n_tokens)
    norms: dict[str, list[Tensor]] = {name: [] for name in hookpoints}
    for rows in captured_rows(lm, blocks, hookpoints, batch_rows, {}):
        for name, values in rows.activations.items():
            norms[name].append(values.float().norm(dim=1))
    medians = {name: torch.cat(parts) for name, parts in norms.items() if parts}
    if not medians or not next(iter(medians.values())).numel():
        raise TextError("the text must hold a position that the policy keeps", "none", "Change the policy.")
    return {name: float(values.median()) for name, values in medians.items()}


def heldout_rows(
    lm: LanguageModel,
    text: TextConfig,
    policy: TokenPolicy,
    hookpoints: Sequence[str],
    n: int,
    batch_rows: int,
    max_norms: dict[str, float | None],
    split: Split,
) -> dict[str, Tensor]:
    """The first n kept rows, per hookpoint, of the documents that are held out of a stream.

    Args:
        lm: The language model.
        text: The corpus.
        policy: Which positions are kept.
        hookpoints: Where to read.
        n: How many rows, at most.
        batch_rows: Contexts per forward.
        max_norms: Largest norm kept at each hookpoint.
        split: The stream's own.

    Raises:
        ConfigError: the stream is of held-out documents itself, or the corpus holds none out.
        TextError: the held-out text is shorter than one context.
    """
    if split != "train" or text.heldout_fraction == 0:
        raise ConfigError(
            "heldout_fraction must be > 0, and the split train, for rows to be held out",
            f"{text.heldout_fraction:g} and {split}",
            "Raise heldout_fraction, or watch no rows (--watch-rows 0).",
        )
    n_tokens = n + batch_rows * policy.context_length
    blocks = token_blocks(text, lm.tokenizer, policy, split="heldout", n_tokens=n_tokens)
    parts = [rows.activations for rows in captured_rows(lm, blocks, hookpoints, batch_rows, max_norms)]
    if not parts:
        raise TextError("the held-out text must hold at least one context", "none", "Give more text.")
    return {name: torch.cat([part[name] for part in parts])[:n] for name in hookpoints}


def sites_along(
    lm: LanguageModel, names: Sequence[str], max_norms: Mapping[str, float | None]
) -> tuple[Site, ...]:
    """Hookpoints one after the other along a feature axis."""
    sites, start = [], 0
    for name in names:
        stop = start + lm.width(name)
        sites.append(
            Site(
                model=lm.name,
                model_fingerprint=lm.fingerprint,
                hookpoint=name,
                start=start,
                stop=stop,
                max_norm=max_norms[name],
            )
        )
        start = stop
    return tuple(sites)
