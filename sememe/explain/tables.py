"""What was found about latents, as tables: a row per latent, and a row per cluster. Asks nobody but about clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from sememe.atlas import VARIANT_OF, Atlas, words_score
from sememe.explain.asked import Found, ask_clusters
from sememe.explain.config import ExplainConfig, LexicalConfig
from sememe.explain.examples import EXPLAIN, SCORE, Examples
from sememe.explain.lexical import Lexical
from sememe.explain.scorers import Encode
from sememe.judge import Judge

__all__ = ["clusters_table", "count_clusters", "embeddings_table", "latents_table", "tally"]

MAX_MEMBERS = 10
"""Explanations of a cluster's latents that are shown to whoever names it."""


def latents_table(
    examples: Examples, lexical: Lexical, found: Sequence[Found], config: ExplainConfig
) -> pa.Table:
    """A row per latent: its label, what was said of it, its rule, and the rule's scores."""
    scored = lexical.scored
    good = scored & (np.nan_to_num(lexical.found.gain) >= config.label_score)
    by_rule = isinstance(config.explainer, LexicalConfig)
    category: list[str | None] = [None] * examples.d_sae
    if by_rule:
        category = [
            kind if words is not None else None
            for kind, words in zip(lexical.kinds, lexical.words, strict=True)
        ]
    label = [words if ok else None for words, ok in zip(lexical.words, good, strict=True)]
    source: list[str | None] = ["rule" if text is not None else None for text in label]
    explanation: list[str | None] = [None] * examples.d_sae
    effect: list[str | None] = [None] * examples.d_sae
    for one in found:
        explanation[one.latent], effect[one.latent] = one.explanation, one.effect
        if not by_rule:
            category[one.latent] = one.category
        if one.explanation is not None and _holds(one, config):
            label[one.latent], source[one.latent] = one.explanation, "model"

    def number(values: np.ndarray) -> pa.Array:
        return pa.array(values.astype(np.float32), mask=~scored)

    own = np.arange(examples.d_sae, dtype=np.int32)
    texts = {
        "label": label,
        "label_from": source,
        "explanation": explanation,
        "effect": effect,
        "category": category,
        "rule_words": lexical.words,
        "rule": lexical.rules,
    }
    return pa.table(
        {
            "latent": own,
            **{name: pa.array(values, pa.string()) for name, values in texts.items()},
            "score": number(lexical.found.gain),
            "auroc": number((lexical.found.gain + 1) / 2),
            "correlation": number(lexical.found.correlation),
            "auroc_train": number((lexical.train_gain + 1) / 2),
            "auroc_shuffled": number((lexical.shuffled.gain + 1) / 2),
            "auroc_other": number((lexical.other.gain + 1) / 2),
            "n_train": lexical.n_train,
            "n_test": lexical.found.n_on,
            "n_train_documents": _count_documents(examples, EXPLAIN),
            "n_test_documents": _count_documents(examples, SCORE),
        }
    )


def _holds(one: Found, config: ExplainConfig) -> bool:
    """Whether a model's words may be the label: by the score that the list and the map show of them.

    Without a scorer that reads them, always; with undefined scores alone, never.
    """
    reading = {
        (s.scorer, s.variant): s.score for s in one.scores if s.scorer in VARIANT_OF and s.decile is None
    }
    score = words_score(reading)
    return not reading or (score is not None and score >= config.label_score)


def _count_documents(examples: Examples, side: int) -> np.ndarray:
    """How many documents each latent's windows on one side come from."""
    latent = np.repeat(np.arange(examples.d_sae), np.diff(examples.latent_ptr))
    on_side = examples.side == side
    pairs = np.unique(latent[on_side].astype(np.int64) << 32 | examples.document[on_side])
    return np.bincount(pairs >> 32, minlength=examples.d_sae)


def clusters_table(
    atlas: Atlas, table: pa.Table, judge: Judge | None, config: ExplainConfig
) -> pa.Table | None:
    """What each cluster of the atlas is about, from its members' words; None if the atlas has no clusters."""
    there = {row["table_name"] for row in atlas.query("SELECT table_name FROM duckdb_tables()")}
    if "clusters" not in there:
        return None
    about = {
        row["id"]: row
        for row in atlas.query("SELECT id, label, n_latents FROM clusters WHERE id >= 0 ORDER BY id")
    }
    by_rule = isinstance(config.explainer, LexicalConfig)
    words = table["label" if by_rule else "explanation"].to_pylist()
    members: dict[int, list[str]] = {}
    for row in atlas.query("SELECT id, cluster FROM latents WHERE cluster >= 0 ORDER BY id"):
        if words[row["id"]] is not None:
            members.setdefault(row["cluster"], []).append(words[row["id"]])
    said: dict[int, str | None]
    if by_rule or judge is None:
        said = {cluster: "; ".join(list(tally(found))[:3]) for cluster, found in members.items()}
    else:
        said = ask_clusters({cluster: found[:MAX_MEMBERS] for cluster, found in members.items()}, judge)
    return pa.table(
        {
            "cluster": pa.array(list(about), pa.int32()),
            "label": pa.array([row["label"] for row in about.values()], pa.string()),
            "explanation": pa.array([said.get(cluster) for cluster in about], pa.string()),
            "n_latents": pa.array([row["n_latents"] for row in about.values()], pa.int64()),
            "n_shown": pa.array(
                [len(members.get(cluster, ())[:MAX_MEMBERS]) for cluster in about], pa.int32()
            ),
        }
    )


def count_clusters(table: pa.Table | None, judge: Judge | None) -> dict[str, int]:
    """How many clusters a judge was asked about, and how many of its answers could not be read."""
    if table is None or judge is None:
        return {"n_asked": 0, "n_unexplained": 0}
    shown = [n > 0 for n in table["n_shown"].to_pylist()]
    silent = [
        asked and said is None for asked, said in zip(shown, table["explanation"].to_pylist(), strict=True)
    ]
    return {"n_asked": sum(shown), "n_unexplained": sum(silent)}


def embeddings_table(table: pa.Table, encode: Encode) -> pa.Table:
    """Where each label lies among meanings: a row per labelled latent, a unit vector of the sentence encoder's."""
    labelled = [
        (latent, label)
        for latent, label in zip(table["latent"].to_pylist(), table["label"].to_pylist(), strict=True)
        if label is not None
    ]
    vectors = encode([label for _, label in labelled]) if labelled else np.zeros((0, 1), np.float32)
    width = vectors.shape[1]
    return pa.table(
        {
            "latent": pa.array([latent for latent, _ in labelled], pa.int32()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), width),
        }
    )


def tally(names: Sequence[str]) -> dict[str, int]:
    """How often each name occurs, the commonest first."""
    counts = {name: names.count(name) for name in set(names)}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
