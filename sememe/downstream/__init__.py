"""What comes after one latent at one position: the model run on with it taken out, the context run without a token.

Shared by the verbs that measure effects. A context goes through the whole model once, unedited; for each ablation
only the layers above the dictionary's output and the tokens from the position on run again, over the keys and values
that the unedited forward left. Knows models and dictionaries; knows no atlas, writes no file.

    reruns.py    the forwards
    changes.py   what they change in the model's predictions
    prompts.py   a typed text as tokens, and which positions count
"""

from sememe.downstream.changes import Changes, Predictions
from sememe.downstream.prompts import kept_positions, prompt_ids
from sememe.downstream.reruns import Reruns, Unedited, check_dictionary

__all__ = ["Changes", "Predictions", "Reruns", "Unedited", "check_dictionary", "kept_positions", "prompt_ids"]
