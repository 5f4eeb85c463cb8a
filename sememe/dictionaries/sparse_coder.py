"""Sparse coding over given directions: OMP, gradient pursuit and FISTA as encoders, K-SVD and MOD to learn with.

An encoder that searches for each row's code is slow, and a strong reference for a trained one. Knows rows, no
trainer of ours.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self, final

import torch
import torch.nn.functional as F
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
N_IN_CACHE = 2**19
"""The same where they are gone through many times and little is multiplied: 2 MB."""
MAX_GRAM = 4096
"""Directions up to which their products with each other are kept (64 MB): OMP reads them instead of multiplying."""
N_STEP_ROWS = 512
"""Rows of a step of the gradient update."""
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
        self._products: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(SparseCoderConfig.build(config), d_in, d_out, d_sae, sites)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Codes by search; nothing flows back through it."""
        self.check_input(x)
        parts = []
        gram = self._gram() if self.config.encoder == "omp" and self.d_sae <= MAX_GRAM else None
        n_rows = N_AT_ONCE // max(self.d_sae, self.config.k * self.d_in)
        if gram is not None:
            n_rows = N_IN_CACHE // self.d_sae
        for rows in torch.split(x - self.b_dec, max(1, n_rows)):
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
                    rows,
                    self.W_dec,
                    self.config.k,
                    self.config.encoder == "omp",
                    self.config.non_negative,
                    gram,
                )
                acts = torch.where(broken, torch.nan, acts)
                parts.append(Encoded.from_topk(acts, indices.to(torch.int32), self.d_sae))
        return Encoded.cat(parts) if len(parts) != 1 else parts[0]

    def _gram(self) -> Float[Tensor, "d_sae d_sae"]:
        """Products of all directions with each other; made anew when the directions have changed."""
        W = self.W_dec
        version = -1 if W.is_inference() else W._version
        kept = self._products
        if kept is None or kept[0] is not W or kept[1] != version:
            self._products = kept = (W, version, W @ W.T)
        return kept[2]


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
    gram: Float[Tensor, "d_sae d_sae"] | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """k times: the direction that correlates most with what is left; then all coefficients again, or a step.

    Rows that are reconstructed before k keep coefficients of 0.

    Source of the fast way with `gram`: Rubinstein, Zibulevsky & Elad 2008 (batch OMP). Differs: the fit is solved anew
    each time, without a Cholesky factor that grows.

    Args:
        x: Rows, already centred.
        W: Directions of norm 1.
        k: How many.
        refit: Least squares on the directions taken (OMP); else one gradient step (gradient pursuit).
        non_negative: Coefficients >= 0: only positive correlations count, and the fit is projected.
        gram: `W @ W.T`, if known: correlations with what is left are then sums of its rows, a fraction of the products.
            With refit only.
    """
    assert gram is None or refit
    batch = x.shape[0]
    indices = torch.zeros(batch, k, dtype=torch.int64, device=x.device)
    acts = torch.zeros(batch, k, device=x.device)
    residual, along = x.clone(), x @ W.T
    among = torch.zeros(batch, k, k, device=x.device)  # products of the directions taken, where gram is known
    least = (1e-6 if gram is None else 1e-5) * x.norm(dim=1)  # sums of products round more than residuals
    for step in range(k):
        if gram is None:
            correlation = residual @ W.T
        elif step == 0:
            correlation = along
        else:
            so_far = indices[:, :step].contiguous(), acts[:, :step].contiguous()
            explained = F.embedding_bag(so_far[0], gram, per_sample_weights=so_far[1], mode="sum")
            correlation = torch.sub(along, explained, out=explained)
        size = correlation.clone() if non_negative else correlation.abs()
        best = size.scatter_(1, indices[:, :step], -torch.inf).max(dim=1)
        going = (best.values > least) & (best.values > 0)
        indices[:, step] = best.indices
        here = indices[:, : step + 1]
        if refit:
            wanted = along.gather(1, here)
            if gram is None:
                chosen = W[here]  # (batch, step + 1, d)
                products = chosen @ chosen.transpose(1, 2)
            else:
                new = gram[best.indices[:, None], here]
                among[:, step, : step + 1] = among[:, : step + 1, step] = new
                products = among[:, : step + 1, : step + 1]
            fitted = _least_squares(products, wanted, non_negative)
        else:
            chosen = W[here]
            gradient = (chosen @ residual[:, :, None])[..., 0]
            moved = (gradient[:, None, :] @ chosen)[:, 0]
            length = (residual * moved).sum(1) / moved.square().sum(1).clamp_min(1e-30)
            fitted = acts[:, : step + 1] + length[:, None] * gradient
            fitted = fitted.clamp_min(0) if non_negative else fitted
        acts[:, : step + 1] = torch.where(going[:, None], fitted, acts[:, : step + 1])
        if gram is None:
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
    """ksvd: one direction after the other, with its coefficients. mod: all at once, by least squares. gradient: a
    step down the squared error for every 512 rows."""
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
            if config.update == "gradient":
                codes, residual = _steps(made, x)
                errors.append(float(residual.square().mean()))
                _replace_unused(made.W_dec, codes, residual)
                progress.note = f"mse {errors[-1]:.4g}"
                progress.advance()
                continue
            codes = made.encode(x).to_dense()
            residual = centred - codes @ made.W_dec
            errors.append(float(residual.square().mean()))
            if config.update == "mod":
                gram = codes.T @ codes + 1e-6 * torch.eye(d_sae, device=x.device)
                made.W_dec = _unit(torch.linalg.solve(gram, codes.T @ centred))
                _replace_unused(made.W_dec, codes, residual)
            else:
                _one_by_one(made.W_dec, codes, residual, config.non_negative)
            progress.note = f"mse {errors[-1]:.4g}"
            progress.advance()
    return Learned(made.eval(), errors)


def _steps(made: SparseCoder, x: Float[Tensor, "rows d"]) -> tuple[Tensor, Tensor]:
    """A round of gradient steps, a batch of rows each; the codes and what they left when they were found."""
    found, left = [], []
    for rows in torch.split(x, N_STEP_ROWS):
        codes = made.encode(rows).to_dense()
        residual = rows - made.b_dec - codes @ made.W_dec
        # no step is longer than the inverse of the largest curvature
        curvature = torch.linalg.matrix_norm(codes.T @ codes, ord=1).clamp_min(1e-12)
        made.W_dec = _unit(made.W_dec + codes.T @ residual / curvature)
        found.append(codes)
        left.append(residual)
    return torch.cat(found), torch.cat(left)


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
