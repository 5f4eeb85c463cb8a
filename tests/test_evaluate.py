"""Evaluation on a tiny random language model: answers known beforehand, masks, nulls, errors."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
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
    site,
    text_config,
    zeros,
)

from sememe import dictionaries, metrics, text
from sememe.dictionaries.base import Sites
from sememe.dictionaries.part import Part
from sememe.dictionaries.pca import PCA, PCAConfig
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.errors import ConfigError, MismatchError, ShapeError
from sememe.evaluate import evaluate
from sememe.figures import Report, open_report
from sememe.lm import LanguageModel
from sememe.measure.units import MAX_UNITS, MAX_VALUES, MOST_UNITS, Units
from sememe.store import open_store


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


@pytest.fixture(scope="module")
def report(world: World) -> Report:
    corpus, lm, store = world.corpus, world.lm, world.store
    sites = autoencoder(lm)
    rows = torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    dictionary = TopK(TopKConfig(k=3, d_sae=32), D, D, 32, sites)
    dictionary.initialise(rows, rows, torch.Generator().manual_seed(5))
    path = save(dictionary, world.place / "topk")
    return evaluate(
        config_for(
            path, corpus, world.place / "report", store=store, nulls=("pca", "untrained", "identity", "ica")
        ),
        lm=lm,
    )


# -- known answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hookpoint", [HOOKPOINT, "resid_pre.0", "mlp_out.2", "mlp_act.0", "attn_z.3", "model.layers.1"]
)
def test_a_perfect_reconstruction_changes_nothing(
    tmp_path: Path, corpus: Path, lm: LanguageModel, hookpoint: str
) -> None:
    path = identity(lm, tmp_path / "d", autoencoder(lm, hookpoint))
    found = evaluate(config_for(path, corpus, tmp_path / "r", nulls=()), lm=lm)
    assert found.value("fvu") == found.value("mse") == 0
    assert found.value("explained_variance") == 1
    assert found.value("ce_increase") == found.value("kl") == 0
    assert found.value("ce_recovered_zero") == found.value("ce_recovered_mean") == 1
    assert found.value("perplexity") == found.value("perplexity_base")


@pytest.mark.parametrize("hookpoint", [HOOKPOINT, "mlp_out.2"])
def test_reconstructing_zero_is_zero_ablation(
    tmp_path: Path, corpus: Path, lm: LanguageModel, hookpoint: str
) -> None:
    path = zeros(lm, tmp_path / "d", autoencoder(lm, hookpoint))
    found = evaluate(config_for(path, corpus, tmp_path / "r", nulls=()), lm=lm)
    assert found.value("ce_recovered_zero") == 0
    assert found.data["metrics"]["kl"] == found.data["ablations"]["zero"]["kl"]
    assert found.value("ce") == found.value("ce_zero")
    assert found.value("l0") == found.value("frac_alive") == 0


def test_reconstructing_the_mean_is_mean_ablation(
    tmp_path: Path, corpus: Path, lm: LanguageModel, store: Path
) -> None:
    from sememe.store import open_store

    opened = open_store(store)
    rows = torch.cat(
        [opened.read(i, [HOOKPOINT]).activations[HOOKPOINT] for i in range(len(opened.info.shards))]
    )
    mean = rows[:1000].double().mean(0).float()
    path = zeros(lm, tmp_path / "d", bias=mean)
    found = evaluate(config_for(path, corpus, tmp_path / "r", nulls=(), store=store), lm=lm)
    assert found.value("ce_recovered_mean") == pytest.approx(0, abs=1e-6)
    assert found.value("ce") == pytest.approx(found.value("ce_mean"), abs=1e-6)
    assert found.value("fvu") == pytest.approx(1, abs=0.05)


# -- against a slow version written from the definition --------------------------------------------


def slow(
    lm: LanguageModel, dictionary: dictionaries.Dictionary, corpus: Path, max_norm: float | None
) -> dict[str, float]:
    """One context at a time, full forwards with a hook of our own, NumPy in float64."""
    totals = dict.fromkeys(("n", "base", "arm", "zero", "kl"), 0.0)
    xs, recons, counts = [], [], []
    (block,) = text.token_blocks(
        text_config(corpus), lm.tokenizer, POLICY, split="heldout", n_tokens=1200, block_rows=4096
    )

    def logits(ids: torch.Tensor, change=None) -> torch.Tensor:
        hook = None
        if change is not None:
            hook = lm.hf.model.layers[1].register_forward_hook(
                lambda module, args, out: (change(out[0]),) if isinstance(out, tuple) else change(out)
            )
        with torch.no_grad():
            found = lm.hf(input_ids=ids).logits[0].double()
        if hook:
            hook.remove()
        return torch.log_softmax(found, -1)

    for row in range(block.ids.shape[0]):
        ids = torch.from_numpy(block.ids[row][None]).long()
        with torch.no_grad():
            x = lm.hf.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
            recon = dictionary(x)
            acts = dictionary.encode(x).to_dense()
        keep = torch.from_numpy(block.keep[row])
        if max_norm is not None:
            keep = keep & (x.norm(dim=1) <= max_norm)
        put = torch.where(keep[:, None], recon, x)
        base, arm = logits(ids), logits(ids, lambda out, put=put: put.view_as(out))
        zero = logits(
            ids, lambda out, keep=keep: torch.where(keep[:, None], 0.0, out.view(16, -1)).view_as(out)
        )
        for t in range(15):
            if keep[t]:
                target = ids[0, t + 1]
                totals["n"] += 1
                totals["base"] -= float(base[t, target])
                totals["arm"] -= float(arm[t, target])
                totals["zero"] -= float(zero[t, target])
                totals["kl"] += float((base[t].exp() * (base[t] - arm[t])).sum())
        xs.append(x[keep].double().numpy())
        recons.append(recon[keep].double().numpy())
        counts.append((acts[keep] != 0).sum(1).double().numpy())
    x, recon = np.concatenate(xs), np.concatenate(recons)
    n = totals["n"]
    return {
        "fvu": ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": ((x - recon) ** 2).mean(),
        "l0": np.concatenate(counts).mean(),
        "ce_base": totals["base"] / n,
        "ce_increase": (totals["arm"] - totals["base"]) / n,
        "ce_recovered_zero": (totals["zero"] - totals["arm"]) / (totals["zero"] - totals["base"]),
        "kl": totals["kl"] / n,
    }


@pytest.mark.parametrize("limited", [False, True])
def test_the_numbers_are_those_of_a_slow_version(
    tmp_path: Path, corpus: Path, lm: LanguageModel, limited: bool
) -> None:
    with torch.no_grad():
        ids = torch.arange(320).view(20, 16)
        norms = lm.capture(ids, HOOKPOINT)[HOOKPOINT].norm(dim=-1)
    max_norm = float(norms.flatten().quantile(0.7)) if limited else None
    sites = autoencoder(lm, max_norm=max_norm)
    rows = torch.randn(500, D, generator=torch.Generator().manual_seed(1)) * 3
    pca = PCA.fit([rows], PCAConfig(k=5), sites)
    path = save(pca, tmp_path / "d")
    found = evaluate(config_for(path, corpus, tmp_path / "r", nulls=()), lm=lm)
    for name, value in slow(lm, dictionaries.load(path), corpus, max_norm).items():
        assert found.value(name) == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert (found.data["text"]["n_norm_outliers"] > 0) == limited
    assert (found.value("fvu_all_rows") != found.value("fvu")) or not limited


@pytest.mark.parametrize("packing", [True, False])
def test_batch_size_changes_nothing(tmp_path: Path, corpus: Path, lm: LanguageModel, packing: bool) -> None:
    policy = POLICY.replace(packing=packing)
    sites = autoencoder(lm)
    pca = PCA.fit([torch.randn(300, D, generator=torch.Generator().manual_seed(1))], PCAConfig(k=4), sites)
    pca.save(tmp_path / "d", torch.randn(16, D), extra={"policy": policy.resolved()})
    found = [
        evaluate(
            config_for(tmp_path / "d", corpus, tmp_path / f"r{n}", nulls=("pca",), batch_rows=n), lm=lm
        ).data
        for n in (3, 7, 64)
    ]
    for other in found[1:]:
        for name, statistic in found[0]["metrics"].items():
            for part in ("value", "low", "high"):
                if statistic[part] is not None:
                    assert other["metrics"][name][part] == pytest.approx(
                        statistic[part], rel=1e-5, abs=1e-5
                    ), name
        assert other["text"] == found[0]["text"]


def test_a_transcoder_reads_one_place_and_is_spliced_at_another(
    tmp_path: Path, corpus: Path, lm: LanguageModel
) -> None:
    sites = Sites(inputs=(site(lm, "mlp_in.2"),), outputs=(site(lm, "mlp_out.2"),))
    path = zeros(lm, tmp_path / "d", sites)
    found = evaluate(config_for(path, corpus, tmp_path / "r", nulls=("untrained",)), lm=lm)
    assert found.value("ce_recovered_zero") == 0
    assert found.data["dictionary"]["inputs"] == ["mlp_in.2"]
    assert found.data["dictionary"]["outputs"] == ["mlp_out.2"]
    with pytest.raises(
        ConfigError,
        match=r"the null pca needs a dictionary that reconstructs its input, got one from mlp_in.2 to mlp_out.2",
    ):
        evaluate(config_for(path, corpus, tmp_path / "r2", nulls=("pca",)), lm=lm)


def test_several_outputs_are_spliced_at_once(tmp_path: Path, corpus: Path, lm: LanguageModel) -> None:
    first, second = site(lm), site(lm, "resid_post.2", start=D)
    both = Sites(inputs=(first, second), outputs=(first, second))
    found = evaluate(
        config_for(identity(lm, tmp_path / "d", both), corpus, tmp_path / "r", nulls=("pca",)), lm=lm
    )
    assert found.value("kl") == 0 and found.value("ce_recovered_zero") == 1
    by_site = found.data["by_site"]
    assert {name: values["fvu"]["value"] for name, values in by_site.items()} == {
        HOOKPOINT: 0,
        "resid_post.2": 0,
    }
    beside = [values["nulls"]["pca"]["fvu"] for values in by_site.values()]
    assert all(0 <= one["low"] <= one["value"] <= one["high"] < 0.2 for one in beside)
    last = zeros(lm, tmp_path / "d2", autoencoder(lm, "resid_post.2"))
    only_last = evaluate(config_for(last, corpus, tmp_path / "r2", nulls=()), lm=lm)
    assert "by_site" not in only_last.data
    assert found.value("ce_zero") == pytest.approx(only_last.value("ce_zero"), abs=0.5)


# -- the report ------------------------------------------------------------------------------------


def test_the_report_holds_what_it_promises(report: Report, store: Path) -> None:
    data = json.loads((report.path / "report.json").read_text())
    assert data == report.data
    for name in ("fvu", "l0", "frac_alive", "ce_recovered_zero", "ce_recovered_mean", "kl"):
        assert data[name] == data["metrics"][name]["value"]
        assert math.isfinite(data[name])
    for name in (
        "mse",
        "rmse",
        "explained_variance",
        "l1",
        "cosine",
        "perplexity",
        "ce_increase",
        "fvu_all_rows",
    ):
        statistic = data["metrics"][name]
        assert statistic["low"] <= statistic["value"] <= statistic["high"]
    assert set(data["nulls"]) == {"pca", "untrained", "identity", "ica"}
    for null in data["nulls"].values():
        assert null["l0"]["value"] == pytest.approx(data["l0"], abs=0.5)
    assert data["null_configs"]["pca"]["k"] == data["null_configs"]["untrained"]["k"] == 3
    assert data["null_configs"]["untrained"]["d_sae"] == 32
    histogram = data["density"]["dictionary"]
    assert sum(histogram["counts"]) + histogram["n_silent"] + histogram["n_below"] == 32
    assert histogram["n_silent"] == round(32 * (1 - data["frac_alive"]))
    for arm, own in data["density"].items():
        assert set(own["shares"]) == {"below_1e-5", "below_1e-4", "below_1e-3", "above_1e-2"}
        for one in (*own["shares"].values(), *own["l0_quantiles"].values()):
            assert one["low"] <= one["value"] <= one["high"], arm
        alive = (data["metrics"] if arm == "dictionary" else data["nulls"][arm])["frac_alive"]
        assert alive["low"] <= alive["value"] <= alive["high"]
        # with fewer than 100,000 rows, below 1e-5 is silent
        assert own["shares"]["below_1e-5"]["value"] == pytest.approx(1 - alive["value"])
    page = (report.path / "report.html").read_text()
    assert "How often latents are active</h3>" in page and "<td>null: untrained</td>" in page
    assert data["bootstrap"]["unit"] == "document"
    assert data["bootstrap"]["n_units"] == data["text"]["n_documents"]
    assert set(data["by_language"]) == {"english", "german"}
    assert sum(group["n_documents"] for group in data["by_language"].values()) == data["text"]["n_documents"]
    assert sum(group["n_rows"] for group in data["by_language"].values()) == data["text"]["n_rows_kept"]
    assert data["text"]["policy"] == POLICY.resolved()
    assert report.artifact.meta["parents"]["store"] == data["store"]["fingerprint"]


def test_groups_average_to_the_whole(report: Report) -> None:
    groups = report.data["by_language"].values()
    n = sum(group["n_rows"] for group in groups)
    l0 = sum(group["n_rows"] * group["metrics"]["l0"]["value"] for group in groups) / n
    assert l0 == pytest.approx(report.value("l0"), rel=1e-9)
    for null in report.data["nulls"]:
        mse = sum(group["n_rows"] * group["nulls"][null]["mse"]["value"] for group in groups) / n
        assert mse == pytest.approx(report.data["nulls"][null]["mse"]["value"], rel=1e-9)
        for group in groups:
            fvu = group["nulls"][null]["fvu"]
            assert fvu["low"] <= fvu["value"] <= fvu["high"]
            assert group["nulls"][null]["ce_base"] == group["metrics"]["ce_base"]
            for own in (group["metrics"], group["nulls"][null]):
                assert own["perplexity_base"]["value"] == pytest.approx(math.exp(own["ce_base"]["value"]))
                assert own["fvu_all_rows"]["value"] != own["fvu"]["value"] and "frac_alive" not in own
    markdown = (report.path / "report.md").read_text()
    by_language = markdown[markdown.index("**By language**") :]
    assert by_language.index("| german |") < by_language.rindex("| null: untrained |")


def test_numbers_are_grouped_by_each_tag(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    """A tag's group is what its documents alone give; a unit never has documents of two."""
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"genre": "<news>" if number % 2 else "verse"} | (
            {"year": 1900 + number} if number % 5 else {}
        )
    tagged = tmp_path / "tagged.jsonl"
    tagged.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    path = zeros(lm, tmp_path / "d")
    config = config_for(path, tagged, tmp_path / "r", nulls=())
    asked = config.replace(text=text_config(tagged, tag_fields=("genre", "year")))
    found = evaluate(asked, lm=lm).data
    assert list(found["by_tag"]) == ["genre", "year"] and set(found["by_tag"]["genre"]) == {"<news>", "verse"}
    for groups in found["by_tag"].values():
        assert sum(group["n_documents"] for group in groups.values()) == found["text"]["n_documents"]
        assert sum(group["n_rows"] for group in groups.values()) == found["text"]["n_rows_kept"]
    mse = sum(g["n_rows"] * g["metrics"]["mse"]["value"] for g in found["by_tag"]["genre"].values())
    assert mse / found["text"]["n_rows_kept"] == pytest.approx(found["metrics"]["mse"]["value"])
    assert "unknown" in found["by_tag"]["year"] and len(found["by_tag"]["year"]) <= MAX_VALUES + 1
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<h3>By genre</h3>" in page and "&lt;news&gt;" in page and "<news>" not in page
    assert evaluate(config.replace(out=tmp_path / "r2"), lm=lm).data["by_tag"] == {}


def test_units_are_merged_only_among_documents_of_the_same_tags() -> None:
    units = Units(("genre", "id"))
    n = 2 * MAX_UNITS
    ids = np.arange(n, dtype=np.int32)[None]
    documents = {
        i: text.DocumentInfo(i, "a", "english", None, {"genre": "ab"[i % 2], "id": str(i)}, "")
        for i in range(n)
    }
    found = units(text.TokenBlock(ids, ids, ids, ids >= 0, ids >= 0, documents), slice(0, 1))
    assert found.max() < MAX_UNITS + 2
    for unit, own in enumerate(units.tags):
        genres = {documents[int(i)].tags["genre"] for i in np.flatnonzero(found == unit)}
        assert genres == {own[2]}
    assert len({tags[3] for tags in units.tags}) == MAX_VALUES + 1


def test_many_combinations_of_tags_do_not_make_units_without_end() -> None:
    units = Units(("a", "b", "c"))
    n = 6 * MAX_UNITS
    ids = np.arange(n, dtype=np.int32)[None]
    tags = [{"a": str(i % 37), "b": str(i % 41), "c": str(i % 43)} for i in range(n)]
    documents = {i: text.DocumentInfo(i, "a", "english", None, tags[i], "") for i in range(n)}
    found = units(text.TokenBlock(ids, ids, ids, ids >= 0, ids >= 0, documents), slice(0, 1))
    assert len(units.tags) <= MOST_UNITS + 1 and found.max() < len(units.tags)
    assert ("english", "a", *["(others)"] * 3) in units.tags
    assert sum(bool(units.where(0, "english")[unit]) for unit in units.of.values()) == n


def test_every_row_is_in_the_histogram_of_l0(report: Report) -> None:
    kept = report.data["text"]["n_rows_kept"]
    for arm, own in report.data["density"].items():
        pairs = own["l0_histogram"]
        assert sum(count for _, count in pairs) == kept and all(count > 0 for _, count in pairs)
        value = report.value("l0", None if arm == "dictionary" else arm)
        assert sum(n * count for n, count in pairs) / kept == pytest.approx(value)
    assert report.data["density"]["untrained"]["l0_histogram"] == [[3, kept]]


def test_pca_beats_untrained_on_the_rows_it_was_fitted_to(report: Report) -> None:
    assert report.value("fvu", "pca") < report.value("fvu", "untrained")


def test_parts_of_a_dictionary_add_up_to_it(
    world: World, corpus: Path, lm: LanguageModel, store: Path, report: Report, tmp_path: Path
) -> None:
    path = world.place / "topk"
    asked = {"leave_out_above": (0.2, 0.999), "top_latents": (4,), "nulls": ()}
    found = evaluate(config_for(path, corpus, tmp_path / "r", store=store, **asked), lm=lm)
    parts = found.data["parts"]
    assert list(parts) == ["without_above_0.2", "without_above_0.999", "top_4", "rest_4"]
    whole = found.data["metrics"]
    assert whole["fvu"] == report.data["metrics"]["fvu"], "measured beside them as without them"
    value = {name: {key: s["value"] for key, s in part.items()} for name, part in parts.items()}
    assert value["top_4"]["l0"] + value["rest_4"]["l0"] == pytest.approx(whole["l0"]["value"])
    assert "frac_alive" not in value["top_4"], "what is left out is not silent"
    assert value["without_above_0.999"]["fvu"] == pytest.approx(whole["fvu"]["value"])
    assert value["without_above_0.2"]["l0"] < whole["l0"]["value"]
    assert value["rest_4"]["fvu"] > whole["fvu"]["value"]
    assert "part: rest_4" in (tmp_path / "r" / "report.md").read_text() and "ce_increase" in value["rest_4"]
    assert list(found.data["density"]) == ["dictionary"]


def test_latents_that_another_dictionary_has_are_spliced_alone(
    world: World, corpus: Path, lm: LanguageModel, store: Path, tmp_path: Path
) -> None:
    path = world.place / "topk"
    ours = dictionaries.load(path)
    other = TopK(TopKConfig(k=2, d_sae=10), D, D, 10, ours.sites)
    other.W_dec.data.copy_(2 * ours.decoder_directions()[5:15])
    save(other, tmp_path / "other")
    asked = {"matched_in": tmp_path / "other", "nulls": ()}
    found = evaluate(config_for(path, corpus, tmp_path / "r", store=store, **asked), lm=lm)
    matched = Part(ours, torch.arange(ours.d_sae).ge(5) & torch.arange(ours.d_sae).lt(15))
    unmatched = Part(ours, ~matched.keep)
    x = open_store(store).read(0, (HOOKPOINT,)).activations[HOOKPOINT].float()
    assert matched.encode(x).l0().sum() + unmatched.encode(x).l0().sum() == ours.encode(x).l0().sum()
    value = {name: part["l0"]["value"] for name, part in found.data["parts"].items()}
    assert value["matched"] + value["unmatched"] == pytest.approx(found.value("l0")) and value["matched"] > 0
    with pytest.raises(ConfigError, match="matched_above must be left out without matched_in"):
        config_for(path, corpus, tmp_path / "r", matched_above=0.8)
    of = site(lm)
    for about, width, error, message in (
        ({"stop": 7}, 7, ShapeError, r"matched_in must have d_out=24 like the dictionary, got 7 of .*there"),
        (
            {"model_fingerprint": "f" * 64, "model": "another"},
            D,
            MismatchError,
            r"matched_in must be of the dictionary's model, .*, got .*there of another \(fingerprint ffff",
        ),
        (
            {"hookpoint": "resid_post.2"},
            D,
            MismatchError,
            r"matched_in must write to the dictionary's hookpoint, resid_post.1, got resid_post.2 of .*there",
        ),
    ):
        sites = (of.replace(**about),)
        there = TopK(TopKConfig(k=2, d_sae=8), width, width, 8, Sites(inputs=sites, outputs=sites))
        there.save(
            tmp_path / error.__name__ / str(width) / next(iter(about)) / "there", torch.randn(16, width)
        )
        asked["matched_in"] = tmp_path / error.__name__ / str(width) / next(iter(about)) / "there"
        with pytest.raises(error, match=message):
            evaluate(config_for(path, corpus, tmp_path / "r2", **asked), lm=lm)
    bare = TopK(TopKConfig(k=2, d_sae=8), D, D, 8)
    bare.save(tmp_path / "bare", torch.randn(16, D))
    asked["matched_in"] = tmp_path / "bare"
    with pytest.raises(MismatchError, match="must know its model and hookpoint"):
        evaluate(config_for(path, corpus, tmp_path / "r2", **asked), lm=lm)


def test_the_smallest_set_of_latents_within_a_share_of_the_perplexity(
    report: Report, world: World, corpus: Path, lm: LanguageModel, store: Path, tmp_path: Path
) -> None:
    path = world.place / "topk"
    found = evaluate(config_for(path, corpus, tmp_path / "r", store=store, within=1e9, nulls=()), lm=lm).data
    parts = found["parts"]
    assert sorted(parts) == sorted(f"{how}_{n}" for n in (1, 2, 4, 8, 16) for how in ("strongest", "drawn"))
    for how in ("strongest", "drawn"):
        l0 = [parts[f"{how}_{n}"]["l0"]["value"] for n in (1, 2, 4, 8, 16)]
        assert l0 == sorted(l0)
    assert parts["strongest_4"]["fvu"]["value"] < parts["drawn_4"]["fvu"]["value"], "they write more"
    assert found["smallest_within"]["n_latents"] == 1  # anything is within so much
    assert found["smallest_within"]["more_than"] == 0
    base = found["smallest_within"]["perplexity_base"]
    assert base == found["metrics"]["perplexity_base"]["value"]
    perplexity = {n: parts[f"strongest_{n}"]["perplexity"]["value"] for n in (1, 2, 4, 8, 16)}
    perplexity[32] = found["metrics"]["perplexity"]["value"]
    for share in (0.001, 0.02, 0.3):
        config = config_for(path, corpus, tmp_path / f"r{share}", store=store, within=share, nulls=())
        own = evaluate(config, lm=lm).data["smallest_within"]
        by_chance = {n: parts[f"drawn_{n}"]["perplexity"]["value"] for n in (1, 2, 4, 8, 16)} | {
            32: perplexity[32]
        }
        drawn_enough = [n for n, value in by_chance.items() if value <= (1 + share) * base]
        assert own["random"]["n_latents"] == (min(drawn_enough) if drawn_enough else None)
        enough = [n for n, value in perplexity.items() if value <= (1 + share) * base]
        assert own["n_latents"] == (min(enough) if enough else None)
        before = [n for n in (0, *perplexity) if enough and n < min(enough)]
        assert own["more_than"] == (max(before) if enough else None)
        assert ("cause" in own) == (not enough)
        if own["low"] is not None:
            assert own["low"] <= own["n_latents"]
        with np.load(tmp_path / f"r{share}" / "draws.npz") as file:
            draws = dict(file)
        # the base's own draws follow from an arm's: its cross-entropy less what it adds
        most = (1 + share) * np.exp(draws["dictionary/ce"] - draws["dictionary/ce_increase"])
        kept = {n: draws[f"strongest_{n}/perplexity"] <= most for n in (1, 2, 4, 8, 16)}
        kept[32] = draws["dictionary/perplexity"] <= most
        fewest = [min((n for n in kept if kept[n][i]), default=math.inf) for i in range(1, len(most))]
        low, high = np.sort(fewest)[[math.ceil(q * len(fewest)) - 1 for q in (0.025, 0.975)]]
        expected = [None if not enough or end == math.inf else end for end in (low, high)]
        assert [own["low"], own["high"]] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out_above": (1.5,)}, r"leave_out_above must be densities in \(0, 1\), got 1.5"),
        ({"top_latents": (0,)}, "top_latents must be at least 1, got 0"),
        ({"top_latents": (32,)}, "top_latents must leave a rest of d_sae=32, got 32"),
    ],
)
def test_impossible_parts_are_refused(
    options: dict[str, Any], message: str, report: Report, world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(config_for(world.place / "topk", world.corpus, tmp_path / "r", **options), lm=world.lm)
    assert not (tmp_path / "r").exists()


def test_the_second_run_opens_the_report(
    report: Report, world: World, corpus: Path, lm: LanguageModel, store: Path
) -> None:
    config = config_for(
        world.place / "topk",
        corpus,
        world.place / "report",
        store=store,
        nulls=("pca", "untrained", "identity", "ica"),
    )
    again = evaluate(config, lm=lm)
    assert again.artifact.fingerprint == report.artifact.fingerprint
    with pytest.raises(MismatchError, match="must have been made with this config"):
        evaluate(config.replace(n_tokens=600), lm=lm)
    anew = evaluate(config, lm=lm, fresh=True)
    assert anew.artifact.fingerprint == report.artifact.fingerprint  # to the bit
    assert open_report(config.out).data == report.data


def test_documents_are_held_out(corpus: Path, lm: LanguageModel, store: Path, report: Report) -> None:
    from sememe.store import open_store

    trained_on = {row["id"] for row in open_store(store).documents()}
    blocks = text.token_blocks(text_config(corpus), lm.tokenizer, POLICY, split="heldout", n_tokens=1200)
    tested_on = {doc_id for block in blocks for doc_id in block.documents}
    assert tested_on and not tested_on & trained_on
    assert len(tested_on) == report.data["text"]["n_documents"]


def test_with_a_million_documents_memory_stays(corpus: Path) -> None:
    units = Units()
    info = text.DocumentInfo(0, "a", "english", None, {}, "")
    n = MAX_UNITS + 500
    for start in range(0, n, 16):
        ids = np.arange(start, start + 16, dtype=np.int32)[None]
        block = text.TokenBlock(ids, ids, ids, ids >= 0, ids >= 0, {int(i): info for i in ids[0]})
        found = units(block, slice(0, 1))
        assert found.max() < MAX_UNITS
    assert len(units.tags) == MAX_UNITS
    again = units(block, slice(0, 1))
    assert np.array_equal(again, found)


def test_metrics_room_is_where_the_numbers_come_from(report: Report) -> None:
    assert set(report.data["metrics"]) >= {*metrics.Reconstruction()._formulas(), "l0", "l1", "frac_alive"}
