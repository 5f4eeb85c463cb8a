"""Members of one shape that take their steps as one, on a device where that is cheaper. Knows members and a batch.

Each stays a member: its own plan, random numbers, resampling, freezing and state; what is one is the step, and where
one cannot take it with the others (see `Stack.ready`), each takes it by itself. The bits are those of a member alone
but for sums that the device takes in another order: products in bfloat16 (which select candidates only; what is kept
is scored alike), the mean that is logged, the sum that a penalty is made of, and the decoder bias's gradient.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.stacked import stack_of, stackable
from sememe.optimiser import Adam, AdamStack, InTurn
from sememe.source import Batch
from sememe.train.member import Member, Stepped
from sememe.train.objective import own_loss

__all__ = ["MemberStack", "stacks_of"]


def stacks_of(members: list[Member]) -> list[MemberStack]:
    """Those of one shape together; members that have no like are in none.

    Args:
        members: With parameters and optimisers, between the same two steps.
    """
    groups: dict[Hashable, list[Member]] = {}
    for member in members:
        key = _shape(member)
        if key is not None:
            groups.setdefault(key, []).append(member)
    return [MemberStack(group) for group in groups.values() if len(group) > 1]


def _shape(member: Member) -> Hashable | None:
    """What members have in common that step as one; None for one that cannot."""
    shape = stackable(member.dictionary)
    if shape is None or member.objective is not own_loss:
        return None
    columns = member.columns
    own_rows = None if columns is None else columns.inputs == columns.outputs
    optimiser = member.config.optimiser
    # one pass of Adam has one set of options; others take their steps in turn
    return shape, own_rows, repr(optimiser.resolved()) if optimiser.kind == "adam" else optimiser.kind


class _Rows(NamedTuple):
    """As `Batch`, with a leading member axis."""

    x: Float[Tensor, "*n batch d_in"]
    target: Float[Tensor, "*n batch d_out"]


class MemberStack:
    """Members of one shape, from now on parts of one.

    Args:
        members: At least two, as `stacks_of` groups them.
    """

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.names = tuple(member.name for member in members)
        self.stack = stack_of([member.dictionary for member in members])
        optimisers = [member.optimiser for member in members]
        adams = [one for one in optimisers if isinstance(one, Adam)]
        self.optimiser: AdamStack | InTurn
        if adams:
            self.optimiser = AdamStack(adams, self.stack.parameters)
        else:
            self.optimiser = InTurn(optimisers, self.stack.parameters)
        self.first_bad = torch.stack([member.first_bad for member in members])
        for member, part in zip(members, self.first_bad, strict=True):
            member.first_bad = part

    def train_step(self, batch: Batch, ahead: Batch | None, logging: bool) -> dict[str, dict[str, float]]:
        """One update of each; their numbers by name, if asked.

        Args:
            batch: Rows of the stream, in raw units and on the device.
            ahead: The rows that come next, likewise.
            logging: Whether to read the numbers from the device.
        """
        if not self.stack.ready(len(batch.x)):
            stepped = [member.train_step(batch, ahead) for member in self.members]
            own = zip(self.members, stepped, strict=True)
            return {member.name: member.metrics(one) for member, one in own} if logging else {}
        for member in self.members:
            member.before_step(ahead)
        x, target = self._scaled(batch)
        step = self.members[0].step
        loss = self.stack.loss(x, target, step / self.members[0].plan.n_steps)
        loss.totals.sum().backward()  # type: ignore[no-untyped-call]
        rates = [member.rate() for member in self.members]
        self.optimiser.step(rates)
        self.stack.after_step(loss)
        self.first_bad.masked_fill_(~torch.isfinite(loss.totals.detach()) & (self.first_bad < 0), step)
        for member in self.members:
            member.after_step()
        if not logging:
            return {}
        return {
            member.name: member.metrics(Stepped(self.stack.loss_of(loss, i), target[i], rates[i]))
            for i, member in enumerate(self.members)
        }

    def _scaled(self, batch: Batch) -> _Rows:
        """Each member's own rows in its training units."""
        asked = {one.columns and (one.columns.inputs, one.columns.outputs) for one in self.members}
        if len(asked) == 1:
            own = _Rows(*self.members[0].own(batch))
        else:  # other hookpoints of the stream, equally wide
            parts = [member.own(batch) for member in self.members]
            x = torch.stack([part.x for part in parts])
            alike = parts[0].target is parts[0].x
            own = _Rows(x, x if alike else torch.stack([part.target for part in parts]))
        x = own.x * self.stack.scale_in
        return _Rows(x, x if own.target is own.x else own.target * self.stack.scale_out)
