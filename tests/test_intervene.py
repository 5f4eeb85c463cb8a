"""Edits of latents on tiny random models: against plain hooks, against recomputation, and against arithmetic."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sememe import artifact
from sememe import lm as language_models
from sememe.dictionaries import ReLU, ReLUConfig, Site, Sites, TopK, TopKConfig
from sememe.dictionaries.base import Dictionary
from sememe.errors import ActivationError, ConfigError, HookpointError, MismatchError, ShapeError
from sememe.intervene import InterveneConfig, Intervention, LatentEdit, intervene
from sememe.lm import LanguageModel
from sememe.lm.build import LlamaShape, build_causal_lm, train_tokenizer
from sememe.text import TextConfig, TokenPolicy, token_blocks

D, N, K, CTX = 32, 96, 8, 24
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "tree",
    "river",
    "stone",
    "walks",
    "sees",
    "finds",
    "old",
    "small",
    "red",
    "under",
    "over",
    "and",
    "then",
    "never",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(20, 60))) + "." for _ in range(120)]


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_lm(texts: list[str], dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    tokenizer = train_tokenizer(texts, 320)
    shape = LlamaShape(n_layers=3, d_model=D, n_heads=4)
    hf = build_causal_lm(
        shape, vocab_size=len(tokenizer), context_length=64, end_of_text=tokenizer.eos_token_id, seed=seed
    )
    with torch.no_grad():  # sharper than at initialisation, so that texts differ
        for parameter in hf.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return language_models.wrap(hf.to(dtype), tokenizer, "tiny")


@pytest.fixture(scope="module")
def lm(texts: list[str]) -> LanguageModel:
    return make_lm(texts)


def sites(lm: LanguageModel, inputs: str, outputs: str | None = None, max_norm: float | None = None) -> Sites:
    def site(name: str) -> Site:
        width = lm.width(name)
        return Site(
            model=lm.name,
            model_fingerprint=lm.fingerprint,
            hookpoint=name,
            start=0,
            stop=width,
            max_norm=max_norm,
        )

    return Sites(inputs=(site(inputs),), outputs=(site(outputs or inputs),))


def random_topk(where: Sites | None, seed: int = 0) -> TopK:
    dictionary = TopK(TopKConfig(k=K, d_sae=N), D, D, N, where)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (dictionary.W_enc, dictionary.W_dec, dictionary.b_dec):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / D**0.5)
    return dictionary.eval()


def identity(where: Sites) -> ReLU:
    """Latent i reads +x_i, latent D + i reads -x_i; the sum is x to the bit."""
    dictionary = ReLU(ReLUConfig(d_sae=2 * D), D, D, 2 * D, where)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    with torch.no_grad():
        dictionary.W_dec.copy_(both)
        dictionary.W_enc.copy_(both.T)
    return dictionary.eval()


def some_ids(lm: LanguageModel, texts: list[str], n: int = 3, length: int = 12) -> Tensor:
    return torch.tensor([lm.tokenizer(text).input_ids[:length] for text in texts[:n]])


def commonest(dictionary: Dictionary, x: Tensor) -> list[int]:
    """Latents by how often they fire on x."""
    counts = (dictionary.encode(x.reshape(-1, D)).to_dense() != 0).sum(0)
    return counts.argsort(descending=True).tolist()


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


def test_edits_in_generation_equal_recomputation_without_a_cache(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "resid_post.1"))
    intervention = Intervention(dictionary, [LatentEdit(latents=(3,), how="add", value=6.0)])
    ids = some_ids(lm, texts, length=5)
    plain = lm.generate(ids, 20, stop_at_eos=False)
    with intervention.on(lm):
        cached = lm.generate(ids, 20, stop_at_eos=False)
        anew = lm.generate(ids, 20, stop_at_eos=False, use_cache=False)
    by_hand = ids
    for _ in range(20):
        with intervention.on(lm), torch.no_grad():
            logits = lm.logits(lm.hidden(by_hand))[:, -1]
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, anew) and torch.equal(cached, by_hand)
    assert not torch.equal(cached, plain)


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


# -- the verb ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(lm: LanguageModel, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dictionary") / "tiny"
    with torch.no_grad():
        x = lm.capture(some_ids(lm, texts, n=8), "resid_post.1")["resid_post.1"].reshape(-1, D)
        limit = float(x.norm(dim=1).quantile(0.9))
        dictionary = random_topk(sites(lm, "resid_post.1", max_norm=limit))
        dictionary.W_enc[:, N - 1] = 0.0  # never among the largest
        dictionary.b_enc[N - 1] = -1.0
        dictionary.save(path, x, extra={"policy": TokenPolicy(context_length=CTX).resolved()})
    return path


def small(corpus: Path, saved: Path, out: Path, **changes: Any) -> InterveneConfig:
    base: dict[str, Any] = {
        "out": out,
        "dictionary": saved,
        "latents": (4, N - 1),
        "text": TextConfig(corpus=(str(corpus),)),
        "split": "train",
        "n_tokens": 2_400,
        "n_contexts": 6,
        "n_shown": 4,
        "prompts": ("the old cat",),
        "strengths": (1.0, 8.0),
        "new_tokens": 12,
        "batch_rows": 4,
    }
    return InterveneConfig.build(base | changes)


@pytest.fixture(scope="module")
def effects(
    lm: LanguageModel, corpus: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> artifact.Artifact:
    return intervene(small(corpus, saved, tmp_path_factory.mktemp("effects") / "e"), lm=lm)


def read(effects: artifact.Artifact) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((effects.path / "effects.json").read_text())
    return data


@torch.no_grad()
def test_the_effects_are_those_of_a_plain_recomputation(
    effects: artifact.Artifact, lm: LanguageModel, corpus: Path, saved: Path
) -> None:
    from sememe import dictionaries

    dictionary = dictionaries.load(saved)
    assert dictionary.sites is not None
    limit, latent = dictionary.sites.inputs[0].max_norm, 4
    assert limit is not None
    policy = TokenPolicy(context_length=CTX)
    text = TextConfig(corpus=(str(corpus),))
    rows = []
    n_active = n_kept = 0
    for block in token_blocks(text, lm.tokenizer, policy, split="train", n_tokens=2_400):
        for ids, keep, mask, docs in zip(
            block.ids, block.keep, block.attention_mask, block.doc_ids, strict=True
        ):
            row = torch.from_numpy(ids).long()[None]
            x = lm.capture(row, "resid_post.1", torch.from_numpy(mask)[None])["resid_post.1"][0]
            ok = torch.from_numpy(keep) & (x.norm(dim=1) <= limit)
            acts = dictionary.encode(x).to_dense()[:, latent] * ok
            n_active, n_kept = n_active + int((acts != 0).sum()), n_kept + int(ok.sum())
            rows.append((float(acts[:-1].max()), int(docs[int(acts.argmax())]), row, mask, x, acts))
    best: dict[int, Any] = {}
    for entry in sorted(rows, key=lambda e: -e[0]):
        if entry[0] > 0:
            best.setdefault(entry[1], entry)
    chosen = sorted(best.values(), key=lambda e: -e[0])[:6]
    logit, log_prob, kl = [], [], []
    for _, _, row, mask, x, acts in chosen:
        new = (x - acts[:, None] * dictionary.decoder_directions()[latent])[None]
        full = torch.from_numpy(mask)[None]
        before = lm.logits(lm.hidden(row, full))[0]
        with lm.edit({"resid_post.1": lambda _, new=new: new}):
            after = lm.logits(lm.hidden(row, full))[0]
        for position in range(CTX - 1):
            if acts[position] != 0 and mask[position + 1]:
                a, b = before[position], after[position]
                target = row[0, position + 1]
                logit.append(float(b[target] - b.mean() - a[target] + a.mean()))
                a, b = a.log_softmax(0), b.log_softmax(0)
                log_prob.append(float(b[target] - a[target]))
                kl.append(float((a.exp() * (a - b)).sum()))
    found = read(effects)["latents"][0]
    # each chosen context holds at least one position where the latent fires; how many more depends on the training
    assert found["n_contexts"] == len(chosen) == 6 and found["n_positions"] == len(kl) >= 6
    assert found["density"] == pytest.approx(n_active / n_kept) and found["n_tokens"] == n_kept
    assert found["max_act"] >= chosen[0][0]
    assert found["true_logit_change"] == pytest.approx(sum(logit) / len(logit), abs=1e-5)
    assert found["true_log_prob_change"] == pytest.approx(sum(log_prob) / len(log_prob), abs=1e-5)
    assert found["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert found["kl_random_direction"] > 0
    assert sum(found["histogram"]["counts"]) == len(kl)
    worst = [example["log_prob_change"] for example in found["examples_hurt"]]
    assert worst == sorted(worst) and worst[0] == pytest.approx(min(log_prob), abs=1e-5)


def test_lowered_and_raised_tokens_are_the_extremes(effects: artifact.Artifact) -> None:
    found = read(effects)["latents"][0]
    lowered = [item["logit_change"] for item in found["lowered"]]
    raised = [item["logit_change"] for item in found["raised"]]
    assert lowered == sorted(lowered) and raised == sorted(raised, reverse=True)
    assert lowered[-1] < 0 < raised[-1] and len(lowered) == 4


def test_a_dead_latent_is_said_to_be_dead(effects: artifact.Artifact) -> None:
    dead = read(effects)["latents"][1]
    assert dead["density"] == 0 and "never fired" in dead["note"] and "steering" not in dead
    assert "never fired" in (effects.path / "effects.md").read_text()


def test_steering_sits_beside_the_unsteered_text(
    effects: artifact.Artifact, lm: LanguageModel, saved: Path
) -> None:
    from sememe import dictionaries

    found = read(effects)["latents"][0]
    (steered,) = found["steering"]
    assert [c["strength"] for c in steered["continuations"]] == [0.0, 1.0, 8.0]
    ids = torch.tensor([lm.tokenizer("the old cat").input_ids])
    plain = lm.generate(ids, 12, stop_at_eos=False)
    assert steered["continuations"][0]["text"] == lm.tokenizer.decode(plain[0, ids.shape[1] :])
    edit = LatentEdit(latents=(4,), how="add", value=8 * found["max_act"])
    with Intervention(dictionaries.load(saved), [edit]).on(lm):
        strong = lm.generate(ids, 12, stop_at_eos=False)
    assert steered["continuations"][2]["text"] == lm.tokenizer.decode(strong[0, ids.shape[1] :])
    with torch.no_grad():
        chances = lm.logits(lm.hidden(strong))[0].log_softmax(-1)
    loss = -chances[ids.shape[1] - 1 : -1].gather(1, strong[0, ids.shape[1] :, None]).mean()
    assert steered["continuations"][2]["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert "Steered, after `the old cat`" in (effects.path / "effects.md").read_text()


def test_mean_ablation_and_a_dropped_error_are_other_effects(
    lm: LanguageModel, corpus: Path, saved: Path, effects: artifact.Artifact, tmp_path: Path
) -> None:
    base = read(effects)["latents"][0]["kl"]
    for i, change in enumerate(({"ablation": "mean"}, {"error": "drop"})):
        config = small(corpus, saved, tmp_path / str(i), latents=(4,), prompts=(), **change)
        other = read(intervene(config, lm=lm))["latents"][0]
        assert other["kl"] != base and "steering" not in other


def test_a_second_run_opens_the_first(
    lm: LanguageModel, corpus: Path, saved: Path, effects: artifact.Artifact
) -> None:
    config = small(corpus, saved, effects.path)
    before = effects.path.stat().st_mtime_ns
    assert intervene(config, lm=lm).fingerprint == effects.fingerprint
    assert effects.path.stat().st_mtime_ns == before
    again = intervene(config, lm=lm, fresh=True)
    assert again.fingerprint == effects.fingerprint  # the same numbers, to the bit


# -- bad input ---------------------------------------------------------------------------------------


def test_latents_models_and_masks_that_do_not_fit(
    lm: LanguageModel, texts: list[str], corpus: Path, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"a latent must be in \[0, 95\], got 96\. Change --latents"):
        intervene(small(corpus, saved, tmp_path / "a", latents=(96,)), lm=lm)
    other = make_lm(texts, seed=1)
    with pytest.raises(MismatchError, match=r"must belong to the model tiny \(fingerprint .*got one of tiny"):
        intervene(small(corpus, saved, tmp_path / "a"), lm=other)
    with pytest.raises(MismatchError, match=r"must know its model and hookpoint, got none"):
        Intervention(random_topk(None), [LatentEdit(latents=(0,))])
    random_topk(None).save(tmp_path / "bare", torch.randn(16, D))
    with pytest.raises(MismatchError, match=r"bare must know its model and hookpoint"):
        intervene(small(corpus, tmp_path / "bare", tmp_path / "a"), lm=lm)
    dictionary = random_topk(sites(lm, "resid_post.1"))
    keep = torch.ones(2, 2, dtype=torch.bool)
    with (
        pytest.raises(ShapeError, match=r"the shape of the batch \(3, 12\), got \(2, 2\)\. Give one value"),
        Intervention(dictionary, [LatentEdit(latents=(0,))], keep=keep).on(lm),
    ):
        lm.hidden(some_ids(lm, texts))
    assert not (tmp_path / "a").exists()


def test_a_dictionary_that_writes_before_it_reads(lm: LanguageModel, texts: list[str]) -> None:
    dictionary = random_topk(sites(lm, "mlp_out.1", "mlp_in.1"))
    with (
        pytest.raises(HookpointError, match=r"read all its inputs by then.* got mlp_out\.1 still to come"),
        Intervention(dictionary, [LatentEdit(latents=(0,))]).on(lm),
    ):
        lm.hidden(some_ids(lm, texts))


def test_steering_to_infinity_is_an_error(
    lm: LanguageModel, corpus: Path, saved: Path, tmp_path: Path
) -> None:
    config = small(corpus, saved, tmp_path / "a", latents=(4,), strengths=(1e38,))
    with pytest.raises(ActivationError, match=r"must (give|leave).* finite.*Lower"):
        intervene(config, lm=lm)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": (1, 1)}, r"each latent must be named once, got \(1, 1\)"),
        ({"latents": ()}, r"latents must be at least 1 long"),
        ({"strengths": ()}, r"strengths must not be empty with prompts"),
        ({"prompts": ("",)}, r"prompts not empty"),
        ({"strength": 3}, r"strength must be a known option .*Did you mean 'strengths'"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InterveneConfig.build(options)


def test_an_edit_takes_the_value_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"sets to zero takes no value, got 1\.0\. Drop value"):
        LatentEdit.build({"latents": (1,), "value": 1.0})
    with pytest.raises(ConfigError, match=r"'scale' needs a value, got None\. Set value"):
        LatentEdit.build({"latents": (1,), "how": "scale"})
