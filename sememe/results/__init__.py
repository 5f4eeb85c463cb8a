"""The published numbers beside ours: a page of tables and claims, read from what a recipe's stages made.

A number is named by where it is, `FILE#PATH`: a JSON file in the recipe's folder, and the way to a value in it.

    report/small/report.json#metrics/l0                the statistic with its interval
    geometry/geometry.json#rows/name=small/numbers/top_1    the entry of a list whose `name` is "small"
    grid/relu/plots/grid.json#dictionaries/max:recall/penalty    of the entry with the largest recall
    comparison/comparison.json#rows/name=small~1k16/metrics/fvu    a / inside a name is written ~1
    atlas/small#SELECT count(*) FROM latents WHERE n_active > 0    an atlas, asked in SQL; effects and explanations
                                                                   of the same name are opened with it
    CHOICE#best penalty                                the option that a [[expected.choices]] of this name finds best

A number that is not there stands as missing, with its cause; nothing is guessed. Knows artifacts' files and no verb.

    config.py     what was published, and where our numbers are
    numbers.py    a number by its FILE#PATH
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Literal

from scipy.stats import spearmanr

from sememe import artifact, figures
from sememe.errors import MismatchError
from sememe.results.config import Claim, ResultsConfig
from sememe.results.numbers import Reader, beside, endless, missing

__all__ = ["RESULTS", "ResultsConfig", "results"]

VERSION = 4
RESULTS = "results.json"
RISING = 0.5
"""Rank correlation of numbers with their places, from which they count as rising."""
Verdict = Literal["holds", "does not hold", "undecided", "not measured"]


def results(config: ResultsConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Write the page, or open it if it is there.

    The artifact holds results.json, results.md with its plots, and results.html.

    Args:
        config: What was published, and where our numbers are.
        fresh: Replace whatever stands at config.out.

    Raises:
        MismatchError: something that is no artifact stands at config.out.
    """
    parents = _parents(config)
    identity = artifact.identity_of("results", VERSION, config, parents)
    with contextlib.suppress(MismatchError):  # a page of other numbers: written again, it takes no time
        there = None if fresh else artifact.find(config.out, "results", identity)
        if there is not None:
            return there
    with (
        Reader(config.base, config.choices) as reader,
        artifact.building(
            config.out, kind="results", version=VERSION, config=config, parents=parents, fresh=True
        ) as work,
    ):
        data = _data(config, reader)
        artifact.write_json(work.path / RESULTS, data)
        figures.write_results(work.path, data)
        work.extra = {
            "verdicts": {claim["claim"]: claim["verdict"] for claim in data["claims"]},
            "n_missing": data["n_missing"],
        }
    return artifact.load(config.out, "results")


def _parents(config: ResultsConfig) -> dict[str, str]:
    """The artifacts that numbers are read from; those that are not there are left out, and made results differ."""
    found = {}
    for file in config.files():
        folder = config.base / file
        while not (folder / artifact.META).is_file() and folder != config.base:
            folder = folder.parent
        if folder != config.base:
            place = folder.relative_to(config.base)
            found[str(place)] = artifact.load(folder).fingerprint
            if place.parts[0] == "atlas":
                found |= {
                    str(path.relative_to(config.base)): artifact.load(path).fingerprint
                    for path in beside(config.base, place)
                }
    return found


def _data(config: ResultsConfig, reader: Reader) -> dict[str, Any]:
    tables: list[dict[str, Any]] = []
    for table in config.tables:
        rows: list[dict[str, Any]] = []
        for row in table.rows:
            cells = [reader.statistic(table.reference(row, column)) for column in table.columns]
            published = row.published or ("",) * len(table.columns)
            rows.append({"name": row.name, "published": list(published), "here": cells})
        about = {"title": table.title, "source": table.source, "note": table.note, "plot": table.plot}
        tables.append({**about, "columns": [column.name for column in table.columns], "rows": rows})
    claims: list[dict[str, Any]] = []
    for claim in config.claims:
        values = [reader.statistic(reference) for reference in claim.values]
        claims.append(
            {
                "claim": claim.claim,
                "source": claim.source,
                "published": claim.published,
                "relation": claim.relation,
                "than": claim.than,
                "within": claim.within,
                "here": values,
                "verdict": _verdict(claim, values),
            }
        )
    cells = [cell for table in tables for row in table["rows"] for cell in row["here"]]
    cells += [value for claim in claims for value in claim["here"]]
    return {
        "format_version": 1,
        "name": config.name,
        "scale": config.scale,
        "title": config.title,
        "conversion": config.conversion,
        "settings": [setting.resolved() for setting in config.settings],
        "tables": tables,
        "claims": claims,
        "n_missing": sum(map(missing, cells)),
    }


# -- claims --------------------------------------------------------------------------------------------------------


def _verdict(claim: Claim, values: Sequence[dict[str, Any]]) -> Verdict:
    """Whether our numbers are as was said; undecided where the intervals of the two overlap."""
    if any(missing(value) for value in values):
        return "not measured"
    values = [endless(value) for value in values]
    numbers = [value["value"] for value in values]
    if all(math.isinf(number) for number in numbers) and claim.than is None:
        return "undecided"
    if claim.relation in ("rising", "falling"):
        rho = _rank_correlation(numbers)
        return _word(rho >= RISING if claim.relation == "rising" else rho <= -RISING)
    left = values[0]
    right = {"value": claim.than} if claim.than is not None else values[1]
    if claim.relation in ("near", "apart"):
        assert claim.within is not None
        near = abs(left["value"] - right["value"]) <= claim.within
        return _word(near == (claim.relation == "near"))
    if _low(left) <= _high(right) and _low(right) <= _high(left) and left["value"] != right["value"]:
        return "undecided"
    above = left["value"] > right["value"]
    return _word(above if claim.relation == "above" else left["value"] < right["value"])


def _word(held: bool) -> Verdict:
    return "holds" if held else "does not hold"


def _low(statistic: dict[str, Any]) -> float:
    low = statistic.get("low")
    return float(statistic["value"] if low is None else low)


def _high(statistic: dict[str, Any]) -> float:
    high = statistic.get("high")
    return float(statistic["value"] if high is None else high)


def _rank_correlation(numbers: Sequence[float]) -> float:
    """Spearman's, of numbers with their places; ties share a rank. 0 where all numbers are the same."""
    if len(set(numbers)) < 2:
        return 0.0
    return float(spearmanr(range(len(numbers)), numbers).statistic)
