"""How much of what a model does a circuit accounts for, by resampling ablation. Knows circuits and inputs; no file.

Every input is given another one at random. Latents outside the circuit take the activation that they have there, at the
same position; those inside stay as they come out (without edges: from whatever is left of the model below; with edges:
from the nodes that have an edge to them, and nothing else). Where the token policy drops the position in either of the
two, nothing is resampled.

Source: causal scrubbing, Chan et al. 2022 (Alignment Forum), in the form in which all that is outside a hypothesis is
resampled together. Differs: latents of dictionaries instead of heads; one other input for all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe import metrics
from sememe.errors import ActivationError, TextError
from sememe.metrics.sums import Formula
from sememe.progress import track
from sememe.scrub.circuit import Circuit, Node, Place
from sememe.scrub.config import ScrubConfig
from sememe.scrub.inputs import Batch, Inputs, flat

__all__ = ["Scrubber", "other_rows", "random_like", "scrub_circuit"]

LOGIT_ROWS = 128
"""Rows of logits held at once."""

Given = tuple[list[int], Float[Tensor, "rows n_given"]]
"""Latents, and the activations that they are set to."""
NOTHING = Circuit((), ())


class _Found(NamedTuple):
    """What inputs have at one place."""

    x: Float[Tensor, "n seq d"]
    here: Bool[Tensor, "n seq"]
    """Positions that may be taken: kept by the policy and within the norm limit."""

    def of(self, rows: Int[Tensor, " n"]) -> _Found:
        """What some of them have."""
        return _Found(self.x[rows.to(self.x.device)], self.here[rows.to(self.here.device)])


class _Group(NamedTuple):
    """Batches of one length, and what all of their inputs have at every place."""

    batches: list[Batch]
    found: list[_Found]


def other_rows(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """For each of n inputs another one, at random: none is its own, and each is somebody's."""
    order = torch.randperm(n, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(-1)
    return other


def random_like(circuit: Circuit, firing: Sequence[Sequence[int]], rng: random.Random) -> Circuit:
    """A circuit of the same form of other latents, at random among those that fire; of all, where those are too few."""
    left = [list(latents) for latents in firing]
    for latents in left:
        rng.shuffle(latents)
    nodes = []
    for node in circuit.nodes:
        own = left[node.place]
        nodes.append(Node(node.name, node.place, tuple(own.pop() for _ in node.latents)))
    return Circuit(tuple(nodes), circuit.edges)


class Scrubber:
    """Inputs, each run once as it is, that are scrubbed as often as wanted.

    Args:
        config: The metric, and what becomes of the dictionaries' errors.
        inputs: What the model reads.

    Raises:
        TextError: the text gives one context only.
    """

    def __init__(self, config: ScrubConfig, inputs: Inputs) -> None:
        self.config, self.inputs, self.lm = config, inputs, inputs.lm
        self.places: tuple[Place, ...] = inputs.places
        by_length: dict[int, list[Batch]] = {}
        for batch in inputs.batches():
            by_length.setdefault(batch.run.ids.shape[1], []).append(batch)
        names = [place.hookpoint for place in self.places]
        self.groups = [
            _Group(
                batches,
                [
                    _Found(
                        torch.cat([batch.run.activations[name] for batch in batches]),
                        torch.cat([batch.here[number] for batch in batches]),
                    )
                    for number, name in enumerate(names)
                ],
            )
            for batches in by_length.values()
        ]
        self.n_inputs = sum(len(group.found[0].x) for group in self.groups)
        if self.n_inputs < 2:
            raise TextError(
                "the text must give at least two contexts, to take activations from one another",
                f"one, of {self.groups[0].found[0].x.shape[1]} tokens",
                "Raise --n-tokens, or give more text.",
            )

    @torch.no_grad()
    def firing(self) -> list[list[int]]:
        """Of each place, the latents that fire on the inputs."""
        found = []
        for number, place in enumerate(self.places):
            fires = torch.zeros(place.dictionary.d_sae, dtype=torch.bool)
            for group in self.groups:
                for batch in group.batches:
                    rows = flat(batch.run.activations[place.hookpoint])[batch.here[number].reshape(-1)]
                    encoded = place.dictionary.encode(rows).compact()
                    fires[encoded.indices.long()[encoded.acts != 0].cpu()] = True
            found.append(torch.nonzero(fires).flatten().tolist())
        return found

    def unedited(self) -> float:
        """The metric of the model as it is."""
        return self._over(lambda batch, _: batch.run.hidden, None)

    def scrubbed(self, circuit: Circuit, seed: int) -> float:
        """The metric with all but the circuit resampled.

        Args:
            circuit: What stays.
            seed: Of which input takes from which.
        """
        return self._over(lambda batch, others: self._outcome(batch, others, circuit), seed)

    @torch.no_grad()
    def _over(self, hidden_of: Callable[[Batch, list[_Found]], Tensor], seed: int | None) -> float:
        """The mean of the metric over all inputs."""
        generator = torch.Generator().manual_seed(seed or 0)
        total, n = 0.0, 0
        for group in self.groups:
            others = other_rows(len(group.found[0].x), generator)
            start = 0
            for batch in group.batches:
                rows = others[start : start + len(batch.run.ids)]
                start += len(batch.run.ids)
                taken = [found.of(rows) for found in group.found]
                own, own_n = self._metric(batch, hidden_of(batch, taken))
                total, n = total + own, n + own_n
        value = total / max(n, 1)
        if not np.isfinite(value):
            raise ActivationError(
                f"the metric {self.config.metric_in_use} must be finite",
                "NaN or infinity",
                "Load the model in float32 (--dtype float32), or check its weights.",
            )
        return value

    # -- what stays --------------------------------------------------------------------------------------------

    def _outcome(self, batch: Batch, others: list[_Found], circuit: Circuit) -> Tensor:
        if not circuit.edges:
            kept = [circuit.latents_at(number) for number in range(len(self.places))]
            return self._forward(batch, others, kept, {}, len(self.places))[0]
        acts: dict[int, Tensor] = {}
        waiting = sorted(
            {(node.place, circuit.parents(i)) for i, node in enumerate(circuit.nodes)}, key=_by_place
        )
        for place, parents in waiting:  # nodes that are reached from the same ones share a forward
            if parents:
                given = self._given(circuit, parents, acts)
                kept = [given[number][0] if number in given else [] for number in range(len(self.places))]
                x = self._forward(batch, others, kept, given, place)[1]
            else:  # it depends on nothing but the input
                x = batch.run.activations[self.places[place].hookpoint]
            encoded = self.places[place].dictionary.encode(flat(x))
            for i, node in enumerate(circuit.nodes):
                if node.place == place and circuit.parents(i) == parents:
                    acts[i] = encoded.columns(node.latents)
        given = self._given(circuit, circuit.parents(None), acts)
        kept = [given[number][0] if number in given else [] for number in range(len(self.places))]
        return self._forward(batch, others, kept, given, len(self.places))[0]

    def _given(
        self, circuit: Circuit, parents: frozenset[int], acts: Mapping[int, Tensor]
    ) -> dict[int, Given]:
        """What the latents of some nodes are set to, by place."""
        out: dict[int, Given] = {}
        for i in sorted(parents):
            node = circuit.nodes[i]
            latents, values = out.get(node.place, ([], acts[i][:, :0]))
            out[node.place] = [*latents, *node.latents], torch.cat([values, acts[i]], dim=1)
        return out

    def _forward(
        self, batch: Batch, others: list[_Found], kept: list[list[int]], given: Mapping[int, Given], stop: int
    ) -> tuple[Tensor, Tensor]:
        """What the unembedding sees with all places below `stop` scrubbed; and what the place `stop` reads then."""
        read: list[Tensor] = [batch.run.hidden]

        def scrub(number: int) -> Callable[[Tensor], Tensor]:
            return lambda x: self._replaced(number, x, others[number], batch, kept[number], given.get(number))

        def look(x: Tensor) -> Tensor:
            read[0] = x.clone()
            return x

        edits = {self.places[number].hookpoint: scrub(number) for number in range(stop)}
        if stop < len(self.places):
            edits[self.places[stop].hookpoint] = look
        with self.lm.edit(edits):
            hidden = self.inputs.splicer.spliced(batch.run, {})
        return hidden, read[0]

    def _replaced(
        self,
        number: int,
        x: Float[Tensor, "n seq d"],
        other: _Found,
        batch: Batch,
        kept: Sequence[int],
        given: Given | None,
    ) -> Float[Tensor, "n seq d"]:
        """Activations whose latents are another input's, but for those that are kept or given."""
        dictionary = self.places[number].dictionary
        rows, theirs = flat(x), flat(other.x)
        outside = torch.ones(dictionary.d_sae, dtype=torch.bool, device=rows.device)
        outside[list(kept)] = False
        own, taken = dictionary.encode(rows), dictionary.encode(theirs)
        moved = dictionary.decode(taken.select_latents(outside), rows)
        moved = moved - dictionary.decode(own.select_latents(outside), rows)
        if given is not None:
            latents, values = given
            moved = moved + (values - own.columns(latents)) @ dictionary.decoder_directions()[latents].float()
        if self.config.error == "resample":
            missing = rows - dictionary.decode(own, rows)
            moved = moved + (theirs - dictionary.decode(taken, theirs)) - missing
        here = (batch.here[number] & other.here.to(batch.here[number].device)).reshape(-1)
        return torch.where(here[:, None], rows + moved, rows).to(x.dtype).reshape(x.shape)

    # -- the metric --------------------------------------------------------------------------------------------

    def _metric(self, batch: Batch, hidden: Tensor) -> tuple[float, int]:
        """Its sum, and over how many predictions."""
        metric = self.config.metric_in_use
        if metric == "logit_difference":
            assert batch.asked is not None
            both = self.lm.logits(hidden[:, -1:])[:, 0].float().gather(1, batch.asked.to(hidden.device))
            return float((both[:, 0] - both[:, 1]).sum(dtype=torch.float64)), len(both)
        total = 0.0
        targets = torch.roll(batch.run.ids.to(hidden.device), -1, dims=1)
        places = torch.nonzero(batch.scored)
        for part in torch.split(places, LOGIT_ROWS):
            row, column = part[:, 0], part[:, 1]
            says = self._log_probs(hidden[row, column])
            if metric == "loss":
                values = -says.gather(1, targets[row, column][:, None])
            else:
                base = self._log_probs(batch.run.hidden[row, column])
                values = torch.where(base.isneginf(), 0.0, base.exp() * (base - says)).sum(1)
            total += float(values.sum(dtype=torch.float64))
        return total, len(places)

    def _log_probs(self, hidden: Float[Tensor, "rows d"]) -> Float[Tensor, "rows vocab"]:
        return self.lm.logits(hidden[None])[0].float().log_softmax(-1)


def _by_place(item: tuple[int, frozenset[int]]) -> tuple[int, list[int]]:
    return item[0], sorted(item[1])


def _mean(name: str) -> Formula:
    return lambda t: t[name] / t["n"]


def _score(name: str) -> Formula:
    return lambda t: (t[name] - t["nothing"]) / (t["base"] - t["nothing"])


def scrub_circuit(config: ScrubConfig, scrubber: Scrubber, circuit: Circuit) -> dict[str, Any]:
    """How much a circuit recovers, beside random ones of its size, as plain JSON data.

    Every resample gives each input another one; the circuit, nothing, and a random circuit are tested on the same.
    """
    firing = [
        found if len(found) >= len(circuit.latents_at(number)) else list(range(place.dictionary.d_sae))
        for number, (found, place) in enumerate(zip(scrubber.firing(), scrubber.places, strict=True))
    ]
    base = scrubber.unedited()
    values: dict[str, list[float]] = {"nothing": [], "circuit": [], "random": []}
    with track("scrub", config.n_resamples, "resamples") as progress:
        for number in range(config.n_resamples):
            seed = config.seed * 1_000_003 + number
            drawn = random_like(circuit, firing, random.Random(seed))
            for name, one in (("nothing", NOTHING), ("circuit", circuit), ("random", drawn)):
                values[name].append(scrubber.scrubbed(one, seed))
            progress.advance()
    sums = {name: np.array(own) for name, own in values.items()}
    sums |= {"n": np.ones(config.n_resamples), "base": np.full(config.n_resamples, base)}
    formulas = {name: _mean(name) for name in values}
    formulas |= {f"score_{name}": _score(name) for name in ("circuit", "random")}
    found = metrics.bootstrap(sums, formulas, n=config.n_bootstrap, seed=config.seed)
    return {
        "metric": config.metric_in_use,
        "error": config.error,
        "n_inputs": scrubber.n_inputs,
        "n_resamples": config.n_resamples,
        "n_latents": circuit.n_latents,
        "n_edges": len(circuit.edges),
        "nodes": [
            {"name": node.name, "dictionary": scrubber.places[node.place].name, "latents": list(node.latents)}
            for node in circuit.nodes
        ],
        "unedited": base,
        **{
            name: {
                **value.to_json(),
                **({"cause": value.cause.replace("documents", "resamples")} if value.cause else {}),
            }
            for name, value in found.items()
        },
    }
