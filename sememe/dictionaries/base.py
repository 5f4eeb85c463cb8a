"""The contracts: what every dictionary promises, and what a dictionary that can be trained promises besides.

Knows nothing about language models, stores or optimisers. `Dictionary` is all that evaluation, interpretation
and intervention use; `Trainable` is all that `train` uses. Concrete classes are final, one file each.

Units: a model's activations are *raw*. While training, inputs are multiplied by `scale_in` and targets by
`scale_out` (so that learning rates carry over between models), and the parameters live in those *training
units*. A scale is one number, or, where several sites are concatenated, one number per feature that is the same
within a site. `fold()` gives the same map in raw units with both scales 1; only folded dictionaries are saved.
"""

from __future__ import annotations

import abc
import copy
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import pydantic
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sememe import artifact, kernels
from sememe.config import Config
from sememe.encoded import Counts, Encoded
from sememe.errors import ConfigError, CorruptError, MismatchError, ShapeError

__all__ = [
    "ArchitectureConfig",
    "Batch",
    "Constraints",
    "Dictionary",
    "LatentGroup",
    "Loss",
    "Resampling",
    "Site",
    "Sites",
    "Trainable",
]

WEIGHTS = "weights.safetensors"
PROBE = "probe.safetensors"
N_PROBE_ROWS = 16
PROBE_RTOL = 1e-4


class Site(Config):
    """One place in one model that a dictionary reads or writes."""

    model: str
    """The model's name, as given to `sememe.lm.load`."""
    model_fingerprint: str
    """The model's fingerprint."""
    hookpoint: str
    """Where in the model, e.g. resid_post.8."""
    start: int
    """First feature of the concatenated axis that belongs to this site."""
    stop: int
    """One past the last."""
    max_norm: float | None = None
    """Rows with a larger Euclidean norm (raw units) were left out of training: attention sinks."""

    def admits(self, rows: Float[Tensor, "*lead d"]) -> Bool[Tensor, "*lead"]:
        """Which of the site's own rows are within its limit of norm."""
        if self.max_norm is None:
            return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
        norms: Tensor = rows.float().norm(dim=-1)  # as rows are measured when they are harvested
        return norms <= self.max_norm


class Sites(Config):
    """Where a dictionary's inputs come from and its outputs go; equal for an autoencoder."""

    inputs: tuple[Site, ...]
    """Concatenated along the feature axis in this order."""
    outputs: tuple[Site, ...]
    """Concatenated along the feature axis in this order."""

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Every hookpoint read or written, without repeats, in order."""
        return tuple(dict.fromkeys(site.hookpoint for site in (*self.inputs, *self.outputs)))

    def admit(self, x: Float[Tensor, "*lead d_in"]) -> Bool[Tensor, "*lead"]:
        """Which rows, of all inputs side by side, are within every input's limit of norm."""
        each = [site.admits(x[..., site.start : site.stop]) for site in self.inputs]
        return torch.stack(each).all(0)


class ArchitectureConfig(Config):
    """What every architecture's config shares. Subclasses add `kind` (the discriminator) and their options."""

    rate_factor: ClassVar[float] = 1.0
    """What Adam's rule for the learning rate is multiplied by for this architecture, if none is given."""

    kind: str
    """Name of the architecture."""
    d_sae: int | None = None
    """Number of latents; 8 x d_in if not given."""

    @pydantic.model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.d_sae is not None and self.d_sae < 1:
            raise ConfigError("d_sae must be >= 1", self.d_sae, "Raise d_sae.")
        k = self.k_in_use()
        if k is not None and self.d_sae is not None and not 1 <= k <= self.d_sae:
            raise ConfigError(f"k must be in [1, d_sae={self.d_sae}]", k, "Lower k or raise d_sae.")
        return self

    def k_in_use(self) -> int | None:
        """The number of active latents that the options ask for, if they ask for one."""
        k: int | None = getattr(self, "k", None)
        return k

    def width(self, d_in: int) -> int:
        """The number of latents for an input width."""
        return 8 * d_in if self.d_sae is None else self.d_sae


class Batch(NamedTuple):
    """Rows to train on, in raw units and float32. For an autoencoder `target is x`."""

    x: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"]

    def to(self, device: torch.device) -> Batch:
        """The rows on another device; the target stays x where it is."""
        x = self.x.to(device, non_blocking=True)
        return self.of_rows(x, x if self.target is self.x else self.target.to(device, non_blocking=True))

    def of_rows(self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]) -> Batch:
        """The same rows elsewhere, with whatever else the batch carries."""
        return Batch(x, target)


class Loss(NamedTuple):
    """A training loss. `terms` are its parts, for logging, still on the device.

    `total` holds the term `mse`, the mean square of `error`, with weight 1. `error` is the reconstruction minus the
    target, in training units; gradients flow through it, so that the reconstruction can be spliced into a model.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    encoded: Encoded | Counts
    """What was active; counts only, where a dense batch is taken in chunks whose activations nobody keeps."""
    error: Float[Tensor, "batch d_out"] | None = None


class Constraints(NamedTuple):
    """What the optimiser keeps true in its own pass over the parameters."""

    unit_norm: tuple[str, ...] = ()
    """Parameters whose rows (one per latent) keep norm 1: the gradient's radial part is removed first."""
    non_negative: tuple[str, ...] = ()
    """Parameters whose entries stay >= 0."""


class Resampling(NamedTuple):
    """Which latents are pointed anew, where to, and when."""

    at: tuple[float, ...]
    """Shares of the run."""
    after_tokens: int
    """Training rows without firing after which a latent counts as silent."""
    rewarmup_steps: int
    """Steps over which the learning rate climbs back."""
    scheme: Literal["loss", "worst", "random", "mcs"] = "loss"
    """As `ResamplingConfig.resample`."""
    against: Path | None = None
    """The second dictionary of mcs."""
    below: float = 0.0
    """The smallest of its cosines that spares a latent."""


class LatentGroup(NamedTuple):
    """Latents that write to the same features of the output."""

    latents: slice
    outputs: slice


class Dictionary(nn.Module, abc.ABC):
    """Latents and how to go from activations to them and back."""

    kind: ClassVar[str]
    signed: bool = False
    """Whether activations may be below 0. Then the sign of a direction means nothing: what compares directions takes
    absolute cosines."""
    config: Config
    sites: Sites | None
    d_in: int
    d_out: int
    d_sae: int
    scale_in: Tensor
    scale_out: Tensor

    def __init__(self, config: Config, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None) -> None:
        super().__init__()
        self.config, self.d_in, self.d_out, self.d_sae, self.sites = config, d_in, d_out, d_sae, sites
        self.register_buffer("scale_in", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))

    @abc.abstractmethod
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Latent activations, each row on its own whatever the batch (in eval mode)."""

    def encode_latents(
        self, x: Float[Tensor, "batch d_in"], latents: Sequence[int]
    ) -> Float[Tensor, "batch n"]:
        """The activations of a few latents, dense: those that `encode` gives them (in eval mode)."""
        return self.encode(x).columns(latents)

    @abc.abstractmethod
    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """The reconstruction from latent activations; `x` is read by skip connections only."""

    @abc.abstractmethod
    def fold(self) -> Dictionary:
        """The same map from raw inputs to raw outputs, with both scales 1. A new object; self is unchanged."""

    @abc.abstractmethod
    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """The output direction that each latent writes."""

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"] | None:
        """The input direction that each latent reads, where the encoder is linear."""
        weights = getattr(self, "W_enc", None)
        return weights.T if isinstance(weights, Tensor) else None

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """decode(encode(x), x)."""
        return self.decode(self.encode(x), x)

    def check_input(self, x: Tensor) -> None:
        """Raise a ShapeError unless the last axis is d_in."""
        if x.dim() != 2 or x.shape[-1] != self.d_in:
            raise ShapeError(
                f"x must have shape (batch, d_in={self.d_in})",
                tuple(x.shape),
                "Flatten leading axes, and check that the dictionary belongs to this hookpoint.",
            )

    def check_autoencoder(self) -> None:
        """Raise a ShapeError unless outputs are as wide as inputs."""
        if self.d_in != self.d_out:
            raise ShapeError(
                f"{self.kind} reconstructs its input: d_in must be d_out",
                f"{self.d_in} and {self.d_out}",
                "Use an autoencoder's site.",
            )

    # -- saving ------------------------------------------------------------------------------------

    def write(self, folder: str | Path, probe_rows: Float[Tensor, "rows d_in"]) -> dict[str, Any]:
        """Fold and write the files of a dictionary artifact; returns what belongs into its meta.json's extra.

        Args:
            folder: An artifact's work folder.
            probe_rows: Raw activations; the first 16 and their reconstructions are stored and checked on load.
        """
        folder = Path(folder)
        folded = self.fold().eval().cpu()
        x = probe_rows[:N_PROBE_ROWS].detach().to("cpu", torch.float32).contiguous()
        with torch.no_grad(), kernels.use("reference"):
            recon = folded(x)
        tensors = {name: value.detach().contiguous() for name, value in folded.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        save_file({"x": x, "recon": recon.contiguous()}, folder / PROBE)
        return {
            "architecture": {"kind": self.kind, **folded.config.resolved()},
            "d_in": self.d_in,
            "d_out": self.d_out,
            "d_sae": self.d_sae,
            "sites": None if self.sites is None else self.sites.resolved(),
        }

    def save(
        self,
        path: str | Path,
        probe_rows: Float[Tensor, "rows d_in"],
        *,
        parents: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> artifact.Artifact:
        """Write as an artifact that loads without the code that trained it.

        Args:
            path: The folder to make.
            probe_rows: Raw activations for the stored self-check, see `write`.
            parents: Fingerprints of what it was made from.
            extra: More to remember in meta.json.
            fresh: Replace whatever stands at the path.
        """
        with artifact.building(
            path, kind="dictionary", version=1, config=self.config, parents=parents or {}, fresh=fresh
        ) as work:
            work.extra = {**(extra or {}), **self.write(work.path, probe_rows)}
        return artifact.load(path, "dictionary")

    @classmethod
    @abc.abstractmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape, to load saved weights into."""

    def load_folder(self, saved: artifact.Artifact) -> None:
        """Fill this dictionary from a folder and check its probe on the CPU reference.

        Raises:
            CorruptError: a file changed.
            MismatchError: the weights do not give the stored reconstructions (transposed, cast, other code).
        """
        path = saved.file(WEIGHTS, verify=True)
        try:
            self.load_state_dict(load_file(path))
            probe = load_file(saved.file(PROBE, verify=True))
        except (RuntimeError, ValueError, OSError) as error:
            raise CorruptError(
                f"{path} must hold the weights of a {self.kind} dictionary",
                str(error).splitlines()[0],
                "Delete the folder and make it again.",
            ) from None
        self.eval()
        with torch.no_grad(), kernels.use("reference"):
            recon = self(probe["x"])
        error_size = (recon - probe["recon"]).norm(dim=1) / probe["recon"].norm(dim=1).clamp_min(1e-12)
        if not bool((error_size <= PROBE_RTOL).all()):
            raise MismatchError(
                f"the dictionary {saved.path} must reproduce its stored reconstructions to {PROBE_RTOL:g}",
                f"a relative difference of {float(error_size.max()):.3g}",
                "Its weights or this version's code differ from what wrote it; make it again.",
            )

    def _repr_html_(self) -> str:
        rows = {
            "architecture": self.kind,
            "latents": f"{self.d_sae:,}",
            "d_in": self.d_in,
            "d_out": self.d_out,
            "hookpoints": ", ".join(self.sites.hookpoints) if self.sites else "none",
            "model": self.sites.inputs[0].model if self.sites else "none",
        }
        options = {
            k: v for k, v in self.config.resolved().items() if k not in {"kind", "d_sae"} and v is not None
        }
        body = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(k))}</th>"
            f"<td style='text-align:left'>{html.escape(str(v))}</td></tr>"
            for k, v in (rows | options).items()
        )
        return f"<table><caption>Sememe dictionary</caption>{body}</table>"


class Trainable(Dictionary):
    """A dictionary that `train` can train. All tensors here are in training units.

    `tokens_since_fired` counts, per latent, the rows since it was last active.
    """

    shared: ClassVar[frozenset[str]] = frozenset({"b_dec", "W_skip"})
    """Parameters without a latent axis, whatever their shape."""
    tokens_since_fired: Int[Tensor, " d_sae"]
    overflow_steps: Int[Tensor, ""]
    """Steps since the start or the last resume in which a buffer was too small for all entries (see `Encoded`)."""
    scale_per_site: ClassVar[bool] = True
    """Whether concatenated sites are scaled one by one, so that each counts alike whatever its size."""
    weakens: ClassVar[bool] = False
    """Whether `weaken` is there."""

    def __init__(self, config: Config, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        if sites is not None and self.scale_per_site:
            if len(sites.inputs) > 1:
                self.scale_in = torch.ones(d_in)
            if len(sites.outputs) > 1:
                self.scale_out = torch.ones(d_out)
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64), persistent=False)
        self.register_buffer("overflow_steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def set_scales(self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"]) -> None:
        """Scale inputs and targets so that the mean square distance from the mean, per feature, is 1 at each site.

        Args:
            x: A sample of raw inputs.
            target: Of raw targets.
        """
        for scale, rows, side in ((self.scale_in, x, "inputs"), (self.scale_out, target, "outputs")):
            if scale.dim() == 0:
                scale.fill_(_one_over_spread(rows))
                continue
            for site in getattr(self.sites, side):
                part = slice(site.start, site.stop)
                scale[part] = _one_over_spread(rows[:, part])

    @abc.abstractmethod
    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """Set the parameters from a sample of activations (training units) and random numbers."""

    @abc.abstractmethod
    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """The objective of its paper; `progress` goes from 0 to 1 over the run."""

    @abc.abstractmethod
    def reset_latents(
        self,
        ids: Int[Tensor, " n"],
        directions: Float[Tensor, "n d_out"],
        inputs: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """Point latents at new directions (of any length); the optimiser forgets their moments.

        Args:
            ids: The latents.
            directions: What they write from now on.
            inputs: What they read; the directions, if not given (an autoencoder).
        """

    @property
    def competes(self) -> bool:
        """Whether latents compete for places, so that what is weaker is not chosen at all."""
        return False

    def kept(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The activations that a training step reconstructs a batch from: those of each row, unless rows compete."""
        return self.encode(x)

    def settle(self, ids: Int[Tensor, " n"], x: Float[Tensor, "rows d_in"]) -> None:
        """Fit to some rows what hangs on rows in latents just pointed anew; here, nothing does."""

    def weaken(self, ids: Int[Tensor, " n"], factor: float) -> None:
        """Multiply the pre-activations of latents, and what they are compared with, by a factor; only if `weakens`."""
        raise NotImplementedError

    def revival_loss(
        self, x: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_out"]
    ) -> Float[Tensor, ""] | None:
        """What the trainer adds to `loss` for the sake of dead latents; None if nothing.

        Args:
            x: Inputs.
            residual: The target minus the reconstruction; a constant.
        """
        return None

    def after_step(self, encoded: Encoded | Counts) -> None:
        """Bookkeeping after the optimiser's step: which latents fired. Never waits for the device."""
        self.tokens_since_fired += encoded.n_rows
        self.tokens_since_fired.masked_fill_(kernels.fired(encoded), 0)
        if encoded.overflow is not None:
            self.overflow_steps += encoded.overflow

    def latents_of(self, name: str) -> slice | None:
        """Which latents a parameter's entries belong to; None if it has no latent axis.

        Here: all of them, where the first or the last axis is as long as there are latents.
        """
        shape = self.get_parameter(name).shape
        if name in self.shared or not shape or self.d_sae not in (shape[0], shape[-1]):
            return None
        return slice(0, self.d_sae)

    def constraints(self) -> Constraints:
        """What the optimiser keeps true."""
        return Constraints()

    def resampling(self) -> Resampling | None:
        """Whether and when the trainer points latents anew."""
        return None

    def latent_groups(self) -> tuple[LatentGroup, ...]:
        """Which latents can write where, for they are pointed at errors they can mend: here all of them everywhere."""
        return (LatentGroup(slice(0, self.d_sae), slice(0, self.d_out)),)

    def training_buffers(self) -> dict[str, Tensor]:
        """State that a checkpoint needs and a finished dictionary does not."""
        return {"tokens_since_fired": self.tokens_since_fired}

    def _copy_with_scales_one(self) -> Self:
        folded = copy.deepcopy(self)
        folded.scale_in.fill_(1.0)
        folded.scale_out.fill_(1.0)
        return folded


def _one_over_spread(x: Tensor) -> float:
    """What makes the mean square distance from the mean, per feature, equal 1: then mse is nearly fvu."""
    spread = float((x - x.mean(0)).square().mean().sqrt())
    return 1.0 / spread if spread > 0 else 1.0
