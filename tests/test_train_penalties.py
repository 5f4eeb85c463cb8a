"""Training with the ReLU family's options: a run that is killed goes on to the same bits, and the options are flags."""

from pathlib import Path

import pytest
import test_train
import torch
from cyclopts import App
from test_train import RESUME, TensorSource, killed_and_resumed, planted

from sememe.cli.flags import command
from sememe.dictionaries import TRAINABLE
from sememe.tracking import read_log
from sememe.train import TrainConfig, train

ARCHITECTURES = {
    "noisy": {
        "kind": "relu",
        "l1_coefficient": 0.0,
        "noise": 0.5,
        "entropy_coefficient": 0.05,
        "sqrt_coefficient": 0.001,
        "target_l0": 5.0,
        "start_l0": 20.0,
        "sparsity_warmup": 0.2,
    },
    "constant": {
        "kind": "gated",
        "l1_coefficient": 0.02,
        "decoder_bias": False,
        "constant_latent": True,
        "target_l0": 5.0,
        "non_negative_decoder": True,
    },
}

__all__ = ["TensorSource", "config", "planted"]  # what a resumed process finds here


def config(name: str, out: Path, **changes) -> TrainConfig:
    architecture = {"d_sae": 64, "resample_after_tokens": 500, **ARCHITECTURES[name]}
    return test_train.config("relu", out, architecture=architecture, **changes)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_kill_9_and_resume_gives_the_same_bits(name, tmp_path, monkeypatch):
    _, x = planted()
    train(config(name, tmp_path / "whole"), source=TensorSource(x))
    monkeypatch.setattr(
        test_train, "RESUME", RESUME.replace("import test_train as t", f"import {__name__} as t")
    )
    killed_and_resumed([name, str(tmp_path / "resumed"), "stored"], tmp_path / "resumed", (13,))
    for file in ("weights.safetensors", "probe.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    logs = [read_log(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "resumed")]
    assert [line["steered_factor"] for line in logs[0]] == [line["steered_factor"] for line in logs[1]]


def test_other_seeds_have_other_noise_from_the_same_weights(tmp_path):
    _, x = planted()
    made = [
        train(config("noisy", tmp_path / str(s), seed=s, n_tokens=256), source=TensorSource(x))
        for s in (0, 1)
    ]
    assert not torch.equal(made[0].decoder_directions(), made[1].decoder_directions())


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        (
            "relu",
            "--l1-coefficient 0 --sqrt-coefficient 0.01 --sqrt-eps 0.1 --target-l0 20 --start-l0 80 --l0-anneal 0.3",
            {"sqrt_coefficient": 0.01, "sqrt_eps": 0.1, "target_l0": 20, "start_l0": 80, "l0_anneal": 0.3},
        ),
        ("relu", "--entropy-coefficient 0.1 --sparsity-warmup 0.2", {"entropy_coefficient": 0.1}),
        ("tied", "--noise 0.3 --target-l0 20 --steering 0.02", {"noise": 0.3, "steering": 0.02}),
        ("gated", "--no-decoder-bias --constant-latent", {"decoder_bias": False, "constant_latent": True}),
        ("p_anneal", "--non-negative-decoder", {"non_negative_decoder": True}),
        ("jumprelu", "--target-l0 20 --l0-anneal 0.2", {"target_l0": 20, "l0_anneal": 0.2}),
    ],
)
def test_options_are_flags(kind, flags, expected):
    app = App()
    app.result_action = "return_value"
    choices = {"architecture": TRAINABLE[kind].config_class}
    fixed = {"architecture.kind": kind}
    app.default(command(TrainConfig, lambda made: made, choices=choices, fixed=fixed, doc="Train."))
    made = app(flags.split(), exit_on_error=False).architecture
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_a_run_of_300_steps_arrives_at_its_set_point_and_hardly_falls_below(kind, tmp_path):
    """With an integral alone it ends at 25 of 6, or falls to 3 first if that is three times as fast."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)
    active = torch.rand(20_000, 128, generator=generator) < 3 / 128
    x = (active * torch.rand(20_000, 128, generator=generator)) @ features
    made = {
        "architecture": {"kind": kind, "d_sae": 128, "target_l0": 6},
        "out": tmp_path / "d",
        "n_tokens": 300 * 256,
        "batch_size": 256,
        "watch_rows": 0,
        "log_every": 1,
        "threads": 1,
    }
    train(TrainConfig.build(made), source=TensorSource(x, seed=0))
    l0 = [line["l0"] for line in read_log(tmp_path / "d" / "metrics.jsonl")]
    assert sum(l0[-20:]) / 20 == pytest.approx(6, rel=0.15)
    assert min(l0) > 4.5
