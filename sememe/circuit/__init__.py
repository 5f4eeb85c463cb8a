"""The verb that says what feeds what on one prompt: the linear attribution graph of a model seen through transcoders.

Knows transcoders, the frozen model and the graph. MLPs are replaced by what transcoders make of them plus an error, all
else that is not linear is held as it was, and what is left is followed backwards from the likeliest tokens.

    config.py    the options
    sources.py   active latents, errors and embeddings
    rows.py      what every source gives to a target, exactly
    growth.py    which targets are looked into, and the edges so far
    exact.py     the same effects by real forwards
    summary.py   the graph as a page of text
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe import artifact, dictionaries, graph
from sememe import lm as language_models
from sememe.atlas import dictionary_of, labels, open_atlas
from sememe.circuit.config import CircuitConfig
from sememe.circuit.exact import agreement, chosen, exact_edges, exact_effects
from sememe.circuit.growth import Grown, grow
from sememe.circuit.rows import Targets
from sememe.circuit.sources import Sources
from sememe.circuit.summary import page
from sememe.downstream import prompt_ids
from sememe.errors import ConfigError, MismatchError
from sememe.graph import DictionaryRef, Edge, Graph, GraphNode, node_id
from sememe.lm import Frozen, LanguageModel
from sememe.text import TokenPolicy

__all__ = ["CircuitConfig", "circuit"]

VERSION = 3
PAGE = "circuit.md"


class _Loaded(NamedTuple):
    saved: artifact.Artifact
    dictionary: dictionaries.Dictionary
    policy: TokenPolicy


class _Explained(NamedTuple):
    """The tokens whose logits are followed back."""

    tokens: Int[Tensor, " n"]
    probabilities: Float[Tensor, " n"]
    targets: Targets
    directions: Float[Tensor, "n d_hidden"]
    offsets: Float[Tensor, " n"]

    def metric(self, hidden: Float[Tensor, "rows d_hidden"]) -> Float[Tensor, " rows"]:
        """Their logits, less the vocabulary's mean, weighted by their probabilities on the prompt."""
        return (hidden @ self.directions.T + self.offsets) @ self.probabilities


def circuit(
    config: CircuitConfig, *, lm: LanguageModel | None = None, fresh: bool = False
) -> artifact.Artifact:
    """The pruned graph of a prompt, or the one that is there.

    Args:
        config: Prompt, transcoders, and how much is kept.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.
    Returns:
        The folder, with `graph.json` and `circuit.md`.
    Raises:
        ConfigError: a dictionary is no transcoder, or not linear; two of them share a layer; a token is none.
        MismatchError: a dictionary belongs to another model, or an atlas to another dictionary; or something else
            stands at config.out.
        ModelError: attention patterns, norms or MLPs of the model cannot be held still.
    """
    loaded = [_open(path) for path in config.dictionaries]
    model_fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    parents = {f"dictionary_{i}": one.saved.fingerprint for i, one in enumerate(loaded)}
    parents["model"] = model_fingerprint
    for kind, paths in (("atlas", config.atlases), ("explanations", config.explanations)):
        parents |= {f"{kind}_{i}": artifact.load(path, kind).fingerprint for i, path in enumerate(paths)}
    identity = artifact.identity_of("circuit", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "circuit", identity, config, parents)):
        return done
    known = _known(config, loaded)
    lm = lm if lm is not None else language_models.load(config.model)
    with artifact.building(
        config.out, kind="circuit", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        made = _make(config, lm, loaded, known)
        graph.write_graph(work.path / graph.FILE, made)
        (work.path / PAGE).write_text(page(made), encoding="utf-8")
    return artifact.load(config.out, "circuit")


def _open(path: Path) -> _Loaded:
    saved = artifact.load(path, "dictionary")
    dictionary = dictionaries.load(path)
    policy = TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()
    return _Loaded(saved, dictionary, policy)


# ---- what is known of the latents ----------------------------------------------------------------------------


class _Known(NamedTuple):
    atlas: str | None = None
    labels: Mapping[int, str] = MappingProxyType({})


def _known(config: CircuitConfig, loaded: list[_Loaded]) -> list[_Known]:
    """For each dictionary its atlas, and what that and its explanations call the latents."""
    found = [_Known() for _ in loaded]
    place = {one.saved.fingerprint: i for i, one in enumerate(loaded)}
    for i, path in enumerate(config.atlases):
        atlas = open_atlas(path)
        try:
            of = dictionary_of(atlas)
            if of not in place:
                raise MismatchError(
                    "an atlas must be of one of the dictionaries",
                    f"{path}, of {of[:16]}",
                    "Leave it out, or name its dictionary.",
                )
            rows = atlas.query("SELECT l.id, t.text FROM latents l JOIN tokens t ON t.id = l.top_token")
        finally:
            atlas.close()
        names = {row["id"]: f"on {row['text']!r}" for row in rows}
        if config.explanations:
            names |= labels(config.explanations[i])
        found[place[of]] = _Known(str(path), names)
    return found


# ---- the graph -----------------------------------------------------------------------------------------------


def _make(config: CircuitConfig, lm: LanguageModel, loaded: list[_Loaded], known: list[_Known]) -> Graph:
    if len({one.policy.bos for one in loaded}) > 1:
        raise ConfigError(
            "dictionaries of one circuit must begin their rows alike",
            "some with a beginning-of-sequence token and some without",
            "Use dictionaries of one token policy.",
        )
    ids = prompt_ids(lm, config.prompt, loaded[0].policy.bos)
    frozen = Frozen(lm, ids)
    placed = [(one.dictionary.fold().eval().to(lm.device), one.policy) for one in loaded]
    sources = Sources(lm, frozen, placed)
    explained = _explained(config, lm, frozen)
    grown = grow(config, frozen, sources, explained.targets, explained.probabilities)
    pruned = graph.prune(grown.links, grown.sinks, config.keep_nodes, config.keep_edges)
    effects = grown.effects(sources)
    latents = np.flatnonzero(pruned.nodes[: sources.n_latents])
    which = chosen(effects, latents, config.n_checked, config.seed)
    exact = exact_effects(lm, ids, sources, which.tolist(), explained.metric, config.batch_rows)
    n_strongest = min((config.n_checked + 1) // 2, len(which))
    predicted = effects[which].tolist()
    scores = graph.scores(grown.links, grown.sinks)
    nodes = _nodes(
        lm, frozen, sources, explained, grown, known, effects, dict(zip(which, exact, strict=True))
    )
    edges = [
        Edge(nodes[a].id, nodes[b].id, float(w))
        for a, b, w in zip(
            grown.links.source[pruned.edges],
            grown.links.target[pruned.edges],
            grown.links.weight[pruned.edges],
            strict=True,
        )
    ]
    named = [repr(lm.token_text(token)) for token in explained.tokens.tolist()]
    clean = float(explained.metric(frozen.hidden[-1:].float())[0])
    return Graph(
        kind="linear",
        model=lm.name,
        ids=tuple(ids[0].tolist()),
        tokens=tuple(lm.token_text(token) for token in ids[0].tolist()),
        metric={
            "name": "logits",
            "text": f"the logits of {', '.join(named)}, less the vocabulary's mean, weighted by probability",
            "clean": clean,
            "patched": None,
        },
        nodes=[node for node, stays in zip(nodes, pruned.nodes, strict=True) if stays],
        edges=edges,
        dictionaries=[
            DictionaryRef(
                path.name,
                one.dictionary.sites.hookpoints if one.dictionary.sites else (),
                one.saved.fingerprint,
                one.dictionary.d_sae,
                what.atlas,
            )
            for path, one, what in zip(config.dictionaries, loaded, known, strict=True)
        ],
        scores={"replacement": scores.replacement, "completeness": scores.completeness},
        checks={
            "n_active": sources.n_latents,
            "n_targets": grown.n_targets,
            "n_edges": len(grown.links.weight),
            "influence_covered": grown.covered,
            "sum_off": grown.off,
            "n_checked": len(which),
            "n_strongest": n_strongest,
            "correlation": agreement(predicted, exact),
            "correlation_strongest": agreement(predicted[:n_strongest], exact[:n_strongest]),
            **_checked_edges(config, lm, ids, sources, grown, pruned.edges),
        },
    )


def _checked_edges(
    config: CircuitConfig,
    lm: LanguageModel,
    ids: Int[Tensor, "1 seq"],
    sources: Sources,
    grown: Grown,
    kept: graph.Mask,
) -> dict[str, Any]:
    """How some of the kept edges between latents agree with what their targets really lose."""
    links = grown.links
    between = kept & (links.source < sources.n_latents) & (links.target < sources.n_latents)
    which = chosen(links.weight, np.flatnonzero(between), config.n_checked_edges, config.seed)
    pairs = list(zip(links.source[which].tolist(), links.target[which].tolist(), strict=True))
    weights = links.weight[which].tolist()
    held, free = (
        exact_edges(lm, ids, sources, pairs, config.batch_rows, held=held) for held in (True, False)
    )
    return {
        "n_checked_edges": len(which),
        "correlation_edges": agreement(weights, held),
        "correlation_edges_free": agreement(weights, free),
    }


def _explained(config: CircuitConfig, lm: LanguageModel, frozen: Frozen) -> _Explained:
    with torch.no_grad():
        hidden = frozen.hidden[-1:]
        probabilities = torch.softmax(lm.logits(hidden)[0].float(), -1)
        if config.tokens:
            tokens = torch.tensor([_token(lm, text) for text in config.tokens], device=probabilities.device)
        else:
            best = probabilities.topk(min(config.n_logits, len(probabilities)))
            before = best.values.cumsum(0) - best.values
            tokens = best.indices[before < config.probability]
        unembedding = lm.embeddings()[1]
        directions = unembedding[tokens].float() - unembedding.float().mean(0)
        at_zero = lm.logits(torch.zeros_like(hidden))[0].float()
        offsets = at_zero[tokens] - at_zero.mean()
        values = directions @ hidden[0].float() + offsets
    n = len(tokens)
    targets = Targets(
        torch.full((n,), lm.n_layers, device=tokens.device),
        torch.full((n,), frozen.embedding.shape[0] - 1, device=tokens.device),
        directions,
        offsets,
        values,
    )
    return _Explained(tokens, probabilities[tokens], targets, directions, offsets)


def _token(lm: LanguageModel, text: str) -> int:
    ids = list(lm.tokenizer(text, add_special_tokens=False).input_ids)
    if len(ids) != 1:
        raise ConfigError(
            f"tokens must be single tokens of {lm.name}",
            f"{text!r}, which is {len(ids)}",
            "Mind the space at its beginning.",
        )
    return int(ids[0])


def _nodes(
    lm: LanguageModel,
    frozen: Frozen,
    sources: Sources,
    explained: _Explained,
    grown: Grown,
    known: list[_Known],
    effects: graph.Floats,
    exact: dict[Any, float],
) -> list[GraphNode]:
    """Every node of the unpruned graph, in the order of its links."""
    seq, n_layers = sources.seq, lm.n_layers
    share = graph.influence(grown.links, grown.sinks) / max(float(grown.sinks.sum()), 1e-12)
    entries = sources.latents
    nodes = [
        GraphNode(
            node_id(layer, latent, position),
            "latent",
            layer,
            position,
            dictionary,
            latent,
            act,
            float(effects[i]),
            exact.get(i),
            float(share[i]),
            known[dictionary].labels.get(latent),
        )
        for i, (dictionary, latent, layer, position, act) in enumerate(
            zip(
                entries.dictionary.tolist(),
                entries.latent.tolist(),
                entries.layer.tolist(),
                entries.position.tolist(),
                entries.act.tolist(),
                strict=True,
            )
        )
    ]
    sizes = sources.errors.norm(dim=-1).tolist()
    for layer in range(n_layers):
        for position in range(seq):
            i, name = len(nodes), node_id(layer, "error", position)
            error = GraphNode(name, "error", layer, position, act=sizes[layer][position])
            nodes.append(error._replace(effect=float(effects[i]), influence=float(share[i])))
    sizes = frozen.embedding.float().norm(dim=-1).tolist()
    for position, token in enumerate(frozen.ids[0].tolist()):
        i, name = len(nodes), node_id(-1, "token", position)
        node = GraphNode(name, "token", -1, position, latent=token, label=lm.token_text(token))
        nodes.append(node._replace(act=sizes[position], effect=float(effects[i]), influence=float(share[i])))
    for token, probability, value in zip(
        explained.tokens.tolist(),
        explained.probabilities.tolist(),
        explained.targets.value.tolist(),
        strict=True,
    ):
        name = node_id(n_layers, f"logit {token}", seq - 1)
        nodes.append(
            GraphNode(
                name,
                "logit",
                n_layers,
                seq - 1,
                latent=token,
                act=value,
                effect=probability,
                label=lm.token_text(token),
            )
        )
    return nodes
