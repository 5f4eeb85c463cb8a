"""A grid of penalties and sizes on one planted stream, and its four plots. Knows `train` and `toy`.

    recall       how much of the truth each dictionary found (mmcs planted -> learned)
    dead         latents that never fire on fresh rows
    fvu          what is left unexplained there
    next_larger  how much of it the next larger dictionary of the same penalty has too (mmcs)

Source: the four plots of Cunningham, Riggs, Ewart & Huben's replication of Sharkey et al. 2022. Differs: the penalty
multiplies the sum over latents against the error averaged over dimensions, as everywhere here; fvu instead of the
reconstruction loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from sememe import artifact, figures, metrics
from sememe.config import Config, sha256_of
from sememe.dictionaries import Dictionary
from sememe.errors import ConfigError
from sememe.source import Batch
from sememe.toy import PlantedSource, ToyConfig, recovery
from sememe.train import TrainConfig, train_sweep

__all__ = ["GRID", "GridConfig", "grid"]

VERSION = 1
GRID = "grid.json"
N_ROWS = 16_384
"""Fresh rows on which dead latents and fvu are counted."""
N_AT_ONCE = 2048


class GridConfig(Config):
    """Which grid, on what."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out"})

    out: Path = Path("artifacts/grid")
    """The folder to make; the dictionaries lie in OUT/dictionaries, the plots in OUT/plots."""
    planted: ToyConfig = ToyConfig()
    """What is to be found."""
    train: TrainConfig
    """How; its sweep is the grid's."""
    penalties: tuple[float, ...] = Field(
        default=(0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0), min_length=1
    )
    """Values of the architecture's l1_coefficient."""
    ratios: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0, 2.0, 4.0), min_length=1)
    """Latents per planted feature."""


def grid(config: GridConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Train a dictionary for every penalty and ratio on one stream; measure each; draw the four plots.

    The artifact holds grid.json (a line per dictionary), grid.csv and grid.svg, and lies in OUT/plots.

    Args:
        config: Which grid.
        fresh: Make everything again.

    Raises:
        ConfigError: the architecture has no L1 penalty, a sweep of its own is given, or a size is below 1.
    """
    sizes = _sizes(config)
    sweep = (
        f"l1_coefficient={','.join(map(repr, config.penalties))}",
        f"d_sae={','.join(map(str, sizes))}",
    )
    trained = config.train.replace(sweep=sweep, out=config.out / "dictionaries")
    source = PlantedSource(config.planted)
    about = {"planted": config.planted.resolved()}
    planted = {"planted": sha256_of(config.planted.resolved())}
    found = train_sweep(trained, source=source, parents=planted, extra=about, fresh=fresh)
    parents = {"sweep": found.artifact.fingerprint}
    identity = artifact.identity_of("grid", VERSION, config, parents)
    plots = config.out / "plots"
    there = None if fresh else artifact.find(plots, "grid", identity)
    if there is not None:
        return there
    loaded = {
        (float(entry["options"]["l1_coefficient"]), int(entry["options"]["d_sae"])): found.load(entry["name"])
        for entry in found.index
    }
    lines = _measure(loaded, source)
    with artifact.building(
        plots, kind="grid", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        artifact.write_json(work.path / GRID, {"format_version": 1, "dictionaries": lines})
        names = list(lines[0])
        rows = [",".join("" if line[name] is None else f"{line[name]:g}" for name in names) for line in lines]
        (work.path / "grid.csv").write_text("\n".join([",".join(names), *rows, ""]), encoding="utf-8")
        for name, picture in figures.grid_plots(lines, config.planted.n_features).items():
            (work.path / f"{name}.svg").write_text(picture, encoding="utf-8")
    return artifact.load(plots, "grid")


def _sizes(config: GridConfig) -> list[int]:
    if "l1_coefficient" not in type(config.train.architecture).model_fields:
        raise ConfigError(
            "a grid must be of an architecture with an l1_coefficient",
            config.train.architecture.kind,
            "Take relu, tied, gated or p_anneal.",
        )
    if config.train.sweep:
        raise ConfigError(
            "a grid must have no sweep of its own", " ".join(config.train.sweep), "Drop --sweep, or --grid."
        )
    if len(set(config.penalties)) < len(config.penalties):
        raise ConfigError("each penalty must be named once", f"{config.penalties}", "Leave the repeats out.")
    sizes = [round(ratio * config.planted.n_features) for ratio in config.ratios]
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError(
            "every ratio must give a size of its own, at least 1", f"{sizes}", "Change --ratios."
        )
    return sizes


@torch.no_grad()
def _measure(loaded: dict[tuple[float, int], Dictionary], source: PlantedSource) -> list[dict[str, Any]]:
    """One line per dictionary, by penalty and then by size."""
    rows, lines = source.hold_out(N_ROWS), []
    for penalty, size in sorted(loaded):
        dictionary = loaded[penalty, size]
        larger = min((d for p, d in loaded if p == penalty and d > size), default=None)
        scores = recovery(source.planted, dictionary)
        following = None
        if larger is not None:
            other = loaded[penalty, larger].decoder_directions()
            following = float(metrics.mmcs(dictionary.decoder_directions(), other))
        lines.append(
            {
                "l1_coefficient": penalty,
                "d_sae": size,
                "recall": scores.recall,
                "precision": scores.precision,
                "found": scores.found,
                **_on(dictionary, rows),
                "next_larger": following,
            }
        )
    return lines


def _on(dictionary: Dictionary, rows: Batch) -> dict[str, float]:
    """What a dictionary does with fresh rows."""
    sums, active = metrics.Reconstruction(), torch.zeros(dictionary.d_sae, dtype=torch.int64)
    for x in torch.split(rows.x, N_AT_ONCE):
        encoded = dictionary.encode(x)
        sums.update(x, dictionary.decode(encoded, x))
        active += torch.bincount(encoded.indices[encoded.acts != 0].long(), minlength=dictionary.d_sae)
    return {
        "dead": int((active == 0).sum()),
        "l0": float(active.sum()) / rows.x.shape[0],
        "fvu": sums.compute()["fvu"].value,
    }
