"""The experiments of `sememe toy` that train no dictionary: their tables, plots, commands, and what they refuse."""

import csv
import json

import pytest
import torch
from evaluate_world import HOOKPOINT, autoencoder, make_world, zeros

from sememe import artifact, dictionaries
from sememe.cli import _run
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.errors import ConfigError, HookpointError
from sememe.experiments import (
    LayersConfig,
    LikenessConfig,
    SuperpositionConfig,
    _superposition_line,
    layers,
    likeness,
    superposition,
)
from sememe.source import StoreSource
from sememe.store import open_store
from sememe.toy import Superposed, statistics
from sememe.toy.superposed import _measure


def rows(folder):
    """A table, which the CSV holds too."""
    found = json.loads((folder / "table.json").read_text())["rows"]
    with (folder / "table.csv").open() as file:
        copied = list(csv.DictReader(file))
    assert len(copied) == len(found) and list(copied[0]) == list(found[0])
    for line, copy in zip(found, copied, strict=True):
        for name, value in line.items():
            if isinstance(value, float):
                assert float(copy[name]) == pytest.approx(value, rel=1e-5)
    return found


def test_superposition_against_width_and_density(tmp_path, capsys):
    command = ["toy", "superposed", "--n-features", "12", "--widths", "3", "6", "--densities", "1", "0.02"]
    command += ["--n-steps", "900", "--batch-size", "256", "--out", str(tmp_path / "s")]
    assert _run(command) == 0
    out = capsys.readouterr().out
    assert "dimensions_per_feature" in out and "superposition.svg" in out
    found = {(line["d"], line["density"]): line for line in rows(tmp_path / "s")}
    assert list(found) == [(3, 1.0), (3, 0.02), (6, 1.0), (6, 0.02)]
    for d in (3, 6):  # more of the sparse ones fit in, and better
        assert d < found[d, 1.0]["n_carried"] < found[d, 0.02]["n_carried"]
        assert found[d, 0.02]["loss"] < 0.8 * found[d, 1.0]["loss"]
    picture = (tmp_path / "s" / "superposition.svg").read_text()
    assert "features carried, of 12" in picture and "d 6" in picture
    before = artifact.load(tmp_path / "s", "superposition").fingerprint
    assert _run(command) == 0 and artifact.load(tmp_path / "s").fingerprint == before
    with pytest.raises(ConfigError, match=r"widths must be in \[1, n_features=80\], got 90"):
        superposition(SuperpositionConfig.build({"networks": {"widths": (90,)}, "out": tmp_path / "no"}))
    assert not (tmp_path / "no").exists()


def test_one_layer_computes_its_features_alone(tmp_path, capsys):
    command = ["toy", "layered", "--n-features", "6", "--d", "6", "--n-layers", "1", "--width", "12"]
    command += ["--density", "0.2", "--n-steps", "400", "--batch-size", "128", "--out", str(tmp_path / "l")]
    assert _run(command) == 0
    out = capsys.readouterr().out
    found = rows(tmp_path / "l")
    learned = [line for line in found if line["effective_layers"] is not None]
    assert f"features computed (fvu at most 0.9)           {len(learned)} of 6" in out and learned
    assert all(line["share_0"] == 1 and line["effective_layers"] == 1 for line in learned)
    assert f"features of which one layer has over 90%     {len(learned)} of {len(learned)}" in out
    assert "effective layers of a feature" in (tmp_path / "l" / "layers.svg").read_text()


def test_networks_without_a_number_have_a_cause_beside_it(tmp_path, capsys):
    command = ["toy", "superposed", "--n-features", "4", "--widths", "2", "--densities", "1", "1e-12"]
    command += ["--n-steps", "2", "--batch-size", "8"]
    assert _run([*command, "--out", str(tmp_path / "idle")]) == 0
    dense, idle = rows(tmp_path / "idle")
    assert dense["cause"] == "" and dense["loss"] > 0
    assert idle["loss"] is None and "loss: no feature is active in any test row" in idle["cause"]
    assert "no feature is active" in capsys.readouterr().out
    assert _run([*command, "--lr", "1e30", "--out", str(tmp_path / "far")]) == 0
    far = rows(tmp_path / "far")[0]
    assert far["interference"] is None and far["dimensions_per_feature"] is None
    assert far["cause"] == "the training diverged: weights are NaN or infinite (lower lr)"
    assert (tmp_path / "far" / "superposition.svg").is_file()


def test_a_network_that_carries_nothing_has_no_interference():
    network = Superposed(torch.zeros(2, 4), torch.zeros(4), 0.5, 0)
    measured = _measure(network, torch.ones(4), torch.Generator().manual_seed(0))
    line = _superposition_line(measured, network)
    assert line["n_carried"] == 0 and line["interference"] is None and line["dimensions_per_feature"] is None
    assert "interference: no feature is carried; dimensions_per_feature: all weights are 0" in line["cause"]


def test_features_that_no_layer_computes_say_why(tmp_path):
    stack = {"n_features": 4, "d": 4, "width": 1, "n_steps": 2, "batch_size": 16}
    for density, cause in (
        (0.5, "not learned: fvu above 0.9"),
        (1e-12, "the feature is active in no test row, or the training diverged"),
    ):
        out = tmp_path / f"{density}"
        layers(LayersConfig.build({"stack": {**stack, "density": density}, "out": out}))
        found = rows(out)
        assert all(line["effective_layers"] is None and line["cause"] == cause for line in found)
        assert all((line["fvu"] is None) == (density < 0.1) for line in found)


def test_a_fitted_generator_stands_beside_two_halves_of_the_real_rows(tmp_path, capsys):
    world = make_world(tmp_path)
    sites = autoencoder(world.lm)
    store = open_store(world.store)
    first, second = (StoreSource(store, (HOOKPOINT,)).next_batch(n).x.float() for n in (1000, 2000))
    second = second[1000:]
    made = TopK(TopKConfig(k=3, d_sae=32), first.shape[1], first.shape[1], 32, sites)
    made.initialise(first, first, torch.Generator().manual_seed(0))
    made.fold().eval().save(tmp_path / "d", first[:16])
    command = ["toy", "fitted", "--store", str(world.store), "--dictionary", str(tmp_path / "d")]
    assert _run([*command, "--n-rows", "2000", "--out", str(tmp_path / "f")]) == 0
    assert "effective dimensions" in capsys.readouterr().out
    found = {line["statistic"]: line for line in rows(tmp_path / "f")}
    dictionary = dictionaries.load(tmp_path / "d")
    for name, half in (("real_again", first), ("real", second)):
        expected = statistics(half, dictionary)
        assert {key: line[name] for key, line in found.items()} == pytest.approx(expected)
    assert found["mean norm"]["fitted"] == pytest.approx(found["mean norm"]["real"], rel=0.1)
    elsewhere = zeros(world.lm, tmp_path / "other", autoencoder(world.lm, "resid_post.2"))
    config = LikenessConfig(store=world.store, dictionary=elsewhere, out=tmp_path / "no", n_rows=2000)
    with pytest.raises(
        HookpointError, match=r"the store must hold resid_post.2, which the dictionary reads, got "
    ):
        likeness(config)
    assert not (tmp_path / "no").exists()
