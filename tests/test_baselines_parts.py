"""NMF, reconstruction ICA and thresholded neurons: what they find of data with a known answer, contracts, errors."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from sememe import dictionaries, metrics
from sememe.dictionaries.base import Dictionary, Trainable
from sememe.dictionaries.ica import ICA, ICAConfig
from sememe.dictionaries.neurons import Neurons, NeuronsConfig
from sememe.dictionaries.nmf import NMF, NMFConfig
from sememe.dictionaries.rica import RICA, RICAConfig
from sememe.errors import ActivationError, ConfigError, ShapeError

D = 12


def rows(n: int = 600, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 5.0


def fvu(dictionary: Dictionary, x: torch.Tensor) -> float:
    quality = metrics.Reconstruction()
    quality.update(x, dictionary(x))
    return quality.compute()["fvu"].value


def every() -> list[Dictionary]:
    x = rows()
    return [
        NMF.fit(x, NMFConfig(d_sae=8)),
        NMF.fit(x, NMFConfig(d_sae=20, k=3)),
        RICA.fit(x, RICAConfig(d_sae=20, n_steps=60)),
        RICA.fit(x, RICAConfig(d_sae=20, k=3, n_steps=60)),
        Neurons.fit(x, NeuronsConfig()),
        Neurons.fit(x, NeuronsConfig(k=4, both_signs=False)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_each_keeps_the_contract_and_comes_back_from_disk(index: int, tmp_path) -> None:
    dictionary, x = every()[index], rows(9)
    assert not isinstance(dictionary, Trainable)
    encoded = dictionary.encode(x)
    k = getattr(dictionary.config, "k", None)
    assert encoded.d_sae == dictionary.d_sae and (k is None or int(encoded.l0().max()) <= k)
    for row in range(9):  # row by row, whatever the batch
        alone = dictionary.encode(x[row : row + 1])
        assert torch.allclose(alone.to_dense()[0], encoded.to_dense()[row], atol=1e-3)
    directions = dictionary.decoder_directions()
    assert directions.shape == (dictionary.d_sae, D)
    assert torch.allclose(dictionary(x), encoded.to_dense() @ directions + dictionary.b_dec, atol=1e-3)
    dictionary.save(tmp_path / "d", x)
    again = dictionaries.load(tmp_path / "d")
    assert type(again) is type(dictionary) and torch.allclose(again(x), dictionary(x), atol=1e-4)
    assert torch.allclose(dictionary.fold()(x), dictionary(x), atol=1e-4)
    with pytest.raises(ShapeError, match=r"x must have shape \(batch, d_in=12\), got \(9, 11\)"):
        dictionary.encode(x[:, :11])


def test_nmf_finds_parts_that_only_add() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = (torch.rand(6, 24, generator=generator) < 0.25).float() + 0.01
    acts = torch.rand(3000, 6, generator=generator) * (torch.rand(3000, 6, generator=generator) < 0.4)
    x = acts @ parts - 3.0  # moved below 0: activations have both signs
    made = NMF.fit(x, NMFConfig(d_sae=6, max_iterations=200))
    assert float(metrics.mcs(parts, made.W_dec).mean()) > 0.97
    assert fvu(made, x) < 0.02 and float(made.W_dec.min()) >= 0
    assert float(made.encode(x).acts.min()) >= 0


def in_batches(x: torch.Tensor, seen: list[int]) -> Callable[[int], Iterator[torch.Tensor]]:
    """Passes over rows, and how many rows were held at a time."""

    def one(size: int) -> Iterator[torch.Tensor]:
        for part in torch.split(x, size):
            seen.append(len(part))
            yield part

    return one


def test_nmf_of_streamed_rows_finds_what_it_finds_in_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = (torch.rand(6, 24, generator=generator) < 0.25).float() + 0.01
    acts = torch.rand(3000, 6, generator=generator) * (torch.rand(3000, 6, generator=generator) < 0.4)
    x, seen = acts @ parts - 3.0, list[int]()
    config = NMFConfig(d_sae=6, max_iterations=200)
    held, made = NMF.fit(x, config), NMF.fit_stream(in_batches(x, seen), len(x), config)
    assert max(seen) == 1024 and bool(made.converged)
    assert torch.equal(made.b_dec, held.b_dec)
    assert float(metrics.mcs(parts, made.W_dec).mean()) > 0.97 and fvu(made, x) < max(
        0.02, 1.2 * fvu(held, x)
    )
    with pytest.raises(ShapeError, match="nmf with 700 components takes as many rows, got 600"):
        NMF.fit_stream(in_batches(rows(), seen), 600, NMFConfig(d_sae=700))
    assert not NMF.fit_stream(in_batches(x, seen), len(x), NMFConfig(d_sae=6, max_iterations=1)).converged


def test_rica_of_streamed_rows_finds_what_it_finds_in_memory() -> None:
    truth, x = sparse_rows(8)
    seen: list[int] = []
    config = RICAConfig(d_sae=8, batch_size=256)
    held, made = RICA.fit(x + 3, config), RICA.fit_stream(in_batches(x + 3, seen), config)
    assert max(seen) == 256 and len(seen) == 24 + 2000, "a pass for the mean, and a batch for each step"
    torch.testing.assert_close(made.b_dec, held.b_dec, rtol=1e-4, atol=1e-5)
    for one in (held, made):
        assert float(metrics.mmacs(truth, one.W_dec)) > 0.99 and fvu(one, x + 3) < 0.01
    assert float(metrics.mmacs(held.W_dec, made.W_dec)) > 0.99
    x[7, 2] = torch.inf
    with pytest.raises(ActivationError, match="activations must be finite"):
        RICA.fit_stream(in_batches(x, seen), config)


def test_nmf_coefficients_are_those_of_scipys_nnls() -> None:
    from scipy.optimize import nnls

    x = rows()
    made = NMF.fit(x, NMFConfig(d_sae=8, n_steps=2000))
    for row in x[:5]:
        wanted, left = nnls(made.W_dec.T.double().numpy(), (row - made.b_dec).double().numpy())
        found = made.encode(row[None]).to_dense()[0]
        error = (row - made.b_dec - found @ made.W_dec).norm()
        assert float(error) <= left * 1.01 + 1e-3
        assert np.allclose(found, wanted, atol=0.05 * max(wanted.max(), 1))


def sparse_rows(n_directions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit directions in 8 dimensions, orthonormal if there are 8, and rows that hold few of them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(n_directions, 8, generator=generator)
    truth = torch.linalg.qr(truth)[0] if n_directions == 8 else truth / truth.norm(dim=1, keepdim=True)
    size = (6000, n_directions)
    acts = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) < 0.1)
    return truth, acts @ truth


def test_rica_finds_sparse_directions() -> None:
    truth, x = sparse_rows(8)
    made = RICA.fit(x, RICAConfig(d_sae=8))
    random = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    assert float(metrics.mmacs(truth, made.W_dec)) > 0.99 and float(metrics.mmacs(truth, random)) < 0.8
    assert fvu(made, x) < 0.01
    same, again = (RICA.fit(x, RICAConfig(d_sae=8, n_steps=50)) for _ in range(2))
    assert torch.equal(same.W_dec, again.W_dec)


def test_rica_of_more_directions_than_dimensions_reconstructs_and_finds_them_in_part() -> None:
    """Its objective is not least at the truth there (docs/dictionaries/rica.md)."""
    truth, x = sparse_rows(12)
    made = RICA.fit(x, RICAConfig(d_sae=12))
    random = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    assert fvu(made, x) < 0.01
    assert float(metrics.mmacs(truth, made.W_dec)) > float(metrics.mmacs(truth, random)) + 0.1


def test_neurons_are_what_the_formula_says() -> None:
    x = rows()
    made = Neurons.fit(x, NeuronsConfig(bias_scale=0.5, seed=3))
    mean = x.mean(0)
    size = (x - mean).square().mean().sqrt()
    bias = 0.5 * size * torch.randn(2 * D, generator=torch.Generator().manual_seed(3))
    expected = torch.relu(torch.cat([x - mean, mean - x], 1) + bias)
    assert torch.allclose(made.encode(x).to_dense(), expected, atol=1e-4)
    assert torch.allclose(made(x), expected[:, :D] - expected[:, D:] + mean, atol=1e-4)
    exact = Neurons.fit(x, NeuronsConfig(bias_scale=0.0))
    assert fvu(exact, x) < 1e-10  # relu(x) - relu(-x) is x
    assert fvu(Neurons.fit(x, NeuronsConfig(bias_scale=0.0, both_signs=False)), x) > 0.2


def test_fewer_kept_are_a_copy() -> None:
    whole = ICA.fit(rows(), ICAConfig())
    part = whole.keeping(3)
    assert whole.config.k is None and part.encode(rows(5)).k == 3 and whole.keeping(99).config.k == D


def test_what_cannot_be_fitted() -> None:
    x = rows()
    with pytest.raises(ConfigError, match="d_sae must be 24 for neurons, got 5"):
        Neurons.fit(x, NeuronsConfig(d_sae=5))
    with pytest.raises(ShapeError, match="nmf with 700 components takes as many rows, got 600"):
        NMF.fit(x, NMFConfig(d_sae=700))
    x[3, 2] = torch.nan
    for cls, config in ((NMF, NMFConfig()), (RICA, RICAConfig(d_sae=8))):
        with pytest.raises(
            ActivationError, match="activations must be finite, got NaN or infinity among the rows"
        ):
            cls.fit(x, config)
    made = NMF.fit(rows(), NMFConfig(d_sae=8))
    broken = rows(3)
    broken[1, 0] = torch.nan
    assert torch.isnan(made(broken)[1]).any() and not torch.isnan(made(broken)[0]).any()
