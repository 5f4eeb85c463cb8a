"""Chosen texts with the latents that fire on them, from what `sememe prompt --out FILE.json` wrote.

Knows those files; computes nothing. A text is columns of its tokens, and at each token the latents that fire there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sememe.artifact import META, file_sha256
from sememe.browse.data.values import number
from sememe.errors import ArtifactError, CorruptError

__all__ = ["fingerprints", "read_texts", "text_files"]

Json = dict[str, Any]
FIGURES = ("act", "quantile", "loss_change", "loss_change_after", "kl")
TOKEN = ("position", "token", "text", "kept", "n_active", "loss_of_next")


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files meant by files and folders of them, in order.

    Raises:
        ArtifactError: a path is not there, or a folder holds no such file.
    """
    out: list[Path] = []
    for path in paths:
        # A folder that `sememe prompts` made has a meta.json, too.
        found = (
            sorted(p for p in path.glob("*.json") if p.name != META)
            if path.is_dir()
            else [path]
            if path.is_file()
            else []
        )
        if not found:
            raise ArtifactError(
                "prompts must be .json files that `sememe prompt --out` wrote, or folders of them",
                f"{path}" + (", a folder without any" if path.is_dir() else ", which is not there"),
                "Make some: `sememe prompts DICTIONARY --out prompts`.",
            )
        out += found
    return out


def fingerprints(files: Iterable[Path]) -> dict[str, str]:
    """The files' hashes, by role."""
    return {f"prompt.{i}": file_sha256(file) for i, file in enumerate(files)}


def read_texts(files: Iterable[Path], known: Iterable[int]) -> list[Json]:
    """Each file as the page gets it.

    Args:
        files: Views of prompts.
        known: The atlas's latents; others are of another dictionary.

    Raises:
        CorruptError: a file is not a view of a prompt, or names latents that the atlas does not have.
    """
    there = set(known)
    return [_text(file, there) for file in files]


def _text(file: Path, known: set[int]) -> Json:
    try:
        view = json.loads(file.read_text(encoding="utf-8"))
        tokens = {name: [token[name] for token in view["tokens"]] for name in TOKEN}
        at: dict[int, Json] = {}
        for row in view["rows"]:
            empty: Json = {name: [] for name in ("latent", *FIGURES, "raised", "lowered")}
            here = at.setdefault(int(row["position"]), empty)
            here["latent"].append(int(row["latent"]))
            for name in FIGURES:
                here[name].append(number(row[name], 3))
            for end in ("raised", "lowered"):
                here[end].append(
                    [[int(o["token"]), str(o["text"]), number(o["change"], 3)] for o in row[end]]
                )
        out = {"prompt": str(view["prompt"]), "model": str(view["model"]), "ablated": bool(view["ablated"])}
        tokens["bytes"] = [token.get("bytes") for token in view["tokens"]]
        tokens["loss_of_next"] = [number(loss, 3) for loss in tokens["loss_of_next"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{file} must be a view of a prompt",
            f"{type(error).__name__}: {error}",
            "Write it again with `sememe prompt --out`.",
        ) from None
    strangers = sorted({latent for here in at.values() for latent in here["latent"]} - known)
    if strangers:
        raise CorruptError(
            f"{file} must be of the atlas's dictionary",
            f"latent {strangers[0]}, which the atlas does not have",
            "Name prompts that were looked at through this dictionary.",
        )
    for here in at.values():
        for name in (*FIGURES, "raised", "lowered"):
            if not any(value is not None and value != [] for value in here[name]):
                del here[name]
    return {**out, "tokens": tokens, "latents": [at.get(position) for position in tokens["position"]]}
