"""What a language model loses to a dictionary that is still being trained. Knows models and text, no trainer.

A probe is a function of a reconstruction: it is handed one and gives numbers for the log. This one splices it
into a few held-out contexts, as evaluation does (`evaluate`), with fewer arms and without intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.dictionaries.base import Site, Sites
from sememe.end_to_end import ContextSource
from sememe.errors import ConfigError, TextError
from sememe.source import LiveSource, Source, StoreSource
from sememe.splice import BaseRun, Splicer
from sememe.store import Store
from sememe.text import TextConfig, TokenBlock, TokenPolicy, fetch, token_blocks

if TYPE_CHECKING:
    from sememe.lm import LanguageModel

__all__ = ["CrossEntropy", "cross_entropy_of"]

LOGIT_ROWS = 256
"""Predictions whose logits are held at once."""


class _Context(NamedTuple):
    """One forward over held-out rows, and which of its positions are spliced and predicted from."""

    run: BaseRun
    x: Float[Tensor, "kept d_in"]
    kept: Int[Tensor, " kept"]
    predicting: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]


class CrossEntropy:
    """ce_recovered_zero and ce_increase on fixed held-out contexts.

    Positions that the policy drops keep their own activation, and cross-entropy is a mean over the predictions
    made from kept positions. The unedited and the zero-ablated model are run once.

    Args:
        lm: The language model.
        sites: What the dictionary reads and writes.
        text: The corpus; its held-out documents are used.
        policy: Which positions are kept.
        n_tokens: How many tokens, rounded up to whole contexts.
        batch_rows: Contexts per forward.

    Raises:
        ConfigError: the corpus holds no documents out.
        TextError: the held-out text is shorter than one context.
    """

    def __init__(
        self,
        lm: LanguageModel,
        sites: Sites,
        text: TextConfig,
        policy: TokenPolicy,
        n_tokens: int,
        batch_rows: int = 16,
    ) -> None:
        if text.heldout_fraction == 0:
            raise ConfigError(
                "heldout_fraction must be > 0 for ce_recovered_zero to be watched",
                0,
                "Raise it in the text, or leave --watch-ce-tokens out.",
            )
        self.lm, self.sites = lm, sites
        self.splicer = Splicer(lm, [s.hookpoint for s in sites.inputs], [s.hookpoint for s in sites.outputs])
        blocks = token_blocks(text, lm.tokenizer, policy, split="heldout", n_tokens=n_tokens)
        with torch.inference_mode():
            self.contexts = list(self._contexts(blocks, batch_rows))
            n = sum(context.predicting.shape[0] for context in self.contexts)
            if n == 0:
                raise TextError(
                    "the held-out text must hold predictions from kept positions",
                    "none",
                    "Raise watch_ce_tokens or heldout_fraction.",
                )
            self.base = self._mean(lambda context: context.run.hidden)
            self.zero = self._mean(lambda context: self._spliced(context, None))

    def __call__(
        self, reconstruct: Callable[[Float[Tensor, "rows d_in"]], Float[Tensor, "rows d_out"]]
    ) -> dict[str, float]:
        """Splice the reconstruction in."""
        with torch.inference_mode():
            ce = self._mean(lambda context: self._spliced(context, reconstruct(context.x)))
        gap = self.zero - self.base
        return {
            "ce_recovered_zero": (self.zero - ce) / gap if gap else float("nan"),
            "ce_increase": ce - self.base,
        }

    def _contexts(self, blocks: Iterable[TokenBlock], batch_rows: int) -> Iterable[_Context]:
        for block in blocks:
            for start in range(0, block.ids.shape[0], batch_rows):
                yield self._context(block, slice(start, start + batch_rows))

    def _context(self, block: TokenBlock, part: slice) -> _Context:
        device = self.lm.device
        ids = torch.from_numpy(block.ids[part]).to(device, torch.int64)
        valid = torch.from_numpy(block.attention_mask[part]).to(device, torch.bool)
        run = self.splicer.base(ids, None if bool(valid.all()) else valid)
        keep = torch.from_numpy(block.keep[part]).to(device, torch.bool) & valid
        for site in (*self.sites.inputs, *self.sites.outputs):
            if site.max_norm is not None:
                norms = run.activations[site.hookpoint].float().norm(dim=-1)
                keep &= (norms <= site.max_norm).to(device)
        followed = torch.zeros_like(keep)
        followed[:, :-1] = valid[:, 1:]
        predicting = torch.nonzero((keep & followed).view(-1)).view(-1)
        kept = torch.nonzero(keep.view(-1)).view(-1)
        x = self._rows(run, self.sites.inputs, kept)
        return _Context(run, x, kept, predicting, ids.reshape(-1)[predicting + 1])

    def _rows(
        self, run: BaseRun, sites: tuple[Site, ...], kept: Int[Tensor, " kept"]
    ) -> Float[Tensor, "kept d"]:
        parts = [run.activations[site.hookpoint].flatten(0, 1) for site in sites]
        return torch.cat([part[kept.to(part.device)].float().cpu() for part in parts], dim=1)

    def _spliced(
        self, context: _Context, recon: Float[Tensor, "kept d_out"] | None
    ) -> Float[Tensor, "batch seq d_model"]:
        """What the unembedding sees when kept positions hold the reconstruction; zeros for None."""
        replacements = {}
        for site in self.sites.outputs:
            new = context.run.activations[site.hookpoint].clone()
            rows = new.flatten(0, 1)
            values = 0.0 if recon is None else recon[:, site.start : site.stop].to(rows.device, rows.dtype)
            rows[context.kept.to(rows.device)] = values
            replacements[site.hookpoint] = new
        return self.splicer.spliced(context.run, replacements)

    def _mean(self, hidden_of: Callable[[_Context], Float[Tensor, "batch seq d_model"]]) -> float:
        """Mean cross-entropy in nats per prediction."""
        total, n = 0.0, 0
        for context in self.contexts:
            flat = hidden_of(context).flatten(0, 1)
            states = flat[context.predicting.to(flat.device)]
            for start in range(0, states.shape[0], LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                logits = self.lm.logits(states[part]).float()
                targets = context.targets[part].to(logits.device)
                total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            n += states.shape[0]
        return total / max(n, 1)


def cross_entropy_of(
    source: Source, sites: Sequence[Sites | None], n_tokens: int, batch_rows: int
) -> list[CrossEntropy]:
    """Probes for dictionaries that are trained on a source: on the same text, with the same model.

    Args:
        source: A store, or a live run, on the dictionary's own loss or end to end.
        sites: What each dictionary reads and writes; those that agree share a probe.
        n_tokens: See `CrossEntropy`.
        batch_rows: See `CrossEntropy`.

    Raises:
        ConfigError: the source does not come from a language model and a text.
        ModelError: the model of a store cannot be loaded.
    """
    if isinstance(source, LiveSource | ContextSource):
        lm, text, policy = source.lm, source.text, source.policy
    elif isinstance(source, StoreSource) and isinstance(source.store, Store):
        from sememe import lm as language_models

        made = source.store.artifact.meta["config"]
        text, policy = TextConfig.build(made["text"]), source.store.info.policy
        fetch(text)
        lm = language_models.load(language_models.ModelConfig.build(made["model"]))
    else:
        raise ConfigError(
            "watch_ce_tokens needs one store, or a live run", "another source", "Leave --watch-ce-tokens out."
        )
    found: list[CrossEntropy] = []
    for index, one in enumerate(sites):
        assert one is not None, "stores and live runs know their sites"
        if one in sites[:index]:
            found.append(found[sites.index(one)])
        else:
            found.append(CrossEntropy(lm, one, text, policy, n_tokens, batch_rows))
    return found
