"""Numbers and strings as the page gets them: few digits, no NaN, exact text. Knows arrays; nothing of atlases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["decimals", "display", "fixed", "lists_of", "number", "rounded", "significant"]


def display(text: str, raw: bytes) -> tuple[str, bool]:
    """A token's string, and whether it is exact: its bytes where they are UTF-8, else the lossy text."""
    if not raw:
        return text, True
    try:
        return raw.decode("utf-8"), True
    except UnicodeDecodeError:
        return text, False


def number(value: float | None, digits: int = 4) -> float | None:
    """A float with so many significant digits; None if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def rounded(column: pa.ChunkedArray, digits: int = 4) -> list[float | None]:
    """A column of floats with so many significant digits; missing and non-finite values are None."""
    return significant(column.to_numpy(zero_copy_only=False), digits)


def decimals(largest: float) -> int:
    """Decimals that show four digits of it (negative: tens)."""
    return 3 - math.floor(math.log10(largest)) if largest > 0 else 0


def fixed(values: NDArray[Any], decimals: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each rounded to so many decimals (negative: tens); what is not finite becomes 0.

    Dividing whole numbers by a power of ten gives the float nearest to the decimal.
    """
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    up, down = 10.0 ** np.maximum(decimals, 0), 10.0 ** np.maximum(-decimals, 0)
    rounded_values: NDArray[np.float64] = np.round(values * up / down) / up * down
    return rounded_values


def significant(values: NDArray[Any], digits: int = 3) -> list[float | None]:
    """Many floats with so many significant digits each, without a Python loop; None where not finite."""
    x = np.asarray(values, dtype=np.float64)
    size = np.abs(x)
    known = np.isfinite(x) & (size > 0)
    power = digits - 1 - np.floor(np.log10(size, where=known, out=np.zeros_like(x)))
    # Whole numbers over (or times) a power of ten give the float nearest to the decimal.
    up, down = 10.0 ** np.maximum(power, 0), 10.0 ** np.maximum(-power, 0)
    out = np.round(np.where(known, x, 0.0) * up / down) / up * down
    plain: list[float | None] = out.tolist()
    if bool(np.isfinite(x).all()):
        return plain
    return [value if ok else None for value, ok in zip(plain, np.isfinite(x).tolist(), strict=True)]


def lists_of(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """A column of lists as where each begins (and the end), and their values end to end."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], values
