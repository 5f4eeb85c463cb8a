"""Kernels that choose latents otherwise than k per row: against dense masks, values and gradients per parameter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sememe import kernels
from sememe.encoded import Encoded

shapes = st.tuples(st.integers(1, 7), st.integers(1, 12), st.integers(1, 60), st.integers(0, 10_000))


def case(batch: int, d_in: int, d_sae: int, seed: int) -> dict[str, torch.Tensor]:
    """Small integers, so that ties and exact zeros are common and every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=generator).float()  # noqa: E731
    return {
        "x": whole(batch, d_in).requires_grad_(),
        "W_enc": whole(d_sae, d_in).T.requires_grad_(),
        "b_enc": whole(d_sae).requires_grad_(),
        "b_pre": whole(d_in),
    }


def check(encoded: Encoded, keep: np.ndarray, p: dict[str, torch.Tensor], relu: bool) -> None:
    """The entries are the pre-activations where `keep` is, and gradients are those of the masked dense ones."""
    weights = torch.randn(keep.shape, generator=torch.Generator().manual_seed(1))
    pre_acts = (p["x"] - p["b_pre"]) @ p["W_enc"] + p["b_enc"]
    dense = pre_acts * torch.from_numpy(keep)
    dense = torch.relu(dense) if relu else dense
    found = encoded.to_dense()
    torch.testing.assert_close(found, dense)
    names = ("x", "W_enc", "b_enc")
    wanted = torch.autograd.grad((dense * weights).sum(), [p[n] for n in names], retain_graph=True)
    got = torch.autograd.grad((found * weights).sum(), [p[n] for n in names])
    for name, a, b in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def pre_acts_of(p: dict[str, torch.Tensor]) -> np.ndarray:
    return ((p["x"] - p["b_pre"]) @ p["W_enc"] + p["b_enc"]).detach().numpy()


@pytest.mark.parametrize("path", ["reference", "auto"])
@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans())
def test_threshold(path, shape, with_threshold):
    p = case(*shape)
    threshold = torch.linspace(-2, 3, shape[2]).round() if with_threshold else None
    with kernels.use(path):
        encoded = kernels.encode_threshold(p["x"], p["W_enc"], p["b_enc"], p["b_pre"], threshold)
    pre = pre_acts_of(p)
    keep = pre > (0 if threshold is None else threshold.numpy())
    assert encoded.row_counts().tolist() == keep.sum(1).tolist()
    check(encoded, keep, p, relu=False)


@pytest.mark.parametrize("path", ["reference", "auto"])
@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_batch_topk(path, shape, data):
    p = case(*shape)
    n_kept = data.draw(st.integers(1, shape[0] * shape[2]))
    with kernels.use(path):
        encoded, threshold = kernels.encode_batch_topk(p["x"], p["W_enc"], p["b_enc"], p["b_pre"], n_kept)
    pre = pre_acts_of(p)
    ranked = sorted(
        ((-pre[r, i], r, i) for r in range(shape[0]) for i in range(shape[2])),
    )[:n_kept]
    keep = np.zeros(pre.shape, dtype=bool)
    for _, r, i in ranked:
        keep[r, i] = True
    assert encoded.acts.shape[0] == n_kept
    assert float(threshold) == max(0.0, -ranked[-1][0])
    check(encoded, keep, p, relu=True)


@pytest.mark.parametrize("path", ["reference", "auto"])
@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_abs_topk(path, shape, data):
    p = case(*shape)
    k = data.draw(st.integers(1, shape[2]))
    with kernels.use(path):
        acts, indices = kernels.encode_abs_topk(p["x"], p["W_enc"], p["b_enc"], p["b_pre"], k)
    pre = pre_acts_of(p)
    keep = np.zeros(pre.shape, dtype=bool)
    for r, row in enumerate(pre):
        keep[r, sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:k]] = True
    check(Encoded.from_topk(acts, indices, shape[2]), keep, p, relu=False)


@pytest.mark.parametrize("path", ["reference", "auto"])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 9), st.integers(1, 7), st.integers(0, 10_000))
def test_group_max(path, batch, d_in, n_groups, size, seed):
    p = case(batch, d_in, n_groups * size, seed)
    with kernels.use(path):
        acts, indices = kernels.encode_group_max(p["x"], p["W_enc"], p["b_enc"], p["b_pre"], n_groups)
    pre = pre_acts_of(p)
    keep = np.zeros(pre.shape, dtype=bool)
    for r, row in enumerate(pre):
        for g in range(n_groups):
            keep[r, max(range(g * size, (g + 1) * size), key=lambda i: (row[i], -i))] = True
    assert (indices // size).tolist() == [list(range(n_groups))] * batch
    check(Encoded.from_topk(acts, indices, n_groups * size), keep, p, relu=True)


def test_a_nan_is_the_largest_of_its_group():
    """Of every group, the last too, whose neighbour is outside the dictionary."""
    p = case(3, 4, 12, 0)
    p["x"].data[1, 2] = torch.nan
    p["b_enc"].data[10] = -torch.nan
    acts, indices = kernels.encode_group_max(p["x"], p["W_enc"], p["b_enc"], p["b_pre"], 3)
    assert acts.isnan().tolist() == [[False, False, True], [True] * 3, [False, False, True]]
    assert indices[1].tolist() == [0, 4, 8] and indices[0, 2] == indices[2, 2] == 10


def test_a_pursuit_takes_the_latent_that_is_nan():
    W = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    W[2, 1] = torch.nan
    with kernels.use("reference"):
        acts, indices, _ = kernels.matching_pursuit(torch.ones(2, 4), W, torch.zeros(4), 1)
    assert indices.tolist() == [[2], [2]] and bool(acts.isnan().all())


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_decoding_is_one_map_whether_sums_or_a_dense_product_do_it(share):
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(9, 200, generator=generator)
    dense = torch.where(dense < share, dense, torch.zeros(())).requires_grad_()
    W, b = torch.randn(200, 6, generator=generator).requires_grad_(), torch.randn(6).requires_grad_()
    is_dense = Encoded.from_dense(dense).acts.shape[0] > kernels.DENSE_SHARE * dense.numel()
    assert is_dense == (share == 0.5), "one case on either side"
    outs = [kernels.decode_encoded(Encoded.from_dense(dense), W, b), dense @ W + b]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), [dense, W, b]) for out in outs]
    active = dense.detach() != 0
    torch.testing.assert_close(grads[0][0][active], grads[1][0][active], atol=1e-4, rtol=1e-4)
    for got, wanted in zip(grads[0][1:], grads[1][1:], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True), st.integers(0, 1000))
def test_prefixes_are_reconstructions_from_the_first_latents(ends, seed):
    ends = sorted(ends)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.relu(torch.randn(4, 40, generator=generator))
    W, b = torch.randn(40, 5, generator=generator), torch.randn(5, generator=generator)
    recons = kernels.decode_prefixes(Encoded.from_dense(dense), W, b, ends)
    assert len(recons) == len(ends)
    for recon, end in zip(recons, ends, strict=True):
        torch.testing.assert_close(recon, dense[:, :end] @ W[:end] + b, atol=1e-4, rtol=1e-4)
