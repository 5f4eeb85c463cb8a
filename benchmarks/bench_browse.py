"""How quickly the page is there, and how large and how fast an export is, at 100,000 latents.

    python benchmarks/bench_browse.py [--latents 100000] [--rounds 5] [--out artifacts/bench/browse.json]

The atlas is synthetic: 2,000 latents with as many examples, neighbours, pairs and tokens as `sememe interpret` keeps
by default, over contexts of 256 tokens, repeated under new numbers. Repetition lies farther apart than a shard is
long, so compression gains nothing by it. Times are of headless Chromium, medians of several rounds, each in a new
browser context with an empty cache:

    first_paint_ms_*   from the address to the first row of the list on the screen, served and from disk
    first_paint_ms_cold  the same for the first visit to a server that has just said where it listens; once
    ready_s            from `sememe browse` to that line, the answers of the first look made
    latent_page_ms     from the address of a latent that was not read before to its examples; the slower of the two ways
    search_ms          from a letter typed to the list that answers it, the longest of a word's letters, tables loaded
    export_*           all of `sememe browse --export`; kilobytes (1000) of the latents' scripts over their number,
                       contexts, which are stored once, not counted
    export_full_*      the same of a fifth as many latents, each with an explanation and its scores, effects of its top
                       examples, and removals of tokens before the strongest two
    *_full             the times of that smaller atlas, with its explanations and effects
    layout_shift       cumulative layout shift of landing page and latent page, the larger

Playwright and Chromium are needed; SEMEME_CHROMIUM names another one than the system's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MUST = {
    "first_paint_ms_served": "<= 1000",
    "first_paint_ms_static": "<= 1000",
    "first_paint_ms_cold": "<= 1000",
    "ready_s": "",
    "latent_page_ms": "<= 200",
    "search_ms": "<= 100",
    "export_kb_per_latent": "<= 4",
    "export_latents_per_s": ">= 2000",
    "export_full_kb_per_latent": "<= 4",
    "export_full_latents_per_s": ">= 2000",
    "layout_shift": "<= 0.02",
}
TIMES = (
    "first_paint_ms_served", "first_paint_ms_static", "first_paint_ms_cold", "ready_s", "latent_page_ms", "search_ms",
    "layout_shift",
)  # fmt: skip
MUST |= {f"{name}_full": MUST[name] for name in TIMES}
UNIT = {
    "ready_s": "s", "ready_s_full": "s", "layout_shift_full": "",
    "export_kb_per_latent": "kB", "export_latents_per_s": "1/s",
    "export_full_kb_per_latent": "kB", "export_full_latents_per_s": "1/s", "layout_shift": "",
}  # fmt: skip
BASE = 2000
FULL = 5  # times fewer latents where effects and explanations are joined
WORD = "river"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]

# In the page: milliseconds from navigation to the first frame in which `ready` holds.
WATCH = """
window.moved = 0;
new PerformanceObserver((list) => list.getEntries().forEach((e) => { if (!e.hadRecentInput) window.moved += e.value; }))
  .observe({ type: "layout-shift", buffered: true });
window.reached = (ready) => new Promise((done) => {
  const look = () => (ready() ? requestAnimationFrame(() => done(performance.now())) : requestAnimationFrame(look));
  look();
});
"""
FIRST_ROW = "() => reached(() => document.querySelector('.rows .row .c-id'))"
JUMP = """(latent) => {
  const start = performance.now();
  location.hash = `#/latent/${latent}?sort=id`;
  return reached(() => { const number = document.querySelector('.latent:not(.stale) .number');
    return number && number.textContent === 'Latent ' + latent
      && document.querySelector('.latent:not(.stale) .example'); })
    .then((end) => end - start);
}"""
TYPE = """(text) => {
  const box = document.getElementById('search'), start = performance.now();
  box.value = text;
  box.dispatchEvent(new Event('input', { bubbles: true }));
  return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>
    done(performance.now() - start))));
}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/browse.json"))
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from common import finish, row

    with tempfile.TemporaryDirectory() as folder:
        atlas, full = _atlases(Path(folder), options.latents)
        figures, context = _export(Path(folder) / "site", options.latents, atlas=atlas)
        n_full = max(1, options.latents // FULL // BASE) * min(BASE, options.latents)
        of_full, _ = _export(Path(folder) / "full-site", n_full, **full)
        figures |= {name.replace("export", "export_full"): value for name, value in of_full.items()}
        alone = _times(
            {"atlas": atlas}, Path(folder) / "site" / "index.html", options.latents, options.rounds
        )
        beside = _times(full, Path(folder) / "full-site" / "index.html", n_full, options.rounds)
        figures |= alone | {f"{name}_full": value for name, value in beside.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    context |= {"latents": options.latents, "rounds": options.rounds}
    finish(
        options.out.stem,
        [row(name, figures[name], must, UNIT.get(name, "ms"), **context) for name, must in MUST.items()],
    )


def _atlases(folder: Path, n_latents: int) -> tuple[Path, dict[str, Path]]:
    """An atlas, and a smaller one with what may stand beside it."""
    from synthetic_atlas import (
        SyntheticConfig,
        build,
        build_effects,
        build_explanations,
        scale,
        scale_effects,
    )

    from sememe import artifact

    base = min(BASE, n_latents)
    path = build(
        folder / "atlas",
        SyntheticConfig(
            n_latents=base, n_contexts=4000, context_length=256, n_top=20, n_decile=3, n_random=10,
            window=(40, 24), n_bins=40,
        ),
    ).path  # fmt: skip
    small = folder / "full" / "atlas"
    shutil.copytree(path, small)
    scale(path, n_latents // base)
    times = max(1, n_latents // FULL // base)
    scale(small, times)
    atlas = artifact.load(small, "atlas")
    full = {name: small.parent / name for name in ("atlas", "explanations", "effects")}
    build_explanations(
        full["explanations"],
        atlas,
        {i: f"explanation {i}" + " of rivers" * (i % 97 == 0) for i in range(base * times)},
    )
    build_effects(full["effects"], atlas, list(range(base)))
    scale_effects(full["effects"], base, times)
    return path, full


def _export(out: Path, n_latents: int, **inputs: Path) -> tuple[dict[str, float], dict[str, Any]]:
    from sememe.browse import ExportConfig, export

    started = time.perf_counter()
    export(ExportConfig(**inputs, out=out))
    seconds = time.perf_counter() - started
    size = {
        part: sum(f.stat().st_size for f in (out / "data" / part).rglob("*.js"))
        for part in ("latents", "contexts")
    }
    whole = sum(f.stat().st_size for f in (out / "data").glob("*.js"))
    figures = {
        "export_kb_per_latent": size["latents"] / 1000 / n_latents,
        "export_latents_per_s": n_latents / seconds,
    }
    return figures, {
        "contexts_mb": round(size["contexts"] / 1e6, 1),
        "whole_mb": round(whole / 1e6, 1),
        "export_s": round(seconds, 1),
    }


@contextlib.contextmanager
def _served(inputs: Mapping[str, Path]) -> Iterator[tuple[str, float]]:
    """`sememe browse` in a process of its own, as a user runs it: where it listens, and seconds until it does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [part for name, path in inputs.items() if name != "atlas" for part in (f"--{name}", str(path))]
    started = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "sememe", "browse", str(inputs["atlas"]), *flags, "--port", str(port)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert server.stdout is not None
        assert b"Serving" in server.stdout.readline()
        yield f"http://127.0.0.1:{port}/", time.perf_counter() - started
    finally:
        server.terminate()
        server.wait(timeout=20)


def _times(inputs: Mapping[str, Path], site: Path, n_latents: int, rounds: int) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("SEMEME_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    found: dict[str, list[float]] = {}
    with sync_playwright() as playwright, _served(inputs) as (served, ready):
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        cold = _paint(browser, served)
        for name in ("search", "details"):  # made by now, or waited for
            urllib.request.urlopen(f"{served}api/{name}").read()
        for _ in range(rounds):
            for way, address in (("served", served), ("static", site.resolve().as_uri())):
                for name, value in _round(browser, address, n_latents).items():
                    found.setdefault(f"{name}_{way}", []).append(value)
        browser.close()

    def worse(name: str) -> float:
        return max(median(found[f"{name}_{way}"]) for way in ("served", "static"))

    return {
        "first_paint_ms_served": median(found["first_paint_ms_served"]),
        "first_paint_ms_static": median(found["first_paint_ms_static"]),
        "first_paint_ms_cold": cold,
        "ready_s": ready,
        "latent_page_ms": worse("latent_page_ms"),
        "search_ms": worse("search_ms"),
        "layout_shift": worse("layout_shift"),
    }


def _paint(browser: Any, address: str) -> float:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.add_init_script(WATCH)
    page.goto(address + "#/", wait_until="commit")
    out = float(page.evaluate(FIRST_ROW))
    context.close()
    return out


def _round(browser: Any, address: str, n_latents: int) -> dict[str, float]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.add_init_script(WATCH)
    page.goto(address + "#/", wait_until="commit")
    out = {"first_paint_ms": page.evaluate(FIRST_ROW)}
    page.wait_for_selector(".map-legend")
    page.wait_for_timeout(500)
    moved = page.evaluate("window.moved")
    page.locator("#search").focus()
    page.wait_for_timeout(1500)  # the table behind the search arrives
    page.evaluate(TYPE, "zz")  # and is read once
    page.evaluate(TYPE, "")
    out["search_ms"] = max(page.evaluate(TYPE, WORD[:n]) for n in range(1, len(WORD) + 1))
    page.wait_for_timeout(300)
    moved = max(moved, page.evaluate("window.moved"))
    page.evaluate(JUMP, 0)  # code that has not run yet
    # Latents far apart, so that none of them has been read ahead or lies in a shard that has.
    out["latent_page_ms"] = median(
        page.evaluate(JUMP, int(n_latents * share) + 1) for share in (0.2, 0.4, 0.6, 0.8, 0.5)
    )
    out["layout_shift"] = moved
    context.close()
    return out


if __name__ == "__main__":
    main()
