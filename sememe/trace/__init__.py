"""The verb that traces a number back to latents: which of them, at which positions, made the model say this.

Knows dictionaries of one model, prompts and a number (a logit difference, a loss, a latent's activation); every
prediction is held against real ablations. An artifact of kind "graph".

    config.py        the options
    places.py        dictionaries in a model, and what they make of its activations
    metric.py        numbers that can be traced
    table.py         what is changed: latents and errors, entry by entry, and the nodes they belong to
    attribution.py   effects of all nodes from few passes
    exact.py         effects of single nodes and edges by real forwards
    edges.py         from node to node, by Jacobians
    circuit.py       faithfulness and completeness
    feeds.py         what feeds a latent, and what feeds that
    results.py       what was found
    drawn.py         results as a graph
    pages.py         results as Markdown and figures
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.errors import ConfigError, ShapeError
from sememe.graph import FILE, write_graph
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.text import TokenPolicy, fetch, fingerprint
from sememe.trace import drawn, pages
from sememe.trace.attribution import EMBEDDED, Attribution, Passes, attribute, integrate
from sememe.trace.circuit import Circuits, curves
from sememe.trace.config import Ablation, TraceConfig
from sememe.trace.edges import METRIC, Edges, edges_of
from sememe.trace.exact import Agreement, agreement, exact_edges, exact_effects
from sememe.trace.feeds import Fed, How, feeds
from sememe.trace.metric import (
    LatentMetric,
    Metric,
    PredictionMetric,
    kl,
    log_prob,
    logit,
    logit_difference,
    loss,
    of_logits,
)
from sememe.trace.places import (
    Inputs,
    Means,
    Placed,
    Reading,
    at_places,
    captured,
    inputs_of,
    means_of,
    readings,
)
from sememe.trace.results import Setting, Traced
from sememe.trace.table import ERROR, Table, shift_of

__all__ = [
    "ERROR",
    "METRIC",
    "Agreement",
    "Attribution",
    "Circuits",
    "Edges",
    "Fed",
    "How",
    "Inputs",
    "LatentMetric",
    "Metric",
    "Passes",
    "Placed",
    "PredictionMetric",
    "Setting",
    "Table",
    "TraceConfig",
    "agreement",
    "at_places",
    "attribute",
    "edges_of",
    "exact_edges",
    "exact_effects",
    "feeds",
    "inputs_of",
    "integrate",
    "kl",
    "log_prob",
    "logit",
    "logit_difference",
    "loss",
    "of_logits",
    "prepare",
    "trace",
]

VERSION = 4
PAGE = "trace.md"
NODES = "nodes.json"
"""Every node's predicted effect, those that are not in the graph too, and what was checked."""


def trace(config: TraceConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> artifact.Artifact:
    """Trace a number back to latents, or open the graph if it is there.

    Args:
        config: Which number, which dictionaries.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.
    Returns:
        The folder, with `graph.json`, `nodes.json`, `trace.md` and figures.
    Raises:
        ConfigError: a position is outside its prompt, a token's text is not one token, two dictionaries stand at one
            hookpoint, or the number does not depend on them.
        MismatchError: a dictionary belongs to another model, or is of another token policy than the others; an atlas
            is of another dictionary; or something else stands at config.out.
        ShapeError: a prompt and its counterpart are of different length.
        ActivationError: the number is NaN or infinite; a latent never fires on the text.
    """
    saved = {str(path): artifact.load(path, "dictionary") for path in config.dictionaries}
    reads_text = config.latent is not None or config.ablation == "mean"
    if reads_text:
        fetch(config.text)
    parents = {f"dictionary {i}": one.fingerprint for i, one in enumerate(saved.values())}
    parents["model"] = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    for kind, paths in (("atlas", config.atlases), ("explanations", config.explanations)):
        parents |= {f"{kind} {i}": artifact.load(path, kind).fingerprint for i, path in enumerate(paths)}
    if reads_text:
        parents["text"] = fingerprint(config.text)
    identity = artifact.identity_of("graph", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "graph", identity)):
        return done
    lm = lm if lm is not None else language_models.load(config.model)
    names = _names(config.dictionaries)
    places = at_places(
        lm,
        {names[path]: dictionaries.load(path) for path in config.dictionaries},
        policies={names[Path(path)]: _policy(one) for path, one in saved.items()},
        fingerprints={names[Path(path)]: one.fingerprint for path, one in saved.items()},
    )
    about = drawn.about(places, {names[p]: p for p in config.dictionaries}, config, saved)
    with artifact.building(
        config.out, kind="graph", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        found = _feeds(config, lm, places) if config.latent is not None else _prompts(config, lm, places)
        graph = (
            drawn.graph(found, about) if isinstance(found, Traced) else drawn.tree(lm, places, found, about)
        )
        write_graph(work.path / FILE, graph)
        details = drawn.details(found) if isinstance(found, Traced) else drawn.details_of(found)
        artifact.write_json(work.path / NODES, details)
        pages.write(work.path, PAGE, graph, details)
        work.extra["checks"] = dict(graph.checks)
        work.extra["scores"] = {k: v for k, v in graph.scores.items() if not isinstance(v, dict)}
    return artifact.load(config.out, "graph")


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Short names of folders, with as much of their paths as tells them apart."""
    last = [path.name for path in paths]
    return {path: path.name if last.count(path.name) == 1 else "/".join(path.parts[-2:]) for path in paths}


def _policy(saved: artifact.Artifact) -> TokenPolicy:
    return TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()


def prepare(
    lm: LanguageModel,
    places: Sequence[Placed],
    inputs: Inputs,
    metric: Metric,
    *,
    ablation: Ablation = "zero",
    patched: Inputs | None = None,
    means: Sequence[Means] | None = None,
    by_position: bool = True,
) -> Setting:
    """Run the model once with gradients (and once more on counterparts), and say what ablating would change.

    Args:
        lm: The model.
        places: Its dictionaries.
        inputs: The prompts.
        metric: The number.
        ablation: What a latent is set to.
        patched: With patch: the counterparts.
        means: With mean: see `places.means_of`.
        by_position: Whether nodes are at positions.
    Raises:
        ShapeError: prompts of different length, where their positions must be the same.
        ConfigError: the number does not depend on what is at a place.
    """
    if patched is not None and not torch.equal(inputs.mask, patched.mask):
        raise ShapeError(
            "a prompt and its patched counterpart must have as many tokens",
            f"{inputs.lengths.tolist()} and {patched.lengths.tolist()}",
            "Reword one of them.",
        )
    if by_position and len(set(inputs.lengths.tolist())) > 1:
        raise ShapeError(
            "prompts whose nodes are at positions must have as many tokens as each other",
            inputs.lengths.tolist(),
            "Reword them, or pass --no-by-position.",
        )
    passes = Passes(lm, places, inputs, metric)
    base = passes.run()
    clean = readings(lm, places, inputs, base.activations)
    others: Sequence[Reading] | None = None
    embedded: Tensor | None = None
    value: float | None = None
    if ablation == "patch":
        assert patched is not None
        with torch.no_grad(), passes.counted():
            activations = captured(lm, places, patched)
            others = readings(lm, places, patched, activations)
            value = float(metric.forward(lm, patched).mean())
        with torch.no_grad():
            before, after = (lm.capture(one.ids, [EMBEDDED], one.mask)[EMBEDDED] for one in (inputs, patched))
        embedded = after - before
    shifts = [
        shift_of(
            placed,
            run,
            ablation,
            patched=None if others is None else others[i],
            means=None if means is None else means[i],
        )
        for i, (placed, run) in enumerate(zip(places, clean, strict=True))
    ]
    table = Table(places, inputs, shifts, by_position=by_position)
    circuits = Circuits(passes, table, clean, ablation, patched=others, means=means)
    return Setting(passes, base, table, circuits, embedded, value)


def _prompts(config: TraceConfig, lm: LanguageModel, places: Sequence[Placed]) -> Traced:
    bos = places[0].policy.bos
    inputs = inputs_of(lm, config.prompts, bos=bos)
    patched = inputs_of(lm, config.patched, bos=bos) if config.patched else None
    if patched is not None and not torch.equal(inputs.lengths, patched.lengths):
        raise ShapeError(
            "a prompt and its patched counterpart must have as many tokens",
            f"{inputs.lengths.tolist()} and {patched.lengths.tolist()}",
            "Reword one of them.",
        )
    metric = _metric(config, lm, inputs, patched)
    means = (
        means_of(
            lm,
            places,
            config.text,
            split=config.split,
            n_tokens=config.n_tokens,
            batch_rows=config.batch_rows,
        )
        if config.ablation == "mean"
        else None
    )
    with track("trace", 5, "steps") as progress:
        setting = prepare(
            lm,
            places,
            inputs,
            metric,
            ablation=config.ablation,
            patched=patched,
            means=means,
            by_position=config.by_position,
        )
        passes, base, table = setting.passes, setting.base, setting.table
        generator = torch.Generator().manual_seed(config.seed)
        attribution = _attribution(config, setting)
        progress.advance()
        order = attribution.effects.abs().argsort(descending=True, stable=True)
        loud = order[attribution.effects[order].abs() >= config.node_threshold]
        nodes = loud[: config.max_nodes]
        checked = order[: config.n_largest].tolist()
        others = order[config.n_largest :]
        checked += others[
            torch.randperm(len(others), generator=generator)[: config.n_checked_random]
        ].tolist()
        exact = exact_effects(passes, table, base, checked, batch_rows=config.batch_rows).tolist()
        progress.advance()
        direct = config.edges == "direct"
        edges: Edges | None = None
        every: Edges | None = None
        checked_edges: list[tuple[int, int]] = []
        true_edges: list[float] = []
        if config.max_edges and len(nodes):
            every = edges_of(passes, table, base, nodes, direct=direct, batch_rows=config.batch_rows)
            edges = _heaviest(every, config.max_edges, config.edge_threshold)
            progress.advance()
            checked_edges = _some_edges(every, config.n_checked_edges, generator)
            true_edges = exact_edges(
                passes, table, base, checked_edges, direct=direct, batch_rows=config.batch_rows
            ).tolist()
        found: dict[str, Any] | None = None
        if config.n_random:
            found = curves(
                setting.circuits,
                base,
                attribution.effects,
                n_random=config.n_random,
                generator=generator,
                batch_rows=config.batch_rows,
            )
        progress.advance()
    return Traced(
        config=config,
        setting=setting,
        attribution=attribution,
        nodes=nodes.tolist(),
        edges=edges,
        all_edges=every,
        checked=checked,
        exact=exact,
        checked_edges=checked_edges,
        exact_edges=true_edges,
        curves=found,
    )


def _attribution(config: TraceConfig, setting: Setting) -> Attribution:
    passes, table, base = setting.passes, setting.table, setting.base
    if config.method == "gradient":
        return attribute(passes, table, base)
    return integrate(
        passes,
        table,
        base,
        path=config.path,
        n_steps=config.n_steps,
        n_grouped=config.n_grouped,
        reach=config.reach,
        embedded=setting.embedded,
    )


def _metric(config: TraceConfig, lm: LanguageModel, inputs: Inputs, patched: Inputs | None) -> Metric:
    if config.metric == "logit_difference":
        return logit_difference(lm, inputs, config.answers, config.wrong, config.position)
    if config.metric == "logit":
        return logit(lm, inputs, config.answers, config.position)
    if config.metric == "log_prob":
        return log_prob(lm, inputs, config.answers, config.position)
    if config.metric == "loss":
        return loss(lm, inputs)
    return kl(lm, inputs, inputs if patched is None else patched, config.position)


def _heaviest(edges: Edges, n: int, threshold: float) -> Edges:
    order = edges.weight.abs().argsort(descending=True, stable=True)[:n]
    order = order[edges.weight[order].abs() >= threshold]
    return Edges(edges.source[order], edges.target[order], edges.weight[order])


def _some_edges(edges: Edges, n: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Half of them the heaviest, half drawn at random from the others."""
    order = edges.weight.abs().argsort(descending=True, stable=True)
    top, others = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    drawn_ones = others[torch.randperm(len(others), generator=generator)[: n // 2]]
    chosen = torch.cat([top, drawn_ones])
    return list(zip(edges.source[chosen].tolist(), edges.target[chosen].tolist(), strict=True))


def _feeds(config: TraceConfig, lm: LanguageModel, places: Sequence[Placed]) -> list[Fed]:
    assert config.latent is not None
    if len(places) < 2:
        raise ConfigError("there must be dictionaries of two hookpoints", len(places), "Name another.")
    how = How(
        text=config.text,
        split=config.split,
        n_tokens=config.n_tokens,
        n_contexts=config.n_contexts,
        depth=config.depth,
        width=config.width,
        method=config.method,
        path=config.path,
        n_steps=config.n_steps,
        n_grouped=config.n_grouped,
        reach=config.reach,
        n_checked=config.n_largest,
        seed=config.seed,
        batch_rows=config.batch_rows,
    )
    return feeds(lm, places, config.latent, how)
