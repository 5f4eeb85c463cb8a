"""The other kinds of planted data: magnitudes, noise, families, superposition, layers, fitted to rows."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linprog
from test_toy import Directions, generator

from sememe.encoded import Encoded
from sememe.errors import ConfigError, ShapeError
from sememe.metrics import mcs
from sememe.toy import (
    Fitted,
    FittedSource,
    LayeredConfig,
    PlantedSource,
    SuperposedConfig,
    SuperposedSource,
    ToyConfig,
    absorption,
    differences,
    layered,
    planted,
    recovery,
    superpose,
)
from sememe.train import TrainConfig, train


def acts_of(**options) -> torch.Tensor:
    return (
        planted(ToyConfig.build({"d": 16, "n_features": 32, "n_active": 4} | options))
        .batch(20_000, generator(1))
        .codes.acts
    )


def test_binary_magnitudes_are_one():
    assert bool((acts_of(magnitudes="binary") == 1).all())


def test_heavy_magnitudes_have_the_mean_of_uniform_ones_and_a_longer_tail():
    heavy, uniform = acts_of(magnitudes="heavy"), acts_of()
    assert (
        float(heavy.mean()) == pytest.approx(0.5, rel=0.03) == pytest.approx(float(uniform.mean()), rel=0.03)
    )
    assert float(heavy.log().std()) == pytest.approx(1.0, rel=0.02)
    assert float(heavy.max()) > 10 * float(uniform.max())


def test_coloured_noise_has_variances_that_fall_with_their_rank():
    shape = {"d": 24, "n_features": 24, "n_active": 1e-6, "decay": 1.0, "noise": 0.3}
    for colour in ("white", "coloured"):
        x = planted(ToyConfig.build(shape | {"noise_colour": colour})).batch(60_000, generator()).x
        variances = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
        assert float(variances.mean()) == pytest.approx(0.09, rel=0.02)
        ranks = torch.arange(1, 25)
        expected = (1 / ranks) / (1 / ranks).mean() if colour == "coloured" else torch.ones(24)
        torch.testing.assert_close(variances / 0.09, expected, rtol=0.06, atol=0)


def test_a_child_is_active_only_with_its_parent_and_alone_among_its_siblings():
    config = ToyConfig(d=64, n_features=40, n_active=6, decay=0.9, n_children=3, child_share=0.4)
    toy = planted(config)
    assert float(toy.rates.sum()) == pytest.approx(6, rel=1e-5)
    active = (toy.batch(40_000, generator()).codes.to_dense() > 0).view(-1, 10, 4)
    parents, children = active[..., 0], active[..., 1:]
    assert not bool((children.any(-1) & ~parents).any())
    assert int(children.sum(-1).max()) == 1
    found = active.float().mean(0).flatten()
    deviation = (found - toy.rates) / (toy.rates * (1 - toy.rates) / 40_000).sqrt()
    assert float(deviation.abs().max()) < 4.5
    share = float((children.any(-1) & parents).sum() / parents.sum())
    assert share == pytest.approx(0.4, abs=0.01)


def test_correlated_parents_keep_their_rates():
    toy = planted(ToyConfig(d=16, n_features=30, n_active=6, decay=1.0, n_children=2, correlation=0.5))
    found = (toy.batch(60_000, generator()).codes.to_dense() > 0).float().mean(0)
    torch.testing.assert_close(found, toy.rates, rtol=0.08, atol=0)


def test_orthogonal_features_are_the_axes_and_need_not_fill_the_space():
    assert torch.equal(
        planted(ToyConfig(d=4, n_features=3, n_active=1, directions="orthogonal")).features, torch.eye(3, 4)
    )


def test_on_the_dense_unit_square_three_diagonal_atoms_cost_less_than_the_truth():
    """L1 prefers (1, 1), (1, -1), (-1, 1) to the axes the square was made of: 0.943 against 1."""
    square = ToyConfig(d=2, n_features=2, n_active=2, decay=1.0, directions="orthogonal")
    rows = planted(square).batch(200_000, generator())
    assert float(rows.codes.acts.sum()) / 200_000 == pytest.approx(1.0, abs=0.003)
    largest = rows.x.amax(1)
    assert 2**0.5 * float(largest.mean()) == pytest.approx(0.943, abs=0.002)
    atoms = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]) / 2**0.5
    for x, most in zip(rows.x[:200].double(), largest[:200], strict=True):
        least = linprog([1.0, 1.0, 1.0], A_eq=atoms.T.numpy(), b_eq=x.numpy(), bounds=(0, None))
        assert least.status == 0 and least.fun == pytest.approx(2**0.5 * float(most), rel=1e-5)


FAMILIES = ToyConfig(d=32, n_features=32, n_active=4, decay=1.0, n_children=3, directions="orthogonal")


class Absorbing(Directions):
    """Parents' latents keep silent beside a child; children's latents carry their parent."""

    def encode(self, x: torch.Tensor) -> Encoded:
        codes = x.view(-1, 8, 4).clamp_min(0)
        codes[..., 0] *= ~(codes[..., 1:] > 0).any(-1)
        return Encoded.from_dense(codes.flatten(1))


def test_absorption_is_none_for_the_truth_and_all_for_a_dictionary_that_absorbs():
    toy = planted(FAMILIES)
    truth = absorption(toy, Directions(toy.features), n_rows=5000)
    assert (truth.silent_with_child, truth.silent_alone, truth.split, truth.n_found) == (0, 0, 0, 8)
    assert truth.leaning == pytest.approx(0, abs=1e-6)
    rows = toy.features.view(8, 4, 32).clone()
    rows[:, 1:] += 0.4 * rows[:, :1]
    rows /= rows.norm(dim=-1, keepdim=True)
    absorbed = absorption(toy, Absorbing(rows.flatten(0, 1)), n_rows=5000)
    assert (absorbed.silent_with_child, absorbed.silent_alone) == (1, 0)
    assert absorbed.leaning == pytest.approx(0.4 / 1.16**0.5, abs=1e-5)


def test_a_parent_that_only_its_children_stand_for_is_split():
    toy = planted(FAMILIES)
    children = toy.features.view(8, 4, 32)[:, 1:].flatten(0, 1)
    found = absorption(toy, Directions(children), n_rows=1000)
    assert (found.split, found.n_found) == (1, 0) and math.isnan(found.silent_with_child)
    assert found.causes == dict.fromkeys(("silent_with_child", "silent_alone"), "no parent was found")


def test_nan_in_a_dictionary_is_no_absence_of_absorption():
    toy = planted(FAMILIES)
    rows = toy.features.clone()
    rows[3] = torch.nan
    found = absorption(toy, Directions(rows), n_rows=1000)
    assert all(math.isnan(value) for value in found[:-1])
    assert set(found.causes.values()) == {"1 of 32 learned directions are NaN or infinite"}

    class Broken(Directions):
        def encode(self, x: torch.Tensor) -> Encoded:
            acts = (x @ self.W_dec.T).relu()
            acts[:2] = torch.nan
            return Encoded.from_dense(acts)

    found = absorption(toy, Broken(toy.features), n_rows=1000)
    assert math.isnan(found.silent_alone) and found.n_found == 8 and found.split == 0
    assert found.causes["silent_with_child"] == "activations are NaN or infinite in 2 rows"
    always = planted(FAMILIES.replace(child_share=1.0))
    alone = absorption(always, Directions(always.features), n_rows=1000)
    assert alone.silent_with_child == 0
    assert alone.causes == {"silent_alone": "no row has a parent that was found without a child"}


def test_lengths_of_learned_rows_do_not_count():
    toy = planted(FAMILIES)
    half = absorption(toy, Directions(0.5 * toy.features), n_rows=1000)
    assert (half.n_found, half.silent_with_child) == (8, 0) and half.leaning == pytest.approx(0, abs=1e-6)
    between = 3 * toy.features.view(8, 4, 32).sum(1) / 2  # a cosine of 0.5 to all four
    assert absorption(toy, Directions(between), n_rows=1000).n_found == 0


def test_absorption_without_families_is_an_error():
    toy = planted(ToyConfig(d=8, n_features=8, n_active=2))
    with pytest.raises(ConfigError, match=r"with families, got n_children 0\. Raise n_children"):
        absorption(toy, Directions(toy.features))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_colour": "coloured"}, "noise_colour must go with noise > 0, got noise 0. Raise noise"),
        ({"child_share": 0.3}, "child_share must go with n_children > 0, got n_children 0. Raise n_children"),
        ({"n_children": 4}, "n_features must be a multiple of a family's size 5, got 512. Change n_features"),
        ({"n_children": 3, "fill_empty": True}, "fill_empty must be left out with families"),
        (
            {"directions": "orthogonal"},
            "orthogonal features must be at most d=256, got 512. Lower n_features",
        ),
    ],
)
def test_options_that_do_not_fit_say_so(options, message):
    with pytest.raises(ConfigError) as error:
        ToyConfig.build(options)
    assert message in str(error.value)


# -- superposition -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks():
    options = {"n_features": 20, "widths": (5,), "densities": (1.0, 0.02), "importance_decay": 0.85}
    return superpose(SuperposedConfig.build(options | {"n_steps": 2500, "lr": 1e-2}))


def test_sparse_features_are_superposed_and_dense_ones_are_not(networks):
    (dense, _), (sparse, network) = networks
    assert dense.n_carried <= 6 and dense.dimensions_per_feature > 0.8
    assert sparse.n_carried > 9 and sparse.dimensions_per_feature < 0.6
    assert sparse.interference > dense.interference
    assert 0 < sparse.loss < 1 and 0 < dense.loss < 1
    assert network.features.shape == (sparse.n_carried, 5)
    torch.testing.assert_close(network.features.norm(dim=1), torch.ones(sparse.n_carried))


def test_hidden_activations_are_a_stream_whose_codes_are_what_was_carried(networks):
    (_, (measured, network)) = networks
    source = SuperposedSource(network)
    assert source.d_in == 5 and torch.equal(source.sample(9).x, source.sample(9).x)
    rows = network.batch(4000, generator())
    off = rows.x - rows.codes.to_dense() @ network.features
    assert float(off.square().sum() / rows.x.square().sum()) < 0.1, "the rest was not carried"
    assert recovery(network, Directions(network.features)).recall == pytest.approx(1, abs=1e-5)
    assert measured.density == 0.02


def test_dimensions_are_those_of_the_weights(networks):
    for measured, network in networks:
        squares = float((network.W**2).sum())
        assert measured.dimensions_per_feature == pytest.approx(5 / squares, rel=1e-5)
        cosines = (network.features @ network.W).double()
        own = network.norms[network.carried].double()
        expected = (cosines.square().sum(1) - own.square()).mean()
        assert measured.interference == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (100,)}, r"widths must be in \[1, n_features=80\], got 100"),
        ({"densities": (0.0,)}, r"densities must be in \(0, 1\], got 0"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        superpose(SuperposedConfig.build(options))


# -- layers ------------------------------------------------------------------------------------------


def test_one_layer_computes_everything_and_several_share_it():
    small = {"n_features": 12, "d": 12, "width": 48, "n_steps": 1200, "lr": 1e-2, "density": 0.2}
    alone = layered(LayeredConfig.build(small | {"n_layers": 1}))
    learned = alone.fvu < 0.01
    assert int(learned.sum()) >= 8, "it computes what was asked for"
    torch.testing.assert_close(alone.shares[learned], torch.ones(int(learned.sum()), 1))
    torch.testing.assert_close(alone.effective_layers[learned], torch.ones(int(learned.sum())))
    three = layered(LayeredConfig.build(small | {"n_layers": 3}))
    learned = three.fvu < 0.01
    assert int(learned.sum()) >= 8
    torch.testing.assert_close(three.shares[learned].sum(1), torch.ones(int(learned.sum())))
    effective = three.effective_layers[learned]
    assert bool(((effective >= 1 - 1e-5) & (effective <= 3 + 1e-5)).all())
    again = layered(LayeredConfig.build(small | {"n_layers": 3}))
    assert torch.equal(again.fvu, three.fvu)


def test_features_that_nothing_computes_have_no_shares():
    found = layered(
        LayeredConfig(n_features=12, d=12, width=1, n_layers=1, n_steps=300, lr=1e-2, density=0.2)
    )
    unlearned = found.fvu > 0.9
    assert int(unlearned.sum()) > 0 and bool(found.shares[unlearned].isnan().all())
    assert bool(found.effective_layers[unlearned].isnan().all())


# -- fitted to rows ----------------------------------------------------------------------------------


def test_a_generator_fitted_to_planted_rows_is_the_planted_one():
    config = ToyConfig(
        d=24, n_features=16, n_active=3, decay=0.9, directions="orthogonal", magnitudes="heavy", noise=0.0
    )
    toy, rows = planted(config), PlantedSource(config).hold_out(30_000).x
    dictionary = Directions(toy.features)
    fitted = Fitted(dictionary, rows)
    order = mcs(fitted.features, toy.features)
    torch.testing.assert_close(order, torch.ones(16))
    torch.testing.assert_close(fitted.rates, toy.rates, rtol=0.1, atol=0.002)
    assert float(fitted.log_std.mean()) == pytest.approx(1.0, rel=0.03)
    assert float(fitted.log_mean.mean()) == pytest.approx(math.log(0.5) - 0.5, abs=0.03)
    made = FittedSource(fitted).hold_out(30_000).x
    for name, real, ours in differences(rows, made, dictionary):
        assert ours == pytest.approx(real, rel=1.5 if name.startswith("kurtosis") else 0.1, abs=0.02), name


def test_magnitudes_that_are_not_log_normal_keep_their_mean_and_mean_square():
    config = ToyConfig(d=24, n_features=16, n_active=3, directions="orthogonal", noise=0.05)
    dictionary, rows = Directions(planted(config).features), PlantedSource(config).hold_out(30_000).x
    made = FittedSource(Fitted(dictionary, rows)).hold_out(30_000).x
    found = {name: (real, ours) for name, real, ours in differences(rows, made, dictionary)}
    for name in (
        "mean norm",
        "share of variance in the first direction",
        "effective dimensions (participation ratio)",
    ):
        assert found[name][1] == pytest.approx(found[name][0], rel=0.2), name
    assert all(math.isfinite(value) for pair in found.values() for value in pair)


def test_what_a_dictionary_leaves_over_becomes_noise_of_the_same_covariance():
    config = ToyConfig(d=24, n_features=16, n_active=3, directions="orthogonal", noise=0.4)
    rows = PlantedSource(config).hold_out(20_000).x + 3.0
    half = Directions(planted(config).features[:8])
    fitted = Fitted(half, rows)
    made = fitted.batch(60_000, generator()).x
    torch.testing.assert_close(made.mean(0), rows.mean(0), atol=0.05, rtol=0)
    rest = rows - half(rows)
    codes = fitted.batch(60_000, generator(2))
    left = codes.x - codes.codes.to_dense() @ fitted.features
    torch.testing.assert_close(torch.cov(left.T), torch.cov(rest.T), atol=0.03, rtol=0.05)


def test_a_fit_of_foreign_or_few_rows_is_refused():
    dictionary = Directions(torch.eye(4))
    with pytest.raises(ShapeError, match="rows must have d=4"):
        Fitted(dictionary, torch.zeros(2000, 5))
    with pytest.raises(ConfigError, match=r"at least 1000 rows, got 7\. Give it more\."):
        Fitted(dictionary, torch.zeros(7, 4))


# -- the page's example ------------------------------------------------------------------------------


def test_any_config_of_train_runs_on_superposed_and_on_fitted_rows_as_the_page_says(
    tmp_path, monkeypatch, capsys
):
    page = (Path(__file__).parent.parent / "docs" / "toy.md").read_text(encoding="utf-8")
    example = next(one for one in re.findall(r"```python\n(.*?)```", page, re.S) if "TrainConfig(" in one)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    network, dictionary = names["network"], names["dictionary"]
    recall = float(capsys.readouterr().out.split()[-1])
    assert recall == recovery(network, dictionary).recall > recovery(network, dictionary).random + 0.1
    rows = SuperposedSource(network).hold_out(2000).x
    fitted = Fitted(dictionary, rows)
    config = TrainConfig.build(
        {
            "out": tmp_path / "relu",
            "architecture": {"kind": "relu", "d_sae": 24},
            "n_tokens": 4096,
            "batch_size": 256,
        }
    )
    learned = train(config, source=FittedSource(fitted))
    assert learned.d_in == 8 and 0 < recovery(fitted, learned).recall <= 1
