"""Effects of all latents and errors of all places on a number, predicted from few forwards and backwards.

At every place a zero is added to the activation, x + d, and the number's gradient at d is that of the residual itself:
what passes the place counts, and errors get no gradient through the reconstruction. From dm/dx follow
dm/df = (dm/dx) D^T for the latents that are active, and dm/dx for the errors.

    gradient   the gradient where nothing is changed, times the change (attribution patching)
    ig         the gradient averaged over points of a path on which things are changed

Ways through which ig goes, with n_steps passes for all places together unless said otherwise:

    groups     The nodes with the largest gradient effects are dealt out to n_steps - 1 groups, those of one position
               as far apart as can be, because they act on each other most. In each pass one group, of all places, is
               changed by half; its nodes take the gradient from there (the middle of their own path), all others that
               of the unchanged run.
    inputs     The embeddings go from the prompt's to its counterpart's, and everything follows.
    layers     Each place goes from its own activation to the changed one while nothing else is touched: n_steps
               passes for each. What circuits are usually found with (Marks et al. 2024, arXiv:2403.19647); here the
               slow reference.

A number that is least where nothing is changed (the divergence from the unedited predictions) has no gradient there but
rounding: only `layers` can trace it.

Knows no dictionary but as directions, and no text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.errors import ActivationError, ConfigError
from sememe.lm import LanguageModel
from sememe.trace.config import PathName
from sememe.trace.metric import Metric
from sememe.trace.places import Inputs, Placed
from sememe.trace.table import Table

__all__ = ["Attribution", "Pass", "Passes", "attribute", "check_slope", "integrate"]

EMBEDDED = "resid_pre.0"
"""Where a prompt's embeddings enter the layers."""
LEAST_REMEDY = "Set --path layers, or compare with a counterpart (--ablation patch --patched)."
Change = Callable[[Tensor], Tensor]


class Pass(NamedTuple):
    """One forward and its backward."""

    value: Float[Tensor, " batch"]
    gradients: tuple[Float[Tensor, "tokens d"], ...]
    """Of the number, at each place; rows of a batch do not see each other."""
    activations: dict[str, Float[Tensor, "batch seq d"]]
    """At everything that is read or written, before what was added."""


class Passes:
    """Runs a model on prompts, with gradients at some places, and counts how often.

    Args:
        lm: The model.
        places: Where gradients are wanted.
        inputs: The prompts.
        metric: The number.
    """

    def __init__(self, lm: LanguageModel, places: Sequence[Placed], inputs: Inputs, metric: Metric) -> None:
        self.lm, self.places, self.inputs, self.metric = lm, tuple(places), inputs, metric
        self.n_forwards, self.n_backwards = 0, 0

    def _count(self, x: Tensor) -> Tensor:
        self.n_forwards += 1
        return x

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Forwards of the model inside the context are counted, by a hook before its first layer."""
        with self.lm.edit({EMBEDDED: self._count}):
            yield

    def run(
        self, moved: Mapping[int, Float[Tensor, "tokens d"]] | None = None, embedded: Tensor | None = None
    ) -> Pass:
        """One forward and backward.

        Args:
            moved: What is added at places, by their number.
            embedded: What is added to the embeddings, (batch, seq, d).
        Raises:
            ConfigError: the number does not depend on what is at the places.
            ActivationError: it, or a gradient, is NaN or infinite.
        """
        leaves: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        edits = {name: self._reader(name, seen) for p in self.places for name in (p.reads, p.writes)}
        for i, placed in enumerate(self.places):
            added = None if moved is None else moved.get(i)
            edits[placed.writes] = self._leaf(placed.writes, added, leaves, seen)
        start: dict[str, Change] = {}
        if embedded is not None:
            start[EMBEDDED] = lambda x: x + embedded.to(x.device, x.dtype)
        with torch.enable_grad(), frozen(self.lm), self.lm.edit(start), self.counted(), self.lm.edit(edits):
            value = self.metric.forward(self.lm, self.inputs)
        self._check_depends(value, leaves)
        names = [placed.writes for placed in self.places]
        leaves[names[0]].register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        found = torch.autograd.grad(value.sum(), [leaves[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is None:
                raise self._no_effect(name)
        gradients = tuple(g.float().reshape(-1, g.shape[-1]) for g in found if g is not None)
        if not all(bool(torch.isfinite(g).all()) for g in (value, *gradients)):
            raise ActivationError(
                f"{self.metric.text} and its gradients must be finite",
                "NaN or infinity",
                "Load the model with --dtype float32, or check its weights.",
            )
        return Pass(value.detach().float(), gradients, seen)

    def _count_backward(self, gradient: Tensor) -> None:
        self.n_backwards += 1

    @staticmethod
    def _reader(name: str, seen: dict[str, Tensor]) -> Change:
        def look(x: Tensor) -> Tensor:
            seen[name] = x.detach().clone()
            return x

        return look

    @staticmethod
    def _leaf(name: str, added: Tensor | None, leaves: dict[str, Tensor], seen: dict[str, Tensor]) -> Change:
        def change(x: Tensor) -> Tensor:
            seen[name] = x.detach().clone()
            leaves[name] = torch.zeros_like(x, requires_grad=True)
            x = x + leaves[name]
            return x if added is None else x + added.to(x.device, x.dtype).reshape(x.shape)

        return change

    def _check_depends(self, value: Tensor, leaves: Mapping[str, Tensor]) -> None:
        if value.shape != self.inputs.ids.shape[:1]:
            raise ConfigError(
                "a metric must be one number for each row of tokens",
                f"shape {tuple(value.shape)} for {len(self.inputs.ids)} rows",
                "Keep the first axis.",
            )
        missing = [p.writes for p in self.places if p.writes not in leaves]
        if missing or not value.requires_grad:
            raise self._no_effect(missing[0] if missing else self.places[0].writes)

    def _no_effect(self, name: str) -> ConfigError:
        return ConfigError(
            f"the metric must depend on what is at {name}",
            f"{self.metric.text}, which does not",
            "Choose dictionaries of earlier hookpoints, or a metric that is read from the logits.",
        )


@contextlib.contextmanager
def frozen(lm: LanguageModel) -> Iterator[None]:
    """No gradient is kept for the model's own weights."""
    learning = [p for p in lm.hf.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class Attribution(NamedTuple):
    """Predicted effects of all nodes: what the number changes by when a node is changed, mean over prompts."""

    effects: Float[Tensor, " n_nodes"]
    rest: Float[Tensor, " n_places"]
    """The effect of what belongs to no node, by place."""
    clean: float
    """The number where nothing is changed, mean over prompts."""
    n_forwards: int
    n_backwards: int


def attribute(passes: Passes, table: Table, base: Pass) -> Attribution:
    """Gradient times change.

    Args:
        passes: How the model is run.
        table: What is changed.
        base: The run in which nothing is.
    Raises:
        ConfigError: the number is flat where nothing is changed.
    """
    check_slope(passes, base)
    effects = table.per_node(table.effects(base.gradients))
    return _result(passes, table, base, effects, base.gradients)


def check_slope(passes: Passes, base: Pass) -> None:
    """That the number has a gradient where nothing is changed, and not only rounding.

    Raises:
        ConfigError: it does not depend on a place, or is as small as it can be.
    """
    if passes.metric.is_least:
        raise ConfigError(
            "the metric must have a gradient where nothing is changed",
            f"{passes.metric.text}, which is least there, so that its gradient is rounding",
            LEAST_REMEDY,
        )
    _check_gradients(passes, base.gradients, "where nothing is changed")


def _check_gradients(passes: Passes, gradients: Sequence[Tensor], where: str) -> None:
    for placed, gradient in zip(passes.places, gradients, strict=True):
        if not bool((gradient != 0).any()):
            raise ConfigError(
                f"the metric must depend on what is at {placed.writes}",
                f"{passes.metric.text}, whose gradient is 0 {where}",
                "Choose another metric, or dictionaries of other hookpoints.",
            )


def integrate(
    passes: Passes,
    table: Table,
    base: Pass,
    *,
    path: PathName = "groups",
    n_steps: int = 10,
    n_grouped: int = 256,
    reach: float = 1.0,
    embedded: Tensor | None = None,
) -> Attribution:
    """Gradients averaged over a path, times change.

    Args:
        passes: How the model is run.
        table: What is changed.
        base: The run in which nothing is; counts as one of the passes of `groups`.
        path: As the module says.
        n_steps: Passes.
        n_grouped: How many nodes `groups` moves.
        reach: How far along the other paths gradients are taken, 1: to the end.
        embedded: With `inputs`: the counterpart's embeddings minus the prompt's.
    Raises:
        ConfigError: the number does not depend on a place; with `groups`: it is flat where nothing is changed.
    """
    if path == "groups":
        return _groups(passes, table, base, n_steps, n_grouped)
    points = [(step + 0.5) / n_steps * reach for step in range(n_steps)]
    if path == "inputs":
        assert embedded is not None
        runs = [passes.run(embedded=point * embedded).gradients for point in points]
        gradients = [torch.stack(found).mean(0) for found in zip(*runs, strict=True)]
    else:
        gradients = []
        for i in range(len(table.places)):
            whole = table.whole(i)
            gradients.append(
                torch.stack([passes.run({i: point * whole}).gradients[i] for point in points]).mean(0)
            )
    _check_gradients(passes, gradients, "all along the path")
    return _result(passes, table, base, table.per_node(table.effects(gradients)), gradients)


def _groups(passes: Passes, table: Table, base: Pass, n_steps: int, n_grouped: int) -> Attribution:
    check_slope(passes, base)
    effects = table.per_node(table.effects(base.gradients))
    for nodes in dealt_out(effects, table.node_position, n_grouped, n_steps - 1):
        mine = table.entries_of(nodes)
        moved = {
            i: table.moved(i, mine, 0.5)
            for i in range(len(table.places))
            if bool((table.place[mine] == i).any())
        }
        found = table.per_node(table.effects(passes.run(moved).gradients, only=mine))
        effects[nodes] = found[nodes]
    return _result(passes, table, base, effects, base.gradients)


def dealt_out(
    effects: Float[Tensor, " n"], positions: Int[Tensor, " n"], n_chosen: int, n_groups: int
) -> list[Int[Tensor, " k"]]:
    """The largest effects in groups: position by position, in order of size, one goes to each group in turn.

    Args:
        effects: Of all nodes.
        positions: Where each is.
        n_chosen: How many are dealt out.
        n_groups: Into how many groups; empty ones are left out.
    """
    order = effects.abs().argsort(descending=True, stable=True)[:n_chosen]
    order = order[positions[order].argsort(stable=True)]
    return [order[hand::n_groups] for hand in range(min(n_groups, len(order)))]


def _result(
    passes: Passes, table: Table, base: Pass, effects: Tensor, gradients: Sequence[Tensor]
) -> Attribution:
    rest = torch.stack(
        [
            (g.to(s.rest.device) * s.rest).sum() / table.n_prompts
            for g, s in zip(gradients, table.shifts, strict=True)
        ]
    )
    return Attribution(effects, rest, float(base.value.mean()), passes.n_forwards, passes.n_backwards)
