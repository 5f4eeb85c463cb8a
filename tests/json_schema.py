"""A small check of values against JSON schemas: those words of them that the browser's document uses, and no others."""

from __future__ import annotations

from typing import Any

__all__ = ["complaints", "unnamed"]

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
CHECKED = {
    "type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items", "minimum", "maximum",
    "minLength", "maxLength", "maxItems", "maxProperties",
}  # fmt: skip
WORDS = {"description", "title", "default"}


def complaints(value: Any, schema: dict[str, Any], at: str = "answer") -> list[str]:
    """Where a value is not what a schema says; empty where it is."""
    assert schema.keys() <= CHECKED | WORDS, f"{at}: {schema.keys() - CHECKED - WORDS} is not checked here"
    found: list[str] = []
    if (types := schema.get("type")) is not None:
        named = [types] if isinstance(types, str) else types
        if not any(_is(value, name) for name in named):
            return [f"{at} must be {' or '.join(named)}, got {value!r:.60}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at} must be in {schema['enum']}, got {value!r:.60}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{at} must be {schema['const']!r}, got {value!r:.60}")
    if "anyOf" in schema:
        tried = [complaints(value, one, at) for one in schema["anyOf"]]
        if all(tried):
            found += min(tried, key=len)
    if isinstance(value, dict):
        found += [f"{at} must have {name}" for name in schema.get("required", ()) if name not in value]
        known, more = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, inner in value.items():
            if name in known or isinstance(more, dict):
                found += complaints(inner, known.get(name, more), f"{at}.{name}")
            elif more is False:
                found.append(f"{at} must not have {name}")
        if len(value) > schema.get("maxProperties", len(value)):
            found.append(f"{at} must have fewer properties, got {len(value)}")
    if isinstance(value, list):
        for i, inner in enumerate(value):
            found += complaints(inner, schema.get("items", {}), f"{at}[{i}]")
        if len(value) > schema.get("maxItems", len(value)):
            found.append(f"{at} must have fewer items, got {len(value)}")
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get(
        "maxLength", len(value)
    ):
        found.append(f"{at} must be shorter or longer, got {len(value)} letters")
    if _is(value, "number") and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{at} must be within its range, got {value}")
    return found


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name])


def unnamed(value: Any, schema: dict[str, Any], at: str = "answer") -> list[str]:
    """Names in a value of which its schema says nothing."""
    found: list[str] = []
    options = [schema, *schema.get("anyOf", ())]
    if isinstance(value, dict):
        properties = {k: v for one in options for k, v in one.get("properties", {}).items()}
        more = next((one["additionalProperties"] for one in options if "additionalProperties" in one), None)
        for name, inner in value.items():
            if name in properties:
                found += unnamed(inner, properties[name], f"{at}.{name}")
            elif isinstance(more, dict):
                found += unnamed(inner, more, f"{at}.{name}")
            elif properties:
                found.append(f"{at}.{name}")
    if isinstance(value, list):
        items = next((one["items"] for one in options if "items" in one), {})
        for i, inner in enumerate(value):
            found += unnamed(inner, items, f"{at}[{i}]")
    return found
