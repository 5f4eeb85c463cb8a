"""What the formats share: strict reading of files, checks of shapes, and the one map they all describe.

Every format here stores `acts = f((x - b_pre) W_enc + b_enc)`, `recon = acts W_dec + b_dec`, where f is ReLU or
ReLU and top-k; they differ in names, in which way a matrix lies, and in what b_pre is. Knows no format.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sememe.dictionaries.base import Dictionary
from sememe.dictionaries.relu import ReLU, ReLUConfig
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.errors import FormatError, nearest

__all__ = [
    "Foreign",
    "Parts",
    "assemble",
    "parts_of",
    "read_json",
    "read_pickle",
    "read_safetensors",
    "require_fields",
    "require_tensors",
    "take",
    "translate",
]


class Foreign(NamedTuple):
    """A dictionary from another tool, and what its files say about where it belongs."""

    dictionary: Dictionary
    model: str | None
    """The model's name as written there."""
    hookpoint: str | None
    """The hookpoint in our words, where theirs has an equal."""
    config: dict[str, Any]
    """Their config, as it was."""


class Parts(NamedTuple):
    """The map that all formats describe, in raw units, float32, on the CPU."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    b_pre: Float[Tensor, " d_in"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    k: int | None
    """Latents kept per row; None for a plain ReLU."""

    def bias_without_centre(self) -> Float[Tensor, " d_sae"]:
        """The encoder bias of the same map when nothing is subtracted from the input."""
        return (self.b_enc.double() - self.b_pre.double() @ self.W_enc.double()).float()

    def bias_with_centre(self) -> Float[Tensor, " d_sae"]:
        """The encoder bias of the same map when b_dec is subtracted from the input."""
        if torch.equal(self.b_pre, self.b_dec):
            return self.b_enc
        shift = (self.b_dec.double() - self.b_pre.double()) @ self.W_enc.double()
        return (self.b_enc.double() + shift).float()


# -- files -----------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(
            f"{path.parent} must hold {path.name}", "no such file", "Name the whole folder."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path} must be JSON", error, "Fetch the file again; it may be truncated."
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must be a JSON object", type(value).__name__, "Fetch the file again.")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Named tensors.

    Raises:
        FormatError: the file is missing, truncated, or not safetensors.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise FormatError(
            f"{path.parent} must hold {path.name}", "no such file", "Name the whole folder."
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(
            f"{path} must be a whole safetensors file", str(error).splitlines()[0], "Fetch the file again."
        ) from None
    return tensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Named tensors from a PyTorch file, without running anything in it.

    Raises:
        FormatError: the file is missing, truncated, holds code, or holds something other than tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files hold storages that PyTorch warns about
            value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FormatError(
            f"{path.parent} must hold {path.name}", "no such file", "Name the whole folder."
        ) from None
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|global|function|class) [`'\"]?([\w.]+)", str(error))
        found = f"a pickle that asks for {match[1]}" if match else "a pickle that cannot be read safely"
        raise FormatError(
            f"{path} must hold tensors and no code", found, "Ask its author for a file of plain tensors."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path} must be a whole PyTorch file", text, "Fetch the file again.") from None
    if not isinstance(value, dict) or not all(isinstance(t, Tensor) for t in value.values()):
        raise FormatError(
            f"{path} must hold named tensors", type(value).__name__, "Save the module's state_dict()."
        )
    return {str(name): tensor for name, tensor in value.items()}


# -- checks ----------------------------------------------------------------------------------------


def require_fields(found: Iterable[str], known: Iterable[str], path: Path) -> None:
    """Refuse fields that this version does not know: they may change what the weights mean.

    Raises:
        FormatError: a field is unknown.
    """
    known = sorted(known)
    for name in found:
        if name not in known:
            raise FormatError(f"{path} must hold known fields only", repr(name), nearest(name, known))


def take(config: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """A field of a config that must be there and of a type.

    Raises:
        FormatError: it is missing or of another type.
    """
    if name not in config:
        raise FormatError(
            f"{path} must hold {name}", "no such field", "Fetch the file again, or name another folder."
        )
    value = config[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{name} in {path} must be of type {kind.__name__}", repr(value), "Mend the file.")
    return value


def require_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Exactly these tensors, of these shapes, without NaN or infinity.

    Raises:
        FormatError: one is missing, unknown, transposed, of another shape, or not finite.
    """
    for name in shapes:
        if name not in tensors:
            raise FormatError(
                f"{path} must hold the tensor {name}", ", ".join(sorted(tensors)), "Fetch the file again."
            )
    for name in tensors:
        if name not in shapes:
            raise FormatError(
                f"{path} must hold known tensors only", repr(name), nearest(name, sorted(shapes))
            )
    for name, expected in shapes.items():
        found = tuple(tensors[name].shape)
        if found != expected:
            turned = len(found) == 2 and found == expected[::-1]
            raise FormatError(
                f"{name} in {path} must have shape {expected}",
                f"{found}{', its transpose' if turned else ''}",
                "Transpose it, or correct the config beside it."
                if turned
                else "Correct the config beside it.",
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise FormatError(
                f"{name} in {path} must be finite", "NaN or infinity", "Fetch or train it again."
            )


# -- the map ---------------------------------------------------------------------------------------


def assemble(parts: Parts, path: Path) -> Dictionary:
    """Our dictionary with these weights, in eval mode.

    Raises:
        FormatError: k is out of range.
    """
    d_in, d_sae = parts.W_enc.shape
    d_out = parts.W_dec.shape[1]
    dictionary: TopK | ReLU
    if parts.k is None:
        dictionary = ReLU(ReLUConfig(d_sae=d_sae), d_in, d_out, d_sae)
    elif 1 <= parts.k <= d_sae:
        dictionary = TopK(TopKConfig(k=parts.k, d_sae=d_sae), d_in, d_out, d_sae)
    else:
        raise FormatError(f"k in {path} must be in [1, d_sae={d_sae}]", parts.k, "Mend the file.")
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_pre", "W_dec", "b_dec"):
            getattr(dictionary, name).copy_(getattr(parts, name))
    return dictionary.eval()


def parts_of(dictionary: Dictionary, format_name: str) -> Parts:
    """The weights of one of our dictionaries, folded.

    Raises:
        FormatError: the format has no place for this architecture.
    """
    folded = dictionary.fold()
    if not isinstance(folded, (TopK, ReLU)):
        raise FormatError(
            f"a dictionary must be topk or relu to be written as {format_name}",
            folded.kind,
            "Keep it in Sememe's own format.",
        )
    if folded.config.skip:
        raise FormatError(
            f"a dictionary must have no skip connection to be written as {format_name}",
            "one with W_skip",
            "Keep it in Sememe's own format.",
        )
    tensors = {
        name: getattr(folded, name).detach().to("cpu", torch.float32).contiguous()
        for name in ("W_enc", "b_enc", "b_pre", "W_dec", "b_dec")
    }
    return Parts(**tensors, k=folded.config.k if isinstance(folded, TopK) else None)


def translate(name: str | None, patterns: Mapping[str, str]) -> str | None:
    """A hookpoint's name by a table of `regular expression -> template`, or None if none matches."""
    for pattern, template in patterns.items():
        match = re.fullmatch(pattern, name or "")
        if match:
            return template.format(*match.groups())
    return None
