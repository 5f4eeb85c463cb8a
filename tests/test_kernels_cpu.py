"""The CPU path's own parts: selections on real numbers, reconstruction errors, buffers, threads; against the truth."""

import gc
import itertools
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import KINDS, products_in

from sememe import dictionaries, kernels
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.encoded import Encoded
from sememe.kernels import cpu, reference
from sememe.kernels.cpu import buffers, encode, pool, sparse_loops, sums
from sememe.kernels.cpu import rough as rough_products
from sememe.kernels.cpu.sums import Transposed

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 150), st.integers(0, 10_000))


def case(batch: int, d_in: int, d_sae: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "x": normal(batch, d_in).requires_grad_(),
        "W_enc": (normal(d_sae, d_in) / d_in**0.5).T.requires_grad_(),
        "b_enc": (0.1 * normal(d_sae) - 0.5).requires_grad_(),
        "b_pre": normal(d_in),
    }


def gradients(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values())), strict=True))


def weighted(dense: torch.Tensor) -> torch.Tensor:
    return (dense * torch.linspace(-1, 2, dense.numel()).view_as(dense)).sum()


@pytest.fixture(params=KINDS)
def rough(request):
    """The rough product."""
    with products_in(request.param):
        yield request.param


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans())
def test_threshold_selection_in_float32_is_the_references(shape, with_threshold):
    p = case(*shape)
    threshold = torch.linspace(-0.2, 0.8, shape[2]) if with_threshold else None
    with products_in("float32"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "DENSE_SHARE", 1.0)
        fast = kernels.encode_threshold(**p, threshold=threshold)
    slow = reference.encode_threshold(**p, threshold=threshold)
    torch.testing.assert_close(fast.to_dense(), slow.to_dense())
    for (name, a), b in zip(
        gradients(weighted(fast.to_dense()), p).items(),
        gradients(weighted(slow.to_dense()), p).values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("outlying", [1.0, 100.0])
def test_threshold_selection_loses_next_to_nothing(monkeypatch, outlying):
    monkeypatch.setattr(encode, "DENSE_SHARE", 1.0)
    p = case(512, 96, 1024, 1)
    with torch.no_grad():
        p["x"][:, 5] = p["b_pre"][5] + outlying * (p["x"][:, 5] - p["b_pre"][5])
        p["x"][100:104, 8] = 30 * outlying  # rows whose other features int8 hardly sees
    fast = kernels.encode_threshold(**p, threshold=torch.full((1024,), 1.0)).to_dense()
    slow = reference.encode_threshold(**p, threshold=torch.full((1024,), 1.0)).to_dense()
    both = (fast > 0) & (slow > 0)
    assert int(both.sum()) > 10_000
    torch.testing.assert_close(fast[both], slow[both], atol=1e-5, rtol=1e-5)
    assert int(((fast > 0) != (slow > 0)).sum()) / int(both.sum()) < 1e-3


def test_many_active_latents_take_the_dense_way_with_the_same_result():
    p = case(64, 16, 100, 2)
    fast, slow = (
        kernels.encode_threshold(**p, threshold=None),
        reference.encode_threshold(**p, threshold=None),
    )
    assert slow.acts.shape[0] > encode.DENSE_SHARE * 6400
    assert torch.equal(fast.to_dense(), slow.to_dense())


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 12))
def test_batch_selection_in_float32_is_the_references(shape, k):
    p = case(*shape)
    n_kept = min(k, shape[2]) * shape[0]
    with products_in("float32"):
        fast = kernels.encode_batch_topk(**p, n_kept=n_kept)
    slow, least = reference.encode_batch_topk(**p, n_kept=n_kept)
    assert fast.encoded.acts.shape == slow.acts.shape == (n_kept,)
    torch.testing.assert_close(fast.encoded.to_dense(), slow.to_dense())
    torch.testing.assert_close(fast.threshold, least)
    for (name, a), b in zip(
        gradients(weighted(fast.encoded.to_dense()), p).items(),
        gradients(weighted(slow.to_dense()), p).values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_batch_selection_finds_more_when_the_probed_rows_mislead():
    """Every row that is looked at first is large, and all others small: the first bound keeps far too few."""
    p = case(256, 8, 64, 3)
    x = p["x"].detach() * 1e-3
    x[:: 256 // encode.N_PROBE_ROWS] *= 1e5
    p |= {"x": x, "b_pre": torch.zeros(8), "b_enc": torch.zeros(64)}
    fast, slow = kernels.encode_batch_topk(**p, n_kept=2560), reference.encode_batch_topk(**p, n_kept=2560)
    assert fast.encoded.acts.shape == (2560,)
    shared = (fast.encoded.to_dense() > 0) & (slow[0].to_dense() > 0)
    assert int(shared.sum()) > 0.999 * 2560


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 4), st.booleans())
def test_reconstruction_errors_are_the_references(shape, n_borders, rows_differ):
    batch, d_out, d_sae, seed = shape
    generator = torch.Generator().manual_seed(seed)
    dense = torch.relu(torch.randn(batch, d_sae, generator=generator) - 1.9)
    encoded = Encoded.from_dense(dense)
    if not rows_differ:
        k = min(3, d_sae)
        indices = torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(batch)]).int()
        encoded = Encoded.from_topk(torch.rand(batch, k, generator=generator), indices, d_sae)
    p = {
        "acts": encoded.acts.clone().requires_grad_(),
        "W_dec": torch.randn(d_sae, d_out, generator=generator).requires_grad_(),
        "b_dec": torch.randn(d_out, generator=generator).requires_grad_(),
        "target": torch.randn(batch, d_out, generator=generator).requires_grad_(),
    }
    ends = sorted({1 + seed * (i + 1) % d_sae for i in range(n_borders)} | {d_sae}) if n_borders else None
    results = []
    for path in ("reference", "auto"):
        with kernels.use(path):
            found = kernels.reconstruct(
                encoded.with_acts(p["acts"]), p["W_dec"], p["b_dec"], p["target"], ends
            )
            results.append((found, gradients(3 * found.mse, p)))
    (slow, slow_grads), (fast, fast_grads) = results
    torch.testing.assert_close(fast.mse, slow.mse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.mses, slow.mses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.error, slow.error, atol=1e-4, rtol=1e-4)
    assert len(fast.mses) == len(ends or [1])
    for name, grad in slow_grads.items():
        torch.testing.assert_close(
            fast_grads[name], grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_large_rows_use_several_tiles_and_keep_their_order(monkeypatch, rough):
    monkeypatch.setattr(rough_products, "TILE", 64 * 300)
    monkeypatch.setattr(rough_products, "TILE_INT8", 64 * 300)
    monkeypatch.setattr(rough_products, "TILE_FLOAT32", 64 * 300)
    p = case(1000, 24, 300, 4)
    acts, indices = kernels.encode_topk(**p, k=5)
    slow_acts, _ = reference.encode_topk(**p, k=5)
    torch.testing.assert_close(acts.sort(1).values, slow_acts.sort(1).values, atol=2e-2, rtol=1e-2)
    exact = ((p["x"] - p["b_pre"]) @ p["W_enc"] + p["b_enc"]).gather(1, indices.long())
    torch.testing.assert_close(acts, exact.relu(), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("rough")
def test_nan_is_not_lost():
    p = {name: value.detach() for name, value in case(3, 9, 300, 5).items()}
    x, W = p["x"].clone(), p["W_enc"].clone()
    x[1, 2], W[4, 250] = float("nan"), -float("nan")
    for changed, rows in (({"x": x}, [1]), ({"W_enc": W}, [0, 1, 2])):
        for threshold in (None, torch.full((300,), 2.0)):
            found = kernels.encode_threshold(**(p | changed), threshold=threshold)
            assert found.row_ids()[found.acts.isnan()].unique().tolist() == rows
        found = kernels.encode_batch_topk(**(p | changed), n_kept=9).encoded
        assert bool(found.acts.isnan().any())


def _selected(choose, **options):
    """What a selection gives for 512 rows, and its gradients."""
    p = case(512, 24, 300, 3)
    found = choose(**p, **options)
    acts = found.encoded.acts if isinstance(found, kernels.BatchTopK) else found.acts
    return [acts.detach(), *gradients(weighted(acts), p).values()]


def _reconstructed():
    p = case(512, 24, 300, 3)
    encoded = kernels.encode_batch_topk(
        **{name: one.detach() for name, one in p.items()}, n_kept=4096
    ).encoded
    leaves = {"acts": encoded.acts.requires_grad_(), "W": p["W_enc"].detach().T.contiguous().requires_grad_()}
    found = kernels.reconstruct(
        encoded.with_acts(leaves["acts"]), leaves["W"], torch.zeros(24), p["x"].detach(), [100, 300]
    )
    return [found.mse.detach(), found.error.detach(), *gradients(found.mse, leaves).values()]


def _stepped(function, n_slots, **options):
    generator = torch.Generator().manual_seed(0)
    param, grad, *slots = (torch.rand(3000, 40, generator=generator) for _ in range(2 + n_slots))
    weight = (torch.rand(3000, generator=generator),) if function is kernels.signum_step else ()
    function(param, grad, *slots, *weight, lr=0.01, unit_norm=True, **options)
    return [param, *slots]


ADAM = {"step": 3, "betas": (0.9, 0.999), "eps": 1e-8, "grad_scale": 0.5}
TWICE = {
    "threshold": lambda: _selected(kernels.encode_threshold, threshold=torch.full((300,), 0.5)),
    "dense threshold": lambda: _selected(kernels.encode_threshold, threshold=None),
    "batch_topk": lambda: _selected(kernels.encode_batch_topk, n_kept=4096),
    "abs_topk": lambda: _selected(kernels.encode_abs_topk, k=8),
    "group_max": lambda: _selected(kernels.encode_group_max, n_groups=10),
    "reconstruct": _reconstructed,
    "adam_step": lambda: _stepped(kernels.adam_step, 2, **ADAM),
    "signum_step": lambda: _stepped(kernels.signum_step, 2, momentum=0.9),
}


@pytest.mark.parametrize("name", sorted(TWICE))
def test_same_bits_twice_with_several_threads(name):
    cpu.set_threads(2)
    first, second = TWICE[name](), TWICE[name]()
    assert any(bool((one != 0).any()) for one in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_buffer_is_used_again_only_when_nobody_holds_it():
    shape = (buffers.SMALLEST // 64, 64)
    first = torch.from_numpy(buffers.empty(*shape))
    first.fill_(1.0)
    place = first.data_ptr()
    view = first[3:]
    del first
    other = torch.from_numpy(buffers.empty(*shape))
    assert other.data_ptr() != place  # a view still holds it
    other.fill_(2.0)
    assert float(view.min()) == 1.0
    del view
    gc.collect()
    assert torch.from_numpy(buffers.empty(*shape)).data_ptr() == place


def test_no_more_shapes_are_kept_than_said():
    for n in range(buffers.N_SHAPES + 5):
        buffers.empty(buffers.SMALLEST + n)
    assert len(buffers._kept) <= buffers.N_SHAPES


def test_ranges_cover_everything_once_and_come_back_in_order():
    cpu.set_threads(2)
    ranges = pool.run(lambda start, stop: (start, stop), 1000, 64)
    assert ranges[0] == (0, 64) and ranges[-1] == (992, 1000)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


def test_ranges_are_small_at_the_end():
    sizes = [stop - start for start, stop in pool._ranges(4096, 256)]
    assert sizes == [256] * 13 + [128] * 4 + [64] * 4


def test_an_error_in_a_range_is_raised_and_the_threads_go_on():
    def task(start: int, stop: int) -> int:
        if start == 96:
            raise ValueError("in a range")
        return start

    with pytest.raises(ValueError, match="in a range"):
        pool.run(task, 200, 64)
    assert pool.run(lambda start, stop: start, 100, 64)[0] == 0


def test_workers_run_torch_on_one_thread_and_leave_its_setting_alone():
    before = torch.get_num_threads()
    cpu.set_threads(2)
    barrier = threading.Barrier(2)

    def task(start: int, stop: int) -> int:
        barrier.wait(timeout=30)  # both workers take part
        return torch.get_num_threads()

    assert pool.run(task, 2, 1) == [1, 1]
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    pool.run(lambda start, stop: start, 4, 1)
    child = os.fork()
    if child == 0:
        os._exit(0 if pool.run(lambda start, stop: start, 4, 1) == [0, 1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_silent_rows_fill_up_like_the_reference():
    x, W = torch.zeros(3, 4), torch.ones(10, 4).T
    found = kernels.encode_batch_topk(x, W, -torch.ones(10), torch.zeros(4), 6)
    slow, least = reference.encode_batch_topk(x, W, -torch.ones(10), torch.zeros(4), 6)
    assert found.encoded.indices.tolist() == slow.indices.tolist()
    assert found.encoded.row_ptr.tolist() == slow.row_ptr.tolist()
    assert float(found.threshold) == float(least) == 0.0
    assert np.all(found.encoded.acts.numpy() == 0)


# -- int8 --------------------------------------------------------------------------------------------


def shared(p: dict[str, torch.Tensor], k: int) -> float:
    """Share of the truth's active latents that int8 keeps."""
    p = p | {"W_enc": p["W_enc"].detach().requires_grad_()}  # int8 is for training
    with products_in("int8"):
        fast = Encoded.from_topk(*kernels.encode_topk(**p, k=k), p["W_enc"].shape[1]).to_dense()
    slow = Encoded.from_topk(*reference.encode_topk(**p, k=k), p["W_enc"].shape[1]).to_dense()
    torch.testing.assert_close(
        fast[(fast > 0) & (slow > 0)], slow[(fast > 0) & (slow > 0)], atol=1e-4, rtol=1e-4
    )
    return float(((fast > 0) & (slow > 0)).sum() / (slow > 0).sum())


def test_outlying_features_cost_int8_no_precision():
    """Three features are 200 times as large as the others, as in language models; few latents look at them."""
    p = case(512, 96, 2048, 4)
    x, W = p["x"].detach().clone(), p["W_enc"].detach().clone()
    x[:, [3, 40, 77]] *= 200
    W[[3, 40, 77]] /= 200
    p |= {"x": x, "W_enc": W, "b_pre": torch.zeros(96)}
    assert shared(p, 32) > 0.999
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rough_products, "_evened", lambda x, weights: np.ones(x.shape[1], np.float32))
        assert shared(p, 32) < 0.9  # so it is the evening out that does it


def test_rows_that_int8_does_not_resolve_are_ranked_in_bfloat16():
    p = case(200, 512, 2048, 5)
    x = p["x"].detach().clone()
    x[17, 100], x[150, 9] = 5e3, -2e4  # what the others add is lost beside them
    p |= {"x": x, "b_pre": torch.zeros(512)}
    product = rough_products.Int8(x, p["W_enc"].detach().T.contiguous())
    for start in range(0, 200, 50):
        product.tile(start, start + 50)
    assert product.unresolved().tolist() == [17, 150]
    assert shared({name: value[[17, 150]] if name == "x" else value for name, value in p.items()}, 32) > 0.98
    assert shared(p, 32) > 0.999


def test_int8_is_taken_in_training_only_and_not_where_many_latents_peak():
    p = {name: value.detach() for name, value in case(64, 600, 1024, 6).items()}
    W = p["W_enc"].T.contiguous()
    with products_in("int8"):
        assert isinstance(rough_products.product_of(p["x"], W, True), rough_products.Int8)
        assert isinstance(rough_products.product_of(p["x"], W, False), rough_products.Wide)
        W[5, 7] = 100.0
        assert isinstance(rough_products.product_of(p["x"], W, True), rough_products.Int8)
        W[:20, 7] = 100.0
        assert isinstance(rough_products.product_of(p["x"], W, True), rough_products.Wide)


def test_outside_training_a_row_is_encoded_as_if_alone():
    p = {name: value.detach() for name, value in case(300, 64, 700, 7).items()}
    together = kernels.encode_topk(**p, k=8)
    for row in (0, 17, 299):
        alone = kernels.encode_topk(**(p | {"x": p["x"][row : row + 1]}), k=8)
        assert torch.equal(alone.acts[0], together.acts[row])
        assert torch.equal(alone.indices[0], together.indices[row])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 10_000), st.booleans(), st.data())
def test_marking_the_largest_is_the_references(batch, n, seed, signed, data):
    k = data.draw(st.integers(1, n))
    values = torch.randn(batch, n, generator=torch.Generator().manual_seed(seed))
    if data.draw(st.booleans()):
        values = (2 * values).round()  # ties and zeros
    if data.draw(st.booleans()):
        values[0, n // 2] = float("nan")
    values = values.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    assert torch.equal(kernels.largest(values, k, signed=signed), reference.largest(values, k, signed=signed))


def test_large_pages_change_nothing_but_the_place():
    for tensor in (torch.randn(1500, 1000), torch.randn(1500, 1000).T, torch.randn(3, 700, 900)):
        moved = kernels.in_large_pages(tensor)
        assert torch.equal(moved, tensor) and moved.stride() == tensor.stride()
        assert moved.data_ptr() != tensor.data_ptr() and moved.data_ptr() % buffers.LINE == 0
    for tensor in (torch.randn(10), torch.randn(1500, 2000)[:, ::2]):
        assert kernels.in_large_pages(tensor) is tensor


def test_entries_are_sorted_again_once_they_are_others():
    def sorted_by_hand(indices, ptr, d_sae):
        rows = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr.numpy()))
        order = np.argsort(indices.numpy(), kind="stable")
        starts = np.searchsorted(indices.numpy()[order], np.arange(d_sae + 1))
        return starts, order, rows[order]

    generator = torch.Generator().manual_seed(0)
    ptr = torch.tensor([0, 3, 3, 8])
    indices = torch.randint(0, 5, (8,), generator=generator).int()
    first = Transposed.of(indices, ptr, 5)
    assert Transposed.of(indices.detach(), ptr.clone(), 5) is first, (
        "the encoder's gradient asks for it again"
    )

    def check(d_sae=5):
        for ours, expected in zip(
            Transposed.of(indices, ptr, d_sae), sorted_by_hand(indices, ptr, d_sae), strict=True
        ):
            np.testing.assert_array_equal(ours, expected)

    check()
    check(d_sae=7)
    indices[0] = 4 - indices[0]  # in place
    check()
    ptr[1] = 2
    check()
    for _ in range(20):
        before = indices.data_ptr()
        del indices
        indices = torch.randint(0, 5, (8,), generator=generator).int()
        assert indices.data_ptr() != before, "what was sorted last is held: its memory becomes nobody else's"
        check()


@pytest.mark.parametrize("width", [5, 64])
def test_vectors_kept_at_hand_change_no_sum(width, monkeypatch):
    """Many entries: blocks of rows for the gradients, tiles of latents for the encoder; against single ones."""
    p = case(70, width, 90, 3)
    with torch.no_grad():
        p["b_enc"].add_(1.0)
    found = []
    monkeypatch.setattr(sums, "CACHED", 4 * width * 16)
    for many in (10**9, 0):
        monkeypatch.setattr(sums, "MANY", many)
        monkeypatch.setattr(encode, "MANY", many)
        monkeypatch.setattr(encode, "DENSE_SHARE", 1.0)
        encoded = kernels.encode_threshold(**p, threshold=None)
        found.append((encoded.to_dense(), gradients(weighted(encoded.to_dense()), p)))
    (one, slow), (other, fast) = found
    torch.testing.assert_close(one, other)
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ascending", [True, False])
def test_reconstruction_by_tiles_is_the_plain_one_in_any_order(ascending, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    W, b, target = (torch.randn(*shape, generator=generator) for shape in ((90, 7), (7,), (40, 7)))
    indices = torch.stack([torch.randperm(90, generator=generator)[:30] for _ in range(40)])
    indices = (indices.sort(1).values if ascending else indices).to(torch.int32)
    monkeypatch.setattr(sums, "CACHED", 4 * 7 * 16)
    monkeypatch.setattr(kernels, "DENSE_SHARE", 2.0)
    found = []
    for many in (10**9, 0):
        monkeypatch.setattr(sums, "MANY", many)
        acts = torch.rand(40, 30, generator=torch.Generator().manual_seed(1)).requires_grad_()
        W_dec = W.clone().requires_grad_()
        encoded = Encoded(acts.view(-1), indices.view(-1), torch.arange(0, 1201, 30), 90)
        mse, _, error = kernels.reconstruct(encoded, W_dec, b, target)
        found.append((mse.detach(), error.detach(), *torch.autograd.grad(mse, (acts, W_dec))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("n_rows", [0, 1, 300])
def test_blocks_sort_and_mark_as_one(n_rows, monkeypatch):
    generator = torch.Generator().manual_seed(n_rows)
    counts = torch.randint(0, 9, (n_rows,), generator=generator)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices = torch.randint(0, 40, (int(ptr[-1]),), generator=generator).int()
    acts = torch.randint(0, 2, indices.shape, generator=generator).float()
    encoded = Encoded(acts, indices, ptr, 60)
    assert torch.equal(kernels.fired(encoded), reference.fired(encoded))
    assert int(kernels.fired(encoded).sum()) == len(set(indices[acts != 0].tolist()))
    order = np.argsort(indices.numpy(), kind="stable")
    for least in (1, 100, 10**6):
        monkeypatch.setattr(sums, "LEAST_BLOCK", least)
        found = Transposed._sorted(indices.numpy(), ptr.numpy(), 60)
        np.testing.assert_array_equal(found.entries, order)
        np.testing.assert_array_equal(found.rows, encoded.row_ids().numpy()[order])
        np.testing.assert_array_equal(found.starts[1:], np.bincount(indices, minlength=60).cumsum())


@pytest.mark.parametrize(
    "config", [TopKConfig(k=3, d_sae=40), ReLUConfig(d_sae=400)], ids=lambda config: config.kind
)
def test_a_step_sorts_its_entries_once(config, monkeypatch):
    counted, place = [], sparse_loops.place_entries
    monkeypatch.setattr(sparse_loops, "place_entries", lambda *parts: (counted.append(1), place(*parts)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    dictionary = dictionaries.build(config, 16, 16)
    dictionary.initialise(x, x, generator)
    if config.kind == "relu":
        with torch.no_grad():
            dictionary.b_enc.sub_(8.0)  # few are active
    dictionary.loss(x, x, 0.5).total.backward()
    assert len(counted) == 1
