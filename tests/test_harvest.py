"""Stores: what is in them, how well they are shuffled, and that a killed harvest goes on to the same bits."""

import json
import time
from collections import Counter
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from small_world import POLICY, load_model, text_of, write_corpus, write_model

from sememe import artifact
from sememe.capture import PositionChoice
from sememe.cli import _run
from sememe.errors import ActivationError, ConfigError, CorruptError, HookpointError, MismatchError, TextError
from sememe.harvest import HarvestConfig, harvest
from sememe.lm import LanguageModel, ModelConfig
from sememe.source import LiveSource, StoreSource
from sememe.store import Store, open_store
from sememe.text import token_blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("harvest")
    write_corpus(place / "corpus.jsonl")
    write_model(place / "model")
    return place


@pytest.fixture(scope="module")
def lm(world) -> LanguageModel:
    return load_model(world / "model")


def config_for(world: Path, out: Path, **changes) -> HarvestConfig:
    return HarvestConfig.build(
        {
            "out": out,
            "model": ModelConfig(model=str(world / "model"), dtype="float32"),
            "text": text_of(world / "corpus.jsonl"),
            "policy": POLICY,
            "hookpoints": ("resid_post.0", "mlp_out.1"),
            "n_tokens": 4096,
            "batch_rows": 8,
            "shard_contexts": 32,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def store(world, lm) -> Store:
    return harvest(config_for(world, world / "store"), lm=lm)


def rows_of(store: Store) -> dict[str, torch.Tensor]:
    shards = [store.read(i, store.info.hookpoints) for i in range(len(store.info.shards))]
    columns = {name: torch.cat([s.activations[name] for s in shards]) for name in store.info.hookpoints}
    for name in ("token_ids", "doc_ids", "positions"):
        columns[name] = torch.cat([getattr(s, name) for s in shards])
    return columns


def test_every_row_is_the_models_activation_at_that_document_and_position(store, world, lm):
    rows = rows_of(store)
    place = {
        (int(d), int(p)): i for i, (d, p) in enumerate(zip(rows["doc_ids"], rows["positions"], strict=True))
    }
    assert len(place) == store.info.n_rows == len(rows["token_ids"])
    config = config_for(world, world / "unused")
    found = 0
    for block in token_blocks(config.text, lm.tokenizer, POLICY, split="train", n_tokens=config.n_tokens):
        ids = torch.from_numpy(block.ids).long()
        with torch.inference_mode():
            truth = {
                name: torch.cat([lm.capture(ids[i : i + 8], [name])[name] for i in range(0, len(ids), 8)])
                for name in store.info.hookpoints
            }
        for row, column in np.argwhere(block.keep):
            index = place.get((int(block.doc_ids[row, column]), int(block.doc_positions[row, column])))
            if index is None:
                continue  # left out for its norm
            found += 1
            assert int(rows["token_ids"][index]) == int(block.ids[row, column])
            for name, values in truth.items():
                assert torch.equal(rows[name][index], values[row, column].bfloat16())
    assert found == store.info.n_rows
    assert store.info.n_rows + store.info.n_norm_outliers == sum(
        int(b.keep.sum())
        for b in token_blocks(config.text, lm.tokenizer, POLICY, split="train", n_tokens=config.n_tokens)
    )


def test_norm_outliers_and_the_first_position_are_left_out(store):
    rows = rows_of(store)
    for name, point in store.info.hookpoints.items():
        norms = rows[name].float().norm(dim=1)
        assert point.max_norm == pytest.approx(5 * point.median_norm)
        assert float(norms.max()) <= point.max_norm
        assert point.median_norm == pytest.approx(float(norms.median()), rel=0.15)


def test_the_batch_size_does_not_change_which_rows_are_kept(world, lm, tmp_path):
    """It is not part of a store's identity, so nothing may depend on it."""
    tight = POLICY.replace(max_norm_ratio=1.2)
    made = [harvest(config_for(world, tmp_path / str(n), batch_rows=n, policy=tight), lm=lm) for n in (2, 16)]
    assert made[0].info.n_norm_outliers > 100
    for name, point in made[0].info.hookpoints.items():
        assert point.max_norm == pytest.approx(made[1].info.hookpoints[name].max_norm, rel=1e-5)
    assert (
        abs(made[0].info.n_rows - made[1].info.n_rows) <= 2
    )  # a row whose norm is the limit, up to rounding


def test_documents_are_traceable_and_none_is_held_out(store, world):
    from sememe.text import split_of

    known = {row["id"] for row in store.documents()}
    assert set(rows_of(store)["doc_ids"].tolist()) <= known
    texts = [json.loads(line)["text"] for line in (world / "corpus.jsonl").read_text().splitlines()]
    assert any(split_of(text, 0.2) == "heldout" for text in texts)


def same_document_pairs(ids: torch.Tensor) -> float:
    """The share of pairs of rows that come from one document."""
    counts = Counter(ids.tolist()).values()
    return sum(c * (c - 1) for c in counts) / (len(ids) * (len(ids) - 1))


def pairs_in_batches(source: StoreSource | LiveSource, store: Store, n_rows: int, batch: int = 256) -> float:
    """The statistic: the mean share of pairs of rows within a batch that come from one document."""
    rows = rows_of(store)
    by_row = {
        tuple(row.tolist()): int(doc)
        for row, doc in zip(rows["mlp_out.1"].float(), rows["doc_ids"], strict=True)
    }
    shares = []
    for _ in range(n_rows // batch):
        docs = [by_row[tuple(row.tolist())] for row in source.next_batch(batch).x]
        shares.append(same_document_pairs(torch.tensor(docs)))
    return float(np.mean(shares))


def test_a_batch_rarely_holds_two_tokens_of_one_document(store):
    """Against a perfect shuffle of the whole store; read whole, and one shard of 32 contexts at a time.

    A shard holds 1 / n_shards of the contexts, drawn from all over the corpus: of two rows from one shard, at most
    n_shards times as many pairs share a document as of two rows from anywhere.
    """
    perfect = same_document_pairs(rows_of(store)["doc_ids"])
    assert perfect < 0.05, "the order of the text, where neighbours share a document, would give far more"
    whole = StoreSource(store, ("mlp_out.1",), seed=0)
    assert pairs_in_batches(whole, store, store.info.n_rows) <= 1.2 * perfect
    n_shards = len(store.info.shards)
    assert n_shards >= 4
    by_shard = StoreSource(store, ("mlp_out.1",), seed=0)
    by_shard.group_shards, by_shard._cursor.n_groups = 1, n_shards
    assert pairs_in_batches(by_shard, store, store.info.n_rows) <= 1.2 * n_shards * perfect


def test_a_live_batch_rarely_holds_two_tokens_of_one_document(world, lm, tmp_path):
    """Through a buffer of 16 forwards, 1/20 of the text: at most 4 times a perfect shuffle of all of it.

    The text in its own order, for comparison, gives more than 20 times.
    """
    store = harvest(config_for(world, tmp_path / "all", n_tokens=10**6, hookpoints=("mlp_out.1",)), lm=lm)
    docs = rows_of(store)["doc_ids"]
    perfect = same_document_pairs(docs)
    in_order = [same_document_pairs(part) for part in docs.sort().values.split(256)]
    assert float(np.mean(in_order)) > 20 * perfect
    limits = {"mlp_out.1": store.info.hookpoints["mlp_out.1"].max_norm}
    text = text_of(world / "corpus.jsonl")
    live = LiveSource(lm, text, POLICY, ("mlp_out.1",), buffer_mb=1, batch_rows=2, max_norms=limits)
    live.capacity = 16 * 2 * POLICY.context_length
    assert store.info.n_rows > 20 * live.capacity / 2
    assert pairs_in_batches(live, store, 2 * store.info.n_rows) <= 4 * perfect


def test_the_same_seed_gives_the_same_bits_and_batching_does_not_matter_for_positions(
    world, lm, store, tmp_path
):
    again = harvest(config_for(world, tmp_path / "again"), lm=lm)
    assert again.fingerprint == store.fingerprint
    other = harvest(config_for(world, tmp_path / "other", seed=1), lm=lm)
    assert other.fingerprint != store.fingerprint


def test_a_finished_store_is_opened_and_a_different_one_refused(world, lm, store):
    meta = world / "store" / "meta.json"
    before = meta.stat().st_mtime_ns
    harvest(config_for(world, world / "store"), lm=lm)
    assert meta.stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match=r"identity \w+\), got identity \w+. Delete .* or pass --fresh"):
        harvest(config_for(world, world / "store", n_tokens=2048), lm=lm)


def test_chosen_positions_alone_are_stored(world, lm, store, tmp_path):
    """Exactly the rows of the whole store that stand at the chosen places of their contexts."""
    config = config_for(world, tmp_path / "chosen", positions=(3, 7))
    chosen, everything = rows_of(harvest(config, lm=lm)), rows_of(store)
    wanted = set()
    for block in token_blocks(config.text, lm.tokenizer, POLICY, split="train", n_tokens=config.n_tokens):
        for row, column in np.argwhere(block.keep):
            if column in (3, 7):
                wanted.add((int(block.doc_ids[row, column]), int(block.doc_positions[row, column])))
    places = lambda rows: zip(rows["doc_ids"].tolist(), rows["positions"].tolist(), strict=True)  # noqa: E731
    assert set(places(chosen)) == wanted & set(places(everything)) and len(wanted) > 100
    by_place = dict(zip(places(everything), everything["mlp_out.1"], strict=True))
    for place, row in zip(places(chosen), chosen["mlp_out.1"], strict=True):
        assert torch.equal(row, by_place[place])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": (3, 32)}, r"each in \[1, 32\).* got \[32\]\. Name others"),
        ({"positions": (-1,)}, r"each in \[1, 32\).* got \[-1\]"),
        ({"positions": (0,)}, r"each in \[1, 32\).* got \[0\]"),
        ({"positions": ()}, r"at least one position.* got none"),
        ({"positions_per_context": 32}, r"positions_per_context must be <= 31.* got 32. Lower it"),
        ({"positions": (3, 7), "positions_per_context": 3}, r"must be <= 2"),
        ({"batch_rows": 64}, r"batch_rows must be <= shard_contexts=32, got 64"),
    ],
)
def test_options_that_cannot_be_met(world, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_for(world, tmp_path / "no", **changes)


def test_random_and_chosen_positions(world, lm, tmp_path):
    few = harvest(config_for(world, tmp_path / "few", positions_per_context=5), lm=lm)
    assert few.info.n_rows <= 5 * few.info.n_tokens_read // 32
    assert few.info.n_rows > 4 * few.info.n_tokens_read // 32
    keep = np.ones((4, 32), dtype=bool)
    keep[:, 0] = False
    chosen = PositionChoice(chosen=(0, 3)).apply(keep, 0)
    assert chosen.sum() == 4 and chosen[:, 3].all()
    one, two = (PositionChoice(n_random=5, seed=0).apply(keep, first) for first in (0, 0))
    assert (one == two).all() and (one.sum(1) == 5).all() and not one[:, 0].any()
    assert (PositionChoice(n_random=5, seed=0).apply(keep[1:], 1) == one[1:]).all(), (
        "independent of the batching"
    )


def test_killed_and_started_again_gives_the_same_bits(world, store, tmp_path):
    """kill -9 in the middle, twice; the third run finishes with the fingerprint of the uninterrupted one."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads({torch.get_num_threads()})
from pathlib import Path
import test_harvest as t
from sememe import harvest as h
write = h.write_shard
def slow(path, shard):
    write(path, shard)
    print("shard", flush=True)
    time.sleep(float(sys.argv[1]))
h.write_shard = slow
world = Path({str(world)!r})
h.harvest(t.config_for(world, Path({str(tmp_path)!r}) / "store"), lm=t.load_model(world / "model"))
"""
    for n_shards in (1, 2):
        process = forked.start(code, "0.3")
        for _ in range(n_shards):
            assert process.stdout.readline() == "shard\n"
        time.sleep(0.1)
        process.kill()
        process.communicate()
        assert not (tmp_path / "store").exists()
    forked.run(code, "0", check=True)
    assert open_store(tmp_path / "store").fingerprint == store.fingerprint


def test_bad_input_is_named(world, lm, tmp_path):
    with pytest.raises(HookpointError, match=r"resid_pots\.0.*resid_po?st\.0"):
        harvest(config_for(world, tmp_path / "a", hookpoints=("resid_pots.0",)), lm=lm)
    with pytest.raises(HookpointError, match=r"the layer of resid_post must be in \[0, 2\] .* got 9"):
        harvest(config_for(world, tmp_path / "a", hookpoints=("resid_post.9",)), lm=lm)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(TextError):
        harvest(
            config_for(world, tmp_path / "a", text=text_of(tmp_path / "short.txt", heldout_fraction=0.0)),
            lm=lm,
        )
    assert not (tmp_path / "a").exists()


def test_more_text_is_the_remedy_it_says(world, tmp_path, capsys):
    text, out = tmp_path / "grow.txt", tmp_path / "s"
    command = ["harvest", "--model", str(world / "model"), "--corpus", str(text), "--out", str(out)]
    command += ["--hookpoints", "resid_post.0", "--heldout-fraction", "0", "--context-length", "32"]
    text.write_text("hello\n")
    assert _run(command) == 1 and "Give more text" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]
    text.write_text("hello and more of it. " * 50)
    assert _run(command) == 0, capsys.readouterr().err
    assert open_store(out).info.n_rows > 0


def test_nan_activations_say_where(world, tmp_path):
    lm = load_model(write_model(tmp_path / "model"))
    with torch.no_grad():
        lm.hf.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(
        ActivationError,
        match=r"activations at resid_post.0 must be finite, got NaN or infinity in document \d+, position \d+",
    ):
        harvest(config_for(world, tmp_path / "store"), lm=lm)
    assert not (tmp_path / "store").exists()


def test_damaged_shards_are_found(world, lm, tmp_path):
    store = harvest(config_for(world, tmp_path / "store"), lm=lm)
    path = tmp_path / "store" / store.info.shards[0]
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(CorruptError, match=r"shard-00000.safetensors must have SHA-256"):
        open_store(tmp_path / "store").read(0, ("resid_post.0",))
    path.write_bytes(bytes(content[:-10]))
    with pytest.raises(CorruptError, match=r"must be \d+ bytes long, got \d+ bytes. The file was truncated"):
        open_store(tmp_path / "store")


def test_infinite_rows_in_a_store_are_named(world, lm, tmp_path):
    store = harvest(config_for(world, tmp_path / "store"), lm=lm)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "store" / store.info.shards[1]
    tensors = load_file(path)
    tensors["resid_post.0"][5, 2] = float("inf")
    save_file(tensors, path)
    store.artifact.meta["files"][path.name] |= {
        "sha256": artifact.file_sha256(path),
        "bytes": path.stat().st_size,
    }
    artifact.write_json(tmp_path / "store" / "meta.json", store.artifact.meta)
    with pytest.raises(
        ActivationError, match=r"NaN or infinity at resid_post.0, row 5 \(document \d+, position \d+\)"
    ):
        open_store(tmp_path / "store").read(1, ("resid_post.0",))
