"""What an artifact was, or would be, made from: its identity, and what differs between two. Knows configs, no file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sememe.config import Config, canonical_json, sha256_of

__all__ = ["FORMAT_VERSION", "about", "differences", "identity_of", "named"]

FORMAT_VERSION = 1


def identity_of(kind: str, version: int, config: Config, parents: Mapping[str, str]) -> str:
    """The hash by which a finished artifact is recognised as the one that would be made now."""
    return sha256_of(
        {
            "format": FORMAT_VERSION,
            "kind": kind,
            "version": version,
            "config": config.identity(),
            "parents": dict(parents),
        }
    )


def about(config: Config, parents: Mapping[str, str]) -> dict[str, Any]:
    """What goes into an identity, as JSON would give it back."""
    about: dict[str, Any] = json.loads(canonical_json({**config.identity(), "parents": dict(parents)}))
    return about


def differences(there: Any, now: Any, place: str = "") -> list[str]:
    """What differs between two configs as plain data, option by option: "architecture.k 4 there, 5 now".

    Only options known now are looked at.
    """
    if isinstance(there, dict) and isinstance(now, dict) and there.get("kind") == now.get("kind"):
        return [
            line
            for name, value in now.items()
            for line in differences(there.get(name), value, f"{place}.{name}" if place else name)
        ]
    return [] if there == now else [f"{place} {_short(there)} there, {_short(now)} now"]


def _short(value: Any) -> str:
    text = str(value["kind"]) if isinstance(value, dict) and "kind" in value else canonical_json(value)
    return text if len(text) <= 40 else text[:37] + "..."


def named(lines: list[str]) -> str:
    """The first few differences, for an error; what hides behind them is another version or parent."""
    if not lines:
        return "another version of sememe's verb"
    return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
