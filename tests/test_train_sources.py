"""Runs on every kind of source: killed with kill -9 and run again, to the same bits. Too large a run is refused."""

import re
from pathlib import Path

import pytest
from small_world import load_model, write_corpus, write_model
from test_harvest import config_for
from test_train import config, killed_and_resumed, planted

from sememe import needs
from sememe.errors import ResourceError
from sememe.harvest import harvest
from sememe.kernels import pursuit
from sememe.needs.training import GRAM_BYTES
from sememe.source import IteratorSource, StoreSource, TensorSource
from sememe.store import open_store
from sememe.train import TrainConfig, train, train_sweep

KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_train_sources as t
from sememe.train.run import Run
step = Run._one_step
def counted(run):
    values = step(run)
    time.sleep(0.02)
    print("step", run.step, flush=True)
    return values
Run._one_step = counted
t.run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
"""


def run(source: str, world: Path, out: Path) -> None:
    """Train on one of the sources; on a store for more than a pass."""
    options = {"checkpoint_every_seconds": 0, "n_tokens": 24 * 256}
    if source == "iterator":
        x = planted()[1]
        blocks = IteratorSource(lambda: x.split(300), seed=3, buffer_rows=1000)
        train(config("topk", out, **options), source=blocks)
        return
    join = (world / "b",) if source == "joined" else ()
    train(config("topk", out, store=world / "a", join=join, inputs=("resid_post.0",), **options))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' stores of the same text, in four shards."""
    place = tmp_path_factory.mktemp("sources")
    write_corpus(place / "corpus.jsonl")
    for seed, name in enumerate("ab"):
        write_model(place / f"model{seed}", seed=seed)
        made = config_for(place, place / name, hookpoints=("resid_post.0",), shard_contexts=32)
        harvest(made, lm=load_model(place / f"model{seed}"))
    assert len(open_store(place / "a").info.shards) > 1
    return place


@pytest.mark.parametrize(
    "source",
    # a joined store is read by the source that reads a single one, and more of it can go wrong
    [
        "joined",
        pytest.param("store", marks=pytest.mark.slow),
        pytest.param("iterator", marks=pytest.mark.slow),
    ],
)
def test_a_run_on_any_source_is_killed_and_resumed_to_the_same_bits(source, world, tmp_path):
    run(source, world, tmp_path / "whole")
    out = tmp_path / "resumed"
    killed_and_resumed([source, str(world), str(out)], out, (13,), KILLED)
    for name in ("weights.safetensors", "probe.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes(), name


# -- what cannot fit -------------------------------------------------------------------------------


def number(error: str, option: str) -> int:
    found = re.search(option + r" to at most ([\d,]+)", error)
    assert found is not None, error
    return int(found.group(1).replace(",", ""))


def test_a_run_that_cannot_fit_is_refused_with_the_width_that_does(world, tmp_path):
    wide = {"kind": "topk", "k": 3, "d_sae": 4_000_000_000}
    made = config("topk", tmp_path / "d", architecture=wide, store=world / "a", inputs=("resid_post.0",))
    with pytest.raises(
        ResourceError,
        match=r"train must fit in the memory that is free, [\d.]+ GB, got about [\d,.]+ GB \(d_sae=4,000,000,000, "
        r"batch_size=256\). Lower d_sae to at most [\d,]+\.",
    ) as error:
        train(made)
    assert not list(tmp_path.iterdir()), "nothing was begun"
    fits = number(str(error.value), "d_sae")
    size = needs.size_of(made.architecture.replace(d_sae=fits), 32, 32)
    taken, free = needs.train_bytes([size], 256, 0.0).memory, needs.memory_free() + needs.BASE
    assert taken <= 1.1 * free < 1.7 * taken, "others may have taken some meanwhile"


def test_a_sweep_that_cannot_fit_names_how_many_do(monkeypatch, tmp_path):
    _, x = planted(300)
    made = config("topk", tmp_path / "s", architecture={"kind": "topk", "d_sae": 64}, sweep=("k=2,3,4,5",))
    size = needs.size_of(made.architecture.replace(k=5), 16, 16)
    one, four = (needs.train_bytes([size] * n, 256, 0.0).memory for n in (1, 4))
    monkeypatch.setattr(needs, "memory_free", lambda: (2 * one + four) / 3 - needs.BASE)
    monkeypatch.setattr(needs, "resident", lambda: 2 * needs.BASE)
    with pytest.raises(ResourceError, match=r"train must fit in the memory .* the dictionaries=4\)") as error:
        train_sweep(made, source=TensorSource(x))
    assert number(str(error.value), "the dictionaries") == 2 and number(str(error.value), "d_sae") < 64
    assert not list(tmp_path.iterdir())


def test_what_steps_hold_is_counted_by_what_they_are():
    """Sparse steps hold entries of all rows; dense ones, taken some rows at a time, only counts."""

    def step(kind: str, batch: int = 2**14, **options) -> float:
        architecture = TrainConfig.build(
            {"architecture": {"kind": kind, "d_sae": 2**16, **options}}
        ).architecture
        sizes = [needs.size_of(architecture, 64, 64)]
        small, large = (needs.train_bytes(sizes, n, 0.0).memory for n in (2**13, batch))
        return (large - small) / (batch - 2**13)

    rows = 4 * 4 * 128
    assert step("topk", k=32) == step("group_max", k=32) == rows + 60 * 32
    assert GRAM_BYTES == pursuit.GRAM_BYTES
    assert step("mlp_encoder", k=32) == step("matching_pursuit", k=32) == rows + 60 * 32
    assert step("jumprelu", target_l0=10.0) == rows + 60 * 40
    assert step("relu", start_density=0.02) == pytest.approx(rows + 60 * 0.02 * 2**16)
    assert step("relu", start_density=0.0) == step("lista") == step("variational") == rows


def test_a_store_says_what_reading_it_takes(world):
    source = StoreSource(open_store(world / "a"), ("resid_post.0",))
    info = open_store(world / "a").info
    assert source.buffer_bytes == 64 * (info.n_rows + 3 * max(info.shard_rows))
