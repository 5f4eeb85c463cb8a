"""Members that take each batch together, in this process. Knows no source, no log and no file.

On a GPU those of one shape take their steps as one (`stacked`); on a CPU, where a step is no cheaper for that, one
after the other.

`workers.Workers` does the same with other processes; `run.Run` cannot tell them apart.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.errors import ResourceError
from sememe.source import Batch
from sememe.train.dead import rows_wanted
from sememe.train.feed import Feed
from sememe.train.member import Member, Spec
from sememe.train.objective import Objective
from sememe.train.stacked import MemberStack, stacks_of
from sememe.train.watch import measure, reconstruct

__all__ = ["Crew", "Team", "device_of", "stacks_on"]


@runtime_checkable
class Team(Protocol):
    """What the loop needs of the dictionaries it trains."""

    kinds: tuple[str, ...]
    """Which kernels serve them; the bits depend on that."""

    def initialise(self, sample: Batch) -> None:
        """Start from rows of the stream."""
        ...

    def rows_wanted(self, step: int) -> int:
        """How many of the rows that come next the members look at before a step."""
        ...

    def train_step(
        self, batch: Batch, ahead: Batch | None, logging: bool
    ) -> dict[str, dict[str, float]] | None:
        """One step of each that is not finished; their numbers by name, if asked."""
        ...

    def finished(self) -> bool:
        """Whether there is nothing left to train in any."""
        ...

    def check(self) -> None:
        """Raise an ActivationError if a loss was or a parameter is not finite."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Each member's state by name, on the CPU or to be copied there."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...

    def look(self, rows: Batch) -> dict[str, dict[str, Any]]:
        """What each does on held-out rows of the stream as it stands."""
        ...

    def reconstruct(self, name: str, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """What one of them makes of rows of its own, in raw units, as it stands."""
        ...

    def write(self, name: str, folder: Path, probe_rows: Batch, n_rows: int | None) -> dict[str, Any]:
        """Write a finished dictionary's files; what its meta.json shall remember."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def stacks_on(device: torch.device) -> bool:
    """Whether members of one shape step as one on a device: where kernels take several dictionaries at once."""
    return kernels.path_for(torch.empty(0, dtype=torch.float32, device=device)) == "gpu"


def device_of(name: str) -> torch.device:
    """A device by its name.

    Raises:
        ResourceError: it is not there.
    """
    device = torch.device(name)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count[device.type]:
        raise ResourceError(
            f"a device of this machine must be given (it has {count[device.type]} of type {device.type})",
            name,
            "Change --devices.",
        )
    return device


class Crew:
    """Members on one device.

    Args:
        specs: What to make.
        n_steps: Length of the run.
        device: Where.
        objective: What they are trained for; each dictionary's own loss if not given.
    """

    def __init__(
        self, specs: list[Spec], n_steps: int, device: torch.device, objective: Objective | None = None
    ) -> None:
        self.device = device
        self.feed = Feed(device)
        self.members = {spec.name: Member(spec, n_steps, device, objective) for spec in specs}
        self.stacks: list[MemberStack] = []
        """Members that step as one; filled when they have a state."""
        probe = torch.empty(0, dtype=torch.float32, device=device)
        self.kinds: tuple[str, ...] = (kernels.kind_for(probe),)

    def initialise(self, sample: Batch) -> None:
        """Start from rows of the stream."""
        for member in self.members.values():
            member.initialise(sample)
        self._stack()

    def _stack(self) -> None:
        """Let those of one shape step as one, where that is faster; not those that have nothing left to train."""
        going = [member for member in self.members.values() if not member.finished]
        self.stacks = stacks_of(going) if stacks_on(self.device) else []

    def rows_wanted(self, step: int) -> int:
        """The most that any member wants."""
        return max(rows_wanted(member.config, member.plan, step) for member in self.members.values())

    def train_step(
        self, batch: Batch, ahead: Batch | None, logging: bool
    ) -> dict[str, dict[str, float]] | None:
        """One step of each that has something left to train, as each would end alone; numbers of those."""
        batch = self.feed.send(batch)
        ahead = None if ahead is None else ahead.to(self.device)
        values: dict[str, dict[str, float]] = {}
        if any(self.members[name].finished for stack in self.stacks for name in stack.names):
            self._stack()
        stacked = {name for stack in self.stacks for name in stack.names}
        for stack in self.stacks:
            values |= stack.train_step(batch, ahead, logging)
        for name, member in self.members.items():
            if name in stacked or member.finished:
                continue
            stepped = member.train_step(batch, ahead)
            if logging:
                values[name] = member.metrics(stepped)
        return {name: values[name] for name in self.members if name in values} if logging else None

    def finished(self) -> bool:
        """Whether all members are."""
        return all(member.finished for member in self.members.values())

    def check(self) -> None:
        """Look at every member."""
        for member in self.members.values():
            member.check()

    def state_dict(self) -> dict[str, Any]:
        """Each member's state."""
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, member in self.members.items():
            member.load_state_dict(state[name])
        self._stack()

    def look(self, rows: Batch) -> dict[str, dict[str, Any]]:
        """Each in turn."""
        rows = rows.to(self.device)
        found = {}
        for name, member in self.members.items():
            with member.optimiser.exported():
                found[name] = measure(member.dictionary, member.own(rows), member.config.batch_size)
        return found

    def reconstruct(self, name: str, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """There and back."""
        member = self.members[name]
        with member.optimiser.exported():
            return reconstruct(member.dictionary, x.to(self.device)).to(x.device)

    def write(self, name: str, folder: Path, probe_rows: Batch, n_rows: int | None) -> dict[str, Any]:
        """Write one of them."""
        return self.members[name].write(folder, probe_rows, n_rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
