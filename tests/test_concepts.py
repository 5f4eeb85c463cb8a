"""Concepts end to end on a small model: labels read, probes above chance, nulls at it, errors that name the line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_world import WORDS, World, autoencoder, make_world, save
from test_report import Page

from sememe import artifact, dictionaries
from sememe.concepts import ConceptsConfig, concepts
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError, MismatchError, TextError
from sememe.labelled import pooled_rows, read_labelled
from sememe.store import open_store
from sememe.text import TokenPolicy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_world(tmp_path_factory.mktemp("concepts"))
    store = open_store(made.store)
    x = store.read(0, ("resid_post.1",)).activations["resid_post.1"].float()
    topk = dictionaries.build(TopKConfig(k=4, d_sae=48), 24, 24, autoencoder(made.lm))
    topk.initialise(x, x, torch.Generator().manual_seed(0))
    save(topk, made.place / "dictionary")
    yield made


def write(path: Path, n: int = 40, **changes: object) -> Path:
    """Sentences of two languages, and whether they are long, which has nothing to do with it."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(n * 4):
        language, long = ("english", "german")[number % 2], bool(number // 2 % 2)
        words = rng.choice(WORDS[language].split(), 14 if long else 7)
        lines.append(json.dumps({"text": " ".join(words), "label": language, "long": long, **changes}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config_for(world: World, out: Path, **changes: object) -> ConceptsConfig:
    options = {"dictionary": world.place / "dictionary", "out": out, "model": {"model": "unused"}}
    options |= {"ks": (1, 3), "n_ablated": (2, 8), "max_per_class": 40, "n_bootstrap": 200, "n_folds": 3}
    return ConceptsConfig.build({**options, **changes})


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> artifact.Artifact:
    place = tmp_path_factory.mktemp("done")
    labelled = write(place / "languages.jsonl")
    config = config_for(world, place / "c", labelled=(labelled,), spurious_field="long")
    return concepts(config, lm=world.lm)


def read(done: artifact.Artifact) -> dict:
    return json.loads((done.path / "concepts.json").read_text())


def test_probes_know_the_language_and_nulls_know_nothing(done: artifact.Artifact) -> None:
    data = read(done)
    means = data["mean_balanced_accuracy"]
    assert means["activations"]["dense"]["value"] > 0.8
    assert means["neurons"]["3"]["value"] > 0.6  # the dictionary is untrained
    for one in means["shuffled labels"].values():
        assert one["value"] == pytest.approx(0.5, abs=0.2)
    for by_k in means.values():
        for one in by_k.values():
            assert one["low"] <= one["value"] <= one["high"]
    (only,) = data["classes"].values()  # of two classes, one says all
    assert (
        only["n_with"] == only["n_without"] == 40 and len(only["probes"]["dictionary"]["3"]["latents"]) == 3
    )


def test_means_over_positions_are_those_of_a_slow_version(world: World) -> None:
    dictionary = dictionaries.load(world.place / "dictionary")
    texts = [
        "the cat sat on a mat while seven",
        "der Hund",
        "old ships sailed home and nobody knew why it rained",
    ]
    policy = TokenPolicy(context_length=8, drop_positions=2)
    assert dictionary.sites is not None
    for pooling in ("mean", "last"):
        for batch_rows in (1, 2, 16):
            pooled = pooled_rows(world.lm, dictionary, dictionary.sites, policy, texts, pooling, batch_rows)
            assert pooled.n_cut >= 1
            for i, text in enumerate(texts):
                ids = torch.tensor([world.lm.tokenizer(text)["input_ids"][:8]])
                rows = world.lm.capture(ids, ("resid_post.1",))["resid_post.1"][0, 2:].float()
                rows = rows[-1:] if pooling == "last" else rows
                dense = dictionary.encode(rows).to_dense()
                assert np.allclose(pooled.x[i], rows.mean(0), atol=1e-4)
                assert np.allclose(pooled.acts[i], dense.mean(0).detach(), atol=1e-3)


def test_spurious_removal_and_absorption_stand_beside_an_untrained_null(done: artifact.Artifact) -> None:
    data = read(done)
    assert set(data["spurious_removal"]) == {"dictionary", "untrained"}
    for arm in data["spurious_removal"].values():
        assert set(arm) == {"2", "8"}
        assert all(0 <= one["clean"]["value"] <= 1 for one in arm.values())
    (only,) = data["classes"].values()
    assert set(only["absorption"]) == {"dictionary", "untrained"}
    numbers = [
        only["absorption"][arm][name] for arm in only["absorption"] for name in ("full", "fraction", "f1")
    ]
    numbers += [
        one[name] for arm in data["spurious_removal"].values() for one in arm.values() for name in one
    ]
    for one in numbers:
        assert len(one["halvings"]) == 3
        if one["low"] is None:
            assert one["cause"], "what has no interval says why"
        else:
            assert one["low"] <= one["value"] <= one["high"]
    assert sum(one["low"] is not None for one in numbers) > len(numbers) / 2
    assert "targeted_perturbation" not in data  # needs three classes: with two, others are the same class


def test_the_page_and_the_csv(done: artifact.Artifact) -> None:
    page = Page((done.path / "concepts.html").read_text())
    assert page.loads == [] and "script" not in page.tags and page.tags.count("svg") == 2
    with (done.path / "concepts.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["arm"] for line in lines} == {
        "dictionary",
        "untrained",
        "neurons",
        "shuffled labels",
        "activations",
    }
    assert len(lines) == 4 * 2 + 1
    for line in lines:
        for name in ("accuracy", "balanced_accuracy", "auroc"):
            assert float(line[f"{name}_low"]) <= float(line[name]) <= float(line[f"{name}_high"])
    assert "Spurious removal" in (done.path / "concepts.md").read_text()


def test_three_classes_are_perturbed(world: World, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    kinds = {"english": WORDS["english"], "german": WORDS["german"], "numbers": "1 2 3 4 5 6 7 8 9 10 11 12"}
    lines = [
        json.dumps({"words": " ".join(rng.choice(kinds[kind].split(), 8)), "kind": kind})
        for kind in kinds
        for _ in range(44)
    ]
    lines += [json.dumps({"words": "a b c d e", "kind": "rare"})] * 3
    (tmp_path / "three.jsonl").write_text("\n".join(lines), encoding="utf-8")
    few = {"ks": (1,), "n_ablated": (2,), "max_per_class": 24, "n_bootstrap": 40}
    config = config_for(
        world,
        tmp_path / "c",
        labelled=(tmp_path / "three.jsonl",),
        text_field="words",
        label_field="kind",
        **few,
    )
    data = read(concepts(config, lm=world.lm))
    assert data["left_out"] == {"rare": 3} and set(data["classes"]) == set(kinds)
    for arm in data["targeted_perturbation"].values():
        for one in arm.values():
            assert one["score"]["value"] == pytest.approx(one["own"]["value"] - one["others"]["value"])
    again = concepts(config, lm=world.lm)
    assert again.fingerprint == artifact.load(tmp_path / "c").fingerprint
    with pytest.raises(MismatchError, match="the concepts at"):
        concepts(config.replace(ks=(2,)), lm=world.lm)


def test_first_letters_come_from_the_vocabulary(world: World, tmp_path: Path) -> None:
    with pytest.raises(
        TextError, match=r"at least two classes of 20 different texts or more"
    ):  # of 300 tokens
        concepts(config_for(world, tmp_path / "c", first_letter=True), lm=world.lm)
    from sememe.labelled import first_letters

    class Vocabulary:
        def __len__(self) -> int:
            return 70

        def decode(self, ids: list[int]) -> str:
            number = ids[0]
            letters = "abcdefghij"
            return (
                f" {'ab'[number % 2]}{letters[number % 10]}{letters[number // 10]}rd"
                if number < 66
                else "<x>"
            )

    found = first_letters(config_for(world, tmp_path / "c", first_letter=True), Vocabulary())
    assert set(found.classes) == {"a", "b"} and len(found.texts) == 66
    assert all(
        text.startswith(f"The word is {label}") for text, label in zip(found.texts, found.labels, strict=True)
    )


def test_every_letter_with_enough_words_is_asked_about(world: World, tmp_path: Path) -> None:
    from sememe.labelled import MAX_CLASSES, first_letters, read_labelled

    letters = "abcdefghijklmnopqrstuvwxyz"

    class Vocabulary:
        def __len__(self) -> int:
            return 26 * 20 - 1

        def decode(self, ids: list[int]) -> str:
            letter, number = letters[ids[0] % 26], ids[0] // 26
            return f" {letter}{letters[number]}rd"

    config = config_for(world, tmp_path / "c", first_letter=True)
    found = first_letters(config, Vocabulary())
    assert set(found.classes) == set(letters) - {"z"}, "z has 19"
    assert found.left_out == {"z": 19}
    assert len(first_letters(config.replace(max_classes=5), Vocabulary()).classes) == 5
    path = tmp_path / "many.jsonl"
    lines = [json.dumps({"text": f"text {i}", "label": letters[i % 26]}) for i in range(26 * 20)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert (
        len(read_labelled(config_for(world, tmp_path / "c", labelled=(path,))).classes) == MAX_CLASSES == 12
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "a b c"}',
            r"line 161 of .* must have a label in 'label', got none\. It has text: set label_field",
        ),
        ('{"text": "a b c", "label": NaN}', r"line 161 of .* must have a label in 'label', got nan"),
        ('{"text": "", "label": "x"}', r"line 161 of .* must have a text in 'text', got ''"),
        (
            '{"label": "x"}',
            r"line 161 of .* must have a text in 'text', got None\. It has label: set text_field",
        ),
        ('["text"]', r"line 161 of .* must be an object"),
        ('{"text"', r"line 161 of .* must be JSON"),
        ('{"text": " ", "label": "x"}', "must have a text"),
    ],
)
def test_bad_lines_are_named(world: World, tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl")
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    with pytest.raises(TextError, match=message):
        concepts(config_for(world, tmp_path / "c", labelled=(path,)), lm=world.lm)
    assert not (tmp_path / "c").exists()


def test_a_corpus_is_labelled_by_what_is_known_of_its_documents(world: World, tmp_path: Path) -> None:
    options = {"label_field": "language", "max_per_class": 500}
    asked = config_for(world, tmp_path / "c", corpus=(str(world.corpus),), **options)
    found = read_labelled(asked)
    same = read_labelled(config_for(world, tmp_path / "c", labelled=(world.corpus,), **options))
    assert sorted(zip(found.texts, found.labels, strict=True)) == sorted(
        zip(same.texts, same.labels, strict=True)
    )
    assert found.classes == ("english", "german")
    data = read(
        concepts(asked.replace(max_per_class=40, ks=(1,), n_ablated=(2,), n_bootstrap=20), lm=world.lm)
    )
    assert data["labels"] == [f"{world.corpus}: language"]
    assert data["mean_balanced_accuracy"]["activations"]["dense"]["value"] > 0.8


def test_texts_that_occur_again_are_not_known_again(world: World, tmp_path: Path) -> None:
    """Labels that were drawn: a probe that has seen a text in training would still tell them."""
    rng = np.random.default_rng(0)
    english = WORDS["english"].split()
    lines = [
        json.dumps({"text": " ".join(rng.choice(english, 8)), "label": "xy"[number % 2], "of": number // 2})
        for number in range(48)
    ]
    path = tmp_path / "again.jsonl"
    path.write_text("\n".join(lines * 3), encoding="utf-8")
    few = {"labelled": (path,), "ks": (1,), "n_ablated": (2,), "max_per_class": 72, "n_bootstrap": 20}
    data = read(concepts(config_for(world, tmp_path / "c", **few), lm=world.lm))
    assert data["n_texts"] == 144 and data["n_units"] == 48
    assert data["mean_balanced_accuracy"]["activations"]["dense"]["value"] < 0.62
    assert read_labelled(config_for(world, tmp_path / "c", **few), group_field="of").groups[:2] == ("0", "0")
    with pytest.raises(
        TextError, match=r"two classes of 20 different texts or more, got (x 10, y 10|y 10, x 10)"
    ):
        path.write_text("\n".join(lines[:20] * 3), encoding="utf-8")
        read_labelled(config_for(world, tmp_path / "c", **few))


def test_labels_that_cannot_be_asked_about(world: World, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", label="same")
    with pytest.raises(TextError, match=r"at least two classes of 20 different texts or more, got same 160"):
        concepts(config_for(world, tmp_path / "c", labelled=(one,)), lm=world.lm)
    with pytest.raises(TextError, match=r"labelled texts must be a JSONL file, got .*no\.jsonl"):
        concepts(config_for(world, tmp_path / "c", labelled=(tmp_path / "no.jsonl",)), lm=world.lm)
    three = tmp_path / "three.jsonl"
    lines = [{"text": f"a b c {i}", "label": "xyz"[i % 3], "long": i % 2 == 0} for i in range(90)]
    three.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(TextError, match=r"with spurious_field, label must have two classes, got x, y, z"):
        concepts(config_for(world, tmp_path / "c", labelled=(three,), spurious_field="long"), lm=world.lm)
    fine = write(tmp_path / "fine.jsonl")
    with pytest.raises(ConfigError, match=r"ks must be at most d_sae=48, got 49"):
        concepts(config_for(world, tmp_path / "c", labelled=(fine,), ks=(49,)), lm=world.lm)
    with pytest.raises(ConfigError, match=r"from files, from corpora, or be first letters, got none of them"):
        config_for(world, tmp_path / "c")
    with pytest.raises(ConfigError, match=r"or be first letters, got corpus and first_letter"):
        config_for(world, tmp_path / "c", first_letter=True, corpus=("default",))
    with pytest.raises(ConfigError, match=r"text_field must be left out when texts are a corpus's documents"):
        config_for(world, tmp_path / "c", corpus=("default",), text_field="x")
    with pytest.raises(
        TextError,
        match=r"documents of .*corpus.jsonl must have topic, got none, but language, source. Set --label-",
    ):
        read_labelled(config_for(world, tmp_path / "c", corpus=(str(world.corpus),), label_field="topic"))
    with pytest.raises(ConfigError, match=r"label_field must be left out with first_letter"):
        config_for(world, tmp_path / "c", first_letter=True, label_field="x")
    short = tmp_path / "short.jsonl"
    texts = [{"text": f"the cat sat {i}" if i else "a", "label": "xy"[i % 2]} for i in range(60)]
    short.write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    with pytest.raises(TextError, match=r"must have a token that the token policy keeps, got 'a'"):
        concepts(config_for(world, tmp_path / "c", labelled=(short,)), lm=world.lm)
    assert not (tmp_path / "c").exists()
