"""Stores of two models joined row by row: the same token in every row, and an error where it is not."""

import pytest
import torch
from small_world import POLICY, load_model, write_corpus, write_model
from test_harvest import config_for

from sememe.errors import ConfigError, HookpointError, MismatchError
from sememe.harvest import harvest
from sememe.join import JoinedStore, open_stores
from sememe.source import StoreSource
from sememe.store import Store, open_store

TIGHT = POLICY.replace(max_norm_ratio=1.2)
"""Leaves out many rows, others in each model."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("join")
    write_corpus(place / "corpus.jsonl")
    for name, seed, policy in (("a", 0, TIGHT), ("b", 1, TIGHT), ("other_policy", 1, POLICY)):
        if not (place / f"model{seed}").exists():
            write_model(place / f"model{seed}", seed=seed)
        lm = load_model(place / f"model{seed}")
        harvest(config_for(place, place / name, policy=policy), lm=lm)
    lm = load_model(place / "model1")
    harvest(config_for(place, place / "other_text", policy=TIGHT, n_tokens=4096 + 1024), lm=lm)
    return place


def rows(store: Store | JoinedStore, name: str) -> dict[tuple[int, int], torch.Tensor]:
    """Each row's activations by (document, position)."""
    out = {}
    for index in range(len(store.info.shards)):
        shard = store.read(index, [name])
        for key, value in zip(
            zip(shard.doc_ids.tolist(), shard.positions.tolist(), strict=True),
            shard.activations[name],
            strict=True,
        ):
            out[key] = value
    return out


def test_every_row_holds_both_models_at_one_token(world):
    a, b = open_store(world / "a"), open_store(world / "b")
    joined = open_stores([world / "a", world / "b"])
    assert isinstance(joined, JoinedStore)
    of_a, of_b = rows(a, "mlp_out.1"), rows(b, "mlp_out.1")
    common = of_a.keys() & of_b.keys()
    assert 0 < len(common) < min(len(of_a), len(of_b)), "norms leave out different rows of each model"
    assert joined.info.n_rows == len(common) == sum(joined.info.shard_rows)
    for name, truth in (("mlp_out.1@0", of_a), ("mlp_out.1@1", of_b)):
        found = rows(joined, name)
        assert found.keys() == common
        assert all(torch.equal(found[key], truth[key]) for key in common)


def test_a_source_reads_it_like_a_store(world):
    joined = open_stores([world / "a", world / "b"])
    source = StoreSource(joined, ("resid_post.0",), seed=1)
    assert (source.d_in, source.d_out, source.n_rows) == (64, 64, joined.info.n_rows)
    assert [site.hookpoint for site in source.sites.inputs] == ["resid_post.0"] * 2
    models = [site.model_fingerprint for site in source.sites.inputs]
    assert models == [store.info.model_fingerprint for store in joined.stores] and models[0] != models[1]
    batch = source.next_batch(32)
    assert batch.target is batch.x
    pairs = {
        tuple(a.tolist()): b
        for a, b in zip(
            rows(joined, "resid_post.0@0").values(), rows(joined, "resid_post.0@1").values(), strict=True
        )
    }
    for row in batch.x:
        assert torch.equal(pairs[tuple(row[:32].tolist())].float(), row[32:])
    across = StoreSource(joined, ("mlp_out.1@0",), ("mlp_out.1@1",)).next_batch(4)
    assert across.x.shape == across.target.shape == (4, 32) and not torch.equal(across.x, across.target)
    with pytest.raises(
        HookpointError, match=r"one of the joined stores, got 'mlp_out.2'. Did you mean 'mlp_out.1@"
    ):
        StoreSource(joined, ("mlp_out.2",))
    with pytest.raises(HookpointError, match="a hookpoint must be chosen when the store holds several"):
        StoreSource(joined)


def test_stores_that_do_not_belong_together_are_refused(world):
    a = open_store(world / "a")
    with pytest.raises(ConfigError, match="a join needs at least two stores, got 1"):
        JoinedStore([a])
    with pytest.raises(
        MismatchError, match=r"must have one token policy.*\(max_norm_ratio=1.2\), got max_norm_ratio=5.0 in"
    ):
        open_stores([world / "a", world / "other_policy"])
    with pytest.raises(MismatchError, match=r"must have one number of shards, that of .*Harvest both models"):
        open_stores([world / "a", world / "other_text"])


def test_other_tokens_or_rows_are_refused(world, monkeypatch):
    a, b = open_store(world / "a"), open_store(world / "b")
    honest = b.columns
    tokens, documents, positions = honest(0)

    def changed(index):
        return (tokens.flip(0), documents, positions) if index == 0 else honest(index)

    monkeypatch.setattr(b, "columns", changed)
    with pytest.raises(
        MismatchError,
        match=r"same tokens: .* has token \d+ in document \d+ at position \d+, got token \d+ in .*same tokenizer",
    ):
        JoinedStore([a, b])

    def moved(index):
        return (tokens, documents, positions + 1) if index == 0 else honest(index)

    monkeypatch.setattr(b, "columns", moved)
    with pytest.raises(MismatchError, match="must hold the same"):
        JoinedStore([a, b])

    def elsewhere(index):
        found = honest(index)
        return found[0], found[1] + 10_000_000, found[2]

    monkeypatch.setattr(b, "columns", elsewhere)
    with pytest.raises(
        MismatchError,
        match=r"same documents and positions, but for the [\d,]+ rows .* got [\d,]+ of [\d,]+ rows only in",
    ):
        JoinedStore([a, b])
