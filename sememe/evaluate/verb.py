"""Opens what an evaluation needs, checks that it belongs together, measures, and writes the report."""

from __future__ import annotations

from sememe import artifact, dictionaries, figures, text
from sememe import lm as language_models
from sememe.evaluate.arms import make_arms
from sememe.evaluate.checks import (
    check_model,
    check_nulls,
    check_parts,
    check_store,
    check_text,
    describe,
    policy_of,
    sites_of,
    splicer_for,
)
from sememe.evaluate.config import EvaluateConfig
from sememe.evaluate.measure import Measured
from sememe.figures import Report
from sememe.lm import LanguageModel
from sememe.store import open_store

__all__ = ["evaluate"]

VERSION = 2


def evaluate(config: EvaluateConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> Report:
    """Measure a dictionary and write a report, or open it if it is there.

    Args:
        config: Which dictionary, on what, against what.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: a null is unknown, or cannot be made for this dictionary.
        MismatchError: dictionary, store, model and policy do not belong together; or another report stands at
            config.out.
        TextError: the held-out text is shorter than one context.
        ActivationError: an activation is NaN or infinite; the error says in which document.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    dictionary = dictionaries.load(config.dictionary)
    sites = sites_of(dictionary, config.dictionary)
    check_nulls(config.nulls, sites)
    check_parts(config.top_latents, dictionary.d_sae)
    store = None if config.store is None else open_store(config.store)
    policy = policy_of(config, saved, store)
    if store is not None:
        check_store(store, saved, sites)
    notices = check_text(saved, store, config.text)
    model_fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    check_model(sites, model_fingerprint)
    text.fetch(config.text)
    parents = {
        "dictionary": saved.fingerprint,
        "model": model_fingerprint,
        "text": text.fingerprint(config.text),
    }
    if store is not None:
        parents["store"] = store.fingerprint
    identity = artifact.identity_of("report", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "report", identity):
        return figures.open_report(config.out)
    lm = lm if lm is not None else language_models.load(config.model)
    splicer = splicer_for(lm, sites)
    with artifact.building(
        config.out, kind="report", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        measured = Measured(config, lm, splicer, sites, policy)
        arms, null_configs = make_arms(config, lm, dictionary.to(lm.device), sites, policy, store)
        measured.run(arms)
        data = measured.report(arms) | {
            "dictionary": describe(saved, dictionary, sites),
            "null_configs": null_configs,
            "text": measured.describe_text(parents["text"]),
            "store": None if store is None else {"path": str(config.store), "fingerprint": store.fingerprint},
            "notices": notices,
            "training": figures.read_curves(saved),
            "watched": figures.read_watched(saved),
            "attributions": [a._asdict() for a in text.attributions(config.text)],
        }
        artifact.write_json(work.path / figures.REPORT, data)
        figures.write_pages(work.path, {saved.path.name: data})
        work.extra = {
            name: data["metrics"][name]["value"] for name in figures.HEADLINE if name in data["metrics"]
        }
    return figures.open_report(config.out)
