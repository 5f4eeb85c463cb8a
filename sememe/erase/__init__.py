"""The verb that takes a labelled concept out of a model's activations, and says how well that went and what it cost.

config.py (options) -> tasks.py (sentences before a pronoun) -> chosen.py (which latents, on training texts alone)
-> erasures.py (the edits) -> felt.py (probes of held-out texts) -> passes.py (what the model then says) -> verb.py
"""

from sememe.erase.chosen import Ranking, ranking
from sememe.erase.config import EraseConfig
from sememe.erase.erasures import AffineErasure, Erasure, LatentErasure
from sememe.erase.verb import erase

__all__ = [
    "AffineErasure",
    "EraseConfig",
    "Erasure",
    "LatentErasure",
    "Ranking",
    "erase",
    "ranking",
]
