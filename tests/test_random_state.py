"""Random numbers of training steps: the same when asked again or resumed, others at each step and for each seed."""

import torch

from sememe.dictionaries.random_state import RandomState

CPU = torch.device("cpu")


def draws(numbers: RandomState, n_steps: int) -> list[torch.Tensor]:
    found = []
    for _ in range(n_steps):
        found.append(torch.rand(1000, generator=numbers.generator(CPU)))
        numbers.next_step()
    return found


def test_a_step_gives_the_same_numbers_until_the_next():
    numbers = RandomState()
    numbers.start(torch.Generator().manual_seed(0))
    first = torch.rand(5, generator=numbers.generator(CPU))
    assert torch.equal(first, torch.rand(5, generator=numbers.generator(CPU)))
    numbers.next_step()
    assert not torch.equal(first, torch.rand(5, generator=numbers.generator(CPU)))


def test_steps_and_seeds_share_nothing():
    streams = []
    for seed in (0, 1):
        numbers = RandomState()
        numbers.start(torch.Generator().manual_seed(seed))
        streams += draws(numbers, 10)
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(20)
    assert float(correlation.abs().max()) < 0.2, "6 standard deviations of chance"


def test_copying_the_state_back_resumes():
    numbers, other = RandomState(), RandomState()
    numbers.start(torch.Generator().manual_seed(3))
    draws(numbers, 4)
    other.state.copy_(numbers.state.clone())
    for one, two in zip(draws(numbers, 3), draws(other, 3), strict=True):
        assert torch.equal(one, two)
