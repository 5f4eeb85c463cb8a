"""The verb that changes a model's latents and writes down what the model then says.

Knows dictionaries, models and text; the edits are `edits.py`, the splicing `splice.py`. Latents are ablated in the
contexts where they
fire most, and turned up while the model writes.

    config.py     the options
    ablation.py   what goes missing when a latent is taken out
    steering.py   what the model writes when a latent is turned up
    pages.py      effects.json as Markdown and histograms
"""

from __future__ import annotations

from typing import Any

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.dictionaries.base import Dictionary
from sememe.edits import check
from sememe.errors import ConfigError, MismatchError
from sememe.intervene.ablation import ablate, find
from sememe.intervene.config import InterveneConfig
from sememe.intervene.pages import page, pictures
from sememe.intervene.steering import steer
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.splice import Splicer
from sememe.text import TokenPolicy, attributions, fetch, fingerprint

__all__ = ["InterveneConfig", "intervene"]

VERSION = 3
EFFECTS, PAGE = "effects.json", "effects.md"


def intervene(
    config: InterveneConfig, *, lm: LanguageModel | None = None, fresh: bool = False
) -> artifact.Artifact:
    """Ablate some latents on a text and steer with them, or open the effects if they are there.

    Args:
        config: Which latents, on what.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.
    Returns:
        The folder, with `effects.json`, `effects.md` and its figures.
    Raises:
        ConfigError: a latent does not exist.
        MismatchError: the dictionary belongs to another model; or other effects stand at config.out.
        TextError: the text is shorter than one context.
        ActivationError: an edit drives the model to NaN or infinity.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    dictionary = dictionaries.load(config.dictionary)
    _check_latents(config, dictionary)
    fetch(config.text)
    model_fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    parents = {
        "dictionary": saved.fingerprint,
        "model": model_fingerprint,
        "text": fingerprint(config.text),
    }
    identity = artifact.identity_of("effects", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "effects", identity)):
        return done
    lm = lm if lm is not None else language_models.load(config.model)
    check(dictionary, lm)
    with artifact.building(
        config.out, kind="effects", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        data = _measure(config, lm, dictionary.to(lm.device), saved)
        artifact.write_json(work.path / EFFECTS, data)
        (work.path / PAGE).write_text(page(data), encoding="utf-8")
        for name, picture in pictures(data).items():
            (work.path / name).parent.mkdir(exist_ok=True)
            (work.path / name).write_text(picture, encoding="utf-8")
    return artifact.load(config.out, "effects")


def _check_latents(config: InterveneConfig, dictionary: Dictionary) -> None:
    if dictionary.sites is None:
        raise MismatchError(
            f"the dictionary {config.dictionary} must know its model and hookpoint",
            "none (it was trained on bare tensors)",
            "Train it from a store.",
        )
    for latent in config.latents:
        if not 0 <= latent < dictionary.d_sae:
            raise ConfigError(f"a latent must be in [0, {dictionary.d_sae - 1}]", latent, "Change --latents.")


def _measure(
    config: InterveneConfig, lm: LanguageModel, dictionary: Dictionary, saved: artifact.Artifact
) -> dict[str, Any]:
    sites = dictionary.sites
    assert sites is not None
    policy = TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()
    splicer = Splicer(lm, [s.hookpoint for s in sites.inputs], [s.hookpoint for s in sites.outputs])
    latents = []
    found = find(config, lm, dictionary, splicer, policy)
    with track("ablate and steer", len(found), "latents") as progress:
        for one in found:
            effects = ablate(config, lm, dictionary, splicer, one)
            if config.prompts and one.max_act > 0:
                effects["steering"] = steer(config, lm, dictionary, one.latent, one.max_act, bos=policy.bos)
            latents.append(effects)
            progress.advance()
    return {
        "dictionary": {
            "name": config.dictionary.name,
            "kind": dictionary.kind,
            "d_sae": dictionary.d_sae,
            "fingerprint": saved.fingerprint,
            "model": lm.name,
            "hookpoints": list(sites.hookpoints),
        },
        "ablation": config.ablation,
        "error": config.error,
        "policy": policy.resolved(),
        "attributions": [a._asdict() for a in attributions(config.text)],
        "latents": latents,
    }
