"""Atlas -> plain JSON, the same for the server and for the static export.

    __init__    answers about the whole atlas: overview, list, search, contexts
    latents     one latent: statistics, tokens, relations, effects, examples
    explained   what explanations say, and how they compare with nulls
    reports     the dictionary's report, and the frontier it stands on
    texts       chosen texts with the latents that fire on them
    graphs      graphs of prompts, in columns
    values      numbers and strings as they are sent

Knows the atlas's tables and what the page asks for; knows neither HTTP, nor files, nor torch. Every public method of
`Data` returns plain lists, dictionaries, strings, numbers and None: what `json.dumps` takes without help. NaN and
infinities become None. Columns beat rows: 100,000 latents are one dictionary of lists, not 100,000 dictionaries.

Tokens travel as ids. Their strings are sent once, with the exact bytes of those that are not UTF-8 by themselves
(half a Japanese letter), so that the page can join such tokens again and show what cannot be joined as escapes.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sememe import __version__
from sememe.atlas import Atlas
from sememe.browse.data.explained import Explained
from sememe.browse.data.graphs import about_graph
from sememe.browse.data.latents import EXAMPLE_COLUMNS, EffectFiles, Latents
from sememe.browse.data.reports import report_figures
from sememe.browse.data.values import display, lists_of, number, rounded, significant
from sememe.errors import CorruptError

__all__ = ["API_VERSION", "LABEL_TOKENS", "PROMOTED_IN_SEARCH", "Data", "EffectFiles", "Explained", "display"]

API_VERSION = 2
LABEL_TOKENS = 3  # a latent without an explanation is called by this many of its peak tokens
PROMOTED_IN_SEARCH = 10  # a search by token looks at this many of a latent's promoted tokens

Json = dict[str, Any]

MAP_SIZE = 9999
"""Places on the map are whole numbers from 0 to this: finer than any screen, and short."""

DETAILS = (
    "mcs", "max_cos", "self_similarity", "encoder_decoder_cosine", "kurtosis", "skew", "n_effective_neurons",
    "top_neuron_share", "outlier_share", "bias", "decoder_norm", "logit_std",
)  # fmt: skip
"""Figures of the latents that the list can sort and filter by, beside those of the index."""

PEAKS_SQL = """
    SELECT e.latent AS latent, c.token_ids[e.position + 1] AS token, sum(abs(e.act)) AS mass
    FROM examples e JOIN contexts c ON c.id = e.context
    WHERE e.kind IN ({kinds}) GROUP BY 1, 2"""


class Data:
    """An open atlas as the page sees it.

    Args:
        atlas: Open for reading.
        explained: What each latent stands for, where somebody has said so: shown instead of tokens.
        report: The dictionary's `metrics` and those of its `nulls`, each by name: {"value", "low", "high"}.
        frontier: Where it stands among the dictionaries of its sweep: `frontier_point` of each.
        effects: Files of what its latents do to the predictions.
    """

    def __init__(
        self,
        atlas: Atlas,
        explained: Explained | None = None,
        report: Mapping[str, Any] | None = None,
        *,
        frontier: Sequence[Json] = (),
        effects: EffectFiles | None = None,
    ) -> None:
        self.atlas, self._report, self._frontier = atlas, report, list(frontier)
        self.explained = explained or Explained()
        self.explanations = self.explained.labels
        self._effects = effects
        self.graphs: list[Json] = []  # graphs of prompts, as `read_graphs` gives them
        self.texts: list[
            Json
        ] = []  # chosen texts with the latents that fire on them, as `read_texts` gives them
        self._latents = Latents(self._table, self.explained, effects)

    # ---- the whole ------------------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> list[int]:
        """The latents' ids in ascending order: a latent's *row* is its place here."""
        return [int(row[0]) for row in self._rows("SELECT id FROM latents ORDER BY id")]

    def overview(self) -> Json:
        """What the landing page's panel shows: where this comes from, vital signs, density histogram, attributions."""
        meta = self.atlas.meta
        (n, alive, l0), *_ = self._rows(
            "SELECT count(*), count(*) FILTER (n_active > 0), sum(density) FROM latents"
        )
        languages = self._rows(
            "SELECT language, count(*) AS n FROM latents WHERE language IS NOT NULL AND n_active > 0 "
            "GROUP BY 1 ORDER BY n DESC, 1"
        )
        return {
            "api": API_VERSION,
            "sememe": __version__,
            "fingerprint": self.atlas.artifact.fingerprint,
            "dictionary": meta.get("dictionary", {}),
            "text": meta.get("text", {}),
            "context_length": meta.get("context_length"),
            "window": meta.get("window"),
            "histogram_edges": meta.get("histogram_edges", []),
            "report": report_figures(self._report or meta.get("report")),
            "attributions": meta.get("attributions") or [],
            "latents": {"n": n, "alive": alive, "dead": n - alive, "l0": number(l0)},
            "density": self._density_histogram(),
            "languages": [{"language": language, "n": count} for language, count in languages],
            "contexts": int(self._rows("SELECT count(*) FROM contexts")[0][0]),
            "explained": len(self.explanations),
            "frontier": self._frontier,
            "scores": self.explained.lifts,
            "clusters": self._clusters(),
            "embedded": 0 if self.explained.embeddings is None else len(self.explained.embeddings[0]),
            "placed": int(self._rows("SELECT count(x) FROM latents")[0][0]),
            "logit_edges": meta.get("logit_edges", []),
            "position_edges": meta.get("position_edges", []),
            "coactive_tokens": meta.get("coactive_tokens"),
            "effects": self._effects is not None,
            "graphs": [about_graph(shown) for shown in self.graphs],
            "texts": [
                {"prompt": text["prompt"], "n_tokens": len(text["tokens"]["token"])} for text in self.texts
            ],
        }

    def _clusters(self) -> list[Json]:
        """Groups of latents on the map, the largest first; `explanation` where somebody has said what they share."""
        rows = self._rows("SELECT id, label, n_latents FROM clusters ORDER BY id")
        return [
            {"id": id, "label": label, "n": n, "explanation": self.explained.clusters.get(id)}
            for id, label, n in rows
        ]

    def _density_histogram(self, bins_per_decade: int = 5) -> Json:
        """Alive latents by log10 of their density. `edges` has one entry more than `counts`."""
        # Rounded as in the index, so that a bar and the list filtered by it agree.
        found = self._table("SELECT density FROM latents WHERE density > 0")
        logs = np.log10(np.array(rounded(found.column("density")), dtype=np.float64))
        if not len(logs):
            return {"log10_edges": [], "counts": []}
        low = math.floor(float(logs.min()) * bins_per_decade) / bins_per_decade
        edges = low + np.arange(max(1, math.ceil(-low * bins_per_decade - 1e-9)) + 1) / bins_per_decade
        edges = np.array([math.log10(number(10.0**edge) or 1.0) for edge in edges])
        counts, _ = np.histogram(np.clip(logs, edges[0], edges[-1]), bins=edges)
        return {"log10_edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}

    def index(self) -> Json:
        """Every latent in compact columns: all that the list needs to sort, filter and show.

        `language` is an index into `languages` (-1: none); `label_tokens` are the latent's commonest peak tokens,
        the strongest first; `promoted` the output tokens it makes likeliest; `explanation` maps a row to its text.
        """
        table = self._table(
            "SELECT id, density, n_active, max_act, mean_act, top_token, top_token_share, n_distinct_tokens, "
            "language, language_share FROM latents ORDER BY id"
        )
        column = {name: table.column(name) for name in table.column_names}
        spoken = column["language"].to_pylist()
        languages = sorted({language for language in spoken if language is not None})
        number = {language: i for i, language in enumerate(languages)}
        row_of = {latent: row for row, latent in enumerate(self.ids)}
        promoted = dict(
            self._rows(
                "SELECT latent, list(token ORDER BY rank) FROM logits "
                f"WHERE sign = 1 AND lens = 'logit' AND rank < {LABEL_TOKENS} GROUP BY latent"
            )
        )
        return {
            "id": column["id"].to_pylist(),
            "density": rounded(column["density"]),
            "n_active": column["n_active"].to_pylist(),
            "max_act": rounded(column["max_act"]),
            "mean_act": rounded(column["mean_act"]),
            "top_token": column["top_token"].to_pylist(),
            "top_token_share": rounded(column["top_token_share"], 3),
            "n_distinct_tokens": column["n_distinct_tokens"].to_pylist(),
            "languages": languages,
            "language": [number.get(language, -1) for language in spoken],
            "language_share": rounded(column["language_share"], 3),
            "label_tokens": [self._label_tokens.get(latent, []) for latent in self.ids],
            "promoted": [promoted.get(latent, []) for latent in self.ids],
            "explanation": {
                str(row_of[latent]): text for latent, text in self.explanations.items() if latent in row_of
            },
        }

    def details(self) -> Json:
        """The rest of every latent's figures, in columns like the index's: what is not needed for the first look.

        `x` and `y` are the place on the map, whole numbers from 0 to 9,999 (None: not on it); `cluster` is None for
        a latent in none. `score` is the explanation's. Columns without any value are left out.
        """
        table = self._table(
            f"SELECT {', '.join(DETAILS)}, cluster, top_neuron, x, y FROM latents ORDER BY id"
        )
        out: Json = {
            name: significant(table.column(name).to_numpy(zero_copy_only=False))
            for name in DETAILS
            if table.column(name).null_count < len(table)
        }
        out["cluster"] = [None if c is None or c < 0 else c for c in table.column("cluster").to_pylist()]
        out["top_neuron"] = table.column("top_neuron").to_pylist()
        x, y = (
            np.asarray(table.column(name).to_numpy(zero_copy_only=False), dtype=np.float64) for name in "xy"
        )
        placed = np.isfinite(x) & np.isfinite(y)
        if placed.any():
            # One scale for both axes: distances on the map mean the same in every direction.
            low = np.array([x[placed].min(), y[placed].min()])
            size = max(float(np.ptp(x[placed])), float(np.ptp(y[placed])), 1e-9)
            shift = (size - np.array([np.ptp(x[placed]), np.ptp(y[placed])])) / 2
            for name, values, start, margin in zip("xy", (x, y), low, shift, strict=True):
                whole = np.round((np.where(placed, values, start) - start + margin) / size * MAP_SIZE).astype(
                    int
                )
                out[name] = [v if ok else None for v, ok in zip(whole.tolist(), placed.tolist(), strict=True)]
        scores = [self.explained.score(latent) for latent in self.ids]
        if any(score is not None for score in scores):
            out["score"] = scores
        return out

    def embeddings(self) -> Json:
        """Where labels lie among meanings: `latent`, and in base64 the `vectors`, `width` signed bytes for each.

        Of unit vectors, times 127. Only a served page can use them: a question has to be embedded, too.
        """
        latents, vectors = self.explained.embeddings or ([], np.zeros((0, 0), np.float32))
        packed = np.clip(np.round(vectors * 127), -127, 127).astype(np.int8).tobytes()
        return {
            "latent": latents,
            "width": vectors.shape[1],
            "vectors": base64.b64encode(packed).decode("ascii"),
        }

    def graph(self, place: int) -> Json | None:
        """A graph of a prompt; None if there is none of this number."""
        return self.graphs[place] if 0 <= place < len(self.graphs) else None

    def text(self, place: int) -> Json | None:
        """A chosen text: its tokens, and at each the latents that fire there; None if there is no such text."""
        return self.texts[place] if 0 <= place < len(self.texts) else None

    @cached_property
    def _label_tokens(self) -> dict[int, list[int]]:
        peaks = PEAKS_SQL.format(kinds="'top'")
        rows = self._rows(
            f"SELECT latent, list(token ORDER BY mass DESC, token) FROM "
            f"(SELECT *, row_number() OVER (PARTITION BY latent ORDER BY mass DESC, token) AS place FROM ({peaks})) "
            f"WHERE place <= {LABEL_TOKENS} GROUP BY latent"
        )
        labels = {int(latent): [int(token) for token in tokens] for latent, tokens in rows}
        for latent, token in self._rows("SELECT id, top_token FROM latents WHERE top_token IS NOT NULL"):
            known = [t for t in labels.get(latent, []) if t != token]
            labels[latent] = [int(token), *known][:LABEL_TOKENS]
        return labels

    def tokens(self) -> Json:
        """The strings of all tokens in the atlas; `bytes` has the hex of those that are not UTF-8 by themselves."""
        ids: list[int] = []
        texts: list[str] = []
        exact: dict[str, str] = {}
        for token, text, raw in self._rows("SELECT id, text, bytes FROM tokens ORDER BY id"):
            ids.append(int(token))
            shown, is_text = display(str(text), bytes(raw))
            texts.append(shown)
            if not is_text:
                exact[str(token)] = bytes(raw).hex()
        return {"id": ids, "text": texts, "bytes": exact}

    def search(self) -> Json:
        """Which latents a token leads to: `promoted` by them, or the peak (`peaks`) of one of their examples."""
        promoted = self._rows(
            "SELECT token, list(latent ORDER BY latent) FROM "
            "(SELECT DISTINCT token, latent FROM logits "
            f"WHERE sign = 1 AND lens = 'logit' AND rank < {PROMOTED_IN_SEARCH}) "
            "GROUP BY token ORDER BY token"
        )
        peaks = self._rows(
            "SELECT token, list(latent ORDER BY latent) FROM ("
            + PEAKS_SQL.format(kinds="'top', 'decile'")
            + ") "
            "GROUP BY token ORDER BY token"
        )
        return {
            "promoted": {"token": [row[0] for row in promoted], "latents": [row[1] for row in promoted]},
            "peaks": {"token": [row[0] for row in peaks], "latents": [row[1] for row in peaks]},
        }

    # ---- latents --------------------------------------------------------------------------------------------------

    def latent(self, latent: int) -> Json | None:
        """Everything about one latent; None if there is no such latent."""
        found = self.latents(latent, latent)
        return found[0] if found else None

    def latents(self, first: int, last: int) -> list[Json]:
        """Everything about the latents whose ids are in [first, last], in order.

        Examples come as columns. Their tokens are in `contexts`; `positions` and `acts` are the latent's activations
        between `start` and `stop`, and nothing is said about its activations outside of them.
        """
        return self._latents.between(first, last, self._label_tokens)

    def examples(self, latent: int) -> list[Json] | None:
        """One latent's examples for people and scripts: token strings, one activation per token, the document."""
        found = self.latent(latent)
        if found is None:
            return None
        columns = found["examples"]
        contexts = self.contexts(sorted(set(columns["context"])))
        used = sorted({token for context in contexts["contexts"].values() for token in context["tokens"]})
        text = {
            token: display(str(shown), bytes(raw))[0]
            for token, shown, raw in self._rows(
                "SELECT id, text, bytes FROM tokens WHERE list_contains(?, id)", used
            )
        }
        out = []
        for i, context in enumerate(columns["context"]):
            start, stop = columns["start"][i], columns["stop"][i]
            acts = dict(zip(columns["positions"][i], columns["acts"][i], strict=True))
            ids = contexts["contexts"][str(context)]["tokens"][start:stop]
            out.append(
                {name: columns[name][i] for name in EXAMPLE_COLUMNS}
                | {
                    "tokens": [text.get(token, f"<token {token}>") for token in ids],
                    "token_ids": ids,
                    "acts": [acts.get(position, 0) for position in range(start, stop)],
                    "document": contexts["documents"].get(str(columns["document"][i])),
                }
            )
        return out

    # ---- contexts -------------------------------------------------------------------------------------------------

    @cached_property
    def context_ids(self) -> list[int]:
        """The contexts' ids in ascending order: a context's shard in an export follows from its place here."""
        return [int(row[0]) for row in self._rows("SELECT id FROM contexts ORDER BY id")]

    def contexts(self, ids: Iterable[int]) -> Json:
        """Full token rows and the documents they came from. Unknown ids are left out.

        `documents` of a context is run-length coded: [document, number of tokens], document -1 for padding.
        """
        wanted = [int(i) for i in ids]
        table = self._table(
            "SELECT id, token_ids, doc_ids FROM contexts WHERE id IN (SELECT unnest(?::INTEGER[])) ORDER BY id",
            wanted,
        )
        tokens, documents = (_cut_rows(table.column(name)) for name in ("token_ids", "doc_ids"))
        contexts = {
            str(context): {"tokens": row.tolist(), "documents": _run_lengths(of)}
            for context, row, of in zip(table.column("id").to_pylist(), tokens, documents, strict=True)
        }
        named = sorted(
            {run[0] for context in contexts.values() for run in context["documents"] if run[0] >= 0}
        )
        rows = self._rows(
            "SELECT id, source, language, title, tags FROM documents "
            "WHERE id IN (SELECT unnest(?::INTEGER[])) ORDER BY id",
            named,
        )
        return {
            "contexts": contexts,
            "documents": {
                str(document): {"source": source, "language": language, "title": title, "tags": _tags(tags)}
                for document, source, language, title, tags in rows
            },
        }

    # ---- reading --------------------------------------------------------------------------------------------------

    def _rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        try:
            # A cursor per query: the server answers from several threads.
            return list(self.atlas.connection.cursor().execute(sql, list(parameters)).fetchall())
        except duckdb.Error as error:
            raise _damaged(self.atlas, error) from None

    def _table(self, sql: str, *parameters: object) -> pa.Table:
        try:
            return self.atlas.connection.cursor().sql(sql, params=list(parameters)).to_arrow_table()
        except duckdb.Error as error:
            raise _damaged(self.atlas, error) from None


def _damaged(atlas: Atlas, error: duckdb.Error) -> CorruptError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return CorruptError(
        f"the atlas {atlas.artifact.path} must be readable",
        first,
        "Delete the folder and run `sememe interpret` again.",
    )


def _tags(text: str) -> Json:
    try:
        tags = json.loads(text)
    except ValueError:
        return {}
    return tags if isinstance(tags, dict) else {}


def _cut_rows(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    starts, flat = lists_of(column)
    return np.split(flat, starts[1:-1]) if len(starts) > 1 else []


def _run_lengths(values: NDArray[Any]) -> list[list[int]]:
    if not len(values):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(values)) + 1))
    lengths = np.diff(np.append(starts, len(values)))
    return [list(run) for run in zip(values[starts].tolist(), lengths.tolist(), strict=True)]
