"""Small atlases behind a server without a socket, and a model that only echoes: what tests of the server share."""

from __future__ import annotations

import contextlib
from pathlib import Path

from starlette.testclient import TestClient
from synthetic_atlas import SyntheticConfig, build

from sememe.browse import BrowseConfig
from sememe.browse.guard import Door
from sememe.browse.live import LiveError, Refusal
from sememe.browse.server import application
from sememe.browse.serving import served

HERE = "http://127.0.0.1:8000"
SMALL = SyntheticConfig(n_latents=40, n_contexts=30)


class Echo:
    """A model that says what it was asked."""

    def __init__(self) -> None:
        self.refusal: Refusal | None = None

    def status(self):
        return {"state": "ready", "job": None, "waiting": 0}

    def ask(self, verb, arguments, job=""):
        if self.refusal is not None:
            raise LiveError(self.refusal)
        return {"verb": verb, "arguments": arguments, "job": job}

    def cancel(self, job):
        return job == "mine"

    def close(self):
        pass


def two_atlases(root: Path) -> tuple[Path, Path]:
    """Of 40 and of 25 latents."""
    build(root / "one", SMALL)
    build(root / "two", SyntheticConfig(n_latents=25, n_contexts=30, seed=3))
    return root / "one", root / "two"


@contextlib.contextmanager
def client_of(config: BrowseConfig, *, door: Door | None = None, live=None, base_url: str = HERE):
    with (
        served(config) as atlases,
        TestClient(
            application(atlases, live=live, door=door), base_url=base_url, raise_server_exceptions=False
        ) as client,
    ):
        yield client
