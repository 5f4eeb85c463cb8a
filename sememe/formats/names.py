"""What places in a model are called elsewhere: TransformerLens' names, module paths, and ours. Knows no file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sememe.dictionaries.base import Dictionary, Site

__all__ = [
    "folder_name",
    "from_module",
    "from_transformer_lens",
    "only_site",
    "to_transformer_lens",
    "translate",
]

_FROM_TRANSFORMER_LENS = {
    r"blocks\.(\d+)\.hook_resid_(pre|post)": "resid_{1}.{0}",
    r"blocks\.(\d+)\.hook_mlp_out": "mlp_out.{0}",
    r"blocks\.(\d+)\.mlp\.hook_post": "mlp_act.{0}",
    r"blocks\.(\d+)\.(?:ln2\.hook_normalized|hook_mlp_in|mlp\.hook_in)": "mlp_in.{0}",
    r"blocks\.(\d+)\.attn\.hook_z": "attn_z.{0}",
    r"blocks\.(\d+)\.hook_attn_out": "attn_out.{0}",
}
_TO_TRANSFORMER_LENS = {
    r"resid_(pre|post)\.(\d+)": "blocks.{1}.hook_resid_{0}",
    r"mlp_out\.(\d+)": "blocks.{0}.hook_mlp_out",
    r"mlp_act\.(\d+)": "blocks.{0}.mlp.hook_post",
    r"mlp_in\.(\d+)": "blocks.{0}.ln2.hook_normalized",
    r"attn_z\.(\d+)": "blocks.{0}.attn.hook_z",
    r"attn_out\.(\d+)": "blocks.{0}.hook_attn_out",
}
_LAYER = r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)"
_ATTENTION = r"(?:attention|self_attn|attn)"
_FROM_MODULE = {
    _LAYER: "resid_post.{0}",
    rf"{_LAYER}\.mlp": "mlp_out.{0}",
    rf"{_LAYER}\.{_ATTENTION}": "attn_out.{0}",
}
_FROM_MODULE_INPUT = {_LAYER: "resid_pre.{0}", rf"{_LAYER}\.mlp": "mlp_in.{0}"}


def folder_name(path: Path) -> str | None:
    """A folder's name; of a repository's root in the hub client's cache, the repository's. None of the disk's root."""
    if path.parent.name == "snapshots" and (repo := path.parent.parent.name).startswith("models--"):
        return repo.rpartition("--")[2]
    return path.name or None


def translate(name: str | None, patterns: Mapping[str, str]) -> str | None:
    """A place's name by a table of `regular expression -> template`, or None if none matches."""
    for pattern, template in patterns.items():
        match = re.fullmatch(pattern, name or "")
        if match:
            return template.format(*match.groups())
    return None


def from_transformer_lens(name: str | None) -> str | None:
    """Our name of `blocks.8.hook_resid_post` and the like; None where there is none."""
    return translate(name, _FROM_TRANSFORMER_LENS)


def to_transformer_lens(hookpoint: str) -> str:
    """TransformerLens' name of one of our hookpoints; ours, where there is none."""
    return translate(hookpoint, _TO_TRANSFORMER_LENS) or hookpoint


def from_module(path: str, *, reads: bool = False) -> str | None:
    """Our name of a module's output (`layers.8.mlp`), or of what it reads; None where there is none."""
    return translate(path, _FROM_MODULE_INPUT if reads else _FROM_MODULE)


def only_site(dictionary: Dictionary, side: str = "inputs") -> Site | None:
    """Where a dictionary reads or writes, if that is known and one place."""
    sites: tuple[Site, ...] = getattr(dictionary.sites, side) if dictionary.sites else ()
    return sites[0] if len(sites) == 1 else None
