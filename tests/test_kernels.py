"""Every fast kernel against its slow reference: values, gradients per parameter, ties, odd shapes, same bits."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from products import KINDS, products_in

from sememe import kernels
from sememe.encoded import Encoded
from sememe.errors import ConfigError
from sememe.kernels import cpu, reference


def parameters(d_in: int, d_sae: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "W_enc": (torch.randn(d_sae, d_in, generator=generator) / d_in**0.5).T.requires_grad_(),
        "b_enc": (0.1 * torch.randn(d_sae, generator=generator)).requires_grad_(),
        "W_dec": torch.randn(d_sae, d_in, generator=generator).requires_grad_(),
        "b_dec": torch.randn(d_in, generator=generator).requires_grad_(),
    }


def run(path, x, b_pre, k, p):
    """Reconstruction and every gradient, through one path."""
    x = x.clone().requires_grad_()
    for tensor in p.values():
        tensor.grad = None
    with kernels.use(path):
        acts, indices = kernels.encode_topk(x, p["W_enc"], p["b_enc"], b_pre, k)
        recon = kernels.decode(acts, indices, p["W_dec"], p["b_dec"])
    (recon - 1.0).square().sum().backward()
    return acts, indices, recon, {"x": x.grad, **{name: t.grad for name, t in p.items()}}


shapes = st.tuples(st.integers(1, 9), st.integers(1, 33), st.integers(1, 150))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10_000), st.sampled_from(["int8", "bfloat16"]), st.data())
def test_topk_and_decode_agree_with_the_reference_in_values_and_gradients(shape, seed, kind, data):
    batch, d_in, d_sae = shape
    k = data.draw(st.integers(1, d_sae))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator)
    b_pre = torch.randn(d_in, generator=generator)
    p = parameters(d_in, d_sae, seed)
    slow = run("reference", x, b_pre, k, p)
    with products_in(kind):
        fast = run("auto", x, b_pre, k, p)
    # a rough selection may swap a pre-activation for one within rounding of it: compare what is reconstructed
    # where the selected sets agree, which must be nearly everywhere.
    dense = [Encoded.from_topk(a.detach(), i, d_sae).to_dense() for a, i in (slow[:2], fast[:2])]
    differ = (dense[1] - dense[0]).abs() > 1e-5 + 1e-4 * dense[0].abs()
    smallest_kept = slow[0].detach().min(dim=1, keepdim=True).values
    rounding = (
        (2**-4 if kind == "int8" else 2**-7)
        * (x - b_pre).norm(dim=1, keepdim=True)
        * p["W_enc"].detach().norm(dim=0).max()
    )
    assert bool((torch.maximum(*dense)[differ] <= (smallest_kept + rounding).expand_as(differ)[differ]).all())
    assume(not bool(differ.any()))
    torch.testing.assert_close(fast[2], slow[2], atol=1e-4, rtol=1e-4)
    for name in slow[3]:
        torch.testing.assert_close(
            fast[3][name], slow[3][name], atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10_000), st.data())
def test_selection_in_float32_is_the_references_without_exception(shape, seed, data):
    """Where the CPU has no bfloat16 product, nothing may differ: no allowance for rounding in the selection."""
    batch, d_in, d_sae = shape
    k = data.draw(st.integers(1, d_sae))
    generator = torch.Generator().manual_seed(seed)
    x, b_pre = torch.randn(batch, d_in, generator=generator), torch.randn(d_in, generator=generator)
    p = parameters(d_in, d_sae, seed)
    slow = run("reference", x, b_pre, k, p)
    with products_in("float32"):
        fast = run("auto", x, b_pre, k, p)
    dense = [Encoded.from_topk(a.detach(), i, d_sae).to_dense() for a, i in (slow[:2], fast[:2])]
    torch.testing.assert_close(dense[1], dense[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast[2], slow[2], atol=1e-4, rtol=1e-4)
    for name in slow[3]:
        torch.testing.assert_close(fast[3][name], slow[3][name], atol=1e-3, rtol=1e-3)


def test_the_fast_path_was_taken():
    assert kernels.path_for(torch.zeros(2, 2)) == "cpu"
    with kernels.use("reference"):
        assert kernels.path_for(torch.zeros(2, 2)) == "reference"
    assert kernels.path_for(torch.zeros(2, 2, dtype=torch.float64)) == "reference"


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_path_is_an_error():
    with pytest.raises(ConfigError, match="'auto' or 'reference', got 'fast'"), kernels.use("fast"):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_lower_index(kind):
    W = torch.ones(70, 3).T
    x = torch.ones(2, 3)
    for path in ("reference", "auto"):
        with products_in(kind), kernels.use(path):
            _, indices = kernels.encode_topk(x, W, torch.zeros(70), torch.zeros(3), 5)
        assert sorted(indices[0].tolist()) == [0, 1, 2, 3, 4], path


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_is_not_lost(kind):
    """In a row, in a latent, or both, whatever its sign: training must stop at it."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(6, 40, generator=generator), torch.randn(300, 40, generator=generator)
    for sign, latent in itertools.product((1.0, -1.0), (0, 7, 299)):
        rows, latents = x.clone(), W.clone()
        rows[2, 3] = sign * float("nan")
        latents[latent] = 0.0  # silent otherwise
        latents[latent, 5] = sign * float("nan")
        with products_in(kind):
            of_row, _ = kernels.encode_topk(rows, W.T, torch.zeros(300), torch.zeros(40), 5)
            of_latent, indices = kernels.encode_topk(x, latents.T, torch.zeros(300), torch.zeros(40), 5)
        assert bool(of_row[2].isnan().all()) and int(of_row.isnan().any(dim=1).sum()) == 1
        assert int(of_latent.isnan().sum()) == 6 and bool((indices[of_latent.isnan()] == latent).all())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_positive_pre_activations_stay_silent(kind):
    W = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).T
    for path in ("reference", "auto"):
        with kernels.use(path):
            with products_in(kind):
                acts, indices = kernels.encode_topk(torch.zeros(3, 4), W, -torch.ones(40), torch.zeros(4), 6)
            assert float(acts.abs().max()) == 0.0
            assert int(indices.min()) >= 0
            recon = kernels.decode(acts, indices, torch.ones(40, 4), torch.full((4,), 2.0))
        assert recon.tolist() == [[2.0] * 4] * 3


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10_000), st.data())
def test_the_latents_furthest_from_0_are_the_references(shape, seed, data):
    batch, d_in, d_sae = shape
    k = data.draw(st.integers(1, d_sae))
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed))
    found = []
    for path in ("reference", "auto"):
        p = parameters(d_in, d_sae, seed)
        with products_in("float32"), kernels.use(path):
            acts, indices = kernels.encode_abs_topk(x, p["W_enc"], p["b_enc"], torch.zeros(d_in), k)
        dense = Encoded.from_topk(acts, indices, d_sae).to_dense()
        dense.square().sum().backward()
        found.append((dense.detach(), p["W_enc"].grad, p["b_enc"].grad))
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    assert bool((found[1][0] < 0).any()) or k * batch < 20


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_rough_selection_of_signed_latents_keeps_what_float32_would(kind):
    generator = torch.Generator().manual_seed(3)
    x, W = (
        torch.randn(512, 64, generator=generator),
        (torch.randn(1024, 64, generator=generator).T / 8).requires_grad_(),
    )
    with products_in(kind):
        acts, fast = kernels.encode_abs_topk(x, W, torch.zeros(1024), torch.zeros(64), 16)
    _, slow = reference.encode_abs_topk(x, W, torch.zeros(1024), torch.zeros(64), 16)
    shared = sum(len(set(a) & set(b)) for a, b in zip(fast.tolist(), slow.tolist(), strict=True))
    assert shared / (512 * 16) > 0.999 and 0.4 < float((acts < 0).float().mean()) < 0.6


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_rough_selection_keeps_what_float32_would(kind):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 64, generator=generator)
    W = (torch.randn(1024, 64, generator=generator).T / 8).requires_grad_()
    with products_in(kind):
        _, fast = kernels.encode_topk(x, W, torch.zeros(1024), torch.zeros(64), 16)
    _, slow = reference.encode_topk(x, W, torch.zeros(1024), torch.zeros(64), 16)
    shared = sum(len(set(a) & set(b)) for a, b in zip(fast.tolist(), slow.tolist(), strict=True))
    assert shared / (512 * 16) > 0.999


def test_same_bits_twice_and_whatever_the_number_of_threads():
    generator = torch.Generator().manual_seed(1)
    x, b_pre, p = torch.randn(64, 24, generator=generator), torch.zeros(24), parameters(24, 200, 1)
    runs = []
    for threads in (2, 2, 1):
        cpu.set_threads(threads)
        runs.append(run("auto", x, b_pre, 8, p))
    cpu.set_threads(2)
    for other in runs[1:]:
        assert torch.equal(runs[0][2], other[2])
        for name, grad in runs[0][3].items():
            assert torch.equal(grad, other[3][name]), name


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 9), st.floats(0, 1), st.integers(0, 1000))
def test_decode_of_rows_of_different_lengths(batch, d_sae, d_out, share, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch, d_sae, generator=generator)
    dense *= torch.rand(batch, d_sae, generator=generator) < share
    weights = torch.randn(d_sae, d_out, generator=generator)
    upstream = torch.randn(batch, d_out, generator=generator)

    def decoded(path: str | None) -> tuple[torch.Tensor, ...]:
        W, b = weights.clone().requires_grad_(), torch.ones(d_out, requires_grad=True)
        encoded = Encoded.from_dense(dense)
        acts = encoded.acts.clone().requires_grad_()
        if path is None:
            out = dense.index_put(torch.nonzero(dense, as_tuple=True), acts) @ W + b
        else:
            with kernels.use(path):
                out = kernels.decode_encoded(encoded.with_acts(acts), W, b)
        out.backward(upstream)
        return out.detach(), acts.grad, W.grad, b.grad

    truth = decoded(None)
    for path in ("reference", "auto"):
        for found, wanted in zip(decoded(path), truth, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_adam_agrees_with_the_reference_and_with_torch(rows, columns, n_steps, unit_norm, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=generator)
    start /= start.norm(dim=1, keepdim=True)
    grads = [torch.randn(rows, columns, generator=generator) for _ in range(n_steps)]
    results = []
    for path in ("reference", "auto"):
        param, m, v = start.clone(), torch.zeros(rows, columns), torch.zeros(rows, columns)
        with kernels.use(path):
            for step, grad in enumerate(grads, 1):
                kernels.adam_step(
                    param,
                    grad,
                    m,
                    v,
                    step=step,
                    lr=0.01,
                    betas=(0.9, 0.99),
                    eps=1e-8,
                    grad_scale=1.0,
                    unit_norm=unit_norm,
                )
        results.append(param)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
    if unit_norm:
        torch.testing.assert_close(results[1].norm(dim=1), torch.ones(rows))
    else:
        theirs = start.clone().requires_grad_()
        adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
        for grad in grads:
            theirs.grad = grad
            adam.step()
        torch.testing.assert_close(results[1], theirs.detach(), atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_signum_agrees_with_the_reference(rows, columns, n_steps, unit_norm, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=generator)
    start /= start.norm(dim=1, keepdim=True)
    grads = [torch.randn(rows, columns, generator=generator) for _ in range(n_steps)]
    grads[0][0] = 0.0
    results = []
    for path in ("reference", "auto"):
        param, base, average = start.clone(), start.clone(), start.clone()
        with kernels.use(path):
            for step, grad in enumerate(grads, 1):
                weight = torch.full((rows,), 1 / step)
                kernels.signum_step(
                    param, grad, base, average, weight, lr=0.01, momentum=0.9, unit_norm=unit_norm
                )
        results.append((param, base, average))
    for fast, slow in zip(results[1], results[0], strict=True):
        # one coordinate whose projected gradient is within rounding of 0 may be stepped either way
        differs = (fast - slow).abs() > 1e-5
        assert int(differs.sum()) <= (columns if unit_norm and columns < 3 else 0)
    if unit_norm:
        torch.testing.assert_close(results[1][0].norm(dim=1), torch.ones(rows))


@pytest.mark.parametrize("path", ["reference", "auto"])
def test_frozen_rows_keep_every_bit_and_a_nan_is_passed_on(path):
    generator = torch.Generator().manual_seed(0)
    frozen = torch.tensor([True, False, True, False])
    for unit_norm in (False, True):
        grad = torch.randn(4, 5, generator=generator)
        grad[3, 2] = float("nan")
        with kernels.use(path):
            adam = [torch.randn(4, 5, generator=generator).abs() for _ in range(3)]
            kept = [tensor.clone() for tensor in adam]
            kernels.adam_step(
                adam[0], grad, adam[1], adam[2],
                step=3, lr=0.1, betas=(0.9, 0.99), eps=1e-8, grad_scale=0.5, unit_norm=unit_norm, frozen=frozen,
            )  # fmt: skip
            signum = [torch.randn(4, 5, generator=generator) for _ in range(3)]
            kept += [tensor.clone() for tensor in signum]
            kernels.signum_step(
                *(signum[0], grad, signum[1], signum[2]), torch.full((4,), 0.5),
                lr=0.1, momentum=0.9, unit_norm=unit_norm, frozen=frozen,
            )  # fmt: skip
        for tensor, before in zip(adam + signum, kept, strict=True):
            assert torch.equal(tensor[frozen], before[frozen])
            assert not torch.equal(tensor[1], before[1])
            assert bool(tensor[3].isnan().any())


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 10_000), st.booleans())
def test_every_latent_listed_agrees_with_the_reference_and_with_the_entries(shape, seed, with_threshold):
    batch, d_in, d_sae = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator)
    b_pre, weights = torch.randn(d_in, generator=generator), torch.randn(batch, d_in, generator=generator)
    threshold = torch.rand(d_sae, generator=generator) - 0.3 if with_threshold else None
    found = []
    for path in ("reference", "auto"):
        p = parameters(d_in, d_sae, seed)
        rows = x.clone().requires_grad_()
        with kernels.use(path):
            encoded = kernels.encode_every(rows, p["W_enc"], p["b_enc"], b_pre, threshold)
            (kernels.decode_encoded(encoded, p["W_dec"], p["b_dec"]) * weights).sum().backward()
            counts = kernels.counts(encoded)
        grads = {name: tensor.grad for name, tensor in p.items()} | {"x": rows.grad}
        found.append((encoded, counts, grads))
    (slow, slow_counts, slow_grads), (fast, fast_counts, fast_grads) = found
    near = 1e-5  # rounding decides there which side of its threshold a pre-activation is on
    limit = torch.zeros(d_sae) if threshold is None else threshold
    with torch.no_grad():
        pre_acts = (x - b_pre) @ p["W_enc"] + p["b_enc"]
    assume(bool(((pre_acts - limit).abs() > near).all()))
    torch.testing.assert_close(fast.acts, slow.acts, atol=1e-5, rtol=1e-4)
    assert torch.equal(fast.mask, slow.mask) and torch.equal(fast.indices, slow.indices)
    assert all(torch.equal(a, b) for a, b in zip(slow_counts, fast_counts, strict=True))
    assert torch.equal(fast_counts.per_latent, (fast.to_dense() != 0).sum(0))
    for name, grad in slow_grads.items():
        torch.testing.assert_close(fast_grads[name], grad, atol=1e-4, rtol=1e-3, msg=name)
    # and only what is listed differs from the entries alone
    entries = kernels.encode_threshold(x, p["W_enc"], p["b_enc"], b_pre, threshold)
    torch.testing.assert_close(fast.to_dense(), entries.to_dense(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.compact().to_dense(), fast.to_dense())
    assert torch.equal(fast.compact().row_counts(), fast.mask.view(batch, -1).sum(1))
