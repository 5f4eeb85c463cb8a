"""Every metric against a definition written out in NumPy, and against answers known without computing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from sememe import metrics
from sememe.encoded import Encoded
from sememe.errors import ConfigError, ShapeError


def rows(n: int = 300, d: int = 12, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(0.5, 3, d) + offset


def in_batches(
    x: torch.Tensor, recon: torch.Tensor, size: int, mask=None, units=None
) -> metrics.Reconstruction:
    quality = metrics.Reconstruction()
    for start in range(0, x.shape[0], size):
        part = slice(start, start + size)
        quality.update(
            x[part], recon[part], None if mask is None else mask[part], None if units is None else units[part]
        )
    return quality


# -- reconstruction: known answers -----------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, -1e5])
def test_predicting_the_mean_explains_nothing_at_any_offset(offset: float) -> None:
    x = rows().double() + offset
    found = in_batches(x, x.mean(0).expand_as(x), 64).compute()
    assert found["explained_variance"].value == pytest.approx(0, abs=1e-9)
    assert found["fvu"].value == pytest.approx(1, abs=1e-9)


def test_the_identity_explains_everything() -> None:
    x = rows(offset=5)
    found = in_batches(x, x, 64).compute()
    assert found["explained_variance"].value == 1
    assert found["fvu"].value == found["mse"].value == found["rmse"].value == 0
    assert found["cosine"].value == pytest.approx(1)


def test_predicting_zero_is_worse_than_nothing_when_there_is_an_offset() -> None:
    x = rows(offset=10)
    found = in_batches(x, torch.zeros_like(x), 64).compute()
    assert found["explained_variance"].value < -5
    assert found["cosine"].value == 0  # cosine with the zero vector


def test_orthonormal_pca_leaves_the_small_eigenvalues() -> None:
    x = rows(2000).double()
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    top = torch.from_numpy(vectors[:, -5:])
    recon = (x - x.mean(0)) @ top @ top.T + x.mean(0)
    assert in_batches(x, recon, 512).compute()["fvu"].value == pytest.approx(values[:-5].sum() / values.sum())


def test_a_ten_line_numpy_version_agrees() -> None:
    x, recon = rows(offset=2), rows(offset=2) + 0.3 * rows(seed=1)
    a, b = x.double().numpy(), recon.double().numpy()
    mse = np.mean((a - b) ** 2)
    fvu = np.sum((a - b) ** 2) / np.sum((a - a.mean(0)) ** 2)
    cosine = np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    found = in_batches(x, recon, 50).compute()
    assert found["mse"].value == pytest.approx(mse, rel=1e-12)
    assert found["rmse"].value == pytest.approx(math.sqrt(mse), rel=1e-12)
    assert found["fvu"].value == pytest.approx(fvu, rel=1e-12)
    assert found["explained_variance"].value == pytest.approx(1 - fvu, rel=1e-12)
    assert found["cosine"].value == pytest.approx(cosine, rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
@pytest.mark.parametrize("padded", [False, True])
def test_batch_size_and_padding_change_nothing(size: int, padded: bool) -> None:
    x, recon = rows(200, offset=30), rows(200, offset=30) + rows(200, seed=1)
    whole = in_batches(x, recon, 200).compute()
    mask = None
    if padded:
        gaps = torch.zeros(400, dtype=torch.bool)
        gaps[torch.randperm(400, generator=torch.Generator().manual_seed(3))[:200]] = True
        wide, wide_recon = torch.full((400, 12), math.nan), torch.full((400, 12), math.inf)
        wide[gaps], wide_recon[gaps] = x, recon
        x, recon, mask = wide, wide_recon, gaps
    found = in_batches(x, recon, size, mask).compute()
    for name, statistic in whole.items():
        assert found[name].value == pytest.approx(statistic.value, rel=1e-6), name


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-100, 100),
    noise=st.floats(0, 2),
    n=st.integers(2, 60),
)
def test_fvu_does_not_depend_on_units_or_origin(scale: float, offset: float, noise: float, n: int) -> None:
    x = rows(n).double()
    recon = x + noise * rows(n, seed=1).double()
    plain = in_batches(x, recon, 16).compute()
    moved = in_batches(scale * x + offset, scale * recon + offset, 16).compute()
    assert moved["fvu"].value == pytest.approx(plain["fvu"].value, rel=1e-6, abs=1e-9)
    assert moved["mse"].value == pytest.approx(scale**2 * plain["mse"].value, rel=1e-6, abs=1e-12)
    assert -1 <= plain["cosine"].value <= 1 + 1e-12


def test_nan_is_reported_with_its_cause() -> None:
    x = rows(20)
    recon = x.clone()
    recon[3, 2] = math.nan
    found = in_batches(x, recon, 8).compute(n_bootstrap=10)
    assert math.isnan(found["fvu"].value) and math.isnan(found["fvu"].low)
    assert found["fvu"].cause == "1 rows of the reconstruction or its target are NaN or infinite"
    assert found["fvu"].to_json() == {"value": None, "low": None, "high": None, "cause": found["fvu"].cause}
    assert in_batches(x, recon, 8, ~recon.isnan().any(1)).compute()["fvu"].value == 0


def test_where_the_broken_row_stands_does_not_count() -> None:
    """Units without it have the numbers that they have alone, and no cause that is another's."""
    x, units = rows(40, offset=1e3), torch.arange(40) // 10
    recon = x + 0.1 * rows(40, seed=1)
    chosen = np.array([False, True, True, True])
    whole = metrics.Reconstruction()
    whole.update(x, recon, None, units)
    expected = whole.compute(units=chosen)
    for at in (0, 7):
        broken = x.clone()
        broken[at, 3] = math.nan
        quality = metrics.Reconstruction()
        for part in torch.split(torch.arange(40), 1 if at == 0 else 8):
            quality.update(broken[part], recon[part], None, units[part])
        found = quality.compute()
        assert all(math.isnan(one.value) and one.cause.startswith("1 rows of") for one in found.values())
        others = quality.compute(units=chosen)
        for name, one in expected.items():
            assert others[name].value == pytest.approx(one.value, rel=1e-9) and not others[name].cause, name


def test_rows_without_variance_have_no_fvu() -> None:
    x = torch.full((10, 3), 0.1)
    found = in_batches(x, x + 1, 4).compute()
    assert math.isnan(found["fvu"].value) and found["fvu"].cause == "the rows have no variance"
    assert found["mse"].value == pytest.approx(1, rel=1e-6)


def test_no_rows_is_not_a_number() -> None:
    quality = metrics.Reconstruction()
    quality.update(rows(5), rows(5), torch.zeros(5, dtype=torch.bool))
    assert quality.compute()["mse"].cause == "there were no rows"
    assert metrics.Sparsity(4).compute()["l0"].cause == "there were no rows"
    assert metrics.LanguageModelLoss().compute("base")["ce"].cause == "there were no predictions"


@pytest.mark.usefixtures("unchecked")
def test_shapes_must_agree() -> None:
    with pytest.raises(
        ShapeError, match=r"target and recon must have one shape .* got \(5, 12\) and \(4, 12\)"
    ):
        metrics.Reconstruction().update(rows(5), rows(4))
    with pytest.raises(ShapeError, match="x must have one row per unit id"):
        metrics.Sums().add(torch.tensor([0, 1]), {"x": torch.zeros(3)})


# -- bootstrap -------------------------------------------------------------------------------------


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sums = {"n": np.full(80, 10.0), "x": 10 * (3 + rng.normal(size=80))}
        found = metrics.bootstrap(sums, {"mean": lambda t: t["x"] / t["n"]}, n=300, seed=trial)["mean"]
        covered += found.low <= 3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_is_that_of_a_plain_loop_over_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    x, recon = rows(300), rows(300) + rows(300, seed=1)
    units = torch.randint(0, 25, (300,), generator=generator)
    found = in_batches(x, recon, 64, units=units).compute(n_bootstrap=200, seed=7)["fvu"]
    a, b = x.double().numpy(), recon.double().numpy()
    weights = np.random.default_rng(7).multinomial(25, np.full(25, 1 / 25), size=200)
    drawn = []
    for weight in weights:
        chosen = np.concatenate(
            [np.tile(np.flatnonzero(units.numpy() == u), c) for u, c in enumerate(weight)]
        )
        drawn.append(((a - b)[chosen] ** 2).sum() / ((a[chosen] - a.mean(0)) ** 2).sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), rel=1e-9)
    assert found.low < found.value < found.high


def test_the_interval_of_fvu_holds_the_value_when_documents_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    units = torch.arange(300) // 30
    x = (rows() + 4 * torch.randn(10, 12, generator=generator)[units]).double()
    found = in_batches(x, x + 0.87 * (x.mean(0) - x), 64, units=units).compute(n_bootstrap=300)["fvu"]
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 1e-9  # each document loses the same share of its variance


def test_one_document_gives_no_interval() -> None:
    found = in_batches(rows(9), rows(9, seed=1), 3).compute(n_bootstrap=100)["mse"]
    assert math.isfinite(found.value) and math.isnan(found.low)
    assert found.cause == "an interval needs at least 2 documents"


def test_equal_seeds_give_equal_intervals() -> None:
    units = torch.arange(300) // 10
    quality = in_batches(rows(), rows(seed=1), 100, units=units)
    first, second, other = (quality.compute(n_bootstrap=50, seed=s)["mse"] for s in (1, 1, 2))
    assert first == second != other


def test_a_choice_of_units_is_a_choice_of_rows() -> None:
    x, recon, units = rows(), rows(seed=1), torch.arange(300) % 3
    chosen = in_batches(x, recon, 64, units=units).compute(units=np.array([True, False, True]))
    alone = in_batches(x[units != 1], recon[units != 1], 64).compute()
    assert chosen["fvu"].value == pytest.approx(alone["fvu"].value, rel=1e-12)


# -- language-model quality ------------------------------------------------------------------------


def predictions(n: int = 50, vocab: int = 40):
    base, arm = 3 * rows(n, vocab), 3 * rows(n, vocab, seed=1)
    return base, arm, torch.arange(n) % vocab


def test_cross_entropy_and_kl_are_the_textbook_ones() -> None:
    base, arm, targets = predictions()
    terms = metrics.base_terms(base, targets)
    found = metrics.prediction_terms(terms, arm, targets)
    p, q = torch.log_softmax(base.double(), 1), torch.log_softmax(arm.double(), 1)
    assert torch.allclose(
        terms.ce.double(), torch.nn.functional.cross_entropy(base, targets, reduction="none").double()
    )
    assert torch.allclose(found.ce.double(), -q[torch.arange(50), targets], atol=1e-5)
    assert torch.allclose(found.kl.double(), (p.exp() * (p - q)).sum(1), atol=1e-4)


def test_an_arm_equal_to_the_base_diverges_by_exactly_nothing() -> None:
    base, _, targets = predictions()
    terms = metrics.base_terms(base, targets)
    found = metrics.prediction_terms(terms, base.clone(), targets)
    assert torch.equal(found.kl, torch.zeros(50)) and torch.equal(found.ce, terms.ce)


def test_tokens_that_both_rule_out_cost_nothing() -> None:
    base, arm, targets = predictions()
    base[:, 39] = arm[:, 39] = -math.inf
    targets = targets % 39
    found = metrics.prediction_terms(metrics.base_terms(base, targets), arm, targets)
    without = metrics.prediction_terms(metrics.base_terms(base[:, :39], targets), arm[:, :39], targets)
    assert torch.allclose(found.kl, without.kl, atol=1e-5)


def losses(n: int = 60) -> tuple[metrics.LanguageModelLoss, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ce = {
        arm: rate + torch.rand(n, generator=generator)
        for arm, rate in (("base", 2.0), ("zero", 9.0), ("mean", 7.0), ("dictionary", 2.5))
    }
    loss = metrics.LanguageModelLoss()
    units = torch.arange(n) // 5
    for start in range(0, n, 7):
        part = slice(start, start + 7)
        chosen = {arm: values[part] for arm, values in ce.items()}
        kl = {arm: 0.1 * values for arm, values in chosen.items() if arm != "base"}
        loss.update(units[part], chosen, kl)
    return loss, ce


def test_recovered_shares_are_ratios_of_means() -> None:
    loss, ce = losses()
    base, zero, mean, arm = (
        float(ce[name].double().mean()) for name in ("base", "zero", "mean", "dictionary")
    )
    found = loss.compute("dictionary", n_bootstrap=100)
    assert found["ce_increase"].value == pytest.approx(arm - base)
    assert found["ce_recovered_zero"].value == pytest.approx((zero - arm) / (zero - base))
    assert found["ce_recovered_mean"].value == pytest.approx((mean - arm) / (mean - base))
    assert found["kl"].value == pytest.approx(0.1 * arm)
    assert found["perplexity"].value == pytest.approx(math.exp(arm))
    for statistic in found.values():
        assert statistic.low < statistic.value < statistic.high
    assert set(loss.compute("base")) == {"ce", "perplexity"}


def test_ablations_recover_nothing_of_themselves() -> None:
    loss, _ = losses()
    assert loss.compute("zero")["ce_recovered_zero"].value == 0
    assert loss.compute("mean")["ce_recovered_mean"].value == 0


def test_an_ablation_without_effect_leaves_nothing_to_recover() -> None:
    loss = metrics.LanguageModelLoss()
    ce = torch.tensor([1.0, 2.0])
    arms = ("base", "zero", "mean", "dictionary")
    loss.update(torch.tensor([0, 1]), dict.fromkeys(arms, ce), dict.fromkeys(arms[1:], ce * 0))
    found = loss.compute("dictionary", n_bootstrap=10)["ce_recovered_zero"]
    assert math.isnan(found.value) and found.cause == "zero ablation leaves the cross-entropy as it was"


# -- between dictionaries --------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_mcs_in_blocks_is_mcs(block: int) -> None:
    a, b = rows(40, 16), rows(70, 16, seed=1)
    a_unit, b_unit = (m.numpy() / np.linalg.norm(m.numpy(), axis=1, keepdims=True) for m in (a, b))
    full = a_unit @ b_unit.T
    assert metrics.mcs(a, b, block=block).numpy() == pytest.approx(full.max(1), abs=1e-6)
    assert metrics.mmcs(b, a, block=block) == pytest.approx(full.max(0).mean(), abs=1e-6)
    nearest = metrics.nearest_directions(a, b, 5, block=block)
    assert np.array_equal(nearest.indices.numpy(), np.argsort(-full, 1)[:, :5])
    signless = metrics.nearest_directions(a, b, 3, absolute=True, block=block)
    assert np.array_equal(signless.indices.numpy(), np.argsort(-np.abs(full), 1)[:, :3])


def test_a_dictionary_finds_itself_whatever_its_order_and_lengths() -> None:
    a = rows(50, 20)
    shuffled = a.flip(0) * torch.linspace(0.1, 9, 50)[:, None]
    assert metrics.mmcs(a, shuffled) == pytest.approx(1, abs=1e-6)
    assert metrics.mmcs(a, -a) < 0.9  # signed: the opposite direction is another one


def test_recall_and_precision_differ() -> None:
    truth = torch.eye(8)
    learned = torch.eye(8)[:4]
    assert metrics.mmcs(truth, learned) == pytest.approx(0.5)
    assert metrics.mmcs(learned, truth) == pytest.approx(1)


def test_a_zero_direction_is_near_nothing() -> None:
    assert metrics.mcs(torch.zeros(1, 4), torch.eye(4)).item() == 0


@pytest.mark.usefixtures("unchecked")
def test_directions_of_other_widths_cannot_be_compared() -> None:
    with pytest.raises(ShapeError, match=r"must have one width, got \(3, 4\) and \(3, 5\). Compare"):
        metrics.mcs(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ConfigError, match=r"n must be in \[1, 3\], the number of directions, got 4"):
        metrics.nearest_directions(torch.eye(4), torch.eye(4)[:3], 4)


def test_nan_logits_give_nan_and_not_zero_divergence() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = -torch.inf  # ruled out by both: costs nothing
    targets = torch.zeros(6, dtype=torch.int64)
    broken = logits.clone()
    broken[2, 3] = torch.nan
    for base, arm in ((broken, logits), (logits, broken)):
        kl = metrics.prediction_terms(metrics.base_terms(base, targets), arm, targets).kl
        assert torch.isnan(kl).tolist() == [number == 2 for number in range(6)]


def test_a_perplexity_that_overflows_says_so() -> None:
    loss = metrics.LanguageModelLoss()
    ce = torch.full((4,), 800.0)
    loss.update(torch.arange(4), {"base": ce / 800, "arm": ce}, {"arm": ce})
    found = loss.compute("arm")
    assert math.isnan(found["perplexity"].value) and "its exponential overflows" in found["perplexity"].cause
    assert found["ce"].value == 800


def test_nan_activations_are_not_active_latents() -> None:
    acts = torch.ones(3, 2)
    acts[1, 0] = torch.nan
    sparsity = metrics.Sparsity(8)
    sparsity.update(Encoded.from_topk(acts, torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32), 8))
    found = sparsity.compute()
    for name in ("l0", "l1", "frac_alive", "frac_alive_8192"):
        assert math.isnan(found[name].value) and "NaN or infinite" in found[name].cause


@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 3000), hit=st.booleans())
def test_a_share_that_is_nothing_or_everything_has_wilsons_interval(n, hit):
    found = metrics.over_latents(torch.full((n,), hit), n_bootstrap=50)
    wilson = binomtest(n if hit else 0, n).proportion_ci(0.95, method="wilson")
    assert found.value == float(hit)
    assert found.low == pytest.approx(wilson.low, abs=1e-12)
    assert found.high == pytest.approx(wilson.high, abs=1e-12)
    # numbers that all agree are no share of anything: their mean is certain as far as draws can tell
    same = metrics.over_latents(torch.full((n,), float(hit)), n_bootstrap=50)
    assert same.low == same.high == float(hit)


def test_wilsons_interval_is_taken_of_shares_of_latents_texts_and_directions():
    sparsity = metrics.Sparsity(40)
    everywhere = Encoded.from_dense(torch.ones(60, 40))
    sparsity.update(everywhere, None, torch.arange(60) % 6)
    alive = sparsity.compute(n_bootstrap=50)["frac_alive"]
    assert alive.value == alive.high == 1 and alive.low == pytest.approx(40 / (40 + 1.959964**2), abs=1e-6)
    rare = sparsity.density_shares(n_bootstrap=50)["below_1e-3"]
    assert rare.value == rare.low == 0 and rare.high == pytest.approx(1 - alive.low)
    together = metrics.coincide(torch.ones(10, 4), n_bootstrap=50)
    assert together.high == 1 and together.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    labels = torch.arange(60) < 20
    x = labels.float()[:, None] + 0.01 * torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    scores = metrics.probe_scores(metrics.dense_probe(x, labels), labels, n_bootstrap=50)
    assert scores["accuracy"].high == 1
    assert scores["accuracy"].low == pytest.approx(60 / (60 + 1.959964**2), abs=1e-6)
    for name, trials in (
        ("balanced_accuracy", 40),
        ("auroc", 20),
    ):  # no shares of trials: all of so many agree
        assert scores[name].high == 1
        assert binomtest(trials, trials).proportion_ci(0.95).low == pytest.approx(scores[name].low), name
