"""Complete or absent: artifacts under crashes, damage, strangers and full disks."""

import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest

from sememe import artifact
from sememe.config import Config
from sememe.errors import ArtifactError, CorruptError, LockError, MismatchError, ResourceError


class Plain(Config):
    not_identity = frozenset({"where"})

    size: int = 3
    where: str = "here"


def build(path: Path, size: int = 3, where: str = "here", parents=None, **options) -> None:
    with artifact.building(
        path, kind="thing", version=1, config=Plain(size=size, where=where), parents=parents or {}, **options
    ) as work:
        (work.path / "data.txt").write_text("x" * size)


def identity(size: int = 3, version: int = 1, parents=None) -> str:
    return artifact.identity_of("thing", version, Plain(size=size), parents or {})


def test_a_finished_artifact_can_be_loaded_and_found(tmp_path):
    build(tmp_path / "a")
    found = artifact.find(tmp_path / "a", "thing", identity())
    assert found is not None
    assert found.file("data.txt", verify=True).read_text() == "xxx"
    assert artifact.find(tmp_path / "nothing", "thing", identity()) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"], "no partial folder or lock is left"


def test_identity_depends_on_config_version_and_parents_but_not_on_places(tmp_path):
    build(tmp_path / "a", where="there")
    assert artifact.load(tmp_path / "a").identity == identity()
    assert len({identity(), identity(4), identity(version=2), identity(parents={"store": "abc"})}) == 4


def test_fingerprint_depends_on_content(tmp_path):
    build(tmp_path / "a")
    with artifact.building(tmp_path / "b", kind="thing", version=1, config=Plain(), parents={}) as work:
        (work.path / "data.txt").write_text("yyy")
    a, b = artifact.load(tmp_path / "a"), artifact.load(tmp_path / "b")
    assert a.identity == b.identity
    assert a.fingerprint != b.fingerprint


def test_another_config_is_an_error_that_names_both_identities(tmp_path):
    build(tmp_path / "a")
    with pytest.raises(MismatchError) as caught:
        build(tmp_path / "a", size=4)
    assert identity(4)[:16] in str(caught.value) and identity(3)[:16] in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert artifact.load(tmp_path / "a").file("data.txt").read_text() == "xxx", "nothing written is lost"
    build(tmp_path / "a", size=4, fresh=True)
    assert artifact.load(tmp_path / "a").file("data.txt").read_text() == "xxxx"


def test_fresh_replaces_artifacts_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(MismatchError, match=rf"{name} must be an artifact for --fresh to replace it"):
            build(tmp_path / name, fresh=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", fresh=True)
    build(tmp_path / "empty", size=5, fresh=True)
    assert artifact.load(tmp_path / "empty").meta["config"]["size"] == 5


def test_a_replacement_killed_halfway_leaves_what_was_there(tmp_path, monkeypatch):
    build(tmp_path / "a")
    renamed, rename = [], Path.rename

    def rename_once(self: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt  # where a kill would have been
        renamed.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_once)
        build(tmp_path / "a", size=5, fresh=True)
    assert renamed and not (tmp_path / "a").exists()
    with pytest.raises(MismatchError, match="must have been made with this config"):
        build(tmp_path / "a", size=5)
    assert artifact.load(tmp_path / "a").meta["config"]["size"] == 3


def test_an_exception_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError),
        artifact.building(tmp_path / "a", kind="thing", version=1, config=Plain(), parents={}) as work,
    ):
        (work.path / "data.txt").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_resumable_work_is_picked_up_and_another_config_may_not_wipe_it(tmp_path):
    def interrupted(size: int) -> bool:
        with artifact.building(
            tmp_path / "a", kind="thing", version=1, config=Plain(size=size), parents={}, resumable=True
        ) as work:
            (work.path / "part").write_text("1")
            if not work.resumed:
                raise KeyboardInterrupt
            return work.resumed

    with pytest.raises(KeyboardInterrupt):
        interrupted(3)
    with pytest.raises(ArtifactError, match=r"a finished thing, got an unfinished one. Run the command"):
        artifact.load(tmp_path / "a", "thing")
    with pytest.raises(MismatchError, match=r"unfinished work"):
        interrupted(4)
    assert interrupted(3)
    assert artifact.load(tmp_path / "a").file("part").read_text() == "1"


@pytest.mark.parametrize("leave_out", [(), ("progress.json", "scratch")])
def test_work_that_failed_before_anything_was_recorded_is_forgotten(tmp_path, leave_out):
    def failing(size: int, name: str) -> None:
        with artifact.building(
            tmp_path / "a",
            kind="thing",
            version=1,
            config=Plain(size=size),
            parents={},
            resumable=True,
            leave_out=leave_out,
        ) as work:
            if leave_out:
                (work.path / "log.txt").write_text("not progress")
                (work.path / "scratch").mkdir(exist_ok=True)
            if name:
                (work.path / name).write_text("1")
            raise RuntimeError

    for size in (3, 4):  # another config: the first left nothing in its way
        with pytest.raises(RuntimeError):
            failing(size, "")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError):
        failing(3, "scratch/1" if leave_out else "part")
    with pytest.raises(MismatchError, match="unfinished work"):
        failing(4, "")


def test_killed_work_without_anything_to_go_on_from_is_in_no_other_configs_way(tmp_path):
    def begin(size: int, *names: str) -> None:
        with artifact.building(
            tmp_path / "a",
            kind="thing",
            version=1,
            config=Plain(size=size),
            parents={},
            resumable=True,
            leave_out=("log", "save-*"),
            worth_keeping=("log",),
            goes_on_from=("save-*",),
        ) as work:
            assert sorted(p.name for p in work.path.iterdir() if p.name in ("log", "save-1")) == []
            for name in names:
                (work.path / name).write_text("1")
            raise RuntimeError  # a log is worth keeping, so the folder stays, as after kill -9

    with pytest.raises(RuntimeError):
        begin(3, "log")
    assert (tmp_path / ".a.partial" / "log").exists()
    with pytest.raises(RuntimeError):
        begin(4, "log", "save-1")
    with pytest.raises(MismatchError, match=r"the unfinished work at .*\(size 4 there, 3 now\)"):
        begin(3)
    assert (tmp_path / ".a.partial" / "save-1").exists()


def test_kill_9_leaves_no_final_folder(tmp_path):
    code = f"""
import time, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_artifact import Plain
from sememe import artifact
from pathlib import Path
with artifact.building(Path({str(tmp_path)!r}) / "a", kind="thing", version=1, config=Plain(), parents={{}}) as work:
    (work.path / "data.txt").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with pytest.raises(
        LockError, match=rf"held by process {process.pid} on {platform.node()} since \d{{4}}-"
    ):
        build(tmp_path / "a")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "a").exists()
    build(tmp_path / "a")  # the dead process's lock does not stand in the way
    assert artifact.load(tmp_path / "a").kind == "thing"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_text("xx"), r"must be 3 bytes long, got 2 bytes"),
        (lambda p: p.unlink(), r"must hold data.txt, got no such file"),
    ],
)
def test_truncated_and_missing_files_are_found_on_load(tmp_path, damage, message):
    build(tmp_path / "a")
    damage(tmp_path / "a" / "data.txt")
    with pytest.raises(CorruptError, match=message):
        artifact.load(tmp_path / "a")


def test_a_flipped_bit_is_found_when_verified(tmp_path):
    build(tmp_path / "a")
    (tmp_path / "a" / "data.txt").write_text("xxy")
    with pytest.raises(CorruptError, match=r"must have SHA-256 \w{16}, got \w{16}"):
        artifact.load(tmp_path / "a").verify()


def test_what_is_not_an_artifact_says_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"must be a finished store, got nothing there"):
        artifact.load(tmp_path / "a", "store")
    (tmp_path / "b").mkdir()
    with pytest.raises(ArtifactError, match=r"got a folder without meta.json"):
        artifact.load(tmp_path / "b", "store")
    (tmp_path / "b" / "meta.json").write_text("{")
    with pytest.raises(CorruptError, match=r"must be a sememe meta.json"):
        artifact.load(tmp_path / "b", "store")
    build(tmp_path / "c")
    with pytest.raises(ArtifactError, match=r"must be a store, got a thing"):
        artifact.load(tmp_path / "c", "store")
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    (tmp_path / "c" / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))
    with pytest.raises(ArtifactError, match=r"format_version <= 1, got 99. Upgrade"):
        artifact.load(tmp_path / "c")


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"the disk must have room .* No space left"),
        artifact.building(tmp_path / "a", kind="thing", version=1, config=Plain(), parents={}),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not (tmp_path / "a").exists()


def test_a_real_full_disk(tmp_path):
    """A write to /dev/full fails as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with (
        pytest.raises(ResourceError, match=r"No space left"),
        artifact.building(tmp_path / "a", kind="thing", version=1, config=Plain(), parents={}),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x")
        full.flush()


@pytest.mark.parametrize(
    "write",
    [
        "from sememe.checkpoint import save_checkpoint; save_checkpoint(work.path, 1, {'a': torch.zeros(10**6)})",
        "from sememe.store import Shard, write_shard; ids = torch.zeros(10**6, dtype=torch.int32); "
        "write_shard(work.path / 's', Shard({'x': torch.zeros(10**6, 1)}, ids, ids + 1, ids + 2))",
        "import duckdb; c = duckdb.connect(str(work.path / 'd')); "
        "c.execute('create table t as select random() as a from range(1000000)'); c.close()",
        "import pyarrow as pa, pyarrow.parquet as pq; "
        "pq.write_table(pa.table({'a': torch.rand(10**6).numpy()}), work.path / 'p')",
        "(work.path / 'plain').write_bytes(bytes(10**6))",
    ],
    ids=["checkpoint", "shard", "atlas", "documents", "plain"],
)
def test_no_room_for_each_real_writer_is_one_line(tmp_path, write):
    """A limit on the size of a file stands for a full disk: writers fail in the same place with their own classes."""
    code = f"""
import resource, torch
from sememe import artifact
from sememe.config import Config
from sememe.errors import ResourceError
class Plain(Config): pass
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with artifact.building({str(tmp_path / "a")!r}, kind="thing", version=1, config=Plain(), parents={{}}) as work:
        {write}
except ResourceError as error:
    print(error)
"""
    done = forked.run(code, check=True)
    assert re.fullmatch(
        r"the disk must have room for the thing .*/a, got File too large\. Free some space .*\n", done.stdout
    )
    assert not (tmp_path / "a").exists()


def test_a_lock_frees_itself(tmp_path):
    started = time.monotonic()
    build(tmp_path / "a")
    build(tmp_path / "a", fresh=True)
    assert time.monotonic() - started < 5


def test_a_lock_file_that_its_owner_deleted_guards_nothing(tmp_path):
    """Opened by a second run just before the first one ends: it must not share the folder with a third."""
    path = tmp_path / "a"
    opened, ended = threading.Event(), threading.Event()
    flock = fcntl.flock

    def late(file, how):
        if threading.current_thread() is not threading.main_thread() and not opened.is_set():
            opened.set()
            assert ended.wait(10)
        flock(file, how)

    seen = []

    def second():
        with artifact.building(path, kind="thing", version=1, config=Plain(), parents={}):
            seen.append(path.with_name(".a.lock").exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with artifact.building(path, kind="thing", version=1, config=Plain(), parents={}):
            thread = threading.Thread(target=second)
            thread.start()
            assert opened.wait(10)
        ended.set()
        thread.join()
    assert seen == [True]


def test_what_differs_is_named(tmp_path):
    build(tmp_path / "a", parents={"store": "abc"})
    with pytest.raises(
        MismatchError, match=r'\(parents\.store "abc" there, "def" now; size 3 there, 4 now\)'
    ):
        build(tmp_path / "a", size=4, parents={"store": "def"})
    with (
        pytest.raises(RuntimeError),
        artifact.building(
            tmp_path / "b", kind="thing", version=1, config=Plain(), parents={}, resumable=True
        ) as work,
    ):
        (work.path / "part").write_text("1")
        raise RuntimeError
    with pytest.raises(MismatchError, match=r"the unfinished work at .*\(size 3 there, 5 now\)"):
        build(tmp_path / "b", size=5, resumable=True)
    with (
        pytest.raises(MismatchError, match=r"\(another version of sememe's verb\)"),
        artifact.building(
            tmp_path / "b", kind="thing", version=2, config=Plain(), parents={}, resumable=True
        ),
    ):
        pass
