"""An atlas as a folder of plain files that opens in a web browser from disk, or from any file host.

Knows `Data` and the file system. From `file://`, browsers refuse `fetch` and ES modules, so every piece of data is
a classic script that hands its payload to the page: `Sememe.shard("latents/00003", "<gzip, base64>")`. The page
loads such a script when it needs it. Latents and contexts are cut into shards; each context is stored once, however
many examples refer to it.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import gc
import gzip
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from sememe import artifact
from sememe.browse import page
from sememe.browse.compared import Compared, Side, dictionary_folder
from sememe.browse.data import Data
from sememe.browse.inputs import Inputs, one_by_one, opened
from sememe.browse.together import Served, name_of, session
from sememe.browse.written import dump
from sememe.progress import track

__all__ = ["VERSION", "ExportConfig", "export"]

VERSION = 2
QUERY_LATENTS = 4096  # latents per query: enough to keep DuckDB busy, few enough to fit in memory


class ExportConfig(Inputs):
    """What a static site shows, where it goes, and how it is cut into files."""

    not_identity: ClassVar[frozenset[str]] = Inputs.not_identity | {"out"}

    out: Path = Path("artifacts/site")
    """The folder to make; open its index.html."""
    latents_per_shard: int = pydantic.Field(default=64, ge=1, le=4096)
    """Latents in one data script: fewer make a latent's page quicker, more make fewer files."""
    contexts_per_shard: int = pydantic.Field(default=32, ge=1, le=4096)
    """Token rows in one data script."""


def export(config: ExportConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Write an atlas as a static site: open its index.html.

    A site already made from the same artifacts with the same config is left as it is, unless the page's own files
    have changed since: then it is made again.

    Args:
        config: What is shown, where it goes, how it is cut.
        fresh: Replace whatever artifact stands at config.out.
    Returns:
        The site, an artifact of kind "site".
    Raises:
        ConfigError: an atlas is named twice.
        ArtifactError: config.atlas is not an atlas, or config.out is a folder of something else.
        CorruptError: the atlas is damaged.
        MismatchError: config.out is a site made from something else; or explanations or report are of another atlas.
    """
    out, each = config.out, one_by_one(config)
    with contextlib.ExitStack() as stack:
        (data, parents), *others = [stack.enter_context(opened(inputs)) for inputs in each]
        for i, other in enumerate(others):
            parents |= {
                f"against {i}" if role == "atlas" else f"against {i} {role}": fingerprint
                for role, fingerprint in other.parents.items()
            }
        shown = [
            Served(data, dictionary=dictionary_folder(data.atlas), name=name_of(inputs.atlas))
            for data, inputs in zip((data, *(other.data for other in others)), each, strict=True)
        ]
        compared = _compared(shown)
        # By directions or by tokens depends on whether dictionaries are still where they were: another site.
        parents |= {f"compared {mine} {other}": pair.method for (mine, other), pair in compared.items()}
        if not fresh and out.is_dir() and not any(out.iterdir()):
            out.rmdir()  # an empty folder was made for us
        identity = artifact.identity_of("site", VERSION, config, parents)
        found = None if fresh else artifact.find(out, "site", identity)
        if found is not None and found.extra.get("page") == page.fingerprint():
            return found
        with artifact.building(
            out, kind="site", version=VERSION, config=config, parents=parents, fresh=fresh
        ) as work:
            work.extra = {"page": page.fingerprint()}
            _write_page(work.path)
            _write(data, work.path, config)
            for number, other in enumerate(others, 1):
                _write(other.data, work.path, config, f"atlas-{number}/")
            _write_together(work.path, shown, compared)
    return artifact.load(out, "site")


def _write_page(folder: Path) -> None:
    (folder / "index.html").write_text(page.index_html("static"), encoding="utf-8")
    for name, content in page.static_files().items():
        target = folder / "static" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _compared(shown: list[Served]) -> dict[tuple[int, int], Compared]:
    """Each atlas beside each other one, by their numbers; nothing is computed yet."""
    sides = [Side(one.data, one.dictionary) for one in shown if isinstance(one.data, Data)]
    return {
        (mine, other): Compared(sides[mine], sides[other])
        for mine, other in itertools.permutations(range(len(sides)), 2)
    }


def _write_together(folder: Path, shown: list[Served], compared: dict[tuple[int, int], Compared]) -> None:
    """What the page knows of all its atlases: their names, and how they compare."""
    _write_shard(folder, "session", session(shown))
    for (mine, other), pair in compared.items():
        turned = compared[other, mine]
        # The products of a pair are the same both ways; neighbours are kept one way.
        back = turned.back() if mine > other and turned.method == pair.method else None
        _write_shard(folder, f"compare-{mine}-{other}", pair.pairs() if back is None else back)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _write(data: Data, folder: Path, config: ExportConfig, at: str = "") -> None:
    """One atlas's shards; `at` is the folder of its own that an atlas beside the first has."""
    for sub in ("latents", "contexts", "texts", "graphs"):
        (folder / "data" / at / sub).mkdir(parents=True, exist_ok=True)
    shards = {
        "latents_per_shard": config.latents_per_shard,
        "contexts_per_shard": config.contexts_per_shard,
        "context_ids": _context_ids(data.context_ids),
    }
    n_latents, n_contexts = len(data.ids), len(data.context_ids)
    # Compressing lets go of the interpreter lock, so that the next shard is read meanwhile. Millions of small lists
    # come and go; none of them holds itself, so looking for such would be time for nothing.
    with (
        _without_garbage_collection(),
        track("export", n_latents + n_contexts, "rows") as progress,
        ThreadPoolExecutor(2) as pool,
    ):
        waiting: collections.deque[Future[None]] = collections.deque()
        whole = (
            ("overview", 0, data.overview() | {"shards": shards}),
            ("index", 0, data.index()),
            ("tokens", 0, data.tokens()),
            ("search", 0, data.search()),
            ("details", 0, data.details()),
            *((f"texts/{i:05}", 0, text) for i, text in enumerate(data.texts)),
            *((f"graphs/{i:05}", 0, graph) for i, graph in enumerate(data.graphs)),
        )
        for name, n_rows, payload in itertools.chain(
            whole, _latent_shards(data, config), _context_shards(data, config)
        ):
            waiting.append(pool.submit(_write_shard, folder, at + name, payload))
            if len(waiting) > 16:  # bounded memory
                waiting.popleft().result()
            if n_rows:
                progress.advance(n_rows)
        for job in waiting:
            job.result()


def _latent_shards(data: Data, config: ExportConfig) -> Iterator[tuple[str, int, Any]]:
    """(name, rows, payload) per shard; rows are cut by place, whatever the ids."""
    size = config.latents_per_shard
    step = max(1, QUERY_LATENTS // size) * size
    for begin in range(0, len(data.ids), step):
        ids = data.ids[begin : begin + step]
        latents = data.latents(ids[0], ids[-1])
        for start in range(0, len(latents), size):
            rows = latents[start : start + size]
            yield f"latents/{(begin + start) // size:05}", len(rows), {"latents": rows}


def _context_shards(data: Data, config: ExportConfig) -> Iterator[tuple[str, int, Any]]:
    size = config.contexts_per_shard
    for begin in range(0, len(data.context_ids), size):
        ids = data.context_ids[begin : begin + size]
        yield f"contexts/{begin // size:05}", len(ids), data.contexts(ids)


def _context_ids(ids: list[int]) -> list[int] | None:
    """The contexts' ids, or None where a context's id is its place."""
    return None if ids == list(range(len(ids))) else ids


def _write_shard(folder: Path, name: str, payload: Any) -> None:
    packed = base64.b64encode(gzip.compress(dump(payload), compresslevel=4, mtime=0))
    path = folder / "data" / f"{name}.js"
    path.write_bytes(b'Sememe.shard("%s","%s");\n' % (name.encode("ascii"), packed))
