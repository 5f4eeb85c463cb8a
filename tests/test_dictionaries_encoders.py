"""What architectures promise whose encoder is more than one product: pursuit, hidden layer, LISTA, variational."""

import functools
import itertools
import math

import pytest
import torch
from sklearn.linear_model import Lasso
from torch.nn.functional import logsigmoid

from sememe import dictionaries, kernels
from sememe.dictionaries import spike_slab, variational
from sememe.dictionaries.base import Trainable
from sememe.dictionaries.lista import LISTAConfig
from sememe.dictionaries.matching_pursuit import MatchingPursuitConfig
from sememe.dictionaries.mlp_encoder import MLPEncoderConfig
from sememe.dictionaries.tied import TiedConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.dictionaries.variational import VariationalConfig
from sememe.errors import ConfigError

D, N = 12, 40


def sample(n: int = 64, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def made(config) -> Trainable:
    dictionary, x = dictionaries.build(config, D, D), sample()
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    return dictionary


@pytest.mark.parametrize("kind", ["matching_pursuit", "mlp_encoder", "lista", "variational"])
def test_an_encoder_that_is_not_linear_names_no_directions(kind):
    assert (
        dictionaries.build(dictionaries.TRAINABLE[kind].config_class(d_sae=N), D, D).encoder_directions()
        is None
    )


# -- matching pursuit ------------------------------------------------------------------------------


def test_pursuit_leaves_less_at_every_step_and_what_it_returns_is_what_is_left():
    dictionary, x = made(MatchingPursuitConfig(k=8, d_sae=N)), sample(seed=4)
    norms = []
    for k in range(1, 9):
        shorter = dictionaries.build(MatchingPursuitConfig(k=k, d_sae=N), D, D)
        shorter.load_state_dict(dictionary.state_dict())
        norms.append((x - shorter(x)).detach().norm(dim=1))
        mse = float(shorter.loss(x, x, 0.5).terms["mse"])
        assert mse == pytest.approx(float(norms[-1].square().sum() / x.numel()), rel=1e-4)
    assert all(bool((b <= a + 1e-5).all()) for a, b in itertools.pairwise(norms))
    assert float(norms[-1].mean()) < 0.5 * float(norms[0].mean())


def test_pursuit_does_not_take_a_second_latent_for_what_the_first_explains():
    """Three directions 20 degrees apart and one across: TopK takes two of the three, the pursuit the one across."""
    angles = torch.tensor([0.0, 20.0, 40.0, 110.0]) * math.pi / 180
    W = torch.stack([angles.cos(), angles.sin()], dim=1)
    x = 4 * W[1:2] + 0.5 * W[3:4]
    pursuit = dictionaries.build(MatchingPursuitConfig(k=2, d_sae=4), 2, 2)
    topk = dictionaries.build(TopKConfig(k=2, d_sae=4), 2, 2)
    with torch.no_grad():
        for dictionary in (pursuit, topk):
            dictionary.W_dec.copy_(W)
        topk.W_enc.copy_(W.T)
    assert (pursuit.encode(x).to_dense() > 0).tolist() == [[False, True, False, True]]
    assert (topk.encode(x).to_dense() > 0).tolist() == [[False, True, True, False]]


def test_pursuits_bias_is_one_and_its_dead_latents_go_on_where_the_live_ones_ended():
    config = MatchingPursuitConfig(k=2, d_sae=N, dead_after_tokens=10, auxk=4)
    dictionary, x = made(config), sample(seed=4)
    assert set(dict(dictionary.named_parameters())) == {"W_dec", "b_dec"}
    with torch.no_grad():
        dictionary.b_dec.add_(1.0)
    assert "auxk" not in dictionary.loss(x, x, 0.5).terms
    dictionary.tokens_since_fired[20:] = 11
    loss = dictionary.loss(x, x, 0.5)
    residual = (x - dictionary(x)).detach()
    scores = torch.relu(residual @ dictionary.W_dec[20:].T)
    kept = scores.topk(4, dim=1)
    recon = torch.zeros_like(scores).scatter(1, kept.indices, kept.values) @ dictionary.W_dec[20:]
    wanted = (residual - recon).square().mean() / residual.square().mean()
    torch.testing.assert_close(loss.terms["auxk"], wanted.detach())


def test_pursuits_loss_against_another_target():
    dictionary, x, target = made(MatchingPursuitConfig(k=4, d_sae=N)), sample(seed=4), sample(seed=5)
    wanted = (target - dictionary(x)).square().mean()
    torch.testing.assert_close(dictionary.loss(x, target, 0.5).terms["mse"], wanted.detach())


# -- hidden layer ----------------------------------------------------------------------------------


def test_the_mlp_encoder_starts_close_to_topk_and_is_topk_without_its_hidden_layer():
    x = sample(seed=4)
    ours, topk = made(MLPEncoderConfig(k=5, d_sae=N, d_hidden=7)), made(TopKConfig(k=5, d_sae=N))
    assert ours.W_in.shape == (D, 7)
    near = float((ours(x) - topk(x)).detach().norm() / topk(x).detach().norm())
    assert 0 < near < 0.2
    with torch.no_grad():
        ours.W_out.zero_()
    assert torch.equal(ours(x), topk(x))


# -- LISTA -----------------------------------------------------------------------------------------


def lasso_like(n_steps: int, penalty: float) -> Trainable:
    """LISTA with the weights of ISTA for the non-negative Lasso about its start."""
    dictionary = made(LISTAConfig(d_sae=N, n_steps=n_steps))
    with torch.no_grad():
        step = 1 / torch.linalg.matrix_norm(dictionary.W_dec, ord=2) ** 2
        dictionary.W_enc.copy_(dictionary.W_dec.T * step)
        dictionary.b_enc.fill_(-penalty * float(step))
    return dictionary


def test_lista_with_istas_weights_goes_to_the_lasso():
    x, penalty = sample(n=6, seed=4), 0.8
    centred = (x - made(LISTAConfig(d_sae=N)).b_pre).double()
    errors = []
    for n_steps in (1, 10, 2000):
        dictionary = lasso_like(n_steps, penalty)
        lasso = Lasso(alpha=penalty / D, fit_intercept=False, positive=True, tol=1e-10, max_iter=100_000)
        wanted = lasso.fit(dictionary.W_dec.detach().double().T.numpy(), centred.T.numpy()).coef_
        found = dictionary.encode(x).to_dense().detach().double()
        errors.append(
            float((found - torch.from_numpy(wanted)).norm()) / float(torch.from_numpy(wanted).norm())
        )
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


@pytest.mark.parametrize("path", ["reference", "auto"])
def test_listas_gradients_are_those_of_the_dense_formula(path):
    dictionary, x = made(LISTAConfig(d_sae=N, n_steps=3, l1_coefficient=0.01)), sample(seed=4)
    with torch.no_grad():
        dictionary.b_enc.normal_(-0.05, 0.05, generator=torch.Generator().manual_seed(1))
        dictionary.W_back.add_(0.05 * torch.randn(N, D, generator=torch.Generator().manual_seed(2)))
    with kernels.use(path):
        dense = kernels.is_dense(x, dictionary.W_enc, dictionary.b_enc, dictionary.b_pre, None)
        assert dense == (path == "auto")
        loss = dictionary.loss(x, x, 0.5)
        got = torch.autograd.grad(loss.total, list(dictionary.parameters()))
    b = (x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc
    S = torch.eye(N) - dictionary.W_back @ dictionary.W_enc
    acts = torch.relu(b)
    for _ in range(3):
        acts = torch.relu(b + acts @ S)
    torch.testing.assert_close(loss.encoded.to_dense(), acts.detach(), atol=1e-4, rtol=1e-4)
    mse = (x - acts @ dictionary.W_dec - dictionary.b_dec).square().mean()
    total = mse + 0.01 * acts.sum(1).mean()
    torch.testing.assert_close(loss.total, total)
    names = list(dict(dictionary.named_parameters()))
    for name, a, b in zip(names, got, torch.autograd.grad(total, list(dictionary.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_lista_without_an_active_latent_gives_the_bias():
    dictionary, x = made(LISTAConfig(d_sae=N)), sample(seed=4)
    with torch.no_grad():
        dictionary.b_enc.fill_(-1e6)
    loss = dictionary.loss(x, x, 0.5)
    loss.total.backward()
    assert loss.encoded.acts.numel() == 0
    assert torch.equal(dictionary(x), dictionary.b_dec.expand(64, -1))
    assert float(dictionary.W_enc.grad.abs().max()) == 0


# -- variational -----------------------------------------------------------------------------------


def test_divergences_are_those_of_their_definition():
    dictionary, x = (
        made(VariationalConfig(d_sae=N, prior_l0=5, n_pseudo_inputs=3)).double(),
        sample(5).double(),
    )
    with torch.no_grad():
        for seed, p in enumerate(dictionary.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        q, prior = dictionary._posterior(x), dictionary._posterior(dictionary.pseudo_inputs)
    shared, terms = spike_slab.Shared(dictionary._weights()), spike_slab.prior_of(prior)

    def divergence(row: int, u: int) -> torch.Tensor:
        choice = torch.zeros(1, 3).double()
        choice[0, u] = 1.0
        return spike_slab.sampled(x[row : row + 1], choice, shared, terms, 50.0, torch.Generator)[1]

    bernoulli, normal = torch.distributions.Bernoulli, torch.distributions.Normal
    for row in range(5):
        for u in range(3):
            spikes = bernoulli(logits=q.logit[row]), bernoulli(logits=prior.logit[u])
            slabs = (
                normal(q.mean[row], torch.exp(q.log_var[row] / 2)),
                normal(prior.mean[u], torch.exp(prior.log_var[u] / 2)),
            )
            kl = torch.distributions.kl_divergence(*spikes)
            kl = kl + spikes[0].probs * torch.distributions.kl_divergence(*slabs)
            torch.testing.assert_close(divergence(row, u).detach(), kl.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_gradients_of_spike_and_slab_are_those_of_autograd(dtype, scale):
    """Also where spikes are all but certain, and an exponential of their logit would be infinite."""
    generator = torch.Generator().manual_seed(0)
    dictionary = made(VariationalConfig(d_sae=N, prior_l0=5, n_pseudo_inputs=3)).to(dtype)
    x, at = sample(20).to(dtype), torch.randn(20, D, generator=generator).to(dtype)
    with torch.no_grad():
        for seed, (name, p) in enumerate(dictionary.named_parameters()):
            size = scale if "spike" in name else 0.1
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
        assert scale == 0.1 or float(dictionary._posterior(x).logit.abs().max()) > 100
    choice = torch.softmax(torch.randn(20, 3, generator=generator), 1).to(dtype)
    leaves = [x.requires_grad_(), choice.requires_grad_(), *dictionary.parameters()]

    several = slice(0, 8), slice(8, 20)

    def noise(some: slice) -> torch.Generator:
        return torch.Generator().manual_seed(some.start)

    def by_autograd() -> tuple[torch.Tensor, torch.Tensor]:
        q, prior = dictionary._posterior(x), dictionary._posterior(dictionary.pseudo_inputs)
        spike, drawn = torch.sigmoid(q.logit), []
        for some in several:
            generator, shape = noise(some), spike[some].shape
            drawn.append([f(shape, generator=generator, dtype=dtype) for f in (torch.rand, torch.randn)])
        uniform, normal = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        acts = torch.sigmoid(5 * (uniform + spike - 1)) * (q.mean + torch.exp(q.log_var / 2) * normal)
        own, its = ([part[:, None] for part in q], [part[None] for part in prior])
        apart = (own[2].exp() + (own[1] - its[1]).square()) / its[2].exp()
        slabs = (its[2] - own[2] + apart - 1) / 2
        log_on, log_off = (logsigmoid(own[0]) - logsigmoid(its[0]), logsigmoid(-own[0]) - logsigmoid(-its[0]))
        on, off = torch.sigmoid(own[0]), torch.sigmoid(-own[0])
        divergences = (on * (log_on + slabs) + off * log_off).sum(2)
        return acts @ dictionary.W_dec + dictionary.b_dec, (choice * divergences).sum()

    def by_hand() -> tuple[torch.Tensor, torch.Tensor]:
        shared = spike_slab.Shared(dictionary._weights())
        prior = spike_slab.prior_of(shared.posterior(dictionary.pseudo_inputs))
        parts = [
            spike_slab.sampled(x[some], choice[some], shared, prior, 5.0, functools.partial(noise, some))
            for some in several
        ]
        return torch.cat([part[0] for part in parts]), parts[0][1] + parts[1][1]

    found = []
    for values in (by_hand(), by_autograd()):
        total = (values[0] * at).sum() + 0.3 * values[1]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        found.append([*(value.detach() for value in values), *grads])
    unused = [i for i, grad in enumerate(found[1]) if grad is None]
    assert unused == [i for i, grad in enumerate(found[0]) if grad is None] and len(unused) == 2
    for a, b in zip(*found, strict=True):
        if a is not None:
            size = float(b.abs().max())
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=(1e-10 if dtype == torch.float64 else 2e-5) * size
            )


def test_a_gradient_of_some_parameters_leaves_nothing_for_the_next_one(monkeypatch):
    monkeypatch.setattr(variational, "CHUNK_ENTRIES", N * 20)
    dictionary, x = made(VariationalConfig(d_sae=N, prior_l0=5)), sample(seed=4).requires_grad_()
    parameters = list(dictionary.parameters())
    wanted = torch.autograd.grad(dictionary.loss(x, x.detach(), 0.5).total, parameters)
    total = dictionary.loss(x, x.detach(), 0.5).total
    for some in (x, dictionary.b_enc):
        torch.autograd.grad(total, some, retain_graph=True)
    for a, b in zip(torch.autograd.grad(total, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_prior_spike_term_is_0_where_the_pseudo_inputs_have_the_priors_l0():
    dictionary, x = made(VariationalConfig(d_sae=N, prior_l0=5)), sample(seed=4)
    with torch.no_grad():
        dictionary.W_spike.zero_()
        dictionary.b_spike.fill_(math.log(5 / 35))
        assert float(dictionary.loss(x, x, 0.5).terms["kl_prior"]) == pytest.approx(0, abs=1e-4)
        dictionary.b_spike.fill_(math.log(10 / 30))
    by_hand = 10 * math.log(10 / 5) + 30 * math.log(30 / 35)
    assert float(dictionary.loss(x, x, 0.5).terms["kl_prior"]) == pytest.approx(by_hand, rel=1e-4)


def test_noise_is_part_of_the_training_state_and_evaluation_has_none():
    config = VariationalConfig(d_sae=N, prior_l0=5)
    dictionary, x = made(config), sample(seed=4)

    def sampled() -> float:
        return float(dictionary.loss(x, x, 0.5).terms["mse_sampled"])

    first = sampled()
    assert sampled() == first, "a step that is computed again sees the same noise"
    recon = dictionary.eval()(x)
    dictionary.after_step(dictionary.encode(x))
    saved = {name: buffer.clone() for name, buffer in dictionary.training_buffers().items()}
    second = sampled()
    assert second != first and torch.equal(dictionary(x), recon)
    dictionary.after_step(dictionary.encode(x))
    assert sampled() != second
    for name, buffer in dictionary.training_buffers().items():
        buffer.copy_(saved[name])
    assert sampled() == second


def test_chunks_hold_the_memory_down_and_change_nothing_but_the_noise(monkeypatch):
    dictionary, x = made(VariationalConfig(d_sae=N, prior_l0=5)), sample(n=200, seed=4)
    whole, encoded = dictionary.loss(x, x, 0.5), dictionary.encode(x)
    monkeypatch.setattr(variational, "CHUNK_ENTRIES", N * 7)
    parts = dictionary.loss(x, x, 0.5)
    for term in ("mse", "kl", "kl_prior"):
        torch.testing.assert_close(parts.terms[term], whole.terms[term])
    assert float(parts.terms["mse_sampled"]) == pytest.approx(float(whole.terms["mse_sampled"]), rel=0.1)
    torch.testing.assert_close(dictionary.encode(x).to_dense(), encoded.to_dense())
    every = dictionary._every_mode(x)
    assert torch.equal(every.to_dense(), encoded.to_dense()) and torch.equal(every.l0(), encoded.l0())


def test_sampled_spikes_sharpen():
    dictionary, x = made(VariationalConfig(d_sae=N, prior_l0=5, sharpness_start=1, sharpness=1e4)), sample()
    steps = [float(dictionary.loss(x, x, progress).total.detach()) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert len(set(steps[:3])) == 3 and steps[2] == steps[3], "the slope grows over half of the run"
    with pytest.raises(ConfigError, match=r"sharpness_start must differ from sharpness.*, got 50"):
        VariationalConfig.build({"sharpness_start": 50.0})
    with pytest.raises(ConfigError, match="sharpness_start must be left out when sharpness_warmup is 0"):
        VariationalConfig.build({"sharpness_warmup": 0.0, "sharpness_start": 3.0})


def test_folding_keeps_the_whole_posterior():
    dictionary, x = made(VariationalConfig(d_sae=N, prior_l0=5)), sample(seed=4)
    with torch.no_grad():
        dictionary.W_var.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    dictionary.scale_in.fill_(0.2)
    dictionary.scale_out.fill_(0.2)
    folded = dictionary.fold()
    before, after = dictionary._posterior(x * 0.2), folded._posterior(x)
    torch.testing.assert_close(after.logit, before.logit, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.mean * 0.2, before.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.log_var + 2 * math.log(0.2), before.log_var, atol=1e-4, rtol=1e-4)
    before, after = (d._posterior(d.pseudo_inputs) for d in (dictionary, folded))
    torch.testing.assert_close(after.logit, before.logit, atol=1e-4, rtol=1e-4)
    choices = [(rows - d.b_pre) @ d.W_choice + d.b_choice for d, rows in ((dictionary, x * 0.2), (folded, x))]
    torch.testing.assert_close(*choices, atol=1e-4, rtol=1e-4)


def test_what_a_variational_dictionary_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"ghost_after_tokens must be left out: .*got 5. Drop it"):
        VariationalConfig.build({"ghost_after_tokens": 5})
    for config in (VariationalConfig, LISTAConfig):
        with pytest.raises(ConfigError, match="constant_latent must be false"):
            config.build({"constant_latent": True, "decoder_bias": False})
    with pytest.raises(ConfigError, match="prior_l0 must be less than d_sae=40, got 40"):
        made(VariationalConfig(d_sae=N, prior_l0=N))


@pytest.mark.parametrize("config", [VariationalConfig(d_sae=N, prior_l0=5), LISTAConfig(d_sae=N)])
def test_the_price_of_activity_warms_up(config):
    dictionary, x = made(config.replace(sparsity_warmup=0.5)), sample(seed=4)
    term = "mse_sampled" if config.kind == "variational" else "mse"
    extra = []
    for progress in (0.0, 0.25, 0.5):
        if (
            config.kind == "variational"
        ):  # whose spikes sharpen meanwhile: they change the sample, not the price
            dictionary.config = dictionary.config.replace(sharpness_start=49.999)
        loss = dictionary.loss(x, x, progress)
        extra.append(float(loss.total.detach() - loss.terms[term]))
    assert extra[0] == pytest.approx(0, abs=1e-5)
    assert extra[1] == pytest.approx(extra[2] / 2, rel=1e-3) and extra[2] > 0


def test_lista_steers_its_weight_to_an_l0_and_starts_where_ista_settles():
    dictionary, x = made(LISTAConfig(d_sae=N, target_l0=3.0)), sample(seed=4)
    largest = float(torch.linalg.matrix_norm(dictionary.W_back.detach(), ord=2)) ** 2
    torch.testing.assert_close(dictionary.W_enc.T * largest, dictionary.W_back, atol=1e-3, rtol=1e-2)
    loss = dictionary.loss(x, x, 0.5)
    assert float(loss.encoded.l0().double().mean()) > 3
    dictionary.after_step(loss.encoded)
    assert float(dictionary.loss(x, x, 0.5).terms["steered_factor"]) > 1


def test_tied_biases_start_at_the_density_asked_for_and_stay_usual_when_reset():
    x = sample(n=1000, seed=0)
    for density in (0.025, 0.2):
        dictionary = dictionaries.build(TiedConfig(d_sae=N, start_density=density), D, D)
        dictionary.initialise(x, x, torch.Generator().manual_seed(0))
        share = (dictionary.encode(x).to_dense() > 0).float().mean(0)
        torch.testing.assert_close(share, torch.full((N,), density), atol=2e-3, rtol=0)
    b_enc = dictionary.b_enc.detach()
    usual = float(torch.cat([b_enc[:3], b_enc[4:]]).median())
    dictionary.reset_latents(torch.tensor([3]), torch.ones(1, D))
    assert float(dictionary.b_enc.detach()[3]) == usual < 0
