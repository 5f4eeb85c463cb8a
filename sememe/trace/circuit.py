"""How much of a number a circuit makes: everything outside it ablated, in one forward with the circuit's own latents.

At each place, of what arrives there, x with latents f and error e (effects of earlier ablations are in them), and of
what everything ablated is there, x0 with f0 and e0:

    only the circuit C       x0 + sum over C of (f - f0) D  [+ (e - e0), errors being in]
    all but the circuit      x  - sum over C of (f - f0) D

    faithfulness(C) = (m(only C) - m(nothing)) / (m(everything) - m(nothing)),  completeness: the same of all but C.

Source: Marks et al. 2024, arXiv:2403.19647, section 3. Differs: numbers of nodes rather than thresholds; beside random
circuits of the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.trace.attribution import Pass, Passes
from sememe.trace.config import Ablation
from sememe.trace.places import Means, Reading, kept, read, written
from sememe.trace.table import ERROR, Table

__all__ = ["Circuits", "curves", "sizes"]


class Circuits:
    """Runs a model with only some latents, or with all but them.

    Args:
        passes: The model, its prompts and the number.
        table: What the latents are, and what ablating them makes of them.
        clean: The places in the run in which nothing is changed.
        ablation: What is put in the place of what is ablated.
        patched: With ablation patch: the places in the counterpart's run.
        means: With ablation mean.
    """

    def __init__(
        self,
        passes: Passes,
        table: Table,
        clean: Sequence[Reading],
        ablation: Ablation,
        *,
        patched: Sequence[Reading] | None = None,
        means: Sequence[Means] | None = None,
    ) -> None:
        self.passes, self.table, self.ablation, self.patched, self.means = (
            passes,
            table,
            ablation,
            patched,
            means,
        )
        self.emptied = [run.x + table.whole(i) for i, run in enumerate(clean)]
        self.keeps = [kept(passes.lm, placed, table.inputs) for placed in table.places]
        # Errors where everything is ablated; positions without a dictionary are never ablated to zero or to the mean.
        self.errors = [run.error + shift.error for run, shift in zip(clean, table.shifts, strict=True)]
        self.free = [~run.keep if ablation != "patch" else torch.zeros_like(run.keep) for run in clean]

    @torch.no_grad()
    def values(
        self,
        circuits: Sequence[Bool[Tensor, " n_nodes"]],
        *,
        without: bool = False,
        errors: bool = True,
        batch_rows: int = 16,
    ) -> Float[Tensor, " k"]:
        """The number of each circuit, mean over prompts.

        Args:
            circuits: Which nodes are in each; errors among them are left to `errors`.
            without: All but the circuit, instead of only it.
            errors: Whether errors are in (of only the circuit; all but it has them).
            batch_rows: Rows of tokens in a forward.
        """
        n = self.table.n_prompts
        step = max(batch_rows // n, 1)
        out = []
        for start in range(0, len(circuits), step):
            part = circuits[start : start + step]
            writes = {placed.writes for placed in self.table.places}
            reads: dict[str, Tensor] = {}
            edits: dict[str, Any] = {}
            for i, placed in enumerate(self.table.places):
                if placed.reads not in writes:
                    edits[placed.reads] = self._reader(placed.reads, reads)
                edits[placed.writes] = self._hook(i, part, reads, without=without, errors=errors)
            with self.passes.lm.edit(edits):
                value = self.passes.metric.forward(self.passes.lm, self.passes.inputs.repeated(len(part)))
            out.append(value.float().cpu().reshape(len(part), n).mean(1))
        return torch.cat(out)

    @staticmethod
    def _reader(name: str, reads: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            reads[name] = x
            return x

        return look

    def _hook(
        self, place: int, circuits: Sequence[Tensor], reads: dict[str, Tensor], *, without: bool, errors: bool
    ) -> Callable[[Tensor], Tensor]:
        placed = self.table.places[place]

        def change(x: Tensor) -> Tensor:
            source = x if placed.reads == placed.writes else reads[placed.reads]
            n = self.table.n_prompts
            out = []
            for i, circuit in enumerate(circuits):
                rows = slice(i * n, (i + 1) * n)
                out.append(self._one(place, circuit, source[rows], x[rows], without=without, errors=errors))
            new = torch.cat(out).to(x.device, x.dtype)
            reads[placed.writes] = new
            return new

        return change

    def _one(
        self, place: int, circuit: Tensor, x_in: Tensor, x_out: Tensor, *, without: bool, errors: bool
    ) -> Float[Tensor, "batch seq d"]:
        table = self.table
        placed = table.places[place]
        run = read(placed, x_in, x_out, self.keeps[place])
        inside = self._contains(place, circuit, run)
        part = written(placed, table.n_tokens, run.token[inside], run.latent[inside], run.act[inside])
        part = part - self._ablated(place, circuit, run.keep)
        if without:
            new = run.x - part
        else:
            new = self.emptied[place] + part
            if errors:
                new = new + run.error - self.errors[place]
            new = torch.where(self.free[place][:, None], run.x, new)
        return new.reshape(x_out.shape)

    def _nodes(self, place: int, circuit: Bool[Tensor, " n_nodes"]) -> Int[Tensor, " k"]:
        mine = circuit & (self.table.node_place == place) & (self.table.node_latent != ERROR)
        return torch.nonzero(mine)[:, 0]

    def _contains(self, place: int, circuit: Tensor, run: Reading) -> Bool[Tensor, " nnz"]:
        """Which active latents of a run are in a circuit."""
        table, nodes = self.table, self._nodes(place, circuit)
        wanted = table.node_latent[nodes] * table.seq + table.node_position[nodes]
        at = run.token % table.seq if table.by_position else torch.zeros_like(run.token)
        return torch.isin(run.latent * table.seq + at, wanted)

    def _ablated(
        self, place: int, circuit: Tensor, keep: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d"] | float:
        """What a circuit's latents would write if they were ablated too."""
        table, placed = self.table, self.table.places[place]
        if self.ablation == "zero":
            return 0.0
        if self.ablation == "patch":
            assert self.patched is not None
            run = self.patched[place]
            inside = self._contains(place, circuit, run)
            return written(placed, table.n_tokens, run.token[inside], run.latent[inside], run.act[inside])
        assert self.means is not None
        nodes = self._nodes(place, circuit)
        latent, at = table.node_latent[nodes], table.node_position[nodes]
        by_position = written(placed, table.seq, at, latent, self.means[place].latents[latent])
        if not table.by_position:  # all lie at 0
            by_position = by_position[:1].expand(table.seq, -1)
        return by_position.repeat(table.n_prompts, 1) * keep[:, None]


def sizes(n_nodes: int) -> list[int]:
    """How large circuits are looked at: 0, 1, 2, 5, 10, ... and all."""
    found = [0]
    step = 1
    while step < n_nodes:
        found += [size for size in (step, 2 * step, 5 * step) if size < n_nodes]
        step *= 10
    return [*found, n_nodes]


def curves(
    circuits: Circuits,
    base: Pass,
    effects: Float[Tensor, " n_nodes"],
    *,
    n_random: int = 3,
    generator: torch.Generator | None = None,
    batch_rows: int = 16,
) -> dict[str, Any] | None:
    """Faithfulness and completeness of circuits of the largest effects, and of random ones; None where ablating
    everything changes nothing.

    Args:
        circuits: How they are run.
        base: The run in which nothing is changed.
        effects: Of all nodes; errors' do not count.
        n_random: Random circuits of each size.
        generator: Of these.
        batch_rows: Rows of tokens in a forward.
    Returns:
        `n_nodes` (sizes) and, by name, as many numbers; `m_everything` and `m_nothing`.
    """
    table = circuits.table
    generator = generator or torch.Generator().manual_seed(0)
    latents = torch.nonzero(table.node_latent != ERROR)[:, 0]
    order = latents[effects[latents].abs().argsort(descending=True, stable=True)]
    wanted = sizes(len(order))
    nothing = float(circuits.values([_chosen(table, order[:0])], errors=False)[0])
    everything = float(base.value.mean())
    if everything == nothing:
        return None

    def shares(orders: Sequence[Tensor], *, without: bool, errors: bool) -> list[float]:
        sets = [_chosen(table, own[:size]) for own in orders for size in wanted]
        values = circuits.values(sets, without=without, errors=errors, batch_rows=batch_rows)
        return ((values.reshape(len(orders), -1).mean(0) - nothing) / (everything - nothing)).tolist()

    randoms = [
        order[torch.randperm(len(order), generator=generator).to(order.device)] for _ in range(n_random)
    ]
    found = {
        "faithfulness": shares([order], without=False, errors=True),
        "faithfulness_without_errors": shares([order], without=False, errors=False),
        "completeness": shares([order], without=True, errors=True),
    }
    if randoms:
        found["faithfulness_random"] = shares(randoms, without=False, errors=True)
        found["faithfulness_without_errors_random"] = shares(randoms, without=False, errors=False)
        found["completeness_random"] = shares(randoms, without=True, errors=True)
    return {"n_nodes": wanted, "m_everything": everything, "m_nothing": nothing, **found}


def _chosen(table: Table, nodes: Int[Tensor, " k"]) -> Bool[Tensor, " n_nodes"]:
    chosen = torch.zeros(table.n_nodes, dtype=torch.bool, device=table.node.device)
    chosen[nodes] = True
    return chosen
