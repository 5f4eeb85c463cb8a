"""From a name to a language model: an embedded one, a local folder, a GGUF file, or one of the hub.

Local and embedded models never touch the network. Knows nothing about what is done with the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator

from sememe.config import Config, sha256_of
from sememe.errors import ConfigError, CorruptError, ModelError, ResourceError, nearest
from sememe.lm import embedded, fingerprint
from sememe.lm.gguf import read_gguf
from sememe.lm.model import LanguageModel

__all__ = ["ModelConfig", "fetch", "fingerprint_of", "load", "native_dtype", "wrap"]

# Models whose hub name has no owner.
_OWNERLESS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")


class ModelConfig(Config):
    """Which language model, and how to run it."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"device", "device_map"})

    model: str = "smollm2-135m"
    """An embedded model's name, a folder, a .gguf file, or a name on the Hugging Face hub (owner/name)."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """auto: bfloat16 where the device multiplies it natively, float32 elsewhere."""
    device: str = "auto"
    """auto: the CUDA device if there is one, else the CPU."""
    device_map: str | None = None
    """Spread a large model over devices ("auto", "balanced", ...); needs the package accelerate."""
    revision: str | None = None
    """A branch, tag or commit of the hub."""
    randomise: Literal["none", "layers", "all"] = "none"
    """A null: shuffle the entries of every weight matrix, of the layers alone or of the embeddings too. What is still
    found was not learned."""
    randomise_seed: int = 0
    """Of the shuffles."""

    @model_validator(mode="after")
    def _seed_has_an_effect(self) -> Self:
        if self.randomise == "none" and self.randomise_seed != 0:
            raise ConfigError(
                "randomise_seed must be left out when nothing is randomised: it has no effect then",
                self.randomise_seed,
                "Drop it, or pass --randomise layers.",
            )
        return self

    def name(self) -> str:
        """What the loaded model is called."""
        if self.randomise == "none":
            return self.model
        return f"{self.model} (randomised: {self.randomise}, seed {self.randomise_seed})"

    def marked(self, fingerprint: str) -> str:
        """A model's fingerprint, or that of the same with its weights shuffled."""
        if self.randomise == "none":
            return fingerprint
        return sha256_of([fingerprint, "randomised", self.randomise, self.randomise_seed])


def native_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device has instructions for its products, float32 elsewhere."""
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
        # Older versions of torch.
        native = native or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def load(config: ModelConfig | str = "smollm2-135m") -> LanguageModel:
    """A language model, ready to read.

    Args:
        config: Which model; a name alone takes the defaults.
    Raises:
        ModelError: there is no such model, or it is not a causal language model.
        CorruptError: its files are damaged.
        ConfigError: the device is not there.
        ResourceError: `device_map` without accelerate, no disk space, or no pip.
    """
    config = ModelConfig(model=config) if isinstance(config, str) else config
    device = _device(config)
    dtype = native_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    with _quiet():
        source, identity = _find(config)
        if source.suffix == ".gguf" and source.is_file():
            hf, tokenizer = read_gguf(source, dtype)
        else:
            hf, tokenizer = _from_folder(source, config, dtype)
    if config.device_map is None:
        hf = hf.to(device)
    hf.requires_grad_(False)
    if config.randomise != "none":
        _randomise(hf, config)
    return LanguageModel(hf, tokenizer, config.name(), config.marked(identity or _fingerprint(source)))


def fingerprint_of(config: ModelConfig | str) -> str:
    """The fingerprint that the loaded model would have, without loading it.

    Raises:
        ModelError: there is no such model.
    """
    config = ModelConfig(model=config) if isinstance(config, str) else config
    with _quiet():
        source, identity = _find(config)
    return config.marked(identity or _fingerprint(source))


def fetch(name: str) -> None:
    """Put an embedded model into the cache, if it is not there.

    Raises:
        ModelError: there is no such model, or it cannot be had.
    """
    if name not in embedded.MODELS:
        raise ModelError(
            "a model to fetch must be an embedded one", repr(name), nearest(name, embedded.MODELS)
        )
    with _quiet():
        embedded.obtain(embedded.MODELS[name])


def wrap(hf: Any, tokenizer: Any, name: str) -> LanguageModel:
    """A language model around a Hugging Face model in memory, whose parameters stay trainable."""
    return LanguageModel(hf, tokenizer, name, fingerprint.of_module(hf, hf.config, tokenizer))


@torch.no_grad()
def _randomise(hf: Any, config: ModelConfig) -> None:
    """Shuffle the entries of weight matrices in place: each keeps its size, and what it had learned is gone.

    Source: the randomised models of Bricken et al. 2023 and Heap et al. 2025, arXiv:2501.17727. Differs: entries are
    shuffled within each matrix instead of drawn anew, so that their distribution stays exactly.
    """
    embeddings = [module for module in hf.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings += [module for module in (hf.get_output_embeddings(),) if module is not None]
    kept = {id(module.weight) for module in embeddings} if config.randomise == "layers" else set()
    generator = torch.Generator().manual_seed(config.randomise_seed)
    for name, weight in sorted(hf.named_parameters()):
        if weight.is_meta:
            raise ResourceError(
                "randomise needs every weight in memory",
                f"{name}, which is offloaded",
                "Drop device_map, or randomise.",
            )
        if weight.dim() >= 2 and id(weight) not in kept:
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.reshape(-1)[order].reshape(weight.shape))


def _device(config: ModelConfig) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "device must be one that torch finds here",
            f"{config.device!r} ({str(error).splitlines()[0]})",
            'Use "cpu" or "auto".',
        ) from None
    if config.device_map is not None:
        raise ConfigError(
            "device must be auto when device_map is given", repr(config.device), "Leave one of them out."
        )
    return config.device


def _find(config: ModelConfig) -> tuple[Path, str]:
    """A folder or a GGUF file, fetched first if it must be, and the fingerprint if it is known already."""
    name = config.model
    if name in embedded.MODELS:
        if config.revision is not None:
            raise ConfigError(
                "revision must be left out for an embedded model", repr(config.revision), "Drop it."
            )
        return embedded.obtain(embedded.MODELS[name])
    path = Path(name).expanduser()
    if path.exists():
        return _local(path), ""
    looks_local = name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")) or name.count("/") > 1
    if looks_local:
        near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            "a model's folder or file must exist",
            name,
            nearest(str(path), near) if near else "Check the path.",
        )
    if "/" not in name and name not in _OWNERLESS:
        raise ModelError(
            "a model must be an embedded name, a folder, a .gguf file, or owner/name on the Hugging Face hub",
            repr(name),
            nearest(name, [*embedded.MODELS, *_OWNERLESS]),
        )
    return _hub(config), ""


def _local(path: Path) -> Path:
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_file():
        raise ModelError(
            "a model file must be GGUF", str(path), "Give a .gguf file or a Hugging Face folder."
        )
    if (path / "config.json").is_file():
        if not _weight_files(path):
            raise ModelError(
                f"the model folder {path} must hold weights",
                "no .safetensors or .bin file",
                "Download it again, or give another folder.",
            )
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    raise ModelError(
        f"{path} must be a Hugging Face model folder",
        f"{len(ggufs)} .gguf files and no config.json" if ggufs else "no config.json",
        "Name one .gguf file." if ggufs else "Give the folder that holds config.json and the weights.",
    )


def _hub(config: ModelConfig) -> Path:
    """A hub model's folder in the hub's own cache; already cached files are used without asking the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name = config.model
    # Not Mistral's second copy of the weights, nor the folders that hold a model for other programs.
    wanted: dict[str, Any] = {"revision": config.revision, "ignore_patterns": ["*/*", "consolidated*"]}
    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with contextlib.suppress(LocalEntryNotFoundError, OSError):
        path = Path(snapshot_download(name, local_files_only=True, **wanted))
        if _complete(path):
            return path
    try:
        path = Path(snapshot_download(name, allow_patterns=files, **wanted))
        if not _weight_files(path):
            path = Path(snapshot_download(name, allow_patterns=[*files, "*.bin"], **wanted))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} must be open to you on the Hugging Face hub",
            "a gated model",
            f"Accept its terms at https://huggingface.co/{name} and log in with `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} must be a model on the Hugging Face hub",
            "no such model",
            nearest(name, embedded.MODELS),
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"{name} must be in the local cache or the Hugging Face hub must be reachable",
            str(error).splitlines()[0].removeprefix("Got: ") if str(error) else type(error).__name__,
            f"Check the network, or use the embedded model: {', '.join(embedded.MODELS)}.",
        ) from error
    if not _complete(path):
        raise ModelError(
            f"{name} must be whole in the local cache or the Hugging Face hub must be reachable",
            f"an unfinished download in {path}",
            "Check the network and run again.",
        )
    return path


def _complete(folder: Path) -> bool:
    """Whether every shard is there: a download may have been interrupted."""
    weights = _weight_files(folder)
    listed: set[str] = set()
    for index in folder.glob("*.index.json"):
        listed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return (
        bool(weights) and (folder / "config.json").is_file() and all((folder / n).is_file() for n in listed)
    )


def _weight_files(folder: Path) -> list[Path]:
    names = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return [name for name in names if not name.name.startswith(("adapter_", "consolidated"))]


def _from_folder(path: Path, config: ModelConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more: dict[str, Any] = {}
    if config.device_map is not None:
        if importlib.util.find_spec("accelerate") is None:
            raise ResourceError(
                "device_map needs the package accelerate",
                "none installed",
                "pip install accelerate, or drop device_map.",
            )
        more["device_map"] = config.device_map
    remedy = "Delete the folder and download the model again."
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True, **more
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except SafetensorError as error:
        raise CorruptError(
            f"the weights in {path} must be complete safetensors", str(error), remedy
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path} must hold a causal language model and its tokenizer",
            f"{type(error).__name__}: {first}",
            remedy,
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CorruptError(
            f"the weights in {path} must hold every parameter of {type(hf).__name__}",
            f"{len(missing)} missing, {missing[0]} first",
            remedy,
        )
    return hf, tokenizer


def _fingerprint(source: Path) -> str:
    if source.is_file():
        return fingerprint.of_files([source], None, [])
    tokenizers = [source / name for name in _TOKENIZERS if (source / name).is_file()]
    return fingerprint.of_files(_weight_files(source), source / "config.json", tokenizers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and advice, unless the user set a level."""
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
