"""Several devices: processes fed from one stream give the bits of one process, and their ends are clean."""

import os
import signal
from pathlib import Path

import pytest
import torch
from test_train import config, planted
from test_train_sweep import run_until, same, start, sweep_config, swept, without_seconds

from sememe.checkpoint import load_checkpoint
from sememe.errors import ActivationError, ConfigError, ResourceError
from sememe.source import TensorSource
from sememe.train import open_sweep, train, train_sweep

TWO = ("cpu", "cpu")


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and b"spawn_main" in stat.with_name("cmdline").read_bytes():
            found.append(int(stat.parent.name))
    return sorted(found)


def test_two_processes_give_the_bits_of_one_even_after_kill_9(tmp_path):
    """The checkpoint is begun by two processes, both killed, and finished by two others."""
    swept(tmp_path / "one")
    process = start(tmp_path / "two", TWO)
    run_until(process, 14)
    others = children(process.pid)
    assert len(others) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    swept(tmp_path / "two", TWO)
    for name in open_sweep(tmp_path / "one").names:
        assert same(tmp_path / "one" / name, tmp_path / "two" / name), name
        assert without_seconds(tmp_path / "one" / name) == without_seconds(tmp_path / "two" / name)
    assert not [pid for pid in others if Path(f"/proc/{pid}").exists()], "they left when their parent died"
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_transcoders_target_travels_too(tmp_path):
    _, x = planted()
    for out, devices in (("one", ()), ("two", TWO)):
        made = sweep_config(tmp_path / out, "k=2,3,4", devices=devices)
        train_sweep(made, source=TensorSource(x, target=x[:, :5] * 2 + 1))
    for name in open_sweep(tmp_path / "one").names:
        assert same(tmp_path / "one" / name, tmp_path / "two" / name), name


def test_a_dying_process_is_an_error_and_ctrl_c_saves(tmp_path):
    process = start(tmp_path / "d", TWO)
    run_until(process, 5)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "the process that trains on cpu must live to the end of the run, got its end by signal SIGKILL"
        in errors
    )
    process = start(tmp_path / "d", TWO)
    run_until(process, 12)
    others = children(process.pid)
    for pid in (process.pid, *others):  # a terminal sends it to all
        os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    said = errors.split("nanobind:")[0]  # what triton's library says at the end of a process
    assert process.returncode != 0 and said.rstrip().endswith("KeyboardInterrupt"), errors
    saved = load_checkpoint(tmp_path / ".d.partial")
    assert saved is not None and saved["run"]["step"] >= 12
    assert not [pid for pid in others if Path(f"/proc/{pid}").exists()]


def test_what_goes_wrong_in_a_process_is_raised_here(tmp_path):
    _, x = planted()
    made = sweep_config(tmp_path / "s", "lr=0.003,1e30", devices=TWO, log_every=5)
    with pytest.raises(ActivationError, match=r"of lr1e\+30 must be finite"):
        train_sweep(made, source=TensorSource(x))
    with pytest.raises(ConfigError, match=r"no more than the dictionaries \(2\), got 3"):
        train_sweep(made.replace(devices=("cpu",) * 3), source=TensorSource(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(tmp_path):
    _, x = planted(64)
    with pytest.raises(ResourceError, match=r"\(it has 0 of type cuda\), got cuda:1"):
        train(config("topk", tmp_path / "d", devices=("cuda:1",)), source=TensorSource(x))
