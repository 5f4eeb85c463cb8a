"""The frozen, strict config that every verb's own config derives from. Knows no verb and no option.

A config is a pydantic model: no unknown keys, a docstring under each field, TOML or JSON in and out.
Fields in `not_identity` say where to read or write, or how fast, and so do not change the result: they are
left out of `identity()`, the dictionary by which a finished artifact is recognised.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self

import pydantic

from sememe.errors import ConfigError, nearest

__all__ = ["Config", "canonical_json", "read_toml", "sha256_of"]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class Config(pydantic.BaseModel):
    """Strict and frozen: unknown keys are errors, values cannot be changed after construction."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    not_identity: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def build(cls, data: dict[str, Any], where: str = "") -> Self:
        """A config from plain data, with pydantic's errors rewritten into one of ours.

        Raises:
            ConfigError: an option is unknown, has a wrong type, or is out of range.
        """
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            raise _rewrite(cls, error, where) from None

    def check_inert(self, *names: str, without: str) -> None:
        """Raise a ConfigError if one of the options differs from its default although it has no effect.

        Args:
            names: The options.
            without: Why they have none, e.g. "auxk_coefficient is 0".
        """
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"{name} must be left out when {without}: it has no effect then",
                    getattr(self, name),
                    "Drop it.",
                )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        data = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).build(data | changes)

    def identity(self) -> dict[str, Any]:
        """What the result depends on: every field, nested ones too, but those in `not_identity`."""
        out: dict[str, Any] = {}
        for name in type(self).model_fields:
            if name not in self.not_identity:
                out[name] = _identity(getattr(self, name))
        return out

    def resolved(self) -> dict[str, Any]:
        """Every field as plain JSON data, defaults filled in."""
        return self.model_dump(mode="json")


def _identity(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _field_names(model: type[pydantic.BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The options known at the place where an unknown one was given."""
    current: Any = model
    candidates: list[Any] = []
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:  # not an option but the kind of a union's member
            current = next((c for c in candidates if c.model_fields["kind"].default == part), current)
            continue
        members = [field.annotation, *getattr(field.annotation, "__args__", ())]
        candidates = [c for c in members if "kind" in getattr(c, "model_fields", {})]
        current = next((c for c in members if hasattr(c, "model_fields")), current)
    return sorted(getattr(current, "model_fields", {}))


def _rewrite(model: type[pydantic.BaseModel], error: pydantic.ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    location = tuple(part for part in first["loc"])
    option = ".".join(str(part) for part in location) or model.__name__
    place = f" in {where}" if where else ""
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        names = _field_names(model, location[:-1])
        return ConfigError(
            f"{option} must be a known option of {model.__name__}{place}",
            repr(value),
            nearest(str(location[-1]), names),
        )
    if first["type"] == "missing":
        return ConfigError(f"{option} must be given{place}", "nothing", f"Set {option}.")
    if first["type"] == "value_error":
        return ConfigError(f"{option}{place} must be valid: {cause}", repr(value), f"Change {option}.")
    rule, remedy = _rule(first["type"], first.get("ctx", {}), value)
    return ConfigError(f"{option}{place} must be {rule}", repr(value), remedy or f"Change {option}.")


_BOUNDS = {
    "greater_than_equal": (">=", "ge", "Raise it."),
    "greater_than": (">", "gt", "Raise it."),
    "less_than_equal": ("<=", "le", "Lower it."),
    "less_than": ("<", "lt", "Lower it."),
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "path": "a path",
    "finite": "a finite number",
}


def _rule(kind: str, context: dict[str, Any], value: object) -> tuple[str, str]:
    """What had to hold, in our words instead of pydantic's, and what to do about it if that is clear."""
    if kind in _BOUNDS:
        sign, key, remedy = _BOUNDS[kind]
        return f"{sign} {context[key]:g}", remedy
    if kind in ("literal_error", "union_tag_invalid"):
        expected = str(context.get("expected", context.get("expected_tags", "")))
        return f"one of {expected}", nearest(str(value), re.findall(r"'([^']*)'", expected))
    if kind == "too_short":
        return f"at least {context['min_length']} long", "Give more."
    if kind == "string_pattern_mismatch":
        return f"of the form {context['pattern']}", ""
    return _TYPES.get(kind.split("_")[0], f"valid ({kind.replace('_', ' ')})"), ""


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as plain data.

    Raises:
        ConfigError: the file is not there or is not TOML.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        beside = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = nearest(str(path), beside) if beside else "Name a .toml file."
        raise ConfigError("a recipe must be a file that exists", str(path), hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be TOML", str(error), "Mend the line it names.") from None
