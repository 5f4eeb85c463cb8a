"""What each architecture of the TopK family promises beyond the common contract."""

import pytest
import torch

from sememe import dictionaries
from sememe.dictionaries import auxiliary
from sememe.dictionaries.abs_topk import AbsTopKConfig
from sememe.dictionaries.base import Trainable
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.group_max import GroupMaxConfig
from sememe.dictionaries.matryoshka import MatryoshkaConfig
from sememe.dictionaries.mlp_encoder import MLPEncoderConfig
from sememe.dictionaries.multi_topk import MultiTopKConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.kernels import cpu
from sememe.toy import PlantedSource, ToyConfig
from sememe.train import TrainConfig, train

D, N = 12, 40


def sample(n: int = 64, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def made(config) -> Trainable:
    dictionary, x = dictionaries.build(config, D, D), sample()
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    return dictionary


def dense(dictionary, x: torch.Tensor) -> torch.Tensor:
    return ((x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc).detach()


BATCHED = [BatchTopKConfig(k=3, d_sae=N), MatryoshkaConfig(k=3, d_sae=N, prefixes=(0.5, 1.0))]


@pytest.mark.parametrize("config", BATCHED, ids=lambda c: c.kind)
def test_a_batch_keeps_k_per_row_on_average_and_rows_differ(config):
    dictionary, x = made(config), sample(seed=4)
    counts = dictionary.loss(x, x, 0.0).encoded.l0()
    assert int(counts.sum()) == 3 * len(x)
    assert len(set(counts.tolist())) > 1


@pytest.mark.parametrize("config", BATCHED, ids=lambda c: c.kind)
def test_the_threshold_follows_what_batches_keep_and_is_saved(config, tmp_path):
    dictionary, x = made(config), sample(seed=4)
    assert float(dictionary.encode(x).l0().float().mean()) == pytest.approx(3, rel=0.3), "from the start"
    before = float(dictionary.threshold)
    encoded = dictionary.loss(x, x, 0.0).encoded
    smallest = float(dense(dictionary, x).flatten().topk(3 * len(x)).values[-1])
    dictionary.after_step(encoded)
    assert float(dictionary.threshold) == pytest.approx(0.9 * before + 0.1 * smallest, rel=1e-5)
    for _ in range(1500):
        dictionary.after_step(encoded)
    assert float(dictionary.threshold) == pytest.approx(smallest, rel=1e-5)
    dictionary.save(tmp_path / "d", x)
    loaded = dictionaries.load(tmp_path / "d")
    assert torch.equal(loaded.threshold, dictionary.threshold) and float(loaded.threshold) > 0


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_after_a_short_run_single_rows_keep_k_on_average(kind, tmp_path):
    """120 steps at a high rate; with a threshold that averages over 100 of them it is 2.6."""
    source = PlantedSource(ToyConfig(d=32, n_features=64, n_active=3, decay=1))
    options = {"kind": kind, "d_sae": 64, "k": 3}
    made = {"n_tokens": 120 * 256, "batch_size": 256, "lr": 1e-2, "watch_rows": 0, "threads": 1}
    config = TrainConfig.build(made | {"architecture": options, "out": tmp_path / "d"})
    dictionary = train(config, source=source)
    l0 = float(dictionary.encode(source.sample(8192).x).l0().float().mean())
    assert l0 == pytest.approx(3, rel=0.06)


def test_a_matryoshka_loss_is_the_mean_of_its_prefixes_losses():
    dictionary, x = made(BATCHED[1]), sample(seed=4)
    loss = dictionary.loss(x, x, 0.0)
    acts = loss.encoded.to_dense()
    errors = [
        (x - acts[:, :end] @ dictionary.W_dec[:end] - dictionary.b_dec).square().mean() for end in (N // 2, N)
    ]
    torch.testing.assert_close(loss.total, torch.stack(errors).mean())
    torch.testing.assert_close(loss.terms["mse"], errors[1].detach())


@pytest.mark.parametrize("prefixes", [(0.5,), (0.5, 0.25, 1.0), (0.001, 1.0), ()])
def test_prefixes_must_rise_to_all_latents(prefixes):
    with pytest.raises(ConfigError, match="prefixes must rise to 1 and end at different latents of d_sae=40"):
        made(MatryoshkaConfig(k=3, d_sae=N, prefixes=prefixes))


def test_abs_topk_keeps_signs_and_reconstructs_a_line_with_one_latent():
    dictionary, x = made(AbsTopKConfig(k=4, d_sae=N)), sample(seed=4)
    acts = dictionary.encode(x).to_dense().detach()
    pre = dense(dictionary, x)
    kept = torch.zeros_like(pre).scatter(1, pre.abs().topk(4, dim=1).indices, 1.0)
    torch.testing.assert_close(acts, pre * kept)
    assert float(acts.min()) < 0 < float(acts.max())


def test_auxk_of_signed_latents_counts_negative_ones():
    dictionary, x = made(AbsTopKConfig(k=2, d_sae=N, dead_after_tokens=10, auxk=1)), sample(seed=4)
    dictionary.tokens_since_fired[7] = 11
    residual = x - dictionary(x).detach()
    recon = dense(dictionary, x)[:, 7:8] * dictionary.W_dec[7].detach()
    wanted = (residual - recon).square().mean() / residual.square().mean()
    torch.testing.assert_close(dictionary.loss(x, x, 0.0).terms["auxk"], wanted)


def test_multi_topk_adds_an_eighth_of_the_error_with_four_times_as_many():
    dictionary, x = made(MultiTopKConfig(k=2, d_sae=N)), sample(seed=4)
    errors = []
    for k in (2, 8):
        values, indices = torch.relu(dense(dictionary, x)).topk(k, dim=1)
        acts = torch.zeros(len(x), N).scatter(1, indices, values)
        errors.append((x - acts @ dictionary.W_dec - dictionary.b_dec).square().mean())
    loss = dictionary.loss(x, x, 0.0)
    torch.testing.assert_close(loss.total, errors[0] + errors[1] / 8)
    assert loss.encoded.k == 2 == dictionary.encode(x).k
    assert made(MultiTopKConfig(k=20, d_sae=N)).loss(x, x, 0.0).encoded.k == 20, "4k is cut to d_sae"
    with pytest.raises(
        ConfigError, match=r"multiple must be <= 2, at which all 40 latents are kept.*, got 3"
    ):
        made(MultiTopKConfig(k=20, d_sae=N, multiple=3))


def test_group_max_keeps_one_latent_of_each_group():
    dictionary, x = made(GroupMaxConfig(k=8, d_sae=N)), sample(seed=4)
    groups = torch.relu(dense(dictionary, x)).view(len(x), 8, N // 8)
    acts, indices = dictionary.encode(x).topk_view()
    torch.testing.assert_close(acts.detach(), groups.amax(2))
    assert (indices // (N // 8)).tolist() == [list(range(8))] * len(x)
    with pytest.raises(ConfigError, match="k must divide d_sae=40 into equal groups, got 7"):
        made(GroupMaxConfig(k=7, d_sae=N))


@pytest.mark.parametrize(
    "config",
    [
        *(config.replace(dead_after_tokens=10) for config in BATCHED),
        MultiTopKConfig(k=2, d_sae=N, dead_after_tokens=10),
        AbsTopKConfig(k=2, d_sae=N, dead_after_tokens=10),
        GroupMaxConfig(k=2, d_sae=N, dead_after_tokens=10),
    ],
    ids=lambda c: c.kind,
)
def test_auxk_gives_dead_latents_a_gradient(config):
    dictionary, x = made(config), sample(seed=4)
    with torch.no_grad():
        dictionary.W_enc[:, 1::2] *= 1e-3  # too weak to be kept
    dictionary.tokens_since_fired[1::2] = 11
    loss = dictionary.loss(x, x, 0.0)
    assert float(loss.terms["auxk"]) > 0
    loss.total.backward()
    assert float(dictionary.W_enc.grad[:, 1::2].abs().max()) > 0


@pytest.mark.parametrize("groups", [1, 3])
def test_auxk_of_many_dead_latents_behind_a_hidden_layer(groups, monkeypatch):
    """A hidden layer is computed again for the gradient, under the bfloat16 that its products were taken in."""
    monkeypatch.setattr(auxiliary, "LARGE", 1)
    dictionary, x = made(MLPEncoderConfig(k=2, d_sae=N)), sample(seed=4)
    dead, found = torch.arange(0, N, 2), []
    monkeypatch.setattr(auxiliary, "GROUP_ENTRIES", -(-len(x) // groups) * len(dead))
    weights = [dictionary.W_in, dictionary.W_enc, dictionary.W_dec, dictionary.b_enc]
    for rough in (True, False):
        monkeypatch.setattr(auxiliary.kernels, "native_bfloat16", lambda x, rough=rough: rough)
        loss = auxiliary.auxk_loss(dictionary, x, x, dead, 32)
        found.append(torch.autograd.grad(loss, weights))
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05


@pytest.mark.skipif(not cpu.native_bfloat16(), reason="needs a CPU that multiplies bfloat16 natively")
def test_auxk_of_many_dead_latents_is_nearly_that_in_float32(monkeypatch):
    """Products in bfloat16, where there is much to multiply: the loss to three digits, gradients to a few percent."""
    dictionary = dictionaries.build(TopKConfig(d_sae=1024, k=8), 64, 64)
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2048, 64, generator=generator), torch.randn(2048, 64, generator=generator)
    dictionary.initialise(x, x, generator)
    dead, found = torch.arange(0, 1024, 2), []
    for large in (0, 2**40):
        monkeypatch.setattr(auxiliary, "LARGE", large)
        loss = auxiliary.auxk_loss(dictionary, x, residual, dead, 32)
        weights = [dictionary.W_enc, dictionary.W_dec, dictionary.b_enc]
        found.append((float(loss.detach()), torch.autograd.grad(loss, weights)))
    (rough, rough_grads), (exact, exact_grads) = found
    assert rough != exact
    assert rough == pytest.approx(exact, rel=1e-3)
    for a, b in zip(rough_grads, exact_grads, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05
        assert a.stride() == b.stride()
