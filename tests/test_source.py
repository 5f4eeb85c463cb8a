"""Streams of activations: every row once per pass, exact resume, the same iterator from a store and live."""

import pytest
import torch
from small_world import POLICY, load_model, text_of, write_corpus, write_model
from test_harvest import config_for

from sememe.dictionaries import Site, Sites
from sememe.errors import ConfigError, HookpointError, ShapeError
from sememe.harvest import harvest
from sememe.source import LiveSource, Source, StoreSource, TensorSource


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("source")
    write_corpus(place / "corpus.jsonl")
    write_model(place / "model")
    return place


@pytest.fixture(scope="module")
def lm(world):
    return load_model(world / "model")


@pytest.fixture(scope="module")
def store(world, lm):
    return harvest(config_for(world, world / "store"), lm=lm)


@pytest.fixture(params=["tensor", "store", "small_groups", "live", "live_few"])
def make(request, store, lm, world):
    def live(positions_per_context: int | None = None) -> LiveSource:
        return LiveSource(
            lm,
            text_of(world / "corpus.jsonl"),
            POLICY,
            ("resid_post.0",),
            seed=3,
            buffer_mb=1,
            batch_rows=8,
            positions_per_context=positions_per_context,
        )

    def small() -> StoreSource:
        source = StoreSource(store, ("resid_post.0",), seed=3, group_mb=1)
        source.group_shards, source._cursor.n_groups = 1, len(store.info.shards)
        return source

    return {
        "tensor": lambda: TensorSource(
            torch.randn(500, 6, generator=torch.Generator().manual_seed(0)), seed=3
        ),
        "store": lambda: StoreSource(store, ("resid_post.0",), seed=3),
        "small_groups": small,
        "live": live,
        "live_few": lambda: live(5),
    }[request.param]


def test_every_source_keeps_the_contract(make):
    source = make()
    assert isinstance(source, Source)
    batch = source.next_batch(100)
    assert batch.x.shape == (100, source.d_in) and batch.x.dtype == torch.float32
    assert batch.target is batch.x


def test_the_stream_goes_on_with_the_same_bits(make):
    source = make()
    for _ in range(5):
        source.next_batch(64)
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in source.state_dict().items()}
    expected = [source.next_batch(64).x for _ in range(40)]  # past a pass or a refill
    other = make()
    other.load_state_dict(state)
    for want in expected:
        assert torch.equal(other.next_batch(64).x, want)


def test_sampling_does_not_move_the_stream(make):
    one, two = make(), make()
    one.sample(50)
    if isinstance(one, LiveSource):  # its buffer is filled by whichever comes first
        two.sample(1)
    assert torch.equal(one.next_batch(32).x, two.next_batch(32).x)


def test_a_pass_over_a_store_is_every_row_once(store):
    source = StoreSource(store, ("resid_post.0",), seed=1)
    n = store.info.n_rows
    seen = torch.cat([source.next_batch(97).x for _ in range(n // 97)] + [source.next_batch(n % 97).x])
    stored = torch.cat(
        [store.read(i, ["resid_post.0"]).activations["resid_post.0"] for i in range(len(store.info.shards))]
    )
    assert torch.equal(seen.sort(0).values, stored.float().sort(0).values)
    assert source._cursor.epoch == 1
    again = torch.cat([source.next_batch(97).x for _ in range(3)])
    assert not torch.equal(again, seen[: 3 * 97]), "the second pass has another order"


def test_several_hookpoints_are_concatenated(store):
    source = StoreSource(store, ("resid_post.0", "mlp_out.1"), ("mlp_out.1",))
    batch = source.next_batch(10)
    assert batch.x.shape == (10, 64) and batch.target.shape == (10, 32)
    assert torch.equal(batch.x[:, 32:], batch.target)
    assert [s.hookpoint for s in source.sites.inputs] == ["resid_post.0", "mlp_out.1"]
    assert (source.sites.inputs[1].start, source.sites.inputs[1].stop) == (32, 64)


def test_live_rows_are_rows_of_the_store(lm, world, tmp_path):
    """The same text, policy and norm limit give the same rows, stored or live."""
    store = harvest(config_for(world, tmp_path / "all", n_tokens=10**6, hookpoints=("resid_post.0",)), lm=lm)
    limits = {"resid_post.0": store.info.hookpoints["resid_post.0"].max_norm}
    live = LiveSource(
        lm,
        text_of(world / "corpus.jsonl"),
        POLICY,
        ("resid_post.0",),
        buffer_mb=1,
        batch_rows=8,
        max_norms=limits,
    )
    shards = [
        store.read(i, ["resid_post.0"]).activations["resid_post.0"] for i in range(len(store.info.shards))
    ]
    known = {tuple(row) for row in torch.cat(shards).float().tolist()}
    assert all(tuple(row) in known for row in live.next_batch(500).x.tolist())


def test_live_rows_of_a_few_positions_of_each_context(lm, world):
    made = {
        n: LiveSource(
            lm,
            text_of(world / "corpus.jsonl"),
            POLICY,
            ("resid_post.0",),
            buffer_mb=1,
            batch_rows=8,
            positions_per_context=n,
        )
        for n in (None, 5)
    }
    everything, few = (source._next_forward()["resid_post.0"] for source in made.values())
    assert few.shape[0] == 8 * 5 < everything.shape[0]
    assert bool((few[:, None] == everything[None]).all(2).any(1).all()), "some of the same rows"


def test_errors(store, lm, world):
    with pytest.raises(HookpointError, match="a hookpoint must be chosen when the store holds several"):
        StoreSource(store)
    with pytest.raises(
        HookpointError, match=r"must be in the store .* got 'mlp_out.7'. Did you mean 'mlp_out.1'"
    ):
        StoreSource(store, ("mlp_out.7",))
    with pytest.raises(ShapeError, match="rows >= 1"):
        TensorSource(torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="buffer_mb must hold at least two forwards"):
        LiveSource(
            lm, text_of(world / "corpus.jsonl"), POLICY, ("resid_post.0",), buffer_mb=1, batch_rows=4096
        )
    live = LiveSource(
        lm, text_of(world / "corpus.jsonl"), POLICY, ("resid_post.0",), buffer_mb=1, batch_rows=8
    )
    with pytest.raises(ConfigError, match="batch_size must be <= half the buffer"):
        live.next_batch(10**6)


def test_a_tensor_source_leaves_out_norm_outliers_and_says_where_it_cut():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(100, 8, generator=generator), dim=1)
    x[[3, 70]] *= 50
    target = torch.arange(100.0)[:, None].repeat(1, 2)
    site = Site(model="m", model_fingerprint="f", hookpoint="resid_post.0", start=0, stop=8)
    sites = Sites(inputs=(site,), outputs=(site,))
    source = TensorSource(x, target=target, sites=sites, max_norm_ratio=5.0)
    batch = source.next_batch(98)
    assert source.n_rows == 98 and sorted(batch.target[:, 0].tolist()) == [
        float(i) for i in range(100) if i not in (3, 70)
    ]
    assert source.sites is not None
    assert source.sites.inputs[0].max_norm == source.sites.outputs[0].max_norm == pytest.approx(5.0)
    assert TensorSource(x).n_rows == 100 and TensorSource(x, max_norm_ratio=5.0).sites is None
    with pytest.raises(ConfigError, match="max_norm_ratio must be >= 1"):
        TensorSource(x, max_norm_ratio=0.5)
