"""Copies kept during training, and latents that are frozen once they stop changing."""

from pathlib import Path

import pytest
import torch
from test_train import config, planted

from sememe import artifact, dictionaries
from sememe.errors import ActivationError, ConfigError
from sememe.source import Batch, TensorSource
from sememe.tracking import read_log
from sememe.train import TrainConfig, train, train_sweep
from sememe.train.member import Member


def directions(folder: Path) -> torch.Tensor:
    made = dictionaries.load(folder).decoder_directions().detach()
    return made / made.norm(dim=1, keepdim=True)


class Breaks(TensorSource):
    n = 0

    def next_batch(self, n):
        self.n += 1
        if self.n == 27:
            raise RuntimeError("the power failed")
        return super().next_batch(n)


@pytest.mark.parametrize("optimiser", ["adam", "signum"])
def test_copies_are_dictionaries_and_the_last_is_the_result(optimiser, tmp_path):
    _, x = planted()
    made = config(
        "topk",
        tmp_path / "d",
        optimiser={"kind": optimiser},
        keep_checkpoints=True,
        keep_every_tokens=10 * 256,
    )
    train(made, source=TensorSource(x))
    folder = tmp_path / "d" / "checkpoints"
    kept = [1, 2, 4, 8, 10, 16, 20, 30, 32, 40]
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:09}" for step in kept]
    copies = [directions(folder / f"step-{step:09}") for step in kept]
    last = tmp_path / "d"
    assert torch.equal(copies[-1], directions(last))
    assert (folder / "step-000000040" / "weights.safetensors").read_bytes() == (
        last / "weights.safetensors"
    ).read_bytes()
    similar = [float((copy * copies[-1]).sum(1).mean()) for copy in copies]
    assert similar == sorted(similar) and similar[0] < 0.999
    extra = artifact.load(folder / "step-000000032", "dictionary").extra
    assert extra["step"] == 32 and extra["tokens"] == 32 * 256
    assert "checkpoints/step-000000032/weights.safetensors" in artifact.load(last).meta["files"]


def test_copies_survive_a_break_and_none_is_kept_unasked(tmp_path):
    _, x = planted()
    for name in ("whole", "broken"):
        made = config("topk", tmp_path / name, keep_checkpoints=True, checkpoint_every_seconds=0)
        if name == "broken":
            with pytest.raises(RuntimeError, match="the power failed"):
                train(made, source=Breaks(x))
        train(made, source=TensorSource(x))
    files = [
        {
            p.name: (p / "weights.safetensors").read_bytes()
            for p in (tmp_path / name / "checkpoints").iterdir()
        }
        for name in ("whole", "broken")
    ]
    assert files[0] == files[1] and len(files[0]) == 6
    train(config("topk", tmp_path / "plain"), source=TensorSource(x))
    assert not (tmp_path / "plain" / "checkpoints").exists()


def freezing(out: Path, above: float, **changes) -> TrainConfig:
    every = {"freeze_above": above, "freeze_every_tokens": 10 * 256}
    return config("topk", out, **every, checkpoint_every_seconds=0, **changes)


@pytest.mark.parametrize("optimiser", ["adam", "signum", "muon"])
def test_latents_that_stopped_changing_are_frozen_and_a_settled_run_ends(optimiser, tmp_path):
    _, x = planted()
    kind = {"optimiser": {"kind": optimiser}}
    train(freezing(tmp_path / "d", 0.3, lr=1e-5, log_every=100, **kind), source=TensorSource(x))
    last = read_log(tmp_path / "d" / "metrics.jsonl")[-1]
    assert last["step"] == 20, "nothing moves: the second comparison freezes all that fires"
    assert 0.5 < last["frac_frozen"] <= 1
    train(freezing(tmp_path / "e", 1.0, lr=1e-2, log_every=100, **kind), source=TensorSource(x))
    last = read_log(tmp_path / "e" / "metrics.jsonl")[-1]
    assert last["step"] == 40 and last["frac_frozen"] < 0.1


def test_some_freeze_earlier_than_others_and_keep_their_bits(tmp_path, monkeypatch):
    _, x = planted()
    seen = []
    step = Member.train_step

    def watch(member, *batches):
        before = member.optimiser.frozen.clone(), member.dictionary.W_dec.detach().clone()
        out = step(member, *batches)
        frozen, rows = before
        assert torch.equal(member.dictionary.W_dec[frozen], rows[frozen])
        seen.append(float(frozen.float().mean()))
        return out

    monkeypatch.setattr(Member, "train_step", watch)
    made = freezing(tmp_path / "d", 0.99, lr=2e-2, n_tokens=200 * 256)
    train(made, source=TensorSource(x))
    assert seen[10] == 0.0 and seen == sorted(seen) and len({share for share in seen if share > 0}) > 2


def test_a_broken_run_with_frozen_latents_goes_on_to_the_same_bits(tmp_path):
    _, x = planted()
    train(freezing(tmp_path / "whole", 0.98, lr=2e-2), source=TensorSource(x))
    with pytest.raises(RuntimeError, match="the power failed"):
        train(freezing(tmp_path / "broken", 0.98, lr=2e-2), source=Breaks(x))
    train(freezing(tmp_path / "broken", 0.98, lr=2e-2), source=TensorSource(x))
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]
    logs = [read_log(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "broken")]
    assert logs[0]["frac_frozen"] == logs[1]["frac_frozen"] > 0


def test_intervals_without_what_they_are_for_are_errors():
    with pytest.raises(
        ConfigError, match="freeze_every_tokens must be left out unless freeze_above is given"
    ):
        TrainConfig.build({"freeze_every_tokens": 5})
    with pytest.raises(
        ConfigError, match="keep_every_tokens must be left out unless keep_checkpoints is set"
    ):
        TrainConfig.build({"keep_every_tokens": 5})


def test_a_sweeps_dictionaries_keep_their_own_copies_and_end_when_all_are_settled(tmp_path):
    _, x = planted()
    made = freezing(tmp_path / "s", 0.3, lr=1e-5, keep_checkpoints=True, sweep=("seed=0,1",))
    sweep = train_sweep(made, source=TensorSource(x))
    alone = freezing(tmp_path / "alone", 0.3, lr=1e-5, keep_checkpoints=True, seed=1, data_seed=0)
    train(alone, source=TensorSource(x))
    for name in sweep.names:
        assert read_log(sweep.path(name) / "metrics.jsonl")[-1]["step"] == 20
        copies = sorted((sweep.path(name) / "checkpoints").iterdir())
        assert [path.name for path in copies] == [f"step-{step:09}" for step in (1, 2, 4, 8, 16)]
    weights = "checkpoints/step-000000016/weights.safetensors"
    assert (sweep.path("seed1") / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()


def test_a_sweeps_member_that_has_settled_waits_for_the_others_as_it_is(tmp_path):
    """The first finishes at its first comparison, the second never: neither knows of the other."""
    _, x = planted()
    made = config(
        "topk", tmp_path / "s", lr=1e-3, checkpoint_every_seconds=0, sweep=("freeze_above=0.1,1.0",)
    )
    sweep = train_sweep(made, source=TensorSource(x))
    for name, above in zip(sweep.names, (0.1, 1.0), strict=True):
        train(
            made.model_copy(update={"sweep": (), "freeze_above": above, "out": tmp_path / name}),
            source=TensorSource(x),
        )
        alone = tmp_path / name
        assert (sweep.path(name) / "weights.safetensors").read_bytes() == (
            alone / "weights.safetensors"
        ).read_bytes()
        assert (
            read_log(sweep.path(name) / "metrics.jsonl")[-1]["step"]
            == read_log(alone / "metrics.jsonl")[-1]["step"]
        )
    last = [read_log(sweep.path(name) / "metrics.jsonl")[-1]["step"] for name in sweep.names]
    assert last[0] < last[1]


def test_no_copy_is_kept_of_a_dictionary_that_went_wrong(tmp_path):
    _, x = planted()
    x[2000:] = float("nan")

    class InOrder(TensorSource):
        n = 0

        def sample(self, n):
            return Batch(x[: min(n, 2000)], x[: min(n, 2000)])

        def next_batch(self, n):
            self.n += n
            part = x[self.n - n : self.n]
            return Batch(part, part)

    made = config(
        "topk", tmp_path / "d", batch_size=100, n_tokens=3000, log_every=50, watch_rows=0, keep_checkpoints=True,
        keep_every_tokens=100,
    )  # fmt: skip
    with pytest.raises(ActivationError, match="first at step 21"):
        train(made, source=InOrder(x))
    kept = sorted((tmp_path / ".d.partial").rglob("step-*"))
    assert len(kept) >= 20
    assert all(torch.isfinite(dictionaries.load(path).W_dec).all() for path in kept)
