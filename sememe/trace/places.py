"""Dictionaries at their places in one model, and what they make of its activations there. Knows no metric.

At each place the activation is written x = decode(f) + error, so that latents and error together are x. Positions that
the dictionary was not made for (those its token policy drops, and rows of too large a norm) have no latents: there the
error is the whole activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.dictionaries.base import Dictionary, Site
from sememe.downstream import prompt_ids
from sememe.errors import ConfigError, MismatchError
from sememe.lm import LanguageModel
from sememe.measure.checks import one_policy
from sememe.splice import check_places
from sememe.text import TextConfig, TokenPolicy, token_blocks

__all__ = ["Inputs", "Means", "Placed", "Reading", "at_places", "inputs_of", "means_of", "read", "written"]

CHUNK = 1 << 22
"""Floats of gathered decoder rows held at once."""


class Placed(NamedTuple):
    """A dictionary where it reads and writes."""

    name: str
    dictionary: Dictionary
    reads: str
    writes: str
    layer: int
    """The layer in whose output a change here first shows; -1 before layer 0."""
    directions: Float[Tensor, "d_sae d"]
    site: Site
    """What it reads."""
    policy: TokenPolicy
    fingerprint: str = ""

    @property
    def d_sae(self) -> int:
        """Latents."""
        return self.dictionary.d_sae


class Inputs(NamedTuple):
    """Prompts, filled up at their ends."""

    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each prompt."""
        return self.mask.sum(1)

    def repeated(self, n: int) -> Inputs:
        """All prompts, n times over."""
        return Inputs(self.ids.repeat(n, 1), self.mask.repeat(n, 1))


class Reading(NamedTuple):
    """What one place holds in one run; tokens are counted through the batch."""

    x: Float[Tensor, "tokens d"]
    recon: Float[Tensor, "tokens d"]
    """decode(f); 0 where there are no latents."""
    keep: Bool[Tensor, " tokens"]
    token: Int[Tensor, " nnz"]
    latent: Int[Tensor, " nnz"]
    act: Float[Tensor, " nnz"]

    @property
    def error(self) -> Float[Tensor, "tokens d"]:
        """What the dictionary does not reconstruct."""
        return self.x - self.recon


class Means(NamedTuple):
    """Of one place over a text, over the positions that are kept."""

    latents: Float[Tensor, " d_sae"]
    error: Float[Tensor, " d"]


def at_places(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    *,
    policies: Mapping[str, TokenPolicy] | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> tuple[Placed, ...]:
    """Dictionaries in the order in which a forward comes to what they write.

    Args:
        lm: The model.
        dictionaries: By name; folded.
        policies: Which positions each was made for; all but rows of too large a norm, if not given.
        fingerprints: Of their folders.
    Raises:
        ConfigError: two of them write at one hookpoint, or there are none.
        MismatchError: one belongs to another model or hookpoint, or reads or writes several; or their policies differ.
    """
    if not dictionaries:
        raise ConfigError("there must be at least one dictionary", "none", "Name one.")
    if policies:
        one_policy({name: policies[name] for name in dictionaries if name in policies})
    found: dict[str, Placed] = {}
    for name, dictionary in dictionaries.items():
        sites = dictionary.sites
        if sites is None:
            raise MismatchError(
                f"the dictionary {name} must know its model and hookpoint",
                "none (it was trained on bare tensors)",
                "Train it from a store.",
            )
        check_places((*sites.inputs, *sites.outputs), lm)
        if len(sites.inputs) > 1 or len(sites.outputs) > 1:
            raise MismatchError(
                "a dictionary that is traced must read one hookpoint and write one",
                f"{name}, of {', '.join(sites.hookpoints)}",
                "Use dictionaries of one hookpoint each.",
            )
        reads, writes = sites.inputs[0], sites.outputs[0]
        if writes.hookpoint in found:
            raise ConfigError(
                "dictionaries that are traced together must stand at different hookpoints",
                f"{found[writes.hookpoint].name} and {name} at {writes.hookpoint}",
                "Drop one of them.",
            )
        dictionary = dictionary.eval().to(lm.device)
        found[writes.hookpoint] = Placed(
            name,
            dictionary,
            reads.hookpoint,
            writes.hookpoint,
            lm.written_layer(writes.hookpoint),
            dictionary.decoder_directions().detach().float(),
            reads,
            (policies or {}).get(name, TokenPolicy(drop_positions=0, drop_special=False)),
            (fingerprints or {}).get(name, ""),
        )
    return tuple(found[name] for name in _in_order(lm, list(found)))


def _in_order(lm: LanguageModel, hookpoints: Sequence[str]) -> list[str]:
    """Hookpoints as a forward comes to them."""
    seen: list[str] = []

    def note(name: str) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            if name not in seen:
                seen.append(name)
            return x

        return look

    with torch.no_grad(), lm.edit({name: note(name) for name in hookpoints}):
        lm.hidden(torch.zeros(1, 1, dtype=torch.long))
    return seen


def inputs_of(lm: LanguageModel, texts: Sequence[str], *, bos: bool) -> Inputs:
    """Texts as rows of tokens.

    Raises:
        ConfigError: one has no token.
        ModelError: one is longer than the model's context.
    """
    return padded([prompt_ids(lm, text, bos)[0].tolist() for text in texts])


def padded(rows: Sequence[Sequence[int]]) -> Inputs:
    """Rows of tokens filled up at their ends."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return Inputs(ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows]))


def kept(lm: LanguageModel, placed: Placed, inputs: Inputs) -> Bool[Tensor, " tokens"]:
    """Positions that a dictionary's policy keeps, whatever the activations."""
    keep = inputs.mask.clone()
    keep[:, : placed.policy.drop_positions] = False
    if placed.policy.drop_special:
        keep &= ~torch.isin(inputs.ids, torch.tensor(lm.tokenizer.all_special_ids))
    return keep.reshape(-1).to(placed.directions.device)


def read(
    placed: Placed,
    x_in: Float[Tensor, "*batch d_in"],
    x_out: Float[Tensor, "*batch d_out"],
    keep: Bool[Tensor, " tokens"],
) -> Reading:
    """What a dictionary makes of activations; without gradient.

    Args:
        placed: The dictionary.
        x_in: What it reads.
        x_out: The activation where it writes.
        keep: Positions that its policy keeps.
    """
    device = placed.directions.device
    with torch.no_grad():
        inputs = x_in.reshape(-1, x_in.shape[-1]).to(device, torch.float32)
        x = x_out.reshape(-1, x_out.shape[-1]).to(device, torch.float32)
        keep = keep & placed.site.admits(inputs)
        places = torch.nonzero(keep)[:, 0]
        recon = torch.zeros_like(x)
        if not len(places):
            none = places.new_zeros(0)
            return Reading(x, recon, keep, none, none, x.new_zeros(0))
        encoded = placed.dictionary.encode(inputs[places]).compact()
        recon[places] = placed.dictionary.decode(encoded, inputs[places]).float()
        fires = encoded.acts != 0
        keys = places[encoded.row_ids()][fires] * placed.d_sae + encoded.indices[fires].long()
        unique, where = torch.unique(keys, return_inverse=True)
        act = x.new_zeros(len(unique)).index_add_(0, where, encoded.acts[fires].float())
    return Reading(x, recon, keep, unique // placed.d_sae, unique % placed.d_sae, act)


def written(
    placed: Placed,
    n_tokens: int,
    token: Int[Tensor, " n"],
    latent: Int[Tensor, " n"],
    amount: Float[Tensor, " n"],
) -> Float[Tensor, "tokens d"]:
    """What latents write at their tokens, given how much of each."""
    out = placed.directions.new_zeros(n_tokens, placed.directions.shape[1])
    for part in _chunks(len(token), placed.directions.shape[1]):
        out.index_add_(0, token[part], amount[part, None] * placed.directions[latent[part]])
    return out


def along(
    placed: Placed, gradient: Float[Tensor, "tokens d"], token: Int[Tensor, " n"], latent: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Gradients at some tokens along the directions of latents: dm/df = (dm/dx) D^T, only where it is asked for."""
    parts = [
        (gradient[token[part]] * placed.directions[latent[part]]).sum(1)
        for part in _chunks(len(token), placed.directions.shape[1])
    ]
    return torch.cat(parts) if parts else gradient.new_zeros(0)


def _chunks(n: int, width: int) -> Iterable[slice]:
    step = max(CHUNK // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, n, step))


def captured(lm: LanguageModel, places: Sequence[Placed], inputs: Inputs) -> dict[str, Tensor]:
    """Activations at everything that is read or written, from one forward without gradient."""
    names = list(dict.fromkeys(name for placed in places for name in (placed.reads, placed.writes)))
    with torch.no_grad():
        return lm.capture(inputs.ids, names, inputs.mask)


def readings(
    lm: LanguageModel, places: Sequence[Placed], inputs: Inputs, activations: Mapping[str, Tensor]
) -> tuple[Reading, ...]:
    """What every dictionary makes of one run."""
    return tuple(
        read(placed, activations[placed.reads], activations[placed.writes], kept(lm, placed, inputs))
        for placed in places
    )


def means_of(
    lm: LanguageModel,
    places: Sequence[Placed],
    text: TextConfig,
    *,
    split: str = "heldout",
    n_tokens: int = 20_000,
    batch_rows: int = 16,
) -> tuple[Means, ...]:
    """Means of latents and errors over a text; sums are accumulated, then divided.

    Raises:
        TextError: the text is shorter than one context.
    """
    policy = places[0].policy
    sums = [(p.directions.new_zeros(p.d_sae), p.directions.new_zeros(p.directions.shape[1])) for p in places]
    counts = [0 for _ in places]
    for block in token_blocks(text, lm.tokenizer, policy, split=split, n_tokens=n_tokens):  # type: ignore[arg-type]
        for start in range(0, len(block.ids), batch_rows):
            rows = slice(start, start + batch_rows)
            inputs = Inputs(
                torch.from_numpy(block.ids[rows]).long(), torch.from_numpy(block.attention_mask[rows])
            )
            keep = torch.from_numpy(block.keep[rows]).reshape(-1)
            activations = captured(lm, places, inputs)
            for i, placed in enumerate(places):
                found = read(
                    placed,
                    activations[placed.reads],
                    activations[placed.writes],
                    keep.to(placed.directions.device),
                )
                sums[i][0].index_add_(0, found.latent, found.act)
                sums[i][1].add_(found.error[found.keep].sum(0))
                counts[i] += int(found.keep.sum())
    return tuple(
        Means(latents / max(n, 1), error / max(n, 1))
        for (latents, error), n in zip(sums, counts, strict=True)
    )
