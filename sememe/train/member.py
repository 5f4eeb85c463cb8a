"""One dictionary in training: its parameters, optimiser, random numbers and place in the plan.

Knows one step and its own state; knows neither where batches come from nor when anything is saved.

    batch * scale -> objective -> optimiser -> dictionary.after_step
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import dictionaries
from sememe.dictionaries import Loss, Sites
from sememe.errors import ActivationError
from sememe.optimiser import make
from sememe.source import Batch, Columns
from sememe.train.by_site import about_sites, fvu_by_site, fvu_of
from sememe.train.config import TrainConfig
from sememe.train.dead import revive, rows_wanted
from sememe.train.objective import Objective, own_loss
from sememe.train.schedule import make_plan
from sememe.train.snapshots import compares, freeze

__all__ = ["Member", "Spec", "Stepped"]


class Spec(NamedTuple):
    """What a member is made from, wherever it is made."""

    name: str
    """What its state is called in a checkpoint, and it itself in errors."""
    config: TrainConfig
    d_in: int
    d_out: int
    sites: Sites | None
    columns: Columns | None
    """Its part of the stream; None if that is the whole."""


class Stepped(NamedTuple):
    """What a step leaves for the log, still on the device."""

    loss: Loss
    target: Float[Tensor, "batch d_out"]
    lr: float


class Member:
    """One dictionary between two steps.

    Args:
        spec: What to make.
        n_steps: Length of the run.
        device: Where it is trained. Initialised on the CPU, so that it starts with the same bits everywhere.
        objective: What it is trained for; the dictionary's own loss if not given.
    """

    def __init__(
        self, spec: Spec, n_steps: int, device: torch.device, objective: Objective | None = None
    ) -> None:
        self.objective = objective or own_loss
        self.name, self.config, self.columns, self.device = spec.name, spec.config, spec.columns, device
        self.dictionary = dictionaries.build(spec.config.architecture, spec.d_in, spec.d_out, spec.sites)
        self.plan = make_plan(spec.config, self.dictionary, n_steps)
        self.generator = torch.Generator().manual_seed(spec.config.seed)
        self.step = 0
        self.resampled_at: int | None = None
        self.compared: Tensor | None = None
        """Unit decoder rows at the last comparison, if latents may be frozen."""
        self.finished = False
        """Whether there is nothing left to train: every latent that fires is frozen."""

    def initialise(self, sample: Batch) -> None:
        """Set scales and parameters from rows of the stream, in raw units on the CPU.

        Raises:
            ActivationError: the rows hold NaN or infinity.
        """
        sample = self.own(sample)
        if not bool(torch.isfinite(sample.x).all() and torch.isfinite(sample.target).all()):
            raise ActivationError(
                "activations must be finite", "NaN or infinity in the sample", "Check the source."
            )
        if self.config.scale:
            self.dictionary.set_scales(sample.x, sample.target)
        self.dictionary.initialise(*self.scaled(sample), self.generator)
        self._settle()

    def _settle(self) -> None:
        """Move to the device; what belongs to the parameters is made there."""
        self.dictionary.to(self.device)
        self.optimiser = make(self.config.optimiser, self.dictionary)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)

    def own(self, batch: Batch) -> Batch:
        """The member's part of the stream's rows."""
        return batch if self.columns is None else self.columns.of(batch)

    def scaled(self, batch: Batch) -> Batch:
        """Raw rows in training units."""
        x = batch.x * self.dictionary.scale_in
        return Batch(x, x if batch.target is batch.x else batch.target * self.dictionary.scale_out)

    # -- a step --------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, ahead: Batch | None = None) -> Stepped:
        """One update.

        Args:
            batch: Rows of the stream, in raw units and on the device.
            ahead: The rows that come next, likewise; not looked at but where `rows_wanted` says so.
        """
        self.before_step(ahead)
        own = self.own(batch)
        x, target = self.scaled(own)
        self.dictionary.train()
        loss = self.objective(self.dictionary, own, x, target, self.step / self.plan.n_steps)
        revival = None if loss.error is None else self.dictionary.revival_loss(x, -loss.error.detach())
        if revival is not None:
            loss = loss._replace(total=loss.total + revival, terms=loss.terms | {"ghost": revival.detach()})
        loss.total.backward()  # type: ignore[no-untyped-call]
        lr = self.rate()
        self.optimiser.step(lr)
        self.dictionary.after_step(loss.encoded)
        bad = ~torch.isfinite(loss.total.detach()) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, self.step)
        self.after_step()
        return Stepped(loss, target, lr)

    def before_step(self, ahead: Batch | None) -> None:
        """What the plan wants done first: latents pointed anew; the argument as for `train_step`."""
        n_ahead = rows_wanted(self.config, self.plan, self.step)
        if n_ahead:
            assert ahead is not None
            revive(self, self.own(_first(ahead, n_ahead)))
        else:
            revive(self, None)

    def rate(self) -> float:
        """The learning rate of the step that comes next."""
        since = None if self.resampled_at is None else self.step - self.resampled_at
        return self.plan.rate(self.step, self.config, since)

    def after_step(self) -> None:
        """What follows an update: the count, and freezing if it is time."""
        self.step += 1
        if compares(self.config, self.plan.n_steps, self.step):
            freeze(self)

    def metrics(self, stepped: Stepped) -> dict[str, float]:
        """A step's numbers for the log, read from the device."""
        loss, target, lr = stepped
        values = {name: float(term) for name, term in loss.terms.items()}
        if loss.encoded.overflow is not None:
            values["overflow_steps"] = float(self.dictionary.overflow_steps)
        values |= {
            "loss": float(loss.total.detach()),
            "fvu": fvu_of(values["mse"], target),
            **fvu_by_site(self.dictionary.sites, target, loss.error),
            "l0": float(loss.encoded.l0().float().mean()),
            "frac_silent": float((self.dictionary.tokens_since_fired > 100_000).float().mean()),
            "lr": lr,
        }
        if self.config.freeze_above is not None:
            values["frac_frozen"] = self.optimiser.frac_frozen()
        return values

    def check(self) -> None:
        """Look whether anything went wrong since the last look; waits for the device.

        Raises:
            ActivationError: a loss was, or a parameter is, NaN or infinite.
        """
        bad = int(self.first_bad)
        where = "" if self.name == ALONE else f" of {self.name}"
        if bad >= 0:
            n = self.config.batch_size
            rows = f"on rows {bad * n:,} to {(bad + 1) * n - 1:,} of the stream"
            if self.objective is not own_loss:  # its batches are whole contexts, as many as have no more rows
                rows = f"on a batch of whole contexts, at most {n:,} rows"
            raise ActivationError(
                f"the loss{where} must be finite",
                f"NaN or infinity first at step {bad + 1}, {rows}",
                "Lower --lr, or look at those rows; checkpoints made before it are kept.",
            )
        for name, parameter in self.dictionary.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ActivationError(
                    f"{name}{where} must be finite",
                    f"NaN or infinity after step {self.step}, though every loss was finite",
                    "Lower --lr; checkpoints made before it are kept.",
                )

    # -- state ---------------------------------------------------------------------------------------

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
                "compared": self.compared,
                "finished": self.finished,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._settle()
        self.dictionary.load_state_dict(state["weights"])
        for name, buffer in self.dictionary.training_buffers().items():
            buffer.copy_(state["training"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["run"]["generator"])
        self.step, self.resampled_at = state["run"]["step"], state["run"]["resampled_at"]
        compared, self.finished = state["run"]["compared"], state["run"]["finished"]
        self.compared = None if compared is None else compared.to(self.device)

    def write(self, folder: Path, probe_rows: Batch, n_rows: int | None) -> dict[str, Any]:
        """Write the dictionary's files; what its meta.json shall remember.

        Args:
            folder: An artifact's work folder.
            probe_rows: A few rows of the stream, on the CPU.
            n_rows: Rows in one pass of the source, if it has an end.
        """
        silent = self.dictionary.tokens_since_fired
        alive = None if n_rows is None else float((silent < n_rows).float().mean())
        scales = self.dictionary.scale_in.expand(self.dictionary.d_in)
        scale_in = torch.unique_consecutive(scales).tolist()
        about: dict[str, Any] = {"frac_alive_last_pass": alive, "scale_in": scale_in}
        with self.optimiser.exported():
            by_site = about_sites(self.dictionary)
            about |= {"sites": by_site} if by_site else {}
            return self.dictionary.write(folder, self.own(probe_rows).x) | {"training": about}


ALONE = "dictionary"
"""The name of a run's only member."""


def _first(batch: Batch, n: int) -> Batch:
    x = batch.x[:n]
    return Batch(x, x if batch.target is batch.x else batch.target[:n])
