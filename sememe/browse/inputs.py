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
from sememe.atlas import Atlas, labels, open_atlas
from sememe.browse.data import Data
from sememe.config import Config
from sememe.errors import CorruptError, MismatchError

__all__ = ["Inputs", "Opened", "opened"]

REPORT = "report.json"


class Inputs(Config):
    """Where the page's data lies."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"atlas", "against", "explanations", "report"})

    atlas: Path = Path("artifacts/atlas")
    """The atlas to show."""
    against: tuple[Path, ...] = ()
    """Other atlases, to change to and to compare with."""
    explanations: Path | None = None
    """The folder of its explanations: latents are called by them. None: by the tokens they peak on."""
    report: Path | None = None
    """The folder of its dictionary's report, for the landing page's table."""


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
    with contextlib.closing(open_atlas(inputs.atlas, inputs.explanations)) as atlas:
        parents = {"atlas": atlas.artifact.fingerprint}
        explanations, report = None, None
        if inputs.explanations is not None:
            parents["explanations"] = artifact.load(inputs.explanations, "explanations").fingerprint
            explanations = labels(inputs.explanations)
        if inputs.report is not None:
            folder = artifact.load(inputs.report, "report")
            parents["report"] = folder.fingerprint
            report = _report(folder, atlas)
        yield Opened(Data(atlas, explanations, report), parents)


def _report(folder: artifact.Artifact, atlas: Atlas) -> dict[str, Any]:
    expected, found = (a.meta["parents"].get("dictionary", "none") for a in (atlas.artifact, folder))
    if expected != found:
        raise MismatchError(
            f"the report {folder.path} must be of the atlas's dictionary (fingerprint {expected[:16]})",
            f"a report of {found[:16]}",
            "Name the report of the same dictionary, or run `sememe evaluate` on it.",
        )
    path = folder.file(REPORT, verify=True)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"metrics": dict(report["metrics"]), "nulls": dict(report["nulls"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path} must be a report", f"{type(error).__name__}: {error}", "Run `sememe evaluate` again."
        ) from None
