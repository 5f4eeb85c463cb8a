"""What a pass found, written as an atlas database. Knows the atlas's schema; runs no model but its unembedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from sememe.atlas import create, insert, lists, set_meta
from sememe.collect import Examples
from sememe.collect.loops import extremes
from sememe.dictionaries import Dictionary
from sememe.interpret.stream import Pass
from sememe.lm import LanguageModel
from sememe.text import attributions

__all__ = ["residual_directions", "write_database"]

KINDS = np.array(["top", "decile", "random"])
N_TOP_TOKENS = 5


def write_database(path: Path, run: Pass, about: dict[str, Any]) -> None:
    """Everything the pass found, as an atlas database."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".wal").unlink(missing_ok=True)
    examples = run.collector.examples(run.config.n_decile)
    connection = create(path)
    try:
        connection.execute("BEGIN")
        shown = _write_contexts(connection, run, examples)
        documents = _write_documents_table(connection, run, shown.documents)
        logits = _write_logits(connection, run)
        _write_latents(connection, run, examples, shown.peaks, documents, logits)
        _write_tokens(connection, run, np.union1d(shown.tokens, logits.tokens))
        config = run.config
        set_meta(
            connection,
            {
                "dictionary": about,
                "text": {
                    "n_tokens": run.collector.n_tokens,
                    "n_rows": run.collector.n_rows,
                    "n_documents": int(run.document_ids().shape[0]),
                },
                "context_length": run.policy.context_length,
                "window": [config.before, config.after],
                "histogram_edges": [(i + 1) / config.n_bins for i in range(config.n_bins)],
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


def _write_logits(connection: duckdb.DuckDBPyConnection, run: Pass) -> _Logits:
    """Each latent's direct effect on the output, where it writes to the residual stream."""
    directions = run.dictionary.decoder_directions().detach().float()
    norms = directions.norm(dim=1).cpu().numpy()
    d_sae = directions.shape[0]
    residual = residual_directions(run.dictionary, run.lm, directions)
    mean, std = _nothing(d_sae), _nothing(d_sae)
    if residual is None:
        return _Logits(norms, mean, std, np.zeros(0, np.int64))
    n = min(run.config.n_logits, run.lm.vocab_size)
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
                },
            )
            tokens = np.union1d(tokens, ids[sign])
    return _Logits(norms, mean, std, tokens)


def residual_directions(
    dictionary: Dictionary, lm: LanguageModel, directions: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "d_sae d_model"] | None:
    """The part of each decoder direction that is added to the residual stream, at the last such output; or None."""
    assert dictionary.sites is not None
    inner = ("attn_z", "mlp_act", "mlp_in")
    for site in reversed(dictionary.sites.outputs):
        name = site.hookpoint
        if site.stop - site.start == lm.d_model and not name.startswith(inner) and not name.endswith(":in"):
            return directions[:, site.start : site.stop]
    return None


def _write_latents(
    connection: duckdb.DuckDBPyConnection,
    run: Pass,
    examples: Examples,
    peaks: np.ndarray,
    languages: dict[int, str | None],
    logits: _Logits,
) -> None:
    found = run.collector
    d_sae, n_bins = found.d_sae, run.config.n_bins
    shown = examples.kind < 2
    latent = examples.latent[shown]
    n_shown = np.bincount(latent, minlength=d_sae)
    pairs = np.unique(latent.astype(np.int64) << 32 | peaks[shown])
    n_distinct = np.bincount(pairs >> 32, minlength=d_sae)
    language, share = _commonest_language(latent, examples.document[shown], languages, n_shown)
    tokens, mass = found.top_tokens(N_TOP_TOKENS)
    shares = np.divide(mass, found.total[:, None], out=np.zeros(mass.shape), where=found.total[:, None] > 0)
    dead = found.n_active == 0
    insert(
        connection,
        "latents",
        {
            "id": np.arange(d_sae, dtype=np.int32),
            "density": found.n_active / max(found.n_tokens, 1),
            "n_active": found.n_active,
            "max_act": found.largest,
            "mean_act": found.mean().astype(np.float32),
            "top_token": np.ma.masked_array(tokens[:, 0], dead),
            "top_token_share": np.ma.masked_array(shares[:, 0], dead),
            "n_distinct_tokens": np.ma.masked_array(n_distinct, dead),
            "language": language,
            "language_share": share,
            "histogram": lists(np.arange(0, d_sae * n_bins + 1, n_bins), found.histogram(n_bins).ravel()),
            "decoder_norm": logits.norms,
            "logit_mean": logits.mean,
            "logit_std": logits.std,
        },
    )
    at, rank = np.nonzero(tokens >= 0)
    insert(
        connection,
        "top_tokens",
        {
            "latent": at.astype(np.int32),
            "rank": rank.astype(np.int32),
            "token": tokens[at, rank],
            "share": shares[at, rank],
        },
    )


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
    """The tokens that occur in the contexts, the logits, or as a latent's top tokens."""
    tokens, _ = run.collector.top_tokens(N_TOP_TOKENS)
    ids = np.union1d(used, tokens[tokens >= 0]).tolist()
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
