"""Traces where the truth is known: networks whose circuit was set by hand, linear ones, real forwards of others."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import text_of, write_corpus
from tiny_models import D_MODEL, tiny_hf, tiny_lm, tiny_tokenizer
from torch import Tensor, nn

from sememe import lm as language_models
from sememe.dictionaries import ReLU, ReLUConfig, Site, Sites, TopK, TopKConfig
from sememe.dictionaries.base import Dictionary
from sememe.edits import Intervention, LatentEdit
from sememe.errors import ConfigError, MismatchError, ShapeError
from sememe.graph import read_graph
from sememe.lm import LanguageModel
from sememe.text import TokenPolicy
from sememe.trace import (
    ERROR,
    METRIC,
    How,
    LatentMetric,
    Setting,
    TraceConfig,
    agreement,
    at_places,
    attribute,
    edges_of,
    exact_edges,
    exact_effects,
    feeds,
    inputs_of,
    integrate,
    kl,
    log_prob,
    logit_difference,
    loss,
    of_logits,
    prepare,
    trace,
)
from sememe.trace.attribution import dealt_out
from sememe.trace.circuit import curves, sizes
from sememe.trace.places import Placed, means_of, padded
from sememe.trace.table import Shift, Table

N, K = 96, 8
POLICY = TokenPolicy(context_length=32, drop_positions=0, drop_special=False)
PROMPT, OTHER = "The cat sat on", "The mat sat on"


# -- worlds ------------------------------------------------------------------------------------------


def linear_lm(seed: int = 0) -> LanguageModel:
    """A Llama whose norms are gone, whose attention looks at all earlier tokens alike, and whose MLPs are matrices."""
    hf = tiny_hf("llama", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in hf.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.mlp = nn.Linear(D_MODEL, D_MODEL, bias=False)
        with torch.no_grad():
            layer.mlp.weight.copy_(0.2 * torch.randn(D_MODEL, D_MODEL, generator=generator))
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
    hf.model.norm = nn.Identity()
    return language_models.wrap(hf.eval(), tiny_tokenizer(), f"linear {seed}")


def by_hand() -> LanguageModel:
    """Token "a" writes 1 into dimension 0; layer 0 adds twice that to dimension 1, layer 1 thrice that to dimension 2,
    from which the logit of token 5 is read. All other tokens write into dimension 3, which nothing reads."""
    lm = linear_lm()
    hf, a = lm.hf, lm.tokenizer("a").input_ids[0]
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        hf.get_input_embeddings().weight[:, 3] = 1.0
        hf.get_input_embeddings().weight[a] = torch.eye(D_MODEL)[0]
        hf.model.layers[0].mlp.weight[1, 0] = 2.0
        hf.model.layers[1].mlp.weight[2, 1] = 3.0
        hf.get_output_embeddings().weight[5, 2] = 1.0
    return language_models.wrap(hf, lm.tokenizer, "by hand")


def sites(lm: LanguageModel, reads: str, writes: str | None = None, max_norm: float | None = None) -> Sites:
    def site(name: str) -> Site:
        return Site(
            model=lm.name,
            model_fingerprint=lm.fingerprint,
            hookpoint=name,
            start=0,
            stop=lm.width(name),
            max_norm=max_norm,
        )

    return Sites(inputs=(site(reads),), outputs=(site(writes or reads),))


def random_topk(
    lm: LanguageModel, reads: str, writes: str | None = None, seed: int = 0, n: int = N, k: int = K
) -> TopK:
    dictionary = TopK(TopKConfig(k=k, d_sae=n), D_MODEL, D_MODEL, n, sites(lm, reads, writes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (dictionary.W_enc, dictionary.W_dec, dictionary.b_dec):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / D_MODEL**0.5)
    return dictionary.eval()


def unit(lm: LanguageModel, hookpoint: str) -> ReLU:
    """Latent i is dimension i where it is positive."""
    dictionary = ReLU(ReLUConfig(d_sae=D_MODEL), D_MODEL, D_MODEL, D_MODEL, sites(lm, hookpoint))
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(D_MODEL))
        dictionary.W_enc.copy_(torch.eye(D_MODEL))
    return dictionary.eval()


def at(lm: LanguageModel, *hookpoints: str, **options: Any) -> tuple[Placed, ...]:
    found = {name: random_topk(lm, name, seed=i, **options) for i, name in enumerate(hookpoints)}
    return at_places(lm, found, policies=dict.fromkeys(hookpoints, POLICY))


def setting(
    lm: LanguageModel,
    places: tuple[Placed, ...],
    ablation: Any = "zero",
    *,
    by_position: bool = True,
    **more: Any,
) -> Setting:
    inputs, patched = inputs_of(lm, [PROMPT], bos=False), inputs_of(lm, [OTHER], bos=False)
    metric = more.pop("metric", None) or of_logits(inputs, lambda z: z[:, 7] - z[:, 9])
    return prepare(
        lm,
        places,
        inputs,
        metric,
        ablation=ablation,
        patched=patched if ablation == "patch" else None,
        by_position=by_position,
        **more,
    )


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def linear() -> LanguageModel:
    return linear_lm()


# -- known circuits ----------------------------------------------------------------------------------


def test_a_circuit_set_by_hand_is_found_and_nothing_else() -> None:
    lm = by_hand()
    places = at_places(lm, {"second": unit(lm, "resid_post.1"), "first": unit(lm, "resid_post.0")})
    assert [p.name for p in places] == ["first", "second"], "the forward's order, not the caller's"
    b, a = (lm.tokenizer(text).input_ids[0] for text in "ba")
    inputs = padded([[b, a]])
    found = prepare(lm, places, inputs, of_logits(inputs, lambda z: z[:, 5]))
    table, last = found.table, 1
    for how in (attribute(found.passes, table, found.base), integrate(found.passes, table, found.base)):
        does = {table.describe(i): float(how.effects[i]) for i in torch.nonzero(how.effects)[:, 0].tolist()}
        assert does == {(0, 1, last): -6.0, (1, 2, last): -6.0}
    assert how.clean == 6.0
    edges = edges_of(found.passes, table, found.base, torch.arange(table.n_nodes))
    names = {i: table.describe(i) for i in range(table.n_nodes)} | {METRIC: "metric"}
    weights = {
        (names[s], names[t]): w
        for s, t, w in zip(edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True)
    }
    assert weights == {((0, 1, last), (1, 2, last)): -6.0, ((1, 2, last), "metric"): -6.0}


def test_what_feeds_a_latent_set_by_hand(tmp_path: Path) -> None:
    lm = by_hand()
    both = {"first": unit(lm, "resid_post.0"), "second": unit(lm, "resid_post.1")}
    places = at_places(lm, both, policies=dict.fromkeys(both, POLICY))
    how = How(
        text=text_of(write_corpus(tmp_path / "corpus.jsonl", 40)), split="all", n_tokens=600, n_contexts=4
    )
    found = feeds(lm, places, 2, how)
    assert len(found) == 1 and found[0].largest == found[0].mean == 6.0 and len(found[0].contexts) == 4
    strongest, others = found[0].sources[0], found[0].sources[1:]
    assert (strongest["latent"], strongest["effect"], strongest["exact"], strongest["share"]) == (
        1,
        -6.0,
        -6.0,
        1.0,
    )
    assert strongest["offset"] == 0 and all(source["effect"] == 0 for source in others)
    assert all(lm.tokenizer.decode(c.ids[-1:]).strip() == "a" for c in found[0].contexts)


@pytest.mark.parametrize("ablation", ["zero", "patch"])
def test_in_a_linear_model_every_prediction_is_the_truth(linear: LanguageModel, ablation: str) -> None:
    lm = linear
    places = at_places(
        lm,
        {
            "a": random_topk(lm, "resid_post.0"),
            "b": random_topk(lm, "mlp_in.1", "mlp_out.1", seed=1),  # a transcoder
            "c": random_topk(lm, "resid_post.1", seed=2),
        },
    )
    found = setting(lm, places, ablation)
    passes, table, base = found.passes, found.table, found.base
    exact = exact_effects(passes, table, base, range(table.n_nodes))
    size = float(exact.abs().max())
    assert size > 0.1 and {int(p) for p in table.node_place} == {0, 1, 2}
    for effects in (
        attribute(passes, table, base).effects,
        integrate(passes, table, base, n_grouped=50).effects,
        integrate(passes, table, base, path="layers", n_steps=2).effects,
    ):
        torch.testing.assert_close(effects, exact, atol=2e-5 * size, rtol=1e-4)
    if ablation == "patch":
        effects = integrate(passes, table, base, path="inputs", n_steps=2, embedded=found.embedded).effects
        torch.testing.assert_close(effects, exact, atol=2e-5 * size, rtol=1e-4)
        # everything that changes, changes through each place that all of the residual passes
        assert found.patched is not None
        for place in (0, 2):
            total = float(effects[table.node_place == place].sum())
            assert total == pytest.approx(found.patched - float(base.value.mean()), abs=1e-4 * size)


@pytest.mark.parametrize("direct", [True, False])
def test_edges_are_what_real_forwards_carry(llama: LanguageModel, direct: bool) -> None:
    """With changes so small that a model is linear and no selection of latents changes."""
    places = at(llama, "resid_post.0", "mlp_out.1", "resid_post.1")
    found = setting(llama, places)
    table = scaled(found.table, 1e-2)
    nodes = attribute(found.passes, table, found.base).effects.abs().argsort(descending=True)[:60]
    edges = edges_of(found.passes, table, found.base, nodes, direct=direct, batch_rows=8)
    order = edges.weight.abs().argsort(descending=True)[:60:3]
    some = list(zip(edges.source[order].tolist(), edges.target[order].tolist(), strict=True))
    exact = exact_edges(found.passes, table, found.base, some, direct=direct)
    found_agreement = agreement(edges.weight[order].tolist(), exact.tolist())
    assert found_agreement.correlation is not None and found_agreement.correlation > 0.999
    assert found_agreement.slope == pytest.approx(1, abs=0.03)
    kinds = {(int(table.node_place[s]), int(table.node_place[t]) if t >= 0 else 3) for s, t in some}
    assert len(kinds) > 2
    through = {
        int(table.node_place[s]) for s, t in zip(edges.source, edges.target, strict=True) if t == METRIC
    }
    assert through == ({2} if direct else {0, 1, 2}), "direct: only the last place has the metric after it"


def scaled(table: Table, factor: float) -> Table:
    """The same entries, changed less."""
    shifts = [
        Shift(
            s.token,
            s.latent,
            s.before,
            s.before + factor * (s.after - s.before),
            factor * s.error,
            factor * s.rest,
        )
        for s in table.shifts
    ]
    return Table(table.places, table.inputs, shifts, by_position=table.by_position)


# -- effects -----------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences(llama: LanguageModel) -> None:
    found = setting(llama, at(llama, "resid_post.0", "resid_post.1", "mlp_out.2"))
    table = scaled(found.table, 2e-3)
    effects = attribute(found.passes, table, found.base).effects
    nodes = effects.abs().argsort(descending=True)[:40].tolist()
    exact = exact_effects(found.passes, table, found.base, nodes)
    torch.testing.assert_close(effects[nodes], exact, rtol=0.05, atol=0.01 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("ablation", "hookpoint"), [("zero", "resid_post.1"), ("mean", "resid_post.1"), ("patch", "attn_out.1")]
)
def test_integrated_gradients_add_up_to_the_whole_change(
    llama: LanguageModel, ablation: Any, hookpoint: str, tmp_path: Path
) -> None:
    places = at(llama, hookpoint)
    means = None
    if ablation == "mean":
        text = text_of(write_corpus(tmp_path / "corpus.jsonl", 30))
        means = means_of(llama, places, text, split="all", n_tokens=400)
    found = setting(llama, places, ablation, means=means)
    passes, table, base = found.passes, found.table, found.base
    whole = passes.run({0: table.whole(0)}).value - base.value
    fine = integrate(passes, table, base, path="layers", n_steps=24)
    assert float(fine.effects.sum() + fine.rest.sum()) == pytest.approx(float(whole), rel=0.03, abs=0.02)
    assert abs(float(attribute(passes, table, base).effects.sum()) - float(whole)) > 0.02, "it takes a path"


def test_groups_predict_ablations_better_than_the_gradient_alone(llama: LanguageModel) -> None:
    found = setting(llama, at(llama, "resid_post.0", "resid_post.1", "resid_post.2", k=3))
    passes, table, base = found.passes, found.table, found.base
    nodes = list(range(table.n_nodes))
    exact = exact_effects(passes, table, base, nodes)
    plain = attribute(passes, table, base).effects
    grouped = integrate(passes, table, base).effects
    assert float((grouped - exact).norm()) < 0.7 * float((plain - exact).norm())


def test_passes_are_counted_by_the_model(llama: LanguageModel) -> None:
    places = at(llama, "resid_post.0", "resid_post.1", "resid_post.2")
    found = setting(llama, places)
    one = attribute(found.passes, found.table, found.base)
    assert (one.n_forwards, one.n_backwards) == (1, 1)
    ten = integrate(found.passes, found.table, found.base, n_steps=10)
    assert (ten.n_forwards, ten.n_backwards) == (10, 10), "the unchanged run is one of them"
    pair = setting(llama, places, "patch")
    assert (pair.passes.n_forwards, pair.passes.n_backwards) == (3, 1), (
        "the counterpart's latents and its number"
    )


def test_nothing_as_large_as_tokens_times_latents_is_kept(llama: LanguageModel) -> None:
    n = 1111
    places = at(llama, "resid_post.0", "resid_post.1", n=n)
    found = setting(llama, places, "patch")
    attribution = integrate(found.passes, found.table, found.base)
    n_tokens = found.table.n_tokens
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    dense = [x.shape for x in tensors if tuple(x.shape) == (n_tokens, n)]
    assert not dense and len(attribution.effects) <= 2 * n_tokens * (2 * K + 1)


def test_a_node_over_all_positions_and_prompts_is_the_sum_of_its_entries(linear: LanguageModel) -> None:
    places = at(linear, "resid_post.1")
    inputs = inputs_of(linear, [PROMPT, "on the mat"], bos=False)
    assert len(set(inputs.lengths.tolist())) == 2
    metric = of_logits(inputs, lambda z: z[:, 7])
    found = prepare(linear, places, inputs, metric, by_position=False)
    effects = attribute(found.passes, found.table, found.base).effects
    exact = exact_effects(found.passes, found.table, found.base, range(found.table.n_nodes))
    torch.testing.assert_close(effects, exact, atol=1e-4, rtol=1e-4)
    alone = []
    for text in (PROMPT, "on the mat"):
        one = inputs_of(linear, [text], bos=False)
        own = prepare(linear, places, one, of_logits(one, lambda z: z[:, 7]), by_position=False)
        values = attribute(own.passes, own.table, own.base).effects
        alone.append({int(own.table.node_latent[i]): float(v) for i, v in enumerate(values)})
    for i, value in enumerate(effects.tolist()):
        latent = int(found.table.node_latent[i])
        assert value == pytest.approx(sum(one.get(latent, 0.0) for one in alone) / 2, abs=1e-4)


def test_exact_ablation_is_the_one_that_edits_make(llama: LanguageModel) -> None:
    places = at(llama, "resid_post.1")
    found = setting(llama, places)
    table = found.table
    node = int(torch.nonzero(table.node_latent != ERROR)[3, 0])
    latent, position = int(table.node_latent[node]), int(table.node_position[node])
    keep = torch.zeros(table.inputs.ids.shape, dtype=torch.bool)
    keep[0, position] = True
    edit = Intervention(places[0].dictionary, [LatentEdit(latents=(latent,))], keep=keep)
    with torch.no_grad(), edit.on(llama):
        value = found.passes.metric.forward(llama, table.inputs)
    exact = exact_effects(found.passes, table, found.base, [node])
    assert float(exact[0]) == pytest.approx(float((value - found.base.value).mean()), abs=1e-5)


def test_positions_a_dictionary_was_not_made_for_have_no_latents(llama: LanguageModel) -> None:
    inputs = inputs_of(llama, [PROMPT], bos=False)
    norms = llama.capture(inputs.ids, "resid_post.0")["resid_post.0"][0].detach().norm(dim=1)
    limit = float(norms.median())
    dictionary = random_topk(llama, "resid_post.0")
    dictionary.sites = sites(llama, "resid_post.0", max_norm=limit)
    places = at_places(llama, {"a": dictionary})
    over = set(torch.nonzero(norms > limit)[:, 0].tolist())
    zero, patch = setting(llama, places), setting(llama, places, "patch")
    assert over and not over & set(zero.table.node_position.tolist())
    latents = patch.table.node_latent != ERROR
    assert not over & set(patch.table.node_position[latents].tolist())
    assert over & set(patch.table.node_position[~latents].tolist()), "there the error is the whole activation"
    inside = {int(p) for p in zero.table.node_position}
    assert inside == set(range(len(norms))) - over


# -- circuits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["zero", "patch"])
def test_a_circuit_of_everything_is_everything(llama: LanguageModel, ablation: str) -> None:
    found = setting(llama, at(llama, "resid_post.0", "mlp_out.1"), ablation)
    effects = attribute(found.passes, found.table, found.base).effects
    shares = curves(found.circuits, found.base, effects, n_random=1)
    assert shares is not None and shares["n_nodes"] == sizes(int((found.table.node_latent != ERROR).sum()))
    assert shares["faithfulness"][-1] == pytest.approx(1, abs=1e-4)
    assert shares["faithfulness_without_errors"][0] == pytest.approx(0, abs=1e-4)
    assert shares["completeness"][0] == pytest.approx(1, abs=1e-4)
    assert shares["faithfulness_random"][-1] == pytest.approx(1, abs=1e-4)
    if ablation == "patch":
        assert shares["m_nothing"] == pytest.approx(found.patched, abs=1e-4)


def test_one_latent_alone_and_all_but_it_by_plain_hooks(llama: LanguageModel) -> None:
    places = at(llama, "resid_post.1")
    found = setting(llama, places)
    table, dictionary = found.table, places[0].dictionary
    node = int(torch.nonzero(table.node_latent != ERROR)[5, 0])
    latent, position = int(table.node_latent[node]), int(table.node_position[node])
    chosen = torch.zeros(table.n_nodes, dtype=torch.bool)
    chosen[node] = True

    def value(change: Any) -> float:
        with torch.no_grad(), llama.edit({"resid_post.1": change}):
            return float(found.passes.metric.forward(llama, table.inputs))

    def own(x: Tensor) -> Tensor:
        act = dictionary.encode(x[0]).to_dense()[position, latent]
        out = torch.zeros_like(x)
        out[0, position] = act * dictionary.W_dec[latent]
        return out

    only = value(lambda x: own(x) + dictionary.b_dec)
    but = value(lambda x: x - own(x))
    with_errors = value(lambda x: own(x) + dictionary.b_dec + x - dictionary(x[0])[None])
    circuits = found.circuits
    assert float(circuits.values([chosen], errors=False)) == pytest.approx(only, abs=1e-4)
    assert float(circuits.values([chosen], errors=True)) == pytest.approx(with_errors, abs=1e-4)
    assert float(circuits.values([chosen], without=True)) == pytest.approx(but, abs=1e-4)


# -- metrics -----------------------------------------------------------------------------------------


def test_metrics_by_hand(llama: LanguageModel) -> None:
    inputs = inputs_of(llama, [PROMPT], bos=False)
    with torch.no_grad():
        logits = llama.logits(llama.hidden(inputs.ids))[0]
    a, b = (llama.tokenizer(t).input_ids[0] for t in "ab")
    log_probs = logits.log_softmax(1)
    other = inputs_of(llama, [OTHER], bos=False)
    with torch.no_grad():
        truth = llama.logits(llama.hidden(other.ids))[0, -1].log_softmax(0)
        expected = {
            logit_difference(llama, inputs, ["a"], ["b"]): logits[-1, a] - logits[-1, b],
            logit_difference(llama, inputs, ["a"], ["b"], 1): logits[1, a] - logits[1, b],
            log_prob(llama, inputs, ["a"]): log_probs[-1, a],
            loss(llama, inputs): -log_probs[:-1].gather(1, inputs.ids[0, 1:, None]).mean(),
            kl(llama, inputs, other): (truth.exp() * (truth - log_probs[-1])).sum(),
        }
        for metric, value in expected.items():
            assert float(metric.forward(llama, inputs)) == pytest.approx(float(value), abs=1e-4), metric.text


def test_padding_changes_nothing(llama: LanguageModel) -> None:
    both = inputs_of(llama, [PROMPT, "on"], bos=False)
    with torch.no_grad():
        together = logit_difference(llama, both, ["a"], ["b"]).forward(llama, both)
        for i, text in enumerate((PROMPT, "on")):
            one = inputs_of(llama, [text], bos=False)
            alone = logit_difference(llama, one, ["a"], ["b"]).forward(llama, one)
            assert float(together[i]) == pytest.approx(float(alone), abs=1e-4)


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
    with pytest.raises(ConfigError, match="must have a gradient where nothing is changed"):
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
        ({"patched": ("a", "b"), "ablation": "zero"}, "must go with patched prompts"),
        ({"path": "inputs"}, "the path inputs leads to patched prompts"),
        ({"method": "gradient", "n_steps": 5}, "n_steps must be left out when the method is gradient"),
        ({"metric": "kl", "method": "gradient"}, "its gradient is 0 there"),
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


def test_the_largest_are_dealt_out_evenly() -> None:
    effects = torch.arange(20.0) - 10
    hands = dealt_out(effects, 10, 3, torch.Generator().manual_seed(0))
    assert sorted(int(i) for hand in hands for i in hand) == sorted(
        effects.abs().argsort(descending=True, stable=True)[:10].tolist()
    )
    assert sorted(map(len, hands)) == [3, 3, 4]
    assert len(dealt_out(effects, 2, 9, torch.Generator().manual_seed(0))) == 2


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
