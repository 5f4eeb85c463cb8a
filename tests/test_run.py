"""Recipes: end to end on a small world, skipped the second time, and told what is wrong before anything runs."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from small_world import write_corpus, write_model, write_recipe

from sememe import artifact
from sememe.atlas import open_atlas
from sememe.errors import ArtifactError, ConfigError, MismatchError
from sememe.explain.results import SHAPE
from sememe.recipe import place_of, read_recipe, stages
from sememe.run import print_report, run

INTERPRET = "[interpret]\nn_tokens = 6000\nmap = false\nnulls = ['pca']\nn_fit_rows = 500\n[prompts]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("run")
    write_corpus(place / "corpus.jsonl", n_documents=300)
    write_model(place / "model")
    write_recipe(place, INTERPRET)
    run(place / "small.toml", out=place / "out")
    return place


def test_everything_lands_where_the_docs_say(place):
    for kind in ("store", "dictionary", "report", "atlas", "prompts", "site"):
        assert (place / "out" / kind / "meta.json").is_file(), kind
    assert (place / "out" / "atlas" / "null-pca" / "meta.json").is_file()
    report = json.loads((place / "out" / "report" / "report.json").read_text())
    for name in ("fvu", "l0", "frac_alive", "ce_recovered_zero", "ce_recovered_mean", "kl"):
        assert "value" in report["metrics"][name], name
    assert set(report["nulls"]) == {"pca", "untrained"}
    assert (place / "out" / "site" / "index.html").is_file()


def test_the_second_run_makes_nothing(place, capsys):
    results = run(place / "small.toml", out=place / "out")
    assert all(result.reused for result in results)
    out = capsys.readouterr().out
    assert "was there" in out and "index.html" in out and "peak GB" in out


def test_a_changed_recipe_is_refused_and_fresh_replaces(place, tmp_path):
    changed = tmp_path / "changed.toml"
    changed.write_text((place / "small.toml").read_text().replace("k = 4", "k = 5"))
    before = (place / "out" / "dictionary" / "meta.json").read_bytes()
    with pytest.raises(MismatchError, match=r"dictionary at .* identity"):
        run(changed, out=place / "out")
    assert (place / "out" / "dictionary" / "meta.json").read_bytes() == before


def test_several_dictionaries_share_a_store(place, tmp_path):
    recipe = (place / "small.toml").read_text().replace("[train.architecture]", "[train.two.architecture]")
    recipe = recipe.replace("epochs = 3", "epochs = 1\n[train.one.architecture]\nkind = 'relu'\nd_sae = 40")
    recipe = recipe[: recipe.index("[evaluate]")]
    (tmp_path / "two.toml").write_text(recipe)
    parsed = read_recipe(tmp_path / "two.toml")
    assert set(parsed.dictionaries) == {"one", "two"}
    assert parsed.dictionaries["one"] == {
        "batch_size": 64,
        "epochs": 1,
        "architecture": {"kind": "relu", "d_sae": 40},
    }


def test_a_sweep_makes_a_dictionary_and_a_report_for_each(place, tmp_path):
    recipe = (place / "small.toml").read_text().replace("epochs = 3", "epochs = 1\nsweep = {k = [2, 4]}")
    recipe = recipe.replace("k = 4\n", "").replace(INTERPRET, "")
    (tmp_path / "swept.toml").write_text(recipe.replace("n_tokens = 1500", "n_tokens = 600"))
    run(tmp_path / "swept.toml", out=tmp_path / "out")
    assert (tmp_path / "out" / "dictionary" / "index.json").is_file()
    fvu = {}
    for name in ("k2", "k4"):
        assert (tmp_path / "out" / "dictionary" / name / "meta.json").is_file()
        report = json.loads((tmp_path / "out" / "report" / name / "report.json").read_text())
        fvu[name] = report["metrics"]["fvu"]["value"]
    assert fvu["k4"] < fvu["k2"]
    results = run(tmp_path / "swept.toml", out=tmp_path / "out")
    assert all(result.reused for result in results)
    stages = [result.stage for result in results if not result.stage.startswith(("interpret", "export"))]
    assert stages == ["harvest", "train", "evaluate k2", "evaluate k4"]
    assert [result.stage for result in results][-2:] == ["export k2", "export k4"], "after the last report"
    for name in ("k2", "k4"):
        site = artifact.load(tmp_path / "out" / "site" / name, "site")
        assert {"report", "report.0", "report.1"} <= set(site.meta["parents"]), (
            "it stands on its sweep's frontier"
        )


def test_a_recipe_can_end_in_a_comparison(place, tmp_path, capsys):
    recipe = (place / "small.toml").read_text().replace("epochs = 3", "epochs = 1\nsweep = {k = [2, 4]}")
    recipe = recipe.replace("k = 4\n", "")
    recipe = (
        recipe[: recipe.index("[evaluate]")]
        + "[compare]\nn_tokens = 600\nn_fit_rows = 500\nnulls = ['pca']\n"
    )
    (tmp_path / "compared.toml").write_text(recipe)
    results = run(tmp_path / "compared.toml", out=tmp_path / "out")
    assert [result.stage for result in results] == ["harvest", "train", "compare"]
    data = json.loads((tmp_path / "out" / "comparison" / "comparison.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["k2", "k4", "pca k=2", "pca k=4"]
    assert "mmcs: how much of the row is in the column" in capsys.readouterr().out
    assert all(result.reused for result in run(tmp_path / "compared.toml", out=tmp_path / "out"))


def test_baselines_and_coders_are_fitted_and_compared(place, tmp_path):
    recipe = (place / "small.toml").read_text().replace("epochs = 3", "epochs = 1")
    recipe = recipe.replace("[train.architecture]", "[train.one.architecture]")
    recipe = (
        recipe[: recipe.index("[evaluate]")]
        + "[fit.coder]\nover = 'one'\nbaseline = {kind = 'sparse_coder', k = 4}\n"
        + "[fit.axes]\nn_rows = 300\nbaseline = {kind = 'pca', k = 4}\n"
        + "[compare]\nn_tokens = 600\nn_fit_rows = 500\nnulls = ['untrained']\n"
    )
    file = tmp_path / "fitted.toml"
    file.write_text(recipe)
    results = run(file, out=tmp_path / "out")
    assert [result.stage for result in results] == [
        "harvest",
        "train one",
        "fit coder",
        "fit axes",
        "compare",
    ]
    data = json.loads((tmp_path / "out" / "comparison" / "comparison.json").read_text())
    fvu = {row["name"]: row["metrics"]["fvu"]["value"] for row in data["rows"]}
    assert list(fvu)[:3] == ["one", "coder", "axes"]
    assert fvu["coder"] < fvu["one"]  # the best four of the same directions
    assert place_of(read_recipe(file), None) == Path("artifacts/small"), "its own name, not a baseline's"
    assert all(result.reused for result in run(file, out=tmp_path / "out"))
    for old, new, message in (
        (
            "over = 'one'",
            "over = 'two'",
            r"over must name a dictionary that the recipe .* trains, got 'two'. ",
        ),
        ("[fit.axes]", "[fit.one]", r"a name that no \[train.NAME\] has, got 'one'\. Name it otherwise"),
        (
            "baseline = {kind = 'pca', k = 4}",
            "k = 4",
            r"\[fit\.axes\] must have a baseline, got n_rows, k\. Write \[fit",
        ),
    ):
        file.write_text(recipe.replace(old, new))
        with pytest.raises(ConfigError, match=message):
            run(file, out=tmp_path / "out")
    file.write_text(recipe[: recipe.index("[fit.coder]")] + "[fit]\n")
    with pytest.raises(ConfigError, match=r"\[fit\] must hold named baselines, got an empty table\. Write"):
        run(file, out=tmp_path / "out")


def test_what_a_page_shows_is_what_the_recipe_made_or_what_it_names(place, tmp_path):
    def config(last: str, verb: str = "export"):
        text = (place / "small.toml").read_text().replace("[prompts]\n", "")
        (tmp_path / "named.toml").write_text(text + last)
        found = stages(read_recipe(tmp_path / "named.toml"), Path("out"))
        return next(stage.config for stage in found if stage.verb == verb)

    everything = config("[prompts]\n[effects]\n[explain]\n[export]\nlatents_per_shard = 8\n")
    assert (everything.effects, everything.explanations) == (
        (Path("out/effects"),),
        (Path("out/explanations"),),
    )
    assert everything.prompts == (Path("out/prompts"),) and everything.report == (Path("out/report"),)
    assert everything.latents_per_shard == 8
    mine = config("[effects]\n[explain]\n[export]\nexplanations = 'mine'\nprompts = ['a', 'b.json']\n")
    assert mine.explanations == (Path("mine"),) and mine.prompts == (Path("a"), Path("b.json"))
    with pytest.raises(ConfigError, match=r"atlas must be left out of \[export\].*got 'x'\. Drop it, or run"):
        config("[export]\natlas = 'x'\n")
    asking = "[explain]\neffects = true\nexplainer = {kind = 'endpoint', model = 'm'}\n"
    assert config("[effects]\n" + asking, "explain").effects == Path("out/effects")
    assert config("[effects]\n" + asking.replace("true", "'e'"), "explain").effects == Path("e")
    with pytest.raises(ConfigError, match=r"effects of \[explain\] can be told where .*Add \[effects\]"):
        config(asking)


TWINS = """
[train.main]
keep_checkpoints = true
[train.main.architecture]
kind = "topk"
d_sae = 40
k = 4
[train.second]
seed = 1
[train.second.architecture]
kind = "topk"
d_sae = 40
k = 4
[evaluate]
dictionaries = ["main"]
n_tokens = 600
n_bootstrap = 50
[interpret]
dictionaries = ["main"]
against = ["second"]
map = false
"""


def with_second(place: Path) -> str:
    recipe = (place / "small.toml").read_text()
    return recipe[: recipe.index("[train.architecture]")].replace("epochs = 3", "epochs = 1") + TWINS


def test_an_atlas_is_made_against_another_and_what_follows_is_of_it_alone(place, tmp_path):
    file = tmp_path / "twins.toml"
    file.write_text(with_second(place) + "[effects]\nn_latents = 3\nn_top = 2\nn_removals = 0\n[explain]\n")
    out = tmp_path / "out"
    found = [stage for stage in stages(read_recipe(file), out) if stage.verb not in ("evaluate", "export")]
    assert [stage.label for stage in found] == [
        *("harvest", "train main", "train second", "interpret main", "effects main", "explain main"),
    ]
    run(file, out=out)
    with closing(open_atlas(out / "atlas" / "main", effects=out / "effects" / "main")) as atlas:
        sql = "SELECT count(mcs) AS near, count(self_similarity) AS settled, count(*) AS n FROM latents"
        assert set(atlas.query(sql)[0].values()) == {40}
        assert {row["dictionary"] for row in atlas.query("SELECT dictionary FROM neighbours")} == {
            None,
            "second",
        }
        assert atlas.query("SELECT count(DISTINCT latent) AS n FROM effects")[0]["n"] == 3
    summary = artifact.load(out / "explanations" / "main", "explanations").extra["summary"]
    found = {row["property"] for row in summary["correlations"] if row["rho"] is not None}
    assert found == set(SHAPE)
    shown = artifact.load(out / "site" / "main", "site").meta["parents"]
    assert {"report", "effects", "explanations"} <= set(shown)
    assert all(result.reused for result in run(file, out=out))


@pytest.mark.parametrize("key", ["against", "dictionaries"])
def test_a_dictionary_that_the_recipe_does_not_train_cannot_be_named(place, tmp_path, key):
    file = tmp_path / "twins.toml"
    table, old = ("[interpret]", "second") if key == "against" else ("[evaluate]", "main")
    start, end = with_second(place).split(table)
    file.write_text(start + table + end.replace(f'{key} = ["{old}"]', f'{key} = ["seconds"]'))
    with pytest.raises(
        ConfigError, match=rf"{key}.* must name dictionaries .* trains, got 'seconds'\. Did you"
    ):
        stages(read_recipe(file), tmp_path / "out")


def test_the_recipe_of_the_explained_demo_has_all_that_its_correlations_need(tmp_path):
    found = {stage.label: stage for stage in stages(read_recipe("runs/explained.toml"), tmp_path)}
    assert found["train main"].config.keep_checkpoints
    interpret = found["interpret main"].config
    assert interpret.against == (tmp_path / "dictionary" / "second",)
    assert "interpret second" not in found and "evaluate second" not in found


def test_a_coder_may_go_over_a_member_of_a_sweep_and_not_over_all_of_it(place, tmp_path):
    recipe = (place / "small.toml").read_text()
    recipe = recipe[: recipe.index("[train]")] + "[train.a]\nsweep = {k = [2, 4]}\nepochs = 1\n"
    recipe += "[train.a.architecture]\nkind = 'topk'\nd_sae = 40\n[fit.coder]\nover = 'a/k4'\n"
    recipe += "baseline = {kind = 'sparse_coder', k = 4}\n[compare]\n"
    file = tmp_path / "swept.toml"
    file.write_text(recipe)
    found = stages(read_recipe(file), tmp_path / "out")
    assert found[-2].config.over == tmp_path / "out" / "dictionary" / "a" / "k4"
    file.write_text(recipe.replace("a/k4", "a"))
    with pytest.raises(ConfigError, match=r"over must name a dictionary .*, got 'a'\. .*'?a/k"):
        stages(read_recipe(file), tmp_path / "out")


def test_an_empty_table_of_training_trains_with_what_is_usual(place, tmp_path):
    recipe = (place / "small.toml").read_text()
    start, end = recipe.index("[train]"), recipe.index("[evaluate]")
    (tmp_path / "empty.toml").write_text(recipe[:start] + "[train]\n" + recipe[end:])
    found = [stage.verb for stage in stages(read_recipe(tmp_path / "empty.toml"), tmp_path)]
    assert found[:3] == ["harvest", "train", "evaluate"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("[evaluate]", "[evalaute]"),
            r"a table of the recipe .* must be known, got 'evalaute'. Did you mean 'evaluate'",
        ),
        (
            ("k = 4", "k = 4\nkk = 3"),
            r"architecture.topk.kk must be a known option of TrainConfig in the recipe small, got 3",
        ),
        (
            ("epochs = 3", "sweep = {kk = [2, 4]}"),
            r"a sweep must be over an option .* got 'kk'\. Did you mean 'k'",
        ),
        (("n_tokens = 1500", "n_tokenz = 1500"), "n_tokenz must be a known option of EvaluateConfig"),
        (('name = "small"', 'name = "../up"'), "a recipe's name must be letters"),
        (
            ("[harvest]", '[harvest]\nsplit = "all"'),
            r"must harvest the train split, or no document is held out, got 'all'",
        ),
        (("[harvest]", "[explain]"), r"must have the tables \[harvest\] and \[train\]"),
    ],
)
def test_wrong_recipes_fail_before_anything_runs(place, tmp_path, change, message):
    (tmp_path / "bad.toml").write_text((place / "small.toml").read_text().replace(*change))
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "bad.toml", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_report_says_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"must be a report, got no report.json. Run `sememe evaluate`"):
        print_report(tmp_path)
