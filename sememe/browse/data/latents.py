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

from sememe.browse.data.explained import Explained
from sememe.browse.data.values import decimals, fixed, number, significant

__all__ = ["EXAMPLE_COLUMNS", "EffectFiles", "Latents"]

Json = dict[str, Any]
Read = Callable[..., pa.Table]

EXAMPLE_COLUMNS = ("kind", "decile", "rank", "context", "position", "start", "stop", "document", "act")
EFFECT_COLUMNS = ("loss", "loss_change", "loss_change_after", "n_after", "kl", "raised", "lowered")
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

EXAMPLES_SQL = """
    SELECT latent, kind, decile, rank, context, position, start, stop, document, act, positions, acts
    FROM examples WHERE latent BETWEEN ? AND ?
    ORDER BY latent, CASE kind WHEN 'top' THEN 0 WHEN 'decile' THEN 1 ELSE 2 END, decile DESC, rank"""

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
}

EFFECTS_SQL = f"""
    SELECT latent, kind, coalesce(decile, -1) AS decile, rank, {", ".join(EFFECT_COLUMNS)} FROM read_parquet(?)
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

    def between(self, first: int, last: int, label_tokens: Mapping[int, list[int]]) -> list[Json]:
        """Everything about the latents whose ids are in [first, last], in order."""
        stats = _cut(self._read(LATENT_SQL, first, last), digits=4)
        logits = _by_latent(self._read(LOGITS_SQL, first, last), digits=4)
        neighbours = _by_latent(self._read(NEIGHBOURS_SQL, first, last))
        tables = {name: _by_latent(self._read(sql, first, last)) for name, sql in TABLES.items()}
        examples = _slices(self._read(EXAMPLES_SQL, first, last))
        effects, removals = self._effects_between(first, last)
        out = []
        for i, latent in enumerate(stats["id"]):
            lenses = _lenses(logits.get(latent))
            out.append(
                {
                    **{name: values[i] for name, values in stats.items()},
                    "label_tokens": label_tokens.get(latent, []),
                    "explanation": self._explained.labels.get(latent),
                    "explained": self._explained.of(latent),
                    **lenses.pop("logit", {"promoted": _ends([], []), "demoted": _ends([], [])}),
                    "lenses": lenses,
                    "neighbours": _neighbours(neighbours.get(latent)),
                    **{name: table.get(latent, {}) for name, table in tables.items()},
                    "examples": _examples(examples.get(latent), effects.get(latent), removals.get(latent)),
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
        elif pa.types.is_list(column.type) and pa.types.is_floating(column.type.value_type):
            out[name] = [None if v is None else significant(np.array(v), 3) for v in column.to_pylist()]
        elif pa.types.is_integer(column.type) and not column.null_count:
            out[name] = column.to_numpy().tolist()
        else:
            out[name] = column.to_pylist()
    return out


def _cuts(latents: np.ndarray) -> list[int]:
    return [0, *(np.flatnonzero(np.diff(latents)) + 1).tolist(), len(latents)]


def _by_latent(table: pa.Table, digits: int = 3) -> dict[int, dict[str, list[Any]]]:
    """The rows of each latent, as columns of plain lists; the table is sorted by its first column, `latent`."""
    latents = table.column("latent").to_numpy()
    columns = _cut(table.drop_columns(["latent"]), digits)
    return {
        int(latents[start]): {name: values[start:stop] for name, values in columns.items()}
        for start, stop in itertools.pairwise(_cuts(latents))
        if stop > start
    }


def _slices(table: pa.Table) -> dict[int, pa.Table]:
    """The rows of each latent as a table."""
    latents = table.column("latent").to_numpy()
    return {
        int(latents[start]): table.slice(start, stop - start)
        for start, stop in itertools.pairwise(_cuts(latents))
        if stop > start
    }


def _ends(tokens: list[int], values: list[float | None]) -> Json:
    return {"tokens": tokens, "values": values}


def _lenses(rows: dict[str, list[Any]] | None) -> dict[str, Json]:
    """Promoted and demoted tokens by the lens they were read through."""
    if rows is None:
        return {}
    out: dict[str, Json] = {}
    for lens, sign, token, value in zip(
        rows["lens"], rows["sign"], rows["token"], rows["value"], strict=True
    ):
        ends = out.setdefault(lens, {"promoted": _ends([], []), "demoted": _ends([], [])})
        end = ends["promoted" if sign == 1 else "demoted"]
        end["tokens"].append(token)
        end["values"].append(value)
    return out


def _neighbours(rows: dict[str, list[Any]] | None) -> list[Json]:
    """The nearest directions, a group for each kind and dictionary; the own dictionary is None."""
    out: list[Json] = []
    if rows is None:
        return out
    for kind, dictionary, other, cosine in zip(
        rows["kind"], rows["dictionary"], rows["other"], rows["cosine"], strict=True
    ):
        if not out or (out[-1]["kind"], out[-1]["dictionary"] or "") != (kind, dictionary):
            out.append({"kind": kind, "dictionary": dictionary or None, "other": [], "cosine": []})
        out[-1]["other"].append(other)
        out[-1]["cosine"].append(cosine)
    return out


def _examples(
    table: pa.Table | None, effects: dict[str, list[Any]] | None, removals: dict[str, list[Any]] | None
) -> Json:
    """A latent's examples as columns; activations keep four digits of the largest, so that they stay short."""
    if table is None:
        return {name: [] for name in (*EXAMPLE_COLUMNS, "positions", "acts")}
    table = table.combine_chunks()
    out: Json = {name: table.column(name).to_pylist() for name in EXAMPLE_COLUMNS}
    flat = {}
    for name in ("positions", "acts"):
        lists = table.column(name).combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        offsets = lists.offsets.to_numpy()
        flat[name] = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        cuts = (offsets - offsets[0]).tolist()
        if name == "acts":
            places = decimals(flat[name])
            flat[name] = fixed(flat[name], places)
            out["act"] = fixed(np.asarray(out["act"], dtype=np.float64), places).tolist()
        values = flat[name].tolist()
        out[name] = [values[start:stop] for start, stop in itertools.pairwise(cuts)]
    keys = list(zip(out["kind"], [-1 if d is None else d for d in out["decile"]], out["rank"], strict=True))
    if effects is not None:
        out["effect"] = _of_examples(keys, effects)
    if removals is not None:
        out["removals"] = _removals(keys, removals)
    return out


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
