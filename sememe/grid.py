"""A grid of penalties and sizes on one planted stream, and its four plots. Knows `train` and `toy`.

    recall       how much of the truth each dictionary found (mmcs planted -> learned)
    dead         latents that never fire on fresh rows
    fvu          what is left unexplained there
    next_larger  how much of it the next larger dictionary of the same penalty has too (mmcs)

Every cell is a training run of its own on the same rows, an artifact of its own, and found or resumed by itself.

Source: the four plots of Cunningham, Riggs, Ewart & Huben's replication of Sharkey et al. 2022, whose whole grid is
`published`; the default is a part of it that takes minutes instead of hours. Penalties are counted as there: the weight
of the mean over latents, in raw units (`l1_coefficient` multiplies the sum, in training units). Differs: fvu instead of
the reconstruction loss.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator

from sememe import artifact, dictionaries, figures, metrics
from sememe.config import Config, sha256_of
from sememe.dictionaries import Dictionary
from sememe.errors import ConfigError, MismatchError
from sememe.toy import PlantedSource, ToyConfig, scores
from sememe.train import TrainConfig, train

__all__ = ["GRID", "GridConfig", "grid", "trainings"]

VERSION = 4
GRID = "grid.json"
PENALTIES, RATIOS, N_TOKENS = (0.1, 10**-0.5, 1.0, 10**0.5), (0.5, 1.0, 2.0), 500_000
"""A part of the published grid, and rows of each training, where none are asked for."""
PUBLISHED_PENALTIES = tuple(10 ** (exponent / 4) for exponent in range(-8, 9))
PUBLISHED_RATIOS = tuple(2.0**exponent for exponent in range(-2, 6))
PUBLISHED_N_TOKENS = 4_000_000
N_SAMPLE_ROWS = 8192
"""Rows from which the data's spread is taken, as the trainer does."""
N_ROWS = 16_384
"""Fresh rows on which dead latents and fvu are counted."""


class GridConfig(Config):
    """Which grid, on what."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out"})

    out: Path = Path("artifacts/grid")
    """The folder to make; the dictionaries lie in OUT/dictionaries, the plots in OUT/plots."""
    planted: ToyConfig = ToyConfig()
    """What is to be found."""
    train: TrainConfig
    """How; 500,000 rows each if it does not say, 4,000,000 with published."""
    published: bool = False
    """The replication's whole grid: 17 penalties, 8 sizes."""
    penalties: tuple[float, ...] = Field(default=PENALTIES, min_length=1)
    """Weights of the mean activation over latents, against the error averaged over dimensions, both in raw units."""
    ratios: tuple[float, ...] = Field(default=RATIOS, min_length=1)
    """Latents per planted feature."""

    @model_validator(mode="before")
    @classmethod
    def _published_axes(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("published"):
            return data
        axes = {"penalties": PUBLISHED_PENALTIES, "ratios": PUBLISHED_RATIOS}
        for name, values in axes.items():
            if tuple(data.get(name, values)) != values:
                raise ConfigError(
                    f"{name} must be left out when the published grid is asked for",
                    " ".join(map(str, data[name])),
                    f"Drop --{name}, or --published.",
                )
        return data | axes

    @field_validator("penalties")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for penalty in value:
            if penalty <= 0:
                raise ConfigError("penalties must be above 0", f"{penalty:g}", "Change --penalties.")
        return value


class _Cell(NamedTuple):
    """One dictionary of the grid."""

    penalty: float
    d_sae: int
    config: TrainConfig

    @property
    def coefficient(self) -> float:
        """What its loss multiplies the sum over latents with, in training units."""
        return float(self.config.architecture.l1_coefficient)  # type: ignore[union-attr]


def grid(config: GridConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Train a dictionary for every penalty and ratio on one stream; measure each; draw the four plots.

    A grid that was stopped goes on: dictionaries that are there are opened, one that was begun is resumed. The
    artifact holds grid.json (a line per dictionary), grid.csv and grid.svg, and lies in OUT/plots.

    Args:
        config: Which grid.
        fresh: Make everything again.

    Raises:
        ConfigError: the architecture has no L1 penalty, a sweep of its own is given, or a size is below 1.
    """
    cells = _cells(config, _sizes(config))
    planted = {"planted": sha256_of(config.planted.resolved())}
    about = {"planted": config.planted.resolved()}
    made: dict[str, artifact.Artifact] = {}
    for number, cell in enumerate(cells, 1):
        if fresh or not (cell.config.out / artifact.META).is_file():
            what = f"penalty {cell.penalty:.3g}, {cell.d_sae:,} latents"
            print(f"cell {number} of {len(cells)}: {what}", file=sys.stderr, flush=True)
        train(cell.config, source=PlantedSource(config.planted), parents=planted, extra=about, fresh=fresh)
        made[cell.config.out.name] = artifact.load(cell.config.out, "dictionary")
    parents = {f"dictionary: {name}": one.fingerprint for name, one in made.items()}
    identity = artifact.identity_of("grid", VERSION, config, parents)
    plots = config.out / "plots"
    with contextlib.suppress(
        MismatchError
    ):  # plots of fewer cells, say: drawn again, as each cell was checked above
        there = None if fresh else artifact.find(plots, "grid", identity)
        if there is not None:
            return there
    lines = _measure(cells, PlantedSource(config.planted))
    with artifact.building(
        plots, kind="grid", version=VERSION, config=config, parents=parents, fresh=True
    ) as work:
        artifact.write_json(work.path / GRID, {"format_version": 3, "dictionaries": lines})
        (work.path / "grid.csv").write_text(figures.csv_of(lines), encoding="utf-8")
        for name, picture in figures.grid_plots(lines, config.planted.n_features).items():
            (work.path / f"{name}.svg").write_text(picture, encoding="utf-8")
    return artifact.load(plots, "grid")


def trainings(config: GridConfig) -> list[TrainConfig]:
    """What a grid trains, the smallest dictionaries first.

    Raises:
        ConfigError: as for `grid`.
    """
    return [cell.config for cell in _cells(config, _sizes(config))]


def _cells(config: GridConfig, sizes: list[int]) -> list[_Cell]:
    """The smallest dictionaries first, which are the quickest."""
    rows = PUBLISHED_N_TOKENS if config.published else N_TOKENS
    length = {} if config.train.n_tokens or config.train.epochs else {"n_tokens": rows}
    spread = _spread(config)
    cells = []
    for d_sae in sorted(sizes):
        for penalty in sorted(config.penalties):
            # rounded, so that the same grid is the same wherever the spread was measured
            coefficient = float(f"{penalty / (d_sae * spread):.4g}")
            architecture = config.train.architecture.replace(l1_coefficient=coefficient, d_sae=d_sae)
            out = config.out / "dictionaries" / f"penalty{penalty:.6g}-d_sae{d_sae}"
            cells.append(
                _Cell(penalty, d_sae, config.train.replace(architecture=architecture, out=out, **length))
            )
    return cells


def _spread(config: GridConfig) -> float:
    """What the trainer divides rows by: their root mean square distance from the mean; 1 if it does not."""
    if not config.train.scale:
        return 1.0
    x = PlantedSource(config.planted).sample(N_SAMPLE_ROWS).x.double()
    return float((x - x.mean(0)).square().mean().sqrt()) or 1.0


def _sizes(config: GridConfig) -> list[int]:
    if "l1_coefficient" not in type(config.train.architecture).model_fields:
        raise ConfigError(
            "a grid must be of an architecture with an l1_coefficient",
            config.train.architecture.kind,
            "Take relu, tied or gated.",
        )
    if config.train.architecture.kind == "p_anneal":
        raise ConfigError(
            "a grid must be of an architecture whose penalty is a sum of activations all along",
            "p_anneal, whose exponent falls",
            "Take relu, tied or gated.",
        )
    if config.train.sweep:
        raise ConfigError(
            "a grid must have no sweep of its own", " ".join(config.train.sweep), "Drop --sweep, or --grid."
        )
    for name, axis in (("l1_coefficient", "penalties"), ("d_sae", "ratios")):
        given = getattr(config.train.architecture, name)
        if given != type(config.train.architecture).model_fields[name].default:
            raise ConfigError(
                f"{name} must be left out of a grid, whose {axis} decide it",
                given,
                f"Drop --{name.replace('_', '-')}, or set --{axis}.",
            )
    if len({f"{penalty:.6g}" for penalty in config.penalties}) < len(config.penalties):
        raise ConfigError("each penalty must be named once", f"{config.penalties}", "Leave the repeats out.")
    sizes = [round(ratio * config.planted.n_features) for ratio in config.ratios]
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError(
            "every ratio must give a size of its own, at least 1", f"{sizes}", "Change --ratios."
        )
    return sizes


@torch.no_grad()
def _measure(cells: list[_Cell], source: PlantedSource) -> list[dict[str, Any]]:
    """One line per dictionary, by penalty and then by size; two are held at a time."""
    rows, lines = source.hold_out(N_ROWS), []
    ordered = sorted(cells, key=lambda cell: (cell.penalty, cell.d_sae))
    following: Dictionary | None = dictionaries.load(ordered[0].config.out)
    for cell, after in zip(ordered, [*ordered[1:], None], strict=True):
        assert following is not None
        dictionary = following
        following = None if after is None else dictionaries.load(after.config.out)
        in_larger = metrics.Statistic(float("nan"))
        if following is not None and after is not None and after.penalty == cell.penalty:
            both = dictionary.decoder_directions(), following.decoder_directions()
            in_larger = metrics.over_latents(metrics.mcs(*both), cause="a direction is NaN or infinite")
        lines.append(
            {
                "penalty": cell.penalty,
                "l1_coefficient": cell.coefficient,
                "d_sae": cell.d_sae,
                **scores(source.planted, dictionary, rows.x, next_larger=in_larger),
            }
        )
    return lines
