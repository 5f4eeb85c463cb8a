"""Dictionaries spliced in at several hookpoints at once: each reads what those below it left."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluate_world import POLICY, World, autoencoder, identity, make_world, save, text_config, zeros

from sememe import dictionaries, text
from sememe.compare import CompareConfig, compare
from sememe.dictionaries.base import Sites
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.measure import check_together


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_world(tmp_path_factory.mktemp("together"))
    ids = torch.arange(200).view(10, 20)
    x = made.lm.capture(ids, ["resid_post.1"])["resid_post.1"].flatten(0, 1).float()
    topk = dictionaries.build(TopKConfig(k=4, d_sae=48), 24, 24, autoencoder(made.lm))
    topk.initialise(x, x, torch.Generator().manual_seed(0))
    save(topk, made.place / "topk")
    for layer in (1, 2):
        identity(made.lm, made.place / f"identity-{layer}", autoencoder(made.lm, f"resid_post.{layer}"))
    zeros(made.lm, made.place / "zeros", autoencoder(made.lm, "mlp_out.2"))
    across = Sites(
        inputs=autoencoder(made.lm, "mlp_in.2").inputs, outputs=autoencoder(made.lm, "mlp_out.2").outputs
    )
    zeros(made.lm, made.place / "transcoder", across)
    yield made


def measured(world: World, out: Path, *names: str, **changes: object) -> dict:
    options = {
        "dictionaries": tuple(world.place / name for name in names),
        "out": out,
        "model": {"model": "unused"},
        "text": text_config(world.corpus),
        "n_tokens": 1200,
        "n_fit_rows": 500,
        "nulls": (),
        "together": True,
    }
    done = compare(CompareConfig.build({**options, **changes}), lm=world.lm)
    return json.loads((done.path / "comparison.json").read_text())


def held_out(world: World) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of ids, and which positions the policy keeps."""
    blocks = text.token_blocks(
        text_config(world.corpus), world.lm.tokenizer, POLICY, split="heldout", n_tokens=1200, block_rows=64
    )
    for block in blocks:
        assert block.attention_mask.all()
        yield torch.from_numpy(block.ids).long(), torch.from_numpy(block.keep)


def test_identities_change_nothing(world, tmp_path):
    found = measured(world, tmp_path / "c", "identity-1", "identity-2")["together"]
    assert found["hookpoints"] == ["resid_post.1", "resid_post.2"]
    assert found["metrics"]["ce_increase"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["metrics"]["ce_recovered_mean"]["value"] == pytest.approx(1, abs=1e-5)


def test_an_upper_dictionary_reads_what_the_lower_one_left(world, tmp_path):
    """The identity above a poor dictionary must not mend it, as it would if it read the unedited model."""
    data = measured(world, tmp_path / "c", "topk", "identity-2")
    alone = next(row for row in data["rows"] if row["name"] == "topk")["metrics"]
    together = data["together"]["metrics"]
    assert abs(alone["ce_increase"]["value"]) > 1e-3 and alone["kl"]["value"] > 1e-3
    for name in ("ce_increase", "kl", "perplexity"):
        assert together[name]["value"] == pytest.approx(alone[name]["value"], rel=1e-4)
        assert together[name]["low"] == pytest.approx(alone[name]["low"], rel=1e-3)


@pytest.mark.parametrize("upper", ["zeros", "transcoder"])
def test_it_is_the_model_with_both_edits(world, tmp_path, upper):
    data = measured(world, tmp_path / "c", "topk", upper)["together"]
    lower = dictionaries.load(world.place / "topk")
    total = base = n = 0.0
    for ids, keep in held_out(world):
        edits = {
            "resid_post.1": lambda x, keep=keep: torch.where(
                keep[..., None], lower(x.flatten(0, 1).float()).view(x.shape), x
            ),
            "mlp_out.2": lambda x, keep=keep: torch.where(keep[..., None], torch.zeros_like(x), x),
        }
        for which in (edits, {}):
            with torch.inference_mode(), world.lm.edit(which):
                logits = world.lm.logits(world.lm.hidden(ids))
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none"
            )
            loss = float(loss[keep[:, :-1].flatten()].sum())
            total, base = (total + loss, base) if which else (total, base + loss)
        n += int(keep[:, :-1].sum())
    assert data["metrics"]["ce"]["value"] == pytest.approx(total / n, rel=1e-5)
    assert data["ablations"]["base"]["value"] == pytest.approx(base / n, rel=1e-5)


def test_zeros_everywhere_recover_nothing_of_zero_ablation(world, tmp_path):
    zeros(world.lm, tmp_path / "nothing", autoencoder(world.lm))
    data = measured(world, tmp_path / "c", dictionaries=(world.place / "zeros", tmp_path / "nothing"))
    assert data["together"]["metrics"]["ce_recovered_zero"]["value"] == pytest.approx(0, abs=1e-5)
    page = (tmp_path / "c" / "comparison.html").read_text()
    assert "All spliced in at once" in page and "At mlp_out.2, resid_post.1" in page


def test_without_it_nothing_is_said_of_it(world, tmp_path):
    assert measured(world, tmp_path / "c", "topk", "identity-2", together=False)["together"] is None


def test_what_cannot_be_spliced_together_says_why(world, tmp_path):
    with pytest.raises(
        ConfigError, match=r"must write to different hookpoints, got resid_post.1 of topk and of identity-1"
    ):
        measured(world, tmp_path / "c", "topk", "identity-1")
    with pytest.raises(ConfigError, match=r"together must be left out with directions_only"):
        measured(world, tmp_path / "c", "topk", "identity-2", directions_only=True)
    one = autoencoder(world.lm)
    two = Sites(inputs=one.inputs, outputs=(*one.outputs, one.outputs[0].replace(start=24, stop=48)))
    with pytest.raises(
        ConfigError, match=r"read and write one hookpoint each, got b, which has 1 inputs and 2 out"
    ):
        check_together({"a": one, "b": two})
    with pytest.raises(ConfigError, match=r"together must be asked of two dictionaries or more, got 1"):
        check_together({"a": one})
    assert not (tmp_path / "c").exists()


@pytest.mark.slow  # three whole comparisons
def test_the_order_of_names_does_not_matter_to_who_reads_what(world, tmp_path):
    """A transcoder reads what a dictionary at its input left, whichever is named first."""
    lm = world.lm
    below = dictionaries.build(TopKConfig(k=4, d_sae=48), 24, 24, autoencoder(lm, "mlp_in.2"))
    across = Sites(inputs=autoencoder(lm, "mlp_in.2").inputs, outputs=autoencoder(lm, "mlp_out.2").outputs)
    above = dictionaries.build(TopKConfig(k=4, d_sae=48), 24, 24, across)
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(200, 24, generator=generator), torch.randn(200, 24, generator=generator)
    below.initialise(x, x, torch.Generator().manual_seed(1))
    above.initialise(x, target, torch.Generator().manual_seed(2))
    places = [save(below, tmp_path / "below"), save(above, tmp_path / "above")]
    found = [
        measured(world, tmp_path / f"c{number}", dictionaries=tuple(order))["together"]["metrics"]
        for number, order in enumerate((places, places[::-1]))
    ]
    for name in ("ce_increase", "kl"):
        assert found[0][name]["value"] == pytest.approx(found[1][name]["value"], abs=1e-6)
    zeros(lm, tmp_path / "nothing", autoencoder(lm, "mlp_in.2"))
    with_zeros = measured(world, tmp_path / "z", dictionaries=(tmp_path / "nothing", places[1]))
    assert with_zeros["together"]["metrics"]["kl"]["value"] != pytest.approx(
        found[0]["kl"]["value"], abs=1e-4
    )
