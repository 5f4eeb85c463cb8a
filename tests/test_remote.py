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
from test_publish import make_atlas, make_dictionary, make_report

from sememe import artifact, dictionaries, remote
from sememe.config import Config
from sememe.dictionaries import TopK, TopKConfig
from sememe.dictionaries.folders import open_all
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError, ResourceError
from sememe.publish import PublishConfig, publish
from sememe.run import print_report, run
from sememe.source import TensorSource
from sememe.train import TrainConfig, open_sweep, train_sweep


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


def test_what_is_no_artifact_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address above others, or a mistyped one: what lies there stays."""
    make("memory://bucket/run/made")
    with pytest.raises(
        MismatchError,
        match=r"memory://bucket/run must be an artifact, or nothing, got 3 files without meta.json, made/b.txt .*"
        r"delete them yourself",
    ):
        make("memory://bucket/run", fresh=True)
    assert len(there("memory://bucket/run")) == 3


def test_artifacts_below_an_address_are_those_below_a_folder(tmp_path: Path) -> None:
    for base in (tmp_path / "run", Path("memory://bucket/run")):
        for name in ("k16", "k2", "deep/k1", "k2/checkpoints/step-1"):
            make(base / name)
        found = artifact.below(base)
        assert found == [base / "deep" / "k1", base / "k2", base / "k16"], "none inside another, 2 before 16"
        assert artifact.kind_of(found[0]) == "page" and artifact.exists(found[0])
        assert (
            artifact.kind_of(base) is None and not artifact.exists(base) and artifact.below(base / "no") == []
        )
        assert (artifact.here(found[0]) / "b.txt").read_text() == "one b"


def test_a_release_of_several_goes_from_there_to_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dictionaries, reports and an atlas that lie on a storage, published to it and read from another machine."""
    base = "memory://bucket/run"
    for number in (2, 10):
        saved = make_dictionary(Path(f"{base}/dictionary/layer{number}"), seed=number)
        make_report(Path(f"{base}/report/layer{number}"), saved)
    make_atlas(Path(f"{base}/atlas"), saved)
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "elsewhere"))
    parts = {role: f"{base}/{role}" for role in ("dictionary", "report", "atlas")}
    publish(PublishConfig.build({**parts, "out": f"{base}/release"}))
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "third"))
    card = artifact.load(f"{base}/release", "release").file("README.md").read_text()
    assert [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("| layer")] == [
        "layer2",
        "layer10",
    ]
    opened = open_all((Path(f"{base}/dictionary"),))
    assert list(opened) == ["layer2", "layer10"]
    again = dictionaries.load(f"{base}/release/dictionary/layer2")
    x = torch.randn(4, again.d_in)
    assert torch.equal(again(x), opened["layer2"].dictionary(x))


def test_a_sweep_is_fetched_by_the_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    config = TrainConfig.build(
        {
            "out": "memory://bucket/sweep",
            "architecture": {"kind": "topk", "d_sae": 40},
            "batch_size": 32,
            "sweep": ("k=2,4",),
            "watch_rows": 0,
        }
    )
    train_sweep(config, source=TensorSource(rows))
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "elsewhere"))
    sweep = open_sweep("memory://bucket/sweep")
    assert not list(sweep.artifact.path.rglob("*.safetensors")), "members come when they are asked for"
    assert sweep.load("k4").config.k == 4
    assert list(open_all((Path("memory://bucket/sweep"),))) == ["k2", "k4"]


def test_reports_there_are_printed_and_drawn_and_recipes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = make_dictionary(Path("memory://bucket/run/dictionary"))
    make_report(Path("memory://bucket/run/report/one"), saved)
    print_report(Path("memory://bucket/run/report/one"))
    assert "0.1234" in capsys.readouterr().out
    (tmp_path / "plain.toml").write_text('[toy.a.fit.baseline]\nkind = "pca"\n')
    with pytest.raises(
        ConfigError, match=r"a recipe's results must lie on a disk, got s3://bucket/x\. Run it"
    ):
        run(tmp_path / "plain.toml", out=Path("s3://bucket/x"))


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
def test_every_verbs_artifact_on_a_real_server(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """harvest, train, evaluate, interpret, export, publish: every artifact on S3, and each verb on a machine that has
    none of those before it."""
    from small_world import load_model, write_corpus, write_model
    from test_harvest import config_for

    from sememe.atlas import open_atlas
    from sememe.browse import ExportConfig, export
    from sememe.evaluate import EvaluateConfig, evaluate
    from sememe.harvest import harvest
    from sememe.interpret import InterpretConfig, interpret
    from sememe.store import open_store
    from sememe.train import train

    def elsewhere(name: str) -> None:
        monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / name))

    write_corpus(tmp_path / "corpus.jsonl")
    lm = load_model(write_model(tmp_path / "model"))
    config = config_for(tmp_path, Path(f"{s3}/small/store"))
    harvest(config, lm=lm)
    elsewhere("trains")
    out = Path(f"{s3}/small/dictionary")
    trained = {
        "store": f"{s3}/small/store",
        "out": out,
        "inputs": ("resid_post.0",),
        "architecture": {"kind": "topk", "k": 4, "d_sae": 48},
        "batch_size": 64,
    }
    train(TrainConfig.build(trained))
    swept = {**trained, "out": f"{s3}/small/sweep", "sweep": ("seed=0,1",)}
    sweep = train_sweep(TrainConfig.build(swept))
    assert sweep.load("seed1").d_sae == 48
    shared = {"text": config.text, "model": config.model}
    elsewhere("evaluates")
    measured = {"dictionary": out, "store": f"{s3}/small/store", "out": f"{s3}/small/report", "n_tokens": 600}
    evaluate(EvaluateConfig.build({**shared, **measured, "n_bootstrap": 20, "nulls": ()}), lm=lm)
    elsewhere("interprets")
    about = {"dictionaries": (out,), "out": f"{s3}/small/atlas", "n_tokens": 4000, "n_top": 5, "n_random": 5}
    interpret(InterpretConfig.build({**shared, **about}), lm=lm).close()
    elsewhere("looks")
    with contextlib.closing(open_atlas(f"{s3}/small/atlas")) as atlas:
        assert atlas.query("SELECT count(*) AS n FROM latents")[0]["n"] == 48
    shown = {"atlas": f"{s3}/small/atlas", "report": f"{s3}/small/report", "out": f"{s3}/small/site"}
    export(ExportConfig.build(shown))
    parts = {role: f"{s3}/small/{role}" for role in ("dictionary", "report", "atlas")}
    publish(PublishConfig.build({**parts, "out": f"{s3}/small/release"}))
    assert {"store", "dictionary", "sweep", "report", "atlas", "site", "release"} == {
        path.name for path in artifact.below(f"{s3}/small")
    }
    elsewhere("reads")
    x = torch.randn(8, 32)
    again = dictionaries.load(f"{s3}/small/release/dictionary")
    assert torch.equal(again(x), dictionaries.load(out)(x))
    assert open_store(f"{s3}/small/store").info.n_rows > 0
    names = set(there(f"{s3}/small/store"))
    assert artifact.META in names and any(name.startswith("shard-") for name in names)
    with pytest.raises(ResourceError, match=r"(bucket|reachable)"):
        make("s3://no-such-bucket/made")
