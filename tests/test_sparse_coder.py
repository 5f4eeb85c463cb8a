"""Codes by search, and directions learned from them: closed forms, oracles, planted data, errors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from sememe import dictionaries, metrics
from sememe.dictionaries.sparse_coder import (
    KSVDConfig,
    SparseCoder,
    SparseCoderConfig,
    fista,
    ksvd,
    pursue,
    sparse_coder_over,
)
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ActivationError, ConfigError, ShapeError


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def omp_by_hand(x: np.ndarray, W: np.ndarray, k: int, non_negative: bool) -> np.ndarray:
    """One row, from the definition."""
    support: list[int] = []
    code = np.zeros(len(W))
    for _ in range(k):
        correlation = W @ (x - code @ W)
        size = correlation if non_negative else np.abs(correlation)
        size[support] = -np.inf
        if size.max() <= 1e-6 * np.linalg.norm(x):
            break
        support.append(int(size.argmax()))
        code[:] = 0
        if non_negative:
            code[support] = nnls(W[support].T, x)[0]
        else:
            code[support] = np.linalg.lstsq(W[support].T, x, rcond=None)[0]
    return code


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(3, 8), st.integers(4, 12), st.integers(0, 99), st.booleans())
def test_omp_is_its_definition(k, d, n, seed, non_negative):
    x, W = rows(5, d, seed), unit(rows(n, d, seed + 1))
    acts, indices = pursue(x, W, min(k, d), True, non_negative)
    for row, act, index in zip(x.double().numpy(), acts, indices, strict=True):
        code = np.zeros(n)
        np.add.at(code, index.numpy(), act.numpy())
        expected = omp_by_hand(row, W.double().numpy(), min(k, d), non_negative)
        ours, theirs = (np.square(row - found @ W.double().numpy()).sum() for found in (code, expected))
        assert not non_negative or float(act.min()) >= 0
        # nearly parallel directions share what they explain as they like: what is left has to be the same
        assert abs(ours - theirs) <= (0.02 if non_negative else 1e-4) * np.square(row).sum()
        chosen = W[torch.from_numpy(np.flatnonzero(expected))]
        if not non_negative and float(torch.linalg.cond(chosen @ chosen.T)) < 100:
            np.testing.assert_allclose(code, expected, atol=2e-3)


def test_on_orthonormal_directions_every_coder_finds_the_code():
    W = torch.linalg.qr(rows(12, 12)).Q
    codes = torch.zeros(40, 12)
    for row in range(40):
        codes[row, torch.randperm(12, generator=torch.Generator().manual_seed(row))[:3]] = torch.tensor(
            [1.0, -2.0, 0.5]
        )
    x = codes @ W
    for refit in (True, False):
        acts, indices = pursue(x, W, 3, refit, False)
        torch.testing.assert_close(
            torch.zeros(40, 12).scatter_add(1, indices, acts), codes, atol=1e-4, rtol=0
        )
    shrunk = codes.sign() * (codes.abs() - 0.2).clamp_min(0)
    torch.testing.assert_close(fista(x, W, 0.2, 50, False), shrunk, atol=1e-5, rtol=0)
    torch.testing.assert_close(fista(x, W, 0.2, 50, True), shrunk.clamp_min(0), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(2, 10), st.integers(0, 99), st.booleans())
def test_fista_meets_the_optimality_conditions(d, n, seed, non_negative):
    x, W = rows(4, d, seed), unit(rows(n, d, seed + 1))
    acts = fista(x, W, 0.3, 3000, non_negative)
    pull = (x - acts @ W) @ W.T  # equals penalty * sign where active, is at most the penalty elsewhere
    active = acts.abs() > 1e-4
    torch.testing.assert_close(pull[active], 0.3 * acts[active].sign(), atol=5e-3, rtol=0)
    rest = pull[~active] if non_negative else pull[~active].abs()
    assert rest.numel() == 0 or float(rest.max()) <= 0.3 + 5e-3
    assert not non_negative or float(acts.min()) >= 0


def test_gradient_pursuit_lies_between_matching_pursuit_and_omp():
    x, W = rows(300, 16), unit(rows(64, 16, 1))
    errors = []
    for refit in (True, False):
        acts, indices = pursue(x, W, 6, refit, False)
        recon = (acts[..., None] * W[indices]).sum(1)
        errors.append(float((x - recon).square().sum()))
    residual = x.clone()  # matching pursuit: no coefficient is looked at twice
    for _ in range(6):
        correlation = residual @ W.T
        best = correlation.abs().argmax(1)
        residual -= correlation.gather(1, best[:, None]) * W[best]
    assert errors[0] <= errors[1] <= float(residual.square().sum()) * 1.02


def test_a_reconstructed_row_takes_no_more_directions():
    W = torch.eye(6)
    acts, _ = pursue(2 * W[:2], W, 4, True, False)
    assert acts.count_nonzero(dim=1).tolist() == [1, 1]
    zero, _ = pursue(torch.zeros(2, 6), W, 4, True, True)
    assert not zero.any()


def test_a_broken_row_is_not_silent():
    for options in ({"k": 2}, {"encoder": "fista", "non_negative": True}):
        made = SparseCoder(SparseCoderConfig.build(options | {"d_sae": 40}), 8, 8, 40)
        made.W_dec = unit(rows(40, 8))
        x = rows(3, 8, 4)
        x[1, 3] = torch.nan
        recon = made(x)
        assert bool(recon[1].isnan().any()) and bool(recon[[0, 2]].isfinite().all())


def test_codes_do_not_depend_on_the_batch(monkeypatch):
    from sememe.dictionaries import sparse_coder

    made = SparseCoder(SparseCoderConfig(k=3, d_sae=20), 8, 8, 20)
    made.W_dec, made.b_dec = unit(rows(20, 8)), rows(1, 8, 3)[0]
    x = rows(30, 8, 4)
    whole = made.encode(x)
    monkeypatch.setattr(sparse_coder, "N_AT_ONCE", 20 * 7)
    parts = made.encode(x)
    torch.testing.assert_close(whole.to_dense(), parts.to_dense())
    assert parts.k == 3


def test_a_dictionarys_directions_are_coded_better_by_search(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = rows(500, 12) + 4.0
    dictionary = dictionaries.build(TopKConfig(k=3, d_sae=40), 12, 12)
    dictionary.initialise(x, x, generator)
    made = sparse_coder_over(dictionary.fold().eval(), SparseCoderConfig(k=3))
    with torch.no_grad():
        errors = [float((x - one(x)).square().sum()) for one in (dictionary.eval(), made)]
    assert errors[1] < errors[0]
    made.save(tmp_path / "coder", x)
    loaded = dictionaries.load(tmp_path / "coder")
    torch.testing.assert_close(loaded(x), made(x), rtol=1e-4, atol=1e-4)
    assert loaded.kind == "sparse_coder" and loaded.config == made.config


def planted(
    n_active: int, n: int = 1500, d: int = 10, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal axes, n_active of them in each row: the catalogue of the sparse-coding project has 10 and 3."""
    generator = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    codes = torch.zeros(n, d)
    for row in range(n):
        values = torch.rand(n_active, generator=generator) + 0.5
        signs = torch.randint(2, (n_active,), generator=generator) * 2 - 1 if signed else 1
        codes[row, torch.randperm(d, generator=generator)[:n_active]] = values * signs
    return axes, codes @ axes


@pytest.mark.parametrize("update", ["ksvd", "mod"])
def test_directions_are_learned_when_the_number_of_active_ones_is_right(update):
    axes, x = planted(3)
    learned = ksvd(x, KSVDConfig(d_sae=10, k=3, n_iterations=40, update=update))
    assert metrics.mmacs(axes, learned.coder.decoder_directions()) > 0.95
    assert learned.mse[-1] < 0.1 * learned.mse[0]
    torch.testing.assert_close(learned.coder.W_dec.norm(dim=1), torch.ones(10))


def test_they_are_not_when_too_many_are_allowed():
    """Any basis reconstructs everything with enough directions, so nothing leads to the true one."""
    axes, x = planted(3)
    right, many = (
        ksvd(x, KSVDConfig(d_sae=10, k=k, n_iterations=40)).coder.decoder_directions() for k in (3, 8)
    )
    assert metrics.mmacs(axes, many) < metrics.mmacs(axes, right) - 0.1


def test_non_negative_codes_find_directions_with_their_signs():
    axes, x = planted(2, signed=False)
    learned = ksvd(x, KSVDConfig(d_sae=12, k=3, n_iterations=40, non_negative=True))
    assert float(learned.coder.encode(x).acts.min()) >= 0
    assert metrics.mmacs(axes, learned.coder.decoder_directions()) > 0.7


def test_the_same_seed_learns_the_same_directions():
    _, x = planted(3, n=300)
    made = [ksvd(x, KSVDConfig(d_sae=10, k=3, n_iterations=3, seed=seed)).coder.W_dec for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda: SparseCoderConfig(encoder="fista", k=3),
            ConfigError,
            "k must be left out when the encoder is fista",
        ),
        (
            lambda: SparseCoderConfig(penalty=3),
            ConfigError,
            "penalty must be left out when the encoder is omp",
        ),
        (
            lambda: SparseCoder(SparseCoderConfig(k=9), 4, 4, 8),
            ConfigError,
            r"k must be in \[1, d_sae=8\], got 9",
        ),
        (lambda: SparseCoder(SparseCoderConfig(k=1), 4, 5, 8), ShapeError, "d_in must be d_out, got 4 and 5"),
        (
            lambda: ksvd(rows(5, 3), KSVDConfig(d_sae=6, k=1)),
            ShapeError,
            r"6 directions takes at least as many rows, got 5\. Give it more",
        ),
        (
            lambda: ksvd(torch.full((9, 3), torch.nan), KSVDConfig(d_sae=6, k=1)),
            ActivationError,
            "NaN or infinity among the rows",
        ),
    ],
)
def test_what_cannot_be_done_says_why(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


def test_every_support_is_tried_by_no_pursuit_but_omp_is_near_the_best():
    """On few directions the best support can be found by trying all: OMP is close to it."""
    x, W = rows(60, 6), unit(rows(9, 6, 1))
    best = np.full(60, np.inf)
    for support in itertools.combinations(range(9), 2):
        some = W[list(support)].T.double()
        left = x.double().T - some @ torch.linalg.lstsq(some, x.double().T).solution
        best = np.minimum(best, left.square().sum(0).numpy())
    acts, indices = pursue(x, W, 2, True, False)
    error = (x - (acts[..., None] * W[indices]).sum(1)).square().sum(1).double().numpy()
    assert (error >= best - 1e-4).all()
    assert error.sum() < 1.25 * best.sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(6, 12), st.integers(13, 40), st.integers(0, 99), st.booleans())
def test_omp_from_the_directions_products_is_omp(k, d, n, seed, non_negative):
    x, W = rows(6, d, seed), unit(rows(n, d, seed + 1))
    slow, fast = (pursue(x, W, k, True, non_negative, gram) for gram in (None, W @ W.T))
    codes = [torch.zeros(6, n).scatter_add(1, indices, acts) for acts, indices in (slow, fast)]
    left = [(x - code @ W).square().sum(1) for code in codes]
    torch.testing.assert_close(
        *left, atol=2e-4 * float(x.square().sum(1).max()), rtol=1e-2 if non_negative else 1e-3
    )
    same = (codes[0] != 0).eq(codes[1] != 0).all(1)
    assert float(same.float().mean()) > 0.5, "the same directions, but where two are nearly as good"
    torch.testing.assert_close(codes[0][same], codes[1][same], atol=5e-2 if non_negative else 5e-3, rtol=1e-2)


def test_products_of_directions_follow_the_directions():
    made = SparseCoder(SparseCoderConfig(k=2, d_sae=20), 8, 8, 20)
    x = rows(30, 8, 4)
    for seed in (0, 1):
        made.W_dec = unit(rows(20, 8, seed))
        fresh = SparseCoder(SparseCoderConfig(k=2, d_sae=20), 8, 8, 20)
        fresh.W_dec = made.W_dec.clone()
        torch.testing.assert_close(made.encode(x).to_dense(), fresh.encode(x).to_dense())
    made.W_dec[3] = unit(rows(1, 8, 9))[0]  # in place, as K-SVD does it
    fresh.W_dec = made.W_dec.clone()
    torch.testing.assert_close(made.encode(x).to_dense(), fresh.encode(x).to_dense())
