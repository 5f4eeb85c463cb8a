"""A grid of penalties and sizes: every cell measured as `recovery` would, four plots, errors."""

import json

import pytest

from sememe import artifact
from sememe.cli import _run
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.grid import GRID, N_ROWS, GridConfig, grid
from sememe.metrics import mmcs
from sememe.toy import PlantedSource, ToyConfig, recovery
from sememe.train import TrainConfig, open_sweep

PLANTED = ToyConfig(d=12, n_features=20, n_active=2, decay=1.0)


def config(out, **options) -> GridConfig:
    train = TrainConfig(
        architecture=ReLUConfig(resample="none"), n_tokens=150_000, batch_size=256, lr=5e-3, threads=1
    )
    return GridConfig.build(
        {"out": out, "planted": PLANTED, "train": train, "penalties": (0.01, 1.0), "ratios": (0.5, 2.0)}
        | options
    )


def test_every_cell_is_what_its_dictionary_does(tmp_path, capsys):
    made = grid(config(tmp_path / "g"))
    lines = json.loads(made.file(GRID).read_text())["dictionaries"]
    assert [(line["l1_coefficient"], line["d_sae"]) for line in lines] == [
        (0.01, 10), (0.01, 40), (1.0, 10), (1.0, 40)
    ]  # fmt: skip
    source = PlantedSource(PLANTED)
    sweep = open_sweep(tmp_path / "g" / "dictionaries")
    names = {(e["options"]["l1_coefficient"], e["options"]["d_sae"]): e["name"] for e in sweep.index}
    for line in lines:
        dictionary = sweep.load(names[line["l1_coefficient"], line["d_sae"]])
        assert recovery(source.planted, dictionary).recall == line["recall"]
        x = source.hold_out(4096).x
        dense = dictionary.encode(x).to_dense()
        assert line["l0"] == pytest.approx(float((dense > 0).sum(1).float().mean()), rel=0.1, abs=0.05)
        error = (x - dictionary(x).detach()).square().sum() / (x - x.mean(0)).square().sum()
        assert line["fvu"] == pytest.approx(float(error), rel=0.1)
        fresh = dictionary.encode(source.hold_out(N_ROWS).x).to_dense()
        assert line["dead"] == int((fresh > 0).any(0).logical_not().sum())
        assert line["precision"] == recovery(source.planted, dictionary).precision
        if line["d_sae"] == 40:
            assert line["next_larger"] is None
        else:
            larger = sweep.load(names[line["l1_coefficient"], 40]).decoder_directions()
            assert line["next_larger"] == mmcs(dictionary.decoder_directions(), larger)
    found = {(line["l1_coefficient"], line["d_sae"]): line for line in lines}
    assert found[0.01, 40]["recall"] > found[0.01, 10]["recall"]
    assert found[1.0, 40]["fvu"] > 2 * found[0.01, 40]["fvu"], "the larger penalty costs more"
    picture = (made.path / "grid.svg").read_text()
    assert picture.count("l1_coefficient") == 4 and "2 x" in picture and "Dead latents" in picture
    assert (made.path / "grid.csv").read_text().splitlines()[0].startswith("l1_coefficient,d_sae,recall")
    before = made.fingerprint
    assert grid(config(tmp_path / "g")).fingerprint == before, "it is there"


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
        ({"penalties": (0.1, 0.1)}, r"named once, got \(0.1, 0.1\)"),
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
