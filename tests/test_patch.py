"""Patching latents from one run into another: against plain activation patching, finite differences and arithmetic."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited_models import D, identity, random_topk, sites
from pairs_world import SOME_NAMES, corpus_of, people_lm, save, save_one, spaced_tokenizer
from tiny_models import tiny_tokenizer
from torch import Tensor

from sememe import artifact
from sememe.edits import Intervention, LatentEdit
from sememe.errors import ConfigError, MismatchError, TextError
from sememe.lm import LanguageModel
from sememe.pairs import Pair, by_length, ioi_pairs, read_pairs, single_tokens
from sememe.patch import PatchConfig, patch
from sememe.patch.arms import Arm, baseline, of_dictionary
from sememe.patch.config import BASELINES
from sememe.patch.orders import acdc, along, attribution, sizes, thresholds
from sememe.patch.runs import Runs, kl_of
from sememe.patch.verb import needed

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return people_lm()


@pytest.fixture(scope="module")
def pairs(lm: LanguageModel) -> list[Pair]:
    return ioi_pairs(lm.tokenizer, 8, names=SOME_NAMES)


def runs_of(lm: LanguageModel, pairs: list[Pair], *, restore: bool = True) -> Runs:
    return Runs(lm, pairs, sites(lm, SITE), restore=restore, batch_rows=3)


# -- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", ["third", "swap"])
@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_prompts_are_made_for_any_tokenizer_with_the_names(
    lm: LanguageModel, kind: str, corruption: Any
) -> None:
    tokenizer = lm.tokenizer if kind == "bytes" else spaced_tokenizer()
    made = ioi_pairs(tokenizer, 30, corruption=corruption, names=SOME_NAMES, bos=kind == "spaces")
    names = {token: name for name, token in single_tokens(tokenizer, SOME_NAMES).items()}
    assert len({pair.texts for pair in made}) == 30
    for pair in made:
        assert len(pair.clean) == len(pair.corrupted)
        apart = [(a, b) for a, b in zip(pair.clean, pair.corrupted, strict=True) if a != b]
        assert len(apart) == 1 and pair.clean[pair.first] == apart[0][0] == pair.wrong
        assert pair.answer is not None and pair.wrong is not None and pair.answer != pair.wrong
        assert pair.texts[0].count(names[pair.wrong]) == 2 and pair.texts[0].count(names[pair.answer]) == 1
        replaced = names[apart[0][1]]
        assert (replaced == names[pair.answer]) == (corruption == "swap")
        if kind == "spaces":
            assert pair.clean[0] == pair.corrupted[0] == tokenizer.bos_token_id
    groups = by_length(made)
    assert sorted(number for group in groups for number in group) == list(range(30))
    assert all(len({len(made[number].clean) for number in group}) == 1 for group in groups)


def test_prompts_that_cannot_be_made(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sememe.pairs.PLACES", ("park",))
    monkeypatch.setattr("sememe.pairs.THINGS", ("book",))
    with pytest.raises(
        ConfigError, match=r"at least 3 of the 50 names must be single tokens.*got none\. Name others"
    ):
        ioi_pairs(tiny_tokenizer(), 4)
    with pytest.raises(
        ConfigError, match=r"n_pairs must be at most what the names make, 72 here, got 100\. Lower it"
    ):
        ioi_pairs(lm.tokenizer, 100, names=SOME_NAMES[:3])


def test_pairs_of_ones_own(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"

    def write(*lines: Any) -> Path:
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    good = {"clean": "Then Mary and John", "corrupted": "Then Mary and Tom", "answer": " Mary"}
    read = read_pairs(write(good, {**good, "clean": "Then Mary and Anna", "wrong": " John"}), lm.tokenizer)
    assert [pair.wrong is None for pair in read] == [True, False]
    assert read[0].answer == single_tokens(lm.tokenizer, ["Mary"])["Mary"]
    bad: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ConfigError, r"equal length in tokens \(pairs\.jsonl, line 2\), got \d+ and \d+\. Change the words",
         (good, {"clean": "Then Mary", "corrupted": "Then Mary and John"})),
        (ConfigError, r"must differ \(pairs\.jsonl, line 1\)", ({"clean": "Mary", "corrupted": "Mary"}, good)),
        (ConfigError, r"must be a single token after its prompt", ({**good, "answer": " Mary and"}, good)),
        (TextError, r"must be an object with the texts clean and corrupted", ("{", good)),
        (TextError, r"at least two pairs, got 1", (good,)),
    ]  # fmt: skip
    for kind, message, lines in bad:
        with pytest.raises(kind, match=message):
            read_pairs(write(*lines), lm.tokenizer)
    with pytest.raises(TextError, match=r"must be a file of JSON lines"):
        read_pairs(tmp_path / "none.jsonl", lm.tokenizer)


# -- against plain activation patching ---------------------------------------------------------------


@torch.no_grad()
def swapped(lm: LanguageModel, edited: Tensor, other: Tensor, dims: list[int]) -> Tensor:
    """Log-probabilities after the last token when some dimensions are the other run's."""
    theirs = lm.capture(other, SITE)[SITE]

    def swap(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., dims] = theirs[..., dims]
        return x

    with lm.edit({SITE: swap}):
        return lm.logits(lm.hidden(edited))[:, -1].float().log_softmax(-1)


@pytest.mark.parametrize("restore", [True, False])
def test_an_identity_dictionary_reproduces_activation_patching(
    lm: LanguageModel, pairs: list[Pair], restore: bool
) -> None:
    runs = runs_of(lm, pairs, restore=restore)
    arm = of_dictionary("identity", identity(sites(lm, SITE)), runs)
    assert len(arm.latents) > D  # those that are on in a run somewhere, of both signs of each dimension
    everything = runs.measure(arm.moves(range(len(arm.latents))))
    assert float(everything.kl.abs().max()) < 1e-6
    nothing = runs.measure(arm.moves([]))
    assert float(nothing.edit.max()) == 0 and float(nothing.kl.min()) > 1e-3
    dims = [1, 4, 9, 20]
    both = [arm.latents.index(i) for dim in dims for i in (dim, D + dim) if i in arm.latents]
    some = runs.measure(arm.moves(both))
    for number, pair in enumerate(pairs):
        edited, other = (
            torch.tensor([ids]) for ids in ((pair.corrupted, pair.clean) if restore else pair[:2])
        )
        with torch.no_grad():
            target = lm.logits(lm.hidden(other))[:, -1].float().log_softmax(-1)
            mine, theirs = (lm.capture(ids, SITE)[SITE][0] for ids in (edited, other))
        found = swapped(lm, edited, other, dims)
        assert float(some.kl[number]) == pytest.approx(float(kl_of(found, target)), abs=2e-6)
        size = (theirs - mine)[pair.first :][:, dims].norm(dim=1).mean()
        assert float(some.edit[number]) == pytest.approx(float(size), rel=1e-4)
        right = found[0, pair.answer] - found[0, pair.wrong]
        assert float(some.logit_difference[number]) == pytest.approx(float(right), abs=1e-4)


def test_keys_that_are_kept_change_nothing(lm: LanguageModel, pairs: list[Pair]) -> None:
    kept = runs_of(lm, pairs)
    whole = Runs(lm, pairs, sites(lm, SITE), restore=True, batch_rows=64, keep_keys=False)
    assert kept.goes_on and kept.parts[0].run.ids.shape[1] < whole.parts[0].run.ids.shape[1]
    arms = [of_dictionary("topk", random_topk(sites(lm, SITE)), runs) for runs in (kept, whole)]
    assert arms[0].latents == arms[1].latents
    chosen = range(0, len(arms[0].latents), 3)
    found = [runs.measure(arm.moves(chosen)) for runs, arm in zip((kept, whole), arms, strict=True)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    slopes = [attribution(arm, runs, "kl") for runs, arm in zip((kept, whole), arms, strict=True)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)


def test_patches_are_those_of_the_edits_room_sinks_included(lm: LanguageModel, pairs: list[Pair]) -> None:
    with torch.no_grad():
        norms = lm.capture(torch.tensor([pairs[0].corrupted]), SITE)[SITE][0].norm(dim=1)
    limit = float(norms[pairs[0].first :].median())
    where = sites(lm, SITE, max_norm=limit)
    dictionary = random_topk(where)
    runs = Runs(lm, pairs, where, restore=True, batch_rows=64)
    arm = of_dictionary("topk", dictionary, runs)
    chosen = list(range(0, len(arm.latents), 2))
    found = runs.measure(arm.moves(chosen))
    edit = LatentEdit(latents=tuple(arm.latents[i] for i in chosen), how="patch")
    for number, pair in enumerate(pairs):
        edited, other = torch.tensor([pair.corrupted]), torch.tensor([pair.clean])
        with torch.no_grad():
            theirs = lm.capture(other, SITE)
            target = lm.logits(lm.hidden(other))[:, -1].float().log_softmax(-1)
            with Intervention(dictionary, [edit], other=theirs).on(lm):
                says = lm.logits(lm.hidden(edited))[:, -1].float().log_softmax(-1)
        assert float(found.kl[number]) == pytest.approx(float(kl_of(says, target)), abs=2e-6)


def test_baselines_that_span_the_space_leave_nothing(lm: LanguageModel, pairs: list[Pair]) -> None:
    runs = runs_of(lm, pairs)
    first = random_topk(sites(lm, SITE))
    rotation = baseline("random_rotation", runs, first, 8.0, None, 0)
    assert float(runs.measure(rotation.moves(range(D))).kl.abs().max()) < 1e-5
    one = baseline("difference_in_means", runs, first, 8.0, None, 0)
    assert len(one.latents) == 1 and float(one.directions.norm()) == pytest.approx(1.0)
    apart = torch.cat([(part.other - part.x)[part.real] for part in runs.parts]).mean(0)
    assert float(torch.cosine_similarity(apart, one.directions[0], dim=0)) == pytest.approx(1.0, abs=1e-5)
    moved = torch.cat([m[p.real] for m, p in zip(one.moves([0]), runs.parts, strict=True)]).mean(
        0
    )  # its mean is the whole of the mean difference
    torch.testing.assert_close(moved, apart, rtol=1e-4, atol=1e-5)


# -- orders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["kl", "logit_difference"])
def test_attribution_is_the_slope(lm: LanguageModel, pairs: list[Pair], of: Any) -> None:
    runs = runs_of(lm, pairs)
    arm = of_dictionary("topk", random_topk(sites(lm, SITE)), runs)
    found = attribution(arm, runs, of)
    assert (runs.n_forwards, runs.n_backwards) == (1, 1)

    def value(step: float, i: int) -> float:
        at = runs.measure([step * move for move in arm.moves([i])])
        return float(at.kl.double().mean() if of == "kl" else -at.logit_difference.double().mean())

    for i in found.abs().argsort(descending=True)[:4].tolist():
        slope = (value(0.02, i) - value(-0.02, i)) / 0.04
        assert float(found[i]) == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_attribution_beats_a_random_order_and_a_straight_way_sums_up(
    lm: LanguageModel, pairs: list[Pair]
) -> None:
    runs = runs_of(lm, pairs)
    arm = of_dictionary("identity", identity(sites(lm, SITE)), runs)
    m = len(arm.latents)
    at = sizes(m, 100)
    order = attribution(arm, runs, "kl", 4).argsort().tolist()

    def area(order: list[int]) -> float:
        return float(np.mean([float(point.measured.kl.mean()) for point in along(arm, runs, order, at)]))

    shuffled = [random.Random(seed).sample(range(m), m) for seed in range(4)]
    assert area(order) < 0.9 * min(area(one) for one in shuffled)
    few = runs_of(lm, pairs[:3])
    arm = of_dictionary("identity", identity(sites(lm, SITE)), few)
    everything, nothing = (
        few.measure(arm.moves(chosen)).kl.mean() for chosen in (range(len(arm.latents)), [])
    )
    steps = attribution(arm, few, "kl", 64).sum()  # integrated gradients are complete
    assert float(steps) == pytest.approx(float(everything - nothing), rel=0.1)


def test_sizes_hold_none_all_and_the_reference() -> None:
    assert sizes(1, 100) == [0, 1] and sizes(0, 100) == [0]
    found = sizes(300, 100)
    assert found[0] == 0 and found[-1] == 300 and {1, 2, 3, 4, 6, 8, 100, 128, 192, 256} <= set(found)
    assert thresholds(50)[0] == pytest.approx(1e-5) and thresholds(50)[-1] == pytest.approx(1.0)


def test_acdc_keeps_exactly_what_is_needed() -> None:
    cost = {0: 0.0, 1: 0.5, 2: 0.0, 3: 0.02, 4: 3.0, 5: 1e-7, 6: 0.0}  # what is lost without each
    asked: list[frozenset[int]] = []

    def kl(chosen: Any) -> float:
        asked.append(frozenset(chosen))
        return 0.1 + sum(cost[i] for i in cost if i not in chosen)

    kept = {round(one.threshold, 6): set(one.chosen) for one in acdc(kl, list(cost), [1e-5, 1e-3, 0.1, 1.0])}
    assert kept == {1e-5: {1, 3, 4}, 1e-3: {1, 3, 4}, 0.1: {1, 4}, 1.0: {4}}
    assert len(asked) == len(set(asked))  # nothing is asked twice


def test_acdc_on_a_model_is_that_of_a_plain_loop(lm: LanguageModel, pairs: list[Pair]) -> None:
    runs = runs_of(lm, pairs[:4])
    arm = of_dictionary("topk", random_topk(sites(lm, SITE)), runs)
    start, at = list(range(10)), [1e-4, 1e-2, 0.1]

    def kl(chosen: Any) -> float:
        return float(runs.measure(arm.moves(chosen)).kl.mean())

    order, plain = list(start), []
    random.Random(3).shuffle(order)
    for threshold in at:
        for one in list(order):
            without = [other for other in order if other != one]
            if kl(without) - kl(order) < threshold:
                order = without
        plain.append(tuple(sorted(order)))
    assert [one.chosen for one in acdc(kl, start, at, seed=3)] == plain


def test_what_is_needed_is_interpolated() -> None:
    kl = np.array([[4.0, 2.0, 1.0], [4.0, 3.0, 2.5]])
    edit = np.array([[0.0, 10.0, 30.0], [0.0, 1.0, 2.0]])
    n, size = needed([0, 10, 20], kl, edit, np.array([1.5, 1.5]))
    assert n[0] == pytest.approx(15.0) and size[0] == pytest.approx(20.0)
    assert math.isinf(n[1]) and math.isinf(size[1])
    n, _ = needed([0, 10, 20], kl, edit, np.array([2.0, 5.0]))
    assert n.tolist() == [10.0, 0.0]


# -- the verb ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patching")
    save(lm, path / "one")
    save_one(identity(sites(lm, SITE)), path / "pca")  # of the name of a baseline
    return path


def small(folder: Path, out: Path, **changes: Any) -> PatchConfig:
    base: dict[str, Any] = {
        "out": out,
        "dictionaries": (folder / "one", folder / "pca"),
        "names": SOME_NAMES,
        "n_pairs": 4,
        "acdc_limit": 4,
        "n_thresholds": 3,
        "reference": 10,
        "text": corpus_of(folder),
        "n_fit_rows": 400,
        "n_bootstrap": 50,
    }
    return PatchConfig.build(base | changes)


@pytest.mark.parametrize(
    "baselines",
    [("pca", "pca_signs", "difference_in_means"), pytest.param(BASELINES, marks=pytest.mark.slow)],
)
def test_the_verb_writes_numbers_plots_and_a_page(
    lm: LanguageModel, folder: Path, tmp_path: Path, baselines: tuple[str, ...]
) -> None:
    done = patch(small(folder, tmp_path / "a", baselines=baselines), lm=lm)
    data = json.loads((done.path / "patch.json").read_text())
    arms = {(arm["name"], arm["is_dictionary"]): arm for arm in data["arms"]}
    assert set(arms) == {("one", True), ("pca", True)} | {(name, False) for name in baselines}
    pca = arms["pca", False]["orders"]["attribution"]
    assert data["reference"]["n"] == 10 and data["reference"]["arm"] == "pca"
    at = next(point for point in pca["points"] if point["n"] == 10)
    assert at["kl"] == data["reference"]["kl"]
    assert pca["n_needed"]["value"] <= 10 and pca["points"][-1]["kl"]["value"] < 1e-4
    for arm in data["arms"]:
        for order, own in arm["orders"].items():
            counts = [point["n"] for point in own["points"]]
            assert counts == sorted(set(counts)) and counts[0] == 0
            start = own["points"][0]
            assert (
                start["edit"]["value"] == 0
                and start["kl"]["low"] <= start["kl"]["value"] <= start["kl"]["high"]
            )
            assert counts[-1] == (min(4, arm["n_candidates"]) if order == "acdc" else arm["n_candidates"])
            cost = {"attribution": (1, 1), "random": (0, 0)}
            assert order == "acdc" or (own["n_forwards"], own["n_backwards"]) == cost[order]
    assert arms["one", True]["orders"]["acdc"]["n_forwards"] > 4
    for name in ("patch.md", "patch.html", "figures/patches.svg", "figures/edit.svg"):
        assert (done.path / name).stat().st_size > 500
    page = (done.path / "patch.md").read_text()
    assert "| one | " in page and "null: PCA, both signs" in page and "Reference: " in page
    again = patch(small(folder, tmp_path / "a", baselines=baselines), lm=lm)
    assert again.fingerprint == done.fingerprint
    fewer: dict[str, Any] = {"baselines": ("random_rotation",), "orders": ("attribution",), "acdc_limit": 128}
    fewer |= {"n_thresholds": 50, "n_fit_rows": 8192, "direction": "corrupt"}
    found = json.loads((patch(small(folder, tmp_path / "b", **fewer), lm=lm).path / "patch.json").read_text())
    assert found["reference"] is None and found["direction"] == "corrupt" and found["attributions"] == []
    assert found["arms"][0]["orders"]["attribution"]["points"][0]["kl"] != at["kl"]


def test_dictionaries_that_do_not_belong_together(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    other = save(lm, tmp_path / "other", "resid_post.0")
    with pytest.raises(
        MismatchError, match=r"of one hookpoint, resid_post\.1 like one, got resid_post\.0 of other\."
    ):
        patch(small(folder, tmp_path / "a", dictionaries=(folder / "one", other)), lm=lm)
    with pytest.raises(MismatchError, match=r"the model must be the one the dictionary was trained on, tiny"):
        patch(small(folder, tmp_path / "a"), lm=people_lm(seed=1))
    transcoder = save_one(random_topk(sites(lm, "mlp_in.1", "mlp_out.1")), tmp_path / "transcoder")
    with pytest.raises(ConfigError, match=r"baselines are of dictionaries that reconstruct what they read"):
        patch(small(folder, tmp_path / "a", dictionaries=(transcoder,), baselines=("pca",)), lm=lm)
    done = patch(small(folder, tmp_path / "t", dictionaries=(transcoder,), orders=("random",), acdc_limit=128,
                       n_thresholds=50), lm=lm)  # fmt: skip
    assert isinstance(done, artifact.Artifact)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pairs": 1}, r"n_pairs must be >= 2"),
        ({"pairs": "x.jsonl", "n_pairs": 9}, r"n_pairs must be left out when pairs are given"),
        ({"orders": ("attribution", "attribution")}, r"each of orders must be named once"),
        ({"orders": ()}, r"orders must name at least one"),
        ({"orders": ("random",), "n_thresholds": 9}, r"n_thresholds must be left out when acdc is not among"),
        (
            {"orders": ("random",), "attribution_steps": 9},
            r"must be left out when nothing is ordered by attribution",
        ),
        (
            {"baselines": ("random_rotation",), "n_fit_rows": 9},
            r"must be left out when no baseline is fitted",
        ),
        ({"dictionaries": ()}, r"dictionaries must be at least 1 long"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PatchConfig.build({"dictionaries": ("d",)} | options)


def test_an_arm_without_candidates_adds_nothing(lm: LanguageModel, pairs: list[Pair]) -> None:
    runs = runs_of(lm, pairs)
    rows = [part.x.shape[0] for part in runs.parts]
    arm = Arm("none", True, {}, 5, (), torch.zeros(0, D), [torch.zeros(n, 0) for n in rows])
    assert all(not bool(move.any()) for move in arm.moves([]))
    assert [one.chosen for one in acdc(lambda _: 0.0, [], [0.1])] == [()]
