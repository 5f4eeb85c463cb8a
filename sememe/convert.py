"""Convert dictionaries between Sememe's own folder and another tool's, in either direction.

Knows which side is ours and checks what it wrote by reading it back. How each format is laid out is the
business of `sememe.formats`; what trained the dictionary is nobody's here.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch

from sememe import artifact, dictionaries, foreign, formats, hub, kernels
from sememe.config import Config
from sememe.dictionaries.base import Dictionary
from sememe.errors import ConfigError, FormatError, MismatchError
from sememe.foreign import Belongs, probe_rows
from sememe.formats.hub import names_below
from sememe.progress import track

__all__ = ["VERSION", "ConvertConfig", "convert", "convert_all"]

VERSION = 2
RTOL = 1e-4  # as a dictionary checks itself on loading; measured differences are below 1e-6


class ConvertConfig(Config):
    """What to convert, into what, and where a foreign dictionary belongs."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"source", "out", "select"})

    source: Path
    """A dictionary: ours, or one in a known format; a folder, a file, or hf://OWNER/REPO/FOLDER on the hub."""
    out: Path = Path("artifacts/converted")
    """The folder to make; with select, the folder that holds one of each."""
    to: Literal["sememe", "sae_lens", "dictionary_learning", "sparsify"] = "sememe"
    """The format to write."""
    select: str | None = None
    """Convert every foreign dictionary below the source whose path in it matches this pattern, e.g. 'mlp_out_*'."""
    model: str | None = None
    """The language model that a foreign dictionary reads, recorded in it with the model's fingerprint."""
    hookpoint: str | None = None
    """Where in the model; what the foreign files say if not given. Needs model."""
    hookpoint_out: str | None = None
    """Of a transcoder, where it writes; what the foreign files say if not given. Needs model."""


def convert(config: ConvertConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Convert, read the result back, and compare the reconstructions of 16 rows.

    Args:
        config: What to convert into what.
        fresh: Replace whatever stands at the output.
    Returns:
        The folder written: a dictionary of ours, or an `export` that the other tool reads as it stands. With
        `select` the last of those that `convert_all` gives.
    Raises:
        ConfigError: an option has no effect in this direction.
        FormatError: the source is damaged or unknown, or the target has no place for it.
        MismatchError: the result does not reproduce the source.
    Example:
        >>> convert(ConvertConfig(source=Path("sae"), out=Path("dictionary")))  # doctest: +SKIP
    """
    if config.select is not None:
        return list(convert_all(config, fresh=fresh).values())[-1]
    source = foreign.source_of(config.source)
    found = formats.detect(source)
    if found == config.to:
        raise ConfigError(
            "to must be another format than the source's", config.to, f"Choose one of {_others(found)}."
        )
    if found == formats.SEMEME:
        return _export(config, source, fresh)
    if config.to != formats.SEMEME:
        raise ConfigError(
            "to must be sememe when the source is another tool's",
            config.to,
            "Convert to sememe first, then on.",
        )
    for option in ("hookpoint", "hookpoint_out"):
        if getattr(config, option) is not None and config.model is None:
            raise ConfigError(
                f"{option} must go with model", getattr(config, option), "Name the model as well."
            )

    def belongs(read: formats.Foreign) -> Belongs | None:
        return None if config.model is None else _belongs(config, read, source)

    return foreign.bring(source, config.out, config, VERSION, belongs, {}, fresh=fresh)


def convert_all(config: ConvertConfig, *, fresh: bool = False) -> dict[str, artifact.Artifact]:
    """Convert every foreign dictionary of a release that `select` matches, into a folder of the same layout.

    Args:
        config: As for `convert`; `source` is the release's folder.
        fresh: Replace whatever stands at the outputs.
    Returns:
        What was made, by the paths in the release.
    Raises:
        ConfigError: select is not given, or the dictionaries are to be of one hookpoint.
        FormatError: nothing matches, or one of them cannot be read.
    """
    if config.select is None or config.to != formats.SEMEME:
        raise ConfigError(
            "select must be given to convert several foreign dictionaries, and to be sememe",
            f"select {config.select!r}, to {config.to}",
            "Pass --select '*'.",
        )
    for option in ("hookpoint", "hookpoint_out"):
        if getattr(config, option) is not None:
            raise ConfigError(
                f"{option} must be left out with select: each dictionary's files or folders say their own",
                getattr(config, option),
                "Drop it, or convert one at a time.",
            )
    found = _found(config.source, config.select)
    if not found:
        there = list(_found(config.source, "*"))
        raise FormatError(
            f"select must match a foreign dictionary below {config.source}",
            repr(config.select),
            f"There are {', '.join(there[:6])}{', ...' if len(there) > 6 else ''}."
            if there
            else "There is none.",
        )
    made = {}
    with track("convert", len(found), "dictionaries") as progress:
        for name, path in found.items():
            out = config.out / name.removesuffix(".pt")
            made[name] = convert(config.replace(source=path, out=out, select=None), fresh=fresh)
            progress.advance()
    return made


def _found(source: Path, select: str) -> dict[str, Path]:
    """The dictionaries below a folder or an id, by their paths in it; those of an id are fetched one by one."""
    if hub.is_id(source):
        return {name: source / name for name in names_below(source, select)}
    return formats.find(source, select)


def _others(name: str) -> str:
    return ", ".join(sorted({formats.SEMEME, *formats.WRITERS} - {name}))


def _export(config: ConvertConfig, folder: Path, fresh: bool) -> artifact.Artifact:
    for option in ("model", "hookpoint", "hookpoint_out"):
        if getattr(config, option) is not None:
            raise ConfigError(
                f"{option} must go with a foreign source",
                f"one of ours, {config.source}",
                f"Leave {option} out.",
            )
    source = artifact.load(folder, "dictionary")
    parents = {"dictionary": source.fingerprint}
    identity = artifact.identity_of("export", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "export", identity)):
        return done
    dictionary = dictionaries.load(folder)
    with artifact.building(
        config.out, kind="export", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        formats.write(dictionary, work.path, config.to)
        _compare(dictionary, formats.READERS[config.to](work.path).dictionary, config)
    return artifact.load(config.out, "export")


def _belongs(config: ConvertConfig, read: formats.Foreign, folder: Path) -> Belongs:
    """The model and the places, checked against the model's own widths."""
    from sememe import lm

    assert config.model is not None
    dictionary = read.dictionary
    hookpoint = config.hookpoint or read.hookpoint
    hookpoint_out = config.hookpoint_out or read.hookpoint_out
    if hookpoint is None:
        raise ConfigError(
            f"hookpoint must be given, as {folder} does not say it",
            "nothing",
            "Pass --hookpoint, e.g. resid_post.8.",
        )
    language_model = lm.load(lm.ModelConfig(model=config.model))
    places = []
    for place, width in ((hookpoint, dictionary.d_in), (hookpoint_out or hookpoint, dictionary.d_out)):
        names = language_model.expand((place,))
        if len(names) != 1:
            raise ConfigError("hookpoint must name one place", ", ".join(names), "Choose one of them.")
        if language_model.width(names[0]) != width:
            raise MismatchError(
                f"a dictionary of {names[0]} of {config.model} must be {language_model.width(names[0])} wide there",
                f"d_in {dictionary.d_in} and d_out {dictionary.d_out}",
                "Name the model and hookpoint that it was trained on; of a transcoder, --hookpoint-out as well.",
            )
        places.append(names[0])
    return Belongs(
        language_model.name,
        language_model.fingerprint,
        places[0],
        places[1] if hookpoint_out is not None else None,
    )


def _compare(ours: Dictionary, theirs: Dictionary, config: ConvertConfig) -> None:
    x = probe_rows(ours)
    with torch.no_grad(), kernels.use("reference"):
        a, b = ours(x), theirs(x)
    difference = float(((a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)).max())
    if not difference <= RTOL:
        raise MismatchError(
            f"{config.out} must reproduce {config.source} to {RTOL:g}",
            f"a relative difference of {difference:.3g}",
            "The weights' scales are too far apart for float32; keep Sememe's own format.",
        )
