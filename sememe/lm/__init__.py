"""Language models: load them, read and change their activations, continue from the middle.

The only package that imports transformers. Knows nothing about dictionaries, stores or verbs.
"""

from sememe.lm.chat import Completion, chat_ids, choice_log_probs, complete
from sememe.lm.embedded import EMBEDDED
from sememe.lm.encoder import SentenceEncoder, sentence_encoder
from sememe.lm.frozen import Frozen, FrozenRun
from sememe.lm.load import ModelConfig, fetch, fingerprint_of, load, wrap
from sememe.lm.model import LanguageModel
from sememe.lm.outline import Outline, outline, outline_of

__all__ = [
    "EMBEDDED",
    "Completion",
    "Frozen",
    "FrozenRun",
    "LanguageModel",
    "ModelConfig",
    "Outline",
    "SentenceEncoder",
    "chat_ids",
    "choice_log_probs",
    "complete",
    "fetch",
    "fingerprint_of",
    "load",
    "outline",
    "outline_of",
    "sentence_encoder",
    "wrap",
]
