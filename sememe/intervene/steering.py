"""What a model writes when a latent is turned up. Knows edits and a model; writes no file."""

from __future__ import annotations

from typing import Any

from sememe.continuations import go_on
from sememe.dictionaries.base import Dictionary
from sememe.downstream import prompt_ids
from sememe.edits import LatentEdit
from sememe.intervene.config import InterveneConfig
from sememe.lm import LanguageModel

__all__ = ["steer"]


def steer(
    config: InterveneConfig,
    lm: LanguageModel,
    dictionary: Dictionary,
    latent: int,
    max_act: float,
    *,
    bos: bool,
) -> list[dict[str, Any]]:
    """Continuations of each prompt at each strength, the unsteered one first, as plain JSON data.

    `added` is what is added to the latent's activation at every position; `perplexity` is the unsteered
    model's, of the continuation.

    Raises:
        ConfigError: a prompt has no tokens.
        ActivationError: a strength drives the model to NaN or infinity.
    """
    out = []
    for prompt in config.prompts:
        ids = prompt_ids(lm, prompt, bos)
        texts = []
        for strength in (0.0, *config.strengths):
            edit = LatentEdit(latents=(latent,), how="add", value=strength * max_act)
            made = go_on(
                lm,
                ids,
                config.new_tokens,
                dictionary=dictionary,
                edits=(edit,) if strength else (),
                temperature=config.temperature,
                seed=config.seed,
            )
            texts.append(
                {
                    "strength": strength,
                    "added": strength * max_act,
                    "text": made.text,
                    "perplexity": made.perplexity,
                }
            )
        out.append({"prompt": prompt, "continuations": texts})
    return out
