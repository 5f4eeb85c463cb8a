"""The verb that tests hypothesised circuits by resampling ablation, and measures what latents do to later ones.

Knows dictionaries at several hookpoints of one model, inputs and circuits.

    config.py       the options
    circuit.py      a hypothesis out of a file: latents, or nodes and edges
    inputs.py       contexts of a text, or prompts, each run once as it is
    scrubbing.py    all but the circuit takes its activation from another input: how much is recovered
    downstream.py   a latent taken out: how later dictionaries' latents change
    verb.py         both, as numbers, a table and a page
"""

from sememe.scrub.config import ScrubConfig
from sememe.scrub.verb import DOWNSTREAM, SCRUBBING, scrub

__all__ = ["DOWNSTREAM", "SCRUBBING", "ScrubConfig", "scrub"]
