"""Opens what is asked, reads the texts once, probes, ablates, and writes the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from sememe import artifact, dictionaries, figures, metrics
from sememe import lm as language_models
from sememe.concepts.config import ConceptsConfig
from sememe.config import sha256_of
from sememe.dictionaries.base import Dictionary, Sites
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError
from sememe.labelled import Labelled, Pooled, first_letters, named, pooled_rows, read_labelled
from sememe.lm import LanguageModel
from sememe.measure.checks import check_model, describe, policy_of, sites_of, splicer_for
from sememe.progress import Progress, track

__all__ = ["CONCEPTS", "concepts"]

VERSION = 5
CONCEPTS = "concepts.json"
N_HALVINGS = 3
"""Draws of a training and a test half for what is fitted on one and scored on the other."""
SHUFFLED = "shuffled labels"


class _Side(NamedTuple):
    """How a probe did on one class."""

    right: np.ndarray
    truth: np.ndarray
    units: np.ndarray
    """What these texts were of: classes share them."""


def concepts(
    config: ConceptsConfig, *, lm: LanguageModel | None = None, fresh: bool = False
) -> artifact.Artifact:
    """Ask what a dictionary's latents know of labels, or open the answer if it is there.

    The artifact holds concepts.json, concepts.csv, concepts.md and concepts.html.

    Args:
        config: Which dictionary, which labels.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: more latents are asked for than there are.
        TextError: labels are missing, NaN, of one class, or too few.
        MismatchError: the dictionary is of another model; or another answer stands at config.out.
        ActivationError: an activation is NaN or infinite; the error says in which text.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    dictionary = dictionaries.load(config.dictionary)
    sites = sites_of(dictionary, config.dictionary)
    for name in ("ks", "n_ablated"):
        asked = getattr(config, name)
        if asked == type(config).model_fields[name].default:  # as far as there are so many
            config = config.replace(**{name: tuple(n for n in asked if n <= dictionary.d_sae) or (1,)})
        elif max(asked) > dictionary.d_sae:
            raise ConfigError(f"{name} must be at most d_sae={dictionary.d_sae}", max(asked), "Lower it.")
    policy = policy_of(config.policy, saved, None)
    model_fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    check_model(sites, model_fingerprint)
    fields = {"spurious_field": config.spurious_field, "group_field": config.group_field}
    labelled = None if config.first_letter else read_labelled(config, **fields)
    parents = {"dictionary": saved.fingerprint, "model": model_fingerprint}
    if labelled is not None:
        parents["texts"] = sha256_of([labelled.texts, labelled.labels, labelled.spurious, labelled.groups])
    identity = artifact.identity_of("concepts", VERSION, config, parents)
    found = None if fresh else artifact.find(config.out, "concepts", identity)
    if found is not None:
        return found
    lm = lm if lm is not None else language_models.load(config.model)
    splicer_for(lm, sites)  # widths
    if labelled is None:
        labelled = first_letters(config, lm.tokenizer)
    pooling = config.pooling if config.pooling != "auto" else ("last" if config.first_letter else "mean")
    with artifact.building(
        config.out, kind="concepts", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        about = (sites, policy, labelled.texts, pooling, config.batch_rows)
        own = pooled_rows(lm, dictionary.to(lm.device), *about)
        untrained = _untrained(dictionary, sites, own, config.seed).to(lm.device)
        null = pooled_rows(lm, untrained, *about)
        data = _asked(config, labelled, {"dictionary": (dictionary, own), "untrained": (untrained, null)})
        data |= {
            "format_version": 2,
            "dictionary": describe(saved, dictionary, sites),
            "pooling": pooling,
            "labels": "first letters" if config.first_letter else named(config),
            "n_texts": len(labelled.texts),
            "n_units": len(set(labelled.groups)),
            "n_cut": own.n_cut,
            "left_out": labelled.left_out,
            "policy": policy.resolved(),
        }
        artifact.write_json(work.path / CONCEPTS, data)
        figures.write_concepts(work.path, data)
        work.extra = {"n_classes": len(labelled.classes), "n_texts": len(labelled.texts)}
    return artifact.load(config.out, "concepts")


def _untrained(dictionary: Dictionary, sites: Sites, own: Pooled, seed: int) -> Dictionary:
    """A TopK dictionary as wide and as sparse, freshly initialised: what its latents tell needs no training."""
    k = max(1, min(dictionary.d_sae, round(own.l0)))
    made = dictionaries.build(
        TopKConfig(k=k, d_sae=dictionary.d_sae), dictionary.d_in, dictionary.d_out, sites
    )
    made.initialise(
        torch.from_numpy(own.x), torch.from_numpy(own.target), torch.Generator().manual_seed(seed)
    )
    return made.fold().eval()


# -- what is asked -------------------------------------------------------------------------------------------------


def _asked(
    config: ConceptsConfig, labelled: Labelled, arms: Mapping[str, tuple[Dictionary, Pooled]]
) -> dict[str, Any]:
    """Probes and absorption of each class, perturbation of all, and spurious removal."""
    labels = np.array(
        [labelled.classes.index(name) if name in labelled.classes else -1 for name in labelled.labels]
    )
    units = labelled.units()
    weights = {
        name: one.decoder_directions().detach().cpu().double().numpy() for name, (one, _) in arms.items()
    }
    # with two classes, what tells one tells the other
    asked = labelled.classes[:1] if len(labelled.classes) == 2 else labelled.classes
    right: dict[str, dict[str, list[_Side]]] = {}
    classes: dict[str, Any] = {}
    with track("probe", len(asked), "classes") as progress:
        for name in asked:
            rows = _beside(labels == labelled.classes.index(name), config.max_per_class, config.seed)
            truth = torch.from_numpy(labels[rows] == labelled.classes.index(name))
            probes, shuffled = _probes(config, arms, rows, units[rows], truth)
            asked_for = {arm: shuffled if arm == SHUFFLED else truth for arm in probes}
            read = arms["dictionary"][1].target[rows].astype(np.float64)  # every arm's: they know no latents
            dense = [
                metrics.concept_probe(read, truth.numpy(), units=units[rows], seed=seed)
                for seed in _seeds(config)
            ]
            classes[name] = {
                "n_with": int(truth.sum()),
                "n_without": int((~truth).sum()),
                "probes": {
                    arm: {k: _scored(config, one, asked_for[arm]) for k, one in own.items()}
                    for arm, own in probes.items()
                },
                "absorption": {
                    arm: _absorbed(config, one, weights[arm], rows, units, truth.numpy(), dense)
                    for arm, (_, one) in arms.items()
                },
            }
            for arm, own in probes.items():
                label = asked_for[arm].numpy()
                for k, one in own.items():
                    side = _Side((one.answers > 0) == label, label, units[rows])
                    right.setdefault(arm, {}).setdefault(k, []).append(side)
            progress.advance(1)
    means = {
        arm: {k: _mean_accuracy(config, sides) for k, sides in own.items()} for arm, own in right.items()
    }
    found: dict[str, Any] = {"classes": classes, "mean_balanced_accuracy": means}
    known = labels >= 0
    if len(labelled.classes) > 2:
        with track("perturb", len(arms) * N_HALVINGS, "halvings") as progress:
            shared: dict[int, list[metrics.LinearProbe]] = {}
            found["targeted_perturbation"] = {
                arm: _perturbed(config, one, weights[arm], labels, units, known, shared, progress)
                for arm, (_, one) in arms.items()
            }
    if labelled.spurious is not None:
        found["spurious_removal"] = {
            arm: _cleaned(config, one, weights[arm], labels, units, labelled.spurious)
            for arm, (_, one) in arms.items()
        }
    return found


def _beside(own: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Rows of a class, and as many others."""
    rng = np.random.default_rng(seed)
    n = min(int(own.sum()), int((~own).sum()), most)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(side))[:n] for side in (own, ~own)]))


def _probes(
    config: ConceptsConfig,
    arms: Mapping[str, tuple[Dictionary, Pooled]],
    rows: np.ndarray,
    units: np.ndarray,
    truth: torch.Tensor,
) -> tuple[dict[str, dict[str, metrics.Probe]], torch.Tensor]:
    """By arm and number of latents; what all of the activations tell is "dense".

    The one of the shuffled labels, which come second, is what choosing among many latents finds in nothing.
    """
    options: dict[str, Any] = {"units": units, "n_folds": config.n_folds, "seed": config.seed}
    numbered = metrics.numbered_units(units, len(units))
    shuffled = torch.from_numpy(metrics.shuffled_labels(truth.numpy(), numbered, config.seed))
    own = arms["dictionary"][1]
    x = torch.from_numpy(own.x[rows])
    found = {
        arm: metrics.sparse_probe(torch.from_numpy(one.acts[rows]), truth, config.ks, **options)
        for arm, (_, one) in arms.items()
    }
    few = tuple(k for k in config.ks if k <= x.shape[1])
    found["neurons"] = metrics.sparse_probe(x, truth, few, **options)
    found[SHUFFLED] = metrics.sparse_probe(torch.from_numpy(own.acts[rows]), shuffled, config.ks, **options)
    by_arm = {arm: {str(k): one for k, one in own.items()} for arm, own in found.items()}
    return by_arm | {"activations": {"dense": metrics.dense_probe(x, truth, **options)}}, shuffled


def _scored(config: ConceptsConfig, probe: metrics.Probe, label: torch.Tensor) -> dict[str, Any]:
    """Scores with intervals over texts, and the latents of most folds."""
    found = metrics.probe_scores(probe, label, n_bootstrap=config.n_bootstrap, seed=config.seed)
    used = [latent for fold in probe.chosen for latent in fold]
    most = sorted(set(used), key=lambda latent: (-used.count(latent), latent))
    return {
        **{name: one.to_json() for name, one in found.items()},
        "latents": most[: len(probe.chosen[0]) if probe.chosen else 0],
    }


def _mean_accuracy(config: ConceptsConfig, sides: list[_Side]) -> dict[str, float | str | None]:
    """The mean over classes of balanced accuracies; its interval over draws of texts, the same in every class."""
    n_units = 1 + max(int(side.units.max()) for side in sides)
    weights = np.random.default_rng(config.seed).multinomial(
        n_units, np.full(n_units, 1 / n_units), size=config.n_bootstrap
    )
    values, draws = [], []
    for side in sides:
        groups = [
            (side.right[side.truth], side.units[side.truth]),
            (side.right[~side.truth], side.units[~side.truth]),
        ]
        values.append(float(np.mean([right.mean() for right, _ in groups])))
        with np.errstate(all="ignore"):
            drawn = [weights[:, of] @ right / weights[:, of].sum(1) for right, of in groups]
        draws.append(np.mean(drawn, axis=0))
    found: dict[str, float | str | None] = {"value": float(np.mean(values)), "low": None, "high": None}
    if config.n_bootstrap > 1:
        drawn_means = np.mean(draws, axis=0)
        if not np.isfinite(drawn_means).all():
            return found | {"cause": "some draws of texts hold none with, or none without, a class"}
        found["low"], found["high"] = (float(q) for q in np.quantile(drawn_means, [0.025, 0.975]))
    return found


def _absorbed(
    config: ConceptsConfig,
    one: Pooled,
    W_dec: np.ndarray,
    rows: np.ndarray,
    units: np.ndarray,
    truth: np.ndarray,
    dense: list[metrics.LinearProbe],
) -> dict[str, Any]:
    x, acts = one.target[rows].astype(np.float64), one.acts[rows].astype(np.float64)
    found = [
        metrics.absorption(x, acts, W_dec, truth, units=units[rows], seed=seed, probe=probe)
        for seed, probe in zip(_seeds(config), dense, strict=True)
    ]
    return {
        **_over_halvings(config, found, ("full", "fraction", "f1")),
        "n_true_positives": [part.n_true_positives for part in found],
        "latents": list(found[0].latents),
    }


def _perturbed(
    config: ConceptsConfig,
    one: Pooled,
    W_dec: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    known: np.ndarray,
    shared: dict[int, list[metrics.LinearProbe]],
    progress: Progress,
) -> dict[str, Any]:
    x, acts = one.target[known].astype(np.float64), one.acts[known].astype(np.float64)
    found = []
    about: dict[str, Any] = {"units": units[known]}
    for seed in _seeds(config):
        if seed not in shared:
            shared[seed] = metrics.class_probes(x, labels[known], **about, seed=seed)
        found.append(
            metrics.targeted_perturbation(
                x, acts, W_dec, labels[known], config.n_ablated, **about, seed=seed, probes=shared[seed]
            )
        )
        progress.advance(1)
    names = ("score", "own", "others")
    return {str(n): _over_halvings(config, [part[n] for part in found], names) for n in config.n_ablated}


def _cleaned(
    config: ConceptsConfig,
    one: Pooled,
    W_dec: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    spurious: tuple[str, ...],
) -> dict[str, Any]:
    x, acts = one.target.astype(np.float64), one.acts.astype(np.float64)
    second = np.array(spurious) == sorted(set(spurious))[1]
    found = [
        metrics.spurious_removal(
            x, acts, W_dec, labels == 0, second, config.n_ablated, units=units, seed=seed
        )
        for seed in _seeds(config)
    ]
    names = ("score", "biased", "clean", "ablated")
    return {str(n): _over_halvings(config, [part[n] for part in found], names) for n in config.n_ablated}


def _seeds(config: ConceptsConfig) -> range:
    return range(config.seed, config.seed + N_HALVINGS)


def _over_halvings(
    config: ConceptsConfig,
    found: list[metrics.Absorption] | list[metrics.TargetedPerturbation] | list[metrics.SpuriousRemoval],
    names: tuple[str, ...],
) -> dict[str, dict[str, Any]]:
    """Each score over all halvings with its interval over texts, and in each of them."""
    scores = metrics.over_halvings(
        [part.tested for part in found], n_bootstrap=config.n_bootstrap, seed=config.seed
    )
    each = {name: [getattr(part, name) for part in found] for name in names}
    return {
        name: scores[name].to_json()
        | {"halvings": [value if math.isfinite(value) else None for value in each[name]]}
        for name in names
    }
