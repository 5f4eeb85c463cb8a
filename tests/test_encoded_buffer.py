"""Encoded in a buffer of fixed capacity: every operation gives what it gives on the entries alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sememe import kernels
from sememe.encoded import Encoded
from sememe.errors import ShapeError
from sememe.kernels.reference import fit

buffers = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(0, 9), st.integers(0, 1000))


def pair(shape: tuple[int, int, int, int]) -> tuple[Encoded, Encoded]:
    """The same entries alone and in a buffer that is longer by some."""
    batch, d_sae, spare, seed = shape
    dense = torch.randint(-1, 2, (batch, d_sae), generator=torch.Generator().manual_seed(seed)).float()
    dense[0] = 0.0  # a row without entries
    plain = Encoded.from_dense(dense.requires_grad_())
    return plain, fit(plain, plain.acts.shape[0] + spare)


def same(one: Encoded, other: Encoded) -> None:
    assert torch.equal(one.acts, other.acts)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.row_ptr, other.row_ptr)


@settings(max_examples=60, deadline=None)
@given(buffers, st.data())
def test_every_operation_is_that_on_the_entries_alone(shape, data):
    plain, buffer = pair(shape)
    n = plain.acts.shape[0]
    assert buffer.acts.shape[0] == n + shape[2]
    assert not bool(buffer.overflow)
    assert bool((buffer.acts[n:] == 0).all()) and bool((buffer.indices[n:] == 0).all())
    same(buffer.compact(), plain)
    same(buffer.detach().to("cpu").compact(), plain)
    same(buffer.with_acts(2 * buffer.acts).compact(), plain.with_acts(2 * plain.acts))
    assert torch.equal(buffer.row_counts(), plain.row_counts())
    assert torch.equal(buffer.row_ids()[:n], plain.row_ids())
    assert torch.equal(buffer.l0(), plain.l0())
    assert torch.equal(buffer.to_dense(), plain.to_dense())
    assert all(torch.equal(a, b) for a, b in zip(buffer.padded(), plain.padded(), strict=True))
    same(Encoded.cat([buffer, plain, buffer]), Encoded.cat([plain, plain, plain]))
    rows = torch.tensor(data.draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])))
    same(buffer.select_rows(rows), plain.select_rows(rows))
    latents = torch.tensor(data.draw(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1])))
    chosen = buffer.select_latents(latents)
    assert chosen.acts.shape == buffer.acts.shape
    same(chosen.compact(), plain.select_latents(latents))


@settings(max_examples=20, deadline=None)
@given(buffers)
def test_decoding_prefixes_has_the_same_values_and_gradients(shape):
    W, b = (
        torch.randn(shape[1], 3, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.ones(3),
    )
    ends = sorted({(shape[1] + 1) // 2, shape[1]})
    grads = []
    for encoded in pair(shape):
        dense = encoded.acts
        recons = kernels.decode_prefixes(encoded, W, b, ends)
        grads.append((*recons, *torch.autograd.grad(torch.cat(recons).square().sum(), [dense, W])))
    n = grads[0][-2].shape[0]
    for k, (plain, buffer) in enumerate(zip(*grads, strict=True)):
        torch.testing.assert_close(buffer[:n] if k == len(ends) else buffer, plain)


def test_a_buffer_too_small_says_so_and_is_never_read_as_a_whole():
    plain = Encoded.from_dense(torch.ones(3, 4))
    buffer = fit(plain, 7)
    assert bool(buffer.overflow) and int(buffer.row_ptr[-1]) == 7
    assert buffer.row_counts().tolist() == [4, 3, 0]
    with pytest.raises(ShapeError, match=r"fit their buffer of 7, got more. Raise its capacity"):
        buffer.compact()


def test_a_threshold_with_a_capacity_is_the_one_without_in_a_buffer():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator).T
    arguments = (x, W, torch.zeros(9), torch.zeros(4), torch.full((9,), 0.3))
    buffer = kernels.encode_threshold(*arguments, capacity=45)
    assert buffer.acts.shape == (45,)
    same(buffer.compact(), kernels.encode_threshold(*arguments))
