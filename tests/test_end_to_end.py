"""Training against the model's output: loss and gradients against a splice written by hand, and what it buys."""

from pathlib import Path

import pytest
import torch
from evaluate_world import POLICY, World, config_for, make_world, text_config
from torch.nn.functional import log_softmax

from sememe import artifact, dictionaries
from sememe.cli import _run
from sememe.dictionaries import Trainable
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.topk import TopKConfig
from sememe.end_to_end import ContextBatch, ContextSource, EndToEnd, EndToEndConfig
from sememe.errors import ConfigError, HookpointError
from sememe.evaluate import evaluate
from sememe.probes import CrossEntropy
from sememe.tracking import read_log
from sememe.train import TrainConfig, train

WHERE = ("resid_post.1",)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("end_to_end"))


def made(world: World, config: EndToEndConfig, inputs=WHERE, outputs=None) -> tuple[EndToEnd, ContextSource]:
    objective = EndToEnd(config, world.lm, inputs, outputs or inputs)
    return objective, objective.source(text_config(world.corpus), POLICY, inputs, outputs)


def dictionary_of(source: ContextSource, config=None) -> Trainable:
    config = config or ReLUConfig(d_sae=60, l1_coefficient=0.01)
    dictionary = dictionaries.build(config, source.d_in, source.d_out, source.sites)
    sample = source.sample(500)
    dictionary.set_scales(sample.x, sample.target)
    target = sample.target * dictionary.scale_out
    dictionary.initialise(sample.x * dictionary.scale_in, target, torch.Generator().manual_seed(0))
    return dictionary


def test_batches_are_the_kept_rows_of_whole_contexts(world):
    _, source = made(world, EndToEndConfig(objective="kl"))
    batch = source.next_batch(8 * 16)
    assert isinstance(batch, ContextBatch) and batch.target is batch.x
    ids = batch.run.ids
    assert ids.shape == (8, 16)
    with torch.no_grad():
        seen = world.lm.capture(ids, WHERE)[WHERE[0]]
    limit = source.max_norms[WHERE[0]]
    keep = seen.norm(dim=-1) <= limit
    keep[:, 0] = False
    keep &= ids != 0  # the end token
    assert torch.equal(batch.places, keep.view(-1).nonzero().view(-1))
    assert torch.equal(batch.x, seen.flatten(0, 1)[batch.places])
    first = source.sample(100).x
    assert torch.equal(first, source.sample(100).x)
    torch.testing.assert_close(first[:50], batch.x[:50])


def test_the_stream_goes_on_from_its_state_and_over_the_texts_end(world):
    _, one = made(world, EndToEndConfig(objective="kl"))
    _, two = made(world, EndToEndConfig(objective="kl"))
    for _ in range(3):
        one.next_batch(64 * 16)
    two.load_state_dict(one.state_dict())
    read = [one.state_dict()["n_read"]]
    while read[-1] == 64 * 3 or read[-1] > read[-2]:
        a, b = one.next_batch(64 * 16), two.next_batch(64 * 16)
        assert torch.equal(a.x, b.x) and torch.equal(a.places, b.places)
        read.append(one.state_dict()["n_read"])
        assert len(read) < 100
    assert read[-1] < 64 < read[-2], "the text has started over"


@pytest.mark.parametrize(
    ("inputs", "outputs", "options"),
    [
        (WHERE, WHERE, {"objective": "kl"}),
        (WHERE, WHERE, {"objective": "ce", "local_coefficient": 0.5}),
        (
            WHERE,
            WHERE,
            {"objective": "kl", "downstream": ("resid_post.2", "mlp_out.3"), "downstream_coefficient": 2.0},
        ),
        (("mlp_in.2",), ("mlp_out.2",), {"objective": "kl", "downstream": ("resid_post.2",)}),
    ],
    ids=["kl", "ce_and_local", "downstream", "transcoder"],
)
def test_loss_and_gradients_are_those_of_a_splice_written_by_hand(world, inputs, outputs, options):
    objective, source = made(world, EndToEndConfig(**options), inputs, outputs)
    dictionary, batch = dictionary_of(source), source.next_batch(8 * 16)
    x, target = batch.x * dictionary.scale_in, batch.target * dictionary.scale_out
    loss = objective(dictionary, batch, x, target, 0.5)
    loss.total.backward()
    found = {name: p.grad.clone() for name, p in dictionary.named_parameters()}
    assert not any(p.requires_grad for p in world.lm.hf.parameters())
    dictionary.zero_grad()

    # by hand: plain hooks on the Hugging Face model, plain softmax over whole logits
    hf, ids = world.lm.hf, batch.run.ids
    layers = hf.model.layers
    modules = {
        "resid_post.1": layers[1],
        "mlp_out.2": layers[2].mlp,
        "resid_post.2": layers[2],
        "mlp_out.3": layers[3].mlp,
    }
    acts = torch.relu((x - dictionary.b_pre) @ dictionary.W_enc + dictionary.b_enc)
    recon = acts @ dictionary.W_dec + dictionary.b_dec
    keep = torch.zeros(ids.numel(), dtype=torch.bool)
    keep[batch.places] = True

    def tensor(output):
        return output[0] if isinstance(output, tuple) else output

    def splice(_, __, output):
        new = tensor(output).reshape(-1, 24).clone()
        new[keep] = recon / dictionary.scale_out
        new = new.view(*ids.shape, 24)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def run(spliced: bool):
        seen = {}
        hooks = [modules[outputs[0]].register_forward_hook(splice)] if spliced else []
        hooks += [
            modules[name].register_forward_hook(
                lambda _, __, output, name=name: seen.__setitem__(name, tensor(output))
            )
            for name in options.get("downstream", ())
        ]
        logits = hf(ids).logits
        for hook in hooks:
            hook.remove()
        return logits, {name: value.reshape(-1, 24)[keep] for name, value in seen.items()}

    with torch.no_grad():
        base, base_seen = run(False)
    new, new_seen = run(True)
    predicting = keep.view(ids.shape)[:, :-1]
    p, q = (log_softmax(logits[:, :-1][predicting].float(), -1) for logits in (base, new))
    if options["objective"] == "kl":
        output = (p.exp() * (p - q)).sum(-1).mean()
    else:
        output = -q.gather(1, ids[:, 1:][predicting][:, None]).mean()
    mse = (target - recon).square().mean()
    total = output + options.get("local_coefficient", 0.0) * mse + 0.01 * acts.sum(1).mean()
    if "downstream" in options:
        missed = [
            (base_seen[n] - new_seen[n]).square().mean()
            / (base_seen[n] - base_seen[n].mean(0)).square().mean()
            for n in options["downstream"]
        ]
        total = total + options.get("downstream_coefficient", 1.0) * torch.stack(missed).mean()
    torch.testing.assert_close(loss.total, total, atol=1e-5, rtol=1e-4)
    assert float(loss.terms[options["objective"]]) == pytest.approx(float(output.detach()), rel=1e-4)
    total.backward()
    for name, parameter in dictionary.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4 * scale, rtol=1e-3, msg=name)


def config_of(out: Path, **changes) -> TrainConfig:
    architecture = TopKConfig(k=4, d_sae=64, dead_after_tokens=5000)
    plain = {"architecture": architecture, "n_tokens": 250 * 256, "batch_size": 256, "lr": 3e-3, "threads": 1}
    return TrainConfig.build(plain | {"out": out, "log_every": 10, **changes})


def test_it_lowers_kl_more_than_local_training_in_as_many_steps(world, tmp_path):
    """The same contexts, steps, start and learning rate; held-out KL."""
    found = {}
    for name, options in {
        "local": {"objective": "kl"},  # its source only
        "kl": {"objective": "kl"},
        "downstream": {"objective": "kl", "downstream": ("resid_post.2", "resid_post.3")},
    }.items():
        objective, source = made(world, EndToEndConfig(**options))
        train(
            config_of(tmp_path / name),
            source=source,
            objective=None if name == "local" else objective,
            extra={"policy": POLICY.resolved()},
        )
        config = config_for(tmp_path / name, world.corpus, tmp_path / f"{name}_report", nulls=())
        report = evaluate(config, lm=world.lm)
        found[name] = {metric: report.value(metric) for metric in ("kl", "fvu")}
    assert found["kl"]["kl"] < 0.95 * found["local"]["kl"], found
    assert found["downstream"]["kl"] < 0.95 * found["local"]["kl"], found
    assert found["downstream"]["fvu"] < found["kl"]["fvu"], found
    assert found["local"]["fvu"] < found["kl"]["fvu"], (
        "what is close locally is not what matters to the output"
    )


class Stops(EndToEnd):
    """An objective that is interrupted at its 20th step."""

    n = 0

    def __call__(self, *arguments):
        self.n += 1
        if self.n == 20:
            raise KeyboardInterrupt
        return super().__call__(*arguments)


def test_an_interrupted_run_goes_on_to_the_same_bits(world, tmp_path):
    options = {"n_tokens": 40 * 256, "checkpoint_every_seconds": 0}
    plain = EndToEndConfig(objective="kl", downstream=("resid_post.3",))
    for out, cls in (("whole", EndToEnd), ("resumed", Stops), ("resumed", EndToEnd)):
        objective = cls(plain, world.lm, WHERE, WHERE)
        source = objective.source(text_config(world.corpus), POLICY, WHERE)
        if cls is Stops:
            with pytest.raises(KeyboardInterrupt):
                train(config_of(tmp_path / out, **options), source=source, objective=objective)
        else:
            train(config_of(tmp_path / out, **options), source=source, objective=objective)
    assert source.state_dict()["n_read"] > 0
    weights = [(tmp_path / out / "weights.safetensors").read_bytes() for out in ("whole", "resumed")]
    assert weights[0] == weights[1]
    watched = [(tmp_path / out / "watched.jsonl").read_bytes() for out in ("whole", "resumed")]
    assert watched[0] == watched[1]


def test_the_command_line(world, tmp_path, capsys):
    live = [
        "--live",
        "--model",
        str(world.place / "model"),
        "--dtype",
        "float32",
        "--corpus",
        str(world.corpus),
    ]
    live += [
        "--heldout-fraction",
        "0.3",
        "--context-length",
        "16",
        "--inputs",
        "resid_post.1",
        "--n-tokens",
        "5120",
    ]
    rest = ["--k", "4", "--d-sae", "64", "--batch-size", "256", "--threads", "1", "--objective", "kl"]
    rest += ["--downstream", "resid_post.3", "--log-every", "5", "--out", str(tmp_path / "d")]
    rest += ["--watch-rows", "100", "--watch-every", "2560", "--watch-ce-tokens", "400"]
    assert _run(["train", "topk", *live, *rest]) == 0
    watched = read_log(tmp_path / "d" / "watched.jsonl")
    assert [line["tokens"] for line in watched] == [0, 2560, 5120]
    assert watched[-1]["fvu"] < watched[0]["fvu"]
    made_here = dictionaries.load(tmp_path / "d")
    probe = CrossEntropy(world.lm, made_here.sites, text_config(world.corpus), POLICY, 400)
    for key, value in probe(made_here).items():
        assert watched[-1][key] == pytest.approx(value, abs=1e-3), key
    last = read_log(tmp_path / "d" / "metrics.jsonl")[-1]
    assert last["step"] == 20 and {"kl", "downstream", "mse", "fvu"} <= set(last)
    assert artifact.load(tmp_path / "d").extra["policy"]["context_length"] == 16
    capsys.readouterr()
    assert _run(["train", "topk", *live, *rest, "--buffer-mb", "9"]) == 2
    assert "buffer_mb must be left out when the objective is kl, got 9" in capsys.readouterr().err


def test_errors(world):
    for options, message in [
        ({"local_coefficient": 0.5}, "local_coefficient must be left out when objective is local"),
        ({"downstream": ("resid_post.3",)}, "downstream must be left out when objective is local"),
        ({"objective": "kl", "downstream_coefficient": 2.0}, "downstream names no hookpoint"),
    ]:
        with pytest.raises(ConfigError, match=message):
            EndToEndConfig.build(options)
    with pytest.raises(ConfigError, match="objective must be left out unless live is set, got kl"):
        TrainConfig(end_to_end=EndToEndConfig(objective="kl"))
    with pytest.raises(
        HookpointError, match=r"must lie above what the dictionary writes, got 'resid_post.1'"
    ):
        made(world, EndToEndConfig(objective="kl", downstream=WHERE))
    objective, source = made(world, EndToEndConfig(objective="kl", downstream=("resid_post.0",)))
    batch, dictionary = source.next_batch(64), dictionary_of(source)
    with pytest.raises(HookpointError, match=r"must lie above what the dictionary writes, got resid_post.0"):
        objective(dictionary, batch, batch.x, batch.x, 0.0)
