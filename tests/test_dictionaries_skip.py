"""Skip transcoders: a linear map of the input beside the latents, in every architecture that can have one."""

import pytest
import torch
from test_dictionaries import CONFIGS, EASY, ONE_PLACE, D, sample

from sememe import dictionaries, kernels
from sememe.dictionaries import TRAINABLE, Site, Sites, Trainable
from sememe.dictionaries.linear import LinearConfig
from sememe.errors import ConfigError, FormatError, ShapeError
from sememe.formats.dictionary_learning import write
from sememe.optimiser import Adam

D_OUT = 9
KINDS = sorted(
    kind for kind in TRAINABLE if isinstance(CONFIGS[kind], LinearConfig) and kind not in ONE_PLACE
)


def sites(read: str, write: str, d_out: int = D_OUT) -> Sites:
    site = Site(model="m", model_fingerprint="f", hookpoint=read, start=0, stop=D)
    return Sites(inputs=(site,), outputs=(site.replace(hookpoint=write, stop=d_out),))


def made(kind: str, seed: int = 0, **options) -> Trainable:
    config = CONFIGS[kind].replace(skip=True, **options)
    dictionary = dictionaries.build(config, D, D_OUT, sites("mlp_in.1", "mlp_out.1"))
    generator = torch.Generator().manual_seed(seed)
    dictionary.initialise(sample(), sample(d=D_OUT, seed=1), generator)
    return dictionary


def turned(kind: str) -> Trainable:
    """With a skip connection that does something."""
    dictionary = made(kind)
    with torch.no_grad():
        dictionary.W_skip.copy_(0.3 * torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(5)))
    return dictionary


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def test_it_starts_at_zero_and_adds_a_linear_map(kind):
    x = sample(seed=3)
    fresh, bent = made(kind).eval(), turned(kind).eval()
    assert fresh.W_skip.shape == (D, D_OUT) and not bool(fresh.W_skip.any())
    torch.testing.assert_close(bent(x), fresh(x) + x @ bent.W_skip, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ShapeError, match=r"needs the input beside the latents, got no x. Pass decode\(encoded, x\)"
    ):
        bent.decode(bent.encode(x))


def test_folding_keeps_the_map(kind, tmp_path):
    dictionary, x = turned(kind).eval(), sample(seed=3)
    dictionary.scale_in.fill_(0.37)
    dictionary.scale_out.fill_(2.5)
    expected = dictionary(x * 0.37) / 2.5
    torch.testing.assert_close(dictionary.fold()(x), expected, atol=1e-4, rtol=1e-4)
    dictionary.save(tmp_path / "d", x)
    loaded = dictionaries.load(tmp_path / "d")
    assert isinstance(loaded.config, LinearConfig) and loaded.config.skip
    with torch.no_grad(), kernels.use("reference"):
        torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-4)


def test_its_gradient_is_the_losss_derivative(kind):
    dictionary = turned(kind).double()
    x, target = sample(seed=2).double(), sample(d=D_OUT, seed=4).double()
    dictionary.after_step(dictionary.loss(x, target, 0.5).encoded)
    dictionary.loss(x, target, 0.5).total.backward()
    found, eps, values = float(dictionary.W_skip.grad[1, 2]), 1e-6, []
    for step in (eps, -2 * eps):
        with torch.no_grad():
            dictionary.W_skip[1, 2] += step
        loss = dictionary.loss(x, target, 0.5)
        gated = loss.terms.get("auxiliary", torch.zeros(()))  # sees a frozen decoder
        values.append(float(loss.total.detach() - gated))
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(found, abs=1e-6, rel=1e-4)


def test_it_learns_the_linear_part_that_latents_would_otherwise_carry(kind):
    """Targets are a dense linear map of the input: hopeless for a few latents, nothing for the skip connection."""
    x = sample(256, seed=6)
    target = x @ torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(8))
    few = (
        {"l1_coefficient": 0.2} if kind == "lista" else EASY.get(kind, {"k": 1})
    )  # lista's EASY is near dense
    n_steps, rate = (300, 0.02) if kind in ("relu", "gated", "p_anneal") else (100, 0.05)
    left = {}
    for skip in (True, False):
        dictionary = dictionaries.build(CONFIGS[kind].replace(skip=skip, **few), D, D_OUT)
        dictionary.initialise(x, target, torch.Generator().manual_seed(0))
        optimiser = Adam(dictionary)
        for _ in range(n_steps):
            loss = dictionary.loss(x, target, 0.5)
            loss.total.backward()
            optimiser.step(rate)
            dictionary.after_step(loss.encoded)
        left[skip] = float(loss.terms["mse"])
    assert left[True] < 0.5 * left[False]


def test_it_is_refused_where_it_could_copy_the_input(kind):
    config = CONFIGS[kind].replace(skip=True)
    with pytest.raises(
        ConfigError, match=r"must write elsewhere than it reads.*got mlp_in.1 on both sides. Drop skip"
    ):
        dictionaries.build(config, D, D, sites("mlp_in.1", "mlp_in.1", D))
    bare = dictionaries.build(config, D, D)
    with pytest.raises(
        ConfigError, match=r"must write elsewhere than it reads.*got the targets are the inputs"
    ):
        bare.initialise(sample(), sample(), torch.Generator().manual_seed(0))


def test_a_tied_dictionary_has_none_and_a_format_without_it_refuses_it(tmp_path):
    for kind in sorted(ONE_PLACE):
        message = rf"a {kind.replace('_', ' ')} dictionary reconstructs what it reads.*got skip"
        with pytest.raises(ConfigError, match=message):
            dictionaries.build(CONFIGS[kind].replace(skip=True), D, D)
    with pytest.raises(FormatError, match="no skip connection to be written as dictionary_learning"):
        write(turned("topk"), tmp_path)
