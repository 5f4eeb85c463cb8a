"""A small atlas whose every number follows from its own text: each latent is a rule over tokens.

A latent fires on its favourite tokens, with strengths drawn once per occurrence; densities, histograms, examples and
deciles are computed from those activations. The vocabulary holds what breaks pages: markup, NUL, overrides of the
writing direction, half letters, a token of 10,000 letters.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sememe import artifact
from sememe.atlas import DATABASE, EXPLANATIONS, create
from sememe.config import Config

NASTY: list[bytes] = [
    b"<script>alert(1)</script>",
    b"</td>",
    b"<img src=x onerror=alert(1)>",
    "\u202eesrever".encode(),  # right-to-left override
    "zero\u200bwidth".encode(),
    b"nul\x00byte",
    b"\x07",
    b"\n",
    b"\n\n",
    b"\t",
    b"    ",
    "👩‍🚀".encode(),
    b"\xe6\x97",  # the first two bytes of 日
    b"\xa5",  # its last byte
    b"\xff",
    "\ufeff".encode(),
    " שלום".encode(),
    "日本".encode(),
    "\u2028".encode(),
    b"${1+1}",
    b"a" * 10_000,
    "ﷺ".encode(),
    "\ufe0f".encode(),  # a variation selector
    "\u0301".encode(),  # an accent without a letter
]
WORDS = [
    "the", "of", "and", "to", "in", "is", "was", "for", "on", "with", "as", "by", "at", "from", "it",
    "an", "be", "are", "this", "which", "or", "had", "not", "but", "have", "one", "their", "were",
    "all", "they", "its", "also", "can", "new", "year", "first", "two", "time", "after", "when",
    "there", "more", "used", "into", "some", "other", "may", "over", "such", "only", "most", "city",
    "river", "music", "water", "people", "house", "world", "state", "school", "small", "large",
    "number", "light", "system", "history", "army", "king", "queen", "red", "green", "blue", "white",
    "black", "seven", "three", "bread", "salt", "sugar", "onion", "butter", "minutes", "oven", "stir",
    "return", "def", "self", "None", "import",
]  # fmt: skip
VOCABULARY: list[bytes] = [
    *NASTY,
    *(f" {word}".encode() for word in WORDS),
    b".",
    b",",
    b"(",
    b")",
    b"2024",
    b"<|endoftext|>",
]
LANGUAGES = ["en", "de", "ja", None]
LATENTS = (
    "id", "density", "n_active", "max_act", "mean_act", "top_token", "top_token_share", "n_distinct_tokens",
    "language", "language_share", "histogram", "decoder_norm", "logit_mean", "logit_std", "position_density",
    "position_mean",
)  # fmt: skip
WINDOW = (8, 4)
N_BINS = 20
DICTIONARY = "d1c7" * 16


class SyntheticConfig(Config):
    """What the atlas was made from."""

    n_latents: int = 300
    """Rows of the atlas."""
    n_contexts: int = 160
    """Token rows."""
    context_length: int = 48
    """Tokens in a row."""
    seed: int = 0
    """Of everything random."""


def build(path: Path, config: SyntheticConfig | None = None) -> artifact.Artifact:
    """An atlas at `path`."""
    config = config or SyntheticConfig()
    with artifact.building(
        path, kind="atlas", version=1, config=config, parents={"dictionary": DICTIONARY}
    ) as work:
        _fill(work.path / DATABASE, config)
    return artifact.load(path, "atlas")


def build_explanations(
    path: Path, atlas: artifact.Artifact, labels: dict[int, str | None]
) -> artifact.Artifact:
    """Explanations of some of the atlas's latents."""
    parents = {"atlas": atlas.fingerprint}
    with artifact.building(
        path, kind="explanations", version=1, config=SyntheticConfig(), parents=parents
    ) as work:
        table = pa.table(
            {"latent": pa.array(labels.keys(), pa.int32()), "label": pa.array(labels.values(), pa.string())}
        )
        pq.write_table(table, work.path / EXPLANATIONS)
    return artifact.load(path, "explanations")


def build_report(path: Path, dictionary: str = DICTIONARY) -> artifact.Artifact:
    """A report in the shape that `evaluate` writes."""

    def figures(fvu: float, ce: float) -> dict[str, dict[str, float | None]]:
        values = {"fvu": fvu, "l0": 31.9, "frac_alive": 0.96, "ce_recovered_zero": ce, "kl": 1 - ce}
        intervals = {"fvu": {"low": fvu * 0.9, "high": fvu * 1.1}}
        return {
            name: {"value": value, **intervals.get(name, {"low": None, "high": None})}
            for name, value in values.items()
        }

    parents = {"dictionary": dictionary}
    with artifact.building(path, kind="report", version=1, config=SyntheticConfig(), parents=parents) as work:
        report = {
            "format_version": 1,
            "metrics": figures(0.12, 0.98),
            "nulls": {"pca": figures(0.3, 0.8), "untrained": figures(0.7, 0.4)},
        }
        artifact.write_json(work.path / "report.json", report)
    return artifact.load(path, "report")


def build_all(folder: Path, config: SyntheticConfig, labels: dict[int, str | None]) -> dict[str, Path]:
    """An atlas with everything that may stand beside it: their folders by kind."""
    build_explanations(folder / "explanations", build(folder / "atlas", config), labels)
    build_report(folder / "report")
    return {name: folder / name for name in ("atlas", "explanations", "report")}


def token_stream(config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and document ids, both (n_contexts, context_length). Half letters stand side by side, as in life."""
    rng = np.random.default_rng(config.seed)
    weights = 1.0 / (1.0 + np.arange(len(VOCABULARY)))
    weights[: len(NASTY)] = 0.02
    shape = (config.n_contexts, config.context_length)
    ids = rng.choice(len(VOCABULARY), size=shape, p=weights / weights.sum()).astype(np.int32)
    ids[:, 10], ids[:, 11] = NASTY.index(b"\xe6\x97"), NASTY.index(b"\xa5")
    documents = np.repeat(
        np.arange(config.n_contexts, dtype=np.int32)[:, None] * 2, config.context_length, axis=1
    )
    documents[:, config.context_length * 3 // 4 :] += 1  # packed rows: a second document begins
    documents[0, -4:] = -1  # and one row ends in padding
    return ids, documents


def _fill(path: Path, config: SyntheticConfig) -> None:
    ids, documents = token_stream(config)
    rng = np.random.default_rng(config.seed + 1)
    flat, flat_documents = ids.ravel(), documents.ravel()
    where = [np.flatnonzero((flat == token) & (flat_documents >= 0)) for token in range(len(VOCABULARY))]
    n_tokens = int((flat_documents >= 0).sum())
    latents: list[tuple] = []
    top_tokens: list[tuple] = []
    logits: list[tuple] = []
    examples: list[tuple] = []
    for latent in range(config.n_latents):
        dead = latent % 25 == 24
        favourites = rng.choice(len(VOCABULARY), size=int(rng.integers(1, 5)), replace=False)
        if latent < len(NASTY):
            favourites[0] = latent
        places = (
            np.empty(0, dtype=np.int64) if dead else np.sort(np.concatenate([where[t] for t in favourites]))
        )
        acts = np.round(rng.gamma(2.0, 1.5, size=len(places)), 4).astype(np.float32) + np.float32(0.01)
        latents.append(_latent(latent, flat, flat_documents, places, acts, n_tokens, rng))
        mass = np.bincount(flat[places], weights=acts, minlength=1)
        ranked = [int(token) for token in np.argsort(-mass, kind="stable")[:5] if mass[token] > 0]
        top_tokens += [
            (latent, rank, token, mass[token] / mass.sum(), 1, 1, float(mass[token]))
            for rank, token in enumerate(ranked)
        ]
        for sign in (1, -1):
            tokens = [int(favourites[0])] if sign == 1 else []
            tokens += [int(t) for t in rng.permutation(len(VOCABULARY)) if t not in tokens][
                : 12 - len(tokens)
            ]
            values = sorted(rng.uniform(0.1, 3.0, size=12), reverse=True)
            logits += [
                (latent, sign, rank, token, sign * value)
                for rank, (token, value) in enumerate(zip(tokens, values, strict=True))
            ]
        examples += _examples(latent, config, flat_documents, places, acts, rng)
    connection = create(path)
    meta = {
        "dictionary": {
            "name": "synthetic <b>topk</b>",
            "kind": "topk",
            "d_in": 64,
            "d_sae": config.n_latents,
            "hookpoint": "resid_post.8",
            "model": "synthetic-1m",
            "fingerprint": "0" * 64,
        },
        "text": {"n_tokens": n_tokens, "n_rows": config.n_contexts, "n_documents": 2 * config.n_contexts},
        "context_length": config.context_length,
        "window": list(WINDOW),
        "histogram_edges": [(i + 1) / N_BINS for i in range(N_BINS)],
        "attributions": [
            {
                "source": "wiki",
                "title": "A wiki & more",
                "licence": "CC BY-SA 4.0",
                "url": "https://example.org/wiki",
                "notice": "Text by its <authors>.",
            },
            {
                "source": "evil",
                "title": "Script link",
                "licence": "none",
                "url": "javascript:alert(1)",
                "notice": None,
            },
        ],
        "report": {"fvu": 0.1234, "l0": 31.9, "frac_alive": 0.96, "ce_recovered_zero": 0.987, "kl": 0.0213},
    }
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in meta.items()]
    )
    lossy = [raw.decode("utf-8", errors="replace") for raw in VOCABULARY]
    _insert(connection, "tokens", [(i, lossy[i], raw) for i, raw in enumerate(VOCABULARY)])
    _insert(
        connection,
        "documents",
        [
            (
                i,
                ("wiki", "books")[i % 2],
                LANGUAGES[i % len(LANGUAGES)],
                f"Document <i>{i}</i>" if i % 3 else None,
                json.dumps({"n": str(i)}),
            )
            for i in range(2 * config.n_contexts)
        ],
    )
    _insert(
        connection,
        "contexts",
        [(i, ids[i].tolist(), documents[i].tolist()) for i in range(config.n_contexts)],
    )
    _insert(connection, "latents", latents, LATENTS)
    _insert(connection, "top_tokens", top_tokens)
    _insert(connection, "logits", logits, ("latent", "sign", "rank", "token", "value"))
    _insert(connection, "examples", examples)
    connection.close()


def _insert(connection, table: str, rows: list[tuple], names: tuple[str, ...] | None = None) -> None:
    names = names or tuple(row[0] for row in connection.execute(f"DESCRIBE {table}").fetchall())
    rows_table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    connection.register("rows_table", rows_table)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM rows_table")
    connection.unregister("rows_table")


def _latent(latent, flat, flat_documents, places, acts, n_tokens, rng) -> tuple:
    if not len(places):
        return (
            latent,
            0.0,
            0,
            0.0,
            0.0,
            None,
            None,
            0,
            None,
            None,
            [0] * N_BINS,
            1.0,
            0.0,
            float(rng.uniform(0.1, 1)),
            [0.0] * 16,
            [0.0] * 16,
        )
    mass = np.bincount(flat[places], weights=acts)
    counts, _ = np.histogram(acts, bins=N_BINS, range=(0, float(acts.max())))
    spoken = [LANGUAGES[d % len(LANGUAGES)] for d in flat_documents[places]]
    named = [language for language in spoken if language is not None]
    language = max(set(named), key=lambda x: (named.count(x), x)) if named else None
    return (
        latent,
        len(places) / n_tokens,
        len(places),
        float(acts.max()),
        float(acts.mean()),
        int(mass.argmax()),
        float(mass.max() / mass.sum()),
        len(np.unique(flat[places])),
        language,
        named.count(language) / len(spoken) if language else None,
        counts.tolist(),
        float(rng.uniform(0.5, 2)),
        0.0,
        float(rng.uniform(0.1, 1)),
        [len(places) / n_tokens] * 16,
        [float(acts.sum()) / n_tokens] * 16,
    )


def _examples(latent, config, flat_documents, places, acts, rng) -> list[tuple]:
    length = config.context_length
    activation = dict(zip(places.tolist(), acts.tolist(), strict=True))

    def window(place: int, kind: str, decile: int | None, rank: int, act: float) -> tuple:
        context, position = divmod(place, length)
        own = np.flatnonzero(
            flat_documents[context * length : (context + 1) * length] == flat_documents[place]
        )
        start, stop = max(own[0], position - WINDOW[0]), min(own[-1] + 1, position + WINDOW[1] + 1)
        start, stop = int(start), int(stop)
        inside = [p for p in range(start, stop) if context * length + p in activation]
        values = [activation[context * length + p] for p in inside]
        document = int(flat_documents[place])
        return (latent, kind, decile, rank, context, position, start, stop, document, act, inside, values)

    out: list[tuple] = []
    seen: set[int] = set()
    order = np.argsort(-acts, kind="stable")
    for i in order:
        if (document := int(flat_documents[places[i]])) not in seen and len(seen) < 12:
            out.append(window(int(places[i]), "top", None, len(seen), float(acts[i])))
            seen.add(document)
    ascending = order[::-1]
    for decile in range(10):
        members = ascending[len(ascending) * decile // 10 : len(ascending) * (decile + 1) // 10][:2]
        for rank, i in enumerate(members):
            out.append(window(int(places[i]), "decile", decile, rank, float(acts[i])))
    silent = np.setdiff1d(np.arange(1, config.n_contexts), places // length)
    for rank, context in enumerate(rng.permutation(silent)[:4].tolist() if len(places) else []):
        out.append(window(context * length + length // 2, "random", None, rank, 0.0))
    return out
