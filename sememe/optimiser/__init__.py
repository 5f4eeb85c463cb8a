"""Optimisers for dictionaries: one contract, one file each. Know a dictionary's constraints, no data.

optimiser = make(SignumConfig(), dictionary)
loss.backward(); optimiser.step(lr)       # updates, keeps constraints, forgets the gradients
optimiser.forget(ids)                     # latents that were changed from outside begin anew
with optimiser.exported(): ...            # the weights that are meant to be used
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sememe.dictionaries.base import Trainable
from sememe.optimiser.adam import Adam, AdamConfig
from sememe.optimiser.base import BaseConfig, Optimiser
from sememe.optimiser.muon import Muon, MuonConfig
from sememe.optimiser.signum import Signum, SignumConfig
from sememe.optimiser.stacked import AdamStack, InTurn

__all__ = [
    "OPTIMISERS",
    "Adam",
    "AdamConfig",
    "AdamStack",
    "InTurn",
    "Muon",
    "MuonConfig",
    "Optimiser",
    "OptimiserConfig",
    "Signum",
    "SignumConfig",
    "make",
]

OptimiserConfig = Annotated[AdamConfig | SignumConfig | MuonConfig, Field(discriminator="kind")]
"""The config of any optimiser, told apart by `kind`."""

OPTIMISERS: dict[str, type[Optimiser]] = {"adam": Adam, "signum": Signum, "muon": Muon}


def make(config: BaseConfig, dictionary: Trainable) -> Optimiser:
    """An optimiser of a dictionary's parameters."""
    if isinstance(config, SignumConfig):
        return Signum(dictionary, config)
    if isinstance(config, MuonConfig):
        return Muon(dictionary, config)
    assert isinstance(config, AdamConfig)
    return Adam(dictionary, config)
