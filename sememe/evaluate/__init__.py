"""The verb that measures a dictionary on held-out documents, beside ablations and nulls.

Knows dictionaries, models and text; the numbers are `metrics.py`, the splicing is `splice.py`, the pages are
`figures.py`. One pass: per batch one unedited forward, and per arm only the layers above the hookpoint.

An *arm* is something put in the place of the activations: the dictionary's reconstruction, zeros, the mean of
the training rows, a null's reconstruction. Positions that the token policy drops (position 0, specials, rows
over the norm limit) keep their own activation in every arm, and cross-entropy and KL are means over the
predictions made from kept positions.
"""

from sememe.evaluate.config import NULLS, EvaluateConfig
from sememe.evaluate.verb import evaluate

__all__ = ["NULLS", "EvaluateConfig", "evaluate"]
