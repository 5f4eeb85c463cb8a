"""Dictionaries of the model with shuffled weights as nulls: measured there, checked, in reports and recipes."""

import json

import pytest
from evaluate_world import HOOKPOINT, POLICY, World, make_world
from small_world import write_recipe

from sememe.compare import CompareConfig, compare
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ConfigError, MismatchError
from sememe.evaluate import EvaluateConfig, evaluate
from sememe.harvest import HarvestConfig, harvest
from sememe.lm import ModelConfig
from sememe.recipe import read_recipe, stages
from sememe.text import TextConfig
from sememe.train import TrainConfig, train

TEXT = {"heldout_fraction": 0.2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """A store and a dictionary of the model, and the same of it with shuffled layers."""
    world = make_world(tmp_path_factory.mktemp("twins"))
    for name, randomise in (("own", "none"), ("twin", "layers")):
        model = ModelConfig(model=str(world.place / "model"), dtype="float32", randomise=randomise)
        text = TextConfig.build({"corpus": (str(world.corpus),), **TEXT})
        store = world.place / f"{name}_store"
        harvest(
            HarvestConfig(
                out=store, model=model, text=text, policy=POLICY, hookpoints=(HOOKPOINT,), n_tokens=2000
            )
        )
        train(
            TrainConfig(
                store=store,
                out=world.place / name,
                architecture=TopKConfig(k=3, d_sae=32),
                batch_size=64,
                epochs=2,
            )
        )
    return world


def options(world: World, out: str, **changes: object) -> dict:
    """What evaluate and compare share here."""
    return {
        "model": {"model": str(world.place / "model"), "dtype": "float32"},
        "text": {"corpus": (str(world.corpus),), **TEXT},
        "n_tokens": 600,
        "n_fit_rows": 400,
        "n_bootstrap": 20,
        "nulls": ("untrained",),
        "out": world.place / out,
        **changes,
    }


def test_a_twin_is_measured_on_its_own_model_and_stands_among_the_nulls(world):
    ours = options(world, "report", dictionary=world.place / "own", twins=(world.place / "twin",))
    report = evaluate(EvaluateConfig.build(ours)).data
    assert list(report["nulls"]) == ["untrained", "randomised: twin"]
    there = report["nulls"]["randomised: twin"]
    assert set(there) == set(report["nulls"]["untrained"]) and there["fvu"]["low"] is not None
    for groups in (report["by_language"], report["by_source"]):
        assert all("randomised: twin" in group["nulls"] for group in groups.values())
    assert "randomised: twin" in report["density"] and report["null_configs"]["randomised: twin"]["k"] == 3
    # by itself, on the shuffled model, it scores the same
    alone = options(world, "alone", dictionary=world.place / "twin", nulls=())
    alone["model"]["randomise"] = "layers"
    itself = evaluate(EvaluateConfig.build(alone)).data["metrics"]
    for name in ("fvu", "l0", "ce_increase", "ce_recovered_zero"):
        assert there[name] == itself[name], name


def test_a_comparison_has_the_twin_as_a_null_of_its_own(world):
    both = (world.place / "own", world.place / "twin")
    with pytest.raises(MismatchError, match="must belong to one model"):
        compare(CompareConfig.build(options(world, "refused", dictionaries=both)))
    other = world.place / "other"
    train(
        TrainConfig(
            store=world.place / "own_store",
            out=other,
            architecture=TopKConfig(k=4, d_sae=32),
            batch_size=64,
            epochs=1,
        )
    )
    config = options(
        world, "comparison", dictionaries=(world.place / "own", other), twins=(world.place / "twin",)
    )
    saved = compare(CompareConfig.build(config))
    data = json.loads((saved.path / "comparison.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["randomised: twin"]["null"] and rows["randomised: twin"]["group"] == "null: randomised: twin"
    report = json.loads((world.place / "report" / "report.json").read_text())
    assert rows["randomised: twin"]["metrics"]["fvu"] == report["nulls"]["randomised: twin"]["fvu"]
    assert saved.meta["parents"]["randomised: twin"]
    assert "randomised: twin" in (saved.path / "comparison.html").read_text()


def test_what_is_no_twin_is_refused(world):
    config = options(world, "no", dictionary=world.place / "own", twins=(world.place / "own",))
    with pytest.raises(
        MismatchError,
        match=r"a twin must be trained on the model .* with its weights shuffled, got .*own, of .* "
        r"Harvest with --randomise layers",
    ):
        evaluate(EvaluateConfig.build(config))
    with pytest.raises(ConfigError, match="twins must be left out when no language model runs"):
        CompareConfig.build({"dictionaries": ("a", "b"), "directions_only": True, "twins": ("c",)})


def test_a_twin_of_another_place_is_refused_before_anything_runs(world):
    transcoder = world.place / "transcoder"
    train(
        TrainConfig(
            store=world.store,
            out=transcoder,
            inputs=("mlp_in.2",),
            outputs=("mlp_out.2",),
            architecture=TopKConfig(k=3, d_sae=32),
            batch_size=64,
            epochs=1,
        )
    )
    config = options(world, "elsewhere", dictionary=transcoder, twins=(world.place / "twin",))
    config["text"]["heldout_fraction"] = 0.3
    with pytest.raises(
        MismatchError,
        match=r"a twin must read and write where a dictionary beside it does, mlp_in.2 -> mlp_out.2, got "
        rf"{HOOKPOINT} of randomised: twin. Train one there on the shuffled model, or leave it out",
    ):
        evaluate(EvaluateConfig.build(config))


def test_a_recipe_s_twin_stands_beside_dictionaries_of_its_own_place_only(tmp_path):
    recipe = write_recipe(tmp_path, "").read_text()
    a, b = (
        recipe.split("[train.architecture]", 1)[0],
        "[train.architecture]" + recipe.split("[train.architecture]", 1)[1],
    )
    body, rest = b.split("[evaluate]", 1)
    own = body.replace("[train.architecture]", "[train.own.architecture]")
    far = '[train.far]\ninputs = ["mlp_in.1"]\n' + body.replace(
        "[train.architecture]", "[train.far.architecture]"
    )
    file = tmp_path / "places.toml"
    file.write_text(f"{a}{own}{far}[twin]\nof = 'own'\n[evaluate]{rest}")
    found = {stage.label: stage for stage in stages(read_recipe(file), tmp_path / "out")}
    assert found["evaluate own"].config.twins == (tmp_path / "out" / "twin" / "own",)
    assert found["evaluate far"].config.twins == ()


def test_a_recipe_makes_the_twin(tmp_path):
    recipe = (
        write_recipe(tmp_path, "").read_text().replace("epochs = 3", "epochs = 1").replace("= 6000", "= 2000")
    )
    recipe = recipe.replace("n_tokens = 1500", "n_tokens = 600\nn_fit_rows = 400\nnulls = []")
    file = tmp_path / "twin.toml"
    file.write_text(recipe.replace("[evaluate]", "[twin]\n[evaluate]"))
    for old, new, message in (
        (
            "[twin]",
            "[twin]\nof = 'two'",
            r"\[twin\] must be of a single dictionary that the recipe trains, got 'two'",
        ),
        ("[twin]", "[twin]\nseed = 1", r"an option of \[twin\] must be known, got 'seed'"),
        ("[train.architecture]", "[train.twin.architecture]", "a dictionary must not be named twin"),
    ):
        wrong = tmp_path / "wrong.toml"
        wrong.write_text(file.read_text().replace(old, new))
        with pytest.raises(ConfigError, match=message):
            read_recipe(wrong)
    found = {stage.label: stage for stage in stages(read_recipe(file), tmp_path / "out")}
    assert list(found)[:5] == ["harvest", "harvest twin", "train twin", "train", "evaluate"]
    own, twin = found["harvest"].config.resolved(), found["harvest twin"].config.resolved()
    assert twin.pop("out") == str(tmp_path / "out" / "twin" / "store")
    assert twin["model"].pop("randomise") == "layers" and own["model"].pop("randomise") == "none"
    assert twin == {name: value for name, value in own.items() if name != "out"}
    trained, twins = found["train twin"], tmp_path / "out" / "twin" / "dictionary"
    assert trained.path == trained.config.out == twins
    assert trained.config.store == tmp_path / "out" / "twin" / "store"
    assert trained.config.architecture == found["train"].config.architecture
    assert found["evaluate"].config.twins == (twins,)
