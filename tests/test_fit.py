"""Fitting baselines and coders to a store: every kind comes out as a dictionary that evaluate and compare take."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluate_world import World, autoencoder, identity, make_world, save, text_config

from sememe import artifact, dictionaries
from sememe.compare import CompareConfig, compare
from sememe.dictionaries.nmf import NMF, NMFConfig
from sememe.dictionaries.rica import RICA, RICAConfig
from sememe.dictionaries.sparse_coder import SparseCoderConfig, sparse_coder_over
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError, HookpointError, MismatchError
from sememe.fit import KINDS, FitConfig, fit
from sememe.source import StoreSource
from sememe.store import open_store

OPTIONS = {
    "ica": {"k": 3},
    "identity": {"k": 3},
    "ksvd": {"k": 3, "d_sae": 40, "n_iterations": 3},
    "neurons": {"k": 3},
    "nmf": {"k": 3},
    "pca": {"k": 3},
    "random_directions": {"k": 3, "d_sae": 40},
    "rica": {"k": 3, "d_sae": 40, "n_steps": 50},
    "sparse_coder": {"k": 3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_world(tmp_path_factory.mktemp("fit"))
    store = open_store(made.store)
    x = store.read(0, ("resid_post.1",)).activations["resid_post.1"].float()
    sites = autoencoder(made.lm, max_norm=store.info.hookpoints["resid_post.1"].max_norm)
    topk = dictionaries.build(TopKConfig(k=3, d_sae=48), 24, 24, sites)
    topk.initialise(x, x, torch.Generator().manual_seed(0))
    save(topk, made.place / "topk")
    yield made


def config_for(world: World, out: Path, kind: str, **changes: object) -> FitConfig:
    options = {"store": world.store, "out": out, "hookpoint": "resid_post.1"}
    options |= {"n_rows": 1000} if kind != "sparse_coder" else {}
    options |= {
        "baseline": {"kind": kind, **OPTIONS[kind]},
        "over": world.place / "topk" if kind == "sparse_coder" else None,
    }
    return FitConfig.build({**options, **changes})


@pytest.fixture(scope="module")
def fitted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fitted")
    for kind in KINDS:
        fit(config_for(world, place / kind, kind))
    return place


def test_there_are_options_for_every_kind() -> None:
    assert set(OPTIONS) == set(KINDS)


def test_every_kind_is_measured_by_the_same_code(world: World, fitted: Path, tmp_path: Path) -> None:
    options = {
        "dictionaries": (fitted,),
        "out": tmp_path / "c",
        "model": {"model": "unused"},
        "store": world.store,
    }
    options |= {"text": text_config(world.corpus), "n_tokens": 1200, "n_fit_rows": 800, "batch_rows": 4}
    options |= {"n_bootstrap": 50, "nulls": ()}
    data = json.loads(
        (compare(CompareConfig.build(options), lm=world.lm).path / "comparison.json").read_text()
    )
    by_name = {row["name"]: row for row in data["rows"]}
    assert set(by_name) == set(KINDS)
    for name, row in by_name.items():
        assert row["metrics"]["l0"]["value"] <= 3 + 1e-9, name
        # nmf keeps 3 of many parts that only add up to a row together
        assert 0 <= row["metrics"]["fvu"]["value"] < (10 if name == "nmf" else 3), name
    value = {name: row["metrics"]["fvu"]["value"] for name, row in by_name.items()}
    assert value["pca"] < value["identity"] and value["sparse_coder"] < value["random_directions"]
    saved = artifact.load(fitted / "pca", "dictionary")
    assert saved.extra["policy"] and saved.extra["separation"] and saved.meta["parents"]["store"]


def test_a_coder_searches_over_the_directions_of_a_dictionary(world: World, fitted: Path) -> None:
    coder = dictionaries.load(fitted / "sparse_coder")
    expected = sparse_coder_over(dictionaries.load(world.place / "topk"), SparseCoderConfig(k=3))
    x = open_store(world.store).read(0, ("resid_post.1",)).activations["resid_post.1"].float()[:20]
    assert torch.allclose(coder(x), expected(x), atol=1e-3)
    error = (x - coder(x)).square().sum()
    assert (
        error < (x - dictionaries.load(world.place / "topk")(x)).square().sum()
    )  # a search beats one product


def test_the_second_run_opens_it_and_another_is_refused(world: World, fitted: Path) -> None:
    before = artifact.load(fitted / "pca", "dictionary").fingerprint
    fit(config_for(world, fitted / "pca", "pca"))
    assert artifact.load(fitted / "pca", "dictionary").fingerprint == before
    with pytest.raises(MismatchError, match="the dictionary at"):
        fit(config_for(world, fitted / "pca", "pca", n_rows=500))


@pytest.mark.parametrize("update", ["ksvd", "mod", "gradient"])
def test_each_update_of_directions_lowers_the_error(world: World, update: str) -> None:
    from sememe.dictionaries.sparse_coder import KSVDConfig, ksvd

    x = open_store(world.store).read(0, ("resid_post.1",)).activations["resid_post.1"].float()[:800]
    learned = ksvd(x, KSVDConfig(k=3, d_sae=40, n_iterations=8, update=update))
    assert learned.mse[-1] < 0.97 * learned.mse[0]


def test_what_cannot_be_fitted(world: World, tmp_path: Path) -> None:
    with pytest.raises(HookpointError, match=r"a hookpoint must be chosen when the store holds several"):
        fit(config_for(world, tmp_path / "d", "pca", hookpoint=None))
    with pytest.raises(HookpointError, match=r"resid_post\.7"):
        fit(config_for(world, tmp_path / "d", "pca", hookpoint="resid_post.7"))
    with pytest.raises(ConfigError, match=r"k must be in \[1, d_sae=24\], got 25"):
        fit(config_for(world, tmp_path / "d", "pca", baseline={"kind": "pca", "k": 25}))
    with pytest.raises(ConfigError, match=r"n_rows must be left out when codes are searched for over given"):
        config_for(world, tmp_path / "d", "sparse_coder", n_rows=1000)
    with pytest.raises(ConfigError, match=r"over must name a dictionary with sparse_coder"):
        config_for(world, tmp_path / "d", "sparse_coder", over=None)
    with pytest.raises(ConfigError, match=r"nothing else has one, got .*Drop --over"):
        config_for(world, tmp_path / "d", "pca", over=world.place / "topk")
    fista = {"kind": "ksvd", "encoder": "fista", "d_sae": 16, "n_iterations": 2, "penalty": 0.5}
    assert fit(config_for(world, tmp_path / "fista", "ksvd", baseline=fista)).d_sae == 16  # which knows no k
    identity(world.lm, tmp_path / "elsewhere", autoencoder(world.lm, "mlp_out.2"))
    with pytest.raises(
        MismatchError,
        match=r"must be of the store's model and hookpoint, resid_post\.1 of .*, got mlp_out\.2",
    ):
        fit(config_for(world, tmp_path / "d", "sparse_coder", over=tmp_path / "elsewhere"))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("kind", ["pca", "identity", "random_directions"])
def test_streamed_rows_give_what_held_ones_give(world, fitted, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("sememe.fit.STREAMED_ROWS", 37)
    streamed = fit(config_for(world, tmp_path / kind, kind))
    held = dictionaries.load(fitted / kind)
    store = open_store(world.store)
    x = store.read(0, ("resid_post.1",)).activations["resid_post.1"].float()
    torch.testing.assert_close(streamed(x), held(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streamed.b_dec, held.b_dec, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nmf", "rica"])
def test_passes_over_the_store_are_passes_over_the_same_rows(world, fitted, kind):
    store = open_store(world.store)
    x = StoreSource(store, ("resid_post.1",)).next_batch(1000).x.float()

    def passes(size):
        return iter(torch.split(x, size))

    made = (
        NMF.fit_stream(passes, 1000, NMFConfig.build(OPTIONS["nmf"]))
        if kind == "nmf"
        else RICA.fit_stream(passes, RICAConfig.build(OPTIONS["rica"]))
    )
    stored = dictionaries.load(fitted / kind)
    torch.testing.assert_close(stored.b_dec, made.b_dec)
    torch.testing.assert_close(stored.W_dec, made.W_dec)
