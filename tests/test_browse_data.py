"""What the page's JSON says of maps, relations, explanations, effects and texts is what the atlas's files say."""

from __future__ import annotations

import math

import duckdb
import numpy as np
import pytest
from planted_atlas import edit
from synthetic_atlas import SyntheticConfig, build, build_all, build_explanations

from sememe.atlas import EFFECTS, EXPLANATIONS, REMOVALS
from sememe.browse.data.latents import N_NEIGHBOURS
from sememe.browse.data.values import significant
from sememe.browse.inputs import Inputs, opened
from sememe.errors import CorruptError, MismatchError

EXPLANATIONS_OF = {5: "names of rivers", 30: "letters"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return build_all(tmp_path_factory.mktemp("data"), SyntheticConfig(), EXPLANATIONS_OF)


@pytest.fixture(scope="module")
def data(inputs):
    with opened(Inputs(**inputs)) as (data, _):
        yield data


def rows(data, sql: str, *parameters: object) -> list[dict]:
    return data.atlas.query(sql, *parameters)


def test_significant_digits_are_those_of_format():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000) * 10.0 ** rng.integers(-12, 12, 2000)
    for digits in (3, 4):
        assert significant(values, digits) == [float(f"{value:.{digits}g}") for value in values.tolist()]
    assert significant(np.array([0.0, math.nan, math.inf, -0.5])) == [0.0, None, None, -0.5]


def test_places_on_the_map_keep_their_proportions(data):
    details = data.details()
    places = rows(data, "SELECT x, y, cluster FROM latents ORDER BY id")
    alive = [i for i, row in enumerate(places) if row["x"] is not None]
    assert [details["x"][i] is None for i in range(len(places))] == [row["x"] is None for row in places]
    shown = np.array([(details["x"][i], details["y"][i]) for i in alive], float)
    true = np.array([(places[i]["x"], places[i]["y"]) for i in alive])
    assert shown.min() == 0 and shown.max() == 9999
    scale = np.ptp(shown, axis=0) / np.ptp(true, axis=0)
    assert scale[0] == pytest.approx(scale[1], rel=1e-3)
    assert np.abs((shown - shown[0]) - (true - true[0]) * scale[0]).max() <= 1.01
    assert details["cluster"] == [row["cluster"] for row in places]


def test_what_fires_below_zero_is_called_by_the_tokens_it_is_strongest_on(tmp_path):
    """PCA, AbsTopK: a label is of sizes, whatever their sign."""
    path = build(tmp_path / "atlas", SyntheticConfig(n_latents=30, n_contexts=60)).path
    with opened(Inputs(atlas=path)) as (before, _):
        labels = before.index()["label_tokens"]
    assert sum(len(tokens) == 3 for tokens in labels) > 10
    edit(path, ("UPDATE examples SET act = -act", []))
    with opened(Inputs(atlas=path)) as (after, _):
        assert after.index()["label_tokens"] == labels


def test_columns_without_a_value_are_left_out_and_scores_are_the_explanations(data, tmp_path):
    with opened(Inputs(atlas=data.atlas.artifact.path)) as (bare, _):
        assert "score" not in bare.details() and "mcs" in bare.details()
    scores = {i: score for i, score in enumerate(data.details()["score"]) if score is not None}
    assert scores == {5: 0.5, 30: 0.8}  # detection's, of a model's words; the rule's own


def test_relations_are_the_atlas_s(data):
    found = data.latent(17)
    for kind, dictionary in (("decoder", None), ("encoder", None), ("decoder", "other <i>")):
        expected = rows(
            data, "SELECT other, cosine FROM neighbours WHERE latent = 17 AND kind = ? AND dictionary IS NOT DISTINCT "
            "FROM ? ORDER BY rank", kind, dictionary,
        )[:N_NEIGHBOURS]  # fmt: skip
        (group,) = [g for g in found["neighbours"] if (g["kind"], g["dictionary"]) == (kind, dictionary)]
        assert group["other"] == [row["other"] for row in expected]
        assert group["cosine"] == pytest.approx([row["cosine"] for row in expected], rel=1e-2)
    for table in ("coactive", "neurons", "top_tokens"):
        expected = rows(data, f"SELECT * FROM {table} WHERE latent = 17 ORDER BY rank")
        for name, values in found[table].items():
            assert values == pytest.approx([row[name] for row in expected], rel=1e-2), (table, name)


def test_history_is_by_step_and_an_atlas_without_the_table_has_none(data, tmp_path):
    expected = rows(data, "SELECT step, cosine FROM history WHERE latent = 17 ORDER BY step")
    found = data.latent(17)["history"]
    assert found["step"] == [row["step"] for row in expected] == [1, 10, 100, 1000]
    assert found["cosine"] == pytest.approx([row["cosine"] for row in expected], rel=1e-2)
    path = build(tmp_path / "atlas", SyntheticConfig(n_latents=10)).path
    edit(path, ("DROP TABLE history", []))
    with opened(Inputs(atlas=path)) as (older, _):
        assert older.latent(3)["history"] == {} and older.latent(3)["neurons"]


def test_effects_stand_beside_their_examples(data, inputs):
    found = data.latent(30)["examples"]
    effects = duckdb.sql(f"FROM read_parquet('{inputs['effects'] / EFFECTS}') WHERE latent = 30").fetchdf()
    removals = duckdb.sql(f"FROM read_parquet('{inputs['effects'] / REMOVALS}') WHERE latent = 30").fetchdf()
    for i, kind in enumerate(found["kind"]):
        effect, removal = found["effect"][i], found["removals"][i]
        if kind != "top":
            assert effect is None and removal is None
            continue
        row = effects[effects["rank"] == found["rank"][i]].iloc[0]
        change = None if np.isnan(row["loss_change"]) else pytest.approx(row["loss_change"], abs=1e-3)
        assert effect["loss_change"] == change and effect["kl"] == pytest.approx(row["kl"], rel=1e-2)
        assert effect["raised"] == [[10**6, "</script><b>up", 0.75]]
        mine = removals[removals["rank"] == found["rank"][i]].sort_values("removed")
        assert (removal or {"removed": []})["removed"] == mine["removed"].tolist()
        if removal:
            assert removal["act"] == pytest.approx(mine["act_without"].tolist(), rel=1e-2)
    assert "effect" not in data.latent(40)["examples"] and "removals" not in data.latent(40)["examples"]


def test_a_tuned_lens_is_kept_apart(tmp_path):
    path = build(tmp_path / "atlas", SyntheticConfig(n_latents=20)).path
    edit(
        path,
        (
            "INSERT INTO logits SELECT * REPLACE (token + 1 AS token, 'tuned' AS lens) FROM logits WHERE rank < 2",
            [],
        ),
    )
    with opened(Inputs(atlas=path)) as (data, _):
        found = data.latent(3)
    assert len(found["promoted"]["tokens"]) == 12
    tuned = found["lenses"]["tuned"]
    assert tuned["promoted"]["tokens"] == [token + 1 for token in found["promoted"]["tokens"][:2]]
    assert len(tuned["demoted"]["tokens"]) == 2


def test_effects_and_explanations_must_be_of_the_atlas(inputs, tmp_path):
    other = build(tmp_path / "other", SyntheticConfig(n_latents=10))
    with (
        pytest.raises(MismatchError, match=r"the effects .* must be of the atlas"),
        opened(Inputs(atlas=other.path, effects=inputs["effects"])),
    ):
        pass


def test_damaged_explanations_say_what_to_do(tmp_path):
    atlas = build(tmp_path / "atlas", SyntheticConfig(n_latents=10))
    folder = build_explanations(tmp_path / "explanations", atlas, {1: "one"})
    (folder.path / "scores.parquet").write_bytes(
        b"PAR1" + b"\0" * (folder.path / "scores.parquet").stat().st_size
    )
    with pytest.raises(CorruptError) as error, opened(Inputs(atlas=atlas.path, explanations=folder.path)):
        pass
    assert "sememe explain" in str(error.value) or "hash" in str(error.value) or "bytes" in str(error.value)
    assert (folder.path / EXPLANATIONS).is_file()
