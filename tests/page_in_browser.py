"""The page in a real browser, served and from disk: what its tests share. Knows how to open it, not what it shows."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sememe.browse import ExportConfig, export
from sememe.browse.inputs import Inputs, opened
from sememe.browse.server import application

AXE = Path(__file__).parent / "axe" / "axe.min.js"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
OF_COLOURS = ["color-contrast", "link-in-text-block"]


def chromium() -> str | None:
    """The system's Chromium; SEMEME_CHROMIUM names another."""
    named = os.environ.get("SEMEME_CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@contextlib.contextmanager
def a_browser() -> Iterator[Any]:
    """A headless Chromium; the test is skipped, loudly, where there is none."""
    path = chromium()
    if path is None:
        pytest.skip(
            "******** no Chromium: the page is NOT tested. Install it, or set SEMEME_CHROMIUM. ********"
        )
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def answering(app: Any) -> Iterator[str]:
    """The address of a server of an application."""
    import uvicorn

    # The protocol is named: else each answer waits 40 ms (serving.py says why).
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


@contextlib.contextmanager
def served(inputs: Mapping[str, Any]) -> Iterator[str]:
    """The address of a server of an atlas."""
    with opened(Inputs(**inputs)) as (data, _), answering(application(data)) as address:
        yield address


def exported(inputs: Mapping[str, Any], out: Path) -> str:
    """The address of a site on disk."""
    return (export(ExportConfig(**inputs, out=out)).path / "index.html").as_uri()


@contextlib.contextmanager
def watched(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """An empty page that fails the test on any complaint of the browser, or any request to elsewhere."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    origin = address.rsplit("/", 1)[0]
    page.on("request", lambda r: None if r.url.startswith(origin) else complaints.append(f"request: {r.url}"))
    page.set_default_timeout(30_000)
    yield page
    context.close()
    assert complaints == [], complaints


def go(page: Any, address: str, hash: str = "#/") -> None:
    """Open a state of the page and wait until it shows something."""
    page.goto(address + hash)
    page.wait_for_selector(
        ".rows .row, .latent[aria-busy=false], .about, .problem, .chosen-text, .empty:not([role])"
    )


def settle(page: Any) -> None:
    """Wait for the two frames in which the page draws what was asked for."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def wait_until(page: Any, condition: str) -> None:
    """Asked again and again; the page's policy forbids Playwright's own way, which is eval in the page."""
    deadline = time.monotonic() + 30
    while not _holds(page, condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(30)


def _holds(page: Any, condition: str) -> bool:
    try:
        return bool(page.evaluate(condition))
    except Exception as error:
        if "context was destroyed" in str(error):
            return False  # it is on its way to another address
        raise


def ids(page: Any) -> list[int]:
    """The latents of the list that are drawn."""
    return [int(text) for text in page.locator(".rows .row .c-id").all_text_contents()]


def violations(page: Any, scheme: str = "light") -> list[str]:
    """What axe-core has to say about the page as it stands: rule, element and why.

    In the dark scheme only of colours: all else is the same page, which has its own test in the light one.
    """
    if not page.evaluate("typeof window.axe === 'object'"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(
        "(o) => axe.run(document, { resultTypes: ['violations'], preload: false, ...o }).then((r) => r.violations)",
        {"runOnly": {"type": "rule", "values": OF_COLOURS}} if scheme == "dark" else {},
    )
    return [
        f"{one['id']}: {node['html'][:160]} | {node['failureSummary'][:300]}"
        for one in found
        for node in one["nodes"][:4]
    ]
