"""Other tools' dictionaries brought in: a folder, file or hub id becomes an artifact of ours, once.

Knows formats and artifacts, and how to say where in a language model a dictionary belongs; loads no model. Verbs
take foreign paths wherever they take a dictionary through `opens`, which brings them in when a config is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from sememe import artifact, formats, hub
from sememe.config import Config, sha256_of
from sememe.dictionaries.base import Dictionary, Site, Sites
from sememe.errors import MismatchError
from sememe.formats.base import Foreign
from sememe.formats.hub import fetch
from sememe.paths import cache_dir

__all__ = ["Belongs", "BroughtConfig", "bring", "opens", "own", "probe_rows", "source_of"]

VERSION = 1
SAME_MODELS = {"gpt2-small": "gpt2", "meta-llama-3.1-8b": "llama-3.1-8b"}
"""TransformerLens' names, and what the same models are called on the hub, without their owners."""


class Belongs(NamedTuple):
    """The model that a foreign dictionary reads, and where."""

    model: str
    fingerprint: str
    hookpoint: str
    hookpoint_out: str | None = None
    """Where it writes, if that is another place."""

    def sites(self, dictionary: Dictionary) -> Sites:
        """Recorded as for a dictionary that was trained here."""

        def site(hookpoint: str, width: int) -> Site:
            return Site(
                model=self.model, model_fingerprint=self.fingerprint, hookpoint=hookpoint, start=0, stop=width
            )

        reads = site(self.hookpoint, dictionary.d_in)
        writes = reads if self.hookpoint_out is None else site(self.hookpoint_out, dictionary.d_out)
        return Sites(inputs=(reads,), outputs=(writes,))


class BroughtConfig(Config):
    """What was brought in by its path alone."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"source"})

    source: str
    """The folder, file or id."""
    model: str | None = None
    """The language model that it was said to read."""


def source_of(source: str | Path) -> Path:
    """A dictionary's folder or file on disk; what an id or an address names is downloaded if it is not there.

    Raises:
        FormatError: an id leads nowhere, or the hub cannot be reached.
        ArtifactError: nothing of ours lies at an address.
    """
    return fetch(source) if hub.is_id(source) else artifact.here(source)


def bring(
    folder: Path,
    out: Path,
    config: Config,
    version: int,
    belongs: Callable[[Foreign], Belongs | None],
    parents: Mapping[str, str],
    *,
    fresh: bool = False,
) -> artifact.Artifact:
    """Make a dictionary of ours out of a foreign one.

    Args:
        folder: The foreign folder or file.
        out: The folder to make.
        config: What is recorded as the options it was made with.
        version: Of the verb that makes it.
        belongs: Where it belongs, given what the files say; None leaves it without a model.
        parents: What it was made from beside the foreign files.
        fresh: Replace whatever stands at `out`.

    Raises:
        FormatError: the folder is damaged or unknown.
        MismatchError: something else stands at `out`.
    """
    name = formats.detect(folder)
    files = {file: artifact.file_sha256(path) for file, path in formats.files_of(folder).items()}
    parents = {name: sha256_of(files), **parents}
    identity = artifact.identity_of("dictionary", version, config, parents)
    if not fresh and (done := artifact.find(out, "dictionary", identity)):
        return done
    foreign = formats.read(folder)
    dictionary = foreign.dictionary
    place = belongs(foreign)
    if place is not None:
        dictionary.sites = place.sites(dictionary)
    origin = {
        "format": name,
        "model": foreign.model,
        "hookpoint": foreign.hookpoint,
        "hookpoint_out": foreign.hookpoint_out,
        "config": foreign.config,
    }
    with artifact.building(
        out, kind="dictionary", version=version, config=config, parents=parents, fresh=fresh
    ) as work:
        work.extra = {"origin": origin} | dictionary.write(work.path, probe_rows(dictionary))
    return artifact.load(out, "dictionary")


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


# -- by path alone ---------------------------------------------------------------------------------


def own(path: str | Path, model: Any = None, *, named: bool = False) -> Path:
    """Where a dictionary of ours is that stands for a path: itself, or a foreign one brought into the cache.

    Args:
        path: A dictionary of ours, a folder of such, a foreign folder or file, or a hub id. What is none of these is
            returned as it is: whoever opens it says what is wrong.
        model: The language model (its config or name) that it is to be used with, if one is known.
        named: Whether somebody named that model, and it is not just the default one.

    Raises:
        FormatError: a foreign dictionary cannot be read, or an id leads nowhere.
        MismatchError: its files name another model than was named.
    """
    if not hub.is_id(path):
        path = Path(path)
        if not path.exists() or not formats.is_foreign(path):
            return path
    folder = source_of(path)
    if not formats.is_foreign(folder):
        return folder  # one of ours, from the hub, or what opening it will say something about
    name = _name_of(model)
    said = formats.read(folder) if name is not None else None
    if said is not None and not _fits(said, str(name), named, path):
        name = said = None
    config = BroughtConfig(source=str(path), model=name)
    parents = {}
    if name is not None and said is not None and said.hookpoint is not None:
        from sememe import lm

        parents["model"] = lm.fingerprint_of(
            lm.ModelConfig.build(dict(model)) if isinstance(model, Mapping) else model
        )

    def belongs(foreign: Foreign) -> Belongs | None:
        if "model" not in parents or foreign.hookpoint is None:
            return None
        return Belongs(str(name), parents["model"], foreign.hookpoint, foreign.hookpoint_out)

    key = sha256_of(
        {
            "files": {f: artifact.file_sha256(p) for f, p in formats.files_of(folder).items()},
            "model": name,
            "parents": parents,
            "version": VERSION,
            "at": str(folder.resolve()),
        }
    )
    return bring(folder, cache_dir() / "dictionaries" / key[:24], config, VERSION, belongs, parents).path


def _name_of(model: Any) -> str | None:
    if isinstance(model, Mapping):
        model = model.get("model")
    found = getattr(model, "model", model)
    return found if isinstance(found, str) else None


def _fits(foreign: Foreign, name: str, named: bool, source: str | Path) -> bool:
    """Whether a model is the one that a foreign dictionary belongs to, as far as can be said."""
    if foreign.model is None:
        return named
    if _bare(foreign.model) == _bare(name):
        return True
    if named:
        raise MismatchError(
            f"{source} must be used with the model that its files name, {foreign.model}",
            name,
            f"Pass --model with {foreign.model}; to use it elsewhere, convert it with --model and --hookpoint.",
        )
    return False


def _bare(model: str) -> str:
    """A model's name without its owner, folder or case."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    return SAME_MODELS.get(last, last)


def opens(*fields: str, model: str = "model") -> Any:
    """A validator for a verb's config: these options take foreign dictionaries, too, which are brought in.

    Args:
        fields: Options that hold a dictionary's path, or several.
        model: The option that says which language model they are of, where there is one.

    Example:
        >>> class Look(Config):
        ...     dictionary: Path
        ...     _opens = opens("dictionary")
    """

    def bring_in(cls: type[Config], data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = cls.model_fields.get(model)
        chosen = data.get(model, known.default if known is not None else None)
        changed: dict[str, Any] = {}
        for field in fields:
            value = data.get(field)
            if isinstance(value, (str, Path)):
                # Of the type it was: what is read from JSON must be text.
                changed[field] = type(value)(own(value, chosen, named=model in data))
            elif isinstance(value, (tuple, list)) and all(isinstance(one, (str, Path)) for one in value):
                changed[field] = type(value)(
                    type(one)(own(one, chosen, named=model in data)) for one in value
                )
        return {**data, **changed}

    return model_validator(mode="before")(bring_in)
