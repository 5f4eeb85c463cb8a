"""Which dictionaries a sweep is made of, and the folder they are found in. Knows no data and trains nothing.

--sweep k=16,32 --sweep seed=0,1    ->    k16-seed0, k16-seed1, k32-seed0, k32-seed1
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from sememe import artifact, dictionaries
from sememe.config import Config
from sememe.dictionaries import Dictionary
from sememe.errors import ArtifactError, ConfigError, nearest
from sememe.options import Flag, flags_of
from sememe.train.config import TrainConfig

__all__ = ["Sweep", "Swept", "open_sweep", "swept_names", "variants"]

INDEX = "index.json"
HOOKPOINTS = ("inputs", "outputs")
Expand = Callable[[str], tuple[str, ...]]


class Swept(NamedTuple):
    """One dictionary of a sweep."""

    name: str
    """Its folder, made of the swept options."""
    options: dict[str, Any]
    """The swept options and its values for them."""
    config: TrainConfig
    """What it would be trained with alone, on a CPU to the same bits where the stream is the same."""


class Sweep:
    """A finished sweep on disk: `index` has a line per dictionary."""

    def __init__(self, folder: artifact.Artifact) -> None:
        self.artifact = folder
        self.index: list[dict[str, Any]] = json.loads(folder.file(INDEX, verify=True).read_text("utf-8"))[
            "dictionaries"
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The dictionaries' names, in the order of the sweep."""
        return tuple(entry["name"] for entry in self.index)

    def path(self, name: str) -> Path:
        """The folder of one of them.

        Raises:
            ArtifactError: the sweep has none of that name.
        """
        if name not in self.names:
            raise ArtifactError(
                f"a dictionary of the sweep {self.artifact.path} must be named",
                repr(name),
                nearest(name, self.names),
            )
        return self.artifact.place / name

    def load(self, name: str) -> Dictionary:
        """Open one of them."""
        return dictionaries.load(self.path(name))


def open_sweep(path: str | Path) -> Sweep:
    """Open a finished sweep.

    Raises:
        ArtifactError: the folder is not a sweep.
        CorruptError: a file changed.
    """
    return Sweep(artifact.load(path, "sweep"))


class _Axis(NamedTuple):
    """One swept option and its values, as plain data."""

    flag: Flag
    values: tuple[Any, ...]


def variants(config: TrainConfig, expand: Expand | None = None) -> list[Swept]:
    """The dictionaries of a sweep, in the order of its options, the last one changing fastest.

    Args:
        config: With a sweep.
        expand: The hookpoints that a name or glob stands for; without it, globs are refused.

    Raises:
        ConfigError: an option is unknown, shared by all, without effect, given twice, or has a value twice.
    """
    axes = _axes(config, expand)
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        options = {axis.flag.name: value for axis, value in zip(axes, values, strict=True)}
        name = "-".join(_name(option, value) for option, value in options.items())
        changes = {axis.flag.path: value for axis, value in zip(axes, values, strict=True)}
        found.append(Swept(name, options, _member_config(config, changes, name)))
    for index, one in enumerate(found):
        for other in found[:index]:
            if one.name == other.name or one.config.identity() == other.config.identity():
                raise ConfigError(
                    "the dictionaries of a sweep must differ",
                    f"{other.options} and {one.options}",
                    "Drop one of the values.",
                )
    return found


def swept_names(config: TrainConfig) -> tuple[str, ...]:
    """The folders that a config will fill inside its own: one per dictionary, or the folder itself ("").

    Raises:
        ConfigError: see `variants`; also a glob, which only the source can resolve.
    """
    return tuple(one.name for one in variants(config)) if config.sweep else ("",)


def _axes(config: TrainConfig, expand: Expand | None) -> list[_Axis]:
    flags = {flag.name: flag for flag in flags_of(type(config), _chosen(config))}
    may = sorted(name for name, flag in flags.items() if flag.path[0] not in config.shared)
    axes: dict[str, _Axis] = {}
    for entry in config.sweep:
        name, equals, text = entry.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        values = tuple(value.strip() for value in text.split(","))
        if not equals or not name or not all(values):
            raise ConfigError(
                "a sweep must name an option and its values: option=value,value",
                repr(entry),
                "Write --sweep k=16,32.",
            )
        if name not in flags:
            raise ConfigError(
                f"a sweep must be over an option of a {config.architecture.kind} dictionary",
                repr(name),
                nearest(name, may),
            )
        if name not in may:
            raise ConfigError(
                "a sweep must be over an option of which each dictionary may have its own",
                f"{name}, which all share as they do the stream",
                f"Drop it, or run the command once for each {name}.",
            )
        if name in axes:
            raise ConfigError(
                "an option must be swept over once", f"{name} twice", f"Write --sweep {name}=..., all in one."
            )
        axes[name] = _Axis(flags[name], _values(config, flags[name], values, expand))
    return list(axes.values())


def _chosen(config: Config) -> dict[str, type[Config]]:
    """For options that are one of several configs, the one that was taken."""
    return {
        name: type(value)
        for name in type(config).model_fields
        if isinstance(value := getattr(config, name), Config)
    }


def _values(
    config: TrainConfig, flag: Flag, texts: tuple[str, ...], expand: Expand | None
) -> tuple[Any, ...]:
    """An option's values, parsed as its type demands."""
    given = _get(config, flag.path)
    if flag.default is not inspect.Parameter.empty and given != flag.default:
        raise ConfigError(
            f"{flag.name} must be left out when it is swept over: it has no effect then",
            given,
            f"Drop --{flag.name.replace('_', '-')}, or its sweep.",
        )
    kinds = (
        typing.get_args(flag.annotation)
        if isinstance(flag.annotation, types.UnionType)
        else (flag.annotation,)
    )
    if flag.name in HOOKPOINTS:
        texts = tuple(itertools.chain.from_iterable(_hookpoints(text, expand) for text in texts))
    found: list[Any] = []
    for text in texts:
        raw: Any = text
        if text == "none" and types.NoneType in kinds:
            raw = None
        elif any(typing.get_origin(kind) is tuple for kind in kinds):
            raw = tuple(text.split("+"))
        value = _parsed(_get(config, flag.path[:-1]), flag.path[-1], raw)
        if value in found:
            raise ConfigError(
                f"a sweep must have each value of {flag.name} once", f"{text} again", "Drop it."
            )
        found.append(value)
    return tuple(found)


def _parsed(owner: Config, name: str, raw: Any) -> Any:
    """A value as its option's type has it. Whether it suits the others shows in each dictionary's whole config: some
    options go only together, and both may be swept over.

    Raises:
        ConfigError: it is none.
    """
    field = type(owner).model_fields[name]
    kind: Any = typing.Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return pydantic.TypeAdapter(kind).validate_python(raw)
    except pydantic.ValidationError:
        return getattr(owner.replace(**{name: raw}), name)  # which says what is wrong, in our words


def _hookpoints(text: str, expand: Expand | None) -> list[str]:
    """A glob gives a dictionary for each hookpoint it matches; names joined by + are one dictionary's."""
    if "+" in text or not re.search(r"[*?\[]", text):
        return [text]
    if expand is None:
        raise ConfigError(
            "a sweep's hookpoints must be named where the store is not made yet", repr(text), "List them."
        )
    return list(expand(text))


def _get(config: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        config = getattr(config, part)
    return config


def _name(option: str, value: Any) -> str:
    """`k16`, `lr0.001`, `scale_true`; of hookpoints the names alone."""
    if isinstance(value, bool) or value is None:
        text = f"{option}_{str(value).lower()}"
    elif isinstance(value, tuple):
        text = "+".join(str(part) for part in value)
        text = text if option in HOOKPOINTS else f"{option}{text}"
    else:
        text = f"{option}_{value}" if isinstance(value, str) else f"{option}{value}"
    return re.sub(r"[^\w.+-]", "_", text)


def _member_config(config: TrainConfig, changes: dict[tuple[str, ...], Any], name: str) -> TrainConfig:
    """One dictionary's config: what would train it alone on the same stream."""
    by_owner: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, value in changes.items():
        by_owner.setdefault(path[:-1], {})[path[-1]] = value
    data_seed = config.seed if config.data_seed is None else config.data_seed
    own: dict[str, Any] = {"sweep": (), "devices": (), "out": config.out / name}
    own |= by_owner.pop((), {})
    own["data_seed"] = None if own.get("seed", config.seed) == data_seed else data_seed
    try:
        for path, values in by_owner.items():
            assert len(path) == 1, "options of a dictionary lie at most one config deep"
            own[path[0]] = getattr(config, path[0]).replace(**values)
        return config.replace(**own)
    except ConfigError as error:
        raise ConfigError(f"{error.rule} (in {name} of the sweep)", error.value, error.remedy) from None
