"""Data with a known answer, so that what was learned can be compared with the truth.

    config      ToyConfig: how a dictionary is planted
    planted     rows made of planted features, as a stream
    recovery    how much of them was learned; absorption in hierarchies
    superposed  small networks that carry more features than they have dimensions, as a stream
    layered     a stack of MLPs that computes features: which layer does which
    fitted      a planted dictionary with the statistics of real activations

Knows nothing about language models, stores or trainers.
"""

from sememe.toy.config import ToyConfig
from sememe.toy.fitted import Fitted, FittedSource, differences, statistics
from sememe.toy.layered import Layered, LayeredConfig, layered
from sememe.toy.planted import Planted, PlantedSource, planted
from sememe.toy.recovery import Absorption, Recovery, absorption, on_rows, recovery, scores
from sememe.toy.stream import PlantedBatch, Stream, Truth
from sememe.toy.superposed import Superposed, SuperposedConfig, SuperposedSource, Superposition, superpose

__all__ = [
    "Absorption",
    "Fitted",
    "FittedSource",
    "Layered",
    "LayeredConfig",
    "Planted",
    "PlantedBatch",
    "PlantedSource",
    "Recovery",
    "Stream",
    "Superposed",
    "SuperposedConfig",
    "SuperposedSource",
    "Superposition",
    "ToyConfig",
    "Truth",
    "absorption",
    "differences",
    "layered",
    "on_rows",
    "planted",
    "recovery",
    "scores",
    "statistics",
    "superpose",
]
