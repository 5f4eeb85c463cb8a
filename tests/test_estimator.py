"""SparseDictionary is an estimator as scikit-learn has them, and what it trains is what `train` would."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

from sememe import artifact, dictionaries
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError, ShapeError
from sememe.estimator import KINDS, SparseDictionary
from sememe.source import TensorSource
from sememe.train import TrainConfig, train

FEW = {"max_iter": 12, "batch_size": 16, "random_state": 0}


def planted(n: int = 400, d: int = 8, n_directions: int = 12, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows that are sums of two of a few directions."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((n_directions, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = np.zeros((n, n_directions))
    for row in codes:
        row[rng.choice(n_directions, 2, replace=False)] = rng.uniform(1, 2, 2)
    return (codes @ directions + 3).astype(np.float32)


X = planted()


@pytest.fixture(scope="module")
def fitted() -> SparseDictionary:
    return SparseDictionary(24, k=2, **FEW).fit(X)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.func.__name__ if hasattr(check, "func") else str(check))
        for _, check in estimator_checks_generator(SparseDictionary(**FEW))
    ],
)
def test_scikit_learns_own_checks(check: Any, unchecked: None) -> None:
    """Every check that scikit-learn has for a transformer; one of them sets parameters to nonsense."""
    check(SparseDictionary(**FEW))


def test_fitting_is_training_to_the_same_bits(tmp_path: Path) -> None:
    estimator = SparseDictionary(24, k=2, options={"dead_after_tokens": 50}, **FEW).fit(X)
    config = TrainConfig(
        out=tmp_path / "d",
        architecture=TopKConfig(d_sae=24, k=2, dead_after_tokens=50),
        n_tokens=12 * 16,
        batch_size=16,
        seed=0,
        watch_rows=0,
    )
    trained = train(config, source=TensorSource(torch.from_numpy(X), seed=0))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(estimator.dictionary_.state_dict()[name], tensor), name
    assert estimator.n_iter_ == 12 and estimator.n_features_in_ == 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_fits_and_comes_back(kind: str) -> None:
    options = {"prior_l0": 3.0} if kind == "variational" else None
    few = FEW | {"max_iter": 3}
    codes = SparseDictionary(24, architecture=kind, options=options, **few).fit_transform(X[:64])
    assert codes.shape == (64, 24) and codes.dtype == np.float32 and scipy.sparse.issparse(codes)


def test_codes_are_the_dictionarys(fitted: SparseDictionary) -> None:
    codes = fitted.transform(X)
    encoded = fitted.dictionary_.encode(torch.from_numpy(X))
    assert np.array_equal(codes.toarray(), encoded.to_dense().numpy())
    assert codes.has_sorted_indices and codes.nnz and (codes.data != 0).all()
    dense = clone(fitted).set_params(sparse_output=False).fit(X)
    assert np.array_equal(dense.transform(X), codes.toarray())
    recon = fitted.inverse_transform(codes)
    assert np.allclose(recon, codes @ fitted.components_ + fitted.intercept_, atol=1e-5)
    assert np.allclose(fitted.inverse_transform(dense.transform(X)), recon, atol=1e-6)
    assert list(fitted.get_feature_names_out()[:2]) == ["sparsedictionary0", "sparsedictionary1"]
    assert fitted.transform(X.astype(np.float64)).dtype == np.float64


def test_the_score_is_one_minus_fvu(fitted: SparseDictionary) -> None:
    recon = fitted.inverse_transform(fitted.transform(X)).astype(np.float64)
    wanted = 1 - np.square(X - recon).sum() / np.square(X - X.mean(0, dtype=np.float64)).sum()
    assert fitted.score(X) == pytest.approx(wanted, rel=1e-5)
    longer = SparseDictionary(24, k=2, max_iter=150, batch_size=100, random_state=0).fit(X[:300])
    assert longer.score(X[300:]) > max(0.7, fitted.score(X[300:])), "on rows that it was not trained on"


def test_partial_fit_goes_on_and_survives_a_pickle() -> None:
    one = SparseDictionary(24, k=2, **FEW)
    for part in np.split(X, 4):
        one.partial_fit(part)
    assert one.n_iter_ == 4 * 7 and one.score(X) > 0
    early = SparseDictionary(24, k=2, **FEW)
    for number, part in enumerate(np.split(X, 4)):
        early.partial_fit(part)
        if number == 1:
            early = pickle.loads(pickle.dumps(early))
    assert np.array_equal(early.components_, one.components_), "a pickle holds the optimiser's state"
    many = SparseDictionary(24, k=2, batch_size=80, max_iter=50, random_state=0).fit(X)
    before = many.score(X)
    for _ in range(20):
        many.partial_fit(X)
    assert many.n_iter_ == 150 and many.score(X) > max(0.7, before)
    with pytest.raises(ConfigError, match=r"must go on from fit or partial_fit in this process.*clone"):
        pickle.loads(pickle.dumps(SparseDictionary(24, k=2, **FEW).fit(X))).partial_fit(X)


def test_pickles_hold_arrays(fitted: SparseDictionary, tmp_path: Path) -> None:
    content = pickle.dumps(fitted)
    assert b"torch" not in content
    again = pickle.loads(content)
    assert np.array_equal(again.transform(X).toarray(), fitted.transform(X).toarray())
    joblib.dump(fitted, tmp_path / "fitted.joblib")
    mapped = joblib.load(tmp_path / "fitted.joblib", mmap_mode="r")
    assert np.array_equal(mapped.components_, fitted.components_)


def test_in_a_pipeline_and_a_grid_search() -> None:
    y = (X[:, 0] > X[:, 0].mean()).astype(int)
    steps = make_pipeline(SparseDictionary(24, **FEW), LogisticRegression(max_iter=500))
    search = GridSearchCV(steps, {"sparsedictionary__k": [1, 4]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.6
    alone = GridSearchCV(SparseDictionary(24, **FEW), {"k": [1, 4]}, cv=2, error_score="raise").fit(X)
    assert alone.best_params_ == {"k": 4}


def test_to_an_artifact_and_back(fitted: SparseDictionary, tmp_path: Path) -> None:
    saved = fitted.save(tmp_path / "d", X)
    assert saved.kind == "dictionary" and artifact.load(tmp_path / "d").fingerprint == saved.fingerprint
    again = SparseDictionary.from_dictionary(tmp_path / "d", sparse_output=False)
    assert np.array_equal(again.transform(X), fitted.transform(X).toarray())
    assert again.architecture == fitted.dictionary_.config and again.n_features_in_ == 8
    transcoder = dictionaries.build(TopKConfig(k=1, d_sae=4), 3, 5)
    with pytest.raises(ShapeError, match=r"d_in must be d_out, got 3 and 5"):
        SparseDictionary.from_dictionary(transcoder)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"architecture": "topkk"}, r"architecture must be one of .* got 'topkk'. Did you mean 'topk'"),
        ({"architecture": "cross_layer"}, r"reconstruct one place, got 'cross_layer'"),
        ({"k": 2, "options": {"k": 3}}, r"an option must be given once, got k. Take it out of options"),
        ({"k": 30, "d_sae": 24}, r"k must be in \[1, d_sae=24\], got 30. Lower k or raise d_sae"),
        ({"architecture": "relu", "k": 3}, r"k must be a known option of"),
        ({"architecture": TopKConfig(k=2), "k": 3}, r"left out when the architecture is a config, got k"),
        ({"options": {"nonsense": 1}}, r"nonsense must be a known option of"),
        ({"max_iter": 0}, r"max_iter must be >= 1, got 0. Raise max_iter"),
    ],
)
def test_bad_options_say_what_to_do(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseDictionary(**params).fit(X)


def test_sparse_rows_are_refused_with_a_remedy(fitted: SparseDictionary) -> None:
    for use in (SparseDictionary(**FEW).fit, fitted.transform):
        with pytest.raises(TypeError, match=r"[Ss]parse data was passed.*dense data is required.*toarray"):
            use(scipy.sparse.csr_matrix(X))
    with pytest.raises(ValueError, match=r"a column for each of the 24 latents, got 8"):
        fitted.inverse_transform(X)
