"""The pass over held-out text that `evaluate` and `compare` share. Knows dictionaries, models and text; no verb.

An *arm* is something put in the place of the activations: a dictionary's reconstruction, zeros, the mean of
the training rows, a null's reconstruction. Positions that the token policy drops (position 0, specials, rows
over the norm limit) keep their own activation in every arm, and cross-entropy and KL are means over the
predictions made from kept positions.
"""

from sememe.measure.arms import Arms, Material, fit, make_null
from sememe.measure.config import NULLS, MeasureConfig
from sememe.measure.measured import Measured, check_documents, run
from sememe.measure.together import Together, check_together
from sememe.measure.twins import Twin, check_twins, open_twins, twin_groups

__all__ = [
    "NULLS",
    "Arms",
    "Material",
    "MeasureConfig",
    "Measured",
    "Together",
    "Twin",
    "check_documents",
    "check_together",
    "check_twins",
    "fit",
    "make_null",
    "open_twins",
    "run",
    "twin_groups",
]
