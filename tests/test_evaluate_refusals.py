"""What does not belong together, and bad text and activations: evaluate says so and leaves nothing."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluate_world import (
    HOOKPOINT,
    POLICY,
    D,
    World,
    autoencoder,
    config_for,
    identity,
    make_world,
    save,
    text_config,
    zeros,
)

from sememe import dictionaries, metrics, text
from sememe.dictionaries.base import Sites
from sememe.dictionaries.identity import Identity
from sememe.dictionaries.topk import TopKConfig
from sememe.encoded import Encoded
from sememe.errors import ActivationError, ConfigError, MismatchError, ShapeError, TextError
from sememe.evaluate import evaluate
from sememe.figures import Report
from sememe.harvest import HarvestConfig, harvest
from sememe.lm import LanguageModel, ModelConfig
from sememe.measure import Measured
from sememe.run import print_report
from sememe.text import Split
from sememe.train import TrainConfig, train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def corpus(world: World) -> Path:
    return world.corpus


@pytest.fixture(scope="module")
def lm(world: World) -> LanguageModel:
    return world.lm


@pytest.fixture(scope="module")
def store(world: World) -> Path:
    return world.store


def test_unknown_nulls_are_named(tmp_path: Path, corpus: Path, lm: LanguageModel) -> None:
    path = identity(lm, tmp_path / "d")
    with pytest.raises(ConfigError, match=r"a null must be a known one, got 'pcaa'. Did you mean 'pca'\?"):
        evaluate(config_for(path, corpus, tmp_path / "r", nulls=("pcaa",)), lm=lm)
    with pytest.raises(ConfigError, match="each null must be named once, got pca, pca"):
        evaluate(config_for(path, corpus, tmp_path / "r", nulls=("pca", "pca")), lm=lm)


def test_a_dictionary_of_bare_tensors_has_no_model(tmp_path: Path, corpus: Path, lm: LanguageModel) -> None:
    save(Identity.rebuild({}, D, D, D, None), tmp_path / "d")
    with pytest.raises(MismatchError, match="must know its model and hookpoint, got none"):
        evaluate(config_for(tmp_path / "d", corpus, tmp_path / "r"), lm=lm)


def other(sites: Sites, **changes: object) -> Sites:
    changed = tuple(s.replace(**changes) for s in sites.inputs)
    return Sites(inputs=changed, outputs=changed)


def test_a_dictionary_of_another_model_names_both_fingerprints(
    tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path
) -> None:
    path = identity(lm, tmp_path / "d", other(autoencoder(lm), model_fingerprint="f" * 64))
    with pytest.raises(MismatchError, match=f"fingerprint {'f' * 16}.*got fingerprint {lm.fingerprint[:16]}"):
        evaluate(config_for(path, corpus, tmp_path / "r"), lm=lm)
    with pytest.raises(
        MismatchError, match=f"fingerprint {'f' * 16}.*got a store of .* {lm.fingerprint[:16]}"
    ):
        evaluate(config_for(path, corpus, tmp_path / "r", store=store), lm=lm)


def test_a_dictionary_of_another_hookpoint_or_store_is_refused(
    tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path
) -> None:
    path = identity(lm, tmp_path / "d", autoencoder(lm, "resid_post.2"))
    with pytest.raises(
        MismatchError, match=r"must hold resid_post.2, which the dictionary .* got resid_post.1, mlp_in.2"
    ):
        evaluate(config_for(path, corpus, tmp_path / "r", store=store), lm=lm)
    trained = Identity.rebuild({}, D, D, D, autoencoder(lm))
    trained.save(tmp_path / "d2", torch.randn(16, D), parents={"store": "a" * 64})
    with pytest.raises(MismatchError, match=f"the one the dictionary was trained on .fingerprint {'a' * 16}"):
        evaluate(config_for(tmp_path / "d2", corpus, tmp_path / "r", store=store), lm=lm)


def test_another_width_is_refused(tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path) -> None:
    wide = other(autoencoder(lm), stop=D + 1)
    path = identity(lm, tmp_path / "d", wide)
    with pytest.raises(ShapeError, match=r"resid_post.1 must be 25 wide, as in the dictionary, got 24 in"):
        evaluate(config_for(path, corpus, tmp_path / "r"), lm=lm)
    with pytest.raises(
        ShapeError, match=r"resid_post.1 in the store must be 25 wide, as in the dictionary, got 24"
    ):
        evaluate(config_for(path, corpus, tmp_path / "r", store=store), lm=lm)


def test_another_token_policy_is_refused(
    tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path
) -> None:
    path = identity(lm, tmp_path / "d")
    with pytest.raises(
        MismatchError,
        match=r"the config must have the token policy of the dictionary .*: context_length=16, got context_length=32",
    ):
        evaluate(config_for(path, corpus, tmp_path / "r", policy=POLICY.replace(context_length=32)), lm=lm)
    plain = Identity.rebuild({}, D, D, D, autoencoder(lm))
    plain.save(tmp_path / "d2", torch.randn(16, D))
    with pytest.raises(
        MismatchError, match=r"the config must have the token policy of the store .*got drop_positions=0"
    ):
        evaluate(
            config_for(
                tmp_path / "d2", corpus, tmp_path / "r", store=store, policy=POLICY.replace(drop_positions=0)
            ),
            lm=lm,
        )


def test_documents_that_were_trained_on_cannot_be_held_out(
    tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path
) -> None:
    path = identity(lm, tmp_path / "d")
    config = config_for(
        path, corpus, tmp_path / "r", store=store, text=text_config(corpus, heldout_fraction=0.5)
    )
    with pytest.raises(
        MismatchError,
        match=r"heldout_fraction must be at most the 0.3 that the training text held back, got 0.5",
    ):
        evaluate(config, lm=lm)


def trained(world: World, out: Path, **changes: object) -> Path:
    """A dictionary after one step, on the world's store unless told otherwise."""
    about = {"out": out, "architecture": TopKConfig(d_sae=8, k=2), "n_tokens": 32, "batch_size": 32}
    about |= {"store": world.store} if "live" not in changes else {}
    train(TrainConfig.build({**about, "inputs": (HOOKPOINT,), "watch_rows": 0, **changes}))
    return out


@pytest.mark.parametrize("split", ["all", "heldout"])
def test_a_dictionary_of_more_than_the_train_split_has_no_held_out_documents(
    tmp_path: Path, world: World, split: Split
) -> None:
    config = HarvestConfig(
        out=tmp_path / "s",
        model=ModelConfig(model="unused"),
        text=text_config(world.corpus),
        policy=POLICY,
        hookpoints=(HOOKPOINT,),
        n_tokens=500,
        split=split,
    )
    harvest(config, lm=world.lm)
    path = trained(world, tmp_path / "d", store=tmp_path / "s")
    bare = identity(world.lm, tmp_path / "bare")  # which says nothing itself
    for dictionary, store in ((path, None), (path, tmp_path / "s"), (bare, tmp_path / "s")):
        with pytest.raises(
            MismatchError, match=f"got one trained on the split {split}. Harvest with --split train"
        ):
            evaluate(config_for(dictionary, world.corpus, tmp_path / "r", store=store), lm=world.lm)


def about_documents(report: Report) -> list[str]:
    """Notices on what was trained on; others say what a dictionary may be."""
    return [notice for notice in report.data["notices"] if not notice.startswith("It may be ")]


@pytest.mark.parametrize("live", [False, True])
def test_another_separation_than_the_training_texts_is_refused_without_a_store(
    tmp_path: Path, world: World, live: bool
) -> None:
    text = text_config(world.corpus, split_by="piece", max_document_chars=120)
    model = ModelConfig(model=str(world.place / "model"), dtype="float32")
    if live:
        more = {"live": True, "buffer_mb": 1, "model": model, "text": text, "policy": POLICY}
    else:
        about = {"model": model, "text": text, "policy": POLICY, "hookpoints": (HOOKPOINT,), "n_tokens": 500}
        harvest(HarvestConfig.build({"out": tmp_path / "s", **about}), lm=world.lm)
        more = {"store": tmp_path / "s"}
    path = trained(world, tmp_path / "d", **more)
    for changes, message in (
        ({"heldout_fraction": 0.5}, "heldout_fraction must be at most the 0.3 .* got 0.5"),
        ({"split_by": "document"}, "split_by must be the training text's, piece, got document"),
        ({"max_document_chars": 200}, "max_document_chars must be the training text's, 120, got 200"),
    ):
        config = config_for(path, world.corpus, tmp_path / "r", text=text.replace(**changes))
        with pytest.raises(MismatchError, match=message):
            evaluate(config, lm=world.lm)
    smaller = text.replace(heldout_fraction=0.2)
    report = evaluate(config_for(path, world.corpus, tmp_path / "r", text=smaller, nulls=()), lm=world.lm)
    assert not about_documents(report)


def test_a_dictionary_that_does_not_say_what_it_saw_is_measured_with_a_notice(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = identity(world.lm, tmp_path / "d")
    report = evaluate(config_for(path, world.corpus, tmp_path / "r", nulls=()), lm=world.lm)
    (notice,) = about_documents(report)
    assert "does not say which documents it was trained on" in notice
    print_report(report.path)
    for shown in (
        capsys.readouterr().out,
        *((report.path / f"report.{x}").read_text() for x in ("md", "html")),
    ):
        assert notice in shown
    measured = evaluate(
        config_for(path, world.corpus, tmp_path / "r2", nulls=(), store=world.store), lm=world.lm
    )
    assert not about_documents(measured), "its store says it"


def test_too_little_text_is_an_error_and_leaves_nothing(tmp_path: Path, lm: LanguageModel) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat sat", encoding="utf-8")
    path = identity(lm, tmp_path / "d")
    for fraction, message in (
        (
            0.0,
            r"the heldout split of .*short\.txt must hold a document, got none with heldout_fraction=0\. Give",
        ),
        (
            0.99,
            r"must hold at least one row of context_length=16 tokens, got \d+ tokens\. Give more text, lower",
        ),
    ):
        config = config_for(
            path, short, tmp_path / "r", text=text_config(short, heldout_fraction=fraction), nulls=()
        )
        with pytest.raises(TextError, match=message):
            evaluate(config, lm=lm)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "short.txt"]


def test_text_of_which_nothing_is_held_out_says_so(tmp_path: Path, corpus: Path, lm: LanguageModel) -> None:
    """As much text as elsewhere here, all of it on the side that was trained on."""
    about = text_config(corpus, heldout_fraction=1e-9)
    config = config_for(identity(lm, tmp_path / "d"), corpus, tmp_path / "r", text=about, nulls=())
    with pytest.raises(
        TextError,
        match=r"the heldout split of .*corpus\.jsonl must hold a document, got none with heldout_fraction=1e-09\. "
        r"Give more documents, change heldout_fraction, or set split_by to 'piece' for one long file\.",
    ):
        evaluate(config, lm=lm)
    assert not (tmp_path / "r").exists()


def test_a_width_to_stop_at_needs_a_budget(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"narrow_enough must be left out when there is no budget: it has no effect then, got 0\.2\. Drop it\.",
    ):
        config_for(tmp_path / "d", corpus, tmp_path / "r", narrow_enough=0.2)
    assert config_for(tmp_path / "d", corpus, tmp_path / "r", narrow_enough=0.2, budget="1s").budget == "1s"


def test_whether_a_broken_dictionary_cheats_is_not_known(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = identity(lm, tmp_path / "d")
    dictionary = dictionaries.load(path)
    sparsity = metrics.Sparsity(dictionary.d_sae)
    acts = torch.ones(4, dictionary.d_sae)
    sparsity.update(Encoded.from_dense(acts))
    measured = SimpleNamespace(sparsity={"dictionary": sparsity})
    assert "It may be the identity" in Measured.cheats(measured, "dictionary", dictionary)[0]  # type: ignore[arg-type]
    sparsity.update(Encoded.from_dense(torch.full_like(acts, math.nan)))
    (said,) = Measured.cheats(measured, "dictionary", dictionary)  # type: ignore[arg-type]
    assert said == (
        "Whether it reconstructs without having found features is not known: activations are NaN or infinite."
    )
    rows = torch.eye(D)
    rows[2, 1] = math.nan
    monkeypatch.setattr(Identity, "decoder_directions", lambda self: rows)
    (said,) = Measured.cheats(measured, "dictionary", dictionary, "k4")  # type: ignore[arg-type]
    assert said.startswith("Whether k4 reconstructs") and said.endswith(
        "not known: 1 decoder rows are NaN or infinite."
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_activations_are_located(
    tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path, bad: float
) -> None:
    path = identity(lm, tmp_path / "d")

    def spoil(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[2, 5, 3] = bad
        return x

    (block,) = text.token_blocks(
        text_config(corpus), lm.tokenizer, POLICY, split="heldout", n_tokens=1200, block_rows=4096
    )
    where = f"document {block.doc_ids[2, 5]}, position {block.doc_positions[2, 5]}"
    with (
        lm.edit({HOOKPOINT: spoil}),
        pytest.raises(
            ActivationError,
            match=f"activations at resid_post.1 must be finite, got NaN or infinity in {where}",
        ),
    ):
        evaluate(config_for(path, corpus, tmp_path / "r", store=store, nulls=()), lm=lm)
    assert not (tmp_path / "r").exists()


def test_a_reconstruction_out_of_all_bounds_is_measured_and_one_that_is_not_finite_refused(
    tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path
) -> None:
    huge = zeros(lm, tmp_path / "huge", bias=torch.full((D,), 1e38))
    found = evaluate(config_for(huge, corpus, tmp_path / "r", nulls=(), store=store), lm=lm)
    assert found.value("mse") == pytest.approx(1e76, rel=1e-5), "squares are added in float64"
    assert math.isfinite(found.value("kl")) and found.value("kl") > 0.1
    broken = zeros(lm, tmp_path / "broken", bias=torch.full((D,), math.inf))
    with pytest.raises(MismatchError, match=r"must reproduce its stored reconstructions .* got .* nan"):
        evaluate(config_for(broken, corpus, tmp_path / "r2", nulls=(), store=store), lm=lm)
    assert not (tmp_path / "r2").exists()


def test_intervals_need_two_documents(
    world: World, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a null is fitted or a forward is run; without intervals one document is enough."""
    path = identity(lm, tmp_path / "d")
    config = config_for(path, world.corpus, tmp_path / "r", nulls=(), n_tokens=POLICY.context_length)
    blocks = text.token_blocks(
        config.text, lm.tokenizer, POLICY, split="heldout", n_tokens=POLICY.context_length
    )
    assert sum(len(set(block.doc_ids[block.keep].tolist())) for block in blocks) == 1
    with monkeypatch.context() as patch:
        patch.setattr("sememe.evaluate.fit", lambda *_: pytest.fail("nulls were fitted"))
        with pytest.raises(
            TextError,
            match=r"^intervals need at least 2 held-out documents, got 1\. Raise n_tokens or heldout_fraction, or pass "
            r"--n-bootstrap 0\.$",
        ):
            evaluate(config, lm=lm)
    assert not (tmp_path / "r").exists()
    found = evaluate(config.replace(n_bootstrap=0), lm=lm).data
    assert found["text"]["n_documents"] == 1 and found["metrics"]["fvu"]["value"] == 0
    assert found["metrics"]["fvu"].get("low") is None
