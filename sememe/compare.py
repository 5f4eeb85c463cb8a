"""The verb that compares two dictionaries: what each finds of the other, and their reports side by side.

Knows decoder directions and report.json; runs no model. Cosines are between decoder directions, signed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float64, Int32
from pydantic import Field

from sememe import artifact, dictionaries, figures, metrics
from sememe.config import Config
from sememe.dictionaries.base import Dictionary
from sememe.errors import MismatchError, ShapeError

__all__ = ["COMPARISON", "CompareConfig", "compare"]

VERSION = 1
COMPARISON = "comparison.json"
MATCHES = "matches_{}_to_{}.npz"
FOUND_COSINE = 0.9
HISTOGRAM_BINS = 40


class CompareConfig(Config):
    """Which two dictionaries."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"a", "b", "report_a", "report_b", "out"})

    a: Path
    """One dictionary."""
    b: Path
    """The other; its outputs must be as wide."""
    report_a: Path | None = None
    """The report of a, to stand beside that of b."""
    report_b: Path | None = None
    """The report of b."""
    out: Path = Path("artifacts/comparison")
    """The folder to make."""
    n_nearest: int = Field(default=5, ge=1)
    """Nearest latents stored per latent, both ways."""
    n_shown: int = Field(default=20, ge=0)
    """Best and worst matches listed on the page."""


def compare(config: CompareConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Compare two dictionaries, or open the comparison if it is there.

    The artifact holds comparison.json, comparison.md, and the nearest latents both ways (`matches_a_to_b.npz`:
    `indices` and `cosines` of shape (d_sae, n_nearest), nearest first).

    Args:
        config: Which two.
        fresh: Replace whatever stands at config.out.

    Raises:
        ShapeError: the dictionaries write outputs of different widths.
        MismatchError: a report is of another dictionary; or another comparison stands at config.out.
        ArtifactError: a folder is not a dictionary or a report.
    """
    saved = {"a": artifact.load(config.a, "dictionary"), "b": artifact.load(config.b, "dictionary")}
    reports = {
        side: figures.open_report(path)
        for side, path in (("a", config.report_a), ("b", config.report_b))
        if path is not None
    }
    for side, one in reports.items():
        measured = one.artifact.meta["parents"].get("dictionary")
        if measured != saved[side].fingerprint:
            raise MismatchError(
                f"report_{side} must be of the dictionary {saved[side].path} ({saved[side].fingerprint[:16]})",
                f"a report of {str(measured)[:16]}",
                f"Run `sememe evaluate` on it, or leave report_{side} out.",
            )
    parents = {side: folder.fingerprint for side, folder in saved.items()}
    parents |= {f"report_{side}": one.artifact.fingerprint for side, one in reports.items()}
    identity = artifact.identity_of("comparison", VERSION, config, parents)
    found = None if fresh else artifact.find(config.out, "comparison", identity)
    if found is not None:
        return found
    loaded = {"a": dictionaries.load(config.a), "b": dictionaries.load(config.b)}
    if loaded["a"].d_out != loaded["b"].d_out:
        raise ShapeError(
            f"the dictionaries must write outputs of one width, {loaded['a'].d_out} like {config.a}",
            f"{loaded['b'].d_out} of {config.b}",
            "Compare dictionaries of the same hookpoint.",
        )
    with artifact.building(
        config.out, kind="comparison", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        data = _measure(config, loaded, work.path)
        data |= {side: _describe(saved[side], loaded[side]) for side in ("a", "b")}
        data["same_sites"] = loaded["a"].sites == loaded["b"].sites
        data["reports"] = {side: one.data["metrics"] for side, one in reports.items()}
        artifact.write_json(work.path / COMPARISON, data)
        tables = {f"{side}: {one.data['dictionary']['name']}": one.data for side, one in reports.items()}
        (work.path / "comparison.md").write_text(_markdown(data, tables), encoding="utf-8")
        work.extra = {name: data[name] for name in ("mmcs_a_to_b", "mmcs_b_to_a")}
    return artifact.load(config.out, "comparison")


def _measure(config: CompareConfig, loaded: dict[str, Dictionary], folder: Path) -> dict[str, Any]:
    """mmcs both ways, and for each direction the share found, a histogram, the nearest latents."""
    data: dict[str, Any] = {"format_version": 1}
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    for one, other in (("a", "b"), ("b", "a")):
        with torch.inference_mode():
            ours, theirs = loaded[one].decoder_directions(), loaded[other].decoder_directions()
            nearest = metrics.nearest_directions(ours, theirs, min(config.n_nearest, theirs.shape[0]))
        cosines, indices = nearest.cosines.cpu().numpy(), nearest.indices.cpu().numpy().astype(np.int32)
        np.savez_compressed(folder / MATCHES.format(one, other), indices=indices, cosines=cosines)
        best = cosines[:, 0].astype(np.float64)
        order = np.argsort(-best, kind="stable").tolist()
        counts, _ = np.histogram(best.clip(-1, 1), bins=edges)
        data[f"mmcs_{one}_to_{other}"] = float(best.mean())
        data[f"{one}_to_{other}"] = {
            "n_latents": int(best.size),
            "median_mcs": float(np.median(best)),
            f"share_above_{FOUND_COSINE:g}": float((best > FOUND_COSINE).mean()),
            "n_distinct_matches": int(np.unique(indices[:, 0]).size),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "best": [_match(i, indices, best) for i in order[: config.n_shown]],
            "worst": [_match(i, indices, best) for i in order[::-1][: config.n_shown]],
        }
    return data


def _match(
    latent: int, indices: Int32[np.ndarray, "latents n_nearest"], best: Float64[np.ndarray, " latents"]
) -> dict[str, Any]:
    return {"latent": latent, "nearest": int(indices[latent, 0]), "cosine": float(best[latent])}


def _describe(saved: artifact.Artifact, dictionary: Dictionary) -> dict[str, Any]:
    return {
        "name": saved.path.name,
        "path": str(saved.path),
        "fingerprint": saved.fingerprint,
        "kind": dictionary.kind,
        "config": dictionary.config.resolved(),
        "d_sae": dictionary.d_sae,
        "d_out": dictionary.d_out,
        "hookpoints": [] if dictionary.sites is None else list(dictionary.sites.hookpoints),
    }


def _markdown(data: dict[str, Any], reports: dict[str, Any]) -> str:
    a, b = data["a"], data["b"]
    lines = [
        f"# {a['name']} and {b['name']} compared",
        "",
        "| | a | b |",
        "|---|---|---|",
        *(f"| {name} | {a[name]} | {b[name]} |" for name in ("name", "kind", "d_sae")),
        f"| hookpoints | {', '.join(a['hookpoints']) or 'none'} | {', '.join(b['hookpoints']) or 'none'} |",
        f"| fingerprint | {a['fingerprint'][:16]} | {b['fingerprint'][:16]} |",
        "",
    ]
    if not data["same_sites"]:
        lines += ["The two read or write different places: their directions may live in different bases.", ""]
    lines += [
        "Cosines are between decoder directions and signed. If b is the truth, a to b is a precision (how much of "
        "a is in b) and b to a a recall (how much of b was found).",
        "",
        f"| | mmcs | median | share above {FOUND_COSINE:g} | latents matched |",
        "|---|---|---|---|---|",
    ]
    for one, other in (("a", "b"), ("b", "a")):
        way = data[f"{one}_to_{other}"]
        lines.append(
            f"| {one} to {other} | {data[f'mmcs_{one}_to_{other}']:.4f} | {way['median_mcs']:.4f} | "
            f"{way[f'share_above_{FOUND_COSINE:g}']:.1%} | {way['n_distinct_matches']:,} of {data[other]['d_sae']:,} |"
        )
    if reports:
        lines += ["", "## On held-out text", "", figures.markdown_table(figures.headline_table(reports))]
    for one, other in (("a", "b"), ("b", "a")):
        for which in ("best", "worst"):
            matches = data[f"{one}_to_{other}"][which]
            if matches:
                lines += ["", f"## {which.capitalize()} matches of {one} in {other}", ""]
                lines += [f"| latent of {one} | nearest of {other} | cosine |", "|---|---|---|"]
                lines += [f"| {m['latent']} | {m['nearest']} | {m['cosine']:.4f} |" for m in matches]
    return "\n".join([*lines, ""])
