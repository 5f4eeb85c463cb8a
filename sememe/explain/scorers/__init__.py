"""Scorers of explanations: a file each, pure functions of words, examples of the scoring side, and a judge.

    base.py         what a scorer is given and gives back; chance correction
    simulation.py   OpenAI's protocol: what would it do at each token?
    detection.py    which windows does the explanation fit?
    fuzzing.py      are these words of the window marked rightly?
    intruder.py     which window does not belong? (no explanation)
    embedding.py    is the explanation nearer to the windows in which it fires? (no judge)
    generation.py   do texts written from the explanation make it fire?
    effect.py       which output tokens does it promote?

Knows no atlas and no dictionary.
"""

from sememe.explain.scorers.base import Asked, Evidence, Score, contrast
from sememe.explain.scorers.detection import detection
from sememe.explain.scorers.effect import effect, on_side
from sememe.explain.scorers.embedding import Encode, auroc, embedding
from sememe.explain.scorers.fuzzing import fuzzing
from sememe.explain.scorers.generation import contrasted, generation, write_texts
from sememe.explain.scorers.intruder import intruder
from sememe.explain.scorers.simulation import simulation

__all__ = [
    "Asked",
    "Encode",
    "Evidence",
    "Score",
    "auroc",
    "contrast",
    "contrasted",
    "detection",
    "effect",
    "embedding",
    "fuzzing",
    "generation",
    "intruder",
    "on_side",
    "simulation",
    "write_texts",
]
