"""Buffers of a training step where the number of active latents varies: nothing waits, nothing is wrong when they are
too small. The GPU's kernels, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from sememe import dictionaries, kernels
from sememe.dictionaries import TRAINABLE
from sememe.dictionaries.gated import GatedConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.room import LONGEST_ROW, ROW_SHARE, Room
from sememe.encoded import Encoded
from sememe.kernels.gpu import selection, sparse, varying
from sememe.optimiser import Adam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D_IN, D_SAE, BATCH = 5, 40, 3
CONFIGS = {
    "relu": ReLUConfig(d_sae=D_SAE, start_density=0.1, l1_coefficient=0.01),
    "p_anneal": PAnnealConfig(d_sae=D_SAE, start_density=0.1, l1_coefficient=0.01),
    "gated": GatedConfig(d_sae=D_SAE, start_density=0.1, l1_coefficient=0.01),
    "jumprelu": JumpReLUConfig(d_sae=D_SAE, target_l0=2.0, start_l0=2.0, bandwidth=0.3),
}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TILE", 128)
        patch.setattr(sparse, "BLOCK", 16)
        patch.setattr(sparse, "ENTRIES", 4)
        yield


@pytest.fixture
def gpu(monkeypatch):
    """The GPU's kernels, and no dictionary so small that it is dense at any l0."""
    monkeypatch.setattr(kernels, "DENSE_SHARE", 2.0)
    monkeypatch.setattr(kernels, "path_for", lambda _: "gpu")


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, BATCH, D_IN, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def started(kind: str):
    dictionary = dictionaries.build(CONFIGS[kind], D_IN, D_IN).to(DEVICE)
    sample = torch.randn(400, D_IN, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    dictionary.initialise(sample, sample, torch.Generator().manual_seed(0))
    dictionary.W_enc.data.mul_(1.25)  # as in test_kernels_gpu
    return dictionary.train()


def capacities(monkeypatch) -> list[int | None]:
    """What each encoding is given from now on."""
    given: list[int | None] = []
    plain = kernels.encode_threshold

    def noted(*arguments, **options):
        given.append(arguments[5] if len(arguments) > 5 else None)
        return plain(*arguments, **options)

    monkeypatch.setattr(kernels, "encode_threshold", noted)
    return given


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_training_through_buffers_is_training_through_the_reference(kind, gpu, monkeypatch):
    """The first step is dense, the others know from the step before how much room they need."""
    given = capacities(monkeypatch)
    trained = []
    for path in ("reference", "gpu"):
        monkeypatch.setattr(kernels, "path_for", lambda _, path=path: path)
        dictionary = started(kind)
        optimiser = Adam(dictionary)
        losses = []
        x = rows(1)[0]
        for _ in range(3):
            loss = dictionary.loss(x, x, 0.5)
            loss.total.backward()
            optimiser.step(1e-3)
            dictionary.after_step(loss.encoded)
            losses.append(loss.total.detach())
        assert loss.encoded.overflow is None if path == "reference" else not bool(loss.encoded.overflow)
        trained.append((torch.stack(losses), dictionary))
    assert given[:4] == [None] * 4 and all(given[4:]), "three of the reference, then one dense step"
    torch.testing.assert_close(trained[1][0], trained[0][0])
    for (name, slow), fast in zip(trained[0][1].named_parameters(), trained[1][1].parameters(), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(trained[0][1].tokens_since_fired, trained[1][1].tokens_since_fired)
    assert "entries" not in trained[0][1].state_dict(), "no part of a finished dictionary"


def test_a_buffer_that_was_too_small_is_counted_and_the_next_one_is_not(gpu, monkeypatch):
    monkeypatch.setattr(varying, "ROW_SHARE", D_SAE)
    given = capacities(monkeypatch)
    dictionary, x = started("jumprelu"), rows(1)[0]
    entries, wanted = [], dictionary.loss(x, x, 0.5).encoded
    dictionary.entries.fill_(1)  # as if the step before had had nearly none
    for _ in range(4):
        encoded = dictionary.loss(x, x, 0.5).encoded
        dictionary.after_step(encoded)
        entries.append(int(dictionary.entries))
    assert given[1] == BATCH and entries[0] == 2 * BATCH, "it doubles"
    assert int(dictionary.overflow_steps) > 0
    assert int(dictionary.overflow_steps) < 4 and not bool(encoded.overflow)
    torch.testing.assert_close(encoded.to_dense(), wanted.to_dense())


def test_what_fills_a_buffer_up_has_no_gradient_and_no_noise(gpu):
    """It names latent 0, whose threshold is within the window about 0, and noise must not make it fire."""
    x = rows(1)[0]
    grads = []
    for n in (-1, 6):
        dictionary = started("jumprelu")
        with torch.no_grad():
            dictionary.W_enc[:, 0] = 0.0
            dictionary.b_enc[0] = -9.0
            dictionary.relative_threshold[0] = 1e-3
        dictionary.entries.fill_(n)
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
        grads.append(dictionary.relative_threshold.grad)
    assert float(grads[0][0]) == float(grads[1][0]) == 0.0
    torch.testing.assert_close(*grads)
    noisy = dictionaries.build(CONFIGS["relu"].replace(noise=0.5), D_IN, D_IN).to(DEVICE)
    noisy.initialise(x, x, torch.Generator().manual_seed(0))
    noisy.entries.fill_(6)
    encoded = noisy.train().loss(x, x, 0.5).encoded
    assert encoded.overflow is not None
    assert not bool(encoded.acts[~encoded.stored()].any())


def test_a_buffer_is_as_long_as_the_step_before_needed_and_a_quarter_more():
    known, n = Room(), torch.tensor(-1, device=DEVICE)
    assert known.capacity(n, 4096, 8192) is None, "nothing is known"
    for needed in (40_000, 131_072):
        capacity = known.capacity(n.fill_(needed), 4096, 8192)
        assert capacity is not None and 1.25 * needed <= capacity <= 1.6 * needed
    assert known.capacity(n.fill_(10), 4096, 8192) == 4096, "one for each row at least"
    assert known.capacity(n.fill_(2_000_000), 4096, 8192) is None, "6% of the latents: dense"
    much = LONGEST_ROW // ROW_SHARE + 1
    assert known.capacity(n.fill_(much * 4096), 4096, 1_000_000) is None, "rows too long for the kernels"
    known.note(n, Encoded.from_dense(torch.eye(3, device=DEVICE)))
    assert int(n) == 3


def test_checkpoints_hold_what_a_resumed_run_has_to_know(monkeypatch):
    assert {"relu", "jumprelu", "p_anneal", "tied"} <= set(TRAINABLE)
    dictionary = started("relu")
    if DEVICE == "cpu":
        assert "entries" not in dictionary.training_buffers()
    monkeypatch.setattr(kernels, "path_for", lambda _: "gpu")
    assert dictionary.training_buffers()["entries"] is dictionary.entries
