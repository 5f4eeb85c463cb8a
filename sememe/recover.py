"""Dictionaries on planted features, and how many of them each found. Knows `train`, `fit` and `toy`.

What is trained or fitted reads one planted stream; each dictionary is compared with the truth, beside as many random
directions, and a table of all of them is written.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from sememe import artifact, dictionaries
from sememe.config import Config, sha256_of
from sememe.errors import ConfigError, MismatchError
from sememe.fit import FitConfig, fit
from sememe.toy import PlantedSource, ToyConfig, scores
from sememe.train import TrainConfig, swept_names, train, train_sweep

__all__ = ["RECOVERY", "RecoverConfig", "recover"]

VERSION = 4
RECOVERY = "recovery.json"


class RecoverConfig(Config):
    """What learns what from which planted features."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out"})

    out: Path = Path("artifacts/recover")
    """The folder to make; dictionaries lie in OUT/dictionary, the table in OUT/recovery."""
    planted: ToyConfig = ToyConfig()
    """What is to be found."""
    train: TrainConfig | None = None
    """What is trained; with a sweep, several."""
    fit: FitConfig | None = None
    """What is fitted instead: K-SVD, PCA, ..."""
    n_rows: int = Field(default=16_384, ge=1)
    """Fresh rows on which dead latents, l0 and fvu are counted."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.train is None) == (self.fit is None):
            raise ConfigError(
                "exactly one of train and fit must say what learns from the planted features",
                "both" if self.train is not None else "neither",
                "Drop one." if self.train is not None else "Add a table train or fit.",
            )
        if self.train is not None and self.train.live:
            raise ConfigError("train must not be live on planted features", "live true", "Drop live.")
        return self


def recover(config: RecoverConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Train or fit on planted features and write what was found, or open the table if it is there.

    The artifact holds recovery.json, a row per dictionary: recall and precision (mmcs planted -> learned and back),
    `found` (share of the planted features above a cosine of 0.9), each with its interval and that of as many random
    directions; `dead`, `l0` and `fvu` on fresh rows. A number that there is not is null, and `cause` says why.

    Args:
        config: What learns what.
        fresh: Make everything again.

    Raises:
        ConfigError: an option is out of range for the planted rows.
        MismatchError: other dictionaries stand in config.out.
    """
    made = _made(config, fresh)
    parents = {
        f"dictionary: {name}": artifact.load(path, "dictionary").fingerprint for name, path in made.items()
    }
    out = config.out / "recovery"
    identity = artifact.identity_of("recovery", VERSION, config, parents)
    with contextlib.suppress(MismatchError):  # of other dictionaries: counted again
        there = None if fresh else artifact.find(out, "recovery", identity)
        if there is not None:
            return there
    source = PlantedSource(config.planted)
    rows = source.hold_out(config.n_rows).x
    lines: list[dict[str, Any]] = []
    for name, path in made.items():
        dictionary = dictionaries.load(path)
        about = {"name": name, "kind": dictionary.kind, "d_sae": dictionary.d_sae}
        lines.append({**about, **scores(source.planted, dictionary, rows)})
    with artifact.building(
        out, kind="recovery", version=VERSION, config=config, parents=parents, fresh=True
    ) as work:
        artifact.write_json(work.path / RECOVERY, {"format_version": 2, "rows": lines})
    return artifact.load(out, "recovery")


def _made(config: RecoverConfig, fresh: bool) -> dict[str, Path]:
    """The dictionaries by name, trained or fitted now if they are not there."""
    source, out = PlantedSource(config.planted), config.out / "dictionary"
    about: dict[str, Any] = {
        "parents": {"planted": sha256_of(config.planted.resolved())},
        "extra": {"planted": config.planted.resolved()},
    }
    if config.fit is not None:
        fit(config.fit.replace(out=out), source=source, **about, fresh=fresh)
        return {config.fit.baseline.kind: out}
    assert config.train is not None
    training = config.train.replace(out=out)
    if not training.sweep:
        train(training, source=source, **about, fresh=fresh)
        return {training.architecture.kind: out}
    train_sweep(training, source=source, **about, fresh=fresh)
    return {name: out / name for name in swept_names(training)}
