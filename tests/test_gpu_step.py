"""A training step on a GPU: it never waits for the device, and says the same twice. Skipped without one."""

import copy

import pytest
import torch

from sememe import dictionaries, kernels
from sememe.dictionaries import Architecture
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.group_max import GroupMaxConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.encoded import Encoded
from sememe.kernels.reference import fit
from sememe.optimiser import Adam
from sememe.source import Batch
from sememe.train import TrainConfig
from sememe.train.crew import Crew
from sememe.train.feed import Feed
from sememe.train.member import Spec

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def steps(n: int, config: Architecture) -> list[torch.Tensor]:
    """Parameters after n steps; all but the first two under torch's check that nothing waits for the device."""
    dead_after_tokens = getattr(config, "dead_after_tokens", None)
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
            assert (
                step < 2 or dead_after_tokens is None or ("auxk" in loss.terms) == (dead_after_tokens < 256)
            )
            loss.total.backward()
            optimiser.step(1e-3)
            dictionary.after_step(loss.encoded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [parameter.detach() for parameter in dictionary.parameters()]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(k=8, d_sae=512, dead_after_tokens=1),
        TopKConfig(k=8, d_sae=512),
        BatchTopKConfig(k=8, d_sae=512),
        GroupMaxConfig(k=8, d_sae=512),
        JumpReLUConfig(target_l0=8.0, start_l0=16.0, d_sae=512),
        ReLUConfig(start_density=0.02, d_sae=512),
    ],
    ids=["topk, all dead", "topk", "batch_topk", "group_max", "jumprelu", "relu"],
)
def test_a_step_never_waits_for_the_device_and_gives_the_same_bits_twice(config):
    runs = [steps(6, config) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_cuda
def test_a_step_of_several_never_waits_either():
    """Two shapes and another architecture, so three stacks; AuxK in two of them, buffers in one."""
    architectures = [
        *(TopKConfig(k=k, d_sae=d_sae, dead_after_tokens=1) for d_sae in (256, 512) for k in (4, 8)),
        *(JumpReLUConfig(target_l0=float(k), start_l0=16.0, d_sae=512) for k in (4, 8)),
    ]
    specs = [
        Spec(f"m{i}", TrainConfig(architecture=one, seed=i, warmup=0.0), 64, 64, None, None)
        for i, one in enumerate(architectures)
    ]
    team = Crew(specs, 1000, torch.device("cuda"))
    data = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    team.initialise(Batch(data, data))
    assert [len(stack.names) for stack in team.stacks] == [2, 2, 2]
    try:
        for step in range(6):
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            x = data[256 * step : 256 * (step + 1)]  # in the host's memory, as sources give them
            team.train_step(Batch(x, x), None, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    team.check()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def test_batches_arrive_as_they_were_when_they_were_sent(device):
    """More than there are slots, of several sizes, the source's memory written to as soon as each is sent."""
    feed = Feed(torch.device(device))
    memory, sent, arrived = torch.empty(8, 3), [], []
    for number, n in enumerate((8, 8, 5, 8, 8, 2, 8)):
        x = memory[:n].fill_(number) if device == "cuda" else torch.full((n, 3), float(number))
        target = x if number % 2 else x + 0.5
        sent.append((x.clone(), target.clone()))
        arrived.append(feed.send(Batch(x, target)))
        assert (arrived[-1].target is arrived[-1].x) == (target is x)
    for (x, target), batch in zip(sent, arrived, strict=True):
        assert torch.equal(batch.x.cpu(), x) and torch.equal(batch.target.cpu(), target)
        assert batch.x.device.type == batch.target.device.type == device


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
