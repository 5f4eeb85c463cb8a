"""The verb that says in words when each latent fires, without a language model, and how well the words hold.

For every latent the smallest rule over the current token, the one before it, and kinds of tokens (script, case,
digits, punctuation, white space, code) that tells its active tokens from its silent ones. Rules are found on some
documents of the atlas and scored on the others. Knows an atlas and nothing of models; the atlas is not changed.

    config.py    the options
    classes.py   kinds of tokens
    loops.py     finding and scoring rules
    words.py     rules in words
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sememe import artifact
from sememe.atlas import EXPLANATIONS, Atlas, labels, open_atlas
from sememe.errors import TextError
from sememe.explain import loops
from sememe.explain.classes import CLASSES, NOTHING, SPECIAL, classes_of
from sememe.explain.config import ExplainConfig
from sememe.explain.words import Rule, as_json, in_words
from sememe.progress import track

__all__ = ["ExplainConfig", "Explanations", "explain", "side_of"]

VERSION = 1
N_RECENT = 8
N_CONDITIONS = 2
CHUNK = 256


class Explanations:
    """Finished explanations of an atlas's latents."""

    def __init__(self, folder: artifact.Artifact) -> None:
        self.artifact = folder

    @property
    def summary(self) -> dict[str, Any]:
        """Mean score and its nulls, each with a 95% interval over latents, and how many latents have a label."""
        summary: dict[str, Any] = self.artifact.extra["summary"]
        return summary

    def labels(self) -> dict[int, str]:
        """What each labelled latent stands for."""
        return labels(self.artifact.path)

    def rows(self) -> list[dict[str, Any]]:
        """One row per latent; the columns are those of docs/explain.md."""
        rows: list[dict[str, Any]] = pq.read_table(self.artifact.file(EXPLANATIONS)).to_pylist()
        return rows

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{value['mean']:.3f}</td>"
            f"<td>{value['low']:.3f} to {value['high']:.3f}</td></tr>"
            for name, value in self.summary.items()
            if "mean" in (value if isinstance(value, dict) else ())
        )
        return (
            f"<table><caption>Sememe explanations: {self.summary['n_labelled']:,} of {self.summary['n_scored']:,} "
            f"latents have a label</caption><tr><th></th><th>mean</th><th>95% interval</th></tr>{rows}</table>"
        )


def explain(config: ExplainConfig, *, fresh: bool = False) -> Explanations:
    """Explain every latent of an atlas, or open the explanations if they are there.

    Args:
        config: Which atlas, and how rules are found and scored.
        fresh: Replace whatever stands at config.out.

    Raises:
        ArtifactError: config.atlas is not an atlas.
        TextError: its examples do not come from documents on both sides of the split.
    """
    folder = artifact.load(config.atlas, "atlas")
    parents = {"atlas": folder.fingerprint}
    identity = artifact.identity_of("explanations", VERSION, config, parents)
    if not fresh and (found := artifact.find(config.out, "explanations", identity)):
        return Explanations(found)
    atlas = open_atlas(config.atlas)
    try:
        examples = _read(atlas, config)
        with artifact.building(
            config.out, kind="explanations", version=VERSION, config=config, parents=parents, fresh=fresh
        ) as work:
            table, work.extra["summary"] = _explain(examples, config)
            pq.write_table(table, work.path / EXPLANATIONS)
    finally:
        atlas.close()
    return Explanations(artifact.load(config.out, "explanations"))


def side_of(key: str, test_fraction: float, seed: int) -> int:
    """0 where a document with this key is for finding rules, 1 where it is for scoring them."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int(int.from_bytes(digest, "big") / 2**64 < test_fraction)


# -- reading an atlas ----------------------------------------------------------------------------------


class _Examples(NamedTuple):
    """An atlas's examples as arrays, ordered by latent, and its contexts' tokens place by place."""

    d_sae: int
    latent_ptr: np.ndarray
    window: tuple[np.ndarray, ...]
    """contexts, starts, stops, offsets, positions, acts, is_random: one entry per example."""
    side: np.ndarray
    document: np.ndarray
    place: tuple[Any, ...]
    """ctx, skip, usable; then current, previous, classes of each place."""
    tokens: dict[int, str]


def _read(atlas: Atlas, config: ExplainConfig) -> _Examples:
    d_sae = int(atlas.meta["dictionary"]["d_sae"])
    table = atlas.table(
        "SELECT latent, kind = 'random' AS is_random, context, start, stop, document, positions, acts FROM examples "
        "ORDER BY latent, kind, decile, rank, context, position"
    )
    column = {name: table[name].combine_chunks() for name in table.column_names}
    number = {
        name: column[name].to_numpy(zero_copy_only=False)
        for name in ("latent", "context", "start", "stop", "document")
    }
    is_random = column["is_random"].to_numpy(zero_copy_only=False)
    offsets = column["positions"].offsets.to_numpy().astype(np.int64)
    positions, acts = (column[name].values.to_numpy() for name in ("positions", "acts"))
    documents, dense = np.unique(number["document"], return_inverse=True)
    keys = _document_keys(atlas)
    side_of_document = np.array(
        [side_of(keys.get(int(d), str(d)), config.test_fraction, config.seed) for d in documents], np.int8
    )
    n_sides = len(set(side_of_document.tolist()))
    if n_sides < 2:
        raise TextError(
            "the atlas must hold examples from documents on both sides of the split",
            f"{documents.shape[0]} documents, all on one side",
            "Make the atlas over more text, or change test_fraction.",
        )
    tokens = {
        row["id"]: (row["text"], row["bytes"]) for row in atlas.query("SELECT id, text, bytes FROM tokens")
    }
    return _Examples(
        d_sae,
        np.searchsorted(number["latent"], np.arange(d_sae + 1)),
        (number["context"], number["start"], number["stop"], offsets, positions, acts, is_random),
        side_of_document[dense],
        dense.astype(np.int64),
        _places(atlas, {i: raw for i, (_, raw) in tokens.items()}),
        {i: text for i, (text, _) in tokens.items()},
    )


def _document_keys(atlas: Atlas) -> dict[int, str]:
    """The whole document that each stored one was cut from: a book's chapters lie on one side of the split."""
    return {row["id"]: row["key"] for row in atlas.query("SELECT id, key FROM document_keys")}


def _places(atlas: Atlas, raw: dict[int, bytes]) -> tuple[Any, ...]:
    """Each place's token, the one before it in the same document, and the classes of both and of the last few."""
    table = atlas.table("SELECT id, token_ids, doc_ids FROM contexts ORDER BY id")
    lists = [table[name].combine_chunks() for name in ("token_ids", "doc_ids")]
    ctx = int(atlas.meta["context_length"])
    ids, docs = (column.values.to_numpy().reshape(-1, ctx) for column in lists)
    known = np.array(sorted(raw))
    classes = np.array([classes_of(bytes(raw[i])) for i in known.tolist()], np.int64)
    current_bits = classes[np.searchsorted(known, ids)]
    same = np.zeros(ids.shape, bool)
    same[:, 1:] = docs[:, 1:] == docs[:, :-1]
    previous = np.full(ids.shape, -1, np.int32)
    previous[:, 1:] = np.where(same[:, 1:], ids[:, :-1], -1)
    previous_bits = np.full(ids.shape, 1 << NOTHING, np.int64)
    previous_bits[:, 1:] = np.where(same[:, 1:], current_bits[:, :-1], 1 << NOTHING)
    recent_bits = np.zeros(ids.shape, np.int64)
    for back in range(1, N_RECENT + 1):
        near = docs[:, back:] == docs[:, :-back]
        recent_bits[:, back:] |= np.where(near, current_bits[:, :-back], 0)
    policy = atlas.meta.get("policy") or {}
    usable = docs >= 0
    if policy.get("drop_special", True):
        usable &= (current_bits >> SPECIAL & 1) == 0
    bits = np.stack([current_bits.ravel(), previous_bits.ravel(), recent_bits.ravel()], axis=1)
    skip = int(policy.get("drop_positions", 0))
    return ctx, skip, usable.ravel(), ids.astype(np.int32).ravel(), previous.ravel(), bits


# -- finding and scoring -------------------------------------------------------------------------------


class _Rules(NamedTuple):
    family: np.ndarray
    items: np.ndarray
    n_items: np.ndarray
    base: np.ndarray
    conditions: np.ndarray

    @classmethod
    def empty(cls, n: int, max_tokens: int) -> _Rules:
        conditions = np.full((n, N_CONDITIONS, 3), -1, np.int64)
        zeros = np.zeros(n, np.int64)
        return cls(
            zeros, np.zeros((n, max_tokens), np.int64), zeros.copy(), np.full(n, -1, np.int64), conditions
        )

    def rule(self, latent: int) -> Rule:
        items = tuple(int(item) for item in self.items[latent, : self.n_items[latent]])
        conditions = tuple(
            (int(w), int(c), bool(n)) for w, c, n in self.conditions[latent].tolist() if w >= 0
        )
        return Rule(int(self.family[latent]), items, int(self.base[latent]), conditions)


def _fit(
    examples: _Examples, config: ExplainConfig, shuffle_seed: int, name: str
) -> tuple[_Rules, np.ndarray, np.ndarray]:
    """Every latent's rule, its gain on the documents it was found on, and how many active tokens those held."""
    rules = _Rules.empty(examples.d_sae, config.max_tokens)
    gain, n_on = np.zeros(examples.d_sae), np.zeros(examples.d_sae, np.int64)
    ctx, skip, usable, current, previous, classes = examples.place
    with track(name, examples.d_sae, "latents") as progress:
        for start in range(0, examples.d_sae, CHUNK):
            part = slice(start, min(start + CHUNK, examples.d_sae))
            # Latents of one chunk are seeded by their place in it; the chunk's own number keeps them apart.
            seed = -1 if shuffle_seed < 0 else (shuffle_seed + 104_729 * start) % (1 << 30)
            loops.fit(
                examples.latent_ptr[part.start : part.stop + 1], *examples.window, examples.side, examples.document,
                ctx, skip, usable, current, previous, classes, config.max_tokens, config.min_gain, seed,
                *(array[part] for array in rules), gain[part], n_on[part],
            )  # fmt: skip
            progress.advance(part.stop - part.start)
    return rules, gain, n_on


class _Scores(NamedTuple):
    gain: np.ndarray
    """Hit rate minus false-alarm rate: 2 AUROC - 1. NaN where the held-out documents leave nothing to score on."""
    correlation: np.ndarray
    n_on: np.ndarray


def _score(examples: _Examples, rules: _Rules, rule_of: np.ndarray, shuffle_seed: int = -1) -> _Scores:
    gain, correlation = np.full(examples.d_sae, np.nan), np.full(examples.d_sae, np.nan)
    n_on = np.zeros(examples.d_sae, np.int64)
    ctx, skip, usable, current, previous, classes = examples.place
    loops.score(
        examples.latent_ptr, *examples.window, examples.side, ctx, skip, usable, current, previous, classes,
        shuffle_seed, rule_of, *rules, gain, correlation, n_on,
    )  # fmt: skip
    return _Scores(gain, correlation, n_on)


def _explain(examples: _Examples, config: ExplainConfig) -> tuple[pa.Table, dict[str, Any]]:
    own = np.arange(examples.d_sae)
    rules, train_gain, n_train = _fit(examples, config, -1, "explain")
    found = _score(examples, rules, own)
    shuffled_rules, _, _ = _fit(examples, config, config.seed, "explain: shuffled")
    shuffled = _score(examples, shuffled_rules, own, config.seed + 1)
    other = _score(examples, rules, _strangers(n_train > 0, config.seed))
    scored = ~np.isnan(found.gain) & (n_train > 0)
    rows = [rules.rule(latent) for latent in range(examples.d_sae)]
    words = [in_words(rule, examples.tokens) for rule in rows]
    good = scored & (np.nan_to_num(found.gain) >= config.label_score)
    n_documents = [_count_documents(examples, side) for side in (0, 1)]

    def number(values: np.ndarray) -> pa.Array:
        return pa.array(values.astype(np.float32), mask=~scored)

    table = pa.table(
        {
            "latent": own.astype(np.int32),
            "label": pa.array(
                [text if ok else None for text, ok in zip(words, good, strict=True)], pa.string()
            ),
            "rule_words": pa.array(words, pa.string()),
            "rule": pa.array([_json(rule, examples.tokens) for rule in rows], pa.string()),
            "score": number(found.gain),
            "auroc": number((found.gain + 1) / 2),
            "correlation": number(found.correlation),
            "auroc_train": number((train_gain + 1) / 2),
            "auroc_shuffled": number((shuffled.gain + 1) / 2),
            "auroc_other": number((other.gain + 1) / 2),
            "n_train": n_train,
            "n_test": found.n_on,
            "n_train_documents": n_documents[0],
            "n_test_documents": n_documents[1],
        }
    )
    rng = np.random.default_rng(config.seed)
    summary: dict[str, Any] = {
        "n_scored": int(scored.sum()),
        "n_labelled": int(good.sum()),
        "kinds": _tally(rows, good),
    }
    figures = {
        "score": found.gain,
        "score_shuffled": shuffled.gain,
        "score_other": other.gain,
        "lift": found.gain - np.fmax(shuffled.gain, other.gain),
        "correlation": found.correlation,
    }
    for name, values in figures.items():
        summary[name] = _interval(values[scored], config.n_bootstrap, rng)
    return table, summary


def _json(rule: Rule, tokens: dict[int, str]) -> str | None:
    data = as_json(rule, tokens)
    return None if data is None else json.dumps(data, ensure_ascii=False)


def _strangers(has_rule: np.ndarray, seed: int) -> np.ndarray:
    """For each latent another one, chosen at random among those with a rule; itself if there is no other."""
    out = np.arange(has_rule.shape[0])
    ids = np.flatnonzero(has_rule)
    order = np.random.default_rng(seed).permutation(ids)
    out[order] = np.roll(order, 1)
    return out


def _count_documents(examples: _Examples, side: int) -> np.ndarray:
    """How many documents each latent's windows on one side come from."""
    latent = np.repeat(np.arange(examples.d_sae), np.diff(examples.latent_ptr))
    on_side = examples.side == side
    pairs = np.unique(latent[on_side].astype(np.int64) << 32 | examples.document[on_side])
    return np.bincount(pairs >> 32, minlength=examples.d_sae)


def _tally(rules: list[Rule], good: np.ndarray) -> dict[str, int]:
    """How many labelled latents each kind of token explains: by the rule's class, or by what its tokens are."""
    counts: dict[str, int] = {}
    for rule, ok in zip(rules, good, strict=True):
        if not ok:
            continue
        if rule.base >= 0:
            name = CLASSES[rule.base]
        elif rule.items:
            many = "a token" if len(rule.items) == 1 else "several tokens"
            name = {1: many, 2: f"{many} before", 3: "a pair of tokens"}[rule.family]
        else:
            name = "a context"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _interval(values: np.ndarray, n: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean and 95% percentile bootstrap interval over latents."""
    values = values[~np.isnan(values)]
    if not values.size:
        return {"mean": 0.0, "low": 0.0, "high": 0.0}
    means = [float(values[rng.integers(0, values.size, values.size)].mean()) for _ in range(n)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
