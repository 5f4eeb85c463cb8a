"""Commands from configs: each option a flag, under the name that `options` gives it. Knows no verb."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Group, Parameter

from sememe.config import Config
from sememe.options import flags_of

__all__ = ["command"]


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
        fixed: Values of options that are not shown, by dotted path; of a whole config, none of its options is.
        extra: Options that are not the config's: name -> (type, default, help).
        doc: The command's help.
    """
    settled = {tuple(path.split(".")) for path in fixed or {}}
    flags = [f for f in flags_of(config, choices) if not any(f.path[: len(path)] == path for path in settled)]
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
