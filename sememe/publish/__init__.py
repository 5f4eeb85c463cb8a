"""The verb that gathers a dictionary, its report and atlas into one folder that others can use, and uploads it.

    RELEASE/README.md, LICENSE, dictionary/, report/, atlas/

Several dictionaries become one release with a folder for each (`several.py`). The inner folders are the artifacts as
they are, but for the paths of the machine (`private.py`), so what is downloaded loads without conversion. The hub is
left to `uploads.py`. Knows files and the layout of report.json; never loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from sememe import artifact, figures
from sememe.atlas import open_atlas
from sememe.config import Config
from sememe.errors import ConfigError, CorruptError, MismatchError, nearest
from sememe.figures.tables import MEANINGS, markdown_table
from sememe.foreign import opens
from sememe.publish import private, several, uploads
from sememe.publish.uploads import CARD

__all__ = ["LICENCES", "Publication", "PublishConfig", "PublishedFile", "publish"]

VERSION = 3
"""Before version 2 local paths were published; before 3 the card in the folder named a repository."""
LICENCE = "LICENSE"

PLOTS = {
    "density": "How often latents are active",
    "fvu": "What is left unexplained, beside the nulls",
    "ce_increase": "What the model loses, beside the nulls",
    "training": "The training",
}
"""Figures of a report that go on the card."""
LICENCES = {
    "apache-2.0": ("Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "cc-by-4.0": (
        "Creative Commons Attribution 4.0",
        "https://creativecommons.org/licenses/by/4.0/legalcode",
    ),
    "cc-by-sa-4.0": (
        "Creative Commons Attribution-ShareAlike 4.0",
        "https://creativecommons.org/licenses/by-sa/4.0/legalcode",
    ),
    "cc0-1.0": ("Creative Commons Zero 1.0", "https://creativecommons.org/publicdomain/zero/1.0/legalcode"),
    "mit": ("MIT License", "https://opensource.org/license/mit"),
}
"""Licences by the hub's name for them: title and text."""


class PublishConfig(Config):
    """What to gather, and where it goes."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"dictionary", "report", "atlas", "out", "repo", "private", "dry_run", "licence_file"}
    )

    _opens = opens("dictionary")

    dictionary: Path = Path("artifacts/dictionary")
    """The dictionary's folder; or a sweep's, or one that holds several, for a release of all of them; or a release that
    is made already, to upload it."""
    report: Path | None = None
    """Its report, whose tables go on the card; of several, the folder of their reports."""
    atlas: Path | None = None
    """Its atlas; of several, the folder of theirs."""
    out: Path = Path("artifacts/release")
    """The folder to make."""
    title: str | None = Field(default=None, min_length=1)
    """The card's title; made from the model and hookpoint if not given."""
    description: str = ""
    """A paragraph of your own for the card."""
    licence: str = "apache-2.0"
    """The licence of the weights, by the hub's name for it."""
    licence_file: Path | None = None
    """The licence's text; needed for a licence that is not known here."""
    repo: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Upload to this repository of the hub (owner/name); nothing is uploaded if not given."""
    private: bool = False
    """Make the repository private if it is new; only with repo."""
    dry_run: bool = False
    """List the files and sizes; write and upload nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.private and self.repo is None:
            raise ConfigError(
                "private must go with repo", "no repo", "Name a repository, or leave private out."
            )
        if self.repo is not None:
            uploads.check_repo(self.repo)
        if self.licence not in LICENCES and self.licence_file is None:
            raise ConfigError(
                "licence must be known, or come with licence_file",
                repr(self.licence),
                nearest(self.licence, sorted(LICENCES)),
            )
        return self


class PublishedFile(NamedTuple):
    """A file of the release."""

    name: str
    n_bytes: int


class Publication(NamedTuple):
    """What was, or in a dry run would be, published."""

    files: tuple[PublishedFile, ...]
    folder: Path
    url: str | None
    """Where it was uploaded."""

    def __str__(self) -> str:
        width = max(len(file.name) for file in self.files)
        lines = [f"{file.name:<{width}}  {file.n_bytes:>14,} bytes" for file in self.files]
        total = sum(file.n_bytes for file in self.files)
        return "\n".join([*lines, f"{len(self.files)} files, {total:,} bytes"])


def publish(config: PublishConfig, *, fresh: bool = False) -> Publication:
    """Make the folder, and upload it if a repository is named; in a dry run, print what it would hold.

    Args:
        config: What to gather, and where it goes.
        fresh: Replace whatever stands at config.out.
    Raises:
        ArtifactError: a part is missing, or of another kind.
        MismatchError: report or atlas belong to another dictionary; or another release stands at config.out.
        CorruptError: a file of a part was changed.
        ResourceError: the hub cannot be reached or refuses.
    """
    if artifact.kind_of(config.dictionary) == "release":
        return _finished(config)
    parts = _parts(config)
    contents = _contents(config, parts)
    if config.dry_run:
        made = [PublishedFile(name, len(text.encode())) for name, text in contents.items()]
        copied = []
        for role, part in parts.items():
            files = _files(part)
            cleaned = private.clean(part, files)
            copied += [PublishedFile(f"{role}/{name}", cleaned.n_bytes(name, files[name])) for name in files]
        publication = Publication(tuple(sorted(made + copied)), config.out, None)
        print(publication)
        return publication
    folder = _write(config, parts, contents, fresh)
    names = sorted([artifact.META, *folder.meta["files"]])
    written = tuple(PublishedFile(name, (folder.path / name).stat().st_size) for name in names)
    url = None if config.repo is None else uploads.upload(folder, config.repo, private=config.private)
    return Publication(written, folder.path, url)


def _finished(config: PublishConfig) -> Publication:
    """A release that is there, as it is: what it holds, and where it was uploaded to."""
    config.check_inert(
        "report",
        "atlas",
        "out",
        "title",
        "description",
        "licence",
        "licence_file",
        without="a release is named",
    )
    if config.repo is None and not config.dry_run:
        raise ConfigError(
            "repo must be given for a release that is made already",
            "none",
            "Pass --repo owner/name to upload it, or --dry-run to see what it holds.",
        )
    folder = artifact.load(config.dictionary, "release")
    files = _files(folder)
    listed = tuple(PublishedFile(name, path.stat().st_size) for name, path in sorted(files.items()))
    if config.dry_run or config.repo is None:
        publication = Publication(listed, folder.path, None)
        print(publication)
        return publication
    return Publication(listed, folder.path, uploads.upload(folder, config.repo, private=config.private))


# -- the parts -------------------------------------------------------------------------------------


def _parts(config: PublishConfig) -> dict[str, artifact.Artifact]:
    """The artifacts by their role, which is also their folder; those of each dictionary together."""
    found = several.members(config.dictionary, "dictionary")
    if found:
        return several.together(found, config.report, config.atlas)
    parts = {"dictionary": artifact.load(config.dictionary, "dictionary")}
    for role, path in (("report", config.report), ("atlas", config.atlas)):
        if path is None:
            continue
        parts[role] = artifact.load(path, role)
        wanted, found = parts["dictionary"].fingerprint, parts[role].meta["parents"].get("dictionary", "none")
        if found != wanted:
            raise MismatchError(
                f"the {role} {path} must be of the dictionary {config.dictionary} ({wanted[:16]})",
                f"one of {found[:16]}",
                f"Make the {role} of this dictionary again.",
            )
    return parts


def _files(part: artifact.Artifact) -> dict[str, Path]:
    """An artifact's files by name, each checked against its hash."""
    files = {artifact.META: part.path / artifact.META}
    for name in part.meta["files"]:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise CorruptError(
                f"the {part.kind} {part.path} must hold files inside its own folder",
                repr(name),
                "Do not use it.",
            )
        files[name] = part.file(name, verify=True)
    return files


def _write(
    config: PublishConfig, parts: Mapping[str, artifact.Artifact], contents: Mapping[str, str], fresh: bool
) -> artifact.Artifact:
    parents = {role: part.fingerprint for role, part in parts.items()}
    if config.licence_file is not None:
        parents["licence"] = artifact.file_sha256(config.licence_file)
    identity = artifact.identity_of("release", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "release", identity)):
        return done
    named = config.replace(
        **{
            field: Path(value.name)
            for field in ("dictionary", "report", "atlas", "out", "licence_file")
            if (value := getattr(config, field)) is not None
        },
        repo=None,
        private=False,
    )
    assert named.identity() == config.identity()
    with artifact.building(
        config.out, kind="release", version=VERSION, config=named, parents=parents, fresh=fresh
    ) as work:
        for name, text in contents.items():
            (work.path / name).write_text(text, encoding="utf-8")
        for role, part in parts.items():
            files = _files(part)
            private.write(private.clean(part, files), files, work.path / role)
    return artifact.load(config.out, "release")


# -- the card --------------------------------------------------------------------------------------


def _contents(config: PublishConfig, parts: Mapping[str, artifact.Artifact]) -> dict[str, str]:
    """The files that are written for the release."""
    if "dictionary" in parts:
        return {CARD: _card(config, parts), LICENCE: _licence(config)}
    return {CARD: _card_of_several(config, parts), LICENCE: _licence(config), **several.extras(parts)}


def _licence(config: PublishConfig) -> str:
    if config.licence_file is not None:
        try:
            return config.licence_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "licence_file must be a text file",
                f"{config.licence_file} ({error})",
                "Change --licence-file.",
            ) from None
    title, url = LICENCES[config.licence]
    return f"The weights in dictionary/ are licensed under the {title}.\nIts text: {url}\n"


def _card(config: PublishConfig, parts: Mapping[str, artifact.Artifact]) -> str:
    about = parts["dictionary"].extra
    architecture, sites = about["architecture"], about.get("sites") or {}
    inputs, outputs = sites.get("inputs") or [], sites.get("outputs") or []
    places = ", ".join(site["hookpoint"] for site in inputs)
    if outputs != inputs:
        places += " to " + ", ".join(site["hookpoint"] for site in outputs)
    model = private.bare(inputs[0]["model"]) if inputs else None
    title = config.title or f"{architecture['kind']} dictionary" + (f" of {model}, {places}" if model else "")
    report = figures.open_report(parts["report"].path).data if "report" in parts else None
    lines = [*_front_matter(config, model), f"# {_line(title)}", ""]
    if config.description:
        lines += [config.description.strip(), ""]
    facts = {
        "architecture": architecture["kind"],
        "language model": model or "none",
        "reads and writes": places or "bare tensors",
        "latents": f"{about['d_sae']:,}",
        "d_in, d_out": f"{about['d_in']}, {about['d_out']}",
        "fingerprint": f"`{parts['dictionary'].fingerprint}`",
    }
    hidden = {"kind", "d_sae"}
    options = {k: v for k, v in architecture.items() if k not in hidden and v is not None}
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_line(str(value))} |" for name, value in (facts | options).items()]
    lines += ["", *_results(report), *_plots(parts), *_usage(parts)]
    lines += _credits(parts, [report] if report else [])
    return "\n".join([*lines, *_about_licence(config)])


def _about_licence(config: PublishConfig) -> list[str]:
    title = LICENCES.get(config.licence, (config.licence, ""))[0]
    return ["## Licence", "", f"{title}; see [LICENSE](LICENSE).", ""]


def _card_of_several(config: PublishConfig, parts: Mapping[str, artifact.Artifact]) -> str:
    """A card for all: what they have in common, a row for each, how to load one."""
    about = [part.extra for role, part in parts.items() if role.startswith("dictionary/")]
    kinds = sorted({one["architecture"]["kind"] for one in about})
    models = {
        private.bare(site["model"]) for one in about for site in (one.get("sites") or {}).get("inputs", ())
    }
    model = models.pop() if len(models) == 1 else None
    title = config.title or f"{len(about)} {', '.join(kinds)} dictionaries" + (
        f" of {model}" if model else ""
    )
    lines = [*_front_matter(config, model), f"# {_line(title)}", ""]
    if config.description:
        lines += [config.description.strip(), ""]
    shared = {
        name: value
        for name, value in about[0]["architecture"].items()
        if value is not None and all(one["architecture"].get(name) == value for one in about)
    }
    facts = {
        "language model": model or ", ".join(sorted(models)) or "none",
        "dictionaries": len(about),
    } | shared
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_line(str(value))} |" for name, value in facts.items()]
    lines += ["", *several.results(parts), *_usage(parts)]
    reports = [
        figures.open_report(part.path).data for role, part in parts.items() if role.startswith("report/")
    ]
    lines += [*_credits(parts, reports), *_about_licence(config)]
    return "\n".join(lines)


def _front_matter(config: PublishConfig, model: str | None) -> list[str]:
    """What the hub reads. JSON strings are YAML strings, whatever is in them."""
    lines = [
        "---",
        f"license: {json.dumps(config.licence if config.licence in LICENCES else 'other')}",
        'library_name: "sememe"',
        'tags: ["sparse-autoencoder", "interpretability", "dictionary-learning"]',
    ]
    if model is not None and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        lines.append(f"base_model: {json.dumps(model)}")
    return [*lines, "---", ""]


def _results(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return []
    table = figures.headline_table({"this dictionary": report})
    text = report["text"]
    lines = [
        "## Results",
        "",
        f"On {text['n_rows_kept']:,} tokens of {text['n_documents']:,} held-out documents; in brackets the 95% "
        "interval over documents. The nulls are controls at the same l0.",
        "",
        markdown_table(table),
        "",
    ]
    lines += [f"- `{name}`: {MEANINGS[name]}" for name in table.columns if name in MEANINGS]
    return [*lines, "", "More in [report/report.md](report/report.md).", ""]


def _plots(parts: Mapping[str, artifact.Artifact]) -> list[str]:
    """The report's figures that say most, as far as it has them."""
    there = parts["report"].meta["files"] if "report" in parts else {}
    shown = {f"figures/{name}.svg": text for name, text in PLOTS.items()}
    return [
        line for file, text in shown.items() if file in there for line in (f"![{text}](report/{file})", "")
    ]


def _usage(parts: Mapping[str, artifact.Artifact]) -> list[str]:
    place = next(role for role in parts if role.split("/")[0] == "dictionary")
    lines = [
        "## Use",
        "",
        "```python",
        "from pathlib import Path",
        "",
        *uploads.opened(uploads.LOCAL_FOLDER).splitlines(),
        f'dictionary = dictionaries.load(folder / "{place}")',
        "encoded = dictionary.encode(x)            # x: (batch, d_in) float32, the model's own activations",
        "recon = dictionary.decode(encoded, x)",
        "```",
        "",
    ]
    if any(role.split("/")[0] == "atlas" for role in parts):
        lines += ["`sememe browse atlas` shows every latent: where it fires and what it writes.", ""]
    return lines


def _credits(parts: Mapping[str, artifact.Artifact], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whom the corpora's licences ask to name, for the texts shown in atlases and reports."""
    items: list[Mapping[str, Any]] = [item for report in reports for item in report.get("attributions", ())]
    for part in parts.values():
        if part.kind == "atlas":
            opened = open_atlas(part.path)
            items += opened.meta.get("attributions", ())
            opened.close()
    texts: dict[str, None] = {}
    for item in items:
        told = [
            private.bare(str(item[key])) for key in ("title", "licence", "url", "notice") if item.get(key)
        ]
        texts[_line("; ".join(told))] = None
    if not texts:
        return []
    return [
        "## Texts",
        "",
        "Examples and numbers come from these texts:",
        "",
        *(f"- {text}" for text in texts),
        "",
    ]


def _line(text: str) -> str:
    """Text that stays on its line and in its table cell."""
    return " ".join(text.split()).replace("|", "\\|")
