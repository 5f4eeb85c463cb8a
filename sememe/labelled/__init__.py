"""Texts with labels, and what a model makes of them: what verbs that ask about concepts share. Knows no verb.

config.py (which texts) -> read.py (texts and their labels) -> rows.py (activations and latents, a row per text)
"""

from sememe.labelled.config import LabelledConfig
from sememe.labelled.read import LEAST, MAX_CLASSES, Labelled, choose, first_letters, named, read_labelled
from sememe.labelled.rows import Pooled, TextBatch, pooled_rows, text_batches

__all__ = [
    "LEAST",
    "MAX_CLASSES",
    "Labelled",
    "LabelledConfig",
    "Pooled",
    "TextBatch",
    "choose",
    "first_letters",
    "named",
    "pooled_rows",
    "read_labelled",
    "text_batches",
]
