"""The answers: a model and a dictionary that stay loaded, and the verbs that look through them.

Knows prompt, continuations and the sentence encoder; knows neither lines nor HTTP. What is asked comes from a web page:
every argument is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.config import Config
from sememe.continuations import Continuation, go_on
from sememe.dictionaries.base import Dictionary
from sememe.downstream import prompt_ids
from sememe.edits import LatentEdit
from sememe.errors import ConfigError, SememeError
from sememe.live.config import LiveConfig
from sememe.live.lines import Json, Progress
from sememe.lm import LanguageModel, ModelConfig
from sememe.prompt import Known, PromptConfig, prompt
from sememe.shuffled import at_home, model_for
from sememe.text import TokenPolicy

__all__ = ["EmbedArguments", "GenerateArguments", "PromptArguments", "Session", "SteerArguments"]

MAX_TEXT = 20_000


class PromptArguments(Config):
    """Which latents fire on a text?"""

    text: str = Field(max_length=MAX_TEXT)
    """The text."""
    n_latents: int = Field(default=5, ge=1, le=50)
    """Latents at each token: those that write most."""
    latents: tuple[int, ...] = Field(default=(), max_length=50)
    """Only these, wherever they fire."""
    ablate: bool = False
    """Run the model again without each of them, at its token: what it does to the loss."""


class SteerArguments(Config):
    """One latent, turned up or down at every position."""

    latent: int = Field(ge=0)
    """Which."""
    strength: float = Field(ge=-100, le=100)
    """What is added to its activation, in multiples of its largest in the atlas."""


class GenerateArguments(Config):
    """What does the model write, and what does it write when latents are turned up?"""

    prompt: str = Field(max_length=MAX_TEXT)
    """The text it goes on from."""
    steer: tuple[SteerArguments, ...] = Field(default=(), max_length=20)
    """The latents; none gives the unsteered text alone."""
    n_tokens: int = Field(default=40, ge=1, le=1000)
    """Tokens to write."""
    temperature: float = Field(default=0.0, ge=0, le=10)
    """0 takes the likeliest token; above 0 samples."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    """Of the sampling, the same for both texts."""


class EmbedArguments(Config):
    """What does a text mean, as a vector?"""

    text: str = Field(max_length=MAX_TEXT)
    """The text; only its first 256 tokens are read."""


ARGUMENTS: dict[str, type[Config]] = {
    "prompt": PromptArguments,
    "generate": GenerateArguments,
    "embed": EmbedArguments,
}


class _Loaded(NamedTuple):
    lm: LanguageModel
    dictionary: Dictionary
    policy: TokenPolicy
    known: Known


class Session:
    """Answers about one dictionary.

    Args:
        config: Where it is.
        lm: The model, if it is loaded already.
    """

    def __init__(self, config: LiveConfig, lm: LanguageModel | None = None) -> None:
        self.config, self._lm = config, lm
        self._loaded: _Loaded | None = None
        self._say: Callable[[Json], None] = lambda message: None
        self._last: tuple[GenerateArguments, Continuation] | None = None

    def prepare(self, say: Callable[[Json], None]) -> None:
        """Load model and dictionary; what goes wrong is said, and tried again at the next question."""
        self._say = say
        try:
            self._get()
        except SememeError:
            return

    def answer(self, verb: str, arguments: Json, progress: Progress) -> Json:
        """The answer to one question.

        Raises:
            ConfigError: an argument is unknown or out of range, or the text has no token that is looked at.
            SememeError: what loading or running the model gives.
            Cancelled: from `progress`.
        """
        if verb not in ARGUMENTS:
            raise ConfigError(f"a question must be one of {', '.join(ARGUMENTS)}", verb, "Ask one of them.")
        asked = ARGUMENTS[verb].build(arguments)
        if isinstance(asked, EmbedArguments):
            return self._embed(asked)
        loaded = self._get()
        progress(0, 1)
        if isinstance(asked, PromptArguments):
            return self._prompt(loaded, asked)
        assert isinstance(asked, GenerateArguments)
        return self._generate(loaded, asked, progress)

    # ---- loading ---------------------------------------------------------------------------------------------------

    def _get(self) -> _Loaded:
        if self._loaded is None:
            self._say({"state": "loading"})
            try:
                self._loaded = self._load()
            except SememeError as error:
                self._say({"state": "failed", "reason": str(error)})
                raise
        self._say({"state": "ready", "about": self._about(self._loaded)})
        return self._loaded

    def _load(self) -> _Loaded:
        config = self.config
        saved = artifact.load(config.dictionary, "dictionary")
        known = Known.of(config.atlas, None, saved)
        lm = self._lm if self._lm is not None else language_models.load(model_for(saved, self._model()))
        dictionary = at_home(dictionaries.load(config.dictionary), saved, lm)
        policy = TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()
        return _Loaded(lm, dictionary.eval().to(lm.device), policy, known)

    def _model(self) -> ModelConfig:
        """The model the atlas was made with, or the one that was named."""
        options = dict(artifact.load(self.config.atlas, "atlas").meta["config"].get("model") or {})
        options |= {"device": "auto"}
        if self.config.model is not None:
            options |= {"model": self.config.model}
        return ModelConfig.build({k: v for k, v in options.items() if k in ModelConfig.model_fields})

    def _about(self, loaded: _Loaded) -> Json:
        lm, dictionary = loaded.lm, loaded.dictionary
        assert dictionary.sites is not None
        return {
            "model": lm.name,
            "device": str(lm.device),
            "context_length": lm.context_length,
            "hookpoints": list(dictionary.sites.hookpoints),
            "n_latents": dictionary.d_sae,
        }

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _prompt(self, loaded: _Loaded, asked: PromptArguments) -> Json:
        config = PromptConfig.build(
            {
                "prompt": asked.text,
                "dictionary": self.config.dictionary,
                "atlas": self.config.atlas,
                "n_latents": asked.n_latents,
                "latents": asked.latents,
                "ablate": asked.ablate,
            }
        )
        view = prompt(config, lm=loaded.lm, dictionary=loaded.dictionary, known=loaded.known)
        found = view.as_json()
        rows: dict[int, list[Json]] = {}
        for row in found["rows"]:
            rows.setdefault(row.pop("position"), []).append(_finite(row))
        return {
            "tokens": [
                _finite(token)
                | _token(loaded.lm, token["token"])
                | {"latents": rows.get(token["position"], [])}
                for token in found["tokens"]
            ],
            "hookpoints": found["hookpoints"],
            "ablated": found["ablated"],
        }

    def _generate(self, loaded: _Loaded, asked: GenerateArguments, progress: Progress) -> Json:
        edits = [_edit(loaded, one) for one in asked.steer if one.strength != 0]
        lm = loaded.lm
        ids = prompt_ids(lm, asked.prompt, loaded.policy.bos)
        n, passes = asked.n_tokens, 2 if edits else 1
        plain_asked = asked.replace(steer=())
        known = self._last is not None and self._last[0] == plain_asked

        def run(which: Literal[0, 1], edits: list[LatentEdit]) -> Continuation:
            def until(so_far: torch.Tensor) -> torch.Tensor:
                progress(which * n + so_far.shape[1] - ids.shape[1], passes * n)
                return torch.zeros(1, dtype=torch.bool, device=so_far.device)

            return go_on(
                lm,
                ids,
                n,
                dictionary=loaded.dictionary,
                edits=edits,
                temperature=asked.temperature,
                seed=asked.seed,
                until=until,
            )

        if known:
            assert self._last is not None
            plain = self._last[1]
        else:
            plain = run(0, [])
            self._last = plain_asked, plain
        steered = run(1, edits) if edits else None
        return {
            "prompt": asked.prompt,
            "n_prompt_tokens": int(ids.shape[1]),
            "unsteered": _written(lm, plain),
            "steered": None if steered is None else _written(lm, steered),
            "added": [
                {"latent": edit.latents[0], "added": edit.value, "strength": one.strength}
                for edit, one in zip(edits, (s for s in asked.steer if s.strength != 0), strict=True)
            ],
        }

    def _embed(self, asked: EmbedArguments) -> Json:
        from sememe.lm.encoder import sentence_encoder

        encoder = sentence_encoder()
        vector = encoder([asked.text])[0]
        return {
            "vector": [round(float(value), 6) for value in vector],
            "encoder": encoder.name,
            "fingerprint": encoder.fingerprint,
        }


def _edit(loaded: _Loaded, one: SteerArguments) -> LatentEdit:
    if one.latent >= loaded.dictionary.d_sae:
        raise ConfigError(
            f"a latent must be in [0, {loaded.dictionary.d_sae - 1}]", one.latent, "Steer with another."
        )
    largest = loaded.known.largest(one.latent)
    if not largest:
        raise ConfigError(
            "a latent to steer with must have fired on the atlas's text, for its strength to have a unit",
            f"latent {one.latent}, which did not",
            "Steer with another.",
        )
    return LatentEdit(latents=(one.latent,), how="add", value=one.strength * largest)


def _written(lm: LanguageModel, made: Continuation) -> Json:
    return {
        "text": made.text,
        "tokens": [_token(lm, token) for token in made.ids.tolist()],
        "perplexity": _number(made.perplexity),
    }


def _token(lm: LanguageModel, token: int) -> Json:
    """A token as the page shows tokens: its text, and its exact bytes where they are no text by themselves."""
    raw = lm.token_bytes(token)
    try:
        return {"token": token, "text": raw.decode("utf-8") if raw else lm.token_text(token)}
    except UnicodeDecodeError:
        return {"token": token, "text": lm.token_text(token), "bytes": raw.hex()}


def _finite(row: Json) -> Json:
    return {key: _number(value) if isinstance(value, float) else value for key, value in row.items()}


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
