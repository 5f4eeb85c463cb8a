"""Dictionaries that differ only in how sparse they are, as one curve; two such curves compared at one l0.

Knows numbers and descriptions, not where they come from; loads no torch. A metric comes as an array of length
1 + n: its value over all documents, then its value in each of n draws of them. The i-th draw has the same documents
everywhere, so differences between arrays are paired.

    descriptions -> grouped() -> Frontier per group -> differences() -> which ones are real, in plain words
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from sememe.config import canonical_json

__all__ = [
    "SPARSITY_OPTIONS",
    "Difference",
    "Frontier",
    "Place",
    "Point",
    "differences",
    "grouped",
    "interval",
]

SPARSITY_OPTIONS = (
    "entropy_coefficient",
    "k",
    "l0_coefficient",
    "l1_coefficient",
    "noise",
    "penalty",
    "prior_l0",
    "sqrt_coefficient",
    "start_l0",
    "target_l0",
)
"""Options by which a frontier is walked."""
ALIKE = 1.05
"""Factor between two l0 up to which dictionaries without a frontier are compared as they are."""
LEAST_L0 = 0.5
"""Mean active latents below which a dictionary is silent, and no point of a frontier."""
FINGERPRINTS = ("model_fingerprint", "over", "store", "text")
N_GRID = 33
"""Values of l0 at which frontiers are compared over the range they share."""
LEVEL = 0.95

Draws = Mapping[str, Float64[np.ndarray, " draws"]]


class Place(NamedTuple):
    """Where a dictionary belongs."""

    group: str
    """What it shares with those of its frontier, in words."""
    setting: str
    """How sparse it was asked to be; dictionaries of a group and a setting differ in nothing but the seed."""


class Point(NamedTuple):
    """One dictionary's numbers."""

    place: Place
    draws: Draws
    """By metric; l0 is one of them."""


class Difference(NamedTuple):
    """A metric of one group less that of another, at one l0 and over all that both reach."""

    metric: str
    a: str
    b: str
    l0: float
    """NaN where they have none in common; then the rest is NaN, too."""
    a_value: float
    b_value: float
    difference: float
    low: float
    high: float
    l0_from: float
    l0_to: float
    mean_difference: float
    """Over that range, on a logarithmic axis: the area between the curves over its width."""
    mean_low: float
    mean_high: float
    sentence: str

    @property
    def real(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


MOST_APART = 3
"""Options that a group's title may be made of, where it is one dictionary with a name of its own."""


def grouped(descriptions: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
    """Which dictionaries make a frontier together, and which are seeds of one another.

    Args:
        descriptions: By name: `kind`, `config` (the architecture's options) and `training`, `inputs` and `outputs`, as
            in report.json. Whatever else is in them is ignored.
    """
    shared: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, about in descriptions.items():
        options = {key: value for key, value in about.get("config", {}).items() if key != "seed"}
        options |= {"d_sae": about.get("d_sae")}
        if "encoder" in options:  # of a sparse coder, which knows both and uses one
            options.pop("k" if options["encoder"] == "fista" else "penalty", None)
        settings[name] = {key: options[key] for key in SPARSITY_OPTIONS if options.get(key)}
        rest = {key: value for key, value in options.items() if key not in SPARSITY_OPTIONS}
        rest |= {
            key: _without_seed(value) for key, value in about.get("training", {}).items() if key != "seed"
        }
        rest |= {key: about[key] for key in ("model_fingerprint", "max_norms") if key in about}
        shared[name] = {"kind": about["kind"], **rest} | {
            key: "+".join(about.get(key, ())) for key in ("inputs", "outputs")
        }
    keys = {name: canonical_json(_plain(options)) for name, options in shared.items()}
    firsts = {key: shared[name] for name, key in reversed(keys.items())}
    members: dict[str, list[str]] = {}
    for name, key in keys.items():
        members.setdefault(key, []).append(name)
    alone = [members[key][0] if len(members[key]) == 1 else None for key in firsts]
    titles = dict(zip(firsts, _titles(list(firsts.values()), alone), strict=True))
    return {name: Place(titles[keys[name]], _words(settings[name], settings[name])) for name in descriptions}


def _without_seed(value: Any) -> Any:
    """The options of a fit without its seed and without what makes it more or less sparse."""
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if key not in ("seed", *SPARSITY_OPTIONS)}


def _plain(value: Any) -> Any:
    """Data as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _titles(groups: Sequence[Mapping[str, Any]], names: Sequence[str | None]) -> list[str]:
    """Each group by its kind and what sets it apart from the others of that kind.

    A group of one dictionary that it takes more than `MOST_APART` options to tell apart has that one's name.
    """
    titles: list[str] = []
    groups = [_flat(one) for one in groups]
    for one, alone in zip(groups, names, strict=True):
        alike = [other for other in groups if other["kind"] == one["kind"]]
        every = sorted({key for other in alike for key in other})
        apart = [name for name in every if any(_of(other, name) != _of(one, name) for other in alike)]
        if {"inputs", "outputs"} <= set(apart) and all(
            other.get("inputs") == other.get("outputs") for other in alike
        ):
            apart.remove("outputs")
        title = f"{one['kind']} {_words(one, apart)}".rstrip()
        if alone is not None and len(apart) > MOST_APART:
            title = alone
        again = sum(title == other or other.startswith(f"{title} (") for other in titles)
        titles.append(f"{title} ({again + 1})" if again else title)  # what a few words do not tell apart
    return titles


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """With the options of what was fitted (a baseline, an optimiser) beside the others, unless they are there."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            inner = {key: item for key, item in value.items() if key != "kind" and key not in options}
            found |= {name: value.get("kind", "another"), **inner}
        else:
            found[name] = value
    return found


def _of(options: Mapping[str, Any], name: str) -> str:
    return canonical_json(_plain(options.get(name)))


def _words(options: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any]) -> str:
    """k=32, lr=0.001."""
    found = []
    for name in names:
        value = options.get(name)
        if name in ("inputs", "outputs"):
            found.append(str(value))
        elif isinstance(value, Mapping):
            found.append(f"{name}={value.get('kind', 'another')}")
        elif name in FINGERPRINTS:
            found.append(f"{name}={str(value)[:8]}")
        else:
            found.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    return ", ".join(found)


class Frontier:
    """A group's metrics against l0; seeds of one setting are averaged.

    Args:
        points: Its dictionaries.
        seed: Of the draws of seeds: where a setting has several, each draw of documents has a draw of them, too.
    """

    def __init__(self, points: Sequence[Point], seed: int = 0) -> None:
        self.group = points[0].place.group
        by_setting: dict[str, list[Point]] = {}
        for point in points:
            by_setting.setdefault(point.place.setting, []).append(point)
        metrics = [name for name in points[0].draws if all(name in point.draws for point in points)]
        rows = []
        for setting, seeds in by_setting.items():
            n = len(seeds)
            # a stream of its own: trainings of different settings have nothing to do with each other
            mark = int.from_bytes(hashlib.sha256(f"{self.group}\n{setting}".encode()).digest()[:8], "little")
            rng = np.random.default_rng([seed, mark])
            weights = np.full((seeds[0].draws["l0"].shape[0], n), 1 / n)
            if n > 1:
                weights[1:] = rng.multinomial(n, np.full(n, 1 / n), size=weights.shape[0] - 1) / n
            averaged = {
                name: (weights * np.stack([point.draws[name] for point in seeds], axis=1)).sum(1)
                for name in metrics
            }
            rows.append((setting, n, averaged))
        self.dropped = {
            row[0]: _no_place(float(row[2]["l0"][0]))
            for row in rows
            if not float(row[2]["l0"][0]) >= LEAST_L0
        }
        """Settings that have no place on the curve, and why."""
        rows = [row for row in rows if row[0] not in self.dropped] or rows[:1]
        rows.sort(key=lambda row: float(row[2]["l0"][0]))
        self.settings = [row[0] for row in rows]
        """From the sparsest on."""
        self.n_seeds = [row[1] for row in rows]
        self.values = {name: np.stack([row[2][name] for row in rows]) for name in metrics}
        """By metric, of shape (settings, 1 + draws)."""

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest l0."""
        return float(self.values["l0"][0, 0]), float(self.values["l0"][-1, 0])

    def at(self, metric: str, l0: float) -> Float64[np.ndarray, " draws"]:
        """A metric at an l0, interpolated on a logarithmic axis; NaN outside of the range.

        With a single setting, its own value where its l0 is within 5%.
        """
        own, l0s = self.values[metric], self.values["l0"]
        known = np.isfinite(l0s[:, 0])  # a metric that is NaN at a setting stays NaN up to the next ones
        nothing = np.full(own.shape[1], math.nan)
        if not known.any():
            return nothing
        own, x = own[known], np.log(np.maximum(l0s[known], 1e-12))
        low, high = float(np.exp(x[0, 0])), float(np.exp(x[-1, 0]))
        if not low / ALIKE <= l0 <= high * ALIKE:
            return nothing
        if own.shape[0] == 1:
            alone: Float64[np.ndarray, " draws"] = own[0]
            return alone
        order = np.argsort(x, axis=0, kind="stable")
        x, own = np.take_along_axis(x, order, 0), np.take_along_axis(own, order, 0)
        left = np.clip((x <= math.log(l0)).sum(0) - 1, 0, x.shape[0] - 2)[None]
        x0, x1, y0, y1 = (np.take_along_axis(of, left + step, 0)[0] for of in (x, own) for step in (0, 1))
        share = np.clip((math.log(l0) - x0) / np.maximum(x1 - x0, 1e-12), 0, 1)
        found: Float64[np.ndarray, " draws"] = y0 + share * (y1 - y0)
        return found

    def mean(self, metric: str, low: float, high: float) -> Float64[np.ndarray, " draws"]:
        """A metric's mean over a range of l0, on a logarithmic axis: the area under the curve over its width."""
        grid = _grid(low, high)
        found: Float64[np.ndarray, " draws"] = np.mean([self.at(metric, l0) for l0 in grid], axis=0)
        return found


def _no_place(l0: float) -> str:
    return (
        "its l0 is NaN"
        if math.isnan(l0)
        else f"its l0, {l0:.2g}, is below {LEAST_L0:g}: hardly any latent is active"
    )


def _grid(low: float, high: float) -> list[float]:
    """Middles of equal parts of a range on a logarithmic axis."""
    steps = (np.arange(N_GRID) + 0.5) / N_GRID
    return [float(l0) for l0 in np.exp(math.log(low) + steps * math.log(high / low))]


def interval(draws: Float64[np.ndarray, " draws"]) -> tuple[float, float]:
    """The 95% interval of a metric's draws; NaN where there are none, or one is NaN."""
    if draws.shape[0] < 3 or not np.isfinite(draws).all():
        return math.nan, math.nan
    low, high = np.quantile(draws[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def differences(a: Frontier, b: Frontier, metrics: Mapping[str, str]) -> list[Difference]:
    """Every metric of a less that of b, at the middle of the l0 that both reach and over all of it.

    Args:
        a: One group.
        b: Another, on the same documents.
        metrics: By name, whether "lower" or "higher" is better.
    """
    low, high = max(a.range[0], b.range[0]), min(a.range[1], b.range[1])
    shared = low <= high * ALIKE and low > 0
    l0 = math.sqrt(low * high) if shared else math.nan
    found = []
    for metric, better in metrics.items():
        if metric not in a.values or metric not in b.values:
            continue
        if not shared:
            sentence = (
                f"{metric}: {a.group} (l0 {_l0s(a)}) and {b.group} (l0 {_l0s(b)}) have no l0 in common and are not "
                "compared."
            )
            nan = math.nan
            nothing = (nan, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan)
            found.append(Difference(metric, a.group, b.group, *nothing, sentence))
            continue
        ours, theirs = a.at(metric, l0), b.at(metric, l0)
        apart = ours - theirs
        span = (low, high) if low < high else (l0, l0)
        over = a.mean(metric, *span) - b.mean(metric, *span) if low < high else apart
        bounds, bounds_over = interval(apart), interval(over)
        values = (float(ours[0]), float(theirs[0]), float(apart[0]))
        unsaid = Difference(
            metric, a.group, b.group, l0, *values, *bounds, *span, float(over[0]), *bounds_over, ""
        )
        found.append(unsaid._replace(sentence=_sentence(unsaid, better)))
    return found


def _l0s(frontier: Frontier) -> str:
    low, high = frontier.range
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _sentence(found: Difference, better: str) -> str:
    """Which is better, by how much, and whether that is real."""
    where = f"{found.metric} at l0 {found.l0:.3g}"
    if not math.isfinite(found.difference):
        return f"{where}: {found.a} and {found.b} cannot be compared, one of them is not a number."
    numbers = f"{found.a_value:.4g} against {found.b_value:.4g}"
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return f"{where}: {found.a} {numbers} of {found.b}; without an interval, nothing says whether that is real."
    size = f"a difference of {abs(found.difference):.2g}"
    low, high = sorted((found.low, found.high) if found.difference >= 0 else (-found.low, -found.high))
    bounds = f"95% interval {low:.2g} to {high:.2g}"
    if not found.real:
        return (
            f"{where}: {found.a} and {found.b} are not told apart by these documents: {numbers}, {size} "
            f"({bounds} holds 0)."
        )
    wins = (found.difference < 0) == (better == "lower")
    first, second = (found.a, found.b) if wins else (found.b, found.a)
    values = numbers if wins else f"{found.b_value:.4g} against {found.a_value:.4g}"
    return f"{where}: {first} is better than {second}, {values}, {size} that is real ({bounds})."


def summary(points: Mapping[str, Point], metrics: Mapping[str, str], seed: int = 0) -> dict[str, Any]:
    """Every group's frontier, every pair of groups compared, and whose areas are left out, as plain data without NaN.

    Args:
        points: Dictionaries by name, all on the same documents.
        metrics: By name, whether "lower" or "higher" is better.
        seed: Of the draws of seeds.
    """
    by_group: dict[str, list[Point]] = {}
    for point in points.values():
        by_group.setdefault(point.place.group, []).append(point)
    frontiers = [Frontier(own, seed) for own in by_group.values()]
    common, left_out = _shared(frontiers)
    described = {
        one.group: _described(one, metrics, None if one.group in left_out else common) for one in frontiers
    }
    compared = [
        _numbers(found)
        for index, one in enumerate(frontiers)
        for other in frontiers[index + 1 :]
        for found in differences(one, other, metrics)
    ]
    dropped = {f"{one.group}, {setting}": why for one in frontiers for setting, why in one.dropped.items()}
    return {"frontiers": described, "differences": compared, "left_out": left_out, "dropped": dropped}


def _shared(frontiers: Sequence[Frontier]) -> tuple[tuple[float, float] | None, dict[str, str]]:
    """The range of l0 over which areas are taken, and why the groups that have none were left out.

    The most groups that share a range; of several such ranges the widest.
    """
    reach = {one.group: one.range for one in frontiers if 0 < one.range[0] < one.range[1]}
    best: tuple[int, float] = (0, 0.0)
    common: tuple[float, float] | None = None
    for low in {own[0] for own in reach.values()}:
        for high in {own[1] for own in reach.values() if own[1] > low}:
            n = sum(own[0] <= low and high <= own[1] for own in reach.values())
            if (n, high / low) > best:
                best, common = (n, high / low), (low, high)
    if common is None or best[0] < 2:
        return None, {}
    left_out = {}
    for one in frontiers:
        own = reach.get(one.group)
        if own is None:
            left_out[one.group] = f"it has one setting (l0 {_l0s(one)}), which is no range"
        elif not (own[0] <= common[0] and common[1] <= own[1]):
            left_out[one.group] = (
                f"its l0 ({_l0s(one)}) do not reach over {common[0]:.3g} to {common[1]:.3g}, which the others share"
            )
    return common, left_out


def _described(
    frontier: Frontier, metrics: Mapping[str, str], common: tuple[float, float] | None
) -> dict[str, Any]:
    """A frontier's points with their intervals, and the area under it over a range of l0, if there is one."""
    names = [name for name in ("l0", *metrics) if name in frontier.values]
    points = [
        {"setting": setting, "n_seeds": n, **{name: _statistic(frontier.values[name][row]) for name in names}}
        for row, (setting, n) in enumerate(zip(frontier.settings, frontier.n_seeds, strict=True))
    ]
    areas, span = {}, {}
    if common is not None:
        low, high = common
        areas = {name: _statistic(frontier.mean(name, low, high)) for name in names if name != "l0"}
        span = {"l0_from": low, "l0_to": high}
    return {"points": points, "mean_over_common_l0": areas, **span}


def _statistic(draws: Float64[np.ndarray, " draws"]) -> dict[str, float | None]:
    low, high = interval(draws)
    return {"value": _finite(float(draws[0])), "low": _finite(low), "high": _finite(high)}


def _numbers(found: Difference) -> dict[str, Any]:
    data = {
        name: _finite(value) if isinstance(value, float) else value for name, value in found._asdict().items()
    }
    return data | {"real": found.real}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
