"""What a page is made of: an atlas and, where they exist, its explanations and its dictionary's report.

Knows artifacts and that they belong together. Knows neither HTTP nor the page.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import field_validator

from sememe import artifact
from sememe.atlas import EFFECTS, REMOVALS, Atlas, dictionary_of, open_atlas
from sememe.browse.data import Data, EffectFiles, Explained
from sememe.browse.data.graphs import read_graphs
from sememe.browse.data.reports import frontier_point
from sememe.browse.data.texts import fingerprints, read_texts, text_files
from sememe.config import Config
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError

__all__ = ["Inputs", "Opened", "named_once", "one_by_one", "opened"]

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
    explanations: tuple[Path, ...] = ()
    """Folders of explanations, one for each atlas at most: latents are called by them. Without: by the tokens they peak
    on. This and the next two know whose they are: the order is free."""
    report: tuple[Path, ...] = ()
    """Folders of dictionaries' reports, for the landing page's table; or of several reports (a sweep's), among which an
    atlas's own is shown on the frontier of all."""
    effects: tuple[Path, ...] = ()
    """Folders of latents' effects: what taking them out does to the predictions, token by token."""
    prompts: tuple[Path, ...] = ()
    """Chosen texts: folders that `sememe prompts` wrote, or files of `sememe prompt --out FILE.json`."""
    graph: tuple[Path, ...] = ()
    """Graphs of prompts, of the first atlas: folders of `sememe circuit` or `sememe trace`, or their graph.json."""

    @field_validator("explanations", "report", "effects", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        """A single folder stands for a list of it."""
        return (value,) if isinstance(value, (str, Path)) else () if value is None else value


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


def one_by_one(inputs: Inputs) -> tuple[Inputs, ...]:
    """What belongs to each atlas, in their order: explanations, report, effects and texts say of what they are.

    What fits none of several atlases goes to the first, and `opened` says what is wrong with it.

    Raises:
        ConfigError: an atlas is named twice.
    """
    paths = named_once(inputs)
    if len(paths) == 1:
        return (Inputs(**{name: getattr(inputs, name) for name in Inputs.model_fields}),)
    whose = [_prints(path) for path in paths]
    given: list[dict[str, list[Path]]] = [{} for _ in paths]
    for kind, role in OF.items():
        for path in getattr(inputs, kind):
            of = {found[role] for found in _parents(path)}
            fits = [i for i, prints in enumerate(whose) if prints[role] and prints[role] in of] or [0]
            for i in fits:
                given[i].setdefault(kind, []).append(path)
    found = [{"atlas": path, **of} for path, of in zip(paths, given, strict=True)]
    return tuple(
        Inputs.build({**one, "graph": inputs.graph if i == 0 else ()}) for i, one in enumerate(found)
    )


OF = {"explanations": "atlas", "effects": "atlas", "report": "dictionary", "prompts": "dictionary"}
"""What may stand beside an atlas, and which of the atlas's fingerprints it knows it by."""


def _prints(path: Path) -> dict[str, str]:
    """An atlas's own fingerprint and its dictionary's; empty of one that cannot be opened."""
    try:
        found = artifact.load(path, "atlas")
    except ArtifactError:  # the page says what is wrong with it
        return {"atlas": "", "dictionary": ""}
    return {"atlas": found.fingerprint, "dictionary": str(found.meta["parents"].get("dictionary", ""))}


def _parents(path: Path) -> list[dict[str, str]]:
    """What a folder was made from, or each of those in it; nothing of bare files."""
    places = [path] if artifact.exists(path) else artifact.below(path)
    found = [artifact.load(place).meta["parents"] for place in places]
    return [{role: str(parents.get(role, "")) for role in ("atlas", "dictionary")} for parents in found]


def _only(inputs: Inputs, kind: str) -> Path | None:
    paths: tuple[Path, ...] = getattr(inputs, kind)
    if len(paths) > 1:
        raise ConfigError(
            f"{kind} must name one folder for each atlas",
            " and ".join(map(str, paths)),
            "Leave out all but one.",
        )
    return paths[0] if paths else None


class Opened(NamedTuple):
    """An open atlas with what belongs to it."""

    data: Data
    parents: dict[str, str]
    """Fingerprints of everything that was read, by role."""


@contextlib.contextmanager
def opened(inputs: Inputs) -> Iterator[Opened]:
    """Open one atlas and what belongs to it (`against` is not looked at), check that it does, close it at the end.

    Raises:
        ConfigError: there are two of what there is one of for an atlas.
        ArtifactError: a folder is not what it should be.
        CorruptError: a file is damaged.
        MismatchError: explanations or report belong to something else.
    """
    explanations, of_effects, of_report = (
        _only(inputs, kind) for kind in ("explanations", "effects", "report")
    )
    with contextlib.closing(open_atlas(inputs.atlas, explanations, of_effects)) as atlas:
        parents = {"atlas": atlas.artifact.fingerprint}
        explained, effects, report, frontier = None, None, None, []
        if explanations is not None:
            folder = artifact.load(explanations, "explanations")
            parents["explanations"] = folder.fingerprint
            explained = Explained.read(folder)
        if of_effects is not None:
            folder = artifact.load(of_effects, "effects")
            parents["effects"] = folder.fingerprint
            effects = EffectFiles(folder.file(EFFECTS), folder.file(REMOVALS))
        if of_report is not None:
            reports = _reports(of_report)
            own = _own(reports, of_report, atlas)
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
