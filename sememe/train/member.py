"""One dictionary in training: its parameters, optimiser, random numbers and place in the plan.

Knows one step and its own state; knows neither where batches come from nor when anything is saved.

    batch * scale -> dictionary.loss -> optimiser -> dictionary.after_step
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sememe.dictionaries import Loss, Trainable
from sememe.errors import ActivationError
from sememe.optimiser import Adam
from sememe.source import Batch
from sememe.train.config import TrainConfig
from sememe.train.schedule import Plan

__all__ = ["Member", "Stepped", "make_optimiser"]


class Stepped(NamedTuple):
    """What a step leaves for the log, still on the device."""

    loss: Loss
    target: Tensor
    lr: float


def make_optimiser(config: TrainConfig, dictionary: Trainable) -> Adam:
    """The optimiser that a config asks for."""
    return Adam(dictionary)


class Member:
    """One dictionary between two steps.

    Args:
        name: What its state is called in a checkpoint.
        config: Its options.
        dictionary: Not yet initialised.
        plan: Its steps and rates.
    """

    def __init__(self, name: str, config: TrainConfig, dictionary: Trainable, plan: Plan) -> None:
        self.name, self.config, self.dictionary, self.plan = name, config, dictionary, plan
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimiser = make_optimiser(config, dictionary)
        self.step = 0
        self.resampled_at: int | None = None

    def initialise(self, sample: Batch) -> None:
        """Set scales and parameters from rows in raw units.

        Raises:
            ActivationError: the rows hold NaN or infinity.
        """
        if not bool(torch.isfinite(sample.x).all() and torch.isfinite(sample.target).all()):
            raise ActivationError(
                "activations must be finite", "NaN or infinity in the sample", "Check the source."
            )
        if self.config.scale:
            self.dictionary.scale_in.fill_(_scale(sample.x))
            self.dictionary.scale_out.fill_(_scale(sample.target))
        self.dictionary.initialise(*self.scaled(sample), self.generator)

    def scaled(self, batch: Batch) -> Batch:
        """Raw rows in training units."""
        x = batch.x * self.dictionary.scale_in
        return Batch(x, x if batch.target is batch.x else batch.target * self.dictionary.scale_out)

    def train_step(self, batch: Batch) -> Stepped:
        """One update from a batch in raw units."""
        x, target = self.scaled(batch)
        self.dictionary.train()
        loss = self.dictionary.loss(x, target, self.step / self.plan.n_steps)
        loss.total.backward()  # type: ignore[no-untyped-call]
        since = None if self.resampled_at is None else self.step - self.resampled_at
        lr = self.plan.rate(self.step, self.config, since)
        self.optimiser.step(lr)
        self.dictionary.after_step(loss.encoded)
        self.step += 1
        return Stepped(loss, target, lr)

    def metrics(self, stepped: Stepped) -> dict[str, float]:
        """A step's numbers for the log, read from the device.

        Raises:
            ActivationError: the loss is NaN or infinite.
        """
        loss, target, lr = stepped
        values = {name: float(term) for name, term in loss.terms.items()}
        total = float(loss.total.detach())
        if not math.isfinite(total):
            raise ActivationError(
                f"the loss must be finite at step {self.step}",
                total,
                "Lower --lr; the last checkpoint is kept.",
            )
        if loss.encoded.overflow is not None:
            values["overflow_steps"] = float(self.dictionary.overflow_steps)
        variance = float((target - target.mean(0)).square().mean())
        return values | {
            "loss": total,
            "fvu": values["mse"] / max(variance, 1e-12),
            "l0": float(loss.encoded.l0().float().mean()),
            "frac_silent": float((self.dictionary.tokens_since_fired > 100_000).float().mean()),
            "lr": lr,
        }

    def check_weights(self) -> None:
        """A checkpoint or a dictionary with NaN in it is never written."""
        for name, parameter in self.dictionary.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ActivationError(
                    f"{name} must be finite at step {self.step}",
                    "NaN or infinity",
                    "Lower --lr; the last checkpoint is kept.",
                )

    def state_dict(self) -> dict[str, Any]:
        """All that the next step's bits depend on, but the data."""
        return {
            "weights": self.dictionary.state_dict(),
            "training": self.dictionary.training_buffers(),
            "optimiser": self.optimiser.state_dict(),
            "run": {
                "step": self.step,
                "generator": self.generator.get_state(),
                "resampled_at": self.resampled_at,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.dictionary.load_state_dict(state["weights"])
        for name, buffer in self.dictionary.training_buffers().items():
            buffer.copy_(state["training"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["run"]["generator"])
        self.step, self.resampled_at = state["run"]["step"], state["run"]["resampled_at"]


def _scale(x: Tensor) -> float:
    """What makes the mean square distance from the mean, per feature, equal 1: then mse is nearly fvu."""
    spread = float((x - x.mean(0)).square().mean().sqrt())
    return 1.0 / spread if spread > 0 else 1.0
