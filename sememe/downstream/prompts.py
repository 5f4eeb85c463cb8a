"""A text that somebody typed, as the token rows a dictionary was made for. Knows policies and tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.dictionaries.base import Site
from sememe.errors import ConfigError, ModelError
from sememe.lm import LanguageModel
from sememe.text import TokenPolicy

__all__ = ["kept_positions", "prompt_ids"]


def prompt_ids(lm: LanguageModel, text: str, bos: bool) -> Int[Tensor, "1 seq"]:
    """A prompt's tokens, after the model's first token if `bos`.

    Raises:
        ConfigError: there are none.
        ModelError: they do not fit the model's context.
    """
    ids: list[int] = list(lm.tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise ConfigError("a prompt must have at least one token", repr(text), "Write a text.")
    if bos and lm.tokenizer.bos_token_id is not None:
        ids = [lm.tokenizer.bos_token_id, *ids]
    if lm.context_length is not None and len(ids) > lm.context_length:
        raise ModelError(
            f"a prompt must fit the context of {lm.context_length} tokens of {lm.name}",
            f"{len(ids)} tokens",
            "Shorten it.",
        )
    return torch.tensor([ids])


def kept_positions(
    lm: LanguageModel,
    ids: Int[Tensor, " seq"],
    sites: Sequence[Site],
    activations: Mapping[str, Float[Tensor, "seq d"]],
    policy: TokenPolicy,
) -> Bool[Tensor, " seq"]:
    """Which positions a dictionary was made for: the policy's, but for rows of too large a norm.

    Args:
        lm: The model.
        ids: The prompt.
        sites: What the dictionary reads.
        activations: By hookpoint.
        policy: The dictionary's.
    """
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[: policy.drop_positions] = False
    if policy.drop_special:
        kept &= ~torch.isin(ids.cpu(), torch.tensor(lm.tokenizer.all_special_ids))
    for site in sites:
        kept &= site.admits(activations[site.hookpoint]).cpu()
    return kept
