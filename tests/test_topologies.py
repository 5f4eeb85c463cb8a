"""Every topology goes through the same trainer and the same command: what is read and written is only a choice of
hookpoints."""

import json
from pathlib import Path

import pytest
import torch
from evaluate_world import World, config_for, make_world
from small_world import load_model, text_of, write_corpus, write_model
from test_harvest import config_for as harvest_config

from sememe import artifact, dictionaries
from sememe.cli import _run
from sememe.dictionaries import Site, Sites
from sememe.edits import Intervention, LatentEdit
from sememe.errors import ConfigError, MismatchError
from sememe.evaluate import EvaluateConfig, evaluate
from sememe.harvest import harvest
from sememe.measure.checks import sites_of
from sememe.source import TensorSource
from sememe.tracking import read_log
from sememe.train import TrainConfig, train


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("topologies"))


def command(out: Path, *arguments: str) -> dictionaries.Dictionary:
    """`sememe train topk ...`, and the dictionary it leaves."""
    common = ["--d-sae", "96", "--k", "6", "--dead-after-tokens", "2000", "--lr", "0.003"]
    common += ["--batch-size", "128", "--threads", "1"]
    assert _run(["train", "topk", *common, "--out", str(out), *arguments]) == 0
    return dictionaries.load(out)


def fvu(x: torch.Tensor, recon: torch.Tensor) -> float:
    return float((x - recon).square().sum() / (x - x.mean(0)).square().sum())


def test_a_skip_transcoder_is_trained_evaluated_and_edited(world, tmp_path):
    where = ["--store", str(world.store), "--inputs", "mlp_in.2", "--outputs", "mlp_out.2", "--epochs", "4"]
    made = {
        name: command(tmp_path / name, *where, *(["--skip"] if name == "skip" else []))
        for name in ("skip", "plain")
    }
    skip = made["skip"]
    assert skip.W_skip.shape == (24, 24) and bool(skip.W_skip.any())
    found = {
        name: evaluate(
            config_for(tmp_path / name, world.corpus, tmp_path / f"{name}_report", nulls=("untrained",)),
            lm=world.lm,
        )
        for name in made
    }
    assert found["skip"].value("fvu") < found["plain"].value("fvu"), "a linear part helps"
    ids = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = world.lm.capture(ids, ["mlp_in.2", "mlp_out.2"])
        x = seen["mlp_in.2"].reshape(-1, 24)
        same = LatentEdit(latents=(0,), how="scale", value=1.0)
        edited = Intervention(skip, [same], error="drop").edited(seen)["mlp_out.2"].reshape(-1, 24)
    limit = min(site.max_norm for site in skip.sites.inputs)
    here = x.norm(dim=1) <= limit
    torch.testing.assert_close(edited[here], skip(x)[here].detach(), atol=1e-5, rtol=1e-4)
    assert float((x @ skip.W_skip).detach().abs().max()) > 1e-3, "which the skip connection is part of"


@pytest.mark.parametrize("live", [False, True])
def test_an_autoencoder_of_concatenated_layers_from_a_store_and_live(world, tmp_path, live):
    inputs = ["--inputs", "resid_post.1", "--inputs", "mlp_out.2"]
    if live:
        source = [
            "--live",
            "--model",
            str(world.place / "model"),
            "--dtype",
            "float32",
            "--corpus",
            str(world.corpus),
        ]
        source += [
            "--heldout-fraction",
            "0.3",
            "--context-length",
            "16",
            "--batch-rows",
            "8",
            "--buffer-mb",
            "1",
        ]
        source += ["--n-tokens", "12000"]
    else:
        source = ["--store", str(world.store), "--epochs", "4"]
    made = command(tmp_path / "d", *inputs, *source)
    assert [(s.hookpoint, s.start, s.stop) for s in made.sites.inputs] == [
        ("resid_post.1", 0, 24),
        ("mlp_out.2", 24, 48),
    ]
    assert made.sites.inputs == made.sites.outputs and made.d_in == made.d_out == 48
    last = read_log(tmp_path / "d" / "metrics.jsonl")[-1]
    assert {"fvu", "fvu.resid_post.1", "fvu.mlp_out.2"} <= set(last)
    assert last["fvu"] < 1 and last["fvu.resid_post.1"] < 1 and last["fvu.mlp_out.2"] < 1
    scales = artifact.load(tmp_path / "d").extra["training"]["scale_in"]
    assert len(scales) == 2 and scales[0] != pytest.approx(scales[1], rel=0.05)
    report = evaluate(config_for(tmp_path / "d", world.corpus, tmp_path / "r", nulls=("pca",)), lm=world.lm)
    assert set(report.data["by_site"]) == {"resid_post.1", "mlp_out.2"}
    assert all(values["fvu"]["value"] < 1 for values in report.data["by_site"].values())


def planted_pair(n: int = 12000, d: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Sites]:
    """Rows of two models of very different size: 12 features that both have, and 6 of each alone.

    Returns:
        The rows, the truth (features, d of both) and the sites.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(24, 2 * d)
    for row in range(24):
        for model in range(2):
            if row < 12 or (row < 18) == (model == 0):
                v = torch.randn(d, generator=generator)
                features[row, model * d : (model + 1) * d] = v / v.norm()
    active = (torch.rand(n, 24, generator=generator) < 2.5 / 24).float()
    x = (active * (torch.rand(n, 24, generator=generator) + 0.5)) @ features
    x[:, d:] *= 50
    part = Site(model="a", model_fingerprint="a", hookpoint="resid_post.1", start=0, stop=d)
    both = (part, part.replace(model="b", model_fingerprint="b", start=d, stop=2 * d))
    return x, features, Sites(inputs=both, outputs=both)


@pytest.mark.parametrize(
    "architecture",
    [
        {"kind": "batch_topk", "k": 3, "site_norms": "l1"},
        {"kind": "relu", "l1_coefficient": 0.03, "norm_weighted": True, "site_norms": "l1"},
    ],
    ids=["batch_topk", "relu"],
)
def test_a_crosscoder_tells_shared_features_from_those_of_one_model(tmp_path, architecture):
    x, features, sites = planted_pair()
    config = TrainConfig.build(
        {
            "out": tmp_path / "d",
            "architecture": architecture | {"d_sae": 48},
            "n_tokens": 2500 * 256,
            "batch_size": 256,
            "lr": 3e-3,
            "threads": 1,
        }
    )
    made = train(config, source=TensorSource(x, sites=sites))
    about = json.loads((tmp_path / "d" / "meta.json").read_text())["extra"]["training"]["sites"]
    assert set(about) == {"resid_post.1@0", "resid_post.1@1"}
    scale = torch.tensor([about[name]["scale"] for name in about])
    assert float(scale[0] / scale[1]) == pytest.approx(50, rel=0.1)
    directions = made.decoder_directions().detach() * scale.repeat_interleave(16)
    norms = directions.view(-1, 2, 16).norm(dim=2)
    directions = directions / directions.norm(dim=1, keepdim=True)
    truth = features / features.norm(dim=1, keepdim=True)
    cosine, latent = (truth @ directions.T).max(1)
    assert float(cosine.mean()) > 0.95
    share = (norms[:, 1] / norms.sum(1))[latent]
    assert float((share[:12] - 0.5).abs().max()) < 0.2, "both models have these"
    alone = torch.cat([share[12:18], 1 - share[18:]])
    assert float((alone < 0.1).float().mean()) > 0.9, "and one alone these"
    last = read_log(tmp_path / "d" / "metrics.jsonl")[-1]
    assert last["fvu.resid_post.1@0"] < 0.2 and last["fvu.resid_post.1@1"] < 0.2


def test_a_crosscoder_of_two_models_from_two_stores(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    for number in range(2):
        write_model(tmp_path / f"model{number}", seed=number)
        lm = load_model(tmp_path / f"model{number}")
        harvest(harvest_config(tmp_path, tmp_path / f"store{number}"), lm=lm)
    where = [
        "--store",
        str(tmp_path / "store0"),
        "--join",
        str(tmp_path / "store1"),
        "--inputs",
        "resid_post.0",
    ]
    made = command(tmp_path / "d", *where, "--site-norms", "l1")
    assert [site.hookpoint for site in made.sites.inputs] == ["resid_post.0"] * 2
    assert len({site.model_fingerprint for site in made.sites.inputs}) == 2
    assert set(artifact.load(tmp_path / "d").meta["parents"]) == {"store.0", "store.1"}

    def evaluation(name: str, **changes) -> EvaluateConfig:
        return EvaluateConfig.build(
            {
                "dictionary": tmp_path / name,
                "model": {"model": str(tmp_path / "model0"), "dtype": "float32"},
                "text": text_of(tmp_path / "corpus.jsonl"),
                "out": tmp_path / f"{name}_report",
                "nulls": ("identity", "untrained"),
                "n_tokens": 512,
                "n_fit_rows": 512,
                "n_bootstrap": 0,
                **changes,
            }
        )

    report = evaluate(evaluation("d"))
    data = json.loads((report.artifact.path / "report.json").read_text())
    assert list(data["by_site"]) == ["resid_post.0@0", "resid_post.0@1"]
    assert [data["by_model"][number]["model"] for number in "01"] == [
        str(tmp_path / f"model{number}") for number in range(2)
    ]
    # each model's own predictions, base and with its hookpoint at 0, are what a dictionary of it alone is told
    for number in "01":
        lm = load_model(tmp_path / f"model{number}")
        alone = ["--store", str(tmp_path / f"store{number}"), "--inputs", "resid_post.0"]
        command(tmp_path / f"alone{number}", *alone)
        one = evaluate(evaluation(f"alone{number}"), lm=lm)
        single = json.loads((one.artifact.path / "report.json").read_text())
        of_model = data["by_model"][number]
        for ours, theirs in (
            (of_model["base"]["ce"], single["metrics"]["ce_base"]),
            (of_model["ablations"]["zero"]["ce"], single["metrics"]["ce_zero"]),
        ):
            assert ours["value"] == pytest.approx(theirs["value"], rel=0.02)
        assert of_model["nulls"]["identity"]["kl"]["value"] < of_model["ablations"]["zero"]["kl"]["value"]
        assert of_model["metrics"]["kl"]["value"] > 0
    models = [data["by_model"][number] for number in "01"]
    assert models[0]["base"]["ce"]["value"] != models[1]["base"]["ce"]["value"]
    mean = sum(one["metrics"]["kl"]["value"] for one in models) / 2
    assert data["metrics"]["kl"]["value"] == pytest.approx(mean), "the headline is their mean"
    with pytest.raises(ConfigError, match="store must be left out for a dictionary of several models"):
        evaluate(evaluation("d", store=tmp_path / "store0"))
    with pytest.raises(
        MismatchError, match=r"must be one of those the dictionary was trained on \(.*model0, "
    ):
        write_model(tmp_path / "model2", seed=2)
        evaluate(evaluation("d", model={"model": str(tmp_path / "model2")}, out=tmp_path / "other"))
    with pytest.raises(MismatchError, match="a dictionary must read and write one model here"):
        sites_of(made, tmp_path / "d")
