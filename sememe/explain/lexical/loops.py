"""The numba loops that find a latent's rule and score it. Knows arrays only.

A *place* is a position of a stored context. `current`, `previous` are its token and the one before it in the same
document (-1: none); `classes` holds, for each place, three numbers whose bits are the classes of the current token
and of its position, of the previous one, and of any of the few before it.

The gain of a set of places is the share of the latent's active places that it holds minus the share of its silent
ones: hit rate minus false-alarm rate, from -1 to 1. Gains of disjoint sets add. The silent places of windows in
which the latent fires and those of windows in which it does not count half each.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

__all__ = ["CURRENT", "N_CLASSES", "N_OF_TOKENS", "PAIR", "PREVIOUS", "fit", "score"]

N_CLASSES, N_OF_TOKENS = 36, 32
"""All, and those before them that a token has by itself: only these can be what a rule lists tokens beyond."""
CURRENT, PREVIOUS, PAIR = 1, 2, 3
"""What the listed items of a rule are: current tokens, previous tokens, or pairs (previous << 32 | current)."""
SIDES = 2


@njit
def _places(  # type: ignore[no-untyped-def]
    low, high, contexts, starts, stops, offsets, positions, acts, is_random, side, ctx, skip, usable, wanted
):  # fmt: skip
    """The places of a latent's windows on one side of the split: (place, activation, in a silent window, window)."""
    n = 0
    for i in range(low, high):
        if side[i] == wanted:
            n += stops[i] - starts[i]
    place = np.empty(n, np.int64)
    act = np.zeros(n, np.float32)
    far = np.zeros(n, np.bool_)
    window = np.empty(n, np.int64)
    n = 0
    for i in range(low, high):
        if side[i] != wanted:
            continue
        e = offsets[i]
        for p in range(max(starts[i], skip), stops[i]):
            at = contexts[i] * ctx + p
            while e < offsets[i + 1] and positions[e] < p:
                e += 1
            value = np.float32(0.0)
            if e < offsets[i + 1] and positions[e] == p:
                value = abs(acts[e])
            if usable[at]:
                place[n] = at
                act[n] = value
                far[n] = is_random[i]
                window[n] = i
                n += 1
    return place[:n], act[:n], far[:n], window[:n]


@njit
def _gains(act, far):  # type: ignore[no-untyped-def]
    """What each place adds to the gain of a set that holds it; all 0 unless there are active and silent places."""
    n_on, n_near, n_far = 0, 0, 0
    for i in range(act.shape[0]):
        if act[i] > 0:
            n_on += 1
        elif far[i]:
            n_far += 1
        else:
            n_near += 1
    gain = np.zeros(act.shape[0], np.float64)
    if n_on == 0 or n_near + n_far == 0:
        return gain, n_on
    share = 0.5 if n_near and n_far else 1.0
    for i in range(act.shape[0]):
        if act[i] > 0:
            gain[i] = 1.0 / n_on
        elif far[i]:
            gain[i] = -share / n_far
        else:
            gain[i] = -share / n_near
    return gain, n_on


@njit
def _by_item(keys, gain, act, window, document):  # type: ignore[no-untyped-def]
    """Items by falling gain: (item, gain), those that fire in at least two documents."""
    order = np.argsort(keys, kind="mergesort")
    n = keys.shape[0]
    items = np.empty(n, np.int64)
    gains = np.empty(n, np.float64)
    found = 0
    i = 0
    while i < n:
        key = keys[order[i]]
        total = 0.0
        first = np.int64(-1)
        several = False
        while i < n and keys[order[i]] == key:
            o = order[i]
            total += gain[o]
            if act[o] > 0:
                d = document[window[o]]
                if first < 0:
                    first = d
                elif d != first:
                    several = True
            i += 1
        if several and total > 0 and key >= 0:
            items[found] = key
            gains[found] = total
            found += 1
    falling = np.argsort(-gains[:found], kind="mergesort")
    return items[:found][falling], gains[:found][falling]


@njit
def _holds(family, items, n_items, base, conditions, current, previous, classes, at):  # type: ignore[no-untyped-def]
    """Whether a rule says yes at a place."""
    yes = False
    if base >= 0:
        yes = (classes[at, 0] >> base) & 1 == 1
    if not yes and n_items > 0:
        key = np.int64(current[at])
        if family == PREVIOUS:
            key = np.int64(previous[at])
        elif family == PAIR:
            key = np.int64(previous[at]) << 32 | np.int64(current[at])
        for i in range(n_items):
            if items[i] == key:
                yes = True
                break
    if not yes and (n_items > 0 or base >= 0):
        return False
    for c in range(conditions.shape[0]):
        which = conditions[c, 0]
        if which >= 0:
            has = (classes[at, which] >> conditions[c, 1]) & 1
            if has == conditions[c, 2]:
                return False
    return True


@njit
def _best_condition(place, gain, inside, classes):  # type: ignore[no-untyped-def]
    """The class condition that most raises the gain of the places inside: (gain, which token, class, negated)."""
    total = 0.0
    with_class = np.zeros((3, N_CLASSES), np.float64)
    for i in range(place.shape[0]):
        if inside[i]:
            total += gain[i]
            for which in range(3):
                bits = classes[place[i], which]
                c = 0
                while bits:
                    if bits & 1:
                        with_class[which, c] += gain[i]
                    bits >>= 1
                    c += 1
    best, b_which, b_class, b_not = total, -1, 0, 0
    for which in range(3):
        for c in range(N_CLASSES):
            if with_class[which, c] > best + 1e-12:
                best, b_which, b_class, b_not = with_class[which, c], which, c, 0
            if total - with_class[which, c] > best + 1e-12:
                best, b_which, b_class, b_not = total - with_class[which, c], which, c, 1
    return best, b_which, b_class, b_not


@njit
def _fit_one(  # type: ignore[no-untyped-def]
    place, act, gain, window, document, current, previous, classes, max_items, min_gain, items, conditions
):  # fmt: skip
    """The rule with the largest gain, each of its parts paying min_gain: (family, n_items, base class, gain)."""
    n = place.shape[0]
    keys = np.empty(n, np.int64)
    best, family, n_best, base = min_gain, 0, 0, -1
    for kind in (CURRENT, PREVIOUS, PAIR):
        for i in range(n):
            at = place[i]
            if kind == CURRENT:
                keys[i] = current[at]
            elif kind == PREVIOUS:
                keys[i] = previous[at]
            else:
                keys[i] = -1 if previous[at] < 0 else np.int64(previous[at]) << 32 | np.int64(current[at])
        found, gains = _by_item(keys, gain, act, window, document)
        value = 0.0
        m = 0
        while m < min(max_items, found.shape[0]) and gains[m] > min_gain:
            value += gains[m] - min_gain
            m += 1
        if value > best:
            best, family, n_best, base = value, kind, m, -1
            items[:m] = found[:m]
        if kind == CURRENT:
            # A class of the current token, with listed tokens beyond it.
            of_class = np.zeros(N_OF_TOKENS, np.float64)
            for i in range(n):
                bits = classes[place[i], 0]
                c = 0
                while bits and c < N_OF_TOKENS:
                    if bits & 1:
                        of_class[c] += gain[i]
                    bits >>= 1
                    c += 1
            token_bits = np.zeros(found.shape[0], np.int64)
            for m in range(found.shape[0]):
                for i in range(n):
                    if current[place[i]] == found[m]:
                        token_bits[m] = classes[place[i], 0]
                        break
                if gains[m] <= min_gain:
                    break
            for c in range(N_OF_TOKENS):
                value = of_class[c] - min_gain
                taken = 0
                for m in range(found.shape[0]):
                    if gains[m] <= min_gain or taken == max_items:
                        break
                    if not (token_bits[m] >> c) & 1:
                        value += gains[m] - min_gain
                        taken += 1
                if value > best:
                    best, family, n_best, base = value, CURRENT, 0, c
                    for m in range(found.shape[0]):
                        if gains[m] <= min_gain or n_best == max_items:
                            break
                        if not (token_bits[m] >> c) & 1:
                            items[n_best] = found[m]
                            n_best += 1
    inside = np.ones(n, np.bool_)
    value = 0.0
    # Without items and base the rule says yes everywhere: conditions alone can still make one.
    if n_best > 0 or base >= 0:
        for i in range(n):
            inside[i] = _holds(family, items, n_best, base, conditions, current, previous, classes, place[i])
            if inside[i]:
                value += gain[i]
    alone, which, c, negated = _best_condition(place, gain, np.ones(n, np.bool_), classes)
    if which >= 0 and alone - min_gain > best + 1e-12:
        n_best, base, family, value = 0, -1, 0, alone
        conditions[0, 0], conditions[0, 1], conditions[0, 2] = which, c, negated
        for i in range(n):
            has = (classes[place[i], which] >> c) & 1
            inside[i] = has != negated
    elif n_best == 0 and base < 0:
        return 0, 0, -1, 0.0
    for slot in range(conditions.shape[0]):
        if conditions[slot, 0] >= 0:
            continue
        more, which, c, negated = _best_condition(place, gain, inside, classes)
        if which < 0 or more - value <= min_gain:
            break
        conditions[slot, 0], conditions[slot, 1], conditions[slot, 2] = which, c, negated
        value = more
        for i in range(n):
            if inside[i] and ((classes[place[i], which] >> c) & 1) == negated:
                inside[i] = False
    return family, n_best, base, value


@njit(parallel=True, cache=True)
def fit(  # type: ignore[no-untyped-def]
    latent_ptr, contexts, starts, stops, offsets, positions, acts, is_random, side, document, ctx, skip, usable,
    current, previous, classes, max_items, min_gain, shuffle_seed,
    family, items, n_items, base, conditions, gain_out, n_on_out,
):  # fmt: skip
    """Find each latent's rule on side 0. With shuffle_seed >= 0 its activations are shuffled over its places first."""
    for latent in prange(latent_ptr.shape[0] - 1):
        place, act, far, window = _places(
            latent_ptr[latent], latent_ptr[latent + 1], contexts, starts, stops, offsets, positions, acts, is_random,
            side, ctx, skip, usable, 0,
        )  # fmt: skip
        if shuffle_seed >= 0:
            np.random.seed((shuffle_seed + 7919 * latent) % 2147483647)  # noqa: NPY002 - numba's own, per thread
            _shuffle(act, far)
        gain, n_on = _gains(act, far)
        n_on_out[latent] = n_on
        if n_on > 0:
            family[latent], n_items[latent], base[latent], gain_out[latent] = _fit_one(
                place, act, gain, window, document, current, previous, classes, max_items, min_gain, items[latent],
                conditions[latent],
            )  # fmt: skip


@njit
def _shuffle(act, far):  # type: ignore[no-untyped-def]
    """What is known of the places in random order, so that nothing about a token tells whether it is active."""
    for i in range(act.shape[0] - 1, 0, -1):
        j = np.random.randint(0, i + 1)  # noqa: NPY002
        act[i], act[j] = act[j], act[i]
        far[i], far[j] = far[j], far[i]


@njit(parallel=True, cache=True)
def score(  # type: ignore[no-untyped-def]
    latent_ptr, contexts, starts, stops, offsets, positions, acts, is_random, side, ctx, skip, usable,
    current, previous, classes, shuffle_seed, rule_of, family, items, n_items, base, conditions,
    gain_out, correlation_out, n_on_out,
):  # fmt: skip
    """How well rule rule_of[l] tells latent l's active places from its silent ones on side 1."""
    for latent in prange(latent_ptr.shape[0] - 1):
        place, act, far, _ = _places(
            latent_ptr[latent], latent_ptr[latent + 1], contexts, starts, stops, offsets, positions, acts, is_random,
            side, ctx, skip, usable, 1,
        )  # fmt: skip
        if shuffle_seed >= 0:
            np.random.seed((shuffle_seed + 7919 * latent) % 2147483647)  # noqa: NPY002
            _shuffle(act, far)
        gain, n_on = _gains(act, far)
        n_on_out[latent] = n_on
        r = rule_of[latent]
        if n_on == 0 or n_on == place.shape[0]:
            continue
        total, n_yes, s_act, s_both, s_square = 0.0, 0, 0.0, 0.0, 0.0
        says = n_items[r] > 0 or base[r] >= 0 or conditions[r, 0, 0] >= 0
        for i in range(place.shape[0]):
            s_act += act[i]
            s_square += act[i] * act[i]
            if says and _holds(
                family[r], items[r], n_items[r], base[r], conditions[r], current, previous, classes, place[i]
            ):
                total += gain[i]
                n_yes += 1
                s_both += act[i]
        gain_out[latent] = total
        n = place.shape[0]
        spread = (n * s_square - s_act * s_act) * (n * n_yes - n_yes * n_yes)
        correlation_out[latent] = (n * s_both - n_yes * s_act) / np.sqrt(spread) if spread > 0 else 0.0
