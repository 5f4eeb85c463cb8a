"""Watching a run: rows never trained on, numbers that agree with a measurement afterwards, bits left as they are."""

import numpy as np
import pytest
import torch
from small_world import POLICY, load_model, text_of, write_corpus, write_model
from test_harvest import config_for
from test_train import config, live_config, planted

from sememe import dictionaries, metrics
from sememe.dictionaries.topk import TopKConfig
from sememe.end_to_end import EndToEnd, EndToEndConfig
from sememe.errors import ConfigError
from sememe.harvest import harvest
from sememe.probes import CrossEntropy, cross_entropy_of
from sememe.source import Batch, HoldsOut, IteratorSource, LiveSource, StoreSource, TensorSource
from sememe.store import open_store
from sememe.toy import PlantedSource, ToyConfig
from sememe.tracking import read_log
from sememe.train import TrainConfig, train, train_sweep
from sememe.train.watch import WATCHED, density_edges, measure

N = 150


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("watch")
    write_corpus(place / "corpus.jsonl", n_documents=400)
    write_model(place / "model")
    return place


@pytest.fixture(scope="module")
def lm(world):
    return load_model(world / "model")


@pytest.fixture(scope="module")
def store(world, lm):
    return harvest(config_for(world, world / "store"), lm=lm)


def blocks():
    """5,000 rows in blocks of different lengths."""
    generator = torch.Generator().manual_seed(0)
    yield from torch.randn(5000, 6, generator=generator).split([100, 7, 893, 1, 999, 3000])


@pytest.fixture(params=["tensor", "store", "small_groups", "live", "context", "planted", "iterator"])
def make(request, store, lm, world):
    def small() -> StoreSource:
        source = StoreSource(store, ("resid_post.0",), seed=3)
        source.group_shards, source._cursor.n_groups = 1, len(store.info.shards)
        return source

    return {
        "tensor": lambda: TensorSource(
            torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)), seed=3
        ),
        "store": lambda: StoreSource(store, ("resid_post.0",), seed=3),
        "small_groups": small,
        "live": lambda: LiveSource(
            lm, text_of(world / "corpus.jsonl"), POLICY, ("resid_post.0",), seed=3, buffer_mb=1, batch_rows=8
        ),
        "context": lambda: context_source(lm, world),
        "iterator": lambda: IteratorSource(blocks, seed=3, n_rows=5000, buffer_rows=3000),
        "planted": lambda: PlantedSource(ToyConfig(d=6, n_features=12, n_active=2, seed=3)),
    }[request.param]


def context_source(lm, world, **changes):
    where = ("resid_post.0",)
    objective = EndToEnd(EndToEndConfig(objective="kl"), lm, where, where)
    return objective.source(text_of(world / "corpus.jsonl", **changes), POLICY, where)


def keys(x: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in x.numpy()}


# -- rows that are set aside ------------------------------------------------------------------------


def test_held_out_rows_are_always_the_same_and_never_come(make):
    one, other = make(), make()
    assert isinstance(one, HoldsOut)
    before = one.n_rows
    held = one.hold_out(N)
    assert torch.equal(held.x, other.hold_out(N).x) and held.target is held.x
    assert 0 < held.x.shape[0] <= N + (before or 0) // 16 and held.x.shape[1] == one.d_in
    seen = keys(one.sample(500).x)
    for _ in range(20 if before is None else -(-before // 100) + 5):  # more than a pass
        seen |= keys(one.next_batch(100).x)
    shared = len(seen & keys(held.x)) / len(keys(held.x))
    if isinstance(one, TensorSource):
        assert shared == 0 and len(seen) == one.n_rows == before - held.x.shape[0]
    if isinstance(one, IteratorSource):
        assert shared == 0 and one.n_rows == before - held.x.shape[0] and held.x.shape[0] == N
    # Elsewhere two rows may well be equal: no feature is active, or the same two tokens begin a context.
    assert shared < 0.5 and (before is None or one.n_rows <= before - held.x.shape[0])


def test_an_iterator_gives_every_other_row_once_a_pass():
    source = IteratorSource(blocks(), seed=1, buffer_rows=1000)  # read once, held out all the same
    held = keys(source.hold_out(N).x)
    given = []
    while (batch := source.next_batch(100)).x.shape[0]:
        given += [row.tobytes() for row in batch.x.numpy()]
    assert len(held) == 1000 // 20 and len(given) == len(set(given)) == 5000 - len(held)
    assert not held & set(given)
    pairs = IteratorSource(
        [(torch.arange(400.0)[:, None], torch.arange(400.0)[:, None] * 2)], buffer_rows=400
    )
    batch = pairs.hold_out(7)
    assert batch.x.shape[0] == 7 and torch.equal(batch.target, batch.x * 2)


def test_a_run_end_to_end_holds_out_what_a_live_run_does(lm, world):
    text, where = text_of(world / "corpus.jsonl"), ("resid_post.0",)
    live = LiveSource(lm, text, POLICY, where, buffer_mb=1, batch_rows=16)
    source = context_source(lm, world)
    assert torch.equal(source.hold_out(N).x, live.hold_out(N).x)
    probes = [cross_entropy_of(one, [one.sites], 200, 4)[0] for one in (live, source)]
    assert probes[0].base == probes[1].base
    with pytest.raises(ConfigError, match="heldout_fraction must be > 0, and the split train"):
        context_source(lm, world, heldout_fraction=0.0).hold_out(10)


def test_what_a_source_cannot_set_aside_is_said_where_it_was_asked_for(tmp_path):
    class Bare:
        """A source without hold_out."""

        def __init__(self):
            self._inner = TensorSource(torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))

        def __getattr__(self, name):
            if name == "hold_out":
                raise AttributeError(name)
            return getattr(self._inner, name)

    plain = {"out": tmp_path / "d", "n_tokens": 256, "batch_size": 64}
    small = TrainConfig.build(plain | {"architecture": {"kind": "topk", "k": 1, "d_sae": 8}})
    with pytest.raises(
        ConfigError, match=r"can set no rows aside, got 100 and a Bare, which has no hold_out"
    ):
        train(small.replace(watch_rows=100), source=Bare())
    with pytest.raises(
        ConfigError, match=r"when nothing is watched, got 256 and a Bare that sets no row aside"
    ):
        train(small.replace(watch_every=256), source=Bare())
    with pytest.raises(ConfigError, match="a TensorSource, which holds fewer than 20 rows"):
        train(small.replace(watch_rows=100), source=TensorSource(torch.randn(19, 4)))
    train(small, source=Bare())
    assert not (tmp_path / "d" / WATCHED).exists()


def test_a_store_holds_out_whole_documents(store):
    source = StoreSource(store, ("resid_post.0",), seed=1)
    held = keys(source.hold_out(N).x)
    of: dict[bytes, set[int]] = {}
    for index in range(len(store.info.shards)):
        shard = store.read(index, ("resid_post.0",))
        for row, document in zip(shard.activations["resid_post.0"].float(), shard.doc_ids, strict=True):
            of.setdefault(row.numpy().tobytes(), set()).add(int(document))

    def documents(rows: set[bytes]) -> set[int]:
        return set().union(*(of[row] for row in rows if len(of[row]) == 1))

    trained = keys(source.next_batch(source.n_rows).x)
    assert documents(held) and not documents(held) & documents(trained)
    assert source.n_rows >= 0.9 * store.info.n_rows


def test_another_seed_holds_out_other_rows(store):
    one, two = (keys(StoreSource(store, ("resid_post.0",), seed=seed).hold_out(N).x) for seed in (1, 2))
    assert len(one & two) < len(one) / 2


def test_a_held_out_stream_goes_on_with_the_same_bits(make):
    source = make()
    source.hold_out(N)
    source.next_batch(64)
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in source.state_dict().items()}
    expected = [source.next_batch(64).x for _ in range(5)]
    other = make()
    other.hold_out(N)
    other.load_state_dict(state)
    for want in expected:
        assert torch.equal(other.next_batch(64).x, want)


def test_few_rows_are_left_to_training():
    source = TensorSource(torch.randn(40, 3))
    assert source.hold_out(1000).x.shape[0] == 2 and source.n_rows == 38


# -- what is measured --------------------------------------------------------------------------------


def test_bins_tell_small_counts_apart_and_cover_everything():
    for n_rows in (1, 7, 100, 4096):
        edges = np.array(density_edges(n_rows))
        assert edges[0] < 1 / n_rows and edges[-1] == 1.0 and (np.diff(edges) > 0).all()
        counts, _ = np.histogram(np.arange(1, n_rows + 1) / n_rows, bins=edges)
        assert counts.sum() == n_rows and (counts > 0).all(), "no bin between two counts stays empty"


def test_the_log_agrees_with_a_measurement_afterwards(tmp_path):
    _, x = planted()
    out = tmp_path / "d"
    train(config("topk", out, watch_rows=N, watch_every=2000), source=TensorSource(x))
    lines = read_log(out / WATCHED)
    assert [line["tokens"] for line in lines] == [0, 2048, 4096, 6144, 8192, 10240]
    assert [line["step"] for line in lines] == [0, 8, 16, 24, 32, 40]
    held = TensorSource(x).hold_out(N)
    dictionary = dictionaries.load(out)
    encoded = dictionary.encode(held.x)
    quality, sparsity = metrics.Reconstruction(), metrics.Sparsity(dictionary.d_sae)
    quality.update(held.target, dictionary.decode(encoded, held.x))
    sparsity.update(encoded)
    assert lines[-1]["fvu"] == pytest.approx(quality.compute()["fvu"].value, rel=1e-3)
    assert lines[-1]["l0"] == pytest.approx(sparsity.compute()["l0"].value)
    assert lines[-1]["frac_dead"] == pytest.approx(1 - sparsity.compute()["frac_alive"].value)
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert "edges" in lines[0] and not any("edges" in line for line in lines[1:])
    for line in lines:
        assert sum(line["density"]) + round(line["frac_dead"] * 64) == 64, "every latent is counted once"


@torch.no_grad()
def test_predicting_the_mean_has_fvu_one():
    x = torch.randn(300, 5) + 3
    dictionary = dictionaries.build(TopKConfig(d_sae=4, k=1), 5, 5)
    dictionary.W_enc.zero_()
    dictionary.b_enc.fill_(-1.0)
    dictionary.b_dec.copy_(x.mean(0))
    found = measure(dictionary, Batch(x, x), 64)
    assert found["fvu"] == pytest.approx(1.0) and found["frac_dead"] == 1.0 and found["l0"] == 0.0


def test_watching_leaves_the_bits_alone(tmp_path):
    _, x = planted()
    for name, every in (("often", 256), ("seldom", 10**9)):
        train(config("batch_topk", tmp_path / name, watch_rows=N, watch_every=every), source=TensorSource(x))
    often, seldom = (tmp_path / name / "weights.safetensors" for name in ("often", "seldom"))
    assert often.read_bytes() == seldom.read_bytes()
    assert len(read_log(tmp_path / "often" / WATCHED)) == 41
    assert len(read_log(tmp_path / "seldom" / WATCHED)) == 2


def test_a_resumed_run_has_the_same_log_and_bits(tmp_path):
    _, x = planted()
    calls = []

    def counted(reconstruct):
        calls.append(1)
        if len(calls) == 12:
            raise RuntimeError("stopped here")
        return {"norm": float(reconstruct(x[:10]).norm())}

    def plain(reconstruct):
        return {"norm": float(reconstruct(x[:10]).norm())}

    options = {"watch_rows": N, "watch_every": 512, "checkpoint_every_seconds": 0.0}
    train(config("topk", tmp_path / "whole", **options), source=TensorSource(x), probes=[plain])
    with pytest.raises(RuntimeError, match="stopped here"):
        train(config("topk", tmp_path / "cut", **options), source=TensorSource(x), probes=[counted])
    train(config("topk", tmp_path / "cut", **options), source=TensorSource(x), probes=[counted])
    for name in (WATCHED, "weights.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert len(calls) == 12 + 10  # 21 measurements; the one that failed was made again


def test_nothing_is_watched_without_rows(tmp_path):
    _, x = planted()
    train(config("topk", tmp_path / "d", watch_rows=0), source=TensorSource(x))
    assert not (tmp_path / "d" / WATCHED).exists()
    with pytest.raises(ConfigError, match="watch_every must be left out when nothing is watched, got 7"):
        config("topk", tmp_path / "d", watch_rows=0, watch_every=7)


# -- with a language model ---------------------------------------------------------------------------


def test_cross_entropy_of_the_activations_themselves_and_of_nothing(world, lm, store):
    source = StoreSource(store, ("resid_post.0",))
    text = text_of(world / "corpus.jsonl")
    probe = CrossEntropy(lm, source.sites, text, POLICY, 600, batch_rows=4)
    same = probe(lambda x: x)
    assert same["ce_recovered_zero"] == pytest.approx(1.0, abs=1e-4)
    assert same["ce_increase"] == pytest.approx(0.0, abs=1e-5)
    nothing = probe(torch.zeros_like)
    assert nothing["ce_recovered_zero"] == pytest.approx(0.0, abs=1e-6)
    assert nothing["ce_increase"] == pytest.approx(probe.zero - probe.base, rel=1e-6)
    whole = CrossEntropy(lm, source.sites, text, POLICY, 600, batch_rows=16)
    assert whole.base == pytest.approx(probe.base, rel=1e-6)


def test_a_store_brings_its_model(world, lm, tmp_path):
    with_path = config_for(world, tmp_path / "store").replace(
        model={"model": str(world / "model"), "dtype": "float32"}
    )
    harvest(with_path)
    out = tmp_path / "d"
    train(
        config("topk", out, watch_ce_tokens=500, watch_rows=100, watch_every=4000, n_tokens=8192).replace(
            store=tmp_path / "store", inputs=("resid_post.0",)
        )
    )
    lines = read_log(out / WATCHED)
    assert all(-5 < line["ce_recovered_zero"] < 1.5 for line in lines)
    assert lines[-1]["tokens"] == 8192
    source = StoreSource(open_store(tmp_path / "store"), ("resid_post.0",), seed=0)
    probe = cross_entropy_of(source, [source.sites], 500, 16)[0]
    afterwards = probe(dictionaries.load(out))
    for name, value in afterwards.items():
        assert lines[-1][name] == pytest.approx(value, abs=1e-4), name
    assert lines[-1]["ce_increase"] < lines[0]["ce_increase"] and lines[-1]["fvu"] < lines[0]["fvu"]


def test_a_live_run_watches_cross_entropy_unless_told_otherwise(world):
    live = live_config(world, world / "d")
    assert live.ce_tokens == 512
    assert live.replace(watch_ce_tokens=0).ce_tokens == live.replace(watch_rows=0).ce_tokens == 0
    assert live.replace(watch_ce_tokens=100, watch_rows=0).ce_tokens == 100
    assert live.replace(text=text_of(world / "corpus.jsonl", heldout_fraction=0.0)).ce_tokens == 0
    assert config("topk", world / "d").ce_tokens == 0, "a store's model would have to be loaded"


def test_what_cannot_be_watched_is_said(world, lm, tmp_path):
    none_held = text_of(world / "corpus.jsonl", heldout_fraction=0.0)
    live = LiveSource(lm, none_held, POLICY, ("resid_post.0",), buffer_mb=1, batch_rows=8)
    with pytest.raises(ConfigError, match=r"heldout_fraction must be > 0, .*got 0 and train.*--watch-rows 0"):
        live.hold_out(10)
    with pytest.raises(ConfigError, match="heldout_fraction must be > 0 for ce_recovered_zero"):
        cross_entropy_of(live, [live.sites], 100, 4)
    with pytest.raises(ConfigError, match="watch_ce_tokens needs one store, or a live run"):
        cross_entropy_of(TensorSource(torch.randn(100, 3)), [None], 100, 4)


def test_a_sweep_is_watched_too(tmp_path):
    _, x = planted()
    options = {"watch_rows": N, "watch_every": 4000, "sweep": ("lr=1e-3,3e-3",), "lr": None}
    swept = config("topk", tmp_path / "s", **options)
    sweep = train_sweep(swept, source=TensorSource(x))
    alone = config("topk", tmp_path / "d", watch_rows=N, watch_every=4000)
    train(alone, source=TensorSource(x))
    logs = [read_log(sweep.path(name) / WATCHED) for name in sweep.names]
    assert logs[1] == read_log(tmp_path / "d" / WATCHED) != logs[0]


# -- in the report -----------------------------------------------------------------------------------


def test_the_figures_draw_what_was_watched():
    from sememe.figures.watched import density_map, watched_plot

    edges = density_edges(100)
    lines = [
        {"step": s, "tokens": 100 * s, "fvu": 1 / (s + 1), "l0": 3.0, "frac_dead": 0.1} for s in range(5)
    ]
    for line in lines:
        line["density"] = [line["step"]] * (len(edges) - 1)
    lines[0]["edges"] = edges
    assert len(watched_plot(lines).axes) == 3
    (mesh,) = density_map(lines).axes[0].collections
    assert mesh.get_array().shape == (len(edges) - 1, 5)
    assert watched_plot([]) is None and density_map([]) is None and density_map(lines[:1]) is None
