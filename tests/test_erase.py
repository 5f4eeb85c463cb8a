"""A concept that one latent carries exactly, taken out: by that latent, LEACE and means it is gone, by others not."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited_models import WORDS, D, identity, make_lm, random_topk, sites
from test_report import Page

from sememe import artifact, metrics
from sememe.dictionaries.base import Dictionary
from sememe.edits import Intervention, LatentEdit
from sememe.erase import EraseConfig, LatentErasure, erase, ranking
from sememe.erase.chosen import alike
from sememe.erase.erasures import Arm, class_directions, leace, project_out, random_basis
from sememe.erase.passes import BASE, Passes, first_tokens
from sememe.erase.tasks import SENTENCES, read_task
from sememe.erase.verb import _fitting, _Split, _split_rows, make_arms, split
from sememe.errors import ConfigError, MismatchError, TextError
from sememe.labelled import LabelledConfig, pooled_rows, read_labelled
from sememe.lm import LanguageModel
from sememe.text import TextConfig, TokenPolicy, token_blocks

CONCEPT, ONE, OTHER = 3, " red", " old"
"""The coordinate of the embedding in which the two words differ, and in nothing else."""
POLICY = TokenPolicy(context_length=24)
OTHERS = [word for word in WORDS if word not in ("red", "old")]


def lines() -> list[dict[str, str]]:
    """Pairs of texts, equal but for the one word, which never stands first."""
    rng = random.Random(1)
    found = []
    for pair in range(60):
        words = [rng.choice(OTHERS) for _ in range(9)]
        places = sorted(rng.sample(range(2, 9), 2))
        for label, word in (("red", ONE), ("old", OTHER)):
            own = [word.strip() if i in places else w for i, w in enumerate(words)]
            found.append({"text": " ".join(own), "label": label, "pair": str(pair)})
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("erase")
    (made / "labelled.jsonl").write_text("\n".join(map(json.dumps, lines())), encoding="utf-8")
    rng = random.Random(2)
    neutral = [" ".join(rng.choice(WORDS) for _ in range(40)) + "." for _ in range(80)]
    (made / "neutral.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in neutral), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def lm(place: Path) -> LanguageModel:
    texts = [line["text"] for line in lines()] * 3
    made = make_lm(texts)
    embedding = made.hf.get_input_embeddings().weight
    one, other = (made.tokenizer(word, add_special_tokens=False).input_ids for word in (ONE, OTHER))
    assert len(one) == len(other) == 1
    with torch.no_grad():
        embedding[:, CONCEPT] = 0.0
        embedding[one] = embedding[other]
        embedding[one, CONCEPT] = 3.0
    return made


@pytest.fixture(scope="module")
def dictionary(lm: LanguageModel, place: Path) -> Dictionary:
    made = identity(sites(lm, "resid_pre.0"))
    made.save(place / "dictionary", torch.randn(16, D), extra={"policy": POLICY.resolved()})
    return made


def config_for(place: Path, **changes: Any) -> EraseConfig:
    base: dict[str, Any] = {
        "dictionary": place / "dictionary",
        "labelled": (place / "labelled.jsonl",),
        "group_field": "pair",
        "out": place / "erasure",
        "model": {"model": "unused"},
        "ns": (1, 2),
        "n_random": 1,
        "text": TextConfig(corpus=(str(place / "neutral.jsonl"),), heldout_fraction=0.5),
        "n_tokens": 240,
        "n_bootstrap": 50,
        "tokens_for": (" cat",),
        "tokens_against": (" dog",),
    }
    return EraseConfig.build({**base, **changes})


@pytest.fixture(scope="module")
def done(place: Path, lm: LanguageModel, dictionary: Dictionary) -> artifact.Artifact:
    return erase(config_for(place), lm=lm)


def arm_of(data: dict[str, Any], kind: str, n: int) -> dict[str, Any]:
    (found,) = [arm for arm in data["arms"] if (arm["arm"], arm["n"]) == (kind, n)]
    return found


def test_the_latent_that_carries_the_concept_takes_it_out_and_others_do_not(
    place: Path, lm: LanguageModel, done: artifact.Artifact
) -> None:
    data = json.loads((done.path / "erasure.json").read_text())
    assert data["base"]["probe"]["balanced_accuracy"]["value"] == 1.0 and data["chance"] == 0.5
    assert data["latents"][0]["latent"] == CONCEPT, "chosen among 64"
    assert data["latents"][0]["consistency"] > 0.9
    # a held-out pair is then the same twice: one is right and one is wrong, whatever the probe
    for kind, n in (("latents", 1), ("latents", 2), ("leace", 1), ("difference in means", 1)):
        arm = arm_of(data, kind, n)
        # the latent leaves pairs equal to the bit, the others up to rounding, of which a probe makes nothing but noise
        room = 1e-12 if kind == "latents" else 0.2
        for probe in ("refitted", "before"):
            for score in ("balanced_accuracy", "auroc"):
                assert arm[probe][score]["value"] == pytest.approx(0.5, abs=room), (kind, n, score)
        assert arm["answers"]["separation"]["value"] == pytest.approx(0, abs=1e-4)
        assert arm["cost"]["kl"]["value"] > 0
    for kind, n in (("random latents", 1), ("random latents", 2), ("random directions", 1)):
        arm = arm_of(data, kind, n)
        assert arm["refitted"]["balanced_accuracy"]["value"] > 0.9, (kind, n)
        assert CONCEPT not in arm["latents"]
    assert data["base"]["answers"]["separation"]["value"] > 0
    assert erase(config_for(place), lm=lm).fingerprint == done.fingerprint, "it was there"


def test_the_page_and_the_csv(done: artifact.Artifact) -> None:
    page = Page((done.path / "erasure.html").read_text())
    assert page.loads == [] and "script" not in page.tags and page.tags.count("svg") == 2
    with (done.path / "erasure.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 2 + 2 + 1
    assert all(
        float(row["cost_kl_low"]) <= float(row["cost_kl"]) <= float(row["cost_kl_high"]) for row in rows
    )
    assert "null: random latents" in (done.path / "erasure.md").read_text()


def test_nothing_held_out_is_looked_at_in_choosing_and_fitting(
    place: Path, lm: LanguageModel, dictionary: Dictionary
) -> None:
    config = _fitting(config_for(place), dictionary)
    labelled = read_labelled(config, group_field="pair")
    heldout = split(labelled, config.heldout_share)
    pairs = {
        side: {g for g, out in zip(labelled.groups, heldout, strict=True) if out == side}
        for side in (True, False)
    }
    assert pairs[True] and pairs[False] and not pairs[True] & pairs[False]
    assert dictionary.sites is not None
    pooled = pooled_rows(lm, dictionary, dictionary.sites, POLICY, labelled.texts, "mean", 16)
    texts = _split_rows(labelled, pooled, heldout)
    rng = np.random.default_rng(0)
    noise = texts._replace(x=texts.x.copy(), acts=texts.acts.copy(), labels=texts.labels.copy())
    noise.x[heldout] = rng.normal(size=noise.x[heldout].shape) * 100
    noise.acts[heldout] = rng.random(noise.acts[heldout].shape) * 100
    noise.labels[heldout] = 1 - noise.labels[heldout]
    (ranks, arms), (others, same) = (make_arms(config, dictionary, one) for one in (texts, noise))
    assert np.array_equal(ranks.order, others.order) and np.array_equal(ranks.score, others.score)
    rows, acts = torch.from_numpy(texts.x), torch.from_numpy(texts.acts)
    for arm, other in zip(arms, same, strict=True):
        assert arm.erasure.latents == other.erasure.latents
        own = acts[:, list(arm.erasure.latents)]
        assert torch.equal(arm.erasure.rows(rows, own), other.erasure.rows(rows, own)), arm.name


def test_leace_is_the_packages_and_directions_are_gone_exactly() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    x = torch.from_numpy(rng.normal(size=(120, 12)) + 2 * np.eye(3, 12)[labels] @ rng.normal(size=(12, 12)))
    nothing = torch.zeros(120, 0)
    made = leace(x, labels)  # the first import warns, and is silenced there
    from concept_erasure import LeaceEraser

    expected = LeaceEraser.fit(x, torch.nn.functional.one_hot(torch.from_numpy(labels)).double())(x)
    torch.testing.assert_close(made.rows(x, nothing), expected, rtol=1e-10, atol=1e-10)
    basis = class_directions(x, labels)
    assert basis.shape == (2, 12)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=torch.float64))
    centre = x.mean(0)
    left = project_out(basis, centre).rows(x, nothing)
    torch.testing.assert_close(left @ basis.T, (basis @ centre).expand(120, 2), rtol=0, atol=1e-12)
    across = torch.eye(12, dtype=torch.float64) - basis.T @ basis
    torch.testing.assert_close(left @ across, x @ across, rtol=0, atol=1e-12)
    means = torch.stack([left[torch.from_numpy(labels == c)].mean(0) for c in range(3)])
    torch.testing.assert_close(means, means.mean(0).expand(3, 12), rtol=0, atol=1e-12)
    drawn = random_basis(2, 12, 0)
    torch.testing.assert_close(drawn @ drawn.T, torch.eye(2, dtype=torch.float64))


def test_latents_are_ranked_as_the_definition_says() -> None:
    acts = np.array([[1.0, 0, 0, 5], [1, 0, 0, 0], [0, 9, 0, 5], [0, 0, 0, 0]], dtype=np.float32)
    found = ranking(acts, np.array([0, 0, 1, 1]), np.array([2.0, 1, 1, 1], dtype=np.float32))
    # latent 0: means 1 and 0, variance 1/4, no spread; latent 1: means 0 and 4.5, spread 0 and 20.25
    assert found.between == pytest.approx([0.25 * 4, 4.5**2 / 4, 0, 0])
    assert found.consistency == pytest.approx([1, 5.0625 / (5.0625 + 10.125), 0, 0])
    assert found.score == pytest.approx([1, 5.0625 / 3, 0, 0])
    assert found.order.tolist() == [1, 0, 2, 3] and found.density.tolist() == [0.5, 0.25, 0, 0.5]
    density = np.linspace(0, 1, 100)
    drawn = alike((50, 51), density, np.random.default_rng(0))
    assert len(set(drawn)) == 2 and not set(drawn) & {50, 51} and all(40 <= one <= 61 for one in drawn)
    assert alike((0, 1), density[:3], np.random.default_rng(0)) == (2,), "there is one other"


def test_cost_and_answers_are_those_of_whole_forwards(place: Path, lm: LanguageModel) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1", max_norm=20.0))
    latents = (5, 9)
    directions = dictionary.decoder_directions().detach()[list(latents)]
    arm = Arm("latents", 2, None, LatentErasure(latents, torch.zeros(2), directions))
    assert dictionary.sites is not None
    passes = Passes(lm, dictionary, dictionary.sites, POLICY, [arm])
    config = config_for(place, batch_rows=3)
    neutral = passes.neutral(config)
    kl, increase, n = 0.0, 0.0, 0
    edit = LatentEdit(latents=latents)
    with torch.inference_mode():
        for block in token_blocks(config.text, lm.tokenizer, POLICY, split="heldout", n_tokens=240):
            ids, keep = torch.from_numpy(block.ids).long(), torch.from_numpy(block.keep)
            plain = lm.logits(lm.hidden(ids)).log_softmax(-1)
            with Intervention(dictionary, [edit], keep=keep).on(lm):
                edited = lm.hidden(ids)
            after = lm.logits(edited).log_softmax(-1)
            here = keep[:, :-1]
            kl += float((plain.exp() * (plain - after)).sum(-1)[:, :-1][here].sum())
            losses = (plain - after)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            increase += float(losses[here].sum())
            n += int(here.sum())
        found = neutral.loss.compute(arm.name)
        assert (
            neutral.n_predictions == n
            and found["kl"].value == pytest.approx(kl / n, abs=1e-5)
            and kl / n > 1e-4
        )
        assert found["ce_increase"].value == pytest.approx(increase / n, abs=1e-5)
        text = "the cat sees a small stone and"
        sides = first_tokens(lm, (" cat", " tree"), (" dog",))
        answers = passes.answers([text, "a dog"], *sides, batch_rows=4)
        ids = torch.tensor([lm.tokenizer(text).input_ids])
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[:, 0] = False
        for name, edits in ((BASE, []), (arm.name, [edit])):
            with Intervention(
                dictionary, edits or [LatentEdit(latents=(0,), how="scale", value=1.0)], keep=keep
            ).on(lm):
                logits = lm.logits(lm.hidden(ids))[0, -1]
            expected = logits[list(sides[0])].logsumexp(0) - logits[list(sides[1])].logsumexp(0)
            assert answers[name][0] == pytest.approx(float(expected), abs=1e-4)


def test_several_classes_have_a_mean_projection_and_scores_by_hand() -> None:
    answers = np.array([[2.0, 1, 0], [0, 3, 1], [1, 0, 5], [4, 0, 1], [0, 1, 0.5], [0, 2, 1]])
    labels = np.array([0, 1, 2, 0, 2, 1])
    found = metrics.class_scores(answers, labels, n_bootstrap=0)
    assert found["balanced_accuracy"].value == pytest.approx((1 + 1 + 0.5) / 3)
    # class 2 has 5 and 0.5 against 0, 1, 1, 1: 5 of 8 pairs are in order; of the other classes all are
    assert found["auroc"].value == pytest.approx((1 + 1 + 5 / 8) / 3)
    drawn = metrics.class_scores(answers, labels, np.array([0, 1, 2, 0, 2, 1]), n_bootstrap=200)
    assert drawn["balanced_accuracy"].cause == "some draws of texts hold none of a class"
    right = metrics.class_scores(
        np.eye(3)[np.repeat([0, 1, 2], 20)], np.repeat([0, 1, 2], 20), n_bootstrap=50
    )
    assert right["balanced_accuracy"].value == 1.0 and right["balanced_accuracy"].low == pytest.approx(
        0.025 ** (1 / 60)
    )


def test_the_built_in_tasks(lm: LanguageModel) -> None:
    for task in ("names", "occupations"):
        found = read_task(LabelledConfig(), task)
        assert found.classes == ("he", "she") and not found.left_out
        heldout = split(found, 0.3)
        sides = [
            {g for g, out in zip(found.groups, heldout, strict=True) if out == side} for side in (True, False)
        ]
        assert all(len(side) > 8 for side in sides) and not sides[0] & sides[1]
        assert all(text[0].isupper() and not text.endswith(" ") for text in found.texts)
        assert len(set(found.texts)) == len(found.texts) <= 400
    assert all("{who}" in sentence for sentence in SENTENCES)


def test_what_it_refuses(place: Path, lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a latent must be in \[0, 63\], got 64\. Change --latents"):
        erase(config_for(place, out=tmp_path / "e", latents=(64,)), lm=lm)
    with pytest.raises(ConfigError, match=r"ns must be at most 64, d_sae=64, got 65\. Lower it"):
        erase(config_for(place, out=tmp_path / "e", ns=(1, 65)), lm=lm)
    with pytest.raises(ConfigError, match=r"ns must be at most 1, the latents named, got 2"):
        erase(config_for(place, out=tmp_path / "e", latents=(3,)), lm=lm)
    with pytest.raises(TextError, match=r"10 texts to choose on and 10 held out, got \d+ and \d of red"):
        erase(config_for(place, out=tmp_path / "e", heldout_share=0.02), lm=lm)
    with pytest.raises(MismatchError, match=r"the model must be the one the dictionary was trained on"):
        erase(config_for(place, out=tmp_path / "e"), lm=make_lm(["the cat sat"] * 9, seed=3))
    with pytest.raises(ConfigError, match=r"must begin with different tokens, got ' cat'"):
        erase(config_for(place, out=tmp_path / "e", tokens_against=(" cat",)), lm=lm)
    with pytest.raises(ConfigError, match=r"from files, from corpora, or from a task, got labelled and task"):
        config_for(place, task="names")
    with pytest.raises(ConfigError, match=r"tokens_for and tokens_against must go together, got 1 and 0"):
        config_for(place, tokens_against=())
    with pytest.raises(ConfigError, match=r"ns must be growing numbers of at least 1, got \(2, 1\)"):
        config_for(place, ns=(2, 1))
    assert not (tmp_path / "e").exists()


def test_of_several_classes_all_means_are_taken_out(place: Path, dictionary: Dictionary) -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 30)
    x = rng.normal(size=(90, D)) + 3 * np.eye(3, D)[labels]
    acts = np.concatenate([x.clip(min=0), (-x).clip(min=0)], axis=1).astype(np.float32)
    texts = _Split(x, acts, labels, np.arange(90), np.arange(90) >= 60)
    ranks, arms = make_arms(config_for(place, ns=(1, 3)), dictionary, texts)
    assert set(ranks.order[:3].tolist()) == {0, 1, 2}
    assert [(arm.kind, arm.n) for arm in arms if arm.draw is None] == [
        ("latents", 1),
        ("latents", 3),
        ("leace", 2),
        ("difference in means", 1),
        ("mean projection", 2),
    ]
    for arm in arms:
        if arm.n == 2 and arm.draw is None:
            rows = arm.erasure.rows(torch.from_numpy(x[:60]), torch.zeros(60, 0))
            means = torch.stack([rows[torch.from_numpy(labels[:60] == c)].mean(0) for c in range(3)])
            torch.testing.assert_close(means, means.mean(0).expand(3, D), rtol=0, atol=1e-6)
