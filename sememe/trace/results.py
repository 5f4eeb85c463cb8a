"""What was found of one number: the run, what would change in it, effects, edges and checks. Computes nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sememe.trace.attribution import Attribution, Pass, Passes
from sememe.trace.circuit import Circuits
from sememe.trace.config import TraceConfig
from sememe.trace.edges import Edges
from sememe.trace.table import Table

__all__ = ["Setting", "Traced"]


class Setting(NamedTuple):
    """A number, what it is made of, and what would change if every node were changed."""

    passes: Passes
    base: Pass
    table: Table
    circuits: Circuits
    embedded: Tensor | None
    """The counterpart's embeddings minus the prompt's, with ablation patch."""
    patched: float | None
    """The number of the counterpart."""


class Traced(NamedTuple):
    """Everything that was found of one number."""

    config: TraceConfig
    setting: Setting
    attribution: Attribution
    nodes: list[int]
    """Those in the graph, largest first."""
    edges: Edges | None
    """Those in the graph."""
    all_edges: Edges | None
    """Between the nodes in the graph, light ones too."""
    checked: list[int]
    exact: list[float]
    checked_edges: list[tuple[int, int]]
    exact_edges: list[float]
    curves: dict[str, Any] | None
