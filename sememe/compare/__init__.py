"""The verb that compares dictionaries: on the same held-out documents at matched l0, and direction by direction.

    dictionaries -> directions.py (what each finds of the others)
                 -> verb.py (one pass over text, frontiers, differences)

Knows decoder directions, models and text; the pass is `measure/`, what is real is `frontier.py`, the page is
`figures/`.
"""

from sememe.compare.config import CompareConfig
from sememe.compare.verb import COMPARISON, compare
from sememe.figures.schema import Comparison

__all__ = ["COMPARISON", "CompareConfig", "Comparison", "compare"]
