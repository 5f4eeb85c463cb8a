"""An atlas's examples, read once for every path: what is shown to an explainer, and what a scorer asks about.

Every document lies on one side, for all latents alike, by a hash of its key: explanations are found on one side and
scored on the other. What a path may see it gets from `Examples.windows` for its own side, or from the arrays with
their `side`. Knows an atlas; asks nobody and scores nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

import numpy as np

from sememe.atlas import Atlas
from sememe.errors import TextError

__all__ = ["EXPLAIN", "KINDS", "SCORE", "Examples", "Window", "excerpt", "read", "side_of"]

EXPLAIN, SCORE = 0, 1
"""The sides: documents that explanations are found on, and documents that they are scored on."""
KINDS = ("decile", "random", "top")
RANDOM = KINDS.index("random")


class Window(NamedTuple):
    """One example of a latent as an explainer or scorer sees it."""

    kind: Literal["top", "decile", "random"]
    decile: int | None
    """Of the latent's non-zero activations, 0 lowest; for kind "decile" only."""
    document: str
    """Key of the whole document that it comes from."""
    tokens: tuple[str, ...]
    acts: tuple[float, ...]
    """Absolute activation at each token, raw units; 0 where it is silent."""
    peak: int
    """Where the activation is that it was kept for; of silent windows, a place like any."""
    place: tuple[int, int] = (-1, -1)
    """The peak's context and position in the atlas."""

    @property
    def text(self) -> str:
        """The tokens as one text."""
        return "".join(self.tokens)

    @property
    def n_active(self) -> int:
        """Tokens on which the latent fires."""
        return sum(act > 0 for act in self.acts)


def excerpt(window: Window, length: int, lead: int) -> Window:
    """At most `length` tokens around the peak, of which at most `lead` lie before it unless the end is near."""
    low = max(0, min(window.peak - lead, len(window.tokens) - length))
    high = low + length
    return window._replace(tokens=window.tokens[low:high], acts=window.acts[low:high], peak=window.peak - low)


class Examples(NamedTuple):
    """An atlas's examples as arrays, ordered by latent; one entry per example unless it says otherwise."""

    d_sae: int
    latent_ptr: np.ndarray
    """Latent l's examples are those from latent_ptr[l] to latent_ptr[l + 1]."""
    kind: np.ndarray
    """By number, see KINDS."""
    decile: np.ndarray
    """-1 where there is none."""
    rank: np.ndarray
    contexts: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    peaks: np.ndarray
    offsets: np.ndarray
    """Example i's activations are those from offsets[i] to offsets[i + 1] of `positions` and `acts`."""
    positions: np.ndarray
    acts: np.ndarray
    side: np.ndarray
    document: np.ndarray
    """Numbers of `keys`: all pieces of one document have one."""
    keys: tuple[str, ...]
    context_ids: np.ndarray
    """(contexts, context length): the tokens."""
    context_docs: np.ndarray
    """(contexts, context length): the document of each token, -1 for padding."""
    skip: int
    """First position of a context that the dictionary reads."""
    drop_special: bool
    texts: dict[int, str]
    """Tokens by id, for people."""
    raw: dict[int, bytes]
    """Tokens by id, exactly."""

    @property
    def is_random(self) -> np.ndarray:
        """Whether the latent is silent in an example."""
        silent: np.ndarray = self.kind == RANDOM
        return silent

    def windows(self, latent: int, side: int) -> list[Window]:
        """A latent's examples from documents on one side: the top ones first, the strongest leading."""
        low, high = self.latent_ptr[latent], self.latent_ptr[latent + 1]
        found = [self._window(i) for i in range(low, high) if self.side[i] == side]
        return sorted(found, key=lambda window: window.kind != "top")

    def _window(self, i: int) -> Window:
        start, stop = max(int(self.starts[i]), self.skip), int(self.stops[i])
        context = int(self.contexts[i])
        acts = np.zeros(stop - start)
        here = slice(self.offsets[i], self.offsets[i + 1])
        kept = self.positions[here] >= start
        acts[self.positions[here][kept] - start] = np.abs(self.acts[here][kept])
        decile = int(self.decile[i])
        return Window(
            KINDS[self.kind[i]],  # type: ignore[arg-type]
            None if decile < 0 else decile,
            self.keys[self.document[i]],
            tuple(self.texts[t] for t in self.context_ids[context, start:stop].tolist()),
            tuple(acts.tolist()),
            max(int(self.peaks[i]) - start, 0),
            (context, int(self.peaks[i])),
        )


def side_of(key: str, test_fraction: float, seed: int) -> int:
    """0 where a document with this key is for finding explanations, 1 where it is for scoring them."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int(int.from_bytes(digest, "big") / 2**64 < test_fraction)


def read(atlas: Atlas, test_fraction: float, seed: int) -> Examples:
    """An atlas's examples, split by document.

    Args:
        atlas: Open for reading.
        test_fraction: Share of the documents on the scoring side.
        seed: Of the split.
    Raises:
        TextError: all documents lie on one side.
    """
    d_sae = int(atlas.meta["dictionary"]["d_sae"])
    table = atlas.table(
        "SELECT latent, kind, coalesce(decile, -1) AS decile, rank, context, position, start, stop, document, "
        "positions, acts FROM examples ORDER BY latent, kind, decile, rank, context, position"
    )
    column = {name: table[name].combine_chunks() for name in table.column_names}
    number = {
        name: column[name].to_numpy(zero_copy_only=False)
        for name in ("latent", "decile", "rank", "context", "position", "start", "stop", "document")
    }
    kinds = column["kind"].to_numpy(zero_copy_only=False).astype(str)
    kind = np.searchsorted(np.array(KINDS), kinds).astype(np.int8)
    pieces, piece = np.unique(number["document"], return_inverse=True)
    known = {row["id"]: row["key"] for row in atlas.query("SELECT id, key FROM document_keys")}
    found, of_piece = np.unique(
        np.array([str(known.get(int(d), d)) for d in pieces], object), return_inverse=True
    )
    keys = tuple(found.tolist())
    document = of_piece[piece].astype(np.int64)
    side_of_document = np.array([side_of(key, test_fraction, seed) for key in keys], np.int8)
    if len(set(side_of_document.tolist())) < 2:
        raise TextError(
            "the atlas must hold examples from documents on both sides of the split",
            f"{len(keys)} documents, all on one side",
            "Make the atlas over more text, or change test_fraction.",
        )
    contexts = atlas.table("SELECT id, token_ids, doc_ids FROM contexts ORDER BY id")
    ctx = int(atlas.meta["context_length"])
    ids, docs = (
        contexts[name].combine_chunks().values.to_numpy().reshape(-1, ctx)
        for name in ("token_ids", "doc_ids")
    )
    tokens = atlas.query("SELECT id, text, bytes FROM tokens")
    policy: dict[str, Any] = atlas.meta.get("policy") or {}
    return Examples(
        d_sae=d_sae,
        latent_ptr=np.searchsorted(number["latent"], np.arange(d_sae + 1)),
        kind=kind,
        decile=number["decile"],
        rank=number["rank"],
        contexts=number["context"],
        starts=number["start"],
        stops=number["stop"],
        peaks=number["position"],
        offsets=column["positions"].offsets.to_numpy().astype(np.int64),
        positions=column["positions"].values.to_numpy(),
        acts=column["acts"].values.to_numpy(),
        side=side_of_document[document],
        document=document,
        keys=keys,
        context_ids=ids,
        context_docs=docs,
        skip=int(policy.get("drop_positions", 0)),
        drop_special=bool(policy.get("drop_special", True)),
        texts={row["id"]: row["text"] for row in tokens},
        raw={row["id"]: bytes(row["bytes"]) for row in tokens},
    )
