"""Logs of a run: the JSONL file, and what each real tracker keeps of it when a run is cut off and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sememe.errors import ResourceError
from sememe.source import TensorSource
from sememe.tracking import IDS, Log, read_log
from sememe.train import TrainConfig, train

TWICE = """
import sys
from sememe.tracking import Log
path, tracker = sys.argv[1:]
with Log(path, (tracker,), name="run", config={"k": 3}) as log:
    for step in (1, 2, 3):
        log.write(step, {"fvu": 1 / step, "note": "words"})
with Log(path, (tracker,), name="run", config={"k": 3}, resume_step=2) as log:
    log.write(3, {"fvu": 0.25})
    log.write(4, {"fvu": 0.125})
    log.link("dictionary", "my/dictionary")
"""
"""A run that is cut off after step 3, whose checkpoint is of step 2, and that goes on from there."""


def twice(tmp_path: Path, tracker: str, **where: str) -> None:
    command = [sys.executable, "-c", TWICE, str(tmp_path / "log.jsonl"), tracker]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | where, cwd=tmp_path)
    assert done.returncode == 0 and "has ended" not in done.stderr, done.stderr


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    with Log(path, resume_step=2) as log:
        log.write(3, {"x": 9})
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "x": 9}]
    assert not (tmp_path / IDS).exists(), "nobody asked for a tracker"


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    """Its own reader gives back what was logged, without what came after the checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "log.jsonl"
    with Log(path, ("tensorboard",), config={"k": 3}) as log:
        for step in (1, 2, 3):
            log.write(step, {"fvu": 1 / step, "note": "words"})
    with Log(path, ("tensorboard",), resume_step=2) as log:
        log.write(3, {"fvu": 0.25})
        log.link("dictionary", "my/dictionary")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("fvu")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert events.Tags()["scalars"] == ["fvu"]
    assert events.Tags()["tensors"] == ["config/text_summary", "links/dictionary/text_summary"]
    with Log(path, ("tensorboard",)) as log:
        log.write(1, {"fvu": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("fvu")] == [(1, 0.75)], "a new run, a clean folder"


def test_wandb_gets_the_same_run_offline(tmp_path: Path) -> None:
    """The real package, writing to disk: two sittings of one run, by its id, with the same numbers."""
    pytest.importorskip("wandb")
    twice(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    number = json.loads((tmp_path / IDS).read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert files and {file.stem for file in files} == {f"run-{number}"}
    content = b"".join(file.read_bytes() for file in files)
    assert b"fvu" in content and b"0.125" in content and b"words" not in content
    assert b"my/dictionary" in content


def test_trackio_gets_the_same_run(tmp_path: Path) -> None:
    """The real package, where it is installed; its database gives back what was logged."""
    pytest.importorskip("trackio")
    twice(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "sememe.db")) as database:
        logged = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    number = json.loads((tmp_path / IDS).read_text())["trackio"]
    assert {name for name, _, _ in logged} == {f"run-{number}"}
    values = [(step, json.loads(text)) for _, step, text in logged]
    assert (1, {"fvu": 1.0}) in values and (4, {"fvu": 0.125}) in values
    assert (4, {"dictionary": "my/dictionary"}) in values


def test_a_missing_tracker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ResourceError, match=r"tracking with trackio needs its package.*pip install trackio"):
        Log(tmp_path / "log.jsonl", ("trackio",))


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Run:
        def __init__(self, **about: Any) -> None:
            self.summary: dict[str, str] = {}
            self.fail("init")

        def fail(self, now: str) -> None:
            if now == when:
                raise ConnectionError(f"no network\nat {now}")

        def log(self, values: dict[str, float], step: int) -> None:
            self.fail("log")

        def finish(self) -> None:
            self.fail("finish")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    config = TrainConfig.build(
        {
            "out": tmp_path / "d",
            "architecture": {"kind": "topk", "k": 1, "d_sae": 8},
            "n_tokens": 64,
            "batch_size": 16,
            "log_every": 1,
            "watch_rows": 0,
            "track": ("wandb", "tensorboard"),
        }
    )
    train(config, source=TensorSource(x))
    assert len(read_log(tmp_path / "d" / "metrics.jsonl")) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "tracking" in line]
    assert said == [f"tracking with wandb has ended, the run goes on: no network at {when}"]
    assert list((tmp_path / "d" / "tensorboard").iterdir()), "the other tracker goes on"
