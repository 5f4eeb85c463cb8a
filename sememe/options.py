"""The options of a config under one short, unique name each, however deep they lie. Knows no verb and no command.

The command line's flags and a sweep's options bear these names.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from typing import Annotated, Any, NamedTuple

from pydantic_core import PydanticUndefined

from sememe.config import Config

__all__ = ["Flag", "changed", "flags_of"]


class Flag(NamedTuple):
    """One option of a config, or of a config inside it."""

    name: str
    path: tuple[str, ...]
    annotation: Any
    default: Any
    help: str


def _config_type(annotation: Any) -> type[Config] | None:
    """The config class behind an annotation, if it is one, or one that may be left out (`SomeConfig | None`)."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    members = typing.get_args(annotation) if _is_union(annotation) else ()
    inside = [member for member in members if member is not types.NoneType]
    return _config_type(inside[0]) if len(inside) == 1 and len(members) == 2 else None


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union


def _plain(annotation: Any) -> Any:
    """An annotation without pydantic's metadata."""
    if typing.get_origin(annotation) is Annotated:
        return _plain(typing.get_args(annotation)[0])
    return annotation


def _union(annotation: Any) -> tuple[type[Config], ...]:
    """The config classes that a union has to choose from by their `kind`; none if it is no such union."""
    members = typing.get_args(annotation) if _is_union(annotation) else ()
    if all(_config_type(member) is not None and "kind" in member.model_fields for member in members):
        return members
    return ()


def flags_of(config: type[Config], choices: dict[str, type[Config]] | None = None) -> list[Flag]:
    """Every option of a config, nested ones too, each with a name of its own.

    An option keeps its own name unless one that lies less deep has it; then its parent's name goes before it.
    A union of configs that is not among the choices becomes a flag of its own name, for the kind, and the options
    of all its members; one that does not belong to the kind is refused by the config. A config that may be left out
    (None) is there as soon as one of its options is given.

    Args:
        config: The config class.
        choices: For fields that are unions, the member that was chosen.
    """
    found: list[Flag] = []
    _collect(config, (), choices or {}, found)
    found.sort(key=lambda flag: len(flag.path))
    taken: set[str] = set()
    named = []
    for flag in found:
        name = flag.name or flag.path[-1]
        if name in taken:
            name = "_".join(flag.path[-2:])
        assert name not in taken, f"two options are called {name}"
        taken.add(name)
        named.append(flag._replace(name=name))
    return named


def _collect(
    config: type[Config], path: tuple[str, ...], choices: dict[str, type[Config]], found: list[Flag]
) -> None:
    for name, field in config.model_fields.items():
        chosen = choices.get(name)
        inner = chosen or _config_type(_plain(field.annotation))
        members = () if inner is not None else _union(_plain(field.annotation))
        if inner is not None:
            _collect(inner, (*path, name), {}, found)
        elif members:
            kinds = tuple(member.model_fields["kind"].default for member in members)
            kind = getattr(field.default, "kind", kinds[0])
            found.append(
                Flag(name, (*path, name, "kind"), typing.Literal[kinds], kind, field.description or "")
            )
            options: list[Flag] = []
            for member in members:
                _collect(member, (*path, name), {}, options)
            found += {option.path: option for option in reversed(options)}.values()
        elif name != "kind":
            default = field.default if field.default is not PydanticUndefined else inspect.Parameter.empty
            if field.default_factory is not None:
                default = field.get_default(call_default_factory=True)
            found.append(Flag("", (*path, name), _plain(field.annotation), default, field.description or ""))


def changed(config: Config, *fields: str) -> list[tuple[str, str]]:
    """The options that are not at their default, of some of a config's fields and what lies inside these.

    Returns:
        Each one's name, as on the command line but for its dashes, and its value as it would be typed.
    """
    chosen = {
        name: type(value)
        for name in type(config).model_fields
        if isinstance(value := getattr(config, name), Config)
    }
    found = []
    for flag in flags_of(type(config), chosen):
        # inside a config that was left out, an option has no value
        value = functools.reduce(lambda held, name: getattr(held, name, flag.default), flag.path, config)
        if flag.path[0] in fields and value != flag.default:
            found.append((flag.name, " ".join(map(str, value)) if isinstance(value, tuple) else str(value)))
    return found
