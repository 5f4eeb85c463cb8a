"""Resampling ablation and downstream effects: against plain hooks, and on a circuit that is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from edited_models import D, N, identity, random_topk, sites
from pairs_world import CTX, corpus_of, people_lm, save, save_one
from torch import Tensor

from sememe.dictionaries import load
from sememe.edits import Intervention, LatentEdit
from sememe.errors import ConfigError, MismatchError, TextError
from sememe.lm import LanguageModel
from sememe.scrub import ScrubConfig, scrub
from sememe.scrub.circuit import Circuit, Node, Place, read_circuit
from sememe.scrub.downstream import Source, downstream, most_active
from sememe.scrub.inputs import Inputs
from sememe.scrub.scrubbing import NOTHING, Scrubber, other_rows, random_like
from sememe.text import TextConfig, TokenPolicy

LOW, HIGH = "resid_post.0", "resid_post.1"
POLICY = TokenPolicy(context_length=CTX)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return people_lm()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    return corpus_of(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def places(lm: LanguageModel) -> tuple[Place, ...]:
    return (
        Place("low", LOW, random_topk(sites(lm, LOW))),
        Place("high", HIGH, random_topk(sites(lm, HIGH), seed=1)),
    )


def options(text: TextConfig, **changes: Any) -> ScrubConfig:
    base: dict[str, Any] = {
        "dictionaries": ("d",),
        "text": text,
        "split": "train",
        "n_tokens": 400,
        "batch_rows": 5,
    }
    return ScrubConfig.build(base | changes)


def scrubber(lm: LanguageModel, places: tuple[Place, ...], config: ScrubConfig) -> Scrubber:
    return Scrubber(config, Inputs(config, lm, places, POLICY))


# -- resampling --------------------------------------------------------------------------------------


def test_every_input_has_another_one() -> None:
    for n in (2, 3, 50):
        other = other_rows(n, torch.Generator().manual_seed(n))
        assert sorted(other.tolist()) == list(range(n)) and not bool((other == torch.arange(n)).any())


@pytest.mark.parametrize("metric", ["loss", "kl"])
@pytest.mark.parametrize("error", ["keep", "resample"])
def test_everything_recovers_all_and_nothing_none(
    lm: LanguageModel, text: TextConfig, metric: Any, error: Any
) -> None:
    whole = (Place("a", LOW, identity(sites(lm, LOW))), Place("b", HIGH, identity(sites(lm, HIGH))))
    config = options(text, metric=metric, error=error, circuit="c.json")
    made = scrubber(lm, whole, config)
    everything = Circuit(tuple(Node(p.name, i, tuple(range(2 * D))) for i, p in enumerate(whole)), ())
    assert made.scrubbed(everything, 0) == pytest.approx(made.unedited(), abs=1e-6)
    assert abs(made.scrubbed(NOTHING, 0) - made.unedited()) > 1e-3


@torch.no_grad()
def test_what_is_outside_comes_from_the_other_input(
    lm: LanguageModel, text: TextConfig, places: tuple[Place, ...]
) -> None:
    made = scrubber(lm, places, options(text, circuit="c.json"))
    kept = ((1, 5, 30, 77), tuple(range(0, N, 3)))
    circuit = Circuit(tuple(Node(str(i), i, latents) for i, latents in enumerate(kept)), ())
    (group,) = made.groups
    rows = other_rows(made.n_inputs, torch.Generator().manual_seed(4))[:5]
    batch, others = group.batches[0], [found.of(rows) for found in group.found]
    found = made._outcome(batch, others, circuit)
    edits = []
    for place, other, latents, here in zip(places, others, kept, batch.here, strict=True):
        outside = tuple(i for i in range(N) if i not in latents)
        edit = LatentEdit(latents=outside, how="patch")
        both = here & other.here
        edits.append(Intervention(place.dictionary, [edit], other={place.hookpoint: other.x}, keep=both))
    with edits[0].on(lm), edits[1].on(lm):
        plain = lm.hidden(batch.run.ids, batch.run.mask)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_paths_that_are_not_in_the_circuit_are_cut(
    lm: LanguageModel, text: TextConfig, places: tuple[Place, ...]
) -> None:
    made = scrubber(lm, places, options(text, circuit="c.json"))
    a, b, c = tuple(range(40)), tuple(range(40, N)), tuple(range(0, N, 2))
    nodes = (Node("a", 0, a), Node("b", 0, b), Node("c", 1, c))
    circuit = Circuit(nodes, ((0, 2), (1, None), (2, None)))  # c may see a, and not b; the output b and c
    (group,) = made.groups
    rows = other_rows(made.n_inputs, torch.Generator().manual_seed(4))[:5]
    batch, others = group.batches[0], [found.of(rows) for found in group.found]
    found = made._outcome(batch, others, circuit)

    low, high = (place.dictionary for place in places)

    def codes(dictionary: Any, x: Tensor) -> Tensor:
        return dictionary.encode(x.reshape(-1, D)).to_dense().reshape(*x.shape[:2], N)

    def put(place: int, kept: tuple[int, ...], values: Tensor | None) -> Any:
        """Latents set to the other input's, but for some that are set to what is given, or stay."""

        def edit(x: Tensor) -> Tensor:
            dictionary = (low, high)[place]
            own, new = codes(dictionary, x), codes(dictionary, others[place].x)
            new[..., list(kept)] = own[..., list(kept)] if values is None else values
            moved = (new - own) @ dictionary.decoder_directions()
            both = batch.here[place] & others[place].here
            return torch.where(both[:, :, None], x + moved, x)

        return edit

    ids, mask = batch.run.ids, batch.run.mask
    with lm.edit({LOW: put(0, a, None)}):
        c_values = codes(high, lm.capture(ids, HIGH, mask)[HIGH])[..., list(c)]
    with lm.edit({LOW: put(0, b, None), HIGH: put(1, c, c_values)}):
        plain = lm.hidden(ids, mask)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_nothing_is_taken_from_what_the_policy_drops(lm: LanguageModel, text: TextConfig) -> None:
    """Documents a row each: where the other one has ended, a position keeps what it has."""
    policy = TokenPolicy(context_length=CTX, packing=False)
    whole = (Place("a", "resid_post.2", identity(sites(lm, "resid_post.2"))),)
    made = Scrubber(options(text, circuit="c.json"), Inputs(options(text), lm, whole, policy))
    (group,) = made.groups
    batch, found = group.batches[0], group.found[0]
    lengths = found.here.sum(1)
    assert int(lengths.min()) < int(lengths.max()), "some rows must be padded"
    rows = torch.full((len(batch.run.ids),), int(lengths.argmin()))
    moved = (made._outcome(batch, [found.of(rows)], NOTHING) - batch.run.hidden).abs().amax(-1) > 1e-4
    ended = batch.here[0] & ~found.here[rows]
    assert bool(ended.any()) and not bool(moved[ended].any())
    assert bool(moved[batch.here[0] & found.here[rows] & (rows != torch.arange(len(rows)))[:, None]].any())


def test_one_context_has_no_other_to_take_from(
    lm: LanguageModel, text: TextConfig, places: tuple[Place, ...]
) -> None:
    with pytest.raises(
        TextError, match=r"at least two contexts, .* got one, of 24 tokens\. Raise --n-tokens"
    ):
        scrubber(lm, places, options(text, circuit="c.json", n_tokens=20))


def test_a_circuit_that_is_known_is_told_from_random_ones(lm: LanguageModel, tmp_path: Path) -> None:
    """Of the last layer only a few dimensions reach the logits, so those are the circuit."""
    made = people_lm(seed=5)
    dims = [2, 7, 11, 19, 23]
    hf: Any = made.hf
    with torch.no_grad():
        head = hf.lm_head.weight.detach().clone()
        head[:, [i for i in range(D) if i not in dims]] = 0
        hf.lm_head.weight = torch.nn.Parameter(head)
    made = type(made)(hf, made.tokenizer, "tiny", made.fingerprint)
    folder = save_one(identity(sites(made, "resid_post.2")), tmp_path / "whole")
    circuit = tmp_path / "circuit.json"
    circuit.write_text(json.dumps([*dims, *(D + i for i in dims)]))
    config = ScrubConfig(
        dictionaries=(folder,), out=tmp_path / "out", circuit=circuit, ioi=True, n_prompts=12, n_resamples=4,
        n_bootstrap=100,
    )  # fmt: skip
    done = scrub(config, lm=made)
    found = json.loads((done.path / "scrub.json").read_text())["circuit"]
    assert found["metric"] == "logit_difference" and found["n_latents"] == 10
    assert found["score_circuit"]["value"] > 0.8 > found["score_random"]["value"] + 0.3
    assert found["score_circuit"]["low"] <= found["score_circuit"]["value"] <= found["score_circuit"]["high"]
    page = (done.path / "scrub.md").read_text()
    assert "| the circuit stays |" in page and "null: random latents" in page and "downstream" not in page
    assert (done.path / "scrub.html").exists() and (done.path / "figures" / "score.svg").exists()
    assert scrub(config, lm=made).fingerprint == done.fingerprint


def test_random_circuits_have_the_same_form() -> None:
    circuit = Circuit((Node("a", 0, (1, 2)), Node("b", 0, (3,)), Node("c", 1, (4,))), ((0, 2), (2, None)))
    firing = [[10, 11, 12], [20, 21]]
    for seed in range(5):
        drawn = random_like(circuit, firing, random.Random(seed))
        assert drawn.edges == circuit.edges and [len(node.latents) for node in drawn.nodes] == [2, 1, 1]
        assert sorted(drawn.latents_at(0)) == [10, 11, 12] and set(drawn.latents_at(1)) <= {20, 21}


# -- downstream --------------------------------------------------------------------------------------


@torch.no_grad()
def test_downstream_changes_are_those_of_a_plain_ablation(
    lm: LanguageModel, text: TextConfig, places: tuple[Place, ...]
) -> None:
    inputs = Inputs(options(text), lm, places, POLICY)
    latents = most_active(inputs, 0, 3)
    low, high = (place.dictionary for place in places)
    counts = torch.zeros(N)
    sums, n = torch.zeros(3, N, dtype=torch.float64), torch.zeros(3)
    for batch in inputs.batches():
        ids, mask = batch.run.ids, batch.run.mask
        x = lm.capture(ids, LOW, mask)[LOW]
        acts = low.encode(x.reshape(-1, D)).to_dense().reshape(*ids.shape, N) * batch.here[0][:, :, None]
        counts += (acts != 0).sum((0, 1))
        before = high.encode(lm.capture(ids, HIGH, mask)[HIGH].reshape(-1, D)).to_dense()
        for slot, latent in enumerate(latents):
            new = x - acts[..., latent, None] * low.decoder_directions()[latent]
            with lm.edit({LOW: lambda _, new=new: new}):
                after = high.encode(lm.capture(ids, HIGH, mask)[HIGH].reshape(-1, D)).to_dense()
            fires = (acts[..., latent] != 0).reshape(-1)
            sums[slot] += (after - before)[fires].double().sum(0)
            n[slot] += int(fires.sum())
    assert set(latents) == set(counts.argsort(descending=True)[:3].tolist())
    (found,) = downstream(inputs, Source(0, latents), n_targets=N, batch_rows=4, seed=0)
    assert found.n.tolist() == n.int().tolist()
    dense = torch.zeros(3, N, dtype=torch.float64)
    edges = found.edges
    for i in np.flatnonzero(~edges.control):
        dense[latents.index(int(edges.source[i])), int(edges.target[i])] = float(edges.mean_change[i])
    torch.testing.assert_close(dense, sums / n[:, None], rtol=1e-3, atol=1e-4)
    totals = (sums / n[:, None]).abs().sum(1).numpy()
    np.testing.assert_allclose(found.total[:, 0, 0], totals, rtol=1e-2)
    assert bool((found.total[:, 1] > 0).all()) and bool(edges.control.any())


def test_the_verb_writes_a_table_of_edges(lm: LanguageModel, text: TextConfig, tmp_path: Path) -> None:
    low, high = save(lm, tmp_path / "low", LOW), save(lm, tmp_path / "high", HIGH, seed=1)
    circuit = tmp_path / "circuit.toml"
    circuit.write_text(
        '[[node]]\nname = "first"\ndictionary = "low"\nlatents = [1, 2, 3]\n'
        '[[node]]\nname = "second"\ndictionary = "resid_post.1"\nlatents = [4]\n'
        '[[edge]]\nfrom = "first"\nto = "second"\n[[edge]]\nfrom = "second"\nto = "output"\n'
    )
    config = options(
        text, dictionaries=(high, low), out=tmp_path / "out", circuit=circuit, n_resamples=2, n_latents=4, n_targets=5,
        n_tokens=200,
    )  # fmt: skip
    done = scrub(config, lm=lm)
    data = json.loads((done.path / "scrub.json").read_text())
    assert [one["name"] for one in data["dictionaries"]] == ["low", "high"]  # as a forward reaches them
    assert data["circuit"]["n_edges"] == 2 and data["circuit"]["metric"] == "loss"
    table = pq.read_table(done.path / "downstream.parquet").to_pydict()
    assert data["downstream"]["n_edges"] == len(table["source"]) <= 4 * 5 * 2
    assert set(table["dictionary"]) == {"high"} and set(table["control"]) == {True, False}
    own = [abs(v) for v, control in zip(table["mean_change"], table["control"], strict=True) if not control]
    assert data["downstream"]["largest"]["latents"] == pytest.approx(max(own))
    assert abs(data["downstream"]["edges"][0]["mean_change"]) == pytest.approx(max(own))
    assert "What latents of low do downstream" in (done.path / "scrub.md").read_text()
    with pytest.raises(
        ConfigError, match=r"a dictionary of a later hookpoint, got high, the last\. Name another"
    ):
        scrub(config.replace(out=tmp_path / "b", source="high"), lm=lm)
    with pytest.raises(ConfigError, match=r"a latent of low must be in \[0, 95\], got 96"):
        scrub(config.replace(out=tmp_path / "b", n_latents=16, latents=(96,)), lm=lm)
    with pytest.raises(MismatchError, match=r"a hookpoint of its own, got high and again at resid_post\.1"):
        again = save(lm, tmp_path / "again", HIGH, seed=2)
        scrub(config.replace(out=tmp_path / "b", dictionaries=(high, again)), lm=lm)
    transcoder = save_one(random_topk(sites(lm, "mlp_in.1", "mlp_out.1")), tmp_path / "transcoder")
    with pytest.raises(MismatchError, match=r"must read and write one hookpoint.*got transcoder, of mlp_in"):
        scrub(config.replace(out=tmp_path / "b", dictionaries=(low, transcoder)), lm=lm)
    with pytest.raises(MismatchError, match=r"the model must be the one the dictionary was trained on"):
        scrub(config.replace(out=tmp_path / "b"), lm=people_lm(seed=1))
    assert not (tmp_path / "b").exists() and load(low).d_sae == N


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], r"several dictionaries must name them, got a bare list"),
        ({"lo": [1]}, r"named by its folder or its hookpoint, got 'lo'\. Did you mean 'low'"),
        ({"low": [96]}, r"a latent of low must be in \[0, 95\], got 96"),
        ({"low": []}, r"must hold latents by dictionary, or nodes.* got \[\] as latents"),
        ({"low": [1, 1.5]}, r"got \[1, 1\.5\] as latents"),
        ({}, r"got no nodes"),
        ("low", r"must hold latents by dictionary.* got str"),
        ({"nodes": [{"latents": [1]}]}, r"a node without dictionary"),
        ({"nodes": [{"name": "a", "dictionary": "low", "latents": [1]}] * 2}, r"a name of its own.* got 'a'"),
        (
            {"nodes": [{"dictionary": "low", "latents": [1]}, {"dictionary": "low", "latents": [1]}]},
            r"latent 1 of low must be in one node, got node 0 and node 1",
        ),
        (
            {
                "nodes": [
                    {"name": "a", "dictionary": "low", "latents": [1]},
                    {"name": "b", "dictionary": "high", "latents": [1]},
                ],
                "edges": [{"from": "b", "to": "a"}],
            },
            r"an edge must lead to a dictionary of a later hookpoint, got b to a",
        ),
        (
            {
                "nodes": [{"name": "a", "dictionary": "low", "latents": [1]}],
                "edges": [{"from": "a", "to": "outptu"}],
            },
            r"from a node to a node or output, got 'outptu'\. Did you mean 'output'",
        ),
    ],
)
def test_circuits_that_do_not_hold(
    places: tuple[Place, ...], tmp_path: Path, data: Any, message: str
) -> None:
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        read_circuit(path, places)


def test_circuits_that_cannot_be_read(places: tuple[Place, ...], tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[[node")
    for name in ("broken.toml", "none.json"):
        with pytest.raises(ConfigError, match=r"a circuit must be a \.toml or \.json file"):
            read_circuit(tmp_path / name, places)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_latents": 0}, r"a circuit to test or latents with downstream effects must be named"),
        ({"ioi": True, "pairs": "p"}, r"prompts must be made or read, got ioi and pairs"),
        ({"metric": "logit_difference", "circuit": "c"}, r"logit_difference must have prompts with answers"),
        ({"metric": "loss", "circuit": "c", "ioi": True}, r"the metric loss is of text"),
        ({"metric": "kl"}, r"metric must be left out when no circuit is tested"),
        ({"n_prompts": 9}, r"n_prompts must be left out when no prompts are made"),
        ({"ioi": True, "n_tokens": 9}, r"n_tokens must be left out when inputs are prompts"),
        ({"latents": (1, 1)}, r"latents must be numbers from 0 on, each named once"),
        ({"latents": (1,), "n_latents": 3}, r"n_latents must be left out when latents are named"),
        (
            {"circuit": "c", "n_latents": 0, "source": "x"},
            r"source must be left out when no downstream effects",
        ),
    ],
)
def test_bad_options_say_what_to_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScrubConfig.build({"dictionaries": ("d",)} | given)
