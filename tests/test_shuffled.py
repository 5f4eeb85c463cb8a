"""The null on shuffled weights is read on the shuffled model by every verb that runs texts through its dictionary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from atlas_fixture import World, make_world

from sememe import lm as language_models
from sememe.atlas import open_atlas
from sememe.effects import EffectsConfig, effects
from sememe.errors import MismatchError
from sememe.interpret import interpret
from sememe.live import LiveConfig, Session
from sememe.lm import LanguageModel
from sememe.prompt import PromptConfig, prompt

TEXT = "the river runs past the old town"
SEED = 3


class Null(NamedTuple):
    world: World
    atlas: Path
    lm: LanguageModel
    """The shuffled model."""


@pytest.fixture(scope="module")
def null(tmp_path_factory: pytest.TempPathFactory) -> Null:
    world = make_world(tmp_path_factory.mktemp("world"))
    config = world.config("atlas", n_tokens=2000, nulls=("randomised",), seed=SEED)
    interpret(config, lm=world.lm).close()
    shuffled = language_models.load(world.model.replace(randomise="layers", randomise_seed=SEED))
    return Null(world, world.root / "atlas" / "null-randomised", shuffled)


def losses(lm: LanguageModel, ids: list[int]) -> list[float]:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logs = lm.logits(lm.hidden(tokens))[0].double().log_softmax(-1)
    return [-float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1)]


def test_effects_find_the_null_s_dictionary_and_run_the_shuffled_model(null: Null) -> None:
    options: dict[str, Any] = {
        "atlas": null.atlas, "model": null.world.model, "n_latents": 4, "n_top": 3, "n_removals": 0,
    }  # fmt: skip
    config = EffectsConfig.build({**options, "out": null.world.root / "effects"})
    made = effects(config)
    assert made.artifact.meta["parents"]["model"] == null.lm.fingerprint
    opened = open_atlas(null.atlas, effects=made.artifact.path)
    rows = opened.query(
        "SELECT f.loss, f.position, token_ids FROM effects f JOIN contexts c ON c.id = context "
        "WHERE loss IS NOT NULL"
    )
    opened.close()
    assert len(rows) > 3
    for row in rows:
        at = row["position"]
        assert row["loss"] == pytest.approx(losses(null.lm, row["token_ids"])[at], rel=1e-3)
        assert abs(row["loss"] - losses(null.world.lm, row["token_ids"])[at]) > 1e-4
    for given in ({"lm": null.world.lm}, {}):
        model = null.world.model if given else null.world.model.replace(randomise="layers", randomise_seed=9)
        with pytest.raises(MismatchError, match=r"must be .*(Pass --model|Leave --randomise out)"):
            effects(config.replace(model=model, out=null.world.root / "bad"), **given)


def test_a_prompt_and_the_browser_s_process_run_the_shuffled_model(null: Null, tmp_path: Path) -> None:
    config = PromptConfig(
        prompt=TEXT, dictionary=null.atlas / "dictionary", atlas=null.atlas, model=null.world.model
    )
    view = prompt(config)
    found = [token.loss_of_next for token in view.tokens[:-1]]
    ids = [token.token for token in view.tokens]
    assert found == pytest.approx(losses(null.lm, ids), rel=1e-4)
    assert found != pytest.approx(losses(null.world.lm, ids), rel=1e-3)
    assert "randomised: layers, seed 3" in view.model and view.rows
    session = Session(LiveConfig(atlas=null.atlas, dictionary=null.atlas / "dictionary"))
    answer = session.answer("prompt", {"text": TEXT}, lambda done, of: None)
    assert [t["loss_of_next"] for t in answer["tokens"][:-1]] == pytest.approx(found, rel=1e-4)
    with pytest.raises(MismatchError, match=r"must be run on the model with its weights shuffled .*Leave"):
        prompt(config, lm=null.world.lm)
    shutil.copytree(null.atlas / "dictionary", tmp_path / "moved")
    with pytest.raises(MismatchError, match=r"must lie inside its atlas.*Name the folder `dictionary`"):
        prompt(config.replace(dictionary=tmp_path / "moved"))
