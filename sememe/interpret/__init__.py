"""The verb that runs a dictionary over a text and writes down what every latent does: the atlas.

Knows models, text and dictionaries, and the atlas's schema; how latents are followed is `collect`'s. One
forward per token, stopped after the dictionary's last input; or none, where a store holds what it would give.
Memory does not grow with the text: the collector's is bounded (see `collect`), and token rows and documents go
to disk, 8 bytes per token, until those that an example shows are picked out. Interrupted and started again, it
goes on from its last snapshot with the same result.

    config.py     the options
    stream.py     the pass over the text, its snapshots
    database.py   what it found, as an atlas
"""

from __future__ import annotations

import shutil

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.atlas import DATABASE, Atlas, open_atlas
from sememe.dictionaries import Dictionary, Site
from sememe.errors import ActivationError, MismatchError, TextError
from sememe.interpret.config import InterpretConfig
from sememe.interpret.database import write_database
from sememe.interpret.stream import DOCUMENTS, ROWS, SNAPSHOT, Pass, enough_documents
from sememe.lm import LanguageModel
from sememe.store import Store, open_store
from sememe.text import TokenPolicy, fetch, fingerprint

__all__ = ["InterpretConfig", "interpret", "parents_of"]

VERSION = 1


def parents_of(config: InterpretConfig, lm_fingerprint: str) -> dict[str, str]:
    """Fingerprints of what an atlas is made from."""
    parents = {
        "dictionary": artifact.load(config.dictionary, "dictionary").fingerprint,
        "model": lm_fingerprint,
    }
    if config.store is not None:
        return parents | {"store": open_store(config.store).fingerprint}
    return parents | {"text": fingerprint(config.text)}


def interpret(config: InterpretConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> Atlas:
    """Make an atlas, or open it if it is there.

    Args:
        config: Which dictionary, over which text, and how many examples to keep.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        ArtifactError: config.dictionary is not a dictionary, or another atlas stands at config.out.
        MismatchError: the dictionary belongs to another model, or does not fit the hookpoint.
        TextError: the text has too few documents for the examples asked for.
        ActivationError: an activation is NaN or infinite, or no latent ever fires.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    if config.store is None:
        fetch(config.text)
    parents = parents_of(config, lm.fingerprint if lm else language_models.fingerprint_of(config.model))
    identity = artifact.identity_of("atlas", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "atlas", identity):
        return open_atlas(config.out)
    dictionary = dictionaries.load(config.dictionary)
    lm = lm if lm is not None else language_models.load(config.model)
    check(dictionary, lm)
    policy = TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()
    store = None if config.store is None else open_store(config.store)
    if store is not None:
        check_store(store, dictionary, policy)
        enough_documents(config, len(store.documents()))
    with artifact.building(
        config.out,
        kind="atlas",
        version=VERSION,
        config=config,
        parents=parents,
        resumable=True,
        fresh=fresh,
        leave_out=(SNAPSHOT, ROWS, DOCUMENTS, f"{DATABASE}.wal"),
    ) as work:
        run = Pass(config, lm, dictionary, policy, work.path, store)
        try:
            run.run(resume=work.resumed)
            run.check()
        except (ActivationError, TextError):
            shutil.rmtree(work.path)  # going on would end in the same place
            raise
        about = {
            "name": config.dictionary.name,
            "kind": dictionary.kind,
            "d_in": dictionary.d_in,
            "d_sae": dictionary.d_sae,
            "hookpoint": ", ".join(site.hookpoint for site in run.sites),
            "model": lm.name,
            "fingerprint": saved.fingerprint,
        }
        write_database(work.path / DATABASE, run, about)
        work.extra = {
            "policy": policy.resolved(),
            "n_tokens": run.collector.n_tokens,
            "n_outliers": run.n_outliers,
        }
    return open_atlas(config.out)


def check(dictionary: Dictionary, lm: LanguageModel) -> None:
    """That a dictionary reads this model, and that its inputs have the model's widths.

    Raises:
        MismatchError: it does not.
    """
    if dictionary.sites is None:
        raise MismatchError(
            "the dictionary must say which hookpoints it reads",
            "one that does not",
            "Train it on a language model.",
        )
    for site in dictionary.sites.inputs:
        if site.model_fingerprint != lm.fingerprint:
            raise MismatchError(
                f"the dictionary must belong to the model {lm.name} (fingerprint {lm.fingerprint[:16]})",
                f"one that reads {site.model} ({site.model_fingerprint[:16]})",
                f"Pass --model {site.model}, or a dictionary of {lm.name}.",
            )
        width = lm.width(site.hookpoint)
        if site.stop - site.start != width:
            raise MismatchError(
                f"the dictionary must read all {width} features of {site.hookpoint} of {lm.name}",
                f"d_in {site.stop - site.start}",
                "Use the dictionary with the model and hookpoint it was trained on.",
            )


def check_store(store: Store, dictionary: Dictionary, policy: TokenPolicy) -> None:
    """That a store holds what a dictionary reads.

    Raises:
        HookpointError: the store lacks a hookpoint.
        MismatchError: it is of another model or token policy.
    """
    sites = _inputs(dictionary)
    store.check_hookpoints(site.hookpoint for site in sites)
    for site in sites:
        if site.model_fingerprint != store.info.model_fingerprint:
            raise MismatchError(
                f"the store must be of the dictionary's model (fingerprint {site.model_fingerprint[:16]})",
                f"one of {store.info.model} ({store.info.model_fingerprint[:16]})",
                "Pass the store the dictionary was trained on, or leave --store out.",
            )
    if store.info.policy != policy:
        raise MismatchError(
            f"the store must have the dictionary's token policy {policy.resolved()}",
            str(store.info.policy.resolved()),
            "Pass the store the dictionary was trained on, or leave --store out.",
        )


def _inputs(dictionary: Dictionary) -> tuple[Site, ...]:
    assert dictionary.sites is not None
    return dictionary.sites.inputs
