"""What the model says when its activations are edited: what that costs on neutral text, and what it answers.

Knows erasures, a model and text; writes no file. Positions that the token policy drops, or whose norm is over the
dictionary's limit, keep their activations in every arm, and cross-entropy and KL are means over the predictions made
from the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe import metrics
from sememe.dictionaries.base import Dictionary, Sites
from sememe.erase.config import EraseConfig
from sememe.erase.erasures import Arm
from sememe.errors import ActivationError, ConfigError, TextError
from sememe.labelled import text_batches
from sememe.lm import LanguageModel
from sememe.measure.measured import LOGIT_ROWS, rows_at
from sememe.measure.units import Units
from sememe.progress import track
from sememe.splice import BaseRun, Splicer
from sememe.text import TokenPolicy, token_blocks

__all__ = ["BASE", "Neutral", "Passes", "first_tokens"]

BASE = "base"


class Neutral(NamedTuple):
    """What the arms cost."""

    loss: metrics.LanguageModelLoss
    n_tokens: int
    n_predictions: int


class Passes:
    """A model that is run once as it is, and from the edited hookpoint on once for each arm.

    Args:
        lm: The model.
        dictionary: On its device.
        sites: Where that reads and writes.
        policy: Which positions are edited.
        arms: The edits.
    """

    def __init__(
        self,
        lm: LanguageModel,
        dictionary: Dictionary,
        sites: Sites,
        policy: TokenPolicy,
        arms: Sequence[Arm],
    ) -> None:
        self.lm, self.dictionary, self.sites, self.policy, self.arms = lm, dictionary, sites, policy, arms
        reads, writes = ([site.hookpoint for site in side] for side in (sites.inputs, sites.outputs))
        self.splicer = Splicer(lm, reads, writes)

    def _hidden(
        self, run: BaseRun, keep: Bool[Tensor, "batch seq"]
    ) -> Iterator[tuple[str, Float[Tensor, "batch seq d_model"]]]:
        """What the unembedding sees in each arm."""
        yield BASE, run.hidden
        device = self.dictionary.decoder_directions().device
        x, target = (
            torch.cat([run.activations[site.hookpoint].to(device).float() for site in side], dim=-1)
            for side in (self.sites.inputs, self.sites.outputs)
        )
        keep = keep.to(device)
        for side, rows in ((self.sites.inputs, x), (self.sites.outputs, target)):
            for site in side:
                keep = keep & site.admits(rows[..., site.start : site.stop])
        here, encoded = target[keep], self.dictionary.encode(x[keep])
        for arm in self.arms:
            new = arm.erasure.rows(here, encoded.columns(arm.erasure.latents))
            if not bool(torch.isfinite(new.norm(dim=1)).all()):
                raise ActivationError(
                    f"the erasure {arm.name} must give activations of finite norm",
                    "NaN or infinity",
                    "Load the model in float32 (--dtype), or check the dictionary's weights.",
                )
            edited = target.clone()
            edited[keep] = new
            yield (
                arm.name,
                self.splicer.spliced(
                    run, {site.hookpoint: edited[..., site.start : site.stop] for site in self.sites.outputs}
                ),
            )

    @torch.inference_mode()
    def neutral(self, config: EraseConfig) -> Neutral:
        """KL to the unedited model and cross-entropy of every arm on neutral held-out text.

        Raises:
            TextError: the text is shorter than one context, or nothing is predicted from a kept position.
            ActivationError: an edit gave NaN or infinity.
        """
        loss, units = metrics.LanguageModelLoss(), Units()
        n_tokens = n_predictions = 0
        blocks = token_blocks(
            config.text, self.lm.tokenizer, self.policy, split="heldout", n_tokens=config.n_tokens
        )
        with track("cost on neutral text", config.n_tokens, "tokens") as progress:
            for block in blocks:
                for start in range(0, len(block.ids), config.batch_rows):
                    part = slice(start, start + config.batch_rows)
                    ids = torch.from_numpy(block.ids[part]).to(self.lm.device, torch.int64)
                    mask = torch.from_numpy(block.attention_mask[part]).to(self.lm.device)
                    keep = torch.from_numpy(block.keep[part]).to(self.lm.device) & mask
                    followed = torch.zeros_like(keep)
                    followed[:, :-1] = mask[:, 1:]
                    at = torch.nonzero((keep & followed).view(-1)).view(-1)
                    run = self.splicer.base(ids, None if bool(mask.all()) else mask)
                    hidden = {name: rows_at(value, at) for name, value in self._hidden(run, keep)}
                    here = torch.from_numpy(units(block, part)).to(at.device)[at]
                    self._add(loss, hidden, ids.reshape(-1)[at + 1], here)
                    n_predictions += len(at)
                    n_tokens += int(mask.sum())
                    progress.advance(int(mask.sum()))
        if n_predictions == 0:
            raise TextError(
                "the neutral text must hold predictions from kept positions", "none", "Change the policy."
            )
        return Neutral(loss, n_tokens, n_predictions)

    def _add(
        self,
        loss: metrics.LanguageModelLoss,
        hidden: dict[str, Float[Tensor, "n d_model"]],
        targets: Int[Tensor, " n"],
        units: Int[Tensor, " n"],
    ) -> None:
        for start in range(0, len(targets), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            base = metrics.base_terms(self.lm.logits(hidden[BASE][part]), targets[part])
            ce, kl = {BASE: base.ce}, {}
            for arm in self.arms:
                terms = metrics.prediction_terms(base, self.lm.logits(hidden[arm.name][part]), targets[part])
                ce[arm.name], kl[arm.name] = terms.ce, terms.kl
            loss.update(units[part], ce, kl)

    @torch.inference_mode()
    def answers(
        self,
        texts: Sequence[str],
        tokens_for: Sequence[int],
        tokens_against: Sequence[int],
        batch_rows: int,
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """After each text, the log of the odds of one set of next tokens against another, by arm; nats.

        With one token in each set, the difference of their logits.
        """
        found = {name: np.zeros(len(texts)) for name in (BASE, *(arm.name for arm in self.arms))}
        with track("what the model answers", len(texts), "texts") as progress:
            for places, ids, mask, keep, _ in text_batches(self.lm, self.policy, texts, batch_rows):
                run = self.splicer.base(ids, None if bool(mask.all()) else mask)
                last = mask.sum(1) - 1
                rows = torch.arange(len(ids), device=last.device)
                for name, hidden in self._hidden(run, keep):
                    states = hidden[rows.to(hidden.device), last.to(hidden.device)]
                    logits = self.lm.logits(states).float()
                    one, other = (logits[:, list(side)].logsumexp(1) for side in (tokens_for, tokens_against))
                    found[name][places] = (one - other).cpu().numpy()
                progress.advance(len(places))
        return found


def first_tokens(
    lm: LanguageModel, tokens_for: Sequence[str], tokens_against: Sequence[str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first token of each text.

    Raises:
        ConfigError: a text has none, or one begins both sides.
    """
    sides = []
    for words in (tokens_for, tokens_against):
        found = []
        for word in words:
            ids = lm.tokenizer(word, add_special_tokens=False).input_ids
            if not ids:
                raise ConfigError(
                    "what the model may say must have a token", repr(word), "Name another text."
                )
            found.append(int(ids[0]))
        sides.append(tuple(dict.fromkeys(found)))
    both = set(sides[0]) & set(sides[1])
    if both:
        raise ConfigError(
            "tokens_for and tokens_against must begin with different tokens",
            repr(lm.token_text(min(both))),
            "Begin both with a space, or name other words.",
        )
    return sides[0], sides[1]
