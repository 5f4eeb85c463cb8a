"""The atlas as JSON, over HTTP, and as a static site. The page itself is tested in test_browse_page.py."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from starlette.testclient import TestClient
from synthetic_atlas import (
    NASTY,
    VOCABULARY,
    SyntheticConfig,
    build,
    build_explanations,
    build_report,
    token_stream,
)

from sememe import artifact
from sememe.atlas import open_atlas
from sememe.browse import BrowseConfig, Data, ExportConfig, browse, export
from sememe.browse.data import display
from sememe.browse.inputs import Inputs, opened
from sememe.browse.server import application
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError, ServerError

CONFIG = SyntheticConfig()
EXPLANATIONS = {5: "names of rivers </script><b>", 7: "זה עברית"}


@pytest.fixture(scope="module")
def atlas_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("browse") / "atlas"
    build(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def atlas(atlas_path):
    with contextlib.closing(open_atlas(atlas_path)) as opened:
        yield opened


@pytest.fixture(scope="module")
def inputs(atlas_path):
    """The atlas with everything that may stand beside it."""
    folder, atlas = atlas_path.parent, artifact.load(atlas_path)
    build_explanations(folder / "explanations", atlas, {**EXPLANATIONS, 8: None})
    build_report(folder / "report")
    return {"atlas": atlas_path, "explanations": folder / "explanations", "report": folder / "report"}


@pytest.fixture(scope="module")
def data(inputs):
    with opened(Inputs(**inputs)) as (data, _):
        yield data


@pytest.fixture(scope="module")
def client(data):
    with TestClient(application(data), base_url="http://127.0.0.1:8000") as client:
        yield client


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


# ---- server


def test_the_api_answers_what_data_says(client, data):
    assert client.get("/api/overview").json() == data.overview()
    assert client.get("/api/index").json() == data.index()
    assert client.get("/api/tokens").json() == data.tokens()
    assert client.get("/api/search").json() == data.search()
    assert client.get("/api/latents/3").json() == data.latent(3)
    assert client.get("/api/latents/3/examples").json() == data.examples(3)
    assert client.get("/api/contexts?ids=0,7").json() == data.contexts([0, 7])


def test_large_answers_are_packed_only_for_those_who_can_unpack(client):
    packed = client.get("/api/index", headers={"accept-encoding": "gzip"})
    plain = client.get("/api/index", headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    assert packed.json() == plain.json()


def test_the_page_and_its_files_are_served_with_strict_headers(client):
    page = client.get("/")
    assert page.status_code == 200 and 'data-mode="served"' in page.text
    names = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert len(names) > 10
    for name in names:
        answer = client.get("/" + name)
        assert answer.status_code == 200 and answer.content, name
    assert client.get("/static/vendor/preact.LICENSE").text.startswith("The MIT License")
    for answer in (page, client.get("/api/overview"), client.get("/nothing")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil", ""]
)
def test_a_foreign_host_header_is_refused(client, host):
    answer = client.get("/api/overview", headers={"host": host})
    assert answer.status_code == 403 and "Host header" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:65535", "[::1]:8000", "LOCALHOST:1"])
def test_this_machine_s_names_are_accepted(client, host):
    assert client.get("/api/overview", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2fserver.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/..\\server.py",
        "/static/vendor/..%2f..%2f..%2fdata.py",
        "/static/index.html%00.js",
        "/static/",
        "/api/../meta.json",
        "/meta.json",
        "/atlas.duckdb",
    ],
)
def test_no_path_leads_out_of_the_page_s_files(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_the_server_only_reads(client, method):
    answer = client.request(method, "/api/overview")
    assert answer.status_code == 405 and answer.json() == {"error": "The atlas can only be read."}


@pytest.mark.parametrize(
    "latent", ["300", "-1", "1e3", "x", "99999999999999999999", "٣", "1;DROP TABLE latents"]
)
def test_an_unknown_latent_is_not_found(client, latent):
    answer = client.get(f"/api/latents/{latent}")
    assert answer.status_code == 404 and "no latent" in answer.json()["error"]


@pytest.mark.parametrize("ids", ["", "a", "1,,2", "-1", "1 OR 1=1", ",".join(map(str, range(257))), "9" * 20])
def test_bad_context_ids_are_refused(client, ids):
    answer = client.get("/api/contexts", params={"ids": ids})
    assert answer.status_code == 400 and answer.json()["error"]


def test_an_oversized_address_is_refused(client):
    assert client.get("/api/contexts?ids=" + "1," * 5000 + "1").status_code == 414


def test_damage_found_while_serving_is_a_message_not_a_crash(tmp_path):
    build(tmp_path / "atlas", SyntheticConfig(n_latents=6, n_contexts=20))
    database = tmp_path / "atlas" / "atlas.duckdb"
    with duckdb.connect(str(database)) as connection:
        connection.execute("DROP TABLE logits")
    meta = json.loads((tmp_path / "atlas" / "meta.json").read_text())
    meta["files"]["atlas.duckdb"]["bytes"] = database.stat().st_size
    (tmp_path / "atlas" / "meta.json").write_text(json.dumps(meta))
    with (
        contextlib.closing(open_atlas(tmp_path / "atlas")) as atlas,
        TestClient(
            application(Data(atlas)), base_url="http://localhost", raise_server_exceptions=False
        ) as client,
    ):
        answer = client.get("/api/latents/1")
        assert answer.status_code == 500
        assert "must be readable" in answer.json()["error"] and "sememe interpret" in answer.json()["error"]
        assert client.get("/api/overview").status_code == 200
    with pytest.raises(CorruptError, match=r"must be readable.*logits.*sememe interpret"):
        export(ExportConfig(atlas=tmp_path / "atlas", out=tmp_path / "site"))
    assert not (tmp_path / "site").exists() and not (tmp_path / ".site.partial").exists()


def _serve(atlas_path: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    code = (
        "import sys; from sememe.browse import BrowseConfig, browse; "
        "browse(BrowseConfig(atlas=sys.argv[1], port=int(sys.argv[2]))); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(atlas_path), str(port)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found, line
    return process, found[0]


def test_the_real_server_serves_stops_on_ctrl_c_and_never_loads_torch(atlas_path):
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process, url = _serve(atlas_path, port)
    try:
        assert url == f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 20
        while True:
            try:
                answer = httpx.get(url + "api/latents/3", timeout=5)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert answer.json()["id"] == 3 and "server" not in answer.headers
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(
                b"GET /static/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            assert raw.recv(4096).startswith(b"HTTP/1.1 404")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0 and out.strip() == "False False"
    finally:
        process.kill()
        process.wait()


def test_a_port_asked_for_must_be_free(atlas_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ServerError, match=rf"port {port} of 127\.0\.0\.1 must be free, got .*in use.*--port"
        ):
            browse(BrowseConfig(atlas=atlas_path, port=port))


def test_without_a_port_the_next_free_one_is_taken(monkeypatch):
    from sememe.browse import server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "DEFAULT_PORT", port)
        with server._listen(None) as listening:
            assert port < listening.getsockname()[1] < port + 100
        monkeypatch.setattr(server, "PORTS_TRIED", 1)
        with pytest.raises(
            ServerError, match=r"a port between \d+ and \d+ of 127\.0\.0\.1 must be free.*--port"
        ):
            server._listen(None)


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_ports_out_of_range_are_config_errors(port):
    with pytest.raises(ConfigError, match=rf"port: .*got {port}"):
        BrowseConfig.build({"port": port})


def test_importing_browse_loads_no_torch():
    code = "import sememe.browse, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60).returncode == 0


# ---- export


def test_the_site_is_an_artifact_made_of_classic_scripts(site, atlas):
    assert site.kind == "site" and set(site.meta["parents"]) == {"atlas", "explanations", "report"}
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


@pytest.mark.parametrize("verb", VERBS)
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
