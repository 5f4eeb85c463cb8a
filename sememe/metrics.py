"""What is measured, as sums that stream. Knows no language model and no dictionary: tensors in, numbers out.

Every metric is a ratio of sums over rows (tokens). Sums are kept in float64 per *unit* of a bootstrap (a
document) and divided once at the end, so that a value does not depend on how the rows were cut into batches,
and so that a confidence interval over documents costs nothing more than the sums. Rows that a mask leaves out
are not read at all: NaN there changes nothing. NaN elsewhere comes out as NaN, with its cause.

    fvu                 sum |x - recon|^2 / sum |x - mean|^2, the mean being that of the same rows
    explained_variance  1 - fvu
    mse                 mean over rows and d_out of (x - recon)^2;  rmse its square root
    cosine              mean over rows of cos(x, recon); 0 where either is the zero vector
    l0, l1              mean over rows of the number of non-zero acts, and of the sum of their absolute values
    density             per latent, the share of rows on which it is active;  frac_alive: the share of
                        latents that are active on at least one row
    ce_increase         CE(arm) - CE(base), means over predictions, in nats
    ce_recovered_zero   (CE(zero) - CE(arm)) / (CE(zero) - CE(base)): 1 is as good as unedited, 0 as zeros
    ce_recovered_mean   the same with mean ablation
    kl                  mean over predictions of KL(base || arm), in nats
    perplexity          exp(CE(arm))
    mcs, mmcs           the largest cosine of each direction with another dictionary's; the mean of those
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.encoded import Encoded
from sememe.errors import ConfigError, ShapeError

__all__ = [
    "BaseTerms",
    "DensityHistogram",
    "LanguageModelLoss",
    "Nearest",
    "PredictionTerms",
    "Reconstruction",
    "Sparsity",
    "Statistic",
    "Sums",
    "base_terms",
    "bootstrap",
    "density_histogram",
    "mcs",
    "mmcs",
    "nearest_directions",
    "prediction_terms",
]

Array = npt.NDArray[np.float64]
Totals = Mapping[str, Array]
Formula = Callable[[Totals], Array]

HISTOGRAM_LOW = 1e-6
HISTOGRAM_BINS = 60
CACHED_LOGITS = 800_000
"""Logits worked on at once on a CPU: 3 MB in float32. At 16 x 49,152 three times as fast as at 256 x 49,152."""


class Statistic(NamedTuple):
    """A number, its bootstrap interval, and, where it is NaN, why."""

    value: float
    low: float = math.nan
    high: float = math.nan
    cause: str = ""

    def to_json(self) -> dict[str, float | str | None]:
        """Plain data; JSON has no NaN, so NaN is null beside its cause."""
        out: dict[str, float | str | None] = {
            name: number if math.isfinite(number) else None
            for name, number in (("value", self.value), ("low", self.low), ("high", self.high))
        }
        if self.cause:
            out["cause"] = self.cause
        return out


class Sums:
    """Named float64 sums, one row per unit; a unit is what a bootstrap draws, a document or a few."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.n_units = 0

    def add(self, units: Int[Tensor, " rows"], values: Mapping[str, Float[Tensor, "rows ..."]]) -> None:
        """Add each row's values to the sums of its unit."""
        if units.numel() == 0:
            return
        needed = int(units.max()) + 1
        for name, value in values.items():
            if value.shape[0] != units.shape[0]:
                raise ShapeError(
                    f"{name} must have one row per unit id ({units.shape[0]})",
                    value.shape[0],
                    "Pass one unit id for each row.",
                )
            have = self._sums.get(name)
            if have is None or have.shape[0] < needed:
                grown = value.new_zeros(
                    (max(needed, 2 * self.n_units), *value.shape[1:]), dtype=torch.float64
                )
                if have is not None:
                    grown[: have.shape[0]] = have
                self._sums[name] = have = grown
            have.index_add_(0, units.to(value.device), value.to(torch.float64))
        self.n_units = max(self.n_units, needed)

    def arrays(self, n_units: int | None = None) -> dict[str, Array]:
        """The sums as NumPy arrays with one row per unit (zeros for units that were never seen)."""
        n = self.n_units if n_units is None else n_units
        out = {}
        for name, tensor in self._sums.items():
            array: Array = np.zeros((n, *tensor.shape[1:]))
            rows = min(n, tensor.shape[0])
            array[:rows] = tensor[:rows].cpu().numpy()
            out[name] = array
        return out


def bootstrap(
    sums: Mapping[str, Array],
    formulas: Mapping[str, Formula],
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    causes: Mapping[str, str] | None = None,
) -> dict[str, Statistic]:
    """Ratios of sums with percentile intervals, units (documents) drawn with replacement.

    Equal seeds and numbers of units draw equal units: intervals of several calls are paired.

    Args:
        sums: Sums per unit, arrays of shape (units, ...).
        formulas: From sums with a leading axis (draws, ...) to values (draws,).
        n: Number of draws; 0 gives no intervals.
        seed: Of the draws.
        level: Probability that the interval covers.
        causes: What it means when a statistic is NaN, by name.
    """
    n_units = next(iter(sums.values())).shape[0] if sums else 0
    seen = np.flatnonzero(sums["n"] > 0) if "n" in sums else np.arange(n_units)
    whole = {name: array[seen].sum(0)[None] for name, array in sums.items()}
    draws: dict[str, Array] | None = None
    if n and seen.size > 1:
        weights = np.random.default_rng(seed).multinomial(
            seen.size, np.full(seen.size, 1 / seen.size), size=n
        )
        draws = {
            name: np.tensordot(weights.astype(np.float64), array[seen], axes=1)
            for name, array in sums.items()
        }
    out: dict[str, Statistic] = {}
    with np.errstate(all="ignore"):
        for name, formula in formulas.items():
            value = float(formula(whole)[0])
            low = high = math.nan
            cause = "" if math.isfinite(value) else (causes or {}).get(name, "its denominator is zero")
            if seen.size == 0:
                cause = "there were no rows"
            value = math.nan if cause else value
            if not cause and n:
                if draws is None:
                    cause = "an interval needs at least 2 documents"
                else:
                    drawn = formula(draws)
                    low, high = (float(q) for q in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
                    if not (math.isfinite(low) and math.isfinite(high)):
                        cause = "some draws of documents leave it undefined"
            out[name] = Statistic(value, low, high, cause)
    return out


# -- reconstruction --------------------------------------------------------------------------------


class Reconstruction:
    """How close reconstructions are to their targets: mse, rmse, fvu, explained_variance, cosine.

    The variance of fvu and explained_variance is about the mean of the rows that are counted.
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self.d_out = 0
        self._shift: Tensor | None = None
        self._n_bad = torch.zeros((), dtype=torch.int64)

    def update(
        self,
        target: Float[Tensor, "rows d_out"],
        recon: Float[Tensor, "rows d_out"],
        mask: Bool[Tensor, " rows"] | None = None,
        units: Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Add rows.

        Args:
            target: What should have come out, in raw units.
            recon: What came out.
            mask: Rows to count; all if not given.
            units: The bootstrap unit of each row; one unit if not given.
        """
        if target.shape != recon.shape or target.dim() != 2:
            raise ShapeError(
                "target and recon must have one shape (rows, d_out)",
                f"{tuple(target.shape)} and {tuple(recon.shape)}",
                "Compare a reconstruction with the activations it reconstructs.",
            )
        units = _units(units, target)
        if mask is not None:
            target, recon, units = target[mask], recon[mask], units[mask]
        if target.shape[0] == 0:
            return
        target, recon = target.detach().to(torch.float64), recon.detach().to(torch.float64)
        if self._shift is None:
            # Variance is taken about this row and corrected at the end: no cancellation at a large offset.
            self._shift, self.d_out = target[0].clone(), target.shape[1]
            self._n_bad = self._n_bad.to(target.device)
        shifted = target - self._shift
        norms = target.norm(dim=1) * recon.norm(dim=1)
        cosine = torch.where(norms == 0, 0.0, (target * recon).sum(1) / norms)
        error = (target - recon).square().sum(1)
        self._n_bad += (~torch.isfinite(error)).sum()
        self.sums.add(
            units,
            {
                "n": torch.ones_like(error),
                "error": error,
                "square": shifted.square().sum(1),
                "sum": shifted,
                "cosine": cosine,
            },
        )

    def compute(
        self, *, n_bootstrap: int = 0, seed: int = 0, units: Bool[np.ndarray, " units"] | None = None
    ) -> dict[str, Statistic]:
        """The metrics over all rows, or over those of some units."""
        sums = _select(self.sums.arrays(), units)
        if not sums:
            return dict.fromkeys(self._formulas(), Statistic(math.nan, cause="there were no rows"))
        # About the mean of all these rows in every draw of the bootstrap too: a draw's own mean lies closer to its
        # few documents, which would push every drawn fvu up.
        with np.errstate(all="ignore"):
            mean = sums["sum"].sum(0) / sums["n"].sum()
            sums["variance"] = sums["square"] - 2 * sums["sum"] @ mean + sums["n"] * (mean @ mean)
        del sums["sum"], sums["square"]
        n_bad = int(self._n_bad)
        if n_bad:
            why = f"{n_bad} rows of the reconstruction or its target are NaN or infinite"
            causes = dict.fromkeys(self._formulas(), why)
        else:
            causes = dict.fromkeys(("fvu", "explained_variance"), "the rows have no variance")
        return bootstrap(sums, self._formulas(), n=n_bootstrap, seed=seed, causes=causes)

    def _formulas(self) -> dict[str, Formula]:
        def fvu(t: Totals) -> Array:
            return t["error"] / t["variance"]

        def mse(t: Totals) -> Array:
            return t["error"] / (t["n"] * self.d_out)

        return {
            "mse": mse,
            "rmse": lambda t: np.sqrt(mse(t)),
            "fvu": fvu,
            "explained_variance": lambda t: 1 - fvu(t),
            "cosine": lambda t: t["cosine"] / t["n"],
        }


# -- sparsity --------------------------------------------------------------------------------------


class Sparsity:
    """How many latents are active, how much, and how often each: l0, l1, frac_alive, density.

    `active_rows` counts, per latent, the non-zero entries seen.
    """

    def __init__(self, d_sae: int) -> None:
        self.sums = Sums()
        self.active_rows = torch.zeros(d_sae, dtype=torch.int64)
        self.n_rows = 0

    def update(
        self,
        encoded: Encoded,
        mask: Bool[Tensor, " rows"] | None = None,
        units: Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Add rows; arguments as in `Reconstruction.update`."""
        units = _units(units, encoded.row_ptr[:-1])
        if mask is not None:
            encoded, units = encoded.select_rows(mask), units[mask]
        if encoded.n_rows == 0:
            return
        encoded = encoded.detach()
        size = encoded.acts.to(torch.float64).abs()
        l1 = size.new_zeros(encoded.n_rows).index_add_(0, encoded.row_ids(), size)
        self.sums.add(units, {"n": torch.ones_like(l1), "l0": encoded.l0().to(torch.float64), "l1": l1})
        self.active_rows = self.active_rows.to(encoded.acts.device)
        self.active_rows += torch.bincount(encoded.indices[encoded.acts != 0].long(), minlength=encoded.d_sae)
        self.n_rows += encoded.n_rows

    def density(self) -> Float[Tensor, " d_sae"]:
        """Per latent, the share of rows on which it is active; NaN before the first row."""
        return self.active_rows.to(torch.float64) / (self.n_rows or math.nan)

    def compute(
        self, *, n_bootstrap: int = 0, seed: int = 0, units: Bool[np.ndarray, " units"] | None = None
    ) -> dict[str, Statistic]:
        """l0, l1 and frac_alive. frac_alive has no interval: drawing documents again loses latents, never
        finds new ones, so its bootstrap does not cover; it is over all units whatever `units` says."""
        sums = _select(self.sums.arrays(), units)
        formulas: dict[str, Formula] = {"l0": lambda t: t["l0"] / t["n"], "l1": lambda t: t["l1"] / t["n"]}
        if not sums:
            return dict.fromkeys((*formulas, "frac_alive"), Statistic(math.nan, cause="there were no rows"))
        cause = "activations are NaN or infinite"
        out = bootstrap(sums, formulas, n=n_bootstrap, seed=seed, causes=dict.fromkeys(formulas, cause))
        out["frac_alive"] = Statistic(float((self.active_rows > 0).double().mean()))
        return out


class DensityHistogram(NamedTuple):
    """Latents per density on a logarithmic axis. `counts[i]` are in [edges[i], edges[i + 1])."""

    edges: list[float]
    counts: list[int]
    n_silent: int
    n_below: int


def density_histogram(
    density: Float[Tensor, " d_sae"], n_bins: int = HISTOGRAM_BINS, low: float = HISTOGRAM_LOW
) -> DensityHistogram:
    """Latents per density, in logarithmic bins between `low` and 1; density 1 belongs to the last bin.

    Latents that never fired are counted in `n_silent`, those that fired more rarely than `low` in `n_below`:
    every latent is counted once.
    """
    values = density.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(values).all():
        raise ShapeError(
            "densities must be finite", "NaN", "Count at least one row before asking for a histogram."
        )
    edges = np.logspace(math.log10(low), 0, n_bins + 1)
    edges[0], edges[-1] = low, 1.0
    silent, below = values == 0, (values > 0) & (values < low)
    inside = values[~silent & ~below].clip(max=1.0)  # duplicate entries of a row can count a latent twice
    counts, _ = np.histogram(inside, bins=edges)
    return DensityHistogram(edges.tolist(), counts.tolist(), int(silent.sum()), int(below.sum()))


# -- language-model quality ------------------------------------------------------------------------


class BaseTerms(NamedTuple):
    """The unedited model's predictions at some positions, in the form that comparing arms needs."""

    ce: Float[Tensor, " n"]
    probs: Float[Tensor, "n vocab"]
    negative_entropy: Float[Tensor, " n"]


class PredictionTerms(NamedTuple):
    """Per prediction, in nats."""

    ce: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]


def base_terms(logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> BaseTerms:
    """Cross-entropy, probabilities and negative entropy of the unedited model, in float32."""
    ce, negative_entropy, probs = [], [], torch.empty_like(logits, dtype=torch.float32)
    for rows in _row_blocks(logits):
        log_probs = torch.log_softmax(logits[rows].float(), -1)
        ce.append(-log_probs.gather(1, targets[rows, None].long()).squeeze(1))
        torch.exp(log_probs, out=probs[rows])
        negative_entropy.append(_expected(probs[rows], log_probs))
    return BaseTerms(_joined(ce, logits), probs, _joined(negative_entropy, logits))


def prediction_terms(
    base: BaseTerms, logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]
) -> PredictionTerms:
    """Cross-entropy of an arm and KL(base || arm), from one pass over its logits.

    KL = sum p log p - sum p log q, with sum p = 1 in float32 (an error near 1e-6 nats).
    """
    ce, kl = [], []
    for rows in _row_blocks(logits):
        log_probs = torch.log_softmax(logits[rows].float(), -1)
        ce.append(-log_probs.gather(1, targets[rows, None].long()).squeeze(1))
        kl.append(base.negative_entropy[rows] - _expected(base.probs[rows], log_probs))
    return PredictionTerms(_joined(ce, logits), _joined(kl, logits))


def _row_blocks(logits: Float[Tensor, "n vocab"]) -> list[slice]:
    """Rows a few at a time on a CPU, so that what one operation writes the next still finds in the cache."""
    n, vocab = logits.shape
    step = max(1, CACHED_LOGITS // vocab) if logits.device.type == "cpu" else max(n, 1)
    return [slice(start, start + step) for start in range(0, n, step)]


def _joined(parts: list[Tensor], logits: Tensor) -> Float[Tensor, " n"]:
    return torch.cat(parts) if parts else logits.new_empty(0, dtype=torch.float32)


def _expected(probs: Float[Tensor, "n vocab"], values: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """Sum of probability times value per row. 0 * -inf (a token that is ruled out) is 0, as in every definition."""
    found = torch.bmm(probs[:, None], values[:, :, None]).reshape(-1)
    if not bool(torch.isfinite(found).all()):
        found = torch.where(probs > 0, probs * values, 0.0).sum(1)
    return found


class LanguageModelLoss:
    """Sums of cross-entropy and KL of several arms over the same predictions.

    The arms "base" (unedited), "zero" and "mean" (ablations) are what recovered shares refer to.
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self.arms: list[str] = []

    def update(
        self,
        units: Int[Tensor, " n"],
        ce: Mapping[str, Float[Tensor, " n"]],
        kl: Mapping[str, Float[Tensor, " n"]],
    ) -> None:
        """Add predictions: the same ones for every arm."""
        for arm in ce:
            if arm not in self.arms:
                self.arms.append(arm)
        n = next(iter(ce.values()))
        values = {"n": torch.ones_like(n, dtype=torch.float64)}
        values |= {f"ce_{arm}": value for arm, value in ce.items()}
        values |= {f"kl_{arm}": value for arm, value in kl.items()}
        self.sums.add(units, values)

    def compute(
        self,
        arm: str,
        *,
        n_bootstrap: int = 0,
        seed: int = 0,
        units: Bool[np.ndarray, " units"] | None = None,
    ) -> dict[str, Statistic]:
        """ce, ce_increase, ce_recovered_zero, ce_recovered_mean, kl and perplexity of an arm."""
        sums = _select(self.sums.arrays(), units)
        formulas = self._formulas(arm)
        if not sums:
            return dict.fromkeys(formulas, Statistic(math.nan, cause="there were no predictions"))
        causes = dict.fromkeys(formulas, "the model's logits are NaN or infinite")
        if all(np.isfinite(array).all() for array in sums.values()):
            for ablation in ("zero", "mean"):
                causes[f"ce_recovered_{ablation}"] = f"{ablation} ablation leaves the cross-entropy as it was"
        return bootstrap(sums, formulas, n=n_bootstrap, seed=seed, causes=causes)

    def _formulas(self, arm: str) -> dict[str, Formula]:
        def recovered(ablation: str) -> Formula:
            return lambda t: (t[f"ce_{ablation}"] - t[f"ce_{arm}"]) / (t[f"ce_{ablation}"] - t["ce_base"])

        formulas: dict[str, Formula] = {
            "ce": lambda t: t[f"ce_{arm}"] / t["n"],
            "perplexity": lambda t: np.exp(t[f"ce_{arm}"] / t["n"]),
        }
        if arm != "base":
            formulas["ce_increase"] = lambda t: (t[f"ce_{arm}"] - t["ce_base"]) / t["n"]
            formulas["kl"] = lambda t: t[f"kl_{arm}"] / t["n"]
            for ablation in ("zero", "mean"):
                if ablation in self.arms:
                    formulas[f"ce_recovered_{ablation}"] = recovered(ablation)
        return formulas


# -- between dictionaries --------------------------------------------------------------------------


class Nearest(NamedTuple):
    """For each direction of one set, the closest of another, closest first."""

    cosines: Float[Tensor, "n_a n"]
    indices: Int[Tensor, "n_a n"]


def nearest_directions(
    a: Float[Tensor, "n_a d"],
    b: Float[Tensor, "n_b d"],
    n: int = 1,
    *,
    absolute: bool = False,
    block: int = 4096,
) -> Nearest:
    """The n directions of `b` with the largest cosine to each direction of `a`, in blocks.

    Args:
        a: Directions of any length; one of length zero has cosine 0 with everything.
        b: Directions of any length.
        n: How many.
        absolute: Rank by |cosine|; the cosines that come back keep their sign.
        block: Rows of either set at a time: memory is block^2 + (n_a + n_b) d, whatever the sets' sizes.

    Raises:
        ShapeError: the two sets live in different spaces, or `b` has fewer than n directions.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(
            "directions that are compared must have one width",
            f"{tuple(a.shape)} and {tuple(b.shape)}",
            "Compare dictionaries of the same hookpoint.",
        )
    if not 1 <= n <= b.shape[0]:
        raise ConfigError(f"n must be in [1, {b.shape[0]}], the number of directions", n, "Lower n.")
    unit_a, unit_b = _unit_rows(a), _unit_rows(b)
    cosines, indices = [], []
    for start_a in range(0, a.shape[0], block):
        rows = unit_a[start_a : start_a + block]
        best = rows.new_empty(rows.shape[0], 0)
        best_ids = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=rows.device)
        for start_b in range(0, b.shape[0], block):
            cosine = rows @ unit_b[start_b : start_b + block].T
            some = (cosine.abs() if absolute else cosine).topk(min(n, cosine.shape[1]), dim=1).indices
            best = torch.cat([best, cosine.gather(1, some)], 1)
            best_ids = torch.cat([best_ids, some + start_b], 1)
            keep = (best.abs() if absolute else best).topk(min(n, best.shape[1]), dim=1).indices
            best, best_ids = best.gather(1, keep), best_ids.gather(1, keep)
        cosines.append(best)
        indices.append(best_ids)
    if not cosines:
        return Nearest(unit_a.new_empty(0, n), torch.empty(0, n, dtype=torch.int64))
    return Nearest(torch.cat(cosines).clamp(-1, 1), torch.cat(indices))


def mcs(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, block: int = 4096) -> Float[Tensor, " n_a"]:
    """Per direction of `a`, its largest cosine with any direction of `b`.

    Source: Sharkey et al. 2022. Signed: an opposite direction does not count as found.
    """
    return nearest_directions(a, b, block=block).cosines[:, 0]


def mmcs(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, block: int = 4096) -> float:
    """Mean over the directions of `a` of their `mcs` with `b`. Not symmetric.

    With truth as `a` it is a recall (how much of the truth was found), with truth as `b` a precision (how
    much of what was found is true).
    """
    return float(mcs(a, b, block=block).double().mean())


def _unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    x = x.detach().float()
    norms = x.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, x / norms, 0.0)


def _units(units: Int[Tensor, " rows"] | None, like: Tensor) -> Int[Tensor, " rows"]:
    if units is None:
        return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
    return units.to(like.device)


def _select(sums: dict[str, Array], units: Bool[np.ndarray, " units"] | None) -> dict[str, Array]:
    if units is None:
        return sums
    return {name: array[units[: array.shape[0]]] for name, array in sums.items()}
