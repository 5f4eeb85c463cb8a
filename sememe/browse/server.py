"""The page and its JSON over HTTP, on this machine only, read-only.

Knows `Data`, the page's files and HTTP. Files are answered from a dictionary read at the start, so that no request
ever becomes a path. Requests must name this machine as their host: a page elsewhere cannot reach this server by
pointing its own name at 127.0.0.1. Never loads torch.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sememe.browse import page
from sememe.browse.data import Data
from sememe.browse.inputs import Inputs, opened
from sememe.errors import SememeError, ServerError

__all__ = ["BrowseConfig", "application", "browse"]

HOST = "127.0.0.1"
DEFAULT_PORT, PORTS_TRIED = 8000, 100
MAX_CONTEXTS = 256
MAX_QUERY_BYTES = 8192

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class BrowseConfig(Inputs):
    """What is shown, and on which port."""

    port: int | None = pydantic.Field(default=None, ge=1, le=65535)
    """The port on 127.0.0.1; without one, 8000 or the next that is free."""
    open: bool = False
    """Open the page in the default web browser."""


def browse(config: BrowseConfig) -> None:
    """Serve an atlas as a web page until interrupted.

    Args:
        config: What is shown, and where.
    Raises:
        ArtifactError: the folder is not an atlas.
        CorruptError: the atlas is damaged.
        MismatchError: explanations or report are of another atlas.
        ServerError: the port is taken, or none is free.
    """
    import uvicorn

    with opened(config) as (data, _), _listen(config.port) as listening:
        app = application(data)
        url = f"http://{HOST}:{listening.getsockname()[1]}/"
        print(f"Serving {config.atlas} at {url} (Ctrl+C stops it)", flush=True)
        if config.open:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none"
            )
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def _listen(port: int | None) -> socket.socket:
    """A listening socket: the port asked for, or the first free one from 8000."""
    candidates = [port] if port is not None else list(range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED))
    for candidate in candidates:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((HOST, candidate))
            listening.listen(128)
            return listening
        except OSError as error:
            listening.close()
            reason = error.strerror or str(error)
    if port is not None:
        raise ServerError(
            f"port {port} of {HOST} must be free",
            reason,
            "Stop what uses it, name another --port, or leave --port out.",
        )
    raise ServerError(
        f"a port between {candidates[0]} and {candidates[-1]} of {HOST} must be free",
        reason,
        "Name another with --port.",
    )


def application(data: Data) -> ASGIApp:
    """The server as an ASGI application, for tests and for other servers."""
    api = _Api(data)
    routes = [
        Route("/", api.page),
        Route("/static/{name:path}", api.static),
        Route("/api/overview", api.whole("overview")),
        Route("/api/index", api.whole("index")),
        Route("/api/tokens", api.whole("tokens")),
        Route("/api/search", api.whole("search")),
        Route("/api/details", api.whole("details")),
        Route("/api/embeddings", api.whole("embeddings")),
        Route("/api/texts/{text}", api.text),
        Route("/api/latents/{latent}", api.latent),
        Route("/api/latents/{latent}/examples", api.examples),
        Route("/api/contexts", api.contexts),
    ]
    app = Starlette(
        routes=routes, exception_handlers={HTTPException: _refused, SememeError: _failed, Exception: _failed}
    )
    return _Guard(app)


class _Api:
    """Answers requests from the atlas. The four answers that describe the whole are made once."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.html = page.index_html("served").encode()
        self.files = page.static_files()
        self._whole: dict[str, tuple[bytes, bytes]] = {}
        self._lock = threading.Lock()

    async def page(self, request: Request) -> Response:
        return Response(self.html, headers={"content-type": page.CONTENT_TYPES[".html"]})

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = self.files.get(name)
        if content is None:
            raise HTTPException(404, "No such file.")
        return Response(content, headers={"content-type": page.CONTENT_TYPES[Path(name).suffix]})

    def whole(self, name: str) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            plain, packed = await run_in_threadpool(self._made, name)
            if "gzip" in request.headers.get("accept-encoding", ""):
                return _json(packed, {"content-encoding": "gzip", "vary": "accept-encoding"})
            return _json(plain, {"vary": "accept-encoding"})

        return answer

    def _made(self, name: str) -> tuple[bytes, bytes]:
        with self._lock:
            if name not in self._whole:
                plain = _dump(getattr(self.data, name)())
                self._whole[name] = plain, gzip.compress(plain, compresslevel=4)
            return self._whole[name]

    async def latent(self, request: Request) -> Response:
        return await self._one(request, self.data.latent)

    async def examples(self, request: Request) -> Response:
        return await self._one(request, self.data.examples)

    async def _one(self, request: Request, read: Callable[[int], Any]) -> Response:
        text = request.path_params["latent"]
        latent = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        found = await run_in_threadpool(read, latent) if latent >= 0 else None
        if found is None:
            raise HTTPException(404, f"The atlas has no latent {text[:20]!r}.")
        return _json(_dump(found))

    async def text(self, request: Request) -> Response:
        text = request.path_params["text"]
        found = self.data.text(int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else None
        if found is None:
            raise HTTPException(404, f"There is no chosen text {text[:20]!r}.")
        return _json(_dump(found))

    async def contexts(self, request: Request) -> Response:
        parts = request.query_params.get("ids", "").split(",")
        if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
            raise HTTPException(400, "ids must be whole numbers with commas between them.")
        if len(parts) > MAX_CONTEXTS:
            raise HTTPException(400, f"At most {MAX_CONTEXTS} contexts can be asked for at once.")
        return _json(_dump(await run_in_threadpool(self.data.contexts, [int(part) for part in parts])))


def _dump(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _json(content: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(
        content, status, headers={"content-type": "application/json; charset=utf-8", **(headers or {})}
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(_dump({"error": error.detail}), status=error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    message = (
        str(error)
        if isinstance(error, SememeError)
        else f"{type(error).__name__}; see the server's terminal."
    )
    return _json(_dump({"error": message}), status=500)


class _Guard:
    """Refuses what is not a small GET for this machine, and sets the security headers of every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # start and stop; there are no web sockets
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        refusal = _refusal(scope)
        if refusal is not None:
            status, reason = refusal
            await _json(_dump({"error": reason}), status=status)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1 or _name(hosts[0]) not in ("127.0.0.1", "localhost", "[::1]"):
        return 403, "The Host header must name this machine."
    if scope["method"] not in ("GET", "HEAD"):
        return 405, "The atlas can only be read."
    if len(scope.get("query_string", b"")) > MAX_QUERY_BYTES:
        return 414, "The address is too long."
    return None


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdigit() else host.lower()
