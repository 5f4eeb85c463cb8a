"""The atlas as JSON and as a static site. The server has test_browse_server.py, the page test_browse_page.py."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import math
import re
import shutil

import duckdb
import numpy as np
import pytest
from synthetic_atlas import (
    NASTY,
    VOCABULARY,
    SyntheticConfig,
    build,
    build_all,
    build_explanations,
    build_report,
    token_stream,
)

from sememe import artifact
from sememe.atlas import open_atlas
from sememe.browse import BrowseConfig, Data, ExportConfig, browse, export
from sememe.browse.data import display
from sememe.browse.inputs import Inputs, opened
from sememe.browse.written import dump
from sememe.cli import _run
from sememe.errors import ArtifactError, CorruptError, MismatchError

CONFIG = SyntheticConfig()
PARENTS = {"atlas", "explanations", "report", "effects", "prompt.0", "prompt.1", "graph.0"}
EXPLANATIONS = {5: "names of rivers </script><b>", 7: "זה עברית"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return build_all(tmp_path_factory.mktemp("browse"), CONFIG, {**EXPLANATIONS, 8: None})


@pytest.fixture(scope="module")
def atlas_path(inputs):
    return inputs["atlas"]


@pytest.fixture(scope="module")
def atlas(atlas_path):
    with contextlib.closing(open_atlas(atlas_path)) as opened:
        yield opened


@pytest.fixture(scope="module")
def data(inputs):
    with opened(Inputs(**inputs)) as (data, _):
        yield data


@pytest.fixture(scope="module")
def site(inputs, tmp_path_factory):
    return export(ExportConfig(**inputs, out=tmp_path_factory.mktemp("sites") / "site"))


def shard(site: artifact.Artifact, name: str):
    """A data script's payload, read as the page reads it."""
    text = (site.path / "data" / f"{name}.js").read_text(encoding="ascii")
    found = re.fullmatch(r'Sememe\.shard\("([a-z0-9/]+)","([A-Za-z0-9+/=]+)"\);\n', text)
    assert found and found[1] == name
    return json.loads(gzip.decompress(base64.b64decode(found[2])))


# ---- data


def test_overview_counts_what_is_in_the_database(data, atlas):
    overview = data.overview()
    rows = atlas.query("SELECT density, n_active FROM latents")
    alive = [row for row in rows if row["n_active"] > 0]
    assert overview["latents"]["n"] == len(rows) == CONFIG.n_latents
    assert overview["latents"]["alive"] == len(alive) < len(rows)
    assert overview["latents"]["l0"] == pytest.approx(sum(row["density"] for row in rows), rel=1e-3)
    assert sum(overview["density"]["counts"]) == len(alive)
    assert len(overview["density"]["log10_edges"]) == len(overview["density"]["counts"]) + 1
    assert overview["report"]["metrics"]["fvu"] == {"value": 0.12, "low": 0.108, "high": 0.132}
    assert overview["report"]["nulls"]["pca"]["fvu"]["value"] == 0.3
    assert overview["attributions"][0]["licence"] == "CC BY-SA 4.0"
    assert sum(entry["n"] for entry in overview["languages"]) == sum(
        row["language"] is not None for row in atlas.query("SELECT language FROM latents")
    )


def test_without_a_report_the_atlas_s_own_figures_are_shown(atlas):
    report = Data(atlas).overview()["report"]
    assert report["metrics"]["fvu"] == {"value": 0.1234, "low": None, "high": None} and report["nulls"] == {}


def test_density_histogram_holds_each_latent_in_its_bin(data, atlas):
    density = data.overview()["density"]
    logs = [np.log10(row["density"]) for row in atlas.query("SELECT density FROM latents WHERE n_active > 0")]
    edges = density["log10_edges"]
    for i, count in enumerate(density["counts"]):
        upper = edges[i + 1] if i + 2 < len(edges) else np.inf
        assert count == sum(edges[i] <= value < upper for value in logs)


def test_index_has_every_latent_in_order_and_agrees_with_the_latent(data):
    index = data.index()
    assert index["id"] == list(range(CONFIG.n_latents))
    for row in (0, 5, 24, 111):
        latent = data.latent(index["id"][row])
        for name in ("density", "n_active", "max_act", "mean_act", "top_token", "label_tokens"):
            assert index[name][row] == latent[name], name
        assert index["promoted"][row] == latent["promoted"]["tokens"][:3]
        language = index["language"][row]
        assert (index["languages"][language] if language >= 0 else None) == latent["language"]


def test_a_label_is_the_explanation_or_the_tokens_with_the_top_token_first(data):
    index = data.index()
    assert index["explanation"] == {str(row): text for row, text in EXPLANATIONS.items()}
    assert data.latent(5)["explanation"] == EXPLANATIONS[5]
    assert data.latent(6)["explanation"] is None
    for row, tokens in enumerate(index["label_tokens"]):
        assert len(tokens) <= 3 and len(set(tokens)) == len(tokens)
        assert tokens[:1] == ([] if index["top_token"][row] is None else [index["top_token"][row]])


def test_latent_matches_the_tables(data, atlas):
    latent = data.latent(3)
    row = atlas.query("SELECT * FROM latents WHERE id = 3")[0]
    assert latent["histogram"] == row["histogram"] and sum(latent["histogram"]) == row["n_active"]
    promoted = atlas.query("SELECT token, value FROM logits WHERE latent = 3 AND sign = 1 ORDER BY rank")
    assert latent["promoted"]["tokens"] == [r["token"] for r in promoted]
    assert latent["promoted"]["values"] == pytest.approx([r["value"] for r in promoted], rel=1e-3)
    assert all(value < 0 for value in latent["demoted"]["values"])
    kinds = latent["examples"]["kind"]
    assert kinds == sorted(kinds, key=["top", "decile", "random"].index) and set(kinds) == {
        "top",
        "decile",
        "random",
    }
    top = [act for act, kind in zip(latent["examples"]["act"], kinds, strict=True) if kind == "top"]
    assert top == sorted(top, reverse=True) and top[0] == pytest.approx(row["max_act"], rel=1e-3)
    deciles = [d for d in latent["examples"]["decile"] if d is not None]
    assert deciles == sorted(deciles, reverse=True) and deciles[0] == 9


def test_example_activations_are_those_of_the_text(data, atlas):
    ids, _ = token_stream(CONFIG)
    stored = {
        (r["context"], r["position"], r["kind"]): r
        for r in atlas.query("SELECT * FROM examples WHERE latent = 3")
    }
    largest = data.latent(3)["max_act"]  # activations keep four digits of it
    for example in data.examples(3):
        start, stop = example["start"], example["stop"]
        assert example["token_ids"] == ids[example["context"], start:stop].tolist()
        assert len(example["tokens"]) == len(example["acts"]) == stop - start
        row = stored[example["context"], example["position"], example["kind"]]
        expected = np.zeros(stop - start)
        expected[np.array(row["positions"], dtype=int) - start] = row["acts"]
        assert example["acts"] == pytest.approx(expected.tolist(), abs=largest * 5.1e-4)
        assert example["document"]["source"] in ("wiki", "books") and "n" in example["document"]["tags"]
        if example["kind"] == "random":
            assert not any(example["acts"])
        else:
            assert example["acts"][example["position"] - start] == pytest.approx(example["act"])


def test_contexts_are_whole_rows_with_their_documents(data):
    ids, documents = token_stream(CONFIG)
    payload = data.contexts([0, 7, 10**6])
    assert set(payload["contexts"]) == {"0", "7"}
    context = payload["contexts"]["0"]
    assert context["tokens"] == ids[0].tolist()
    unrolled = [document for document, n in context["documents"] for _ in range(n)]
    assert unrolled == documents[0].tolist() and unrolled[-1] == -1
    assert set(payload["documents"]) == {"0", "1", "14", "15"}
    assert payload["documents"]["14"]["language"] == "ja"


def test_search_says_which_latents_a_token_leads_to(data, atlas):
    search = data.search()
    promoted = dict(zip(search["promoted"]["token"], search["promoted"]["latents"], strict=True))
    peaks = dict(zip(search["peaks"]["token"], search["peaks"]["latents"], strict=True))
    ids, _ = token_stream(CONFIG)
    token = VOCABULARY.index(b" river")
    assert promoted[token] == [
        r["latent"]
        for r in atlas.query(
            "SELECT DISTINCT latent FROM logits WHERE token = ? AND sign = 1 AND rank < 10 ORDER BY latent",
            token,
        )
    ]
    expected = {
        r["latent"]
        for r in atlas.query("SELECT latent, context, position FROM examples WHERE kind <> 'random'")
        if ids[r["context"], r["position"]] == token
    }
    assert set(peaks[token]) == expected and expected


def test_tokens_keep_their_exact_bytes(data):
    tokens = data.tokens()
    text = dict(zip(tokens["id"], tokens["text"], strict=True))
    for token, raw in enumerate(VOCABULARY):
        exact = tokens["bytes"].get(str(token))
        assert (bytes.fromhex(exact) if exact else text[token].encode()) == raw
    assert set(tokens["bytes"]) == {str(NASTY.index(raw)) for raw in (b"\xe6\x97", b"\xa5", b"\xff")}


def test_display_prefers_exact_bytes():
    assert display("?", "é".encode()) == ("é", True)
    assert display("\ufffd", b"\xe6\x97") == ("\ufffd", False)
    assert display("<bos>", b"") == ("<bos>", True)


def test_a_dead_latent_has_no_examples_and_a_missing_one_is_none(data):
    dead = data.latent(24)
    assert dead["n_active"] == 0 and dead["examples"]["kind"] == [] and dead["label_tokens"] == []
    assert data.latent(10**6) is None and data.examples(10**6) is None


def test_what_is_sent_is_the_json_of_pythons_own_writer():
    """The quick writer beside the slow one, on what it may stumble over."""
    hard = {
        "text": [raw.decode("utf-8", "replace") for raw in NASTY] + ['"\\', "</script>"],
        "numbers": [0, -1, 2**53 + 1, 2**70, 0.1, -0.0, 5.0, 1e-5, 5e-324, 1.7976931348623157e308, 1 / 3],
        "rest": [None, True, False, [], {}, (1, 2), {1: "a key that is a number"}],
    }
    written = dump(hard)
    assert json.loads(written) == json.loads(json.dumps(hard))
    assert b" :" not in written and b"</script>" in written, "as short as it gets, and UTF-8"
    assert json.loads(dump([math.nan, math.inf, 1.5])) == [None, None, 1.5]
    assert json.loads(dump(["\ud800"]).decode("utf-8", "surrogatepass")) == ["\ud800"], "half a letter"
    with pytest.raises(TypeError):
        dump(object())


def test_numbers_that_json_cannot_hold_become_none(tmp_path):
    build(tmp_path / "atlas", SyntheticConfig(n_latents=6, n_contexts=20))
    database = tmp_path / "atlas" / "atlas.duckdb"
    with duckdb.connect(str(database)) as connection:
        connection.execute("UPDATE latents SET logit_std = 'nan', max_act = 'inf' WHERE id = 1")
        connection.execute("UPDATE logits SET value = '-inf' WHERE latent = 1")
    meta = json.loads((tmp_path / "atlas" / "meta.json").read_text())
    meta["files"]["atlas.duckdb"]["bytes"] = database.stat().st_size
    (tmp_path / "atlas" / "meta.json").write_text(json.dumps(meta))
    with contextlib.closing(open_atlas(tmp_path / "atlas")) as atlas:
        data = Data(atlas)
        for payload in (data.index(), data.latent(1), data.overview()):
            json.dumps(payload, allow_nan=False)
        assert data.latent(1)["logit_std"] is None and data.index()["max_act"][1] is None


# ---- export


def test_the_site_is_an_artifact_made_of_classic_scripts(site, atlas):
    assert site.kind == "site" and set(site.meta["parents"]) == PARENTS
    assert site.meta["parents"]["atlas"] == atlas.artifact.fingerprint
    site.verify()
    page = (site.path / "index.html").read_text()
    assert 'data-mode="static"' in page and "type=module" not in page and 'type="module"' not in page
    for name in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert (site.path / name).is_file(), name
    assert {p.name for p in (site.path / "static" / "vendor").iterdir()} >= {"preact.LICENSE", "htm.LICENSE"}


def test_the_site_s_shards_hold_the_server_s_answers(site, data):
    overview = shard(site, "overview")
    shards = overview.pop("shards")
    assert overview == json.loads(json.dumps(data.overview()))
    for name in ("index", "tokens", "search"):
        assert shard(site, name) == json.loads(json.dumps(getattr(data, name)()))
    ids = data.ids
    n_shards = -(-len(ids) // shards["latents_per_shard"])
    found = [latent for k in range(n_shards) for latent in shard(site, f"latents/{k:05}")["latents"]]
    assert [latent["id"] for latent in found] == ids
    assert found[3] == json.loads(json.dumps(data.latent(3)))
    assert len(list((site.path / "data" / "latents").iterdir())) == n_shards


def test_each_context_is_stored_once(site, data):
    seen = []
    for path in sorted((site.path / "data" / "contexts").iterdir()):
        payload = shard(site, f"contexts/{path.stem}")
        seen += [int(i) for i in payload["contexts"]]
        for context in payload["contexts"].values():
            assert all(run[0] == -1 or str(run[0]) in payload["documents"] for run in context["documents"])
    assert seen == data.context_ids


def test_shard_sizes_are_configurable(atlas_path, tmp_path):
    site = export(
        ExportConfig(atlas=atlas_path, out=tmp_path / "site", latents_per_shard=7, contexts_per_shard=100)
    )
    shards = shard(site, "overview")["shards"]
    assert shards == {"latents_per_shard": 7, "contexts_per_shard": 100, "context_ids": None}
    assert [latent["id"] for latent in shard(site, "latents/00002")["latents"]] == list(range(14, 21))
    assert len(list((site.path / "data" / "contexts").iterdir())) == 2


def test_the_command_exports_what_the_page_would_show_and_refuses_what_has_no_effect(
    site, inputs, tmp_path, capsys
):
    command = ["browse", str(inputs["atlas"]), "--export", str(tmp_path / "site")]
    for more, message in (
        (["--port", "8123"], "--port must be left out with --export"),
        (["--open"], "--open must"),
    ):
        assert _run([*command, *more]) == 2 and message in capsys.readouterr().err
    assert _run([*command[:2], "--fresh"]) == 2
    assert "--fresh must go with --export, got none. Drop it" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()
    about = []
    for name in ("explanations", "report", "effects"):
        about += [f"--{name}", str(inputs[name])]
    about += ["--prompts", *map(str, inputs["prompts"])]
    about += ["--graph", *map(str, inputs["graph"])]
    assert _run([*command, *about]) == 0
    assert artifact.load(tmp_path / "site").fingerprint == site.fingerprint


def test_an_export_is_the_same_bytes_every_time(site, inputs, tmp_path):
    again = export(ExportConfig(**inputs, out=tmp_path / "again"))
    assert again.meta["files"] == site.meta["files"] and again.fingerprint == site.fingerprint


def test_a_site_that_is_there_is_left_alone_and_an_old_page_s_is_made_again(
    atlas_path, tmp_path, monkeypatch
):
    from sememe.browse import page

    out = tmp_path / "site"
    out.mkdir()  # an empty folder is no obstacle
    config = ExportConfig(atlas=atlas_path, out=out)
    first = export(config)
    stamp = (out / "index.html").stat().st_mtime_ns
    assert export(config).fingerprint == first.fingerprint
    assert (out / "index.html").stat().st_mtime_ns == stamp
    monkeypatch.setattr(page, "fingerprint", lambda: "newer page")
    assert export(config).extra["page"] == "newer page"
    assert (out / "index.html").stat().st_mtime_ns != stamp


def test_another_site_is_not_overwritten_unless_asked(inputs, tmp_path):
    build(tmp_path / "other", SyntheticConfig(n_latents=6, n_contexts=20))
    out = tmp_path / "site"
    first = export(ExportConfig(atlas=tmp_path / "other", out=out))
    config = ExportConfig(**inputs, out=out)
    message = r"the site at .* \(identity [0-9a-f]{16}\), got identity .*--fresh"
    with pytest.raises(MismatchError, match=message):
        export(config)
    assert artifact.load(out, "site").fingerprint == first.fingerprint
    assert export(config, fresh=True).meta["parents"] != first.meta["parents"]
    for changed in (config.replace(report=None), config.replace(latents_per_shard=9)):
        with pytest.raises(MismatchError, match=message):
            export(changed)


def test_explanations_and_report_must_belong_to_the_atlas(inputs, tmp_path):
    small = build(tmp_path / "other", SyntheticConfig(n_latents=6, n_contexts=20))
    build_explanations(tmp_path / "explanations", small, {1: "x"})
    build_report(tmp_path / "report", dictionary="f" * 64)
    out = tmp_path / "site"
    with pytest.raises(
        MismatchError, match=r"the explanations .* must be of the atlas .* got explanations of"
    ):
        export(ExportConfig(**inputs | {"explanations": tmp_path / "explanations"}, out=out))
    with pytest.raises(
        MismatchError,
        match=r"the report .* must be of the atlas's dictionary \(fingerprint d1c7.*got a report of ffff.*evaluate",
    ):
        export(ExportConfig(**inputs | {"report": tmp_path / "report"}, out=out))
    with pytest.raises(ArtifactError, match=r"must be an? report, got an? explanations|must be a report"):
        export(ExportConfig(**inputs | {"report": inputs["explanations"]}, out=out))
    assert not out.exists()


def test_a_report_that_is_no_report_is_damage(atlas_path, tmp_path):
    with artifact.building(
        tmp_path / "report",
        kind="report",
        version=1,
        config=SyntheticConfig(),
        parents={"dictionary": "d1c7" * 16},
    ) as work:
        (work.path / "report.json").write_text('{"metrics": 3}')
    with pytest.raises(CorruptError, match=r"report\.json must be a report, got TypeError.*sememe evaluate"):
        export(ExportConfig(atlas=atlas_path, report=tmp_path / "report", out=tmp_path / "site"))


def test_somebody_else_s_folder_is_never_replaced(atlas_path, tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "index.html").write_text("mine")
    with pytest.raises(ArtifactError, match=r"must be a finished site, got a folder without meta\.json"):
        export(ExportConfig(atlas=atlas_path, out=tmp_path / "www"))
    with pytest.raises(ArtifactError, match=r"must be a site, got an? atlas"):
        export(ExportConfig(atlas=atlas_path, out=atlas_path))
    assert (tmp_path / "www" / "index.html").read_text() == "mine" and open_atlas(atlas_path).close() is None


VERBS = [
    lambda path: browse(BrowseConfig(atlas=path)),
    lambda path: export(ExportConfig(atlas=path, out=path.parent / "out")),
]


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_an_atlas_is_refused(tmp_path, site, verb):
    with pytest.raises(ArtifactError, match=r"must be a finished atlas, got nothing there\. Name the folder"):
        verb(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"must be a finished atlas, got a folder without meta\.json"):
        verb(tmp_path / "folder")
    shutil.copytree(site.path, tmp_path / "site")
    with pytest.raises(ArtifactError, match=r"must be an atlas, got a site"):
        verb(tmp_path / "site")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS[1:])  # browse serves a page about it: test_browse_guard.py
def test_a_damaged_atlas_is_refused(tmp_path, verb):
    build(tmp_path / "atlas", SyntheticConfig(n_latents=6, n_contexts=20))
    database = tmp_path / "atlas" / "atlas.duckdb"
    content = database.read_bytes()
    database.write_bytes(content[:-100])
    with pytest.raises(CorruptError, match=r"must be \d+ bytes long, got \d+ bytes.*truncated"):
        verb(tmp_path / "atlas")
    database.write_bytes(b"\0" * len(content))
    with pytest.raises(CorruptError, match=r"must be an atlas database, got .*sememe interpret"):
        verb(tmp_path / "atlas")
    assert not (tmp_path / "out").exists()
