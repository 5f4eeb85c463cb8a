"""docs/coverage.md names commands, kinds, recipes, nulls and options that are there."""

import re
from pathlib import Path

import pytest

from sememe.cli import VERBS
from sememe.concepts import ConceptsConfig
from sememe.dictionaries import TRAINABLE
from sememe.effects import EffectsConfig
from sememe.evaluate import NULLS, EvaluateConfig
from sememe.explain import ExplainConfig
from sememe.explain.config import SCORERS
from sememe.fit import KINDS, FitConfig
from sememe.geometry import GeometryConfig
from sememe.harvest import HarvestConfig
from sememe.interpret import InterpretConfig
from sememe.lm.build import PRESETS
from sememe.options import flags_of
from sememe.patch import PatchConfig
from sememe.pretrain import PretrainConfig
from sememe.toy import ToyConfig
from sememe.trace import TraceConfig
from sememe.train import TrainConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
CONFIGS = (
    *(TrainConfig, FitConfig, EvaluateConfig, GeometryConfig, InterpretConfig, ExplainConfig, EffectsConfig),
    *(HarvestConfig, PretrainConfig, ConceptsConfig, PatchConfig, TraceConfig),
)
OTHERS = {"grid", "published", "live"}
"""Flags that are a command's own, not its config's."""


def code() -> list[str]:
    """What stands in backticks, in commands' order."""
    return re.findall(r"`([^`\n]+)`", PAGE)


def test_every_command_is_there():
    named = {words[1]: words for words in (text.split() for text in code()) if words[0] == "sememe"}
    assert set(named) <= set(VERBS) and len(named) > 15
    kinds = {
        "train": set(TRAINABLE),
        "toy": {*TRAINABLE, "fitted", "superposed", "layered"},
        "fit": set(KINDS),
        "pretrain": {"gpt2", "llama", *PRESETS},
    }
    for text in code():
        words = text.split()
        if words[0] == "sememe" and len(words) > 2 and words[1] in kinds and not words[2].startswith("-"):
            assert words[2] in kinds[words[1]], text


def test_every_recipe_is_there():
    recipes = set(re.findall(r"runs/\w+\.toml", PAGE))
    assert len(recipes) >= 7
    assert all((ROOT / recipe).is_file() for recipe in recipes)


def test_every_option_is_there():
    known = {flag.name for config in CONFIGS for flag in flags_of(config)}
    known |= {f"planted_{name}" for name in ToyConfig.model_fields} | OTHERS
    for flag in set(re.findall(r"--([a-z][\w-]*)", " ".join(code()))):
        name = flag.replace("-", "_").removesuffix("_")
        if not name.endswith("*") and name != "planted":
            assert name in known or name.removeprefix("no_") in known, flag


@pytest.mark.parametrize(("said", "there"), [("--nulls", NULLS), ("--scorers", SCORERS)])
def test_every_value_is_there(said, there):
    for text in code():
        found = re.search(rf"{said} (\w+)", text)
        assert found is None or found[1] in there, text


def test_what_is_not_there_says_so():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "|---" not in line]
    assert len(rows) > 100
    assert all(line.count("|") >= 3 and line.rstrip("| ").strip() for line in rows)
    assert sum("**no**" in row for row in rows) >= 5 and "**open**" not in PAGE, "a command, or a refusal"
    for row in rows:
        if "**no**" in row:
            assert re.search(r"\*\*no\*\*(: | option \w+ )\w+.{20}", row), f"a refusal needs a reason: {row}"
