"""An atlas of latents that follow known rules, without a model: what the tests of `explain` stand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from sememe import artifact
from sememe.atlas import DATABASE, create, insert, lists, set_meta
from sememe.collect import Collector
from sememe.config import Config
from sememe.explain.lexical.classes import CLASSES, classes_of

# Words, numbers, marks and letters of several scripts; a document is a random sequence of them.
VOCABULARY = [
    " the", " river", " king", " stone", " and", " house", "ing", "ed", " water", " light",
    " 7", " 1984", "42", " 300", " 12", ",", ".", " (", ")", "\n",
    " река", " дом", " вода", " камень", " Fluss", " über", " König", " def", "()", " self._x",
    " 水", "の", "カ", " House", " NATO", " x", " –", "“", "%", "  ",
]  # fmt: skip
ID = {text: i for i, text in enumerate(VOCABULARY)}
CTX, N_DOCUMENTS = 64, 120


def _is(name: str) -> set[int]:
    return {i for i, text in enumerate(VOCABULARY) if classes_of(text.encode()) >> CLASSES.index(name) & 1}


def planted(ids: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """For each planted latent, where it is active: the rules that `explain` should find again."""
    previous = np.roll(ids, 1, axis=1)
    previous[:, 0] = -1
    return [
        ids == ID[" king"],
        np.isin(ids, [ID[" the"], ID["ing"], ID["カ"]]),
        np.isin(ids, list(_is("a number"))),
        np.isin(ids, list(_is("Cyrillic letters"))),
        (previous == ID[" the"]),
        (ids == ID[" river"]) & (previous == ID[" and"]),
        np.isin(ids, [ID[" stone"], ID[" light"]]) & np.isin(previous, list(_is("a number"))),
        rng.random(ids.shape) < 0.05,
        np.zeros(ids.shape, bool),
        np.isin(previous, list(_is("a number"))),
    ]


class PlantedConfig(Config):
    """What the atlas was made from."""

    seed: int = 0
    """Of everything random."""
    n_documents: int = N_DOCUMENTS
    """One per row."""


class Planted(NamedTuple):
    path: Path
    ids: np.ndarray
    active: list[np.ndarray]


def plant(path: Path, n_documents: int = N_DOCUMENTS, pieces: int = 1) -> Planted:
    """An atlas of latents that follow known rules, made by the collector from their activations."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(VOCABULARY), (n_documents, CTX)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = ID[" the"]
    ids[:, 1:][(ids[:, :-1] == ID[" and"]) & (rng.random((n_documents, CTX - 1)) < 0.4)] = ID[" river"]
    docs = np.repeat(np.arange(n_documents, dtype=np.int32), CTX).reshape(n_documents, CTX)
    active = planted(ids, rng)
    keep = np.ones(ids.shape, bool)
    keep[:, 0] = False
    dense = np.stack([np.where(on & keep, rng.gamma(3, 1, ids.shape), 0) for on in active], axis=2)
    flat = dense[keep].astype(np.float32)
    rows, latents = np.nonzero(flat)
    ptr = np.searchsorted(rows, np.arange(flat.shape[0] + 1))
    found = Collector(len(active), n_top=20, n_reservoir=200, n_random=10, before=20, after=10)
    found.add(latents, flat[rows, latents], ptr, keep, ids, docs)
    examples = found.examples(3)
    with artifact.building(
        path, kind="atlas", version=1, config=PlantedConfig(n_documents=n_documents), parents={}
    ) as work:
        connection = create(work.path / DATABASE)
        set_meta(
            connection,
            {
                "dictionary": {
                    "name": "planted",
                    "kind": "topk",
                    "d_in": 8,
                    "d_sae": len(active),
                    "hookpoint": "resid_post.0",
                },
                "text": {"n_tokens": int(keep.sum()), "n_rows": n_documents, "n_documents": n_documents},
                "context_length": CTX,
                "policy": {"drop_positions": 1, "drop_special": True},
            },
        )
        raw = [text.encode() for text in VOCABULARY]
        insert(
            connection,
            "tokens",
            {"id": np.arange(len(raw), dtype=np.int32), "text": VOCABULARY, "bytes": raw},
        )
        numbers = np.arange(n_documents, dtype=np.int32)
        insert(
            connection,
            "document_keys",
            {"id": numbers, "key": [f"book {i // pieces}" for i in range(n_documents)]},
        )
        offsets = np.arange(0, ids.size + 1, CTX)
        insert(
            connection,
            "contexts",
            {
                "id": numbers,
                "token_ids": lists(offsets, ids.ravel()),
                "doc_ids": lists(offsets, docs.ravel()),
            },
        )
        kinds = np.array(["top", "decile", "random"])
        insert(
            connection,
            "examples",
            {
                "latent": examples.latent, "kind": kinds[examples.kind],
                "decile": np.ma.masked_array(examples.decile, examples.decile < 0), "rank": examples.rank,
                "context": examples.row, "position": examples.position, "start": examples.start,
                "stop": examples.stop, "document": examples.document, "act": examples.act,
                "positions": lists(examples.offsets, examples.positions),
                "acts": lists(examples.offsets, examples.acts),
            },
        )  # fmt: skip
        share = np.array([on[keep].mean() for on in active])
        n = len(active)
        insert(
            connection,
            "latents",
            {
                "id": np.arange(n, dtype=np.int32), "density": share, "n_active": (share * keep.sum()).astype(int),
                "max_act": np.ones(n, np.float32), "mean_act": np.ones(n, np.float32),
                "histogram": lists(np.arange(n + 1), np.ones(n, np.int64)), "decoder_norm": np.ones(n, np.float32),
            },
        )  # fmt: skip
        # Each latent promotes four tokens of its own, and demotes its neighbour's.
        promoted = [(latent, sign, rank, 4 * ((latent + (sign < 0)) % n) + rank)
                    for latent in range(n) for sign in (1, -1) for rank in range(4)]  # fmt: skip
        columns = np.array(promoted).T
        insert(
            connection,
            "logits",
            dict(zip(("latent", "sign", "rank", "token"), columns, strict=True))
            | {"value": columns[1] * 1.0},
        )
        connection.close()
    return Planted(path, ids, active)


def edit(path: Path, *statements: tuple[str, list[object]]) -> None:
    """Change an atlas with SQL and make its hashes true again."""
    database = path / DATABASE
    connection = duckdb.connect(str(database))
    for sql, parameters in statements:
        connection.execute(sql, parameters)
    connection.close()
    meta = json.loads((path / "meta.json").read_text())
    meta["files"][DATABASE] = {"bytes": database.stat().st_size, "sha256": artifact.file_sha256(database)}
    (path / "meta.json").write_text(json.dumps(meta))


TUNED = "INSERT INTO logits SELECT * REPLACE ((token + 1) % 40 AS token, 'tuned' AS lens) FROM logits"
"""What makes it an atlas of two lenses, which agree on three of a latent's four tokens."""
