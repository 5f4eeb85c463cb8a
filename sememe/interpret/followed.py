"""One dictionary that a pass follows: what it reads of a forward, and what is kept of its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sememe.collect import Collector
from sememe.collect.together import PairFiles, sampled
from sememe.dictionaries import Dictionary
from sememe.encoded import Encoded
from sememe.errors import ActivationError
from sememe.interpret.config import InterpretConfig
from sememe.text import TokenBlock

__all__ = ["PAIRS", "Followed", "Seen", "not_finite"]

PAIRS = "pairs"
ENCODE_FLOATS = 1 << 25
"""Rows are encoded in parts so that a dense (rows, d_sae) matrix holds at most this many floats."""


class Seen(NamedTuple):
    """Some token rows, and activations at those of their positions that are kept."""

    part: TokenBlock
    first_row: int
    """Number of the first of them in the pass."""
    places: Int[Tensor, " n"]
    """Which positions, of the rows laid end to end."""
    whole_ids: Int64[np.ndarray, "rows ctx"]
    """Which tokens are of one document, its pieces together."""
    activations: dict[str, Float[Tensor, "n _"]]
    norms: dict[str, Float[Tensor, " n"]]
    """Of each row, on the CPU; none where a store has looked at them already."""
    n_missing: int = 0
    """Positions of the text that a store left out."""


class Followed:
    """A dictionary, its collector, and the files its pairs go to.

    Args:
        config: The verb's config.
        dictionary: In raw units.
        name: What people call it.
        key: What its files are called.
        folder: Where they are.
        n_tokens: How long the text is, at most.
    """

    def __init__(
        self,
        config: InterpretConfig,
        dictionary: Dictionary,
        name: str,
        key: str,
        folder: Path,
        n_tokens: int,
    ) -> None:
        self.config, self.dictionary, self.folder = config, dictionary.eval(), folder
        self.name, self.key = name, key
        self.n_text = n_tokens
        self.collector = Collector(
            dictionary.d_sae,
            n_top=config.n_top,
            n_reservoir=config.n_reservoir,
            n_random=config.n_random,
            before=config.before,
            after=config.after,
            seed=config.seed,
        )
        assert dictionary.sites is not None
        self.sites = dictionary.sites.inputs
        self.n_outliers = 0
        self.pairs: PairFiles

    def open(self, n_bytes: tuple[int, int] = (0, 0)) -> None:
        """Begin to write, or go on after so many bytes."""
        self.pairs = PairFiles(self.folder, f"{PAIRS}-{self.key}", n_bytes)

    def take(self, seen: Seen) -> None:
        """Encode, and keep what there is to keep.

        Raises:
            ActivationError: a latent is NaN or infinite.
        """
        part = seen.part
        inside = torch.ones(seen.places.shape[0], dtype=torch.bool)
        for site in self.sites:
            if site.max_norm is not None and site.hookpoint in seen.norms:
                inside &= seen.norms[site.hookpoint] <= site.max_norm
        values = [seen.activations[site.hookpoint] for site in self.sites]
        x = values[0] if len(values) == 1 else torch.cat([v.to(values[0].device) for v in values], dim=1)
        places = seen.places
        if not bool(inside.all()):
            x, places = x[inside.to(x.device)], places[inside]
        self.n_outliers += int((~inside).sum()) + seen.n_missing
        encoded = self._encode(x)
        if not bool(torch.isfinite(encoded.acts).all()):
            row = int(encoded.row_ids()[~torch.isfinite(encoded.acts)][0])
            not_finite(part, int(places[row]), "the dictionary's latents")
        where = places.numpy()
        keep = np.zeros(part.keep.shape, bool)
        keep.reshape(-1)[where] = True
        indices = encoded.indices.to("cpu", torch.int32).numpy()
        acts = encoded.acts.to("cpu", torch.float32).numpy()
        row_ptr = encoded.row_ptr.to("cpu", torch.int64).numpy()
        self.collector.add(indices, acts, row_ptr, keep, part.ids, part.doc_ids, seen.whole_ids)
        numbers = seen.first_row * part.ids.shape[1] + where
        wanted = sampled(numbers, self.config.coactive_tokens, self.n_text, self.config.seed)
        self.pairs.add(indices, acts, row_ptr, wanted)

    def _encode(self, x: Float[Tensor, "rows d_in"]) -> Encoded:
        step = max(ENCODE_FLOATS // self.dictionary.d_sae, 64)
        parts = [
            self.dictionary.encode(x[start : start + step]) for start in range(0, max(x.shape[0], 1), step)
        ]
        return parts[0] if len(parts) == 1 else Encoded.cat(parts)

    # -- snapshots -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything, as arrays under this one's own names."""
        counts = np.array([self.n_outliers, *self.pairs.tell()], np.int64)
        return {
            f"{self.key}.followed": counts,
            **{f"{self.key}.{name}": value for name, value in self.collector.state().items()},
        }

    def restore(self, state: Any) -> tuple[int, int]:
        """Take back what `state` gave; returns how much of the pairs' files belongs to it."""
        start = f"{self.key}."
        self.collector.restore(
            {name.removeprefix(start): state[name] for name in state if name.startswith(start)}
        )
        self.n_outliers, entries, counts = (int(n) for n in state[f"{self.key}.followed"])
        return entries, counts


def not_finite(part: TokenBlock, at: int, what: str) -> None:
    """Say where in the text something was NaN or infinite.

    Raises:
        ActivationError: always.
    """
    row, column = divmod(at, part.ids.shape[1])
    document, position = part.doc_ids[row, column], part.doc_positions[row, column]
    raise ActivationError(
        f"{what} must be finite",
        f"NaN or infinity in document {document}, position {position}",
        "Load the model in bfloat16 or float32 (--dtype), or check its weights.",
    )
