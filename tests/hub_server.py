"""A stand-in for the hub on this machine, as far as its client asks: repositories, uploads, downloads.

Large files (`lfs_suffixes`) go the way of large files, each by itself and by its hash; small ones into the commit. It
can refuse, and it can cut connections off. `HUB` of the client is pointed at it by `point_at`.

    with serving() as hub:
        point_at(monkeypatch, hub.url)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

__all__ = ["Hub", "point_at", "serving"]


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path | None = None) -> None:
    """Make `url` the hub, also when an earlier test has imported its client, which reads the variables only then.

    Args:
        monkeypatch: The test's.
        url: Where the stand-in serves.
        cache: Where downloads are kept; the machine's own place if not given.
    """
    import huggingface_hub.constants

    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    constants: dict[str, Any] = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    if cache is not None:
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        constants["HF_HUB_CACHE"] = str(cache)
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


class Hub(ThreadingHTTPServer):
    """The stand-in. `content` is what each repository holds, by path; `log` is every request, method and path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by their hash; they stay where an upload is cut off before its commit."""
        self.lfs_suffixes: tuple[str, ...] = (".safetensors", ".duckdb")
        self.refuse = False
        self.cut_uploads: set[int] = set()
        """Which uploads of large files are cut off, counted from 0."""
        self.cut_downloads: dict[str, int] = {}
        """Of which file only so many bytes are sent, once."""
        self.unplugged = False
        """Whether a download that is cut off is the last thing that is answered, until this is set back."""
        self.ranges: list[str] = []
        """Parts of files that were asked for."""
        self.log: list[tuple[str, str]] = []
        self.n_puts = 0
        self.away = False
        """Whether nothing is answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def hold(self, repo: str, files: Mapping[str, bytes]) -> None:
        """Put a repository there."""
        self.content[repo], self.private[repo] = dict(files), False

    def hold_folder(self, repo: str, folder: Path) -> None:
        """Put a folder there as a repository."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.hold(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def sha(self, repo: str) -> str:
        """The commit that a repository is at: of what it holds."""
        names = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.content[repo].items())
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that a client drops are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None: ...

    def answer(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None, *, body: bool = True
    ) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        if not isinstance(value, bytes):
            self.send_header("Content-Type", "application/json")
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def missing(self, what: str, *, body: bool = True) -> None:
        self.answer({"error": f"{what} not found"}, 404, {"X-Error-Code": what}, body=body)

    def cut_off(self) -> None:
        """As if the cable were pulled."""
        self.close_connection = True
        self.connection.close()

    # -- reading -----------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.read(body=False)

    def do_GET(self) -> None:
        self.read(body=True)

    def read(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        if self.server.away:
            self.cut_off()
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/(.*))?", path):
            repo, kind = found[1], found[2]
            if repo not in self.server.content:
                self.missing("RepoNotFound", body=body)
            elif found[3] is not None and unquote(found[3]) not in ("main", self.server.sha(repo)):
                self.missing("RevisionNotFound", body=body)
            elif kind == "tree":
                self.answer([_entry(name, data) for name, data in self.server.content[repo].items()])
            else:
                self.answer(self.about(repo))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(found[1], found[2], body=body)
        else:
            self.missing("EntryNotFound", body=body)

    def about(self, repo: str) -> dict[str, Any]:
        return {
            "id": repo,
            "sha": self.server.sha(repo),
            "private": self.server.private[repo],
            "tags": [],
            "siblings": [{"rfilename": name} for name in self.server.content[repo]],
        }

    def file(self, repo: str, name: str, *, body: bool) -> None:
        if repo not in self.server.content:
            self.missing("RepoNotFound", body=body)
        elif name not in self.server.content[repo]:
            self.missing("EntryNotFound", body=body)
        else:
            content = self.server.content[repo][name]
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": self.server.sha(repo),
                "Accept-Ranges": "bytes",
            }
            start, status = 0, 200
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                self.server.ranges.append(wanted[0])
                start, status = int(wanted[1]), 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if body and name in self.server.cut_downloads:
                n = self.server.cut_downloads.pop(name)
                self.send_response(status)
                for key, text in {**headers, "Content-Length": str(len(content) - start)}.items():
                    self.send_header(key, text)
                self.end_headers()
                self.wfile.write(content[start : start + n])
                self.wfile.flush()
                self.server.away = self.server.unplugged
                self.cut_off()
            else:
                self.answer(content[start:], status, headers, body=body)

    # -- writing -----------------------------------------------------------------------------------

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self.server.log.append(("PUT", path))
        number, self.server.n_puts = self.server.n_puts, self.server.n_puts + 1
        if number in self.server.cut_uploads:
            self.cut_off()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.objects[path.rsplit("/", 1)[1]] = body
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.server.log.append(("POST", path))
        if self.server.refuse:
            self.answer({"error": "no write access"}, 403)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.content.setdefault(name, {})
            hidden = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.private.setdefault(name, hidden)
            self.answer({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.*", path):
            self.answer({"files": [self.mode(found[1], file) for file in json.loads(body)["files"]]})
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.answer({"objects": [self.upload(wanted) for wanted in json.loads(body)["objects"]]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.missing("EntryNotFound")

    def mode(self, repo: str, file: Mapping[str, Any]) -> dict[str, Any]:
        """Which way a file is to go, and what is there of that name."""
        large = file["path"].endswith(self.server.lfs_suffixes)
        there = self.server.content[repo].get(file["path"])
        oid = None if there is None else _entry(file["path"], there, large=large)["oid"]
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def upload(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Where a large file is to be put; nowhere if it is there."""
        about = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.server.objects:
            return about
        return about | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.content[repo]
        for item in lines:
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.server.sha(repo)
        self.answer(
            {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "success": True}
        )


def _entry(name: str, data: bytes, *, large: bool = False) -> dict[str, Any]:
    """A file of a listing; small ones are known by git's hash of them, large ones by their own."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    own = hashlib.sha256(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": own if large else blob}


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in that serves until the block ends."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
