"""The verb that patches latents from one run of a model into another, and asks how few of them change what it says.

Knows dictionaries, prompts in pairs and models. The prompts are made by `pairs.py`, the layers above the hookpoint run
by `splice.py`.

    config.py   the options
    runs.py     pairs of prompts inside a model: what an edit leads to
    arms.py     what can be patched: latents, or a baseline's directions
    orders.py   in which order: by attribution, by ACDC's thresholds, at random
    verb.py     everything in every order, as numbers, plots and a page

Source: Cunningham et al. 2023, arXiv:2309.08600, section 4. Differs: orders by attribution beside ACDC's; ACDC begins
with a part of the candidates; intervals over pairs.
"""

from sememe.patch.config import BASELINES, PatchConfig
from sememe.patch.verb import PATCHING, patch

__all__ = ["BASELINES", "PATCHING", "PatchConfig", "patch"]
