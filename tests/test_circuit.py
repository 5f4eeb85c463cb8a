"""Circuits: the frozen model is affine and true, edges are its derivatives, rows add up, ablations agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import D_MODEL, N_LAYERS, tiny_lm
from traced_models import linear_lm, write_atlas

from sememe import artifact, kernels
from sememe.circuit import CircuitConfig, circuit
from sememe.circuit.exact import exact_edges
from sememe.circuit.rows import Rows, Targets
from sememe.circuit.sources import Sources
from sememe.dictionaries import CrossLayerConfig, Dictionary, Site, Sites
from sememe.dictionaries.cross_layer import CrossLayer
from sememe.dictionaries.gated import Gated, GatedConfig
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.errors import ConfigError, MismatchError, ModelError
from sememe.graph import read_graph
from sememe.lm import Frozen, LanguageModel
from sememe.text import TokenPolicy

IDS = torch.tensor([[11, 40, 7, 99, 23, 5]])
POLICY = TokenPolicy(context_length=32)
NAMES = ("llama", "gpt2")


@pytest.fixture(autouse=True)
def slow_kernels():
    """Nothing here is large enough to be worth a compilation."""
    with kernels.use("reference"):
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {name: tiny_lm(name) for name in NAMES}


def sites_of(lm: LanguageModel, reads: list[str], writes: list[str]) -> Sites:
    def side(names: list[str]) -> tuple[Site, ...]:
        return tuple(
            Site(
                model=lm.name,
                model_fingerprint=lm.fingerprint,
                hookpoint=name,
                start=i * D_MODEL,
                stop=(i + 1) * D_MODEL,
            )
            for i, name in enumerate(names)
        )

    return Sites(inputs=side(reads), outputs=side(writes))


def filled(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    """Random weights and biases, each of which matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*dictionary.parameters(), dictionary.b_pre):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dictionary.eval()


def transcoder(lm: LanguageModel, layer: int, d_sae: int = 24, k: int = 3, skip: bool = False) -> Dictionary:
    sites = sites_of(lm, [f"mlp_in.{layer}"], [f"mlp_out.{layer}"])
    return filled(TopK(TopKConfig(k=k, skip=skip), D_MODEL, D_MODEL, d_sae, sites), seed=layer)


def cross(lm: LanguageModel, layers: tuple[int, ...] = (0, 1, 2)) -> Dictionary:
    sites = sites_of(lm, [f"mlp_in.{i}" for i in layers], [f"mlp_out.{i}" for i in layers])
    d = D_MODEL * len(layers)
    return filled(CrossLayer(CrossLayerConfig(k=2), d, d, 8 * len(layers), sites))


def placed(lm: LanguageModel, kind: str) -> tuple[Frozen, Sources]:
    frozen = Frozen(lm, IDS)
    made = {
        "transcoders": lambda: [transcoder(lm, layer) for layer in range(N_LAYERS)],
        "skip": lambda: [transcoder(lm, layer, skip=True) for layer in range(N_LAYERS)],
        "some": lambda: [transcoder(lm, 1)],
        "cross_layer": lambda: [cross(lm)],
    }[kind]()
    return frozen, Sources(lm, frozen, [(one, POLICY) for one in made])


def all_targets(sources: Sources) -> Targets:
    found, ids = sources.latents, torch.arange(sources.n_latents)
    return Targets(found.layer, found.position, sources.reads(ids), found.offset, found.act)


# ---- the frozen model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_the_frozen_model_is_affine_and_gives_what_the_model_gives(name, models):
    """Twice and half way between two inputs; and the plain forward of transformers itself."""
    lm = models.get(name) or tiny_lm(name)
    frozen = Frozen(lm, IDS)
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(frozen.embedding.shape, generator=generator)
    x = torch.stack([frozen.embedding, other, (frozen.embedding + other) / 2])
    with torch.no_grad():
        hidden = frozen.run(x, [out.expand(3, -1, -1) for out in frozen.mlp_out]).hidden
        truth = lm.hf(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden[0], truth[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[2], (hidden[0] + hidden[1]) / 2, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(hidden[1], hidden[0], atol=0.1)


def test_models_whose_attention_cannot_be_held_are_refused():
    with pytest.raises(ModelError, match=r"queries and keys by q_proj and k_proj, or by c_attn.*GPTNeoX"):
        Frozen(tiny_lm("gpt_neox"), IDS)
    with pytest.raises(ModelError, match="every layer of mamba must have an MLP"):
        Frozen(tiny_lm("mamba"), IDS)


# ---- edges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transcoders", "skip", "some", "cross_layer"])
@pytest.mark.parametrize("name", NAMES)
def test_what_enters_a_target_adds_up_to_it(models, name, kind):
    frozen, sources = placed(models[name], kind)
    targets = all_targets(sources)
    found = Rows(frozen, sources, sources.n_latents).of(targets)
    total = found.weights.sum(1) + found.rest
    torch.testing.assert_close(total.detach(), targets.value, atol=1e-3, rtol=1e-3)
    assert float(found.off.max()) < 1e-5
    n_first = int((sources.latents.position == 0).sum())
    assert n_first == 0, "the policy leaves position 0 out"


@pytest.mark.parametrize("kind", ["transcoders", "cross_layer"])
@pytest.mark.parametrize("name", NAMES)
def test_edges_are_finite_differences_of_the_frozen_model(models, name, kind):
    """Each source is doubled on its own: what it writes is put into the frozen model once more."""
    lm = models[name]
    frozen, sources = placed(lm, kind)
    targets = all_targets(sources)
    found = Rows(frozen, sources, sources.n_latents).of(targets).weights.detach()
    plain = [sources.leaf(layer) for layer in range(N_LAYERS)]

    def values(embedding: torch.Tensor, out: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            run = frozen.run(embedding[None], [sources.put(i, x[None]) for i, x in enumerate(out)])
        places = [*run.mlp_in, run.hidden]
        return torch.stack(
            [
                places[layer][0, position] @ vector
                for layer, position, vector in zip(
                    targets.layer, targets.position, targets.vector, strict=True
                )
            ]
        )

    before = values(frozen.embedding, plain)
    generator = np.random.default_rng(0)
    sampled = generator.choice(sources.n_latents, 8, replace=False)
    errors = sources.n_latents + generator.choice(N_LAYERS * sources.seq, 4, replace=False)
    tokens = sources.n - 1 - generator.choice(sources.seq, 3, replace=False)
    for i in (*sampled, *errors, *tokens):
        embedding, out = frozen.embedding.clone(), [x.clone() for x in plain]
        if i < sources.n_latents:
            for layer, row in sources.written(int(i)).items():
                out[layer][sources.latents.position[i]] += row
        elif i < sources.n - sources.seq:
            layer, position = divmod(int(i) - sources.n_latents, sources.seq)
            out[layer][position] += sources.errors[layer, position]
        else:
            embedding[int(i) - (sources.n - sources.seq)] *= 2
        torch.testing.assert_close(values(embedding, out) - before, found[:, i], atol=1e-3, rtol=1e-3)


def test_latents_of_a_cross_layer_transcoder_reach_later_layers_by_all_they_write(models):
    """A latent of layer 0 that writes to layer 1 alone feeds layer 2 and nothing in layer 1."""
    lm = models["llama"]
    dictionary = cross(lm)
    assert isinstance(dictionary, CrossLayer)
    with torch.no_grad():
        dictionary.decoders[0][:, :D_MODEL] = 0
        dictionary.decoders[0][:, 2 * D_MODEL :] = 0
    frozen = Frozen(lm, IDS)
    sources = Sources(lm, frozen, [(dictionary, POLICY)])
    weights = Rows(frozen, sources, sources.n_latents).of(all_targets(sources)).weights
    layer = sources.latents.layer
    from_first = weights[:, : sources.n_latents][:, layer == 0]
    assert not from_first[layer == 1].any()
    assert from_first[layer == 2].abs().max() > 1e-3


def test_what_no_dictionary_reconstructs_is_an_error_node(models):
    """With a transcoder in one layer, the others' MLPs are errors as a whole."""
    frozen, sources = placed(models["llama"], "some")
    assert torch.equal(sources.errors[0], frozen.mlp_out[0])
    assert torch.equal(sources.errors[1, 0], frozen.mlp_out[1][0]), "position 0 is not the dictionary's"
    assert not torch.allclose(sources.errors[1, 1], frozen.mlp_out[1][1])


# ---- edges against the real model ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transcoders", "skip", "cross_layer"])
def test_where_nothing_but_mlps_could_move_held_edges_are_exact(kind):
    """Without norms, and with attention that looks at all tokens alike."""
    frozen, sources = placed(linear_lm(), kind)
    rows = Rows(frozen, sources, sources.n_latents).of(all_targets(sources)).weights.detach()
    links = torch.nonzero(rows[:, : sources.n_latents]).tolist()[::11]
    edges = [(source, target) for target, source in links]
    weights = [float(rows[target, source]) for source, target in edges]
    held, free = (exact_edges(frozen.lm, IDS, sources, edges, 7, held=held) for held in (True, False))
    assert len(edges) > 10 and held == pytest.approx(weights, rel=1e-3, abs=1e-4)
    layer = sources.latents.layer
    between = [
        int(layer[target]) > 1 + min(sources.written(source)) for source, target in edges
    ]  # MLPs that answer when they are free
    assert any(between) and not all(between)
    for across, one, other in zip(between, held, free, strict=True):
        assert across or other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert any(abs(one - other) > 1e-2 for one, other in zip(held, free, strict=True))


@pytest.mark.parametrize("held", [True, False])
def test_an_edge_by_plain_hooks(models, held):
    """From layer 0 to layer 2, over the MLP of layer 1."""
    lm = models["llama"]
    _, sources = placed(lm, "transcoders")
    found, last = sources.latents, sources.seq - 1
    source = int(torch.nonzero((found.layer == 0) & (found.position == 2))[0, 0])
    target = int(torch.nonzero((found.layer == 2) & (found.position == last))[0, 0])
    written, seen, kept = sources.written(source)[0], [], []

    def run(*, without: bool) -> float:
        def first(_, __, output):
            output[0, 2] -= written * without
            return output

        def second(_, __, output):
            kept.append(output.clone())
            return kept[0] if held else output

        def third(_, args):
            seen.append(float(args[0][0, last] @ sources.reads(torch.tensor([target]))[0]))

        layers = [layer.mlp for layer in lm.hf.model.layers]
        hooks = [
            layers[0].register_forward_hook(first),
            layers[1].register_forward_hook(second),
            layers[2].register_forward_pre_hook(third),
        ]
        try:
            with torch.no_grad():
                lm.hf(IDS)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[-1]

    lost = run(without=False) - run(without=True)
    assert abs(lost) > 1e-3
    assert exact_edges(lm, IDS, sources, [(source, target)], 4, held=held) == pytest.approx([lost], abs=1e-4)


# ---- the verb ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> tuple[LanguageModel, tuple[Path, ...], Path]:
    lm, place = models["llama"], tmp_path_factory.mktemp("circuit")
    paths = []
    for layer in range(N_LAYERS):
        path = place / f"transcoder{layer}"
        rows = torch.randn(16, D_MODEL, generator=torch.Generator().manual_seed(0))
        transcoder(lm, layer, k=4).save(path, rows, extra={"policy": POLICY.resolved()})
        paths.append(path)
    return lm, tuple(paths), place


def config_of(saved, **changes) -> CircuitConfig:
    _, paths, place = saved
    options = {"prompt": "The cat sat on", "dictionaries": paths, "out": place / "out", "n_checked": 8}
    return CircuitConfig.build(options | changes)


def test_a_graph_is_made_kept_and_agrees_with_itself(saved):
    lm, _paths, _place = saved
    made = circuit(config_of(saved), lm=lm)
    found = read_graph(made.path)
    assert found.kind == "linear" and len(found.dictionaries) == N_LAYERS
    assert found.checks["sum_off"] < 1e-4 and found.checks["influence_covered"] == 1.0
    assert 0 <= found.scores["replacement"] <= 1 and 0 <= found.scores["completeness"] <= 1
    logits = [node for node in found.nodes if node.kind == "logit"]
    with torch.no_grad():
        probabilities = torch.softmax(lm.hf(torch.tensor([found.ids])).logits[0, -1], -1)
    assert [node.effect for node in logits] == pytest.approx(
        [float(probabilities[node.latent]) for node in logits], rel=1e-3
    )
    assert sum(node.exact is not None for node in found.nodes) == found.checks["n_checked"]
    page = made.file("circuit.md").read_text()
    assert "correlation with exact ablations" in page
    assert 0 < found.checks["n_checked_edges"] <= 64 and found.checks["correlation_edges"] > 0.5
    assert (
        f"({found.checks['n_checked_edges']}), MLPs in between held | {found.checks['correlation_edges']:+.4f}"
        in page
    )
    assert -1 <= found.checks["correlation_edges_free"] <= 1
    assert circuit(config_of(saved), lm=lm).fingerprint == made.fingerprint
    with pytest.raises(MismatchError, match="n_logits 10 there, 2 now"):
        circuit(config_of(saved, n_logits=2), lm=lm)


def test_exact_effects_are_those_of_a_forward_with_the_latent_taken_out(saved):
    """By hand: hook the MLP, subtract activation times decoder row, look at the metric."""
    lm, _paths, place = saved
    found = read_graph(circuit(config_of(saved, out=place / "exact"), lm=lm).path)
    node = next(node for node in found.nodes if node.exact is not None and node.layer == 1)
    written = node.act * transcoder(lm, 1, k=4).decoder_directions()[node.latent]
    logits = [one for one in found.nodes if one.kind == "logit"]

    def metric() -> float:
        with torch.no_grad():
            out = lm.hf(torch.tensor([found.ids])).logits[0, -1]
        return float(sum(one.effect * (out[one.latent] - out.mean()) for one in logits))

    def without(_, __, output):
        output[0, node.position] -= written.detach()
        return output

    clean = metric()
    assert clean == pytest.approx(found.metric["clean"], rel=1e-3)
    hook = lm.hf.model.layers[1].mlp.register_forward_hook(without)
    try:
        assert clean - metric() == pytest.approx(node.exact, abs=1e-4)
    finally:
        hook.remove()


def test_where_nothing_held_would_move_prediction_and_ablation_agree(saved):
    """Latents of the last layer that write little, and nothing along the residual: the final norm stays as it is."""
    lm, _, place = saved
    config = config_of(
        saved,
        dictionaries=(place / "aside",),
        out=place / "last",
        n_checked=50,
        keep_nodes=1.0,
        keep_edges=1.0,
    )
    ids = torch.tensor([lm.tokenizer(config.prompt).input_ids])
    last = N_LAYERS - 1
    x = lm.capture(ids, f"resid_post.{last}")[f"resid_post.{last}"][0, -1].detach()
    dictionary = transcoder(lm, last, k=8)
    with torch.no_grad():
        dictionary.W_dec.mul_(0.01)
        dictionary.W_dec.sub_(torch.outer(dictionary.W_dec @ x, x) / (x @ x))
    dictionary.save(place / "aside", torch.randn(16, D_MODEL), extra={"policy": POLICY.resolved()})
    found = read_graph(circuit(config, lm=lm).path)
    latents = [node for node in found.nodes if node.kind == "latent"]
    assert len(latents) >= 3 and all(node.position == len(found.ids) - 1 for node in latents)
    effects = [node.effect for node in latents]
    assert [node.exact for node in latents] == pytest.approx(effects, rel=0.02, abs=3e-5)
    assert found.checks["correlation"] > 0.99


def test_atlases_and_explanations_count(saved):
    """They decide links and labels: others give another graph, those that moved the same."""
    lm, paths, place = saved
    told = write_atlas(place / "atlas", paths[0], {0: "early"})
    config = config_of(
        saved,
        out=place / "told",
        n_latents=2,
        n_checked=0,
        n_checked_edges=0,
        atlases=told[:1],
        explanations=told[1:],
    )
    made = circuit(config, lm=lm)
    (place / "atlas_told").rename(place / "moved_told")
    assert (
        circuit(config.replace(explanations=(place / "moved_told",)), lm=lm).fingerprint == made.fingerprint
    )
    told = write_atlas(place / "atlas", paths[0], {0: "anew"})
    with pytest.raises(MismatchError, match=r"or pass --fresh"):
        circuit(config, lm=lm)


def test_few_latents_are_looked_into_and_it_is_said_how_much_they_hold(saved):
    lm, _paths, place = saved
    few = read_graph(circuit(config_of(saved, out=place / "few", n_latents=10, batch_rows=4), lm=lm).path)
    assert few.checks["n_targets"] == 10 < few.checks["n_active"]
    assert 10 / few.checks["n_active"] < few.checks["influence_covered"] < 1
    assert sum(node.kind == "latent" for node in few.nodes) <= 10


def test_a_named_token_is_explained_alone(saved):
    lm, _paths, place = saved
    token = lm.token_text(int(lm.tokenizer("cat").input_ids[0]))
    found = read_graph(circuit(config_of(saved, out=place / "named", tokens=(token,)), lm=lm).path)
    assert [node.label for node in found.nodes if node.kind == "logit"] == [token]
    with pytest.raises(
        ConfigError, match="tokens must be single tokens of llama, got 'The cat sat', which is"
    ):
        circuit(config_of(saved, out=place / "no", tokens=("The cat sat",)), lm=lm)
    assert not (place / "no").exists()


# ---- bad input -----------------------------------------------------------------------------------------------


def test_dictionaries_that_make_no_circuit_are_refused(models):
    lm = models["llama"]
    frozen = Frozen(lm, IDS)

    def place(*made: Dictionary) -> Sources:
        return Sources(lm, frozen, [(one, POLICY) for one in made])

    with pytest.raises(
        ConfigError, match=r"must read mlp_in.L and write mlp_out.L, got resid_post.1. Train trans"
    ):
        place(
            filled(TopK(TopKConfig(k=2), D_MODEL, D_MODEL, 8, sites_of(lm, ["resid_post.1"], ["mlp_out.1"])))
        )
    with pytest.raises(
        ConfigError, match=r"reads layer 2 must write to that layer or later ones, got mlp_out.1"
    ):
        place(filled(TopK(TopKConfig(k=2), D_MODEL, D_MODEL, 8, sites_of(lm, ["mlp_in.2"], ["mlp_out.1"]))))
    with pytest.raises(
        ConfigError, match=r"one dictionary at most may read mlp_in\.1, got dictionaries 0 and 1"
    ):
        place(transcoder(lm, 1), transcoder(lm, 1))
    gated = filled(Gated(GatedConfig(), D_MODEL, D_MODEL, 16, sites_of(lm, ["mlp_in.1"], ["mlp_out.1"])))
    with pytest.raises(ConfigError, match=r"must be linear in what they read.*got gated"):
        place(gated)
    other = tiny_lm("llama", seed=1)
    with pytest.raises(MismatchError, match="must belong to the model llama"):
        place(transcoder(other, 1))


def test_options_without_effect_are_refused():
    with pytest.raises(ConfigError, match="n_logits must be left out when tokens are named"):
        CircuitConfig.build({"prompt": "a", "tokens": ["a"], "n_logits": 3})
    with pytest.raises(ConfigError, match="seed must be left out when nothing is checked"):
        CircuitConfig.build({"prompt": "a", "n_checked": 0, "n_checked_edges": 0, "seed": 1})
    with pytest.raises(ConfigError, match="explanations must be one for each atlas, got 1 for 0 atlases"):
        CircuitConfig.build({"prompt": "a", "explanations": ["e"]})
    assert CircuitConfig(prompt="a").model.dtype == "float32"


def test_a_circuit_is_an_artifact_of_its_own_kind(saved):
    assert artifact.load(saved[2] / "out").kind == "circuit"
