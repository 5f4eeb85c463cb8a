"""One dictionary's kept checkpoints: which latents settled, which were lost again. Knows a dictionary's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sememe import artifact, dictionaries, metrics
from sememe.dictionaries.folders import CHECKPOINTS, last_step
from sememe.geometry.config import GeometryConfig
from sememe.progress import track

__all__ = ["history"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NULLS = 0x68697374
"""The first stream of the random directions: one for each checkpoint."""


def history(folder: Path, config: GeometryConfig) -> dict[str, Any] | None:
    """Self-similarity over the checkpoints in a dictionary's folder, the dictionary itself being the last; None if it
    kept none. Beside it that of random directions, drawn anew at every checkpoint."""
    folder = artifact.here(folder)
    places = sorted((folder / CHECKPOINTS).glob(f"step-*/{artifact.META}"))
    if not places:
        return None
    paths = [place.parent for place in places]
    steps = [int(artifact.load(path, "dictionary").extra["step"]) for path in paths]
    last = last_step(folder)
    if last is not None and last > steps[-1]:
        paths.append(folder)
        steps.append(last)
    if len(paths) < 2:
        return None

    def directions() -> Iterator[Tensor]:
        with track(f"checkpoints of {folder.name}", len(paths), "checkpoints") as progress:
            for path in paths:
                yield dictionaries.load(path).decoder_directions().detach()
                progress.advance(1)

    found = metrics.self_similarity(directions())
    similarity = found.similarity.double().cpu()
    d_out = dictionaries.load(folder).d_out
    n_latents = int(similarity.shape[1])
    random = metrics.self_similarity(
        metrics.random_rows(n_latents, d_out, config.seed, stream=NULLS + number)
        for number in range(len(paths))
    )
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "seed": config.seed}

    def beside(own: Tensor, null: Tensor) -> dict[str, Any]:
        chance = float(null.double().mean())
        return {**metrics.over_latents(own.cpu(), **options).to_json(), "random": chance}

    by_step = list(zip(similarity, random.similarity, strict=True))
    return {
        "steps": steps,
        "n_latents": n_latents,
        "mean": [beside(own, null) for own, null in by_step],
        "quantiles": {f"{q:g}": torch.quantile(similarity, q, dim=1).tolist() for q in QUANTILES},
        "share_at_least_0.9": [beside(own >= 0.9, null >= 0.9) for own, null in by_step],
        "n_reached_0.9": int(found.reached.sum()),
        "n_fell_below_0.6": int(found.fell.sum()),
        "reached_0.9": beside(found.reached, random.reached),
        "fell_below_0.6": beside(found.fell, random.fell),
        "random_spread": float(1 / np.sqrt(d_out)),
    }
