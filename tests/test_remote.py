"""Artifacts on object storage: written whole or not at all, read back, gone on with after a cut.

`memory://` is fsspec's own; the tests marked slow ask a real S3 server in a process of its own (moto).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from sememe import artifact, dictionaries, remote
from sememe.config import Config
from sememe.dictionaries import TopK, TopKConfig
from sememe.errors import ArtifactError, CorruptError, MismatchError, ResourceError


class Made(Config):
    """What an artifact is made from."""

    name: str = "one"
    """Anything."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
    yield
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def make(path: str | Path, name: str = "one", fresh: bool = False, kind: str = "page") -> artifact.Artifact:
    config = Made(name=name)
    if not fresh and (done := artifact.find(path, kind, artifact.identity_of(kind, 1, config, {}))):
        return done
    with artifact.building(path, kind=kind, version=1, config=config, parents={}, fresh=fresh) as work:
        (work.path / "inner").mkdir()
        (work.path / "inner" / "a.txt").write_text(f"{name} a")
        (work.path / "b.txt").write_text(f"{name} b")
    return artifact.load(path, kind)


def there(url: str = "memory://bucket/made") -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    base = root.strip("/") + "/"
    return {path.strip("/").removeprefix(base): fs.cat_file(path) for path in fs.find(root)}


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (Path("s3://bucket/a/b"), "s3://bucket/a/b"),
        ("gs://bucket/a/", "gs://bucket/a"),
        ("hf://owner/name", None),
        ("s3/bucket", None),
        ("/tmp/s3:/x", None),
        (Path("artifacts/store"), None),
    ],
)
def test_what_is_an_address(path: str | Path, url: str | None) -> None:
    assert remote.address(path) == url


def test_an_artifact_is_whole_once_its_meta_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    order: list[str] = []
    put = MemoryFileSystem.put_file

    def noted(self: Any, lpath: str, rpath: str, **rest: Any) -> None:
        order.append(rpath.rsplit("made/", 1)[1])
        put(self, lpath, rpath, **rest)

    monkeypatch.setattr(MemoryFileSystem, "put_file", noted)
    saved = make(Path("memory://bucket/made"))
    assert sorted(order[:-1]) == ["b.txt", "inner/a.txt"] and order[-1] == artifact.META
    assert set(there()) == {"b.txt", "inner/a.txt", artifact.META}
    assert json.loads(there()[artifact.META])["fingerprint"] == saved.fingerprint
    order.clear()
    assert make("memory://bucket/made").fingerprint == saved.fingerprint and not order, "it is opened"


def test_another_machine_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = make("memory://bucket/made")
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "elsewhere"))
    opened = artifact.load(Path("memory://bucket/made"), "page")
    opened.verify()
    assert opened.fingerprint == saved.fingerprint and opened.path != saved.path
    assert opened.file("inner/a.txt").read_text() == "one a"
    make("memory://bucket/made", "two", fresh=True)
    assert artifact.load("memory://bucket/made").file("b.txt").read_text() == "two b", (
        "a stale mirror is seen"
    )


def test_a_stores_shards_are_fetched_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("memory://bucket/made", kind="store")
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "elsewhere"))
    opened = artifact.load("memory://bucket/made", "store")
    assert sorted(p.name for p in opened.path.iterdir()) == [artifact.META]
    assert opened.file("b.txt", verify=True).read_text() == "one b"
    assert sorted(p.name for p in opened.path.iterdir()) == ["b.txt", artifact.META]


def test_an_upload_that_is_cut_off_is_absent_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    put, sent = MemoryFileSystem.put_file, []

    def cut(self: Any, lpath: str, rpath: str, **rest: Any) -> None:
        if len(sent) == 1:
            raise ConnectionError("the cable was pulled\nhere")
        sent.append(rpath)
        put(self, lpath, rpath, **rest)

    monkeypatch.setattr(MemoryFileSystem, "put_file", cut)
    with pytest.raises(
        ResourceError, match=r"made must be reachable.*got the cable was pulled. .*run it again"
    ):
        make("memory://bucket/made")
    assert artifact.META not in there()
    with pytest.raises(ArtifactError, match=r"must be a finished page, got nothing with meta.json there"):
        artifact.load(Path("memory://bucket/made"), "page")
    again: list[str] = []
    monkeypatch.setattr(
        MemoryFileSystem, "put_file", lambda self, l, r, **rest: (again.append(r), put(self, l, r, **rest))[1]
    )
    make("memory://bucket/made").verify()
    assert len(again) == 2 and sent[0] not in again, "what had arrived is not sent again, nor made again"


def test_another_artifact_there_is_a_mismatch() -> None:
    make("memory://bucket/made")
    with pytest.raises(
        MismatchError, match=r"the page at memory://bucket/made must have been made with.*--fresh"
    ):
        make("memory://bucket/made", "two")
    make("memory://bucket/made", "two", fresh=True)
    assert there()["b.txt"] == b"two b"
    artifact.remove("memory://bucket/made")
    assert there() == {}


def test_a_name_that_would_leave_the_folder_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("memory://bucket/made")
    meta = json.loads(there()[artifact.META])
    meta["files"]["../../out"] = meta["files"]["b.txt"]
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/made/meta.json", json.dumps(meta).encode())
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(CorruptError, match=r"files inside its own folder, got '../../out'"):
        artifact.load("memory://bucket/made")


def test_a_dictionary_goes_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = TopK(TopKConfig(k=2, d_sae=12), 4, 4, 12)
    dictionary.initialise(torch.randn(64, 4), torch.randn(64, 4), torch.Generator().manual_seed(0))
    dictionary.save(Path("memory://bucket/made"), torch.randn(16, 4))
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "elsewhere"))
    x = torch.randn(5, 4)
    assert torch.equal(dictionaries.load("memory://bucket/made")(x), dictionary.fold()(x))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ResourceError, match=r"gs:// needs its package, got .* pip install gcsfs"):
        artifact.load("gs://bucket/made")


# -- a real server -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on a server that speaks S3, in a process of its own."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    about = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in about}
    os.environ.update(about)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # botocore's own
def test_store_dictionary_and_atlas_on_a_real_server(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """harvest -> train -> interpret, every artifact on S3, and read from a machine that has none of them."""
    from small_world import load_model, write_corpus, write_model
    from test_harvest import config_for

    from sememe.atlas import open_atlas
    from sememe.harvest import harvest
    from sememe.interpret import InterpretConfig, interpret
    from sememe.store import open_store
    from sememe.train import TrainConfig, train

    write_corpus(tmp_path / "corpus.jsonl")
    lm = load_model(write_model(tmp_path / "model"))
    config = config_for(tmp_path, Path(f"{s3}/small/store"))
    harvest(config, lm=lm)
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "second"))
    out = Path(f"{s3}/small/dictionary")
    train(
        TrainConfig.build(
            {
                "store": f"{s3}/small/store",
                "out": out,
                "inputs": ("resid_post.0",),
                "architecture": {"kind": "topk", "k": 4, "d_sae": 48},
                "batch_size": 64,
            }
        )
    )
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "third"))
    about = {"dictionaries": (out,), "out": f"{s3}/small/atlas", "n_tokens": 4000, "n_top": 5, "n_random": 5}
    text = {"text": config.text, "model": config.model, "policy": config.policy}
    known = {name: value for name, value in text.items() if name in InterpretConfig.model_fields}
    interpret(InterpretConfig.build(about | known), lm=lm).close()
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "fourth"))
    with contextlib.closing(open_atlas(f"{s3}/small/atlas")) as atlas:
        assert atlas.query("SELECT count(*) AS n FROM latents")[0]["n"] == 48
    assert dictionaries.load(out).d_sae == 48
    assert open_store(f"{s3}/small/store").info.n_rows > 0
    names = set(there(f"{s3}/small/store"))
    assert artifact.META in names and any(name.startswith("shard-") for name in names)
    with pytest.raises(ResourceError, match=r"(bucket|reachable)"):
        make("s3://no-such-bucket/made")
