"""Planted dictionaries have the statistics they state, and the streams made from them resume exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sememe import metrics
from sememe.dictionaries.base import Dictionary
from sememe.encoded import Encoded
from sememe.errors import ConfigError, CorruptError, ShapeError
from sememe.toy import Planted, PlantedSource, ToyConfig, on_rows, planted, recovery, scores


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(toy: Planted, n: int = 40_000, step: int = 4_000) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each feature was active, and all of the active values."""
    numbers, counts, values = generator(5), torch.zeros(toy.config.n_features), []
    for _ in range(n // step):
        codes = toy.batch(step, numbers).codes
        counts += torch.bincount(codes.indices.long(), minlength=toy.config.n_features)
        values.append(codes.acts)
    return counts / n, torch.cat(values)


def test_features_are_unit_vectors_without_a_preferred_direction() -> None:
    features = planted(ToyConfig()).features
    assert features.shape == (512, 256)
    assert torch.allclose(features.norm(dim=1), torch.ones(512), atol=1e-6)
    cosines = features @ features.T - torch.eye(512)
    assert abs(float(cosines.mean())) < 1e-3
    assert 0.9 < float(cosines[cosines != 0].std()) * 256**0.5 < 1.1


@pytest.mark.parametrize("options", [{}, {"correlation": 0.6, "n_factors": 4}], ids=["free", "correlated"])
def test_rates_decay_and_magnitudes_are_as_stated(options: dict[str, float]) -> None:
    toy = planted(ToyConfig.build(options))
    found, values = frequencies(toy)
    expected = 0.99 ** torch.arange(512) / (0.99 ** torch.arange(512)).sum() * 5
    assert torch.allclose(toy.rates, expected, rtol=1e-4)
    deviation = (found - expected) / (expected * (1 - expected) / 40_000).sqrt()
    assert float(deviation.abs().max()) < 5
    assert float(found.sum()) == pytest.approx(5, rel=0.03 if options else 0.01)
    assert float(values.min()) > 0 and float(values.max()) < 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(values.var()) == pytest.approx(1 / 12, abs=0.002)


def test_published_rates_are_not_normalised() -> None:
    toy = planted(ToyConfig(rates="published"))
    assert float(toy.rates[0]) == pytest.approx(5 / 512)
    assert float(toy.rates.sum()) == pytest.approx(0.97, abs=0.01)


def test_x_is_the_sum_of_active_features() -> None:
    toy = planted(ToyConfig(d=12, n_features=20, n_active=3))
    x, codes = toy.batch(50, generator())
    assert torch.allclose(x, codes.to_dense() @ toy.features, atol=1e-6)
    assert int(codes.l0().sum()) == codes.acts.shape[0]


def test_noise_has_the_stated_size() -> None:
    quiet, noisy = ToyConfig(d=64), ToyConfig(d=64, noise=0.25)
    x, codes = planted(noisy).batch(4_000, generator())
    residual = x - codes.to_dense() @ planted(quiet).features
    assert float(residual.std()) == pytest.approx(0.25, rel=0.01)
    assert abs(float(residual.mean())) < 0.005


def test_correlation_makes_features_meet_more_often_than_chance() -> None:
    def excess(config: ToyConfig) -> float:
        toy = planted(config)
        active = (toy.batch(20_000, generator(1)).codes.to_dense() != 0).double()
        joint = active.T @ active / len(active)
        rates = active.mean(0)
        spread = joint - rates[:, None] * rates[None]
        return float((spread - torch.diag(spread.diag())).abs().mean() / (rates.mean() ** 2))

    base = {"d": 16, "n_features": 32, "n_active": 4.0, "decay": 1.0}
    assert excess(ToyConfig.build(base)) < 0.1
    assert excess(ToyConfig.build(base | {"correlation": 0.8, "n_factors": 3})) > 0.3


def test_empty_rows_are_filled_only_when_asked() -> None:
    base = {"d": 8, "n_features": 16, "n_active": 1.0}
    bare = planted(ToyConfig.build(base)).batch(2_000, generator()).codes
    full = planted(ToyConfig.build(base | {"fill_empty": True})).batch(2_000, generator()).codes
    assert int((bare.l0() == 0).sum()) > 500
    assert int(full.l0().min()) == 1


def test_a_resolved_config_builds_again() -> None:
    for config in (ToyConfig(), ToyConfig(correlation=0.5), ToyConfig(rates="published")):
        assert ToyConfig.build(config.resolved()) == config


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data() -> None:
    a, b, c = planted(ToyConfig(seed=3)), planted(ToyConfig(seed=3)), planted(ToyConfig(seed=4))
    assert torch.equal(a.features, b.features) and not torch.equal(a.features, c.features)
    assert torch.equal(a.batch(9, generator()).x, b.batch(9, generator()).x)
    assert torch.equal(PlantedSource(a.config).next_batch(5).x, PlantedSource(b.config).next_batch(5).x)
    assert not torch.equal(PlantedSource(a.config).next_batch(5).x, PlantedSource(c.config).next_batch(5).x)


def test_a_planted_stream_is_a_source() -> None:
    from sememe.source import Source

    assert isinstance(PlantedSource(ToyConfig(d=8, n_features=16, n_active=2)), Source)


def test_a_stream_resumes_exactly_and_its_sample_does_not_advance_it() -> None:
    source = PlantedSource(ToyConfig(d=8, n_features=16, n_active=2))
    assert (source.d_in, source.d_out, source.sites, source.n_rows) == (8, 8, None, None)
    source.next_batch(7)
    state = source.state_dict()
    assert torch.equal(source.sample(6).x, source.sample(6).x)
    expected = source.next_batch(11)
    assert expected.target is expected.x
    other = PlantedSource(ToyConfig(d=8, n_features=16, n_active=2))
    other.load_state_dict(state)
    assert torch.equal(other.next_batch(11).x, expected.x)
    assert not torch.equal(source.sample(11).x, expected.x)


class Directions(Dictionary):
    """A dictionary of which only the directions matter."""

    kind = "directions"

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(ToyConfig(), rows.shape[1], rows.shape[1], rows.shape[0])
        self.register_buffer("W_dec", rows)

    def encode(self, x: torch.Tensor) -> Encoded:
        return Encoded.from_dense((x @ self.W_dec.T).relu())

    def decode(self, encoded: Encoded, x: torch.Tensor | None = None) -> torch.Tensor:
        return encoded.to_dense() @ self.W_dec

    def fold(self) -> Directions:
        return self

    def decoder_directions(self) -> torch.Tensor:
        return self.W_dec

    @classmethod
    def rebuild(cls, config, d_in, d_out, d_sae, sites):  # type: ignore[no-untyped-def]
        return cls(torch.zeros(d_sae, d_out))


def test_opposite_directions_are_the_same_where_activations_have_signs() -> None:
    toy = planted(ToyConfig(d=64, n_features=32, n_active=2))
    flipped = toy.features * torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0)[:, None]
    unsigned, signed = Directions(flipped), Directions(flipped)
    signed.signed = True  # type: ignore[assignment]
    assert recovery(toy, unsigned).recall < 0.8 and recovery(toy, unsigned).precision < 0.8
    assert recovery(toy, signed).recall == pytest.approx(1, abs=1e-5)
    assert recovery(toy, signed).precision == pytest.approx(1, abs=1e-5)


def test_recovery_tells_recall_from_precision() -> None:
    toy = planted(ToyConfig(d=64, n_features=32, n_active=2))
    order = torch.randperm(32, generator=generator())
    whole = recovery(toy, Directions(3 * toy.features[order]))
    assert whole.recall == pytest.approx(1, abs=1e-5) and whole.precision == pytest.approx(1, abs=1e-5)
    assert whole.found == 1
    half = recovery(toy, Directions(toy.features[:16]))
    assert half.precision == pytest.approx(1, abs=1e-5) and half.found == 0.5
    assert 0.5 < half.recall < 0.8
    flipped = recovery(toy, Directions(-toy.features))
    assert flipped.found == 0 and flipped.precision < 0.5


def test_recovery_has_intervals_and_nulls() -> None:
    toy = planted(ToyConfig(d=64, n_features=32, n_active=2))
    learned = torch.cat([toy.features[:16], torch.randn(8, 64, generator=generator())])
    found = recovery(toy, Directions(learned))
    for name in ("recall", "precision", "found"):
        value, low, high = (getattr(found, f"{name}{end}") for end in ("", "_low", "_high"))
        assert low < value < high, name
    assert found.precision_high - found.precision_low < 0.3  # of 24 directions, 8 of them anything
    assert found.random < 0.5 and found.random_precision < 0.5 and found.random_found == 0
    assert found.random == pytest.approx(
        recovery(toy, Directions(metrics.random_rows(24, 64))).recall, abs=1e-6
    )
    assert math.isnan(recovery(toy, Directions(learned), n_bootstrap=0).recall_low)


def test_a_direction_that_is_nan_makes_no_score_of_0() -> None:
    toy = planted(ToyConfig(d=64, n_features=32, n_active=2))
    broken = toy.features.clone()
    broken[3, 5] = math.nan
    found = recovery(toy, Directions(broken))
    assert math.isnan(found.found) and math.isnan(found.recall) and math.isnan(found.precision)
    assert found.cause == "1 of 32 learned directions are NaN or infinite" and found.random < 0.5
    x = toy.batch(300, generator()).x
    line = scores(toy, Directions(broken), x, next_larger=metrics.Statistic(0.5, 0.4, 0.6))
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert [line[name] for name in ("recall", "found_low", "dead", "l0", "fvu")] == [None] * 5
    assert (line["next_larger"], line["next_larger_high"]) == (0.5, 0.6)
    assert line["cause"] == (
        "1 of 32 learned directions are NaN or infinite; dead: activations are NaN or infinite in 300 rows; "
        "l0: activations are NaN or infinite; fvu: 300 rows of the reconstruction or its target are NaN or infinite"
    )


def test_what_a_dictionary_does_with_rows_has_intervals() -> None:
    toy = planted(ToyConfig(d=64, n_features=32, n_active=2))
    x, dictionary = toy.batch(3000, generator()).x, Directions(toy.features)
    found, dense = on_rows(dictionary, x), dictionary.encode(x).to_dense()
    assert found["l0"].value == pytest.approx(float((dense != 0).sum(1).double().mean()))
    assert found["l0"].low < found["l0"].value < found["l0"].high < found["l0"].low + 1
    assert found["fvu"].low < found["fvu"].value < found["fvu"].high
    half = on_rows(Directions(torch.cat([toy.features, torch.zeros(32, 64)])), x)["dead"]
    assert half.low <= half.value == 32 <= half.high


def test_recovery_of_another_width_is_an_error() -> None:
    toy = planted(ToyConfig(d=8, n_features=16, n_active=2))
    with pytest.raises(ShapeError, match=r"d_out=8 like the planted one, got 5\. Compare it"):
        recovery(toy, Directions(torch.ones(3, 5)))


def test_the_command_trains_and_says_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sememe import dictionaries
    from sememe.cli import main

    planted_options = ["--planted-d", "16", "--planted-n-features", "24", "--planted-n-active", "1.5"]
    size = [
        "--k",
        "2",
        "--d-sae",
        "32",
        "--n-tokens",
        "200000",
        "--batch-size",
        "512",
        "--lr",
        "0.01",
        "--threads",
        "1",
    ]
    with pytest.raises(SystemExit) as left:
        main(["toy", "topk", *planted_options, *size, "--out", str(tmp_path / "learned")])
    assert left.value.code == 0
    toy = planted(ToyConfig(d=16, n_features=24, n_active=1.5))
    found = recovery(toy, dictionaries.load(tmp_path / "learned"))
    printed = capsys.readouterr().out
    assert f"{found.recall:.4f} ({found.recall_low:.4f} to {found.recall_high:.4f})" in printed
    assert f"{found.found:.1%}" in printed and f"{found.random_precision:.4f}" in printed
    assert printed.count("of as many random directions") == 3
    chance = recovery(toy, Directions(torch.randn(32, 16, generator=generator())))
    assert chance.random == pytest.approx(chance.recall, abs=0.05) and found.random == chance.random
    assert found.recall > 0.9 > chance.recall


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 4}, "at most 1, got 1.27 for the commonest one. Lower n_active"),
        ({"n_factors": 8}, "n_factors must go with correlation > 0, got correlation 0. Raise correlation"),
        ({"decay": 1.5}, "decay must be <= 1, got 1.5. Lower it."),
        ({"wdith": 3}, "wdith must be a known option of ToyConfig"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ToyConfig.build(options)
    assert message in str(error.value)


def test_a_foreign_state_is_an_error() -> None:
    source = PlantedSource(ToyConfig(d=8, n_features=16, n_active=2))
    with pytest.raises(CorruptError, match="must hold a generator's state, got KeyError"):
        source.load_state_dict({})
    with pytest.raises(CorruptError, match="Delete the checkpoint and train again"):
        source.load_state_dict({"generator": torch.zeros(3, dtype=torch.uint8)})
