"""Several sites on both sides: a scale for each, decoder norms site by site, folding exact all the same."""

import pytest
import torch
from test_dictionaries import CONFIGS, ONE_PLACE

from sememe import dictionaries, kernels
from sememe.dictionaries import TRAINABLE, Site, Sites, Trainable
from sememe.dictionaries.linear import LinearConfig
from sememe.dictionaries.matching_pursuit import MatchingPursuitConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.selection import SelectionConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError

WIDTHS = (5, 7, 4)
SIZES = (1.0, 30.0, 0.2)
"""How large the activations of each site are."""
D = sum(WIDTHS)
PARTS = (slice(0, 5), slice(5, 12), slice(12, 16))
KINDS = sorted(kind for kind in TRAINABLE if isinstance(CONFIGS[kind], LinearConfig))
CHOOSING = sorted(
    kind for kind in KINDS if isinstance(CONFIGS[kind], SelectionConfig) and kind != "matching_pursuit"
)


def sites() -> Sites:
    found = tuple(
        Site(model="m", model_fingerprint="f", hookpoint=f"resid_post.{i}", start=part.start, stop=part.stop)
        for i, part in enumerate(PARTS)
    )
    return Sites(inputs=found, outputs=found)


def sample(n: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.cat([torch.full((width,), size) for width, size in zip(WIDTHS, SIZES, strict=True)])
    return sizes * (torch.randn(n, D, generator=generator) + torch.randn(D, generator=generator))


def made(kind: str, **options) -> Trainable:
    """In training units, scales set from the sample, rows of the decoder of very different lengths per site."""
    dictionary = dictionaries.build(CONFIGS[kind].replace(**options), D, D, sites())
    raw = sample()
    dictionary.set_scales(raw, raw)
    x = raw * dictionary.scale_in
    generator = torch.Generator().manual_seed(0)
    dictionary.initialise(x, x, generator)
    with torch.no_grad():
        for part in PARTS:
            dictionary.W_dec[:, part] *= torch.rand(40, 1, generator=generator) + 0.1
        dictionary.W_dec /= dictionary.W_dec.norm(dim=1, keepdim=True)
        if kind != "matching_pursuit":  # which has none
            dictionary.b_enc.add_(0.05 * torch.randn(40, generator=generator))
        if hasattr(dictionary, "threshold") and kind in ("batch_topk", "matryoshka"):
            dictionary.threshold.fill_(0.4)
    return dictionary.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_each_site_is_scaled_by_itself(kind):
    dictionary, x = made(kind), sample()
    if kind in ONE_PLACE:
        assert dictionary.scale_in.shape == (), "one decoder for both ends: one scale"
        return
    for part in PARTS:
        spread = (x - x.mean(0))[:, part].square().mean().sqrt()
        torch.testing.assert_close(dictionary.scale_in[part], (1 / spread).expand(part.stop - part.start))
    assert torch.equal(dictionary.scale_in, dictionary.scale_out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site_norms", ["l2", "l1"])
def test_folding_is_exact_with_a_scale_per_site(kind, site_norms, tmp_path):
    options = {}
    if site_norms == "l1":
        if kind not in (*CHOOSING, "relu"):
            pytest.skip("it has no such option")
        options = {"site_norms": "l1"} | ({"norm_weighted": True} if kind == "relu" else {})
    dictionary, x = made(kind, **options), sample(seed=3)
    scaled = x * dictionary.scale_in
    before, expected = dictionary.encode(scaled).to_dense(), dictionary(scaled) / dictionary.scale_out
    assert bool((before != 0).any())
    folded = dictionary.fold()
    after = folded.encode(x).to_dense()
    assert torch.equal(before != 0, after != 0), "the same latents fire"
    for part, size in zip(PARTS, SIZES, strict=True):
        torch.testing.assert_close(folded(x)[:, part], expected[:, part], atol=1e-4 * size, rtol=1e-4)
    dictionary.save(tmp_path / "d", x)
    loaded = dictionaries.load(tmp_path / "d")
    with torch.no_grad(), kernels.use("reference"):
        torch.testing.assert_close(loaded(x), folded(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CHOOSING)
def test_l1_chooses_latents_by_activation_times_the_sum_of_decoder_norms(kind):
    dictionary, x = made(kind, site_norms="l1"), sample(seed=3)
    x = x * dictionary.scale_in
    norms = sum(dictionary.W_dec[:, part].norm(dim=1) for part in PARTS).detach()
    torch.testing.assert_close(dictionary.site_norms().sum(1).detach(), norms)
    pre_acts = ((x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc).detach()
    weighed = pre_acts * norms
    acts = dictionary.encode(x).to_dense().detach()
    if kind == "mlp_encoder":
        pre_acts = dictionary.pre_acts_of(torch.arange(40))(x).detach()
        weighed = pre_acts * norms
    if kind in ("topk", "multi_topk", "mlp_encoder"):
        chosen = torch.zeros_like(acts).scatter(1, weighed.topk(5, dim=1).indices, 1.0)
    elif kind == "abs_topk":
        chosen = torch.zeros_like(acts).scatter(1, weighed.abs().topk(5, dim=1).indices, 1.0)
    elif kind == "group_max":
        groups = weighed.view(len(x), 5, 8)
        chosen = (groups == groups.amax(2, keepdim=True)).float().view(len(x), 40)
    else:
        chosen = (weighed > 0.4).float()
    wanted = pre_acts * chosen if kind == "abs_topk" else torch.relu(pre_acts) * chosen
    torch.testing.assert_close(acts, wanted, atol=1e-5, rtol=1e-5)
    plain = dictionaries.build(CONFIGS[kind], D, D, sites())
    plain.load_state_dict(dictionary.state_dict())
    assert not torch.equal(plain.eval().encode(x).to_dense() != 0, acts != 0), "norms change what is chosen"


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_a_batch_is_chosen_from_by_weighed_activations_and_the_threshold_follows_them(kind):
    dictionary, x = made(kind, site_norms="l1"), sample(seed=3)
    x = x * dictionary.scale_in
    norms = dictionary.site_norms().sum(1).detach()
    weighed = torch.relu((x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc).detach() * norms
    encoded = dictionary.train().loss(x, x, 0.5).encoded
    smallest = weighed.flatten().topk(5 * len(x)).values[-1]
    assert torch.equal(encoded.to_dense() != 0, weighed >= smallest)
    dictionary.after_step(encoded)
    torch.testing.assert_close(dictionary.threshold, 0.9 * torch.tensor(0.4) + 0.1 * smallest)


@pytest.mark.parametrize("site_norms", ["l1", "l2"])
def test_the_penalty_weighs_activations_by_the_norms_asked_for(site_norms):
    dictionary, x = made("relu", norm_weighted=True, site_norms=site_norms), sample(seed=3)
    with torch.no_grad():
        dictionary.W_dec.mul_(torch.rand(40, 1, generator=torch.Generator().manual_seed(4)) + 0.5)
    x = (x * dictionary.scale_in).double()
    dictionary = dictionary.double()
    loss = dictionary.loss(x, x, 0.5)
    acts = torch.relu((x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc)
    by_site = torch.stack([dictionary.W_dec[:, part].norm(dim=1) for part in PARTS])
    norms = by_site.sum(0) if site_norms == "l1" else by_site.square().sum(0).sqrt()
    mse = (x - acts @ dictionary.W_dec - dictionary.b_dec).square().mean()
    wanted = mse + dictionary.config.l1_coefficient * (acts * norms).sum(1).mean()
    torch.testing.assert_close(loss.total, wanted)
    loss.total.backward()
    found = dictionary.W_dec.grad.clone()
    dictionary.zero_grad()
    wanted.backward()
    torch.testing.assert_close(found, dictionary.W_dec.grad)


def test_norms_per_site_need_several_sites():
    with pytest.raises(
        ConfigError, match=r"site_norms l1 needs several outputs.*got outputs that are not known"
    ):
        dictionaries.build(TopKConfig(k=2, d_sae=8, site_norms="l1"), 4, 4)
    one = Site(model="m", model_fingerprint="f", hookpoint="resid_post.0", start=0, stop=4)
    with pytest.raises(
        ConfigError, match=r"site_norms l1 needs several outputs.*got one output. Drop site_norms"
    ):
        dictionaries.build(
            ReLUConfig(d_sae=8, norm_weighted=True, site_norms="l1"),
            4,
            4,
            Sites(inputs=(one,), outputs=(one,)),
        )
    with pytest.raises(ConfigError, match="site_norms must be left out when norm_weighted is not set"):
        ReLUConfig(site_norms="l1")


def test_a_pursuit_takes_away_what_it_chose_by():
    with pytest.raises(
        ConfigError, match=r"site_norms must be l2 in a pursuit.*got l1. Drop it, or use topk"
    ):
        MatchingPursuitConfig.build({"site_norms": "l1"})
