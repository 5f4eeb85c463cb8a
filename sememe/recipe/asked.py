"""Stages that ask something of finished dictionaries: compare, geometry, any verb about them; release and results."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.recipe.places import Places, Stage
from sememe.recipe.tables import TWIN, Table

__all__ = ["asked", "comparisons", "geometries", "release", "results"]

PARTS = {"report": "evaluate", "atlas": "interpret"}
"""Parts of a release beside its dictionaries, and the stages that make them."""


def comparisons(places: Places, made: Sequence[Stage]) -> list[Stage]:
    """[compare], or [compare.NAME]: all dictionaries and baselines, or those that its table names."""
    if not places.recipe.comparisons:
        return []
    from sememe.compare import CompareConfig

    found = []
    for name, table in places.recipe.comparisons.items():
        labels, rest = _chosen(places, "compare", table)
        if len(labels) < 2:
            raise ConfigError(
                f"a recipe that ends in [compare] must make at least two dictionaries ({places.recipe.name})",
                len(labels),
                "Add [train.NAME] or [fit.NAME] tables or a sweep, or drop [compare].",
            )
        if "dictionaries" in table:
            paths = tuple(places.dictionary(label) for label in labels)
        else:  # folders: a sweep as a whole
            paths = tuple(s.path for s in made if s.verb in ("train", "fit") and s.name != TWIN)
        on_text = not rest.get("directions_only")  # else nothing of it has an effect
        shared = places.shared if on_text else {}
        twin = on_text and places.recipe.twin is not None
        beside = {"twins": (places.twin_path(),)} if twin else {}
        out = places.base / "comparison" / name
        about: dict[str, Any] = {"dictionaries": paths, "out": out}
        if on_text or "store" in table:
            about["store"] = _store(places, table, labels)
        config = CompareConfig.build({**shared, **rest, **about, **beside}, places.where)
        found.append(Stage("compare", name, out, config))
    return found


def geometries(places: Places) -> list[Stage]:
    """[geometry], or [geometry.NAME]. Rows come from the store, where all of them share one."""
    if not places.recipe.geometries:
        return []
    from sememe.geometry import GeometryConfig

    found = []
    for name, table in places.recipe.geometries.items():
        labels, rest = _chosen(places, "geometry", table)
        out = places.base / "geometry" / name
        about: dict[str, Any] = {"dictionaries": tuple(map(places.dictionary, labels)), "out": out}
        about["store"] = _store(places, table, labels)
        if rest.get("embeddings"):
            about["model"] = {**places.model, **rest.get("model", {})}
        config = GeometryConfig.build({**rest, **about}, places.where)
        found.append(Stage("geometry", name, out, config))
    return found


def _chosen(places: Places, stage: str, table: Table) -> tuple[list[str], Table]:
    """Dictionaries and baselines that a stage is about, and the rest of its table."""
    rest = {key: value for key, value in table.items() if key not in ("dictionaries", "store")}
    if "dictionaries" not in table:
        return [*places.trained, *places.recipe.baselines], rest
    return places.named(f"dictionaries of [{stage}]", table["dictionaries"], baselines=True), rest


def _store(places: Places, table: Table, labels: Iterable[str]) -> Path | None:
    """The harvest that a table names; else the store that all of its dictionaries come from, if there is one."""
    if "store" in table:
        return places.stores[places.harvest_of(table)]
    stores = {places.store_of(label) for label in labels}
    return stores.pop() if len(stores) == 1 else None


# -- any verb about dictionaries ------------------------------------------------------------------------------------


def asked(places: Places) -> list[Stage]:
    """[VERB] or [VERB.NAME] tables: for every trained dictionary, or those that it names.

    A verb that takes several dictionaries has one result in VERB/NAME; one that takes one has a result of each in
    VERB/NAME/DICTIONARY. A verb's config says what it wants: of `model`, `text`, `store`, `atlas`, `atlases`,
    `explanations` it is given those that it has a field for, as far as the recipe makes them.
    """
    found = []
    for verb, tables in places.recipe.asked.items():
        config = _config_of(verb)
        for name, table in tables.items():
            labels, rest = places.about(verb, {key: value for key, value in table.items() if key != "store"})
            together = "dictionaries" in config.model_fields
            for group in [labels] if together else [[label] for label in labels]:
                place = Path(name) if together else Path(name) / places.trained[group[0]].place
                offered = _offered(places, table, group)
                given = {key: value for key, value in offered.items() if key in config.model_fields}
                out = places.base / verb / place
                built = config.build({**given, **rest, "out": out}, places.where)
                found.append(Stage(verb, "" if place == Path() else str(place), out, built))
    return found


def _config_of(verb: str) -> type[Config]:
    if importlib.util.find_spec(f"sememe.{verb}") is None:
        raise ConfigError(
            "a table of a recipe must be of a verb that this version has",
            repr(verb),
            "Drop it, or upgrade sememe.",
        )
    found: type[Config] = getattr(importlib.import_module(f"sememe.{verb}"), f"{verb.capitalize()}Config")
    return found


def _offered(places: Places, table: Table, labels: Sequence[str]) -> dict[str, Any]:
    paths, interpret = tuple(map(places.dictionary, labels)), places.recipe.interpret
    offered: dict[str, Any] = {
        **places.shared,
        "store": _store(places, table, labels),
        "dictionary": paths[0],
        "dictionaries": paths,
    }
    interpreted = [] if interpret is None else places.about("interpret", interpret)[0]
    if labels[0] in interpreted:
        offered["atlas"] = places.base / "atlas" / places.trained[labels[0]].place
    if set(labels) <= set(interpreted):  # by place in a list: all of them or none
        kinds = ["atlas", *(["explanations"] if places.recipe.explain is not None else [])]
        for kind, option in zip(kinds, ("atlases", "explanations"), strict=False):
            offered[option] = tuple(places.base / kind / places.trained[label].place for label in labels)
    return offered


# -- what others can use -------------------------------------------------------------------------------------------


def release(places: Places, made: Sequence[Stage]) -> list[Stage]:
    """[publish]: the dictionaries, their reports and atlases in one folder with a card. It is uploaded by hand."""
    table = places.recipe.publish
    if table is None:
        return []
    from sememe.publish import PublishConfig

    for option in ("repo", "private", "dry_run"):
        if option in table:
            raise ConfigError(
                f"{option} must be left out of [publish]: a recipe sends nothing anywhere",
                table[option],
                "Look with `sememe publish RELEASE --dry-run`, and upload with `sememe publish RELEASE --repo`.",
            )
    if not places.trained:
        raise ConfigError(
            f"a recipe that ends in [publish] must train a dictionary ({places.recipe.name})",
            "none",
            "Add [train], or drop [publish].",
        )
    verbs = {stage.verb for stage in made}
    about: dict[str, Any] = {"dictionary": places.base / "dictionary", "out": places.base / "release"}
    about |= {role: places.base / role for role, verb in PARTS.items() if verb in verbs}
    return [Stage("publish", "", about["out"], PublishConfig.build({**table, **about}, places.where))]


def _made(stages: Sequence[Stage]) -> list[Path]:
    """The folders that stages make: of explanations, those of the atlas's nulls lie beside its own."""
    configs: dict[tuple[str, str], Any] = {(stage.verb, stage.name): stage.config for stage in stages}
    found = []
    for stage in stages:
        found.append(stage.path)
        if stage.verb == "explain" and configs["explain", stage.name].nulls is None:
            nulls = configs["interpret", stage.name].nulls
            found += [stage.path.with_name(f"{stage.path.name}-null-{null}") for null in nulls]
    return found


# -- the published numbers -----------------------------------------------------------------------------------------


def results(places: Places, made: Sequence[Stage]) -> list[Stage]:
    """[expected]: a page that puts the published numbers beside those of the recipe's stages."""
    table = places.recipe.expected
    if table is None:
        return []
    from sememe.results import ResultsConfig

    out = places.base / "results"
    about = {"base": places.base, "out": out, "name": places.recipe.name, "scale": places.recipe.scale}
    config = ResultsConfig.build({**table, **about}, places.where)
    known = [str(path.relative_to(places.base)) for path in _made(made)]
    for file in config.files():
        if not any(file == path or file.startswith(f"{path}/") for path in known):
            raise ConfigError(
                "a number of [expected] must come from what a stage of the recipe makes",
                repr(file),
                f"Name a file in one of {', '.join(known)}.",
            )
    return [Stage("results", "", out, config)]
