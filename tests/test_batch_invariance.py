"""Every metric at batches of 1, 7, 64 and 4096, with and without padding, beside NumPy written from its definition."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from evaluate_world import HOOKPOINT, POLICY, WORDS, D, World, autoencoder, config_for, make_world
from scipy.optimize import linear_sum_assignment

from sememe import dictionaries, metrics
from sememe.dictionaries.topk import TopKConfig
from sememe.encoded import Encoded
from sememe.evaluate import evaluate
from sememe.labelled import pooled_rows

SIZES = (1, 7, 64, 4096)
TOLERANCE = 1e-6
N, N_UNITS, N_DRAWS, VOCAB = 300, 25, 40, 50
"""Counted rows, their documents, draws of these, tokens."""


def agree(found: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal to 1e-6: of the value where that is above 1. NaN equals NaN alone."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, what
    within = np.abs(a - b) <= tolerance * np.maximum(1, np.abs(b))
    assert np.all(within | (np.isnan(a) & np.isnan(b))), (what, np.abs(a - b).max())


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


# -- what streams ----------------------------------------------------------------------------------


class Stream(NamedTuple):
    """Rows as they come, padding among them; `keep` says which count."""

    keep: torch.Tensor
    units: torch.Tensor
    x: torch.Tensor
    recon: torch.Tensor
    acts: torch.Tensor
    targets: torch.Tensor
    logits: dict[str, torch.Tensor]


def stream() -> Stream:
    x = rows(N, 12) * torch.linspace(0.5, 3, 12) + 20
    recon = x + rows(N, 12, 1)
    recon[5] = 0
    acts = torch.where(rows(N, 40, 2) > 1.2, rows(N, 40, 3), 0.0)
    acts[:, 7], acts[:250, 8], acts[9] = 0, 0, 0
    acts[250:, 8] = 1
    base = 2 * rows(N, VOCAB, 4)
    others = {name: base + scale * rows(N, VOCAB, 5) for name, scale in (("dictionary", 0.5), ("mean", 2.0))}
    logits = {"base": base, **others, "zero": torch.zeros(N, VOCAB)}
    units = torch.arange(N) * N_UNITS // N
    return Stream(torch.ones(N, dtype=torch.bool), units, x, recon, acts, torch.arange(N) % VOCAB, logits)


DATA = stream()


def padded(plain: Stream) -> Stream:
    """The same rows among as many that are garbage."""
    keep = torch.zeros(2 * N, dtype=torch.bool)
    keep[torch.randperm(2 * N, generator=torch.Generator().manual_seed(9))[:N]] = True

    def spread(values: torch.Tensor, garbage: float) -> torch.Tensor:
        wide = torch.full((2 * N, *values.shape[1:]), garbage, dtype=values.dtype)
        wide[keep] = values
        return wide

    logits = {name: spread(values, math.nan) for name, values in plain.logits.items()}
    x, recon = spread(plain.x, math.nan), spread(plain.recon, math.inf)
    units, targets = spread(plain.units, 10 * N_UNITS), spread(plain.targets, 0)
    return Stream(keep, units, x, recon, spread(plain.acts, math.nan), targets, logits)


def fed(
    data: Stream, size: int
) -> tuple[metrics.Reconstruction, metrics.Sparsity, metrics.LanguageModelLoss]:
    """All three kinds of sums, a batch at a time; predictions at padding are left out before, as a loop does."""
    quality, sparsity, loss = metrics.Reconstruction(), metrics.Sparsity(40), metrics.LanguageModelLoss()
    for part in parts(data.keep.shape[0], size):
        keep, units = data.keep[part], data.units[part]
        mask = None if data.keep.all() else keep
        quality.update(data.x[part], data.recon[part], mask, units)
        sparsity.update(Encoded.from_dense(data.acts[part]), mask, units)
        targets = data.targets[part][keep]
        base = metrics.base_terms(data.logits["base"][part][keep], targets)
        ce, kl = {"base": base.ce}, {}
        for arm in ("dictionary", "zero", "mean"):
            ce[arm], kl[arm] = metrics.prediction_terms(base, data.logits[arm][part][keep], targets)
        loss.update(units[keep], ce, kl)
    return quality, sparsity, loss


def numbers(data: Stream, size: int) -> dict[str, Any]:
    """Everything that the sums can be asked, by name: a value and its interval, draws, or plain numbers."""
    quality, sparsity, loss = fed(data, size)
    options = {"n_bootstrap": N_DRAWS, "seed": 3}
    statistics = quality.compute(**options) | sparsity.compute(**options)
    statistics |= loss.compute("dictionary", **options)
    statistics |= {f"{name}_base": one for name, one in loss.compute("base", **options).items()}
    chosen = np.arange(N_UNITS) % 2 == 0
    for sums in (quality.compute, sparsity.compute, lambda **how: loss.compute("dictionary", **how)):
        found = sums(**options, units=chosen).items()
        statistics |= {f"{name}_chosen": one for name, one in found if not name.startswith("frac_alive")}
    drawn = {"n": N_DRAWS, "seed": 3, "n_units": N_UNITS + 2}
    draws = quality.drawn(**drawn) | sparsity.drawn(**drawn) | loss.drawn("dictionary", **drawn)
    histogram = metrics.density_histogram(sparsity.density(), n_bins=8, low=0.1)
    return {
        **{name: one[:3] for name, one in statistics.items()},
        **{f"{name}_drawn": values for name, values in draws.items()},
        "density": sparsity.density().numpy(),
        "l0_quantiles": [one.value for one in sparsity.l0_quantiles().values()],
        "density_shares": [one.value for one in sparsity.density_shares().values()],
        "l0_quantiles_bounds": [one[1:3] for one in sparsity.l0_quantiles(**options).values()],
        "density_shares_bounds": [one[1:3] for one in sparsity.density_shares(**options).values()],
        "density_histogram": [*histogram.counts, histogram.n_silent, histogram.n_below],
    }


def log_probs(logits: torch.Tensor) -> np.ndarray:
    z = logits.double().numpy()
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def terms(data: Stream) -> dict[str, np.ndarray]:
    """Cross-entropies of the arms, and KL(base || dictionary), per prediction."""
    log_p = {arm: log_probs(logits) for arm, logits in data.logits.items()}
    found = {arm: -p[np.arange(N), data.targets.numpy()] for arm, p in log_p.items()}
    kl = (np.exp(log_p["base"]) * (log_p["base"] - log_p["dictionary"])).sum(1)
    return {**found, "kl": kl}


def definitions(data: Stream, w: np.ndarray, centre: np.ndarray) -> dict[str, float]:
    """docs/metrics.md in NumPy, each row counted w times; the variance is about `centre`."""
    x, recon, acts = (one.double().numpy() for one in (data.x, data.recon, data.acts))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(recon, axis=1)
    cosine = np.divide((x * recon).sum(1), norms, out=np.zeros(N), where=norms > 0)
    n, error, log_p = w.sum(), ((x - recon) ** 2).sum(1), terms(data)
    base, zero, mean, arm = (w @ log_p[name] / n for name in ("base", "zero", "mean", "dictionary"))
    fvu = w @ error / (w @ ((x - centre) ** 2).sum(1))
    return {
        "mse": w @ error / n / 12,
        "rmse": math.sqrt(w @ error / n / 12),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": w @ cosine / n,
        "target_norm": w @ np.linalg.norm(x, axis=1) / n,
        "l0": w @ (acts != 0).sum(1) / n,
        "l1": w @ np.abs(acts).sum(1) / n,
        "ce": arm,
        "ce_base": base,
        "perplexity": math.exp(arm),
        "perplexity_base": math.exp(base),
        "ce_increase": arm - base,
        "ce_recovered_zero": (zero - arm) / (zero - base),
        "ce_recovered_mean": (mean - arm) / (mean - base),
        "kl": w @ log_p["kl"] / n,
    }


def by_definition(data: Stream) -> dict[str, Any]:
    """What `numbers` must say."""
    units, x = data.units.numpy(), data.x.double().numpy()
    found: dict[str, Any] = {}
    for suffix, mine in (("", np.arange(N_UNITS)), ("_chosen", np.arange(0, N_UNITS, 2))):
        rng, n = np.random.default_rng(3), len(mine)
        inside = np.isin(units, mine)
        centre, whole = x[inside].mean(0), definitions(data, inside * 1.0, x[inside].mean(0))
        draws = []
        for counts in rng.multinomial(n, np.full(n, 1 / n), size=N_DRAWS):
            weight = np.zeros(N_UNITS)
            weight[mine] = counts
            draws.append(definitions(data, weight[units], centre))
        for name, value in whole.items():
            if not (suffix and name.endswith("_base")):
                low_high = np.quantile([draw[name] for draw in draws], [0.025, 0.975])
                found[name + suffix] = [value, *low_high]
    n = N_UNITS + 2  # two documents have no row
    draws = np.random.default_rng(3).multinomial(n, np.full(n, 1 / n), size=N_DRAWS)
    weights = [np.ones(N), *(counts[units] * 1.0 for counts in draws)]
    drawn = [definitions(data, weight, x.mean(0)) for weight in weights]
    found |= {f"{name}_drawn": [one[name] for one in drawn] for name in drawn[0] if "_base" not in name}
    active = data.acts.numpy() != 0
    density, l0 = active.mean(0), np.sort(active.sum(1))
    edges = np.logspace(-1, 0, 9)
    counts = [((density >= low) & (density < high)).sum() for low, high in pairwise(edges)]
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)

    def below(own: np.ndarray) -> list[float]:
        return [*((own < limit).mean() for limit in (1e-5, 1e-4, 1e-3)), (own > 1e-2).mean()]

    def about(value: float, drawn: list[float]) -> list[float]:
        low, high = np.quantile(drawn, [0.025, 0.975]) - np.mean(drawn)
        return [max(0, value + low), min(1, value + high)]

    early = [unit for unit in range(N_UNITS) if active[:200][units[:200] == unit].any()]
    chosen, chosen_early = (
        [
            np.concatenate([np.flatnonzero(units[:rows] == u) for u in np.repeat(mine, counts)])
            for counts in np.random.default_rng(3).multinomial(
                len(mine), np.full(len(mine), 1 / len(mine)), 40
            )
        ]
        for rows, mine in ((N, np.arange(N_UNITS)), (200, np.array(early)))
    )
    of_draws = np.array([below(active[rows].mean(0)) for rows in chosen])
    ordered = [np.sort(active[rows].sum(1)) for rows in chosen]
    at = [[one[math.ceil(round(share * len(one), 9)) - 1] for one in ordered] for share in shares]
    alive, first = (density > 0).mean(), active[:200].any(0).mean()
    return found | {
        "frac_alive": [alive, *about(alive, [active[rows].any(0).mean() for rows in chosen])],
        "frac_alive_8192": [first, *about(first, [active[rows].any(0).mean() for rows in chosen_early])],
        "l0_quantiles_bounds": [np.quantile(own, [0.025, 0.975]) for own in at],
        "density_shares_bounds": [
            about(v, list(own)) for v, own in zip(below(density), of_draws.T, strict=True)
        ],
        "density": density,
        "l0_quantiles": [l0[math.ceil(round(share * N, 9)) - 1] for share in shares],
        "density_shares": below(density),
        "density_histogram": [*counts, (density == 0).sum(), ((density > 0) & (density < 0.1)).sum()],
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return by_definition(DATA)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_padding", [False, True])
def test_sums_do_not_know_batches_or_padding(
    size: int, with_padding: bool, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first 8,192 rows are the first 200 here, which no batch ends at."""
    monkeypatch.setattr("sememe.metrics.sparsity.N_FIRST_ROWS", 200)
    found = numbers(padded(DATA) if with_padding else DATA, size)
    assert found.keys() == expected.keys()
    assert found["frac_alive"][0] > found["frac_alive_8192"][0]
    for name, values in expected.items():
        agree(found[name], values, name)


# -- what is cut into blocks, or can be asked of some rows at a time --------------------------------

A = rows(70, 24) * torch.linspace(0.2, 5, 70)[:, None]
B = rows(90, 24, 1)
B[:40] = A[:40] + 0.4 * B[:40]
B[40:60] = A[:20] + 0.4 * B[40:60]
B[60:75] = -A[20:35] - 0.1 * B[60:75]
C = torch.cat([B[:60], -3 * B[:20], torch.eye(24)[:9]])
DENSITY = torch.linspace(0, 0.3, C.shape[0]) ** 2
W_OUT = rows(24, 6, 2)
LATER = [A, A + 0.2 * rows(70, 24, 3), A + rows(70, 24, 4)]


def unit(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = x.double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


AB = unit(A) @ unit(B).T
SQUARES = np.sort(unit(C) ** 2, axis=1)[:, ::-1]


def flat(found: Any) -> list[np.ndarray]:
    """The numbers of any answer, words left out."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (tuple, list)):
        return [array for one in found for array in flat(one)]
    return [] if isinstance(found, str) else [np.asarray(found, np.float64)]


def by_rows(ask: Callable[..., Any], *tensors: torch.Tensor) -> Callable[[int], Any]:
    """A function of rows, asked of a few at a time."""

    def asked(size: int) -> list[np.ndarray]:
        found = [flat(ask(*(one[part] for one in tensors))) for part in parts(tensors[0].shape[0], size)]
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]

    return asked


def matched() -> Any:
    mine, theirs = linear_sum_assignment(AB, maximize=True)
    return mine, theirs, AB[mine, theirs]


def split() -> Any:
    nearest, cosine = AB.argmax(0), AB.max(0)
    children = [np.flatnonzero((nearest == i) & (cosine >= 0.5)) for i in range(len(AB))]
    parents = [i for i, found in enumerate(children) if len(found) > 1]
    return np.array(parents), [children[i][np.argsort(-cosine[children[i]])] for i in parents]


def cheated() -> Any:
    opposite = (unit(C) @ unit(C).T <= -0.95).any(1)
    return (SQUARES[:, 0] > 0.9).mean(), opposite.mean(), (DENSITY.numpy() > 0.1).mean()


def neurons() -> Any:
    top, after = SQUARES[:, 0], SQUARES[:, 1:10].sum(1)
    one = (top > 0.35) & (after < 0.1)
    return top, after, one, ~one & (top + after > 0.35)


def capacities() -> np.ndarray:
    gram = C.double().numpy() @ C.double().numpy().T
    found: np.ndarray = np.diag(gram) ** 2 / (gram**2).sum(1)
    return found


def standardised() -> Any:
    y = C.double().numpy() - C.double().numpy().mean(1, keepdims=True)
    variance = (y**2).mean(1)
    return (y**3).mean(1) / variance**1.5, (y**4).mean(1) / variance**2


def remembered() -> Any:
    kept = np.stack([(unit(x) * unit(y)).sum(1) for x, y in pairwise(LATER)])
    return kept.T, (kept >= 0.9).any(0), (kept[0] >= 0.9) & (kept[1] < 0.6)


def nearest() -> Any:
    order, signless = (np.argsort(-table, 1)[:, :9] for table in (AB, np.abs(AB)))
    return [array for one in (order, signless) for array in (np.take_along_axis(AB, one, 1), one)]


def tokens() -> Any:
    table = unit(A) @ unit(B - B.mean(0)).T
    return table.max(1), table.argmax(1)


def unseen() -> np.ndarray:
    left = np.linalg.qr(W_OUT.double().numpy())[0]
    return 1 - ((unit(A) @ left) ** 2).sum(1)


def predicted(*tensors: torch.Tensor) -> Any:
    base = metrics.base_terms(tensors[0], tensors[2])
    return metrics.prediction_terms(base, tensors[1], tensors[2])


def base_by_definition() -> Any:
    log_p = log_probs(DATA.logits["base"])
    return terms(DATA)["base"], np.exp(log_p), (np.exp(log_p) * log_p).sum(1)


def larger() -> Any:
    best, one_to_one = AB.max(1), matched()[2]
    return best.mean(), one_to_one.mean(), (best > 0.9).mean(), (one_to_one > 0.9).mean()


AGAINST_FLOAT64 = {"prediction_terms": 5e-6}
"""A single prediction's KL is a difference of sums in float32; the mean of them is above, to 1e-6."""

LOGITS, TARGETS = DATA.logits, DATA.targets
CASES: dict[str, tuple[Callable[[int], Any], Callable[[], Any]]] = {
    "base_terms": (by_rows(metrics.base_terms, LOGITS["base"], TARGETS), base_by_definition),
    "prediction_terms": (
        by_rows(predicted, LOGITS["base"], LOGITS["dictionary"], TARGETS),
        lambda: [terms(DATA)[name] for name in ("dictionary", "kl")],
    ),
    "mcs": (lambda n: metrics.mcs(A, B, block=n), lambda: AB.max(1)),
    "mmcs": (lambda n: metrics.mmcs(A, B, block=n), lambda: AB.max(1).mean()),
    "mmacs": (lambda n: metrics.mmacs(A, B, block=n), lambda: np.abs(AB).max(1).mean()),
    "nearest_directions": (
        lambda n: [
            metrics.nearest_directions(A, B, 9, absolute=signless, block=n) for signless in (False, True)
        ],
        nearest,
    ),
    "match": (lambda n: metrics.match(A, B, block=n), matched),
    "larger_dictionary_test": (lambda n: metrics.larger_dictionary_test(A, B, block=n), larger),
    "splits": (lambda n: metrics.splits(A, B, block=n), split),
    "opposites": (
        lambda n: metrics.opposites(C, block=n),
        lambda: np.flatnonzero((unit(C) @ unit(C).T <= -0.95).any(1)),
    ),
    "cheats": (lambda n: metrics.cheats(C, DENSITY, 5.0, block=n)[:3], cheated),
    "capacity": (lambda n: metrics.capacity(C, block=n), capacities),
    "token_match": (lambda n: metrics.token_match(A, B, block=n), tokens),
    "unit_rows": (by_rows(metrics.unit_rows, A), lambda: unit(A)),
    "neuron_sparsity": (by_rows(metrics.neuron_sparsity, C), neurons),
    "moments": (by_rows(metrics.moments, C), standardised),
    "effective_neurons": (by_rows(metrics.effective_neurons, C), lambda: 1 / (SQUARES**2).sum(1)),
    "null_space_share": (by_rows(lambda x: metrics.null_space_share(x, W_OUT), A), unseen),
    "encoder_decoder_cosine": (
        by_rows(lambda x, y: metrics.encoder_decoder_cosine(x.T, y), A, LATER[1]),
        lambda: (unit(A) * unit(LATER[1])).sum(1),
    ),
    "self_similarity": (
        by_rows(lambda *x: [one.movedim(-1, 0) for one in metrics.self_similarity([*x])], *LATER),
        remembered,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_change_nothing(name: str) -> None:
    ask, define = CASES[name]
    found, right = {size: flat(ask(size)) for size in SIZES}, flat(define())
    assert len(found[1]) == len(right) and all(array.size for array in right)
    for size in SIZES:
        for one, whole, other in zip(found[size], found[4096], right, strict=True):
            agree(one, whole, f"{name}, {size} against 4096")
            agree(one, other, f"{name}, {size} against its definition", AGAINST_FLOAT64.get(name, TOLERANCE))


# -- nobody is forgotten ----------------------------------------------------------------------------

STREAMS = {"LanguageModelLoss", "Reconstruction", "Sparsity", "Sums", "bootstrap", "density_histogram"}
EXEMPT = {
    "one mean or one order over all latents: has no batches": (
        "coincide correlations mean_directions outlier_dimensions over_latents over_pairs probe_rank"
        " random_moments random_rows rare_cluster"
    ),
    "no number: an error, or a cut of labels": "check_finite numbered_units shuffled_labels",
    "a regression on all texts at once: has no batches; how these are read is below": (
        "absorption class_probes class_scores concept_probe dense_probe linear_probe over_halvings probe_scores"
        " sparse_probe spurious_removal targeted_perturbation"
    ),
}


def test_every_public_metric_is_here_or_says_why_not() -> None:
    answers = [name for name in metrics.__all__ if hasattr(getattr(metrics, name), "_fields")]
    exempt = [name for names in EXEMPT.values() for name in names.split()]
    assert sorted([*STREAMS, *CASES, *exempt, *answers]) == sorted(metrics.__all__)


def test_metrics_without_batches_are_their_definitions() -> None:
    uneven = C * torch.where(torch.arange(24) % 11 == 3, 9.0, 1.0)
    energy = (unit(uneven) ** 2).mean(0)
    outliers = np.flatnonzero(energy > 6 * np.sort(energy)[11])
    agree(metrics.outlier_dimensions(uneven), outliers[np.argsort(-energy[outliers])], "outlier_dimensions")
    cosines = unit(A) @ unit(W_OUT.T)[0]
    ranked, order = metrics.probe_rank(A, W_OUT[:, 0])
    agree(order, np.argsort(-cosines), "probe_rank")
    agree(ranked, -np.sort(-cosines), "probe_rank")
    alike = C.clone()
    alike[:6] = C[0] + 0.1 * C[:6]
    rare = np.flatnonzero(DENSITY.numpy() < 5e-4)
    mean = unit(alike[rare]).mean(0)
    mean /= np.linalg.norm(mean)
    inside = unit(alike[rare]) @ mean > 0.95
    expected = (len(rare) / len(C), inside.mean(), mean, rare[inside])
    for found, right in zip(metrics.rare_cluster(alike.T, DENSITY, 5e-4), expected, strict=False):
        agree(found, right, "rare_cluster")


# -- the verbs that feed them -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("batches"))


def saved(world: World, path: Path, packing: bool = True) -> Path:
    dictionary = dictionaries.build(TopKConfig(k=3, d_sae=32), D, D, autoencoder(world.lm, HOOKPOINT))
    dictionary.initialise(rows(500, D, 1), rows(500, D, 1), torch.Generator().manual_seed(5))
    dictionary.save(path, rows(16, D), extra={"policy": POLICY.replace(packing=packing).resolved()})
    return path


def leaves(data: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(data, (dict, list)):
        return {where: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {name: leaf for key, value in items for name, leaf in leaves(value, f"{where}/{key}").items()}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_report_does_not_know_its_batches(tmp_path: Path, world: World, packing: bool) -> None:
    """Recovered shares to 1e-5: some draws divide by next to nothing, as this random model hardly misses its layer."""
    path = saved(world, tmp_path / "d", packing)
    found = {}
    for size in SIZES:
        changes = {
            "nulls": ("pca",),
            "batch_rows": size,
            "n_tokens": 1100 if packing else 600,
            "n_fit_rows": 200,
        }
        config = config_for(path, world.corpus, tmp_path / f"r{size}", **changes)
        found[size] = leaves(evaluate(config, lm=world.lm).data)
    for size in SIZES[:-1]:
        assert found[size].keys() == found[4096].keys()
        for name, value in found[4096].items():
            if isinstance(value, float):
                agree(found[size][name], value, name, 1e-5 if "ce_recovered" in name else TOLERANCE)
            else:
                assert found[size][name] == value, name


def test_rows_of_labelled_texts_do_not_know_their_batches(tmp_path: Path, world: World) -> None:
    dictionary = dictionaries.load(saved(world, tmp_path / "d"))
    words = WORDS["english"].split()
    texts = [" ".join(words[i % 7 : i % 7 + 2 + i % 5]) for i in range(80)]
    asked = (world.lm, dictionary, autoencoder(world.lm, HOOKPOINT), POLICY, texts, "mean")
    whole = pooled_rows(*asked, 4096)
    for size in SIZES[:-1]:
        found = pooled_rows(*asked, size)
        for one, other in ((found.x, whole.x), (found.acts, whole.acts)):
            length = np.linalg.norm(other, axis=1, keepdims=True)  # float32 rounds by the largest entries
            agree(one / length, other / length, f"{size} texts")
