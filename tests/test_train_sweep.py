"""Sweeps: each dictionary has the bits it has alone, one stream feeds all, and wrong sweeps say what is wrong."""

import json
from pathlib import Path

import forked
import pytest
import torch
from small_world import load_model, write_corpus, write_model
from test_harvest import config_for
from test_train import CONFIGS, config, live_config, planted

from sememe import artifact, dictionaries
from sememe.errors import (
    ActivationError,
    ArtifactError,
    ConfigError,
    HookpointError,
    LockError,
    MismatchError,
)
from sememe.harvest import harvest
from sememe.source import TensorSource
from sememe.store import open_store
from sememe.tracking import read_log
from sememe.train import TrainConfig, open_sweep, swept_names, train, train_sweep, variants
from sememe.train.watch import WATCHED

DYING = {"l1_coefficient": 3.0, "resample_after_tokens": 200}
"""Of a ReLU dictionary some of whose latents fall silent, so that resampling has something to do."""
FILES = ("weights.safetensors", "probe.safetensors")


def sweep_config(out: Path, *sweep: str, kind: str = "topk", **changes) -> TrainConfig:
    swept = {entry.split("=")[0] for entry in sweep}
    options = CONFIGS[kind] | (DYING if kind == "relu" else {})
    architecture = {name: value for name, value in options.items() if name not in swept}
    base = {"architecture": {"kind": kind, **architecture}, "sweep": sweep}
    if "lr" in swept:
        base["lr"] = None
    return config(kind, out, **(base | changes))


def same(one: Path, two: Path) -> bool:
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in FILES)


def without_seconds(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_each_has_the_bits_that_it_has_alone(kind, tmp_path):
    """The ReLU dictionaries resample at different steps: what one looks at must not be missing from the stream."""
    _, x = planted()
    option = "k=2,3" if kind == "topk" else "resample_at=0.25+0.5,0.4"
    quick = {"lr": 0.05} if kind == "relu" else {}  # so that biases get where latents are silent
    made = sweep_config(tmp_path / "s", option, "seed=0,1", kind=kind, **quick)
    sweep = train_sweep(made, source=TensorSource(x))
    assert len(sweep.names) == 4
    for member in variants(made):
        alone = train(member.config.replace(out=tmp_path / member.name), source=TensorSource(x))
        assert same(tmp_path / "s" / member.name, tmp_path / member.name), member.name
        assert without_seconds(tmp_path / "s" / member.name) == without_seconds(tmp_path / member.name)
        torch.testing.assert_close(sweep.load(member.name)(x[:50]), alone(x[:50]), rtol=0, atol=0)
        assert (
            artifact.load(sweep.path(member.name)).identity == artifact.load(tmp_path / member.name).identity
        )
    bits = {(tmp_path / "s" / name / FILES[0]).read_bytes() for name in sweep.names}
    assert len(bits) == 4, "all differ"


def test_the_folder_has_an_index_and_opens(tmp_path):
    _, x = planted()
    made = sweep_config(tmp_path / "s", "k=2,3", "lr=1e-3,0.004")
    sweep = train_sweep(made, source=TensorSource(x))
    assert sweep.names == ("k2-lr0.001", "k2-lr0.004", "k3-lr0.001", "k3-lr0.004")
    index = json.loads((tmp_path / "s" / "index.json").read_text())["dictionaries"]
    for entry in index:
        saved = artifact.load(tmp_path / "s" / entry["name"], "dictionary")
        assert entry["fingerprint"] == saved.fingerprint and entry["config"] == saved.meta["config"]
        assert entry["metrics"] == read_log(saved.path / "metrics.jsonl")[-1]
        assert entry["config"]["architecture"]["k"] == entry["options"]["k"]
        assert dictionaries.load(saved.path).kind == "topk"
    whole = read_log(tmp_path / "s" / "metrics.jsonl")[-1]
    assert whole["k3-lr0.004/fvu"] == index[3]["metrics"]["fvu"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    left = {"index.json", "meta.json", "metrics.jsonl", *sweep.names}
    assert {p.name for p in (tmp_path / "s").iterdir()} == left
    before = (tmp_path / "s" / "meta.json").stat().st_mtime_ns
    assert train_sweep(made, source=TensorSource(x)).names == sweep.names
    assert (tmp_path / "s" / "meta.json").stat().st_mtime_ns == before, "the second run opens it"
    with pytest.raises(ArtifactError, match=r"a dictionary of the sweep .* must be named, got 'k4'"):
        sweep.load("k4")
    with pytest.raises(ArtifactError, match="must be a dictionary, got a sweep"):
        dictionaries.load(tmp_path / "s")
    with pytest.raises(
        MismatchError,
        match=r'lr null there, 0.003 now; sweep \["k=2,3","lr=1e-3,0.004"\] there, \["k=2,3"\] now\)',
    ):
        train_sweep(sweep_config(tmp_path / "s", "k=2,3"), source=TensorSource(x))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sweeps")
    write_corpus(place / "corpus.jsonl")
    write_model(place / "model")
    harvest(config_for(place, place / "store"), lm=load_model(place / "model"))
    return place


def test_hookpoints_of_a_store_share_one_reading(world, tmp_path, monkeypatch):
    known = tuple(open_store(world / "store").info.hookpoints)
    assert len(known) > 1
    made = TrainConfig.build(
        {
            "store": world / "store",
            "out": tmp_path / "s",
            "architecture": {"kind": "topk", **CONFIGS["topk"]},
            "sweep": ("inputs=*," + "+".join(known),),
            "batch_size": 64,
            "n_tokens": 1000,
            "threads": 1,
        }
    )
    sweep = train_sweep(made)
    assert sweep.names == (*known, "+".join(known))
    for name in sweep.names:
        hookpoints = tuple(name.split("+"))
        own = made.replace(sweep=(), inputs=hookpoints, out=tmp_path / name)
        alone = train(own)
        assert same(sweep.path(name), tmp_path / name), name
        assert alone.sites is not None and alone.sites == sweep.load(name).sites
        assert alone.sites.hookpoints == hookpoints
        assert artifact.load(sweep.path(name)).meta["parents"] == {
            "store": open_store(world / "store").fingerprint
        }
    with pytest.raises(HookpointError, match=r"must be in the store .*, got 'resid_pre\*'"):
        train_sweep(made.replace(sweep=("inputs=resid_pre*",), out=tmp_path / "t"))


def test_a_live_sweep_runs_the_model_once_for_all(world, tmp_path, monkeypatch):
    from sememe import capture

    runs: list[int] = []
    original = capture.captured_rows
    monkeypatch.setattr(
        "sememe.source.live.captured_rows", lambda *a, **k: (runs.append(1), original(*a, **k))[1]
    )
    made = live_config(world, tmp_path / "s").replace(
        inputs=None, sweep=("inputs=resid_post.*", "k=2,4"), watch_rows=0
    )
    sweep = train_sweep(made.replace(architecture=made.architecture.replace(k=32)))
    assert len(runs) == 1
    assert sweep.names[:2] == ("resid_post.0-k2", "resid_post.0-k4") and len(sweep.names) % 2 == 0
    fvu = {entry["name"]: entry["metrics"]["fvu"] for entry in sweep.index}
    assert fvu["resid_post.0-k4"] < fvu["resid_post.0-k2"]
    alone = train(live_config(world, tmp_path / "a").replace(inputs=("resid_post.0", "resid_post.1")))
    assert alone.d_in == 2 * sweep.load("resid_post.1-k2").d_in


RESUME = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_train_sweep as t
from sememe.train.run import Run
step = Run._one_step
def counted(run):
    values = step(run)
    time.sleep(0.02)
    print("step", run.step, flush=True)
    return values
Run._one_step = counted
if len(sys.argv) > 2:
    t.swept_live(Path(sys.argv[1]), Path(sys.argv[2]))
else:
    t.swept(Path(sys.argv[1]), {devices})
"""


def swept(out: Path, devices: tuple[str, ...] = ()) -> None:
    made = sweep_config(
        out, "resample_at=0.3+0.6,0.4", "seed=0,1", kind="relu", checkpoint_every_seconds=0, devices=devices
    )
    train_sweep(made, source=TensorSource(planted()[1]))


def swept_live(out: Path, world: Path) -> None:
    """Several hookpoints, one model's forwards, each watched; under an optimiser with averages of its own."""
    made = live_config(world, out).replace(
        inputs=None, sweep=("inputs=resid_post.*",), optimiser={"kind": "signum"}, n_tokens=24 * 256
    )
    train_sweep(made.replace(watch_every=2000, watch_rows=100))


def start(out: Path, devices: tuple[str, ...] = (), world: tuple[Path, ...] = ()) -> forked.Program:
    code = RESUME.format(tests=str(Path(__file__).parent), devices=devices)
    return forked.start(code, str(out), *map(str, world))


def run_until(process: forked.Program, steps: int) -> None:
    for line in process.stdout:
        if int(line.split()[1]) >= steps:
            return
    raise AssertionError(process.communicate()[1])


def test_kill_9_and_resume_gives_the_same_bits_for_all(tmp_path):
    swept(tmp_path / "whole")
    for steps in (7, 16):
        process = start(tmp_path / "resumed")
        run_until(process, steps)
        process.kill()
        process.communicate()
        assert not (tmp_path / "resumed").exists()
    process = start(tmp_path / "resumed")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert int(out.split()[1]) >= 16, "it went on instead of starting again"
    for name in open_sweep(tmp_path / "whole").names:
        assert same(tmp_path / "whole" / name, tmp_path / "resumed" / name), name
        assert without_seconds(tmp_path / "whole" / name) == without_seconds(tmp_path / "resumed" / name)


def test_a_live_sweep_over_hookpoints_is_killed_and_resumed_to_the_same_bits(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    write_model(tmp_path / "model")
    swept_live(tmp_path / "whole", tmp_path)
    process = start(tmp_path / "resumed", world=(tmp_path,))
    run_until(process, 11)
    process.kill()
    process.communicate()
    assert not (tmp_path / "resumed").exists()
    process = start(tmp_path / "resumed", world=(tmp_path,))
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert int(out.split()[1]) >= 11, "it went on instead of starting again"
    names = open_sweep(tmp_path / "whole").names
    assert len(names) > 1
    for name in names:
        whole, resumed = tmp_path / "whole" / name, tmp_path / "resumed" / name
        assert same(whole, resumed) and without_seconds(whole) == without_seconds(resumed), name
        watched = read_log(whole / WATCHED)
        assert watched == read_log(resumed / WATCHED), name
        assert all("ce_recovered_zero" in line for line in watched) and len(watched) > 3


def test_two_runs_into_one_folder_are_told_apart(tmp_path):
    process = start(tmp_path / "s")
    run_until(process, 3)
    with pytest.raises(
        LockError,
        match=rf"only one run may write .*/s, got a lock held by process {process.pid} on \S+ since",
    ):
        swept(tmp_path / "s")
    process.kill()
    process.communicate()
    swept(tmp_path / "s")
    assert len(open_sweep(tmp_path / "s").names) == 4


def test_a_diverging_member_is_named(tmp_path):
    _, x = planted()
    made = sweep_config(tmp_path / "s", "lr=0.003,1e30", log_every=1, checkpoint_every_seconds=0)
    with pytest.raises(ActivationError, match=r"of lr1e\+30 must be finite, got NaN or infinity"):
        train_sweep(made, source=TensorSource(x))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (("kk=1,2",), r"a sweep must be over an option of a topk dictionary, got 'kk'\. Did you mean 'k'"),
        (("batch-size=64,128",), r"each dictionary may have its own, got batch_size, which all share"),
        (("n_tokens=64,128",), r"got n_tokens, which all share as they do the stream\. Drop it, or run"),
        (("store=a,b",), r"got store, which all share"),
        (("k=2,3,2",), r"each value of k once, got 2 again\. Drop it"),
        (("lr=0.001,1e-3",), r"each value of lr once, got 1e-3 again"),
        (("k=2", "k=3"), r"an option must be swept over once, got k twice"),
        (("k",), r"option=value,value, got 'k'\. Write --sweep k=16,32"),
        (("k=2,",), r"option=value,value, got 'k=2,'"),
        (("k=2,x",), r"k must be a whole number, got 'x'"),
        (("k=2,65",), r"k must be in \[1, d_sae=64\] \(in k65 of the sweep\), got 65"),
        (("d_sae=64,128",), r"d_sae must be left out when it is swept over: it has no effect then, got 64"),
        (
            ("auxk=8,16", "auxk_coefficient=0"),
            r"auxk must be left out when auxk_coefficient is 0: .* \(in auxk8-auxk_coefficient0\.0 of .*got 8",
        ),
        (("inputs=a,b",), r"inputs must be left out for a source without hookpoints"),
        (("inputs=a*",), r"a sweep's hookpoints must be in the source, got 'a\*'"),
    ],
)
def test_wrong_sweeps_fail_before_anything_runs(tmp_path, sweep, message):
    _, x = planted(64)
    drop = {entry.split("=")[0] for entry in sweep} - {"d_sae"}
    made = sweep_config(tmp_path / "s", *sweep)
    kept = {name: value for name, value in CONFIGS["topk"].items() if name not in drop}
    made = made.replace(architecture={"kind": "topk", **kept})
    with pytest.raises((ConfigError, HookpointError), match=message):
        train_sweep(made, source=TensorSource(x))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("kind", "sweep", "members"),
    [
        ("topk", ("k=4,8", "d_sae=16,24"), {(k, d) for k in (4, 8) for d in (16, 24)}),
        ("relu", ("target_l0=3,6", "start_l0=12"), {(3.0, 12.0), (6.0, 12.0)}),
    ],
)
def test_options_that_go_only_together_are_swept_over_together(tmp_path, kind, sweep, members):
    """Alone with the defaults each is refused: 32 active of 16 latents; a start without a target."""
    made = TrainConfig.build(
        {
            "out": tmp_path / "s",
            "architecture": {"kind": kind},
            "sweep": sweep,
            "n_tokens": 64,
            "batch_size": 16,
        }
    )
    names = [entry.split("=")[0] for entry in sweep]
    found = {tuple(getattr(one.config.architecture, name) for name in names) for one in variants(made)}
    assert found == members
    with pytest.raises(
        ConfigError, match=r"k must be in \[1, d_sae=16\] \(in k20-d_sae16 of the sweep\), got 20"
    ):
        variants(made.replace(architecture={"kind": "topk"}, sweep=("k=4,20", "d_sae=16")))


def test_one_and_many_are_told_apart(tmp_path):
    _, x = planted(64)
    with pytest.raises(
        ConfigError, match=r"train makes one dictionary, got a sweep over k=2,3\. Call train_sweep"
    ):
        train(sweep_config(tmp_path / "s", "k=2,3"), source=TensorSource(x))
    with pytest.raises(ConfigError, match="sweep must be given for a sweep"):
        train_sweep(config("topk", tmp_path / "s"), source=TensorSource(x))
    with pytest.raises(ConfigError, match="more share the dictionaries of a sweep, got cpu, cpu"):
        train(config("topk", tmp_path / "s", devices=("cpu", "cpu")), source=TensorSource(x))
    with pytest.raises(ConfigError, match=r"a device must be cpu, mps, cuda or cuda:N, got 'gpu'"):
        config("topk", tmp_path / "s", devices=("gpu",))


def test_a_recipes_table_means_the_same():
    table = TrainConfig.build({"sweep": {"k": [16, 32], "lr": 0.01, "scale": [True, False]}})
    assert table.sweep == ("k=16,32", "lr=0.01", "scale=true,false")
    assert swept_names(table)[:2] == ("k16-lr0.01-scale_true", "k16-lr0.01-scale_false")
    made = TrainConfig(sweep=("seed=3,4",), data_seed=3)
    assert [(m.config.seed, m.config.data_seed) for m in variants(made)] == [(3, None), (4, 3)]
    with pytest.raises(ConfigError, match="must be named where the store is not made yet, got 'resid"):
        swept_names(TrainConfig(sweep=("inputs=resid*",)))
