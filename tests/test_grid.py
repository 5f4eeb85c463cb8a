"""A grid of penalties and sizes: every cell measured as `recovery` would, four plots, errors."""

import json

import pytest
import torch

from sememe import artifact, dictionaries
from sememe.cli import _run
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.grid import GRID, N_ROWS, N_SAMPLE_ROWS, GridConfig, _cells, _sizes, grid
from sememe.metrics import mmcs
from sememe.toy import PlantedSource, ToyConfig, recovery
from sememe.train import TrainConfig
from sememe.train.crew import Crew

PLANTED = ToyConfig(d=12, n_features=20, n_active=2, decay=1.0)


def config(out, **options) -> GridConfig:
    train = TrainConfig(
        architecture=ReLUConfig(resample="none"), n_tokens=150_000, batch_size=256, lr=5e-3, threads=1
    )
    return GridConfig.build(
        {"out": out, "planted": PLANTED, "train": train, "penalties": (0.5, 50.0), "ratios": (0.5, 2.0)}
        | options
    )


def test_every_cell_is_what_its_dictionary_does(tmp_path, capsys):
    made = grid(config(tmp_path / "g"))
    lines = json.loads(made.file(GRID).read_text())["dictionaries"]
    assert [(line["penalty"], line["d_sae"]) for line in lines] == [
        (0.5, 10),
        (0.5, 40),
        (50.0, 10),
        (50.0, 40),
    ]
    source = PlantedSource(PLANTED)
    folder = tmp_path / "g" / "dictionaries"
    assert len(list(folder.iterdir())) == 4
    for line in lines:
        dictionary = dictionaries.load(folder / f"penalty{line['penalty']:g}-d_sae{line['d_sae']}")
        assert dictionary.config.l1_coefficient == line["l1_coefficient"]
        assert recovery(source.planted, dictionary).recall == line["recall"]
        x = source.hold_out(4096).x
        dense = dictionary.encode(x).to_dense()
        assert line["l0"] == pytest.approx(float((dense > 0).sum(1).float().mean()), rel=0.1, abs=0.05)
        error = (x - dictionary(x).detach()).square().sum() / (x - x.mean(0)).square().sum()
        assert line["fvu"] == pytest.approx(float(error), rel=0.1)
        fresh = dictionary.encode(source.hold_out(N_ROWS).x).to_dense()
        assert line["dead"] == int((fresh > 0).any(0).logical_not().sum())
        found_there = recovery(source.planted, dictionary)
        assert line["precision"] == found_there.precision and line["random"] == found_there.random
        assert line["random_precision"] == found_there.random_precision < line["precision"]
        for name in ("recall", "precision", "found", "l0", "fvu"):
            assert line[f"{name}_low"] <= line[name] <= line[f"{name}_high"], name
        assert line["cause"] == ""
        if line["d_sae"] == 40:
            assert line["next_larger"] is line["next_larger_low"] is None
        else:
            larger = dictionaries.load(folder / f"penalty{line['penalty']:g}-d_sae40").decoder_directions()
            assert line["next_larger"] == pytest.approx(mmcs(dictionary.decoder_directions(), larger))
            assert line["next_larger_low"] < line["next_larger"] < line["next_larger_high"]
    found = {(line["penalty"], line["d_sae"]): line for line in lines}
    assert found[0.5, 40]["recall"] > found[0.5, 10]["recall"]
    assert found[50.0, 40]["fvu"] > 2 * found[0.5, 40]["fvu"], "the larger penalty costs more"
    picture = (made.path / "grid.svg").read_text()
    assert picture.count("penalty") == 4 and "2 x" in picture and "Dead latents" in picture
    header, *cells = (made.path / "grid.csv").read_text().splitlines()
    assert header.startswith("penalty,l1_coefficient,d_sae,recall,recall_low,recall_high,precision")
    assert len(cells) == 4 and all(cell.count(",") == header.count(",") for cell in cells)
    before = made.fingerprint
    capsys.readouterr()
    assert grid(config(tmp_path / "g")).fingerprint == before, "it is there"
    assert capsys.readouterr().err == "", "and nothing was trained again"


def test_the_published_grid_is_an_option_and_the_default_a_part_of_it():
    trained = TrainConfig(architecture=ReLUConfig())
    few = GridConfig(train=trained)
    assert few.penalties == pytest.approx((0.1, 10**-0.5, 1, 10**0.5)) and few.ratios == (0.5, 1, 2)
    options = GridConfig(train=trained, published=True)
    assert options.replace(out=few.out) == options
    with pytest.raises(
        ConfigError, match=r"ratios must be left out when the published grid is asked for, got 1.0. "
    ):
        GridConfig(train=trained, published=True, ratios=(1.0,))
    assert len(options.penalties) == 17 and len(options.ratios) == 8
    assert options.penalties[0] == pytest.approx(0.01) and options.penalties[-1] == pytest.approx(100)
    assert options.penalties[9] / options.penalties[8] == pytest.approx(10**0.25)
    assert options.ratios == (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    for one, n_tokens in ((few, 500_000), (options, 4_000_000)):
        assert {cell.config.n_tokens for cell in _cells(one, _sizes(one))} == {n_tokens}


@pytest.mark.parametrize("scale", [True, False])
def test_a_penalty_weighs_the_mean_over_latents_in_raw_units(scale, tmp_path, capsys):
    """As in the published code: mse + penalty * (sum over latents, mean over rows) / d_sae, on the rows as they are."""
    train = TrainConfig(architecture=ReLUConfig(resample="none"), n_tokens=256, batch_size=256, scale=scale)
    made = grid(config(tmp_path / "g", train=train, penalties=(0.1, 3.0)))
    source = PlantedSource(PLANTED)
    x = source.sample(N_SAMPLE_ROWS).x
    spread = float((x - x.mean(0)).square().mean().sqrt()) if scale else 1.0
    assert spread != pytest.approx(1.0, abs=0.1) or not scale
    for line in json.loads(made.file(GRID).read_text())["dictionaries"]:
        sae = ReLUConfig(l1_coefficient=line["l1_coefficient"], d_sae=line["d_sae"])
        built = dictionaries.build(sae, PLANTED.d, PLANTED.d)
        rows = x[:512] / spread
        built.initialise(rows, rows, torch.Generator().manual_seed(0))
        loss = built.loss(rows, rows, 0.5)
        acts, recon = built.encode(rows).to_dense() * spread, built(rows) * spread
        mean_act = acts.abs().sum(1).mean() / line["d_sae"]
        published = (x[:512] - recon).square().mean() + line["penalty"] * mean_act
        assert loss.total.item() * spread**2 == pytest.approx(published.item(), rel=1e-3)


def test_a_grid_that_was_killed_goes_on(tmp_path, monkeypatch, capsys):
    """The first cells are kept, the one that was begun is resumed, and all is as if nothing had happened."""
    options = config(tmp_path).train.replace(n_tokens=10 * 256)
    whole = grid(config(tmp_path / "whole", train=options)).file(GRID).read_text()
    real, calls = Crew.train_step, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 16:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Crew, "train_step", dies)
    options = options.replace(checkpoint_every_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        grid(config(tmp_path / "g", train=options))
    capsys.readouterr()
    assert grid(config(tmp_path / "g", train=options)).file(GRID).read_text() == whole
    assert len(calls) == 4 * 10 + 1, "no step was taken twice"
    err = capsys.readouterr().err
    assert "cell 2 of 4" in err and "cell 4 of 4" in err and "cell 1 of 4" not in err


def test_the_command_draws_a_grid(tmp_path, capsys):
    options = [
        "--planted-d",
        "12",
        "--planted-n-features",
        "20",
        "--planted-n-active",
        "2",
        "--planted-decay",
        "1",
    ]
    options += ["--n-tokens", "20000", "--batch-size", "256", "--lr", "0.003", "--threads", "1"]
    command = ["toy", "tied", *options, "--out", str(tmp_path / "g"), "--resample", "none"]
    assert _run([*command, "--grid", "--penalties", "0.01", "0.1", "--ratios", "1"]) == 0
    assert f"plots: {tmp_path / 'g' / 'plots' / 'grid.svg'}" in capsys.readouterr().out
    assert artifact.load(tmp_path / "g" / "plots", "grid").meta["kind"] == "grid"
    assert _run([*command, "--ratios", "1", "2"]) == 2
    assert "--ratios must go with --grid, got 1.0 2.0. Drop it, or pass --grid." in capsys.readouterr().err
    assert _run([*command, "--published"]) == 2
    assert "--published must go with --grid" in capsys.readouterr().err


def test_a_grid_without_a_kind_is_of_tied_weights(tmp_path, capsys):
    options = ["--planted-d", "12", "--planted-n-features", "20", "--planted-n-active", "2"]
    options += ["--planted-decay", "1", "--n-tokens", "512", "--batch-size", "256", "--threads", "1"]
    options += ["--penalties", "0.1", "--ratios", "1"]
    assert _run(["toy", "--grid", *options, "--out", str(tmp_path / "g")]) == 0
    (made,) = (tmp_path / "g" / "dictionaries").iterdir()
    assert dictionaries.load(made).kind == "tied"
    capsys.readouterr()
    assert _run(["toy", "--k", "3"]) == 2
    said = capsys.readouterr().err
    assert "`sememe toy` must go with one of its kinds, got '--k'." in said
    assert _run(["toy", "topkk"]) == 2
    assert "must go with one of its kinds, got 'topkk'. Did you mean 'topk'" in capsys.readouterr().err
    assert _run(["toy"]) == 0 and "superposed" in capsys.readouterr().out


def test_families_are_reported(tmp_path, capsys):
    options = [
        "--planted-d",
        "16",
        "--planted-n-features",
        "16",
        "--planted-n-active",
        "2",
        "--planted-decay",
        "1",
    ]
    options += ["--planted-n-children", "3", "--n-tokens", "60000", "--batch-size", "256", "--lr", "0.003"]
    assert _run(["toy", "topk", *options, "--k", "2", "--threads", "1", "--out", str(tmp_path / "d")]) == 0
    assert "parents silent beside a child" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": TrainConfig(architecture=TopKConfig())}, "with an l1_coefficient, got topk. Take relu"),
        (
            {"train": TrainConfig(architecture=ReLUConfig(), sweep=("seed=0,1",))},
            "no sweep of its own, got seed=0,1. Drop --sweep",
        ),
        (
            {"train": TrainConfig(architecture=PAnnealConfig())},
            "penalty is a sum of activations all along, got p_anneal, whose exponent falls. Take relu",
        ),
        ({"penalties": (0.1, 0.1)}, r"named once, got \(0.1, 0.1\)"),
        ({"penalties": (0.1, 0.0)}, "penalties must be above 0, got 0. Change --penalties"),
        (
            {"train": TrainConfig(architecture=ReLUConfig(d_sae=64))},
            "d_sae must be left out of a grid, whose ratios decide it, got 64. Drop --d-sae, or set --ratios",
        ),
        (
            {"train": TrainConfig(architecture=ReLUConfig(l1_coefficient=0.5))},
            "l1_coefficient must be left out of a grid, whose penalties decide it, got 0.5",
        ),
        ({"ratios": (1.0, 1.01)}, "a size of its own, at least 1, got"),
        ({"ratios": (0.001,)}, "a size of its own, at least 1, got"),
    ],
)
def test_what_cannot_be_a_grid_is_refused_before_anything_starts(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        grid(config(tmp_path / "g", **options))
    assert not (tmp_path / "g").exists()


def test_fresh_rows_are_not_those_of_the_stream():
    source = PlantedSource(PLANTED)
    held, given = source.hold_out(50).x, source.next_batch(50).x
    some = held[held.any(dim=1)]  # rows without any feature are alike
    assert len(some) > 30 and not (some[:, None] == given).all(-1).any()


def test_a_grid_with_more_cells_keeps_those_that_are_there(tmp_path):
    first = grid(config(tmp_path / "g", penalties=(0.1,), ratios=(1.0,)))
    (made,) = (tmp_path / "g" / "dictionaries").iterdir()
    before = (made / "meta.json").stat().st_mtime_ns
    more = grid(config(tmp_path / "g", penalties=(0.1, 1.0), ratios=(1.0,)))
    assert more.fingerprint != first.fingerprint and (made / "meta.json").stat().st_mtime_ns == before
    lines = json.loads((more.path / "grid.json").read_text())["dictionaries"]
    assert [line["penalty"] for line in lines] == [0.1, 1.0]
