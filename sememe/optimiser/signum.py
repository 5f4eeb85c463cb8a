"""Schedule-free Signum: steps by the gradient's sign, and the average of where they lead. Knows no data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Trainable
from sememe.optimiser.base import BaseConfig, Optimiser

__all__ = ["Signum", "SignumConfig"]


class SignumConfig(BaseConfig):
    """Options of Signum. There is none to clip by: a sign has no length."""

    default_decay: ClassVar[float] = 0.0

    kind: Literal["signum"] = "signum"
    """Name of the optimiser."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Signum: how near to the average the gradient is taken. Muon: decay rate of the momentum."""

    def learning_rate(self, d_sae: int) -> float:
        """5e-3 / sqrt(d_sae / 2^14). Source: sparsify (EleutherAI), `trainer.py`, 1.1 to 1.3."""
        return 5e-3 / math.sqrt(d_sae / 2**14)


@final
class Signum(Optimiser):
    """Three points per parameter: the base z steps by signs, the average x follows it, gradients are taken at y.

        z <- z - lr sign(g(y)),   x <- x + c (z - x),   y = z + momentum (x - z)

    c is this step's share of the sum of lr_max^2 so far, so that steps of the warm-up count little. The
    dictionary's own parameters are y while training; `exported` puts x in their place, rows of unit norm again.
    No decay of the learning rate is needed: the average does its work.

    Source: Defazio et al. 2024, arXiv:2405.15682, around sign descent (Bernstein et al. 2018, arXiv:1802.04434),
    as sparsify (EleutherAI) combines them, momentum 0.95. Differs: z and y have rows of norm 1 where the
    dictionary wants it (sparsify normalises y only); c counts from a latent's last reset, so that what it was
    before is no part of its average; warm-up as every optimiser here.
    """

    def __init__(self, dictionary: Trainable, config: SignumConfig | None = None) -> None:
        self.config = config or SignumConfig()
        self.lr_max = 0.0
        super().__init__(dictionary)
        self.weight_sum = torch.zeros(self.d_sae, device=self.frozen.device)
        self.shared_sum = torch.zeros(1, device=self.frozen.device)
        self._weights = (self.weight_sum, self.shared_sum)

    def _new_slots(self, name: str, rows: Float[Tensor, "rows columns"]) -> dict[str, Tensor]:
        # nothing is known of the parameter yet: it may be set after the optimiser is made
        return {"base": torch.zeros_like(rows), "average": torch.zeros_like(rows)}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """As every optimiser; the averages' weights come first."""
        if self.step_count == 0:
            self._start_from(None)
        self.lr_max = max(self.lr_max, lr)
        new = self.lr_max**2
        for total in (self.weight_sum, self.shared_sum):
            total += new
        self._weights = (new / self.weight_sum.clamp_min(1e-30), new / self.shared_sum.clamp_min(1e-30))
        super().step(lr)

    def _start_from(self, ids: Int[Tensor, " n"] | None) -> None:
        """Base and average are where the parameter is; for all rows, or those of some latents."""
        for name, param in self.parameters.items():
            rows = self._rows(name, param)
            for slot in self.slots[name].values():
                if ids is None:
                    slot.copy_(rows)
                else:
                    own = self._own(name, ids)
                    slot[own] = rows[own]

    def _update(
        self,
        name: str,
        rows: Float[Tensor, "rows columns"],
        grad: Float[Tensor, "rows columns"],
        lr: float,
        scale: float | Float[Tensor, ""],
        frozen: Bool[Tensor, " rows"] | None,
    ) -> None:
        slots = self.slots[name]
        of = self.latents[name]
        weights = self._weights[1].expand(rows.shape[0]) if of is None else self._weights[0][of]
        kernels.signum_step(
            rows,
            grad,
            slots["base"],
            slots["average"],
            weights.contiguous(),
            lr=lr,
            momentum=self.config.momentum,
            unit_norm=name in self.unit_norm,
            frozen=frozen,
        )

    def _points(self, name: str) -> tuple[Tensor, ...]:
        """The base, and the average, which began at an unclamped one."""
        return self.slots[name]["base"], self.slots[name]["average"]

    def _unit_points(self, name: str) -> tuple[Tensor, ...]:
        return (self.slots[name]["base"],)

    def forget(self, ids: Int[Tensor, " n"]) -> None:
        """Base and average of changed latents begin where their parameters are now."""
        self._start_from(ids)
        self.weight_sum[ids] = 0.0

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Inside, the dictionary has the averaged weights."""
        if self.step_count == 0:
            yield
            return
        kept = {name: param.detach().clone() for name, param in self.parameters.items()}
        try:
            for name, param in self.parameters.items():
                rows = self._rows(name, param)
                rows.copy_(self.slots[name]["average"])
                if name in self.unit_norm:
                    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
            yield
        finally:
            for name, param in self.parameters.items():
                param.detach().copy_(kept[name])

    def state_dict(self) -> dict[str, Any]:
        """Base and average, how much each average holds, frozen latents and step count."""
        sums = {"weight_sum": self.weight_sum, "shared_sum": self.shared_sum, "lr_max": self.lr_max}
        return super().state_dict() | sums

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self.lr_max = state["lr_max"]
        self.weight_sum.copy_(state["weight_sum"])
        self.shared_sum.copy_(state["shared_sum"])
