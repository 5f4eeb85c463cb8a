"""What each architecture of the ReLU family promises beyond the common contract: its own gradient rules first."""

import pytest
import torch

from sememe import dictionaries
from sememe.dictionaries.base import Site, Sites, Trainable
from sememe.dictionaries.gated import GatedConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.tied import Tied, TiedConfig
from sememe.errors import ConfigError
from sememe.optimiser import Adam

D, N = 12, 40


def sample(n: int = 64, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def made(config) -> Trainable:
    dictionary, x = dictionaries.build(config, D, D), sample()
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    return dictionary


def pre_acts(dictionary, x: torch.Tensor) -> torch.Tensor:
    return (x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc


# -- JumpReLU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [None, 3.0])
def test_jumprelu_gradients_are_the_papers_equations(goal):
    config = JumpReLUConfig(d_sae=N, target_l0=goal, l0_coefficient=0.7, bandwidth=0.1, sparsity_warmup=0.0)
    dictionary, x = made(config).double(), sample(seed=4).double()
    dictionary.loss(x, x, 0.5).total.backward()

    with torch.no_grad():
        z, theta = pre_acts(dictionary, x), dictionary.threshold
        width = 0.1 * dictionary.threshold_unit
        above, window = (z > theta).double(), ((z - theta).abs() < width / 2).double()
        acts = z * above
        residual = acts @ dictionary.W_dec + dictionary.b_dec - x
        to_acts = (2 / residual.numel()) * residual @ dictionary.W_dec.T
        l0 = above.sum(1).mean()
        to_l0 = 0.7 * (1.0 if goal is None else 2 * (l0 / goal - 1) / goal) / len(x)
        to_theta = (-(theta / width) * window * to_acts - window / width * to_l0).sum(0)
        to_z = to_acts * above
    assert int(window.sum()) >= 20, "the rule is seen at work"
    torch.testing.assert_close(dictionary.relative_threshold.grad, to_theta * dictionary.threshold_unit)
    torch.testing.assert_close(dictionary.b_enc.grad, to_z.sum(0))
    torch.testing.assert_close(dictionary.W_enc.grad, (x - dictionary.b_pre).T @ to_z)
    torch.testing.assert_close(dictionary.W_dec.grad, acts.T @ residual * 2 / residual.numel())


def test_jumprelus_thresholds_move_and_l0_falls_to_the_target():
    dictionary = dictionaries.build(JumpReLUConfig(d_sae=96, target_l0=4), 24, 24)
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(48, 24, generator=generator), dim=1)

    def rows() -> torch.Tensor:
        active = torch.rand(512, 48, generator=generator) < 0.08
        return (active * torch.rand(512, 48, generator=generator)) @ features

    scale = 1 / rows().std(0).square().mean().sqrt()
    x = rows() * scale
    dictionary.initialise(x, x, generator)
    started, l0 = dictionary.threshold.detach().clone(), []
    optimiser = Adam(dictionary)
    for step in range(400):
        x = rows() * scale
        loss = dictionary.loss(x, x, step / 400)
        loss.total.backward()
        optimiser.step(1e-3)
        dictionary.after_step(loss.encoded)
        l0.append(float(loss.encoded.l0().float().mean()))
    assert l0[0] > 12, "it starts at 4 x the target"
    assert sum(l0[-20:]) / 20 == pytest.approx(4, rel=0.15)
    moved = (dictionary.threshold.detach() - started).abs().median()
    active = loss.encoded.acts[loss.encoded.acts > 0].median()
    assert float(moved) > 0.1 * float(active), "thresholds move on the scale of the activations"
    assert float(dictionary.threshold.detach().min()) >= 0


def test_jumprelus_penalty_warms_up():
    dictionary, x = made(JumpReLUConfig(d_sae=N, target_l0=3, sparsity_warmup=0.5)), sample()
    totals = [dictionary.loss(x, x, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    extra = [float(loss.total.detach() - loss.terms["mse"]) / float(loss.terms["penalty"]) for loss in totals]
    assert extra == pytest.approx([0, 0.5, 1, 1], abs=1e-4)


def test_a_reset_jumprelu_latent_fires_on_what_it_was_pointed_at():
    dictionary, x = made(JumpReLUConfig(d_sae=N, target_l0=3)), sample()
    row = x[(x - dictionary.b_pre).norm(dim=1).argmax()]
    dictionary.reset_latents(torch.tensor([7]), (row - dictionary.b_pre)[None])
    assert bool(dictionary.encode(row[None]).to_dense()[0, 7] > 0)


# -- gated -----------------------------------------------------------------------------------------


def test_gated_activations_and_gradients_are_the_papers_equations():
    dictionary, x = made(GatedConfig(d_sae=N, l1_coefficient=0.01)).double(), sample(seed=4).double()
    with torch.no_grad():
        for seed, p in enumerate((dictionary.r_mag, dictionary.b_mag, dictionary.b_enc)):
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    loss = dictionary.loss(x, x, 0.5)
    names = list(dict(dictionary.named_parameters()))
    got = torch.autograd.grad(loss.total, list(dictionary.parameters()))

    gate = pre_acts(dictionary, x)
    linear = (x - dictionary.b_pre) @ dictionary.W_enc
    acts = (gate > 0) * torch.relu(linear * dictionary.r_mag.exp() + dictionary.b_mag)
    torch.testing.assert_close(loss.encoded.to_dense(), acts.detach())
    mse = (x - acts @ dictionary.W_dec - dictionary.b_dec).square().mean()
    frozen = torch.relu(gate) @ dictionary.W_dec.detach() + dictionary.b_dec.detach()
    wanted = mse + 0.01 * torch.relu(gate).sum(1).mean() + (x - frozen).square().mean()
    torch.testing.assert_close(loss.total, wanted)
    for name, a, b in zip(
        names, got, torch.autograd.grad(wanted, list(dictionary.parameters())), strict=True
    ):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


# -- tied ------------------------------------------------------------------------------------------


def test_tied_weights_are_one_parameter_with_gradients_from_both_uses():
    config = TiedConfig(d_sae=N, l1_coefficient=0.01, bias_decay=0.1, centre=True)
    dictionary, x = made(config).double(), sample(seed=4).double()
    with torch.no_grad():
        dictionary.b_enc.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    assert set(dict(dictionary.named_parameters())) == {"b_enc", "W_dec", "b_dec"}
    dictionary.loss(x, x, 0.5).total.backward()
    W = dictionary.W_dec.detach().clone().requires_grad_()
    acts = torch.relu((x - dictionary.b_pre) @ W.T + dictionary.b_enc)
    mse = (x - acts @ W - dictionary.b_dec).square().mean()
    (mse + 0.01 * acts.sum(1).mean() + 0.1 * dictionary.b_enc.norm()).backward()
    torch.testing.assert_close(dictionary.W_dec.grad, W.grad)


def test_tied_centring_is_optional():
    assert float(made(TiedConfig(d_sae=N)).b_pre.abs().max()) == 0
    centred = made(TiedConfig(d_sae=N, centre=True))
    assert float(centred.b_pre.abs().max()) > 0 and torch.equal(centred.b_pre, centred.b_dec.detach())
    with pytest.raises(ConfigError, match="centre needs a decoder bias"):
        made(TiedConfig(d_sae=N, centre=True, decoder_bias=False))


def test_tied_refuses_two_places_of_the_same_width():
    site = {"model": "m", "model_fingerprint": "f", "start": 0, "stop": D}
    sites = Sites(inputs=(Site(hookpoint="a", **site),), outputs=(Site(hookpoint="b", **site),))
    with pytest.raises(ConfigError, match="must read and write the same place"):
        Tied(TiedConfig(d_sae=N), D, D, N, sites)


# -- p-anneal --------------------------------------------------------------------------------------


def test_p_anneal_starts_as_l1_and_its_penalty_is_continuous_as_p_falls():
    config = PAnnealConfig(d_sae=N, l1_coefficient=0.01, anneal_from=0.2, anneal_until=0.8)
    dictionary, x = made(config), sample(seed=4)
    weighted, ps = [], []
    for progress in (0.0, 0.2, 0.5, 0.8, 1.0):
        loss = dictionary.loss(x, x, progress)
        dictionary.after_step(loss.encoded)
        ps.append(float(dictionary.p))
        weighted.append(float(loss.total.detach() - loss.terms["mse"]))
    assert ps == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    assert weighted == pytest.approx([0.01 * float(loss.terms["l1"])] * 5, rel=1e-3), "same acts, same value"
    acts = loss.encoded.to_dense()
    by_hand = ((acts + 1e-3).pow(0.2) - 1e-3**0.2).sum(1).mean()
    torch.testing.assert_close(loss.terms["penalty"], by_hand)
    assert set(dictionary.training_buffers()) == {"tokens_since_fired", "p", "penalty_scale"}


def test_p_anneal_must_end_after_it_starts():
    with pytest.raises(ConfigError, match="anneal_from must be less than anneal_until"):
        PAnnealConfig.build({"anneal_from": 0.5, "anneal_until": 0.5})


# -- options that several share --------------------------------------------------------------------


def test_norm_weighted_l1_weighs_activations_and_leaves_norms_free():
    dictionary, x = made(ReLUConfig(d_sae=N, l1_coefficient=0.01, norm_weighted=True)), sample(seed=4)
    with torch.no_grad():
        dictionary.W_dec.mul_(torch.linspace(0.5, 2, N)[:, None])
    assert dictionary.constraints().unit_norm == ()
    dictionary.loss(x, x, 0.5).total.backward()
    W = dictionary.W_dec.detach().clone().requires_grad_()
    acts = torch.relu(pre_acts(dictionary, x)).detach()
    mse = (x - acts @ W - dictionary.b_dec).square().mean()
    (mse + 0.01 * (acts * W.norm(dim=1)).sum(1).mean()).backward()
    torch.testing.assert_close(dictionary.W_dec.grad, W.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [ReLUConfig, GatedConfig, PAnnealConfig, TiedConfig, JumpReLUConfig])
def test_without_a_decoder_bias_nothing_is_added_or_saved(config, tmp_path):
    dictionary, x = made(config(d_sae=N, decoder_bias=False)), sample(seed=4)
    assert "b_dec" not in dictionary.state_dict() and "b_dec" not in dict(dictionary.named_parameters())
    encoded = dictionary.encode(x)
    torch.testing.assert_close(
        dictionary.decode(encoded), encoded.to_dense() @ dictionary.W_dec, atol=1e-4, rtol=1e-4
    )
    dictionary.save(tmp_path / "d", x)
    assert float(dictionaries.load(tmp_path / "d").b_dec.abs().max()) == 0


@pytest.mark.parametrize("config", [ReLUConfig, GatedConfig, PAnnealConfig])
@pytest.mark.parametrize(
    ("given", "d_sae", "expected"), [(None, 1024, 0.025), (None, 1023, 0.5), (0.1, 40, 0.1), (0, 2000, 0.5)]
)
def test_many_latents_start_where_few_are_active_unless_asked_otherwise(config, given, d_sae, expected):
    dictionary = dictionaries.build(config(d_sae=d_sae, start_density=given), D, D)
    x = sample(2000)
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    density = float((pre_acts(dictionary, x) > 0).double().mean())
    assert density == pytest.approx(expected, rel=0.2)
