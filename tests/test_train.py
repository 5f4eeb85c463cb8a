"""Training: it learns, it resumes to the same bits after kill -9, and bad runs stop with a reason."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from small_world import POLICY, load_model, text_of, write_corpus, write_model
from test_harvest import config_for
from torch.utils._python_dispatch import TorchDispatchMode

from sememe import artifact, dictionaries, kernels
from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.dictionaries import TRAINABLE
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.room import Room
from sememe.errors import ActivationError, ConfigError, CorruptError, MismatchError
from sememe.harvest import harvest
from sememe.source import Batch, TensorSource
from sememe.store import open_store
from sememe.tracking import read_log
from sememe.train import TrainConfig, learning_rate, train
from sememe.train.member import Member, Spec
from sememe.train.objective import own_loss
from sememe.train.schedule import Plan, count_steps

_RESAMPLED = {"d_sae": 64, "resample_after_tokens": 500, "rewarmup_steps": 5}
CONFIGS: dict[str, dict[str, Any]] = {
    kind: {"k": 3, "d_sae": 64, "dead_after_tokens": 2000}
    for kind in (
        "topk",
        "batch_topk",
        "matryoshka",
        "multi_topk",
        "abs_topk",
        "matching_pursuit",
        "mlp_encoder",
    )
} | {
    "cross_layer": {"k": 4, "d_sae": 64, "n_layers": 2, "over": "all", "dead_after_tokens": 2000},
    "group_max": {"k": 4, "d_sae": 64, "dead_after_tokens": 2000},
    "relu": _RESAMPLED | {"l1_coefficient": 0.05},
    "gated": _RESAMPLED | {"l1_coefficient": 0.05},
    "tied": _RESAMPLED | {"l1_coefficient": 0.05},
    "p_anneal": _RESAMPLED | {"l1_coefficient": 0.05},
    "lista": _RESAMPLED | {"l1_coefficient": 0.05},
    "variational": _RESAMPLED | {"prior_l0": 3.0},
    "jumprelu": _RESAMPLED | {"target_l0": 3.0, "bandwidth": 0.05},
}


def planted(
    n: int = 4000, d: int = 16, n_features: int = 32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n_features, d, generator=generator)
    features /= features.norm(dim=1, keepdim=True)
    codes = torch.zeros(n, n_features)
    for row in range(n):
        codes[row, torch.randperm(n_features, generator=generator)[:3]] = (
            torch.rand(3, generator=generator) + 0.5
        )
    return features, codes @ features * 7 + 2


def config(kind: str, out: Path, **changes) -> TrainConfig:
    return TrainConfig.build(
        {
            "out": out,
            "architecture": {"kind": kind, **CONFIGS[kind]},
            "n_tokens": 40 * 256,
            "batch_size": 256,
            "lr": 3e-3,
            "log_every": 10,
            "threads": 1,
            **changes,
        }
    )


@pytest.fixture(params=sorted(TRAINABLE))
def kind(request) -> str:
    return request.param


def test_it_learns_and_writes_what_it_promises(kind, tmp_path):
    _, x = planted()
    out = tmp_path / "d"
    dictionary = train(config(kind, out, n_tokens=300 * 256), source=TensorSource(x))
    log = read_log(out / "metrics.jsonl")
    assert log[-1]["step"] == 300 and {"mse", "fvu", "l0", "lr", "tokens", "seconds"} <= set(log[-1])
    assert log[-1]["fvu"] < 0.5 * log[0]["fvu"]
    fvu = float((x - dictionary(x).detach()).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(log[-1]["fvu"], rel=0.2), "the exported dictionary works in raw units"
    assert not list(out.glob("checkpoint*"))
    extra = artifact.load(out).extra
    assert 0 < extra["training"]["frac_alive_last_pass"] <= 1
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(64), atol=1e-4, rtol=1e-4)


def test_one_row_has_no_variance_and_so_no_fvu(tmp_path):
    _, x = planted()
    made = config("topk", tmp_path / "d", batch_size=1, n_tokens=3, watch_rows=0, log_every=1)
    train(made, source=TensorSource(x))
    log = read_log(tmp_path / "d" / "metrics.jsonl")
    assert all(math.isnan(line["fvu"]) and line["mse"] > 0 for line in log) and len(log) == 3


def test_same_seed_same_bits_and_another_seed_others(kind, tmp_path):
    _, x = planted()
    prints = [
        artifact.file_sha256(tmp_path / name / "weights.safetensors")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
        if train(config(kind, tmp_path / name, seed=seed), source=TensorSource(x, seed=seed))
    ]
    assert prints[0] == prints[1] != prints[2]


RESUME = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_train as t
from sememe.train import train
from sememe.train.run import Run
kind, out, live = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "live"
step = Run._one_step
def counted(run):
    values = step(run)
    time.sleep(0.02)
    print("step", run.step, flush=True)
    return values
Run._one_step = counted
if live:
    train(t.live_config(Path(sys.argv[4]), out, sys.argv[5]))
else:
    train(t.config(kind, out, checkpoint_every_seconds=0), source=t.TensorSource(t.planted()[1]))
"""


def live_config(world: Path, out: Path, objective: str = "local") -> TrainConfig:
    end_to_end = {"objective": objective} if objective != "local" else {}
    return TrainConfig.build(
        {
            "out": out,
            "architecture": {"kind": "topk", **CONFIGS["topk"]},
            "live": True,
            "model": {"model": str(world / "model"), "dtype": "float32"},
            "text": text_of(world / "corpus.jsonl"),
            "policy": POLICY,
            "inputs": ("resid_post.0",),
            "n_tokens": 40 * 256,
            "batch_size": 256,
            **({"end_to_end": end_to_end} if end_to_end else {"batch_rows": 8, "buffer_mb": 1}),
            "threads": 1,
            "checkpoint_every_seconds": 0,
        }
    )


def program(code: str | None = None) -> str:
    """RESUME as it is now, if not given: other files put their own there."""
    return (code or RESUME).format(tests=str(Path(__file__).parent))


def killed_and_resumed(
    arguments: list[str], out: Path, kill_at: tuple[int, ...], code: str | None = None
) -> None:
    last = 0
    for steps in kill_at:
        process = forked.start(program(code), *arguments)
        for line in process.stdout:
            last = int(line.split()[1])
            if last >= steps:
                break
        process.kill()
        process.communicate()
        assert last >= steps and not out.exists()
    done = forked.run(program(code), *arguments, check=True)
    first = int(done.stdout.split()[1])
    assert first >= kill_at[-1] > 1, "it went on instead of starting again"


@pytest.mark.parametrize(
    "kind",
    [
        # Of each family one in every run, and the one that draws random numbers in a step; the others are slow.
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("topk", "jumprelu", "variational")))
        for kind in sorted(TRAINABLE)
    ],
    indirect=True,
)
def test_kill_9_and_resume_gives_the_same_bits(kind, tmp_path):
    _, x = planted()
    train(config(kind, tmp_path / "whole", checkpoint_every_seconds=0), source=TensorSource(x))
    killed_and_resumed([kind, str(tmp_path / "resumed"), "stored"], tmp_path / "resumed", (7, 23))
    for name in ("weights.safetensors", "probe.safetensors"):
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes(), name
    logs = [read_log(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "resumed")]
    for one, two in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {
            k: v for k, v in two.items() if k != "seconds"
        }


@pytest.mark.parametrize("objective", ["local", "kl"])
def test_a_live_run_is_killed_and_resumed_to_the_same_bits(objective, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    write_model(tmp_path / "model")
    train(live_config(tmp_path, tmp_path / "whole", objective))
    out = tmp_path / "resumed"
    killed_and_resumed(["topk", str(out), "live", str(tmp_path), objective], out, (9,))
    assert (tmp_path / "whole" / "weights.safetensors").read_bytes() == (
        out / "weights.safetensors"
    ).read_bytes()
    assert artifact.load(out).extra["policy"] == POLICY.resolved()


def test_ctrl_c_writes_a_checkpoint_and_loses_nothing(tmp_path):
    code = program().replace("checkpoint_every_seconds=0", "checkpoint_every_seconds=999")
    process = forked.start(code, "topk", str(tmp_path / "d"), "stored")
    for line in process.stdout:
        if line == "step 5\n":
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    saved = load_checkpoint(tmp_path / ".d.partial")
    assert saved is not None and saved["run"]["step"] >= 5


def test_a_run_killed_before_its_first_checkpoint_is_in_no_other_configs_way(tmp_path):
    """It leaves a folder with a log and nothing to go on from."""
    code = program().replace("checkpoint_every_seconds=0", "checkpoint_every_seconds=999, log_every=1")
    process = forked.start(code, "topk", str(tmp_path / "d"), "stored")
    for line in process.stdout:
        if line == "step 5\n":
            break
    process.kill()
    process.communicate()
    left = tmp_path / ".d.partial"
    assert (left / "metrics.jsonl").stat().st_size > 0 and load_checkpoint(left) is None
    _, x = planted()
    other = config("topk", tmp_path / "d", lr=1e-3, n_tokens=512)
    train(other, source=TensorSource(x))
    assert [line["step"] for line in read_log(tmp_path / "d" / "metrics.jsonl")] == [2]
    assert not left.exists()


def test_a_checkpoint_of_other_threads_or_config_is_refused(tmp_path):
    _, x = planted()
    made = config("topk", tmp_path / "d")
    with pytest.raises(KeyboardInterrupt):
        interrupted(made, x)
    with pytest.raises(
        MismatchError, match="must go on with the threads, kernels and torch it was made with"
    ):
        train(made.replace(threads=2), source=TensorSource(x))
    with pytest.raises(MismatchError, match=r"unfinished work .* \(lr 0\.003 there, 0\.001 now\)"):
        train(made.replace(lr=1e-3), source=TensorSource(x))
    path = next((tmp_path / ".d.partial").glob("checkpoint-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CorruptError, match=r"the checkpoint .* must have SHA-256 .* delete it to start"):
        train(made, source=TensorSource(x))


def interrupted(made: TrainConfig, x: torch.Tensor) -> None:
    class Stops(TensorSource):
        n = 0

        def next_batch(self, n):
            self.n += 1
            if self.n == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_batch(n)

    train(made, source=Stops(x))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    _, x = planted()
    bad = x.clone()
    bad[:, 3] = float("nan")

    class TurnsBad(TensorSource):
        n = 0

        def next_batch(self, n):
            self.n += 1
            if self.n > 25:
                self.x = bad
            return super().next_batch(n)

    with pytest.raises(
        ActivationError,
        match=r"the loss must be finite, got NaN or infinity first at step 26, on rows 6,400 to 6,655",
    ):
        train(config("topk", tmp_path / "d", log_every=1, checkpoint_every_seconds=0), source=TurnsBad(x))
    assert not (tmp_path / "d").exists()
    saved = load_checkpoint(tmp_path / ".d.partial")
    assert saved is not None and saved["run"]["step"] == 25
    assert all(torch.isfinite(t).all() for t in saved["members"]["dictionary"]["weights"].values())
    with pytest.raises(ActivationError, match="NaN or infinity in the sample"):
        train(config("topk", tmp_path / "e"), source=TensorSource(bad))


def test_less_than_a_batch_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"n_tokens must be at least batch_size=256, got 100\. Raise n_tokens"
    ):
        train(config("topk", tmp_path / "d", n_tokens=100), source=TensorSource(planted()[1]))


def test_the_learning_rate_rises_falls_and_rewarms():
    made = TrainConfig(warmup=0.1, decay=0.2, n_tokens=1)
    plan = Plan(100, 1.0, (50,), 10)
    rates = [plan.rate(step, made, None) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1.0
    assert rates[-1] == pytest.approx(0.05) and rates == sorted(rates[:50]) + sorted(rates[50:], reverse=True)
    assert plan.rate(50, made, 0) == pytest.approx(0.1) and plan.rate(60, made, 10) == 1.0
    assert learning_rate(TrainConfig(), 4096) == pytest.approx(4 * learning_rate(TrainConfig(), 65536))
    free = TrainConfig.build({"n_tokens": 1, "optimiser": {"kind": "signum"}})
    assert plan.rate(99, free, None) == 1.0 and plan.rate(99, free.replace(decay=0.2), None) < 0.1
    assert learning_rate(free, 2**14) == pytest.approx(5e-3)


def test_the_topk_family_takes_larger_steps_with_adam():
    def rate(kind: str, optimiser: str = "adam") -> float:
        made = {"n_tokens": 1, "architecture": {"kind": kind}, "optimiser": {"kind": optimiser}}
        return learning_rate(TrainConfig.build(made), 4096)

    for kind in ("topk", "batch_topk", "matryoshka"):
        assert rate(kind) == pytest.approx(4e-3)
        assert rate(kind, "muon") == pytest.approx(2e-3)
    assert rate("relu") == rate("jumprelu") == pytest.approx(1.2e-3)
    given = TrainConfig.build({"n_tokens": 1, "architecture": {"kind": "topk"}, "lr": 1e-3})
    assert learning_rate(given, 4096) == 1e-3


def test_a_store_feeds_training_and_the_dictionary_remembers_it(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    write_model(tmp_path / "model")
    harvest(config_for(tmp_path, tmp_path / "store"), lm=load_model(tmp_path / "model"))
    made = TrainConfig.build(
        {
            "store": tmp_path / "store",
            "out": tmp_path / "d",
            "architecture": {"kind": "topk", **CONFIGS["topk"]},
            "inputs": ("mlp_out.1",),
            "batch_size": 64,
            "track": ("tensorboard",),
        }
    )
    dictionary = train(made)
    store = open_store(tmp_path / "store")
    assert artifact.load(tmp_path / "d").meta["parents"] == {"store": store.fingerprint}
    assert dictionary.sites is not None
    assert dictionary.sites.inputs[0].hookpoint == "mlp_out.1"
    assert dictionary.sites.inputs[0].model_fingerprint == store.info.model_fingerprint
    assert list((tmp_path / "d" / "tensorboard").iterdir())
    before = (tmp_path / "d" / "meta.json").stat().st_mtime_ns
    train(made)
    assert (tmp_path / "d" / "meta.json").stat().st_mtime_ns == before, "the second run opens it"


def test_positions_of_a_context_are_of_live_runs():
    with pytest.raises(ConfigError, match="positions_per_context must be left out unless live is set, got 5"):
        TrainConfig.build({"positions_per_context": 5})


def test_options_without_effect_and_contradictions_are_errors():
    with pytest.raises(ConfigError, match="buffer_mb must be left out unless live is set, got 7"):
        TrainConfig.build({"buffer_mb": 7})
    with pytest.raises(ConfigError, match="n_tokens must be given when live"):
        TrainConfig.build({"live": True, "inputs": ("resid_post.0",)})
    with pytest.raises(
        ConfigError, match=r"epochs must make at least batch_size=10 rows .* got 1e-06, which makes 0"
    ):
        count_steps(TrainConfig(epochs=1e-6, batch_size=10), 5000)
    assert count_steps(TrainConfig(batch_size=10), 5) == 1, "one pass over a small store is a step"
    with pytest.raises(ConfigError, match="n_tokens and epochs both say how long"):
        TrainConfig.build({"n_tokens": 5, "epochs": 2})
    with pytest.raises(ConfigError, match=r"l1_coefficient must be a known option"):
        TrainConfig.build({"architecture": {"kind": "topk", "l1_coefficient": 1.0}})


def test_checkpoints_round_trip_and_replace_each_other(tmp_path):
    state = {"a": torch.arange(5), "b": {"c": torch.ones(2, dtype=torch.bfloat16), "n": 3, "none": None}}
    save_checkpoint(tmp_path, 1, {"old": 1})
    save_checkpoint(tmp_path, 2, state)
    assert len(list(tmp_path.iterdir())) == 1
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and torch.equal(loaded["a"], state["a"]) and loaded["b"]["n"] == 3
    assert torch.equal(loaded["b"]["c"], state["b"]["c"]) and loaded["b"]["none"] is None
    assert load_checkpoint(tmp_path / "nowhere") is None
    assert dictionaries.TRAINABLE


def test_a_source_that_ends_early_says_where(tmp_path):
    _, x = planted(1000)

    class Once(TensorSource):
        """A single pass, as a file or a queue would give it."""

        def next_batch(self, n):
            start = self._cursor.epoch * 1000 + self._cursor.offset
            self._cursor.offset = min(start + n, 1000)
            rows = self.x[start : start + n]
            return Batch(rows, rows)

    with pytest.raises(
        ActivationError,
        match=r"must give the 10,240 rows of this run \(n_tokens\), got 1,000: it ended at step 4 of 40\. "
        r"Train on fewer \(--n-tokens 768\)",
    ):
        train(config("topk", tmp_path / "d"), source=Once(x))
    assert not (tmp_path / "d").exists()
    made = train(config("topk", tmp_path / "d", n_tokens=768), source=Once(x), fresh=True)
    assert made.d_in == 16


def test_the_first_bad_step_is_told_even_when_it_is_read_later(tmp_path):
    _, x = planted()

    class OneBadBatch(TensorSource):
        n = 0

        def next_batch(self, n):
            self.n += 1
            batch = super().next_batch(n)
            if self.n == 13:
                batch.x[0, 0] = float("inf")
            return batch

    with pytest.raises(ActivationError, match=r"first at step 13, on rows 3,072 to 3,327 of the stream"):
        train(config("topk", tmp_path / "d", log_every=20), source=OneBadBatch(x))
    assert load_checkpoint(tmp_path / ".d.partial") is None


def test_a_bad_step_on_whole_contexts_names_no_rows():
    """They hold fewer rows than batch_size: which rows of the stream they were cannot be counted."""

    def broken(dictionary, batch, x, target, progress):
        return own_loss(dictionary, batch, x * float("nan"), target, progress)

    _, x = planted(64)
    made = config("topk", Path("nowhere"), batch_size=4)
    member = Member(Spec("dictionary", made, 16, 16, None, None), 40, torch.device("cpu"), broken)
    member.initialise(Batch(x, x))
    member.train_step(Batch(x[:4], x[:4]))
    with pytest.raises(
        ActivationError, match="first at step 1, on a batch of whole contexts, at most 4 rows"
    ):
        member.check()


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device: those that read a number or make as many places
    as a number on the device says."""

    waiting = (
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "bincount",
        "_unique2",
    )
    indexing = ("index", "index_put", "index_put_", "_index_put_impl_")

    def __init__(self):
        super().__init__()
        self.found, self.aside = [], False

    @classmethod
    def past_what_arrives(cls, monkeypatch):
        """Counts all but the numbers that on a GPU set off in the step before, and are awaited by their event."""
        reads = cls()

        def arrives(method):
            def aside(*args):
                reads.aside = True
                try:
                    return method(*args)
                finally:
                    reads.aside = False

            return aside

        monkeypatch.setattr(Room, "_arrived", arrives(Room._arrived))
        monkeypatch.setattr(DeadLatents, "ids_of_each", arrives(DeadLatents.ids_of_each))
        return reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        masks = [one for one in args[1] if one is not None] if name in self.indexing else []
        waits = name in self.waiting or any(mask.dtype == torch.bool for mask in masks)
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        if waits and not self.aside:
            self.found.append(name)
        return function(*args, **kwargs)


WAITS = {
    "dense relu": {"nonzero", "masked_select"},
    "lista": {"nonzero"},
}
"""What reads the device in a step on a GPU, and the operations that do."""
SLOW = {"abs_topk", "matryoshka", "multi_topk", "p_anneal", "relu", "tied", "mlp_encoder"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in sorted({*TRAINABLE, *WAITS})],
)
def test_a_step_on_a_gpu_reads_nothing_from_the_device_but_for_the_kinds_named(case, monkeypatch):
    """By the GPU's kernels, in Triton's interpreter; a dictionary that has few active latents, as after the start."""
    pytest.importorskip("triton")
    from sememe.kernels.gpu import selection

    monkeypatch.setattr(selection, "TILE", 64)
    monkeypatch.setattr(kernels, "path_for", lambda _: "gpu")
    reads = Reads.past_what_arrives(monkeypatch)
    _, x = planted(64)
    kind, d_sae = case.removeprefix("dense "), 64
    options: dict[str, Any] = {}
    if kind in ("relu", "gated", "tied", "p_anneal") and kind == case:
        d_sae, options = 256, {"start_density": 0.01}
    elif kind == "jumprelu":
        d_sae, options = 512, {"start_l0": 4.0}
    architecture = {"kind": kind} | CONFIGS[kind] | options | {"d_sae": d_sae}
    made = config(kind, Path("nowhere"), architecture=architecture, batch_size=4)
    member = Member(Spec("dictionary", made, 16, 16, None, None), 40, torch.device("cpu"))
    member.initialise(Batch(x, x))
    member.train_step(Batch(x[:4], x[:4]))
    if kind == "cross_layer":  # whose AuxK is its own
        member.dictionary.tokens_since_fired[::5] = 3000
    with reads:
        stepped = member.train_step(Batch(x[4:8], x[4:8]))
    assert set(reads.found) == WAITS.get(case, set())
    reads.found.clear()
    with reads:
        member.metrics(stepped)
    assert reads.found, "the log does"
