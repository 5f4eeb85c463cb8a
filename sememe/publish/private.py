"""Parts of a release without the paths of the machine they were made on: of each only its last name stays.

Knows the layout of an artifact and of an atlas's database, not what a path is for. Identity and fingerprint stay
those of the artifact as it was made, by which its children know it; the hashes of files that change are renewed.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import duckdb

from sememe import artifact
from sememe.atlas import DATABASE

__all__ = ["Cleaned", "as_json", "bare", "clean", "write"]

TEXTS = {".html", ".json", ".jsonl", ".md", ".svg", ".txt"}
PATH_KEYS = {
    "against",
    "atlas",
    "dictionaries",
    "dictionary",
    "explanations",
    "lens",
    "out",
    "path",
    "report",
    "store",
}
"""Options that are paths whatever they look like; elsewhere `owner/name` may be a name on the hub."""
ROOTS = (
    "Users|Volumes|content|data|home|kaggle|media|mnt|opt|private|root|scratch|srv|tmp|usr|var|work|workspace"
)
LOCAL = re.compile(
    rf"""(?:(?:hf|file)://)?
    (?: /(?:{ROOTS})/[^\n]+            # a machine's own folders, with spaces and all
      | /[^/\s]{{2,}}/[^\s]+            # other roots, of more letters than /r/name has
      | /[^/\s]+/[^/\s]+/[^\n]+         # or with more folders below
      | (?:~[^/\s]*/|\.{{1,2}}/|[A-Za-z]:[\\/])[^\n]* )""",
    re.VERBOSE,
)
"""What looks like a place on a machine. What merely begins with a slash does not: `/r/AskReddit`, `/`, ` /s`."""


class Cleaned(NamedTuple):
    """A part's meta.json and those of its other texts that change; the atlas's database is done in `write`."""

    meta: dict[str, Any]
    texts: dict[str, bytes]

    def n_bytes(self, name: str, path: Path) -> int:
        """The size of a file once cleaned (an atlas's database: as it is)."""
        if name == artifact.META:
            return len(as_json(self.meta))
        return len(self.texts[name]) if name in self.texts else path.stat().st_size


def bare(text: str) -> str:
    """The last name of an absolute, home or dotted path, also behind hf:// or file://; other text as it is."""
    return _last(text.replace("\\", "/"), text) if LOCAL.fullmatch(text) else text


def _last(path: str, text: str) -> str:
    """The last name of a path; the text itself where it has none."""
    return PurePosixPath(path).name or text


def clean(part: artifact.Artifact, files: Mapping[str, Path]) -> Cleaned:
    """What of a part's texts is published; `files` are its files by name."""
    found: dict[str, str] = {}
    meta = _strip(part.meta, found)
    contents = {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if path.suffix in TEXTS and name != artifact.META
    }
    new = {
        name: as_json(_strip(json.loads(text), found)).decode() if name.endswith(".json") else text
        for name, text in contents.items()
    }
    for name, text in new.items():
        new[name] = _without(text, found)
    texts = {name: text.encode() for name, text in new.items() if _differs(name, text, contents[name])}
    for name, content in texts.items():
        meta["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return Cleaned(meta, texts)


def write(cleaned: Cleaned, files: Mapping[str, Path], folder: Path) -> None:
    """Write a part into a folder; `files` are its files by name."""
    meta = cleaned.meta | {"files": dict(cleaned.meta["files"])}
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in cleaned.texts:
            target.write_bytes(cleaned.texts[name])
        elif name == DATABASE and _write_database(path, target):
            meta["files"][name] = {"bytes": target.stat().st_size, "sha256": artifact.file_sha256(target)}
        elif name not in (artifact.META, DATABASE):
            shutil.copyfile(path, target)
    (folder / artifact.META).write_bytes(as_json(meta))


def as_json(value: Any) -> bytes:
    """A JSON file of a release."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _differs(name: str, new: str, old: str) -> bool:
    """Whether anything was taken out; the way JSON is laid out does not matter."""
    return json.loads(new) != json.loads(old) if name.endswith(".json") else new != old


def _strip(value: Any, found: dict[str, str], key: str = "") -> Any:
    """Plain data with bare names for local paths; these are noted in `found`, old to new."""
    if isinstance(value, dict):
        return {_strip(name, found): _strip(inner, found, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_strip(inner, found, key) for inner in value]
    if not isinstance(value, str):
        return value
    new = _last(value, value) if key in PATH_KEYS else bare(value)
    if new != value:
        found[value] = new
    return new


def _without(text: str, found: Mapping[str, str]) -> str:
    """Running text with the paths in `found` replaced where they stand alone, the longest first."""
    for path in sorted(found, key=len, reverse=True):
        for old, new in ((path, found[path]), (html.escape(path), html.escape(found[path]))):
            text = new.join(re.split(rf"(?<![\w./:<~-]){re.escape(old)}(?![\w/-])", text))
    return text


def _write_database(source: Path, target: Path) -> bool:
    """Copy an atlas's database; True if it held local paths and was made anew without them."""
    with duckdb.connect(str(source), read_only=True) as database:
        facts = {
            key: json.loads(value)
            for key, value in database.execute("SELECT key, value FROM meta").fetchall()
        }
        names = [name for (name,) in database.execute("SELECT DISTINCT source FROM documents").fetchall()]
    new_facts = {key: new for key, value in facts.items() if (new := _strip(value, {})) != value}
    new_names = {name: bare(name) for name in names if bare(name) != name}
    if not new_facts and not new_names:
        shutil.copyfile(source, target)
        return False
    # By way of a second file: a database that is changed in place still holds what was there before.
    aside = target.with_name(f".{target.name}")
    shutil.copyfile(source, aside)
    with duckdb.connect() as database:
        database.execute(f"ATTACH '{_quoted(aside)}' AS held")
        database.execute(f"ATTACH '{_quoted(target)}' AS fresh")
        for key, value in new_facts.items():
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            database.execute("UPDATE held.meta SET value = ? WHERE key = ?", [text, key])
        for old, new in new_names.items():
            database.execute("UPDATE held.documents SET source = ? WHERE source = ?", [new, old])
        database.execute("COPY FROM DATABASE held TO fresh")
    aside.unlink()
    return True


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
