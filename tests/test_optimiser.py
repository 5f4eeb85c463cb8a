"""Optimisers: each against a slow torch loop written here, on a quadratic and on planted features."""

import math

import pytest
import torch

from sememe import dictionaries, kernels
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.cross_layer import CrossLayerConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.optimiser import OPTIMISERS, AdamConfig, MuonConfig, OptimiserConfig, SignumConfig, make
from sememe.optimiser.muon import orthogonal
from sememe.toy import PlantedSource, ToyConfig, recovery

CONFIGS = {"adam": AdamConfig(), "signum": SignumConfig(), "muon": MuonConfig()}
RATES = {"adam": 3e-3, "signum": 4e-3, "muon": 2e-2}
N, D = 12, 5


def made(d_sae: int = N, d: int = D, seed: int = 0) -> dictionaries.Trainable:
    dictionary = dictionaries.build(TopKConfig(d_sae=d_sae, k=2), d, d)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, d, generator=generator)
    dictionary.initialise(x, x, generator)
    return dictionary


def gradients(dictionary: dictionaries.Trainable, n_steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {name: torch.randn(p.shape, generator=generator) for name, p in dictionary.named_parameters()}
        for _ in range(n_steps)
    ]


def run(dictionary, optimiser, grads, lr=0.01) -> None:
    for step in grads:
        for name, p in dictionary.named_parameters():
            p.grad = step[name].clone() if p.is_contiguous() else step[name].T.contiguous().T
        optimiser.step(lr)


def units(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def slow_adam(weights, grads, lr, clip=None):
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    for t, step in enumerate(grads, 1):
        norm = torch.cat([g.flatten() for g in step.values()]).norm()
        scale = 1.0 if clip is None else min(1.0, clip / float(norm))
        for n, w in weights.items():
            g = step[n] * scale
            if n == "W_dec":
                g = g - (g * w).sum(1, keepdim=True) * w
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.999 * v[n] + 0.001 * g * g
            w = w - lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            weights[n] = units(w) if n == "W_dec" else w
    return weights


def slow_signum(weights, grads, lr):
    z, x = dict(weights), dict(weights)
    for t, step in enumerate(grads, 1):
        for n, y in weights.items():
            g = step[n]
            if n == "W_dec":
                g = g - (g * y).sum(1, keepdim=True) * y
            z[n] = z[n] - lr * g.sign()
            z[n] = units(z[n]) if n == "W_dec" else z[n]
            x[n] = x[n] + (z[n] - x[n]) / t
            y = 0.05 * z[n] + 0.95 * x[n]
            weights[n] = units(y) if n == "W_dec" else y
    x["W_dec"] = units(x["W_dec"])
    return weights, x


def slow_muon(weights, grads, lr):
    """With the orthogonal factor from a singular value decomposition in place of the iteration."""
    buffers = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in grads:
        for n in ("W_enc", "W_dec"):
            w, g = weights[n], step[n]
            if n == "W_dec":
                g = g - (g * w).sum(1, keepdim=True) * w
            buffers[n] = 0.95 * buffers[n] + 0.05 * g
            u, _, vt = torch.linalg.svd(0.05 * g + 0.95 * buffers[n], full_matrices=False)
            w = w - lr * 0.2 * math.sqrt(N) * (u @ vt)
            weights[n] = units(w) if n == "W_dec" else w
    return weights


def start_of(dictionary) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in dictionary.named_parameters()}


@pytest.mark.parametrize("path", ["reference", "auto"])
@pytest.mark.parametrize("clip", [None, 3.0, 1e6])
@pytest.mark.parametrize("d_sae", [N, D])
def test_adam_is_adam(path, clip, d_sae):
    dictionary = made(d_sae)
    grads = gradients(dictionary, 4)
    expected = slow_adam(start_of(dictionary), grads, 0.01, clip)
    with kernels.use(path):
        run(dictionary, make(AdamConfig(clip=clip), dictionary), grads)
    for name, p in dictionary.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-5, rtol=1e-4)


def test_a_clip_below_the_gradients_norm_changes_adam_and_one_above_it_does_not():
    ends = []
    for clip in (None, 1e6, 3.0):
        dictionary = made()
        grads = [
            {n: g * (10.0 if i == 2 else 1.0) for n, g in step.items()}
            for i, step in enumerate(gradients(dictionary, 4))
        ]
        run(dictionary, make(AdamConfig(clip=clip), dictionary), grads)
        ends.append(dictionary.b_enc.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], atol=0, rtol=0)
    assert float((ends[0] - ends[2]).abs().max()) > 1e-3


@pytest.mark.parametrize("path", ["reference", "auto"])
def test_signum_is_schedule_free_sign_descent(path):
    dictionary = made()
    grads = gradients(dictionary, 6)
    expected, averaged = slow_signum(start_of(dictionary), grads, 0.01)
    optimiser = make(SignumConfig(), dictionary)
    with kernels.use(path):
        run(dictionary, optimiser, grads)
    before = start_of(dictionary)
    for name, p in dictionary.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-5, rtol=1e-4)
    with optimiser.exported():
        for name, p in dictionary.named_parameters():
            torch.testing.assert_close(p.detach(), averaged[name], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(p.detach(), before[name]) for name, p in dictionary.named_parameters())


def test_muon_steps_by_the_orthogonal_factor_of_its_momentum():
    dictionary = made()
    grads = gradients(dictionary, 3)
    expected = slow_muon(start_of(dictionary), grads, 0.01)
    start = start_of(dictionary)
    run(dictionary, make(MuonConfig(newton_schulz_steps=5), dictionary), grads)
    for name in ("W_enc", "W_dec"):
        ours, theirs = (w - start[name] for w in (start_of(dictionary)[name], expected[name]))
        cosine = float((ours * theirs).sum() / ours.norm() / theirs.norm())
        assert cosine > 0.97, name
        assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.3)
    slow = slow_adam(start, grads, 0.01)
    torch.testing.assert_close(dictionary.b_enc.detach(), slow["b_enc"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (8, 8), (1, 4)])
def test_the_orthogonal_factor_has_singular_values_near_1_and_keeps_zero_rows(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix[0] = 0.0 if shape[0] > 1 else matrix[0]
    made_ = orthogonal(matrix, 8)
    values = torch.linalg.svdvals(made_)[: torch.linalg.matrix_rank(matrix)]
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert shape[0] == 1 or bool((made_[0] == 0).all())


@pytest.mark.parametrize("kind", sorted(OPTIMISERS))
def test_a_quadratic_is_minimised(kind):
    """The optimum of `sum |p - p*|^2`, decoder rows on the sphere, is reached by the exported weights."""
    dictionary, goal = made(), start_of(made(seed=7))
    optimiser = make(CONFIGS[kind], dictionary)
    n_steps = 600
    for step in range(n_steps):
        loss = sum((p - goal[n]).square().sum() for n, p in dictionary.named_parameters())
        loss.backward()
        decay = 1.0 if kind == "signum" else 1 - step / n_steps
        optimiser.step({"adam": 2e-2, "signum": 2e-2, "muon": 2e-2}[kind] * decay)
    with optimiser.exported():
        for name, p in dictionary.named_parameters():
            assert float((p.detach() - goal[name]).abs().max()) < 0.05, name
        torch.testing.assert_close(dictionary.W_dec.norm(dim=1).detach(), torch.ones(N))


@pytest.mark.slow  # test_train_optimisers recovers features by each, through `train`
@pytest.mark.parametrize("kind", sorted(OPTIMISERS))
def test_planted_features_are_recovered(kind):
    source = PlantedSource(ToyConfig(d=16, n_features=24, n_active=2, decay=1.0))
    dictionary = dictionaries.build(TopKConfig(d_sae=32, k=3), 16, 16)
    generator = torch.Generator().manual_seed(0)
    sample = source.sample(1024).x
    scale = 1 / sample.std(0).square().mean().sqrt()
    dictionary.initialise(sample * scale, sample * scale, generator)
    optimiser = make(CONFIGS[kind], dictionary)
    n_steps = 1500
    for step in range(n_steps):
        x = source.next_batch(256).x * scale
        loss = dictionary.loss(x, x, step / n_steps)
        loss.total.backward()
        optimiser.step(RATES[kind] * (1.0 if kind == "signum" else 1 - step / n_steps))
        dictionary.after_step(loss.encoded)
    with optimiser.exported():
        assert recovery(source.planted, dictionary).recall > 0.95


@pytest.mark.parametrize("kind", sorted(OPTIMISERS))
def test_a_state_goes_on_with_the_same_bits(kind):
    whole, resumed = made(), made()
    grads = gradients(whole, 6)
    one, two = make(CONFIGS[kind], whole), make(CONFIGS[kind], resumed)
    frozen = torch.arange(N) == 3
    for dictionary, optimiser in ((whole, one), (resumed, two)):
        run(dictionary, optimiser, grads[:3])
        optimiser.freeze(frozen)
        optimiser.forget(torch.tensor([1, 5]))
    fresh = made(seed=5)
    fresh.load_state_dict(resumed.state_dict())
    three = make(CONFIGS[kind], fresh)
    three.load_state_dict(two.state_dict())
    run(whole, one, grads[3:])
    run(fresh, three, grads[3:])
    with one.exported(), three.exported():
        for (name, p), (_, q) in zip(whole.named_parameters(), fresh.named_parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", sorted(OPTIMISERS))
def test_frozen_latents_keep_every_bit_and_the_others_move(kind):
    dictionary = made(D, D)  # b_dec is as long as there are latents, and is none of them
    optimiser = make(CONFIGS[kind], dictionary)
    grads = gradients(dictionary, 6)
    run(dictionary, optimiser, grads[:3])
    frozen = torch.tensor([True, False, False, True, False])
    optimiser.freeze(frozen)
    with optimiser.exported():
        before = start_of(dictionary)
    run(dictionary, optimiser, grads[3:])
    with optimiser.exported():
        after = start_of(dictionary)
    for name in ("W_dec", "b_enc"):
        assert torch.equal(after[name][frozen], before[name][frozen])
        assert bool((after[name][~frozen] != before[name][~frozen]).any())
    assert torch.equal(after["W_enc"][:, frozen], before["W_enc"][:, frozen])
    assert bool((after["W_enc"][:, ~frozen] != before["W_enc"][:, ~frozen]).any())
    assert bool((after["b_dec"] != before["b_dec"]).all())


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_changed_latents_lose_their_moments_everywhere_and_nobody_else_does(kind):
    dictionary = made(D, D)
    optimiser = make(CONFIGS[kind], dictionary)
    run(dictionary, optimiser, gradients(dictionary, 2))
    ids, others = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    optimiser.forget(ids)
    for name, slots in optimiser.slots.items():
        for slot in slots.values():
            assert slot.abs().sum() > 0, name
            if name == "b_dec":
                assert bool((slot != 0).all())
            else:
                assert float(slot[ids].abs().sum()) == 0.0, name
                assert float(slot[others].abs().min(dim=1).values.max()) > 0, name


@pytest.mark.parametrize("kind", sorted(OPTIMISERS))
def test_a_cross_layer_dictionarys_latents_freeze_and_are_forgotten_layer_by_layer(kind):
    sites = Sites(
        inputs=tuple(_site(f"mlp_in.{i}", 4 * i) for i in range(2)),
        outputs=tuple(_site(f"mlp_out.{i}", 4 * i) for i in range(2)),
    )
    dictionary = dictionaries.build(CrossLayerConfig(d_sae=12, k=2), 8, 8, sites)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    dictionary.initialise(x, x, generator)
    optimiser = make(CONFIGS[kind], dictionary)
    grads = gradients(dictionary, 4)
    run(dictionary, optimiser, grads[:2])
    frozen = torch.zeros(12, dtype=torch.bool)
    frozen[[1, 7]] = True
    optimiser.freeze(frozen)
    with optimiser.exported():
        before = dictionary.W_enc.detach().T.clone(), dictionary.W_dec.detach().clone()
    run(dictionary, optimiser, grads[2:])
    with optimiser.exported():
        after = dictionary.W_enc.detach().T.clone(), dictionary.W_dec.detach().clone()
    for old, new in zip(before, after, strict=True):
        assert (new != old).any(1).tolist() == (~frozen).tolist()
    optimiser.forget(torch.tensor([7]))
    if kind == "adam":
        for name in ("encoders.1", "decoders.1"):
            sums = optimiser.slots[name]["exp_avg"].abs().sum(1)
            assert (sums == 0).tolist() == [False, True, False, False, False, False], name
        assert bool((optimiser.slots["decoders.0"]["exp_avg"].abs().sum(1) > 0).all())


def _site(hookpoint: str, start: int) -> Site:
    return Site(model="m", model_fingerprint="f", hookpoint=hookpoint, start=start, stop=start + 4)


def test_a_reset_latents_average_begins_where_it_was_put():
    dictionary = made()
    optimiser = make(SignumConfig(), dictionary)
    grads = gradients(dictionary, 80)
    run(dictionary, optimiser, grads[:50], lr=0.001)
    ids = torch.tensor([2])
    put = units(torch.randn(1, D, generator=torch.Generator().manual_seed(3)))
    dictionary.reset_latents(ids, put)
    optimiser.forget(ids)
    with optimiser.exported():
        torch.testing.assert_close(dictionary.W_dec[ids].detach(), put)
    run(dictionary, optimiser, grads[50:], lr=0.001)
    with optimiser.exported():
        moved = dictionary.W_dec[ids].detach()
    torch.testing.assert_close(moved, dictionary.W_dec[ids].detach(), atol=0.01, rtol=0)
    assert float((moved - put).abs().max()) > 1e-3


def test_the_learning_rate_follows_each_optimisers_rule():
    assert AdamConfig().learning_rate(4096) == pytest.approx(1.2e-3)
    assert AdamConfig().learning_rate(16384) == pytest.approx(6e-4)
    assert SignumConfig().learning_rate(16384) == pytest.approx(5e-3)
    assert SignumConfig().learning_rate(65536) == pytest.approx(2.5e-3)
    assert MuonConfig().learning_rate(4096) == MuonConfig().learning_rate(65536) == pytest.approx(2e-3)
    assert {config.kind for config in CONFIGS.values()} == set(OPTIMISERS)


def test_an_option_of_another_optimiser_is_an_error():
    with pytest.raises(ConfigError, match="clip must be a known option"):
        SignumConfig.build({"clip": 1.0})
    with pytest.raises(ConfigError, match="momentum must be a known option"):
        AdamConfig.build({"momentum": 0.9})
    assert OptimiserConfig


@pytest.mark.parametrize("kind", sorted(OPTIMISERS))
def test_thresholds_never_go_below_0(kind):
    dictionary = dictionaries.build(JumpReLUConfig(d_sae=N), D, D)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, D, generator=generator)
    dictionary.initialise(x, x, generator)
    optimiser = make(CONFIGS[kind], dictionary)
    for _ in range(30):
        dictionary.relative_threshold.grad = torch.ones(N)  # downwards
        dictionary.b_enc.grad = torch.ones(N)
        optimiser.step(0.1)
        assert float(dictionary.relative_threshold.detach().min()) >= 0
    with optimiser.exported():
        assert float(dictionary.relative_threshold.detach().min()) >= 0
        assert float(dictionary.b_enc.detach().max()) < 0
