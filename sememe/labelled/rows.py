"""Texts to rows: a model's activations and a dictionary's latents, averaged over a text's kept positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.dictionaries.base import Dictionary, Site, Sites
from sememe.errors import ActivationError, TextError
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.text import TokenPolicy

__all__ = ["Pooled", "TextBatch", "pooled_rows", "text_batches"]


class Pooled(NamedTuple):
    """A row per text."""

    x: Float[np.ndarray, "n d_in"]
    target: Float[np.ndarray, "n d_out"]
    """The same as x for an autoencoder."""
    acts: Float[np.ndarray, "n d_sae"]
    n_cut: int
    """Texts longer than a context: their beginnings are read."""
    l0: float
    """Mean number of latents active at a position that was read."""


class TextBatch(NamedTuple):
    """Texts of like length, each by itself in a row."""

    places: list[int]
    """Which texts these are."""
    ids: Int[Tensor, "rows seq"]
    mask: Bool[Tensor, "rows seq"]
    """False at the padding behind a text."""
    keep: Bool[Tensor, "rows seq"]
    """Positions that the policy keeps, but for norms."""
    n_cut: int
    """Those of them that are longer than a context."""


def text_batches(
    lm: LanguageModel, policy: TokenPolicy, texts: Sequence[str], batch_rows: int
) -> Iterator[TextBatch]:
    """Texts as the model reads them, the shortest first."""
    encoded = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    room = policy.context_length - int(policy.bos)
    rows = [([lm.tokenizer.bos_token_id] if policy.bos else []) + ids[:room] for ids in encoded]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_rows):
        part = order[start : start + batch_rows]
        ids, mask = _padded([rows[i] for i in part], lm)
        n_cut = sum(len(encoded[i]) > room for i in part)
        yield TextBatch(part, ids, mask, _kept(ids, mask, lm, policy), n_cut)


def pooled_rows(
    lm: LanguageModel,
    dictionary: Dictionary,
    sites: Sites,
    policy: TokenPolicy,
    texts: Sequence[str],
    pooling: str,
    batch_rows: int,
) -> Pooled:
    """Run the model over each text by itself.

    Args:
        lm: The dictionary's model.
        dictionary: On the model's device.
        sites: Where it reads and writes.
        policy: Which positions are kept.
        texts: One row each.
        pooling: "mean" over kept positions, or "last" of them.
        batch_rows: Texts per forward; those of like length go together.

    Raises:
        TextError: a text has no position that the policy keeps.
        ActivationError: an activation is NaN or infinite.
    """
    n, same = len(texts), sites.inputs == sites.outputs
    x = np.zeros((n, dictionary.d_in), dtype=np.float32)
    target = x if same else np.zeros((n, dictionary.d_out), dtype=np.float32)
    acts = np.zeros((n, dictionary.d_sae), dtype=np.float32)
    n_read = n_active = n_cut = 0
    with track("read texts", n, "texts") as progress, torch.inference_mode():
        for part, ids, mask, keep, cut in text_batches(lm, policy, texts, batch_rows):
            n_cut += cut
            captured = lm.capture(ids, sites.hookpoints, None if bool(mask.all()) else mask)
            for site in {one.hookpoint: one for one in (*sites.inputs, *sites.outputs)}.values():
                keep &= _within(captured[site.hookpoint], site, mask, [texts[i] for i in part])
            for row, i in enumerate(part):
                own = torch.nonzero(keep[row]).view(-1)
                if own.numel() == 0:
                    raise TextError(
                        "a labelled text must have a token that the token policy keeps",
                        repr(texts[i][:60]),
                        "Leave it out.",
                    )
                own = own[-1:] if pooling == "last" else own
                read = _joined(captured, sites.inputs, row, own)
                x[i] = read.mean(0).cpu().numpy()
                if not same:
                    target[i] = _joined(captured, sites.outputs, row, own).mean(0).cpu().numpy()
                found = dictionary.encode(read)
                summed = read.new_zeros(dictionary.d_sae).index_add_(
                    0, found.indices.long(), found.acts.float()
                )
                acts[i] = (summed / own.numel()).cpu().numpy()
                n_read, n_active = n_read + own.numel(), n_active + int(found.l0().sum())
            progress.advance(len(part))
    return Pooled(x, target, acts, n_cut, n_active / max(n_read, 1))


def _padded(rows: list[list[int]], lm: LanguageModel) -> tuple[Tensor, Tensor]:
    length = max(1, *(len(row) for row in rows)) if rows else 1
    pad = lm.tokenizer.pad_token_id or lm.tokenizer.eos_token_id or 0
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = True
    return ids.to(lm.device), mask.to(lm.device)


def _kept(ids: Tensor, mask: Tensor, lm: LanguageModel, policy: TokenPolicy) -> Bool[Tensor, "rows seq"]:
    """Positions that the policy keeps, but for norms."""
    keep = mask.clone()
    keep[:, : policy.drop_positions] = False
    if policy.drop_special:
        special = torch.tensor(lm.tokenizer.all_special_ids, device=ids.device, dtype=ids.dtype)
        keep &= ~torch.isin(ids, special)
    return keep


def _within(
    activations: Float[Tensor, "rows seq d"], site: Site, mask: Bool[Tensor, "rows seq"], texts: list[str]
) -> Bool[Tensor, "rows seq"]:
    """Positions whose norm the dictionary was trained up to."""
    norms = torch.linalg.vector_norm(activations, dim=2, dtype=torch.float32).to(mask.device)
    bad = ~torch.isfinite(norms) & mask
    if bool(bad.any()):
        raise ActivationError(
            f"activations at {site.hookpoint} must be finite",
            f"NaN or infinity in the text {texts[int(torch.nonzero(bad)[0, 0])][:60]!r}",
            "Load the model in bfloat16 or float32 (--dtype), or check its weights.",
        )
    return torch.ones_like(mask) if site.max_norm is None else norms <= site.max_norm


def _joined(
    captured: dict[str, Tensor], sites: tuple[Site, ...], row: int, own: Tensor
) -> Float[Tensor, "positions d"]:
    parts = [
        captured[site.hookpoint][row].index_select(0, own.to(captured[site.hookpoint].device))
        for site in sites
    ]
    return torch.cat([part.float().to(own.device) for part in parts], dim=-1)
