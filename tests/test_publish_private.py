"""A release says nothing about the folders of the machine it was made on, and still opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from atlas_fixture import make_world

from sememe import artifact, dictionaries
from sememe.atlas import DATABASE, open_atlas
from sememe.evaluate import EvaluateConfig, evaluate
from sememe.figures import open_report
from sememe.interpret import interpret
from sememe.publish import Publication, PublishConfig, publish
from sememe.publish.private import bare, clean, write


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary, its report and atlas, made with absolute paths everywhere: model, corpus and folders."""
    world = make_world(tmp_path_factory.mktemp("a_private_home"))
    about = {"dictionary": world.dictionary, "model": world.model, "text": world.text}
    options = {"n_tokens": 400, "batch_rows": 8, "n_bootstrap": 20, "nulls": ("untrained",)}
    evaluate(EvaluateConfig.build({**about, **options, "out": world.root / "report"}), lm=world.lm)
    interpret(world.config("atlas", n_tokens=2000), lm=world.lm)
    (world.root / "mine.txt").write_text("Do as you like.")
    return world.root


def config(root: Path, **changes: Any) -> PublishConfig:
    parts = {role: root / role for role in ("dictionary", "report", "atlas")}
    own = {"licence": "mine", "licence_file": root / "mine.txt", "out": root / "release"}
    return PublishConfig.build({**parts, **own, **changes})


@pytest.fixture(scope="module")
def release(root: Path) -> Publication:
    return publish(config(root))


def strings(value: Any) -> list[str]:
    """Every text in plain data, keys included."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *strings(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in strings(inner)]
    return [value] if isinstance(value, str) else []


def columns(database: Path) -> list[tuple[str, str]]:
    with duckdb.connect(str(database), read_only=True) as connection:
        rows = connection.execute(
            "SELECT table_name, column_name FROM information_schema.columns WHERE data_type = 'VARCHAR'"
        ).fetchall()
    return [(str(table), str(column)) for table, column in rows]


def test_the_parts_do_hold_paths(root: Path) -> None:
    """Else the tests below would say nothing."""
    for role in ("dictionary", "report", "atlas"):
        assert str(root) in (root / role / artifact.META).read_text()
    assert str(root) in (root / "report" / "report.json").read_text()
    with duckdb.connect(str(root / "atlas" / DATABASE), read_only=True) as database:
        assert database.execute("SELECT DISTINCT source FROM documents").fetchone() == (
            str(root / "corpus.jsonl"),
        )


def test_no_absolute_path_is_in_any_published_file(root: Path, release: Publication) -> None:
    for file in release.files:
        path = release.folder / file.name
        content = path.read_bytes()
        assert str(root).encode() not in content and root.name.encode() not in content, file.name
        if path.suffix == ".json":
            assert not [text for text in strings(json.loads(content)) if text.startswith(("/", "~"))], (
                file.name
            )
    database = release.folder / "atlas" / DATABASE
    assert ("documents", "source") in columns(database)
    with duckdb.connect(str(database), read_only=True) as connection:
        for table, column in columns(database):
            query = f"SELECT count(*) FROM {table} WHERE contains({column}, ?)"
            assert connection.execute(query, [root.name]).fetchone() == (0,), (table, column)


def test_bare_names_are_left(release: Publication) -> None:
    meta = artifact.load(release.folder / "atlas").meta
    assert (
        meta["config"]["text"]["corpus"] == ["corpus.jsonl"] and meta["config"]["model"]["model"] == "model"
    )
    assert meta["config"]["out"] == "atlas" and meta["config"]["dictionaries"] == ["dictionary"]
    report = open_report(release.folder / "report").data
    assert report["dictionary"]["path"] == "dictionary" and report["dictionary"]["model"] == "model"
    own = artifact.load(release.folder, "release").meta["config"]
    assert own["out"] == "release" and own["licence_file"] == "mine.txt"
    card = (release.folder / "README.md").read_text()
    assert "# topk dictionary of model, resid_post.0" in card and "- corpus.jsonl; not stated" in card


def test_the_parts_open_and_are_the_same_but_for_that(root: Path, release: Publication) -> None:
    for role in ("dictionary", "report", "atlas"):
        there, here = artifact.load(release.folder / role, role), artifact.load(root / role, role)
        there.verify()
        assert (there.identity, there.fingerprint) == (here.identity, here.fingerprint)
    x = torch.randn(5, 32)
    assert torch.equal(*(dictionaries.load(folder / "dictionary")(x) for folder in (root, release.folder)))
    here, there = (open_report(folder / "report").data for folder in (root, release.folder))
    assert here["metrics"] == there["metrics"] and here["nulls"] == there["nulls"]
    ours, theirs = (open_atlas(folder / "atlas") for folder in (root, release.folder))
    try:
        for table in ("tokens", "contexts", "latents", "examples", "document_keys"):
            query = f"SELECT * FROM {table}"
            assert ours.query(query) == theirs.query(query) != [], table
        query = "SELECT * EXCLUDE (source) FROM documents"
        assert ours.query(query) == theirs.query(query)
        assert {**ours.meta, "attributions": 0, "dictionary": 0} == {
            **theirs.meta,
            "attributions": 0,
            "dictionary": 0,
        }
        assert ours.meta["dictionary"] | {"model": "model"} == theirs.meta["dictionary"]
    finally:
        ours.close()
        theirs.close()


def test_a_second_run_keeps_the_release_and_a_dry_run_tells_its_sizes(
    root: Path, release: Publication
) -> None:
    before = (release.folder / artifact.META).stat().st_mtime_ns
    assert publish(config(root)).files == release.files
    assert (release.folder / artifact.META).stat().st_mtime_ns == before
    dry = {file.name: file.n_bytes for file in publish(config(root, dry_run=True, out=root / "other")).files}
    real = {file.name: file.n_bytes for file in release.files}
    about = {"meta.json", "atlas/meta.json", f"atlas/{DATABASE}"}  # known only once the database is written
    assert dry.keys() == real.keys() - {"meta.json"}
    assert all(size == real[name] for name, size in dry.items() if name not in about)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/texts/*.jsonl", "*.jsonl"),
        ("~/models/tiny", "tiny"),
        ("../store", "store"),
        ("C:\\Users\\me\\tiny", "tiny"),
        ("hf:///home/me/set", "set"),
        ("file:///home/me/a.txt", "a.txt"),
        ("owner/name", "owner/name"),
        ("hf://owner/name", "hf://owner/name"),
        ("https://example.org/a", "https://example.org/a"),
        ("resid_post.8", "resid_post.8"),
        ("~5 of 10", "~5 of 10"),
        ("/home/me/my texts/a b.txt", "a b.txt"),
        ("/lustre/me/set", "set"),
        ("/n/home01/me/set", "set"),
        ("/lustre/me/my texts/set", "set"),
        ("/r/AskReddit", "/r/AskReddit"),
        ("/", "/"),
        ("//", "//"),
        ("./", "./"),
        ("/s", "/s"),
        ("/data.jsonl", "/data.jsonl"),
        ("/ and then/or", "/ and then/or"),
    ],
)
def test_what_counts_as_a_path(text: str, left: str) -> None:
    assert bare(text) == left


def test_a_slash_alone_is_taken_out_of_nothing(tmp_path: Path) -> None:
    """A report that mentions "/", and its picture, whose tags end with one."""
    picture = '<svg xmlns="http://www.w3.org/2000/svg"><g> / </g><rect / ></svg>'
    with artifact.building(
        tmp_path / "part", kind="report", version=1, config=PublishConfig(), parents={}
    ) as work:
        artifact.write_json(work.path / "report.json", {"token": "/", "corpus": "/r/AskReddit", "store": "/"})
        (work.path / "a.svg").write_text(picture)
    part = artifact.load(tmp_path / "part")
    files = {name: part.path / name for name in (artifact.META, *part.meta["files"])}
    write(clean(part, files), files, tmp_path / "released")
    assert (tmp_path / "released" / "a.svg").read_text() == picture
    told = json.loads((tmp_path / "released" / "report.json").read_text())
    assert told == {"token": "/", "corpus": "/r/AskReddit", "store": "/"}
