"""A training step on a GPU: it never waits for the device, and says the same twice. Skipped without one."""

import copy

import pytest
import torch

from sememe import dictionaries, kernels
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.topk import TopKConfig
from sememe.encoded import Encoded
from sememe.kernels.reference import fit
from sememe.optimiser import Adam

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def steps(n: int, dead_after_tokens: int) -> list[torch.Tensor]:
    """Parameters after n steps; all but the first two under torch's check that nothing waits for the device."""
    config = TopKConfig(k=8, d_sae=512, dead_after_tokens=dead_after_tokens)
    dictionary = dictionaries.build(config, 64, 64).cuda()
    assert kernels.path_for(dictionary.W_dec) == "gpu"
    data = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).cuda()
    dictionary.initialise(data, data, torch.Generator().manual_seed(0))
    optimiser = Adam(dictionary)
    try:
        for step in range(n):
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            x = data[256 * step : 256 * (step + 1)] * dictionary.scale_in
            loss = dictionary.loss(x, x, step / n)
            assert step < 2 or ("auxk" in loss.terms) == (dead_after_tokens < 256)
            loss.total.backward()
            optimiser.step(1e-3)
            dictionary.after_step(loss.encoded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [parameter.detach() for parameter in dictionary.parameters()]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dead_after_tokens", [1, 10_000_000])
def test_a_topk_step_never_waits_for_the_device_and_gives_the_same_bits_twice(dead_after_tokens):
    runs = [steps(6, dead_after_tokens) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def test_dead_latents_are_those_silent_for_longer_whoever_counted_them(device):
    silent = torch.tensor([5, 11, 10, 30, 0, 12], device=device)
    dead = DeadLatents()
    assert dead.ids(silent, 10).tolist() == [1, 3, 5]
    dead.send(silent, 10)
    assert dead.ids(silent, 10).tolist() == [1, 3, 5]
    dead.send(silent, 10)
    silent[3] = 0  # a reset after the number set off
    assert dead.ids(silent, 10).tolist() == [1, 5]
    dead.send(silent, 10)
    assert copy.deepcopy(dead).ids(silent, 10).tolist() == [1, 5]


def test_steps_whose_buffer_was_too_small_are_counted():
    dictionary = dictionaries.build(TopKConfig(k=2, d_sae=8), 4, 4)
    plain = Encoded.from_dense(torch.ones(3, 8))
    for capacity in (24, 23, 20):
        dictionary.after_step(fit(plain, capacity))
    dictionary.after_step(plain)
    assert int(dictionary.overflow_steps) == 2
    assert dictionary.tokens_since_fired.tolist() == [0] * 8
