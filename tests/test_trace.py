"""Traces where the truth is known: networks whose circuit was set by hand, linear ones, real forwards of others."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import text_of, write_corpus
from tiny_models import D_MODEL, tiny_lm
from torch import Tensor
from traced_models import (
    OTHER,
    POLICY,
    PROMPT,
    K,
    at,
    by_hand,
    linear_lm,
    random_topk,
    setting,
    sites,
    unit,
)

from sememe.edits import Intervention, LatentEdit
from sememe.errors import ConfigError
from sememe.lm import LanguageModel
from sememe.trace import (
    ERROR,
    METRIC,
    How,
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
)
from sememe.trace.circuit import curves, sizes
from sememe.trace.places import Means, means_of, padded
from sememe.trace.table import Shift, Table


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


def test_circuits_against_mean_ablation_by_hand() -> None:
    """Latents 0 and 1 hold 1 and 2 at the last token and reach the logit with weights 1 and 3: 7 in all. At their
    means, 0.25 and 0.5, and with the errors' mean in it, 0.5, it is 2.25."""
    lm = by_hand()
    with torch.no_grad():
        lm.hf.model.layers[1].mlp.weight[2, 0] = 1.0
    places = at_places(lm, {"first": unit(lm, "resid_post.0")})
    inputs = padded([[lm.tokenizer(text).input_ids[0] for text in "ba"]])
    latents, error = torch.zeros(D_MODEL), torch.zeros(D_MODEL)
    latents[0], latents[1], error[2] = 0.25, 0.5, 0.5
    metric = of_logits(inputs, lambda z: z[:, 5])
    found = prepare(lm, places, inputs, metric, ablation="mean", means=[Means(latents, error)])
    effects = attribute(found.passes, found.table, found.base).effects
    does = {found.table.describe(i): float(effects[i]) for i in torch.nonzero(effects)[:, 0].tolist()}
    assert does == {(0, 0, 1): -0.75, (0, 1, 1): -4.5, (0, ERROR, 1): 0.5}
    shares = curves(found.circuits, found.base, effects, n_random=1)
    assert shares is not None and shares["n_nodes"] == [0, 1, 2, 3]
    assert (shares["m_everything"], shares["m_nothing"]) == (7.0, 2.25)
    whole = 7 - 2.25
    expected = {  # the latents at 1 and 0.25 and 0.5 and 2, the mean error in the logit or out of it
        "faithfulness": [1.75, 6.25, 7, 7],
        "faithfulness_without_errors": [2.25, 6.75, 7.5, 7.5],
        "completeness": [7, 2.5, 1.75, 1.75],
    }
    for name, values in expected.items():
        assert shares[name] == pytest.approx([(value - 2.25) / whole for value in values], abs=1e-6), name
    assert shares["faithfulness_random"][-1] == pytest.approx(1, abs=1e-6)


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


# -- numbers without a gradient ----------------------------------------------------------------------


def test_what_is_least_where_nothing_is_changed_is_traced_by_layers_only(llama: LanguageModel) -> None:
    """The divergence from the unedited predictions: its gradient there is rounding."""
    inputs = inputs_of(llama, [PROMPT], bos=False)
    places = at(llama, "resid_post.0", "resid_post.2")
    found = setting(llama, places, metric=kl(llama, inputs, inputs))
    passes, table, base = found.passes, found.table, found.base
    for refused in (
        lambda: attribute(passes, table, base),
        lambda: integrate(passes, table, base),
        lambda: edges_of(passes, table, base, torch.arange(3)),
    ):
        with pytest.raises(
            ConfigError, match=r"which is least there, .* is rounding\. Set --path layers, or"
        ):
            refused()
    effects = integrate(passes, table, base, path="layers", n_steps=5).effects
    exact = exact_effects(passes, table, base, range(table.n_nodes))
    best = exact.argsort(descending=True)[:20].tolist()
    assert len(set(best) & set(effects.argsort(descending=True)[:40].tolist())) > 10
    other = setting(llama, places, "patch", metric=kl(llama, inputs, inputs_of(llama, [OTHER], bos=False)))
    assert float(integrate(other.passes, other.table, other.base).effects.abs().max()) > 0.01


@pytest.mark.parametrize("path", ["groups", "layers", "inputs"])
def test_a_flat_metric_is_refused_whatever_the_path(llama: LanguageModel, path: Any) -> None:
    inputs = inputs_of(llama, [PROMPT], bos=False)
    flat = of_logits(inputs, lambda z: 0 * z[:, 0])
    found = setting(llama, at(llama, "resid_post.0", "resid_post.2"), "patch", metric=flat)
    with pytest.raises(
        ConfigError, match=r"must depend on what is at resid_post\.0, got own, whose gradient is 0"
    ):
        integrate(found.passes, found.table, found.base, path=path, n_steps=2, embedded=found.embedded)


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
