"""Dense steps in chunks of rows: the same values and gradients, and no batch x d_sae."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sememe import dictionaries, kernels
from sememe.dictionaries import chunks
from sememe.dictionaries.gated import GatedConfig
from sememe.dictionaries.group_max import GroupMaxConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.lista import LISTAConfig
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.tied import TiedConfig
from sememe.encoded import Counts
from sememe.kernels import reference
from sememe.kernels.cpu import encode

D, N, BATCH = 12, 128, 90
DENSE = {
    "relu": ReLUConfig(
        d_sae=N, start_density=0, sqrt_coefficient=0.03, entropy_coefficient=0.5, norm_weighted=True
    ),
    "tied": TiedConfig(d_sae=N, start_density=0, bias_decay=0.1),
    "gated": GatedConfig(d_sae=N, start_density=0),
    "p_anneal": PAnnealConfig(d_sae=N, start_density=0),
    "jumprelu": JumpReLUConfig(d_sae=N, target_l0=8, start_l0=50, bandwidth=0.3),
    "lista": LISTAConfig(d_sae=N, l1_coefficient=0.1),
}


def made(config) -> Any:
    dictionary = dictionaries.build(config, D, D)
    x = rows(0)
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    if config.kind == "p_anneal":  # between two steps of its exponent
        dictionary.p.fill_(0.9)
    return dictionary.train()


def rows(seed: int) -> torch.Tensor:
    return 3 * torch.randn(BATCH, D, generator=torch.Generator().manual_seed(seed)) + 1


def stepped(config) -> dict[str, torch.Tensor]:
    dictionary, x = made(config), rows(4)
    loss = dictionary.loss(x, x, 0.5)
    loss.total.backward()
    dictionary.after_step(loss.encoded)
    found = {f"grad of {name}": parameter.grad for name, parameter in dictionary.named_parameters()}
    found |= loss.terms | dictionary.training_buffers()
    return found | {
        "total": loss.total.detach(),
        "error": loss.error.detach(),
        **counts_of(loss)._asdict(),
    }


def counts_of(loss) -> Counts:
    return loss.encoded if isinstance(loss.encoded, Counts) else kernels.counts(loss.encoded)


@pytest.mark.parametrize("kind", sorted(DENSE))
def test_chunks_change_neither_values_nor_gradients(kind, monkeypatch):
    x = rows(4)
    dictionary = made(DENSE[kind])
    assert kernels.is_dense(x, dictionary.W_enc, dictionary.b_enc, dictionary.b_pre, None)
    whole = stepped(DENSE[kind])
    monkeypatch.setattr(chunks, "ENTRIES", 20 * N)  # four of 20 rows and one of 10
    parts = stepped(DENSE[kind])
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(
            parts[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_lista_selects_some_rows_at_a_time_where_its_batch_is_not_dense(monkeypatch):
    monkeypatch.setattr(kernels, "is_dense", lambda *_: False)
    whole = stepped(DENSE["lista"])
    monkeypatch.setattr(chunks, "ENTRIES", 20 * N)
    parts = stepped(DENSE["lista"])
    for name, value in whole.items():
        torch.testing.assert_close(
            parts[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_noise_differs_from_chunk_to_chunk_and_is_the_same_for_the_gradient(monkeypatch):
    monkeypatch.setattr(chunks, "ENTRIES", BATCH // 2 * N)
    dictionary = made(ReLUConfig(d_sae=N, start_density=0, l1_coefficient=0, noise=1.0))
    twice = rows(4)[: BATCH // 2].repeat(2, 1)
    found = [dictionary.loss(twice, twice, 0.5) for _ in range(2)]
    first, second = found[0].error.detach().chunk(2)
    assert not torch.equal(first, second)
    assert torch.equal(found[0].total, found[1].total), "a step's noise is its own"
    with torch.no_grad():
        dictionary.b_dec.add_(1e-3)
        moved = dictionary.loss(twice, twice, 0.5).total
        dictionary.b_dec.sub_(1e-3)
    found[0].total.backward()
    slope = float(dictionary.b_dec.grad.sum())
    assert float(moved - found[0].total.detach()) == pytest.approx(1e-3 * slope, rel=0.02, abs=1e-6)


class Largest(TorchDispatchMode):
    """The most numbers that any one operation gave."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


@pytest.mark.parametrize("kind", sorted(DENSE))
def test_a_dense_step_holds_no_batch_times_d_sae(kind, monkeypatch):
    monkeypatch.setattr(chunks, "ENTRIES", 10 * N)
    monkeypatch.setattr(reference, "DENSE_TILE", 10 * N)
    monkeypatch.setattr(encode, "N_PROBE_ROWS", 8)
    dictionary, x = made(DENSE[kind]), rows(4)
    with Largest() as largest:
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
        dictionary.after_step(loss.encoded)
    assert isinstance(loss.encoded, Counts)
    steps = 4 if kind == "lista" else 1  # whose chunks have fewer rows for each
    assert largest.numel <= max(10 * N, BATCH * D, N * D) * steps


def test_group_max_on_a_cpu_is_not_the_dense_reference(monkeypatch):
    def dense(*_):
        raise AssertionError("batch x d_sae")

    dictionary, x = made(GroupMaxConfig(k=8, d_sae=N)), rows(4)
    monkeypatch.setattr(reference, "encode_group_max", dense)
    with Largest() as largest:
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
    assert largest.numel < BATCH * N
