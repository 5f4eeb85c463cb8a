"""Whether dictionary, store, model, policy and nulls belong together. Reads their descriptions, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from sememe import artifact
from sememe import lm as language_models
from sememe.dictionaries.base import Dictionary, Site, Sites
from sememe.errors import ConfigError, MismatchError, ShapeError, nearest
from sememe.lm import LanguageModel, ModelConfig
from sememe.measure.config import AUTOENCODER_NULLS, NULLS
from sememe.splice import SeveralModels, SeveralSplicers, Splicer
from sememe.store import Store
from sememe.text import TextConfig, TokenPolicy

__all__ = [
    "check_model",
    "check_nulls",
    "check_parts",
    "check_same_place",
    "check_store",
    "check_text",
    "describe",
    "models_of",
    "one_policy",
    "open_models",
    "policy_of",
    "sign_notice",
    "sites_of",
    "splicer_for",
]


def sites_of(dictionary: Dictionary, path: Path, *, several: bool = False) -> Sites:
    """Where a dictionary reads and writes.

    Args:
        dictionary: Which.
        path: Its folder, for errors.
        several: Places of several models will do; their hookpoints are then numbered by model, as in a joined store.

    Raises:
        MismatchError: it does not know, or these are places of several models.
    """
    if dictionary.sites is None:
        raise MismatchError(
            f"the dictionary {path} must know its model and hookpoint",
            "none (it was trained on bare tensors)",
            "Train it from a store; of another tool's, name the model (--model); or measure it with sememe.metrics.",
        )
    sites = (*dictionary.sites.inputs, *dictionary.sites.outputs)
    if len({site.model_fingerprint for site in sites}) > 1:
        if several:
            return _numbered(dictionary.sites)
        raise MismatchError(
            "a dictionary must read and write one model here",
            ", ".join(sorted({site.model for site in sites})),
            "Name a dictionary of a single model; one of several can be measured by sememe evaluate.",
        )
    return dictionary.sites


def models_of(sites: Sites) -> dict[str, str]:
    """The models of a dictionary, names by fingerprint, in the order in which it reads and writes them."""
    return {site.model_fingerprint: site.model for site in (*sites.inputs, *sites.outputs)}


def _numbered(sites: Sites) -> Sites:
    order = list(models_of(sites))

    def of(side: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(
            site.replace(hookpoint=f"{site.hookpoint}@{order.index(site.model_fingerprint)}") for site in side
        )

    return Sites(inputs=of(sites.inputs), outputs=of(sites.outputs))


def open_models(config: ModelConfig, sites: Sites) -> SeveralModels:
    """The models of a dictionary of several, by the names it knows them by.

    Args:
        config: How to run them; its own model must be one of them.
        sites: Of the dictionary.

    Raises:
        MismatchError: it is none of them, one is not what it was, or their tokenizers differ.
    """
    wanted = models_of(sites)
    given = language_models.fingerprint_of(config)
    if given not in wanted:
        raise MismatchError(
            f"the model must be one of those the dictionary was trained on ({', '.join(wanted.values())})",
            f"{config.model} (fingerprint {given[:16]})",
            f"Pass --model {next(iter(wanted.values()))}.",
        )
    opened = []
    for fingerprint, name in wanted.items():
        lm = language_models.load(config if fingerprint == given else config.replace(model=name))
        if lm.fingerprint != fingerprint:
            raise MismatchError(
                f"{name} must be the model the dictionary was trained on (fingerprint {fingerprint[:16]})",
                f"fingerprint {lm.fingerprint[:16]}",
                "Put that model back in its place, or train again.",
            )
        opened.append(lm)
    return SeveralModels(opened)


def check_parts(top_latents: tuple[int, ...], d_sae: int) -> None:
    """Whether each number of latents leaves a rest.

    Raises:
        ConfigError: one does not.
    """
    for n in top_latents:
        if n >= d_sae:
            raise ConfigError(f"top_latents must leave a rest of d_sae={d_sae}", n, "Lower it.")


def check_same_place(dictionary: Dictionary, other: Dictionary, path: Path) -> None:
    """Whether directions of both can be compared.

    Raises:
        MismatchError: the other is of another model, or writes to another hookpoint.
        ShapeError: they write outputs of different widths.
    """
    assert dictionary.sites is not None
    ours, theirs = dictionary.sites.outputs, sites_of(other, path).outputs
    if ours[0].model_fingerprint != theirs[0].model_fingerprint:
        raise MismatchError(
            f"matched_in must be of the dictionary's model, {ours[0].model} "
            f"(fingerprint {ours[0].model_fingerprint[:16]})",
            f"{path} of {theirs[0].model} (fingerprint {theirs[0].model_fingerprint[:16]})",
            "Name one of the same model.",
        )
    if [site.hookpoint for site in ours] != [site.hookpoint for site in theirs]:
        raise MismatchError(
            f"matched_in must write to the dictionary's hookpoint, {_names(ours)}",
            f"{_names(theirs)} of {path}",
            "Name one of the same hookpoint.",
        )
    if other.d_out != dictionary.d_out:
        raise ShapeError(
            f"matched_in must have d_out={dictionary.d_out} like the dictionary",
            f"{other.d_out} of {path}",
            "Name one of the same hookpoint.",
        )


def check_nulls(nulls: tuple[str, ...], sites: Sites) -> None:
    autoencoder = sites.inputs == sites.outputs
    for name in nulls:
        if name not in NULLS:
            raise ConfigError("a null must be a known one", repr(name), nearest(name, NULLS))
        if name in AUTOENCODER_NULLS and not autoencoder:
            raise ConfigError(
                f"the null {name} needs a dictionary that reconstructs its input",
                f"one from {_names(sites.inputs)} to {_names(sites.outputs)}",
                "Pass --nulls untrained.",
            )
    if len(set(nulls)) != len(nulls):
        raise ConfigError("each null must be named once", ", ".join(nulls), "Leave the repeats out.")


def _names(sites: tuple[Site, ...]) -> str:
    return "+".join(site.hookpoint for site in sites)


def check_model(sites: Sites, fingerprint: str) -> None:
    site = sites.inputs[0]
    if site.model_fingerprint != fingerprint:
        raise MismatchError(
            f"the model must be the one the dictionary was trained on, {site.model} "
            f"(fingerprint {site.model_fingerprint[:16]})",
            f"fingerprint {fingerprint[:16]}",
            f"Pass --model, and --randomise if it was: {site.model}.",
        )


def check_store(store: Store, saved: artifact.Artifact, sites: Sites) -> None:
    """The store must be of the dictionary's model, hold its hookpoints, and be the one it was trained on."""
    wanted = sites.inputs[0].model_fingerprint
    if store.info.model_fingerprint != wanted:
        raise MismatchError(
            f"the store must hold activations of the dictionary's model (fingerprint {wanted[:16]})",
            f"a store of {store.info.model} (fingerprint {store.info.model_fingerprint[:16]})",
            "Name the store that the dictionary was trained on.",
        )
    for site in (*sites.inputs, *sites.outputs):
        point = store.info.hookpoints.get(site.hookpoint)
        if point is None:
            raise MismatchError(
                f"the store {store.artifact.path} ({store.fingerprint[:16]}) must hold {site.hookpoint}, which the "
                f"dictionary ({saved.fingerprint[:16]}) reads or writes",
                ", ".join(store.info.hookpoints),
                "Name the store that the dictionary was trained on.",
            )
        if point.width != site.stop - site.start:
            raise ShapeError(
                f"{site.hookpoint} in the store must be {site.stop - site.start} wide, as in the dictionary",
                point.width,
                "Name the store that the dictionary was trained on.",
            )
    trained_on = saved.meta["parents"].get("store")
    if trained_on is not None and trained_on != store.fingerprint:
        raise MismatchError(
            f"the store must be the one the dictionary was trained on (fingerprint {trained_on[:16]})",
            f"fingerprint {store.fingerprint[:16]}",
            "Name that store, or leave --store out: activations of the training documents are then computed anew.",
        )


def check_text(saved: artifact.Artifact, store: Store | None, text: TextConfig) -> list[str]:
    """No document that was trained on may count as held out; returns a notice where nothing says what was.

    Equal documents lie on the same side of the split in every corpus, so this holds for other corpora too. How
    long documents are cut matters only where pieces are held out one by one.
    """
    recorded = [saved.extra.get("separation"), store.separation if store is not None else None]
    known = [separation for separation in recorded if separation is not None]
    for trained in known:
        _check_separation(trained, text)
    if known:
        return []
    return [
        "The dictionary does not say which documents it was trained on: that it never saw the held-out ones "
        "could not be checked."
    ]


def _check_separation(trained: dict[str, Any], text: TextConfig) -> None:
    if trained["split"] != "train":
        raise MismatchError(
            "the dictionary must have been trained on the train split, for held-out documents to be new to it",
            f"one trained on the split {trained['split']}",
            "Harvest with --split train, and train on that store.",
        )
    held_back = trained["heldout_fraction"]
    if text.heldout_fraction > held_back:
        raise MismatchError(
            f"heldout_fraction must be at most the {held_back:g} that the training text held back",
            f"{text.heldout_fraction:g}",
            "Lower heldout_fraction: else documents that were trained on count as held out.",
        )
    names = ["split_by", "max_document_chars"] if text.split_by == "piece" else ["split_by"]
    for name in names:
        if getattr(text, name) != trained[name]:
            raise MismatchError(
                f"{name} must be the training text's, {trained[name]}",
                getattr(text, name),
                f"Set {name} to that: else documents that were trained on count as held out.",
            )


def policy_of(asked: TokenPolicy | None, saved: artifact.Artifact, store: Store | None) -> TokenPolicy:
    """The dictionary's, the store's, or the config's token policy; they must not contradict one another."""
    given = []
    recorded = saved.extra.get("policy")
    if recorded is not None:
        given.append((f"the dictionary ({saved.fingerprint[:16]})", TokenPolicy.build(recorded)))
    if store is not None:
        given.append((f"the store ({store.fingerprint[:16]})", store.info.policy))
    if asked is not None:
        given.append(("the config", asked))
    for who, policy in given[1:]:
        if policy != given[0][1]:
            ours, theirs = given[0][1].resolved(), policy.resolved()
            different = [name for name in ours if ours[name] != theirs[name]]
            raise MismatchError(
                f"{who} must have the token policy of {given[0][0]}: "
                + ", ".join(f"{name}={ours[name]}" for name in different),
                ", ".join(f"{name}={theirs[name]}" for name in different),
                "Leave the policy's options out, and name the store that the dictionary was trained on.",
            )
    return given[0][1] if given else TokenPolicy()


def one_policy(policies: Mapping[str, TokenPolicy]) -> TokenPolicy:
    """The token policy of dictionaries that are used together, by their names.

    Raises:
        MismatchError: they have several.
    """
    first = next(iter(policies))
    for name, policy in policies.items():
        if policy != policies[first]:
            raise MismatchError(
                f"the dictionaries must have one token policy, that of {first}",
                f"another of {name}",
                "Leave it out, or train it on a store of that policy.",
            )
    return policies[first]


@overload
def splicer_for(lm: LanguageModel, sites: Sites) -> Splicer: ...


@overload
def splicer_for(lm: SeveralModels, sites: Sites) -> SeveralSplicers: ...


def splicer_for(lm: LanguageModel | SeveralModels, sites: Sites) -> Splicer | SeveralSplicers:
    for site in (*sites.inputs, *sites.outputs):
        width = lm.width(site.hookpoint)
        if width != site.stop - site.start:
            raise ShapeError(
                f"{site.hookpoint} must be {site.stop - site.start} wide, as in the dictionary",
                f"{width} in {lm.name}",
                "Evaluate on the model that the dictionary was trained on.",
            )
    reads, writes = ([site.hookpoint for site in side] for side in (sites.inputs, sites.outputs))
    return SeveralSplicers(lm, reads, writes) if isinstance(lm, SeveralModels) else Splicer(lm, reads, writes)


TRAINING_OPTIONS = (
    *("n_tokens", "epochs", "batch_size", "optimiser", "lr", "warmup", "decay", "freeze_above", "scale"),
    *("end_to_end", "seed"),
    *("baseline", "n_rows"),
)
"""Options of `train` and `fit`, beside the architecture's, by which dictionaries of one stream differ."""


PARENTS = ("store", "text", "over")
"""What dictionaries are made from, by fingerprint."""


def describe(saved: artifact.Artifact, dictionary: Dictionary, sites: Sites) -> dict[str, Any]:
    trained_with = saved.meta["config"]
    return {
        "name": saved.path.name,
        "path": str(saved.path),
        "fingerprint": saved.fingerprint,
        "kind": dictionary.kind,
        "config": dictionary.config.resolved(),
        "training": {
            **{name: trained_with[name] for name in TRAINING_OPTIONS if name in trained_with},
            **{name: saved.meta["parents"][name][:16] for name in PARENTS if name in saved.meta["parents"]},
            **({"step": saved.extra["step"]} if "step" in saved.extra else {}),
        },
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "d_sae": dictionary.d_sae,
        "model": sites.inputs[0].model,
        "model_fingerprint": sites.inputs[0].model_fingerprint,
        "inputs": [site.hookpoint for site in sites.inputs],
        "outputs": [site.hookpoint for site in sites.outputs],
        "max_norms": {site.hookpoint: site.max_norm for site in (*sites.inputs, *sites.outputs)},
    }


def sign_notice(signed: Mapping[str, bool]) -> list[str]:
    """What a reader of cosines has to know, if a dictionary's activations may be below 0.

    Args:
        signed: Whether they may, by the dictionary's name.
    """
    names = [name for name, one in signed.items() if one]
    if not names or len(signed) < 2:
        return []
    return [
        f"Activations of {', '.join(names)} may be below 0, so that signs of directions mean nothing: cosines to and "
        "from there are absolute ones (mmcs is mmacs), which by chance are larger."
    ]
