"""The verb that turns latents up while the model writes: behaviour against strength, and what it costs in perplexity.

config.py (options) -> pushes.py (what is added, and how) -> lexical.py and measures.py (what is made of a
continuation) -> verb.py (every arm at every strength)
"""

from sememe.steer.config import SteerConfig
from sememe.steer.pushes import Push
from sememe.steer.verb import steer

__all__ = ["Push", "SteerConfig", "steer"]
