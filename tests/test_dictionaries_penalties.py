"""Penalties on activations, noise, steering to an l0, warm-up, what the penalty does not see: values and gradients."""

import math
from typing import Any

import pytest
import torch

from sememe import dictionaries
from sememe.dictionaries import activation_penalty
from sememe.dictionaries.base import Trainable
from sememe.dictionaries.gated import GatedConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.steered import SteeredConfig
from sememe.dictionaries.tied import TiedConfig
from sememe.dictionaries.variational import VariationalConfig
from sememe.encoded import Encoded
from sememe.errors import ConfigError
from sememe.optimiser import Adam, Muon, Signum

D, N = 12, 40
STEERED: list[type[SteeredConfig]] = [ReLUConfig, TiedConfig, GatedConfig, PAnnealConfig]


def sample(n: int = 64, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def made(config, seed: int = 0) -> Trainable:
    dictionary, x = dictionaries.build(config, D, D), sample()
    dictionary.initialise(x, x, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        dictionary.b_enc.add_(0.3 * torch.randn(N, generator=torch.Generator().manual_seed(7)))
    return dictionary


def copies(dictionary: Trainable) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone().requires_grad_() for name, parameter in dictionary.named_parameters()
    }


def relu_acts(dictionary: Trainable, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    W_enc = p["W_enc"] if "W_enc" in p else p["W_dec"].T
    return torch.relu((x - dictionary.b_pre) @ W_enc + p["b_enc"])


def assert_same_gradients(dictionary: Trainable, p: dict[str, torch.Tensor]) -> None:
    for name, parameter in dictionary.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
        torch.testing.assert_close(
            parameter.grad, p[name].grad, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- the parts of the penalty ----------------------------------------------------------------------


def l1(acts: torch.Tensor) -> torch.Tensor:
    return acts.sum(1).mean()


def root(acts: torch.Tensor) -> torch.Tensor:
    return ((acts + 0.01).sqrt() - 0.1).sum(1).mean()


def entropy(acts: torch.Tensor) -> torch.Tensor:
    p = acts / acts.sum(1, keepdim=True).clamp_min(1e-8)  # a row may have none
    return -(p * p.clamp_min(1e-30).log()).sum(1).mean()


PARTS: dict[str, tuple[dict[str, Any], Any]] = {
    "l1": ({"l1_coefficient": 0.02}, lambda acts: 0.02 * l1(acts)),
    "sqrt": (
        {"l1_coefficient": 0.0, "sqrt_coefficient": 0.03, "sqrt_eps": 0.01},
        lambda acts: 0.03 * root(acts),
    ),
    "entropy": ({"l1_coefficient": 0.0, "entropy_coefficient": 0.5}, lambda acts: 0.5 * entropy(acts)),
    "all": (
        {"l1_coefficient": 0.02, "sqrt_coefficient": 0.03, "sqrt_eps": 0.01, "entropy_coefficient": 0.5},
        lambda acts: 0.02 * l1(acts) + 0.03 * root(acts) + 0.5 * entropy(acts),
    ),
}


@pytest.mark.parametrize("part", sorted(PARTS))
@pytest.mark.parametrize("config", [ReLUConfig, TiedConfig])
def test_values_and_gradients_are_those_of_the_written_loss(config, part):
    options, penalty = PARTS[part]
    dictionary, x = made(config(d_sae=N, **options)).double(), sample(seed=4).double()
    with torch.no_grad():
        dictionary.b_enc.fill_(0.1)  # a row without active latents has no entropy to compare
    loss = dictionary.loss(x, x, 0.5)
    loss.total.backward()
    p = copies(dictionary)
    acts = relu_acts(dictionary, p, x)
    wanted = (x - acts @ p["W_dec"] - p["b_dec"]).square().mean() + penalty(acts)
    wanted.backward()
    torch.testing.assert_close(loss.total, wanted, rtol=1e-6, atol=1e-6)
    assert_same_gradients(dictionary, p)


def test_norms_weigh_every_part():
    config = ReLUConfig(d_sae=N, sqrt_coefficient=0.03, entropy_coefficient=0.5, norm_weighted=True)
    dictionary, x = made(config).double(), sample(seed=4).double()
    with torch.no_grad():
        dictionary.W_dec.mul_(torch.linspace(0.5, 2, N)[:, None])
    dictionary.loss(x, x, 0.5).total.backward()
    p = copies(dictionary)
    acts = relu_acts(dictionary, p, x)
    weighted = acts * p["W_dec"].norm(dim=1)
    roots = ((weighted + 1e-3).sqrt() - 1e-3**0.5).sum(1).mean()
    penalty = 1e-3 * l1(weighted) + 0.03 * roots + 0.5 * entropy(weighted)
    ((x - acts @ p["W_dec"] - p["b_dec"]).square().mean() + penalty).backward()
    assert_same_gradients(dictionary, p)


def test_entropy_asks_for_few_and_not_for_small_activations():
    config = ReLUConfig(d_sae=N, l1_coefficient=0.0, entropy_coefficient=1.0)
    dictionary, x = made(config), sample(seed=4)
    one = dictionary.loss(x, x, 0.5).terms
    with torch.no_grad():
        dictionary.W_enc.mul_(1e-6)
        dictionary.b_enc.mul_(1e-6)
    other = dictionary.loss(x, x, 0.5).terms
    assert float(other["l1"]) == pytest.approx(1e-6 * float(one["l1"]), rel=1e-4)
    assert float(other["entropy"]) == pytest.approx(float(one["entropy"]), rel=1e-4)
    with torch.no_grad():
        dictionary.b_enc.fill_(-1e3)
    assert float(dictionary.loss(x, x, 0.5).total.detach()) == pytest.approx(
        float((x - dictionary.b_dec).square().mean().detach())
    ), "a row without activations has no entropy"
    bad = Encoded.from_dense(torch.tensor([[1.0, 2.0], [math.nan, 1.0]]))
    assert math.isnan(float(activation_penalty.entropy(bad))), "what is not a number is not hidden"


# -- noise -----------------------------------------------------------------------------------------


def test_noise_is_on_pre_activations_and_gradients_pass_through_it():
    config = ReLUConfig(d_sae=N, l1_coefficient=0.02, noise=0.5)
    dictionary, x = made(config).double(), sample(seed=4).double()
    loss = dictionary.loss(x, x, 0.5)
    loss.total.backward()
    p = copies(dictionary)
    pre_acts = (x - dictionary.b_pre) @ p["W_enc"] + p["b_enc"]
    near = (pre_acts > -2.0).detach()
    drawn = torch.randn(
        int(near.sum()), generator=dictionary._random.generator(x.device), dtype=torch.float64
    )
    noise = torch.zeros_like(pre_acts).masked_scatter(near, 0.5 * drawn.clamp(-4, 4))
    acts = torch.relu(pre_acts + noise) * near
    ((x - acts @ p["W_dec"] - p["b_dec"]).square().mean() + 0.02 * l1(acts)).backward()
    torch.testing.assert_close(loss.encoded.to_dense(), acts.detach())
    assert_same_gradients(dictionary, p)
    torch.testing.assert_close(
        dictionary.encode(x).to_dense(), relu_acts(dictionary, p, x).detach(), msg="none when used"
    )


def test_noise_is_the_steps_own_and_comes_back_with_the_state():
    config, x = ReLUConfig(d_sae=N, noise=0.5), sample(seed=4)
    dictionary, other, third = made(config), made(config, seed=1), made(config)
    totals = []
    for _ in range(4):
        loss = dictionary.loss(x, x, 0.5)
        assert float(dictionary.loss(x, x, 0.5).total.detach()) == float(loss.total.detach())
        totals.append(float(loss.total.detach()))
        if len(totals) == 3:
            saved = {name: buffer.clone() for name, buffer in dictionary.training_buffers().items()}
        dictionary.after_step(loss.encoded)
    assert len(set(totals)) == 4
    assert float(other.loss(x, x, 0.5).total.detach()) != totals[0], "another seed, other noise"
    assert "noise" in saved and "noise" not in made(ReLUConfig(d_sae=N)).training_buffers()
    for name, buffer in third.training_buffers().items():
        buffer.copy_(saved[name])
    assert float(third.loss(x, x, 0.5).total.detach()) == totals[2]


def test_noise_alone_makes_latents_silent_that_are_not_worth_it():
    """Two orthogonal directions, one above and one below the noise: only the first is worth a latent."""
    config = ReLUConfig(d_sae=2, l1_coefficient=0.0, noise=1.0, resample="none")
    dictionary = dictionaries.build(config, 2, 2)
    generator = torch.Generator().manual_seed(0)

    def rows() -> torch.Tensor:
        active = torch.rand(1024, 2, generator=generator) < 0.2
        return active * torch.tensor([6.0, 0.3])

    dictionary.initialise(rows(), rows(), generator)
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(2))
        dictionary.W_enc.copy_(torch.eye(2))
    optimiser = Adam(dictionary)
    for _ in range(600):
        x = rows()
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
        optimiser.step(1e-2)
        dictionary.after_step(loss.encoded)
    x = rows()
    fires = (dictionary.encode(x).to_dense() > 0).float()
    strong, weak = (x[:, 0] > 0), (x[:, 1] > 0)
    assert float(fires[strong, 0].mean()) > 0.99 and float(fires[~strong, 0].mean()) < 0.01
    assert float(fires[weak & ~strong, 1].mean()) < 0.01


# -- steering and warm-up --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "coefficient"),
    [
        # One architecture from either side in every run; the others share its controller, and are slow.
        *(pytest.param(c, 3e-3, marks=[pytest.mark.slow] * (c is not ReLUConfig)) for c in STEERED),
        (ReLUConfig, 0.6),
    ],
)
def test_the_weight_is_steered_until_l0_is_the_set_point(config, coefficient):
    """From too small and from too large a weight."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(48, 24, generator=generator), dim=1)

    def rows() -> torch.Tensor:
        active = torch.rand(256, 48, generator=generator) < 0.08
        return 8 * (active * torch.rand(256, 48, generator=generator)) @ features

    dictionary = dictionaries.build(config(d_sae=96, l1_coefficient=coefficient, target_l0=6), 24, 24)
    dictionary.initialise(rows(), rows(), generator)
    optimiser, l0, factors = Adam(dictionary), [], []
    n_steps = 1600 if config is TiedConfig else 1000  # a tied one starts sparse: its weight has further to go
    for step in range(n_steps):
        x = rows()
        loss = dictionary.loss(x, x, step / n_steps)
        loss.total.backward()
        optimiser.step(3e-3)
        dictionary.after_step(loss.encoded)
        l0.append(float(loss.encoded.l0().float().mean()))
        factors.append(float(loss.terms["steered_factor"]))
    print(l0[::50], factors[::50])
    assert sum(l0[-50:]) / 50 == pytest.approx(6, rel=0.2)
    assert factors[-1] > 2 if coefficient < 0.1 else factors[-1] < 0.9


@pytest.mark.parametrize("start_l0", [16, None])
def test_the_controller_is_the_written_one(start_l0):
    config = ReLUConfig(
        d_sae=N, l1_coefficient=0.01, target_l0=4, start_l0=start_l0, steering=0.05, sparsity_warmup=0.1
    )
    dictionary, average, before, start, log_factor = made(config), None, None, start_l0, 0.0
    for progress in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9):
        x = sample(seed=int(100 * progress))
        loss = dictionary.loss(x, x, progress)
        wanted = 0.01 * min(1, progress / 0.1) * math.exp(log_factor) * float(loss.terms["l1"])
        assert float(loss.total.detach() - loss.terms["mse"]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        dictionary.after_step(loss.encoded)
        if progress >= 0.1:
            l0 = float(loss.encoded.l0().float().mean())
            start = l0 if start is None else start
            average = l0 if average is None else 0.8 * average + 0.2 * l0
            set_point = 4 * (start / 4) ** max(0, 1 - progress / 0.3)
            error = max(-1, min(1, math.log(average / set_point)))
            log_factor += 0.05 * error + 2 * (0 if before is None else error - before)
            before = error
        assert float(dictionary.log_factor) == pytest.approx(log_factor, rel=1e-4, abs=1e-6)
    assert log_factor != 0
    assert {"log_factor", "l0_average", "first_l0", "l0_error"} <= set(dictionary.training_buffers())
    assert "log_factor" not in made(ReLUConfig(d_sae=N)).training_buffers()
    assert "log_factor" not in dictionary.state_dict(), "a finished dictionary has no use for it"


def test_the_set_point_moves_geometrically_and_stays():
    config = ReLUConfig(d_sae=N, target_l0=4, start_l0=64, l0_anneal=0.8)
    points = [made(config).set_point(progress) for progress in (0.0, 0.2, 0.4, 0.8, 1.0)]
    assert points == pytest.approx([64, 32, 16, 4, 4])
    assert made(ReLUConfig(d_sae=N, target_l0=4, start_l0=4)).set_point(0.0) == 4


@pytest.mark.parametrize(("first", "points"), [(64, [64, 16, 4]), (1, [4, 4, 4])])
def test_the_set_point_starts_at_the_first_l0_if_that_is_above_the_target(first, points):
    dictionary = made(ReLUConfig(d_sae=N, target_l0=4, l0_anneal=0.8))
    dictionary.first_l0.fill_(first)
    assert [float(dictionary.set_point(progress)) for progress in (0.0, 0.4, 0.8)] == pytest.approx(points)


@pytest.mark.parametrize("config", STEERED)
def test_the_penalty_warms_up(config):
    dictionary, x = made(config(d_sae=N, l1_coefficient=0.1, sparsity_warmup=0.5)), sample()
    plain = made(config(d_sae=N, l1_coefficient=0.1))
    free = made(config(d_sae=N, l1_coefficient=1e-12))
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        totals = [float(d.loss(x, x, progress).total.detach()) for d in (dictionary, plain, free)]
        assert totals[0] == pytest.approx(share * totals[1] + (1 - share) * totals[2], rel=1e-4)


# -- what the penalty does not see -----------------------------------------------------------------

CONSTANT = {"decoder_bias": False, "constant_latent": True}


@pytest.mark.parametrize("config", [ReLUConfig, GatedConfig, PAnnealConfig, JumpReLUConfig])
def test_a_constant_latent_writes_the_centre_and_is_not_penalised(config):
    options = {} if config is JumpReLUConfig else {"l1_coefficient": 0.3}
    made_so = config(d_sae=N, **CONSTANT, **options)
    dictionary, x = dictionaries.build(made_so, D, D), sample()
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    acts = dictionary.encode(x).to_dense().detach()
    assert bool((acts[:, 0] == acts[0, 0]).all())
    torch.testing.assert_close((acts[0, 0] * dictionary.W_dec[0]).detach(), dictionary._centre()(x))
    with torch.no_grad():
        dictionary.b_enc[1:] = -1e3  # only the constant is left
    loss = dictionary.loss(x, x, 0.5)
    assert float(loss.encoded.l0().float().mean()) == 1
    if config is JumpReLUConfig:
        assert float(loss.terms["penalty"]) == 1, "(0 / target - 1)^2"
    else:
        assert float(loss.terms["l1"]) == 0


def test_gradients_with_a_constant_latent_are_those_of_the_written_loss():
    config = ReLUConfig(
        d_sae=N, l1_coefficient=0.02, sqrt_coefficient=0.03, entropy_coefficient=0.5, **CONSTANT
    )
    dictionary, x = made(config).double(), sample(seed=4).double()
    dictionary.loss(x, x, 0.5).total.backward()
    p = copies(dictionary)
    acts = relu_acts(dictionary, p, x)
    roots = ((acts[:, 1:] + 1e-3).sqrt() - 1e-3**0.5).sum(1).mean()
    penalty = 0.02 * l1(acts[:, 1:]) + 0.03 * roots + 0.5 * entropy(acts[:, 1:])
    ((x - acts @ p["W_dec"]).square().mean() + penalty).backward()
    assert_same_gradients(dictionary, p)


def test_steering_does_not_count_a_constant_latent():
    dictionary, x = made(ReLUConfig(d_sae=N, target_l0=5, **CONSTANT)), sample()
    loss = dictionary.loss(x, x, 0.5)
    dictionary.after_step(loss.encoded)
    assert float(dictionary.l0_average) == pytest.approx(float(loss.encoded.l0().float().mean()) - 1)


def test_a_constant_latent_of_centred_data_fires_and_can_learn():
    dictionary = dictionaries.build(ReLUConfig(d_sae=N, **CONSTANT), D, D)
    x = torch.zeros(8, D)
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    assert 0 < float(dictionary.encode(x).to_dense()[0, 0].detach()) < 0.01
    torch.testing.assert_close(dictionary.W_dec.detach().norm(dim=1), torch.ones(N))


@pytest.mark.parametrize("config", [*STEERED, JumpReLUConfig])
def test_the_penalty_has_no_gradient_for_unpenalised_latents(config):
    """The loss with a hundred times the weight less the loss without: what the penalty alone asks for."""
    x, grads = sample(seed=4), []
    weight = "l0_coefficient" if config is JumpReLUConfig else "l1_coefficient"
    options = {"target_l0": 3.0, "bandwidth": 0.3} if config is JumpReLUConfig else {}
    for value in (1.0, 100.0):
        dictionary = made(config(d_sae=N, unpenalised_latents=5, **options, **{weight: value}))
        dictionary.loss(x, x, 0.5).total.backward()
        name = "relative_threshold" if config is JumpReLUConfig else "b_enc"
        grads.append(dictionary.get_parameter(name).grad)
    asked = (grads[1] - grads[0]).abs()
    assert float(asked[:5].max()) <= 1e-5 * float(asked[5:].max()) and float(asked[5:].max()) > 0
    assert dictionary.penalised.tolist() == [0.0] * 5 + [1.0] * (N - 5)


def test_unpenalised_latents_start_as_all_others_and_are_not_counted():
    dictionary, x = made(JumpReLUConfig(d_sae=N, target_l0=3.0, unpenalised_latents=5)), sample()
    started = dictionary.relative_threshold.detach()
    assert float(started[:5].min()) > 0.2 * float(started[5:].mean())
    steered, x = made(ReLUConfig(d_sae=N, target_l0=5, unpenalised_latents=7)), sample()
    loss = steered.loss(x, x, 0.5)
    steered.after_step(loss.encoded)
    seen = (loss.encoded.to_dense()[:, 7:] != 0).sum(1).float().mean()
    assert float(steered.l0_average) == pytest.approx(float(seen))


def test_all_latents_but_one_may_be_unpenalised():
    dictionaries.build(ReLUConfig(d_sae=N, unpenalised_latents=N - 1), D, D)
    with pytest.raises(
        ConfigError, match=r"unpenalised_latents must be less than d_sae=40.*got 40\. Lower it"
    ):
        dictionaries.build(ReLUConfig(d_sae=N, unpenalised_latents=N), D, D)


# -- a non-negative decoder ------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", [Adam, Muon, Signum])
@pytest.mark.parametrize("config", [*STEERED, JumpReLUConfig])
def test_a_non_negative_decoder_stays_so_with_rows_of_norm_1(config, optimiser):
    dictionary, x = dictionaries.build(config(d_sae=N, non_negative_decoder=True), D, D), sample()
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    dictionary.reset_latents(torch.tensor([3, 4]), torch.stack([-torch.ones(D), torch.eye(D)[2] - 0.1]))
    torch.testing.assert_close(
        dictionary.W_dec[3].detach(), torch.full((D,), D**-0.5), msg="no positive part"
    )
    torch.testing.assert_close(dictionary.W_dec[4].detach(), torch.eye(D)[2])
    steps, started = optimiser(dictionary), dictionary.W_dec.detach().clone()
    for _ in range(30):
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
        steps.step(0.02)
        dictionary.after_step(loss.encoded)
        W_dec = dictionary.W_dec.detach()
        assert float(W_dec.min()) >= 0
        torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(N))
        if optimiser is Signum:
            base = steps.slots["W_dec"]["base"]
            torch.testing.assert_close(base.norm(dim=1), torch.ones(N))
            assert float(base.min()) >= 0
    assert int((W_dec == 0).sum()) > 20 and float((W_dec - started).abs().max()) > 0.1


def test_frozen_rows_of_a_non_negative_decoder_keep_every_bit():
    dictionary, x = made(ReLUConfig(d_sae=N, non_negative_decoder=True)), sample()
    steps, before = Adam(dictionary), dictionary.W_dec.detach().clone()
    steps.freeze(torch.arange(N) < 20)
    for _ in range(5):
        dictionary.loss(x, x, 0.5).total.backward()
        steps.step(0.02)
    assert torch.equal(dictionary.W_dec[:20], before[:20]) and not torch.equal(
        dictionary.W_dec[20:], before[20:]
    )


def test_norms_are_free_when_weighted_and_the_sign_is_not():
    constraints = made(ReLUConfig(d_sae=N, non_negative_decoder=True, norm_weighted=True)).constraints()
    assert constraints.unit_norm == () and constraints.non_negative == ("W_dec",)
    both = made(JumpReLUConfig(d_sae=N, non_negative_decoder=True)).constraints()
    assert set(both.non_negative) == {"W_dec", "relative_threshold"}


# -- options without effect ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (ReLUConfig, {"sqrt_eps": 0.1}, r"sqrt_eps must be left out when sqrt_coefficient is 0.*got 0.1"),
        (ReLUConfig, {"start_l0": 9}, r"start_l0 must be left out when target_l0 is not given"),
        (TiedConfig, {"steering": 0.1}, r"steering must be left out when target_l0 is not given"),
        (
            GatedConfig,
            {"target_l0": 9, "start_l0": 9, "l0_anneal": 0.2},
            r"l0_anneal must be left out when start_l0 is the target",
        ),
        (PAnnealConfig, {"l0_anneal": 0.2}, r"l0_anneal must be left out when target_l0 is not given"),
        (
            PAnnealConfig,
            {"l1_coefficient": 0, "target_l0": 9},
            r"l1_coefficient must be > 0, got 0. Raise it.",
        ),
        (
            ReLUConfig,
            {"l1_coefficient": 0, "sparsity_warmup": 0.1},
            r"sparsity_warmup must be left out when every weight of the penalty is 0",
        ),
        (
            ReLUConfig,
            {"l1_coefficient": 0, "norm_weighted": True},
            r"norm_weighted must be left out when every weight",
        ),
        (ReLUConfig, {"noise": 0.1, "norm_weighted": True}, r"norm_weighted must go without noise.*Drop one"),
        (
            JumpReLUConfig,
            {"target_l0": None, "l0_anneal": 0.2},
            r"l0_anneal must be left out when target_l0 is not given",
        ),
        (
            JumpReLUConfig,
            {"target_l0": 9, "start_l0": 9, "l0_anneal": 0.2},
            r"l0_anneal must be left out when start_l0 is the target",
        ),
        (ReLUConfig, {"constant_latent": True}, r"constant_latent must go without a decoder bias"),
        (TiedConfig, CONSTANT, r"constant_latent must be false when weights are tied"),
        (
            ReLUConfig,
            {**CONSTANT, "unpenalised_latents": 1},
            r"unpenalised_latents must be more than 1 beside constant_latent.*got 1\. Drop it",
        ),
        (
            ReLUConfig,
            {"l1_coefficient": 0, "unpenalised_latents": 3},
            r"unpenalised_latents must be left out when every weight of the penalty is 0",
        ),
        (VariationalConfig, {"unpenalised_latents": 3}, r"unpenalised_latents must be 0: the prior"),
        (ReLUConfig, {"l1_coefficient": -1.0}, r"l1_coefficient must be >= 0, got -1.0. Raise it."),
    ],
)
def test_options_without_effect_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config.build(options)


def test_noise_may_be_warmed_up_and_steered_alone():
    config = ReLUConfig(d_sae=N, l1_coefficient=0, noise=0.3, sparsity_warmup=0.5, target_l0=4)
    dictionary, x = made(config), sample()
    assert torch.equal(dictionary.loss(x, x, 0.0).encoded.to_dense(), dictionary.encode(x).to_dense())
    before = float(dictionary.loss(x, x, 0.5).encoded.l0().float().mean())
    with torch.no_grad():
        dictionary.log_factor.fill_(3.0)
    assert float(dictionary.loss(x, x, 0.5).encoded.l0().float().mean()) > before
