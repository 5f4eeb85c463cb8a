"""The effects of the examples in a few contexts, by real forwards. Knows no file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sememe.downstream import Changes, Predictions, Reruns, Unedited
from sememe.effects.config import EffectsConfig
from sememe.effects.examples import Contexts, Examples

__all__ = ["CONTROL", "Found", "measure"]

CONTROL = 0.01
"""The share of its contribution that is taken out in a control: what changes then is mostly rounding."""


class Found(NamedTuple):
    """What was found in some contexts, as columns."""

    effects: dict[str, np.ndarray]
    removals: dict[str, np.ndarray]
    controls: dict[str, np.ndarray]

    @classmethod
    def cat(cls, parts: list[Found]) -> Found:
        """Several, one after the other."""
        return cls(
            *(
                {name: np.concatenate([part[i][name] for part in parts]) for name in parts[0][i]}
                for i in range(len(cls._fields))
            )
        )


def measure(
    reruns: Reruns, config: EffectsConfig, contexts: Contexts, numbers: np.ndarray, examples: Examples
) -> Found:
    """Every ablation and removal of the examples in some contexts.

    Args:
        reruns: The model and the dictionary.
        config: How much is kept.
        contexts: The token rows.
        numbers: Their ids in the atlas.
        examples: Those that lie in them.
    """
    with torch.inference_mode():
        ids = torch.from_numpy(contexts.ids)
        run = reruns.unedited(ids)
        order = np.lexsort((examples.latent, examples.position, examples.context))
        examples = examples.take(order)
        rows = torch.from_numpy(np.searchsorted(numbers, examples.context))
        scored = _scored(contexts, rows.numpy(), examples.position, config.n_after)
        wanted = torch.zeros(ids.shape, dtype=torch.bool)
        i, t = torch.nonzero(scored | _first(scored), as_tuple=True)
        positions = torch.from_numpy(examples.position.astype(np.int64))
        wanted[rows[i], positions[i] + t] = True
        predictions = Predictions(reruns.lm, ids, run.base.hidden, wanted, reruns.unembedding)
        reruns.unembedding = predictions.unembedding
        ablations = _Ablations(reruns, run, predictions, config, examples, rows, positions, scored)
        changes, control = ablations.changes()
        removals = _removals(reruns, run, config, examples, rows, positions, contexts)
    effects = {
        **{
            name: getattr(examples, name)
            for name in ("latent", "kind", "decile", "rank", "context", "position")
        },
        "act": examples.act,
        **{name: value.numpy() for name, value in changes._asdict().items()},
    }
    return Found(effects, removals, control)


def _scored(contexts: Contexts, rows: np.ndarray, position: np.ndarray, n_after: int) -> Tensor:
    """Whether there is a next token of the same document, at each position from the peak on."""
    n_ctx = contexts.ids.shape[1]
    targets = position[:, None].astype(np.int64) + 1 + np.arange(n_after + 1)
    documents = contexts.documents[rows]
    there = np.take_along_axis(documents, np.minimum(targets, n_ctx - 1), axis=1)
    own = np.take_along_axis(documents, position[:, None].astype(np.int64), axis=1)
    # Once another document began, what follows is no longer the latent's own.
    return torch.from_numpy(np.logical_and.accumulate((targets < n_ctx) & (there == own), axis=1))


def _first(like: Tensor) -> Tensor:
    first = torch.zeros_like(like)
    first[:, 0] = True
    return first


class _Ablations(NamedTuple):
    """The ablations of a group of contexts."""

    reruns: Reruns
    run: Unedited
    predictions: Predictions
    config: EffectsConfig
    examples: Examples
    rows: Tensor
    positions: Tensor
    scored: Tensor

    def changes(self) -> tuple[Changes, dict[str, np.ndarray]]:
        """Of all of them; and of one, once more with nearly nothing taken out: the control."""
        acts = torch.from_numpy(self.examples.act.astype(np.float32))
        n = len(acts)
        which = torch.cat([torch.arange(n), torch.tensor([n // 2])])
        acts = torch.cat([acts, CONTROL * acts[n // 2, None]])
        rows, positions = self.rows[which], self.positions[which]
        n_new = torch.full_like(positions, self.config.n_after + 1)
        batches = list(self.reruns.batches(self.run, rows, positions, n_new))
        parts = [self._of(which[batch], acts[batch]) for batch in batches]
        back = torch.argsort(torch.cat(batches))
        both = Changes(*(torch.cat(columns)[back] for columns in zip(*parts, strict=True)))
        names = ("loss_change", "loss_change_after", "scored", "n_after")
        control = {name: getattr(both, name)[n:].numpy() for name in names}
        return Changes(*(column[:n] for column in both)), control

    def _of(self, which: Tensor, acts: Tensor) -> Changes:
        rows, positions = self.rows[which], self.positions[which]
        latents = torch.from_numpy(self.examples.latent[which.numpy()].astype(np.int64))
        hidden = self.reruns.ablated(self.run, rows, positions, latents, acts, self.config.n_after)
        return self.predictions.changes(
            hidden,
            rows,
            positions,
            self.scored[which],
            n_shown=self.config.n_shown,
            n_likeliest=self.config.n_likeliest,
        )


def _removals(
    reruns: Reruns,
    run: Unedited,
    config: EffectsConfig,
    examples: Examples,
    rows: Tensor,
    positions: Tensor,
    contexts: Contexts,
) -> dict[str, np.ndarray]:
    """The strongest examples' activations without each token of the window before the peak."""
    chosen = np.flatnonzero((examples.kind == 0) & (examples.rank < config.n_removals))
    counts = (examples.position - examples.start)[chosen].astype(np.int64)
    which = np.repeat(chosen, counts)
    removed = np.concatenate(
        [np.arange(examples.start[i], examples.position[i]) for i in chosen] or [np.zeros(0, np.int64)]
    ).astype(np.int64)
    latents = torch.from_numpy(examples.latent.astype(np.int64))
    peaks = torch.zeros(len(examples.latent))
    if len(chosen):
        at = torch.from_numpy(chosen)
        peaks[at] = reruns.acts(run, rows[at], positions[at], latents[at]).float().cpu()
    acts = np.zeros(len(which), np.float32)
    where, gone = torch.from_numpy(which), torch.from_numpy(removed)
    for part in reruns.batches(run, rows[where], gone, positions[where] - gone):
        at = where[part]
        found = reruns.acts_without(run, rows[at], positions[at], gone[part], latents[at])
        acts[part.numpy()] = found.float().cpu().numpy()
    places = np.searchsorted(np.unique(examples.context), examples.context[which])
    return {
        **{name: getattr(examples, name)[which] for name in ("latent", "rank", "context", "position")},
        "removed": removed,
        "token": contexts.ids[places, removed] if len(which) else removed,
        "act": peaks.numpy()[which],
        "act_without": acts,
    }
