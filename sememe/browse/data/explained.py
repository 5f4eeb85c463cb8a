"""What explanations say of each latent, and how they compare with nulls. Knows the artifact's files; asks nobody.

Rows are held by latent in memory: explanations are a few short strings and numbers each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sememe import artifact
from sememe.atlas import EXPLANATIONS, words_score
from sememe.browse.data.values import number, rounded
from sememe.errors import CorruptError

__all__ = ["Explained"]

Json = dict[str, Any]
SCORES = "scores.parquet"
CLUSTERS = "clusters.parquet"
EMBEDDINGS = "embeddings.parquet"
WORDS = ("label_from", "explanation", "effect", "category", "rule_words")
FIGURES = ("score", "auroc", "correlation", "auroc_shuffled", "auroc_other")
CONTROLS = {("lexical", "shuffled"), ("lexical", "other")}
"""Scores of the rules that are nulls themselves."""


class Explained:
    """Labels, words and scores by latent.

    Args:
        labels: What each latent is called.
        words: The rest of a latent's row: words and the rule's figures.
        scores: Of each latent: a row per scorer and variant, with the score of each tenth where there is one.
        lifts: Of each scorer and variant: the dictionary's mean, each null's, and the lift over the best.
        clusters: What each cluster is about, where somebody has said so.
        embeddings: Where labels lie among meanings: latents, and a unit vector of each.
    """

    def __init__(
        self,
        labels: Mapping[int, str] | None = None,
        words: Mapping[int, Json] | None = None,
        scores: Mapping[int, list[Json]] | None = None,
        lifts: list[Json] | None = None,
        clusters: Mapping[int, str] | None = None,
        embeddings: tuple[list[int], NDArray[np.float32]] | None = None,
    ) -> None:
        self.labels = {int(latent): str(text) for latent, text in (labels or {}).items()}
        self._words, self._scores = words or {}, scores or {}
        self.lifts, self.clusters, self.embeddings = lifts or [], clusters or {}, embeddings

    def of(self, latent: int) -> Json | None:
        """What is said of a latent beside its label; None where nothing is."""
        if latent not in self._words and latent not in self._scores:
            return None
        return {**self._words.get(latent, {}), "scores": self._scores.get(latent, [])}

    def score(self, latent: int) -> float | None:
        """One number for the list and the map, of what it is called by: the rule's, or a model's words'."""
        words = self._words.get(latent, {})
        if words.get("label_from") != "rule":
            rows = self._scores.get(latent, [])
            score = words_score({(row["scorer"], row["variant"]): row["score"] for row in rows})
            if score is not None:
                return float(score)
        found = words.get("score")
        return None if found is None else float(found)

    @classmethod
    def read(cls, folder: artifact.Artifact) -> Explained:
        """From an artifact of explanations.

        Raises:
            CorruptError: a file is damaged.
        """
        try:
            table = pq.read_table(folder.file(EXPLANATIONS))
            names = [name for name in (*WORDS, *FIGURES) if name in table.column_names]
            latents = table.column("latent").to_pylist()
            columns = {name: table.column(name).to_pylist() for name in ("label", *names)}
            there = folder.meta["files"]
            scores = _scores(pq.read_table(folder.file(SCORES))) if SCORES in there else {}
            clusters = _clusters(pq.read_table(folder.file(CLUSTERS))) if CLUSTERS in there else {}
            embeddings = _vectors(pq.read_table(folder.file(EMBEDDINGS))) if EMBEDDINGS in there else None
        except (pa.ArrowException, KeyError, OSError) as error:
            raise CorruptError(
                f"the explanations {folder.path} must be readable",
                str(error).splitlines()[0],
                "Run `sememe explain` again.",
            ) from None
        labels = {
            latent: text for latent, text in zip(latents, columns["label"], strict=True) if text is not None
        }
        words = {}
        for i, latent in enumerate(latents):
            row = {name: columns[name][i] for name in names if columns[name][i] is not None}
            if row:
                words[latent] = {
                    name: number(value, 3) if isinstance(value, float) else value
                    for name, value in row.items()
                }
        return cls(labels, words, scores, _lifts(folder.extra.get("summary") or {}), clusters, embeddings)


def _scores(table: pa.Table) -> dict[int, list[Json]]:
    """By latent: scorers and variants, each with its score over all and by tenth of the activations."""
    rows: dict[tuple[int, str, str], Json] = {}
    names = ("latent", "scorer", "variant", "decile", "n")
    columns = (table.column(name).to_pylist() for name in names)
    for latent, scorer, variant, decile, n, score in zip(
        *columns, rounded(table.column("score"), 3), strict=True
    ):
        if (scorer, variant) in CONTROLS:
            continue
        row = rows.setdefault(
            (latent, scorer, variant), {"scorer": scorer, "variant": variant, "score": None, "n": None}
        )
        if decile is None:
            row["score"], row["n"] = score, n
        else:
            row.setdefault("deciles", [None] * 10)[decile] = score
    out: dict[int, list[Json]] = {}
    for (latent, _, _), row in sorted(rows.items(), key=lambda item: item[0]):
        out.setdefault(latent, []).append(row)
    return out


def _clusters(table: pa.Table) -> dict[int, str]:
    pairs = zip(table.column("cluster").to_pylist(), table.column("explanation").to_pylist(), strict=True)
    return {cluster: text for cluster, text in pairs if text}


def _vectors(table: pa.Table) -> tuple[list[int], NDArray[np.float32]]:
    latents = table.column("latent").to_pylist()
    flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return latents, np.asarray(flat, dtype=np.float32).reshape(len(latents), -1)


def _lifts(summary: Mapping[str, Any]) -> list[Json]:
    """The summary's lifts with the dictionary's own means; scorers without nulls have a mean alone."""
    known = {(row["scorer"], row["variant"]): row for row in summary.get("lifts") or []}
    out = []
    for row in summary.get("scorers") or []:
        key = (row["scorer"], row["variant"])
        if key in CONTROLS or row.get("mean") is None:
            continue
        lift = known.get(key)
        entry: Json = {
            "scorer": key[0],
            "variant": key[1],
            **{name: number(row[name], 3) for name in ("mean", "low", "high")},
            "n": row["n_latents"],
            "nulls": {},
            "lift": None,
        }
        if lift is not None:
            entry["nulls"] = {name: number(null["mean"], 3) for name, null in lift["nulls"].items()}
            value, low, high = (number(lift[of], 3) for of in ("lift", "low", "high"))
            entry["lift"] = {"value": value, "low": low, "high": high}
            entry["best_null"] = lift["best_null"]
        out.append(entry)
    return out
