"""The atlas as a file: opening, joining, showing itself, bad folders; and the queries of docs/atlas.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
from atlas_fixture import make_world
from planted_atlas import TUNED, edit, plant

from sememe import artifact
from sememe.atlas import DATABASE, SCHEMA, Atlas, create, insert, labels, lists, open_atlas, set_meta
from sememe.config import Config
from sememe.effects import EffectsConfig, effects
from sememe.errors import ArtifactError, CorruptError
from sememe.explain import ExplainConfig, explain
from sememe.interpret import interpret

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    interpret(world.config("atlas"), lm=world.lm).close()
    explain(ExplainConfig(atlas=world.root / "atlas", out=world.root / "explanations", n_bootstrap=10))
    config = EffectsConfig(
        atlas=world.root / "atlas", out=world.root / "effects", model=world.model, n_latents=40, n_removals=0
    )
    effects(config, lm=world.lm)
    return world.root


@pytest.fixture
def atlas(folder: Path) -> Iterator[Atlas]:
    opened = open_atlas(folder / "atlas", folder / "explanations", folder / "effects")
    yield opened
    opened.close()


def queries() -> list[str]:
    text = (ROOT / "docs" / "atlas.md").read_text(encoding="utf-8")
    block = text.split("```sql\n")[1].split("```")[0]
    return [query.strip() for query in block.split(";") if query.strip()]


@pytest.mark.parametrize("query", queries())
def test_the_queries_in_the_docs_run(atlas: Atlas, query: str) -> None:
    rows = atlas.query(query)
    if not any(part in query for part in ("' king'", "language_share", "FROM clusters", "FROM history")):
        assert rows, "and they find something"


def test_queries_and_every_table_is_documented() -> None:
    assert len(queries()) >= 10
    text = (ROOT / "docs" / "atlas.md").read_text(encoding="utf-8")
    for table in re.findall(r"CREATE TABLE (\w+)", SCHEMA):
        assert f"`{table}`" in text, f"docs/atlas.md must name the table {table}"


def test_it_shows_itself(atlas: Atlas) -> None:
    page = atlas._repr_html_()
    assert "Sememe atlas" in page and "resid_post.0" in page and "48, of which" in page
    assert page.count("<tr><td>") == 8, "a handful of latents"
    assert "<code>" in page


def test_a_second_lens_changes_neither_the_table_nor_the_queries(tmp_path: Path) -> None:
    path = plant(tmp_path / "atlas", n_documents=10).path
    edit(path, ("UPDATE latents SET top_token = id, top_token_share = 1, n_active = 100", []))
    asks = [query for query in queries() if "FROM logits" in query]
    assert len(asks) == 1
    found = []
    for statements in ((), ((TUNED, []),)):
        edit(path, *statements)
        opened = open_atlas(path)
        found.append(([opened.query(query) for query in asks], opened._repr_html_()))
        opened.close()
    assert found[0] == found[1]
    assert [row["latent"] for row in found[0][0][0]] == [0], "and it is found"


def test_texts_of_tokens_are_escaped(tmp_path: Path) -> None:
    path = small(tmp_path / "atlas", "<script>alert(1)</script>")
    opened = open_atlas(path)
    assert "<script>" not in opened._repr_html_() and "&lt;script&gt;" in opened._repr_html_()
    opened.close()


def test_threads_read_at_once(atlas: Atlas) -> None:
    """Each query has a connection of its own, the joined explanations included."""
    found: list[int] = []

    def read() -> None:
        for _ in range(5):
            found.append(
                atlas.query("SELECT count(*) AS n FROM explanations JOIN latents ON id = latent")[0]["n"]
            )

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [48] * 20


def test_labels_without_the_atlas(folder: Path, atlas: Atlas) -> None:
    rows = atlas.query("SELECT latent, label FROM explanations WHERE label IS NOT NULL ORDER BY latent")
    assert labels(folder / "explanations") == {row["latent"]: row["label"] for row in rows} != {}


def test_columns_come_as_arrow(atlas: Atlas) -> None:
    assert atlas.table("SELECT id FROM latents ORDER BY id")["id"].to_pylist() == list(range(48))


def test_reading_an_atlas_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from sememe.atlas import open_atlas, labels\n"
        f"open_atlas({str(folder / 'atlas')!r}, {str(folder / 'explanations')!r})._repr_html_()\n"
        f"labels({str(folder / 'explanations')!r})\n"
        "assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_insert_takes_lists_missing_values_and_bytes(tmp_path: Path) -> None:
    connection = create(tmp_path / "x.duckdb")
    insert(
        connection,
        "contexts",
        {
            "id": np.arange(2, dtype=np.int32),
            "token_ids": lists(np.array([0, 2, 3]), np.array([7, 8, 9], np.int32)),
            "doc_ids": lists(np.array([0, 0, 1]), np.array([5], np.int32)),
        },
    )
    insert(connection, "tokens", {"id": np.array([1]), "text": ["a"], "bytes": [b"\xff"]})
    assert connection.execute("SELECT * FROM contexts ORDER BY id").fetchall() == [
        (0, [7, 8], []),
        (1, [9], [5]),
    ]
    assert connection.execute("SELECT bytes FROM tokens").fetchall() == [(b"\xff",)]
    with pytest.raises(duckdb.Error):
        insert(connection, "tokens", {"id": np.array([2]), "text": ["b"]})
    connection.close()


# -- bad folders ---------------------------------------------------------------------------------------


class _Config(Config):
    """Nothing to choose."""


def small(path: Path, token: str = "a", version: int | None = None) -> Path:
    """An atlas of one latent."""
    with artifact.building(path, kind="atlas", version=1, config=_Config(), parents={}) as work:
        connection = create(work.path / DATABASE)
        facts = {"dictionary": {"d_sae": 1, "name": token}, "text": {"n_tokens": 1, "n_documents": 1}}
        set_meta(connection, facts)
        if version is not None:
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", [str(version)])
        connection.execute(
            "INSERT INTO latents (id, density, n_active, max_act, mean_act, top_token, top_token_share, histogram, "
            "decoder_norm) VALUES (0, 0.5, 50, 1, 1, 0, 1, [50], 1)"
        )
        connection.execute("INSERT INTO tokens VALUES (0, ?, 'a'::BLOB)", [token])
        connection.execute("INSERT INTO top_tokens VALUES (0, 0, 0, 1, 1, 1, 1)")
        connection.close()
    return path


def test_a_newer_schema(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"must have schema version 2, got 3\. Upgrade sememe to read it"):
        open_atlas(small(tmp_path / "atlas", version=3))


def test_an_older_schema(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"must have schema version 2, got 1\. Run `sememe interpret` again"
    ):
        open_atlas(small(tmp_path / "atlas", version=1))


def test_nothing_there_and_another_kind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"must be a finished atlas, got nothing there"):
        open_atlas(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"must be an? atlas, got an? dictionary"):
        open_atlas(folder / "dictionary")
    with pytest.raises(ArtifactError, match=r"must be an? explanations, got an? atlas"):
        open_atlas(folder / "atlas", folder / "atlas")


def test_a_truncated_database(tmp_path: Path) -> None:
    path = small(tmp_path / "atlas")
    data = (path / DATABASE).read_bytes()
    (path / DATABASE).write_bytes(data[:-100])
    with pytest.raises(CorruptError, match=r"must be \d+ bytes long"):
        open_atlas(path)


def test_a_damaged_database(tmp_path: Path) -> None:
    path = small(tmp_path / "atlas")
    database = path / DATABASE
    database.write_bytes(b"\0" * database.stat().st_size)
    with pytest.raises(CorruptError, match=r"must be an atlas database.*Delete the folder"):
        open_atlas(path)


def test_meta_that_is_not_json(tmp_path: Path) -> None:
    path = small(tmp_path / "atlas")
    connection = duckdb.connect(str(path / DATABASE))
    connection.execute("UPDATE meta SET value = '{' WHERE key = 'text'")
    connection.close()
    meta = json.loads((path / "meta.json").read_text())
    meta["files"][DATABASE]["bytes"] = (path / DATABASE).stat().st_size
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CorruptError, match=r"must be an atlas database"):
        open_atlas(path)
