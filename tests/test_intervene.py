"""The verb: effects on tiny random models, against a plain recomputation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import CTX, D, N, make_lm, random_topk, sites, some_ids, some_texts

from sememe import artifact
from sememe.edits import Intervention, LatentEdit
from sememe.errors import ActivationError, ConfigError, MismatchError, ShapeError
from sememe.intervene import InterveneConfig, intervene
from sememe.lm import LanguageModel
from sememe.text import TextConfig, TokenPolicy, token_blocks


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return some_texts()


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def lm(texts: list[str]) -> LanguageModel:
    return make_lm(texts)


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


def test_pieces_of_one_document_are_one_context(
    lm: LanguageModel, texts: list[str], saved: Path, tmp_path: Path
) -> None:
    """Two books, each cut into many pieces, have a strongest context each."""
    books = ["\n\n".join(texts[start::2][:40]) for start in (0, 1)]
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"text": book}) + "\n" for book in books))
    text = TextConfig(corpus=(str(path),), max_document_chars=300, heldout_fraction=0.0)
    options: dict[str, Any] = {"text": text, "latents": (4,), "split": "all"}
    (latent,) = read(intervene(small(path, saved, tmp_path / "e", **options), lm=lm))["latents"]
    assert latent["n_contexts"] == 2


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


def test_the_page_draws_the_histogram(effects: artifact.Artifact) -> None:
    alive, dead = read(effects)["latents"][:2]
    name = f"figures/latent_{alive['latent']}.svg"
    assert f"]({name})" in (effects.path / "effects.md").read_text() and name in effects.meta["files"]
    assert (effects.path / name).read_text().startswith("<svg")
    assert not (effects.path / f"figures/latent_{dead['latent']}.svg").exists()


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
