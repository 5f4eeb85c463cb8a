"""Training with each optimiser: exported weights, resume after kill -9, options that belong to it."""

import json
from pathlib import Path

import pytest
import test_train
import torch
from safetensors.torch import load_file
from test_train import RESUME, TensorSource, killed_and_resumed, planted

from sememe.cli.flags import command
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.metrics import mmcs
from sememe.optimiser import OPTIMISERS, AdamConfig, MuonConfig, SignumConfig
from sememe.tracking import read_log
from sememe.train import TrainConfig, train
from sememe.train.member import Member

RATES = {"adam": 3e-3, "signum": 4e-3, "muon": 1e-2}

__all__ = ["TensorSource", "config", "planted"]  # what a resumed process finds here


def config(kind: str, out: Path, **changes) -> TrainConfig:
    changes = {"optimiser": {"kind": kind}, "lr": RATES[kind]} | changes
    return test_train.config("topk", out, **changes)


@pytest.mark.parametrize("kind", ["signum", "muon"])  # Adam, with every architecture, in test_train
def test_kill_9_and_resume_gives_the_same_bits(kind, tmp_path, monkeypatch):
    _, x = planted()
    train(config(kind, tmp_path / "whole"), source=TensorSource(x))
    monkeypatch.setattr(
        test_train, "RESUME", RESUME.replace("import test_train as t", f"import {__name__} as t")
    )
    killed_and_resumed([kind, str(tmp_path / "resumed"), "stored"], tmp_path / "resumed", (13,))
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", sorted(OPTIMISERS))
def test_training_recovers_planted_features(kind, tmp_path):
    features, x = planted(8000)
    made = train(config(kind, tmp_path / "d", n_tokens=600 * 256), source=TensorSource(x))
    assert mmcs(features, made.decoder_directions().detach()) > (0.95 if kind == "adam" else 0.93)
    log = read_log(tmp_path / "d" / "metrics.jsonl")
    assert log[-1]["fvu"] < 0.3 * log[0]["fvu"]
    assert (log[-1]["lr"] == pytest.approx(RATES[kind])) == (kind == "signum"), "schedule-free"


def test_signum_exports_the_average_and_not_where_it_stands(tmp_path, monkeypatch):
    _, x = planted()
    members = []
    step = Member.train_step

    def watch(member, *batches):
        members[:] = [member]
        return step(member, *batches)

    monkeypatch.setattr(Member, "train_step", watch)
    train(config("signum", tmp_path / "d"), source=TensorSource(x))
    (member,) = members
    weights = load_file(tmp_path / "d" / "weights.safetensors")
    average = torch.nn.functional.normalize(member.optimiser.slots["W_dec"]["average"], dim=1)
    ours = torch.nn.functional.normalize(weights["W_dec"], dim=1)
    torch.testing.assert_close(ours, average)
    assert float((member.dictionary.W_dec.detach() - average).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), AdamConfig()),
        (("--clip", "1"), AdamConfig(clip=1)),
        (("--optimiser", "signum"), SignumConfig()),
        (("--optimiser", "signum", "--momentum", "0.8"), SignumConfig(momentum=0.8)),
        (("--optimiser", "muon", "--clip", "2", "--beta1", "0.5"), MuonConfig(clip=2, beta1=0.5)),
    ],
)
def test_an_optimiser_and_its_options_are_flags(flags, expected):
    assert parsed(*flags).optimiser == expected


def parsed(*flags: str) -> TrainConfig:
    from cyclopts import App

    app = App()
    app.result_action = "return_value"
    fixed = {"architecture.kind": "topk"}
    choices = {"architecture": TopKConfig}
    app.default(command(TrainConfig, lambda made: made, choices=choices, fixed=fixed, doc="Train."))
    made = app(list(flags), exit_on_error=False)
    assert isinstance(made, TrainConfig)
    return made


def test_an_option_of_another_optimiser_is_refused_and_named():
    with pytest.raises(ConfigError, match=r"optimiser.signum.clip must be a known option.*momentum"):
        parsed("--optimiser", "signum", "--clip", "1")
    with pytest.raises(ConfigError, match=r"optimiser.adam.momentum must be a known option"):
        parsed("--momentum", "0.5")
    with pytest.raises(ConfigError, match=r"optimiser must be one of .*'muon'"):
        TrainConfig.build({"optimiser": {"kind": "sgd"}})
    saved = json.loads(json.dumps(config("muon", Path("d")).resolved()))
    assert TrainConfig.build(saved).optimiser == MuonConfig()
