"""The command `trace`: what it refuses, and the folder it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import write_corpus
from tiny_models import D_MODEL, tiny_lm
from traced_models import (
    POLICY,
    PROMPT,
    at,
    by_hand,
    linear_lm,
    random_topk,
    setting,
    unit,
    write_atlas,
)

from sememe.dictionaries import TopK, TopKConfig
from sememe.dictionaries.base import Dictionary
from sememe.errors import ConfigError, MismatchError, ShapeError
from sememe.graph import read_graph
from sememe.lm import LanguageModel
from sememe.trace import (
    LatentMetric,
    TraceConfig,
    at_places,
    attribute,
    inputs_of,
    log_prob,
    logit_difference,
    of_logits,
    prepare,
    trace,
)
from sememe.trace.attribution import dealt_out


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def linear() -> LanguageModel:
    return linear_lm()


# -- bad input ---------------------------------------------------------------------------------------


def test_a_metric_that_does_not_depend_on_a_place_is_refused(llama: LanguageModel) -> None:
    places = at(llama, "resid_post.0", "resid_post.2")
    inputs = inputs_of(llama, [PROMPT], bos=False)
    with pytest.raises(
        ConfigError, match=r"the metric must depend on what is at resid_post\.0, got own, which does not"
    ):
        setting(llama, places, metric=of_logits(inputs, lambda z: torch.ones(len(z))))
    early = LatentMetric(at(llama, "resid_post.1")[0], 3, inputs.lengths - 1)
    with pytest.raises(
        ConfigError, match=r"must depend on what is at resid_post\.2, got the activation of latent 3"
    ):
        setting(llama, places, metric=early)
    with pytest.raises(
        ConfigError, match=r"resid_post\.1, got own, whose gradient is 0 where nothing is changed"
    ):
        found = setting(llama, at(llama, "resid_post.1"), metric=of_logits(inputs, lambda z: 0 * z[:, 0]))
        attribute(found.passes, found.table, found.base)


def test_places_prompts_and_tokens_that_do_not_fit(llama: LanguageModel, linear: LanguageModel) -> None:
    inputs = inputs_of(llama, [PROMPT], bos=False)
    n = inputs.ids.shape[1]
    with pytest.raises(
        ConfigError, match=rf"the position must be inside the prompt, in \[-{n}, {n - 1}\], got {n}"
    ):
        logit_difference(llama, inputs, ["a"], ["b"], n)
    with pytest.raises(ConfigError, match="must be one token of llama"):
        log_prob(llama, inputs, ["a cat"])
    with pytest.raises(ConfigError, match="answer and wrong must differ"):
        logit_difference(llama, inputs, ["a"], ["a"])
    two = {"one": random_topk(llama, "resid_post.0"), "two": random_topk(llama, "resid_post.0", seed=1)}
    with pytest.raises(
        ConfigError, match=r"must stand at different hookpoints, got one and two at resid_post\.0"
    ):
        at_places(llama, two)
    with pytest.raises(MismatchError, match="must belong to the model llama"):
        at_places(llama, {"a": random_topk(linear, "resid_post.0")})
    with pytest.raises(MismatchError, match="must know its model"):
        at_places(llama, {"a": TopK(TopKConfig(k=2, d_sae=8), D_MODEL, D_MODEL, 8)})
    metric = of_logits(inputs, lambda z: z[:, 0])
    with pytest.raises(ShapeError, match="must have as many tokens"):
        longer = inputs_of(llama, [PROMPT + " it"], bos=False)
        prepare(llama, at(llama, "resid_post.0"), inputs, metric, ablation="patch", patched=longer)
    with pytest.raises(ShapeError, match="--no-by-position"):
        unequal = inputs_of(llama, [PROMPT, "on"], bos=False)
        prepare(llama, at(llama, "resid_post.0"), unequal, of_logits(unequal, lambda z: z[:, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablation": "patch"}, "ablation patch must go with patched prompts"),
        ({"patched": ("a", "b")}, "must go with patched prompts"),
        ({"path": "inputs"}, "the path inputs leads to patched prompts"),
        ({"method": "gradient", "n_steps": 5}, "n_steps must be left out when the method is gradient"),
        (
            {"metric": "kl", "method": "gradient"},
            r"its gradient is 0 there.*got method gradient, max_edges 2000\. Set --path layers --max-edges 0, or",
        ),
        ({"metric": "kl"}, "its gradient is 0 there.*got path groups"),
        ({"metric": "kl", "path": "layers"}, "its gradient is 0 there.*got path layers, max_edges 2000"),
        ({"metric": "loss", "position": 3}, "position must be left out when the metric is loss"),
        ({"metric": "loss", "answers": (" x",)}, "answers must be left out when the metric is loss"),
        ({"metric": "logit", "wrong": (" x",)}, "wrong must be left out when the metric is logit"),
        ({"ablation": "zero", "split": "train"}, "split must be left out when the ablation is zero"),
        ({"ablation": "zero", "n_tokens": 5}, "n_tokens must be left out when the ablation is zero"),
        ({"max_edges": 0, "edges": "total"}, "edges must be left out when max_edges is 0"),
        ({"max_edges": 0, "n_checked_edges": 7}, "n_checked_edges must be left out when max_edges is 0"),
        ({"max_edges": 0, "edge_threshold": 1.0}, "edge_threshold must be left out when max_edges is 0"),
        (
            {"max_edges": 0, "n_checked_random": 0, "n_random": 0, "seed": 3},
            "seed must be left out when nothing is drawn",
        ),
        ({"latent": 3}, "there must be at least 2 dictionaries"),
        ({"depth": 3}, "depth must be left out when no latent is named"),
        ({"answers": ("a", "b", "c")}, "answers must be one for all 2 prompts, or one for each"),
        ({"reach": 0.5}, "reach must be left out when the path is groups"),
        ({"dictionaries": ("a", "a")}, "each dictionary must be named once"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TraceConfig.build(options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("edges", "total"),
        ("max_edges", 5),
        ("edge_threshold", 1.0),
        ("node_threshold", 1.0),
        ("n_checked_edges", 7),
        ("n_checked_random", 3),
        ("metric", "kl"),
    ],
)
def test_options_that_a_latent_has_no_use_for(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be left out when a latent is traced back"):
        TraceConfig.build({"latent": 3, "dictionaries": ("a", "b"), option: value})


def test_how_many_are_checked_and_what_kl_goes_with() -> None:
    assert TraceConfig().n_largest == 200 and TraceConfig(n_checked=300).n_largest == 300
    of_latent = {"latent": 3, "dictionaries": ("a", "b")}
    assert TraceConfig.build(of_latent).n_largest == 50
    assert TraceConfig.build(of_latent | {"n_checked": 200}).n_largest == 200
    TraceConfig.build({"metric": "kl", "path": "layers", "max_edges": 0})
    TraceConfig.build({"metric": "kl", "ablation": "patch", "patched": ("a", "b")})


def test_the_largest_are_dealt_out_those_of_one_position_apart() -> None:
    effects, positions = torch.arange(20.0) - 10, torch.arange(20) % 4
    hands = dealt_out(effects, positions, 12, 3)
    assert sorted(int(i) for hand in hands for i in hand) == sorted(
        effects.abs().argsort(descending=True, stable=True)[:12].tolist()
    )
    for hand in hands:
        assert sorted(positions[hand].tolist()) == [0, 1, 2, 3]
    assert [len(hand) for hand in dealt_out(effects, positions, 10, 3)] == [4, 3, 3]
    assert len(dealt_out(effects, positions, 2, 9)) == 2


# -- the verb ----------------------------------------------------------------------------------------


def save(lm: LanguageModel, dictionary: Dictionary, path: Path) -> Path:
    rows = lm.capture(torch.arange(1, 30)[None], "resid_post.0")["resid_post.0"][0]
    dictionary.save(path, rows.detach(), extra={"policy": POLICY.resolved()})
    return path


def test_the_folder_of_a_trace(llama: LanguageModel, tmp_path: Path) -> None:
    folders = tuple(
        save(llama, random_topk(llama, f"resid_post.{i}", seed=i), tmp_path / f"d{i}") for i in (1, 0)
    )
    options = {
        "out": tmp_path / "trace",
        "dictionaries": folders,
        "prompts": (PROMPT,),
        "answers": ("a",),
        "wrong": ("b",),
        "ablation": "zero",
        "max_nodes": 30,
        "max_edges": 50,
        "n_checked": 20,
        "n_checked_random": 10,
        "n_checked_edges": 6,
        "n_random": 1,
    }
    done = trace(TraceConfig.build(options), lm=llama)
    graph = read_graph(done.path)
    assert [d.hookpoints for d in graph.dictionaries] == [("resid_post.0",), ("resid_post.1",)]
    assert len(graph.nodes) == 31 and len(graph.edges) == 50 and graph.nodes[-1].kind == "logit"
    sizes = [abs(node.effect) for node in graph.nodes[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert graph.scores["n_forwards"] == graph.scores["n_backwards"] == 10
    assert graph.checks["largest"]["n"] == 20 and graph.checks["edges"]["n"] == 6
    assert all(node.exact is not None for node in graph.nodes[:20])
    details = json.loads((done.path / "nodes.json").read_text())
    assert len(details["nodes"]) == graph.scores["n_nodes"] and len(details["checked"]["exact"]) == 30
    page = (done.path / "trace.md").read_text()
    assert "logit of 'a' minus logit of 'b'" in page and "| largest | 20 |" in page
    assert {"agreement.svg", "circuit.svg", "graph.json"} <= set(done.meta["files"])
    again = trace(TraceConfig.build(options), lm=llama)
    assert again.fingerprint == done.fingerprint and again.meta["files"] == done.meta["files"]
    with pytest.raises(MismatchError):
        trace(TraceConfig.build(options | {"seed": 1}), lm=llama)


def test_atlases_and_explanations_count(tmp_path: Path) -> None:
    """They decide the graph's links and labels, so that others give another graph; those that moved do not."""
    lm = by_hand()
    folders = tuple(save(lm, unit(lm, f"resid_post.{i}"), tmp_path / f"d{i}") for i in (0, 1))
    asked = {"dictionaries": folders, "prompts": ("b a",), "metric": "logit", "answers": (lm.token_text(5),)}
    short = {"ablation": "zero", "n_checked": 2, "n_checked_random": 0, "n_random": 0, "max_edges": 0}
    bare = TraceConfig.build(asked | short | {"out": tmp_path / "trace"})
    done = trace(bare, lm=lm)
    told = write_atlas(tmp_path / "atlas", folders[0], dict.fromkeys(range(32), "early"))
    with_labels = bare.replace(atlases=told[:1], explanations=told[1:])
    with pytest.raises(MismatchError, match=r"or pass --fresh"):
        trace(with_labels, lm=lm)
    labelled = trace(with_labels, lm=lm, fresh=True)
    graph = read_graph(labelled.path)
    assert graph.dictionaries[0].atlas == str(told[0]) and {node.label for node in graph.nodes} >= {"early"}
    (tmp_path / "atlas_told").rename(tmp_path / "moved")
    moved = with_labels.replace(explanations=(tmp_path / "moved",))
    assert trace(moved, lm=lm).fingerprint == labelled.fingerprint != done.fingerprint
    write_atlas(tmp_path / "atlas", folders[0], dict.fromkeys(range(32), "anew"))
    with pytest.raises(MismatchError, match=r"or pass --fresh"):
        trace(with_labels, lm=lm)


def test_dictionaries_of_other_policies_are_refused(tmp_path: Path) -> None:
    lm = by_hand()
    first = save(lm, unit(lm, "resid_post.0"), tmp_path / "d0")
    rows, policy = torch.randn(16, D_MODEL), POLICY.replace(bos=True).resolved()
    unit(lm, "resid_post.1").save(tmp_path / "d1", rows, extra={"policy": policy})
    config = {"out": tmp_path / "trace", "dictionaries": (first, tmp_path / "d1"), "ablation": "zero"}
    with pytest.raises(
        MismatchError, match=r"one token policy, that of d0, got another of d1\. Leave it out, or"
    ):
        trace(TraceConfig.build(config), lm=lm)
    assert not (tmp_path / "trace").exists()


def test_a_latent_traced_back_by_the_verb(tmp_path: Path) -> None:
    lm = by_hand()
    folders = tuple(save(lm, unit(lm, f"resid_post.{i}"), tmp_path / f"d{i}") for i in (0, 1))
    corpus = write_corpus(tmp_path / "corpus.jsonl", 40)
    options = {
        "out": tmp_path / "trace",
        "dictionaries": folders,
        "latent": 2,
        "text": {"corpus": (str(corpus),)},
        "split": "all",
        "n_tokens": 1000,
        "n_contexts": 3,
    }
    graph = read_graph(trace(TraceConfig.build(options), lm=lm).path)
    heavy = [(edge.source, edge.target, edge.weight) for edge in graph.edges if edge.weight]
    last = len(graph.ids) - 1
    assert heavy == [(f"0:1@{last}", f"1:2@{last}", 6.0)]
    assert "Mean activation 6 in 3 contexts" in (tmp_path / "trace" / "trace.md").read_text()
    with pytest.raises(ConfigError, match=r"a latent must be in \[0, 31\], got 99"):
        trace(TraceConfig.build(options | {"latent": 99, "out": tmp_path / "none"}), lm=lm)
    assert not (tmp_path / "none").exists()


def test_means_are_the_default_and_all_of_a_latents_sources_are_checked(tmp_path: Path) -> None:
    lm = by_hand()
    folders = tuple(save(lm, unit(lm, f"resid_post.{i}"), tmp_path / f"d{i}") for i in (0, 1))
    text = {"corpus": (str(write_corpus(tmp_path / "corpus.jsonl", 40)),)}
    read = {"dictionaries": folders, "text": text, "split": "all", "n_tokens": 600}
    of_latent = read | {"out": tmp_path / "latent", "latent": 2, "n_contexts": 2, "n_checked": 60}
    trace(TraceConfig.build(of_latent), lm=lm)
    fed = json.loads((tmp_path / "latent" / "nodes.json").read_text())["feeds"][0]
    assert all(source["exact"] is not None for source in fed["sources"]) and fed["sources"]
    asked = {"out": tmp_path / "mean", "prompts": ("b a",), "metric": "logit", "answers": (lm.token_text(5),)}
    done = trace(TraceConfig.build(read | asked | {"max_edges": 5}), lm=lm)
    found = read_graph(done.path)
    assert found.pair is not None and found.pair["ablation"] == "mean"
    assert found.scores["curves"]["completeness"][0] == pytest.approx(1, abs=1e-6)
