"""The docs are true: a page per verb and dictionary, a README line per room, links that lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from cyclopts import App, CycloptsError

from sememe.cli import VERBS, flags, kinds, toys, verbs
from sememe.dictionaries import REGISTRY, TRAINABLE
from sememe.errors import SememeError
from sememe.fit import KINDS
from sememe.lm.build import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"models"}))
def test_every_verb_has_a_page(verb):
    page = ROOT / "docs" / f"{verb}.md"
    assert page.is_file() and f"sememe {verb}" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_every_dictionary_has_a_page(kind):
    assert (ROOT / "docs" / "dictionaries" / f"{kind}.md").is_file()


@pytest.mark.parametrize(
    "name",
    ["formats", "glossary", "log", "benchmarks", "text", "lm", "atlas", "metrics", "topologies", "judge"],
)
def test_the_other_pages_are_there(name):
    assert (ROOT / "docs" / f"{name}.md").is_file()


def test_readme_has_a_line_for_every_file_and_folder_of_the_package():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "sememe").iterdir()):
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").is_file()):
            name = path.name + ("/" if path.is_dir() else "")
            assert re.search(rf"^\s*{re.escape(name)}\s+\S", readme, re.M), f"README's file map lacks {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


KINDS_OF = {
    "train": set(TRAINABLE),
    "toy": {*TRAINABLE, "fitted", "superposed", "layered"},
    "fit": set(KINDS),
    "pretrain": {"gpt2", "llama", *PRESETS},
}
"""Verbs whose first word is a kind."""
COMMAND = re.compile(r"^(?:\s*|.*`)sememe ([a-z]+)(?: ([^\s`]+))?", re.M)


def commands_that_are_not_there(text):
    """Lines of code whose verb, or whose verb's kind, the command line does not know."""
    code = "\n".join(
        [*re.findall(r"^ {4}(sememe .*)$", text, re.M), *re.findall(r"`(sememe [^`\n]+)`", text)]
        + [
            line
            for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
            for line in block.splitlines()
        ]
    )
    found = []
    for verb, kind in COMMAND.findall(code):
        named = verb in KINDS_OF and kind and re.fullmatch(r"[a-z]\w*", kind)
        if verb not in VERBS or (named and kind not in KINDS_OF[verb]):
            found.append(f"sememe {verb} {kind}".strip())
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_there(page):
    assert not commands_that_are_not_there(page.read_text(encoding="utf-8"))


def test_a_wrong_command_would_be_seen():
    text = "    sememe pretrain gpt --track wandb\n`sememe evalute x`\n"
    text += "```sh\nsememe train topk\nsememe fit pcaa\n```\n"
    assert commands_that_are_not_there(text) == ["sememe pretrain gpt", "sememe evalute x", "sememe fit pcaa"]


WHOLE_PAGES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]
PLACES = {"run", "plan", "models"}
"""Verbs that have no config."""


def command_lines(text):
    """The words of every command in a block of code, of its whole line, without what is left out (...)."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    for line in [*"".join(blocks).splitlines(), *re.findall(r"^ {4}(\S.*)$", text, re.M)]:
        if line.startswith("sememe "):
            yield [word for word in shlex.split(line, comments=True)[1:] if word != "..."]


def config_of(words):
    """The config that a command line makes; its verb is not called. None for verbs without one."""
    made = getattr(verbs, VERBS[words[0]].target)
    if not isinstance(made, App):
        alone, made = made, App(result_action="return_value")
        made.default(alone)
    # no such folder is there, and nothing is fetched
    given = [word.replace("hf://", "theirs/") for word in words[1:]]
    if words[0] in PLACES:
        made.parse_args(given, exit_on_error=False, print_error=False)
        return None
    return made(given, exit_on_error=False, print_error=False)


@pytest.fixture
def only_configs(monkeypatch, tmp_path):
    """Commands return their config in place of what their verb does."""

    def command(config, verb, **options):
        return flags.command(config, lambda built, **extra: built, **options)

    for room in (kinds, toys, verbs):
        monkeypatch.setattr(room, "command", command)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", WHOLE_PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_make_their_config(page, only_configs):
    wrong = []
    for words in command_lines(page.read_text(encoding="utf-8")):
        try:
            assert words[0] in PLACES or config_of(words) is not None
        except (SememeError, CycloptsError) as error:
            wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_command_without_a_config_would_be_seen(only_configs):
    text = "    sememe trace A B --prompts x \\\n        --ablation zero --answers y  # one\n"
    text += "```\nsememe trace A ...\n```\n"
    (first, second) = sorted(command_lines(text), key=len, reverse=True)
    assert second == ["trace", "A"] and config_of(second).dictionaries == (Path("A"),)
    with pytest.raises(SememeError, match="wrong must be one for all 1 prompts"):
        config_of(first)


PLACEHOLDER = re.compile(r"\b[A-Z][A-Z0-9_-]*-FIGURES\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_waits_for_its_figures(page):
    assert PLACEHOLDER.search("as in SUPERPOSED-FIGURES.") and not PLACEHOLDER.search(
        "its FIGURES, and -FIGURES"
    )
    found = PLACEHOLDER.findall(page.read_text(encoding="utf-8"))
    assert not found, f"{page.name}: {', '.join(found)} stands where figures are missing"


def test_no_page_names_a_machines_paths_or_a_registrys_host():
    for path in [*PAGES, *sorted((ROOT / "sememe").rglob("*.py")), *sorted((ROOT / "runs").glob("*.toml"))]:
        text = path.read_text(encoding="utf-8")
        for word in (
            "/work/",
            "../shared",
            "files.pythonhosted",
            "pypi.org",
            "registry.npmjs",
            "deb.debian.org",
        ):
            assert word not in text, f"{path.name} mentions {word}"
