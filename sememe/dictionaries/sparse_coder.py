"""Sparse coding over given directions: OMP, gradient pursuit and FISTA as encoders, K-SVD and MOD to learn with.

An encoder that searches for each row's code is slow, and a strong reference for a trained one. Knows rows, no
trainer of ours.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from sememe.dictionaries.base import ArchitectureConfig, Dictionary, Sites
from sememe.dictionaries.fitted import Fitted, check_rows
from sememe.encoded import Encoded
from sememe.errors import ShapeError
from sememe.progress import track

__all__ = ["KSVDConfig", "SparseCoder", "SparseCoderConfig", "ksvd", "sparse_coder_over"]

N_AT_ONCE = 2**22
"""Numbers of a block of rows' codes that are held densely."""
N_PROJECTED_STEPS = 60
"""Of accelerated projected gradient on a support of OMP, where coefficients may not be negative."""


class CoderOptions(ArchitectureConfig):
    """How codes are searched for."""

    encoder: Literal["omp", "gradient_pursuit", "fista"] = "omp"
    """omp: the best direction at a time, all coefficients fitted anew. gradient_pursuit: a step along the gradient
    instead of the fit. fista: an L1 penalty, minimised over all directions."""
    k: int = 32
    """Directions per row, of omp and gradient_pursuit."""
    penalty: float = Field(default=0.1, ge=0)
    """Weight of sum |acts| against half the squared error of a row, of fista; in raw units."""
    n_steps: int = Field(default=100, ge=1)
    """Steps of fista."""
    non_negative: bool = False
    """Whether coefficients have to be >= 0."""

    def k_in_use(self) -> int | None:
        """fista knows none."""
        return None if self.encoder == "fista" else self.k

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.encoder == "fista":
            self.check_inert("k", without="the encoder is fista")
        else:
            self.check_inert("penalty", "n_steps", without=f"the encoder is {self.encoder}")
        return self


class SparseCoderConfig(CoderOptions):
    """A coder over given directions."""

    kind: Literal["sparse_coder"] = "sparse_coder"
    """Name of the coder."""


@final
class SparseCoder(Fitted):
    """`acts = argmin |x - b_dec - acts W_dec|` under a sparsity constraint or penalty; rows of W_dec have norm 1.

    Sources: omp: Pati et al. 1993; gradient_pursuit: Blumensath & Davies 2008, the gradient direction with exact step;
    fista: Beck & Teboulle 2009.
    """

    kind = "sparse_coder"
    config: SparseCoderConfig

    def __init__(
        self, config: SparseCoderConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.signed = not config.non_negative

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(SparseCoderConfig.build(config), d_in, d_out, d_sae, sites)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Codes by search; nothing flows back through it."""
        self.check_input(x)
        parts = []
        for rows in torch.split(
            x - self.b_dec, max(1, N_AT_ONCE // max(self.d_sae, self.config.k * self.d_in))
        ):
            broken = ~torch.isfinite(rows).all(
                1, keepdim=True
            )  # no search ends well there; silence would hide it
            if self.config.encoder == "fista":
                codes = fista(
                    rows, self.W_dec, self.config.penalty, self.config.n_steps, self.config.non_negative
                )
                parts.append(Encoded.from_dense(torch.where(broken, torch.nan, codes)))
            else:
                acts, indices = pursue(
                    rows, self.W_dec, self.config.k, self.config.encoder == "omp", self.config.non_negative
                )
                acts = torch.where(broken, torch.nan, acts)
                parts.append(Encoded.from_topk(acts, indices.to(torch.int32), self.d_sae))
        return Encoded.cat(parts) if len(parts) != 1 else parts[0]


def sparse_coder_over(dictionary: Dictionary, config: SparseCoderConfig) -> SparseCoder:
    """Another encoder over a dictionary's directions, about what it reconstructs without any latent.

    Raises:
        ShapeError: the dictionary writes elsewhere than it reads.
    """
    d_sae = dictionary.d_sae
    made = SparseCoder(
        config.replace(d_sae=d_sae), dictionary.d_in, dictionary.d_out, d_sae, dictionary.sites
    )
    with torch.no_grad():
        directions = dictionary.decoder_directions()
        made.W_dec = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
        none = torch.zeros(1, 1, device=directions.device)
        silent = Encoded.from_topk(none, none.to(torch.int32), d_sae)
        made.b_dec = dictionary.decode(silent, torch.zeros(1, dictionary.d_in, device=directions.device))[0]
    return made.eval()


def pursue(
    x: Float[Tensor, "batch d"],
    W: Float[Tensor, "d_sae d"],
    k: int,
    refit: bool,
    non_negative: bool,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """k times: the direction that correlates most with what is left; then all coefficients again, or a step.

    Rows that are reconstructed before k keep coefficients of 0.

    Args:
        x: Rows, already centred.
        W: Directions of norm 1.
        k: How many.
        refit: Least squares on the directions taken (OMP); else one gradient step (gradient pursuit).
        non_negative: Coefficients >= 0: only positive correlations count, and the fit is projected.
    """
    batch = x.shape[0]
    indices = torch.zeros(batch, k, dtype=torch.int64, device=x.device)
    acts = torch.zeros(batch, k, device=x.device)
    residual, along = x.clone(), x @ W.T
    taken = torch.zeros(batch, W.shape[0], dtype=torch.bool, device=x.device)
    rows = torch.arange(batch, device=x.device)
    least = 1e-6 * x.norm(dim=1)
    for step in range(k):
        correlation = residual @ W.T
        size = correlation if non_negative else correlation.abs()
        best = size.masked_fill(taken, -torch.inf).max(dim=1)
        going = (best.values > least) & (best.values > 0)
        indices[:, step] = best.indices
        taken[rows, best.indices] = True
        chosen = W[indices[:, : step + 1]]  # (batch, step + 1, d)
        if refit:
            gram = chosen @ chosen.transpose(1, 2)
            wanted = along.gather(1, indices[:, : step + 1])
            fitted = _least_squares(gram, wanted, non_negative)
        else:
            gradient = (chosen @ residual[:, :, None])[..., 0]
            moved = (gradient[:, None, :] @ chosen)[:, 0]
            length = (residual * moved).sum(1) / moved.square().sum(1).clamp_min(1e-30)
            fitted = acts[:, : step + 1] + length[:, None] * gradient
            fitted = fitted.clamp_min(0) if non_negative else fitted
        acts[:, : step + 1] = torch.where(going[:, None], fitted, acts[:, : step + 1])
        residual = x - (acts[:, None, : step + 1] @ chosen)[:, 0]
    return acts, indices


def _least_squares(gram: Tensor, wanted: Tensor, non_negative: bool) -> Tensor:
    """Coefficients of the directions taken; directions that hardly differ share theirs."""
    eye = torch.eye(gram.shape[-1], device=gram.device)
    fitted: Tensor = torch.linalg.solve(gram + 1e-6 * eye, wanted)
    if not non_negative or not bool((fitted < 0).any()):
        return fitted
    fitted = ahead = fitted.clamp_min(0)
    step = 1 / gram.abs().sum(dim=-1).amax(dim=-1, keepdim=True)  # at most 1 / the largest eigenvalue
    for turn in range(N_PROJECTED_STEPS):
        following = (ahead + step * (wanted - (gram @ ahead[..., None])[..., 0])).clamp_min(0)
        ahead = following + turn / (turn + 3) * (following - fitted)
        fitted = following
    return fitted


def fista(
    x: Float[Tensor, "batch d"],
    W: Float[Tensor, "d_sae d"],
    penalty: float,
    n_steps: int,
    non_negative: bool,
) -> Float[Tensor, "batch d_sae"]:
    """Minimise `1/2 |x - a W|^2 + penalty * sum |a|` for each row, by accelerated proximal gradient."""
    step = 1 / torch.linalg.eigvalsh((W.T @ W).double())[-1].float().clamp_min(1e-12)
    acts = ahead = torch.zeros(x.shape[0], W.shape[0], device=x.device)
    momentum = 1.0
    for _ in range(n_steps):
        moved = ahead - step * ((ahead @ W - x) @ W.T)
        shrunk = (moved.abs() - step * penalty).clamp_min(0)
        following = torch.where(moved > 0, shrunk, torch.zeros_like(moved) if non_negative else -shrunk)
        larger = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / larger * (following - acts)
        acts, momentum = following, larger
    return acts


# -- learning the directions -----------------------------------------------------------------------------


class KSVDConfig(CoderOptions):
    """How directions are learned: codes by search, then each direction from the rows that use it."""

    kind: Literal["ksvd"] = "ksvd"
    """Name of the way to learn. What comes out is a sparse_coder."""

    update: Literal["ksvd", "mod", "gradient"] = "ksvd"
    """ksvd: one direction after the other, with its coefficients. mod: all at once, by least squares. gradient: one
    step down the squared error."""
    n_iterations: int = Field(default=30, ge=1)
    """Rounds."""
    seed: int = Field(default=0, ge=0)
    """Of the first directions: rows of the data."""

    def coder(self) -> SparseCoderConfig:
        """The options of the coder that comes out."""
        return SparseCoderConfig.build(
            {name: getattr(self, name) for name in CoderOptions.model_fields if name != "kind"}
        )


class Learned(NamedTuple):
    """What came out, and how."""

    coder: SparseCoder
    mse: list[float]
    """Mean square error over rows and dimensions after the codes of each round."""


@torch.no_grad()
def ksvd(x: Float[Tensor, "rows d"], config: KSVDConfig, sites: Sites | None = None) -> Learned:
    """Learn directions for sparse codes of the rows, all of which are held in memory.

    Sources: Aharon, Elad & Bruckstein 2006 (K-SVD), with one power step per direction instead of an SVD (Rubinstein,
    Zibulevsky & Elad 2008); Engan et al. 1999 (MOD); Olshausen & Field 1996
    (gradient). A direction that no row uses becomes the row that is worst
    reconstructed. With non_negative, coefficients stay >= 0; directions are free.

    Args:
        x: Rows in raw units.
        config: How.
        sites: What the rows are.

    Raises:
        ShapeError: fewer rows than directions.
        ActivationError: a row is NaN or infinite.
    """
    n_rows, d = x.shape
    d_sae = config.width(d)
    if n_rows < d_sae:
        raise ShapeError(f"learning {d_sae} directions takes at least as many rows", n_rows, "Give it more.")
    check_rows(x)
    made = SparseCoder(config.coder().replace(d_sae=d_sae), d, d, d_sae, sites).to(x.device)
    made.b_dec = x.mean(0)
    centred = x - made.b_dec
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(config.seed))
    made.W_dec = _unit(centred[order[:d_sae]])
    errors = []
    with track(config.update, config.n_iterations, "rounds") as progress:
        for _ in range(config.n_iterations):
            codes = made.encode(x).to_dense()
            residual = centred - codes @ made.W_dec
            errors.append(float(residual.square().mean()))
            if config.update == "gradient":
                # no step is longer than the inverse of the largest curvature
                curvature = torch.linalg.matrix_norm(codes.T @ codes, ord=1).clamp_min(1e-12)
                made.W_dec = _unit(made.W_dec + codes.T @ residual / curvature)
                _replace_unused(made.W_dec, codes, residual)
            elif config.update == "mod":
                gram = codes.T @ codes + 1e-6 * torch.eye(d_sae, device=x.device)
                made.W_dec = _unit(torch.linalg.solve(gram, codes.T @ centred))
                _replace_unused(made.W_dec, codes, residual)
            else:
                _one_by_one(made.W_dec, codes, residual, config.non_negative)
            progress.note = f"mse {errors[-1]:.4g}"
            progress.advance()
    return Learned(made.eval(), errors)


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit


def _one_by_one(W: Tensor, codes: Tensor, residual: Tensor, non_negative: bool) -> None:
    """Each direction and its coefficients, the others held; in place."""
    for latent in range(W.shape[0]):
        users = torch.nonzero(codes[:, latent]).view(-1)
        if users.numel() == 0:
            continue
        own = codes[users, latent]
        without = residual[users] + own[:, None] * W[latent]
        direction = own @ without
        length = direction.norm()
        if float(length) == 0:
            continue
        W[latent] = direction / length
        coefficients = without @ W[latent]
        codes[users, latent] = coefficients.clamp_min(0) if non_negative else coefficients
        residual[users] = without - codes[users, latent][:, None] * W[latent]
    _replace_unused(W, codes, residual)


def _replace_unused(W: Tensor, codes: Tensor, residual: Tensor) -> None:
    unused = torch.nonzero(~(codes != 0).any(0)).view(-1)
    if unused.numel():
        worst = residual.square().sum(1).topk(min(unused.numel(), residual.shape[0])).indices
        W[unused[: worst.numel()]] = _unit(residual[worst])
