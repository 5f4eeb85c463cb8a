"""The GPU's kernels against the reference: values, gradients per parameter, ties, odd shapes, same bits.

Without a CUDA device Triton's interpreter runs them on the CPU: the same source, slowly, so shapes are small, and
tiles and blocks are made small with them. That they compile for the device is a test of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from sememe import dictionaries, kernels
from sememe.dictionaries.abs_topk import AbsTopKConfig
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.group_max import GroupMaxConfig
from sememe.dictionaries.matryoshka import MatryoshkaConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.encoded import Encoded
from sememe.kernels import gpu, reference
from sememe.kernels.gpu import groups, optimiser, selection, signum, sparse, varying
from sememe.optimiser import Adam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_EXAMPLES = 10


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TILE", 16)
        patch.setattr(sparse, "BLOCK", 16)
        patch.setattr(sparse, "ENTRIES", 4)
        yield


def case(batch: int, d_in: int, d_sae: int, seed: int, whole: bool = False) -> dict[str, torch.Tensor]:
    """Random numbers; or small integers, so that ties and exact zeros are common and every sum is exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).float().to(DEVICE)
        return torch.randn(shape, generator=generator).to(DEVICE)

    return {
        "x": draw(batch, d_in).requires_grad_(),
        "W_enc": (draw(d_sae, d_in) / (1 if whole else d_in**0.5)).T.requires_grad_(),
        "b_enc": draw(d_sae).requires_grad_(),
        "b_pre": draw(d_in),
        "W_dec": draw(d_sae, d_in).requires_grad_(),
        "b_dec": draw(d_in).requires_grad_(),
    }


def inputs(p: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return p["x"], p["W_enc"], p["b_enc"], p["b_pre"]


def pre_acts_of(p: dict[str, torch.Tensor]) -> torch.Tensor:
    x, W, b, b_pre = inputs(p)
    return (x - b_pre) @ W + b


def check(encoded: Encoded, keep: torch.Tensor, p: dict[str, torch.Tensor], rectified: bool) -> None:
    """The entries are the pre-activations where `keep` is, and all gradients those of the masked dense ones."""
    dense = pre_acts_of(p) * keep
    dense = torch.relu(dense) if rectified else dense
    found = encoded.to_dense()
    torch.testing.assert_close(found, dense)
    recons = (
        gpu.decode_encoded(encoded, p["W_dec"], p["b_dec"]),
        dense @ p["W_dec"] + p["b_dec"],
    )
    torch.testing.assert_close(*recons, atol=1e-4, rtol=1e-4)
    names = [name for name in p if name != "b_pre"]
    grads = [torch.autograd.grad((recon - 1).square().sum(), [p[n] for n in names]) for recon in recons]
    for name, got, wanted in zip(names, *grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def mask_of(shape: torch.Size, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bool, device=indices.device).scatter_(1, indices.long(), True)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 24), st.integers(0, 10_000))
"""One or two blocks of features, one or two tiles of latents, whole or not; three tiles and more have their own."""


@settings(max_examples=N_EXAMPLES, deadline=None)
@given(shapes, st.booleans(), st.data())
def test_topk(shape, whole, data):
    p = case(*shape, whole=whole)
    k = data.draw(st.integers(1, shape[2]))
    acts, indices = gpu.encode_topk(*inputs(p), k)
    assert acts.shape == indices.shape == (shape[0], k)
    pre = pre_acts_of(p).detach()
    if whole:  # bfloat16 is exact: the same latents, ties to the lower index, without exception
        keep = mask_of(pre.shape, reference.encode_topk(*inputs(p), k)[1])
    else:  # bfloat16 may rank a latent lower, but then by no more than rounding
        keep = mask_of(pre.shape, indices) & (Encoded.from_topk(acts, indices, shape[2]).to_dense() > 0)
        missed = torch.relu(pre).masked_fill(keep, 0).amax(1)
        rounding = 2**-7 * (p["x"] - p["b_pre"]).norm(dim=1) * p["W_enc"].norm(dim=0).max()
        assert bool((missed <= acts.amin(1) + rounding + 1e-5).all())
    check(Encoded.from_topk(acts, indices, shape[2]), keep, p, rectified=True)


@settings(max_examples=N_EXAMPLES, deadline=None)
@given(shapes, st.data())
def test_abs_topk(shape, data):
    p = case(*shape, whole=True)
    k = data.draw(st.integers(1, shape[2]))
    acts, indices = gpu.encode_abs_topk(*inputs(p), k)
    wanted = reference.encode_abs_topk(*inputs(p), k)
    order = indices.argsort(dim=1), wanted[1].argsort(dim=1)
    assert torch.equal(indices.gather(1, order[0]), wanted[1].gather(1, order[1]))
    check(
        Encoded.from_topk(acts, indices, shape[2]),
        mask_of(pre_acts_of(p).shape, wanted[1]),
        p,
        rectified=False,
    )


@settings(max_examples=N_EXAMPLES // 2, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 7), st.integers(1, 20), st.integers(0, 10_000))
@example(1, 3, 2, 37, 0)
def test_group_max(batch, d_in, n_groups, size, seed):
    """Several groups in a tile of 16, or several tiles in a group; every group has its latent, positive or not."""
    p = case(batch, d_in, n_groups * size, seed, whole=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "ELEMENTS", 8)
        acts, indices = gpu.encode_group_max(*inputs(p), n_groups)
    wanted = reference.encode_group_max(*inputs(p), n_groups)
    assert torch.equal(indices, wanted[1]) and torch.equal(acts, wanted[0])
    keep = mask_of(pre_acts_of(p).shape, indices)
    check(Encoded.from_topk(acts, indices, n_groups * size), keep, p, rectified=True)


def test_the_largest_of_a_group_is_decided_in_float32():
    """Of latents that bfloat16 cannot tell apart, and of two tiles."""
    p = case(1, 20, 40, 5)
    nearly = 1 + 1e-4 * torch.randn(40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        p["W_enc"].copy_(p["W_enc"][:, :1] * nearly)
        p["b_enc"].zero_()
    wanted = reference.encode_group_max(*inputs(p), 2)[0]
    few = gpu.encode_group_max(*inputs(p), 2)[0]
    assert bool((few >= 0.99 * wanted).all()), "four of each tile lose no more than rounding"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "KEPT", 16)  # all of a tile: bfloat16 decides nothing
        torch.testing.assert_close(gpu.encode_group_max(*inputs(p), 2)[0], wanted)


@settings(max_examples=N_EXAMPLES, deadline=None)
@given(shapes, st.booleans(), st.booleans(), st.data())
def test_threshold(shape, whole, with_threshold, data):
    p = case(*shape, whole=whole)
    threshold = torch.linspace(-2, 3, shape[2]).round().to(DEVICE) if with_threshold else None
    wanted = reference.encode_threshold(*inputs(p), threshold)
    capacity = data.draw(st.integers(max(1, wanted.acts.shape[0]), shape[0] * shape[2] + 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varying, "ROW_SHARE", shape[2])  # no row overflows
        encoded = gpu.encode_threshold(*inputs(p), threshold, capacity)
    assert encoded.acts.shape == (capacity,)
    assert not bool(encoded.overflow)
    assert torch.equal(encoded.row_ptr, wanted.row_ptr)
    assert torch.equal(encoded.compact().indices, wanted.indices)
    keep = pre_acts_of(p).detach() > (0 if threshold is None else threshold)
    check(encoded, keep, p, rectified=False)


def test_too_many_entries_raise_the_flag_and_the_rest_is_true():
    p = case(4, 3, 50, 0, whole=True)
    wanted = reference.encode_threshold(*inputs(p), None)
    n = wanted.acts.shape[0]
    for capacity, share in ((n - 1, 50), (n, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(varying, "ROW_SHARE", share)
            encoded = gpu.encode_threshold(*inputs(p), None, capacity)
        assert bool(encoded.overflow)
        found = encoded.to_dense()
        assert bool(((found == 0) | (found == wanted.to_dense())).all())
    fitted = reference.fit(wanted, n - 1)
    assert bool(fitted.overflow) and int(fitted.row_ptr[-1]) == n - 1


@settings(max_examples=N_EXAMPLES, deadline=None)
@given(shapes, st.data())
def test_batch_topk(shape, data):
    p = case(*shape, whole=True)
    n_kept = data.draw(st.integers(1, shape[0] * shape[2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varying, "ROW_SHARE", shape[2])
        encoded, threshold = gpu.encode_batch_topk(*inputs(p), n_kept)
    wanted, lowest = reference.encode_batch_topk(*inputs(p), n_kept)
    assert encoded.acts.shape == (n_kept,)
    assert not bool(encoded.overflow)
    assert float(threshold) == float(lowest)
    positive = wanted.to_dense() > 0
    assert torch.equal(encoded.row_counts(), positive.sum(1))
    check(encoded, positive, p, rectified=True)


def test_a_row_with_more_than_its_share_of_a_batch_raises_the_flag():
    p = case(40, 3, 64, 0)
    p["x"] = torch.zeros(40, 3, device=DEVICE)
    p["x"][7] = 50.0
    p["b_enc"] = torch.zeros(64, device=DEVICE)
    p["b_pre"] = torch.zeros(3, device=DEVICE)
    encoded, _ = gpu.encode_batch_topk(*inputs(p), 40)  # 16 per row at most, of about 32 positive ones
    assert bool(encoded.overflow)
    assert int(encoded.row_counts()[7]) == 16


@pytest.mark.parametrize("encode", ["topk", "abs_topk", "group_max", "threshold", "batch_topk"])
def test_rows_of_zeros_and_a_batch_of_one(encode):
    for batch in (1, 3):
        p = case(batch, 5, 40, 1)
        p["x"] = p["b_pre"].expand(batch, 5).clone().requires_grad_()
        p["b_enc"] = torch.full((40,), -1.0, device=DEVICE).requires_grad_()
        if encode == "threshold":
            encoded = gpu.encode_threshold(*inputs(p), None, 12)
        elif encode == "batch_topk":
            encoded = gpu.encode_batch_topk(*inputs(p), 2 * batch)[0]
        else:
            encoded = Encoded.from_topk(*getattr(gpu, f"encode_{encode}")(*inputs(p), 2), 40)
        keep = torch.zeros(batch, 40, dtype=torch.bool, device=DEVICE)
        if encode == "abs_topk":
            keep[:, :2] = True  # all are -1: ties go to the lower latents
        check(encoded, keep, p, rectified=False)


def test_more_tiles_than_one_and_rising_latents():
    """Each tile pushes all earlier candidates out."""
    W = torch.arange(1.0, 101.0, device=DEVICE)[:, None].T
    x = torch.ones(2, 1, device=DEVICE)
    acts, indices = gpu.encode_topk(x, W, torch.zeros(100, device=DEVICE), torch.zeros(1, device=DEVICE), 20)
    assert indices[1].tolist() == list(range(99, 79, -1))
    assert acts[1].tolist() == list(range(100, 80, -1))


ENCODERS = {
    "topk": lambda path, p: Encoded.from_topk(*path.encode_topk(*inputs(p), 3), 40),
    "abs_topk": lambda path, p: Encoded.from_topk(*path.encode_abs_topk(*inputs(p), 3), 40),
    "group_max": lambda path, p: Encoded.from_topk(*path.encode_group_max(*inputs(p), 4), 40),
    "threshold": lambda path, p: path.encode_threshold(*inputs(p), None, *[160] * (path is gpu)),
    "batch_topk": lambda path, p: path.encode_batch_topk(*inputs(p), 12)[0],
}


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize("where", ["row", "latent"])
def test_a_nan_is_not_lost(encode, where):
    """Of either sign it is the largest value: it takes all that its row keeps, and every row keeps a latent of it."""
    p = case(4, 8, 40, 0)
    with torch.no_grad():
        if where == "row":
            p["x"][1, 3], p["x"][2, 3] = torch.nan, -torch.nan
        else:
            p["W_enc"][:, [12, 33]] = 0.0  # silent otherwise, in the first and the last of the tiles
            p["b_enc"][[12, 33]] = 0.0
            p["W_enc"][5, 12], p["W_enc"][5, 33] = torch.nan, -torch.nan
    encoded, wanted = (ENCODERS[encode](path, p) for path in (gpu, reference))
    found, true = (one.detach().to_dense().isnan() for one in (encoded, wanted))
    assert torch.equal(found, true)
    of_rows = {"threshold": 80, "batch_topk": 12, "group_max": 8}.get(encode, 6)
    assert found.sum() == {"row": of_rows, "latent": 8}[where]
    loss = gpu.decode_encoded(encoded, p["W_dec"], p["b_dec"]).square().mean()
    assert bool(loss.isnan())
    assert bool(torch.autograd.grad(loss, [p["W_enc"]])[0].isnan().any())


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_a_transcoders_step_on_a_nan_does_not_look_fine(kind, monkeypatch):
    """Its target is finite, so that only the latents can tell."""
    monkeypatch.setattr(kernels, "path_for", lambda _: "gpu")
    architecture = {"topk": TopKConfig, "batch_topk": BatchTopKConfig}[kind](k=3, d_sae=24)
    dictionary = dictionaries.build(architecture, 8, 8).to(DEVICE)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    target = x.clone()
    x[1, 2] = torch.nan
    loss = dictionary.loss(x, target, 0.0)
    loss.total.backward()
    assert bool(loss.total.isnan()) and bool(dictionary.W_enc.grad.isnan().any())


def test_each_of_several_dictionaries_has_its_own_overflow():
    """Only the second has a row with more than its share of the batch."""
    x = torch.zeros(2, 8, 3, device=DEVICE)
    x[1, 7] = 50.0
    W = case(1, 3, 64, 0)["W_enc"].detach().T.repeat(2, 1, 1).mT
    b, b_pre = torch.zeros(2, 64, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    encoded, _ = gpu.encode_batch_topk(x, W, b, b_pre, 8)
    assert encoded.overflow is not None and encoded.overflow.tolist() == [False, True]


def test_a_latents_value_has_the_gradients_of_its_entries():
    """Of a buffer with room to spare; a latent without an entry has none."""
    p = case(3, 5, 20, 2, whole=True)
    encoded = gpu.encode_threshold(*inputs(p), None, 50).detach()
    values = torch.randn(20, device=DEVICE, requires_grad=True)
    weights = torch.randn(50, device=DEVICE).masked_fill(~encoded.stored(), 0.0)
    found, wanted = gpu.of_entries(values, encoded.indices), values[encoded.indices.long()]
    assert torch.equal(found, wanted)
    grads = [torch.autograd.grad((one * weights).sum(), values)[0] for one in (found, wanted)]
    torch.testing.assert_close(*grads)
    absent = torch.ones(20, dtype=torch.bool, device=DEVICE)
    absent[encoded.indices[encoded.stored()].long()] = False
    assert bool((grads[0][absent] == 0).all())


def test_same_bits_twice():
    p = case(3, 20, 40, 3)
    encoders = {
        "topk": lambda: Encoded.from_topk(*gpu.encode_topk(*inputs(p), 6), 40),
        "group_max": lambda: Encoded.from_topk(*gpu.encode_group_max(*inputs(p), 8), 40),
        "threshold": lambda: gpu.encode_threshold(*inputs(p), None, 120),
        "batch_topk": lambda: gpu.encode_batch_topk(*inputs(p), 18)[0],
    }
    names = [name for name in p if name != "b_pre"]
    for name, encode in encoders.items():
        runs = []
        for _ in range(2):
            encoded = encode()
            recon = gpu.decode_encoded(encoded, p["W_dec"], p["b_dec"])
            grads = torch.autograd.grad(recon.square().sum(), [p[n] for n in names])
            runs.append((encoded.acts, encoded.indices, recon, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), name


@settings(max_examples=N_EXAMPLES, deadline=None)
@given(st.integers(1, 7), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 1000))
def test_adam(rows, columns, n_steps, unit_norm, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=generator)
    start = (start / start.norm(dim=1, keepdim=True)).to(DEVICE)
    grads = [torch.randn(rows, columns, generator=generator).to(DEVICE) for _ in range(n_steps)]
    results = []
    for step_of in (reference.adam_step, gpu.adam_step):
        state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
        for step, grad in enumerate(grads, 1):
            step_of(state[0], grad, *state[1:], step, 0.01, (0.9, 0.99), 1e-8, 0.5, unit_norm, None)
        results.append(state)
    for name, slow, fast in zip(("param", "exp_avg", "exp_avg_sq"), *results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # with the scale on the device: the same bits; frozen rows: those, or what they were
    scale = torch.full((), 0.5, device=DEVICE)
    frozen = torch.arange(rows, device=DEVICE) % 2 == 0
    for mask in (None, frozen):
        state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
        for step, grad in enumerate(grads, 1):
            gpu.adam_step(state[0], grad, *state[1:], step, 0.01, (0.9, 0.99), 1e-8, scale, unit_norm, mask)
        before = (start, torch.zeros_like(start), torch.zeros_like(start))
        for now, free, old in zip(state, results[1], before, strict=True):
            assert torch.equal(now, free if mask is None else torch.where(mask[:, None], old, free))


@settings(max_examples=N_EXAMPLES, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_signum(rows, columns, n_steps, unit_norm, freeze, seed):
    """Gradients of 0 move nothing; frozen rows keep every bit; the rest is the reference's."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=generator)
    start = (start / start.norm(dim=1, keepdim=True)).to(DEVICE)
    grads = [
        torch.randint(-2, 3, (rows, columns), generator=generator).float().to(DEVICE) for _ in range(n_steps)
    ]
    weight = torch.rand(rows, generator=generator).to(DEVICE)
    frozen = torch.arange(rows, device=DEVICE) % 2 == 0 if freeze else None
    results = []
    for step_of in (reference.signum_step, gpu.signum_step):
        state = [start.clone() for _ in range(3)]
        for grad in grads:
            # a radial part that is 0 but for rounding would have a sign: of unit rows only what is clear of it
            step_of(
                state[0],
                grad + 0.01 if unit_norm else grad,
                *state[1:],
                weight,
                0.01,
                0.95,
                unit_norm,
                frozen,
            )
        results.append(state)
    for name, slow, fast in zip(("param", "base", "average"), *results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        if frozen is not None:
            assert torch.equal(fast[frozen], start[frozen])
    if not unit_norm:
        resting = grads[0] == 0
        one = [start.clone() for _ in range(3)]
        gpu.signum_step(one[0], grads[0], *one[1:], weight, 0.01, 0.95, False, None)
        assert torch.equal(one[1][resting], start[resting])
    bad = [torch.ones(1, 2, device=DEVICE) for _ in range(4)]
    bad[1][0, 1] = torch.nan
    gpu.signum_step(*bad, torch.ones(1, device=DEVICE), 0.01, 0.95, False, None)
    assert bad[0].isnan().tolist() == [[False, True]], "a NaN is not lost"


@pytest.mark.slow  # each kernel through the compiler
def test_every_kernel_compiles_for_a_gpu_even_where_there_is_none(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    of_triton = "ignore:AnnAssign.__init__ missing:DeprecationWarning"  # under Python 3.13
    options = ["-W", "error", "-W", of_triton]
    program = [sys.executable, *options, str(Path(__file__).with_name("triton_compiles.py"))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    names = [
        name
        for module in (groups, optimiser, selection, signum, sparse)
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and value.fn.__module__ == module.__name__
    ]
    assert sorted(done.stdout.split()) == sorted(names), done.stderr
    assert names


@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(k=3, d_sae=24, dead_after_tokens=10),
        AbsTopKConfig(k=3, d_sae=24),
        GroupMaxConfig(k=3, d_sae=24),
        BatchTopKConfig(k=3, d_sae=24, dead_after_tokens=10),
        MatryoshkaConfig(k=3, d_sae=24, prefixes=(0.25, 1.0)),
    ],
    ids=lambda config: config.kind,
)
def test_training_through_these_kernels_is_training_through_the_reference(config, monkeypatch):
    """Selection, decoding, gradients and optimiser as `kernels` joins them, over a few steps."""
    x = torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    trained = []
    for path in ("reference", "gpu"):
        monkeypatch.setattr(kernels, "path_for", lambda _, path=path: path)
        dictionary = dictionaries.build(config, 10, 10).to(DEVICE)
        dictionary.initialise(x[0], x[0], torch.Generator().manual_seed(0))
        # While encoder and decoder are the same, the encoder's gradient from a row with one latent is 0 but for
        # rounding, and Adam would step by its sign.
        dictionary.W_enc.data.mul_(1.25)
        optimiser = Adam(dictionary)
        losses = []
        for batch in x:
            loss = dictionary.loss(batch, batch, 0.5)
            loss.total.backward()
            optimiser.step(1e-3)
            dictionary.after_step(loss.encoded)
            losses.append(loss.total.detach())
        trained.append((torch.stack(losses), dictionary))
    torch.testing.assert_close(trained[1][0], trained[0][0])
    for (name, slow), fast in zip(
        trained[0][1].state_dict().items(), trained[1][1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(trained[0][1].tokens_since_fired, trained[1][1].tokens_since_fired)
