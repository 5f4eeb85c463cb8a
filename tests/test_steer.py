"""Steering on a tiny model: doses that do what arithmetic says, that change nothing at 0, and that break it."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import WORDS, D, identity, make_lm, sites
from test_report import Page

from sememe import artifact
from sememe.continuations import perplexity
from sememe.dictionaries.base import Dictionary
from sememe.downstream import prompt_ids
from sememe.errors import ActivationError, ConfigError, MismatchError
from sememe.lm import LanguageModel
from sememe.steer import SteerConfig, steer
from sememe.steer.lexical import train_lexical
from sememe.steer.measures import Measures
from sememe.steer.pushes import latents_push, like, pushing, random_push, steered
from sememe.steer.verb import write
from sememe.text import TextConfig, TokenPolicy

HOOKPOINT = "resid_post.2"
POLICY = TokenPolicy(context_length=24)
TARGET = " river"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("steer")
    rng = random.Random(0)
    text = [" ".join(rng.choice(WORDS) for _ in range(40)) + "." for _ in range(60)]
    (made / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in text), encoding="utf-8")
    kinds = {"wet": ["river", "under", "old", "the"], "dry": ["stone", "over", "red", "a"]}
    lines = [
        {"text": " ".join(rng.choices(words, k=8)), "label": kind}
        for kind, words in kinds.items()
        for _ in range(24)
    ]
    (made / "labelled.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def lm(place: Path) -> LanguageModel:
    return make_lm([json.loads(line)["text"] for line in (place / "text.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def dictionary(lm: LanguageModel, place: Path) -> Dictionary:
    """Latent 0 writes what raises the target's logit, latent 1 reads and writes coordinate 1; the last never fires."""
    made = identity(sites(lm, HOOKPOINT))
    (target,) = lm.tokenizer(TARGET).input_ids
    with torch.no_grad():
        unembedding = lm.embeddings()[1][target]
        made.W_dec[0] = unembedding / unembedding.norm()
        made.W_enc[:, 2 * D - 1] = 0.0
        made.b_enc[2 * D - 1] = -1.0
    made.save(place / "dictionary", torch.randn(16, D), extra={"policy": POLICY.resolved()})
    return made


def config_for(place: Path, **changes: Any) -> SteerConfig:
    base: dict[str, Any] = {
        "dictionary": place / "dictionary",
        "out": place / "steering",
        "model": {"model": "unused"},
        "latents": (0,),
        "strengths": (-1.0, 0.0, 1.0, 4.0),
        "prompts": ("the cat", "a dog sees"),
        "n_samples": 2,
        "n_random": 1,
        "new_tokens": 6,
        "text": TextConfig(corpus=(str(place / "text.jsonl"),), heldout_fraction=0.5),
        "n_tokens": 480,
        "n_bootstrap": 20,
        "target_tokens": (TARGET,),
    }
    return SteerConfig.build({**base, **changes})


# -- doses -------------------------------------------------------------------------------------------


def test_styles_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(50, 8, generator=generator), torch.randn(8, generator=generator)
    size, unit = v.norm(), v / v.norm()
    across = torch.eye(8) - torch.outer(unit, unit)
    for dose in (-2.0, 0.0, 3.0):
        assert torch.equal(steered(x, v, dose, "add"), x + dose * v)
        new = steered(x, v, dose, "orthogonal")
        torch.testing.assert_close(new @ unit, (dose * size).expand(50), rtol=0, atol=1e-4)
        torch.testing.assert_close(new @ across, x @ across, rtol=0, atol=1e-5)
        capped = steered(x, v, dose, "cap")
        along = x @ unit
        expected = (
            along if dose == 0 else along.clamp(min=dose * size) if dose > 0 else along.clamp(max=dose * size)
        )
        torch.testing.assert_close(capped @ unit, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(capped @ across, x @ across, rtol=0, atol=1e-5)
    assert torch.equal(steered(x, v, 0.0, "cap"), x)


def test_other_directions_are_as_long_as_the_latents(dictionary: Dictionary) -> None:
    own = latents_push(dictionary, [(0, 2.0), (1, 3.0)])
    torch.testing.assert_close(own.vector, 2 * dictionary.W_dec[0] + 3 * dictionary.W_dec[1])
    drawn = [random_push(own, draw, 0) for draw in range(3)]
    for push in (*drawn, like(torch.ones(D), own, "difference in means")):
        assert float(push.vector.norm()) == pytest.approx(float(own.vector.norm()), rel=1e-6)
    assert not torch.equal(drawn[0].vector, drawn[1].vector)
    assert torch.equal(drawn[2].vector, random_push(own, 2, 0).vector)


def test_clamping_sets_the_latents_activation(lm: LanguageModel, dictionary: Dictionary) -> None:
    push = latents_push(dictionary, [(1, 2.0)])
    ids = prompt_ids(lm, "the old cat walks", False)
    with torch.no_grad(), pushing(lm, dictionary, push, 1.5, "clamp"):
        x = lm.capture(ids, HOOKPOINT)[HOOKPOINT][0]
        plain = lm.capture(ids, "resid_post.1")
    with torch.no_grad():
        before = lm.capture(ids, HOOKPOINT)[HOOKPOINT][0]
        assert torch.equal(lm.capture(ids, "resid_post.1")["resid_post.1"], plain["resid_post.1"])
    old = before[:, 1].clamp(min=0)
    torch.testing.assert_close(x[:, 1], before[:, 1] + 3.0 - old, rtol=0, atol=1e-5)


def test_a_dose_of_nothing_changes_no_token_and_no_bit(
    place: Path, lm: LanguageModel, dictionary: Dictionary
) -> None:
    config = config_for(place, new_tokens=10)
    ids = prompt_ids(lm, "the cat", False)
    push = latents_push(dictionary, [(0, 2.0)])
    plain = write(lm, dictionary, ids, None, 0.0, config, seed=3)
    for style in ("add", "cap"):
        same = write(lm, dictionary, ids, push, 0.0, config.replace(style=style), seed=3)
        assert torch.equal(same.rows, plain.rows) and same.texts == plain.texts
        assert same.masses is not None and (same.masses == plain.masses).all()
    assert not torch.equal(write(lm, dictionary, ids, push, 4.0, config, seed=3).rows, plain.rows)
    assert not torch.equal(plain.rows[0], plain.rows[1]), "samples differ"


def test_steered_generation_with_a_cache_is_recomputation_without(
    place: Path, lm: LanguageModel, dictionary: Dictionary
) -> None:
    config = config_for(place, temperature=0.0, n_samples=4, new_tokens=10)
    ids = prompt_ids(lm, "the cat", False)
    push = random_push(latents_push(dictionary, [(0, 2.0)]), 0, 0)
    made = write(lm, dictionary, ids, push, 1.0, config)
    by_hand = ids
    for _ in range(10):
        with torch.no_grad(), pushing(lm, dictionary, push, 1.0, "add"):
            logits = lm.logits(lm.hidden(by_hand))[:, -1]
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made.rows, by_hand)


# -- the verb ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(place: Path, lm: LanguageModel, dictionary: Dictionary) -> artifact.Artifact:
    config = config_for(
        place,
        labelled=(place / "labelled.jsonl",),
        towards="wet",
        before="under the river",
        words=("cat", "river"),
        pattern="river|tree",
        strengths=(-1.0, 0.0, 1.0, 4.0, 1e37),
    )
    return steer(config, lm=lm)


def test_the_direction_of_a_token_raises_its_share_with_the_dose(done: artifact.Artifact) -> None:
    data = json.loads((done.path / "steering.json").read_text())
    arms = {arm["arm"]: arm["points"] for arm in data["arms"]}
    assert set(arms) == {"latents", "difference in means", "random direction"}
    told = [point["measures"]["tokens"]["value"] for point in arms["latents"][:4]]
    assert told == sorted(told) and told[-1] > 2 * told[1], told
    zero = arms["latents"][1]
    assert zero["strength"] == 0.0
    for name in ("perplexity", "measures"):
        assert zero[name] == data["unsteered"][name], "to the bit"
        assert arms["random direction"][1][name] == zero[name]
    assert [one["text"] for one in zero["examples"]] == [one["text"] for one in data["unsteered"]["examples"]]
    assert data["classifier"]["accuracy"] == 1.0 and data["looked_for"]["label"] == "wet"
    assert set(data["meanings"]) == {"latent", "tokens", "words", "pattern", "classifier"}
    assert data["before"]["text"] == "under the river" and data["before"]["perplexity"]["value"] > 0


def test_a_dose_that_breaks_the_model_is_marked(
    done: artifact.Artifact, place: Path, lm: LanguageModel
) -> None:
    data = json.loads((done.path / "steering.json").read_text())
    for arm in data["arms"]:
        *whole, last = arm["points"]
        assert last["strength"] == 1e37 and last["broken"].startswith("after 'the cat': NaN or infinity")
        assert not any(point["broken"] for point in whole)
    assert "Doses that broke the model" in (done.path / "steering.md").read_text()
    with pytest.raises(
        ActivationError,
        match=r"some dose must leave .* finite, got NaN or infinity at all of -1e\+37, 1e\+37",
    ):
        steer(config_for(place, out=place / "b", strengths=(-1e37, 0.0, 1e37), n_random=0), lm=lm)
    assert not (place / "b").exists()


def test_the_page_and_the_csv(done: artifact.Artifact) -> None:
    page = Page((done.path / "steering.html").read_text())
    assert page.loads == [] and "script" not in page.tags and page.tags.count("svg") == 2 * 5 + 1
    with (done.path / "steering.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 3 * 5
    broken = [row for row in rows if row["broken"]]
    assert len(broken) == 3 and all(row["perplexity"] == "" for row in broken)


def test_measures_are_sums_divided_once(place: Path, lm: LanguageModel, dictionary: Dictionary) -> None:
    config = config_for(place, words=("Cat", "river"), pattern="tree", before="old")
    ids = prompt_ids(lm, "the cat", False)
    made = write(lm, dictionary, ids, None, 0.0, config, whole=prompt_ids(lm, "under the cat", False))
    assert made.rows[0, : ids.shape[1]].tolist() == ids[0].tolist(), "what stood before is not read"
    texts = ["a cat, a category. River", "tree tree"]
    measures = Measures(config, lm, dictionary, [(1, 2.0)], None)
    found = measures.of(made._replace(texts=texts))
    assert found["words"][0].tolist() == [2, 0] and found["words"][1].tolist() == [5, 2]
    assert found["pattern"][0].tolist() == [0, 1] and found["pattern"][1].tolist() == [1, 1]
    with torch.no_grad():
        x = lm.capture(made.rows, HOOKPOINT)[HOOKPOINT][:, ids.shape[1] :]
    torch.testing.assert_close(
        torch.from_numpy(found["latent"][0]).float(),
        x[..., 1].clamp(min=0).sum(1) / 2.0,
        rtol=1e-4,
        atol=1e-4,
    )
    statistics = measures.statistics([found])
    assert statistics["measures"]["words"]["value"] == pytest.approx(2 / 7)
    one = measures.statistics([{name: (a[:1], b[:1]) for name, (a, b) in found.items()}])
    assert one["perplexity"]["value"] == pytest.approx(perplexity(lm, made.rows[:1], ids.shape[1]), rel=1e-4)


def test_a_bag_of_words_knows_its_label() -> None:
    texts = ["rain and sea", "dry sand", "sea and rain", "sand so dry"] * 6
    lexical = train_lexical(texts, [True, False] * 12)
    assert lexical.accuracy == 1.0
    wet, dry, neither = lexical.chances(["the sea, the rain", "dry sand", "nothing"])
    assert wet > 0.7 and dry < 0.3 and dry < neither < wet


def test_what_it_refuses(place: Path, lm: LanguageModel, dictionary: Dictionary) -> None:
    out = place / "refused"
    with pytest.raises(ConfigError, match=r"a latent must be in \[0, 63\], got 64\. Change --latents"):
        steer(config_for(place, out=out, latents=(64,)), lm=lm)
    with pytest.raises(
        ConfigError, match=r"must fire on the text, .*, got latent 63, never in 480 tokens\. Raise"
    ):
        steer(config_for(place, out=out, latents=(63,)), lm=lm)
    labelled = (place / "labelled.jsonl",)
    with pytest.raises(ConfigError, match=r"the label to steer to must be one .*, got 'icy'\. Known: "):
        steer(config_for(place, out=out, labelled=labelled, towards="icy"), lm=lm)
    with pytest.raises(MismatchError, match=r"the model must be the one the dictionary was trained on"):
        steer(config_for(place, out=out), lm=make_lm(["the cat sat"] * 9, seed=3))
    for changes, message in (
        ({"prompts": ("the", " ")}, r"prompts must not be empty, got \('the', ' '\)"),
        ({"prompts": ()}, r"prompts must be at least 1 long"),
        ({"strengths": (1.0, float("inf"))}, r"strengths.* must be a finite number"),
        ({"strengths": (1.0, 1.0)}, r"strengths must be different, got"),
        ({"latents": (1, 1)}, r"each latent must be named once"),
        ({"towards": "wet"}, r"towards must be left out when there are no labelled texts"),
        ({"pattern": "("}, r"pattern must be a regular expression, got '\('"),
        ({"temperature": 0.0}, r"n_samples must be left out when temperature is 0"),
        ({"before": ""}, r"before must not be empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_for(place, **changes)
    assert not out.exists()
