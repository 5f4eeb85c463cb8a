"""What a page is made of: an atlas and, where they exist, its explanations and its dictionary's report.

Knows artifacts and that they belong together. Knows neither HTTP nor the page.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sememe import artifact
from sememe.atlas import EFFECTS, REMOVALS, Atlas, dictionary_of, open_atlas
from sememe.browse.data import Data, EffectFiles, Explained
from sememe.browse.data.graphs import read_graphs
from sememe.browse.data.reports import frontier_point
from sememe.browse.data.texts import fingerprints, read_texts, text_files
from sememe.config import Config
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError

__all__ = ["Inputs", "Opened", "named_once", "opened"]

REPORT = "report.json"


class Inputs(Config):
    """Where the page's data lies."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"atlas", "against", "explanations", "report", "effects", "prompts", "graph"}
    )

    atlas: Path = Path("artifacts/atlas")
    """The atlas to show."""
    against: tuple[Path, ...] = ()
    """Other atlases, to change to and to compare with."""
    explanations: Path | None = None
    """The folder of its explanations: latents are called by them. None: by the tokens they peak on."""
    report: Path | None = None
    """The folder of its dictionary's report, for the landing page's table; or a folder of reports (a sweep's), among
    which its own is shown on the frontier of all."""
    effects: Path | None = None
    """The folder of its latents' effects: what taking them out does to the predictions, token by token."""
    prompts: tuple[Path, ...] = ()
    """Chosen texts: folders that `sememe prompts` wrote, or files of `sememe prompt --out FILE.json`."""
    graph: tuple[Path, ...] = ()
    """Graphs of prompts: folders that `sememe circuit` or `sememe trace` wrote, or their graph.json."""


def named_once(inputs: Inputs) -> tuple[Path, ...]:
    """The folders of all atlases that are shown.

    Raises:
        ConfigError: two of them are one: its notes would have two writers, and it cannot be compared with itself.
    """
    paths = (inputs.atlas, *inputs.against)
    first: dict[Path, Path] = {}
    for path in paths:
        place = path.resolve()
        if place in first:
            raise ConfigError(
                "each atlas must be named once", f"{path}, which is {first[place]} again", "Leave it out."
            )
        first[place] = path
    return paths


class Opened(NamedTuple):
    """An open atlas with what belongs to it."""

    data: Data
    parents: dict[str, str]
    """Fingerprints of everything that was read, by role."""


@contextlib.contextmanager
def opened(inputs: Inputs) -> Iterator[Opened]:
    """Open the inputs, check that they belong together, and close them at the end.

    Raises:
        ArtifactError: a folder is not what it should be.
        CorruptError: a file is damaged.
        MismatchError: explanations or report belong to something else.
    """
    with contextlib.closing(open_atlas(inputs.atlas, inputs.explanations, inputs.effects)) as atlas:
        parents = {"atlas": atlas.artifact.fingerprint}
        explained, effects, report, frontier = None, None, None, []
        if inputs.explanations is not None:
            folder = artifact.load(inputs.explanations, "explanations")
            parents["explanations"] = folder.fingerprint
            explained = Explained.read(folder)
        if inputs.effects is not None:
            folder = artifact.load(inputs.effects, "effects")
            parents["effects"] = folder.fingerprint
            effects = EffectFiles(folder.file(EFFECTS), folder.file(REMOVALS))
        if inputs.report is not None:
            reports = _reports(inputs.report)
            own = _own(reports, inputs.report, atlas)
            report = _report(own)
            parents |= {"report": own.fingerprint} | {
                f"report.{i}": one.fingerprint for i, one in enumerate(reports) if len(reports) > 1
            }
            if len(reports) > 1:
                frontier = [frontier_point(one.path.name, _report(one), one is own) for one in reports]
        _check_prompts(inputs.prompts, atlas)
        files = text_files(inputs.prompts)
        parents |= fingerprints(files)
        data = Data(atlas, explained, report, frontier=frontier, effects=effects)
        data.texts = read_texts(files, data.ids)
        data.graphs, fingerprints_of_graphs = read_graphs(inputs.graph)
        parents |= fingerprints_of_graphs
        yield Opened(data, parents)


def _check_prompts(paths: tuple[Path, ...], atlas: Atlas) -> None:
    """That folders which `sememe prompts` made are of the atlas's dictionary; bare files do not say whose they are."""
    for path in paths:
        if not artifact.exists(path):
            continue
        found = str(artifact.load(path, "prompts").meta["parents"]["dictionary"])
        if found != dictionary_of(atlas):
            raise MismatchError(
                f"the texts {path} must be of the atlas's dictionary (fingerprint {dictionary_of(atlas)[:16]})",
                f"texts of {found[:16]}",
                "Run `sememe prompts` on the atlas's dictionary.",
            )


def _reports(path: Path) -> list[artifact.Artifact]:
    """The report at a path, or all of those in a folder of them."""
    if artifact.exists(path):
        return [artifact.load(path, "report")]
    inner = artifact.below(path)
    if not inner and not path.is_dir():
        return [artifact.load(path, "report")]  # which says that nothing is there
    found = [artifact.load(one, "report") for one in inner]
    if not found:
        raise ArtifactError(
            "a report's folder must be a report, or hold reports",
            f"{path}, which holds none",
            "Name a folder that `sememe evaluate` made.",
        )
    return found


def _own(reports: list[artifact.Artifact], path: Path, atlas: Atlas) -> artifact.Artifact:
    """The one of the atlas's dictionary."""
    expected = atlas.artifact.meta["parents"].get("dictionary", "none")
    found = [one.meta["parents"].get("dictionary", "none") for one in reports]
    if expected not in found:
        raise MismatchError(
            f"the report {path} must be of the atlas's dictionary (fingerprint {expected[:16]})",
            f"a report of {', '.join(one[:16] for one in found)}",
            "Name the report of the same dictionary, or run `sememe evaluate` on it.",
        )
    return reports[found.index(expected)]


def _report(folder: artifact.Artifact) -> dict[str, Any]:
    path = folder.file(REPORT, verify=True)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"metrics": dict(report["metrics"]), "nulls": dict(report["nulls"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path} must be a report", f"{type(error).__name__}: {error}", "Run `sememe evaluate` again."
        ) from None
