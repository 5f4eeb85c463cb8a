"""The atlas over HTTP: what is answered, what is refused, and the real server's life."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from starlette.testclient import TestClient
from synthetic_atlas import SyntheticConfig, build, build_all

from sememe.atlas import open_atlas
from sememe.browse import BrowseConfig, Data, ExportConfig, browse, export
from sememe.browse.inputs import Inputs, opened
from sememe.browse.server import application
from sememe.browse.together import Served
from sememe.browse.whole import Whole
from sememe.errors import ConfigError, CorruptError, ServerError

CONFIG = SyntheticConfig()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return build_all(tmp_path_factory.mktemp("browse"), CONFIG, {5: "names of rivers </script><b>", 8: None})


@pytest.fixture(scope="module")
def atlas_path(inputs):
    return inputs["atlas"]


@pytest.fixture(scope="module")
def data(inputs):
    with opened(Inputs(**inputs)) as (data, _):
        yield data


@pytest.fixture(scope="module")
def client(data):
    with TestClient(application(data), base_url="http://127.0.0.1:8000") as client:
        yield client


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
    assert answer.status_code == 405 and answer.json() == {
        "error": f"/api/overview must be asked by GET, HEAD, got {method}. See /api/openapi.json for what can be asked."
    }
    assert answer.headers["allow"] == "GET, HEAD"


THREE_PARTS = re.compile(r"^.+ (must|can) .+, got .+\. [A-Z].+\.$", re.DOTALL)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing", 404),
        ("/static/none.js", 404),
        ("/api/latents/999", 404),
        ("/api/texts/99", 404),
        ("/api/overview?atlas=7", 404),
        ("/api/contexts?ids=x", 400),
        ("/api/contexts?ids=" + ",".join(["1"] * 257), 400),
        ("/api/compare?with=0", 400),
        ("/api/contexts?ids=" + "1," * 5000, 414),
    ],
)
def test_every_refusal_names_rule_value_and_remedy(client, path, status):
    answer = client.get(path)
    assert answer.status_code == status and THREE_PARTS.match(answer.json()["error"]), answer.text


def test_refusals_of_what_is_sent_have_three_parts_too(client):
    plain = {"content-type": "text/plain"}
    for answer, status in (
        (client.delete("/api/notes"), 405),
        (client.put("/api/notes/3", json={}), 403),
        (client.post("/api/live/cancel", content="x", headers=plain), 415),
        (client.post("/api/live/cancel", content="x", headers={"content-type": "application/json"}), 400),
        (client.post("/api/live/cancel", json=[]), 400),
        (client.post("/api/live/cancel", json={"job": 3}), 400),
        (client.post("/api/live/prompt", json={"text": "x"}), 503),
        (client.post("/api/live/cancel", json={}, headers={"origin": "http://evil.example"}), 403),
        (client.get("/api/overview", headers={"host": "evil.example"}), 403),
    ):
        assert answer.status_code == status and THREE_PARTS.match(answer.json()["error"]), answer.text
    assert client.delete("/api/notes").headers["allow"] == "GET, HEAD, POST", "of all routes of the address"


@pytest.mark.parametrize(
    "latent", ["300", "-1", "1e3", "x", "99999999999999999999", "٣", "1;DROP TABLE latents"]
)
def test_an_unknown_latent_is_not_found(client, latent):
    answer = client.get(f"/api/latents/{latent}")
    assert answer.status_code == 404 and "one of the atlas's" in answer.json()["error"]


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
    from sememe.browse import serving as server

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
    with pytest.raises(ConfigError, match=rf"port must be .*got {port}"):
        BrowseConfig.build({"port": port})


def test_importing_browse_loads_no_torch():
    code = "import sememe.browse, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60).returncode == 0


def test_the_first_look_is_made_before_anybody_asks(atlas_path, monkeypatch):
    calls: list[str] = []
    for name in ("index", "search"):
        made = getattr(Data, name)
        monkeypatch.setattr(Data, name, lambda self, made=made, name=name: calls.append(name) or made(self))
    with contextlib.closing(open_atlas(atlas_path)) as atlas:
        whole = Whole([Served(Data(atlas))])
        with whole.ahead():
            assert calls[:1] == ["index"], "when the address is said"
            with TestClient(application(whole), base_url="http://127.0.0.1:8000") as client:
                assert client.get("/api/index").json()["id"] and client.get("/api/search").json()
        assert calls == ["index", "search"], "once"
    broken = CorruptError("the atlas must be readable", "nothing", "Make it again.")
    with (
        Whole([Served(broken)]).ahead(),
        TestClient(application(broken), base_url="http://127.0.0.1:8000") as client,
    ):
        assert "Make it again" in client.get("/api/index").json()["error"]
