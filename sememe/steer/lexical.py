"""Whether a text's words are those of a label: a bag of words. Knows labelled texts; knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["Lexical", "train_lexical"]

N_FOLDS = 5


class Lexical(NamedTuple):
    """Logistic regression on the logarithm of words' counts, from scikit-learn."""

    words: Any
    model: Any
    accuracy: float
    """Mean over the two sides of the accuracy on texts of other folds: 0.5 for knowing nothing."""

    def chances(self, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Of the label, for each text."""
        found: np.ndarray = self.model.predict_proba(_logarithm(self.words.transform(texts)))[:, 1]
        return found


def train_lexical(texts: Sequence[str], label: Sequence[bool], *, seed: int = 0) -> Lexical:
    """Learn a label's words.

    Args:
        texts: Of both sides.
        label: Which have it.
        seed: Of the folds.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    words = CountVectorizer(min_df=2, token_pattern=r"(?u)\b\w+\b")
    x, y = _logarithm(words.fit_transform(texts)), np.array(label)
    model = LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced")
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    right = cross_val_predict(model, x, y, cv=folds) == y
    return Lexical(words, model.fit(x, y), float((right[y].mean() + right[~y].mean()) / 2))


def _logarithm(counts: Any) -> Any:
    return counts.astype(np.float64).log1p()
