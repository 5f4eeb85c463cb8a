"""What feeds a latent: its activation traced back to latents of the place before it, and these in their turn.

Each latent is looked at in contexts of a text in which it reaches half of its largest activation there; effects are
summed over positions and averaged over contexts, and the strongest are really taken out. Knows no prompt.

Source: Cunningham et al. 2023, arXiv:2309.08600, section 5.3 (20 contexts in [M/2, M], ablate, recurse). Differs:
ablations are predicted first, and only the strongest are run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe.errors import ActivationError
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.text import TextConfig, token_blocks
from sememe.trace.attribution import Passes, attribute, integrate
from sememe.trace.config import PathName
from sememe.trace.exact import exact_effects
from sememe.trace.metric import LatentMetric
from sememe.trace.places import Inputs, Placed, padded, read, readings
from sememe.trace.table import ERROR, Table, shift_of

__all__ = ["Context", "Fed", "How", "contexts_of", "feeds"]


N_SHOWN = 50
"""Nodes that are listed for each latent at least, really taken out or not."""


class Context(NamedTuple):
    """A stretch of text that ends where a latent fires."""

    act: float
    ids: tuple[int, ...]
    document: int


class How(NamedTuple):
    """How far and how thoroughly."""

    text: TextConfig = TextConfig()
    split: str = "heldout"
    n_tokens: int = 20_000
    n_contexts: int = 20
    depth: int = 2
    width: int = 3
    method: str = "ig"
    path: PathName = "groups"
    n_steps: int = 10
    n_grouped: int = 256
    reach: float = 1.0
    n_checked: int = 50
    seed: int = 0
    batch_rows: int = 16


class Fed(NamedTuple):
    """One latent, and what feeds it."""

    place: int
    latent: int
    depth: int
    largest: float
    """On the text."""
    contexts: list[Context]
    mean: float
    """Activation in the contexts."""
    sources: list[dict[str, Any]]
    """Strongest first: latent (None: the error), effect, exact (None: not run), share of the mean, and how far from the
    latent's own position it matters most."""
    checks: dict[str, Any]


def feeds(lm: LanguageModel, places: Sequence[Placed], latent: int, how: How) -> list[Fed]:
    """Trace a latent of the last place back.

    Args:
        lm: The model.
        places: In order; the first ones feed the last.
        latent: Of the last.
        how: How far.
    Returns:
        The latent, then those that feed it, then those that feed them; each once.
    Raises:
        ConfigError: there is no such latent.
        ActivationError: it never fires on the text.
    """
    LatentMetric(places[-1], latent, torch.zeros(1, dtype=torch.long))  # there is such a latent
    found: list[Fed] = []
    level = [latent]
    for depth in range(min(how.depth, len(places) - 1)):
        place = len(places) - 1 - depth
        largest, contexts = contexts_of(lm, places[place], level, how)
        following: list[int] = []
        with track(f"what feeds {places[place].writes}", len(level), "latents") as progress:
            for i, one in enumerate(level):
                if not contexts[i]:
                    if depth == 0:
                        raise ActivationError(
                            f"latent {one} must fire on the text",
                            "never",
                            "Name another, or raise --n-tokens.",
                        )
                    continue
                fed = _fed(lm, places, place, one, depth, largest[i], contexts[i], how)
                found.append(fed)
                following += [s["latent"] for s in fed.sources[: how.width] if s["latent"] is not None]
                progress.advance()
        level = list(dict.fromkeys(following))
    return found


def contexts_of(
    lm: LanguageModel, placed: Placed, latents: Sequence[int], how: How
) -> tuple[list[float], list[list[Context]]]:
    """Where latents reach half of their largest activation, one context per document, drawn at random.

    Returns:
        The largest activation of each, and its contexts; none of one that never fires.
    Raises:
        TextError: the text is shorter than one context.
    """
    largest = np.zeros(len(latents))
    best: list[dict[int, Context]] = [{} for _ in latents]
    wanted = torch.tensor(list(latents), device=placed.directions.device)
    blocks = token_blocks(how.text, lm.tokenizer, placed.policy, split=how.split, n_tokens=how.n_tokens)  # type: ignore[arg-type]
    for block in blocks:
        for start in range(0, len(block.ids), how.batch_rows):
            rows = slice(start, start + how.batch_rows)
            ids, keep = block.ids[rows], torch.from_numpy(block.keep[rows]).reshape(-1)
            mask = torch.from_numpy(block.attention_mask[rows])
            with torch.no_grad():
                x = lm.capture(torch.from_numpy(ids).long(), [placed.reads], mask)[placed.reads]
            # a stand-in for what is written: only latents are looked at
            blank = torch.zeros(*ids.shape, placed.directions.shape[1])
            run = read(placed, x, blank, keep.to(placed.directions.device))
            for slot, latent in enumerate(wanted):
                mine = run.latent == latent
                for token, act in zip(run.token[mine].tolist(), run.act[mine].tolist(), strict=True):
                    row, position = divmod(token, ids.shape[1])
                    document = int(block.doc_ids[start + row, position])
                    before = best[slot].get(document)
                    if act > 0 and (before is None or act > before.act):
                        best[slot][document] = Context(
                            act, tuple(ids[row, : position + 1].tolist()), document
                        )
                        largest[slot] = max(largest[slot], act)
    rng = np.random.default_rng(how.seed)
    out = []
    for top, found in zip(largest, best, strict=True):
        strong = [context for context in found.values() if context.act >= top / 2]
        chosen = rng.permutation(len(strong))[: how.n_contexts]
        out.append(sorted((strong[i] for i in chosen), key=lambda c: -c.act))
    return largest.tolist(), out


def _fed(
    lm: LanguageModel,
    places: Sequence[Placed],
    place: int,
    latent: int,
    depth: int,
    largest: float,
    contexts: list[Context],
    how: How,
) -> Fed:
    inputs = padded([context.ids for context in contexts])
    before = places[place - 1]
    metric = LatentMetric(places[place], latent, inputs.lengths - 1)
    passes = Passes(lm, [before], inputs, metric)
    base = passes.run()
    clean = readings(lm, [before], inputs, base.activations)
    table = Table([before], inputs, [shift_of(before, clean[0], "zero")], by_position=False)
    if how.method == "gradient":
        found = attribute(passes, table, base)
    else:
        found = integrate(
            passes,
            table,
            base,
            path=how.path,
            n_steps=how.n_steps,
            n_grouped=how.n_grouped,
            reach=how.reach,
        )
    order = found.effects.abs().argsort(descending=True, stable=True).tolist()
    checked = order[: max(how.n_checked, how.width)]
    exact = dict(
        zip(
            checked,
            exact_effects(passes, table, base, checked, batch_rows=how.batch_rows).tolist(),
            strict=True,
        )
    )
    shown = sorted(order[: max(len(checked), N_SHOWN)], key=lambda node: -abs(exact.get(node, 0.0)))
    offsets = _offsets(table, inputs, base.gradients[0])
    mean = float(base.value.mean())
    sources = [
        {
            "latent": None if int(table.node_latent[node]) == ERROR else int(table.node_latent[node]),
            "effect": float(found.effects[node]),
            "exact": exact.get(node),
            "share": -exact[node] / mean if node in exact and mean else None,
            "offset": int(offsets[node]),
        }
        for node in shown
    ]
    checks = {"predicted": [float(found.effects[n]) for n in checked], "exact": [exact[n] for n in checked]}
    return Fed(place, latent, depth, largest, contexts, mean, sources, checks)


def _offsets(table: Table, inputs: Inputs, gradient: Float[Tensor, "tokens d"]) -> list[int]:
    """For each node, how far from the end of its context the entries lie that do most."""
    entries = table.effects([gradient]).abs()
    last = (inputs.lengths - 1).to(table.token.device)
    offset = table.token % table.seq - last[table.token // table.seq]
    sums = torch.zeros(table.n_nodes, table.seq, device=entries.device)
    sums.index_put_((table.node, -offset.clamp(max=0)), entries, accumulate=True)
    return (-sums.argmax(1)).tolist()
