"""Dictionaries against one another and in their space: oracles from the definitions, closed forms, errors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sememe import metrics
from sememe.errors import ActivationError, ConfigError, ShapeError
from sememe.metrics.assignment import assign


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    a, b = a.double().numpy(), b.double().numpy()
    return (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T


# -- one against another -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_a_matching_is_the_best_of_all(n_a, n_b, seed):
    a, b = rows(n_a, 3, seed), rows(n_b, 3, seed + 1)
    table = cosines(a, b) if n_a <= n_b else cosines(b, a)
    best = max(
        sum(table[i, j] for i, j in enumerate(columns))
        for columns in itertools.permutations(range(table.shape[1]), table.shape[0])
    )
    found = metrics.match(a, b, block=2)
    assert float(found.cosines.double().sum()) == pytest.approx(best, abs=1e-5)
    assert len(set(found.a.tolist())) == len(set(found.b.tolist())) == min(n_a, n_b)
    for i, j, cosine in zip(*found, strict=True):
        assert float(cosine) == pytest.approx(cosines(a, b)[i, j], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(0, 60),
    st.integers(2, 40),
    st.floats(0, 1),
    st.integers(0, 2**31),
    st.integers(1, 50),
    st.booleans(),
)
def test_a_matching_without_the_table_is_that_of_scipy_with_it(n_a, more, d, alike, seed, block, absolute):
    a, b = rows(n_a, d, seed), rows(n_a + more, d, seed + 1)
    twins = int(alike * n_a)
    b[:twins] = a[:twins] + 0.3 * b[:twins]
    b[-1] = b[0]  # ties
    a[0] = 0
    unit_a, unit_b = metrics.unit_rows(a), metrics.unit_rows(b)
    columns, _ = assign(unit_a, unit_b, absolute=absolute, block=block)
    table = (unit_a @ unit_b.T).double().numpy()
    table = np.abs(table) if absolute else table
    mine, theirs = linear_sum_assignment(table, maximize=True)
    assert len(set(columns.tolist())) == n_a and min(columns.tolist()) >= 0
    ours = table[np.arange(n_a), columns.numpy()].sum()
    assert ours == pytest.approx(table[mine, theirs].sum(), abs=1e-6 * n_a)
    again, _ = assign(unit_a, unit_b, absolute=absolute, block=block)
    assert torch.equal(columns, again), "the same twice"


def test_signs_do_not_count_where_absolute_is_said():
    a = rows(20, 12)
    signs = torch.where(torch.arange(20) % 3 == 0, -1.0, 1.0)[:, None]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    b = (signs * a)[order]
    assert metrics.mcs(a, b, absolute=True).tolist() == pytest.approx([1] * 20, abs=1e-6)
    assert metrics.mcs(a, b).min() < 0.9
    found = metrics.match(a, b, absolute=True)
    assert torch.equal(order[found.b], found.a) and bool((found.cosines > 1 - 1e-6).all())
    twice = torch.cat([a[:1] + 0.05 * rows(1, 12, 2), -a[:1] + 0.05 * rows(1, 12, 3), rows(5, 12, 4)])
    assert metrics.splits(a[:1], twice, 0.9, absolute=True).children[0].numel() == 2
    assert metrics.splits(a[:1], twice, 0.9).parents.numel() == 0


def test_a_matching_that_its_first_candidates_do_not_hold_is_found():
    """All rows want the same few columns: most have to be looked for."""
    crowd = rows(1, 30) + 0.01 * rows(200, 30, 1)
    others = torch.cat([crowd[:20], rows(180, 30, 2)])
    columns, n_looks = assign(metrics.unit_rows(crowd), metrics.unit_rows(others))
    table = cosines(crowd, others)
    mine, theirs = linear_sum_assignment(table, maximize=True)
    assert n_looks > 1
    assert table[np.arange(200), columns.numpy()].sum() == pytest.approx(table[mine, theirs].sum(), abs=2e-4)


def test_a_matching_does_not_mind_which_side_is_smaller():
    a, b = rows(30, 8), rows(50, 8, 1)
    one, other = metrics.match(a, b), metrics.match(b, a)
    assert one.a.tolist() == other.b[other.b.argsort()].tolist()
    assert one.b.tolist() == other.a[other.b.argsort()].tolist()
    assert other.a.tolist() == sorted(other.a.tolist())


def broken(n: int, d: int) -> torch.Tensor:
    made = rows(n, d)
    made[1, 2] = torch.nan
    return made


@pytest.mark.parametrize(
    "ask",
    [
        lambda bad, good, few: metrics.match(good, bad),
        lambda bad, good, few: metrics.self_similarity([good, bad]),
        lambda bad, good, few: metrics.splits(good, bad),
        lambda bad, good, few: metrics.opposites(bad),
        lambda bad, good, few: metrics.cheats(bad, few, 1.0),
        lambda bad, good, few: metrics.rare_cluster(bad.T, few),
        lambda bad, good, few: metrics.neuron_sparsity(bad),
        lambda bad, good, few: metrics.outlier_dimensions(bad),
        lambda bad, good, few: metrics.token_match(bad, good),
        lambda bad, good, few: metrics.token_match(good, bad),
        lambda bad, good, few: metrics.probe_rank(bad, good[0]),
    ],
)
def test_a_choice_refuses_nan_which_its_answer_could_not_show(ask):
    good, few = rows(6, 12), torch.full((6,), 0.01)
    with pytest.raises(
        ActivationError, match=r"must be finite, got NaN or infinity in 1 of 6, the first being 1\. Look"
    ):
        ask(broken(6, 12), good, few)
    with pytest.raises(ActivationError, match=r"densities must be finite, got NaN"):
        metrics.cheats(good, torch.full((6,), torch.nan), 1.0)


def test_nan_in_a_mean_of_cosines_stays_nan():
    good = rows(6, 12)
    for found in (metrics.mmcs(broken(6, 12), good), metrics.mmacs(good, broken(6, 12))):
        assert np.isnan(found)


def test_a_shuffled_dictionary_is_matched_to_itself():
    a = rows(50, 20)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    found = metrics.match(a, 3 * a[order])
    assert torch.equal(order[found.b], found.a)
    torch.testing.assert_close(found.cosines, torch.ones(50))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_mmacs_does_not_look_at_signs(n_a, n_b, seed):
    a, b = rows(n_a, 4, seed), rows(n_b, 4, seed + 1)
    expected = np.abs(cosines(a, b)).max(1).mean()
    assert metrics.mmacs(a, b, block=3) == pytest.approx(expected, abs=1e-6)
    assert metrics.mmacs(-a, b) == pytest.approx(expected, abs=1e-6) or n_a == 0


def test_the_larger_dictionary_test_tells_one_to_one_from_at_best():
    a = torch.eye(4)
    twice = torch.cat([a[:1], a[:1], rows(6, 4)])
    found = metrics.larger_dictionary_test(torch.cat([a[:1], a[:1] + 1e-4, a[1:2]]), twice)
    assert found["share_above_0.9"] >= 2 / 3 and found["mmcs"] >= found["mean_matched_cosine"]
    same = metrics.larger_dictionary_test(a, torch.cat([a, -a]))
    assert same == pytest.approx(dict.fromkeys(same, 1.0))


def test_self_similarity_counts_who_settled_and_who_was_lost_again():
    start = torch.eye(3)
    moved = start.clone()
    moved[2] = torch.tensor([0.0, 1.0, 1.0])  # 45 degrees: 0.707
    lost = moved.clone()
    lost[1] = torch.tensor([1.0, 0.0, 0.0])  # 90 degrees
    found = metrics.self_similarity([start, moved, lost, lost])
    assert found.similarity.shape == (3, 3)
    assert found.similarity[0].tolist() == pytest.approx([1, 1, 0.7071], abs=1e-4)
    assert found.similarity[1].tolist() == pytest.approx([1, 0, 1], abs=1e-6)
    assert found.reached.tolist() == [True, True, True]
    assert found.fell.tolist() == [False, True, False], "the third was never below 0.6"


def test_low_before_high_is_not_a_fall():
    turned = torch.tensor([[0.0, 1.0]])
    found = metrics.self_similarity([torch.tensor([[1.0, 0.0]]), turned, turned])
    assert found.reached.tolist() == [True] and found.fell.tolist() == [False]


def test_a_latent_is_split_when_two_of_the_larger_are_nearest_to_it():
    small = torch.eye(3)
    large = torch.tensor([[1.0, 0.2, 0], [1.0, -0.4, 0], [0, 1.0, 0], [0.1, 0.1, -1.0]])
    found = metrics.splits(small, large)
    assert found.parents.tolist() == [0]
    assert [part.tolist() for part in found.children] == [[0, 1]]
    assert metrics.splits(small, large, least=0.95).parents.tolist() == []


def test_opposites_are_pairs_of_opposite_rows():
    assert metrics.opposites(torch.tensor([[1.0, 0], [-2.0, 0.1], [0, 1.0]])).tolist() == [0, 1]


def test_cheats_are_named():
    honest = metrics.cheats(rows(64, 32), torch.full((64,), 0.01), 0.6)
    assert honest.named == () and honest.one_hot == 0 and honest.in_opposite_pairs == 0
    basis = torch.cat([torch.eye(32), -torch.eye(32)])
    identity = metrics.cheats(basis, torch.full((64,), 0.5), 16.0)
    assert (identity.one_hot, identity.in_opposite_pairs, identity.dense) == (1, 1, 1)
    assert [reason.split(":")[0] for reason in identity.named] == [
        "the identity",
        "opposite pairs",
        "dense latents",
    ]
    sparse_neurons = metrics.cheats(torch.eye(32), torch.full((32,), 0.01), 0.3)
    assert sparse_neurons.named == (), "single neurons, few at a time, are no cheat"


def test_opposite_pairs_are_named_from_a_small_share_on():
    rare = torch.full((100,), 0.01)
    for n_pairs, said in ((2, []), (3, ["opposite pairs: 6% of the latents have one, so signs are free"])):
        W = rows(100, 32)
        W[:n_pairs] = -2 * W[n_pairs : 2 * n_pairs]
        assert list(metrics.cheats(W, rare, 1.0).named) == said


def test_dense_latents_are_told_apart_from_a_long_tail():
    W = rows(400, 32)
    rng = np.random.default_rng(0)
    tail = torch.from_numpy(10 ** rng.normal(-1.3, 0.4, 400)).clamp(max=1).float()
    one = metrics.cheats(W, tail, 20.0)
    assert one.dense > 0.1 and not one.bimodal and "two modes" not in one.named[0]
    apart = torch.full((400,), 0.003)
    apart[:80] = 0.4  # as after a resampling that went wrong
    two = metrics.cheats(W, apart, 20.0)
    assert two.dense == 0.2 and two.bimodal and "apart from the others (two modes of density)" in two.named[0]
    assert not metrics.cheats(W, torch.full((400,), 0.4), 20.0).bimodal, "there are no others"
    few = torch.full((400,), 0.003)
    few[:12] = 0.4  # 3%: far fewer than a tenth, but a mode of their own
    assert "dense latents: 3% of the latents" in metrics.cheats(W, few, 20.0).named[0]
    few[3:12] = 0.003
    assert metrics.cheats(W, few, 20.0).named == (), "three dense latents are in most dictionaries"


def test_the_rare_cluster_is_found_where_there_is_one():
    W_enc, density = rows(40, 20).T.contiguous(), torch.full((40,), 0.01)
    density[10:30] = 1e-6
    apart = metrics.rare_cluster(W_enc, density)
    assert apart.share == 0.5 and apart.coincide < 0.2
    direction = rows(1, 20, 5)[0]
    W_enc[:, 10:30] = direction[:, None] + 0.05 * rows(20, 20, 6)
    W_enc[:, 12] = -direction
    together = metrics.rare_cluster(W_enc, density)
    assert together.coincide == 0.95 and 12 not in together.latents.tolist()
    assert float(together.direction @ direction / direction.norm()) > 0.99
    none = metrics.rare_cluster(W_enc, torch.ones(40))
    assert (none.share, none.coincide, none.latents.tolist()) == (0, 0, [])


# -- in their space ----------------------------------------------------------------------------------


def test_neuron_sparsity_has_its_three_classes():
    d = 100
    one, ten, dense, edge = (torch.zeros(d) for _ in range(4))
    one[3], one[50:] = 1.0, 0.1  # 1 of 1.5
    ten[:10], ten[10:] = 1.0, 0.1
    dense[:] = 1.0
    edge[0], edge[1:3] = 1.0, 0.6  # a large second: not one-sparse
    found = metrics.neuron_sparsity(torch.stack([one, ten, dense, edge, torch.zeros(d)]))
    assert found.one_sparse.tolist() == [True, False, False, False, False]
    assert found.ten_sparse.tolist() == [False, True, False, True, False]
    assert found.shares() == pytest.approx({"one_sparse": 0.2, "ten_sparse": 0.4, "dense": 0.4})
    squares = one.square() / one.square().sum()
    assert float(found.top_1[0]) == pytest.approx(float(squares.max()), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 30), st.integers(0, 99), st.booleans())
def test_moments_are_those_of_their_definition(n, d, seed, about_zero):
    x = rows(n, d, seed).double() + 0.3
    found = metrics.moments(x, about_zero=about_zero)
    for row, skew, kurtosis in zip(x.numpy(), *found, strict=True):
        y = row if about_zero else row - row.mean()
        assert float(skew) == pytest.approx((y**3).mean() / (y**2).mean() ** 1.5)
        assert float(kurtosis) == pytest.approx((y**4).mean() / (y**2).mean() ** 2)


def test_random_directions_have_the_moments_of_a_normal_distribution():
    found = metrics.random_moments(2000, 512)
    assert found.kurtosis == pytest.approx(3 - 6 / 512, abs=0.03) and abs(found.skew) < 0.01
    assert found == metrics.random_moments(2000, 512) != metrics.random_moments(2000, 512, seed=1)


def test_effective_neurons_counts_equal_shares():
    x = torch.zeros(3, 8)
    x[0, 2], x[1, :4], x[2] = -5.0, 1.0, 1.0
    assert metrics.effective_neurons(x).tolist() == pytest.approx([1, 4, 8], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_capacity_is_its_definition_and_sums_to_at_most_the_dimensions(n, d, seed):
    W = rows(n, d, seed)
    found = metrics.capacity(W, block=2).numpy()
    gram = W.double().numpy() @ W.double().numpy().T
    np.testing.assert_allclose(found, np.diag(gram) ** 2 / (gram**2).sum(1), rtol=1e-6)
    assert found.sum() <= min(n, d) + 1e-6


def test_capacity_of_orthogonal_rows_is_one_and_of_twins_a_half():
    assert metrics.capacity(2 * torch.eye(4)).tolist() == pytest.approx([1, 1, 1, 1])
    assert metrics.capacity(torch.tensor([[1.0, 0], [1.0, 0], [0, 0]])).tolist() == pytest.approx(
        [0.5, 0.5, 0]
    )


def test_the_null_space_is_what_the_projection_does_not_see():
    W_out = torch.zeros(8, 3)
    W_out[:2, :2] = rows(2, 2)  # rank 2 of 3
    x = torch.zeros(3, 8)
    x[0, 0], x[1, 5], x[2, 1], x[2, 6] = 1.0, 1.0, 1.0, 1.0
    assert metrics.null_space_share(x, W_out).tolist() == pytest.approx([0, 1, 0.5], abs=1e-6)
    wide = metrics.null_space_share(rows(500, 64), rows(64, 16, 1))
    assert float(wide.mean()) == pytest.approx(0.75, abs=0.01), "Nanda's expectation for random directions"


def test_outlier_dimensions_are_named_largest_first():
    W = rows(300, 40)
    W[:, 7] *= 5
    W[:, 30] *= 9
    assert metrics.outlier_dimensions(W).tolist() == [30, 7]
    assert metrics.outlier_dimensions(rows(300, 40)).tolist() == []


def test_latents_that_are_tokens_are_matched_to_them():
    vocab = rows(30, 12) + 5.0  # all share a part
    centred = vocab - vocab.mean(0)
    found, tokens = metrics.token_match(centred[[4, 17]] * 3, vocab)
    assert tokens.tolist() == [4, 17] and found.tolist() == pytest.approx([1, 1], abs=1e-5)


def test_a_probe_ranks_latents_by_cosine():
    W = torch.tensor([[1.0, 0], [0, 2.0], [-1.0, 0]])
    found, order = metrics.probe_rank(W, torch.tensor([3.0, 1.0]))
    assert order.tolist() == [0, 1, 2]
    assert found.tolist() == pytest.approx([3 / 10**0.5, 1 / 10**0.5, -3 / 10**0.5])


def test_correlations_are_numpys():
    values = rows(300, 5)
    values[:, 1] = values[:, 0] + 0.1 * values[:, 1]
    table = np.abs(np.corrcoef(values.double().numpy().T))[~np.eye(5, dtype=bool)]
    found = metrics.correlations(values)
    assert found.mean_absolute.value == pytest.approx(table.mean(), abs=1e-9)
    assert found.share_small.value == pytest.approx((table < 0.05).mean())
    values[:, 2] = 1
    constant = metrics.correlations(values)
    assert np.isnan(constant.mean_absolute.value) and np.isnan(constant.share_small.value)
    assert constant.share_small.cause == "a coordinate never changes, or is NaN or infinite"


def test_pairs_are_drawn_as_a_plain_bootstrap_of_their_ends_does():
    table = rows(7, 7).abs()
    table = table + table.T
    found = metrics.over_pairs(table, n_bootstrap=30, seed=2)
    assert found.value == pytest.approx(float(table[~torch.eye(7, dtype=torch.bool)].mean()), abs=1e-6)
    means = []
    for weights in np.random.default_rng(2).multinomial(7, np.full(7, 1 / 7), size=30):
        ends = np.repeat(np.arange(7), weights)
        means.append(np.mean([float(table[i, j]) for i in ends for j in ends if i != j]))
    assert found[1:3] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    two = metrics.over_pairs(table[:2, :2], n_bootstrap=30)
    assert np.isnan(two.low) and two.cause == "some draws hold one thing alone"
    assert metrics.over_pairs(table[:1, :1]).cause == "there were no pairs"
    table[0, 1] = torch.nan
    assert np.isnan(metrics.over_pairs(table).value)


def test_an_interval_over_pairs_covers_where_one_over_the_pairs_themselves_would_not():
    """Pairs that share an end go together: each end adds its own part."""
    inside = naive = 0
    for seed in range(150):
        ends = rows(30, 1, seed)[:, 0].double()
        table = ends[:, None] + ends[None] + 0.1 * rows(30, 30, seed + 1000).double()
        found = metrics.over_pairs(table, n_bootstrap=200, seed=seed)
        inside += found.low < 0 < found.high
        upper = table[np.triu_indices(30, 1)]
        naive += abs(float(upper.mean())) < 1.96 * float(upper.std()) / len(upper) ** 0.5
    assert 133 <= inside <= 149 and naive < 75


def test_who_coincides_is_drawn_as_a_plain_bootstrap_does():
    alike = rows(1, 12, 3) + 0.35 * rows(30, 12, 4)
    found = metrics.coincide(alike, n_bootstrap=40, seed=6)
    x = (alike / alike.norm(dim=1, keepdim=True)).numpy()

    def share(some: np.ndarray) -> float:
        mean = some.mean(0) / np.linalg.norm(some.mean(0))
        return float((some @ mean > 0.95).mean())

    draws = np.random.default_rng(6).multinomial(30, np.full(30, 1 / 30), size=40)
    shares = [share(np.repeat(x, weights, axis=0)) for weights in draws]
    assert found[:3] == pytest.approx((share(x), *np.quantile(shares, [0.025, 0.975])), abs=1e-6)
    assert 0 < found.low < found.value < found.high < 1
    assert metrics.coincide(alike[:1]).cause == "an interval needs at least 2 latents"
    assert np.isnan(metrics.coincide(alike[:0]).value)
    drawn = metrics.mean_directions(alike, n_bootstrap=3, seed=(6, 1))
    assert drawn.shape == (4, 12)
    assert np.allclose(drawn[0], x.mean(0) / np.linalg.norm(x.mean(0)), atol=1e-6)
    first = np.random.default_rng((6, 1)).multinomial(30, np.full(30, 1 / 30), size=3)[0]
    mean = np.repeat(x, first, axis=0).mean(0)
    assert np.allclose(drawn[1], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_mean_over_latents_has_an_interval_that_covers():
    inside = 0
    for seed in range(200):
        found = metrics.over_latents(rows(80, 1, seed)[:, 0].double() + 2, n_bootstrap=200, seed=seed)
        inside += found.low < 2 < found.high
    assert 178 <= inside <= 198  # 95% of 200, and three standard errors
    many = rows(5000, 1)[:, 0].double()
    found = metrics.over_latents(many)
    assert found.value == pytest.approx(float(many.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * float(many.std()) / 5000**0.5, rel=0.15)
    broken = metrics.over_latents(torch.tensor([1.0, torch.nan]), cause="one is nothing")
    assert np.isnan(broken.value) and broken.cause == "one is nothing"
    assert metrics.over_latents(torch.ones(1)).cause == "an interval needs at least 2 latents"


def test_the_rare_cluster_says_whether_it_writes_one_direction_too():
    W_enc, density = rows(40, 20).T.contiguous(), torch.full((40,), 0.01)
    W_enc[:, 10:30] = rows(1, 20, 5).T + 0.02 * rows(20, 20, 6)
    density[10:30] = 0
    apart = metrics.rare_cluster(W_enc, density, W_dec=rows(40, 20, 7))
    assert apart.coincide == 1 and apart.decoders_coincide == 0
    together = metrics.rare_cluster(W_enc, density, W_dec=W_enc.T)
    assert together.decoders_coincide == 1
    assert metrics.rare_cluster(W_enc, density).decoders_coincide is None
    assert metrics.rare_cluster(W_enc, torch.ones(40), W_dec=W_enc.T).decoders_coincide == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: metrics.match(rows(2, 3), rows(2, 4)), ShapeError, r"must have one width, got \(2, 3\) and"),
        (
            lambda: metrics.self_similarity([rows(2, 3)]),
            ShapeError,
            "two checkpoints or more of one shape, got 1",
        ),
        (
            lambda: metrics.self_similarity([rows(2, 3), rows(3, 3)]),
            ShapeError,
            r"got 2 of shapes \[\(2, 3\), \(3, 3\)\]",
        ),
        (
            lambda: metrics.correlations(rows(1, 3)),
            ShapeError,
            r"at least 2 rows and 2 coordinates, got \(1, 3\)",
        ),
        (lambda: metrics.neuron_sparsity(rows(2, 9)), ShapeError, "at least 10 dimensions, got 9"),
        (
            lambda: metrics.null_space_share(rows(2, 3), rows(4, 2)),
            ShapeError,
            "must read the rows' width 3, got 4. Transpose",
        ),
        (
            lambda: metrics.probe_rank(rows(2, 3), torch.zeros(3)),
            ConfigError,
            "must be a direction, got a vector of length 0",
        ),
    ],
)
def test_what_cannot_be_asked_says_why(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


def test_encoder_decoder_cosine_is_that_of_numpy():
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(7, 20, generator=generator), torch.randn(20, 7, generator=generator)
    W_dec[3] = 0
    W_enc[:, 5] = -2 * W_dec[5]
    found = metrics.encoder_decoder_cosine(W_enc, W_dec).numpy()
    for latent in range(20):
        a, b = W_enc[:, latent].double().numpy(), W_dec[latent].double().numpy()
        expected = 0.0 if latent == 3 else a @ b / np.sqrt((a @ a) * (b @ b))
        assert found[latent] == pytest.approx(expected, abs=1e-6)
    assert found[5] == pytest.approx(-1)
    assert torch.allclose(metrics.encoder_decoder_cosine(W_dec.T, W_dec)[4], torch.ones(()))


def test_the_capacity_of_a_broken_row_is_nan_and_of_none_0():
    W = rows(4, 5)
    W[1], W[2, 3] = 0, torch.nan
    found = metrics.capacity(W)
    assert float(found[1]) == 0 and torch.isnan(found[2])
    whole = metrics.capacity(W[:2])
    assert torch.isfinite(whole).all() and float(whole[0]) == pytest.approx(1)


def test_cheats_refuse_an_l0_that_is_nan():
    with pytest.raises(ActivationError, match="l0 must be finite, got NaN"):
        metrics.cheats(rows(6, 12), torch.full((6,), 0.01), float("nan"))


@pytest.mark.parametrize("which", ["nearly one", "one", "zero in a", "zero in b", "zero in both"])
def test_a_crowd_is_matched_in_a_few_looks(which):
    """Rows that nearly coincide all want the same columns; those of length 0 do not care."""
    n = 500
    a, b = rows(n, 30), rows(n, 30, 1)
    if "one" in which:
        a, b = (rows(1, 30, 2) + (1e-3 if "nearly" in which else 0) * side for side in (a, b))
    if which in ("zero in a", "zero in both"):
        a[50:] = 0
    if which in ("zero in b", "zero in both"):
        b[50:] = 0
    a, b = metrics.unit_rows(a), metrics.unit_rows(b)
    columns, n_looks = assign(a, b)
    table = (a @ b.T).double().numpy()
    mine, theirs = linear_sum_assignment(table, maximize=True)
    assert n_looks <= 8 and sorted(columns.tolist()) == list(range(n))
    assert table[np.arange(n), columns.numpy()].mean() == pytest.approx(table[mine, theirs].mean(), abs=1e-6)


def test_random_directions_are_strange_to_the_baseline_of_that_name():
    from sememe.dictionaries.random_directions import RandomDirections, RandomDirectionsConfig

    made = RandomDirections.from_mean(torch.zeros(32), RandomDirectionsConfig(d_sae=256, seed=0), None)
    chance = metrics.mmcs(metrics.random_rows(256, 32, 5), metrics.random_rows(256, 32, 0))
    assert metrics.mmcs(made.W_dec, metrics.random_rows(256, 32, 0)) == pytest.approx(chance, abs=0.02)
