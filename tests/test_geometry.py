"""Geometry end to end: numbers per latent, nulls, pairs, checkpoints, the page; errors that say what to do."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluate_world import HOOKPOINT, World, autoencoder, make_world, save
from test_report import Page

from sememe import artifact, dictionaries, metrics
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ArtifactError, ConfigError, MismatchError, ShapeError
from sememe.geometry import GeometryConfig, geometry
from sememe.store import open_store
from sememe.train import TrainConfig, train

D = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_world(tmp_path_factory.mktemp("geometry"))
    for name, seed, d_sae in (("one", 0, 48), ("two", 1, 48), ("large", 2, 96)):
        options = {
            "store": made.store,
            "inputs": (HOOKPOINT,),
            "out": made.place / "dictionaries" / name,
            "architecture": {"kind": "topk", "d_sae": d_sae, "k": 4, "dead_after_tokens": 2000},
            "n_tokens": 20_000,
            "batch_size": 256,
            "seed": seed,
            "threads": 1,
            "keep_checkpoints": name == "one",
        }
        train(TrainConfig.build(options))
    yield made


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> artifact.Artifact:
    return geometry(config_for(world, tmp_path_factory.mktemp("done") / "g", embeddings=True), lm=world.lm)


def config_for(world: World, out: Path, **changes: object) -> GeometryConfig:
    options = {
        "dictionaries": (world.place / "dictionaries",),
        "store": world.store,
        "n_rows": 1500,
        "n_correlated": 8,
        "out": out,
    }
    return GeometryConfig.build({**options, **changes})


def read(found: artifact.Artifact) -> dict:
    return json.loads((found.path / "geometry.json").read_text())


def test_each_latent_has_its_numbers_and_their_mean_an_interval_and_a_null(world, done):
    data = read(done)
    assert [row["name"] for row in data["rows"]] == ["large", "one", "two"]
    row = data["rows"][1]
    dictionary = dictionaries.load(world.place / "dictionaries" / "one")
    W_dec = dictionary.decoder_directions().detach()
    table = pq.read_table(done.path / row["latents"])
    assert table.num_rows == 48 and table.schema.metadata[b"dictionary"] == b"one"
    oracle = {
        "kurtosis": metrics.moments(W_dec).kurtosis,
        "effective_neurons": metrics.effective_neurons(W_dec),
        "encoder_decoder_cosine": metrics.encoder_decoder_cosine(dictionary.W_enc, W_dec),
        "unembedding_cosine": metrics.token_match(W_dec, world.lm.embeddings()[1].float())[0],
    }
    for name, values in oracle.items():
        assert np.allclose(table[name].to_numpy(), values.detach().numpy(), atol=1e-6), name
        one = row["numbers"][name]
        assert one["value"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert one["low"] < one["value"] < one["high"]
    assert row["numbers"]["kurtosis"]["random"] == pytest.approx(3, abs=0.4)
    assert (
        abs(row["numbers"]["encoder_decoder_cosine"]["random"])
        < 0.1
        < row["numbers"]["encoder_decoder_cosine"]["low"]
    )
    classes = [row["numbers"][f"share_{name}"]["value"] for name in ("one_sparse", "ten_sparse", "dense")]
    assert sum(classes) == pytest.approx(1)
    assert "null_space_share" not in row["numbers"], "no single projection reads the residual stream"


def test_densities_are_those_of_the_stores_rows(world, done):
    row = read(done)["rows"][2]
    dictionary = dictionaries.load(world.place / "dictionaries" / "two")
    store = open_store(world.store)
    x = torch.cat([store.read(i, (HOOKPOINT,)).activations[HOOKPOINT] for i in range(len(store.info.shards))])
    everything = geometry_density(dictionary, x.float())
    density = pq.read_table(done.path / row["latents"])["density"].to_numpy()
    assert np.abs(density - everything).mean() < 0.01 and np.corrcoef(density, everything)[0, 1] > 0.99
    assert row["l0"]["low"] <= row["l0"]["value"] <= row["l0"]["high"]
    assert row["l0"]["value"] == pytest.approx(4, abs=0.2)
    assert row["rare"]["share"]["value"] == pytest.approx((density < 1e-4).mean())
    assert row["rare"]["n"] == (density < 1e-4).sum()
    assert set(row["correlations"]) == {"latents", "neurons", "random_directions"}
    for one in row["correlations"].values():
        for name in ("mean_absolute", "share_small"):
            assert 0 <= one[name]["low"] <= one[name]["value"] <= one[name]["high"] <= 1
    assert row["numbers"]["density"]["random"] == pytest.approx(4 / 48)  # four of them on every row


def geometry_density(dictionary: dictionaries.Dictionary, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        dense = dictionary.encode(x).to_dense()
    return (dense != 0).double().mean(0).numpy()


def test_pairs_are_matched_beside_random_directions(world, done):
    data = read(done)
    assert [(pair["small"], pair["large"]) for pair in data["pairs"]] == [
        ("one", "two"),
        ("one", "large"),
        ("two", "large"),
    ]
    pair = data["pairs"][1]
    small, large = (
        dictionaries.load(world.place / "dictionaries" / name).decoder_directions().detach()
        for name in ("one", "large")
    )
    test = metrics.larger_dictionary_test(small, large)
    assert pair["mmcs_small_to_large"]["value"] == pytest.approx(test["mmcs"], abs=1e-6)
    assert pair["matched_cosine"]["value"] == pytest.approx(test["mean_matched_cosine"], abs=1e-6)
    assert pair["mmcs_large_to_small"]["value"] == pytest.approx(metrics.mmcs(large, small), abs=1e-6)
    for name in ("mmcs_small_to_large", "matched_cosine"):
        assert pair[name]["random"] < pair[name]["low"], (
            "trained on the same rows, they agree more than chance"
        )
        assert sum(pair[name]["histogram"]["counts"]) == 48
    found = metrics.splits(small, large)
    split = pair["splits"]
    assert split["n"] == found.parents.numel()
    indicator = torch.zeros(48, dtype=torch.float64)
    indicator[found.parents] = 1
    expected = metrics.over_latents(indicator)
    assert (split["share"]["value"], split["share"]["low"], split["share"]["high"]) == expected[:3]
    by_chance = metrics.splits(small, metrics.random_rows(96, D)).parents.numel() / 48
    assert split["share"]["random"] == by_chance
    above = pair["matched_cosine"]["share_above_0.9"]
    own = metrics.match(small, large).cosines > 0.9
    assert above["value"] == pytest.approx(float(own.double().mean()))
    assert above["low"] <= above["value"] <= above["high"] and above["random"] < 0.1


def test_random_directions_are_not_where_a_training_started(world):
    """Equal seeds and sizes: were they one stream, the null would resemble the dictionary."""
    start = torch.randn(48, D, generator=torch.Generator().manual_seed(0))
    random = metrics.random_rows(48, D, 0)
    assert abs(float((metrics.unit_rows(start) * metrics.unit_rows(random)).sum(1).mean())) < 0.15
    assert torch.equal(random, metrics.random_rows(48, D, 0))
    assert not torch.equal(random, metrics.random_rows(48, D, 1))


def test_kept_checkpoints_say_which_latents_settled(world, done):
    rows = read(done)["rows"]
    assert ["history" in row for row in rows] == [False, True, False]
    past = rows[1]["history"]
    folder = world.place / "dictionaries" / "one"
    steps = [int(path.name.removeprefix("step-")) for path in sorted((folder / "checkpoints").iterdir())]
    assert past["steps"][: len(steps)] == steps == [2**n for n in range(len(steps))]
    assert past["steps"][-1] == 20_000 // 256
    kept = [folder / "checkpoints" / f"step-{step:09}" for step in steps] + [folder]
    found = metrics.self_similarity(dictionaries.load(path).decoder_directions().detach() for path in kept)
    assert past["n_reached_0.9"] == int(found.reached.sum()) > 0
    means = [one["value"] for one in past["mean"]]
    assert means == pytest.approx(found.similarity.double().mean(1).tolist())
    expected = metrics.over_latents(found.reached)
    reached = past["reached_0.9"]
    assert (reached["value"], reached["low"], reached["high"]) == expected[:3]
    assert reached["random"] < 0.1 < reached["low"], "drawn anew each time, directions do not stay"
    assert all(one["low"] <= one["value"] <= one["high"] for one in past["mean"])
    assert past["fell_below_0.6"]["value"] == past["n_fell_below_0.6"] / 48


def clustered(world: World, folder: Path, seed: int, direction: torch.Tensor) -> Path:
    """A dictionary of which 16 latents read one direction, upside down to all rows, so that none of them fires."""
    made = dictionaries.build(TopKConfig(k=4, d_sae=48), D, D, autoencoder(world.lm))
    noise = torch.Generator().manual_seed(seed)
    made.initialise(
        torch.randn(64, D, generator=noise),
        torch.randn(64, D, generator=noise),
        torch.Generator().manual_seed(seed),
    )
    with torch.no_grad():
        made.W_enc[:, :16] = direction[:, None] + 0.03 * torch.randn(D, 16, generator=noise)
        made.b_enc[:16] = -1e4
    return save(made, folder)


def test_the_rare_cluster_stands_beside_as_many_other_latents(world, tmp_path):
    direction = torch.randn(D, generator=torch.Generator().manual_seed(9))
    places = [clustered(world, tmp_path / name, seed, direction) for seed, name in enumerate(("a", "b"))]
    found = geometry(config_for(world, tmp_path / "g", dictionaries=tuple(places)))
    data = read(found)
    for row in data["rows"]:
        rare = row["rare"]
        assert rare["n"] == rare["n_coincide"] == 16
        assert rare["share"]["low"] < 16 / 48 == rare["share"]["value"] < rare["share"]["high"]
        assert rare["share"]["random"] == rare["silent"]["random"] < 0.2
        # of 16 latents, all of them: Wilson's interval begins at 16 / (16 + 1.96^2)
        assert rare["encoders_coincide"]["value"] == 1
        assert rare["encoders_coincide"]["low"] == pytest.approx(16 / (16 + 1.96**2), abs=1e-3)
        assert rare["encoders_coincide"]["random"] < 0.2, "other latents read directions of their own"
        assert rare["decoders_coincide"]["high"] < 0.3
        assert rare["decoders_coincide"]["random"] == pytest.approx(0, abs=0.1)
    assert data["rare_agreement"]["names"] == ["a", "b"]
    cosine = data["rare_agreement"]["cosines"][0][1]
    assert 0.97 < cosine["low"] <= cosine["value"] <= cosine["high"] + 1e-3
    assert abs(cosine["random"]) < 0.3
    text = (found.path / "geometry.md").read_text()
    assert "16 below 0.0001" in text and "cosine to b" in text


def test_a_dictionary_without_rare_latents_says_so(world, tmp_path):
    one = world.place / "dictionaries" / "one"
    rare = read(geometry(config_for(world, tmp_path / "g", dictionaries=(one,), rare_below=1e-9)))["rows"][0][
        "rare"
    ]
    if rare["n"] == 0:
        assert (
            rare["encoders_coincide"]["value"] is None
            and rare["encoders_coincide"]["cause"] == "there are none"
        )
        assert rare["encoders_coincide"]["random"] is None
    assert rare["n"] == rare["silent"]["value"] * 48


def test_the_page_has_the_scatter_plot_and_every_table(done):
    text = (done.path / "geometry.html").read_text()
    page = Page(text)
    for words in ("Means over latents", "The rare cluster", "Correlations", "Over training", "Two by two"):
        assert f">{words}</h2>" in text
    assert "one neuron, ten, or many" in (done.path / "figures" / "neurons-0.svg").read_text()
    assert page.loads == [] and page.links == [] and "script" not in page.tags


def test_a_probe_lists_the_latents_nearest_to_it(world, tmp_path):
    W_dec = dictionaries.load(world.place / "dictionaries" / "one").decoder_directions().detach()
    np.save(tmp_path / "probe.npy", (3 * W_dec[7]).numpy())
    found = geometry(
        config_for(
            world, tmp_path / "g", probe=tmp_path / "probe.npy", store=None, n_rows=65_536, n_correlated=64
        ).replace(dictionaries=(world.place / "dictionaries" / "one",))
    )
    (row,) = read(found)["rows"]
    assert row["probe"]["nearest"][0] == {"latent": 7, "cosine": pytest.approx(1, abs=1e-5)}
    assert row["probe"]["random"] < 0.9 and "density" not in row["numbers"]


def test_the_output_projections_null_space_is_asked_where_one_reads(world, tmp_path):
    lm = world.lm
    W_out = lm.output_projection("mlp_act.1")
    x = torch.randn(3, W_out.shape[0], generator=torch.Generator().manual_seed(0))
    module = lm.hf.model.layers[1].mlp.down_proj
    torch.testing.assert_close(x @ W_out, module(x.to(lm.dtype)).float(), rtol=1e-4, atol=1e-5)
    assert lm.output_projection("resid_post.1") is None
    made = dictionaries.build(TopKConfig(k=4, d_sae=60), 40, 40, autoencoder(lm, "mlp_act.1"))
    made.initialise(torch.randn(64, 40), torch.randn(64, 40), torch.Generator().manual_seed(5))
    place = save(made, tmp_path / "mlp")
    found = geometry(GeometryConfig(dictionaries=(place,), out=tmp_path / "g", embeddings=True), lm=lm)
    one = read(found)["rows"][0]["numbers"]["null_space_share"]
    assert one["random"] == pytest.approx(1 - D / 40, abs=0.06), "what 24 of 40 dimensions leave unseen"


def test_it_is_reused_and_made_again_for_other_options(world, done):
    config = config_for(world, done.path, embeddings=True)
    before = (done.path / "meta.json").stat().st_mtime_ns
    assert geometry(config, lm=world.lm).fingerprint == done.fingerprint
    assert (done.path / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match=r"must have been made with this config"):
        geometry(config.replace(seed=3), lm=world.lm)


def test_the_same_twice(world, done, tmp_path):
    again = geometry(config_for(world, tmp_path / "g", embeddings=True), lm=world.lm)
    for name in ("geometry.json", "geometry.html"):
        assert (again.path / name).read_bytes() == (done.path / name).read_bytes()


def test_what_cannot_be_asked_says_why(world, tmp_path):
    def ask(**changes: object) -> None:
        geometry(config_for(world, tmp_path / "g", **changes), lm=world.lm)

    bare = dictionaries.build(TopKConfig(k=4, d_sae=48), D, D)
    bare.initialise(torch.randn(64, D), torch.randn(64, D), torch.Generator().manual_seed(0))
    bare = save(bare, tmp_path / "bare")
    wide = dictionaries.build(TopKConfig(k=4, d_sae=48), 40, 40, autoencoder(world.lm, "mlp_act.1"))
    wide.initialise(torch.randn(64, 40), torch.randn(64, 40), torch.Generator().manual_seed(0))
    wide = save(wide, tmp_path / "wide")
    one = world.place / "dictionaries" / "one"
    with pytest.raises(ArtifactError, match="nowhere"):
        ask(dictionaries=(tmp_path / "nowhere",))
    with pytest.raises(ConfigError, match="each dictionary must be named once"):
        ask(dictionaries=(one, one))
    with pytest.raises(ShapeError, match=r"must write outputs of one width, 24 like one, got 40 of wide"):
        ask(dictionaries=(one, wide))
    with pytest.raises(
        MismatchError, match=r"must know its model and hookpoint to be compared with a store, got none"
    ):
        ask(dictionaries=(bare,))
    with pytest.raises(MismatchError, match=r"must hold mlp_act\.1"):
        ask(dictionaries=(wide,))
    with pytest.raises(
        ConfigError, match=r"n_rows must be left out when no store is named: it has no effect then, got 9"
    ):
        ask(store=None, n_correlated=64, n_rows=9)
    np.save(tmp_path / "short.npy", np.ones(5))
    with pytest.raises(ShapeError, match=r"one direction of d_out=24 numbers, got float64 of shape \(5,\)"):
        ask(probe=tmp_path / "short.npy")
    np.save(tmp_path / "zero.npy", np.zeros(D))
    with pytest.raises(ConfigError, match=r"a probe must be a direction, got a vector of length 0"):
        ask(probe=tmp_path / "zero.npy")
    (tmp_path / "text.npy").write_text("no numbers")
    with pytest.raises(ConfigError, match=r"probe must be a \.npy file of numbers, got .*text\.npy"):
        ask(probe=tmp_path / "text.npy")
    assert not (tmp_path / "g").exists()


def test_dictionaries_of_other_places_are_compared_with_a_notice(world, tmp_path):
    made = dictionaries.build(TopKConfig(k=4, d_sae=48), D, D, autoencoder(world.lm, "mlp_out.2"))
    made.initialise(torch.randn(64, D), torch.randn(64, D), torch.Generator().manual_seed(0))
    elsewhere = save(made, tmp_path / "elsewhere")
    here = world.place / "dictionaries" / "one"
    found = geometry(GeometryConfig(dictionaries=(here, elsewhere), out=tmp_path / "g"))
    assert read(found)["notices"][0].startswith("Dictionaries are of different hookpoints or models: ")
    alone = geometry(GeometryConfig(dictionaries=(here,), out=tmp_path / "h"))
    assert read(alone)["notices"] == [] and read(alone)["pairs"] == []
