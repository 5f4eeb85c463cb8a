"""The contract that every dictionary keeps, checked on each; and what each promises besides."""

from typing import Any

import pytest
import torch

from sememe import dictionaries, kernels
from sememe.dictionaries import REGISTRY, TRAINABLE, Trainable
from sememe.dictionaries.abs_topk import AbsTopKConfig
from sememe.dictionaries.auxiliary import auxk_loss
from sememe.dictionaries.base import ArchitectureConfig
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.cross_layer import CrossLayerConfig
from sememe.dictionaries.gated import GatedConfig
from sememe.dictionaries.group_max import GroupMaxConfig
from sememe.dictionaries.initial import geometric_median
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.lista import LISTAConfig
from sememe.dictionaries.matching_pursuit import MatchingPursuitConfig
from sememe.dictionaries.matryoshka import MatryoshkaConfig
from sememe.dictionaries.mlp_encoder import MLPEncoderConfig
from sememe.dictionaries.multi_topk import MultiTopKConfig
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.tied import TiedConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.dictionaries.variational import VariationalConfig
from sememe.encoded import Counts
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError, ShapeError

CONFIGS: dict[str, ArchitectureConfig] = {
    "topk": TopKConfig(k=5, d_sae=40),
    "batch_topk": BatchTopKConfig(k=5, d_sae=40),
    "matryoshka": MatryoshkaConfig(k=5, d_sae=40, prefixes=(0.25, 0.5, 1.0)),
    "multi_topk": MultiTopKConfig(k=5, d_sae=40),
    "abs_topk": AbsTopKConfig(k=5, d_sae=40),
    "group_max": GroupMaxConfig(k=5, d_sae=40),
    "matching_pursuit": MatchingPursuitConfig(k=5, d_sae=40),
    "mlp_encoder": MLPEncoderConfig(k=5, d_sae=40),
    "relu": ReLUConfig(d_sae=40),
    "jumprelu": JumpReLUConfig(d_sae=40, target_l0=5, bandwidth=0.05),
    "gated": GatedConfig(d_sae=40),
    "tied": TiedConfig(d_sae=40),
    "p_anneal": PAnnealConfig(d_sae=40),
    "lista": LISTAConfig(d_sae=40),
    "variational": VariationalConfig(d_sae=40, prior_l0=5),
    "cross_layer": CrossLayerConfig(k=5, d_sae=40, n_layers=3, over="all"),
}
EASY: dict[str, dict[str, Any]] = {
    "relu": {"l1_coefficient": 1e-4},
    "jumprelu": {"target_l0": 2.0, "bandwidth": 0.005},
    "gated": {"l1_coefficient": 1e-4},
    "tied": {"l1_coefficient": 1e-4, "start_density": 0.5},  # else a feature without a latent on it stays so
    "p_anneal": {"l1_coefficient": 1e-4},
    "lista": {"l1_coefficient": 1e-4},
    "variational": {"prior_l0": 2.0, "decoder_variance": 0.01},
}
"""Options that solve one-hot data; one latent per row where nothing is said."""
FROZEN: dict[str, set[str]] = {
    "gated": {"W_dec", "b_dec"},  # the auxiliary loss sees a frozen decoder
    "jumprelu": {"relative_threshold"},  # straight-through
}
"""Parameters whose gradient is, by its paper, not the loss's derivative; each has a test of its own."""
ONE_PLACE = {"tied", "matching_pursuit"}
"""Encoder and decoder share weights: no transcoders."""
D = 12


def sample(n: int = 64, d: int = D, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * 3 + torch.randn(d, generator=generator)


def made(kind: str, d_out: int = D, seed: int = 0) -> Trainable:
    dictionary = dictionaries.build(CONFIGS[kind], D, d_out)
    x, target = sample(), sample(d=d_out, seed=1) if d_out != D else sample()
    dictionary.initialise(x, target, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        if kind != "matching_pursuit":  # which has none
            dictionary.b_enc.add_(0.05 * torch.randn(40, generator=torch.Generator().manual_seed(7)))
    return dictionary


@pytest.fixture(params=sorted(TRAINABLE))
def kind(request) -> str:
    return request.param


def test_rows_do_not_influence_each_other(kind):
    dictionary, x = made(kind).eval(), sample()
    whole = dictionary(x)
    for batch in (1, 7):
        parts = torch.cat([dictionary(x[i : i + batch]) for i in range(0, len(x), batch)])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_some_latents_are_encoded_as_all_are(kind):
    dictionary, x = made(kind).eval(), sample(seed=3)
    whole = dictionary.encode(x).to_dense()
    for latents in ([3], [5, 0, 39], []):
        found = dictionary.encode_latents(x, latents)
        torch.testing.assert_close(found, whole[:, latents], atol=1e-6, rtol=1e-5)
    assert bool((whole[:, [5, 0, 39]] != 0).any())
    never = x[:4].clone()
    never[:] = 0.0
    assert dictionary.encode_latents(never[:0], [1, 2]).shape == (0, 2)
    torch.testing.assert_close(
        dictionary.encode_latents(never, [1]), dictionary.encode(never).to_dense()[:, [1]]
    )


def test_only_signed_dictionaries_go_below_zero(kind):
    dictionary = made(kind).eval()
    assert dictionary.signed == bool((dictionary.encode(sample(seed=3)).acts < 0).any())


@pytest.mark.parametrize("d_out", [D, 9])
def test_folding_keeps_the_map(kind, d_out):
    if kind in ONE_PLACE and d_out != D:
        name = kind.replace("_", " ")
        with pytest.raises(ConfigError, match=f"a {name} dictionary must read and write the same place"):
            made(kind, d_out)
        return
    dictionary = made(kind, d_out)
    dictionary.scale_in.fill_(0.37)
    dictionary.scale_out.fill_(2.5 if d_out != D else 0.37)
    x = sample(seed=3)
    expected = dictionary(x * dictionary.scale_in) / dictionary.scale_out
    folded = dictionary.fold()
    torch.testing.assert_close(folded(x), expected, atol=1e-4, rtol=1e-4)
    assert float(folded.scale_in) == float(folded.scale_out) == 1.0
    assert float(dictionary.scale_in) == pytest.approx(0.37), "folding leaves the original alone"


def test_latents_fire_alike_before_and_after_folding(kind):
    dictionary = made(kind)
    dictionary.scale_in.fill_(0.2)
    dictionary.scale_out.fill_(0.2)
    x = sample(seed=3)
    before, after = dictionary.encode(x * 0.2).to_dense(), dictionary.fold().encode(x).to_dense()
    assert torch.equal(before != 0, after != 0)
    torch.testing.assert_close(after * 0.2, before, atol=1e-4, rtol=1e-4)


def test_save_and_load_keep_every_bit(kind, tmp_path):
    dictionary, x = made(kind), sample(seed=5)
    saved = dictionary.save(tmp_path / "d", x, extra={"note": "n"})
    loaded = dictionaries.load(tmp_path / "d")
    assert type(loaded) is REGISTRY[kind] and not loaded.training
    with torch.no_grad(), kernels.use("reference"):
        assert torch.equal(loaded(x), dictionary.eval()(x))
    assert saved.extra["note"] == "n"
    assert loaded.config == CONFIGS[kind]
    html = loaded._repr_html_()
    assert kind in html and "40" in html


def test_every_gradient_is_the_references(kind):
    grads = []
    for path in ("reference", "auto"):
        dictionary, x = made(kind), sample(seed=9)
        with kernels.use(path):
            dictionary.loss(x, x, 0.5).total.backward()
        grads.append({name: p.grad.clone() for name, p in dictionary.named_parameters()})
    for name in grads[0]:
        assert float(grads[0][name].abs().max()) > 0, f"{name} gets no gradient"
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-5, rtol=1e-4)


def test_gradients_agree_with_finite_differences(kind):
    dictionary, x = made(kind).double(), sample(seed=2).double()
    loss = lambda: dictionary.loss(x, x, 0.5).total  # noqa: E731
    dictionary.after_step(dictionary.loss(x, x, 0.5).encoded)  # schedules stand still from here
    loss().backward()
    for name, parameter in dictionary.named_parameters():
        if name in FROZEN.get(kind, ()):
            continue
        # The first entry may be of a silent latent; the largest gradient is of one that matters.
        steepest = torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape)
        eps = 1e-6
        for place in ((0,) * parameter.dim(), tuple(map(int, steepest))):
            with torch.no_grad():
                old = float(parameter[place])
                parameter[place] = old + eps
                up = float(loss())
                parameter[place] = old - eps
                down = float(loss())
                parameter[place] = old
            slope = (up - down) / (2 * eps)
            assert slope == pytest.approx(float(parameter.grad[place]), abs=1e-5, rel=1e-3), (name, place)


def test_the_optimum_of_an_easy_case_is_found(kind):
    """On one-hot data with enough latents the loss falls by far."""
    from sememe.optimiser import Adam

    config = CONFIGS[kind].replace(d_sae=24, **EASY.get(kind, {"k": 1}))
    dictionary = dictionaries.build(config, D, D)
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(D)[torch.randint(0, D, (256,), generator=generator)] * 3
    dictionary.initialise(x, x, generator)
    optimiser = Adam(dictionary)
    first = None
    for _ in range(300):
        loss = dictionary.loss(x, x, 0.5)
        loss.total.backward()
        optimiser.step(0.02)
        dictionary.after_step(loss.encoded)
        first = first if first is not None else float(loss.terms["mse"])
    assert float(loss.terms["mse"]) < 0.1 * first
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(24))


def test_dead_latents_are_counted_in_rows(kind):
    dictionary, x = made(kind), sample()
    active = dictionary.loss(x, x, 0.0).encoded
    encoded = dictionary.encode(x) if isinstance(active, Counts) else active
    dictionary.after_step(active)
    fired = torch.zeros(40, dtype=torch.bool)
    fired[encoded.indices[encoded.acts != 0].long()] = True
    assert torch.equal(dictionary.tokens_since_fired == 0, fired)
    assert set(dictionary.tokens_since_fired.tolist()) <= {0, len(x)}


def test_reset_latents_points_them_at_the_directions(kind):
    dictionary = made(kind)
    directions = torch.eye(D)[:3] * 5
    dictionary.reset_latents(torch.tensor([1, 2, 3]), directions)
    torch.testing.assert_close(dictionary.W_dec[1:4], torch.eye(D)[:3])
    cosine = torch.nn.functional.cosine_similarity(dictionary.W_enc[:, 1:4].T, directions)
    torch.testing.assert_close(cosine, torch.ones(3))


def test_auxk_gives_dead_latents_gradients_and_only_when_dead():
    config = TopKConfig(k=2, d_sae=40, dead_after_tokens=10, auxk=8)
    dictionary, x = dictionaries.build(config, D, D), sample()
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    assert "auxk" not in dictionary.loss(x, x, 0.0).terms
    with torch.no_grad():
        dictionary.b_enc[20:] = -100.0  # never selected
    dictionary.tokens_since_fired[20:] = 11
    loss = dictionary.loss(x, x, 0.0)
    assert "auxk" in loss.terms and float(loss.terms["auxk"]) > 0
    with torch.no_grad():
        dictionary.b_enc[20:] = 0.0
    dictionary.zero_grad()
    auxk_loss(dictionary, x, x - dictionary(x), torch.arange(20, 40), 8).backward()
    assert float(dictionary.W_enc.grad[:, 20:].abs().max()) > 0
    assert float(dictionary.W_enc.grad[:, :20].abs().max()) == 0


@pytest.mark.parametrize("start", ["geometric_median", "mean"])
def test_the_decoder_bias_starts_at_the_centre_asked_for(start):
    x = torch.cat([sample(), torch.full((4, D), 1e3)])
    dictionary = dictionaries.build(TopKConfig(k=3, d_sae=40, b_dec_init=start), D, D)
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    centre = x.mean(0) if start == "mean" else geometric_median(x)
    torch.testing.assert_close(dictionary.b_dec.detach(), centre)
    torch.testing.assert_close(dictionary.b_pre, centre)


def test_geometric_median_resists_outliers():
    x = torch.cat(
        [torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + 1, torch.full((20, 3), 1e4)]
    )
    assert float((geometric_median(x) - 1).norm()) < 0.5
    assert float((x.mean(0) - 1).norm()) > 100


def test_errors():
    with pytest.raises(ConfigError, match=r"k must be in \[1, d_sae=40\], got 50. Lower k or raise d_sae."):
        dictionaries.build(TopKConfig(k=50, d_sae=40), D, D)
    for options, message in [
        (
            {"auxk_coefficient": 0.0, "auxk": 8},
            r"auxk must be left out when auxk_coefficient is 0.*got 8. Drop it.",
        ),
        ({"auxk_coefficient": 0.0, "dead_after_tokens": 8}, r"dead_after_tokens must be left out"),
        ({"auxk": -5}, r"auxk must be >= 1, got -5"),
        ({"auxk": 0}, r"auxk must be >= 1, got 0"),
        ({"auxk_coefficient": -3}, r"auxk_coefficient must be >= 0, got -3"),
        ({"dead_after_tokens": -1}, r"dead_after_tokens must be >= 1, got -1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            TopKConfig.build(options)
    with pytest.raises(ConfigError, match=r"l1_coefficient must be > 0, got 0"):
        PAnnealConfig.build({"l1_coefficient": 0})
    with pytest.raises(
        ConfigError, match=r"k must be less than d_sae=40: else the second loss is the first, got 40. Lower k"
    ):
        dictionaries.build(MultiTopKConfig(k=40, d_sae=40), D, D)
    for options, message in [
        (
            {"resample": "none", "rewarmup_steps": 8},
            r"rewarmup_steps must be left out when resample is none",
        ),
        (
            {"resample_at": ()},
            r"resample_at must hold at least one share of the run, got none. Set resample to none",
        ),
        (
            {"resample_at": (0.5, 0.9)},
            r"resample_at must hold shares of the run in \(0, 0.8\], none close to its end, got \(0.5, 0.9\)",
        ),
        ({"resample_below": 0.2}, r"resample_below must be left out when resample is not mcs"),
        ({"resample": "mcs"}, r"resample mcs needs a second dictionary"),
        (
            {"resample": "mcs", "resample_against": "x", "resample_after_tokens": 7},
            r"resample_after_tokens must be left out when resample is mcs",
        ),
        ({"resample": "bricken"}, r"resample must be one of .*'worst'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ReLUConfig.build(options)
    with pytest.raises(ConfigError, match=r"d_sae must be >= 1, got 0"):
        dictionaries.build(TopKConfig(d_sae=0), D, D)
    with pytest.raises(ShapeError, match=r"x must have shape \(batch, d_in=12\), got \(3, 11\)"):
        made("topk").encode(torch.zeros(3, 11))


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from sememe.artifact import file_sha256, write_json

    dictionary, x = made("topk"), sample()
    dictionary.save(tmp_path / "d", x)
    weights = tmp_path / "d" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(CorruptError, match=r"must have SHA-256"):
        dictionaries.load(tmp_path / "d")

    # a transposed encoder of the right shape, with honest hashes: only the probe can tell
    square = dictionaries.build(TopKConfig(k=3, d_sae=D), D, D)
    square.initialise(x, x, torch.Generator().manual_seed(0))
    saved = square.save(tmp_path / "s", x)
    tensors = load_file(tmp_path / "s" / "weights.safetensors")
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    save_file(tensors, tmp_path / "s" / "weights.safetensors")
    saved.meta["files"]["weights.safetensors"]["sha256"] = file_sha256(tmp_path / "s" / "weights.safetensors")
    write_json(tmp_path / "s" / "meta.json", saved.meta)
    with pytest.raises(MismatchError, match=r"must reproduce its stored reconstructions to 0.0001"):
        dictionaries.load(tmp_path / "s")

    saved.meta["extra"]["architecture"]["kind"] = "topq"
    write_json(tmp_path / "s" / "meta.json", saved.meta)
    with pytest.raises(ArtifactError, match=r"known architecture, got 'topq'. Did you mean 'topk'"):
        dictionaries.load(tmp_path / "s")


def test_registry_names_are_the_classes_kinds():
    for name, cls in REGISTRY.items():
        assert cls.kind == name
    assert set(CONFIGS) == set(TRAINABLE), "the contract is checked on every architecture"
