"""Cross-layer transcoders: the causal mask, the selection over one or all layers, and the recovery of a planted
causal structure."""

import pytest
import torch

from sememe import dictionaries, kernels
from sememe.dictionaries import Site, Sites, auxiliary, cross_layer
from sememe.dictionaries.cross_layer import CrossLayer, CrossLayerConfig
from sememe.errors import ConfigError
from sememe.source import TensorSource
from sememe.train import TrainConfig, train

L, D_IN, D_OUT, N = 3, 6, 4, 30
SIZES = (1.0, 20.0, 0.1)
CONFIGS = {
    "layer": CrossLayerConfig(k=3, d_sae=N, n_layers=L),
    "all": CrossLayerConfig(k=7, d_sae=N, n_layers=L, over="all"),
    "jumprelu": CrossLayerConfig(d_sae=N, n_layers=L, selection="jumprelu", target_l0=5, bandwidth=0.1),
}


def sites(d_in: int = D_IN, d_out: int = D_OUT) -> Sites:
    def side(alias: str, d: int) -> tuple[Site, ...]:
        return tuple(
            Site(model="m", model_fingerprint="f", hookpoint=f"{alias}.{i}", start=i * d, stop=(i + 1) * d)
            for i in range(L)
        )

    return Sites(inputs=side("mlp_in", d_in), outputs=side("mlp_out", d_out))


def sample(d: int, n: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(SIZES).repeat_interleave(d)
    return sizes * (torch.randn(n, L * d, generator=generator) + torch.randn(L * d, generator=generator))


def made(name: str, **changes) -> CrossLayer:
    """With scales per layer set, in eval mode."""
    dictionary = dictionaries.build(
        CONFIGS[name].replace(n_layers=None, **changes), L * D_IN, L * D_OUT, sites()
    )
    x, target = sample(D_IN), sample(D_OUT, seed=1)
    dictionary.set_scales(x, target)
    generator = torch.Generator().manual_seed(0)
    dictionary.initialise(x * dictionary.scale_in, target * dictionary.scale_out, generator)
    with torch.no_grad():
        dictionary.b_enc.add_(0.05 * torch.randn(N, generator=generator))
    return dictionary.eval()


@pytest.fixture(params=sorted(CONFIGS))
def name(request) -> str:
    return request.param


def test_the_map_is_the_dense_one_with_zeros_where_the_mask_forbids(name):
    dictionary, x = made(name), sample(D_IN, seed=2)
    x = x * dictionary.scale_in
    layer_of = torch.arange(N) // (N // L)
    reads, writes = dictionary.W_enc.detach(), dictionary.W_dec.detach()
    for latent in range(N):
        layer = int(layer_of[latent])
        assert reads[:, latent].view(L, D_IN).abs().sum(1).nonzero().flatten().tolist() == [layer]
        assert writes[latent].view(L, D_OUT).abs().sum(1).nonzero().flatten().tolist() == list(
            range(layer, L)
        )
    torch.testing.assert_close(writes.norm(dim=1), torch.ones(N))
    pre_acts = (x - dictionary.b_pre) @ reads + dictionary.b_enc.detach()
    if name == "jumprelu":
        wanted = pre_acts * (pre_acts > dictionary.threshold.detach())
    elif name == "all":
        wanted = torch.relu(pre_acts) * torch.zeros_like(pre_acts).scatter(
            1, pre_acts.topk(7, dim=1).indices, 1.0
        )
    else:
        best = pre_acts.view(-1, L, N // L).topk(3, dim=2).indices
        kept = torch.zeros(len(x), L, N // L).scatter(2, best, 1.0).view(len(x), N)
        wanted = torch.relu(pre_acts) * kept
    acts = dictionary.encode(x).to_dense().detach()
    torch.testing.assert_close(acts, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        dictionary(x).detach(), wanted @ writes + dictionary.b_dec.detach(), atol=1e-5, rtol=1e-4
    )


def test_a_later_layers_input_changes_no_earlier_output():
    dictionary, x = made("layer"), sample(D_IN, seed=2)
    x = x * dictionary.scale_in
    other = x.clone()
    other[:, D_IN:] += torch.randn(len(x), (L - 1) * D_IN, generator=torch.Generator().manual_seed(3))
    one, two = dictionary(x), dictionary(other)
    assert torch.equal(one[:, :D_OUT], two[:, :D_OUT])
    assert not torch.equal(one[:, D_OUT : 2 * D_OUT], two[:, D_OUT : 2 * D_OUT])


def test_folding_and_saving_keep_the_map_and_the_choice(name, tmp_path):
    dictionary, x = made(name), sample(D_IN, seed=3)
    scaled = x * dictionary.scale_in
    before, expected = dictionary.encode(scaled).to_dense() != 0, dictionary(scaled) / dictionary.scale_out
    folded = dictionary.fold()
    assert torch.equal(before, folded.encode(x).to_dense() != 0) and bool(before.any())
    for layer, size in enumerate(SIZES):
        part = slice(layer * D_OUT, (layer + 1) * D_OUT)
        torch.testing.assert_close(folded(x)[:, part], expected[:, part], atol=1e-4 * size, rtol=1e-4)
    dictionary.save(tmp_path / "d", x)
    loaded = dictionaries.load(tmp_path / "d")
    with torch.no_grad(), kernels.use("reference"):
        torch.testing.assert_close(loaded(x), folded(x), atol=1e-5, rtol=1e-5)


def test_every_gradient_is_that_of_the_dense_map(name):
    """The loss written with whole matrices, and dead latents in both."""
    changes = {"dead_after_tokens": 10, "auxk": 4} if name != "jumprelu" else {}
    dictionary = made(name, **changes).double()
    x = (sample(D_IN, seed=4) * dictionary.scale_in).double()
    target = (sample(D_OUT, seed=5) * dictionary.scale_out).double()
    dead = torch.tensor([1, 4, 12, 29])
    dictionary.tokens_since_fired[dead] = 11
    loss = dictionary.loss(x, target, 1.0)
    loss.total.backward()
    found = {key: parameter.grad.clone() for key, parameter in dictionary.named_parameters()}
    dictionary.zero_grad()
    pre_acts = (x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc
    acts = pre_acts * (loss.encoded.to_dense() != 0)
    residual = target - acts @ dictionary.W_dec - dictionary.b_dec
    total = residual.square().mean()
    if name != "jumprelu":
        assert "auxk" in loss.terms
        strongest = pre_acts[:, dead].topk(4, dim=1)
        sparse = torch.zeros(len(x), 4).double().scatter(1, strongest.indices, torch.relu(strongest.values))
        left = residual.detach()
        auxk = (left - sparse @ dictionary.W_dec[dead]).square().mean() / left.square().mean()
        total = total + auxk / 32
    total.backward()
    for key, parameter in dictionary.named_parameters():
        if name == "jumprelu" and key == "relative_threshold":
            assert bool((found[key] != 0).any()), "straight-through"
            continue
        torch.testing.assert_close(found[key], parameter.grad, msg=key)


def test_entries_left_in_place_decode_as_those_taken_out():
    """What a GPU does, which cannot learn how many entries a layer has, against what a CPU does."""
    dictionary, x = made("all"), sample(D_IN, seed=2)
    encoded = dictionary.encode(x * dictionary.scale_in).detach()
    found = []
    for split in (cross_layer._masked, cross_layer._of_layer):
        acts = encoded.acts.clone().requires_grad_()
        parts = [split(encoded.with_acts(acts), layer.latents) for layer in dictionary.layers]
        out = dictionary._decode(parts)
        leaves = [acts, *dictionary.decoders]
        grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[1])).sum(), leaves)
        found.append((out, *[part.to_dense() for part in parts], *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found[0][0], dictionary.decode(encoded))


def test_auxk_some_rows_at_a_time_is_auxk_at_once(monkeypatch):
    found = []
    for entries in (auxiliary.GROUP_ENTRIES, 40):  # 10 rows of 4 dead latents
        monkeypatch.setattr(auxiliary, "GROUP_ENTRIES", entries)
        dictionary = made("layer", dead_after_tokens=10, auxk=2).double()
        x, target = (sample(d, seed=4).double() * s for d, s in _sides(dictionary))
        dictionary.tokens_since_fired[torch.tensor([1, 4, 12, 29])] = 11
        loss = dictionary.loss(x, target, 1.0)
        loss.total.backward()
        found.append((loss.terms["auxk"], *[parameter.grad for parameter in dictionary.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def _sides(dictionary):
    return (D_IN, dictionary.scale_in), (D_OUT, dictionary.scale_out)


def planted(
    n: int = 12000, d: int = 12, per_layer: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that are read at one layer and written to it and later ones, each with its own directions.

    Returns:
        Inputs, targets, how active each feature is (rows, features), and what it writes (features, L * d).
    """
    generator = torch.Generator().manual_seed(0)
    reads, writes = (torch.zeros(L * per_layer, L, d) for _ in range(2))
    for feature in range(L * per_layer):
        layer = feature // per_layer
        reads[feature, layer] = torch.randn(d, generator=generator)
        writes[feature, layer:] = torch.randn(L - layer, d, generator=generator)
    reads, writes = (part.view(L * per_layer, L * d) for part in (reads, writes))
    reads, writes = (part / part.norm(dim=1, keepdim=True) for part in (reads, writes))
    active = (torch.rand(n, L * per_layer, generator=generator) < 0.08).float()
    acts = active * (torch.rand(n, L * per_layer, generator=generator) + 0.5)
    return acts @ reads, acts @ writes, acts, writes


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"k": 3, "over": "all"}, id="all", marks=pytest.mark.slow),
        pytest.param({"k": 2}, id="layer", marks=pytest.mark.slow),
        pytest.param({"selection": "jumprelu", "target_l0": 3.0}, id="jumprelu", marks=pytest.mark.slow),
    ],
)
def test_a_planted_causal_structure_is_recovered(tmp_path, options):
    x, target, codes, writes = planted()
    config = TrainConfig.build(
        {
            "out": tmp_path / "d",
            "architecture": {"kind": "cross_layer", "d_sae": 60, **options},
            "n_tokens": 2000 * 256,
            "batch_size": 256,
            "lr": 3e-3,
            "threads": 1,
        }
    )
    made = train(config, source=TensorSource(x, target=target, sites=sites(12, 12)))
    found = made.decoder_directions().detach()
    found /= found.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosine, latent = (writes @ found.T).max(1)
    layer = torch.arange(30) // 10
    assert torch.equal(latent // 20, layer), (
        "each feature is found by a latent of the layer that it is read at"
    )
    assert float(cosine.mean()) > 0.95
    acts = made.encode(x).to_dense().detach()[:, latent]
    pairs = [torch.stack([acts[:, feature], codes[:, feature]]).corrcoef()[0, 1] for feature in range(30)]
    assert float(torch.stack(pairs).mean()) > 0.9, "and that latent is active when the feature is"
    fvu = float((target - made(x).detach()).square().sum() / (target - target.mean(0)).square().sum())
    assert fvu < 0.15


def test_with_jumprelu_latents_that_no_row_reaches_are_pointed_at_errors_they_can_mend(tmp_path, monkeypatch):
    """Half of each layer's thresholds start out of reach: without resampling these latents stay dead for good."""
    x, target, _, writes = planted(6000)
    plain = CrossLayer.initialise

    def out_of_reach(self, *arguments):
        plain(self, *arguments)
        with torch.no_grad():
            self.relative_threshold[::2] = 100.0

    monkeypatch.setattr(CrossLayer, "initialise", out_of_reach)
    dead, cosines = {}, {}
    for remedy in ("none", "loss"):
        options = {"resample_at": (0.1, 0.3), "resample_after_tokens": 2000} if remedy == "loss" else {}
        config = TrainConfig.build(
            {
                "out": tmp_path / remedy,
                "architecture": {
                    "kind": "cross_layer",
                    "d_sae": 60,
                    "selection": "jumprelu",
                    "target_l0": 3.0,
                    "resample": remedy,
                    **options,
                },
                "n_tokens": 250 * 128,
                "batch_size": 128,
                "lr": 3e-3,
                "threads": 1,
            }
        )
        made = train(config, source=TensorSource(x, target=target, sites=sites(12, 12)))
        dead[remedy] = float((made.encode(x).to_dense().detach() == 0).all(0).float().mean())
        found = made.decoder_directions().detach()
        cosines[remedy] = float((writes @ found.T / found.norm(dim=1).clamp_min(1e-12)).amax(1).mean())
    assert dead["none"] >= 0.5 and dead["loss"] < 0.2
    assert cosines["loss"] > cosines["none"] + 0.03


def test_a_reset_latent_reads_its_own_layers_part_of_the_input_and_writes_what_it_may():
    dictionary = made("jumprelu").train()
    ids = torch.tensor([3, 14, 27])  # one of each layer
    generator = torch.Generator().manual_seed(3)
    out, into = torch.randn(3, L * D_OUT, generator=generator), torch.randn(3, L * D_IN, generator=generator)
    dictionary.reset_latents(ids, out, into)
    reads, writes = (
        of()[ids].detach() for of in (dictionary.encoder_directions, dictionary.decoder_directions)
    )
    for i in range(3):
        own = slice(i * D_IN, (i + 1) * D_IN)
        assert float(torch.cosine_similarity(reads[i, own], into[i, own], dim=0)) > 0.9999
        assert float(torch.cosine_similarity(writes[i, i * D_OUT :], out[i, i * D_OUT :], dim=0)) > 0.9999
        assert not bool(writes[i, : i * D_OUT].any())
    assert [group.outputs.start for group in dictionary.latent_groups()] == [0, D_OUT, 2 * D_OUT]


def test_errors():
    for options, message in [
        (
            {"selection": "jumprelu", "k": 5},
            r"k must be left out when selection is jumprelu.*got 5. Drop it.",
        ),
        ({"resample_at": (0.5,)}, "resample_at must be left out when resample is none"),
        ({"bandwidth": 0.1}, "bandwidth must be left out when selection is topk"),
        ({"auxk": 0}, "auxk must be >= 1, got 0"),
        ({"auxk_coefficient": -3.0}, "auxk_coefficient must be >= 0, got -3"),
        ({"dead_after_tokens": 0}, "dead_after_tokens must be >= 1, got 0"),
        ({"auxk_coefficient": 0.0, "auxk": 5}, "auxk must be left out when auxk_coefficient is 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            CrossLayerConfig.build(options)
    assert CrossLayerConfig.build({"selection": "jumprelu"}).resample == "loss"
    assert CrossLayerConfig.build({}).resample == "none"
    with pytest.raises(ConfigError, match=r"k must be in \[1, 10\], the latents to choose from, got 11"):
        dictionaries.build(CONFIGS["layer"].replace(k=11), L * D_IN, L * D_OUT)
    with pytest.raises(
        ConfigError, match="n_layers must divide d_in=18 and d_out=12 into equal layers, got 4"
    ):
        dictionaries.build(CONFIGS["layer"].replace(n_layers=4), L * D_IN, L * D_OUT)
    with pytest.raises(ConfigError, match=r"n_layers must be left out where hookpoints are known.*got 3"):
        dictionaries.build(CONFIGS["layer"], L * D_IN, L * D_OUT, sites())
    with pytest.raises(ConfigError, match="as many outputs as inputs, got 3 inputs and 2 outputs"):
        where = sites()
        where = where.replace(outputs=where.outputs[:2])
        dictionaries.build(CONFIGS["layer"].replace(n_layers=None), L * D_IN, 2 * D_OUT, where)
    with pytest.raises(ConfigError, match="d_sae must be at least the number of layers, 3, got 2"):
        dictionaries.build(CONFIGS["layer"].replace(d_sae=2, k=1), L * D_IN, L * D_OUT)
