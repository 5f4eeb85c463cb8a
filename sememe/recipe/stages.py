"""From a recipe's tables to its stages: what makes models, stores and dictionaries, and what is told of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sememe.errors import ConfigError, nearest
from sememe.recipe.asked import asked, comparisons, geometries, release, results
from sememe.recipe.places import Places, Stage, Trained, place_of
from sememe.recipe.tables import TWIN, Recipe

__all__ = ["Stage", "place_of", "stages"]

REPORTING = ("evaluate", "compare", "concepts", "results")


def stages(recipe: Recipe, base: Path) -> list[Stage]:
    """Every stage in order, its config built and so checked.

    Raises:
        ConfigError: an option of a stage is unknown, out of range, or without effect; or what is trained on is what
            is evaluated on.
    """
    places = Places(recipe, base)
    found = [*_pretrain(places), *_toys(places)]
    harvests = _harvests(places)
    found += harvests
    if recipe.twin is not None:
        found += _twin(places, harvests)
    for name in recipe.dictionaries:
        found.append(_train(places, name))
    # All dictionaries before the first atlas, which may look into them.
    for label in places.trained:
        found += _after_training(places, label)
    # All reports of a sweep before its first page, which shows them.
    for label in places.trained:
        found += _page(places, label)
    found += _baselines(places)
    found += comparisons(places, found)
    found += geometries(places)
    found += asked(places)
    for stage in harvests:
        split = stage.config.split  # type: ignore[attr-defined]
        if split != "train" and any(stage.verb in REPORTING for stage in found):
            raise ConfigError(
                "a recipe that evaluates must harvest the train split, or no document is held out",
                repr(split),
                "Leave split out of [harvest].",
            )
    found += release(places, found)
    found += results(places, found)
    return found


# -- models, stores, dictionaries --------------------------------------------------------------------------------------


def _pretrain(places: Places) -> list[Stage]:
    """The language model, if the recipe makes its own."""
    recipe = places.recipe
    if recipe.pretrain is None:
        return []
    from sememe.pretrain import PretrainConfig
    from sememe.text import TokenPolicy

    out = places.base / "model"
    config = PretrainConfig.build({"text": recipe.text, **recipe.pretrain, "out": out}, places.where)
    length = TokenPolicy.build(recipe.policy, places.where).context_length
    if recipe.harvests and length > config.context_length:
        raise ConfigError(
            f"context_length of [policy] must be <= that of [pretrain], {config.context_length}",
            length,
            "Lower the first or raise the second.",
        )
    return [Stage("pretrain", "", out, config)]


def _toys(places: Places) -> list[Stage]:
    """Trainings on planted features, and grids of them."""
    found = []
    if places.recipe.toys:
        from sememe.recover import RecoverConfig

        for name, table in places.recipe.toys.items():
            out = places.base / "toy" / name
            config = RecoverConfig.build({**table, "out": out}, places.where)
            found.append(Stage("toy", name, out / "recovery", config))
    if places.recipe.grids:
        from sememe.grid import GridConfig

        for name, table in places.recipe.grids.items():
            out = places.base / "grid" / name
            asked_for = GridConfig.build({**table, "out": out}, places.where)
            found.append(Stage("grid", name, out / "plots", asked_for))
    return found


def _harvests(places: Places) -> list[Stage]:
    from sememe.harvest import HarvestConfig

    shared = {**places.shared, "policy": places.recipe.policy}
    return [
        Stage(
            "harvest",
            name,
            places.stores[name],
            HarvestConfig.build({**shared, **table, "out": places.stores[name]}, places.where),
        )
        for name, table in places.recipe.harvests.items()
    ]


def _twin(places: Places, harvests: list[Stage]) -> list[Stage]:
    """The null of training as a whole: the same text through the model with its weights shuffled, the same training."""
    from sememe.harvest import HarvestConfig
    from sememe.train import TrainConfig

    twin = places.recipe.twin
    assert twin is not None
    of = places.recipe.dictionaries[twin["of"]]
    harvest = next(stage for stage in harvests if stage.name == places.harvest_of(of))
    model = {**places.model, "randomise": twin["randomise"]}
    store, out = places.base / TWIN / "store", places.twin_path()
    resolved = {**harvest.config.resolved(), "model": model, "out": store}
    return [
        Stage("harvest", TWIN, store, HarvestConfig.build(resolved, places.where)),
        Stage("train", TWIN, out, TrainConfig.build({**of, "store": store, "out": out}, places.where)),
    ]


def _train(places: Places, name: str) -> Stage:
    """A dictionary or a sweep of them."""
    from sememe.train import TrainConfig, swept_names

    table, out = places.recipe.dictionaries[name], places.base / "dictionary" / name
    store = None if table.get("live") else places.stores[places.harvest_of(table)]
    # A live run reads the model itself.
    read = {"store": store} if store else {**places.shared, "policy": places.recipe.policy}
    config = TrainConfig.build({**table, **read, "out": out}, places.where)
    for member in swept_names(config):
        place = Path(name) / member
        places.trained["" if place == Path() else str(place)] = Trained(place, store, table)
    return Stage("train", name, out, config)


def _baselines(places: Places) -> list[Stage]:
    """The fit stages. `over` is the name of one of the dictionaries trained: "small", or "small/k16" of a sweep."""
    if not places.recipe.baselines:
        return []
    from sememe.fit import FitConfig

    found = []
    for name, table in places.recipe.baselines.items():
        about: dict[str, Any] = {"store": places.store_of(name)}
        about["out"] = places.base / "baseline" / name
        if "over" in table:
            over = str(table["over"])
            if over not in places.trained:
                raise ConfigError(
                    f"over must name a dictionary that the recipe {places.recipe.name} trains",
                    repr(over),
                    nearest(over, places.trained),
                )
            about["over"] = places.dictionary(over)
        found.append(Stage("fit", name, about["out"], FitConfig.build({**table, **about}, places.where)))
    return found


# -- what is told of each dictionary -----------------------------------------------------------------------------------


KINDS = ("dictionary", "report", "atlas", "prompts", "effects", "explanations", "site")
"""Folders with a place in each for every dictionary."""


def _after_training(places: Places, name: str) -> list[Stage]:
    """What happens to one dictionary before its page, each result at its place in the folder of its kind."""
    recipe, where, own = places.recipe, places.where, places.trained[name]
    paths = _paths(places, name)
    found: list[Stage] = []
    reported, evaluate_table = _about(places, "evaluate", name)
    if reported:
        from sememe.evaluate import EvaluateConfig

        about: dict[str, Any] = {
            "dictionary": paths["dictionary"],
            "store": own.store,
            "out": paths["report"],
        }
        _check_free(evaluate_table, about, "evaluate")
        beside = places.twins_beside(name)
        evaluate = EvaluateConfig.build({**places.shared, **evaluate_table, **about, **beside}, where)
        found.append(Stage("evaluate", name, paths["report"], evaluate))
    interpreted, interpret_table = _about(places, "interpret", name)
    if not interpreted:
        return found
    from sememe.interpret import InterpretConfig

    # Over the store's own text, whose activations need no second forward, unless the recipe asks for another.
    elsewhere = own.store is None or {"n_tokens", "split", "text"} & set(interpret_table)
    origin = places.shared if elsewhere else {"model": places.model, "store": own.store}
    made: dict[str, Any] = {"dictionaries": (paths["dictionary"],), "out": paths["atlas"]}
    _check_free(interpret_table, made, "interpret")
    if "against" in interpret_table:
        others = places.named("against", interpret_table["against"])
        made["against"] = tuple(places.dictionary(other) for other in others if other != name)
    interpret = InterpretConfig.build({**origin, **interpret_table, **made}, where)
    found.append(Stage("interpret", name, paths["atlas"], interpret))
    seen = {"atlas": paths["atlas"], "dictionary": paths["dictionary"]}
    if recipe.prompts is not None:
        from sememe.prompt import PromptsConfig

        read = {**seen, "out": paths["prompts"]}
        _check_free(recipe.prompts, read, "prompts")
        prompts = PromptsConfig.build({"model": places.model, **recipe.prompts, **read}, where)
        found.append(Stage("prompts", name, paths["prompts"], prompts))
    affected, effects_table = _about(places, "effects", name)
    if affected:
        from sememe.effects import EffectsConfig

        read = {**seen, "out": paths["effects"]}
        _check_free(effects_table, read, "effects")
        effects = EffectsConfig.build({"model": places.model, **effects_table, **read}, where)
        found.append(Stage("effects", name, paths["effects"], effects))
    if recipe.explain is not None:
        found.append(_explain(places, name))
    return found


def _explain(places: Places, name: str) -> Stage:
    """`effects = true` tells the explainer the recipe's own effects."""
    from sememe.explain import ExplainConfig

    table, paths = dict(places.recipe.explain or {}), _paths(places, name)
    read = {"atlas": paths["atlas"], "out": paths["explanations"]}
    _check_free(table, read, "explain")
    if isinstance(table.get("effects"), bool):
        told = table.pop("effects")
        if told and not _about(places, "effects", name)[0]:
            raise ConfigError(
                "effects of [explain] can be told where the recipe measures them",
                "true",
                f"Add [effects], or {name} to its dictionaries.",
            )
        if told:
            table["effects"] = paths["effects"]
    config = ExplainConfig.build({**table, **read}, places.where)
    return Stage("explain", name, paths["explanations"], config)


def _page(places: Places, name: str) -> list[Stage]:
    """The page of one dictionary's atlas, with all that the recipe makes of it; options of [export] come before that.

    Of a sweep all reports are shown, so that each of its dictionaries stands on the frontier of all.
    """
    recipe = places.recipe
    if recipe.export is None or not _about(places, "interpret", name)[0]:
        return []
    from sememe.browse import ExportConfig

    paths = _paths(places, name)
    read = {"atlas": paths["atlas"], "out": paths["site"]}
    _check_free(recipe.export, read, "export")
    shown: dict[str, Any] = {}
    if _about(places, "evaluate", name)[0]:
        shown["report"] = (
            paths["report"].parent if places.trained[name].table.get("sweep") else paths["report"]
        )
    if recipe.prompts is not None:
        shown["prompts"] = (paths["prompts"],)
    if _about(places, "effects", name)[0]:
        shown["effects"] = paths["effects"]
    if recipe.explain is not None:
        shown["explanations"] = paths["explanations"]
    config = ExportConfig.build({**shown, **recipe.export, **read}, places.where)
    return [Stage("export", name, paths["site"], config)]


def _paths(places: Places, name: str) -> dict[str, Path]:
    return {kind: places.base / kind / places.trained[name].place for kind in KINDS}


def _check_free(table: dict[str, Any], decided: Iterable[str], stage: str) -> None:
    """That a stage's table leaves alone what follows from the recipe.

    Raises:
        ConfigError: it does not.
    """
    for key in decided:
        if key in table:
            raise ConfigError(
                f"{key} must be left out of [{stage}]: where that is follows from the recipe's name",
                repr(table[key]),
                f"Drop it, or run `sememe {'browse --export' if stage == 'export' else stage}` by hand.",
            )


def _about(places: Places, stage: str, name: str) -> tuple[bool, dict[str, Any]]:
    """Whether a stage is about a dictionary, and its table without the key that says so."""
    table = getattr(places.recipe, stage)
    if table is None:
        return False, {}
    chosen, rest = places.about(stage, table)
    return name in chosen, rest
