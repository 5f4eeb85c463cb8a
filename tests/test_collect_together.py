"""Co-activation against numpy's own square of the table of yes and no, and the files it comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sememe.collect import together
from sememe.collect.pair_loops import count_pairs
from sememe.collect.together import PairFiles, sampled, strongest


def table(seed: int, n_tokens: int, d_sae: int, share: float = 0.3) -> np.ndarray:
    """Yes or no of each token and latent; latents 0 and 1 go together, 2 is always on."""
    rng = np.random.default_rng(seed)
    on = rng.random((n_tokens, d_sae)) < share
    if d_sae > 2:
        on[:, 1] = on[:, 0] ^ (rng.random(n_tokens) < 0.05)
        on[:, 2] = True
    return on


def sparse(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.nonzero(on)[1].astype(np.int32), np.concatenate(([0], np.cumsum(on.sum(1)))).astype(np.int64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 24), st.integers(1, 5))
def test_every_pair_is_counted_and_the_strongest_are_numpys(
    seed: int, n_tokens: int, d_sae: int, n: int
) -> None:
    on = table(seed, n_tokens, d_sae)
    entries, ptr = sparse(on)
    counts = np.zeros((d_sae, d_sae), np.int32)
    count_pairs(entries, ptr, 0, counts)
    np.testing.assert_array_equal(counts, on.T.astype(int) @ on.astype(int))
    found = strongest(entries, ptr, d_sae, n, min_both=1)
    for a in range(d_sae):
        if 0 < on[:, a].sum() < n_tokens:
            phi = {
                b: np.corrcoef(on[:, a], on[:, b])[0, 1]
                for b in range(d_sae)
                if b != a and 0 < on[:, b].sum() < n_tokens
            }
            wanted = sorted((value for value in phi.values() if value > 1e-6), reverse=True)[:n]
        else:
            phi, wanted = {}, []
        got = [value for value in found.phi[a].tolist() if not np.isnan(value)]
        np.testing.assert_allclose([value for value in got if value > 1e-6], wanted, atol=1e-6)
        for other, both, expected, value in zip(
            found.others[a], found.n_both[a], found.expected[a], found.phi[a], strict=True
        ):
            if other >= 0:
                assert both == (on[:, a] & on[:, other]).sum()
                assert expected == pytest.approx(on[:, a].sum() * on[:, other].sum() / n_tokens, rel=1e-6)
                assert value == pytest.approx(phi[int(other)], abs=1e-6)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    entries, ptr = sparse(table(0, 300, 40))
    whole = strongest(entries, ptr, 40, 4)
    monkeypatch.setattr(together, "N_COUNTS", 40 * 7)  # seven latents at a time
    for x, y in zip(whole, strongest(entries, ptr, 40, 4), strict=True):
        np.testing.assert_array_equal(x, y)
    assert whole.others[0, 0] == 1 and whole.others[1, 0] == 0 and (whole.others[2] == -1).all()


def test_pairs_seen_by_chance_are_left_out() -> None:
    on = np.zeros((1000, 4), bool)
    on[:4, :2] = True  # together on four tokens only
    assert (strongest(*sparse(on), 4, 3).others == -1).all()
    assert strongest(*sparse(on), 4, 3, min_both=4).others[0, 0] == 1


def test_files_hold_what_was_wanted_and_go_on_where_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    on = table(1, 50, 12)
    entries, ptr = sparse(on)
    acts = rng.random(entries.shape[0]).astype(np.float32)
    acts[::7] = 0  # an entry of 0 is no activation
    wanted = rng.random(50) < 0.5
    row = np.repeat(np.arange(50), np.diff(ptr))

    files = PairFiles(tmp_path, "pairs")
    files.add(entries[: ptr[20]], acts[: ptr[20]], ptr[:21], wanted[:20])
    files.flush()
    kept = files.tell()
    files.add(entries[: ptr[5]], acts[: ptr[5]], ptr[:6], np.ones(5, bool))  # lost with the process
    files.close()
    files = PairFiles(tmp_path, "pairs", kept)
    files.add(entries[ptr[20] :], acts[ptr[20] :], ptr[20:] - ptr[20], wanted[20:])
    got, got_ptr = files.read()
    files.close()
    np.testing.assert_array_equal(got, entries[wanted[row] & (acts != 0)])
    np.testing.assert_array_equal(
        np.diff(got_ptr), [((row == i) & (acts != 0)).sum() for i in range(50) if wanted[i]]
    )


def test_no_activation_at_all(tmp_path: Path) -> None:
    files = PairFiles(tmp_path, "pairs")
    files.add(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(4, np.int64), np.ones(3, bool))
    found = strongest(*files.read(), 5, 2)
    files.close()
    assert found.n_tokens == 3 and (found.others == -1).all()


def test_the_sample_is_uniform_and_the_whole_text_where_it_is_short() -> None:
    places = np.arange(100_000)
    assert sampled(places, 100_000, 100_000, 0).all()
    taken = sampled(places, 10_000, 100_000, 0)
    assert abs(int(taken.sum()) - 10_000) < 5 * np.sqrt(9000)
    by_part = taken.reshape(100, -1).sum(1)
    assert ((by_part - 100) ** 2 / 90).sum() < 149  # 99.9% of chi-square with 100 degrees of freedom
    np.testing.assert_array_equal(taken[5:50], sampled(places[5:50], 10_000, 100_000, 0))
    assert (taken != sampled(places, 10_000, 100_000, 1)).any()
