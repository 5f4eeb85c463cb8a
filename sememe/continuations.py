"""What a model writes after a prompt, its latents changed or not. Knows edits and a model; writes no file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sememe.dictionaries.base import Dictionary
from sememe.edits import Intervention, LatentEdit
from sememe.errors import ActivationError
from sememe.lm import LanguageModel

__all__ = ["Continuation", "go_on", "perplexity"]


class Continuation(NamedTuple):
    """What a model wrote after a prompt."""

    ids: Int[Tensor, " n_new"]
    text: str
    perplexity: float
    """exp of the mean loss per new token under the model as it is."""


def go_on(
    lm: LanguageModel,
    ids: Int[Tensor, "1 seq"],
    n_new: int,
    *,
    dictionary: Dictionary | None = None,
    edits: Sequence[LatentEdit] = (),
    temperature: float = 0.0,
    seed: int = 0,
    until: Callable[[Int[Tensor, "1 seq_so_far"]], Bool[Tensor, 1]] | None = None,
) -> Continuation:
    """Go on from a prompt, with some latents turned up or down at every position.

    Args:
        lm: The model.
        ids: The prompt.
        n_new: Tokens to write; it does not stop at an end token.
        dictionary: Whose latents.
        edits: In the order in which they are made; none writes what the model would.
        temperature: 0 takes the likeliest token; above 0 samples.
        seed: Of the sampling.
        until: Whether to stop, asked after each token.
    Raises:
        ConfigError: a latent does not exist.
        ModelError: prompt and continuation do not fit the model's context.
        ActivationError: the edits drive the model to NaN or infinity.
    """
    options: dict[str, Any] = {
        "temperature": temperature,
        "seed": seed,
        "stop_at_eos": False,
        "until": until,
    }
    if not edits:
        rows = lm.generate(ids, n_new, **options)
    else:
        assert dictionary is not None
        with Intervention(dictionary, edits).on(lm):
            rows = lm.generate(ids, n_new, **options)
            with torch.inference_mode():
                finite = torch.isfinite(lm.hidden(rows)).all()
        if not bool(finite):
            raise ActivationError(
                "steering must leave the model's output finite",
                f"NaN or infinity after adding {', '.join(f'{edit.value or 0:.3g}' for edit in edits)}",
                "Lower --strengths.",
            )
    n_prompt = ids.shape[1]
    new = rows[0, n_prompt:]
    return Continuation(new.cpu(), str(lm.tokenizer.decode(new)), perplexity(lm, rows, n_prompt))


@torch.inference_mode()
def perplexity(lm: LanguageModel, rows: Tensor, n_prompt: int) -> float:
    """exp of the mean loss per new token under the model as it is."""
    hidden = lm.hidden(rows)[:, n_prompt - 1 : -1]
    chances = lm.logits(hidden).float().log_softmax(-1)
    loss = -chances.gather(-1, rows[:, n_prompt:, None].to(chances.device)).mean()
    return math.exp(float(loss))
