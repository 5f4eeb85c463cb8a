"""Opens what is asked, writes continuations of every prompt at every dose of every arm, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe import artifact, dictionaries, figures
from sememe import lm as language_models
from sememe.capture import captured_rows
from sememe.config import sha256_of
from sememe.dictionaries.base import Dictionary, Sites
from sememe.downstream import prompt_ids
from sememe.errors import ActivationError, ConfigError
from sememe.labelled import Labelled, pooled_rows, read_labelled
from sememe.lm import LanguageModel
from sememe.measure.checks import check_model, describe, policy_of, sites_of, splicer_for
from sememe.progress import Progress, track
from sememe.steer.config import SteerConfig
from sememe.steer.lexical import train_lexical
from sememe.steer.measures import MEANINGS, Measures, Share, Written
from sememe.steer.pushes import Push, latents_push, like, pushing, random_push
from sememe.text import TokenPolicy, attributions, fetch, fingerprint, token_blocks

__all__ = ["STEERING", "steer", "write"]

VERSION = 1
STEERING = "steering.json"
N_EXAMPLES = 3
"""Prompts whose first continuation stands in the report."""


def steer(config: SteerConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> artifact.Artifact:
    """Steer, or open what came of it if it is there.

    The artifact holds steering.json, steering.csv, steering.md and steering.html.

    Args:
        config: Which latents, how far.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: a latent does not exist, or never fires on the text; there is no such label; a prompt is empty.
        TextError: labels are missing or too few; the text is too short.
        MismatchError: the dictionary is of another model; or other steering stands at config.out.
        ModelError: prompt and continuation do not fit the model's context.
        ActivationError: every dose drives the model to NaN or infinity.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    dictionary = dictionaries.load(config.dictionary)
    sites = sites_of(dictionary, config.dictionary)
    for latent in config.latents:
        if not 0 <= latent < dictionary.d_sae:
            raise ConfigError(f"a latent must be in [0, {dictionary.d_sae - 1}]", latent, "Change --latents.")
    policy = policy_of(config.policy, saved, None)
    model_fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(config.model)
    check_model(sites, model_fingerprint)
    labelled = read_labelled(config) if config.has_labels else None
    towards = _label(config, labelled) if labelled is not None else None
    fetch(config.text)
    parents = {
        "dictionary": saved.fingerprint,
        "model": model_fingerprint,
        "text": fingerprint(config.text),
    }
    if labelled is not None:
        parents["texts"] = sha256_of([labelled.texts, labelled.labels])
    identity = artifact.identity_of("steering", VERSION, config, parents)
    if not fresh and (found := artifact.find(config.out, "steering", identity, config, parents)):
        return found
    lm = lm if lm is not None else language_models.load(config.model)
    splicer_for(lm, sites)  # widths
    with artifact.building(
        config.out, kind="steering", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        dictionary = dictionary.to(lm.device)
        largest = _largest(config, lm, dictionary, sites, policy)
        own = latents_push(dictionary, largest)
        arms, natural = [own], {}
        if labelled is not None and towards is not None:
            difference = _difference(config, lm, dictionary, sites, policy, labelled, towards)
            natural["difference in means"] = float(difference.norm())
            arms.append(like(difference, own, "difference in means"))
        arms += [random_push(own, draw, config.seed) for draw in range(config.n_random)]
        lexical = None
        if labelled is not None:
            lexical = train_lexical(
                labelled.texts, [name == towards for name in labelled.labels], seed=config.seed
            )
        told = _Told(config, lm, dictionary, policy.bos, Measures(config, lm, dictionary, largest, lexical))
        data = _data(config, told, arms)
        data |= {
            "format_version": 1,
            "dictionary": describe(saved, dictionary, sites),
            "latents": [{"latent": latent, "largest": act} for latent, act in largest],
            "length": float(own.vector.norm()),
            "natural_lengths": natural,
            "style": config.style,
            "meanings": {name: MEANINGS[name] for name in told.measures.names},
            "looked_for": {
                "tokens": list(config.target_tokens),
                "words": list(config.words),
                "pattern": config.pattern,
                "label": towards,
            },
            "classifier": None if lexical is None else {"label": towards, "accuracy": lexical.accuracy},
            "prompts": list(config.prompts),
            "n_samples": config.samples(),
            "new_tokens": config.new_tokens,
            "temperature": config.temperature,
            "policy": policy.resolved(),
            "attributions": [a._asdict() for a in attributions(config.text)],
        }
        artifact.write_json(work.path / STEERING, data)
        figures.write_steering(work.path, data)
        work.extra = {"latents": list(config.latents), "n_prompts": len(config.prompts)}
    return artifact.load(config.out, "steering")


def _label(config: SteerConfig, labelled: Labelled) -> str:
    if config.towards is None:
        return labelled.classes[0]
    if config.towards not in labelled.classes:
        raise ConfigError(
            "the label to steer to must be one that is asked about",
            repr(config.towards),
            f"Known: {', '.join(labelled.classes)}.",
        )
    return config.towards


@torch.inference_mode()
def _largest(
    config: SteerConfig, lm: LanguageModel, dictionary: Dictionary, sites: Sites, policy: TokenPolicy
) -> list[tuple[int, float]]:
    """Each latent's largest activation on the text, at kept positions.

    Raises:
        ConfigError: one never fires.
    """
    limits = {site.hookpoint: site.max_norm for site in (*sites.inputs, *sites.outputs)}
    blocks = token_blocks(config.text, lm.tokenizer, policy, split="heldout", n_tokens=config.n_tokens)
    found = torch.zeros(len(config.latents))
    with track("largest activations", config.n_tokens, "tokens") as progress:
        for rows in captured_rows(lm, blocks, sites.hookpoints, config.batch_rows, limits):
            parts = [rows.activations[site.hookpoint].float() for site in sites.inputs]
            x = torch.cat([part.to(lm.device) for part in parts], dim=-1)
            if len(x):
                acts = dictionary.encode_latents(x, config.latents)
                found = torch.maximum(found, acts.amax(0).cpu())
            progress.advance(rows.n_tokens)
    for latent, act in zip(config.latents, found.tolist(), strict=True):
        if act <= 0:
            raise ConfigError(
                "a latent to steer with must fire on the text, whose largest activation is the dose's unit",
                f"latent {latent}, never in {config.n_tokens:,} tokens",
                "Raise --n-tokens, or name another latent.",
            )
    return list(zip(config.latents, found.tolist(), strict=True))


def _difference(
    config: SteerConfig,
    lm: LanguageModel,
    dictionary: Dictionary,
    sites: Sites,
    policy: TokenPolicy,
    labelled: Labelled,
    towards: str,
) -> Float[Tensor, " d_out"]:
    """The mean of the label's texts less the mean of the others'.

    Raises:
        ActivationError: they are the same.
    """
    pooled = pooled_rows(lm, dictionary, sites, policy, labelled.texts, "mean", config.batch_rows)
    own = np.array([name == towards for name in labelled.labels])
    found = pooled.target[own].mean(0, dtype=np.float64) - pooled.target[~own].mean(0, dtype=np.float64)
    if not np.linalg.norm(found) > 0:
        raise ActivationError(
            f"texts of {towards} must differ from the others in the mean",
            "no difference",
            "Give other texts.",
        )
    return torch.from_numpy(found).float()


@torch.inference_mode()
def write(
    lm: LanguageModel,
    dictionary: Dictionary,
    ids: Int[Tensor, "1 seq"],
    push: Push | None,
    strength: float,
    config: SteerConfig,
    *,
    whole: Int[Tensor, "1 longer"] | None = None,
    seed: int = 0,
) -> Written:
    """Continuations of a prompt while the model is steered.

    Args:
        lm: The model.
        dictionary: On its device.
        ids: The prompt.
        push: What to steer with; None: nothing.
        strength: The dose.
        config: Samples, tokens, temperature, style and target tokens.
        whole: What the model goes on from, if not the prompt; what is made of the continuation sees the prompt alone.
        seed: Of the sampling: the same at every dose, so that doses are paired.

    Raises:
        ActivationError: the dose drives the model to NaN or infinity.
        ModelError: prompt and continuation do not fit the model's context.
    """
    whole = ids if whole is None else whole
    prompts = whole.expand(config.samples(), -1)
    masses = None
    with pushing(lm, dictionary, push, strength, config.style):
        rows = lm.generate(
            prompts, config.new_tokens, temperature=config.temperature, seed=seed, stop_at_eos=False
        )
        if config.target_tokens:
            targets = sorted({_first_token(lm, one) for one in config.target_tokens})
            hidden = lm.hidden(rows)[:, whole.shape[1] - 1 : -1]
            chances = lm.logits(hidden).float().softmax(-1)
            masses = chances[..., targets].sum((1, 2)).double().cpu().numpy()
    new = rows[:, whole.shape[1] :]
    texts = [str(lm.tokenizer.decode(row)) for row in new]
    return Written(
        torch.cat([ids.to(new.device).expand(len(new), -1), new], dim=1), ids.shape[1], texts, masses
    )


def _first_token(lm: LanguageModel, text: str) -> int:
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError("a target token must have a token", repr(text), "Change --target-tokens.")
    return int(ids[0])


class _Told:
    """What every dose gives, over all prompts."""

    def __init__(
        self,
        config: SteerConfig,
        lm: LanguageModel,
        dictionary: Dictionary,
        bos: bool,
        measures: Measures,
    ) -> None:
        self.config, self.lm, self.dictionary = config, lm, dictionary
        self.measures, self.bos = measures, bos
        self.prompts = [prompt_ids(lm, prompt, bos) for prompt in config.prompts]

    def _behind(self, before: str, number: int) -> Int[Tensor, "1 longer"]:
        """A prompt behind a text."""
        bare = prompt_ids(self.lm, self.config.prompts[number], False)
        return torch.cat([prompt_ids(self.lm, before, self.bos), bare], dim=1)

    def point(
        self,
        push: Push | None,
        strength: float | None,
        progress: Progress,
        before: str | None = None,
    ) -> dict[str, Any]:
        """Statistics and examples at one dose; what drove the model to NaN or infinity says so instead."""
        by_prompt: list[dict[str, Share]] = []
        examples = []
        for number, ids in enumerate(self.prompts):
            try:
                written = write(
                    self.lm,
                    self.dictionary,
                    ids,
                    push,
                    strength or 0.0,
                    self.config,
                    whole=None if before is None else self._behind(before, number),
                    seed=self.config.seed + number,
                )
            except ActivationError as error:
                progress.advance(len(self.prompts) - number)
                why = f"after {self.config.prompts[number]!r}: {error.value}: {error.rule}"
                return {"strength": strength, "broken": why, "examples": []}
            by_prompt.append(self.measures.of(written))
            if number < N_EXAMPLES:
                examples.append({"prompt": self.config.prompts[number], "text": written.texts[0]})
            progress.advance(1)
        return {
            "strength": strength,
            "broken": None,
            **self.measures.statistics(by_prompt),
            "examples": examples,
        }


def _data(config: SteerConfig, told: _Told, arms: Sequence[Push]) -> dict[str, Any]:
    strengths = sorted(config.strengths)
    n_points = 1 + len(arms) * len(strengths) + (config.before is not None)
    with track("continuations", n_points * len(config.prompts), "prompts") as progress:
        unsteered = told.point(None, None, progress)
        points = [[told.point(push, strength, progress) for strength in strengths] for push in arms]
        doses = [(one["strength"], one["broken"]) for own in points for one in own if one["strength"] != 0]
        if doses and all(broken for _, broken in doses):
            raise ActivationError(
                "some dose must leave the model's activations finite",
                f"NaN or infinity at all of {', '.join(f'{one:g}' for one in strengths if one)}",
                "Lower --strengths.",
            )
        before = None
        if config.before is not None:
            before = {"text": config.before, **told.point(None, None, progress, config.before)}
    found = [
        {"arm": push.kind, "draw": push.draw, "points": own} for push, own in zip(arms, points, strict=True)
    ]
    return {"strengths": strengths, "unsteered": unsteered, "arms": found, "before": before}
