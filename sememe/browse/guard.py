"""Who may ask the browser's server what: its names, its token, and what a request that changes something must show.

Knows HTTP and nothing of atlases. A page elsewhere must not reach this server: it cannot by pointing its own name at
this machine (the Host header must be one of ours), nor by sending a form or a request across origins (requests that
are not GET or HEAD must come from this page, as JSON), nor from another machine without the token.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sememe.browse.written import dump
from sememe.errors import SememeError

__all__ = [
    "LOCAL",
    "MAX_BODY_BYTES",
    "MAX_QUERY_BYTES",
    "READING",
    "SECURITY_HEADERS",
    "Door",
    "Guard",
    "body_of",
    "door_of",
    "json_response",
    "refused",
]

LOCAL = ("127.0.0.1", "localhost", "[::1]")
MAX_QUERY_BYTES = 8192
MAX_BODY_BYTES = 4 << 20
READING = ("GET", "HEAD")
COOKIE = "sememe_token"

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


class Door(NamedTuple):
    """What a request must show to be let in."""

    names: frozenset[str] = frozenset(LOCAL)
    """Host names that are this server's, in lower case, without ports."""
    addresses: bool = False
    """Whether any numerical address will do as well: where it listens on all of them."""
    token: str | None = None
    """What else must be shown: in the address once, by a cookie from then on, or as a bearer's token."""


def door_of(host: str) -> Door:
    """The door of a server that listens on `host`: without a token on this machine alone, with a new one elsewhere."""
    bare = host.strip("[]").lower()
    if bare == "localhost" or _is(bare, "is_loopback"):
        return Door(frozenset({*LOCAL, _written(bare)}))
    token = secrets.token_urlsafe(24)
    if not _is(bare, "is_unspecified"):
        return Door(frozenset({_written(bare)}), token=token)
    names = {*LOCAL, socket.gethostname().lower(), socket.getfqdn().lower()}
    return Door(frozenset(names), addresses=True, token=token)


def _is(host: str, what: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(host), what))
    except ValueError:
        return False


def _written(bare: str) -> str:
    """A host as it stands in a Host header."""
    return f"[{bare}]" if ":" in bare else bare


class Guard:
    """An application behind a door; sets the security headers of every answer.

    Args:
        app: What stands behind it.
        door: What a request must show.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # start and stop; there are no web sockets
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        answer = self._instead(scope)
        await (answer if answer is not None else self.app)(scope, receive, guarded)

    def _instead(self, scope: Scope) -> Response | None:
        """The answer to a request that does not come in."""
        refusal = _refusal(scope, self.door)
        if refusal is None:
            return _entered(scope, self.door) if self.door.token is not None else None
        return json_response(dump({"error": refusal.detail}), status=refusal.status_code)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _refusal(scope: Scope, door: Door) -> HTTPException | None:
    hosts = _values(scope, b"host")
    if len(hosts) != 1 or not _ours(_name(hosts[0]), door):
        return refused(
            403,
            "the Host header must name this machine",
            ", ".join(hosts)[:60] or "none",
            "Open the address that `sememe browse` printed.",
        )
    if (size := len(scope.get("query_string", b""))) > MAX_QUERY_BYTES:
        return refused(
            414,
            f"an address's query must be at most {MAX_QUERY_BYTES:,} bytes",
            f"{size:,}",
            "Ask for less at once.",
        )
    if scope["method"] in READING:
        return None
    site, origin = _values(scope, b"sec-fetch-site"), _values(scope, b"origin")
    ours = f"{scope.get('scheme', 'http')}://{hosts[0].lower()}"
    if any(value not in ("same-origin", "none") for value in site) or any(
        value.lower() != ours for value in origin
    ):
        return refused(
            403,
            "a request that changes something must come from this server's own page",
            f"one from {', '.join([*origin, *site])[:60]}",
            "Send it from the page, or from a script without an Origin header.",
        )
    return None


def _ours(name: str, door: Door) -> bool:
    if name in door.names:
        return True
    return door.addresses and (_is(name, "version") or _is(name.strip("[]"), "version"))


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdigit() else host.lower()


def _cookie(scope: Scope) -> str:
    """The name of this server's cookie: browsers send a host's cookies to every port of it, and keep one of a name."""
    port = _values(scope, b"host")[0].rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isdigit() else COOKIE


def _entered(scope: Scope, door: Door) -> Response | None:
    """None where the request shows the token; else a step towards it, or why not."""
    assert door.token is not None
    cookie = _cookie(scope)
    shown = [value.removeprefix("Bearer ") for value in _values(scope, b"authorization")]
    for line in _values(scope, b"cookie"):
        try:
            jar = SimpleCookie(line)
        except CookieError:
            continue
        shown += [morsel.value for name, morsel in jar.items() if name == cookie]
    if any(_same(value, door.token) for value in shown):
        return None
    query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    given = [value for name, value in query if name == "token"]
    if scope["method"] in READING and len(given) == 1 and _same(given[0], door.token):
        left = urlencode([(name, value) for name, value in query if name != "token"])
        headers = {
            # The address without the token is what stays in the browser's history.
            "location": "." + (f"?{left}" if left else "") if scope["path"] == "/" else "/",
            "set-cookie": f"{cookie}={door.token}; HttpOnly; SameSite=Strict; Path=/",
        }
        return Response(status_code=303, headers=headers)
    refusal = refused(
        401,
        "a request to this server must carry its token",
        "none that fits",
        "Open the whole address that `sememe browse` printed.",
    )
    return json_response(dump({"error": refusal.detail}), {"www-authenticate": "Bearer"}, 401)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), token.encode())


# ---- answers and bodies


def refused(status: int, rule: str, value: object, remedy: str) -> HTTPException:
    """Why a request is not answered, in the three parts of every error."""
    return HTTPException(status, str(SememeError(rule, value, remedy)))


def json_response(content: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """JSON that is written already, as an answer."""
    return Response(
        content, status, headers={"content-type": "application/json; charset=utf-8", **(headers or {})}
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        HTTPException: 415 for another content type, 413 for a large body, 400 for anything but an object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refused(
            415,
            "a request that changes something must be application/json",
            kind[:60] or "no content type",
            "Send JSON, and say so in the Content-Type header.",
        )
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise refused(
                413,
                f"a request's body must be at most {MAX_BODY_BYTES >> 20} MB",
                f"more than {MAX_BODY_BYTES:,} bytes",
                "Send less at once.",
            )
        parts.append(part)
    try:
        found = json.loads(b"".join(parts), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise refused(
            400, "a request's body must be JSON", str(error)[:80], "See /api/openapi.json for what it takes."
        ) from None
    if not isinstance(found, dict):
        raise refused(
            400,
            "a request's body must be a JSON object",
            type(found).__name__,
            "See /api/openapi.json for what it takes.",
        )
    return found
