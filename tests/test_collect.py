"""The collector against a slow truth in plain Python, and its promises: exactness, bounds, independence of batches."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sememe.collect import N_DECILES, N_FINE, N_PLACES, N_TOKENS, Collector
from sememe.errors import ConfigError

BEFORE, AFTER = 3, 2


class Batch(NamedTuple):
    indices: np.ndarray
    acts: np.ndarray
    row_ptr: np.ndarray
    keep: np.ndarray
    ids: np.ndarray
    doc_ids: np.ndarray
    whole_ids: np.ndarray
    """Of what document each is a piece."""


def make(
    seed: int,
    n_rows: int,
    ctx: int,
    d_sae: int,
    k: int,
    *,
    vocab: int = 20,
    ties: bool = False,
    signed: bool = False,
    pieces: int = 1,
) -> Batch:
    """Random rows holding documents of random lengths (some over several rows), with random sparse activations."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2 * ctx, n_rows * ctx)
    docs = np.repeat(np.arange(lengths.size), lengths)[: n_rows * ctx].reshape(n_rows, ctx).astype(np.int32)
    docs[rng.random((n_rows, ctx)) < 0.02] = -1
    keep = (rng.random((n_rows, ctx)) < 0.9) & (docs >= 0)
    n = int(keep.sum())
    indices = np.stack([rng.permutation(d_sae)[:k] for _ in range(n)]) if n else np.zeros((0, k), np.int64)
    acts = rng.gamma(0.7, 2.0, (n, k)).astype(np.float32)
    if ties:
        acts = np.ceil(acts)
    acts[rng.random((n, k)) < 0.2] = 0
    if signed:
        acts *= rng.choice([-1, 1], acts.shape)
    ids = rng.integers(0, vocab, (n_rows, ctx)).astype(np.int32)
    ptr = np.arange(0, n * k + 1, k) if n else np.zeros(1, np.int64)
    return Batch(
        indices.ravel().astype(np.int64), acts.ravel(), ptr, keep, ids, docs, docs.astype(np.int64) // pieces
    )


def cut(batch: Batch, size: int) -> list[Batch]:
    """The same rows in batches of `size`."""
    out, done = [], 0
    for start in range(0, batch.ids.shape[0], size):
        keep = batch.keep[start : start + size]
        n = int(keep.sum())
        ptr = batch.row_ptr[done : done + n + 1]
        entries = slice(ptr[0], ptr[-1])
        rows = slice(start, start + size)
        out.append(
            Batch(
                batch.indices[entries],
                batch.acts[entries],
                ptr - ptr[0],
                keep,
                batch.ids[rows],
                batch.doc_ids[rows],
                batch.whole_ids[rows],
            )
        )
        done += n
    return out


def collector(d_sae: int, **changes: Any) -> Collector:
    options: dict[str, Any] = {
        "n_top": 4, "n_reservoir": 40, "n_random": 3, "before": BEFORE, "after": AFTER, "seed": 1,
    }  # fmt: skip
    return Collector(d_sae, **(options | changes))


class Slow:
    """Everything about one text, in dictionaries and loops."""

    def __init__(self, batch: Batch) -> None:
        self.docs, self.wholes = batch.doc_ids, batch.whole_ids
        self.at: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
        kept = np.argwhere(batch.keep)
        for n, (row, pos) in enumerate(kept):
            for e in range(batch.row_ptr[n], batch.row_ptr[n + 1]):
                if batch.acts[e] != 0:
                    entries = self.at[int(batch.indices[e])]
                    entries[int(row), int(pos)] = entries.get((int(row), int(pos)), 0.0) + float(
                        batch.acts[e]
                    )

    def window(self, row: int, pos: int) -> tuple[int, int]:
        start, stop = pos, pos + 1
        while start > max(0, pos - BEFORE) and self.docs[row, start - 1] == self.docs[row, pos]:
            start -= 1
        while stop < min(self.docs.shape[1], pos + AFTER + 1) and self.docs[row, stop] == self.docs[row, pos]:
            stop += 1
        return start, stop

    def inside(self, latent: int, row: int, pos: int) -> dict[int, float]:
        start, stop = self.window(row, pos)
        return {p: a for (r, p), a in sorted(self.at[latent].items()) if r == row and start <= p < stop}

    def top(self, latent: int, n: int) -> list[tuple[int, int, int, float]]:
        best: dict[int, tuple[float, int, int, float]] = {}
        for (row, pos), act in sorted(self.at[latent].items()):
            whole = int(self.wholes[row, pos])
            if whole not in best or abs(act) > -best[whole][0]:
                best[whole] = (-abs(act), row, pos, act)
        return [(row, pos, int(self.docs[row, pos]), act) for _, row, pos, act in sorted(best.values())][:n]


def check(found: Collector, batch: Batch, n_decile: int = 2) -> None:
    slow = Slow(batch)
    examples = found.examples(n_decile)
    assert found.n_tokens == batch.keep.sum() and found.n_rows == batch.ids.shape[0]
    np.testing.assert_array_equal(examples.latent, np.sort(examples.latent))
    for latent in range(found.d_sae):
        truth = slow.at[latent]
        assert found.n_active[latent] == len(truth)
        strengths = [abs(a) for _, a in sorted(truth.items())]
        assert found.largest[latent] == pytest.approx(max(strengths, default=0.0), rel=1e-6)
        assert found.total[latent] == pytest.approx(sum(strengths), rel=1e-6)
        mine = [i for i in range(examples.latent.size) if examples.latent[i] == latent]
        tops = [i for i in mine if examples.kind[i] == 0]
        got = [
            (
                int(examples.row[i]),
                int(examples.position[i]),
                int(examples.document[i]),
                float(examples.act[i]),
            )
            for i in tops
        ]
        assert got == slow.top(latent, found.n_top)
        assert [examples.rank[i] for i in tops] == list(range(len(tops)))
        for i in mine:
            row, pos = int(examples.row[i]), int(examples.position[i])
            assert (examples.start[i], examples.stop[i]) == slow.window(row, pos)
            assert examples.document[i] == batch.doc_ids[row, pos] and batch.keep[row, pos]
            entries = slice(examples.offsets[i], examples.offsets[i + 1])
            window = dict(
                zip(examples.positions[entries].tolist(), examples.acts[entries].tolist(), strict=True)
            )
            assert window == pytest.approx(slow.inside(latent, row, pos))
            if examples.kind[i] == 2:
                assert window == {} and examples.act[i] == 0
            else:
                assert window[pos] == examples.act[i]
        for kind in range(3):
            documents = [
                batch.whole_ids[examples.row[i], examples.position[i]]
                for i in mine
                if examples.kind[i] == kind
            ]
            assert len(documents) == len(set(documents)), "one example per document"
        if len(truth) <= found.n_reservoir:  # the reservoir holds everything, so deciles are exact
            order = sorted(truth, key=lambda at: (abs(np.float32(truth[at])), at))
            for i in mine:
                if examples.kind[i] == 1:
                    rank = order.index((int(examples.row[i]), int(examples.position[i])))
                    assert examples.decile[i] == (2 * rank + 1) * N_DECILES // (2 * len(truth))
        counts = found.histogram(8)[latent]
        assert counts.sum() == len(truth)
        if strengths:
            largest = max(strengths)
            for edge in range(1, 8):  # right but for values within largest / N_FINE of an edge
                at = largest * edge / 8
                low = sum(s < at - largest / N_FINE for s in strengths)
                high = sum(s <= at + largest / N_FINE for s in strengths)
                assert low <= counts[:edge].sum() <= high
        mass: dict[int, float] = defaultdict(float)
        for (row, pos), act in truth.items():
            mass[int(batch.ids[row, pos])] += abs(act)
        times: dict[int, int] = defaultdict(int)
        for row, pos in truth:
            times[int(batch.ids[row, pos])] += 1
        keys, masses, counted = found.top_tokens(3)
        for token, amount, n in zip(keys[latent], masses[latent], counted[latent], strict=True):
            if token >= 0:
                assert amount == pytest.approx(mass[int(token)], rel=1e-6)
                assert n == times[int(token)]
        assert (
            keys[latent][0] == -1
            if not mass
            else masses[latent][0] == pytest.approx(max(mass.values()), rel=1e-6)
        )
    check_places(found, batch, slow)


def check_places(found: Collector, batch: Batch, slow: Slow) -> None:
    """Density and mean by position, and how often each token was seen."""
    ctx = batch.ids.shape[1]
    density, mean = found.by_place()
    for band in range(N_PLACES):
        inside = [p for p in range(ctx) if p * N_PLACES // ctx == band]
        n_kept = int(batch.keep[:, inside].sum())
        for latent in range(found.d_sae):
            strengths = [abs(a) for (_, p), a in slow.at[latent].items() if p in inside]
            if n_kept == 0:
                assert np.isnan(density[latent, band]) and np.isnan(mean[latent, band])
            else:
                assert density[latent, band] == pytest.approx(len(strengths) / n_kept)
                assert mean[latent, band] == pytest.approx(sum(strengths) / n_kept, rel=1e-6)
    tokens, times = np.unique(batch.ids[batch.keep], return_counts=True)
    np.testing.assert_array_equal(np.flatnonzero(found.occurrences), tokens)
    np.testing.assert_array_equal(found.occurrences[tokens], times)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_rows=st.integers(1, 12),
    ctx=st.integers(1, 24),
    d_sae=st.integers(1, 12),
    size=st.integers(1, 5),
    ties=st.booleans(),
    signed=st.booleans(),
    pieces=st.sampled_from([1, 3]),
)
def test_collector_equals_the_slow_truth(
    seed: int, n_rows: int, ctx: int, d_sae: int, size: int, ties: bool, signed: bool, pieces: int
) -> None:
    batch = make(seed, n_rows, ctx, d_sae, min(3, d_sae), ties=ties, signed=signed, pieces=pieces)
    found = collector(d_sae)
    for part in cut(batch, size):
        found.add(*part)
    check(found, batch)


def same(a: Collector, b: Collector) -> None:
    for x, y in zip(a.examples(2), b.examples(2), strict=True):
        np.testing.assert_array_equal(x, y)
    for name in (
        "n_active",
        "total",
        "largest",
        "hist",
        "exponents",
        "token_mass",
        "token_count",
        "place_n",
        "place_mass",
        "n_silent",
    ):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_batches_and_threads_do_not_change_the_result() -> None:
    batch = make(3, 40, 16, 10, 4, pieces=2)
    whole, parts = collector(10), collector(10)
    whole.add(*batch)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        for part in cut(batch, 7):
            parts.add(*part)
    finally:
        numba.set_num_threads(before)
    same(whole, parts)


def test_state_goes_on_where_it_was(tmp_path: Any) -> None:
    parts = cut(make(4, 40, 16, 10, 4, pieces=2), 5)
    whole, first, second = collector(10), collector(10), collector(10)
    for part in parts:
        whole.add(*part)
    for part in parts[:3]:
        first.add(*part)
    np.savez(tmp_path / "state.npz", **first.state())
    with np.load(tmp_path / "state.npz") as saved:
        second.restore(saved)
    for part in parts[3:]:
        second.add(*part)
    same(whole, second)


def test_duplicate_entries_of_a_row_add() -> None:
    keep = np.ones((1, 2), bool)
    ids, docs = np.array([[5, 6]], np.int32), np.zeros((1, 2), np.int32)
    found = collector(2)
    found.add(
        np.array([1, 1, 0]), np.array([1.0, 2.0, 4.0], np.float32), np.array([0, 2, 3]), keep, ids, docs
    )
    assert found.n_active.tolist() == [1, 1] and found.largest.tolist() == [4.0, 3.0]


def test_memory_does_not_grow_with_the_text() -> None:
    """Once the slots are full, ten times the text needs the same memory."""
    found = collector(16, n_reservoir=20)
    sizes = []
    for step in range(200):
        found.add(*make(step, 8, 32, 16, 4))
        sizes.append(found.nbytes)
    assert max(sizes[20:]) <= 1.05 * max(sizes[:20])
    n_slots, window = 24, BEFORE + AFTER + 1
    bound = 16 * (4 * N_FINE + 16 * N_TOKENS + 12 * N_PLACES + 36 * n_slots + 22 * 3 + 60) + max(
        2 * 6 * 16 * n_slots * window, 6 * 4096
    )
    bound += 8 * (20 + N_PLACES)  # tokens and places counted once for all latents
    assert max(sizes) <= bound


def test_reservoir_is_a_uniform_sample() -> None:
    """Every activation is equally likely to be kept: chi-square over ten stretches of the text."""
    n, d_sae, keep = 400, 300, np.ones((1, 400), bool)
    found = collector(d_sae, n_reservoir=20, n_top=1)
    for start in range(0, n, 100):
        indices = np.tile(np.arange(d_sae), 100)
        acts = np.repeat(np.arange(start, start + 100, dtype=np.float32) + 1, d_sae)
        docs = np.full((1, 100), start, np.int32)
        found.add(
            indices,
            acts,
            np.arange(0, 100 * d_sae + 1, d_sae),
            keep[:, :100],
            np.zeros((1, 100), np.int32),
            docs,
        )
    kept = found.act[:, 1:].ravel() - 1
    counts = np.histogram(kept, bins=10, range=(0, n))[0]
    expected = d_sae * 20 / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 99.9% of chi-square with 9 degrees of freedom


def test_token_table_keeps_the_heavy_tokens_of_many() -> None:
    """With far more tokens than entries the top token is found and its mass is short by no more than said."""
    rng = np.random.default_rng(0)
    n, found = 20_000, collector(1, n_random=0)
    ids = np.where(rng.random(n) < 0.2, 7, rng.integers(100, 5000, n)).astype(np.int32).reshape(-1, 100)
    acts = rng.random(n).astype(np.float32)
    found.add(
        np.zeros(n, np.int64),
        acts,
        np.arange(n + 1),
        np.ones(ids.shape, bool),
        ids,
        np.zeros(ids.shape, np.int32),
    )
    truth = acts[ids.ravel() == 7].sum(dtype=np.float64)
    tokens, mass, n_active = found.top_tokens(2)
    assert tokens[0, 0] == 7
    assert truth - found.token_lost[0] - 1e-6 <= mass[0, 0] <= truth + 1e-6
    assert 0 < found.token_lost[0] < 0.1 * acts.sum()
    assert n_active[0, 0] <= (ids == 7).sum() < 1.1 * n_active[0, 0]


def test_deciles_come_from_every_band() -> None:
    n, ctx = 1000, 10
    acts = np.random.default_rng(0).permutation(n).astype(np.float32) + 1
    docs = np.repeat(np.arange(n // ctx), ctx).reshape(-1, ctx).astype(np.int32)
    ids = np.zeros(docs.shape, np.int32)
    found = collector(1, n_reservoir=200)
    found.add(np.zeros(n, np.int64), acts, np.arange(n + 1), np.ones(docs.shape, bool), ids, docs)
    examples = found.examples(3)
    shown = examples.kind == 1
    assert np.bincount(examples.decile[shown]).tolist() == [3] * 10
    exact = examples.act[shown] / n * 10
    assert (
        np.abs(exact - (examples.decile[shown] + 0.5)).max() < 1.5
    )  # a sample's deciles, not the exact ones


def test_a_latent_that_is_always_on_has_no_silent_window() -> None:
    keep, ids = np.ones((4, 8), bool), np.zeros((4, 8), np.int32)
    docs = np.repeat(np.arange(4), 8).reshape(4, 8).astype(np.int32)
    found = collector(3)
    found.add(np.zeros(32, np.int64), np.ones(32, np.float32), np.arange(33), keep, ids, docs)
    assert found.n_silent.tolist() == [0, 3 + 1, 3 + 1]
    examples = found.examples(2)
    assert set(examples.latent.tolist()) == {0}, "latents that never fired have no examples"
    assert (examples.kind == 2).sum() == 0


def test_context_length_must_fit() -> None:
    ids = np.zeros((1, 70_000), np.int32)
    with pytest.raises(
        ConfigError, match=r"context_length must be <= 65535, got 70000. Use shorter contexts"
    ):
        collector(1).add(
            np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(1, np.int64), ids > 0, ids, ids
        )
