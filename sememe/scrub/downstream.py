"""What taking a latent out does to the latents of later layers, as a sparse matrix. Knows inputs; writes no file.

A source latent is ablated wherever it fires; the later dictionaries encode what the model then has. Changes are
averaged over the positions at which the source fires. Beside each: as much taken out along one random direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.encoded import Encoded
from sememe.errors import ConfigError
from sememe.progress import track
from sememe.scrub.inputs import Batch, Inputs, flat
from sememe.splice import BaseRun, Splicer

__all__ = ["Changes", "Edges", "Source", "downstream", "most_active"]

SUMS_BYTES = 256e6
"""What the sums of the sources of one pass may take; of more sources there are more passes."""


class Source(NamedTuple):
    """A dictionary's latents that are taken out."""

    place: int
    latents: tuple[int, ...]


class Edges(NamedTuple):
    """The largest changes, as columns of one length."""

    source: Int[np.ndarray, " edges"]
    place: Int[np.ndarray, " edges"]
    target: Int[np.ndarray, " edges"]
    mean_change: Float[np.ndarray, " edges"]
    """Of the target's activation, over the positions at which the source fires."""
    n: Int[np.ndarray, " edges"]
    """So many."""
    n_both: Int[np.ndarray, " edges"]
    """At how many of them the target fires in the unedited model."""
    control: np.ndarray
    """Whether a random direction was taken out instead."""


class Changes(NamedTuple):
    """What was found of some sources."""

    edges: Edges
    n: Int[np.ndarray, " sources"]
    total: Float[np.ndarray, "sources arms places"]
    """Sum over all targets of a place of the size of their mean change; of the latent, and of the control."""


class _Sums(NamedTuple):
    """Per place: the targets' summed change (of the latent and of the control), and how often they fire."""

    change: list[Float[Tensor, "arms sources d_sae"]]
    fires: list[Float[Tensor, "sources d_sae"]]
    n: Float[Tensor, " sources"]


@torch.no_grad()
def most_active(inputs: Inputs, place: int, n: int) -> tuple[int, ...]:
    """The latents that fire at most positions of the inputs.

    Raises:
        ConfigError: none fires.
    """
    dictionary = inputs.places[place].dictionary
    counts = torch.zeros(dictionary.d_sae, dtype=torch.int64)
    for batch in inputs.batches():
        rows = flat(batch.run.activations[inputs.places[place].hookpoint])[batch.here[place].reshape(-1)]
        encoded = dictionary.encode(rows).compact()
        counts += torch.bincount(encoded.indices.long()[encoded.acts != 0].cpu(), minlength=dictionary.d_sae)
    order = counts.argsort(descending=True, stable=True)[:n]
    found = tuple(int(latent) for latent in order if counts[latent] > 0)
    if not found:
        raise ConfigError(
            f"a latent of {inputs.places[place].name} must fire on the inputs", "none", "Give more text."
        )
    return found


def downstream(
    inputs: Inputs, source: Source, *, n_targets: int, batch_rows: int, seed: int
) -> Iterator[Changes]:
    """The effects of some latents on all of the later places, some sources after the other.

    Args:
        inputs: What the model reads.
        source: The latents, of a place that is not the last.
        n_targets: Of each later place, edges kept for each source: those that change most.
        batch_rows: Inputs per forward.
        seed: Of the controls' directions.
    """
    later = range(source.place + 1, len(inputs.places))
    width = 8 * 3 * sum(inputs.places[number].dictionary.d_sae for number in later)
    step = max(1, int(SUMS_BYTES // width))
    chunks = [source.latents[start : start + step] for start in range(0, len(source.latents), step)]
    with track("downstream", len(source.latents), "latents") as progress:
        for chunk in chunks:
            sums = _Pass(inputs, Source(source.place, chunk), batch_rows, seed).run()
            yield _kept(chunk, sums, list(later), n_targets)
            progress.advance(len(chunk))


class _Pass:
    """One pass over the inputs for some sources."""

    def __init__(self, inputs: Inputs, source: Source, batch_rows: int, seed: int) -> None:
        self.inputs, self.source, self.batch_rows = inputs, source, batch_rows
        self.place = inputs.places[source.place]
        self.later = inputs.places[source.place + 1 :]
        self.splicer = Splicer(inputs.lm, [self.place.hookpoint], [self.place.hookpoint])
        directions = self.place.dictionary.decoder_directions().detach().float()[list(source.latents)]
        drawn = [
            torch.randn(
                directions.shape[1], generator=torch.Generator().manual_seed(seed * 1_000_003 + latent)
            )
            for latent in source.latents
        ]
        random = torch.stack(drawn).to(directions.device)
        random *= directions.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
        self.directions = torch.stack([directions, random])
        n = len(source.latents)
        widths = [place.dictionary.d_sae for place in self.later]
        self.sums = _Sums(
            [torch.zeros(2, n, width, dtype=torch.float64) for width in widths],
            [torch.zeros(n, width, dtype=torch.float64) for width in widths],
            torch.zeros(n, dtype=torch.float64),
        )

    @torch.no_grad()
    def run(self) -> _Sums:
        """The sums over all inputs."""
        for batch in self.inputs.batches():
            x = batch.run.activations[self.place.hookpoint]
            acts = self.place.dictionary.encode_latents(flat(x), self.source.latents)
            acts = acts.reshape(*x.shape[:2], -1) * batch.here[self.source.place][:, :, None]
            fires = torch.nonzero((acts != 0).any(1))
            for part in torch.split(fires, self.batch_rows):
                self._add(batch, part[:, 0], part[:, 1], acts[part[:, 0], :, part[:, 1]])
        return self.sums

    def _add(
        self, batch: Batch, rows: Int[Tensor, " m"], slots: Int[Tensor, " m"], acts: Float[Tensor, "m seq"]
    ) -> None:
        """Each of some inputs with one source taken out."""
        run = _some(batch.run, rows)
        at = torch.nonzero(acts)
        owner = slots[at[:, 0]].cpu()
        self.sums.n.index_add_(0, owner, torch.ones(len(owner), dtype=torch.float64))
        before = [
            place.dictionary.encode(run.activations[place.hookpoint][at[:, 0], at[:, 1]].float())
            for place in self.later
        ]
        for i, encoded in enumerate(before):
            fires = (encoded.acts != 0).to(torch.float64)
            _scatter(self.sums.fires[i], owner, encoded, fires)
            for arm in range(2):
                _scatter(self.sums.change[i][arm], owner, encoded, -encoded.acts.to(torch.float64))
        x = run.activations[self.place.hookpoint]
        for arm in range(2):
            moved = acts[:, :, None] * self.directions[arm][slots][:, None]
            after = self._after(run, (x.float() - moved).to(x.dtype))
            for i, place in enumerate(self.later):
                encoded = place.dictionary.encode(after[place.hookpoint][at[:, 0], at[:, 1]].float())
                _scatter(self.sums.change[i][arm], owner, encoded, encoded.acts.to(torch.float64))

    def _after(self, run: BaseRun, replaced: Float[Tensor, "m seq d"]) -> dict[str, Tensor]:
        """What the later places read when the source's is replaced."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], Tensor]:
            def look(x: Tensor) -> Tensor:
                found[name] = x.clone()
                return x

            return look

        with self.inputs.lm.edit({place.hookpoint: keep(place.hookpoint) for place in self.later}):
            self.splicer.spliced(run, {self.place.hookpoint: replaced})
        return found


def _some(run: BaseRun, rows: Int[Tensor, " m"]) -> BaseRun:
    """Some inputs of a run."""
    mask = None if run.mask is None else run.mask[rows.to(run.mask.device)]
    activations = {name: values[rows] for name, values in run.activations.items()}
    return BaseRun(run.ids[rows.to(run.ids.device)], mask, run.hidden[rows], activations)


def _scatter(
    sums: Float[Tensor, "sources d_sae"],
    owner: Int[Tensor, " rows"],
    encoded: Encoded,
    values: Float[Tensor, " nnz"],
) -> None:
    """Add entries to the sums of the sources that their rows belong to."""
    places = owner[encoded.row_ids().cpu()] * sums.shape[1] + encoded.indices.long().cpu()
    sums.view(-1).index_add_(0, places, encoded.only_stored(values).cpu())


def _kept(latents: Sequence[int], sums: _Sums, later: Sequence[int], n_targets: int) -> Changes:
    """The largest mean changes of each source and place."""
    n = sums.n.clamp_min(1)
    columns: list[list[np.ndarray]] = [[] for _ in Edges._fields]
    totals = []
    for number, change, fires in zip(later, sums.change, sums.fires, strict=True):
        mean = change / n[:, None]
        totals.append(mean.abs().sum(-1).T)
        best = mean.abs().topk(min(n_targets, mean.shape[-1]), dim=-1).indices
        for arm in range(2):
            for slot, latent in enumerate(latents):
                chosen = best[arm, slot]
                chosen = chosen[mean[arm, slot, chosen] != 0]
                own = (
                    np.full(len(chosen), latent, np.int32),
                    np.full(len(chosen), number, np.int32),
                    chosen.numpy().astype(np.int32),
                    mean[arm, slot, chosen].numpy().astype(np.float32),
                    np.full(len(chosen), int(sums.n[slot]), np.int32),
                    fires[slot, chosen].numpy().astype(np.int32),
                    np.full(len(chosen), arm == 1),
                )
                for column, values in zip(columns, own, strict=True):
                    column.append(values)
    edges = Edges(*(np.concatenate(column) for column in columns))
    return Changes(edges, sums.n.numpy().astype(np.int64), torch.stack(totals, dim=-1).numpy())
