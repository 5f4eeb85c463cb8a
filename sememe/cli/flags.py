"""Flags from configs: one short, unique flag per option, however deep the option lies. Knows no verb."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from cyclopts import Group, Parameter
from pydantic_core import PydanticUndefined

from sememe.config import Config

__all__ = ["Flag", "command", "flags_of"]


class Flag(NamedTuple):
    """One option of a config, or of a config inside it."""

    name: str
    path: tuple[str, ...]
    annotation: Any
    default: Any
    help: str


def _config_type(annotation: Any) -> type[Config] | None:
    """The config class behind an annotation, if it is one."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return None


def _plain(annotation: Any) -> Any:
    """An annotation without pydantic's metadata."""
    if typing.get_origin(annotation) is Annotated:
        return _plain(typing.get_args(annotation)[0])
    return annotation


def _union(annotation: Any) -> tuple[type[Config], ...]:
    """The config classes that a union has to choose from by their `kind`; none if it is no such union."""
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    if typing.get_origin(annotation) is typing.Union:
        members = typing.get_args(annotation)
    configs = [member for member in members if _config_type(member) is not None]
    known = len(configs) == len(members) and all("kind" in member.model_fields for member in configs)
    return tuple(configs) if known else ()


def flags_of(config: type[Config], choices: dict[str, type[Config]] | None = None) -> list[Flag]:
    """Every option of a config, nested ones too, each with a name of its own.

    An option keeps its own name unless one that lies less deep has it; then its parent's name goes before it.
    A union of configs that is not among the choices becomes a flag of its own name, for the kind, and the options
    of all its members; one that does not belong to the kind is refused by the config.

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
            kinds = [member.model_fields["kind"].default for member in members]
            kind = getattr(field.default, "kind", kinds[0])
            help_text = field.description or ""
            found.append(Flag(name, (*path, name, "kind"), typing.Literal[tuple(kinds)], kind, help_text))
            options: list[Flag] = []
            for member in members:
                _collect(member, (*path, name), {}, options)
            found += {option.path: option for option in reversed(options)}.values()
        elif name != "kind":
            default = field.default if field.default is not PydanticUndefined else inspect.Parameter.empty
            if field.default_factory is not None:
                default = field.get_default(call_default_factory=True)
            found.append(Flag("", (*path, name), _plain(field.annotation), default, field.description or ""))


def command(
    config: type[Config],
    verb: Callable[..., Any],
    *,
    positional: tuple[str, ...] = (),
    choices: dict[str, type[Config]] | None = None,
    fixed: dict[str, Any] | None = None,
    extra: dict[str, tuple[Any, Any, str]] | None = None,
    doc: str,
) -> Callable[..., Any]:
    """A function whose parameters are a config's options, for cyclopts.

    Args:
        config: The verb's config.
        verb: Called with the config, and the extra options by keyword.
        positional: Options that are given by position, in order.
        choices: For fields that are unions, the member this command is about.
        fixed: Values of options that are not shown, by dotted path.
        extra: Options that are not the config's: name -> (type, default, help).
        doc: The command's help.
    """
    flags = flags_of(config, choices)
    parameters, by_name = [], {}
    groups: dict[str, Group] = {}
    order = {name: place for place, name in enumerate(positional)}
    for flag in sorted(flags, key=lambda f: order.get(f.name, len(order))):
        by_name[flag.name] = flag
        is_positional = flag.name in order
        group_name = "Options" if len(flag.path) == 1 else flag.path[0].replace("_", " ").capitalize()
        groups.setdefault(group_name, Group(group_name))
        many = typing.get_origin(flag.annotation) is tuple or (
            isinstance(flag.annotation, types.UnionType)
            and any(typing.get_origin(a) is tuple for a in typing.get_args(flag.annotation))
        )
        parameters.append(
            inspect.Parameter(
                flag.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if is_positional else inspect.Parameter.KEYWORD_ONLY,
                default=flag.default,
                annotation=Annotated[
                    flag.annotation,
                    Parameter(
                        help=flag.help,
                        group=groups[group_name],
                        consume_multiple=many or None,
                        negative_iterable=(),
                    ),
                ],
            )
        )
    for name, (annotation, default, text) in (extra or {}).items():
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[annotation, Parameter(help=text, negative="")],
            )
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        data: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if name in by_name:
                _put(data, by_name[name].path, value)
            else:
                options[name] = value
        for flag in flags:
            # an option of a union without its kind: that of the default
            if flag.path[-1] == "kind" and _get(data, flag.path[:-1]) is not None:
                _put(data, flag.path, _get(data, flag.path) or flag.default)
        for path, value in (fixed or {}).items():
            _put(data, tuple(path.split(".")), value)
        return verb(config.build(data), **options)

    signature = inspect.Signature(parameters)
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = doc
    call.__name__ = config.__name__.removesuffix("Config").lower()
    return call


def _put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        data = data.setdefault(key, {})
    data[path[-1]] = value


def _get(data: dict[str, Any], path: tuple[str, ...]) -> Any:
    """What lies at a path; None if nothing does."""
    for key in path[:-1]:
        data = data.get(key, {})
    return data.get(path[-1])
