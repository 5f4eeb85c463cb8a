"""What the formats share about files: strict reading, nothing executed, checks of names, types and shapes.

Knows no format and no dictionary.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sememe.errors import FormatError, nearest

__all__ = [
    "check_shapes",
    "read_json",
    "read_npz",
    "read_pickle",
    "read_safetensors",
    "require_fields",
    "require_plain",
    "require_tensors",
    "take",
    "take_if_there",
]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
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
        raise _missing(path) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(
            f"{path} must be a whole safetensors file", str(error).splitlines()[0], "Fetch the file again."
        ) from None
    return tensors


def read_npz(path: Path) -> dict[str, Tensor]:
    """Named arrays of a NumPy archive, as tensors. Arrays of objects, which are pickles, are not read.

    Raises:
        FormatError: the file is missing, truncated, no archive, or holds something other than numbers.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, TypeError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "allow_pickle" in text:
            raise FormatError(
                f"{path} must hold numbers and no code",
                "a pickle",
                "Ask its author for a file of plain arrays.",
            ) from None
        raise FormatError(f"{path} must be a whole .npz file", text, "Fetch the file again.") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise FormatError(
                f"{name} in {path} must be an array of numbers", array.dtype, "Fetch the file again."
            )
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def read_pickle(path: Path, plain: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Named tensors from a PyTorch file, without running anything in it.

    Args:
        path: The file.
        plain: Names that may be there beside the tensors, with values that are none.
    Returns:
        The tensors, and those other values.
    Raises:
        FormatError: the file is missing, truncated, holds code, or holds something other than tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files hold storages that PyTorch warns about
            value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise _missing(path) from None
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|global|function|class) [`'\"]?([\w.]+)", str(error))
        found = f"a pickle that asks for {match[1]}" if match else "a pickle that cannot be read safely"
        raise FormatError(
            f"{path} must hold tensors and no code", found, "Ask its author for a file of plain tensors."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path} must be a whole PyTorch file", text, "Fetch the file again.") from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{path} must hold named tensors", type(value).__name__, "Save the module's state_dict()."
        )
    tensors, others = {}, {}
    for name, part in value.items():
        if isinstance(part, Tensor):
            tensors[str(name)] = part
        elif name in plain:
            others[str(name)] = part
        else:
            raise FormatError(
                f"{path} must hold named tensors",
                f"{name!r} of type {type(part).__name__}",
                "Save the module's state_dict().",
            )
    return tensors, others


def _missing(path: Path) -> FormatError:
    return FormatError(f"{path.parent} must hold {path.name}", "no such file", "Name the whole folder.")


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


def require_plain(
    config: Mapping[str, Any], plain: Mapping[str, Any], path: Path, why: Mapping[str, str] | None = None
) -> None:
    """Refuse options under which the map is another one than is read here.

    Args:
        config: The config.
        plain: The values that leave the map as it is; an option that is not there has them.
        path: The config's file.
        why: The reason why another value is not read, by option.

    Raises:
        FormatError: an option has another value.
    """
    for name, value in plain.items():
        if config.get(name, value) != value:
            reason = (why or {}).get(name, "Such dictionaries are not read.")
            raise FormatError(f"{name} in {path} must be {value}", config[name], reason)


def take(config: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """A field of a config that must be there and of a type; whole numbers are numbers, too.

    Raises:
        FormatError: it is missing or of another type.
    """
    if name not in config:
        raise FormatError(
            f"{path} must hold {name}", "no such field", "Fetch the file again, or name another folder."
        )
    value = config[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{name} in {path} must be of type {kind.__name__}", repr(value), "Mend the file.")
    return value


def take_if_there(config: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """As `take`; None where the field is not there or null.

    Raises:
        FormatError: it is of another type.
    """
    return None if config.get(name) is None else take(config, name, kind, path)


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
    check_shapes(tensors, shapes, path)


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Each named tensor of its shape, without NaN or infinity.

    Raises:
        FormatError: one is transposed, of another shape, or not finite.
    """
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
