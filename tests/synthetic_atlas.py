"""A small atlas whose every number follows from its own text: each latent is a rule over tokens.

A latent fires on its favourite tokens, with strengths drawn once per occurrence; densities, histograms, examples and
deciles are computed from those activations. The vocabulary holds what breaks pages: markup, NUL, overrides of the
writing direction, half letters, a token of 10,000 letters.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sememe import artifact
from sememe.atlas import DATABASE, EFFECTS, EXPLANATIONS, REMOVALS, create
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
    "position_mean", "bias", "encoder_decoder_cosine", "max_cos", "mcs", "self_similarity", "skew", "kurtosis",
    "n_effective_neurons", "top_neuron", "top_neuron_share", "outlier_share", "cluster", "x", "y",
)  # fmt: skip
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
    n_top: int = 12
    """Largest activations of each latent."""
    window: tuple[int, int] = (8, 4)
    """Tokens of an example before and after its peak."""
    n_random: int = 4
    """Silent windows."""
    n_decile: int = 2
    """Examples from each tenth."""
    n_bins: int = 20
    """Bars of the histogram of activations."""


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
        n = len(labels)
        table = pa.table(
            {
                "latent": pa.array(labels.keys(), pa.int32()),
                "label": pa.array(labels.values(), pa.string()),
                "label_from": pa.array(["rule" if i % 2 else "model" for i in range(n)]),
                "explanation": pa.array([None if i % 2 else f"in <i>words</i> {i}" for i in range(n)]),
                "rule_words": pa.array([f"a rule <b>{i}</b>" for i in range(n)]),
                "category": pa.array(["words </td>"] * n),
                "score": pa.array([0.2 + 0.6 * i / max(n - 1, 1) for i in range(n)], pa.float32()),
                "auroc": pa.array([0.6] * n, pa.float32()),
            }
        )
        pq.write_table(table, work.path / EXPLANATIONS)
        rows = [
            (latent, scorer, variant, decile, None if score is None else score + 0.01 * i, 50)
            for i, latent in enumerate(labels)
            for scorer, variant, decile, score in (
                ("detection", "windows", None, 0.5),
                *(("detection", "windows", d, 0.1 * d) for d in range(10)),
                ("lexical", "score", None, 0.4),
                ("lexical", "shuffled", None, 0.0),
                ("simulation", "top_only", None, None),
            )
        ]
        names = ("latent", "scorer", "variant", "decile", "score", "n")
        types = (pa.int32(), pa.string(), pa.string(), pa.int8(), pa.float64(), pa.int32())
        pq.write_table(
            pa.table({name: pa.array([row[i] for row in rows], types[i]) for i, name in enumerate(names)}),
            work.path / "scores.parquet",
        )
        clusters = pa.table({"cluster": pa.array([0], pa.int32()), "explanation": ["<u>water</u> words"]})
        pq.write_table(clusters, work.path / "clusters.parquet")
        vectors = np.eye(4, dtype=np.float32)[np.arange(n) % 4]
        embeddings = {
            "latent": pa.array(labels.keys(), pa.int32()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4),
        }
        pq.write_table(pa.table(embeddings), work.path / "embeddings.parquet")
        whole = {"mean": 0.5, "low": 0.4, "high": 0.6, "n_latents": n}
        work.extra["summary"] = {
            "scorers": [
                {"scorer": "detection", "variant": "windows", **whole},
                {"scorer": "lexical", "variant": "shuffled", **whole},
            ],
            "lifts": [
                {
                    "scorer": "detection", "variant": "windows", "lift": 0.3, "low": 0.2, "high": 0.4,
                    "best_null": "random_directions",
                    "nulls": {"random_directions": {"mean": 0.2}, "<b>evil</b>": {"mean": 0.1}},
                }
            ],
        }  # fmt: skip
    return artifact.load(path, "explanations")


def build_report(
    path: Path, dictionary: str = DICTIONARY, fvu: float = 0.12, l0: float = 31.9
) -> artifact.Artifact:
    """A report in the shape that `evaluate` writes."""

    def figures(fvu: float, ce: float) -> dict[str, dict[str, float | None]]:
        values = {"fvu": fvu, "l0": l0, "frac_alive": 0.96, "ce_recovered_zero": ce, "kl": 1 - ce}
        intervals = {"fvu": {"low": fvu * 0.9, "high": fvu * 1.1}}
        return {
            name: {"value": value, **intervals.get(name, {"low": None, "high": None})}
            for name, value in values.items()
        }

    parents = {"dictionary": dictionary}
    with artifact.building(path, kind="report", version=1, config=SyntheticConfig(), parents=parents) as work:
        report = {
            "format_version": 1,
            "metrics": figures(fvu, 0.98),
            "nulls": {"pca": figures(0.3, 0.8), "untrained": figures(0.7, 0.4)},
        }
        artifact.write_json(work.path / "report.json", report)
    return artifact.load(path, "report")


def build_effects(path: Path, atlas: artifact.Artifact, latents: list[int]) -> artifact.Artifact:
    """Effects of some latents: the loss changes by what the activation says, tokens before the peak matter less the
    farther they are."""
    connection = duckdb.connect(str(atlas.path / DATABASE), read_only=True)
    rows = connection.execute(
        "SELECT latent, kind, decile, rank, context, position, start, act, token_ids FROM examples "
        "JOIN contexts ON contexts.id = context WHERE kind = 'top' AND list_contains(?, latent) ORDER BY ALL",
        [latents],
    ).fetchall()
    connection.close()
    output = pa.list_(pa.struct([("token", pa.int32()), ("text", pa.string()), ("change", pa.float32())]))
    effects: dict[str, list] = {}
    removals: dict[str, list] = {}
    for latent, kind, decile, rank, context, position, start, act, tokens in rows:
        values = {
            "latent": latent, "kind": kind, "decile": decile, "rank": rank, "context": context,
            "position": position, "act": act, "loss": 2.5, "loss_change": 0.5 - 0.1 * rank if rank < 11 else None,
            "loss_change_after": 0.25, "n_after": 2, "kl": 0.05, "logit_change": 0.1 * rank - 0.75,
            "raised": [{"token": 10**6, "text": "</script><b>up", "change": 0.75}],
            "lowered": [{"token": 0, "text": "\u202edown", "change": -1.5}],
        }  # fmt: skip
        for name, value in values.items():
            effects.setdefault(name, []).append(value)
        for removed in range(start, position if rank < 2 else start):
            gone = {
                "latent": latent, "rank": rank, "context": context, "position": position, "removed": removed,
                "token": tokens[removed], "act": act, "act_without": act * (1 - 1 / (1 + position - removed)),
            }  # fmt: skip
            for name, value in gone.items():
                removals.setdefault(name, []).append(value)
    parents = {"atlas": atlas.fingerprint}
    with artifact.building(
        path, kind="effects", version=1, config=SyntheticConfig(), parents=parents
    ) as work:
        types = {"raised": output, "lowered": output, "decile": pa.int8(), "loss_change": pa.float32()}
        table = pa.table({name: pa.array(values, types.get(name)) for name, values in effects.items()})
        pq.write_table(table, work.path / EFFECTS)
        pq.write_table(pa.table(removals), work.path / REMOVALS)
    return artifact.load(path, "effects")


def build_prompts(folder: Path) -> Path:
    """Views of two texts, as `sememe prompt --out` writes them; every latent up to 40 fires on some token."""
    folder.mkdir(parents=True)
    for which, text in enumerate((" river <b>", "日 bread")):
        tokens, rows = [], []
        pieces = [" river", "<script>alert(1)</script>", " bread", "\u202eesrever", "unseen </td>"]
        for position, piece in enumerate(pieces):
            raw = piece.encode()
            token = VOCABULARY.index(raw) if raw in VOCABULARY else 10**6
            last = position == len(pieces) - 1
            tokens.append(
                {
                    "position": position, "token": token, "text": piece, "kept": position > 0,
                    "n_active": position * 8 if position else None, "loss_of_next": None if last else 1.5,
                }
            )  # fmt: skip
            for i in range(position * 8):
                rows.append(
                    {
                        "position": position, "text": piece, "latent": position * 8 + i, "act": 8.0 - 0.2 * i,
                        "writes": 1.0, "share_of_max": 0.5, "quantile": 0.9, "density": 0.01, "label": None,
                        "loss_change": None if last else 0.125 * (1 - 2 * which), "loss_change_after": None,
                        "n_after": 0, "kl": 0.5, "raised": [{"token": 3, "text": "<i>up</i>", "change": 0.5}],
                        "lowered": [],
                    }
                )  # fmt: skip
        view = {
            "prompt": text, "model": "synthetic-1m", "hookpoints": ["resid_post.8"], "dictionary": "d",
            "tokens": tokens, "rows": rows, "ablated": True,
        }  # fmt: skip
        artifact.write_json(folder / f"{which}.json", view)
    return folder


def build_all(folder: Path, config: SyntheticConfig, labels: dict[int, str | None]) -> dict[str, Any]:
    """An atlas with everything that may stand beside it: their folders by kind."""
    atlas = build(folder / "atlas", config)
    build_explanations(folder / "explanations", atlas, labels)
    build_effects(folder / "effects", atlas, [5, 30, 31])
    build_prompts(folder / "prompts")
    build_report(folder / "report")
    found: dict[str, Any] = {name: folder / name for name in ("atlas", "explanations", "report", "effects")}
    return found | {"prompts": (folder / "prompts",)}


def scale(path: Path, times: int) -> None:
    """Make an atlas so many times larger by repeating its latents under new numbers: for benchmarks, where building
    100,000 of them one by one would take minutes. Its hashes are made true again."""
    connection = duckdb.connect(str(path / DATABASE))
    n = connection.execute("SELECT max(id) + 1 FROM latents").fetchall()[0][0]
    copies = f"range(1, {times}) AS r(copy)"
    connection.execute(
        f"INSERT INTO latents SELECT l.* REPLACE (id + {n} * copy AS id, density * (0.5 + random()) AS density, "
        f"x + 3 * cos(copy) * sqrt(copy) AS x, y + 3 * sin(copy) * sqrt(copy) AS y) FROM latents l, {copies}"
    )
    for table in ("logits", "logit_histograms", "top_tokens", "examples", "neurons"):
        connection.execute(
            f"INSERT INTO {table} SELECT t.* REPLACE (latent + {n} * copy AS latent) FROM {table} t, {copies}"
        )
    for table in ("neighbours", "coactive"):
        connection.execute(
            f"INSERT INTO {table} SELECT t.* REPLACE (latent + {n} * copy AS latent, other + {n} * copy AS other) "
            f"FROM {table} t, {copies}"
        )
    connection.execute("CHECKPOINT")
    connection.close()
    meta = json.loads((path / "meta.json").read_text())
    database = path / DATABASE
    meta["files"][DATABASE] = {"bytes": database.stat().st_size, "sha256": artifact.file_sha256(database)}
    (path / "meta.json").write_text(json.dumps(meta))


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
        latents.append(_latent(config, latent, flat, flat_documents, places, acts, n_tokens, rng))
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
        "logit_edges": [i / 4 - 5 for i in range(41)],
        "position_edges": [(i + 1) * config.context_length // 16 for i in range(16)],
        "coactive_tokens": n_tokens,
        "window": list(config.window),
        "histogram_edges": [(i + 1) / config.n_bins for i in range(config.n_bins)],
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
    bell = [int(8000 * math.exp(-((i - 19.5) ** 2) / 32)) for i in range(40)]
    _insert(connection, "logit_histograms", [(latent, "logit", bell) for latent in range(config.n_latents)])
    _insert(connection, "examples", examples)
    for table, rows in _related(config, rng).items():
        _insert(connection, table, rows)
    sizes = [
        sum(1 for i in range(config.n_latents) if i % 25 != 24 and i % 5 and i % 6 == c) for c in range(6)
    ]
    _insert(connection, "clusters", [(c, f"“group <s>{c}</s>”", sizes[c], [c]) for c in range(6)])
    connection.close()


def _insert(connection, table: str, rows: list[tuple], names: tuple[str, ...] | None = None) -> None:
    names = names or tuple(row[0] for row in connection.execute(f"DESCRIBE {table}").fetchall())
    rows_table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    connection.register("rows_table", rows_table)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM rows_table")
    connection.unregister("rows_table")


def _latent(config, latent, flat, flat_documents, places, acts, n_tokens, rng) -> tuple:
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
            [0] * config.n_bins,
            1.0,
            0.0,
            float(rng.uniform(0.1, 1)),
            [0.0] * 16,
            [0.0] * 16,
            *_shape(config, latent, dead=True),
        )
    mass = np.bincount(flat[places], weights=acts)
    counts, _ = np.histogram(acts, bins=config.n_bins, range=(0, float(acts.max())))
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
        *_shape(config, latent, dead=False),
    )


def _shape(config, latent, *, dead: bool) -> tuple:
    """Bias to outlier_share, then cluster (none of every fifth) and the place in one of six clouds."""
    rng = np.random.default_rng((config.seed, latent))
    cloud = latent % 6
    place = (None, None) if dead else (cloud % 3 * 4 + rng.normal(), cloud // 3 * 5 + rng.normal())
    aligned = latent % 10 == 3
    return (
        -0.1, 0.9, float(rng.uniform(0, 1)), float(rng.uniform(0, 1)), 1 - 0.001 * (latent % 100), 0.1,
        40.0 if aligned else 3.0, 1.5 if aligned else 30.0, latent % 64, 0.8 if aligned else 0.1, 0.05,
        None if dead or latent % 5 == 0 else cloud, *(None if v is None else float(v) for v in place),
    )  # fmt: skip


def _related(config: SyntheticConfig, rng: np.random.Generator) -> dict[str, list[tuple]]:
    """Rows of the tables that say what a latent has to do with others."""
    n = config.n_latents
    out: dict[str, list[tuple]] = {"neighbours": [], "coactive": [], "neurons": [], "history": []}
    for latent in range(n):
        for kind, dictionary, count in (
            ("decoder", None, 12),
            ("encoder", None, 12),
            ("decoder", "other <i>", 3),
        ):
            for rank in range(count):
                other = (latent + 6 * (rank + 1)) % n
                out["neighbours"].append((latent, kind, dictionary, rank, other, float(0.9 / (rank + 1))))
        for rank in range(8):
            expected, phi = float(rng.uniform(1, 9)), float(0.6 / (rank + 1))
            out["coactive"].append((latent, rank, (latent + rank + 1) % n, 20 - rank, expected, phi))
        for rank in range(5):
            out["neurons"].append(
                (latent, rank, (latent + rank) % 64, 0.9 / (rank + 1), 0.81 / (rank + 1) ** 2)
            )
        for i, cosine in enumerate((-0.1, 0.3, 0.6, 0.9)):
            out["history"].append((latent, 10**i, cosine * (latent + 1) / n, 1.0 + i))
    return out


def _examples(latent, config, flat_documents, places, acts, rng) -> list[tuple]:
    length = config.context_length
    activation = dict(zip(places.tolist(), acts.tolist(), strict=True))

    def window(place: int, kind: str, decile: int | None, rank: int, act: float) -> tuple:
        context, position = divmod(place, length)
        own = np.flatnonzero(
            flat_documents[context * length : (context + 1) * length] == flat_documents[place]
        )
        start, stop = (
            max(own[0], position - config.window[0]),
            min(own[-1] + 1, position + config.window[1] + 1),
        )
        start, stop = int(start), int(stop)
        inside = [p for p in range(start, stop) if context * length + p in activation]
        values = [activation[context * length + p] for p in inside]
        document = int(flat_documents[place])
        return (latent, kind, decile, rank, context, position, start, stop, document, act, inside, values)

    out: list[tuple] = []
    seen: set[int] = set()
    order = np.argsort(-acts, kind="stable")
    for i in order:
        if (document := int(flat_documents[places[i]])) not in seen and len(seen) < config.n_top:
            out.append(window(int(places[i]), "top", None, len(seen), float(acts[i])))
            seen.add(document)
    ascending = order[::-1]
    for decile in range(10):
        members = ascending[len(ascending) * decile // 10 : len(ascending) * (decile + 1) // 10][
            : config.n_decile
        ]
        for rank, i in enumerate(members):
            out.append(window(int(places[i]), "decile", decile, rank, float(acts[i])))
    silent = np.setdiff1d(np.arange(1, config.n_contexts), places // length)
    for rank, context in enumerate(
        rng.permutation(silent)[: config.n_random].tolist() if len(places) else []
    ):
        out.append(window(context * length + length // 2, "random", None, rank, 0.0))
    return out
