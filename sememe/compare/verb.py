"""Opens dictionaries, measures them on the same documents, says which differences are real, and writes the page."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from sememe import artifact, figures, frontier, text
from sememe import lm as language_models
from sememe.compare.config import CompareConfig
from sememe.compare.directions import all_pairs, one_pair
from sememe.dictionaries.base import Dictionary, Sites
from sememe.dictionaries.folders import Opened, open_all
from sememe.errors import MismatchError
from sememe.figures.schema import FORMAT, Comparison
from sememe.frontier import Place, Point
from sememe.lm import LanguageModel
from sememe.measure import (
    Arms,
    Measured,
    Together,
    Twin,
    check_documents,
    check_together,
    check_twins,
    fit,
    make_null,
    open_twins,
    run,
    twin_groups,
)
from sememe.measure.checks import (
    check_nulls,
    check_store,
    check_text,
    describe,
    policy_of,
    sign_notice,
    splicer_for,
)
from sememe.measure.config import AUTOENCODER_NULLS
from sememe.store import Store, open_store
from sememe.text import TokenPolicy

__all__ = ["COMPARISON", "compare"]

VERSION = 11
COMPARISON = "comparison.json"
SCHEMA = "comparison.schema.json"
MAX_NULL_L0S = 3
"""Values of l0 at which each null is measured, for each set of sites."""


def compare(
    config: CompareConfig, *, lm: LanguageModel | None = None, fresh: bool = False
) -> artifact.Artifact:
    """Compare dictionaries, or open the comparison if it is there.

    The artifact holds comparison.json with its schema, comparison.csv, comparison.html, comparison.md with its plots,
    and of two dictionaries the nearest latents both ways.

    Args:
        config: Which ones, on what.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: fewer than two dictionaries; an unknown null.
        ShapeError: dictionaries write outputs of different widths.
        MismatchError: dictionaries belong to different models, policies or stores; or another comparison stands at
            config.out.
        ArtifactError: a folder is not a dictionary.
        TextError: the held-out text is shorter than one context, or too few documents for intervals.
    """
    opened = open_all(config.dictionaries, at_least=2)
    # under the names that the page tells them apart by
    parents = {f"dictionary: {name}": one.saved.fingerprint for name, one in opened.items()}
    store = None if config.store is None or config.directions_only else open_store(config.store)
    policy, notices, twins = None, list[str](), dict[str, Twin]()
    if not config.directions_only:
        policy, notices = _check(config, opened, store)
        twins = open_twins(config)
        notices += check_twins(config, twins, policy, [_sites(one) for one in opened.values()])
        parents |= {name: twin.saved.fingerprint for name, twin in twins.items()}
        text.fetch(config.text)
        parents |= {"model": _model_of(config, opened, lm), "text": text.fingerprint(config.text)}
        if store is not None:
            parents["store"] = store.fingerprint
    identity = artifact.identity_of("comparison", VERSION, config, parents)
    found = None if fresh else artifact.find(config.out, "comparison", identity)
    if found is not None:
        return found
    with artifact.building(
        config.out, kind="comparison", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        loaded = {name: one.dictionary for name, one in opened.items()}
        data: dict[str, Any] = {"format_version": FORMAT, "directions": all_pairs(config, loaded)}
        data["pair"] = one_pair(config, loaded, work.path) if len(loaded) == 2 else None
        if policy is None:
            data |= _undescribed(opened)
        else:
            lm = lm if lm is not None else language_models.load(config.model)
            data |= _measured(config, lm, opened, policy, store, twins)
        notices += sign_notice({name: one.signed for name, one in loaded.items()})
        data["notices"] = notices + data.get("notices", []) + _cautions(data)
        data["attributions"] = [] if policy is None else [a._asdict() for a in text.attributions(config.text)]
        Comparison.build(data, COMPARISON)  # what is written is what is published
        artifact.write_json(work.path / COMPARISON, data)
        schema = json.dumps(Comparison.model_json_schema(by_alias=True), indent=2)
        (work.path / SCHEMA).write_text(schema + "\n", encoding="utf-8")
        figures.write_comparison(work.path, data)
        work.extra = _summary(data)
    return artifact.load(config.out, "comparison")


# -- what belongs together -----------------------------------------------------------------------------------------


def _check(
    config: CompareConfig, opened: dict[str, Opened], store: Store | None
) -> tuple[TokenPolicy, list[str]]:
    """The token policy that all share, and what a reader has to know."""
    _check_one_model(opened)
    if config.together:
        check_together({name: _sites(one) for name, one in opened.items()})
    policies: dict[str, TokenPolicy] = {}
    notices: dict[str, None] = {}
    for name, one in opened.items():
        sites = _sites(one)
        if sites.inputs != sites.outputs:
            check_nulls(tuple(null for null in config.nulls if null not in AUTOENCODER_NULLS), sites)
        else:
            check_nulls(config.nulls, sites)
        policies[name] = policy_of(config.policy, one.saved, store)
        if store is not None:
            check_store(store, one.saved, sites)
        notices |= dict.fromkeys(f"{name}: {notice}" for notice in check_text(one.saved, store, config.text))
    (first, policy), *others = policies.items()
    for name, other in others:
        if other != policy:
            raise MismatchError(
                f"dictionaries must have one token policy to be measured on the same positions, that of {first}: "
                f"{policy.resolved()}",
                f"{other.resolved()} of {name}",
                "Compare those of one policy, or pass --directions-only.",
            )
    return policy, list(notices)


def _check_one_model(found: dict[str, Opened]) -> None:
    """Whether all belong to one language model.

    Raises:
        MismatchError: they do not, or one was trained on bare tensors.
    """
    models: dict[str, Any] = {}
    for name, one in found.items():
        if one.sites is None:
            raise MismatchError(
                f"the dictionary {name} must know its model and hookpoint to be measured on text",
                "none (it was trained on bare tensors)",
                "Pass --directions-only.",
            )
        for site in (*one.sites.inputs, *one.sites.outputs):
            models.setdefault(
                site.model_fingerprint, f"{site.model} ({site.model_fingerprint[:16]}), of {name}"
            )
    if len(models) > 1:
        raise MismatchError(
            "dictionaries must belong to one model to be measured on the same documents",
            "; ".join(models.values()),
            "Compare those of one model, or pass --directions-only.",
        )


def _sites(one: Opened) -> Sites:
    assert one.sites is not None
    return one.sites


def _model_of(config: CompareConfig, opened: dict[str, Opened], lm: LanguageModel | None) -> str:
    """The model's fingerprint, which must be the dictionaries'."""
    fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    site = _sites(next(iter(opened.values()))).inputs[0]
    if site.model_fingerprint != fingerprint:
        raise MismatchError(
            f"the model must be the one the dictionaries were trained on, {site.model} "
            f"(fingerprint {site.model_fingerprint[:16]})",
            f"fingerprint {fingerprint[:16]}",
            f"Pass --model, and --randomise if it was: {site.model}.",
        )
    return fingerprint


# -- measuring -----------------------------------------------------------------------------------------------------


def _measured(
    config: CompareConfig,
    lm: LanguageModel,
    opened: dict[str, Opened],
    policy: TokenPolicy,
    store: Store | None,
    twins: dict[str, Twin],
) -> dict[str, Any]:
    """Every dictionary and its nulls on the same documents."""
    check_documents(config, lm, policy)
    since = time.monotonic()
    by_sites: dict[str, list[str]] = {}
    for name, one in opened.items():
        by_sites.setdefault(_places(_sites(one)), []).append(name)
    groups: dict[str, tuple[Measured, Arms]] = {}
    null_configs: dict[str, dict[str, Any]] = {}
    for place, names in by_sites.items():
        sites = _sites(opened[names[0]])
        own = {name: opened[name].dictionary.to(lm.device) for name in names}
        prefix = f"{place}: " if len(by_sites) > 1 else ""
        arms, configs = _arms(config, lm, own, sites, policy, store, prefix)
        null_configs |= configs
        groups[place] = (Measured(config, lm, splicer_for(lm, sites), sites, policy), arms)
    together = None
    if config.together:
        means = {one.sites.outputs[0].hookpoint: arms.mean for one, arms in groups.values()}
        own = {name: one.dictionary for name, one in opened.items()}
        together = Together(config, lm, own, means, policy)
        groups["all together"] = (together, Arms({}, next(iter(means.values())), (), ()))
    groups |= twin_groups(config, twins, policy)
    stopped = run(config, groups, since)
    descriptions = {
        name: describe(one.saved, one.dictionary, _sites(one)) | {"name": name}
        for name, one in opened.items()
    }
    places = frontier.grouped(descriptions)
    for name, about in null_configs.items():
        width = f" d_sae={about['d_sae']}" if about["null"] in ("untrained", "random_directions") else ""
        where = f" {about['place']}" if len(by_sites) > 1 else ""
        places[name] = Place(f"null: {about['null']}{width}{where}", f"k={about['k']}")
        descriptions[name] = about
    for name, twin in twins.items():
        descriptions[name] = describe(twin.saved, twin.dictionary, twin.sites) | {"name": name}
        places[name] = Place(f"null: {name}", "")
    rows, points = [], {}
    cheats: list[str] = []
    for measured, arms in groups.values():
        for name in arms.dictionaries:
            points[name] = Point(places[name], measured.drawn(name))
            if name not in arms.controls:
                cheats += measured.cheats(name, arms.dictionaries[name], name)
            rows.append(
                {
                    "name": name,
                    **places[name]._asdict(),
                    "null": name in arms.controls,
                    "description": descriptions[name],
                    "metrics": measured.statistics(name) | measured.unedited(),
                    "density": measured.density(name),
                }
            )
    rows.sort(key=lambda row: bool(row["null"]))
    by_value = _merged(
        [
            measured.grouped(list(arms.dictionaries), figures.GROUPED)
            for measured, arms in groups.values()
            if arms.dictionaries
        ]
    )
    first, _ = next(iter(groups.values()))
    return {
        "rows": rows,
        **frontier.summary(points, figures.BETTER, config.seed),
        "text": first.describe_text(text.fingerprint(config.text)),
        "bootstrap": first.describe_bootstrap(),
        "stopped": stopped,
        **by_value,
        "together": None if together is None else together.summary(),
        "notices": cheats,
    }


def _merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers by language, source and tag of several places, which saw the same documents, as one."""

    def joined(groups: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            value: {
                "n_documents": one["n_documents"],
                "arms": {name: arm for group in groups for name, arm in group[value]["arms"].items()},
            }
            for value, one in groups[0].items()
        }

    out: dict[str, Any] = {key: joined([one[key] for one in found]) for key in ("by_language", "by_source")}
    by_tag = {field: joined([one["by_tag"][field] for one in found]) for field in found[0]["by_tag"]}
    return {**out, "by_tag": by_tag}


def _places(sites: Sites) -> str:
    """Where dictionaries read and write, with the norms they leave out: those that agree share a pass."""
    inputs, outputs = (
        "+".join(f"{site.hookpoint}" for site in side) for side in (sites.inputs, sites.outputs)
    )
    limits = {site.hookpoint: site.max_norm for site in (*sites.inputs, *sites.outputs)}
    about = "" if all(limit is None for limit in limits.values()) else f" (norms {list(limits.values())})"
    return (inputs if inputs == outputs else f"{inputs} to {outputs}") + about


def _arms(
    config: CompareConfig,
    lm: LanguageModel,
    own: dict[str, Dictionary],
    sites: Sites,
    policy: TokenPolicy,
    store: Store | None,
    prefix: str,
) -> tuple[Arms, dict[str, dict[str, Any]]]:
    """Dictionaries of one place, and each null at their l0."""
    fitted = fit(config, lm, sites, policy, store)
    l0s = {name: fitted.sparsity_of(one).compute()["l0"].value for name, one in own.items()}
    d_in = next(iter(own.values())).d_in
    ks = _spread(
        sorted({round(l0) for l0 in l0s.values() if 0.5 <= l0 < d_in - 0.5})
    )  # all would be the identity
    d_sae = int(np.median([one.d_sae for one in own.values()]))
    autoencoder = sites.inputs == sites.outputs
    nulls: dict[str, Dictionary] = {}
    configs: dict[str, dict[str, Any]] = {}
    for null in config.nulls:
        if not autoencoder and null != "untrained":
            continue
        for k in ks:
            made, about = make_null(null, k, d_sae, config.seed, sites, fitted)
            name = f"{prefix}{null} k={about['k']}"
            name = name if name not in own else f"{name} (null)"
            if name not in nulls:
                nulls[name] = made
                configs[name] = about | {"null": null, "place": prefix.removesuffix(": "), "kind": null}
    return Arms({**own, **nulls}, fitted.mean, (), tuple(nulls)), configs


def _spread(ks: list[int]) -> list[int]:
    """At most MAX_NULL_L0S of them, the ends among them."""
    if len(ks) <= MAX_NULL_L0S:
        return ks
    return [ks[round(i * (len(ks) - 1) / (MAX_NULL_L0S - 1))] for i in range(MAX_NULL_L0S)]


def _undescribed(opened: dict[str, Opened]) -> dict[str, Any]:
    """What is known of dictionaries that were not measured."""
    rows = [
        {
            "name": name,
            "group": one.dictionary.kind,
            "setting": "",
            "null": False,
            "description": {
                "kind": one.dictionary.kind,
                "config": one.dictionary.config.resolved(),
                "d_sae": one.dictionary.d_sae,
                "d_out": one.dictionary.d_out,
                "path": str(one.saved.path),
                "fingerprint": one.saved.fingerprint,
                "hookpoints": [] if one.sites is None else list(one.sites.hookpoints),
            },
        }
        for name, one in opened.items()
    ]
    nothing: dict[str, Any] = {"frontiers": {}, "differences": [], "left_out": {}, "dropped": {}}
    nothing |= {"by_language": {}, "by_source": {}, "by_tag": {}}
    return {"rows": rows, **nothing, "text": None, "bootstrap": None, "stopped": None, "together": None}


def _cautions(data: dict[str, Any]) -> list[str]:
    """What the numbers do not say."""
    found = []
    places = {
        tuple(row["description"].get("outputs") or row["description"].get("hookpoints") or ("unknown",))
        for row in data["rows"]
        if not row["null"]
    }
    if len(places) > 1:
        found.append("Dictionaries write to different places: their directions may live in different bases.")
    points = [point for group in data["frontiers"].values() for point in group["points"]]
    if points and all(point["n_seeds"] == 1 for point in points):
        found.append(
            "One seed each: intervals say how the numbers hang on the documents, not how another training "
            "would have come out."
        )
    left_out = dict(data["left_out"])
    single = [group for group in left_out if len(data["frontiers"][group]["points"]) == 1]
    if len(single) > 1:
        found.append(f"The means over shared l0 are without those of one setting: {', '.join(single)}.")
        left_out = {group: why for group, why in left_out.items() if group not in single}
    found += [f"The means over shared l0 are without {group}: {why}." for group, why in left_out.items()]
    found += [f"{setting} has no place on a frontier: {why}." for setting, why in data["dropped"].items()]
    n_compared = sum(one["low"] is not None for one in data["differences"])
    if n_compared >= 20:
        found.append(
            f"Of {n_compared:,} differences about {round(n_compared / 20):,} would look real by chance alone."
        )
    stopped = data["stopped"]
    if stopped and "spent" in stopped:
        said = figures.stopped(stopped)
        found.append(f"{said[:1].upper()}{said[1:]}.")
    return found


def _summary(data: dict[str, Any]) -> dict[str, Any]:
    pair = data["pair"] or {}
    return {name: pair[name]["value"] for name in ("mmcs_a_to_b", "mmcs_b_to_a") if name in pair}
