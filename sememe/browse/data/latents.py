"""Everything about single latents, as the page's latent shard holds it.

Knows the atlas's tables, the files of effects, and explanations; asks for whole ranges of latents at once, because
DuckDB answers one query over a thousand latents about as fast as over one. Rows are cut by latent as plain lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sememe.browse.data.explained import Explained
from sememe.browse.data.values import decimals, fixed, number, significant

__all__ = ["EXAMPLE_COLUMNS", "EffectFiles", "Latents"]

Json = dict[str, Any]
Read = Callable[..., pa.Table]

EXAMPLE_COLUMNS = ("kind", "decile", "rank", "context", "position", "start", "stop", "document", "act")
EFFECT_COLUMNS = (
    "loss",
    "loss_change",
    "loss_change_after",
    "n_after",
    "kl",
    "logit_change",
    "raised",
    "lowered",
)
N_NEIGHBOURS = 10
"""Nearest directions shown of each kind."""
N_REMOVALS = 64
"""Removals sent of one example, those nearest to the peak: a window is no longer than that by default."""

LATENT_SQL = """
    SELECT id, density, n_active, max_act, mean_act, decoder_norm, logit_mean, logit_std, top_token, top_token_share,
           n_distinct_tokens, language, language_share, histogram, position_density, position_mean, bias,
           encoder_decoder_cosine, max_cos, mcs, self_similarity, skew, kurtosis, n_effective_neurons, top_neuron,
           top_neuron_share, outlier_share, cluster
    FROM latents WHERE id BETWEEN ? AND ? ORDER BY id"""

LOGITS_SQL = """
    SELECT latent, lens, sign, token, value FROM logits
    WHERE latent BETWEEN ? AND ? ORDER BY latent, lens, sign DESC, rank"""

KINDS = ("top", "decile", "random")
EXAMPLES_SQL = """
    SELECT latent, CASE kind WHEN 'top' THEN 0 WHEN 'decile' THEN 1 ELSE 2 END AS kind,
           coalesce(decile, -1) AS decile, rank, context, position, start, stop, document, act, positions, acts
    FROM examples WHERE latent BETWEEN ? AND ? ORDER BY latent, 2, 3 DESC, rank"""

NEIGHBOURS_SQL = f"""
    SELECT latent, kind, coalesce(dictionary, '') AS dictionary, other, cosine FROM neighbours
    WHERE latent BETWEEN ? AND ? AND rank < {N_NEIGHBOURS} ORDER BY latent, kind, dictionary, rank"""

TABLES = {
    "top_tokens": (
        "SELECT latent, token, share, n_active, n_seen, mean_act FROM top_tokens "
        "WHERE latent BETWEEN ? AND ? ORDER BY latent, rank"
    ),
    "coactive": (
        "SELECT latent, other, n_both, expected, phi FROM coactive WHERE latent BETWEEN ? AND ? ORDER BY latent, rank"
    ),
    "neurons": (
        "SELECT latent, neuron, weight, share FROM neurons WHERE latent BETWEEN ? AND ? ORDER BY latent, rank"
    ),
    "history": "SELECT latent, step, cosine FROM history WHERE latent BETWEEN ? AND ? ORDER BY latent, step",
    "logit_histograms": (
        "SELECT latent, lens, counts FROM logit_histograms WHERE latent BETWEEN ? AND ? ORDER BY latent, lens"
    ),
}

ADDED = frozenset({"history", "logit_histograms"})
"""Of these, those that an older atlas of the same schema version may lack."""

# Effects that were measured earlier lack the newest column: then it is taken from the row of nulls beside them.
EFFECTS_SQL = f"""
    SELECT latent, kind, coalesce(decile, -1) AS decile, rank, {", ".join(EFFECT_COLUMNS)}
    FROM (SELECT * FROM read_parquet(?) UNION ALL BY NAME SELECT NULL::FLOAT AS logit_change WHERE false)
    WHERE latent BETWEEN ? AND ? ORDER BY latent"""

REMOVALS_SQL = """
    SELECT latent, rank, removed, act_without FROM read_parquet(?)
    WHERE latent BETWEEN ? AND ? AND removed >= position - ? ORDER BY latent, rank, removed"""


class EffectFiles(NamedTuple):
    """Where the effects of the atlas's latents lie."""

    effects: Path
    removals: Path


class Latents:
    """Latents by range of ids.

    Args:
        read: A query and its parameters -> an Arrow table.
        explained: What explanations say.
        effects: Effects' files, where there are any.
    """

    def __init__(self, read: Read, explained: Explained, effects: EffectFiles | None) -> None:
        self._read, self._explained, self._effects = read, explained, effects
        there = read("SELECT table_name FROM duckdb_tables()").column("table_name").to_pylist()
        self._tables = {name: sql for name, sql in TABLES.items() if name in there or name not in ADDED}

    def between(self, first: int, last: int, label_tokens: Mapping[int, list[int]]) -> list[Json]:
        """Everything about the latents whose ids are in [first, last], in order."""
        stats = _cut(self._read(LATENT_SQL, first, last), digits=4)
        lenses = _lenses(self._read(LOGITS_SQL, first, last))
        neighbours = _neighbours(self._read(NEIGHBOURS_SQL, first, last))
        tables = {name: _by_latent(self._read(sql, first, last)) for name, sql in self._tables.items()}
        examples = _examples(self._read(EXAMPLES_SQL, first, last))
        effects, removals = self._effects_between(first, last)
        for latent in effects.keys() | removals.keys():
            if latent in examples:
                _beside(examples[latent], effects.get(latent), removals.get(latent))
        names = list(stats)
        out = []
        for latent, *values in zip(stats["id"], *stats.values(), strict=True):
            read = lenses.get(latent, {})
            out.append(
                {
                    **dict(zip(names, values, strict=True)),
                    "label_tokens": label_tokens.get(latent, []),
                    "explanation": self._explained.labels.get(latent),
                    "explained": self._explained.of(latent),
                    **read.pop("logit", {"promoted": _ends([], []), "demoted": _ends([], [])}),
                    "lenses": read,
                    "neighbours": neighbours.get(latent, []),
                    **{name: tables.get(name, {}).get(latent, {}) for name in TABLES},
                    "examples": examples.get(latent) or _none(),
                }
            )
        return out

    def _effects_between(
        self, first: int, last: int
    ) -> tuple[dict[int, dict[str, list[Any]]], dict[int, dict[str, list[Any]]]]:
        if self._effects is None:
            return {}, {}
        effects = self._read(EFFECTS_SQL, str(self._effects.effects), first, last)
        removals = self._read(REMOVALS_SQL, str(self._effects.removals), first, last, N_REMOVALS)
        return _by_latent(effects), _by_latent(removals)


def _cut(table: pa.Table, digits: int = 3) -> dict[str, list[Any]]:
    """A table's columns as plain lists: numbers rounded, missing ones None, lists of numbers rounded, too."""
    out: dict[str, list[Any]] = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_floating(column.type):
            out[name] = significant(column.to_numpy(zero_copy_only=False), digits)
        elif pa.types.is_list(column.type) and not pa.types.is_nested(column.type.value_type):
            starts, flat = _lists(column)
            values = (
                significant(flat, digits=3) if pa.types.is_floating(column.type.value_type) else flat.tolist()
            )
            missing = column.combine_chunks().is_null().to_pylist()
            out[name] = [
                None if gone else values[start:stop]
                for gone, (start, stop) in zip(missing, itertools.pairwise(starts.tolist()), strict=True)
            ]
        elif pa.types.is_integer(column.type) and not column.null_count:
            out[name] = column.to_numpy().tolist()
        else:
            out[name] = column.to_pylist()
    return out


def _cuts(*columns: NDArray[Any]) -> list[int]:
    """Where rows begin that differ from the row before in any of the columns, and the end."""
    n = len(columns[0])
    if n == 0:
        return [0]
    changes = np.zeros(n - 1, bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    return [0, *(np.flatnonzero(changes) + 1).tolist(), n]


def _by_latent(table: pa.Table, digits: int = 3) -> dict[int, dict[str, list[Any]]]:
    """The rows of each latent, as columns of plain lists; the table is sorted by its column `latent`."""
    latents = table.column("latent").to_numpy()
    columns = _cut(table.drop_columns(["latent"]), digits)
    return {
        int(latents[start]): {name: values[start:stop] for name, values in columns.items()}
        for start, stop in itertools.pairwise(_cuts(latents))
    }


def _codes(column: pa.ChunkedArray) -> NDArray[Any]:
    """A number for each different string."""
    codes: NDArray[Any] = column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return codes


def _ends(tokens: list[int], values: list[float | None]) -> Json:
    return {"tokens": tokens, "values": values}


def _lenses(table: pa.Table) -> dict[int, dict[str, Json]]:
    """Promoted and demoted tokens of each latent, by the lens they were read through."""
    latents, signs = table.column("latent").to_numpy(), table.column("sign").to_numpy()
    tokens = table.column("token").to_numpy().tolist()
    values = significant(table.column("value").to_numpy(), 4)
    cuts = _cuts(latents, _codes(table.column("lens")), signs)
    names = table.column("lens").take(pa.array(cuts[:-1], pa.int64())).to_pylist()
    out: dict[int, dict[str, Json]] = {}
    for (start, stop), lens in zip(itertools.pairwise(cuts), names, strict=True):
        of_latent = out.setdefault(int(latents[start]), {})
        ends = of_latent.setdefault(lens, {"promoted": _ends([], []), "demoted": _ends([], [])})
        ends["promoted" if signs[start] == 1 else "demoted"] = _ends(tokens[start:stop], values[start:stop])
    return out


def _neighbours(table: pa.Table) -> dict[int, list[Json]]:
    """The nearest directions of each latent, a group for each kind and dictionary; the own dictionary is None."""
    latents = table.column("latent").to_numpy()
    others = table.column("other").to_numpy().tolist()
    cosines = significant(table.column("cosine").to_numpy())
    cuts = _cuts(latents, _codes(table.column("kind")), _codes(table.column("dictionary")))
    starts = pa.array(cuts[:-1], pa.int64())
    kinds, names = (table.column(name).take(starts).to_pylist() for name in ("kind", "dictionary"))
    out: dict[int, list[Json]] = {}
    for (start, stop), kind, name in zip(itertools.pairwise(cuts), kinds, names, strict=True):
        group = {
            "kind": kind, "dictionary": name or None,
            "other": others[start:stop], "cosine": cosines[start:stop],
        }  # fmt: skip
        out.setdefault(int(latents[start]), []).append(group)
    return out


def _none() -> Json:
    return {name: [] for name in (*EXAMPLE_COLUMNS, "positions", "acts")}


def _examples(table: pa.Table) -> dict[int, Json]:
    """Each latent's examples as columns; activations keep four digits of its largest, so that they stay short.

    All latents at once: a loop over them would be most of an export's time.
    """
    latents = table.column("latent").to_numpy()
    cuts = _cuts(latents)
    if len(latents) == 0:
        return {}
    starts, acts = _lists(table.column("acts"))
    _, positions = _lists(table.column("positions"))
    # The largest of each latent says how many decimals its activations keep.
    of_latent = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    of_act = np.repeat(of_latent, np.diff(starts))
    peak = np.asarray(table.column("act").to_numpy(), dtype=np.float64)
    largest = _largest(np.where(np.isfinite(acts), np.abs(acts), 0.0), starts[cuts])
    places = np.array([decimals(value) for value in largest.tolist()])
    columns: dict[str, list[Any]] = {
        name: table.column(name).to_numpy().tolist()
        for name in ("rank", "context", "position", "start", "stop", "document")
    }
    columns["kind"] = np.array(KINDS, dtype=object)[table.column("kind").to_numpy()].tolist()
    decile = table.column("decile").to_numpy().astype(object)
    decile[decile < 0] = None
    columns["decile"] = decile.tolist()
    columns["act"] = fixed(peak, places[of_latent]).tolist()
    pairs = list(itertools.pairwise(starts.tolist()))
    for name, flat in (("positions", positions), ("acts", fixed(acts, places[of_act]))):
        values = flat.tolist()
        columns[name] = [values[start:stop] for start, stop in pairs]
    names = (*EXAMPLE_COLUMNS, "positions", "acts")
    return {
        int(latents[start]): {name: columns[name][start:stop] for name in names}
        for start, stop in itertools.pairwise(cuts)
    }


def _largest(values: NDArray[Any], starts: NDArray[Any]) -> NDArray[np.float64]:
    """The largest of each run of values that are not negative; 0 for an empty one."""
    out = np.zeros(len(starts) - 1)
    filled = starts[1:] > starts[:-1]
    if filled.any():
        out[filled] = np.maximum.reduceat(values, starts[:-1][filled])
    return out


def _lists(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """A column of lists as where each begins (and the end), and their values end to end."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], values


def _beside(
    examples: Json, effects: dict[str, list[Any]] | None, removals: dict[str, list[Any]] | None
) -> None:
    """Put a latent's effects beside its examples."""
    deciles = [-1 if decile is None else decile for decile in examples["decile"]]
    keys = list(zip(examples["kind"], deciles, examples["rank"], strict=True))
    if effects is not None:
        examples["effect"] = _of_examples(keys, effects)
    if removals is not None:
        examples["removals"] = _removals(keys, removals)


def _of_examples(keys: list[tuple[str, int, int]], rows: dict[str, list[Any]]) -> list[Json | None]:
    """What taking the latent out does at each example's peak; None where that was not tried."""
    found = {key: i for i, key in enumerate(zip(rows["kind"], rows["decile"], rows["rank"], strict=True))}

    def one(i: int) -> Json:
        effect = {name: rows[name][i] for name in EFFECT_COLUMNS}
        for end in ("raised", "lowered"):
            # The texts go along: an output token need not occur anywhere in the atlas.
            effect[end] = [
                [item["token"], item["text"], number(item["change"], 3)] for item in effect[end] or []
            ]
        return effect

    return [one(found[key]) if key in found else None for key in keys]


def _removals(keys: list[tuple[str, int, int]], rows: dict[str, list[Any]]) -> list[Json | None]:
    """The activation at each top example's peak without each token before it: {removed, act}; None where not tried."""
    of_rank: dict[int, Json] = {}
    for rank, removed, act in zip(rows["rank"], rows["removed"], rows["act_without"], strict=True):
        entry = of_rank.setdefault(rank, {"removed": [], "act": []})
        entry["removed"].append(removed)
        entry["act"].append(act)
    return [of_rank.get(rank) if kind == "top" else None for kind, _, rank in keys]
