"""The atlas on disk: a DuckDB database with everything known about a dictionary's latents on a text.

Schema and access only. Knows how an atlas is laid out and how to read it; does not fill one (`interpret.py`
does) and never loads torch, so that the browser's server can import it.

All activations are in raw units. Where a dictionary's activations are signed, everything is ranked, summed and
counted by absolute value, and only `examples.act` and `examples.acts` keep the sign. Activations of a context are
stored sparsely: two lists of equal length, `positions` (offsets into the context's tokens) and `acts`.

An atlas does not change. What is found out later stands in artifacts of its own beside it (`explain` makes one of
kind "explanations", `effects` one of kind "effects"; parquet files) and is joined when the atlas is opened.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from sememe import artifact
from sememe.errors import ArtifactError, CorruptError, MismatchError

__all__ = [
    "DATABASE",
    "EFFECTS",
    "EFFECTS_SCHEMA",
    "EXPLANATIONS",
    "NULL_DICTIONARY",
    "RANDOMISED",
    "REMOVALS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "VARIANT_OF",
    "Atlas",
    "create",
    "dictionary_of",
    "insert",
    "labels",
    "lists",
    "open_atlas",
    "read_notes",
    "set_meta",
    "words_score",
]

DATABASE = "atlas.duckdb"
EXPLANATIONS = "explanations.parquet"
EFFECTS, REMOVALS = "effects.parquet", "removals.parquet"
NULL_DICTIONARY = "dictionary"
"""The folder in a null's atlas that holds the null: a dictionary like any other."""
RANDOMISED = "randomised"
"""The null that is the dictionary itself, on the model with its layers' weights shuffled by the atlas's seed."""
SCHEMA_VERSION = 2
VARIANT_OF = {
    "simulation": "top_and_random",
    "detection": "windows",
    "fuzzing": "highlights",
    "embedding": "cosine",
    "generation": "auroc",
}
"""Scorers of explanations that read a model's words, the one that stands for them first, each with the variant of its
score that is meant where one number is wanted."""

SCHEMA = """
-- One row per fact about the whole: value is JSON. Keys: schema_version, dictionary (name, kind, d_in, d_sae,
-- hookpoint, model, fingerprint), text (n_tokens, n_rows, n_documents), context_length, window (before, after),
-- histogram_edges (list: upper edges are max_act * edge), position_edges (upper edges of the bands of positions),
-- coactive_tokens (how many tokens pairs were counted on), lenses (those of `logits`), attributions (list of {source,
-- title, licence, url, notice}), report (headline numbers, when known). A null's dictionary says `null`, its name.
CREATE TABLE meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);

-- The model's tokens that occur anywhere in this atlas. `text` is for people (may hold U+FFFD), `bytes` is exact.
CREATE TABLE tokens (id INTEGER PRIMARY KEY, text VARCHAR NOT NULL, bytes BLOB NOT NULL);

-- Where the text came from.
CREATE TABLE documents (id INTEGER PRIMARY KEY, source VARCHAR NOT NULL, language VARCHAR, title VARCHAR,
    tags VARCHAR NOT NULL);                             -- tags: a JSON object

-- Which whole document each of them was cut from: pieces of one share the key. Who splits examples splits by this.
CREATE TABLE document_keys (id INTEGER PRIMARY KEY, key VARCHAR NOT NULL);

-- Token rows, stored once; only those an example refers to. doc_ids holds the document of each token (-1: padding).
CREATE TABLE contexts (id INTEGER PRIMARY KEY, token_ids INTEGER[] NOT NULL, doc_ids INTEGER[] NOT NULL);

-- One row per latent, dead ones too.
CREATE TABLE latents (
    id INTEGER PRIMARY KEY,
    density DOUBLE NOT NULL,            -- share of kept tokens on which it is active
    n_active BIGINT NOT NULL,           -- that as a count
    max_act FLOAT NOT NULL,             -- largest activation (0 if dead)
    mean_act FLOAT NOT NULL,            -- mean over its active tokens (0 if dead)
    top_token INTEGER,                  -- the token on which its total activation is largest
    top_token_share DOUBLE,             -- the share of its activation mass on that token
    n_distinct_tokens INTEGER,          -- among the tokens of its kept examples' peaks
    language VARCHAR, language_share DOUBLE,   -- the commonest `language` of its kept examples' documents
    histogram BIGINT[] NOT NULL,        -- counts of active tokens between 0 and max_act, see meta.histogram_edges
    position_density FLOAT[],           -- share of the kept tokens in each band of positions on which it is active,
    position_mean FLOAT[],              -- and its mean activation over them, silent ones as 0; see meta.position_edges
    decoder_norm FLOAT NOT NULL,
    bias FLOAT,                         -- its encoder bias; NULL where the dictionary has none
    encoder_decoder_cosine FLOAT,       -- NULL where it reads elsewhere than it writes
    max_cos FLOAT,                      -- cosine of its decoder direction to the nearest other of this dictionary
    mcs FLOAT,                          -- to the nearest of the other dictionaries that were looked at, if any
    self_similarity FLOAT,              -- to itself at the last but one kept checkpoint, if there are any
    skew FLOAT, kurtosis FLOAT,         -- of its decoder direction's entries (normal: 0 and 3)
    n_effective_neurons FLOAT,          -- participation ratio of those entries: 1 is one neuron
    top_neuron INTEGER, top_neuron_share FLOAT, -- the dimension it writes to most, and that one's share of its square
    outlier_share FLOAT,                -- share of its square in the outlier dimensions of the dictionary's directions
    cluster INTEGER,                    -- clusters.id; NULL: in none, or dead
    x FLOAT, y FLOAT,                   -- its place on a map of the decoder directions; NULL if dead
    logit_mean FLOAT, logit_std FLOAT); -- of its direct effect over the vocabulary

-- Groups of decoder directions that lie close together, named by the tokens that most of their latents fire on.
CREATE TABLE clusters (id INTEGER PRIMARY KEY, label VARCHAR NOT NULL, n_latents INTEGER NOT NULL,
    tokens INTEGER[] NOT NULL);

-- The directions nearest to a latent's, of this dictionary (dictionary NULL) or of another that was named. kind:
-- 'decoder' or 'encoder'; rank 0 is the nearest.
CREATE TABLE neighbours (latent INTEGER NOT NULL, kind VARCHAR NOT NULL, dictionary VARCHAR, rank INTEGER NOT NULL,
    other INTEGER NOT NULL, cosine FLOAT NOT NULL);

-- The latents with which it is active on the same tokens, of the whole dictionary, by correlation. n_both of
-- meta.coactive_tokens; `expected` if the two knew nothing of each other.
CREATE TABLE coactive (latent INTEGER NOT NULL, rank INTEGER NOT NULL, other INTEGER NOT NULL, n_both BIGINT NOT NULL,
    expected FLOAT NOT NULL, phi FLOAT NOT NULL);

-- The dimensions ("neurons", where the hookpoint is the inside of an MLP) it writes to most.
CREATE TABLE neurons (latent INTEGER NOT NULL, rank INTEGER NOT NULL, neuron INTEGER NOT NULL,
    weight FLOAT NOT NULL, share FLOAT NOT NULL);       -- weight: of the unit direction; share: its square

-- Its decoder direction at each checkpoint that training kept. No rows without any; no table in some older atlases.
CREATE TABLE history (latent INTEGER NOT NULL, step BIGINT NOT NULL,
    cosine FLOAT NOT NULL,                              -- to the direction of the finished dictionary
    norm FLOAT NOT NULL);                               -- of the direction then

-- Direct effect on the output: decoder direction through final norm and unembedding, minus the vocabulary mean.
-- lens 'logit': the direction itself; 'tuned': as a tuned lens translates it to the last layer, where one was given.
CREATE TABLE logits (latent INTEGER NOT NULL, sign TINYINT NOT NULL, rank INTEGER NOT NULL, token INTEGER NOT NULL,
    value FLOAT NOT NULL,                               -- sign 1: promoted, -1: demoted; rank 0 is the strongest
    lens VARCHAR NOT NULL DEFAULT 'logit');

-- How that is spread over the vocabulary: tokens by standard deviations from the mean (latents.logit_mean, logit_std),
-- in the bins of meta.logit_edges; whatever lies beyond is in the first and last. No table in some older atlases.
CREATE TABLE logit_histograms (latent INTEGER NOT NULL, lens VARCHAR NOT NULL, counts INTEGER[] NOT NULL);

-- The tokens that hold most of its activation: rank 0 is latents.top_token. `share` is of its activation mass; for
-- latents active on more than 192 distinct tokens it may be slightly too small, never too large; so may n_active, on
-- how many of the token's n_seen kept occurrences it is active, and mean_act, its mean over those.
CREATE TABLE top_tokens (latent INTEGER NOT NULL, rank INTEGER NOT NULL, token INTEGER NOT NULL,
    share DOUBLE NOT NULL, n_active BIGINT NOT NULL, n_seen BIGINT NOT NULL, mean_act FLOAT NOT NULL);

-- Where it fired. kind 'top': its largest activations, one per document (its pieces, of one key, together), rank 0 the
-- largest, decile NULL.
-- kind 'decile': from the decile of its non-zero activations (0 lowest .. 9 highest), one per document.
-- kind 'random': a context in which the latent is verified silent in the window; act 0.
-- [start, stop) is the window within the context, clipped to the peak's document; position is the peak;
-- positions/acts are the latent's activations inside the window (absolute offsets into the context).
CREATE TABLE examples (latent INTEGER NOT NULL, kind VARCHAR NOT NULL, decile TINYINT, rank INTEGER NOT NULL,
    context INTEGER NOT NULL, position INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    document INTEGER NOT NULL, act FLOAT NOT NULL, positions INTEGER[] NOT NULL, acts FLOAT[] NOT NULL);
"""

EFFECTS_SCHEMA = """
-- What taking a latent out at one position does to the model's predictions, in nats: one row per example that was
-- ablated. (latent, kind, decile, rank) are those of `examples`. Changes are ablated minus unedited: a loss_change
-- above 0 says that the latent helped. NULL where the document ends: there is no next token to predict.
CREATE TABLE effects (latent INTEGER, kind VARCHAR, decile TINYINT, rank INTEGER, context INTEGER, position INTEGER,
    act FLOAT,                          -- what was taken out, times the decoder direction
    loss FLOAT,                         -- of the true next token, unedited
    loss_change FLOAT,                  -- of that loss
    loss_change_after FLOAT,            -- summed over the next n_after predictions
    n_after INTEGER,                    -- how many there were before the document or the row ended
    kl FLOAT,                           -- from the unedited prediction at the position to the ablated one
    logit_change FLOAT,                 -- of the true next token's logit, minus the mean over the vocabulary
    -- of the likeliest tokens there, those whose log-probability rises most and falls most, the largest first
    raised STRUCT(token INTEGER, "text" VARCHAR, change FLOAT)[],
    lowered STRUCT(token INTEGER, "text" VARCHAR, change FLOAT)[]);

-- What a latent's activation is at its peak when one earlier token of the window is left out of the context and those
-- after it move up: one row per token left out, for the strongest examples (rank as in examples of kind 'top').
CREATE TABLE removals (latent INTEGER, rank INTEGER, context INTEGER, position INTEGER,
    removed INTEGER,                    -- offset of the token into the context
    token INTEGER,                      -- which token that was
    act FLOAT,                          -- at the peak, with the whole context
    act_without FLOAT);                 -- and without the token
"""


class Atlas:
    """A finished atlas, open for reading. `connection` takes any SQL; see docs/atlas.md.

    Args:
        folder: The artifact.
        explanations: Folder of explanations of this atlas; they are joined as the view `explanations`.
        effects: Folder of effects of its latents; they are joined as the views `effects` and `removals`.
        notes: File of what people said of its latents; joined as the view `notes`.
    """

    def __init__(
        self,
        folder: artifact.Artifact,
        explanations: str | Path | None = None,
        effects: str | Path | None = None,
        notes: str | Path | None = None,
    ) -> None:
        self.artifact = folder
        path = folder.file(DATABASE)
        try:
            self.connection = duckdb.connect(str(path), read_only=True)
            rows = self.connection.execute("SELECT key, value FROM meta").fetchall()
            self.meta: dict[str, Any] = {key: json.loads(value) for key, value in rows}
        except (duckdb.Error, ValueError) as error:
            raise CorruptError(
                f"{path} must be an atlas database",
                str(error).splitlines()[0],
                "Delete the folder and run `sememe interpret` again.",
            ) from None
        files: dict[str, Path] = {}
        if explanations is not None:
            child = _child_of(folder, explanations, "explanations", "explain")
            files["explanations"] = child.file(EXPLANATIONS)
        if effects is not None:
            child = _child_of(folder, effects, "effects", "effects")
            files |= {"effects": child.file(EFFECTS), "removals": child.file(REMOVALS)}
        self._notes = None if notes is None else _notes_table(read_notes(notes, self))
        catalogue = str(self.connection.execute("SELECT current_database()").fetchall()[0][0])
        self._views = [_view(name, f"SELECT * FROM {_rows(file)}") for name, file in files.items()]
        self._views.append(_view("latents", _explained(catalogue, files.get("explanations"))))
        if self.meta.get("schema_version") == SCHEMA_VERSION:
            for view in self._views:
                self.connection.execute(view)

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own, so that threads do not disturb each other; views are each connection's own."""
        cursor = self.connection.cursor()
        for view in self._views:
            cursor.execute(view)
        if self._notes is not None:
            cursor.register("notes", self._notes)
        return cursor

    def query(self, sql: str, *parameters: Any) -> list[dict[str, Any]]:
        """Rows of a query as dictionaries."""
        cursor = self._cursor().execute(sql, list(parameters))
        names = [column[0] for column in cursor.description or []]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def table(self, sql: str) -> pa.Table:
        """Rows of a query as an Arrow table, for whoever wants columns."""
        return self._cursor().sql(sql).to_arrow_table()

    def close(self) -> None:
        """Close the database."""
        self.connection.close()

    def _repr_html_(self) -> str:
        """Vital signs, and a handful of latents with the tokens they fire on and the tokens they promote."""
        about, text = self.meta["dictionary"], self.meta["text"]
        n_alive = self.query("SELECT count(*) AS n FROM latents WHERE n_active > 0")[0]["n"]
        rows = {
            "dictionary": f"{about.get('name', '')} ({about.get('kind', '')})",
            "reads": f"{about.get('hookpoint', '')} of {about.get('model', '')}",
            "latents": f"{about['d_sae']:,}, of which {n_alive:,} fired",
            "text": f"{text['n_tokens']:,} tokens of {text['n_documents']:,} documents",
        }
        left = "style='text-align:left'"
        vital = "".join(
            f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(str(value))}</td></tr>"
            for name, value in rows.items()
        )
        head = "".join(f"<th {left}>{name}</th>" for name in ("latent", "density", "fires on", "promotes"))
        lines = "".join(
            f"<tr><td>{row['id']}</td><td>{row['density']:.2%}</td><td {left}>{_tokens(row['peaks'])}</td>"
            f"<td {left}>{_tokens(row['promoted'])}</td></tr>"
            for row in self.query(_HANDFUL)
        )
        return (
            f"<table><caption>Sememe atlas</caption>{vital}</table>"
            f"<table><caption>Latents that fire on few tokens</caption><tr>{head}</tr>{lines}</table>"
        )


# The latents that are easiest to name: those whose activation lies on the fewest tokens, one for each token.
_HANDFUL = """
    WITH focused AS (SELECT id, density, top_token, top_token_share,
            row_number() OVER (PARTITION BY top_token ORDER BY top_token_share DESC, id) AS place
        FROM latents WHERE n_active > 20 AND top_token IS NOT NULL)
    SELECT id, density,
        (SELECT list(text ORDER BY r.rank) FROM top_tokens r JOIN tokens t ON t.id = r.token
            WHERE r.latent = f.id) AS peaks,
        (SELECT list(text ORDER BY l.rank) FROM logits l JOIN tokens t ON t.id = l.token
            WHERE l.latent = f.id AND lens = 'logit' AND sign = 1 AND l.rank < 5) AS promoted
    FROM focused f WHERE place = 1 ORDER BY top_token_share DESC, id LIMIT 8
"""


def _tokens(texts: list[str] | None) -> str:
    return " ".join(f"<code>{html.escape(repr(text)[1:-1])}</code>" for text in texts or [])


def create(path: str | Path) -> duckdb.DuckDBPyConnection:
    """A new, empty atlas database with the current schema."""
    connection = duckdb.connect(str(path))
    connection.execute(SCHEMA)
    set_meta(connection, {"schema_version": SCHEMA_VERSION})
    return connection


def set_meta(connection: duckdb.DuckDBPyConnection, facts: Mapping[str, Any]) -> None:
    """Store facts about the whole; each value becomes JSON."""
    for key, value in facts.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        connection.execute("INSERT INTO meta VALUES (?, ?)", [key, text])


def insert(connection: duckdb.DuckDBPyConnection, table: str, columns: Mapping[str, Any]) -> None:
    """Append rows given as columns (arrays of equal length), without a Python loop over them."""
    incoming = pa.table(
        {name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in columns.items()}
    )
    connection.register("incoming", incoming)
    try:
        connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
    finally:
        connection.unregister("incoming")


def lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    """A column of lists: row i is values[offsets[i]:offsets[i + 1]]."""
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def open_atlas(
    path: str | Path,
    explanations: str | Path | None = None,
    effects: str | Path | None = None,
    notes: str | Path | None = None,
) -> Atlas:
    """Open a finished atlas, with its explanations, effects and notes if they are named.

    Raises:
        ArtifactError: the folder is not an atlas, or of a schema this version does not read.
        CorruptError: the database, or the notes, are damaged.
        MismatchError: the explanations, effects or notes are of another atlas.
    """
    atlas = Atlas(artifact.load(path, "atlas"), explanations, effects, notes)
    found = atlas.meta.get("schema_version")
    if found != SCHEMA_VERSION:
        atlas.close()
        newer = isinstance(found, int) and found > SCHEMA_VERSION
        raise ArtifactError(
            f"the atlas {path} must have schema version {SCHEMA_VERSION}",
            found,
            "Upgrade sememe to read it." if newer else "Run `sememe interpret` again with this version.",
        )
    return atlas


def dictionary_of(atlas: Atlas) -> str:
    """The fingerprint of the dictionary an atlas was made from; of a null's atlas, of the one that it keeps itself.

    Raises:
        MismatchError: it is the atlas of a null, of an earlier version that kept none.
    """
    found = atlas.artifact.meta["parents"].get("dictionary")
    own = atlas.artifact.path / NULL_DICTIONARY
    if found is None and (own / artifact.META).is_file():
        return artifact.load(own, "dictionary").fingerprint
    if found is None:
        raise MismatchError(
            f"the atlas {atlas.artifact.path} must be of a dictionary",
            f"the atlas of a null ({atlas.meta['dictionary'].get('null', 'unknown')})",
            "Run `sememe interpret` again, which keeps a null's dictionary, or name the atlas of a dictionary.",
        )
    return str(found)


def labels(explanations: str | Path) -> dict[int, str]:
    """What each explained latent stands for, from a folder of explanations.

    Raises:
        ArtifactError: the folder does not hold explanations.
    """
    file = artifact.load(explanations, "explanations").file(EXPLANATIONS)
    connection = duckdb.connect()
    try:
        sql = "SELECT latent, label FROM read_parquet(?) WHERE label IS NOT NULL ORDER BY latent"
        return {int(latent): str(label) for latent, label in connection.execute(sql, [str(file)]).fetchall()}
    finally:
        connection.close()


def words_score(scores: Mapping[tuple[str, str], float | None]) -> float | None:
    """The one number that says how well a model's words hold: their first score that is defined.

    Args:
        scores: Of a latent, over all its activations, by scorer and variant; None or NaN where undefined.
    """
    chosen = (scores.get(pair) for pair in VARIANT_OF.items())
    return next((score for score in chosen if score is not None and not math.isnan(score)), None)


def read_notes(path: str | Path, atlas: Atlas) -> dict[str, Any]:
    """What people said of an atlas's latents, from the file that `browse --write` keeps beside it.

    Raises:
        ArtifactError: there is no such file.
        CorruptError: it is not a file of notes.
        MismatchError: it is of another dictionary.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {str(found[of]) for of in ("atlas", "dictionary")}
        assert found["kind"] == "notes" and found["format_version"] == 1
        assert all(latent.isdigit() for latent in found["latents"]), "latents by number"
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} must be a file of notes", "nothing there", "Make some with `sememe browse --write`."
        ) from None
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
        raise CorruptError(
            f"{path} must be a file of notes",
            f"{type(error).__name__}: {error}",
            "Mend it, or move it away.",
        ) from None
    mine = {atlas.artifact.fingerprint, str(atlas.artifact.meta["parents"].get("dictionary"))}
    if not mine & known:
        raise MismatchError(
            f"the notes {path} must be of the dictionary of the atlas {atlas.artifact.path}",
            f"notes of the dictionary {str(found['dictionary'])[:16] or 'unknown'}",
            "Move the file away: it belongs to an atlas that stood here before.",
        )
    return dict(found)


def _notes_table(found: Mapping[str, Any]) -> pa.Table:
    """Notes as rows: latent, star, tags, note, explanation, changed."""
    rows = [(int(latent), note) for latent, note in sorted(found["latents"].items(), key=lambda i: int(i[0]))]
    text = {
        name: pa.array([str(note.get(name, "")) for _, note in rows], pa.string())
        for name in ("note", "explanation", "changed")
    }
    return pa.table(
        {
            "latent": pa.array([latent for latent, _ in rows], pa.int32()),
            "star": pa.array([bool(note.get("star")) for _, note in rows], pa.bool_()),
            "tags": pa.array(
                [[str(tag) for tag in note.get("tags", [])] for _, note in rows], pa.list_(pa.string())
            ),
            **text,
        }
    )


def _view(name: str, select: str) -> str:
    return f"CREATE TEMP VIEW IF NOT EXISTS {name} AS {select}"


def _rows(file: Path) -> str:
    quoted = str(file).replace("'", "''")
    return f"read_parquet('{quoted}')"


def _explained(catalogue: str, explanations: Path | None) -> str:
    """The table of latents with what each stands for, which goes by the bare table's name."""
    latents = f'"{catalogue}".main.latents AS l'
    if explanations is None:
        return f"SELECT l.*, CAST(NULL AS VARCHAR) AS explanation FROM {latents}"
    joined = f"LEFT JOIN {_rows(explanations)} AS e ON e.latent = l.id"
    return f"SELECT l.*, e.label AS explanation FROM {latents} {joined}"


def _child_of(atlas: artifact.Artifact, path: str | Path, kind: str, verb: str) -> artifact.Artifact:
    """An artifact that was made from this atlas."""
    child = artifact.load(path, kind)
    parent = child.meta["parents"].get("atlas", "none")
    if parent != atlas.fingerprint:
        raise MismatchError(
            f"the {kind} {path} must be of the atlas {atlas.path} (fingerprint {atlas.fingerprint[:16]})",
            f"{kind} of {parent[:16]}",
            f"Run `sememe {verb}` on this atlas.",
        )
    return child
