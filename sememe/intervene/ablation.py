"""What goes missing when a latent is taken out of a text. Knows edits, text and a model; writes no file.

For each latent: the contexts with its largest activations, one per document; the model run once as it is and
once with the latent ablated; and, as a control, once with as much taken out along a random direction. Logits
are compared after subtracting their mean over the vocabulary, which softmax does not see.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sememe.dictionaries.base import Dictionary
from sememe.edits import Intervention, LatentEdit
from sememe.errors import TextError
from sememe.intervene.config import InterveneConfig
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.splice import BaseRun, Splicer
from sememe.text import TokenPolicy, token_blocks, whole_id

__all__ = ["Context", "Found", "ablate", "find"]

LOGIT_ROWS = 128  # rows of logits held at once: 128 x 50,000 floats are 25 MB
N_BEFORE = 24  # tokens of an example's context shown before its position


class Context(NamedTuple):
    """A row of text in which a latent fires."""

    peak: float
    ids: Int[np.ndarray, " ctx"]
    mask: Bool[np.ndarray, " ctx"]
    keep: Bool[np.ndarray, " ctx"]
    document: int
    """A number that all pieces of one document share."""


class Found(NamedTuple):
    """What a latent does on a text, and where it does it most."""

    latent: int
    n_tokens: int
    n_active: int
    mean_act: float
    max_act: float
    contexts: list[Context]


def find(
    config: InterveneConfig, lm: LanguageModel, dictionary: Dictionary, splicer: Splicer, policy: TokenPolicy
) -> list[Found]:
    """One pass over the text: every latent's statistics and its strongest contexts.

    Raises:
        TextError: the text is shorter than one context.
    """
    n = len(config.latents)
    heaps: list[list[tuple[float, int, Context]]] = [[] for _ in range(n)]
    active, total, largest = np.zeros(n, np.int64), np.zeros(n), np.zeros(n)
    n_tokens, counter = 0, itertools.count()
    blocks = token_blocks(config.text, lm.tokenizer, policy, split=config.split, n_tokens=config.n_tokens)
    with track("find contexts", config.n_tokens, "tokens") as progress, torch.inference_mode():
        for block in blocks:
            wholes = {i: whole_id(info.key) for i, info in block.documents.items()}
            for start in range(0, len(block.ids), config.batch_rows):
                part = slice(start, start + config.batch_rows)
                ids = torch.from_numpy(block.ids[part]).long()
                mask = torch.from_numpy(block.attention_mask[part])
                captured = lm.capture(ids, splicer.reads, mask)
                x = _inputs(dictionary, captured)
                keep = torch.from_numpy(block.keep[part]) & _inside(dictionary, x, ids.shape)
                dense = dictionary.encode_latents(x, config.latents).cpu().reshape(*ids.shape, n)
                acts = (dense * keep[:, :, None]).numpy()
                n_tokens += int(keep.sum())
                active += (acts != 0).sum(axis=(0, 1))
                total += acts.sum(axis=(0, 1), dtype=np.float64)
                largest = np.maximum(largest, acts.max(axis=(0, 1)))
                peaks = acts[:, :-1].max(axis=1)  # the last position predicts nothing here
                for row, slot in zip(*np.nonzero(peaks > 0), strict=True):
                    at = start + int(row)
                    document = wholes[int(block.doc_ids[at, int(acts[row, :-1, slot].argmax())])]
                    context = Context(
                        float(peaks[row, slot]),
                        block.ids[at],
                        block.attention_mask[at],
                        keep[row].numpy().copy(),
                        document,
                    )
                    _push(heaps[slot], context, next(counter), config.n_contexts)
                progress.advance(int(mask.sum()))
    if n_tokens == 0:
        raise TextError("the text must hold a position that the policy keeps", "none", "Change the policy.")
    return [
        Found(
            latent,
            n_tokens,
            int(active[i]),
            float(total[i] / n_tokens),
            float(largest[i]),
            [entry[2] for entry in sorted(heaps[i], reverse=True)],
        )
        for i, latent in enumerate(config.latents)
    ]


def _push(heap: list[tuple[float, int, Context]], context: Context, order: int, n: int) -> None:
    """Keep the n largest peaks, one per document."""
    entry = (context.peak, -order, context)
    for i, (peak, _, other) in enumerate(heap):
        if other.document == context.document:
            if context.peak > peak:
                heap[i] = entry
                heapq.heapify(heap)
            return
    if len(heap) < n:
        heapq.heappush(heap, entry)
    elif entry[:2] > heap[0][:2]:
        heapq.heapreplace(heap, entry)


def _inputs(dictionary: Dictionary, captured: dict[str, Tensor]) -> Float[Tensor, "rows d_in"]:
    assert dictionary.sites is not None
    device = dictionary.decoder_directions().device
    parts = [captured[site.hookpoint] for site in dictionary.sites.inputs]
    return torch.cat([part.reshape(-1, part.shape[-1]).to(device, torch.float32) for part in parts], dim=1)


def _inside(
    dictionary: Dictionary, x: Float[Tensor, "rows d_in"], shape: torch.Size
) -> Bool[Tensor, "batch seq"]:
    """Positions whose norm is within the sites' limits."""
    assert dictionary.sites is not None
    return dictionary.sites.admit(x).cpu().reshape(shape)


# -- one latent --------------------------------------------------------------------------------------


@torch.inference_mode()
def ablate(
    config: InterveneConfig, lm: LanguageModel, dictionary: Dictionary, splicer: Splicer, found: Found
) -> dict[str, Any]:
    """What ablating one latent does in its strongest contexts, as plain JSON data."""
    summary = {
        "latent": found.latent,
        "n_tokens": found.n_tokens,
        "density": found.n_active / found.n_tokens,
        "mean_act": found.mean_act,
        "max_act": found.max_act,
        "n_contexts": len(found.contexts),
    }
    if not found.contexts:
        return summary | {"note": "It never fired on this text, so nothing was ablated."}
    tally = _Tally(lm, config.n_shown)
    generator = torch.Generator().manual_seed(config.seed + found.latent)
    for start in range(0, len(found.contexts), config.batch_rows):
        _add_batch(tally, config, splicer, dictionary, found, start, generator)
    return summary | tally.result()


def _add_batch(
    tally: _Tally,
    config: InterveneConfig,
    splicer: Splicer,
    dictionary: Dictionary,
    found: Found,
    start: int,
    generator: torch.Generator,
) -> None:
    contexts = found.contexts[start : start + config.batch_rows]
    ids = torch.from_numpy(np.stack([c.ids for c in contexts])).long()
    mask = torch.from_numpy(np.stack([c.mask for c in contexts]))
    keep = torch.from_numpy(np.stack([c.keep for c in contexts]))
    run = splicer.base(ids, mask)
    acts = (
        dictionary.encode_latents(_inputs(dictionary, run.activations), [found.latent])
        .cpu()
        .reshape(ids.shape)
        * keep
    )
    if config.ablation == "mean":
        edit = LatentEdit(latents=(found.latent,), how="clamp", value=found.mean_act)
    else:
        edit = LatentEdit(latents=(found.latent,))
    replaced = Intervention(dictionary, [edit], error=config.error, keep=keep).edited(run.activations)
    hidden = splicer.spliced(run, replaced)
    random = splicer.spliced(run, _moved_at_random(dictionary, run, acts, found.latent, generator))
    tally.add(run, hidden, random, acts, mask)


def _moved_at_random(
    dictionary: Dictionary,
    run: BaseRun,
    acts: Float[Tensor, "batch seq"],
    latent: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The control: as long a vector as the latent writes, taken out along one random direction."""
    assert dictionary.sites is not None
    length = float(dictionary.decoder_directions()[latent].norm())
    direction = torch.randn(dictionary.d_out, generator=generator)
    direction *= length / direction.norm()
    out = {}
    for site in dictionary.sites.outputs:
        old = run.activations[site.hookpoint]
        moved = acts[:, :, None] * direction[site.start : site.stop]
        out[site.hookpoint] = (old.float() - moved.to(old.device)).to(old.dtype)
    return out


class _Tally:
    """Sums over the positions at which a latent fires."""

    def __init__(self, lm: LanguageModel, n_shown: int) -> None:
        self.lm, self.n_shown = lm, n_shown
        self.change = torch.zeros(lm.vocab_size, dtype=torch.float64)
        self.true_logit: list[NDArray[np.float64]] = []
        self.true_log_prob: list[NDArray[np.float64]] = []
        self.kl: list[NDArray[np.float64]] = []
        self.kl_random: list[NDArray[np.float64]] = []
        self.later: list[NDArray[np.float64]] = []
        self.examples: list[dict[str, Any]] = []

    def add(
        self, run: BaseRun, hidden: Tensor, random: Tensor, acts: Float[Tensor, "batch seq"], mask: Tensor
    ) -> None:
        ids, base = run.ids.cpu(), run.hidden
        predicts = torch.zeros_like(mask)
        predicts[:, :-1] = mask[:, 1:]  # the next token is there to be predicted
        fires = (acts != 0) & predicts
        after = (acts != 0).cumsum(1) > 0
        later = after & predicts & ~fires
        targets = torch.roll(ids, -1, dims=1)
        places = torch.nonzero(fires)
        for rows in torch.split(places, LOGIT_ROWS):
            r, c = rows[:, 0].to(base.device), rows[:, 1].to(base.device)
            a, b, z = (self._logits(h[r, c]) for h in (base, hidden, random))
            target = targets[rows[:, 0], rows[:, 1]].to(a.device)[:, None]
            logit = (b - a).gather(1, target)[:, 0]
            log_a, log_b = a.log_softmax(1), b.log_softmax(1)
            log_prob = (log_b - log_a).gather(1, target)[:, 0]
            self.change += (b - a).sum(0, dtype=torch.float64).cpu()
            self.true_logit.append(_array(logit))
            self.true_log_prob.append(_array(log_prob))
            self.kl.append(_array((log_a.exp() * (log_a - log_b)).sum(1)))
            self.kl_random.append(_array((log_a.exp() * (log_a - z.log_softmax(1))).sum(1)))
            self._keep_examples(ids, rows, acts, target[:, 0].cpu(), logit.cpu(), log_prob.cpu())
        for rows in torch.split(torch.nonzero(later), LOGIT_ROWS):
            r, c = rows[:, 0].to(base.device), rows[:, 1].to(base.device)
            target = targets[rows[:, 0], rows[:, 1]].to(base.device)[:, None]
            before, now = (
                self._logits(h[r, c]).log_softmax(1).gather(1, target)[:, 0] for h in (base, hidden)
            )
            self.later.append(_array(before - now))

    def _logits(self, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        logits = self.lm.logits(hidden[None])[0].float()
        return logits - logits.mean(1, keepdim=True)

    def _keep_examples(
        self, ids: Tensor, rows: Tensor, acts: Tensor, targets: Tensor, logit: Tensor, log_prob: Tensor
    ) -> None:
        for i, (row, position) in enumerate(rows.tolist()):
            first = max(0, position + 1 - N_BEFORE)
            self.examples.append(
                {
                    "before": "".join(self.lm.token_text(t) for t in ids[row, first:position].tolist()),
                    "token": self.lm.token_text(int(ids[row, position])),
                    "next": self.lm.token_text(int(targets[i])),
                    "act": float(acts[row, position]),
                    "logit_change": float(logit[i]),
                    "log_prob_change": float(log_prob[i]),
                }
            )
        self.examples.sort(key=lambda e: e["log_prob_change"])
        if len(self.examples) > 2 * self.n_shown:
            self.examples = self.examples[: self.n_shown] + self.examples[-self.n_shown :]

    def result(self) -> dict[str, Any]:
        logit, log_prob, kl, kl_random = (
            np.concatenate(parts) for parts in (self.true_logit, self.true_log_prob, self.kl, self.kl_random)
        )
        later = np.concatenate(self.later) if self.later else np.zeros(0)
        limit = max(float(np.quantile(np.abs(logit), 0.99)), 1e-6)
        counts, edges = np.histogram(np.clip(logit, -limit, limit), bins=21, range=(-limit, limit))
        change = self.change / len(logit)
        return {
            "n_positions": len(logit),
            "true_logit_change": float(logit.mean()),
            "true_log_prob_change": float(log_prob.mean()),
            "kl": float(kl.mean()),
            "kl_random_direction": float(kl_random.mean()),
            "ce_increase_after": float(later.mean()) if len(later) else None,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "lowered": self._tokens(change, largest=False),
            "raised": self._tokens(change, largest=True),
            "examples_hurt": [e for e in self.examples if e["log_prob_change"] < 0][: self.n_shown],
            "examples_helped": [e for e in reversed(self.examples) if e["log_prob_change"] > 0][
                : self.n_shown
            ],
        }

    def _tokens(self, change: Tensor, *, largest: bool) -> list[dict[str, Any]]:
        values, tokens = change.topk(min(self.n_shown, len(change)), largest=largest)
        return [
            {"token": token, "text": self.lm.token_text(token), "logit_change": value}
            for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
        ]


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.double().cpu().numpy()
