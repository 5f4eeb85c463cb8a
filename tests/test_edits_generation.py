"""Edits of latents while a model writes: with keys kept as without, at positions of the prompt and of new tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edited_models import D, N, make_lm, random_topk, sites, some_ids, some_texts
from torch import Tensor

from sememe.edits import Intervention, LatentEdit
from sememe.errors import ConfigError
from sememe.lm import LanguageModel


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return some_texts()


@pytest.fixture(scope="module")
def lm(texts: list[str]) -> LanguageModel:
    return make_lm(texts)


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize(
    "edit",
    [
        {"how": "zero"},
        {"how": "mean"},
        {"how": "resample"},
        {"how": "clamp", "value": 3.0},
        {"how": "scale", "value": 4.0},
        {"how": "add", "value": 2.0},
        {"how": "patch"},
        {"how": "project_out"},
    ],
    ids=lambda edit: edit["how"],
)
def test_edits_in_generation_equal_recomputation_without_a_cache(
    lm: LanguageModel, texts: list[str], edit: dict[str, Any], error: Any
) -> None:
    """The prompt has 5 tokens, the other run 9: four of the new ones are patched, too, and those after are not."""
    dictionary = random_topk(sites(lm, "resid_post.1"))
    ids = some_ids(lm, texts, length=5)
    other = None
    if edit["how"] in ("mean", "resample", "patch"):
        with torch.no_grad():
            other = lm.capture(some_ids(lm, texts[10:], length=9), "resid_post.1")
    edits = [LatentEdit.build({"latents": tuple(range(N)), **edit})]
    if edit["how"] == "project_out":
        edits = [LatentEdit(latents=(1, 2, 3), how="project_out")]
    intervention = Intervention(dictionary, edits, error=error, other=other)
    with intervention.on(lm):
        cached = lm.generate(ids, 14, stop_at_eos=False)
        anew = lm.generate(ids, 14, stop_at_eos=False, use_cache=False)
    assert torch.equal(cached, anew)
    assert not torch.equal(cached, lm.generate(ids, 14, stop_at_eos=False))
    if edit["how"] == "patch":  # by hand, with what a forward of the whole text is given
        acts = dictionary.encode(other["resid_post.1"].reshape(-1, D)).to_dense().reshape(3, 9, N)

        def patched(x: Tensor) -> Tensor:
            new, n = x.clone(), min(x.shape[1], 9)
            mine = x[:, :n].reshape(-1, D)
            theirs = acts[:, :n].reshape(-1, N) @ dictionary.W_dec
            own = (
                dictionary.b_dec
                if error == "drop"
                else mine - dictionary.encode(mine).to_dense() @ dictionary.W_dec
            )
            new[:, :n] = (theirs + own).reshape(3, n, D)
            return new

        with torch.no_grad(), lm.edit({"resid_post.1": patched}):
            assert torch.equal(cached, lm.generate(ids, 14, stop_at_eos=False, use_cache=False))


def test_a_patch_in_generation_holds_at_its_positions_only(lm: LanguageModel, texts: list[str]) -> None:
    """One of the prompt and one of the new tokens, from a run that is longer; and from one as long as what is named."""
    dictionary = random_topk(sites(lm, "resid_post.1"))
    ids = some_ids(lm, texts, length=5)
    with torch.no_grad():
        other = lm.capture(some_ids(lm, texts[10:], length=12), "resid_post.1")
    patch = LatentEdit(latents=tuple(range(N)), how="patch")
    short = {"resid_post.1": other["resid_post.1"][:, :3]}
    for theirs, positions in ((other, [2, 6]), (short, [2])):
        with Intervention(dictionary, [patch], other=theirs, positions=positions).on(lm):
            cached = lm.generate(ids, 10, stop_at_eos=False)
            anew = lm.generate(ids, 10, stop_at_eos=False, use_cache=False)
        by_hand = ids
        for _ in range(10):
            at = [p for p in positions if p < by_hand.shape[1]]
            more = {"resid_post.1": torch.nn.functional.pad(theirs["resid_post.1"], (0, 0, 0, 12))}
            with Intervention(dictionary, [patch], other=more, positions=at).on(lm), torch.no_grad():
                logits = lm.logits(lm.hidden(by_hand))[:, -1]
            by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(cached, anew) and torch.equal(cached, by_hand)


def test_edits_before_a_patch_stay_where_the_other_run_has_nothing(lm: LanguageModel) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1"))
    x = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(0))
    edits = [LatentEdit(latents=(3,), how="clamp", value=2.0), LatentEdit(latents=(3, 4), how="patch")]
    own = Intervention(dictionary, edits, other={"resid_post.1": x[:, :1]})
    with torch.no_grad():
        new = own.edited({"resid_post.1": x}, first=0, n_prompt=1)["resid_post.1"]
        acts = dictionary.encode(x[0]).to_dense()
    assert torch.equal(new[0, 0], x[0, 0])
    expected = x[0, 1] + (2.0 - acts[1, 3]) * dictionary.W_dec[3]
    torch.testing.assert_close(new[0, 1], expected.detach(), rtol=1e-5, atol=1e-6)


def test_positions_count_over_the_whole_text_in_generation(lm: LanguageModel, texts: list[str]) -> None:
    """Positions 2, the prompt's last and the second new one, cached, anew and by hand."""
    dictionary = random_topk(sites(lm, "resid_post.1"))
    ids = some_ids(lm, texts, length=5)
    edit = LatentEdit(latents=(3,), how="add", value=25.0)
    with Intervention(dictionary, [edit], positions=[2, -1, 6]).on(lm):
        cached = lm.generate(ids, 12, stop_at_eos=False)
        anew = lm.generate(ids, 12, stop_at_eos=False, use_cache=False)
    by_hand = ids
    for _ in range(12):
        at = [p for p in (2, 4, 6) if p < by_hand.shape[1]]
        with Intervention(dictionary, [edit], positions=at).on(lm), torch.no_grad():
            logits = lm.logits(lm.hidden(by_hand))[:, -1]
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, by_hand) and torch.equal(anew, by_hand)
    assert not torch.equal(cached, lm.generate(ids, 12, stop_at_eos=False))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", [9, 10_000, -6])
def test_positions_that_a_generation_never_reads(
    lm: LanguageModel, texts: list[str], position: int, use_cache: bool
) -> None:
    """Of 5 tokens and 5 new ones, 9 are read: nothing follows the last."""
    ids = some_ids(lm, texts, length=5)
    own = Intervention(
        random_topk(sites(lm, "resid_post.1")), [LatentEdit(latents=(3,))], positions=[1, position]
    )
    message = (
        rf"in \[-5, 8\], the prompt has 5 tokens and 4 of the new ones are read, got {position}\. Change"
    )
    with own.on(lm), pytest.raises(ConfigError, match=message):
        lm.generate(ids, 5, stop_at_eos=False, use_cache=use_cache)
