"""What is changed when every node is: latents and errors of all places, entry by entry, and their nodes.

An entry is a latent (or the error) at one token of one prompt; a node is an entry, or, over several prompts or
positions, what of them belongs together. Knows no model and no metric. Memory: entries of latents that are active in
either run, and one activation per token and place; never tokens x d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.trace.config import Ablation
from sememe.trace.places import Inputs, Means, Placed, Reading, along, written

__all__ = ["ERROR", "Node", "Shift", "Table", "shift_of"]

ERROR = -1
"""In the place of a latent's number: the error."""


class Shift(NamedTuple):
    """From one activation to another at one place: x' = x + (after - before) D + error + rest."""

    token: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    before: Float[Tensor, " n"]
    after: Float[Tensor, " n"]
    error: Float[Tensor, "tokens d"]
    rest: Float[Tensor, "tokens d"]
    """What belongs to no node: of ablation mean, the means of latents that are not active; skip connections."""


def shift_of(
    placed: Placed,
    clean: Reading,
    ablation: Ablation,
    *,
    patched: Reading | None = None,
    means: Means | None = None,
) -> Shift:
    """What ablating all latents and errors of a place changes.

    zero and mean leave positions alone that the dictionary was not made for; patch does not.
    """
    if ablation == "patch":
        assert patched is not None
        return _patched(placed, clean, patched)
    n = len(clean.x)
    here = clean.keep[:, None]
    if ablation == "zero":
        error = torch.where(here, -clean.error, 0.0)
        return Shift(
            clean.token, clean.latent, clean.act, torch.zeros_like(clean.act), error, torch.zeros_like(error)
        )
    assert means is not None
    error = torch.where(here, means.error - clean.error, 0.0)
    after = means.latents[clean.latent]
    everywhere = torch.where(here, means.latents @ placed.directions, 0.0)
    rest = everywhere - written(placed, n, clean.token, clean.latent, after)
    return Shift(clean.token, clean.latent, clean.act, after, error, rest)


def _patched(placed: Placed, clean: Reading, patched: Reading) -> Shift:
    keys = torch.cat([run.token * placed.d_sae + run.latent for run in (clean, patched)])
    unique, where = torch.unique(keys, return_inverse=True)
    n = len(clean.token)
    before = clean.act.new_zeros(len(unique)).index_add_(0, where[:n], clean.act)
    after = clean.act.new_zeros(len(unique)).index_add_(0, where[n:], patched.act)
    token, latent = unique // placed.d_sae, unique % placed.d_sae
    rest = patched.recon - clean.recon - written(placed, len(clean.x), token, latent, after - before)
    return Shift(token, latent, before, after, patched.error - clean.error, rest)


class Node(NamedTuple):
    """A latent or an error of one place, at one position or over all."""

    place: int
    latent: int
    """ERROR for an error."""
    position: int | None


class Table:
    """All entries of all places, and their nodes.

    Args:
        places: Where.
        inputs: The prompts.
        shifts: What is changed at each place.
        by_position: Whether a node is at one position.
    """

    def __init__(
        self, places: Sequence[Placed], inputs: Inputs, shifts: Sequence[Shift], *, by_position: bool
    ) -> None:
        self.places, self.inputs, self.shifts, self.by_position = (
            tuple(places),
            inputs,
            tuple(shifts),
            by_position,
        )
        self.n_prompts, self.seq = inputs.ids.shape
        self.n_tokens = self.n_prompts * self.seq
        real = inputs.mask.reshape(-1)
        place, token, latent, change = [], [], [], []
        for i, shift in enumerate(self.shifts):
            errors = torch.nonzero((shift.error != 0).any(1) & real.to(shift.error.device))[:, 0]
            token.append(torch.cat([shift.token, errors]))
            latent.append(torch.cat([shift.latent, torch.full_like(errors, ERROR)]))
            change.append(torch.cat([shift.after - shift.before, shift.error.new_ones(len(errors))]))
            place.append(torch.full_like(token[-1], i))
        self.place, self.token, self.latent = torch.cat(place), torch.cat(token), torch.cat(latent)
        self.change = torch.cat(change)
        """after - before of latents; 1 of errors, whose change is `shifts[place].error`."""
        wide = max(p.d_sae for p in self.places) + 1
        at = self.token % self.seq if by_position else torch.zeros_like(self.token)
        keys = (self.place * wide + self.latent + 1) * self.seq + at
        unique, self.node = torch.unique(keys, return_inverse=True)
        self.node_place = unique // (wide * self.seq)
        self.node_latent = unique // self.seq % wide - 1
        self.node_position = unique % self.seq
        """0 for all, where nodes are not at positions."""

    @property
    def n_nodes(self) -> int:
        """Nodes of all places."""
        return len(self.node_place)

    def describe(self, node: int) -> Node:
        """One node in words that need no table."""
        position = int(self.node_position[node]) if self.by_position else None
        return Node(int(self.node_place[node]), int(self.node_latent[node]), position)

    def entries_of(self, nodes: Bool[Tensor, " n_nodes"] | Int[Tensor, " k"]) -> Bool[Tensor, " n_entries"]:
        """Which entries belong to some nodes."""
        chosen = torch.zeros(self.n_nodes, dtype=torch.bool, device=self.node.device)
        chosen[nodes] = True
        return chosen[self.node]

    def acts(self) -> Float[Tensor, " n_nodes"]:
        """Mean over the prompts, summed over positions where nodes have none; of an error the size of its change."""
        values = torch.zeros_like(self.change)
        for i, shift in enumerate(self.shifts):
            mine = (self.place == i) & (self.latent != ERROR)
            values[mine] = shift.before
            errors = (self.place == i) & (self.latent == ERROR)
            values[errors] = shift.error[self.token[errors]].norm(dim=1)
        return self.per_node(values)

    def per_node(self, entries: Float[Tensor, " n_entries"]) -> Float[Tensor, " n_nodes"]:
        """Sums over each node's entries, divided by the number of prompts."""
        return entries.new_zeros(self.n_nodes).index_add_(0, self.node, entries) / self.n_prompts

    def effects(
        self, gradients: Sequence[Float[Tensor, "tokens d"]], only: Bool[Tensor, " n_entries"] | None = None
    ) -> Float[Tensor, " n_entries"]:
        """Each entry's change times the gradient along it; 0 for entries that are not asked for."""
        out = torch.zeros_like(self.change)
        for i, (placed, shift, gradient) in enumerate(zip(self.places, self.shifts, gradients, strict=True)):
            mine = self.place == i if only is None else (self.place == i) & only
            latents, errors = mine & (self.latent != ERROR), mine & (self.latent == ERROR)
            gradient = gradient.to(out.device)
            slope = along(placed, gradient, self.token[latents], self.latent[latents])
            out[latents] = slope * self.change[latents]
            at = self.token[errors]
            out[errors] = (gradient[at] * shift.error[at]).sum(1)
        return out

    def moved(
        self, place: int, entries: Bool[Tensor, " n_entries"], scale: float = 1.0
    ) -> Float[Tensor, "tokens d"]:
        """What some entries of a place, changed at once, change of its activation."""
        placed, shift = self.places[place], self.shifts[place]
        mine = entries & (self.place == place)
        latents, errors = mine & (self.latent != ERROR), mine & (self.latent == ERROR)
        out = written(
            placed, self.n_tokens, self.token[latents], self.latent[latents], scale * self.change[latents]
        )
        at = self.token[errors]
        out[at] += scale * shift.error[at]
        return out

    def whole(self, place: int) -> Float[Tensor, "tokens d"]:
        """What all of it changes: x' - x."""
        everything = torch.ones_like(self.node, dtype=torch.bool)
        return self.moved(place, everything) + self.shifts[place].rest
