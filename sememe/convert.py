"""Convert a dictionary between Sememe's own folder and another tool's, in either direction.

Knows which side is ours and checks what it wrote by reading it back. How each format is laid out is the
business of `sememe.formats`; what trained the dictionary is nobody's here.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import artifact, dictionaries, formats, kernels
from sememe.config import Config, sha256_of
from sememe.dictionaries.base import Dictionary, Site, Sites
from sememe.errors import ConfigError, MismatchError

__all__ = ["VERSION", "ConvertConfig", "convert"]

VERSION = 1
RTOL = 1e-4  # as a dictionary checks itself on loading; measured differences are below 1e-6


class ConvertConfig(Config):
    """What to convert, into what, and where a foreign dictionary belongs."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"source", "out"})

    source: Path
    """The folder of a dictionary: ours, or one in a known format."""
    out: Path = Path("artifacts/converted")
    """The folder to make."""
    to: Literal["sememe", "sae_lens", "dictionary_learning", "sparsify"] = "sememe"
    """The format to write."""
    model: str | None = None
    """The language model that a foreign dictionary reads, recorded in it with the model's fingerprint."""
    hookpoint: str | None = None
    """Where in the model; what the foreign files say if not given. Needs model."""


def convert(config: ConvertConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Convert, read the result back, and compare the reconstructions of 16 rows.

    Args:
        config: What to convert into what.
        fresh: Replace whatever stands at the output.
    Returns:
        The folder written: a dictionary of ours, or an `export` that the other tool reads as it stands.
    Raises:
        ConfigError: an option has no effect in this direction.
        FormatError: the source is damaged or unknown, or the target has no place for it.
        MismatchError: the result does not reproduce the source.
    Example:
        >>> convert(ConvertConfig(source=Path("sae"), out=Path("dictionary")))  # doctest: +SKIP
    """
    found = formats.detect(config.source)
    if found == config.to:
        raise ConfigError(
            "to must be another format than the source's", config.to, f"Choose one of {_others(found)}."
        )
    if found == formats.SEMEME:
        return _export(config, fresh)
    if config.to != formats.SEMEME:
        raise ConfigError(
            "to must be sememe when the source is another tool's",
            config.to,
            "Convert to sememe first, then on.",
        )
    return _import(config, found, fresh)


def _others(name: str) -> str:
    return ", ".join(sorted({formats.SEMEME, *formats.WRITERS} - {name}))


def _export(config: ConvertConfig, fresh: bool) -> artifact.Artifact:
    for option in ("model", "hookpoint"):
        if getattr(config, option) is not None:
            raise ConfigError(
                f"{option} must go with a foreign source",
                f"one of ours, {config.source}",
                f"Leave {option} out.",
            )
    source = artifact.load(config.source, "dictionary")
    parents = {"dictionary": source.fingerprint}
    identity = artifact.identity_of("export", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "export", identity)):
        return done
    dictionary = dictionaries.load(config.source)
    with artifact.building(
        config.out, kind="export", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        formats.write(dictionary, work.path, config.to)
        _compare(dictionary, formats.READERS[config.to](work.path).dictionary, config)
    return artifact.load(config.out, "export")


def _import(config: ConvertConfig, found: str, fresh: bool) -> artifact.Artifact:
    if config.hookpoint is not None and config.model is None:
        raise ConfigError("hookpoint must go with model", config.hookpoint, "Name the model as well.")
    folder = config.source
    files = {file.name: artifact.file_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
    parents = {found: sha256_of(files)}
    identity = artifact.identity_of("dictionary", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "dictionary", identity)):
        return done
    foreign = formats.read(folder)
    dictionary = foreign.dictionary
    if config.model is not None:
        dictionary.sites = _sites(config.model, config.hookpoint or foreign.hookpoint, dictionary, folder)
    origin = {
        "format": found,
        "model": foreign.model,
        "hookpoint": foreign.hookpoint,
        "config": foreign.config,
    }
    with artifact.building(
        config.out, kind="dictionary", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        work.extra = {"origin": origin} | dictionary.write(work.path, probe_rows(dictionary))
    return artifact.load(config.out, "dictionary")


def _sites(model: str, hookpoint: str | None, dictionary: Dictionary, folder: Path) -> Sites:
    if hookpoint is None:
        raise ConfigError(
            f"hookpoint must be given, as {folder} does not say it",
            "nothing",
            "Pass --hookpoint, e.g. resid_post.8.",
        )
    from sememe import lm

    language_model = lm.load(lm.ModelConfig(model=model))
    names = language_model.expand((hookpoint,))
    if len(names) != 1:
        raise ConfigError("hookpoint must name one place", ", ".join(names), "Choose one of them.")
    hookpoint = names[0]
    width = language_model.width(hookpoint)
    if (dictionary.d_in, dictionary.d_out) != (width, width):
        raise MismatchError(
            f"a dictionary of {hookpoint} of {model} must have d_in = d_out = {width}",
            f"{dictionary.d_in} and {dictionary.d_out}",
            "Name the model and hookpoint that it was trained on.",
        )
    site = Site(
        model=language_model.name,
        model_fingerprint=language_model.fingerprint,
        hookpoint=hookpoint,
        start=0,
        stop=width,
    )
    return Sites(inputs=(site,), outputs=(site,))


def probe_rows(dictionary: Dictionary) -> Float[Tensor, "16 d_in"]:
    """Rows on which latents of any scale fire, for a dictionary whose activations are not at hand.

    Row r is the input bias plus 2 ** (r - 6) times the unit encoder direction of a latent drawn at random.
    """
    directions = dictionary.encoder_directions()
    assert directions is not None, "formats give linear encoders"
    generator = torch.Generator().manual_seed(0)
    chosen = directions[torch.randint(dictionary.d_sae, (16,), generator=generator)].detach()
    units = chosen / chosen.norm(dim=1, keepdim=True).clamp_min(1e-12)
    centre: Tensor = getattr(dictionary, "b_pre", torch.zeros(dictionary.d_in))
    scales: Tensor = torch.exp2(torch.arange(-6, 10))[:, None]
    rows: Tensor = centre + units * scales
    return rows


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
