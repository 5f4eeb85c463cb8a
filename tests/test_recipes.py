"""Recipes of published experiments: all parse, resolve and can be planned at every scale; what a recipe can say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from small_world import write_corpus

from sememe import artifact
from sememe.compare import CompareConfig
from sememe.config import read_toml
from sememe.dictionaries.folders import paths_in
from sememe.errors import ConfigError
from sememe.lm.build import PRESETS
from sememe.patch.config import BASELINES
from sememe.plan.stages import estimates
from sememe.recipe import place_of, read_recipe, stages
from sememe.recipe.tables import ASKED
from sememe.run import run
from sememe.train.sweep import swept_names

RUNS = sorted((Path(__file__).parent.parent / "runs").glob("*.toml"))
PUBLISHED = ("cunningham", "marks_mueller", "modern", "monosemanticity", "nanda", "sparse_coding_log")
AT = [(path, scale) for path in RUNS for scale in read_toml(path).get("scale", {"": {}})]


@pytest.mark.parametrize(("path", "scale"), AT, ids=lambda one: one.stem if isinstance(one, Path) else one)
def test_every_recipe_resolves_and_can_be_planned_at_every_scale(path, scale, tmp_path):
    recipe = read_recipe(path, scale or None)
    asked = [verb for verb in recipe.asked if importlib.util.find_spec(f"sememe.{verb}") is None]
    recipe = recipe._replace(asked={verb: table for verb, table in recipe.asked.items() if verb not in asked})
    found = stages(recipe, tmp_path)
    assert len({stage.path for stage in found}) == len(found)
    assert len({stage.label for stage in found}) == len(found)
    for estimate in estimates(found).stages:
        assert not estimate.done and (estimate.note or (estimate.needs and estimate.seconds_at))
    if path.stem in PUBLISHED:
        assert recipe.scale == scale and found[-1].verb == "results"
        assert found[-1].config.title and found[-1].config.settings


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_experiments_have_two_scales_and_run_small_by_themselves(name):
    path = next(path for path in RUNS if path.stem == name)
    assert {"small", "full"} <= set(read_toml(path)["scale"])
    assert read_recipe(path).scale == "small"
    text = path.read_text()
    assert "# Loss:" in text and "--scale full" in text, (
        "says how coefficients were converted, and how it is run"
    )


# -- what a recipe can say -----------------------------------------------------------------------------------------

RECIPE = """
name = "tiny"
[text]
corpus = ["{place}/corpus.jsonl"]
heldout_fraction = 0.3
[policy]
context_length = 32
[pretrain]
context_length = 32
batch_rows = 8
validation_tokens = 300
n_validations = 1
n_samples = 0
vocab_size = 280
[harvest]
hookpoints = ["mlp_act.0", "resid_post.0"]
[harvest.much]
n_tokens = 4000
[harvest.little]
n_tokens = 1000
[train]
batch_size = 64
watch_rows = 0
[train.architecture]
d_sae = 40
[train.wide]
inputs = ["mlp_act.0"]
architecture = {{ kind = "topk", k = 4 }}
sweep = {{ seed = [0, 1] }}
[train.again]
store = "little"
inputs = ["resid_post.0"]
architecture = {{ kind = "relu" }}
[train.live]
live = true
n_tokens = 500
buffer_mb = 1
inputs = ["resid_post.0"]
architecture = {{ kind = "topk", k = 3 }}
[evaluate]
dictionaries = ["again"]
n_tokens = 600
n_bootstrap = 50
n_fit_rows = 400
nulls = []
[geometry.seeds]
dictionaries = ["wide"]
n_rows = 200
n_bootstrap = 20
[geometry.live]
dictionaries = ["live"]
store = "much"
n_rows = 200
n_bootstrap = 20
[toy.fitted]
planted = {{ d = 8, n_features = 12, n_active = 2 }}
fit = {{ n_rows = 400, baseline = {{ kind = "ksvd", k = 2, d_sae = 12, n_iterations = 2 }} }}
n_rows = 300
[expected]
title = "A small paper"
[[expected.tables]]
title = "Ours"
columns = [
    {{ name = "l0", value = "report/again/report.json#metrics/l0" }},
    {{ name = "between seeds", value = "geometry/seeds/geometry.json#pairs/0/mmcs_small_to_large" }},
    {{ name = "found", value = "toy/fitted/recovery/recovery.json#rows/0/recall" }},
]
rows = [{{ name = "all", published = [4.0, "", 0.9] }}]
[[expected.claims]]
claim = "Something is found."
relation = "above"
values = ["toy/fitted/recovery/recovery.json#rows/0/recall"]
than = 0.1
[scale.tiny.pretrain]
n_tokens = 2000
architecture = {{ kind = "gpt2", d_model = 16, n_heads = 2 }}
[scale.large.pretrain]
architecture = "nanda"
[scale.large.train.wide]
sweep = {{ seed = [0, 1, 2] }}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("recipes")
    write_corpus(place / "corpus.jsonl", n_documents=300)
    (place / "tiny.toml").write_text(RECIPE.format(place=place))
    return place


def built(place, tmp_path, old="", new="", scale=None):
    text = (place / "tiny.toml").read_text()
    assert old in text
    (tmp_path / "changed.toml").write_text(text.replace(old, new, 1))
    return stages(read_recipe(tmp_path / "changed.toml", scale), tmp_path / "out")


def test_a_scale_is_laid_over_the_rest(place, tmp_path):
    tiny, large = (built(place, tmp_path, scale=scale) for scale in ("tiny", "large"))
    first, other = tiny[0].config, large[0].config
    assert (first.n_tokens, first.architecture.d_model) == (2000, 16)
    assert (
        other.architecture == PRESETS["nanda"]
        and other.n_tokens == type(other).model_fields["n_tokens"].default
    )
    assert first.vocab_size == other.vocab_size == 280, "what no scale changes is the same"
    (wide,) = [stage.config for stage in large if stage.label == "train wide"]
    assert wide.sweep == ("seed=0,1,2",)
    recipe = read_recipe(place / "tiny.toml", "large")
    assert place_of(recipe, None) == Path("artifacts/tiny/large")
    assert read_recipe(place / "tiny.toml").scale == "tiny", "the first one, if none is asked for"


def test_stages_know_their_model_store_and_dictionaries(place, tmp_path):
    found = {stage.label: stage.config for stage in built(place, tmp_path)}
    out = tmp_path / "out"
    assert found["harvest much"].model.model == str(out / "model")
    assert found["train wide"].store == out / "store" / "much", "the first, where a table does not say"
    assert found["train again"].store == out / "store" / "little"
    assert found["train live"].live and found["train live"].policy.context_length == 32
    assert found["train again"].architecture.d_sae == 40, "a named table's options lie over what all share"
    assert found["geometry live"].store == out / "store" / "much"
    seeds = out / "dictionary" / "wide"
    assert found["geometry seeds"].dictionaries == (seeds / "seed0", seeds / "seed1")
    labels = list(found)
    assert labels[0] == "pretrain" and labels[-1] == "results" and "interpret again" not in labels


def test_any_verb_about_a_dictionary_can_be_asked(place, tmp_path):
    table = '[concepts.letters]\ndictionaries = ["again"]\nfirst_letter = true\n[expected]'
    (stage,) = [s for s in built(place, tmp_path, "[expected]", table) if s.verb == "concepts"]
    assert stage.path == tmp_path / "out" / "concepts" / "letters" / "again"
    assert stage.config.dictionary == tmp_path / "out" / "dictionary" / "again"
    assert stage.config.model.model == str(tmp_path / "out" / "model") and stage.config.first_letter
    missing = next((verb for verb in ASKED if importlib.util.find_spec(f"sememe.{verb}") is None), None)
    if missing is not None:
        with pytest.raises(ConfigError, match=rf"a verb that this version has, got '{missing}'\. Drop"):
            built(place, tmp_path, "[expected]", f"[{missing}]\n[expected]")


def test_all_of_it_runs(place, tmp_path, capsys):
    results = run(place / "tiny.toml", out=tmp_path / "out")
    assert [result.stage for result in results] == [
        *(
            "pretrain",
            "toy fitted",
            "harvest much",
            "harvest little",
            "train wide",
            "train again",
            "train live",
        ),
        *("evaluate again", "geometry seeds", "geometry live", "results"),
    ]
    data = json.loads((tmp_path / "out" / "results" / "results.json").read_text())
    assert data["n_missing"] == 0 and data["claims"][0]["verdict"] == "holds" and data["scale"] == "tiny"
    printed = capsys.readouterr().out
    assert "what was said" in printed and "results.html" in printed and "tiny at scale tiny" in printed
    recovery = json.loads((tmp_path / "out" / "toy" / "fitted" / "recovery" / "recovery.json").read_text())
    (row,) = recovery["rows"]
    assert row["name"] == "ksvd" and row["random"] < row["recall"] <= 1 and row["d_sae"] == 12
    model = artifact.load(tmp_path / "out" / "model", "model")
    store = artifact.load(tmp_path / "out" / "store" / "much", "store")
    assert model.extra["results"]["vocab_size"] == 280 and store.extra["model"] == str(
        tmp_path / "out" / "model"
    )
    assert all(result.reused for result in run(place / "tiny.toml", out=tmp_path / "out"))
    capsys.readouterr()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "[scale.tiny.pretrain]",
            "[scale.tiny.pretrian]",
            r"in \[scale.tiny\], must be known, got 'pretrian'\. Did",
        ),
        (
            "[scale.tiny.pretrain]",
            "[scale.'../up'.pretrain]",
            r"the name of a table must be .*, got '\.\./up'",
        ),
        (
            "[train.again]",
            "[train.'../up']",
            r"the name of a table must be letters.*, got '\.\./up'\. Change it",
        ),
        (
            'store = "little"',
            'store = "litle"',
            r"store must name a harvest .*, got 'litle'\. Did you mean 'little'",
        ),
        (
            "[policy]",
            '[model]\nmodel = "m"\n[policy]',
            r"\[model\] must not name a model .*, got 'm'\. Drop model",
        ),
        (
            "[policy]\ncontext_length = 32",
            "[policy]\ncontext_length = 64",
            r"must be <= that of \[pretrain\], 32, got 64",
        ),
        (
            'dictionaries = ["wide"]',
            'dictionaries = ["wild"]',
            r"dictionaries of \[geometry\] must name .*'wild'\. Known: wide",
        ),
        (
            'architecture = { kind = "gpt2"',
            'architecture = "shepher"\nx = { kind = "gpt2"',
            r"got 'shepher'\. Did you mean 'shehper'",
        ),
        (
            "report/again",
            "reports/again",
            r"must come from what a stage of the recipe makes, got 'reports/again/report.json'\. Name",
        ),
        ("[toy.fitted]", "[toy]", r"\[toy\] must hold named tables, got planted, fit, n_rows\. Write"),
        (
            "n_rows = 300",
            "n_rows = 300\ntrain = { n_tokens = 100 }",
            r"exactly one of train and fit .*, got both\. Drop",
        ),
    ],
)
def test_wrong_recipes_are_refused(place, tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        built(place, tmp_path, old, new)


def test_a_scale_that_is_not_there(place, tmp_path):
    with pytest.raises(
        ConfigError, match=r"scale must be one that the recipe .* has, got 'larg'\. Did you mean 'large'"
    ):
        read_recipe(place / "tiny.toml", "larg")
    (tmp_path / "plain.toml").write_text('[toy.a.fit.baseline]\nkind = "pca"\n')
    with pytest.raises(ConfigError, match=r"got 'small'\. Leave it out: the recipe has none"):
        read_recipe(tmp_path / "plain.toml", "small")
    assert read_recipe(tmp_path / "plain.toml").scale == "", "planted features alone need no harvest"


# -- one of the published, in miniature ----------------------------------------------------------------------------

MINIATURE = """
[scale.miniature.text]
corpus = ["{place}/corpus.jsonl"]
heldout_fraction = 0.3
[scale.miniature.pretrain]
n_tokens = 4000
context_length = 128
vocab_size = 300
batch_rows = 4
validation_tokens = 1000
n_samples = 0
[scale.miniature.pretrain.architecture]
kind = "gpt2"
n_layers = 6
d_model = 16
n_heads = 2
[scale.miniature.harvest]
hookpoints = ["mlp_out.*"]
n_tokens = 6000
[scale.miniature.train]
batch_size = 256
[scale.miniature.train.0_8192.architecture]
d_sae = 64
[scale.miniature.train.1_32768.architecture]
d_sae = 128
[scale.miniature.evaluate]
n_tokens = 1500
n_fit_rows = 1000
"""


@pytest.mark.slow  # thirty stages
def test_marks_and_mueller_in_miniature(place, tmp_path):
    recipe = next(path for path in RUNS if path.stem == "marks_mueller").read_text()
    (tmp_path / "m.toml").write_text(recipe + MINIATURE.format(place=place))
    run(tmp_path / "m.toml", out=tmp_path / "out", scale="miniature")
    data = json.loads((tmp_path / "out" / "results" / "results.json").read_text())
    assert data["n_missing"] == 0
    assert [len(table["rows"]) for table in data["tables"]] == [6, 6]
    assert {claim["verdict"] for claim in data["claims"]} <= {"holds", "does not hold", "undecided"}


def named_in(base, references):
    """Of each file of a results page, the names of rows and arms that its numbers are taken from."""
    for reference in references:
        file, _, way = reference.partition("#")
        found = re.search(r"(?:rows|arms)/name=([^/]+)/", way)
        if found is not None:
            yield (base / file).parent, found[1].replace("~1", "/")


def nulls_of(config):
    """What stands beside the dictionaries of a comparison or a patching."""
    return config.nulls if isinstance(config, CompareConfig) else config.baselines or BASELINES


@pytest.mark.parametrize(("path", "scale"), AT, ids=lambda one: one.stem if isinstance(one, Path) else one)
def test_numbers_are_taken_from_dictionaries_that_there_will_be(path, scale, tmp_path):
    """Comparisons and patchings call dictionaries by the shortest names that tell them apart; pages must, too."""
    recipe = read_recipe(path, scale or None)
    if recipe.expected is None:
        return
    found = stages(recipe, tmp_path)
    swept = {  # a folder of several is not there yet
        stage.path: tuple(stage.path / name for name in swept_names(stage.config))
        for stage in found
        if stage.verb == "train" and stage.config.sweep
    }
    arms = {
        stage.path: {
            *paths_in(
                tuple(one for place in stage.config.dictionaries for one in swept.get(place, (place,)))
            ),
            *nulls_of(stage.config),
        }
        for stage in found
        if stage.verb in ("compare", "patch")
    }
    for place, name in named_in(tmp_path, found[-1].config.references()):
        if place in arms:
            assert name in arms[place], f"{name} is not among {sorted(arms[place])}"


def test_effects_may_be_of_fewer_dictionaries_than_are_interpreted(tmp_path):
    path = next(path for path in RUNS if path.stem == "cunningham")
    labels = [stage.label for stage in stages(read_recipe(path, "small"), tmp_path / "out")]
    assert sum(label.startswith("interpret") for label in labels) == 3
    assert [label for label in labels if label.startswith("effects")] == [
        "effects resid/resid_post.15-target_l024.0-d_sae1152"
    ]


def test_explanations_of_nulls_are_named_as_they_will_lie(tmp_path):
    """Beside those of the atlas, as its folder is called: NAME-null-pca, which the page would miss under NAME-pca."""
    recipe = next(path for path in RUNS if path.stem == "monosemanticity").read_text()
    assert "explanations-null-identity/" in recipe
    (tmp_path / "m.toml").write_text(recipe.replace("explanations-null-identity/", "explanations-identity/"))
    with pytest.raises(
        ConfigError, match=r"must come from what a stage .*, got 'explanations-identity/meta\.json'"
    ):
        stages(read_recipe(tmp_path / "m.toml"), tmp_path / "out")


def test_wrong_names_would_be_seen(tmp_path):
    way = "comparison/comparison.json#rows/name=sizes~1d_sae512/metrics/fvu"
    assert list(named_in(tmp_path, [way, "report/report.json#metrics/l0"])) == [
        (tmp_path / "comparison", "sizes/d_sae512")
    ]
