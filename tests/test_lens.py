"""Tuned lenses: better than the logit lens where the truth is known, exact resume, other people's files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import forked
import pytest
import torch
from atlas_fixture import D_MODEL, POLICY, World, make_world, save_dictionary, sites

from sememe import artifact
from sememe.atlas import open_atlas
from sememe.errors import (
    ActivationError,
    ConfigError,
    CorruptError,
    FormatError,
    HookpointError,
    MismatchError,
)
from sememe.interpret import interpret
from sememe.lens import LensConfig, lens
from sememe.lm import load
from sememe.tuned import Lens, Translator, open_lens, read_out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def config_of(world: World, out: str, **changes: object) -> LensConfig:
    options: dict[str, object] = {
        "out": world.root / out, "model": world.model, "text": world.text.replace(heldout_fraction=0.3),
        "policy": POLICY, "n_tokens": 3000, "n_heldout_tokens": 600, "batch_rows": 4, "learning_rate": 3e-3,
        "n_bootstrap": 50,
    }  # fmt: skip
    return LensConfig.build(options | changes)


@pytest.fixture(scope="module")
def made(world: World) -> Lens:
    return lens(config_of(world, "lens"), lm=world.lm)


def test_nearer_to_the_model_than_the_logit_lens(world: World, made: Lens) -> None:
    assert list(made.translators) == [0], "the last layer needs none"
    found = artifact.load(world.root / "lens", "lens").extra["measured"]["0"]
    assert found["tuned"]["kl"]["value"] < found["tuned"]["kl"]["high"] < found["logit"]["kl"]["low"]
    assert found["tuned"]["kl"]["value"] < 0.85 * found["logit"]["kl"]["value"]


def test_measured_as_ten_lines_of_torch_say(world: World, made: Lens) -> None:
    """KL and cross-entropy over predictions from kept positions of held-out rows, by the model's own logits."""
    from sememe.text import token_blocks

    config = config_of(world, "lens")
    kl, ce, n = {"tuned": 0.0, "logit": 0.0}, {"tuned": 0.0, "logit": 0.0}, 0
    one = made.translators[0]
    for block in token_blocks(config.text, world.lm.tokenizer, POLICY, split="heldout", n_tokens=600):
        ids = torch.from_numpy(block.ids).long()
        with torch.no_grad():
            out = world.lm.hf(ids, output_hidden_states=True)
            truth = torch.log_softmax(out.logits, -1)
            h = out.hidden_states[1]
            says = {}
            for name, x in (("tuned", h + h @ one.A + one.b), ("logit", h)):
                says[name] = torch.log_softmax(world.lm.hf.lm_head(world.lm.hf.model.norm(x)), -1)
        for row in range(ids.shape[0]):
            for p in range(ids.shape[1] - 1):
                if block.keep[row, p] and block.doc_ids[row, p] == block.doc_ids[row, p + 1]:
                    n += 1
                    for name in says:
                        t, q = truth[row, p], says[name][row, p]
                        kl[name] += float((t.exp() * (t - q)).sum())
                        ce[name] -= float(q[ids[row, p + 1]])
    found = artifact.load(world.root / "lens", "lens").extra["measured"]["0"]
    for name in kl:
        assert found[name]["kl"]["value"] == pytest.approx(kl[name] / n, rel=2e-3)
        assert found[name]["ce"]["value"] == pytest.approx(ce[name] / n, rel=1e-4)


def test_at_zero_it_is_the_logit_lens_and_at_the_last_layer_the_model(world: World) -> None:
    none = Lens({0: Translator(torch.zeros(D_MODEL, D_MODEL), torch.zeros(D_MODEL))})
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        out = world.lm.hf(ids, output_hidden_states=True)
        h = out.hidden_states[1]
        assert torch.equal(none.residual(h, 0), h)
        last = world.lm.capture(ids, ["resid_post.1"])["resid_post.1"]
        torch.testing.assert_close(read_out(world.lm, last, ids), out.logits)
    directions = torch.randn(3, D_MODEL)
    assert torch.equal(none.translate(directions, 0), directions)


def test_a_direction_is_translated_as_the_stream_is(made: Lens) -> None:
    h, d = torch.randn(2, D_MODEL), torch.randn(2, D_MODEL)
    moved = made.residual(h + d, 0) - made.residual(h, 0)
    torch.testing.assert_close(made.translate(d, 0), moved, atol=1e-5, rtol=1e-4)


KILLED = """
import os, signal, sys
from pathlib import Path
from sememe import lens as module
from sememe.lens import LensConfig, lens
step, calls = module._Training._step, [0]
def dying(self, *args):
    step(self, *args)
    calls[0] += 1
    if calls[0] == 7:
        os.kill(os.getpid(), signal.{number})
module._Training._step = dying
lens(LensConfig.model_validate_json(Path({config!r}).read_text()))
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_stopped_and_run_again_gives_the_same_bits(
    world: World, made: Lens, tmp_path: Path, number: str
) -> None:
    config = config_of(world, f"stopped-{number}", checkpoint_seconds=0 if number == "SIGKILL" else 60)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = KILLED.format(config=str(tmp_path / "config.json"), number=number)
    done = forked.run(script)
    assert done.returncode != 0 and not config.out.exists(), done.stderr
    assert number == "SIGINT" or done.returncode == -signal.SIGKILL
    kept = list((config.out.parent / f".{config.out.name}.partial").glob("checkpoint-*"))
    assert len(kept) == 1 and int(kept[0].name.split("-")[1]) == (7 if number == "SIGINT" else 6) * 4
    again = lens(config, lm=world.lm)
    assert torch.equal(again.translators[0].A, made.translators[0].A)
    assert torch.equal(again.translators[0].b, made.translators[0].b)


def test_an_atlas_reads_latents_through_it(world: World, made: Lens) -> None:
    found = interpret(world.config("atlas", n_tokens=2000, lens=world.root / "lens"), lm=world.lm)
    assert found.meta["lenses"] == ["logit", "tuned"]
    from sememe import dictionaries

    direction = dictionaries.load(world.dictionary).decoder_directions().detach()[5:6]
    logits = next(world.lm.direct_logits(direction + direction @ made.translators[0].A))[0]
    rows = found.query(
        "SELECT token, value FROM logits WHERE latent = 5 AND lens = 'tuned' AND sign = 1 ORDER BY rank"
    )
    assert [row["value"] for row in rows] == pytest.approx(logits.topk(6).values.tolist(), rel=1e-4)
    plain = found.query(
        "SELECT value FROM logits WHERE latent = 5 AND lens = 'logit' AND sign = 1 ORDER BY rank"
    )
    assert [row["value"] for row in plain] != [row["value"] for row in rows]
    found.close()
    assert open_atlas(world.root / "atlas").meta["lenses"] == ["logit", "tuned"]


def theirs(folder: Path, n_layers: int = 2, d: int = D_MODEL) -> tuple[Path, dict[str, torch.Tensor]]:
    """The tuned-lens package's layout: linear layers with weights the other way round, one for each layer's input."""
    folder.mkdir()
    state = {}
    for i in range(n_layers):
        state |= {f"{i}.weight": torch.randn(d, d), f"{i}.bias": torch.randn(d)}
    torch.save(state, folder / "params.pt")
    (folder / "config.json").write_text(json.dumps({"d_model": d, "num_hidden_layers": n_layers}))
    return folder, state


def test_a_lens_of_the_tuned_lens_package(world: World, tmp_path: Path) -> None:
    folder, state = theirs(tmp_path / "theirs")
    found = open_lens(folder, world.lm)
    h = torch.randn(4, D_MODEL)
    wanted = h + torch.nn.functional.linear(h, state["1.weight"], state["1.bias"])
    torch.testing.assert_close(found.residual(h, 0), wanted)
    atlas = interpret(world.config("theirs-atlas", n_tokens=2000, lens=folder), lm=world.lm)
    assert atlas.meta["lenses"] == ["logit", "tuned"]
    atlas.close()


@pytest.mark.parametrize(
    ("hookpoint", "n_layers", "message"),
    [
        ("resid_post.0", 1, r"for the layer, got layer 0 of none\. Train one with `sememe lens --layers 0`"),
        ("resid_pre.0", 2, r"for the layer, got layer -1 of 0\. Leave it out: lenses begin after layer 0"),
    ],
)
def test_a_lens_without_the_layer_is_refused_before_the_first_forward(
    world: World, tmp_path: Path, hookpoint: str, n_layers: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = theirs(tmp_path / "few", n_layers)
    dictionary = save_dictionary(tmp_path / "dictionary", sites(world.lm, hookpoint))

    def no_forward(*_: object) -> None:
        raise AssertionError("the model ran")

    world.lm.width(hookpoint)  # is looked up with a forward of one token, once
    monkeypatch.setattr(type(world.lm), "capture", no_forward)
    with pytest.raises(HookpointError, match=message):
        interpret(world.config(str(tmp_path / "x"), dictionaries=dictionary, lens=folder), lm=world.lm)
    assert not list(tmp_path.glob("*x*")), "nothing is left behind"


class _Evil:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (os.system, ("touch /tmp/sememe-should-not-exist",))


def test_what_cannot_be(world: World, made: Lens, tmp_path: Path) -> None:
    with pytest.raises(HookpointError, match=r"a lens reads the output of a layer in \[0, 0\] .* got 1"):
        lens(config_of(world, "x", layers=(1,)), lm=world.lm)
    with pytest.raises(
        ConfigError, match=r"a lens is measured on held-out documents, got heldout_fraction 0"
    ):
        lens(config_of(world, "x", text=world.text.replace(heldout_fraction=0)), lm=world.lm)
    with pytest.raises(HookpointError, match=r"must have a translator for the layer, got layer 3 of 0"):
        made.translate(torch.zeros(1, D_MODEL), 3)
    other = load(world.model.replace(randomise="layers"))
    with pytest.raises(MismatchError, match=r"the lens .* must be of .*randomised"):
        open_lens(world.root / "lens", other)
    broken = load(world.model)
    with torch.no_grad():
        broken.hf.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ActivationError, match=r"the lens's divergence from the model must be finite"):
        lens(config_of(world, "x"), lm=broken)
    narrow, _ = theirs(tmp_path / "narrow", d=8)
    with pytest.raises(MismatchError, match=r"must be 32 wide, like the residual stream .* got \(8, 8\)"):
        open_lens(narrow, world.lm)
    short, state = theirs(tmp_path / "short")
    torch.save(
        {name: value for name, value in state.items() if not name.startswith("1.")}, short / "params.pt"
    )
    with pytest.raises(
        FormatError, match=r"must have a translator for each of 2 layers, got none for layer 1"
    ):
        open_lens(short, world.lm)
    torch.save(state | {"1.bias": torch.full((D_MODEL,), torch.nan)}, short / "params.pt")
    with pytest.raises(ActivationError, match=r"must be finite, got NaN or infinity at layer 0"):
        open_lens(short, world.lm)
    torch.save({"0.weight": _Evil()}, short / "params.pt")
    with pytest.raises(CorruptError, match=r"must hold tensors and nothing else"):
        open_lens(short, world.lm)
    assert not Path("/tmp/sememe-should-not-exist").exists()
    (short / "config.json").unlink()
    with pytest.raises(FormatError, match=r"must have config\.json beside params\.pt"):
        open_lens(short, world.lm)
