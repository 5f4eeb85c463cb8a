"""Opens what is asked, chooses latents on some texts, erases, and scores on the others; writes the report."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sememe import artifact, dictionaries, figures, metrics
from sememe import lm as language_models
from sememe.config import sha256_of
from sememe.dictionaries.base import Dictionary
from sememe.erase.chosen import Ranking, alike, ranking
from sememe.erase.config import EraseConfig
from sememe.erase.erasures import (
    Arm,
    LatentErasure,
    class_directions,
    leace,
    project_out,
    random_basis,
)
from sememe.erase.felt import fit_probes
from sememe.erase.passes import BASE, Neutral, Passes, first_tokens
from sememe.erase.tasks import ANSWERS, read_task
from sememe.errors import ConfigError, TextError
from sememe.labelled import Labelled, Pooled, named, pooled_rows, read_labelled
from sememe.lm import LanguageModel
from sememe.measure.checks import check_model, describe, policy_of, sites_of, splicer_for
from sememe.progress import track
from sememe.text import attributions, fetch, fingerprint, split_of

__all__ = ["ERASURE", "erase"]

VERSION = 2
ERASURE = "erasure.json"
LEAST_EACH = 10
"""Texts of every class to choose on, and to score on."""
LATENTS, RANDOM_LATENTS, LEACE = "latents", "random latents", "leace"
DIFFERENCE, MEANS, RANDOM = "difference in means", "mean projection", "random directions"


class _Split(NamedTuple):
    """Rows and labels on both sides."""

    x: Float[np.ndarray, "n d_out"]
    acts: Float[np.ndarray, "n d_sae"]
    labels: Int[np.ndarray, " n"]
    units: Int[np.ndarray, " n"]
    """Which group each text is of."""
    heldout: Bool[np.ndarray, " n"]


def erase(config: EraseConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> artifact.Artifact:
    """Erase a concept in several ways, or open what came of it if it is there.

    The artifact holds erasure.json, erasure.csv, erasure.md and erasure.html.

    Args:
        config: Which concept, at which dictionary's hookpoint.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: a latent does not exist, or more are asked for than there are.
        TextError: labels are missing, of one class, or too few on either side; the neutral text is too short.
        MismatchError: the dictionary is of another model; or another erasure stands at config.out.
        ActivationError: an activation is NaN or infinite.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    dictionary = dictionaries.load(config.dictionary)
    sites = sites_of(dictionary, config.dictionary)
    config = _fitting(config, dictionary)
    policy = policy_of(config.policy, saved, None)
    model_fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    check_model(sites, model_fingerprint)
    labelled = (
        read_task(config, config.task)
        if config.task
        else read_labelled(config, group_field=config.group_field)
    )
    heldout = split(labelled, config.heldout_share)
    fetch(config.text)
    parents = {
        "dictionary": saved.fingerprint,
        "model": model_fingerprint,
        "text": fingerprint(config.text),
        "texts": sha256_of([labelled.texts, labelled.labels, labelled.groups]),
    }
    identity = artifact.identity_of("erasure", VERSION, config, parents)
    if not fresh and (found := artifact.find(config.out, "erasure", identity, config, parents)):
        return found
    lm = lm if lm is not None else language_models.load(config.model)
    splicer_for(lm, sites)  # widths
    asked = (
        ((ANSWERS["he"],), (ANSWERS["she"],)) if config.task else (config.tokens_for, config.tokens_against)
    )
    sides = first_tokens(lm, *asked) if asked[0] else None
    with artifact.building(
        config.out, kind="erasure", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        dictionary = dictionary.to(lm.device)
        pooled = pooled_rows(lm, dictionary, sites, policy, labelled.texts, config.pooling, config.batch_rows)
        texts = _split_rows(labelled, pooled, heldout)
        ranks, arms = make_arms(config, dictionary, texts)
        passes = Passes(lm, dictionary, sites, policy, arms)
        neutral = passes.neutral(config)
        data: dict[str, Any] = {
            "format_version": 1,
            "dictionary": describe(saved, dictionary, sites),
            "labels": f"task: {config.task}" if config.task else named(config),
            "classes": _counts(labelled, texts),
            "chance": 1 / len(labelled.classes),
            "left_out": labelled.left_out,
            "n_cut": pooled.n_cut,
            "pooling": config.pooling,
            "ablation": config.ablation,
            "policy": policy.resolved(),
            "latents": _described(ranks, labelled, config),
            "neutral": {"n_tokens": neutral.n_tokens, "n_predictions": neutral.n_predictions},
            "attributions": [a._asdict() for a in attributions(config.text)],
        }
        data |= _scored(config, texts, arms, neutral)
        if sides is not None:
            data["answers"] = {"for": list(asked[0]), "against": list(asked[1])}
            _add_answers(config, data, passes, labelled, texts, sides)
        artifact.write_json(work.path / ERASURE, data)
        figures.write_erasure(work.path, data)
        work.extra = {"n_classes": len(labelled.classes), "n_texts": len(labelled.texts)}
    return artifact.load(config.out, "erasure")


def _fitting(config: EraseConfig, dictionary: Dictionary) -> EraseConfig:
    """The config with as many latents as there are.

    Raises:
        ConfigError: a latent does not exist, or more are asked for than there are.
    """
    for latent in config.latents:
        if not 0 <= latent < dictionary.d_sae:
            raise ConfigError(f"a latent must be in [0, {dictionary.d_sae - 1}]", latent, "Change --latents.")
    most = len(config.latents) or dictionary.d_sae
    if max(config.ns) <= most:
        return config
    if config.ns == type(config).model_fields["ns"].default:
        return config.replace(ns=(*(n for n in config.ns if n < most), most))
    what = "the latents named" if config.latents else f"d_sae={dictionary.d_sae}"
    raise ConfigError(f"ns must be at most {most}, {what}", max(config.ns), "Lower it.")


def split(labelled: Labelled, share: float) -> Bool[np.ndarray, " n"]:
    """Which texts are held out: by a hash of what each is of, so that equal texts lie on one side.

    Raises:
        TextError: a class has too few on a side.
    """
    heldout = np.array([split_of(group, share) == "heldout" for group in labelled.groups])
    names = np.array(labelled.labels)
    for name in labelled.classes:
        own = heldout[names == name]
        if min(int(own.sum()), int((~own).sum())) < LEAST_EACH:
            raise TextError(
                f"each class must have {LEAST_EACH} texts to choose on and {LEAST_EACH} held out",
                f"{int((~own).sum())} and {int(own.sum())} of {name}",
                "Give more labelled texts, or change heldout_share.",
            )
    return heldout


def _split_rows(labelled: Labelled, pooled: Pooled, heldout: Bool[np.ndarray, " n"]) -> _Split:
    labels = np.array([labelled.classes.index(name) for name in labelled.labels])
    return _Split(pooled.target.astype(np.float64), pooled.acts, labels, labelled.units(), heldout)


def make_arms(config: EraseConfig, dictionary: Dictionary, texts: _Split) -> tuple[Ranking, list[Arm]]:
    """Every way to erase, fitted on the training texts: nothing held out is looked at."""
    train = ~texts.heldout
    x, labels = torch.from_numpy(texts.x[train]), texts.labels[train]
    directions = dictionary.decoder_directions().detach().float().cpu()
    ranks = ranking(texts.acts[train], labels, directions.norm(dim=1).numpy())
    order = config.latents or tuple(int(latent) for latent in ranks.order[: max(config.ns)])

    def of_latents(kind: str, latents: tuple[int, ...], draw: int | None) -> Arm:
        means = torch.from_numpy(ranks.means.mean(0)[list(latents)]).float()
        values = means if config.ablation == "mean" else torch.zeros(len(latents))
        return Arm(kind, len(latents), draw, LatentErasure(latents, values, directions[list(latents)]))

    arms = [of_latents(LATENTS, order[:n], None) for n in config.ns]
    for draw in range(config.n_random):
        rng = np.random.default_rng((config.seed, draw))
        drawn = alike(order[: max(config.ns)], ranks.density, rng)
        for n in config.ns:
            if n <= len(drawn):
                arms.append(of_latents(RANDOM_LATENTS, drawn[:n], draw))
    basis, centre = class_directions(x, labels), x.mean(0)
    affine = {(LEACE, len(basis)): leace(x, labels), (DIFFERENCE, 1): project_out(basis[:1], centre)}
    if len(basis) > 1:  # of two classes it is the difference
        affine[MEANS, len(basis)] = project_out(basis, centre)
    arms += [Arm(kind, n, None, erasure) for (kind, n), erasure in affine.items()]
    for draw in range(config.n_random):
        drawn_basis = random_basis(len(basis), x.shape[1], config.seed + draw)
        arms.append(Arm(RANDOM, len(basis), draw, project_out(drawn_basis, centre)))
    return ranks, arms


def _scored(config: EraseConfig, texts: _Split, arms: list[Arm], neutral: Neutral) -> dict[str, Any]:
    """Probes of every arm, and its cost."""
    train, test = ~texts.heldout, texts.heldout
    spread = texts.x[train].std(0)
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "seed": config.seed}

    def scores(answers: Float[np.ndarray, "n classes"]) -> dict[str, Any]:
        found = metrics.class_scores(answers, texts.labels[test], texts.units[test], **options)
        return {name: one.to_json() for name, one in found.items()}

    before = fit_probes(texts.x[train], texts.labels[train], spread, texts.units[train], seed=config.seed)
    base = {"probe": scores(before.answers(texts.x[test]))}
    base["cost"] = {"ce": neutral.loss.compute(BASE, **options)["ce"].to_json()}
    found = []
    with track("probe", len(arms), "arms") as progress:
        for arm in arms:
            acts = torch.from_numpy(texts.acts[:, list(arm.erasure.latents)])
            rows = arm.erasure.rows(torch.from_numpy(texts.x), acts).numpy()
            anew = fit_probes(rows[train], texts.labels[train], spread, texts.units[train], seed=config.seed)
            cost = neutral.loss.compute(arm.name, **options)
            found.append(
                {
                    "arm": arm.kind,
                    "n": arm.n,
                    "draw": arm.draw,
                    "latents": list(arm.erasure.latents),
                    "refitted": scores(anew.answers(rows[test])),
                    "before": scores(before.answers(rows[test])),
                    "cost": {name: cost[name].to_json() for name in ("kl", "ce_increase")},
                }
            )
            progress.advance(1)
    return {"base": base, "arms": found}


def _add_answers(
    config: EraseConfig,
    data: dict[str, Any],
    passes: Passes,
    labelled: Labelled,
    texts: _Split,
    sides: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """The model's own answers after the held-out texts, beside the probes'."""
    heldout = [text for text, out in zip(labelled.texts, texts.heldout, strict=True) if out]
    found = passes.answers(heldout, *sides, config.batch_rows)
    labels, units = texts.labels[texts.heldout], texts.units[texts.heldout]
    means = [found[BASE][labels == number].mean() for number in range(len(labelled.classes))]
    one, other = int(np.argmax(means)), int(np.argmin(means))
    data["answers"]["apart"] = [labelled.classes[one], labelled.classes[other]]
    for place, name in (
        (data["base"], BASE),
        *zip(data["arms"], (arm.name for arm in passes.arms), strict=True),
    ):
        by_class = {c: float(found[name][labels == i].mean()) for i, c in enumerate(labelled.classes)}
        place["answers"] = {
            **_apart(found[name], labels, units, one, other, config),
            "mean_by_class": by_class,
        }


def _apart(
    odds: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    one: int,
    other: int,
    config: EraseConfig,
) -> dict[str, Any]:
    """How far two classes' answers lie apart, in nats, and how well they can be told apart by them."""
    sums = metrics.Sums()
    sides = {
        name: torch.from_numpy((labels == number).astype(np.float64))
        for name, number in (("one", one), ("other", other))
    }
    values = {"n": torch.ones(len(odds), dtype=torch.float64)}
    for name, here in sides.items():
        values |= {f"n_{name}": here, f"sum_{name}": here * torch.from_numpy(odds)}
    sums.add(torch.from_numpy(np.unique(units, return_inverse=True)[1].reshape(-1)), values)
    found = metrics.bootstrap(
        sums.arrays(),
        {"separation": lambda t: t["sum_one"] / t["n_one"] - t["sum_other"] / t["n_other"]},
        n=config.n_bootstrap,
        seed=config.seed,
    )
    two = np.isin(labels, (one, other))
    told = metrics.class_scores(
        np.stack([odds[two], -odds[two]], axis=1),
        (labels[two] == other).astype(np.int64),
        units[two],
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
    )
    return {"separation": found["separation"].to_json(), "auroc": told["auroc"].to_json()}


def _counts(labelled: Labelled, texts: _Split) -> dict[str, dict[str, int]]:
    found = {}
    for number, name in enumerate(labelled.classes):
        own = texts.heldout[texts.labels == number]
        found[name] = {"train": int((~own).sum()), "heldout": int(own.sum())}
    return found


def _described(ranks: Ranking, labelled: Labelled, config: EraseConfig) -> list[dict[str, Any]]:
    """The numbers behind the choice, of the latents that were chosen."""
    order = config.latents or ranks.order[: max(config.ns)].tolist()
    return [
        {
            "latent": int(latent),
            "score": float(ranks.score[latent]),
            "between": float(ranks.between[latent]),
            "consistency": float(ranks.consistency[latent]),
            "density": float(ranks.density[latent]),
            "means": {name: float(ranks.means[c, latent]) for c, name in enumerate(labelled.classes)},
        }
        for latent in order
    ]
