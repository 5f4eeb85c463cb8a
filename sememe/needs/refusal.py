"""What cannot fit, refused with the number that does. Knows bytes, not whose they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sememe.errors import ResourceError

__all__ = ["Bytes", "Knob", "largest", "refuse"]

GB = 1e9


class Bytes(NamedTuple):
    """What a stage takes at its peak."""

    memory: float
    disk: float = 0.0
    gpu: float = 0.0


class Knob(NamedTuple):
    """An option that changes what a stage takes."""

    name: str
    value: int
    bytes_at: Callable[[int], Bytes]


def refuse(
    label: str, what: str, free: float, needs: Bytes, knobs: Sequence[Knob], of: Callable[[Bytes], float]
) -> None:
    """Raise if something does not fit, with the numbers that would.

    Args:
        label: What shall fit.
        what: Where: memory, disk.
        free: Bytes that are free there.
        needs: Bytes that it takes.
        knobs: Options that could be lowered.
        of: Which of the bytes count.

    Raises:
        ResourceError: more is needed than is free.
    """
    if of(needs) <= free:
        return
    options = ", ".join(f"{knob.name}={knob.value:,}" for knob in knobs)
    remedies = []
    for knob in knobs:
        fits = largest(lambda n, knob=knob: of(knob.bytes_at(n)) <= free, knob.value)  # type: ignore[misc]
        if fits:
            remedies.append(f"{knob.name} to at most {fits:,}")
    remedy = f"Lower {', or '.join(remedies)}." if remedies else "Use a smaller model, or a larger machine."
    raise ResourceError(
        f"{label} must fit in the {what} that is free, {free / GB:.1f} GB",
        f"about {of(needs) / GB:.1f} GB" + (f" ({options})" if options else ""),
        remedy,
    )


def largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits, cut to two digits as estimates are no better; 0 if none does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    unit = int(10 ** max(len(str(low)) - 2, 0))
    return low // unit * unit
