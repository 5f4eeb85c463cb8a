"""Ablations and removals over kept keys, against whole forwards with plain hooks; changes against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, D_MODEL, MORE, N_LAYERS, VOCAB, tiny_lm
from torch import Tensor

from sememe.dictionaries import Site, Sites, TopK, TopKConfig
from sememe.dictionaries.base import Dictionary
from sememe.downstream import Predictions, Reruns
from sememe.downstream.changes import _largest
from sememe.downstream.reruns import _Lines
from sememe.errors import ActivationError, MismatchError
from sememe.lm import LanguageModel
from sememe.lm.past import Packed

ALL = {**ARCHITECTURES, **MORE}
SEQ, N_AFTER = 12, 3
ROWS = torch.tensor([0, 1, 1, 0, 2, 2])
POSITIONS = torch.tensor([4, 0, 11, 10, 7, 7])
LATENTS = torch.tensor([3, 5, 3, 11, 20, 6])
ACTS = torch.tensor([3.0, 2.0, -1.5, 4.0, 2.5, 1.0])


@pytest.fixture(scope="module", params=sorted(ALL))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


def sites_of(lm: LanguageModel, names: list[str]) -> tuple[Site, ...]:
    found, start = [], 0
    for name in names:
        width = lm.width(name)
        found.append(
            Site(
                model=lm.name,
                model_fingerprint=lm.fingerprint,
                hookpoint=name,
                start=start,
                stop=start + width,
            )
        )
        start += width
    return tuple(found)


def dictionary_of(
    lm: LanguageModel, inputs: list[str], outputs: list[str] | None = None, d_sae: int = 24
) -> Dictionary:
    """Random directions of length 1, whose latents fire on what the model gives."""
    where = Sites(inputs=sites_of(lm, inputs), outputs=sites_of(lm, outputs or inputs))
    d_in, d_out = where.inputs[-1].stop, where.outputs[-1].stop
    made = TopK(TopKConfig(k=6), d_in, d_out, d_sae, where)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, d_in, generator=generator), torch.randn(64, d_out, generator=generator)
    made.initialise(*rows, generator)
    return made.eval()


def ids_of(batch: int = 3) -> Tensor:
    return torch.randint(2, VOCAB, (batch, SEQ), generator=torch.Generator().manual_seed(1))


def ablated_whole(lm: LanguageModel, dictionary: Dictionary, ids: Tensor, i: int) -> Tensor:
    """The slow truth: one row, one whole forward, with hooks that put x - a d in the place of x."""
    assert dictionary.sites is not None
    row, position = ids[ROWS[i]][None], int(POSITIONS[i])
    names = [site.hookpoint for site in dictionary.sites.outputs]
    before = lm.capture(row, names)
    direction = dictionary.decoder_directions()[LATENTS[i]]

    def edit(site: Site):  # type: ignore[no-untyped-def]
        def change(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, position] = before[site.hookpoint][0, position] - ACTS[i] * direction[site.start : site.stop]
            return x

        return change

    with lm.edit({site.hookpoint: edit(site) for site in dictionary.sites.outputs}):
        return lm.hidden(row)[0, position : position + N_AFTER + 1]


def check_ablations(lm: LanguageModel, dictionary: Dictionary, keep_keys: bool = True) -> Reruns:
    ids = ids_of()
    reruns = Reruns(lm, dictionary, keep_keys=keep_keys)
    with torch.inference_mode():
        run = reruns.unedited(ids)
        hidden = reruns.ablated(run, ROWS, POSITIONS, LATENTS, ACTS, N_AFTER)
        for i in range(len(ROWS)):
            truth = ablated_whole(lm, dictionary, ids, i)
            plain = run.base.hidden[ROWS[i], POSITIONS[i] :][: N_AFTER + 1]
            assert torch.allclose(hidden[i, : len(truth)], truth, rtol=1e-3, atol=1e-4), f"ablation {i}"
            assert (truth[0] - plain[0]).norm() > 100 * (hidden[i, 0] - truth[0]).norm(), (
                "it changes something"
            )
    return reruns


def test_every_architecture(lm: LanguageModel) -> None:
    """Only the layers above and the tokens after run again, where the model lets them; the numbers are the same."""
    reruns = check_ablations(lm, dictionary_of(lm, ["resid_post.1"]))
    assert reruns.goes_on == (lm.hf.config.model_type != "mamba"), (
        "a model with keys and values goes on from them"
    )
    if reruns.goes_on:
        assert reruns.first_layer == 2
    if lm.packs(SEQ):  # and not only where several ablations of a context share a row
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm, "packs", lambda _: False)
            check_ablations(lm, dictionary_of(lm, ["resid_post.1"]))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["resid_pre.0"], None),
        (["resid_post.0"], None),
        (["resid_post.2"], None),
        (["attn_out.1"], None),
        (["attn_z.1"], None),
        (["mlp_act.0"], None),
        (["mlp_out.2"], None),
        (["mlp_in.1"], ["mlp_out.1"]),
        (["resid_post.0", "resid_post.1"], None),
        (["mlp_out.0", "attn_out.2"], None),
        (["resid_post.2"], ["resid_post.0"]),
        (["model.layers.1"], None),
    ],
    ids=str,
)
def test_every_hookpoint(llama: LanguageModel, inputs: list[str], outputs: list[str] | None) -> None:
    check_ablations(llama, dictionary_of(llama, inputs, outputs))


@pytest.mark.parametrize("names", [["resid_post.0", "mlp_out.1"], ["attn_out.1"]], ids=str)
def test_whole_rows_again_give_the_same(llama: LanguageModel, names: list[str]) -> None:
    assert not check_ablations(llama, dictionary_of(llama, names), keep_keys=False).goes_on


def test_layers_below_and_tokens_before_do_not_run_again(llama: LanguageModel) -> None:
    reruns = Reruns(llama, dictionary_of(llama, ["resid_post.1"]))
    seen: list[tuple[int, int]] = []
    with torch.inference_mode():
        run = reruns.unedited(ids_of())
        hooks = [
            layer.self_attn.register_forward_hook(
                lambda _, __, output, i=i: seen.append((i, output[0].shape[1]))
            )
            for i, layer in enumerate(llama.hf.model.layers)
        ]
        reruns.ablated(run, ROWS, POSITIONS, LATENTS, ACTS, N_AFTER)
        for hook in hooks:
            hook.remove()
    assert seen == [(2, 2 * (N_AFTER + 1))], "the two ablations of each context lie in one row"


def test_nothing_taken_out_changes_nothing(llama: LanguageModel) -> None:
    reruns = Reruns(llama, dictionary_of(llama, ["resid_post.0"]))
    with torch.inference_mode():
        run = reruns.unedited(ids_of())
        hidden = reruns.ablated(run, ROWS, POSITIONS, LATENTS, torch.zeros(6), 0)[:, 0]
    assert torch.allclose(hidden, run.base.hidden[ROWS, POSITIONS], rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), min_size=1, max_size=40), st.integers(1, 40)
)
def test_lines_hold_every_continuation_once(items: list[tuple[int, int]], most: int) -> None:
    """Each in a row of its own context, without overlaps, and no row longer than asked for or than the longest."""
    rows, widths = (torch.tensor(column) for column in zip(*items, strict=True))
    lines = _Lines.of(rows, widths, most)
    assert torch.equal(lines.context[lines.line], rows)
    taken = [
        (int(line), place)
        for line, begin, width in zip(lines.line, lines.begins, widths, strict=True)
        for place in range(int(begin), int(begin + width))
    ]
    assert len(taken) == len(set(taken)) == int(widths.sum())
    assert set(lines.line.tolist()) == set(range(len(lines.context)))
    assert max(place for _, place in taken) < max(most, int(widths.max()))


def test_batches_hold_every_continuation_once(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reruns = Reruns(llama, dictionary_of(llama, ["resid_post.1"]))
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, (900,), generator=generator)
    lengths, n_new = (torch.randint(1, 6, (900,), generator=generator) for _ in range(2))
    with torch.inference_mode():
        run = reruns.unedited(ids_of())
    for packs in (True, False):
        monkeypatch.setattr(llama, "packs", lambda _, packs=packs: packs)
        batches = list(reruns.batches(run, rows, lengths, n_new))
        assert sorted(torch.cat(batches).tolist()) == list(range(900))
        assert len(batches) > 2 and max(int(n_new[batch].sum()) for batch in batches) < 900


def test_ablations_share_rows_only_where_that_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny_lm("llama").packs(SEQ) and tiny_lm("gemma2").packs(4096)
    assert not tiny_lm("gemma2").packs(4097), "some of its layers see 4,096 tokens"
    mistral = tiny_lm("mistral")
    assert mistral.goes_on() and not mistral.packs(SEQ), "its layers see 4 tokens"
    mask = Packed.mask
    monkeypatch.setattr(Packed, "mask", lambda self, n_new: torch.zeros_like(mask(self, n_new)))
    seeing_all = tiny_lm("llama", seed=1)
    assert seeing_all.goes_on() and not seeing_all.packs(SEQ)


# -- contexts without a token --------------------------------------------------------------------------

REMOVED = torch.tensor([0, 3, 6, 9, 0, 4])
PEAKS = torch.tensor([4, 10, 7, 10, 1, 11])


def test_a_token_left_out_is_a_text_without_it(lm: LanguageModel) -> None:
    check_removals(lm)


def test_a_token_left_out_of_whole_rows(llama: LanguageModel) -> None:
    check_removals(llama, keep_keys=False)


def check_removals(lm: LanguageModel, keep_keys: bool = True) -> None:
    dictionary = dictionary_of(lm, ["resid_post.1"])
    reruns, ids = Reruns(lm, dictionary, keep_keys=keep_keys), ids_of()
    with torch.inference_mode():
        run = reruns.unedited(ids)
        latents = []
        for row, peak in zip(
            ROWS, PEAKS, strict=True
        ):  # the strongest there, so that something is to be seen
            x = run.base.activations["resid_post.1"][row, peak][None].float()
            latents.append(int(dictionary.encode(x).to_dense().argmax()))
        found = reruns.acts_without(run, ROWS, PEAKS, REMOVED, torch.tensor(latents))
        whole = reruns.acts(run, ROWS, PEAKS, torch.tensor(latents))
        assert bool((whole > 0).all())
        for i, latent in enumerate(latents):
            row = ids[ROWS[i], : PEAKS[i] + 1]
            shorter = torch.cat([row[: REMOVED[i]], row[REMOVED[i] + 1 :]])
            x = lm.capture(shorter[None], ["resid_post.1"])["resid_post.1"][0, -1:].float()
            truth = float(dictionary.encode(x).to_dense()[0, latent])
            assert float(found[i]) == pytest.approx(truth, rel=1e-3, abs=1e-4)
    # Mamba's and others' context may hardly matter to a random model; somewhere it does.
    assert not torch.allclose(found, whole, rtol=1e-6)


# -- what changes in the predictions -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "granite", "opt_post_norm"])
def test_changes_are_those_of_two_softmaxes(name: str) -> None:
    """Against ten lines of NumPy on the two logits: linear unembeddings, a bias (phi), a soft cap (Gemma)."""
    lm = tiny_lm(name)
    ids = ids_of()
    generator = torch.Generator().manual_seed(2)
    scored = POSITIONS[:, None] + torch.arange(N_AFTER + 1) < SEQ - 1
    scored[0, 2:] = False
    with torch.inference_mode():
        base = (2 if name == "gemma3" else 20) * lm.hidden(ids)
        width = base.shape[-1]
        places = (POSITIONS[:, None] + torch.arange(N_AFTER + 1)).clamp(max=SEQ - 1)
        hidden = base[ROWS[:, None], places] + torch.randn(6, N_AFTER + 1, width, generator=generator)
        predictions = Predictions(lm, ids, base, torch.ones(ids.shape, dtype=torch.bool))
        assert predictions.linear == (name != "gemma3")
        plain = predictions.unembedding.weight is not None
        assert plain == (name in ("llama", "opt_post_norm")), "no cap, no bias and no factor"
        changes = predictions.changes(hidden, ROWS, POSITIONS, scored, n_shown=4, n_likeliest=10)
        before = log_softmax(lm.logits(base).double().numpy())
        after = log_softmax(lm.logits(hidden).double().numpy())
    losses = predictions.losses().numpy()
    for i in range(6):
        row, at = int(ROWS[i]), int(POSITIONS[i])
        p, q = before[row, at], after[i, 0]
        assert float(changes.kl[i]) == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-3, abs=1e-5)
        likely = set(np.argsort(-p)[:10].tolist()) | set(np.argsort(-q)[:10].tolist())
        ranked = sorted(likely, key=lambda v: q[v] - p[v])
        assert changes.lowered[i].tolist() == ranked[:4] and changes.raised[i].tolist() == ranked[::-1][:4]
        assert changes.raised_by[i].numpy() == pytest.approx((q - p)[ranked[::-1][:4]], rel=1e-3, abs=1e-4)
        assert changes.lowered_by[i].numpy() == pytest.approx((q - p)[ranked[:4]], rel=1e-3, abs=1e-4)
        truth = [
            before[row, at + t, ids[row, at + t + 1]] - after[i, t, ids[row, at + t + 1]]
            if scored[i, t]
            else 0
            for t in range(N_AFTER + 1)
        ]
        moved = (q - p) - (q - p).mean()  # log-probabilities and logits differ by a constant
        drop = moved[ids[row, at + 1]] if scored[i, 0] else 0
        assert float(changes.logit_change[i]) == pytest.approx(drop, rel=1e-3, abs=1e-4)
        assert float(changes.loss_change[i]) == pytest.approx(truth[0], rel=1e-3, abs=1e-4)
        assert float(changes.loss_change_after[i]) == pytest.approx(sum(truth[1:]), rel=1e-3, abs=1e-4)
        assert bool(changes.scored[i]) == bool(scored[i, 0])
        assert int(changes.n_after[i]) == int(scored[i, 1:].sum())
        if scored[i, 0]:
            assert float(changes.loss[i]) == pytest.approx(-p[ids[row, at + 1]], rel=1e-4)
            assert losses[row, at] == pytest.approx(-p[ids[row, at + 1]], rel=1e-4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_small_changes_survive_half_precision() -> None:
    """Two losses in bfloat16 differ by noise of 0.05; the change of the logits is rounded relative to itself."""
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    ids = ids_of()
    places = POSITIONS.clamp(max=SEQ - 2)
    with torch.inference_mode():
        base = 40 * lm.hidden(ids)
        predictions = Predictions(lm, ids, base, torch.ones(ids.shape, dtype=torch.bool))
        moved = base[ROWS, places][:, None].clone()
        moved[:, :, 0] *= 1.125
        scored = torch.ones(6, 1, dtype=torch.bool)
        changes = predictions.changes(moved, ROWS, places, scored, n_shown=2, n_likeliest=5)
        weight = lm.hf.lm_head.weight.double()
        z = (base[ROWS, places].double() @ weight.T, moved[:, 0].double() @ weight.T)
        rounded = [lm.logits(x).double() for x in (base[ROWS, places], moved[:, 0])]
    target = ids[ROWS, places + 1].numpy()
    truth, naive = (
        (log_softmax(x.numpy()) - log_softmax(y.numpy()))[range(6), target] for x, y in (z, rounded)
    )
    error = np.abs(changes.loss_change.numpy() - truth).max()
    assert error < 0.02 * np.abs(truth).max()
    assert error < 0.2 * np.abs(naive - truth).max(), "better than the difference of two losses"


# -- bad input -----------------------------------------------------------------------------------------


def test_dictionaries_that_cannot_be_ablated(llama: LanguageModel) -> None:
    bare = TopK(TopKConfig(k=2), D_MODEL, D_MODEL, 8)
    with pytest.raises(
        MismatchError, match=r"must know its model and hookpoints, got none .*Train it from a store"
    ):
        Reruns(llama, bare)
    where = sites_of(llama, ["resid_post.0"])
    other = tuple(site.replace(model="another", model_fingerprint="f" * 64) for site in where)
    two = Sites(inputs=where, outputs=tuple(s.replace(start=0, stop=D_MODEL) for s in other))
    with pytest.raises(MismatchError, match=r"reads and writes one model, got a dictionary of 2: .*another"):
        Reruns(llama, TopK(TopKConfig(k=2), D_MODEL, D_MODEL, 8, two))
    with pytest.raises(
        MismatchError, match=r"must belong to the model .*got one of another .*Pass --model another"
    ):
        Reruns(llama, TopK(TopKConfig(k=2), D_MODEL, D_MODEL, 8, Sites(inputs=other, outputs=other)))
    narrow = tuple(site.replace(stop=D_MODEL - 1) for site in where)
    with pytest.raises(MismatchError, match=rf"must take all {D_MODEL} features of resid_post.0"):
        Reruns(
            llama, TopK(TopKConfig(k=2), D_MODEL - 1, D_MODEL - 1, 8, Sites(inputs=narrow, outputs=narrow))
        )


def test_nan_is_an_error_wherever_it_comes_from(llama: LanguageModel) -> None:
    dictionary = dictionary_of(llama, [f"resid_post.{N_LAYERS - 1}"])
    reruns, ids = Reruns(llama, dictionary), ids_of()
    with torch.inference_mode():
        run = reruns.unedited(ids)
        predictions = Predictions(llama, ids, run.base.hidden, torch.ones(ids.shape, dtype=torch.bool))
        reruns.directions[3] = torch.nan
        hidden = reruns.ablated(run, ROWS, POSITIONS, LATENTS, ACTS, 0)
        scored = torch.ones(6, 1, dtype=torch.bool)
        with pytest.raises(
            ActivationError, match=r"must leave the model's output finite, got NaN or infinity"
        ):
            predictions.changes(hidden, ROWS, POSITIONS.clamp(max=10), scored, n_shown=2, n_likeliest=5)

        def broken(x: Tensor) -> Tensor:
            return torch.where(torch.arange(SEQ)[None, :, None] == 5, torch.nan, x)

        with (
            llama.edit({"resid_post.0": broken}),
            pytest.raises(
                ActivationError, match=r"the activations of .* must be finite, got NaN or infinity"
            ),
        ):
            reruns.unedited(ids)


@pytest.mark.parametrize("vocab", [300, 12_799, 12_800, 12_801, 30_011])
def test_the_largest_of_a_vocabulary_are_those_of_a_sort(vocab: int) -> None:
    x = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0))
    x[1, -50:] += 10  # all in what is left over after the last whole part
    x[2, :50] += 10  # all in one part
    assert torch.equal(_largest(x, 50).sort(1).values, x.topk(50, dim=1).indices.sort(1).values)
