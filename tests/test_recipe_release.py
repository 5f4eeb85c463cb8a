"""A recipe to its very end: two layers trained, measured, traced, patched, published, and read back by id over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, point_at, serving
from small_world import write_corpus, write_model

from sememe import artifact, dictionaries
from sememe.errors import ConfigError
from sememe.formats import hub as ids
from sememe.publish import PublishConfig, publish
from sememe.recipe import read_recipe, stages
from sememe.run import run

# how the hub's client sends large files is its own business
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RECIPE = """
name = "tiny"
[model]
model = "{place}/model"
dtype = "float32"
[text]
corpus = ["{place}/corpus.jsonl"]
heldout_fraction = 0.3
[policy]
context_length = 32
[harvest]
hookpoints = ["resid_post.0", "resid_post.1", "mlp_in.1", "mlp_out.1"]
n_tokens = 3000
batch_rows = 8
[train]
batch_size = 64
[train.architecture]
kind = "topk"
d_sae = 48
k = 4
[train.resid.architecture]
[train.resid.sweep]
inputs = ["resid_post.0", "resid_post.1"]
[train.transcoder]
inputs = ["mlp_in.1"]
outputs = ["mlp_out.1"]
architecture = {{ k = 6 }}
[evaluate]
dictionaries = ["resid"]
n_tokens = 800
n_fit_rows = 400
n_bootstrap = 20
nulls = []
[trace]
dictionaries = ["resid"]
prompts = ["the cat sat on a mat"]
metric = "loss"
ablation = "zero"
n_steps = 2
max_nodes = 8
max_edges = 8
n_checked = 2
n_checked_random = 0
n_checked_edges = 2
n_random = 0
[circuit]
dictionaries = ["transcoder"]
prompt = "the cat sat on"
n_logits = 2
n_latents = 8
n_checked = 2
[patch.own]
dictionaries = ["resid/resid_post.1"]
pairs = "{place}/pairs.jsonl"
orders = ["attribution"]
baselines = ["pca"]
reference = 4
n_fit_rows = 200
n_bootstrap = 20
[publish]
title = "Two layers of a tiny model"
licence = "mit"
[expected]
title = "A circuit"
[[expected.tables]]
title = "How few are patched"
file = "patch/own/patch.json"
columns = [
    {{ name = "candidates", value = "arms/name={{at}}/n_candidates" }},
    {{ name = "least divergence", value = "arms/name={{at}}/orders/attribution/least/kl" }},
]
rows = [{{ name = "dictionary", at = "resid_post.1" }}, {{ name = "PCA", at = "pca" }}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("release")
    write_corpus(place / "corpus.jsonl")
    write_model(place / "model")
    pairs = [{"clean": f"{a} + 10", "corrupted": f"{b} + 10"} for a, b in ("xz", "qw")]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (place / "tiny.toml").write_text(RECIPE.format(place=place))
    return place


@pytest.fixture(scope="module")
def made(place: Path) -> list[Any]:
    return run(place / "tiny.toml", out=place / "out")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as server:
        point_at(monkeypatch, server.url, cache=tmp_path / "hub")
        monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
        yield server


def test_the_stages_of_a_recipe_that_ends_in_a_release(place: Path, made: list[Any]) -> None:
    labels = ["harvest", "train resid", "train transcoder", "evaluate resid/resid_post.0"]
    labels += ["evaluate resid/resid_post.1", "circuit", "patch own", "trace", "publish", "results"]
    assert [result.stage for result in made] == labels
    assert all(result.reused for result in run(place / "tiny.toml", out=place / "out"))
    graph = json.loads((place / "out" / "circuit" / "graph.json").read_text())
    assert graph["nodes"] and artifact.load(place / "out" / "trace").extra["checks"]
    (table,) = json.loads((place / "out" / "results" / "results.json").read_text())["tables"]
    for row in table["rows"]:
        n_candidates, least = (cell["value"] for cell in row["here"])
        assert n_candidates > 0 and 0 <= least < 10 and row["here"][1]["low"] <= least


def test_the_release_has_a_table_of_all_layers_densities_and_a_licence(place: Path, made: list[Any]) -> None:
    folder = place / "out" / "release"
    artifact.load(folder, "release").verify()
    card = (folder / "README.md").read_text()
    assert "# Two layers of a tiny model" in card and 'license: "mit"' in card
    head, _, shape = card.partition("The same in the columns of Marks and Mueller's release")
    assert "| dictionary | place | RMSE | L1 | L0 | alive | loss recovered |" in shape
    rows = [line.split(" | ") for line in shape.splitlines() if line.startswith("| resid/")]
    assert [row[1] for row in rows] == ["resid_post.0", "resid_post.1"] and "| transcoder |" in head
    reports = [
        json.loads((folder / "report" / f"resid/resid_post.{layer}" / "report.json").read_text())["metrics"]
        for layer in (0, 1)
    ]
    for row, metrics in zip(rows, reports, strict=True):
        found = [float(cell.strip(" |")) for cell in row[2:]]
        wanted = [metrics[name]["value"] for name in ("rmse", "l1", "l0", "frac_alive", "ce_recovered_zero")]
        assert found == pytest.approx(wanted, rel=1e-3)
    index = json.loads((folder / "dictionaries.json").read_text())["dictionaries"]
    assert [one["name"] for one in index] == ["resid/resid_post.0", "resid/resid_post.1", "transcoder"]
    assert index[0]["metrics"]["rmse"] == reports[0]["rmse"]["value"] and index[2]["outputs"] == ["mlp_out.1"]
    picture = (folder / "densities.svg").read_text()
    assert all(f"<!-- resid/resid_post.{layer}" in picture for layer in (0, 1))
    assert "MIT License" in (folder / "LICENSE").read_text()
    assert (folder / "report" / "resid" / "resid_post.0" / "report.html").is_file()


def test_it_is_uploaded_and_read_back_by_id(
    place: Path, made: list[Any], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "out" / "release"
    dry = publish(PublishConfig(dictionary=folder, dry_run=True))
    assert hub.log == [] and f"{len(dry.files)} files" in capsys.readouterr().out
    done = publish(PublishConfig(dictionary=folder, repo="owner/tiny"))
    assert done.files == dry.files and set(hub.content["owner/tiny"]) == {file.name for file in dry.files}
    for name in ("resid/resid_post.1", "transcoder"):
        there = ids.fetch(f"hf://owner/tiny/dictionary/{name}")
        loaded, mine = dictionaries.load(there), dictionaries.load(place / "out" / "dictionary" / name)
        x = torch.randn(6, mine.d_in, generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded(x), mine(x)) and loaded.sites is not None and mine.sites is not None
        told, known = (
            [(s.hookpoint, s.model_fingerprint) for s in one.sites.inputs] for one in (loaded, mine)
        )
        assert told == known, "the model's path on this machine is left out, what it is known by is not"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"repo must be given for a release that is made already, got none\. Pass --repo"),
        ({"title": "Other", "repo": "a/b"}, r"title must be left out when a release is named"),
    ],
)
def test_a_finished_release_takes_no_other_options(
    place: Path, made: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        publish(PublishConfig.build({"dictionary": place / "out" / "release", **options}))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'licence = "mit"',
            'repo = "owner/tiny"',
            r"repo must be left out of \[publish\]: .*, got owner/tiny\. Look",
        ),
        ('licence = "mit"', 'licence = "mitt"', r"licence must be known, .* got 'mitt'\. Did you mean 'mit'"),
        ('prompt = "the cat sat on"', "", r"prompt"),
    ],
)
def test_wrong_tables_fail_before_anything_runs(
    place: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (place / "tiny.toml").read_text()
    assert old in text
    (tmp_path / "changed.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        stages(read_recipe(tmp_path / "changed.toml"), tmp_path / "out")


def test_a_recipe_without_dictionaries_has_nothing_to_publish(tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text('[toy.a.fit.baseline]\nkind = "pca"\n[publish]\n')
    with pytest.raises(
        ConfigError, match=r"ends in \[publish\] must train a dictionary \(toy\), got none\. Add"
    ):
        stages(read_recipe(tmp_path / "toy.toml"), tmp_path / "out")
