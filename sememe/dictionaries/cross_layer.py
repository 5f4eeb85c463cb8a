"""Cross-layer transcoder: latents of a layer read that layer and write to it and every later one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, cast, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from sememe import kernels
from sememe.dictionaries.auxiliary import auxk_loss_of
from sememe.dictionaries.base import Constraints, LatentGroup, Loss, Resampling, Sites, Trainable
from sememe.dictionaries.dead import DeadLatents
from sememe.dictionaries.initial import geometric_median, median_of_others, unit_rows
from sememe.dictionaries.jumprelu import Jump
from sememe.dictionaries.levels import levels
from sememe.dictionaries.resampling import ResamplingConfig
from sememe.encoded import Counts, Encoded
from sememe.errors import ConfigError

__all__ = ["CrossLayer", "CrossLayerConfig"]

N_THRESHOLD_ROWS = 1024
"""Rows of the sample that set the first thresholds."""


class CrossLayerConfig(ResamplingConfig):
    """Options of a cross-layer transcoder; d_sae counts the latents of all layers together."""

    kind: Literal["cross_layer"] = "cross_layer"
    """Name of the architecture."""
    n_layers: int | None = Field(default=None, ge=1)
    """Layers into which bare tensors are cut, equally; where hookpoints are known, each is a layer."""
    selection: Literal["topk", "jumprelu"] = "topk"
    """topk: a number of latents is kept. jumprelu: those above a learned threshold each."""
    k: int | None = None
    """Latents kept per row, with topk: of each layer, or of all together, as `over` says; 32 if not given."""
    over: Literal["layer", "all"] = "layer"
    """Whether topk chooses within each layer, or among the latents of all layers."""
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the auxiliary loss by which dead latents model the residual, with topk; 0 turns it off."""
    auxk: int | None = Field(default=None, ge=1)
    """Dead latents used per row in the auxiliary loss; d_in / 2 if not given."""
    dead_after_tokens: int = Field(default=10_000_000, ge=1)
    """A latent that has not been kept for this many training rows counts as dead."""
    target_l0: float = Field(default=32.0, gt=0)
    """Active latents per row, of all layers together, that the penalty of jumprelu steers to."""
    l0_coefficient: float = Field(default=1.0, gt=0)
    """Weight of the penalty (l0 / target - 1)^2 of jumprelu."""
    bandwidth: float = Field(default=0.005, gt=0)
    """Width of the window about a threshold in which it gets gradients, in units of a layer's mean norm."""
    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the run over which the weight of jumprelu's penalty rises from 0."""
    resample: Literal["none", "loss", "worst", "random", "mcs"] = "none"
    """Which latents are pointed anew, and where to: none, loss, worst, random or mcs; if not given, loss with
    jumprelu, whose dead latents have no other remedy, and none with topk, which has AuxK."""

    @model_validator(mode="before")
    @classmethod
    def _remedy(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("selection") == "jumprelu":
            return {"resample": "loss", **data}
        return data

    @model_validator(mode="after")
    def _no_inert_option(self) -> Self:
        if self.selection == "topk":
            names: tuple[str, ...] = ("target_l0", "l0_coefficient", "bandwidth", "sparsity_warmup")
            self.check_inert(*names, without="selection is topk")
            if self.auxk_coefficient == 0:
                self.check_inert("auxk", "dead_after_tokens", without="auxk_coefficient is 0")
        else:
            names = ("k", "over", "auxk_coefficient", "auxk", "dead_after_tokens")
            self.check_inert(*names, without="selection is jumprelu")
        return self


class _Layer(NamedTuple):
    """What belongs to one layer: features of the input, the first feature written, latents."""

    inputs: slice
    first_output: int
    latents: slice


@final
class CrossLayer(Trainable):
    """`acts_l = select((x_l - b_pre_l) encoders_l^T + b_enc_l)`, `recon_m = sum_{l <= m} acts_l decoders_lm + b_dec_m`.

    x_l is the l-th input, recon_m the m-th output, both in the order of the hookpoints named. `decoders[l]` holds, side
    by side, what the latents of layer l write to outputs l, l + 1, ...; its rows have norm 1. What the mask forbids is
    not stored. `W_enc` and `W_dec` give the whole matrices, zeros included, made anew at each call.

    Source: Ameisen et al. 2025 (Circuit Tracing: Revealing Computational Graphs in Language Models), "Building an
    interpretable replacement model". Differs: TopK, or JumpReLU with the penalty of Rajamanoharan et al. 2024b on l0
    (a target for all layers together), instead of JumpReLU with a tanh of the activation times its decoder's norm;
    unit rows; b_pre as in our other dictionaries.
    """

    kind = "cross_layer"
    config: CrossLayerConfig
    weakens = True
    b_pre: Tensor
    threshold_unit: Tensor

    def __init__(
        self, config: CrossLayerConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.layers = _layers(config, d_in, d_out, d_sae, sites)
        sizes = [layer.latents.stop - layer.latents.start for layer in self.layers]
        most = min(sizes) if config.over == "layer" else d_sae
        self.k = 32 if config.k is None else config.k
        if config.selection == "topk" and not 1 <= self.k <= most:
            raise ConfigError(
                f"k must be in [1, {most}], the latents to choose from", self.k, "Lower k or raise d_sae."
            )
        widths = [layer.inputs.stop - layer.inputs.start for layer in self.layers]
        self.encoders = nn.ParameterList(
            [nn.Parameter(torch.zeros(n, d)) for d, n in zip(widths, sizes, strict=True)]
        )
        self.decoders = nn.ParameterList(
            [
                nn.Parameter(torch.zeros(n, d_out - layer.first_output))
                for n, layer in zip(sizes, self.layers, strict=True)
            ]
        )
        self.dead = [DeadLatents() for _ in self.layers]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("b_pre", torch.zeros(d_in))
        if config.selection == "jumprelu":
            self.relative_threshold = nn.Parameter(torch.zeros(d_sae))
            self.register_buffer("threshold_unit", torch.ones(()))

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(CrossLayerConfig.build(config), d_in, d_out, d_sae, sites)

    # -- the whole matrices --------------------------------------------------------------------------

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder of all layers: each latent reads its own layer's features, the rest is 0."""
        return self.encoder_directions().T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """The decoder of all layers: a latent writes nothing to earlier layers than its own."""
        return self.decoder_directions()

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What each latent reads, over all inputs."""
        parts = [
            pad(encoder, (layer.inputs.start, self.d_in - layer.inputs.stop))
            for layer, encoder in zip(self.layers, self.encoders, strict=True)
        ]
        return torch.cat(parts)

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """What each latent writes, over all outputs."""
        return self._decoder_rows([slice(None)] * len(self.layers))

    def _decoder_rows(self, rows: Sequence[slice | Tensor]) -> Float[Tensor, "n d_out"]:
        """Some latents' rows, given by their place within each layer."""
        parts = [
            pad(decoder[of], (layer.first_output, 0))
            for layer, decoder, of in zip(self.layers, self.decoders, rows, strict=True)
        ]
        return torch.cat(parts)

    # -- the map -------------------------------------------------------------------------------------

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """What a pre-activation has to exceed, with jumprelu."""
        return self.relative_threshold * self.threshold_unit

    def _reads(self, x: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments that every encoding kernel begins with, for one layer: x, W_enc, b_enc, b_pre."""
        layer = self.layers[number]
        x_l, b_pre = x[:, layer.inputs], self.b_pre[layer.inputs]
        return x_l, self.encoders[number].T, self.b_enc[layer.latents], b_pre

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The latents of all layers that are kept; ids of layer 0 come first."""
        if self.config.selection == "jumprelu":
            self.check_input(x)
            return self._encode_above(x, self.threshold.detach())
        return self._keep(x)[0]

    def _keep(self, x: Float[Tensor, "batch d_in"]) -> tuple[Encoded, list[Encoded]]:
        """The latents that topk keeps, together and layer by layer, there counted from the layer's first."""
        self.check_input(x)
        k, acts, indices = self.k, [], []
        for number, layer in enumerate(self.layers):
            n = layer.latents.stop - layer.latents.start
            found = kernels.encode_topk(*self._reads(x, number), min(k, n))
            acts.append(found.acts)
            indices.append(found.indices + layer.latents.start)
        all_acts, all_indices = torch.cat(acts, dim=1), torch.cat(indices, dim=1)
        if self.config.over == "layer":
            parts = [
                Encoded.from_topk(own, ids - layer.latents.start, layer.latents.stop - layer.latents.start)
                for own, ids, layer in zip(acts, indices, self.layers, strict=True)
            ]
            return Encoded.from_topk(all_acts, all_indices, self.d_sae), parts
        best = all_acts.detach().topk(k, dim=1).indices
        encoded = Encoded.from_topk(all_acts.gather(1, best), all_indices.gather(1, best), self.d_sae)
        # to know how many are whose, a GPU would have to be waited for
        split = _masked if kernels.path_for(x) == "gpu" else _of_layer
        return encoded, [split(encoded, layer.latents) for layer in self.layers]

    def _encode_above(self, x: Float[Tensor, "batch d_in"], threshold: Float[Tensor, " d_sae"]) -> Encoded:
        """Every pre-activation above its latent's threshold."""
        parts = [
            kernels.encode_threshold(*self._reads(x, number), threshold[layer.latents])
            for number, layer in enumerate(self.layers)
        ]
        rows = torch.cat([part.row_ids() for part in parts])
        order = rows.argsort(stable=True)
        counts = torch.stack([part.row_counts() for part in parts]).sum(0)
        indices = [part.indices + layer.latents.start for part, layer in zip(parts, self.layers, strict=True)]
        return Encoded(
            torch.cat([part.acts for part in parts])[order],
            torch.cat(indices)[order],
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            self.d_sae,
        )

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """What all layers write to each output, plus its bias."""
        return self._decode([_of_layer(encoded, layer.latents) for layer in self.layers])

    def _decode(self, encoded: Sequence[Encoded]) -> Float[Tensor, "batch d_out"]:
        """`decode`, of each layer's latents by themselves."""
        parts = [
            kernels.decode_encoded(own, decoder, decoder.new_zeros(decoder.shape[1]))
            for own, decoder in zip(encoded, self.decoders, strict=True)
        ]
        starts = [layer.first_output for layer in self.layers]
        return cast(Tensor, cast(Any, _Summed.apply)(self.b_dec, starts, *parts))

    def fold(self) -> Self:
        """Exact: activations of all layers keep one unit, so that a choice among them stays the same."""
        folded = self._copy_with_scales_one()
        s_in, s_out = self.scale_in.expand(self.d_in), self.scale_out.expand(self.d_out)
        unit = s_in.max()
        with torch.no_grad():
            folded.b_pre.div_(s_in)
            folded.b_enc.div_(unit)
            folded.b_dec.div_(s_out)
            if self.config.selection == "jumprelu":
                folded.threshold_unit.div_(unit)
            for layer, encoder, decoder in zip(self.layers, folded.encoders, folded.decoders, strict=True):
                encoder.mul_(s_in[layer.inputs] / unit)
                decoder.mul_(unit / s_out[layer.first_output :])
        return folded

    # -- training ------------------------------------------------------------------------------------

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """Random unit decoder rows; encoders start as what they write to their own layer, where it is as wide."""
        with torch.no_grad():
            self.b_enc.zero_()
            self.b_pre.copy_(geometric_median(x))
            self.b_dec.copy_(geometric_median(target))
            for number, decoder in enumerate(self.decoders):
                decoder.copy_(unit_rows(decoder.shape[0], decoder.shape[1], generator))
                self.encoders[number].copy_(self._read_as_written(number, decoder, generator))
            if self.config.selection == "jumprelu":
                self._start_thresholds(x)

    def _read_as_written(
        self, number: int, rows: Float[Tensor, "n d_written"], generator: torch.Generator
    ) -> Float[Tensor, "n d_read"]:
        """Unit encoder directions: a layer's own part of decoder rows, or random ones if it is not as wide."""
        n, d = rows.shape[0], self.encoders[number].shape[1]
        starts = [*(layer.first_output for layer in self.layers), self.d_out]
        own = rows[:, : starts[number + 1] - starts[number]]
        if own.shape[1] != d:
            return unit_rows(n, d, generator).to(rows.device)
        units: Tensor = own / own.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return units

    def _start_thresholds(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Quantiles of the sample at which l0 is 4 x the target."""
        x = x[:N_THRESHOLD_ROWS]
        share = min(0.5, 4 * self.config.target_l0 / self.d_sae)
        lengths, lowest = [], []
        for number in range(len(self.layers)):
            x_l, W_enc, b_enc, b_pre = self._reads(x, number)
            lengths.append((x_l - b_pre).norm(dim=1).mean())
            lowest.append(levels(x_l - b_pre, W_enc, b_enc, share))
        self.threshold_unit.copy_(torch.stack(lengths).mean().clamp_min(1e-12))
        self.relative_threshold.copy_((torch.cat(lowest) / self.threshold_unit).clamp_min(0))

    def after_step(self, encoded: Encoded | Counts) -> None:
        """The bookkeeping, and the numbers of dead latents on their way for the next step's AuxK."""
        super().after_step(encoded)
        if self.config.selection == "topk" and self.config.auxk_coefficient > 0:
            for layer, dead in zip(self.layers, self.dead, strict=True):
                dead.send(self.tokens_since_fired[layer.latents], self.config.dead_after_tokens)

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """Mean squared error over all outputs, and AuxK over dead latents or the penalty on l0."""
        if self.config.selection == "jumprelu":
            return self._loss_jumprelu(x, target, progress)
        config = self.config
        encoded, parts = self._keep(x)
        error = self._decode(parts) - target
        mse = total = error.square().mean()
        terms = {"mse": mse.detach()}
        if config.auxk_coefficient > 0:
            dead = [
                own.ids(self.tokens_since_fired[layer.latents], config.dead_after_tokens)
                for layer, own in zip(self.layers, self.dead, strict=True)
            ]
            if any(own.numel() > 0 for own in dead):
                auxk = self._auxk(x, error, dead)
                terms["auxk"] = auxk.detach()
                total = total + config.auxk_coefficient * auxk
        return Loss(total, terms, encoded.detach(), error)

    def _auxk(
        self,
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
        dead: Sequence[Int[Tensor, " _"]],
    ) -> Float[Tensor, ""]:
        """As `dictionaries.auxiliary.auxk_loss`: each dead latent reads its layer and may write to later ones.

        Args:
            x: Inputs.
            error: What the live latents reconstruct minus the target.
            dead: Dead latents by their place within each layer.
        """
        read = [encoder.index_select(0, of) for encoder, of in zip(self.encoders, dead, strict=True)]
        biases = [self.b_enc[layer.latents][of] for layer, of in zip(self.layers, dead, strict=True)]

        def reads(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows n_dead"]:
            centred = x - self.b_pre
            parts = [
                torch.addmm(bias, centred[:, layer.inputs], encoder.T)
                for layer, encoder, bias in zip(self.layers, read, biases, strict=True)
            ]
            return torch.cat(parts, dim=1)

        k = self.config.auxk or max(self.d_in // 2, 1)
        return auxk_loss_of(reads, self._decoder_rows(dead), x, -error, k)

    def _loss_jumprelu(self, x: Tensor, target: Tensor, progress: float) -> Loss:
        config = self.config
        self.check_input(x)
        threshold, width = self.threshold, config.bandwidth * self.threshold_unit
        near = self._encode_above(x, (threshold.detach() - width / 2).clamp_min(0))
        acts, open_ = Jump.apply(near.acts, kernels.of_entries(threshold, near), width)  # type: ignore[no-untyped-call]
        encoded = near.with_acts(acts)
        error = self.decode(encoded) - target
        mse = error.square().mean()
        penalty = (open_.sum() / encoded.n_rows / config.target_l0 - 1).square()
        warm = min(1.0, progress / config.sparsity_warmup) if config.sparsity_warmup else 1.0
        total = mse + config.l0_coefficient * warm * penalty
        return Loss(total, {"mse": mse.detach(), "penalty": penalty.detach()}, encoded.detach(), error)

    @torch.no_grad()
    def reset_latents(
        self,
        ids: Int[Tensor, " n"],
        directions: Float[Tensor, "n d_out"],
        inputs: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """Unit decoder rows along what a latent may write of the directions; the encoder reads its own layer's part of
        the inputs, or of what is written if there are none."""
        generator = torch.Generator().manual_seed(0)
        for number, layer in enumerate(self.layers):
            mine = (ids >= layer.latents.start) & (ids < layer.latents.stop)
            if not bool(mine.any()):
                continue
            of = ids[mine] - layer.latents.start
            rows = directions[mine][:, layer.first_output :]
            rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
            self.decoders[number][of] = rows
            length = median_of_others(self.encoders[number].norm(dim=1), of)
            if inputs is None:
                reads = self._read_as_written(number, rows, generator)
            else:
                own = inputs[mine][:, layer.inputs]
                reads = own / own.norm(dim=1, keepdim=True).clamp_min(1e-12)
            self.encoders[number][of] = length * reads
            if self.config.selection == "jumprelu":
                own_thresholds = self.relative_threshold[layer.latents]
                self.relative_threshold[ids[mine]] = median_of_others(own_thresholds, of)
        self.b_enc[ids] = 0.0
        self.tokens_since_fired[ids] = 0

    @property
    def competes(self) -> bool:
        """For k places of each layer, or of all together, with topk."""
        return self.config.selection == "topk"

    @torch.no_grad()
    def weaken(self, ids: Int[Tensor, " n"], factor: float) -> None:
        """Encoders, biases and thresholds; not so far that all that is positive lies in the window of jumprelu."""
        if self.config.selection == "jumprelu":
            lowest = float(self.relative_threshold[ids].min())
            if lowest > self.config.bandwidth:
                factor = max(factor, self.config.bandwidth / lowest)
            self.relative_threshold[ids] *= factor
        for encoder, layer in zip(self.encoders, self.layers, strict=True):
            mine = (ids >= layer.latents.start) & (ids < layer.latents.stop)
            encoder[ids[mine] - layer.latents.start] *= factor
        self.b_enc[ids] *= factor

    def resampling(self) -> Resampling | None:
        """As the config says."""
        return self.config.resampling()

    def latent_groups(self) -> tuple[LatentGroup, ...]:
        """Latents of each layer, which write to that layer's output and all later ones."""
        return tuple(
            LatentGroup(layer.latents, slice(layer.first_output, self.d_out)) for layer in self.layers
        )

    def latents_of(self, name: str) -> slice | None:
        """A layer's encoder and decoder belong to its own latents."""
        matrix, dot, number = name.partition(".")
        return self.layers[int(number)].latents if dot else super().latents_of(matrix)

    def constraints(self) -> Constraints:
        """Decoder rows, over all that a latent writes, keep norm 1; thresholds stay >= 0."""
        return Constraints(
            unit_norm=tuple(f"decoders.{number}" for number in range(len(self.layers))),
            non_negative=("relative_threshold",) if self.config.selection == "jumprelu" else (),
        )


class _Summed(torch.autograd.Function):
    """`bias` plus each part, which begins at a feature of its own: one array, and no copy for each part."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, starts: list[int], *parts: Tensor) -> Tensor:
        ctx.starts = starts
        out = bias.repeat(parts[0].shape[0], 1)
        for start, part in zip(starts, parts, strict=True):
            out[:, start:] += part
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return grad.sum(0), None, *(grad[:, start:] for start in ctx.starts)


def _layers(
    config: CrossLayerConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None
) -> tuple[_Layer, ...]:
    """Inputs and outputs layer by layer, and as many latents for each, to within one."""
    if sites is not None:
        if config.n_layers is not None:
            raise ConfigError(
                "n_layers must be left out where hookpoints are known: each is a layer",
                config.n_layers,
                "Drop it.",
            )
        if len(sites.inputs) != len(sites.outputs):
            raise ConfigError(
                "a cross-layer transcoder needs as many outputs as inputs",
                f"{len(sites.inputs)} inputs and {len(sites.outputs)} outputs",
                "Name them layer by layer: --inputs mlp_in.0 mlp_in.1 --outputs mlp_out.0 mlp_out.1.",
            )
        inputs = [slice(site.start, site.stop) for site in sites.inputs]
        starts = [site.start for site in sites.outputs]
    else:
        n = config.n_layers or 1
        if d_in % n or d_out % n:
            raise ConfigError(
                f"n_layers must divide d_in={d_in} and d_out={d_out} into equal layers", n, "Change n_layers."
            )
        inputs = [slice(i * d_in // n, (i + 1) * d_in // n) for i in range(n)]
        starts = [i * d_out // n for i in range(n)]
    n = len(inputs)
    if d_sae < n:
        raise ConfigError(f"d_sae must be at least the number of layers, {n}", d_sae, "Raise d_sae.")
    latents = [slice(i * d_sae // n, (i + 1) * d_sae // n) for i in range(n)]
    return tuple(_Layer(*parts) for parts in zip(inputs, starts, latents, strict=True))


def _of_layer(encoded: Encoded, latents: slice) -> Encoded:
    """The entries of one layer's latents, counted from its first."""
    inside = (encoded.indices >= latents.start) & (encoded.indices < latents.stop)
    rows = encoded.row_ids()[inside]
    counts = torch.zeros(encoded.n_rows, dtype=torch.int64, device=rows.device)
    counts.index_add_(0, rows, torch.ones_like(rows))
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    n = latents.stop - latents.start
    return Encoded(encoded.acts[inside], encoded.indices[inside] - latents.start, row_ptr, n)


def _masked(encoded: Encoded, latents: slice) -> Encoded:
    """As `_of_layer`, with nothing left out: other layers' entries stay, without activation, under any of its ids."""
    n, local = latents.stop - latents.start, encoded.indices - latents.start
    acts = torch.where((local >= 0) & (local < n), encoded.acts, 0.0)
    return Encoded(acts, local.remainder(n), encoded.row_ptr, n, encoded.k)
