"""What a model writes when a latent is turned up. Knows edits and a model; writes no file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sememe.dictionaries.base import Dictionary
from sememe.errors import ActivationError, ConfigError
from sememe.intervene.config import InterveneConfig, LatentEdit
from sememe.intervene.edits import Intervention
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
        ids = _ids(lm, prompt, bos)
        texts = []
        for strength in (0.0, *config.strengths):
            edit = LatentEdit(latents=(latent,), how="add", value=strength * max_act)
            rows = _generate(config, lm, ids, Intervention(dictionary, [edit]) if strength else None)
            texts.append(
                {
                    "strength": strength,
                    "added": strength * max_act,
                    "text": lm.tokenizer.decode(rows[0, ids.shape[1] :]),
                    "perplexity": _perplexity(lm, rows, ids.shape[1]),
                }
            )
        out.append({"prompt": prompt, "continuations": texts})
    return out


def _ids(lm: LanguageModel, prompt: str, bos: bool) -> Tensor:
    ids = lm.tokenizer(prompt, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError("a prompt must have at least one token", repr(prompt), "Change --prompts.")
    if bos and lm.tokenizer.bos_token_id is not None:
        ids = [lm.tokenizer.bos_token_id, *ids]
    return torch.tensor([ids])


def _generate(
    config: InterveneConfig, lm: LanguageModel, ids: Tensor, intervention: Intervention | None
) -> Tensor:
    options: dict[str, Any] = {"temperature": config.temperature, "seed": config.seed, "stop_at_eos": False}
    if intervention is None:
        return lm.generate(ids, config.new_tokens, **options)
    with intervention.on(lm):
        rows = lm.generate(ids, config.new_tokens, **options)
        with torch.inference_mode():
            finite = torch.isfinite(lm.hidden(rows)).all()
    if not bool(finite):
        raise ActivationError(
            "steering must leave the model's output finite",
            f"NaN or infinity after adding {intervention.edits[0].value:.3g}",
            "Lower --strengths.",
        )
    return rows


@torch.inference_mode()
def _perplexity(lm: LanguageModel, rows: Tensor, n_prompt: int) -> float:
    """exp of the mean loss per new token under the model as it is."""
    hidden = lm.hidden(rows)[:, n_prompt - 1 : -1]
    chances = lm.logits(hidden).float().log_softmax(-1)
    loss = -chances.gather(-1, rows[:, n_prompt:, None].to(chances.device)).mean()
    return math.exp(float(loss))
