"""Edits of latents on tiny random models: against plain hooks, against recomputation, and against arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edited_models import D, N, commonest, identity, make_lm, random_topk, sites, some_ids, some_texts
from torch import Tensor

from sememe.dictionaries import Sites
from sememe.edits import Intervention, LatentEdit, _hashed, editing
from sememe.errors import ConfigError, HookpointError, MismatchError, ShapeError
from sememe.lm import LanguageModel


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return some_texts()


@pytest.fixture(scope="module")
def lm(texts: list[str]) -> LanguageModel:
    return make_lm(texts)


# -- edits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["scale", "add"])
def test_an_edit_that_changes_nothing_changes_no_bit(texts: list[str], dtype: torch.dtype, how: str) -> None:
    lm = make_lm(texts, dtype)
    dictionary = random_topk(sites(lm, "resid_post.1"))
    edit = LatentEdit.build({"latents": tuple(range(N)), "how": how, "value": 1.0 if how == "scale" else 0.0})
    ids = some_ids(lm, texts)
    with torch.no_grad():
        plain = lm.hidden(ids)
        with Intervention(dictionary, [edit]).on(lm):
            edited = lm.hidden(ids)
    assert torch.equal(plain, edited)


@pytest.mark.parametrize("hookpoint", ["resid_post.1", "mlp_out.0", "attn_out.2"])
def test_ablating_a_latent_takes_out_its_activation_times_its_direction(
    lm: LanguageModel, texts: list[str], hookpoint: str
) -> None:
    dictionary = random_topk(sites(lm, hookpoint))
    ids = some_ids(lm, texts)
    with torch.no_grad():
        x = lm.capture(ids, hookpoint)[hookpoint]
        latent = commonest(dictionary, x)[0]
        acts = dictionary.encode(x.reshape(-1, D)).to_dense()[:, latent].reshape(ids.shape)
        assert 0 < int((acts != 0).sum()) < acts.numel()
        expected = x - acts[:, :, None] * dictionary.W_dec[latent]
        with Intervention(dictionary, [LatentEdit(latents=(latent,))]).on(lm):
            found = lm.capture(ids, hookpoint)[hookpoint]
            edited = lm.hidden(ids)
        with lm.edit({hookpoint: lambda _: expected}):
            by_hand = lm.hidden(ids)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(edited, by_hand, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[acts == 0], x[acts == 0])
        assert not torch.allclose(edited, lm.hidden(ids), atol=1e-3)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"how": "zero"}, lambda acts: 0 * acts),
        ({"how": "clamp", "value": 1.5}, lambda acts: torch.full_like(acts, 1.5)),
        ({"how": "scale", "value": -2.0}, lambda acts: -2 * acts),
        ({"how": "add", "value": 0.25}, lambda acts: acts + 0.25),
    ],
    ids=["zero", "clamp", "scale", "add"],
)
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_every_edit_in_both_arms(edit: dict[str, Any], expected: Any, error: Any) -> None:
    where = Sites.build(
        {
            side: [{"model": "m", "model_fingerprint": "f", "hookpoint": "h", "start": 0, "stop": D}]
            for side in ("inputs", "outputs")
        }
    )
    dictionary = random_topk(where)
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))
    dense = dictionary.encode(x.reshape(-1, D)).to_dense()
    latents = commonest(dictionary, x)[:3]
    changed = dense.clone()
    changed[:, latents] = expected(dense[:, latents])
    new = changed @ dictionary.W_dec + dictionary.b_dec
    if error == "keep":
        new = x.reshape(-1, D) + new - (dense @ dictionary.W_dec + dictionary.b_dec)
    edits = [LatentEdit.build({"latents": latents, **edit})]
    with torch.no_grad():
        found = Intervention(dictionary, edits, error=error).edited({"h": x})["h"]
    torch.testing.assert_close(found.reshape(-1, D), new, rtol=1e-5, atol=1e-5)


def test_an_identity_dictionary_patches_activations_plainly(lm: LanguageModel, texts: list[str]) -> None:
    hookpoint = "resid_post.0"
    dictionary = identity(sites(lm, hookpoint))
    ids = some_ids(lm, texts)

    def patch(x: Tensor) -> Tensor:
        new = x.clone()
        new[:, :, 5] = 0.75
        new[:, :, 9] = 0.0
        return new

    edits = [LatentEdit(latents=(5,), how="clamp", value=0.75), LatentEdit(latents=(D + 5, 9, D + 9))]
    with torch.no_grad():
        with lm.edit({hookpoint: patch}):
            plain = lm.hidden(ids)
        with Intervention(dictionary, edits, error="drop").on(lm):
            edited = lm.hidden(ids)
    assert torch.equal(plain, edited)


def test_positions_over_the_norm_limit_and_outside_the_mask_keep_their_bits(
    lm: LanguageModel, texts: list[str]
) -> None:
    ids = some_ids(lm, texts)
    with torch.no_grad():
        x = lm.capture(ids, "resid_post.1")["resid_post.1"]
        limit = float(x.norm(dim=-1).median())
        dictionary = random_topk(sites(lm, "resid_post.1", max_norm=limit))
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[:, 3] = False
        edit = LatentEdit(latents=(0,), how="add", value=1.0)
        for error in ("keep", "drop"):
            new = Intervention(dictionary, [edit], error=error, keep=keep).edited({"resid_post.1": x})[
                "resid_post.1"
            ]
            here = (x.norm(dim=-1) <= limit) & keep
            assert 0 < int(here.sum()) < here.numel()
            assert torch.equal(new[~here], x[~here])
            assert bool((new[here] != x[here]).any(dim=1).all())


def test_a_transcoder_is_edited_in_one_forward(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "mlp_in.1", "mlp_out.1"))
    ids = some_ids(lm, texts)
    with torch.no_grad():
        x = lm.capture(ids, ["mlp_in.1", "mlp_out.1"])
        latent = commonest(dictionary, x["mlp_in.1"])[0]
        acts = dictionary.encode(x["mlp_in.1"].reshape(-1, D)).to_dense()[:, latent].reshape(ids.shape)
        expected = x["mlp_out.1"] + acts[:, :, None] * dictionary.W_dec[latent]
        with Intervention(dictionary, [LatentEdit(latents=(latent,), how="scale", value=2.0)]).on(lm):
            for _ in range(2):  # a second forward in one context starts afresh
                found = lm.capture(ids, ["mlp_in.1", "mlp_out.1"])
        torch.testing.assert_close(found["mlp_out.1"], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(found["mlp_in.1"], x["mlp_in.1"])


def test_edits_are_differentiable(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1"))
    with Intervention(dictionary, [LatentEdit(latents=(1, 2), how="add", value=0.5)]).on(lm):
        lm.hidden(some_ids(lm, texts)).sum().backward()
    gradient = dictionary.W_dec.grad
    assert gradient is not None
    assert set(gradient.abs().sum(1).nonzero().flatten().tolist()) == {1, 2}


# -- from another run --------------------------------------------------------------------------------


def two_runs(lm: LanguageModel, texts: list[str], hookpoint: str) -> tuple[Tensor, Tensor, Any, Any]:
    ids, others = some_ids(lm, texts), some_ids(lm, texts[10:])
    with torch.no_grad():
        return ids, others, lm.capture(ids, hookpoint), lm.capture(others, hookpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patching_a_run_with_itself_changes_no_bit(texts: list[str], dtype: torch.dtype) -> None:
    lm = make_lm(texts, dtype)
    dictionary = random_topk(sites(lm, "resid_post.1"))
    ids, _, x, _ = two_runs(lm, texts, "resid_post.1")
    patch = LatentEdit(latents=tuple(range(N)), how="patch")
    with torch.no_grad():
        plain = lm.hidden(ids)
        with Intervention(dictionary, [patch], other=x).on(lm):
            assert torch.equal(lm.hidden(ids), plain)


def test_all_latents_of_an_identity_dictionary_are_activation_patching(
    lm: LanguageModel, texts: list[str]
) -> None:
    hookpoint = "resid_post.0"
    dictionary = identity(sites(lm, hookpoint))
    ids, _, _, theirs = two_runs(lm, texts, hookpoint)
    patch = LatentEdit(latents=tuple(range(2 * D)), how="patch")
    at = [2, -1]

    def plainly(x: Tensor) -> Tensor:
        new = x.clone()
        new[:, at] = theirs[hookpoint][:, at]
        return new

    with torch.no_grad():
        with lm.edit({hookpoint: plainly}):
            plain = lm.hidden(ids)
        with Intervention(dictionary, [patch], error="drop", other=theirs, positions=at).on(lm):
            assert torch.equal(lm.hidden(ids), plain)
        with Intervention(dictionary, [patch], other=theirs, positions=at).on(lm):  # the error is kept: none
            torch.testing.assert_close(lm.hidden(ids), plain, rtol=1e-5, atol=2e-6)
            found = lm.capture(ids, hookpoint)[hookpoint]
        x, y = lm.capture(ids, hookpoint)[hookpoint], theirs[hookpoint]
    assert bool(((found - y).abs() <= 2**-22 * (x.abs() + y.abs()))[:, at].all()), "x + (y - x) is rounded"
    rest = [i for i in range(ids.shape[1]) if i not in (2, ids.shape[1] - 1)]
    assert torch.equal(found[:, rest], x[:, rest])


def test_some_latents_move_by_what_they_differ(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1"))
    ids, _, mine, theirs = two_runs(lm, texts, "resid_post.1")
    with torch.no_grad():
        here, there = (dictionary.encode(x["resid_post.1"].reshape(-1, D)).to_dense() for x in (mine, theirs))
        chosen = commonest(dictionary, mine["resid_post.1"])[:4]
        moved = (there - here)[:, chosen] @ dictionary.W_dec[chosen]
        found = Intervention(
            dictionary, [LatentEdit(latents=tuple(chosen), how="patch")], other=theirs
        ).edited(mine)
        expected = mine["resid_post.1"] + moved.reshape(*ids.shape, D)
        torch.testing.assert_close(found["resid_post.1"], expected, rtol=1e-5, atol=1e-5)

        mean = Intervention(dictionary, [LatentEdit(latents=tuple(chosen), how="mean")], other=theirs)
        moved = (there.mean(0) - here)[:, chosen] @ dictionary.W_dec[chosen]
        torch.testing.assert_close(
            mean.edited(mine)["resid_post.1"],
            mine["resid_post.1"] + moved.reshape(*ids.shape, D),
            rtol=1e-5,
            atol=1e-5,
        )


def test_resampling_takes_whole_rows_of_the_other_run_by_its_seed(
    lm: LanguageModel, texts: list[str]
) -> None:
    dictionary = identity(sites(lm, "resid_post.1"))
    ids, _, _mine, theirs = two_runs(lm, texts, "resid_post.1")
    edit = LatentEdit(latents=tuple(range(2 * D)), how="resample")

    def resampled(seed: int) -> Tensor:
        intervention = Intervention(dictionary, [edit], other=theirs, seed=seed, error="drop")
        with torch.no_grad(), intervention.on(lm):
            return lm.capture(ids, "resid_post.1")["resid_post.1"].reshape(-1, D)

    found = resampled(0)
    pool = {tuple(row.tolist()) for row in theirs["resid_post.1"].reshape(-1, D)}
    assert {tuple(row.tolist()) for row in found} <= pool and len(found.unique(dim=0)) > len(found) // 3
    assert torch.equal(found, resampled(0)) and not torch.equal(found, resampled(1))


def test_draws_follow_the_place_and_not_the_forwards(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1"))
    _ids, _, mine, theirs = two_runs(lm, texts, "resid_post.1")
    two = [LatentEdit(latents=(i,), how="resample") for i in (0, 1)]
    x = mine["resid_post.1"]
    with torch.no_grad():
        whole = Intervention(dictionary, two, other=theirs).edited(mine)["resid_post.1"]
        last = Intervention(dictionary, two, other=theirs).edited({"resid_post.1": x[:, 7:]}, 7, 7)
        assert torch.equal(whole[:, 7:], last["resid_post.1"])
        acts = Intervention(dictionary, two, other=theirs)._acts_at(theirs, None)[1]
    places = torch.arange(4000)
    drawn = _hashed(0, 0, torch.zeros_like(places), places) % len(acts)
    counts = torch.bincount(drawn, minlength=len(acts)).double()
    assert float(((counts - 4000 / 36) ** 2 / (4000 / 36)).sum()) < 75, "chi squared of 35 degrees of freedom"
    for other in ((0, 1, 0), (1, 0, 0), (0, 0, 1)):  # another seed, edit, text
        again = _hashed(other[0], other[1], torch.full_like(places, other[2]), places) % len(acts)
        assert abs(float((again == drawn).double().mean()) - 1 / 36) < 0.01


def test_sinks_and_rows_that_are_dropped_are_in_no_mean_and_no_draw(
    lm: LanguageModel, texts: list[str]
) -> None:
    _, _, _, theirs = two_runs(lm, texts, "resid_post.1")
    y = theirs["resid_post.1"].clone()
    limit = 1.1 * float(y.norm(dim=-1).max())
    y[:, 0] *= 100
    keep = torch.ones(y.shape[:2], dtype=torch.bool)
    keep[:, 1] = False
    dictionary = identity(sites(lm, "resid_post.1", max_norm=limit))
    everything = tuple(range(2 * D))
    usual = y[:, 2:].reshape(-1, D)
    place = {"resid_post.1": torch.zeros(4, 50, D)}

    def edited(how: str, **more: Any) -> Tensor:
        edit = LatentEdit.build({"latents": everything, "how": how})
        own = Intervention(dictionary, [edit], error="drop", other={"resid_post.1": y}, **more)
        with torch.no_grad():
            return own.edited(place)["resid_post.1"].reshape(-1, D)

    torch.testing.assert_close(edited("mean", other_keep=keep)[0], usual.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(edited("mean")[0], y[:, 1:].reshape(-1, D).mean(0), rtol=1e-5, atol=1e-6)
    pool = {tuple(row.tolist()) for row in usual}
    assert {tuple(row.tolist()) for row in edited("resample", other_keep=keep)} == pool
    with pytest.raises(
        ConfigError, match=r"a row of the other run that is kept and within .*, got none of 36"
    ):
        edited("mean", other_keep=torch.zeros_like(keep))
    with pytest.raises(ShapeError, match=r"other run that may be taken must have the shape .*\(3, 12\)"):
        edited("mean", other_keep=keep[:, :5])


def test_what_is_projected_out_is_gone_and_the_rest_stays(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1"))
    ids, _, mine, _ = two_runs(lm, texts, "resid_post.1")
    with torch.no_grad():
        dictionary.W_dec[7] = 2 * dictionary.W_dec[3]  # the same line twice
    edit = LatentEdit(latents=(3, 7, 11), how="project_out")
    with torch.no_grad(), Intervention(dictionary, [edit]).on(lm):
        found = lm.capture(ids, "resid_post.1")["resid_post.1"]
    directions = dictionary.W_dec[[3, 11]].detach()
    x = mine["resid_post.1"]
    assert float((found @ directions.T).abs().max()) < 1e-4 < float((x @ directions.T).abs().max())
    removed = (x - found).reshape(-1, D)
    inside = torch.linalg.lstsq(directions.T, removed.T).solution.T @ directions
    torch.testing.assert_close(inside, removed, rtol=1e-4, atol=1e-4)


# -- where -------------------------------------------------------------------------------------------


def test_several_dictionaries_at_once_are_edits_one_after_another(
    lm: LanguageModel, texts: list[str]
) -> None:
    ids = some_ids(lm, texts)
    low = Intervention(
        random_topk(sites(lm, "resid_post.0")), [LatentEdit(latents=(1,), how="add", value=3.0)]
    )
    high = Intervention(random_topk(sites(lm, "mlp_out.2"), 1), [LatentEdit(latents=tuple(range(N)))])
    with torch.no_grad():
        with editing(lm, low, high):
            found = lm.hidden(ids)
        with lm.edit({"resid_post.0": lambda x: x + 3.0 * low.dictionary.W_dec[1]}):
            y = lm.capture(ids, "mlp_out.2")["mlp_out.2"]
            with lm.edit({"mlp_out.2": lambda _: high.edited({"mlp_out.2": y})["mlp_out.2"]}):
                torch.testing.assert_close(found, lm.hidden(ids), rtol=1e-5, atol=1e-5)


# -- bad input ---------------------------------------------------------------------------------------


def test_positions_and_other_runs_that_do_not_fit(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1"))
    ids, _, _mine, theirs = two_runs(lm, texts, "resid_post.1")
    zero, patch = LatentEdit(latents=(0,)), LatentEdit(latents=(0,), how="patch")
    for position in (12, -13):
        with (
            pytest.raises(
                ConfigError, match=rf"in \[-12, 11\], the prompt has 12 tokens, got {position}\. Change"
            ),
            Intervention(dictionary, [zero], positions=[position]).on(lm),
        ):
            lm.hidden(ids)
    with pytest.raises(
        ConfigError, match=r"'patch' needs the activations of another run, got none\. Give other"
    ):
        Intervention(dictionary, [patch])
    short = {"resid_post.1": theirs["resid_post.1"][:, :9]}
    for more, message in (
        ({}, r"patch every position, the other run must have 12 tokens, got 9\. Give prompts of equal"),
        (
            {"positions": [2, 9]},
            r"reach the positions that are patched, got 9 tokens, and positions 2, 9 of 12",
        ),
    ):
        with (
            pytest.raises(ShapeError, match=message),
            Intervention(dictionary, [patch], other=short, **more).on(lm),
        ):
            lm.hidden(ids)
    with (
        pytest.raises(ShapeError, match=r"as many texts as this one, 2, got 3\. Give one counterpart"),
        Intervention(dictionary, [patch], other=theirs).on(lm),
    ):
        lm.hidden(ids[:2])
    with (
        pytest.raises(
            ShapeError, match=r"a whole prompt, the other run must have its 12 tokens or more, got 9"
        ),
        Intervention(dictionary, [patch], other=short).on(lm),
    ):
        lm.generate(ids, 3)
    with (
        pytest.raises(ShapeError, match=r"the other run must have 9 tokens, got 12\. Give prompts of equal"),
        Intervention(dictionary, [patch], other=theirs).on(lm),
    ):
        lm.hidden(ids[:, :9])


def test_a_dictionary_that_writes_before_it_reads(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "mlp_out.1", "mlp_in.1"))
    with (
        pytest.raises(HookpointError, match=r"read all its inputs by then.* got mlp_out\.1 still to come"),
        Intervention(dictionary, [LatentEdit(latents=(0,))]).on(lm),
    ):
        lm.hidden(some_ids(lm, texts))


def test_a_dictionary_without_places_is_not_edited() -> None:
    with pytest.raises(MismatchError, match=r"must know its model and hookpoint, got none"):
        Intervention(random_topk(None), [LatentEdit(latents=(0,))])


def test_an_edit_takes_the_value_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"'zero' takes no value, got 1\.0\. Drop value"):
        LatentEdit.build({"latents": (1,), "value": 1.0})
    with pytest.raises(ConfigError, match=r"'scale' needs a value, got None\. Set value"):
        LatentEdit.build({"latents": (1,), "how": "scale"})
