"""What a model reads while it is scrubbed: contexts of a text, or prompts; each run once as it is. Knows no circuit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.errors import ConfigError, TextError
from sememe.lm import LanguageModel
from sememe.pairs import Pair, by_length, ioi_pairs, read_pairs
from sememe.scrub.circuit import Place
from sememe.scrub.config import ScrubConfig
from sememe.splice import BaseRun, Splicer
from sememe.text import TokenPolicy, token_blocks

__all__ = ["Batch", "Inputs", "flat"]


class Batch(NamedTuple):
    """Inputs of one length, and the unedited forward of them."""

    run: BaseRun
    here: list[Bool[Tensor, "n seq"]]
    """For each place, positions that may be edited: kept by the policy and within the norm limit."""
    scored: Bool[Tensor, "n seq"]
    """Positions whose next token is of the same document."""
    asked: Int[Tensor, "n 2"] | None
    """Of prompts: the right token after the last, and the wrong one."""


class Inputs:
    """The inputs of a config, as often as they are wanted.

    Args:
        config: Which.
        lm: The model.
        places: Where its activations are recorded.
        policy: The token policy of the dictionaries.

    `n_left_out` counts prompts that no other has the length of: nothing could be resampled there.

    Raises:
        ConfigError: too few prompts of equal length, or some without answers where the metric needs them.
    """

    def __init__(
        self, config: ScrubConfig, lm: LanguageModel, places: Sequence[Place], policy: TokenPolicy
    ) -> None:
        self.config, self.lm, self.places, self.policy = config, lm, tuple(places), policy
        names = [place.hookpoint for place in places]
        self.splicer = Splicer(lm, names, names)
        self.pairs: list[Pair] = []
        self.n_left_out = 0
        if config.on_prompts:
            self._find_prompts()

    def _find_prompts(self) -> None:
        config, tokenizer = self.config, self.lm.tokenizer
        if config.pairs is not None:
            pairs = read_pairs(config.pairs, tokenizer, bos=self.policy.bos)
        else:
            pairs = ioi_pairs(tokenizer, config.n_prompts, bos=self.policy.bos, seed=config.seed)
        if config.metric_in_use == "logit_difference" and any(
            pair.answer is None or pair.wrong is None for pair in pairs
        ):
            raise ConfigError(
                "the metric logit_difference must have prompts with answers",
                "pairs without answer and wrong",
                "Add them to the pairs, or pass --metric kl.",
            )
        groups = [group for group in by_length(pairs) if len(group) > 1]
        self.pairs = [pairs[number] for group in groups for number in group]
        self.n_left_out = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise ConfigError(
                "at least two prompts must be of one length in tokens, to take activations from one another",
                "none",
                "Give more prompts.",
            )

    def batches(self) -> Iterator[Batch]:
        """Some inputs after the other, those of one length together.

        Raises:
            TextError: the text has no position that the policy keeps.
        """
        yield from self._of_prompts() if self.pairs else self._of_text()

    def _of_prompts(self) -> Iterator[Batch]:
        for group in by_length(self.pairs):
            for start in range(0, len(group), self.config.batch_rows):
                chosen = [self.pairs[number] for number in group[start : start + self.config.batch_rows]]
                ids = torch.tensor([pair.clean for pair in chosen])
                asked = torch.tensor([(pair.answer or 0, pair.wrong or 0) for pair in chosen])
                keep = torch.ones_like(ids, dtype=torch.bool)
                keep[:, : self.policy.drop_positions] = False
                scored = torch.zeros_like(keep)
                scored[:, -1] = True
                yield self._batch(ids, None, keep, scored, asked)

    def _of_text(self) -> Iterator[Batch]:
        config, n_kept = self.config, 0
        blocks = token_blocks(
            config.text, self.lm.tokenizer, self.policy, split=config.split, n_tokens=config.n_tokens
        )
        for block in blocks:
            follows = np.zeros_like(block.keep)
            follows[:, :-1] = (block.doc_ids[:, 1:] == block.doc_ids[:, :-1]) & block.attention_mask[:, 1:]
            for start in range(0, len(block.ids), config.batch_rows):
                rows = slice(start, start + config.batch_rows)
                keep = torch.from_numpy(block.keep[rows])
                n_kept += int(keep.sum())
                yield self._batch(
                    torch.from_numpy(block.ids[rows]).long(),
                    torch.from_numpy(block.attention_mask[rows]),
                    keep,
                    keep & torch.from_numpy(follows[rows]),
                    None,
                )
        if n_kept == 0:
            raise TextError(
                "the text must hold a position that the policy keeps",
                "none",
                "Change the text, or give more.",
            )

    @torch.no_grad()
    def _batch(
        self, ids: Tensor, mask: Tensor | None, keep: Tensor, scored: Tensor, asked: Tensor | None
    ) -> Batch:
        run = self.splicer.base(ids, mask)
        here = []
        for place in self.places:
            assert place.dictionary.sites is not None
            admitted = place.dictionary.sites.inputs[0].admits(run.activations[place.hookpoint])
            here.append(keep.to(run.hidden.device) & admitted)
        return Batch(run, here, scored.to(run.hidden.device), asked)


def flat(x: Float[Tensor, "*lead d"]) -> Float[Tensor, "rows d"]:
    """Rows in float32, as dictionaries want them."""
    return x.reshape(-1, x.shape[-1]).float()
