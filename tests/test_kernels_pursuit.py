"""Matching pursuit's fast path against its slow reference: values, gradients, ties, nothing left, same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sememe import kernels
from sememe.kernels import pursuit


def unit_rows(n: int, d: int, seed: int) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def run(path: str, x: torch.Tensor, W: torch.Tensor, k: int):
    """What is returned, and the gradients by x, W and b_pre of something that depends on all of it."""
    b_pre = torch.linspace(-0.2, 0.2, x.shape[1])
    x, W, b_pre = (tensor.clone().requires_grad_() for tensor in (x + b_pre, W, b_pre))
    with kernels.use(path):
        found = kernels.matching_pursuit(x, W, b_pre, k)
        weights = torch.linspace(-1, 1, found.acts.numel()).view_as(found.acts)
        ((found.residual - 0.3).square().sum() + (weights * found.acts).sum()).backward()
    return found, x.grad, W.grad, b_pre.grad


def check(x: torch.Tensor, W: torch.Tensor, k: int) -> None:
    """Both paths take the same latents and give the same numbers."""
    slow, fast = run("reference", x, W, k), run("auto", x, W, k)
    close = {"atol": 1e-4, "rtol": 1e-3}
    # a correlation of rounding errors alone may come out positive or not: its latent is free, its activation is not
    real = torch.maximum(slow[0].acts, fast[0].acts) > 1e-5
    assert torch.equal(slow[0].indices[real], fast[0].indices[real])
    torch.testing.assert_close(fast[0].acts, slow[0].acts, **close)
    torch.testing.assert_close(fast[0].residual, slow[0].residual, **close)
    if bool(real.all()):  # a step, however small, takes a direction out of the gradients
        torch.testing.assert_close(fast[1], slow[1], **close)
        torch.testing.assert_close(fast[2], slow[2], **close)
        torch.testing.assert_close(fast[3], slow[3], **(close | {"atol": 1e-4 * len(x)}))


shapes = st.tuples(st.integers(1, 9), st.integers(2, 33), st.integers(1, 150), st.integers(1, 12))


@pytest.mark.parametrize("gram_bytes", [pursuit.GRAM_BYTES, 0], ids=["gram", "products"])
@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 10_000))
def test_values_and_gradients_are_the_references(gram_bytes, shape, seed):
    batch, d_in, d_sae, k = shape
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pursuit, "GRAM_BYTES", gram_bytes)
        check(x, unit_rows(d_sae, d_in, seed + 1), k)


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gram_bytes", [pursuit.GRAM_BYTES, 0], ids=["gram", "products"])
def test_many_rows_of_close_calls(gram_bytes, narrow, monkeypatch):
    """In 16 dimensions, 700 directions lie close: bfloat16 alone would take another one in a seventh of the steps."""
    monkeypatch.setattr(pursuit, "GRAM_BYTES", gram_bytes)
    monkeypatch.setattr(pursuit, "native_bfloat16", lambda: narrow)
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    check(x, unit_rows(700, 16, 1), 12)


def test_the_gram_matrix_in_whole_numbers_is_that_of_the_directions(monkeypatch):
    """To half a step of each row, in whatever groups of rows; equal directions exactly."""
    W = unit_rows(150, 33, 0)
    W[7] = W[3]
    gram = W @ W.T
    monkeypatch.setattr(pursuit, "SCORES", 150 * 40)
    codes, sizes = pursuit._gram(W, False)
    rows = torch.from_numpy(codes).float() * torch.from_numpy(sizes)[:, None]
    off = ~torch.eye(150, dtype=torch.bool)
    assert bool(((rows - gram).abs() <= 0.51 * torch.from_numpy(sizes)[:, None])[off].all())
    assert bool((rows.diagonal() == 0).all()) and float(rows[3, 7]) == pytest.approx(1, abs=1e-6)


def test_ties_go_to_the_lower_latent():
    W = torch.eye(6)[[3, 1, 1, 3, 0, 0, 5]]
    x = torch.tensor([[2.0, 2.0, 0.0, 2.0, 0.0, -9.0], [0.0, 0.0, 7.0, 0.0, 0.0, 0.0]])
    for path in ("reference", "auto"):
        with kernels.use(path):
            acts, indices, residual = kernels.matching_pursuit(x, W, torch.zeros(x.shape[1]), 4)
        assert indices[0, :3].tolist() == [0, 1, 4], path
        assert acts.tolist() == [[2, 2, 2, 0], [0, 0, 0, 0]], "a direction of the wrong sign is not taken"
        assert residual.tolist() == [[0, 0, 0, 0, 0, -9], [0, 0, 7, 0, 0, 0]]


def test_rows_of_zeros_and_rows_that_are_used_up():
    """What is left shrinks by eight orders of magnitude: scores that bfloat16 rounded would be noise by then."""
    W = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(3)))[0].contiguous()
    codes = torch.zeros(50, 40)
    codes[1:, :4] = torch.tensor([1.0, 3e-2, 1e-3, 3e-5])
    x = codes @ W
    acts, indices, residual = kernels.matching_pursuit(x, W, torch.zeros(x.shape[1]), 6)
    assert acts[0].tolist() == [0.0] * 6
    assert indices[1:, :4].tolist() == [[0, 1, 2, 3]] * 49
    torch.testing.assert_close(acts[1:, :4], codes[1:, :4], atol=1e-6, rtol=1e-2)
    assert float(residual.norm(dim=1).max()) < 1e-6


def test_a_latent_taken_twice_has_one_entry():
    W = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6]]), dim=1)
    x = torch.tensor([[1.0, 2.0]]).repeat(3, 1)
    for path in ("reference", "auto"):
        with kernels.use(path):
            acts, indices, residual = kernels.matching_pursuit(x, W, torch.zeros(x.shape[1]), 6)
        torch.testing.assert_close(acts @ torch.ones(6), torch.full((3,), float(acts[0].sum())))
        for row in range(3):
            taken = indices[row][acts[row] > 0].tolist()
            assert len(taken) == len(set(taken)), path
        dense = torch.zeros(3, 2).scatter_add(1, indices.long(), acts)
        torch.testing.assert_close(dense @ W + residual, x)


def test_the_same_bits_twice_and_with_other_threads():
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    W = unit_rows(130, 50, 1)
    runs = []
    for threads in (1, 1, 2):
        with kernels.threads(threads):
            found, *grads = run("auto", x, W, 9)
            runs.append((*found, *grads))
    for other in runs[1:]:
        for a, b in zip(runs[0][1:2] + runs[0][3:], other[1:2] + other[3:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
