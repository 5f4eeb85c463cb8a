"""What an atlas says of latents beside each other: several dictionaries, nulls, neighbours, pairs, the map, a lens."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from atlas_fixture import D_MODEL, POLICY, World, make_world, save_dictionary, sites
from sklearn.manifold import trustworthiness
from test_interpret import TABLES, Slow, contents
from test_lens import theirs as lens_folder

from sememe import artifact, dictionaries, metrics
from sememe.atlas import Atlas, open_atlas
from sememe.dictionaries.folders import checkpoints_in
from sememe.errors import ActivationError, ConfigError, MismatchError
from sememe.interpret import interpret, interpret_all
from sememe.interpret.clusters import layout, make_map, named
from sememe.interpret.relations import Neighbours, relations


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def atlas(world: World) -> Iterator[Atlas]:
    save_dictionary(world.root / "wider", sites(world.lm), d_sae=96)
    found = interpret(world.config("atlas", against=(world.root / "wider",)), lm=world.lm)
    yield found
    found.close()


@pytest.fixture(scope="module")
def slow(world: World) -> Slow:
    return Slow(world)


def test_pairs_are_those_of_the_text(atlas: Atlas, slow: Slow) -> None:
    on = {latent: set(places) for latent, places in slow.acts.items()}
    assert atlas.meta["coactive_tokens"] == slow.n_kept
    rows = atlas.query("SELECT * FROM coactive ORDER BY latent, rank")
    assert len(rows) > 100
    for row in rows:
        both = len(on[row["latent"]] & on[row["other"]])
        a, b, n = len(on[row["latent"]]), len(on[row["other"]]), slow.n_kept
        assert row["n_both"] == both
        assert row["expected"] == pytest.approx(a * b / n, rel=1e-5)
        phi = (n * both - a * b) / np.sqrt(float(a) * (n - a) * b * (n - b))
        assert row["phi"] == pytest.approx(phi, rel=1e-4)
    n = slow.n_kept
    for latent in (0, 13):  # nobody was left out
        mine, phis = on[latent], []
        for other, theirs in on.items():
            both = len(mine & theirs)
            if other != latent and both >= 5:
                spread = np.sqrt(float(len(mine)) * (n - len(mine)) * len(theirs) * (n - len(theirs)))
                phis.append((n * both - len(mine) * len(theirs)) / spread)
        found = [row["phi"] for row in rows if row["latent"] == latent]
        wanted = [phi for phi in sorted(phis, reverse=True) if phi > 0][: len(found)]
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_tokens_are_counted_and_positions_too(atlas: Atlas, slow: Slow) -> None:
    ids = np.stack(slow.ids)
    for latent in (0, 5, 40):
        places = slow.acts[latent]
        by_token = Counter(int(ids[row, position]) for row, position in places)
        for row in atlas.query("SELECT * FROM top_tokens WHERE latent = ?", latent):
            assert row["n_active"] == by_token[row["token"]] <= row["n_seen"]
            acts = [act for (r, p), act in places.items() if ids[r, p] == row["token"]]
            assert row["mean_act"] == pytest.approx(np.mean(acts), rel=1e-5)
        found = atlas.query("SELECT position_density, position_mean FROM latents WHERE id = ?", latent)[0]
        edges = [0, *atlas.meta["position_edges"]]
        assert edges[-1] == POLICY.context_length
        for band in range(1, 16):  # position 0, in the first band, is not kept
            inside = [act for (_, p), act in places.items() if edges[band] <= p < edges[band + 1]]
            n = len(inside) / found["position_density"][band] if inside else 1
            assert n == pytest.approx(round(n), abs=1e-3)
            assert found["position_mean"][band] == pytest.approx(sum(inside) / n, rel=1e-4)


def test_neighbours_are_the_nearest(atlas: Atlas, world: World) -> None:
    dictionary, wider = dictionaries.load(world.dictionary), dictionaries.load(world.root / "wider")
    own = metrics.unit_rows(dictionary.decoder_directions().detach())
    read = metrics.unit_rows(dictionary.encoder_directions().detach())
    other = metrics.unit_rows(wider.decoder_directions().detach())
    assert {
        (r["kind"], r["dictionary"]) for r in atlas.query("SELECT DISTINCT kind, dictionary FROM neighbours")
    } == (
        {("decoder", None), ("decoder", "wider")}
        | (set() if torch.allclose(own, read) else {("encoder", None)})
    )
    for latent in (0, 30):
        cosine = own[latent] @ own.T
        cosine[latent] = -2
        truth = cosine.topk(14)
        rows = atlas.query(
            "SELECT other, cosine FROM neighbours WHERE latent = ? AND dictionary IS NULL AND kind = 'decoder' "
            "ORDER BY rank",
            latent,
        )
        assert [row["other"] for row in rows] == truth.indices.tolist()
        np.testing.assert_allclose([row["cosine"] for row in rows], truth.values, atol=1e-5)
        found = atlas.query("SELECT max_cos, mcs FROM latents WHERE id = ?", latent)[0]
        assert found["max_cos"] == pytest.approx(float(truth.values[0]), abs=1e-5)
        assert found["mcs"] == pytest.approx(float((own[latent] @ other.T).max()), abs=1e-5)


def test_another_dictionary_is_searched_by_what_latents_read_where_it_reads_the_same(world: World) -> None:
    one, two = dictionaries.load(world.dictionary), dictionaries.load(world.dictionary)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        two.W_enc += 0.3 * torch.randn(two.W_enc.shape, generator=generator)
        one.W_dec[:, 5] *= 30

    def by_encoder() -> list[Neighbours]:
        found = relations(one, 3, {"two": two}, None)
        assert found.outliers.tolist() == [5], "the dimension that holds most, by its number"
        return [n for n in found.neighbours if n.kind == "encoder" and n.dictionary == "two"]

    (near,) = by_encoder()
    read, theirs = (metrics.unit_rows(d.encoder_directions().detach()) for d in (one, two))
    truth = (read @ theirs.T).topk(3)
    assert near.others.tolist() == truth.indices.tolist()
    np.testing.assert_allclose(near.cosines, truth.values, atol=1e-5)
    elsewhere = sites(world.lm, "resid_post.1")
    two.sites = elsewhere.replace(outputs=two.sites.outputs)
    assert by_encoder() == [], "what is read elsewhere cannot be compared"


def test_shapes_are_numpys(atlas: Atlas, world: World) -> None:
    dictionary = dictionaries.load(world.dictionary)
    W = dictionary.decoder_directions().detach().double().numpy()
    rows = atlas.query("SELECT * FROM latents ORDER BY id")
    centred = W - W.mean(1, keepdims=True)
    kurtosis = (centred**4).mean(1) / (centred**2).mean(1) ** 2
    share = W**2 / (W**2).sum(1, keepdims=True)
    np.testing.assert_allclose([row["kurtosis"] for row in rows], kurtosis, rtol=1e-5)
    np.testing.assert_allclose([row["n_effective_neurons"] for row in rows], 1 / (share**2).sum(1), rtol=1e-5)
    assert [row["top_neuron"] for row in rows] == np.abs(W).argmax(1).tolist()
    np.testing.assert_allclose([row["top_neuron_share"] for row in rows], share.max(1), rtol=1e-5)
    np.testing.assert_allclose([row["bias"] for row in rows], dictionary.b_enc.detach(), rtol=1e-6)
    assert all(row["self_similarity"] is None and row["cluster"] is None and row["x"] is None for row in rows)
    assert not atlas.query("SELECT * FROM history"), "there are no checkpoints"
    outliers = metrics.outlier_dimensions(dictionary.decoder_directions().detach())
    assert atlas.meta["outlier_dimensions"] == outliers.tolist()
    neurons = atlas.query("SELECT neuron, weight FROM neurons WHERE latent = 3 ORDER BY rank")
    assert neurons[0]["weight"] == pytest.approx(W[3, neurons[0]["neuron"]] / np.linalg.norm(W[3]), rel=1e-5)


def test_several_dictionaries_in_one_forward_are_each_what_it_is_alone(
    world: World, monkeypatch: Any
) -> None:
    """Other hookpoints, other widths: one forward per batch, and the numbers of a pass of each one's own."""
    paths = (
        save_dictionary(world.root / "low", sites(world.lm, "resid_post.0"), d_sae=48),
        save_dictionary(world.root / "high", sites(world.lm, "resid_post.1"), d_sae=40),
    )
    alone = {}
    for path in paths:
        interpret(world.config(f"alone-{path.name}", dictionaries=path, n_tokens=2000), lm=world.lm).close()
        alone[path.name] = contents(world.root / f"alone-{path.name}")
    calls = []
    capture = type(world.lm).capture
    monkeypatch.setattr(
        type(world.lm),
        "capture",
        lambda self, *args, **more: (calls.append(args[1]), capture(self, *args, **more))[1],
    )
    found = interpret_all(world.config("both", dictionaries=paths, n_tokens=2000), lm=world.lm)
    wide = [names for names in calls if list(names) == ["resid_post.0", "resid_post.1"]]
    assert len(wide) == -(-found["low"].meta["text"]["n_rows"] // 8), "one forward a batch"
    for name, atlas in found.items():
        atlas.close()
        got = contents(world.root / "both" / name)
        for table in TABLES:
            if table != "meta":
                assert got[table] == alone[name][table], (name, table)
    again = interpret_all(world.config("both", dictionaries=paths, n_tokens=2000), lm=world.lm)
    assert {n: a.artifact.fingerprint for n, a in again.items()} == {
        n: a.artifact.fingerprint for n, a in found.items()
    }
    for one in again.values():
        one.close()
    with pytest.raises(
        ConfigError, match=r"one dictionary must be named where one atlas is wanted, got 2 of them"
    ):
        interpret(world.config("both", dictionaries=paths))


def test_dictionaries_of_one_pass_are_looked_for_in_each_other_when_named(world: World) -> None:
    a = save_dictionary(world.root / "a", sites(world.lm), d_sae=48)
    b = save_dictionary(world.root / "b", sites(world.lm), d_sae=64)
    found = interpret_all(
        world.config("pair", dictionaries=(a, b), against=(a, b), n_tokens=2000), lm=world.lm
    )
    for name, other in (("a", "b"), ("b", "a")):
        rows = found[name].query("SELECT DISTINCT dictionary FROM neighbours WHERE dictionary IS NOT NULL")
        assert rows == [{"dictionary": other}], "not in itself"
        found[name].close()


INTERRUPTED = """
import signal, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from sememe.interpret import InterpretConfig, interpret_all
from sememe.interpret.stream import Pass
step, calls = Pass.step, [0]
def dying(self, *args):
    n = step(self, *args)
    calls[0] += 1
    if calls[0] == 5:
        os.kill(os.getpid(), signal.{number})
    return n
Pass.step = dying
interpret_all(InterpretConfig.model_validate_json(Path({config!r}).read_text()))
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_a_pass_over_several_goes_on_and_never_with_another_s_counts(
    world: World, tmp_path: Path, number: str
) -> None:
    """Stopped with two dictionaries: the same two end as if nothing had happened; another one starts anew."""
    places = {"one": "resid_post.0", "two": "resid_post.1", "three": "mlp_out.1"}
    paths = {
        name: save_dictionary(world.root / f"{number}-{name}", sites(world.lm, place))
        for name, place in places.items()
    }
    config = world.config(
        f"stopped-{number}", dictionaries=(paths["one"], paths["two"]), n_tokens=2000,
        snapshot_seconds=0 if number == "SIGKILL" else 60,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = INTERRUPTED.format(
        tests=str(Path(__file__).parent), config=str(tmp_path / "config.json"), number=number
    )
    done = forked.run(script)
    assert done.returncode != 0 and list(config.out.glob(".*.partial/snapshot.npz")), done.stderr
    for second in ("two", "three"):
        out = world.root / f"stopped-{number}-{second}"
        shutil.copytree(config.out, out)
        asked = config.replace(dictionaries=(paths["one"], paths[second]), out=out)
        for name, atlas in interpret_all(asked, lm=world.lm).items():
            atlas.close()
            path = paths[name.removeprefix(f"{number}-")]
            alone = world.config(f"alone-{name}", dictionaries=path, n_tokens=2000)
            interpret(alone, lm=world.lm).close()
            one, two = contents(out / name), contents(alone.out)
            for table in TABLES:
                assert table == "meta" or one[table] == two[table], (second, name, table)


def test_one_that_never_fires_takes_no_other_with_it(world: World) -> None:
    silent = save_dictionary(world.root / "silent", sites(world.lm), silent=True)
    config = world.config("company", dictionaries=(silent, world.dictionary), n_tokens=2000)
    with pytest.raises(ActivationError, match=r"the dictionary silent must fire .* got no activation on"):
        interpret_all(config, lm=world.lm)
    assert (config.out / "dictionary" / "meta.json").is_file() and not (config.out / "silent").exists()
    assert not list(config.out.glob(".*.partial"))


def test_nulls_beside_the_atlas(world: World) -> None:
    config = world.config(
        "controlled",
        n_tokens=2000,
        n_fit_rows=500,
        nulls=("pca", "random_directions", "untrained", "randomised"),
    )
    interpret(config, lm=world.lm).close()
    densities = {}
    for null in config.nulls:
        found = open_atlas(world.root / "controlled" / f"null-{null}")
        about = found.meta["dictionary"]
        assert about["null"] == null and about["name"] == f"null-{null}"
        densities[null] = found.query("SELECT sum(density) AS l0, count(*) AS n FROM latents")[0]
        found.close()
    assert densities["pca"]["n"] == D_MODEL and densities["untrained"]["n"] == 48
    for null in ("pca", "random_directions", "untrained"):
        assert densities[null]["l0"] == pytest.approx(4, abs=0.01), (
            "as many latents active as the dictionary has"
        )
    before = (world.root / "controlled" / "null-pca" / "meta.json").stat().st_mtime_ns
    interpret(config.replace(nulls=(*config.nulls, "identity")), lm=world.lm).close()
    assert (world.root / "controlled" / "null-pca" / "meta.json").stat().st_mtime_ns == before, "made once"
    assert (world.root / "controlled" / "null-identity" / "meta.json").is_file()
    plain = interpret(world.config("plain", n_tokens=2000), lm=world.lm)
    assert plain.artifact.identity == artifact.load(world.root / "controlled").identity, (
        "nulls are not the atlas"
    )
    plain.close()


def test_nulls_are_read_through_no_lens_and_looked_for_nowhere(world: World, tmp_path: Path) -> None:
    """Their identity says so, and the model with shuffled weights is none that the lens was trained on."""
    wider = save_dictionary(tmp_path / "wider", sites(world.lm), d_sae=96)
    nulls = ("random_directions", "randomised")
    config = world.config(
        "beside",
        n_tokens=2000,
        n_fit_rows=500,
        nulls=nulls,
        against=(wider,),
        lens=lens_folder(tmp_path / "lens")[0],
    )
    own = interpret(config, lm=world.lm)
    assert own.meta["lenses"] == ["logit", "tuned"]
    assert own.query("SELECT count(mcs) AS n FROM latents")[0]["n"] == 48
    own.close()
    for null in nulls:
        found = open_atlas(config.out / f"null-{null}")
        assert found.meta["lenses"] == ["logit"]
        assert found.query("SELECT DISTINCT lens FROM logits") == [{"lens": "logit"}]
        assert found.query("SELECT count(mcs) AS n FROM latents")[0]["n"] == 0
        assert not found.query("SELECT * FROM neighbours WHERE dictionary IS NOT NULL")
        found.close()


def test_the_null_on_shuffled_weights_is_the_dictionary_on_another_model(world: World) -> None:
    from sememe import lm as language_models

    config = world.config("shuffled", n_tokens=2000, nulls=("randomised",))
    interpret(config, lm=world.lm).close()
    other = language_models.load(world.model.replace(randomise="layers"))
    own = sites(world.lm).inputs[0].replace(model_fingerprint=other.fingerprint)
    dictionary = dictionaries.load(world.dictionary)
    dictionary.sites = dictionary.sites.replace(inputs=(own,), outputs=(own,))
    dictionary.save(
        world.root / "moved", torch.randn(16, D_MODEL), extra={"policy": POLICY.resolved(), "store": {}}
    )
    moved = world.config(
        "moved-atlas",
        n_tokens=2000,
        dictionaries=world.root / "moved",
        model=world.model.replace(randomise="layers"),
    )
    interpret(moved, lm=other).close()
    one, two = contents(world.root / "moved-atlas"), contents(world.root / "shuffled" / "null-randomised")
    for table in ("examples", "coactive", "top_tokens"):
        assert one[table] == two[table], table


def test_history_is_of_every_kept_checkpoint_and_self_similarity_of_the_last(world: World) -> None:
    path = save_dictionary(world.root / "settled", sites(world.lm))
    for step, change in ((4, 1.0), (8, 0.1)):
        earlier = dictionaries.load(world.dictionary)
        with torch.no_grad():
            noise = torch.randn(earlier.W_dec.shape, generator=torch.Generator().manual_seed(step))
            earlier.W_dec += change * noise * earlier.W_dec.norm(dim=1, keepdim=True) / D_MODEL**0.5
        at = path / "checkpoints" / f"step-{step:09}"
        earlier.save(
            at, torch.randn(16, D_MODEL), extra={"policy": POLICY.resolved(), "store": {}, "step": step}
        )
    assert [p.name for p in checkpoints_in(path)] == ["step-000000004", "step-000000008"]
    found = interpret(world.config("settled-atlas", dictionaries=path, n_tokens=2000), lm=world.lm)
    last = dictionaries.load(path / "checkpoints" / "step-000000008").decoder_directions()
    truth = torch.nn.functional.cosine_similarity(last, dictionaries.load(path).decoder_directions(), dim=1)
    rows = found.query("SELECT self_similarity FROM latents ORDER BY id")
    np.testing.assert_allclose([row["self_similarity"] for row in rows], truth.detach(), rtol=1e-5)
    now = metrics.unit_rows(dictionaries.load(path).decoder_directions().detach())
    for step in (4, 8):
        before = dictionaries.load(path / "checkpoints" / f"step-{step:09}").decoder_directions().detach()
        rows = found.query("SELECT latent, cosine, norm FROM history WHERE step = ? ORDER BY latent", step)
        assert [row["latent"] for row in rows] == list(range(now.shape[0]))
        cosine = (metrics.unit_rows(before) * now).sum(1)
        np.testing.assert_allclose([row["cosine"] for row in rows], cosine, atol=1e-5)
        np.testing.assert_allclose([row["norm"] for row in rows], before.norm(dim=1), rtol=1e-5)
    assert found.query("SELECT count(DISTINCT step) AS n FROM history")[0]["n"] == 2
    found.close()


def crowds(n: int = 20, d: int = 16) -> tuple[np.ndarray, Neighbours]:
    """Three tight groups of directions, and their nearest."""
    rng = np.random.default_rng(0)
    centres = np.eye(3, d) * 5
    rows = (np.repeat(centres, n, 0) + 0.3 * rng.standard_normal((3 * n, d))).astype(np.float32)
    near = metrics.nearest_directions(torch.from_numpy(rows), torch.from_numpy(rows), 15)
    return rows, Neighbours("decoder", None, near.cosines[:, 1:].numpy(), near.indices[:, 1:].numpy())


def test_groups_on_the_map_are_those_that_were_put_there() -> None:
    rows, near = crowds()
    alive = np.ones(60, bool)
    alive[[3, 25]] = False
    made = make_map(rows, near, alive, seed=0)
    again = make_map(rows, near, alive, seed=0)
    np.testing.assert_array_equal(made.places, again.places)
    assert np.isnan(made.places[~alive]).all() and (made.cluster[~alive] == -1).all()
    truth = np.repeat([0, 1, 2], 20)
    for group in range(made.cluster.max() + 1):
        assert len(set(truth[made.cluster == group])) == 1, "no group mixes two crowds"
    assert (made.cluster[alive] >= 0).mean() > 0.8
    few = make_map(
        rows[:20],
        Neighbours("decoder", None, near.cosines[:20], np.minimum(near.others[:20], 19)),
        alive[:20],
        0,
    )
    assert np.isnan(few.places).all(), "too few for a map"


def near_rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, and each one's seven nearest with itself first, as cosine distances."""
    rows = np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    apart = np.maximum(1 - rows @ rows.T, 0)
    np.fill_diagonal(apart, -1)
    indices = np.argsort(apart, axis=1, kind="stable")[:, :8]
    return rows, indices, np.maximum(np.take_along_axis(apart, indices, axis=1), 0)


def test_neighbours_stay_near_on_the_map() -> None:
    rows, indices, distances = near_rows(300)
    found = layout(rows, indices, distances, seed=3)
    assert found.dtype == np.float32 and found.tobytes() == layout(rows, indices, distances, seed=3).tobytes()
    assert not np.array_equal(found, layout(rows, indices, distances, seed=4))
    drawn = np.random.default_rng(0).normal(size=found.shape)
    kept, by_chance = (trustworthiness(rows, x, n_neighbors=7, metric="cosine") for x in (found, drawn))
    assert kept > 0.93 and by_chance < 0.6


def test_groups_are_named_by_what_most_of_their_latents_fire_on() -> None:
    words = {0: " the", 1: "The", 2: " der", 3: " 12"}
    top = np.array([[0, 3, -1], [1, -1, -1], [0, 2, -1], [2, -1, -1], [2, 3, -1]])
    found = named(np.array([0, 0, 0, 1, 1]), top, words.__getitem__)
    assert [group.n_latents for group in found] == [3, 2]
    assert found[0].label.startswith("“the”") and found[0].tokens[0] == 0
    assert found[1].label == "“der”, “12”"
    assert named(np.array([-1, -1]), top[:2], words.__getitem__) == []


def test_the_map_is_written(world: World) -> None:
    found = interpret(world.config("mapped", n_tokens=2000, map=True), lm=world.lm)
    rows = found.query("SELECT x, y, cluster FROM latents WHERE n_active > 0")
    assert all(np.isfinite([row["x"], row["y"]]).all() for row in rows)
    sizes = Counter(row["cluster"] for row in rows if row["cluster"] is not None)
    assert {row["id"]: row["n_latents"] for row in found.query("SELECT * FROM clusters")} == dict(sizes)
    found.close()


def test_what_cannot_be(world: World) -> None:
    with pytest.raises(ConfigError, match=r"a null must be a known one, got 'pcaa'. Did you mean 'pca'"):
        world.config("x", nulls=("pcaa",))
    with pytest.raises(ConfigError, match="each null must be named once"):
        world.config("x", nulls=("pca", "pca"))
    with pytest.raises(ConfigError, match="n_fit_rows must be left out when no null is fitted to rows"):
        world.config("x", n_fit_rows=9)
    with pytest.raises(ConfigError, match="shuffles a model's weights, which must not be shuffled already"):
        world.config("x", nulls=("randomised",), model=world.model.replace(randomise="layers"))
    other = save_dictionary(world.root / "elsewhere", sites(world.lm, "resid_post.1"))
    with pytest.raises(
        MismatchError,
        match=r"must write where dictionary does, resid_post.0, got elsewhere, which writes to resid_post.1",
    ):
        interpret(world.config("x", against=(other,)), lm=world.lm)
    policy = save_dictionary(world.root / "policy", sites(world.lm), policy=POLICY.replace(drop_positions=2))
    with pytest.raises(MismatchError, match="dictionaries of one pass must have one token policy"):
        interpret_all(world.config("x", dictionaries=(world.dictionary, policy)), lm=world.lm)
    with pytest.raises(ConfigError, match="each dictionary must be named once"):
        interpret_all(world.config("x", dictionaries=(world.dictionary, world.dictionary)), lm=world.lm)
    assert not Path(world.root / "x").exists()
