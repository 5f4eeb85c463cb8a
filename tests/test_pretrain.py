"""Small models from scratch: they learn, resume to the bit, and load wherever a Hugging Face folder does."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sememe import artifact, lm
from sememe.cli import _run
from sememe.errors import ConfigError, MismatchError, ModelError, TextError
from sememe.interrupt import stop_requests
from sememe.lm.build import PRESETS, GPT2Shape, LlamaShape, build_causal_lm, train_tokenizer
from sememe.pretrain import PretrainConfig, baselines, pretrain, training
from sememe.pretrain.group import Group
from sememe.pretrain.training import Run
from sememe.text import TextConfig

NAMES = ["Anna", "Boris", "Clara", "David", "Eva", "Frank"]
PLACES = ["the old market", "the harbour", "a small village", "the library", "the north tower"]
VERBS = [("walks to", "is at"), ("runs from", "is no longer at"), ("dreams of", "has never seen")]


def story(rng: random.Random) -> str:
    """Sentences with words that depend on earlier ones, so that there is more to learn than frequencies."""
    sentences = []
    for _ in range(rng.randint(4, 9)):
        name, place, (verb, then) = rng.choice(NAMES), rng.choice(PLACES), rng.choice(VERBS)
        sentences.append(f"{name} {verb} {place}. Now {name} {then} {place}.")
    return " ".join(sentences)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story(rng)}) + "\n" for _ in range(600)))
    return path


def small(corpus: Path, out: Path, **changes: Any) -> PretrainConfig:
    base: dict[str, Any] = {
        "out": out,
        "text": TextConfig(corpus=(str(corpus),)),
        "architecture": GPT2Shape(d_model=32, n_heads=2),
        "vocab_size": 300,
        "context_length": 32,
        "n_tokens": 32 * 8 * 30,
        "batch_rows": 8,
        "validation_tokens": 2_000,
        "n_samples": 2,
        "sample_tokens": 8,
        "threads": 1,
        "dtype": "float32",
        "device": "cpu",
        "log_every": 5,
    }
    return PretrainConfig.build(base | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> artifact.Artifact:
    out = tmp_path_factory.mktemp("trained") / "model"
    return pretrain(small(corpus, out, n_tokens=32 * 16 * 200, batch_rows=16, lr=6e-3))


def test_a_few_hundred_steps_beat_what_counting_can_do(trained: artifact.Artifact) -> None:
    results = trained.extra["results"]
    assert results["validation_loss"] < 0.6 * results["unigram_loss"]
    assert results["bigram_loss"] < results["unigram_loss"]
    assert results["validation_loss"] < results["bigram_loss"]
    log = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(300), rel=0.25)
    validations = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert len(validations) == 5 and validations[-1] == results["validation_loss"] < validations[0]
    assert json.loads((trained.path / "results.json").read_text()) == results
    samples = (trained.path / "samples.md").read_text()
    assert samples.count("> **") == 2


def test_the_folder_is_a_plain_hugging_face_model(trained: artifact.Artifact) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(trained.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    ours = lm.load(lm.ModelConfig(model=str(trained.path), dtype="float32", device="cpu"))
    ids = torch.tensor([tokenizer("Anna walks to the harbour. Now Anna").input_ids])
    with torch.no_grad():
        assert torch.equal(ours.logits(ours.hidden(ids)), theirs(ids).logits)
    n = trained.extra["results"]["n_parameters"]
    assert n == sum(p.numel() for p in theirs.parameters())
    assert tokenizer.decode(tokenizer("Zoë 北 \n\t x").input_ids) == "Zoë 北 \n\t x"


def test_the_reported_loss_is_that_of_the_saved_model(trained: artifact.Artifact, corpus: Path) -> None:
    from sememe.text import TokenPolicy, token_blocks

    model = lm.load(lm.ModelConfig(model=str(trained.path), dtype="float32", device="cpu"))
    policy = TokenPolicy(context_length=32, drop_positions=0)
    text = TextConfig(corpus=(str(corpus),))
    blocks = token_blocks(text, model.tokenizer, policy, split="heldout", n_tokens=2_000)
    rows = torch.from_numpy(np.concatenate([b.ids[b.attention_mask.all(1)] for b in blocks])).long()
    with torch.no_grad():
        chances = model.logits(model.hidden(rows))[:, :-1].log_softmax(-1)
    loss = -chances.gather(-1, rows[:, 1:, None]).mean()
    assert float(loss) == pytest.approx(trained.extra["results"]["validation_loss"], rel=1e-5)


def test_a_second_run_opens_the_first(trained: artifact.Artifact, corpus: Path) -> None:
    config = PretrainConfig.build(trained.meta["config"])
    before = trained.path.stat().st_mtime_ns
    assert pretrain(config).fingerprint == trained.fingerprint
    assert trained.path.stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match=r"Delete .*, write elsewhere, or pass --fresh"):
        pretrain(config.replace(seed=5))


PROGRAM = """
import sys
from sememe.pretrain import PretrainConfig, pretrain
pretrain(PretrainConfig.model_validate_json(sys.argv[1]))
"""


def test_killed_and_started_again_gives_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps: dict[str, Any] = {"n_tokens": 32 * 8 * 60, "n_samples": 0, "n_validations": 2}
    pretrain(small(corpus, whole, **steps))
    config = small(corpus, broken, checkpoint_every_seconds=0, **steps)
    process = forked.start(PROGRAM, config.model_dump_json())
    scratch = tmp_path / ".broken.partial" / "scratch"
    deadline = time.monotonic() + 300
    while not list(scratch.glob("checkpoint-00000001*.safetensors")):  # ten steps or more
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not broken.exists() and list(scratch.glob("checkpoint-*.safetensors"))
    pretrain(config.replace(checkpoint_every_seconds=60))
    assert_same_bits(whole, broken)
    steps_logged = [json.loads(x)["step"] for x in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps_logged == sorted(set(steps_logged)) and steps_logged[-1] == 60
    assert not (broken / "scratch").exists() and not scratch.exists()


def test_a_checkpoint_of_another_setting_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "model", checkpoint_every_seconds=0, log_every=1)

    class Stop(Exception):
        pass

    def stop(self: PretrainConfig, step: int) -> float:
        if step == 7:
            raise Stop
        return 1e-3

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(PretrainConfig, "rate", stop)
        pretrain(config)
    with pytest.raises(MismatchError, match=r"setting it was made in .*'threads': 1.* Set --threads"):
        pretrain(config.replace(threads=2))
    assert pretrain(config).extra["results"]["n_train_tokens"] == 32 * 8 * 30


def test_gradient_accumulation_gives_the_same_model(corpus: Path, tmp_path: Path) -> None:
    short: dict[str, Any] = {"n_tokens": 32 * 8 * 6, "n_samples": 0}
    pretrain(small(corpus, tmp_path / "whole", **short))
    pretrain(small(corpus, tmp_path / "parts", micro_rows=2, **short))
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOGITS", 32 * 300 * 3)  # three rows, of which two divide eight
        pretrain(small(corpus, tmp_path / "fitting", **short))
    assert_same_bits(tmp_path / "fitting", tmp_path / "parts")


def test_another_tokenizer_and_shape_and_bfloat16(
    trained: artifact.Artifact, corpus: Path, tmp_path: Path
) -> None:
    config = PretrainConfig.build(
        {
            "out": str(tmp_path / "llama"),
            "text": TextConfig(corpus=(str(corpus),)),
            "architecture": {"kind": "llama", "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2},
            "tokenizer": str(trained.path),
            "context_length": 32,
            "n_tokens": 32 * 8 * 30,
            "batch_rows": 8,
            "lr": 1e-2,
            "dtype": "bfloat16",
            "device": "cpu",
            "n_samples": 0,
            "n_validations": 1,
            "threads": 1,
        }
    )
    assert PretrainConfig.build(config.resolved()) == config
    results = pretrain(config).extra["results"]
    assert results["validation_loss"] < results["unigram_loss"]
    assert weights(tmp_path / "llama")["model.embed_tokens.weight"].dtype == torch.float32
    model = lm.load(lm.ModelConfig(model=str(tmp_path / "llama"), device="cpu"))
    assert model.n_layers == 2 and "mlp_act.1" in model.hookpoints()


def test_two_processes_train_as_one_with_the_whole_batch(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short: dict[str, Any] = {"n_tokens": 32 * 8 * 12, "n_samples": 0, "log_every": 1, "micro_rows": 2}
    pretrain(small(corpus, tmp_path / "one", **short))
    config = small(corpus, tmp_path / "two", **short)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for rank in ("1", "0"):
        for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, value)
        if rank == "1":
            second = forked.start(PROGRAM, config.model_dump_json())
    try:
        results = pretrain(config).extra["results"]
        assert second.wait(120) == 0
    finally:
        second.kill()
        second.communicate()

    def logged(name: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert len(logged("two")) == 12
    for one, two in zip(logged("one"), logged("two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two["lr"] == one["lr"]
    alone = artifact.load(tmp_path / "one").extra["results"]
    assert results["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-4)
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(left[name], right[name], rtol=1e-2, atol=1e-3) for name in left)


def test_a_batch_that_processes_cannot_share_is_refused(corpus: Path, tmp_path: Path) -> None:
    group = Group(0, 3, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"batch_rows must be a multiple of the 3 processes.*, got 8\. Change"
    ):
        Run(small(corpus, tmp_path), tmp_path, group)
    uneven = small(corpus, tmp_path, batch_rows=12, micro_rows=3)
    with pytest.raises(
        ConfigError, match=r"micro_rows must divide the 4 rows of each of the 3 .*, got 3\. Change"
    ):
        Run(uneven, tmp_path, group)


def test_a_preset_is_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert PretrainConfig.build({"architecture": "nanda"}).architecture == PRESETS["nanda"]
    with pytest.raises(
        ConfigError, match=r"a preset must be one that is there, got 'nando'\. Did you mean 'nanda'"
    ):
        PretrainConfig.build({"architecture": "nando"})
    assert _run(["pretrain", "shehper", "--n-layers", "2"]) == 2, "its shape is settled"
    assert "--n-layers" in capsys.readouterr().err


# -- parts -----------------------------------------------------------------------------------------


def test_ngram_losses_by_hand() -> None:
    train = np.array([[0, 1, 1, 2], [0, 1, 2, 1]])
    test = np.array([[0, 1, 3]])
    unigram = np.array([0, 4, 2, 0]) + 1  # predicted tokens only: 1 1 2, 1 2 1
    p = unigram / unigram.sum()
    after_0 = (2 + 1 * p[1]) / (2 + 1)  # 0 was followed twice, by one kind of token
    after_1 = (0 + 2 * p[3]) / (3 + 2)  # 1 was followed three times, by two kinds
    found = baselines(train, test, 4)
    assert found.unigram == pytest.approx(-(math.log(p[1]) + math.log(p[3])) / 2)
    assert found.bigram == pytest.approx(-(math.log(after_0) + math.log(after_1)) / 2)
    never_seen = baselines(train, np.array([[3, 3]]), 4)
    assert never_seen.bigram == pytest.approx(never_seen.unigram) == pytest.approx(-math.log(p[3]))


def test_the_learning_rate_rises_and_falls() -> None:
    config = PretrainConfig(n_tokens=256 * 32 * 100, warmup=0.1, lr=1.0, lr_floor=0.2)
    rates = [config.rate(step) for step in range(config.n_steps)]
    assert config.n_steps == 100
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.6) and rates[-1] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("shape", [GPT2Shape(activation="relu", tied=False), LlamaShape(), *PRESETS.values()])
def test_shapes_are_what_they_say(shape: GPT2Shape | LlamaShape) -> None:
    options: dict[str, Any] = {"vocab_size": 260, "context_length": 16, "end_of_text": 0}
    before = torch.random.get_rng_state()
    first = build_causal_lm(shape, seed=1, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, other = build_causal_lm(shape, seed=1, **options), build_causal_lm(shape, seed=2, **options)
    a, b, c = (torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    tokenizer = train_tokenizer(["a b c"], 260)
    model = lm.wrap(first, tokenizer, "new")
    d_mlp = shape.d_mlp or {"gpt2": 1024, "llama": 704}[shape.kind]
    assert (model.n_layers, model.d_model, model.width("mlp_act.0")) == (shape.n_layers, shape.d_model, d_mlp)
    tied = first.get_input_embeddings().weight is first.get_output_embeddings().weight
    assert tied == shape.tied


def test_stop_requests_are_seen_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokenizer": "gpt2", "vocab_size": 500},
            r"vocab_size must be left out with an existing tokenizer, got gpt2",
        ),
        ({"batch_rows": 8, "micro_rows": 3}, r"micro_rows must divide batch_rows=8, got 3\. Change one"),
        (
            {"context_length": 16, "sample_tokens": 64},
            r"sample_tokens must be <= context_length - 8 = 8, got 64",
        ),
        ({"architecture": {"kind": "gpt2", "n_heads": 3}}, r"n_heads must divide d_model=256, got 3"),
        (
            {"architecture": {"kind": "llama", "d_model": 12, "n_heads": 4}},
            r"must be even for rotary positions, got 3",
        ),
        ({"architecture": {"kind": "llama", "n_kv_heads": 3}}, r"n_kv_heads must divide n_heads=4, got 3"),
        ({"architecture": {"kind": "llama", "activation": "relu"}}, r"activation must be a known option"),
        ({"vocab_size": 100}, r"vocab_size must be >= 257, got 100. Raise it."),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.build(options)


def test_bad_input_leaves_nothing_finished(corpus: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("A short text. " * 8)
    with pytest.raises(TextError, match=r"got .*\. .*(context_length|Give more text|held)"):
        pretrain(small(one, tmp_path / "a"))
    with pytest.raises(ModelError, match=r"a tokenizer must be a folder or a name .*nowhere.*Check the name"):
        pretrain(small(corpus, tmp_path / "b", tokenizer=str(tmp_path / "nowhere"), vocab_size=None))
    with pytest.raises(ConfigError, match=r"vocab_size must be >= 257 .*, got 200\. Raise"):
        train_tokenizer(["a"], 200)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
