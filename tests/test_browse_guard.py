"""Who may ask the server what: tokens, hosts, origins, bodies; and that the OpenAPI document says it all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_schema import complaints, unnamed
from served_atlases import HERE, SMALL, Echo, client_of, two_atlases
from synthetic_atlas import SyntheticConfig, build, build_all

from sememe.browse import BrowseConfig, ExportConfig, export, openapi, schemas
from sememe.browse.guard import MAX_BODY_BYTES, door_of
from sememe.browse.live import Refusal
from sememe.browse.server import application
from sememe.browse.serving import served
from sememe.cli import _run
from sememe.errors import ArtifactError, ConfigError


@pytest.fixture(scope="module")
def atlases(tmp_path_factory):
    return two_atlases(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def model():
    return Echo()


@pytest.fixture(scope="module")
def client(atlases, model):
    """Everything is on: two atlases, notes, a model."""
    with client_of(BrowseConfig(atlas=atlases[0], against=atlases[1:], write=True), live=model) as client:
        yield client


@pytest.fixture(scope="module")
def reader(atlases):
    with client_of(BrowseConfig(atlas=atlases[1])) as client:
        yield client


# ---- the token


def test_this_machine_needs_no_token_and_any_other_address_does():
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.5"):
        assert door_of(host).token is None and "localhost" in door_of(host).names
    lan, every = door_of("192.168.7.7"), door_of("0.0.0.0")
    assert lan.names == {"192.168.7.7"} and not lan.addresses and every.addresses
    assert len(lan.token) >= 32 and lan.token != door_of("192.168.7.7").token, "a new one each time"


@pytest.fixture
def guarded(atlases):
    door = door_of("192.168.7.7")
    with client_of(BrowseConfig(atlas=atlases[0]), door=door, base_url="http://192.168.7.7:8000") as client:
        yield client, door.token


@pytest.mark.parametrize(
    "path", ["/", "/api/overview", "/static/js/app.js", "/nothing", "/?token=", "/?token=x"]
)
def test_without_the_token_nothing_is_answered(guarded, path):
    client, _ = guarded
    answer = client.get(path)
    assert answer.status_code == 401
    assert answer.json()["error"].endswith("Open the whole address that `sememe browse` printed.")
    assert "content-security-policy" in answer.headers


def test_the_token_in_the_address_becomes_a_cookie(guarded):
    client, token = guarded
    answer = client.get(f"/?atlas=0&token={token}", follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == ".?atlas=0", "it leaves the address"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and token in cookie
    assert client.get("/api/overview").status_code == 200, "the cookie is enough from then on"
    client.cookies.clear()
    assert client.get("/api/overview").status_code == 401
    client.cookies.set("sememe_token_8000", token[:-1])
    assert client.get("/api/overview").status_code == 401
    client.cookies.clear()
    assert client.get("/api/overview", headers={"authorization": f"Bearer {token}"}).status_code == 200
    assert client.get(f"/?token={token}&token={token}").status_code == 401


def test_two_servers_of_one_host_let_the_same_browser_in(atlases):
    """A browser keeps one cookie of a name for a host, whatever the port, and sends all of them to each."""
    doors = {port: door_of("192.168.7.7") for port in (8000, 8001)}
    jar = {}
    with contextlib.ExitStack() as stack:
        clients = {
            port: stack.enter_context(
                client_of(BrowseConfig(atlas=atlases[0]), door=door, base_url=f"http://192.168.7.7:{port}")
            )
            for port, door in doors.items()
        }
        for port, client in clients.items():
            answer = client.get(f"/?token={doors[port].token}", follow_redirects=False)
            name, _, value = answer.headers["set-cookie"].partition(";")[0].partition("=")
            jar[name] = value
            client.cookies.clear()
        for client in clients.values():
            shown = {"cookie": "; ".join(f"{name}={value}" for name, value in jar.items())}
            assert client.get("/api/overview", headers=shown).status_code == 200


def test_with_a_token_foreign_hosts_are_refused_all_the_same(guarded, atlases):
    client, token = guarded
    shown = {"authorization": f"Bearer {token}"}
    for host in ("evil.example", "127.0.0.1:8000", "192.168.7.8"):
        assert client.get("/api/overview", headers={**shown, "host": host}).status_code == 403
    door = door_of("0.0.0.0")
    shown = {"authorization": f"Bearer {door.token}"}
    with client_of(BrowseConfig(atlas=atlases[0]), door=door) as everywhere:
        for host in ("10.1.2.3:8000", "[fe80::1]:8000", "127.0.0.1", "localhost"):
            assert everywhere.get("/api/session", headers={**shown, "host": host}).status_code == 200
        assert everywhere.get("/api/session", headers={**shown, "host": "evil.example"}).status_code == 403


# ---- what changes something


def test_a_server_that_only_reads_says_how_to_write(reader):
    answer = reader.put("/api/notes/3", json={"star": True})
    assert answer.status_code == 403 and "--write" in answer.json()["error"]
    assert reader.put("/api/ratings", json={}).status_code == 403
    assert reader.get("/api/notes").json()["write"] is False
    answer = reader.post("/api/live/prompt", json={"text": "x"})
    assert answer.status_code == 503 and "sememe browse ATLAS --live" in answer.json()["error"]
    assert reader.get("/api/live").json()["state"] == "off"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:9000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": HERE, "sec-fetch-site": "cross-site"},
    ],
)
def test_requests_of_other_pages_change_nothing(client, headers):
    for method, path in (("PUT", "/api/notes/1"), ("POST", "/api/notes"), ("POST", "/api/live/prompt")):
        answer = client.request(method, path, json={"star": True}, headers=headers)
        assert answer.status_code == 403 and "own page" in answer.json()["error"], path
    assert "1" not in client.get("/api/notes").json()["latents"]


def test_this_page_s_requests_are_let_in(client):
    headers = {"origin": HERE, "sec-fetch-site": "same-origin"}
    answer = client.put("/api/notes/2", json={"star": True}, headers=headers)
    assert answer.status_code == 200 and answer.json()["star"] is True
    assert client.get("/api/notes").json()["latents"]["2"]["star"] is True


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "text/plain", 415),
        (b"{}", "application/x-www-form-urlencoded", 415),
        (b"{}", "", 415),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"NaN", "application/json", 400),
        (b'{"star": Infinity}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b" " * (MAX_BODY_BYTES + 1), "application/json", 413),
        (b'{"note": "' + b"x" * 10_001 + b'"}', "application/json", 400),
        (b'{"note": "\\ud800"}', "application/json", 400),
        (b'{"colour": 1}', "application/json", 400),
        (b'{"tags": ["' + b"x" * 1000 + b'"]}', "application/json", 400),
        (b'{"tags": [' + b",".join([b'"a"'] * 31) + b"]}", "application/json", 400),
    ],
)
def test_bodies_that_are_not_what_they_should_be(client, content, kind, status):
    answer = client.put("/api/notes/1", content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == status and answer.json()["error"]
    assert "1" not in client.get("/api/notes").json()["latents"]


def test_a_body_without_a_length_is_cut_off_as_well(client):
    def endless():
        for _ in range(200):
            yield b" " * (1 << 20)

    answer = client.put("/api/notes/1", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_notes_of_latents_that_are_not_there_are_refused(client):
    for latent in ("40", "-1", "x", "9" * 12):
        assert client.put(f"/api/notes/{latent}", json={"star": True}).status_code == 404


# ---- the document


def test_every_route_is_documented_and_every_documented_one_is_there(client, atlases):
    with served(BrowseConfig(atlas=atlases[0])) as shown:
        routes = application(shown).app.routes
    there = {
        (method, route.path)
        for route in routes
        for method in route.methods - {"HEAD"}
        if route.path.startswith("/api/")
    }
    assert there == {(end.method, end.path) for end in openapi.ENDPOINTS}
    found = client.get("/api/openapi.json").json()
    assert found == json.loads(json.dumps(openapi.document())) and found["openapi"].startswith("3.1")
    names = [op["operationId"] for path in found["paths"].values() for op in path.values()]
    assert len(names) == len(set(names)) == len(there)
    for end in openapi.ENDPOINTS:
        assert set(re.findall(r"{(\w+)}", end.path)) == {
            p["name"] for p in end.parameters if p["in"] == "path"
        }


ASKED = {
    "/api/texts/{text}": "/api/texts/0",
    "/api/graphs/{graph}": "/api/graphs/0",
    "/api/latents/{latent}": "/api/latents/3",
    "/api/latents/{latent}/examples": "/api/latents/3/examples",
    "/api/contexts": "/api/contexts?ids=0,7",
    "/api/compare/{latent}": "/api/compare/3",
}


def test_real_answers_are_what_the_document_says(tmp_path):
    """Of an atlas with everything: explanations, report, effects, chosen texts, notes."""
    inputs = build_all(tmp_path, SyntheticConfig(), {5: "names of rivers", 8: None})
    build(tmp_path / "beside", SMALL)
    sent = {
        "/api/notes/{latent}": ("/api/notes/3", {"star": True, "tags": ["a"], "note": "b"}),
        "/api/ratings": ("/api/ratings", {"session": "s", "latent": 3, "verdict": "unclear"}),
        "/api/notes": ("/api/notes", {"kind": "notes", "latents": {"4": {"star": True}}, "ratings": []}),
    }
    config = BrowseConfig(**inputs, against=(tmp_path / "beside",), write=True)
    with client_of(config) as client:
        # What is written first: PUT, POST, GET.
        for end in sorted(openapi.ENDPOINTS, key=lambda end: end.method, reverse=True):
            if end.method != "GET" and end.path not in sent:
                continue  # the model's: see test_live
            path, body = sent[end.path] if end.method != "GET" else (ASKED.get(end.path, end.path), None)
            assert body is None or complaints(body, end.body) == []
            answer = client.request(end.method, path, json=body)
            assert answer.status_code == 200, answer.text
            assert complaints(answer.json(), end.answer, path)[:5] == []
            assert unnamed(answer.json(), end.answer, path)[:5] == []
        whole = client.get("/api/latents/3").json()
        for spoiled in ({**whole, "id": "3"}, {**whole, "density": True}, {"id": 3}):
            assert complaints(spoiled, schemas.LATENT), "the check can fail"


def test_the_document_says_what_the_model_s_process_takes():
    bodies = {end.path: end.body["properties"] for end in openapi.ENDPOINTS if end.body is not None}
    asked = bodies["/api/live/generate"]
    assert asked["seed"]["maximum"] == 2**31 - 1 and asked["steer"]["maxItems"] == 20
    assert bodies["/api/live/prompt"]["latents"]["maxItems"] == 50


def _values(schema: dict) -> st.SearchStrategy:
    """Values near a schema: some fit, some do not."""
    anything = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    )
    if "properties" in schema:
        fields = {name: _values(field) for name, field in schema["properties"].items()}
        return st.fixed_dictionaries({}, optional=fields) | st.dictionaries(
            st.text(max_size=5), anything, max_size=2
        )
    if schema.get("type") == "integer":
        return st.integers(-2, 60) | anything
    if schema.get("type") == "string":
        return st.text(max_size=12) | anything
    if schema.get("type") == "array":
        return st.lists(_values(schema.get("items", {})), max_size=3) | anything
    return anything


@pytest.mark.parametrize("end", openapi.ENDPOINTS, ids=lambda end: f"{end.method} {end.path}")
def test_whatever_is_asked_the_answer_is_a_documented_one(client, end):
    known = {200, *openapi.ALWAYS, *end.failures} - {500}
    path_part = st.text(alphabet="0123456789abc-.%", min_size=1, max_size=6) | st.integers(0, 50).map(str)
    query = st.dictionaries(
        st.sampled_from([p["name"] for p in end.parameters if p["in"] == "query"] or ["x"]),
        st.integers(-1, 3).map(str) | st.text(max_size=6),
        max_size=2,
    )

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(path_part, query, _values(end.body) if end.body else st.none())
    def ask(part: str, query: dict, body: object) -> None:
        from urllib.parse import quote

        path = re.sub(r"{\w+}", quote(part, safe=""), end.path)
        content = None if end.body is None else json.dumps(body).encode()
        answer = client.request(
            end.method, path, params=query, content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code in known, (answer.status_code, answer.text[:200], path, query, body)
        found = answer.json()
        assert answer.status_code == 200 or list(found) == ["error"]
        if answer.status_code == 200 and not end.path.startswith("/api/live/"):
            assert all(name in found for name in end.answer.get("required", ()))

    ask()


# ---- the model


def test_questions_go_to_the_model_and_refusals_come_back(client, model):
    asked = {"text": "a river", "n_latents": 3}
    answer = client.post("/api/live/prompt", json={**asked, "job": "mine"})
    assert answer.json() == {"verb": "prompt", "arguments": asked, "job": "mine"}
    assert client.post("/api/live/embed", json={"text": "x"}).json()["job"], "a name is made if there is none"
    assert client.post("/api/live/cancel", json={"job": "mine"}).json() == {"cancelled": True}
    assert client.post("/api/live/cancel", json={}).status_code == 400
    assert client.get("/api/live").json()["state"] == "ready"
    for status in (409, 422, 429, 502, 504):
        model.refusal = Refusal(status, "the rule", "a value", "Do this.")
        answer = client.post("/api/live/generate", json={"prompt": "x"})
        assert answer.status_code == status
        assert answer.json() == {"error": "the rule, got a value. Do this."}
    model.refusal = None


# ---- damage


def _break(path, *, schema: int | None = None) -> None:
    import duckdb

    database = path / "atlas.duckdb"
    if schema is None:
        database.write_bytes(database.read_bytes()[:-100])
        return
    with duckdb.connect(str(database)) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", [str(schema)])
    meta = json.loads((path / "meta.json").read_text())
    meta["files"]["atlas.duckdb"]["bytes"] = database.stat().st_size
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("schema", "message"),
    [(None, "truncated"), (999, "Upgrade sememe to read it"), (1, "Run `sememe interpret` again")],
)
def test_an_atlas_that_cannot_be_read_is_a_page_and_an_export_that_fails(tmp_path, capsys, schema, message):
    build(tmp_path / "atlas", SMALL)
    _break(tmp_path / "atlas", schema=schema)
    with client_of(BrowseConfig(atlas=tmp_path / "atlas")) as client:
        assert client.get("/").status_code == 200 and client.get("/static/js/app.js").status_code == 200
        for path in ("/api/overview", "/api/index", "/api/latents/3"):
            answer = client.get(path)
            assert answer.status_code == 500 and message in answer.json()["error"]
        assert message in client.get("/api/session").json()["atlases"][0]["error"]
    with pytest.raises(ArtifactError, match=message):
        export(ExportConfig(atlas=tmp_path / "atlas", out=tmp_path / "site"))
    assert _run(["browse", str(tmp_path / "atlas"), "--export", str(tmp_path / "site")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "site").exists()


def test_a_damaged_atlas_beside_a_whole_one_spoils_only_itself(tmp_path):
    build(tmp_path / "one", SMALL)
    build(tmp_path / "two", SMALL)
    _break(tmp_path / "two")
    with client_of(BrowseConfig(atlas=tmp_path / "one", against=(tmp_path / "two",))) as client:
        assert client.get("/api/overview").status_code == 200
        assert client.get("/api/overview?atlas=1").status_code == 500
        assert client.get("/api/overview?atlas=2").status_code == 404
        assert client.get("/api/compare").status_code == 500


def test_a_damaged_atlas_s_page_is_served_with_live_as_well(tmp_path, monkeypatch):
    build(tmp_path / "atlas", SMALL)
    _break(tmp_path / "atlas")
    seen = []
    monkeypatch.setattr("sememe.browse.browse", lambda config, live: seen.append((config.atlas, live)))
    assert _run(["browse", str(tmp_path / "atlas"), "--live"]) == 0
    assert seen == [(tmp_path / "atlas", None)]


def test_the_command_serves_a_damaged_atlas_s_page_and_fails_at_the_end(tmp_path):
    build(tmp_path / "atlas", SMALL)
    _break(tmp_path / "atlas")
    process = subprocess.Popen(
        [sys.executable, "-m", "sememe", "browse", str(tmp_path / "atlas")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert "Serving" in process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1 and "truncated" in err
    finally:
        process.kill()
        process.wait()


# ---- the command


def test_options_without_effect_are_errors(atlases, tmp_path, capsys):
    export_ = ["browse", str(atlases[0]), "--export", str(tmp_path / "site")]
    for more, message in (
        ([*export_, "--write"], "--write must be left out with --export"),
        ([*export_, "--live"], "--live must be left out with --export"),
        ([*export_, "--host", "0.0.0.0"], "--host must be left out with --export"),
        (["browse", str(atlases[0]), "--model", "x"], "--model must go with --live"),
        (["browse", str(atlases[0]), "--live"], "Name it with --dictionary"),
    ):
        assert _run(more) == 2, more
        assert message in capsys.readouterr().err


def test_the_server_with_a_model_s_process_never_loads_torch(tmp_path):
    import httpx
    from live_world import make_live_world

    world = make_live_world(tmp_path)
    code = (
        "import sys; from sememe.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules, flush=True)"
    )
    command = ["browse", str(world.root / "atlas"), "--live", "--dictionary", str(world.dictionary)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found
        with httpx.Client(base_url=found[0], timeout=120) as client:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("api/session").json()["live"]:
                        break
                assert time.monotonic() < deadline
                time.sleep(0.1)
            answer = client.post("api/live/prompt", json={"text": "the river", "n_latents": 2})
            assert answer.status_code == 200 and answer.json()["tokens"][-1]["latents"]
            answer = client.post("api/live/prompt", json={"text": "the river", "latents": [99]})
            assert answer.status_code == 422 and "[0, 47], got 99" in answer.json()["error"]
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and out.strip() == "False False"
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_does_not_wait_for_the_model(atlases):
    import httpx

    slow = 'import sys, time; print(\'{"state": "ready"}\', flush=True); time.sleep(600)'
    code = (
        "import sys; from sememe.browse import BrowseConfig, Child, browse; "
        "browse(BrowseConfig(atlas=sys.argv[1]), live=Child([sys.executable, '-c', sys.argv[2]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(atlases[0]), slow], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found
        asked = threading.Thread(
            target=lambda: _quietly(
                lambda: httpx.post(found[0] + "api/live/embed", json={"text": "x"}, timeout=60)
            )
        )
        asked.start()
        deadline = time.monotonic() + 30
        while _quietly(lambda: httpx.get(found[0] + "api/live").json()["state"]) != "busy":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        asked.join(15)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _quietly(call):
    import httpx

    try:
        return call()
    except httpx.HTTPError:
        return None


def test_a_host_that_is_not_ours_is_no_host(atlases):
    with pytest.raises(ConfigError, match="host must be"):
        BrowseConfig.build({"host": ""})
