"""Explain an atlas and its nulls, score both alike, and write what was found."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sememe import artifact
from sememe.atlas import EXPLANATIONS, NULL_DICTIONARY, Atlas, labels, open_atlas
from sememe.errors import ConfigError, TextError
from sememe.explain.asked import Facts, Found, ask_about
from sememe.explain.config import ExplainConfig, LexicalConfig
from sememe.explain.examples import EXPLAIN, RANDOM, SCORE, Examples, read
from sememe.explain.lexical import Lexical, find_rules
from sememe.explain.rehearsal import Rehearsal
from sememe.explain.results import SHAPE, Scores, correlations, lifts, mean_of, strata, summarise
from sememe.explain.scorers import Encode, contrasted, generation
from sememe.explain.tables import clusters_table, count_clusters, embeddings_table, latents_table, tally
from sememe.explain.written import Reader
from sememe.figures import write_explanations
from sememe.judge import EndpointConfig, Judge, LocalConfig, Preview, open_judge

__all__ = ["CLUSTERS", "SCORES", "Explanations", "explain", "preview"]

VERSION = 7
SCORES = "scores.parquet"
CLUSTERS = "clusters.parquet"
EMBEDDINGS = "embeddings.parquet"
PAGE = "explanations.md"
N_REMOVALS, LEAST_CHANGE = 3, 0.1
"""Context tokens told of an example, and the least change of its activation for a token to be told."""


class Explanations:
    """Finished explanations of an atlas's latents."""

    def __init__(self, folder: artifact.Artifact) -> None:
        self.artifact = folder

    @property
    def summary(self) -> dict[str, Any]:
        """Means of all scores with 95% intervals over latents, lifts over nulls, and counts; see docs/explain.md."""
        summary: dict[str, Any] = self.artifact.extra["summary"]
        return summary

    def labels(self) -> dict[int, str]:
        """What each labelled latent stands for."""
        return labels(self.artifact.path)

    def rows(self) -> list[dict[str, Any]]:
        """One row per latent; the columns are those of docs/explain.md."""
        rows: list[dict[str, Any]] = pq.read_table(self.artifact.file(EXPLANATIONS)).to_pylist()
        return rows

    def scores(self) -> list[dict[str, Any]]:
        """One row per latent, scorer, variant and decile."""
        rows: list[dict[str, Any]] = pq.read_table(self.artifact.file(SCORES)).to_pylist()
        return rows

    def page(self) -> str:
        """The tables of explanations.md."""
        return self.artifact.file(PAGE).read_text(encoding="utf-8")

    def _repr_html_(self) -> str:
        def cells(row: Mapping[str, Any]) -> str:
            if row["mean"] is None:
                return "<td></td><td></td>"
            return f"<td>{row['mean']:.3f}</td><td>{row['low']:.3f} to {row['high']:.3f}</td>"

        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th>{cells(value)}</tr>"
            for name, value in self.summary.items()
            if isinstance(value, dict) and "mean" in value
        )
        rows += "".join(
            f"<tr><th style='text-align:left'>{row['scorer']}: {row['variant']}</th>{cells(row)}</tr>"
            for row in self.summary["scorers"]
            if row["scorer"] != "lexical"
        )
        return (
            f"<table><caption>Sememe explanations: {self.summary['n_labelled']:,} of {self.summary['n_scored']:,} "
            f"latents have a label</caption><tr><th></th><th>mean</th><th>95% interval</th></tr>{rows}</table>"
        )


def explain(config: ExplainConfig, *, fresh: bool = False, judge: Judge | None = None) -> Explanations:
    """Explain the latents of an atlas, or open the explanations if they are there.

    Nulls are explained first, each into a folder of its own beside config.out. Explanations do not depend on them:
    where finished ones stand beside other nulls than now, the new nulls are scored and the lifts made anew. Every
    answer of a language model is kept when it comes, so a run that was interrupted goes on where it was.

    Args:
        config: Which atlas, who explains, and how words are scored.
        fresh: Replace whatever stands at config.out. Answers that were given before are used again.
        judge: Asked instead of the one that config.explainer names; it must be the same model.

    Raises:
        ArtifactError: config.atlas is not an atlas.
        ConfigError: a latent does not exist.
        JudgeError: the language model cannot be reached, refuses, or costs too much.
        MismatchError: the dictionary or model for the scorer `generation` is not the atlas's.
        TextError: the examples do not come from documents on both sides of the split.
    """
    parents = {"atlas": artifact.load(config.atlas, "atlas").fingerprint}
    if config.effects is not None:
        parents["effects"] = artifact.load(config.effects, "effects").fingerprint
    nulls = _nulls(config)
    against = {name: artifact.load(path, "atlas").fingerprint for name, path in nulls.items()}
    identity = artifact.identity_of("explanations", VERSION, config, parents)
    there = None if fresh else artifact.find(config.out, "explanations", identity, config, parents)
    if there is not None and there.extra["nulls"] == against:
        return Explanations(there)
    wanted = {name: _for_null(config, name, path) for name, path in nulls.items()}
    finished = there is not None and all(artifact.exists(one.out) for one in wanted.values())
    if judge is None and isinstance(config.explainer, (EndpointConfig, LocalConfig)) and not finished:
        judge = open_judge(config.explainer)
    others = {name: explain(one, fresh=fresh, judge=judge) for name, one in wanted.items()}
    if there is None:
        _make(config, parents, against, others, judge, fresh=fresh)
    else:
        _hold_against(there, config, parents, against, others)
    return Explanations(artifact.load(config.out, "explanations"))


def _make(
    config: ExplainConfig,
    parents: Mapping[str, str],
    against: Mapping[str, str],
    others: Mapping[str, Explanations],
    judge: Judge | None,
    *,
    fresh: bool,
) -> None:
    """Explain and score the latents of the atlas, and write the artifact."""
    atlas = open_atlas(config.atlas, effects=config.effects)
    try:
        chosen = _choose(atlas, config)
        encode = _encoder(config)
        reader = Reader(atlas, config.dictionary, config.subject) if config.dictionary is not None else None
        with artifact.building(
            config.out, kind="explanations", version=VERSION, config=config, parents=parents, fresh=fresh
        ) as work:
            made = _explain(chosen, config, judge, encode, reader)
            shape = _shape(atlas, chosen.examples.d_sae)
            clusters = clusters_table(atlas, made.table, judge, config)
            summary = made.summary | {
                "clusters": count_clusters(clusters, judge),
                "lifts": _lifts(made.scores, others, config),
                "no_lift": _no_lift(config),
                "correlations": correlations(made.scores, shape, config.n_bootstrap, config.seed),
            }
            if clusters is not None:
                pq.write_table(clusters, work.path / CLUSTERS)
            pq.write_table(made.table, work.path / EXPLANATIONS)
            pq.write_table(made.scores.table(), work.path / SCORES)
            if encode is not None:
                pq.write_table(embeddings_table(made.table, encode), work.path / EMBEDDINGS)
            _finish(work, summary, against)
    finally:
        atlas.close()


def _hold_against(
    there: artifact.Artifact,
    config: ExplainConfig,
    parents: Mapping[str, str],
    against: Mapping[str, str],
    others: Mapping[str, Explanations],
) -> None:
    """Finished explanations beside other nulls: their tables stay as they are, the lifts are made anew."""
    scores = Scores.of_table(pq.read_table(there.file(SCORES, verify=True)))
    summary = there.extra["summary"] | {
        "lifts": _lifts(scores, others, config),
        "no_lift": _no_lift(config),
    }
    with artifact.building(
        config.out, kind="explanations", version=VERSION, config=config, parents=parents, fresh=True
    ) as work:
        for name in (EXPLANATIONS, SCORES, CLUSTERS, EMBEDDINGS):
            if name in there.meta["files"]:
                shutil.copyfile(there.file(name, verify=True), work.path / name)
        _finish(work, summary, against)


def _finish(work: artifact.Work, summary: dict[str, Any], against: Mapping[str, str]) -> None:
    write_explanations(work.path, summary)
    work.extra |= {"summary": summary, "nulls": dict(against)}


def _lifts(scores: Scores, others: Mapping[str, Explanations], config: ExplainConfig) -> list[dict[str, Any]]:
    null_scores = {
        name.removeprefix("null-"): Scores.of_table(pq.read_table(null.artifact.file(SCORES)))
        for name, null in others.items()
    }
    return lifts(scores, null_scores, config.n_bootstrap, config.seed, without=frozenset(_no_lift(config)))


def _no_lift(config: ExplainConfig) -> dict[str, str]:
    """Scorers for which nulls and dictionary are not treated alike, and why."""
    out: dict[str, str] = {}
    if config.effects is not None:
        why = "the nulls' explainer is not told effects"
        out |= dict.fromkeys([s for s in config.used_scorers if s not in ("intruder", "effect")], why)
    if "generation" in config.used_scorers:
        without = [name for name, path in _nulls(config).items() if _null_dictionary(path) is None]
        if without:
            out["generation"] = f"no dictionary in {' and '.join(without)}, of an earlier version"
    return out


def preview(config: ExplainConfig) -> Preview:
    """What explaining an atlas and its nulls would ask a language model, and cost, at most; nothing is asked.

    Raises:
        ConfigError: no language model would be asked.
    """
    if isinstance(config.explainer, LexicalConfig):
        raise ConfigError(
            "a preview of the cost needs a language model as explainer",
            "lexical",
            "Pass --explainer endpoint.",
        )
    wanted = [config, *(_for_null(config, name, path) for name, path in _nulls(config).items())]
    rehearsal = Rehearsal(open_judge(config.explainer))
    for one in wanted:
        atlas = open_atlas(one.atlas, effects=one.effects)
        try:
            chosen = _choose(atlas, one)
            found = ask_about(chosen.latents, chosen.facts, one, rehearsal, _encoder(one, rehearsal=True))
            clusters_table(atlas, latents_table(chosen.examples, chosen.lexical, found, one), rehearsal, one)
        finally:
            atlas.close()
    return rehearsal.preview()


# -- nulls -----------------------------------------------------------------------------------------------


def _nulls(config: ExplainConfig) -> dict[str, Path]:
    """The atlases of nulls, by folder name."""
    if config.nulls is None:
        found = [path for path in artifact.below(config.atlas) if path.name.startswith("null-")]
    else:
        found = list(config.nulls)
    by_name = {path.name if path.name.startswith("null-") else f"null-{path.name}": path for path in found}
    if len(by_name) < len(found):
        names = " ".join(path.name for path in found)
        raise ConfigError("atlases of nulls must have different folder names", names, "Rename one.")
    return by_name


def _for_null(config: ExplainConfig, name: str, path: Path) -> ExplainConfig:
    """The same for an atlas of a null. Texts are written for its latents where its dictionary was kept."""
    dictionary = _null_dictionary(path) if "generation" in config.used_scorers else None
    scorers = tuple(s for s in config.used_scorers if s != "generation" or dictionary is not None)
    lexical_only = isinstance(config.explainer, LexicalConfig) and not scorers
    n_latents = len(config.latents) if config.latents and not lexical_only else config.n_latents
    fields = ExplainConfig.model_fields
    return config.replace(
        atlas=path,
        out=config.out.with_name(f"{config.out.name}-{name}"),
        nulls=(),
        scorers=scorers,
        latents=(),
        n_latents=fields["n_latents"].default if lexical_only else n_latents,
        effects=None,
        dictionary=dictionary,
        subject=config.subject if dictionary is not None else fields["subject"].default,
    )


def _null_dictionary(atlas: Path) -> Path | None:
    """Where a null's atlas keeps its dictionary; None in atlases of earlier versions."""
    folder = atlas / NULL_DICTIONARY
    return folder if artifact.exists(folder) else None


# -- an atlas ----------------------------------------------------------------------------------------------


class _Chosen(NamedTuple):
    """An atlas's examples, the rules of all latents, and the latents that more is asked about."""

    examples: Examples
    lexical: Lexical
    latents: list[int]
    facts: Facts


def _choose(atlas: Atlas, config: ExplainConfig) -> _Chosen:
    examples = read(atlas, config.test_fraction, config.seed)
    lexical = find_rules(examples, max_tokens=config.max_tokens, min_gain=config.min_gain, seed=config.seed)
    density = np.zeros(examples.d_sae)
    for row in atlas.query("SELECT id, density FROM latents"):
        density[row["id"]] = row["density"]
    latents: list[int] = []
    if config.used_scorers or not isinstance(config.explainer, LexicalConfig):
        latents = _latents(examples, density, config)
    if "generation" in config.used_scorers and len(latents) < 2:
        raise ConfigError(
            "the scorer generation needs two latents or more: texts for one are held against those for another",
            f"{len(latents)}",
            "Make the atlas over more text, or drop the scorer.",
        )
    wanted = ", ".join(map(str, latents)) or "NULL"
    # Through a tuned lens nothing is read: an atlas may have none, and those of nulls never do.
    rows = atlas.query(
        "SELECT latent, sign, text FROM logits JOIN tokens ON id = token "
        f"WHERE lens = 'logit' AND latent IN ({wanted}) ORDER BY latent, sign, rank"
    )
    written: dict[int, dict[int, list[str]]] = {1: {}, -1: {}}
    for row in rows:
        written[row["sign"]].setdefault(row["latent"], []).append(row["text"])
    others = [
        row["text"]
        for row in atlas.query(
            "SELECT DISTINCT token, text FROM logits JOIN tokens ON id = token "
            "WHERE lens = 'logit' AND sign = 1 ORDER BY token"
        )
    ]
    rules = {latent: words for latent in latents if (words := lexical.words[latent]) is not None}
    densities = {latent: float(density[latent]) for latent in latents}
    removals = _removals(atlas, wanted) if config.effects is not None else {}
    return _Chosen(
        examples,
        lexical,
        latents,
        Facts(examples, densities, written[1], written[-1], others, rules, removals),
    )


def _removals(atlas: Atlas, latents: str) -> dict[int, dict[tuple[int, int], list[tuple[str, float]]]]:
    """For each latent's examples, the context tokens without which its activation changes most, as shares of it."""
    out: dict[int, dict[tuple[int, int], list[tuple[str, float]]]] = {}
    rows = atlas.query(
        "SELECT latent, context, position, text, act_without / act - 1 AS share FROM removals "
        f"JOIN tokens ON id = token WHERE latent IN ({latents}) AND act <> 0 "
        f"AND abs(act_without / act - 1) >= {LEAST_CHANGE} "
        "ORDER BY latent, context, position, abs(share) DESC, removed"
    )
    for row in rows:
        found = out.setdefault(row["latent"], {}).setdefault((row["context"], row["position"]), [])
        if len(found) < N_REMOVALS:
            found.append((row["text"], row["share"]))
    return out


def _latents(examples: Examples, density: np.ndarray, config: ExplainConfig) -> list[int]:
    """Those named; else one from each stratum of density among those with examples for every scorer."""
    if config.latents:
        missing = [latent for latent in config.latents if latent >= examples.d_sae]
        if missing:
            raise ConfigError(
                f"latents must be numbers below {examples.d_sae}, the latents of the atlas",
                " ".join(map(str, missing)),
                "Name others.",
            )
        return sorted(config.latents)
    owner = np.repeat(np.arange(examples.d_sae), np.diff(examples.latent_ptr))

    def has(which: np.ndarray, n: int = 1) -> np.ndarray:
        enough: np.ndarray = np.bincount(owner[which], minlength=examples.d_sae) >= n
        return enough

    scoring = examples.side == SCORE
    eligible = np.flatnonzero(
        has((examples.side == EXPLAIN) & (examples.kind != RANDOM))
        & has(scoring & (examples.decile >= 0), 2)
        & has(scoring & (examples.kind == RANDOM))
    )
    if not eligible.size:
        raise TextError(
            "some latent must have active examples on both sides of the split, and a silent one to score on",
            "none that has",
            "Make the atlas with larger n_decile and n_random, over more text.",
        )
    return strata(density, eligible.tolist(), config.n_latents, config.seed)


def _encoder(config: ExplainConfig, *, rehearsal: bool = False) -> Encode | None:
    if "embedding" not in config.used_scorers:
        return None
    if rehearsal:
        return lambda texts: np.zeros((len(texts), 1), np.float32)
    from sememe.lm import sentence_encoder

    return sentence_encoder()


def _shape(atlas: Atlas, d_sae: int) -> dict[str, np.ndarray]:
    """What an atlas tells about its latents' shape, an entry per latent; NaN where it says nothing."""
    there = {row["column_name"] for row in atlas.query("DESCRIBE latents")}
    names = [name for name in SHAPE if name in there]
    table = atlas.table(f"SELECT id, {', '.join(names)} FROM latents ORDER BY id")
    out = {}
    for name in names:
        out[name] = np.full(d_sae, np.nan)
        out[name][table["id"].to_numpy()] = table[name].to_numpy().astype(np.float64)
    return out


# -- what was found ------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    table: pa.Table
    scores: Scores
    summary: dict[str, Any]


def _explain(
    chosen: _Chosen, config: ExplainConfig, judge: Judge | None, encode: Encode | None, reader: Reader | None
) -> _Made:
    found = ask_about(chosen.latents, chosen.facts, config, judge, encode) if chosen.latents else []
    if reader is not None:
        found = _with_generation(found, reader, chosen.examples)
    scores = Scores()
    _add_lexical(scores, chosen.lexical)
    for one in found:
        scores.add(one.latent, one.scores)
    table = latents_table(chosen.examples, chosen.lexical, found, config)
    return _Made(table, scores, _summary(chosen, found, scores, table, config, judge))


def _with_generation(found: Sequence[Found], reader: Reader, examples: Examples) -> list[Found]:
    """Each latent's texts against those of one before it in the list, through the model and the dictionary."""
    latents = [one.latent for one in found]
    texts = [text for one in found for text in one.texts]
    n_texts = [len(one.texts) for one in found]
    ends = np.cumsum(n_texts)
    acts = reader.largest(texts, latents)
    parts = [acts[end - n : end] for n, end in zip(n_texts, ends.tolist(), strict=True)]
    out = []
    for i, one in enumerate(found):
        if one.explanation is None:
            out.append(one)
            continue
        low, high = examples.latent_ptr[one.latent], examples.latent_ptr[one.latent + 1]
        values = np.abs(examples.acts[examples.offsets[low] : examples.offsets[high]])
        largest = float(values.max()) if values.size else 0.0
        j = contrasted(n_texts, i)
        scores = generation(parts[i][:, i], acts[:0, i] if j is None else parts[j][:, i], largest)
        out.append(one._replace(scores=(*one.scores, *scores)))
    return out


def _add_lexical(scores: Scores, lexical: Lexical) -> None:
    for variant, measured in (("shuffled", lexical.shuffled), ("other", lexical.other)):
        _add_column(scores, lexical, variant, None, measured.gain, measured.n_on)
    for decile, measured in ((None, lexical.found), *enumerate(lexical.deciles)):
        _add_column(scores, lexical, "score", decile, measured.gain, measured.n_on)
        _add_column(scores, lexical, "correlation", decile, measured.correlation, measured.n_on)


def _add_column(
    scores: Scores, lexical: Lexical, variant: str, decile: int | None, values: np.ndarray, n: np.ndarray
) -> None:
    kept = lexical.scored & ~np.isnan(values)
    scores.add_many(("lexical", variant, decile), np.flatnonzero(kept), values[kept], n[kept])


def _summary(
    chosen: _Chosen,
    found: Sequence[Found],
    scores: Scores,
    table: pa.Table,
    config: ExplainConfig,
    judge: Judge | None,
) -> dict[str, Any]:
    lexical = chosen.lexical
    scored = lexical.scored
    by_rule = isinstance(config.explainer, LexicalConfig)
    labels_by_rule = [
        kind
        for kind, source in zip(lexical.kinds, table["label_from"].to_pylist(), strict=True)
        if source == "rule"
    ]
    summary: dict[str, Any] = {
        "n_scored": int(scored.sum()),
        "n_labelled": table["label"].length() - table["label"].null_count,
        "kinds": tally(labels_by_rule),
        "judge": None if judge is None else judge.name,
        "n_asked": 0 if by_rule else len(found),
        "n_unexplained": 0 if by_rule else sum(one.explanation is None for one in found),
        "categories": {} if by_rule or not config.categories else tally([str(one.category) for one in found]),
    }
    figures = {
        "score": lexical.found.gain,
        "score_shuffled": lexical.shuffled.gain,
        "score_other": lexical.other.gain,
        "lift": lexical.found.gain - np.fmax(lexical.shuffled.gain, lexical.other.gain),
        "correlation": lexical.found.correlation,
    }
    for name, values in figures.items():
        kept = values[scored]
        summary[name] = mean_of(kept[~np.isnan(kept)], config.n_bootstrap, config.seed).as_json()
    summary["scorers"] = summarise(scores, config.n_bootstrap, config.seed)
    return summary
