"""The server's life: which atlases it opens, where it listens, and how it ends.

Knows folders, sockets and uvicorn; what is answered is `server.py`'s matter. An atlas that is damaged or of another
version is served as well: as a page that says what to do.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pydantic

from sememe import artifact
from sememe.browse.compared import dictionary_folder
from sememe.browse.data import Data
from sememe.browse.guard import Door, door_of
from sememe.browse.inputs import Inputs, one_by_one, opened
from sememe.browse.live import Live
from sememe.browse.notes import NotesFile
from sememe.browse.server import application
from sememe.browse.together import Served, name_of
from sememe.browse.whole import Whole
from sememe.errors import ArtifactError, MismatchError, SememeError, ServerError

__all__ = ["BrowseConfig", "browse", "served"]

HOST = "127.0.0.1"
DEFAULT_PORT, PORTS_TRIED = 8000, 100


class BrowseConfig(Inputs):
    """What is shown, where, and what may be done there."""

    host: str = pydantic.Field(default=HOST, min_length=1, max_length=255)
    """The address to listen on. Any but this machine's own needs a token, which is made and printed."""
    port: int | None = pydantic.Field(default=None, ge=1, le=65535)
    """The port; without one, 8000 or the next that is free."""
    open: bool = False
    """Open the page in the default web browser."""
    write: bool = False
    """Keep stars, tags, notes and ratings in a file beside the atlas, ATLAS.notes.json, instead of in the browser."""
    dictionary: Path | None = None
    """The folder of the atlas's dictionary, to compare with or to try; where it was when the atlas was made if not
    given."""


def browse(config: BrowseConfig, *, live: Live | None = None) -> None:
    """Serve an atlas, or several, as a web page until interrupted.

    Args:
        config: What is shown, and where.
        live: Who answers what needs a model; it is closed at the end.
    Raises:
        ArtifactError: a folder is not an atlas; or, at the end, the only atlas could not be shown.
        ConfigError: an atlas is named twice.
        MismatchError: explanations or report are of another atlas; the dictionary is another.
        ServerError: the port is taken, or none is free.
    """
    import uvicorn

    with contextlib.ExitStack() as stack:
        if live is not None:
            stack.callback(live.close)
        atlases = stack.enter_context(served(config))
        door = door_of(config.host)
        listening = stack.enter_context(_listen(config.port, config.host))
        broken = [one.data for one in atlases if isinstance(one.data, SememeError)]
        for error in broken:
            print(f"sememe: {error}", file=sys.stderr, flush=True)
        whole = Whole(atlases)
        stack.enter_context(whole.ahead())
        url = _url(config.host, listening.getsockname()[1], door)
        names = ", ".join(str(path) for path in (config.atlas, *config.against))
        print(f"Serving {names} at {url} (Ctrl+C stops it)", flush=True)
        if config.open:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server = uvicorn.Server(
            uvicorn.Config(
                application(whole, live=live, door=door),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                timeout_graceful_shutdown=2,
            )
        )
        if live is not None:
            _close_with(server, live)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        if len(broken) == len(atlases):
            raise broken[0]


def _close_with(server: Any, live: Live) -> None:
    """Let the model go as soon as the server is told to stop, so that nobody waits for its answers."""
    leave = server.handle_exit

    def handle_exit(sig: int, frame: FrameType | None) -> None:
        threading.Thread(target=live.close, daemon=True).start()
        leave(sig, frame)

    server.handle_exit = handle_exit


@contextlib.contextmanager
def served(config: BrowseConfig) -> Iterator[list[Served]]:
    """The atlases that a config names, open until the end; those that cannot be shown, as the reason.

    Raises:
        ArtifactError: a folder is not an atlas at all.
        ConfigError: an atlas is named twice.
        MismatchError: something that was named belongs to another atlas.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for number, inputs in enumerate(one_by_one(config)):
            path = inputs.atlas
            try:
                data = stack.enter_context(opened(inputs)).data
            except MismatchError:
                raise
            except ArtifactError as error:
                if not _claims_to_be_an_atlas(path):
                    raise
                found.append(Served(error, name=name_of(path)))
                continue
            named = config.dictionary if number == 0 else None
            found.append(
                Served(data, _notes(data, config), dictionary_folder(data.atlas, named), name=name_of(path))
            )
        yield found


def _notes(data: Data, config: BrowseConfig) -> NotesFile | None:
    """An atlas's notes. Who only reads is not kept from reading by a file that does not fit."""
    try:
        return NotesFile(data.atlas, write=config.write)
    except ArtifactError as error:
        if config.write:
            raise
        print(f"sememe: {error}", file=sys.stderr, flush=True)
        return None


def _claims_to_be_an_atlas(path: Path) -> bool:
    """Whether a folder that cannot be opened is a damaged atlas, or one of another version."""
    meta = path / artifact.META
    try:
        return bool(json.loads(meta.read_text(encoding="utf-8"))["kind"] == "atlas")
    except OSError:
        return False
    except (ValueError, KeyError, TypeError):
        return True  # its meta.json is damaged


def _url(host: str, port: int, door: Door) -> str:
    bare = host.strip("[]")
    if door.addresses:
        bare = socket.gethostname()
    shown = f"[{bare}]" if ":" in bare else bare
    return f"http://{shown}:{port}/" + (f"?token={door.token}" if door.token else "")


def _listen(port: int | None, host: str = HOST) -> socket.socket:
    """A listening socket: the port asked for, or the first free one from 8000."""
    bare = host.strip("[]")
    candidates = [port] if port is not None else list(range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED))
    for candidate in candidates:
        # The protocol is named because asyncio turns Nagle's waiting off only for sockets that name it: without, each
        # answer's body waits 40 ms for the acknowledgement of its head.
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((bare, candidate))
            listening.listen(128)
            return listening
        except OSError as error:
            listening.close()
            reason = error.strerror or str(error)
    if port is not None:
        raise ServerError(
            f"port {port} of {host} must be free",
            reason,
            "Stop what uses it, name another --port, or leave --port out.",
        )
    raise ServerError(
        f"a port between {candidates[0]} and {candidates[-1]} of {host} must be free",
        reason,
        "Name another with --port.",
    )
