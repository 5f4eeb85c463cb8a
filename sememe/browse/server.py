"""The page and its JSON over HTTP.

Knows `Data`, notes, `Live`, the page's files and HTTP. On this machine only and read-only unless asked for more; who
may ask is `guard.py`'s matter, what can be asked stands in `openapi.py`. Files are answered from a dictionary read at
the start, so that no request ever becomes a path. What needs a model goes to a child process: torch is never loaded.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from sememe.browse import openapi, page
from sememe.browse.compared import Compared, Side
from sememe.browse.data import Data
from sememe.browse.guard import Door, Guard, body_of, json_response, refused
from sememe.browse.live import VERBS, Live, LiveError, Refusal
from sememe.browse.notes import NotesFile
from sememe.browse.together import Served, session
from sememe.browse.whole import WHOLE, Whole
from sememe.browse.written import dump
from sememe.errors import ConfigError, SememeError

__all__ = ["MAX_CONTEXTS", "application"]

MAX_CONTEXTS = 256
Json = dict[str, Any]
Answer = Callable[[Request], Awaitable[Response]]


def application(
    data: Data | SememeError | Sequence[Served] | Whole, *, live: Live | None = None, door: Door | None = None
) -> ASGIApp:
    """The server as an ASGI application, for tests and for other servers.

    Args:
        data: The atlas, or several; or their answers, some of which may be made already.
        live: Who answers what needs a model.
        door: What a request must show; a server of this machine alone if not given.
    """
    if not isinstance(data, Whole):
        data = Whole(list(data) if isinstance(data, Sequence) else [Served(data)])
    api = _Api(data, live)
    routes = [
        Route("/", api.page),
        Route("/static/{name:path}", api.static),
        Route("/api/openapi.json", api.openapi),
        Route("/api/session", api.session),
        *(Route(f"/api/{name}", api.whole(name)) for name in WHOLE),
        Route("/api/texts/{text}", api.text),
        Route("/api/graphs/{graph}", api.graph),
        Route("/api/latents/{latent}", api.latent),
        Route("/api/latents/{latent}/examples", api.examples),
        Route("/api/contexts", api.contexts),
        Route("/api/compare", api.compare),
        Route("/api/compare/{latent}", api.compare),
        Route("/api/notes", api.notes, methods=["GET"]),
        Route("/api/notes", api.import_notes, methods=["POST"]),
        Route("/api/notes/{latent}", api.put_note, methods=["PUT"]),
        Route("/api/ratings", api.put_rating, methods=["PUT"]),
        Route("/api/live", api.live_status),
        Route("/api/live/cancel", api.cancel, methods=["POST"]),
        *(Route(f"/api/live/{verb}", api.ask(verb), methods=["POST"]) for verb in VERBS),
    ]
    handlers = {
        HTTPException: _refused,
        LiveError: _unanswered,
        ConfigError: _misunderstood,
        SememeError: _failed,
        Exception: _failed,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), door or Door())


class _Api:
    """Answers requests."""

    def __init__(self, whole: Whole, live: Live | None) -> None:
        self._whole, self.served, self.live = whole, whole.served, live
        self.html = page.index_html("served").encode()
        self.files = page.static_files()
        self._compared: dict[tuple[int, int], Compared] = {}
        self._lock = threading.Lock()

    # ---- the page --------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return Response(self.html, headers={"content-type": page.CONTENT_TYPES[".html"]})

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = self.files.get(name)
        if content is None:
            raise refused(404, "a file must be one of the page's own", name[:60], "Reload the page.")
        return Response(content, headers={"content-type": page.CONTENT_TYPES[Path(name).suffix]})

    async def openapi(self, request: Request) -> Response:
        return json_response(dump(openapi.document()))

    async def session(self, request: Request) -> Response:
        return json_response(dump(session(self.served, live=self.live is not None)))

    # ---- the atlas -------------------------------------------------------------------------------------------------

    def _number(self, request: Request, name: str = "atlas", default: int = 0) -> int:
        """Which atlas a request is about."""
        given = request.query_params.get(name, str(default))
        number = _whole_number(given)
        if number is None or number >= len(self.served):
            raise refused(
                404,
                f"`{name}` must be the number of an atlas that is served, 0 to {len(self.served) - 1}",
                repr(given[:20]),
                "See /api/session for what is served.",
            )
        return number

    def _data(self, number: int) -> Data:
        return self._whole.data(number)

    def whole(self, name: str) -> Answer:
        async def answer(request: Request) -> Response:
            plain, packed = await run_in_threadpool(self._whole.made, self._number(request), name)
            if "gzip" in request.headers.get("accept-encoding", ""):
                return json_response(packed, {"content-encoding": "gzip", "vary": "accept-encoding"})
            return json_response(plain, {"vary": "accept-encoding"})

        return answer

    async def latent(self, request: Request) -> Response:
        return await self._one(request, self._data(self._number(request)).latent)

    async def examples(self, request: Request) -> Response:
        return await self._one(request, self._data(self._number(request)).examples)

    async def _one(self, request: Request, read: Callable[[int], Any]) -> Response:
        latent = _whole_number(request.path_params["latent"])
        found = await run_in_threadpool(read, latent) if latent is not None else None
        if found is None:
            raise _no_latent(request)
        return json_response(dump(found))

    async def text(self, request: Request) -> Response:
        place = _whole_number(request.path_params["text"])
        found = self._data(self._number(request)).text(place) if place is not None else None
        if found is None:
            raise refused(
                404,
                "a chosen text must be one of those that the atlas is shown with",
                repr(request.path_params["text"][:20]),
                "See `texts` of /api/overview, or name more with --prompts.",
            )
        return json_response(dump(found))

    async def graph(self, request: Request) -> Response:
        place = _whole_number(request.path_params["graph"])
        found = self._data(self._number(request)).graph(place) if place is not None else None
        if found is None:
            raise refused(
                404,
                "a graph must be one of those that the atlas is shown with",
                repr(request.path_params["graph"][:20]),
                "See `graphs` of /api/overview, or name more with --graph.",
            )
        return json_response(dump(found))

    async def contexts(self, request: Request) -> Response:
        data = self._data(self._number(request))
        ids = [_whole_number(part) for part in request.query_params.get("ids", "").split(",")]
        known = [one for one in ids if one is not None]
        if len(known) != len(ids):
            raise refused(
                400,
                "`ids` must be whole numbers with commas between them",
                repr(request.query_params.get("ids", "")[:40]),
                "Ask for ?ids=0,7, say.",
            )
        if len(ids) > MAX_CONTEXTS:
            raise refused(
                400,
                f"at most {MAX_CONTEXTS} contexts can be asked for at once",
                len(ids),
                "Ask in several requests.",
            )
        return json_response(dump(await run_in_threadpool(data.contexts, known)))

    async def compare(self, request: Request) -> Response:
        mine, other = self._number(request), self._number(request, "with", 1)
        if mine == other:
            raise refused(
                400, "an atlas must be compared with another one", f"{mine} with itself", "Change `with`."
            )
        compared = await run_in_threadpool(self._pair, mine, other)
        if "latent" not in request.path_params:
            return json_response(dump(await run_in_threadpool(compared.pairs)))
        return await self._one(request, compared.of)

    def _pair(self, mine: int, other: int) -> Compared:
        with self._lock:
            if (mine, other) not in self._compared:
                sides = [Side(self._data(i), self.served[i].dictionary) for i in (mine, other)]
                self._compared[mine, other] = Compared(*sides)
            return self._compared[mine, other]

    # ---- notes -----------------------------------------------------------------------------------------------------

    async def notes(self, request: Request) -> Response:
        notes = self.served[self._number(request)].notes
        found = (
            await run_in_threadpool(notes.as_json)
            if notes is not None
            else {"kind": "notes", "latents": {}, "ratings": []}
        )
        return json_response(dump({**found, "write": notes is not None and notes.write}))

    async def import_notes(self, request: Request) -> Response:
        notes = self._writable(request)
        ids = await run_in_threadpool(self._ids, self._number(request))
        return json_response(dump(await run_in_threadpool(notes.merge, await body_of(request), ids)))

    async def put_note(self, request: Request) -> Response:
        notes, latent = self._writable(request), _whole_number(request.path_params["latent"])
        if latent is None or latent not in await run_in_threadpool(self._ids, self._number(request)):
            raise _no_latent(request)
        return json_response(dump(await run_in_threadpool(notes.put, latent, await body_of(request))))

    async def put_rating(self, request: Request) -> Response:
        notes = self._writable(request)
        ids = await run_in_threadpool(self._ids, self._number(request))
        return json_response(dump(await run_in_threadpool(notes.rate, await body_of(request), ids)))

    def _ids(self, number: int) -> frozenset[int]:
        return frozenset(self._data(number).ids)

    def _writable(self, request: Request) -> NotesFile:
        notes = self.served[self._number(request)].notes
        if notes is None or not notes.write:
            raise refused(
                403,
                "an atlas must be served with --write to keep notes",
                "one that is only read",
                "Serve it with `sememe browse ATLAS --write`.",
            )
        return notes

    # ---- the model -------------------------------------------------------------------------------------------------

    async def live_status(self, request: Request) -> Response:
        if self.live is None:
            return json_response(dump({"state": "off", "reason": NO_MODEL}))
        return json_response(dump(await run_in_threadpool(self.live.status)))

    def ask(self, verb: str) -> Answer:
        async def answer(request: Request) -> Response:
            arguments = await body_of(request)
            if self.live is None:
                raise HTTPException(503, NO_MODEL)
            job = arguments.pop("job", "") or uuid.uuid4().hex
            if not isinstance(job, str) or len(job) > 100:
                raise refused(
                    400,
                    "a job's name must be a text of at most 100 letters",
                    type(job).__name__ if not isinstance(job, str) else f"{len(job)} letters",
                    "Shorten it, or leave it out.",
                )
            asking = asyncio.ensure_future(run_in_threadpool(self.live.ask, verb, arguments, job))
            try:
                while not asking.done():
                    await asyncio.wait({asking}, timeout=0.25)
                    if not asking.done() and await request.is_disconnected():
                        # Nobody waits for the answer any more.
                        await run_in_threadpool(self.live.cancel, job)
            except asyncio.CancelledError:
                self.live.cancel(job)  # the server stops
                raise
            return json_response(dump(await asking))

        return answer

    async def cancel(self, request: Request) -> Response:
        arguments = await body_of(request)
        job = arguments.get("job")
        if not isinstance(job, str) or not job:
            raise refused(
                400,
                "`job` must be the name of a job",
                repr(job)[:40],
                "Send the name that was sent with the question.",
            )
        done = self.live is not None and await run_in_threadpool(self.live.cancel, job)
        return json_response(dump({"cancelled": done}))


NO_MODEL = str(
    SememeError("a model must answer this", "none", "Serve the atlas with `sememe browse ATLAS --live`.")
)


def _whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _no_latent(request: Request) -> HTTPException:
    return refused(
        404,
        "a latent must be one of the atlas's",
        repr(request.path_params["latent"][:20]),
        "See `id` of /api/index for those there are.",
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason, headers = error.detail, error.headers
    if error.status_code == 405:
        taken = _methods(request)
        headers = {"allow": taken}
        reason = refused(
            405, f"{request.url.path[:60]} must be asked by {taken}", request.method, SEE_DOCUMENT
        ).detail
    elif (error.status_code, reason) == (404, "Not Found"):  # the router's own words
        reason = refused(
            404, "an address must be one that is served", request.url.path[:60], SEE_DOCUMENT
        ).detail
    return json_response(dump({"error": reason}), headers, status=error.status_code)


SEE_DOCUMENT = "See /api/openapi.json for what can be asked."


def _methods(request: Request) -> str:
    """What an address takes; several routes may share it, each with methods of its own."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return ", ".join(sorted(found))


async def _unanswered(request: Request, error: Exception) -> Response:
    assert isinstance(error, LiveError)
    refusal: Refusal = error.refusal
    return json_response(dump({"error": str(error)}), status=refusal.status)


async def _misunderstood(request: Request, error: Exception) -> Response:
    return json_response(dump({"error": str(error)}), status=400)


async def _failed(request: Request, error: Exception) -> Response:
    message = (
        str(error)
        if isinstance(error, SememeError)
        else f"{type(error).__name__}; see the server's terminal."
    )
    return json_response(dump({"error": message}), status=500)
