"""PCA, random directions and the neuron basis: closed forms, contracts, errors."""

import numpy as np
import pytest
import torch

from sememe import dictionaries, metrics
from sememe.dictionaries.base import Dictionary, Trainable
from sememe.dictionaries.ica import ICA, ICAConfig
from sememe.dictionaries.identity import Identity, IdentityConfig
from sememe.dictionaries.pca import PCA, Moments, PCAConfig
from sememe.dictionaries.random_directions import RandomDirections, RandomDirectionsConfig
from sememe.errors import ActivationError, ConfigError, ShapeError

D = 12


def rows(n: int = 400, offset: float = 50.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=generator)
    return torch.randn(n, D, generator=generator) @ mixing + offset


def fvu(dictionary: Dictionary, x: torch.Tensor) -> float:
    quality = metrics.Reconstruction()
    quality.update(x, dictionary(x))
    return quality.compute()["fvu"].value


def every() -> list[Dictionary]:
    x = [rows()]
    return [
        PCA.fit(x, PCAConfig()),
        PCA.fit(x, PCAConfig(k=3)),
        PCA.fit(x, PCAConfig(k=3, keep="first", d_sae=8)),
        Identity.fit(x, IdentityConfig()),
        Identity.fit(x, IdentityConfig(k=4)),
        Identity.fit(x, IdentityConfig(k=4, signed=False)),
        RandomDirections.fit(x, RandomDirectionsConfig(k=4, d_sae=40)),
        RandomDirections.fit(x, RandomDirectionsConfig(k=4, d_sae=40, signed=True, seed=3)),
        ICA.fit(x[0], ICAConfig()),
        ICA.fit(x[0], ICAConfig(k=3, d_sae=8)),
    ]


@pytest.mark.parametrize("index", range(10))
def test_each_keeps_the_contract(index: int, tmp_path) -> None:
    dictionary, x = every()[index], rows(9)
    assert not isinstance(dictionary, Trainable)
    encoded = dictionary.encode(x)
    either_side = torch.cat([rows(400), rows(400, offset=0.0)])
    assert dictionary.signed == bool((dictionary.encode(either_side).acts < 0).any())
    k = dictionary.config.k or dictionary.d_sae
    assert encoded.k == k and encoded.d_sae == dictionary.d_sae
    for row in range(9):  # row by row, whatever the batch
        alone = dictionary.encode(x[row : row + 1])
        assert torch.allclose(alone.to_dense()[0], encoded.to_dense()[row], atol=1e-4)
    directions = dictionary.decoder_directions()
    assert directions.shape == (dictionary.d_sae, D)
    assert torch.allclose(directions.norm(dim=1), torch.ones(dictionary.d_sae), atol=1e-5)
    assert torch.allclose(dictionary(x), encoded.to_dense() @ directions + dictionary.b_dec, atol=1e-3)
    with pytest.raises(ShapeError, match=r"x must have shape \(batch, d_in=12\), got \(9, 11\)"):
        dictionary.encode(x[:, :11])

    dictionary.save(tmp_path / "dictionary", x)
    loaded = dictionaries.load(tmp_path / "dictionary")
    assert type(loaded) is type(dictionary) and loaded.config == dictionary.config
    assert torch.allclose(loaded(x), dictionary(x))


@pytest.mark.parametrize("index", range(8))
def test_folding_is_the_same_map_in_raw_units(index: int) -> None:
    dictionary, x = every()[index], rows(9)
    dictionary.scale_in.fill_(0.25)
    dictionary.scale_out.fill_(0.25)
    folded = dictionary.fold()
    assert float(folded.scale_in) == float(folded.scale_out) == 1
    assert torch.allclose(folded(x), dictionary(x * 0.25) / 0.25, rtol=1e-4, atol=1e-3)
    assert float(dictionary.scale_in) == 0.25  # unchanged


def test_pca_with_every_component_is_perfect() -> None:
    x = rows()
    assert fvu(PCA.fit([x], PCAConfig()), x) == pytest.approx(0, abs=1e-9)


def test_pca_first_k_leaves_the_small_eigenvalues_of_the_covariance() -> None:
    x = rows()
    values = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    pca = PCA.fit([x], PCAConfig(k=4, keep="first"))
    assert fvu(pca, x) == pytest.approx(values[4:].sum() / values.sum(), rel=1e-4)
    assert pca.variance.numpy() == pytest.approx(values, rel=1e-4)


def test_keeping_the_largest_coefficients_beats_keeping_the_first_components() -> None:
    x = rows()
    largest, first = (PCA.fit([x], PCAConfig(k=4, keep=keep)) for keep in ("largest", "first"))
    assert fvu(largest, x) < fvu(first, x)


def test_pca_is_centred_and_signed() -> None:
    x = rows(offset=1000)
    pca = PCA.fit([x], PCAConfig(k=1))
    acts = pca.encode(x).acts
    assert (acts < 0).any() and (acts > 0).any()
    assert fvu(pca, x) < 1


def test_moments_do_not_depend_on_batches_or_offset() -> None:
    x = rows().double() + 1e6
    whole, parts = Moments(), Moments()
    whole.update(x)
    for part in x.split(7):
        parts.update(part)
    expected = torch.from_numpy(np.cov(x.numpy().T, bias=True))
    assert torch.allclose(whole.covariance(), expected, rtol=1e-6)
    assert torch.allclose(parts.covariance(), expected, rtol=1e-6)
    assert torch.allclose(parts.mean(), x.mean(0))
    parts.update(x[:0])
    assert parts.n == 400


def test_identity_is_exact() -> None:
    x = rows()
    identity = Identity.fit([x], IdentityConfig())
    assert torch.equal(identity(x), x)


def test_the_neuron_basis_keeps_what_is_furthest_from_the_mean() -> None:
    x = torch.tensor([[10.0, 0.0, 1.0], [10.0, 4.0, -1.0]])
    one = Identity.from_mean(torch.tensor([10.0, 1.0, 0.0]), IdentityConfig(k=1))
    assert torch.equal(one(x[1:]), torch.tensor([[10.0, 4.0, 0.0]]))
    positive = Identity.from_mean(torch.tensor([10.0, 1.0, 0.0]), IdentityConfig(k=3, signed=False))
    assert torch.equal(positive(x), torch.tensor([[10.0, 1.0, 1.0], [10.0, 4.0, 0.0]]))


def test_random_directions_come_from_the_seed() -> None:
    x = [rows()]
    first, same, other = (
        RandomDirections.fit(x, RandomDirectionsConfig(k=4, d_sae=40, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.W_dec, same.W_dec) and not torch.equal(first.W_dec, other.W_dec)
    assert (first.encode(rows()).acts >= 0).all()


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"k must be in \[1, d_sae=12\], got 13. Lower k"):
        PCA.fit([rows()], PCAConfig(k=13))
    with pytest.raises(ConfigError, match=r"d_sae must be in \[1, d_in=12\] for pca, got 13"):
        PCA.fit([rows()], PCAConfig(d_sae=13))
    with pytest.raises(ConfigError, match=r"k must be in \[1, d_sae=40\], got 0"):
        RandomDirections.fit([rows()], RandomDirectionsConfig(k=0, d_sae=40))
    with pytest.raises(ConfigError, match=r"d_sae must be d_in=12 for identity, got 13"):
        Identity.fit([rows()], IdentityConfig(d_sae=13))
    with pytest.raises(ConfigError, match=r"k must be in \[1, d_sae=12\], got 99"):
        Identity.fit([rows()], IdentityConfig(k=99))
    for kind, config in ((PCA, PCAConfig()), (Identity, IdentityConfig())):
        with pytest.raises(ShapeError, match="d_in"):
            kind.rebuild(config.resolved(), 4, 5, 4, None)
    with pytest.raises(ShapeError, match="d_in must be d_out, got 4 and 5"):
        RandomDirections.rebuild({"k": 1}, 4, 5, 4, None)


def test_fitting_to_nothing_or_to_nan_is_an_error() -> None:
    for kind, config in (
        (PCA, PCAConfig()),
        (Identity, IdentityConfig()),
        (RandomDirections, RandomDirectionsConfig()),
    ):
        with pytest.raises(ShapeError, match="at least one row, got none"):
            kind.fit([], config)
    bad = rows()
    bad[17, 3] = float("nan")
    with pytest.raises(ActivationError, match="activations must be finite, got NaN or infinity in row 417"):
        PCA.fit([rows(), bad], PCAConfig())


def test_ica_finds_independent_sources_that_pca_does_not():
    """Laplace sources, mixed obliquely: what ICA reads and what it writes are not each other's transpose."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(20_000, 6, generator=generator) - 0.5
    sources = -uniform.sign() * torch.log1p(-2 * uniform.abs())  # Laplace
    mixing = torch.randn(6, 6, generator=generator)
    mixing /= mixing.norm(dim=1, keepdim=True)
    x = sources @ mixing + 7.0
    ica, pca = ICA.fit(x, ICAConfig()), PCA.fit([x], PCAConfig())
    assert bool(ica.converged)
    assert metrics.mmacs(mixing, ica.decoder_directions()) > 0.99
    assert metrics.mmacs(mixing, pca.decoder_directions()) < 0.9
    assert metrics.mmacs(mixing, ica.W_enc.T) < 0.9, "the analysis matrix is not the dictionary"
    assert fvu(ica, x) < 1e-9
    kept, dense = ICA.fit(x, ICAConfig(k=3)), ica.encode(x).to_dense()
    largest = dense.abs().topk(3, dim=1).indices
    expected = torch.zeros_like(dense).scatter(1, largest, dense.gather(1, largest)) @ ica.W_dec + ica.b_dec
    assert torch.allclose(kept(x), expected, atol=1e-3)


@pytest.mark.parametrize("last", ["sum", "copy", "constant"])
def test_ica_of_rows_that_do_not_fill_their_space(last):
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    column = {"sum": -x.sum(1), "copy": x[:, 0], "constant": torch.ones(400)}[last]
    z = torch.cat([x, column[:, None]], 1)
    ica = ICA.fit(z, ICAConfig())
    assert ica.d_sae == 6 and fvu(ica, z) < 1e-6
    with pytest.raises(ShapeError, match=r"dimensions in which rows vary, 6, got 7\. Lower d_sae"):
        ICA.fit(z, ICAConfig(d_sae=7))


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda: ICA.fit(rows(20), ICAConfig()),
            ShapeError,
            r"12 components takes at least 24 rows, got 20\. Give",
        ),
        (lambda: ICA.fit(rows(40) / 0, ICAConfig()), ActivationError, "NaN or infinity among the rows"),
        (
            lambda: ICAConfig(d_sae=13).width(12),
            ConfigError,
            r"d_sae must be in \[1, d_in=12\] for ica, got 13",
        ),
        (lambda: ICA(ICAConfig(k=13), 12, 12, 12), ConfigError, r"k must be in \[1, d_sae=12\], got 13"),
        (lambda: ICA(ICAConfig(), 12, 13, 12), ShapeError, "d_in must be d_out, got 12 and 13"),
    ],
)
def test_ica_says_what_it_cannot_do(ask, error, message):
    with pytest.raises(error, match=message):
        ask()
