"""Kernels that take several dictionaries of one shape at once: each gets what it gets alone, values and gradients.

On a machine without a GPU the device's kernels run in Triton's interpreter, as in test_kernels_gpu.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from sememe import kernels
from sememe.encoded import Encoded
from sememe.kernels import gpu, reference
from sememe.kernels.gpu import selection, sparse, varying

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TILE", 16)
        patch.setattr(sparse, "BLOCK", 32)
        patch.setattr(sparse, "ENTRIES", 4)
        yield


def several(n: int, batch: int, d_in: int, d_sae: int, seed: int) -> dict[str, torch.Tensor]:
    """Small integers: ties are common and every sum is exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float().to(DEVICE)

    return {
        "x": draw(n, batch, d_in).requires_grad_(),
        "W_enc": draw(n, d_sae, d_in).mT.requires_grad_(),
        "b_enc": draw(n, d_sae).requires_grad_(),
        "b_pre": draw(n, d_in),
        "W_dec": draw(n, d_sae, d_in).requires_grad_(),
        "b_dec": draw(n, d_in).requires_grad_(),
    }


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 999),
    st.data(),
)
def test_kernels_with_a_leading_dictionary_axis(n, batch, d_in, d_sae, seed, data):
    """Values and gradients per parameter, odd shapes, ties, one dictionary; each with a k of its own."""
    p = several(n, batch, d_in, d_sae, seed)
    ks = data.draw(st.lists(st.integers(1, d_sae), min_size=n, max_size=n))
    own_k = torch.tensor(ks, device=DEVICE)
    inputs = [p[name] for name in ("x", "W_enc", "b_enc", "b_pre")]
    acts, indices = gpu.encode_topk(*inputs, max(ks), own_k)
    assert acts.shape == indices.shape == (n, batch, max(ks))
    recon = gpu.decode(acts, indices, p["W_dec"], p["b_dec"])
    wanted = []
    for i, k in enumerate(ks):
        found = reference.encode_topk(*(tensor[i] for tensor in inputs), k)
        assert torch.equal(acts[i].detach().sort().values[:, -k:], found[0].detach().sort().values)
        assert bool((acts[i] > 0).sum(1).le(k).all())
        wanted.append(reference.decode(*found, p["W_dec"][i], p["b_dec"][i]))
    torch.testing.assert_close(recon, torch.stack(wanted))
    names = [name for name in p if name != "b_pre"]
    grads = [
        torch.autograd.grad((out - 1).square().sum(), [p[name] for name in names])
        for out in (recon, torch.stack(wanted))
    ]
    for name, got, slow in zip(names, *grads, strict=True):
        torch.testing.assert_close(got, slow, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=5, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 15), st.booleans(), st.integers(0, 999), st.data()
)
def test_batch_selection_with_a_leading_dictionary_axis(n, batch, d_sae, silent, seed, data):
    """What each keeps of its own rows, with gradients; where fewer are positive, what fills up belongs to its own."""
    p = several(n, batch, 4, d_sae, seed)
    with torch.no_grad():
        p["b_enc"].sub_(12.0 if silent else 0.0)
    n_kept = data.draw(st.integers(1, batch * d_sae))
    inputs = [p[name] for name in ("x", "W_enc", "b_enc", "b_pre")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varying, "ROW_SHARE", d_sae)
        encoded, smallest = gpu.encode_batch_topk(*inputs, n_kept)
    recon = gpu.decode_encoded(encoded, p["W_dec"], p["b_dec"])
    wanted = []
    for i in range(n):
        found, least = reference.encode_batch_topk(*(tensor[i] for tensor in inputs), n_kept)
        own = kernels.apart(encoded, n, i)
        assert torch.equal(own.to_dense(), found.to_dense()) and float(smallest[i]) == float(least)
        # Of several, what fills up counts as the last row's; one alone ends where its entries do.
        assert (n == 1 or int(own.row_ptr[-1]) == n_kept) and int(own.indices.min()) >= 0
        wanted.append(reference.decode_dense(found, p["W_dec"][i], p["b_dec"][i]))
    torch.testing.assert_close(recon, torch.cat(wanted))
    names = [name for name in p if name != "b_pre"]
    grads = [
        torch.autograd.grad((out - 1).square().sum(), [p[name] for name in names])
        for out in (recon, torch.cat(wanted))
    ]
    for name, got, slow in zip(names, *grads, strict=True):
        torch.testing.assert_close(got, slow, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.booleans(), st.booleans())
def test_adam_with_a_leading_dictionary_axis_has_the_bits_of_each_alone(n, rows, columns, unit_norm, freeze):
    generator = torch.Generator().manual_seed(rows)
    start = torch.randn(n, rows, columns, generator=generator)
    start = (start / start.norm(dim=2, keepdim=True)).to(DEVICE)
    state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    alone = [[tensor[i].clone() for tensor in state] for i in range(n)]
    rates = [1e-2 / (3 + i) for i in range(n)]
    scale = torch.linspace(0.5, 1.0, n, device=DEVICE)
    frozen = torch.rand(n, rows, generator=generator).to(DEVICE) < 0.5 if freeze else None
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "unit_norm": unit_norm}
    for step in (1, 2):
        grad = torch.randn(n, rows, columns, generator=generator).to(DEVICE)
        lr = torch.tensor(rates, dtype=torch.float64, device=DEVICE)
        gpu.adam_step(state[0], grad, *state[1:], step, lr, grad_scale=scale, frozen=frozen, **options)
        for i in range(n):
            own = None if frozen is None else frozen[i]
            gpu.adam_step(
                alone[i][0],
                grad[i],
                *alone[i][1:],
                step,
                rates[i],
                grad_scale=scale[i],
                frozen=own,
                **options,
            )
    for i in range(n):
        assert all(torch.equal(now[i], one) for now, one in zip(state, alone[i], strict=True))


@settings(max_examples=4, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(0, 999), st.data()
)
def test_signed_and_grouped_selection_with_a_leading_dictionary_axis(n, batch, n_groups, size, seed, data):
    """Values and gradients of each alone; an entry beyond a k of its own has no gradient."""
    p = several(n, batch, 4, n_groups * size, seed)
    inputs = [p[name] for name in ("x", "W_enc", "b_enc", "b_pre")]
    ks = data.draw(st.lists(st.integers(1, n_groups * size), min_size=n, max_size=n))
    own_k = torch.tensor(ks, device=DEVICE)
    signed = gpu.encode_abs_topk(*inputs, max(ks), own_k)
    grouped = gpu.encode_group_max(*inputs, n_groups)
    weights = torch.arange(1.0, n_groups * size + 1, device=DEVICE)
    for found, wanted in (
        (signed, [reference.encode_abs_topk(*(one[i] for one in inputs), k) for i, k in enumerate(ks)]),
        (grouped, [reference.encode_group_max(*(one[i] for one in inputs), n_groups) for i in range(n)]),
    ):
        outs = [
            [Encoded.from_topk(acts, indices, n_groups * size).to_dense() for acts, indices in one]
            for one in (zip(*found, strict=True), wanted)
        ]
        names = ("x", "W_enc", "b_enc")
        grads = [
            torch.autograd.grad(
                sum((one * weights).square().sum() for one in out), [p[name] for name in names]
            )
            for out in outs
        ]
        for got, slow in zip((*outs[0], *grads[0]), (*outs[1], *grads[1]), strict=True):
            torch.testing.assert_close(got, slow)


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 15), st.integers(0, 999), st.data())
def test_thresholds_with_a_leading_dictionary_axis(n, batch, d_sae, seed, data):
    """Each with thresholds and room of its own: what does not fit for one is missing of that one only."""
    p = several(n, batch, 4, d_sae, seed)
    threshold = (
        torch.randint(-3, 4, (n, d_sae), generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)
    )
    room = data.draw(st.lists(st.integers(1, batch * d_sae), min_size=n, max_size=n))
    inputs = [p[name] for name in ("x", "W_enc", "b_enc", "b_pre")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varying, "ROW_SHARE", d_sae)
        encoded = gpu.encode_threshold(*inputs, threshold, room)
        alone = [
            gpu.encode_threshold(*(one[i] for one in inputs), threshold[i], capacity)
            for i, capacity in enumerate(room)
        ]
    assert encoded.acts.shape == (sum(room),)
    assert encoded.overflow is not None
    assert encoded.overflow.tolist() == [bool(one.overflow) for one in alone]
    on_cpu = [kernels.encode_threshold(*inputs, threshold, room)] if DEVICE == "cpu" else []
    for whole in (encoded, *on_cpu):
        for i, one in enumerate(alone):
            own = kernels.apart(whole, n, i)
            assert torch.equal(own.row_ptr, one.row_ptr) and torch.equal(own.to_dense(), one.to_dense())
    names = ("x", "W_enc", "b_enc")
    grads = [
        torch.autograd.grad(sum(one.acts.square().sum() for one in parts), [p[name] for name in names])
        for parts in ([encoded], alone)
    ]
    for got, slow in zip(*grads, strict=True):
        torch.testing.assert_close(got, slow)
