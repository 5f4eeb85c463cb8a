"""Where a circuit's numbers come from: active latents, what is left of each MLP's output, token embeddings.

Knows transcoders and the frozen model. Latents are listed block by block (a block: the latents of one dictionary that
read one layer), and in a block by position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.dictionaries.base import Dictionary, Site
from sememe.dictionaries.cross_layer import CrossLayer
from sememe.downstream import check_dictionary, kept_positions
from sememe.encoded import Encoded
from sememe.errors import ConfigError
from sememe.lm import Frozen, LanguageModel
from sememe.text import TokenPolicy

__all__ = ["Block", "Latents", "Sources", "blocks_of"]

LINEAR_RTOL = 1e-3


class Block(NamedTuple):
    """The latents of one dictionary that read one layer. All tensors are views of the dictionary's weights."""

    dictionary: int
    layer: int
    first: int
    """The dictionary's number of the first of them."""
    reads: Float[Tensor, "n d_in"]
    writes: Mapping[int, Float[Tensor, "n d_out"]]
    """By the layer whose MLP's output they write to."""


class Latents(NamedTuple):
    """The active latents, one entry per latent and position."""

    block: Int[Tensor, " n"]
    dictionary: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    layer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    act: Float[Tensor, " n"]
    offset: Float[Tensor, " n"]
    """What of the activation does not come from what is read: the encoder's bias."""


def blocks_of(dictionary: Dictionary, number: int) -> list[Block]:
    """A dictionary's latents by the layer that they read.

    Args:
        dictionary: A transcoder or a cross-layer transcoder.
        number: What it is called in the graph.
    Raises:
        ConfigError: it reads or writes elsewhere than at MLPs, or writes to a layer below the one it reads, or is of a
            kind without fixed encoder directions.
    """
    sites = dictionary.sites
    assert sites is not None
    inputs = [_layer_of(site, "mlp_in") for site in sites.inputs]
    outputs = [_layer_of(site, "mlp_out") for site in sites.outputs]
    if isinstance(dictionary, CrossLayer):
        found = []
        for i, part in enumerate(dictionary.layers):
            writes = {
                outputs[m]: dictionary.decoders[i][:, _within(sites.outputs[m], part.first_output)].detach()
                for m in range(i, len(outputs))
            }
            reads = dictionary.encoders[i].detach()
            found.append(Block(number, inputs[i], part.latents.start, reads, writes))
    else:
        rows = dictionary.encoder_directions()
        if len(inputs) != 1 or rows is None:
            raise ConfigError(
                "a circuit's dictionary must be a transcoder of one layer or a cross-layer transcoder, with a linear "
                "encoder",
                f"{dictionary.kind} of {len(inputs)} inputs",
                "Train a transcoder (topk, jumprelu, ...) from mlp_in.L to mlp_out.L, or cross_layer.",
            )
        directions = dictionary.decoder_directions().detach()
        writes = {
            layer: directions[:, _within(site)] for layer, site in zip(outputs, sites.outputs, strict=True)
        }
        found = [Block(number, inputs[0], 0, rows.detach(), writes)]
    for block in found:
        if min(block.writes) < block.layer:
            raise ConfigError(
                f"a latent that reads layer {block.layer} must write to that layer or later ones",
                f"mlp_out.{min(block.writes)}",
                "Use transcoders whose outputs do not come before their inputs.",
            )
    return found


def _within(site: Site, first: int = 0) -> slice:
    return slice(site.start - first, site.stop - first)


def _layer_of(site: Site, alias: str) -> int:
    found = re.fullmatch(rf"{alias}\.(\d+)", site.hookpoint)
    if found is None:
        raise ConfigError(
            "a circuit's dictionaries must read mlp_in.L and write mlp_out.L",
            site.hookpoint,
            "Train transcoders (--inputs mlp_in.3 --outputs mlp_out.3), or use another verb for autoencoders.",
        )
    return int(found.group(1))


class Sources:
    """Everything that the frozen model adds up, on one prompt.

    Args:
        lm: The model.
        frozen: It, on the prompt.
        dictionaries: Folded, on the model's device, each with the policy it was made by.
    Raises:
        ConfigError: as `blocks_of`; two dictionaries read one layer or write to one; or activations are not linear in
            what is read where they are not 0.
        MismatchError: a dictionary does not belong to the model.
    """

    def __init__(
        self, lm: LanguageModel, frozen: Frozen, dictionaries: Sequence[tuple[Dictionary, TokenPolicy]]
    ) -> None:
        self.n_layers, self.seq = lm.n_layers, frozen.embedding.shape[0]
        self.frozen = frozen
        self.blocks: list[Block] = []
        for number, (dictionary, _) in enumerate(dictionaries):
            check_dictionary(dictionary, lm)
            self.blocks += blocks_of(dictionary, number)
        _check_alone(self.blocks)
        self.errors = torch.stack([x.detach().float() for x in frozen.mlp_out])
        self.biases = torch.zeros_like(self.errors)
        self._skips: dict[int, tuple[int, Tensor, Tensor]] = {}
        parts = [
            self._place(lm, dictionary, policy, number)
            for number, (dictionary, policy) in enumerate(dictionaries)
        ]
        self.latents = Latents(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        self.n_latents = len(self.latents.act)
        self.n = self.n_latents + (self.n_layers + 1) * self.seq
        """Latents, then errors (layer by layer), then tokens."""
        self._starts = self._by_position()

    def _place(self, lm: LanguageModel, dictionary: Dictionary, policy: TokenPolicy, number: int) -> Latents:
        """Encode the prompt, and take what is reconstructed off the errors."""
        frozen, sites = self.frozen, dictionary.sites
        assert sites is not None
        layers = [_layer_of(site, "mlp_in") for site in sites.inputs]
        read = {
            site.hookpoint: frozen.mlp_in[layer] for site, layer in zip(sites.inputs, layers, strict=True)
        }
        kept = kept_positions(lm, frozen.ids[0], sites.inputs, read, policy).to(self.errors.device)
        x = torch.cat([frozen.mlp_in[layer].float() for layer in layers], dim=1)[kept].detach()
        encoded = _linear(dictionary, x, [b for b in self.blocks if b.dictionary == number], sites.inputs)
        with torch.no_grad():
            recon = dictionary.decode(encoded, x)
            constant = dictionary.decode(
                encoded.with_acts(torch.zeros_like(encoded.acts)), torch.zeros_like(x)
            )
        for site in sites.outputs:
            layer, part = _layer_of(site, "mlp_out"), _within(site)
            self.errors[layer, kept] -= recon[:, part]
            self.biases[layer, kept] = constant[:, part]
            skip = getattr(dictionary, "W_skip", None)
            if isinstance(skip, Tensor):
                self._skips[layer] = (layers[0], skip.detach()[:, part], kept)
        return self._entries(encoded, kept, x, number, sites.inputs)

    def _entries(
        self,
        encoded: Encoded,
        kept: Bool[Tensor, " seq"],
        x: Float[Tensor, "rows d_in"],
        number: int,
        inputs: Sequence[Site],
    ) -> Latents:
        active = encoded.acts != 0
        rows, indices, acts = encoded.row_ids()[active], encoded.indices.long()[active], encoded.acts[active]
        places = torch.nonzero(kept)[:, 0]
        found = []
        for index, block, site in self._of(number, inputs):
            mine = (indices >= block.first) & (indices < block.first + block.reads.shape[0])
            order = torch.argsort(rows[mine], stable=True)
            row, latent, act = rows[mine][order], indices[mine][order], acts[mine][order]
            own = (block.reads[latent - block.first] * x[row][:, _within(site)]).sum(1)

            def all_(value: int, like: Tensor = latent) -> Tensor:
                return torch.full_like(like, value)

            found.append(
                Latents(all_(index), all_(number), latent, all_(block.layer), places[row], act, act - own)
            )
        return Latents(*(torch.cat(columns) for columns in zip(*found, strict=True)))

    def _of(self, number: int, inputs: Sequence[Site]) -> list[tuple[int, Block, Site]]:
        """A dictionary's blocks with their place among all and the site that each reads."""
        mine = [(i, block) for i, block in enumerate(self.blocks) if block.dictionary == number]
        return [(i, block, site) for (i, block), site in zip(mine, inputs, strict=True)]

    def _by_position(self) -> list[Int[Tensor, " seq_plus_1"]]:
        """For each block, where each position's entries begin among all latents."""
        key = self.latents.block * self.seq + self.latents.position
        wanted = torch.arange(self.seq + 1, device=key.device)
        return [torch.searchsorted(key, i * self.seq + wanted).cpu() for i in range(len(self.blocks))]

    # ---- what is put into the frozen model ---------------------------------------------------------------

    def leaf(self, layer: int) -> Float[Tensor, "seq d_model"]:
        """The MLP's output without what a skip connection adds."""
        whole = self.frozen.mlp_out[layer].detach()
        if layer not in self._skips:
            return whole
        return whole - self._skip(layer, {i: x[None] for i, x in enumerate(self.frozen.mlp_in)})[0]

    def put(
        self, layer: int, leaf: Float[Tensor, "batch seq d_model"]
    ) -> Callable[[Mapping[int, Tensor]], Tensor]:
        """The MLP's output from its leaf and, where there is a skip connection, what is read."""
        return lambda read: leaf + self._skip(layer, read) if layer in self._skips else leaf

    def _skip(self, layer: int, read: Mapping[int, Tensor]) -> Tensor:
        source, weight, kept = self._skips[layer]
        x = read[source]
        return (x.float() @ weight).to(x.dtype) * kept[:, None]

    # ---- what is asked of it -----------------------------------------------------------------------------

    def reads(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Encoder directions of some of the active latents."""
        rows = [
            self.blocks[block].reads[latent - self.blocks[block].first]
            for block, latent in zip(
                self.latents.block[ids].tolist(), self.latents.latent[ids].tolist(), strict=True
            )
        ]
        return torch.stack(rows)

    def written(self, i: int) -> dict[int, Float[Tensor, " d_model"]]:
        """What an active latent adds to each layer's MLP output."""
        block = self.blocks[int(self.latents.block[i])]
        row, act = int(self.latents.latent[i]) - block.first, self.latents.act[i]
        return {layer: act * directions[row] for layer, directions in block.writes.items()}

    def collect(
        self, embedding: Float[Tensor, "n seq d"], out: Sequence[Float[Tensor, "n seq d"] | None]
    ) -> tuple[Float[Tensor, "n sources"], Float[Tensor, " n"]]:
        """What each source gives to some targets, from the targets' gradients.

        Args:
            embedding: Their gradient in the token embeddings.
            out: In each MLP's output; None where it is 0.
        Returns:
            One row per target, and what the decoders' biases give it.
        """
        n = embedding.shape[0]
        weights = embedding.new_zeros(n, self.n, dtype=torch.float32)
        bias = embedding.new_zeros(n, dtype=torch.float32)
        for number, block in enumerate(self.blocks):
            starts = self._starts[number].tolist()
            for layer, directions in block.writes.items():
                gradient = out[layer]
                if gradient is None:
                    continue
                for position in range(self.seq):
                    part = slice(starts[position], starts[position + 1])
                    if part.start == part.stop:
                        continue
                    rows = directions[self.latents.latent[part] - block.first]
                    along = gradient[:, position].float() @ rows.T
                    weights[:, part] += along * self.latents.act[part]
        for layer, gradient in enumerate(out):
            if gradient is None:
                continue
            first = self.n_latents + layer * self.seq
            weights[:, first : first + self.seq] = (gradient.float() * self.errors[layer]).sum(-1)
            bias += (gradient.float() * self.biases[layer]).sum((1, 2))
        weights[:, self.n - self.seq :] = (embedding.float() * self.frozen.embedding.float()).sum(-1)
        return weights, bias


def _check_alone(blocks: Sequence[Block]) -> None:
    read: dict[int, int] = {}
    written: dict[int, int] = {}
    for block in blocks:
        layers = [*((written, layer, f"write to mlp_out.{layer}") for layer in block.writes)]
        for known, layer, what in [(read, block.layer, f"read mlp_in.{block.layer}"), *layers]:
            if known.setdefault(layer, block.dictionary) != block.dictionary:
                raise ConfigError(
                    f"one dictionary at most may {what}",
                    f"dictionaries {known[layer]} and {block.dictionary}",
                    "Leave one of them out.",
                )


def _linear(
    dictionary: Dictionary,
    x: Float[Tensor, "rows d_in"],
    blocks: Sequence[Block],
    inputs: Sequence[Site],
) -> Encoded:
    """The prompt's latents, once it is clear that each is linear in its encoder's direction where it is active."""
    x = x.clone().requires_grad_(True)
    with torch.enable_grad():
        encoded = dictionary.encode(x).compact()
    weights = torch.randn(encoded.acts.shape, generator=torch.Generator().manual_seed(0)).to(encoded.acts)
    weights = torch.where(encoded.acts != 0, weights, 0.0)
    rows, indices = encoded.row_ids(), encoded.indices.long()
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for block, site in zip(blocks, inputs, strict=True):
            mine = (indices >= block.first) & (indices < block.first + block.reads.shape[0]) & (weights != 0)
            part = weights[mine][:, None] * block.reads[indices[mine] - block.first]
            expected[:, _within(site)].index_add_(0, rows[mine], part)
    gradient = None
    if encoded.acts.requires_grad:
        (gradient,) = torch.autograd.grad((encoded.acts * weights).sum(), x, allow_unused=True)
    gradient = torch.zeros_like(x) if gradient is None else gradient
    size, off = expected.norm(), (gradient - expected).norm()
    if not bool(off <= LINEAR_RTOL * size):
        raise ConfigError(
            "latents of a circuit must be linear in what they read, along their encoder's direction",
            f"{dictionary.kind}, whose gradient differs by {float(off / size.clamp_min(1e-12)):.2g}",
            "Use topk, batch_topk, jumprelu, relu or cross_layer.",
        )
    return encoded.detach()
