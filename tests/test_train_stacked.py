"""Members of one shape that step as one: what each would become alone, in a sweep, with every option, and on resuming.

On a machine without a GPU the device's kernels run in Triton's interpreter, as in test_kernels_gpu.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import CONFIGS, Reads, planted
from test_train_sweep import same, sweep_config, without_seconds

pytest.importorskip("triton")

from sememe import dictionaries, kernels
from sememe.dictionaries import TRAINABLE, Architecture, Site, Sites
from sememe.dictionaries.abs_topk import AbsTopKConfig
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.gated import GatedConfig
from sememe.dictionaries.group_max import GroupMaxConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.matryoshka import MatryoshkaConfig
from sememe.dictionaries.mlp_encoder import MLPEncoderConfig
from sememe.dictionaries.multi_topk import MultiTopKConfig
from sememe.dictionaries.p_anneal import PAnnealConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.stacked import stack_of, stackable
from sememe.dictionaries.tied import TiedConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.kernels.gpu import selection, sparse
from sememe.needs.training import STACKED
from sememe.optimiser import AdamConfig, MuonConfig, SignumConfig
from sememe.source import Batch, TensorSource
from sememe.train import TrainConfig, crew, train, train_sweep, variants
from sememe.train.member import Member, Spec
from sememe.train.stacked import MemberStack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TILE", 16)
        patch.setattr(sparse, "BLOCK", 32)
        patch.setattr(sparse, "ENTRIES", 4)
        yield


@pytest.fixture
def path(request, monkeypatch) -> str:
    """All kernels by one path, and members of one shape as one whatever the device is."""
    monkeypatch.setattr(kernels, "path_for", lambda _: request.param)
    monkeypatch.setattr(crew, "stacks_on", lambda _: True)
    return request.param


def stacks_made(monkeypatch) -> list[tuple[str, ...]]:
    """The names of each stack's members, from now on."""
    made: list[tuple[str, ...]] = []
    plain = MemberStack.__init__

    def noted(self, members):
        plain(self, members)
        made.append(self.names)

    monkeypatch.setattr(MemberStack, "__init__", noted)
    return made


ENSEMBLE = {
    "kind": "topk",
    "dead_after_tokens": 3,
    "resample": "loss",
    "resample_at": (0.5,),
    "resample_after_tokens": 11,
    "rewarmup_steps": 2,
}
"""Silent latents from the second step on, so that AuxK and resampling have something to do."""


PENALISED = {
    "jumprelu": ({"start_l0": 20, "bandwidth": 0.3}, "target_l0=2,3"),
    "relu": ({"start_density": 0.2, "target_l0": 2.0, "steering": 0.1}, "l1_coefficient=0.1,0.3"),
}
"""Options beside those of ENSEMBLE, and what is swept over."""


def swept(out: Path, path: str, kind: str = "topk", **changes):
    """Four dictionaries of two k or penalties by the reference; in the interpreter, which is slow, two small ones."""
    small = path == "gpu"
    sweep = ("lr=3e-3,1e-2",) if small else ("k=2,4" if kind == "group_max" else "k=2,3", "seed=0,1")
    size = {"d_sae": 10, "k": 2} if small else {"d_sae": 40}
    size |= {"kind": kind}
    lr = {} if small else {"lr": 3e-3}
    architecture = {k: v for k, v in ENSEMBLE.items() if not small or k in ("kind", "dead_after_tokens")}
    if kind in PENALISED:
        del architecture["dead_after_tokens"]
        size |= PENALISED[kind][0]
        sweep = (PENALISED[kind][1], "seed=0,1")
    options = {"architecture": architecture | size, "batch_size": 4, "n_tokens": 16, "log_every": 4}
    options |= {"n_tokens": 12, "log_every": 3, "watch_rows": 0} if small else {}
    return sweep_config(out, *sweep, kind=kind, **(options | lr | changes))


@pytest.mark.parametrize(
    ("path", "clip", "kind"),
    [
        ("reference", None, "topk"),
        ("reference", 0.05, "topk"),
        ("reference", None, "batch_topk"),
        ("reference", None, "group_max"),
        ("reference", None, "jumprelu"),
        pytest.param("gpu", 0.05, "topk", marks=pytest.mark.slow),
    ],
    indirect=["path"],
)
def test_a_sweep_that_steps_as_one_gives_what_each_gives_alone(path, clip, kind, tmp_path, monkeypatch):
    """Two k, two seeds or two learning rates, with AuxK, and by the reference with resampling too."""
    _, x = planted(200, 6)
    made = stacks_made(monkeypatch)
    config = swept(tmp_path / "s", path, kind, optimiser={"kind": "adam", "clip": clip})
    sweep = train_sweep(config, source=TensorSource(x))
    by_k = kind in ("batch_topk", "group_max")
    assert made == ([sweep.names[:2], sweep.names[2:]] if by_k else [sweep.names])
    n_stacks = len(made)
    terms = []
    for member in variants(config):
        alone = train(member.config.replace(out=tmp_path / member.name), source=TensorSource(x))
        together = sweep.load(member.name)
        for (name, one), other in zip(
            alone.state_dict().items(), together.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        logs = [without_seconds(place / member.name) for place in (tmp_path / "s", tmp_path)]
        for one, other in zip(*logs, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
        terms.append("auxk" in logs[0][-1])
    assert any(terms) or kind in PENALISED, "AuxK had something to do"
    assert len(made) == n_stacks, "a dictionary alone is no stack"


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "relu"])
def test_going_on_from_a_checkpoint_gives_the_same_bits(kind, tmp_path, monkeypatch):
    path = "reference"
    monkeypatch.setattr(kernels, "path_for", lambda _: path)
    monkeypatch.setattr(crew, "stacks_on", lambda _: True)
    _, x = planted(200, 6)
    train_sweep(swept(tmp_path / "whole", path, kind), source=TensorSource(x))
    plain, n = MemberStack.train_step, 0
    n_stacks = 2 if kind == "batch_topk" else 1

    def stops(self, batch, ahead, logging):
        nonlocal n
        n += 1
        if n == 3 * n_stacks + 1:  # after the resampling and the first dead latents
            raise KeyboardInterrupt
        return plain(self, batch, ahead, logging)

    monkeypatch.setattr(MemberStack, "train_step", stops)
    every_step = {"checkpoint_every_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train_sweep(swept(tmp_path / "resumed", path, kind, **every_step), source=TensorSource(x))
    sweep = train_sweep(swept(tmp_path / "resumed", path, kind, **every_step), source=TensorSource(x))
    assert n == 3 * n_stacks + 1 + n_stacks, "three of four steps were not taken again"
    for name in sweep.names:
        assert same(tmp_path / "whole" / name, tmp_path / "resumed" / name), name


@pytest.mark.parametrize("path", ["reference"], indirect=True)
def test_hookpoints_of_one_width_step_as_one_too(path, tmp_path, monkeypatch):
    """Each dictionary reads its own part of the stream, at its own scale."""
    _, x = planted(200, 6)
    x = torch.cat([x, 50 * x.flip(1).roll(3, 0)], dim=1)

    def both(*names: str) -> Sites:
        side = tuple(
            Site(model="m", model_fingerprint="f", hookpoint=name, start=6 * i, stop=6 * (i + 1))
            for i, name in enumerate(names)
        )
        return Sites(inputs=side, outputs=side)

    made = stacks_made(monkeypatch)
    options = {"architecture": {"kind": "topk", "k": 2, "d_sae": 40}, "batch_size": 8, "n_tokens": 64}
    config = sweep_config(tmp_path / "s", "inputs=a,b", **options)
    sweep = train_sweep(config, source=TensorSource(x, sites=both("a", "b")))
    assert made == [("a", "b")]
    for number, name in enumerate(sweep.names):
        own = TensorSource(x[:, 6 * number : 6 * (number + 1)], sites=both(name))
        alone = train(config.replace(sweep=(), out=tmp_path / name), source=own)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(sweep.load(name).state_dict()[key], value, atol=1e-4, rtol=1e-4)


def two(
    config: Callable[..., Architecture], one: dict[str, Any], other: dict[str, Any]
) -> list[Architecture]:
    return [config(d_sae=12, **options) for options in (one, other)]


DEAD = {"dead_after_tokens": 1}
JUMPS = {"start_l0": 3.0, "bandwidth": 0.3, "resample": "none"}
STARTS = {"start_density": 0.2, "resample": "none"}
UNITS = STARTS | {"decoder_bias": False, "norm_weighted": True}
PAIRS = {
    "topk": two(TopKConfig, DEAD | {"k": 2}, {"k": 3}),
    "multi_topk": two(
        MultiTopKConfig,
        DEAD | {"k": 2, "multiple": 2},
        DEAD | {"k": 3, "multiple": 3, "multi_coefficient": 0.5},
    ),
    "abs_topk": two(AbsTopKConfig, DEAD | {"k": 2}, {"k": 3}),
    "group_max": two(GroupMaxConfig, DEAD | {"k": 3}, {"k": 3, "auxk_coefficient": 0.0}),
    "batch_topk": two(BatchTopKConfig, DEAD | {"k": 2}, {"k": 2, "threshold_decay": 0.5}),
    "matryoshka": two(MatryoshkaConfig, *2 * (DEAD | {"k": 2, "prefixes": (0.25, 1.0)},)),
    "mlp_encoder": two(MLPEncoderConfig, DEAD | {"k": 2}, DEAD | {"k": 3, "auxk": 2}),
    "jumprelu": two(
        JumpReLUConfig,
        JUMPS | {"target_l0": 2.0},
        JUMPS | {"target_l0": None, "unpenalised_latents": 2, "sparsity_warmup": 0.5, "bandwidth": 0.1},
    ),
    "relu": two(
        ReLUConfig, STARTS | {"target_l0": 2.0}, STARTS | {"l1_coefficient": 0.1, "unpenalised_latents": 3}
    ),
    "relu, weighted": two(ReLUConfig, UNITS | {"constant_latent": True}, UNITS | {"l1_coefficient": 0.1}),
    "tied": two(
        TiedConfig, STARTS | {"target_l0": 2.0, "bias_decay": 0.01}, STARTS | {"l1_coefficient": 0.1}
    ),
    "gated": two(
        GatedConfig, STARTS | {"target_l0": 2.0}, STARTS | {"l1_coefficient": 0.1, "unpenalised_latents": 3}
    ),
    "p_anneal": two(
        PAnnealConfig,
        STARTS | {"target_l0": 2.0, "anneal_from": 0.0, "p_end": 0.3},
        STARTS | {"l1_coefficient": 0.1, "anneal_from": 0.1, "anneal_until": 0.5, "unpenalised_latents": 2},
    ),
    "relu, >= 0": two(ReLUConfig, *2 * (STARTS | {"non_negative_decoder": True},)),
}
"""Two of each that step as one, in as many options apart as they may be."""


OPTIMISERS = {"adam": AdamConfig(), "signum": SignumConfig(), "muon": MuonConfig()}


def team_of_two(
    kind: str, stacked: bool, monkeypatch, optimiser: str = "adam"
) -> tuple[crew.Crew, list[Batch]]:
    """They, and what they are trained on."""
    monkeypatch.setattr(crew, "stacks_on", lambda _: stacked)
    monkeypatch.setattr(kernels, "DENSE_SHARE", 2.0)  # no dictionary is so small that it is dense at any l0
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {"warmup": 0.0, "optimiser": OPTIMISERS[optimiser]}
    specs = [
        Spec(f"m{i}", TrainConfig(**common, architecture=one, seed=i, lr=1e-3 * (1 + i)), 4, 4, None, None)
        for i, one in enumerate(PAIRS[kind])
    ]
    team = crew.Crew(specs, 6, torch.device(DEVICE))
    team.initialise(Batch(data, data))
    assert [stack.names for stack in team.stacks] == [("m0", "m1")] * stacked
    return team, [Batch(rows, rows) for rows in data.split(2)]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *(("reference", kind) for kind in PAIRS),
        *(("gpu", kind) for kind in ("jumprelu", "gated")),
        *(
            pytest.param("gpu", kind, marks=pytest.mark.slow)
            for kind in (
                *("abs_topk", "group_max", "multi_topk", "matryoshka", "mlp_encoder"),
                *("relu", "relu, >= 0", "tied", "p_anneal"),
            )
        ),
    ],
    indirect=["path"],
)
def test_a_step_of_two_as_one_is_the_step_of_each(path, kind, monkeypatch):
    """Parameters, moments, thresholds, counters and logs, whatever the two differ in; a buffer that is too small for
    one is not for the other."""
    logs, states = [], []
    for stacked in (False, True):
        team, batches = team_of_two(kind, stacked, monkeypatch)
        logs.append([])
        for number, batch in enumerate(batches[: 2 if path == "gpu" else 4]):
            if number == 1 and path == "gpu" and kind == "jumprelu":
                team.members["m0"].dictionary.entries.fill_(1)
            logs[-1].append(team.train_step(batch, None, True))
        states.append(team.state_dict())
    for alone, together in zip(*logs, strict=True):
        for name, values in alone.items():
            assert together[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    torch.testing.assert_close(states[1], states[0], atol=1e-6, rtol=1e-5)
    if path == "gpu" and kind == "jumprelu":
        assert [values["overflow_steps"] for values in logs[1][-1].values()] == [1.0, 0.0]


@pytest.mark.parametrize("path", ["reference"], indirect=True)
@pytest.mark.parametrize("kind", ["topk", "gated", "relu, >= 0"])
@pytest.mark.parametrize("optimiser", ["signum", "muon"])
def test_optimisers_that_step_in_turn_get_the_gradients_of_a_step_as_one(path, kind, optimiser, monkeypatch):
    """Also which latents are frozen, and what is exported of an average."""
    states, exports = [], []
    for stacked in (False, True):
        team, batches = team_of_two(kind, stacked, monkeypatch, optimiser)
        for number, batch in enumerate(batches[:4]):
            if number == 2:
                team.members["m0"].optimiser.freeze(torch.arange(12) < 3)
            team.train_step(batch, None, True)
        states.append(team.state_dict())
        with team.members["m1"].optimiser.exported():
            exports.append(team.members["m1"].dictionary.W_dec.detach().clone())
    torch.testing.assert_close(states[1], states[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(exports[1], exports[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("path", ["gpu"], indirect=True)
def test_a_step_of_two_on_a_gpu_is_one_and_reads_nothing_from_the_device(path, monkeypatch):
    reads, taken = Reads.past_what_arrives(monkeypatch), []
    team, batches = team_of_two("jumprelu", True, monkeypatch)
    plain = Member.train_step
    monkeypatch.setattr(
        Member, "train_step", lambda self, *rows: taken.append(self.name) or plain(self, *rows)
    )
    team.train_step(batches[0], None, False)
    assert taken == ["m0", "m1"], "nothing tells how much room the first step needs"
    with reads:
        team.train_step(batches[1], None, False)
    assert not reads.found and len(taken) < 3


def test_the_plan_knows_which_architectures_step_as_one():
    """Of each architecture one with usual options; below, options by which one steps by itself."""
    usual = {kind: TRAINABLE[kind].rebuild(options, 4, 4, 64, None) for kind, options in CONFIGS.items()}
    assert set(usual) == set(TRAINABLE)
    found = {kind for kind, dictionary in usual.items() if stackable(dictionary) is not None}
    assert found == STACKED
    for kind, options in (
        ("topk", {"k": 2, "skip": True}),
        ("relu", {"noise": 0.1}),
        ("tied", {"sqrt_coefficient": 0.1}),
        ("gated", {"ghost_after_tokens": 5}),
        ("relu", {"entropy_coefficient": 0.1}),
        ("jumprelu", {"ghost_after_tokens": 5}),
    ):
        d_out = 4 if kind == "tied" else 3
        assert stackable(TRAINABLE[kind].rebuild(options | {"d_sae": 12}, 4, d_out, 12, None)) is None


def test_only_those_of_one_shape_step_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "stacks_on", lambda _: True)
    _, x = planted(400, 10)
    made = stacks_made(monkeypatch)
    base = {"architecture": {"kind": "topk", "k": 2}, "batch_size": 12, "n_tokens": 24, "lr": 1e-3}
    train_sweep(sweep_config(tmp_path / "a", "d_sae=16,24", "seed=0,1", **base), source=TensorSource(x))
    assert made == [("d_sae16-seed0", "d_sae16-seed1"), ("d_sae24-seed0", "d_sae24-seed1")]
    made.clear()
    train_sweep(sweep_config(tmp_path / "b", "seed=0", **base), source=TensorSource(x))
    assert made == []
    optimiser = {"optimiser": {"kind": "muon"}}
    train_sweep(sweep_config(tmp_path / "c", "seed=0,1", **(base | optimiser)), source=TensorSource(x))
    assert made == [("seed0", "seed1")]


def test_on_a_cpu_each_steps_by_itself_and_where_the_gpus_kernels_serve_they_step_as_one(monkeypatch):
    cpu = torch.device("cpu")
    assert not crew.stacks_on(cpu)
    monkeypatch.setattr(kernels, "path_for", lambda x: "gpu" if x.device == cpu else "reference")
    assert crew.stacks_on(cpu)


def test_a_stack_is_its_dictionaries():
    """What is done to one of them is done to the stack, and the other way round."""
    whole = [dictionaries.build(TopKConfig(k=2, d_sae=6), 4, 4) for _ in range(2)]
    stack = stack_of(whole)
    with torch.no_grad():
        whole[1].W_enc[:, 3] = 7.0
        whole[0].tokens_since_fired[2] = 5
    assert stack.parameters["W_enc"][1, :, 3].tolist() == [7.0] * 4
    assert stack.parameters["W_enc"][1].T.is_contiguous() and whole[1].W_enc.T.is_contiguous()
    assert int(stack.tokens_since_fired[0, 2]) == 5 and int(stack.tokens_since_fired.sum()) == 5
