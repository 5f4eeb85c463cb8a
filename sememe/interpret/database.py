"""What a pass found, written as an atlas database. Knows the atlas's schema; runs no model but its unembedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from sememe.atlas import create, insert, lists, set_meta
from sememe.collect import N_PLACES, Examples, TopTokens
from sememe.collect.loops import extremes, spread_over
from sememe.collect.together import strongest
from sememe.dictionaries import Dictionary, Site
from sememe.interpret.clusters import Map, make_map, named
from sememe.interpret.followed import Followed
from sememe.interpret.relations import Relations, relations
from sememe.interpret.stream import Pass
from sememe.lm import LanguageModel
from sememe.text import attributions
from sememe.tuned import Lens

__all__ = ["lens_layer", "residual_directions", "write_database"]

KINDS = np.array(["top", "decile", "random"])
LOGIT_BINS, LOGIT_LIMIT = (
    40,
    5.0,
)  # of the histogram over the vocabulary: a quarter of a standard deviation each


def write_database(
    path: Path,
    run: Pass,
    one: Followed,
    about: dict[str, Any],
    others: Mapping[str, Dictionary] | None = None,
    folder: Path | None = None,
    lens: Lens | None = None,
) -> None:
    """Everything the pass found of a dictionary, as an atlas database.

    Args:
        path: The file to make.
        run: The pass, over.
        one: The dictionary's part of it.
        about: What meta says of the dictionary.
        others: Dictionaries in which the nearest latents are looked for, too.
        folder: Where the dictionary came from, if its checkpoints are there.
        lens: A tuned lens of the model, through which what latents write is read, too.
    """
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".wal").unlink(missing_ok=True)
    examples = one.collector.examples(run.config.n_decile)
    found = relations(one.dictionary, run.config.n_neighbours, others or {}, folder)
    connection = create(path)
    try:
        connection.execute("BEGIN")
        shown = _write_contexts(connection, run, examples)
        documents = _write_documents_table(connection, run, shown.documents)
        logits = _write_logits(connection, run, one, lens)
        tokens = one.collector.top_tokens(run.config.n_top_tokens)
        place = _write_map(connection, run, one, found, tokens.tokens)
        facts = Facts(examples, shown.peaks, documents, logits, tokens, found, place)
        _write_latents(connection, run, one, facts)
        n_paired = _write_relations(connection, run, one, found)
        _write_tokens(connection, run, np.union1d(np.union1d(shown.tokens, logits.tokens), tokens.tokens))
        config = run.config
        set_meta(
            connection,
            {
                "dictionary": about,
                "text": {
                    "n_tokens": one.collector.n_tokens,
                    "n_rows": one.collector.n_rows,
                    "n_documents": int(run.document_ids().shape[0]),
                },
                "context_length": run.policy.context_length,
                "window": [config.before, config.after],
                "histogram_edges": [(i + 1) / config.n_bins for i in range(config.n_bins)],
                "position_edges": [
                    -(-(band + 1) * run.policy.context_length // N_PLACES) for band in range(N_PLACES)
                ],
                "coactive_tokens": n_paired,
                "outlier_dimensions": found.outliers.tolist(),
                "lenses": list(logits.lenses),
                "logit_edges": np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, LOGIT_BINS + 1).tolist(),
                "attributions": [dict(a._asdict()) for a in attributions(run.text)],
                "policy": run.policy.resolved(),
            },
        )
        connection.execute("COMMIT")
        connection.execute("CHECKPOINT")
    finally:
        connection.close()


class _Shown(NamedTuple):
    """What the kept examples refer to."""

    peaks: np.ndarray
    """The token at each example's peak."""
    tokens: np.ndarray
    """Every token of the contexts stored."""
    documents: np.ndarray
    """Every document of them."""


def _write_contexts(connection: duckdb.DuckDBPyConnection, run: Pass, examples: Examples) -> _Shown:
    """The token rows that examples refer to, numbered anew, and the examples."""
    rows = run.rows()
    used, context = np.unique(examples.row, return_inverse=True)
    ctx = run.policy.context_length
    tokens, documents = np.zeros(0, np.int64), np.zeros(0, np.int64)
    peaks = np.empty(examples.row.shape, np.int32)
    by_context = np.argsort(context, kind="stable")
    step = 8192
    for start in range(0, used.shape[0], step):
        part = rows[used[start : start + step]]
        ids, docs = np.ascontiguousarray(part[:, 0]), np.ascontiguousarray(part[:, 1])
        offsets = np.arange(0, ids.size + 1, ctx)
        insert(
            connection,
            "contexts",
            {
                "id": np.arange(start, start + ids.shape[0], dtype=np.int32),
                "token_ids": lists(offsets, ids.ravel()),
                "doc_ids": lists(offsets, docs.ravel()),
            },
        )
        tokens, documents = np.union1d(tokens, ids), np.union1d(documents, docs[docs >= 0])
        low, high = np.searchsorted(context, (start, start + step), sorter=by_context)
        here = by_context[low:high]
        peaks[here] = ids[context[here] - start, examples.position[here]]
    insert(
        connection,
        "examples",
        {
            "latent": examples.latent,
            "kind": KINDS[examples.kind],
            "decile": np.ma.masked_array(examples.decile, examples.decile < 0),
            "rank": examples.rank,
            "context": context.astype(np.int32),
            "position": examples.position,
            "start": examples.start,
            "stop": examples.stop,
            "document": examples.document,
            "act": examples.act,
            "positions": lists(examples.offsets, examples.positions),
            "acts": lists(examples.offsets, examples.acts),
        },
    )
    return _Shown(peaks, tokens, documents)


def _write_documents_table(
    connection: duckdb.DuckDBPyConnection, run: Pass, used: np.ndarray
) -> dict[int, str | None]:
    """The documents that stored contexts hold; returns their languages."""
    wanted, found = set(used.tolist()), {}
    for document in run.documents():
        if document["id"] in wanted:
            found[document["id"]] = document
    ordered = [found[key] for key in sorted(found)]
    if ordered:
        ids = np.array([document["id"] for document in ordered], np.int32)
        names = ("source", "language", "title", "tags", "key")
        text = {name: pa.array([document[name] for document in ordered], pa.string()) for name in names}
        insert(connection, "document_keys", {"id": ids, "key": text.pop("key")})
        insert(connection, "documents", {"id": ids, **text})
    return {key: document["language"] for key, document in found.items()}


class _Logits(NamedTuple):
    norms: np.ndarray
    mean: np.ma.MaskedArray[Any, Any]
    std: np.ma.MaskedArray[Any, Any]
    tokens: np.ndarray
    lenses: tuple[str, ...]


def _write_logits(
    connection: duckdb.DuckDBPyConnection, run: Pass, one: Followed, lens: Lens | None
) -> _Logits:
    """Each latent's direct effect on the output, where it writes to the residual stream; through the lens as well."""
    directions = one.dictionary.decoder_directions().detach().float()
    norms = directions.norm(dim=1).cpu().numpy()
    d_sae = directions.shape[0]
    residual = residual_directions(one.dictionary, run.lm, directions)
    if residual is None:
        return _Logits(norms, _nothing(d_sae), _nothing(d_sae), np.zeros(0, np.int64), ())
    mean, std, tokens = _write_extremes(connection, run, residual, "logit")
    lenses = ["logit"]
    if lens is not None:
        layer = lens_layer(one.dictionary, run.lm)
        translated = residual if layer is None else lens.translate(residual, layer)
        _, _, more = _write_extremes(connection, run, translated, "tuned")
        tokens = np.union1d(tokens, more)
        lenses.append("tuned")
    return _Logits(norms, np.ma.masked_array(mean), np.ma.masked_array(std), tokens, tuple(lenses))


def _write_extremes(
    connection: duckdb.DuckDBPyConnection, run: Pass, residual: Float[Tensor, "d_sae d_model"], lens: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens at each end and the histogram; returns mean and spread over the vocabulary, and every token shown."""
    n = min(run.config.n_logits, run.lm.vocab_size)
    d_sae = residual.shape[0]
    mean, std = np.zeros(d_sae, np.float32), np.zeros(d_sae, np.float32)
    tokens = np.zeros(0, np.int64)
    start = 0
    for values in run.lm.direct_logits(residual):
        at = slice(start, start + values.shape[0])
        start = at.stop
        dense = values.cpu().numpy()
        mean[at], std[at] = dense.mean(1), dense.std(1)
        shape = (dense.shape[0], n)
        ids = {1: np.zeros(shape, np.int32), -1: np.zeros(shape, np.int32)}
        found = {1: np.zeros(shape, np.float32), -1: np.zeros(shape, np.float32)}
        extremes(dense, ids[1], found[1], ids[-1], found[-1])
        counts = np.zeros((dense.shape[0], LOGIT_BINS), np.int32)
        spread_over(dense, mean[at], std[at], LOGIT_LIMIT, counts)
        insert(
            connection,
            "logit_histograms",
            {
                "latent": np.arange(at.start, at.stop, dtype=np.int32),
                "lens": pa.array([lens] * dense.shape[0], pa.string()),
                "counts": lists(np.arange(0, counts.size + 1, LOGIT_BINS), counts.ravel()),
            },
        )
        for sign in (1, -1):
            insert(
                connection,
                "logits",
                {
                    "latent": np.repeat(np.arange(at.start, at.stop, dtype=np.int32), n),
                    "sign": np.full(ids[sign].size, sign, np.int8),
                    "rank": np.tile(np.arange(n, dtype=np.int32), shape[0]),
                    "token": ids[sign].ravel(),
                    "value": found[sign].ravel(),
                    "lens": pa.array([lens] * ids[sign].size, pa.string()),
                },
            )
            tokens = np.union1d(tokens, ids[sign])
    return mean, std, tokens


def residual_directions(
    dictionary: Dictionary, lm: LanguageModel, directions: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "d_sae d_model"] | None:
    """The part of each decoder direction that is added to the residual stream, at the last such output; or None."""
    site = _last_residual(dictionary, lm)
    return None if site is None else directions[:, site.start : site.stop]


def lens_layer(dictionary: Dictionary, lm: LanguageModel) -> int | None:
    """The layer whose translator of a lens a dictionary's directions are read through; None: they need none."""
    site = _last_residual(dictionary, lm)
    layer = None if site is None else lm.written_layer(site.hookpoint)
    return None if layer == lm.n_layers - 1 else layer


def _last_residual(dictionary: Dictionary, lm: LanguageModel) -> Site | None:
    """The last output that is added to the residual stream."""
    assert dictionary.sites is not None
    inner = ("attn_z", "mlp_act", "mlp_in")
    for site in reversed(dictionary.sites.outputs):
        name = site.hookpoint
        if site.stop - site.start == lm.d_model and not name.startswith(inner) and not name.endswith(":in"):
            return site
    return None


class Facts(NamedTuple):
    """What the table of latents is made of, besides the collector's."""

    examples: Examples
    peaks: np.ndarray
    languages: dict[int, str | None]
    logits: _Logits
    tokens: TopTokens
    relations: Relations
    place: Map


def _write_latents(connection: duckdb.DuckDBPyConnection, run: Pass, one: Followed, facts: Facts) -> None:
    found, examples, tokens = one.collector, facts.examples, facts.tokens
    d_sae, n_bins = found.d_sae, run.config.n_bins
    shown = examples.kind < 2
    latent = examples.latent[shown]
    n_shown = np.bincount(latent, minlength=d_sae)
    pairs = np.unique(latent.astype(np.int64) << 32 | facts.peaks[shown])
    n_distinct = np.bincount(pairs >> 32, minlength=d_sae)
    language, share = _commonest_language(latent, examples.document[shown], facts.languages, n_shown)
    total = found.total[:, None]
    shares = np.divide(tokens.mass, total, out=np.zeros(tokens.mass.shape), where=total > 0)
    dead = found.n_active == 0
    bands = np.arange(0, d_sae * N_PLACES + 1, N_PLACES)
    density, mean = found.by_place()
    insert(
        connection,
        "latents",
        {
            "id": np.arange(d_sae, dtype=np.int32),
            "density": found.n_active / max(found.n_tokens, 1),
            "n_active": found.n_active,
            "max_act": found.largest,
            "mean_act": found.mean().astype(np.float32),
            "top_token": np.ma.masked_array(tokens.tokens[:, 0], dead),
            "top_token_share": np.ma.masked_array(shares[:, 0], dead),
            "n_distinct_tokens": np.ma.masked_array(n_distinct, dead),
            "language": language,
            "language_share": share,
            "histogram": lists(np.arange(0, d_sae * n_bins + 1, n_bins), found.histogram(n_bins).ravel()),
            "position_density": lists(bands, density.astype(np.float32).ravel()),
            "position_mean": lists(bands, mean.astype(np.float32).ravel()),
            "decoder_norm": facts.logits.norms,
            "logit_mean": facts.logits.mean,
            "logit_std": facts.logits.std,
            "top_neuron": facts.relations.neurons[:, 0].astype(np.int32),
            "cluster": np.ma.masked_array(facts.place.cluster, facts.place.cluster < 0),
            "x": _known(facts.place.places[:, 0]),
            "y": _known(facts.place.places[:, 1]),
            **{name: _known(values) for name, values in facts.relations.columns.items()},
        },
    )
    at, rank = np.nonzero(tokens.tokens >= 0)
    token, n_active = tokens.tokens[at, rank], tokens.n_active[at, rank].astype(np.int64)
    insert(
        connection,
        "top_tokens",
        {
            "latent": at.astype(np.int32),
            "rank": rank.astype(np.int32),
            "token": token,
            "share": shares[at, rank],
            "n_active": n_active,
            "n_seen": found.occurrences[token],
            "mean_act": (tokens.mass[at, rank] / np.maximum(n_active, 1)).astype(np.float32),
        },
    )


def _known(values: np.ndarray) -> np.ma.MaskedArray[Any, Any]:
    """Numbers as a column in which NaN is missing."""
    return np.ma.masked_array(values.astype(np.float32), np.isnan(values))


def _write_map(
    connection: duckdb.DuckDBPyConnection, run: Pass, one: Followed, found: Relations, top_tokens: np.ndarray
) -> Map:
    """The map of the living latents, and the table of its groups."""
    d_sae = one.dictionary.d_sae
    nothing = Map(np.full((d_sae, 2), np.nan, np.float32), np.full(d_sae, -1, np.int32))
    own = [near for near in found.neighbours if near.kind == "decoder" and near.dictionary is None]
    if not run.config.map or not own:
        return nothing
    directions = one.dictionary.decoder_directions().detach().float().cpu().numpy()
    made = make_map(directions, own[0], one.collector.n_active > 0, run.config.seed)
    groups = named(made.cluster, top_tokens, run.lm.token_text)
    if groups:
        offsets = np.concatenate(([0], np.cumsum([len(group.tokens) for group in groups])))
        insert(
            connection,
            "clusters",
            {
                "id": np.arange(len(groups), dtype=np.int32),
                "label": [group.label for group in groups],
                "n_latents": np.array([group.n_latents for group in groups], np.int32),
                "tokens": lists(offsets, np.array([t for group in groups for t in group.tokens], np.int32)),
            },
        )
    return made


def _write_relations(
    connection: duckdb.DuckDBPyConnection, run: Pass, one: Followed, found: Relations
) -> int:
    """Neighbours, partners, neurons and history; returns on how many tokens pairs were counted."""
    for near in found.neighbours:
        d_sae, n = near.others.shape
        insert(
            connection,
            "neighbours",
            {
                "latent": np.repeat(np.arange(d_sae, dtype=np.int32), n),
                "kind": pa.array([near.kind] * (d_sae * n), pa.string()),
                "dictionary": pa.array([near.dictionary] * (d_sae * n), pa.string()),
                "rank": np.tile(np.arange(n, dtype=np.int32), d_sae),
                "other": near.others.ravel().astype(np.int32),
                "cosine": near.cosines.ravel().astype(np.float32),
            },
        )
    d_sae, n = found.neurons.shape
    insert(
        connection,
        "neurons",
        {
            "latent": np.repeat(np.arange(d_sae, dtype=np.int32), n),
            "rank": np.tile(np.arange(n, dtype=np.int32), d_sae),
            "neuron": found.neurons.ravel().astype(np.int32),
            "weight": found.weights.ravel().astype(np.float32),
            "share": (found.weights.ravel() ** 2).astype(np.float32),
        },
    )
    n_kept, d_sae = found.history.cosines.shape
    insert(
        connection,
        "history",
        {
            "latent": np.tile(np.arange(d_sae, dtype=np.int32), n_kept),
            "step": np.repeat(found.history.steps, d_sae),
            "cosine": found.history.cosines.ravel(),
            "norm": found.history.norms.ravel(),
        },
    )
    together = strongest(*one.pairs.read(), d_sae, run.config.n_coactive)
    at, rank = np.nonzero(together.others >= 0)
    insert(
        connection,
        "coactive",
        {
            "latent": at.astype(np.int32),
            "rank": rank.astype(np.int32),
            "other": together.others[at, rank],
            "n_both": together.n_both[at, rank],
            "expected": together.expected[at, rank],
            "phi": together.phi[at, rank],
        },
    )
    return together.n_tokens


def _commonest_language(
    latent: np.ndarray, document: np.ndarray, languages: dict[int, str | None], n_shown: np.ndarray
) -> tuple[list[str | None], np.ma.MaskedArray[Any, Any]]:
    """Each latent's commonest known language among its examples, and the share of all its examples in it."""
    names = sorted({name for name in languages.values() if name})
    d_sae = n_shown.shape[0]
    if not names:
        return [None] * d_sae, _nothing(d_sae)
    number = {name: i for i, name in enumerate(names)}
    code = np.array([number.get(languages.get(int(d)) or "", -1) for d in document])
    counts = np.zeros((d_sae, len(names)), np.int64)
    np.add.at(counts, (latent[code >= 0], code[code >= 0]), 1)
    best = counts.argmax(1)
    most = counts[np.arange(d_sae), best]
    share = np.ma.masked_array(most / np.maximum(n_shown, 1), most == 0)
    return [names[b] if m else None for b, m in zip(best, most, strict=True)], share


def _write_tokens(connection: duckdb.DuckDBPyConnection, run: Pass, used: np.ndarray) -> None:
    """The tokens that occur in the contexts, the logits, or as a latent's top tokens; -1 is none."""
    ids = used[used >= 0].tolist()
    insert(
        connection,
        "tokens",
        {
            "id": np.array(ids, np.int32),
            "text": [run.lm.token_text(i) for i in ids],
            "bytes": [run.lm.token_bytes(i) for i in ids],
        },
    )


def _nothing(n: int) -> np.ma.MaskedArray[Any, Any]:
    """A column of n missing numbers."""
    return np.ma.masked_array(np.zeros(n, np.float32), np.ones(n, bool))
