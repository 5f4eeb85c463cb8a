"""What the tests of explanations by a language model share: options, and scores by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from judge_server import JudgeServer

from sememe.explain import ExplainConfig
from sememe.explain.config import SCORERS

WORDS = [s for s in SCORERS if s not in ("embedding", "generation")]
KING, ENDINGS, NUMBERS, CYRILLIC, NOISE, DEAD = 0, 1, 2, 3, 7, 8


def config(atlas: Path, out: Path, server: JudgeServer, **changes: Any) -> ExplainConfig:
    explainer = {
        "kind": "endpoint",
        "base_url": server.url,
        "model": "rule",
        "backoff_seconds": 0.01,
        "answers": out.parent / "answers.sqlite",
    } | changes.pop("explainer", {})
    options = {"atlas": atlas, "out": out, "explainer": explainer, "scorers": WORDS, "n_bootstrap": 50}
    return ExplainConfig.build(options | changes)


def whole(found: Any) -> dict[tuple[int, str, str], float | None]:
    return {
        (r["latent"], r["scorer"], r["variant"]): r["score"] for r in found.scores() if r["decile"] is None
    }
