"""The model of the atlas null `randomised`: the one its dictionary was trained on, with the weights shuffled.

That null keeps its dictionary inside its atlas, and the dictionary still names the model as it was trained: whoever
runs texts through it asks here which model that takes. Knows dictionaries as artifacts and models' configs; runs
nothing.
"""

from __future__ import annotations

from typing import Any

from sememe import artifact
from sememe.atlas import RANDOMISED
from sememe.dictionaries import Dictionary, Site
from sememe.errors import ArtifactError, MismatchError
from sememe.lm import LanguageModel, ModelConfig

__all__ = ["at_home", "fingerprint_for", "model_for"]


def model_for(saved: artifact.Artifact, model: ModelConfig) -> ModelConfig:
    """The config of the model that a dictionary must be run on: as it is, but for the null `randomised`.

    Args:
        saved: The dictionary's folder.
        model: The model that the dictionary was trained on.
    Raises:
        MismatchError: it is that null's and lies outside of its atlas, so that the shuffle is not known; or the
            config asks for another shuffle.
    """
    changes = _shuffle(saved)
    if not changes:
        return model
    shuffled = model.replace(**changes)
    if model.randomise != "none" and model != shuffled:
        raise MismatchError(
            f"the null {saved.path} must be run on the model shuffled as it was for its atlas "
            f"(layers, seed {shuffled.randomise_seed})",
            f"{model.randomise}, seed {model.randomise_seed}",
            "Leave --randomise out: the shuffle is known.",
        )
    return shuffled


def fingerprint_for(saved: artifact.Artifact, fingerprint: str) -> str:
    """The fingerprint of the model that a dictionary must be run on, from that of the one it was trained on.

    Raises:
        MismatchError: as `model_for`.
    """
    return ModelConfig(**_shuffle(saved)).marked(fingerprint)


def at_home(dictionary: Dictionary, saved: artifact.Artifact, lm: LanguageModel) -> Dictionary:
    """The same dictionary, its sites those of the model that it must be run on; as it is, but for that null.

    Raises:
        MismatchError: as `model_for`; or `lm` is not that model.
    """
    if not _shuffle(saved) or dictionary.sites is None:
        return dictionary
    trained_on = str(saved.meta["parents"]["model"])
    wanted = fingerprint_for(saved, trained_on)
    if lm.fingerprint != wanted:
        raise MismatchError(
            f"the null {saved.path} must be run on the model with its weights shuffled "
            f"(fingerprint {wanted[:16]})",
            f"{lm.name} ({lm.fingerprint[:16]})",
            "Leave the model out, so that the shuffled one is loaded.",
        )

    def moved(site: Site) -> Site:
        if site.model_fingerprint != trained_on:
            return site
        return site.replace(model=lm.name, model_fingerprint=wanted)

    sites = dictionary.sites
    dictionary.sites = sites.replace(
        inputs=tuple(moved(site) for site in sites.inputs),
        outputs=tuple(moved(site) for site in sites.outputs),
    )
    return dictionary


def _shuffle(saved: artifact.Artifact) -> dict[str, Any]:
    """The options by which the model differs from the dictionary's own; none, but for that null."""
    if saved.meta["parents"].get("null") != RANDOMISED:
        return {}
    try:
        config = artifact.load(saved.path.parent, "atlas").meta["config"]
    except ArtifactError:
        raise MismatchError(
            f"{saved.path} must lie inside its atlas, which knows how the model's weights were shuffled: "
            f"it is of the null {RANDOMISED}",
            "no atlas around it",
            "Name the folder `dictionary` inside the null's atlas.",
        ) from None
    return {"randomise": "layers", "randomise_seed": config["seed"]}
