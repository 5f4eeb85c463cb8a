"""The explainer without a language model: for every latent the smallest rule over tokens and kinds of tokens.

Knows examples as arrays, and nothing of models.

    classes.py   kinds of tokens
    loops.py     finding and scoring rules
    rules.py     every latent's rule, its scores and their nulls
    words.py     rules in words
"""

from sememe.explain.lexical.rules import Lexical, find_rules, kind_of

__all__ = ["Lexical", "find_rules", "kind_of"]
