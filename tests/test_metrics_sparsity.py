"""Sparsity and densities against the dense matrix and a plain loop, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sememe import metrics
from sememe.encoded import Encoded
from sememe.errors import ShapeError


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(0.5, 3, d)


def sparse(n: int = 100, d_sae: int = 30) -> torch.Tensor:
    dense = torch.relu(rows(n, d_sae, seed=4) - 0.5)
    dense[:, 7] = 0
    return dense


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_sparsity_is_that_of_the_dense_matrix(size: int) -> None:
    dense = sparse()
    found = metrics.Sparsity(30)
    for start in range(0, 100, size):
        found.update(Encoded.from_dense(dense[start : start + size]))
    values = found.compute()
    assert values["l0"].value == pytest.approx(float((dense != 0).sum(1).double().mean()))
    assert values["l1"].value == pytest.approx(float(dense.double().abs().sum(1).mean()))
    assert values["frac_alive"].value == pytest.approx(29 / 30)
    assert torch.equal(found.density(), (dense != 0).double().mean(0))


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_l0_and_densities_are_distributed_as_in_the_dense_matrix(size: int) -> None:
    dense = sparse()
    found = metrics.Sparsity(30)
    for start in range(0, 100, size):
        found.update(Encoded.from_dense(dense[start : start + size]))
    l0 = np.sort((dense != 0).sum(1).numpy())
    for share, one in found.l0_quantiles().items():
        assert one.value == l0[math.ceil(float(share) * 100 - 1e-9) - 1], share
    assert found.l0_quantiles((1.0,))["1"].value == float(l0[-1])
    found.active_rows = torch.tensor([0, 0, 0, 2, 50, 500, 100_000] + [1] * 23)
    found.n_rows = 1_000_000
    shares = {"below_1e-5": 27 / 30, "below_1e-4": 28 / 30, "below_1e-3": 29 / 30, "above_1e-2": 1 / 30}
    assert {name: one.value for name, one in found.density_shares().items()} == pytest.approx(shares)


def counted(dense: torch.Tensor, units: torch.Tensor, size: int = 64) -> metrics.Sparsity:
    found = metrics.Sparsity(dense.shape[1])
    for start in range(0, len(dense), size):
        part = slice(start, start + size)
        found.update(Encoded.from_dense(dense[part]), None, units[part])
    return found


@pytest.mark.parametrize("n_units", [12, 600])
def test_intervals_of_densities_and_l0_are_a_plain_bootstrap_of_documents(n_units: int) -> None:
    """Of more than 256 units, those are drawn together whose numbers leave the same rest."""
    n = 1200
    often = torch.logspace(-3.5, -0.3, 40)
    dense = (torch.rand(n, 40, generator=torch.Generator().manual_seed(4)) < often).float()
    units = torch.arange(n) * n_units // n
    found = counted(dense, units)
    options = {"n_bootstrap": 60, "seed": 9}
    shares, l0, alive = (
        found.density_shares(**options),
        found.l0_quantiles((0.25, 0.95), **options),
        found.compute(**options)["frac_alive"],
    )
    active, groups = dense.numpy() != 0, units.numpy() % 256
    n_groups = min(n_units, 256)
    drawn: dict[str, list[float]] = {name: [] for name in (*shares, *l0, "alive")}
    for weights in np.random.default_rng(9).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=60):
        chosen = np.concatenate(
            [np.flatnonzero(groups == g) for g in range(n_groups) for _ in range(weights[g])]
        )
        density = active[chosen].mean(0)
        for name, limit in (("below_1e-5", 1e-5), ("below_1e-4", 1e-4), ("below_1e-3", 1e-3)):
            drawn[name].append((density < limit).mean())
        drawn["above_1e-2"].append((density > 1e-2).mean())
        drawn["alive"].append((density > 0).mean())
        ordered = np.sort(active[chosen].sum(1))
        for share in (0.25, 0.95):
            drawn[f"{share:g}"].append(ordered[math.ceil(share * len(ordered) - 1e-9) - 1])
    for name, one in {**shares, "alive": alive}.items():
        low, high = np.quantile(drawn[name], [0.025, 0.975]) - np.mean(drawn[name])
        assert (one.low, one.high) == pytest.approx((max(0, one.value + low), min(1, one.value + high))), name
    for name, one in l0.items():
        assert (one.low, one.high) == pytest.approx(tuple(np.quantile(drawn[name], [0.025, 0.975]))), name
    assert shares["above_1e-2"].low < shares["above_1e-2"].value < shares["above_1e-2"].high
    assert alive.low < alive.value < 1


def test_intervals_of_densities_hold_what_other_documents_give() -> None:
    """Topical latents, many of them rare: percentiles of the draws would hold it in no case."""
    d_sae, n_documents, length = 300, 100, 100
    rng = np.random.default_rng(0)
    density, topical = 10 ** rng.uniform(-5.5, -1, d_sae), 10 ** rng.uniform(-2.5, 0, d_sae)
    inside = np.minimum(density / topical, 0.5)

    def sample(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.binomial(length, inside, (n_documents, d_sae)) * (
            rng.random((n_documents, d_sae)) < topical
        )

    def of(counts: np.ndarray) -> tuple[float, float, float]:
        found = counts.sum(0) / (n_documents * length)
        return (found > 0).mean(), (found < 1e-3).mean(), (found > 1e-2).mean()

    expected = np.mean([of(sample(1000 + i)) for i in range(100)], axis=0)
    covered = np.zeros(3)
    for seed in range(40):
        found = metrics.Sparsity(d_sae)
        counts = torch.from_numpy(sample(seed)).int()
        # the sums that rows would leave: a group for each document
        found.n_rows, found.active_rows = n_documents * length, counts.sum(0).long()
        found._active, found._first = counts, counts > 0
        found._rows_with = torch.full((n_documents, 1), length, dtype=torch.int32)
        found.sums.add(
            torch.arange(n_documents), {name: torch.ones(n_documents) for name in ("n", "l0", "l1")}
        )
        options = {"n_bootstrap": 200, "seed": seed}
        shares = found.density_shares(**options)
        three = (found.compute(**options)["frac_alive"], shares["below_1e-3"], shares["above_1e-2"])
        covered += [one.low <= value <= one.high for one, value in zip(three, expected, strict=True)]
    assert np.all(covered >= 30), covered  # over many more: 84% to 97%


def test_an_interval_of_shares_holds_its_value_and_lies_in_0_to_1() -> None:
    """One of 1,000 latents fires in two of 64 groups only: few draws miss it, and their mean lies below nearly all."""
    dense = torch.ones(64, 1000)
    dense[2:, 0] = 0
    for rows in (dense, 1 - dense):
        sparsity = metrics.Sparsity(1000)
        sparsity.update(Encoded.from_dense(rows), None, torch.arange(64))
        found = sparsity.compute(n_bootstrap=400)["frac_alive"]
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.low < found.high


def test_what_nobody_could_count_has_no_share() -> None:
    broken = Encoded.from_dense(torch.tensor([[1.0, torch.nan], [1.0, 0.0]]))
    found = metrics.Sparsity(2)
    found.update(broken)
    for one in (*found.density_shares().values(), *found.l0_quantiles().values()):
        assert math.isnan(one.value) and one.cause == "activations are NaN or infinite in 1 rows"
    assert metrics.Sparsity(2).density_shares()["below_1e-5"].cause == "there were no rows"
    alone = metrics.Sparsity(2)
    alone.update(Encoded.from_dense(torch.ones(3, 2)))
    share = alone.density_shares(n_bootstrap=20)["above_1e-2"]
    assert share.value == 1 and share.cause == "an interval needs at least 2 documents"


@pytest.mark.parametrize("size", [1000, 4096, 20_000])
def test_who_is_alive_on_the_first_rows_does_not_depend_on_the_batches(size: int) -> None:
    dense = torch.zeros(9000, 4)
    dense[5, 0] = dense[8191, 1] = dense[8192, 2] = -1.0
    found = metrics.Sparsity(4)
    for start in range(0, 9000, size):
        found.update(Encoded.from_dense(dense[start : start + size]))
    values = found.compute()
    assert values["frac_alive_8192"].value == 0.5 and values["frac_alive"].value == 0.75
    few = metrics.Sparsity(4)
    few.update(Encoded.from_dense(dense[:100]))
    missing = few.compute()["frac_alive_8192"]
    assert math.isnan(missing.value) and missing.cause == "there were 100 rows, fewer than 8,192"


def test_stored_zeros_are_not_active_and_signs_do_not_matter() -> None:
    encoded = Encoded.from_topk(torch.tensor([[0.0, -2.0], [3.0, 0.0]]), torch.tensor([[0, 1], [2, 0]]), 5)
    found = metrics.Sparsity(5)
    found.update(encoded)
    values = found.compute()
    assert values["l0"].value == 1 and values["l1"].value == 2.5
    assert found.active_rows.tolist() == [0, 1, 1, 0, 0]


def test_masked_rows_do_not_count() -> None:
    dense, mask = sparse(), torch.arange(100) % 2 == 0
    found, alone = metrics.Sparsity(30), metrics.Sparsity(30)
    found.update(Encoded.from_dense(dense), mask)
    alone.update(Encoded.from_dense(dense[mask]))
    assert found.compute() == alone.compute()
    assert torch.equal(found.density(), alone.density())


def test_every_latent_is_in_the_histogram_once() -> None:
    density = torch.tensor([0.0, 0.0, 1e-9, 1e-6, 2e-3, 0.5, 1.0], dtype=torch.float64)
    histogram = metrics.density_histogram(density, n_bins=6, low=1e-6)
    assert histogram.n_silent == 2 and histogram.n_below == 1
    assert histogram.counts == [1, 0, 0, 1, 0, 2]
    assert histogram.edges == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_histograms_lose_no_latent(values: list[float]) -> None:
    histogram = metrics.density_histogram(torch.tensor(values, dtype=torch.float64))
    assert sum(histogram.counts) + histogram.n_silent + histogram.n_below == len(values)


def test_a_histogram_of_nothing_is_an_error() -> None:
    with pytest.raises(ShapeError, match="densities must be finite, got NaN"):
        metrics.density_histogram(metrics.Sparsity(3).density())
