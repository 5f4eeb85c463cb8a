"""Comparing dictionaries: known matches both ways, the same documents for all, frontiers, pages, errors."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_world import POLICY, World, autoencoder, identity, make_world, save, text_config, zeros
from test_report import Page

from sememe import artifact, dictionaries
from sememe.cli import _run
from sememe.compare import CompareConfig, Comparison, compare
from sememe.compare.verb import _cautions
from sememe.dictionaries.abs_topk import AbsTopK, AbsTopKConfig
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.errors import ArtifactError, ConfigError, MismatchError, ShapeError, TextError
from sememe.evaluate import EvaluateConfig, evaluate
from sememe.figures import GROUPED, open_report, read_draws
from sememe.store import open_store


def dictionary(path: Path, directions: torch.Tensor) -> artifact.Artifact:
    d_sae, d = directions.shape
    made = TopK(TopKConfig(k=1, d_sae=d_sae), d, d, d_sae)
    made.W_dec.data.copy_(directions)
    made.W_enc.data.copy_(directions.T)
    return made.save(path, torch.randn(16, d, generator=torch.Generator().manual_seed(0)))


def config_for(tmp_path: Path, *names: str, **changes: object) -> CompareConfig:
    folders = tuple(tmp_path / name for name in names or ("a", "b"))
    return CompareConfig.build(
        {"dictionaries": folders, "out": tmp_path / "out", "directions_only": True, **changes}
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[artifact.Artifact, artifact.Artifact]:
    """b holds the first four of a's eight directions, in another order and length, and one opposite."""
    a = torch.eye(8)
    b = torch.cat([a[:4].flip(0) * 3, -a[7:]])
    return dictionary(tmp_path / "a", a), dictionary(tmp_path / "b", b)


# -- directions ----------------------------------------------------------------------------------------------------


def test_recall_and_precision_by_name(tmp_path: Path, pair: object) -> None:
    done = compare(config_for(tmp_path))
    data = json.loads((done.path / "comparison.json").read_text())
    own = data["pair"]
    assert own["mmcs_a_to_b"]["value"] == pytest.approx(4 / 8)
    assert own["mmcs_b_to_a"]["value"] == pytest.approx(
        4 / 5
    )  # the opposite direction is not found: cosine 0
    shares = [own[way]["share_above_0.9"] for way in ("a_to_b", "b_to_a")]
    assert [share["value"] for share in shares] == [0.5, 0.8] and [share["random"] for share in shares] == [
        0,
        0,
    ]
    assert sum(own["a_to_b"]["histogram"]["counts"]) == 8
    assert [row["description"]["d_sae"] for row in data["rows"]] == [8, 5]
    assert done.extra == {name: own[name]["value"] for name in ("mmcs_a_to_b", "mmcs_b_to_a")}
    assert data["directions"]["names"] == ["a", "b"]
    for name in ("mmcs", "share_above_0.9"):
        assert np.allclose(values(data["directions"][name]), [[1, 0.5], [0.8, 1]])
    assert data["directions"]["differences"] == [], "of two, each is found in one other"


def test_signs_of_directions_do_not_count_where_activations_have_signs(tmp_path: Path, pair: object) -> None:
    """An AbsTopK dictionary's latent may stand for the one or the other of two half-lines."""
    signed = AbsTopK(AbsTopKConfig(k=1, d_sae=8), 8, 8, 8)
    signed.W_dec.data.copy_(-torch.eye(8))
    signed.save(tmp_path / "c", torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    data = json.loads((compare(config_for(tmp_path, "a", "c")).path / "comparison.json").read_text())
    assert data["pair"]["mmcs_a_to_b"]["value"] == pytest.approx(1)
    assert values(data["directions"]["mmcs"]) == pytest.approx(np.ones((2, 2)))
    assert any("Activations of c may be below 0" in notice for notice in data["notices"])
    whole = config_for(tmp_path, "a", "b", "c", out=tmp_path / "three")
    table = json.loads((compare(whole).path / "comparison.json").read_text())["directions"]["mmcs"]
    assert values(table)[0] == pytest.approx([1, 0.5, 1]), "between a and b they do count"


def values(table: list[list[dict]]) -> list[list[float]]:
    return [[one["value"] for one in row] for row in table]


def test_nearest_latents_are_stored_both_ways(tmp_path: Path, pair: object) -> None:
    done = compare(config_for(tmp_path, n_nearest=7))
    forth = np.load(done.path / "matches_a_to_b.npz")
    assert forth["indices"].shape == (8, 5) and forth["indices"][:4, 0].tolist() == [3, 2, 1, 0]
    back = np.load(done.path / "matches_b_to_a.npz")
    assert back["indices"].shape == (5, 7) and back["indices"][:4, 0].tolist() == [3, 2, 1, 0]
    assert np.all(np.diff(back["cosines"], axis=1) <= 1e-6)
    markdown = (done.path / "comparison.md").read_text()
    assert "| 0 | 3 | 1.0000 |" in markdown and "| a to b | 0.5000 (0.125 to 0.875) |" in markdown


def test_a_dictionary_compared_with_itself_is_found_whole(tmp_path: Path, pair: object) -> None:
    dictionary(tmp_path / "c", torch.eye(8).flip(0))
    done = compare(config_for(tmp_path, "a", "c"))
    assert done.extra["mmcs_a_to_b"] == done.extra["mmcs_b_to_a"] == 1


def test_several_give_a_matrix(tmp_path: Path, pair: object) -> None:
    dictionary(tmp_path / "c", torch.eye(8)[:2])
    done = compare(config_for(tmp_path, "a", "b", "c"))
    data = json.loads((done.path / "comparison.json").read_text())
    assert data["pair"] is None and not list(done.path.glob("*.npz"))
    assert np.allclose(values(data["directions"]["mmcs"]), [[1, 0.5, 0.25], [0.8, 1, 0.4], [1, 1, 1]])
    random = data["directions"]["random"]
    assert len(random) == 3 and all(0 < one["low"] <= one["value"] <= one["high"] < 1 for one in random)


def plain_bootstrap(values: np.ndarray, n: int, seed: int) -> tuple[float, float]:
    """Of a mean, by drawing the values themselves."""
    size = len(values)
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n)
    low, high = np.quantile([np.repeat(values, weights).mean() for weights in draws], [0.025, 0.975])
    return float(low), float(high)


def test_directions_have_intervals_over_latents_and_paired_differences(tmp_path: Path) -> None:
    """Seeds of a: b is a with a little noise, c with more; each latent is a little worse in c."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 30, generator=generator)
    noise = torch.randn(40, 30, generator=generator)
    unlike = torch.linspace(0.1, 2, 40)[:, None] * noise
    for name, rows in (("a", a), ("b", a + unlike), ("c", a + 1.1 * unlike), ("d", a - unlike)):
        dictionary(tmp_path / name, rows)
    done = compare(config_for(tmp_path, "a", "b", "c", "d", n_bootstrap=200, seed=4))
    found = json.loads((done.path / "comparison.json").read_text())["directions"]
    unit = [x / x.norm(dim=1, keepdim=True) for x in (a, a + unlike, a + 1.1 * unlike, a - unlike)]
    best = [(unit[0] @ other.T).amax(1).double().numpy() for other in unit]
    for column in (1, 2, 3):
        one, share = found["mmcs"][0][column], found["share_above_0.9"][0][column]
        assert one["value"] == pytest.approx(best[column].mean(), abs=1e-6)
        assert (one["low"], one["high"]) == pytest.approx(plain_bootstrap(best[column], 200, 4), abs=1e-6)
        above = best[column] > 0.9
        assert (share["low"], share["high"]) == pytest.approx(plain_bootstrap(above, 200, 4), abs=1e-6)
    of_a = {one["other"]: one for one in found["differences"] if one["of"] == "a"}
    assert set(of_a) in ({"c", "d"}, {"c", "b"}), "c is worst"
    worse = of_a["c"]["difference"]
    leader = best[1] if of_a["c"]["best"] == "b" else best[3]
    assert (worse["low"], worse["high"]) == pytest.approx(plain_bootstrap(leader - best[2], 200, 4), abs=1e-6)
    mmcs = found["mmcs"][0]
    assert of_a["c"]["real"] and mmcs[1]["low"] < mmcs[2]["high"], (
        "paired: each interval for itself holds both"
    )
    assert "better in" in of_a["c"]["sentence"]
    alike = of_a["d" if "d" in of_a else "b"]
    assert not alike["real"] and "alike" in alike["sentence"] and "the interval holds 0" in alike["sentence"]
    assert len(found["differences"]) == 4 * 2
    page = (done.path / "comparison.html").read_text()
    assert "Whose latents are in whom</h2>" in page and "better in" in page


def test_a_medians_interval_is_what_a_bootstrap_tends_to(tmp_path: Path, pair: object) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in ("e", "f"):
        dictionary(tmp_path / name, torch.randn(101, 8, generator=generator))
    done = compare(config_for(tmp_path, "e", "f"))
    way = json.loads((done.path / "comparison.json").read_text())["pair"]["a_to_b"]
    best = np.load(done.path / "matches_a_to_b.npz")["cosines"][:, 0].astype(np.float64)
    draws = np.random.default_rng(0).integers(0, 101, (20_000, 101))
    low, high = np.quantile(np.median(best[draws], axis=1), [0.025, 0.975])
    assert way["median_mcs"]["low"] == pytest.approx(low, abs=0.01)
    assert way["median_mcs"]["high"] == pytest.approx(high, abs=0.01)
    assert way["median_mcs"]["random"] == pytest.approx(
        way["median_mcs"]["value"], abs=0.05
    )  # they are random
    assert abs(way["n_distinct_matches"] - way["random_n_distinct_matches"]) < 15


def test_the_command_prints_directions_where_nothing_was_measured(
    tmp_path: Path, pair: object, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert _run(["compare", *folders, "--directions-only", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "mmcs: how much of the row is in the column" in said and "random" in said
    assert f"comparison: {tmp_path / 'out' / 'comparison.html'}" in said.replace("\n", "")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("nulls", ("pca",)),
        ("n_tokens", 100),
        ("n_fit_rows", 100),
        ("budget", "1min"),
        ("store", "a/store"),
        ("batch_rows", 2),
        ("model", {"model": "other"}),
        ("policy", {"context_length": 8}),
    ],
)
def test_options_of_text_are_refused_where_directions_alone_are_compared(tmp_path, option, value) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"{option} must be left out when no language model runs \(directions_only\): it has no effect "
        r"then, got .*\. Drop it\.",
    ):
        config_for(tmp_path, **{option: value})


def test_the_second_run_opens_it(tmp_path: Path, pair: object) -> None:
    first = compare(config_for(tmp_path))
    assert compare(config_for(tmp_path)).fingerprint == first.fingerprint
    assert compare(config_for(tmp_path), fresh=True).fingerprint == first.fingerprint
    with pytest.raises(MismatchError, match="the comparison at"):
        compare(config_for(tmp_path, n_nearest=2))


def test_what_cannot_be_compared(tmp_path: Path, pair: object) -> None:
    dictionary(tmp_path / "wide", torch.eye(9))
    with pytest.raises(ShapeError, match=r"must write outputs of one width, 8 like a, got 9 of wide"):
        compare(config_for(tmp_path, "a", "wide"))
    with pytest.raises(ArtifactError, match="must be a finished dictionary, got nothing there"):
        compare(config_for(tmp_path, "a", "no"))
    with pytest.raises(ConfigError, match=r"at least two dictionaries must be named, got .*a"):
        compare(config_for(tmp_path, "a"))
    with pytest.raises(
        ConfigError, match="each dictionary must be named once, got 1: a and 2: a, which are the same"
    ):
        compare(config_for(tmp_path, "a", "a"))
    with pytest.raises(MismatchError, match="a must know its model and hookpoint to be measured on text"):
        compare(config_for(tmp_path, directions_only=False))
    assert not (tmp_path / "out").exists()


# -- on text -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Below `made`: TopK dictionaries at two k and two seeds, the neuron basis, and one that only knows its bias."""
    made = make_world(tmp_path_factory.mktemp("compare"))
    store = open_store(made.store)
    x = store.read(0, ("resid_post.1",)).activations["resid_post.1"].float()
    sites = autoencoder(made.lm, max_norm=store.info.hookpoints["resid_post.1"].max_norm)
    for k in (2, 4):
        for seed in (0, 1):
            topk = dictionaries.build(TopKConfig(k=k, d_sae=48), x.shape[1], x.shape[1], sites)
            topk.initialise(x, x, torch.Generator().manual_seed(seed))
            save(topk, made.place / "made" / "topk" / f"k{k}-seed{seed}")
    identity(made.lm, made.place / "made" / "neurons", sites)
    zeros(made.lm, made.place / "made" / "zeros", sites)
    yield made


def on_text(world: World, out: Path, *names: str, **changes: object) -> CompareConfig:
    folders = tuple(world.place / "made" / name for name in names) or (world.place / "made",)
    options = {"model": {"model": "unused"}, "text": text_config(world.corpus), "store": world.store}
    options |= {"n_tokens": 1200, "n_fit_rows": 1000, "batch_rows": 4, "n_bootstrap": 50}
    return CompareConfig.build({"dictionaries": folders, "out": out, **options, **changes})


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> artifact.Artifact:
    return compare(
        on_text(world, tmp_path_factory.mktemp("done") / "c", nulls=("pca", "identity")), lm=world.lm
    )


def read(done: artifact.Artifact) -> dict:
    return json.loads((done.path / "comparison.json").read_text())


def test_folders_are_searched_and_dictionaries_named_by_what_tells_them_apart(
    done: artifact.Artifact,
) -> None:
    names = [row["name"] for row in read(done)["rows"] if not row["null"]]
    assert names == ["neurons", "k2-seed0", "k2-seed1", "k4-seed0", "k4-seed1", "zeros"]


def test_each_has_the_numbers_that_an_evaluation_of_it_alone_gives(
    world: World, done: artifact.Artifact, tmp_path: Path
) -> None:
    config = on_text(world, tmp_path / "r")
    shared = {name: getattr(config, name) for name in EvaluateConfig.model_fields if hasattr(config, name)}
    alone = EvaluateConfig(
        **(
            shared
            | {"dictionary": world.place / "made" / "topk" / "k4-seed1", "out": tmp_path / "r", "nulls": ()}
        )
    )
    report = evaluate(alone, lm=world.lm)
    (row,) = (row for row in read(done)["rows"] if row["name"] == "k4-seed1")
    expected = {name: one for name, one in report.data["metrics"].items() if name in row["metrics"]}
    assert (
        row["metrics"] == expected and len(expected) > 12 and {"ce_base", "perplexity_base"} <= set(expected)
    )
    draws = read_draws(open_report(tmp_path / "r"))
    assert draws["fvu"].shape == (51,) and draws["fvu"][0] == pytest.approx(
        expected["fvu"]["value"], rel=1e-12
    )
    assert draws["ce_increase"][0] == pytest.approx(expected["ce_increase"]["value"], rel=1e-9)
    assert report.data["bootstrap"]["units"] == read(done)["bootstrap"]["units"]
    assert row["density"] == report.data["density"]["dictionary"]
    for language, group in report.data["by_language"].items():
        ours = read(done)["by_language"][language]
        arm = ours["arms"]["k4-seed1"]
        assert (ours["n_documents"], arm["n_rows"]) == (group["n_documents"], group["n_rows"])
        assert arm["metrics"] == {name: group["metrics"][name] for name in GROUPED}


def test_every_arm_is_told_by_tag(world: World, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in world.corpus.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["genre"] = ("verse", "<news>", "prose")[number % 3]
    tagged = tmp_path / "tagged.jsonl"
    tagged.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    text = text_config(tagged, tag_fields=("genre",))
    topk = [f"topk/k{k}-seed0" for k in (2, 4)]
    config = on_text(world, tmp_path / "c", *topk, nulls=("pca",), text=text, store=None, n_bootstrap=20)
    done = compare(config, lm=world.lm)
    data = read(done)
    by_name = {row["name"]: row["metrics"] for row in data["rows"]}
    names = set(by_name)
    assert names == {"k2-seed0", "k4-seed0", "pca k=2", "pca k=4"}
    assert set(data["by_tag"]) == {"genre"} and set(data["by_tag"]["genre"]) == {"verse", "<news>", "prose"}
    for group in data["by_tag"]["genre"].values():
        assert set(group["arms"]) == names, "nulls, too"
        for arm in group["arms"].values():
            assert (
                arm["metrics"]["fvu"]["low"]
                <= arm["metrics"]["fvu"]["value"]
                <= arm["metrics"]["fvu"]["high"]
            )
    groups = data["by_tag"]["genre"].values()
    for name in names:
        arms = [group["arms"][name] for group in groups]
        n = sum(arm["n_rows"] for arm in arms)
        l0 = sum(arm["n_rows"] * arm["metrics"]["l0"]["value"] for arm in arms) / n
        assert n == data["text"]["n_rows_kept"] and l0 == pytest.approx(by_name[name]["l0"]["value"])
    page = (done.path / "comparison.html").read_text()
    assert "By genre</h2>" in page and "By language</h2>" in page and "<news>" not in page


def test_seeds_make_a_setting_and_nulls_stand_at_the_same_l0(done: artifact.Artifact) -> None:
    frontiers = read(done)["frontiers"]
    (topk,) = (one for group, one in frontiers.items() if group.startswith("topk") and len(one["points"]) > 1)
    assert [p["n_seeds"] for p in topk["points"]] == [2, 2]
    by_name = {row["name"]: row for row in read(done)["rows"]}
    for k, p in zip((2, 4), topk["points"], strict=True):
        seeds = [by_name[f"k{k}-seed{seed}"]["metrics"]["fvu"]["value"] for seed in (0, 1)]
        assert p["fvu"]["value"] == pytest.approx(np.mean(seeds)) and p["l0"]["value"] == pytest.approx(k)
    nulls = [row for row in by_name.values() if row["null"]]
    assert {row["name"] for row in nulls} >= {"pca k=2", "pca k=4", "identity k=4"}
    assert by_name["pca k=4"]["metrics"]["fvu"]["value"] < by_name["pca k=2"]["metrics"]["fvu"]["value"]
    assert all(row["description"]["k"] < 24 for row in nulls)  # all 24 would be the identity


def test_differences_are_those_of_the_rows_and_real_where_they_are(done: artifact.Artifact) -> None:
    data = read(done)
    by_name = {row["name"]: row["metrics"] for row in data["rows"]}
    found = {
        (one["a"], one["b"]): one
        for one in data["differences"]
        if one["metric"] == "fvu" and one["difference"] is not None
    }
    topk, null = "topk d_sae=48", "null: pca"
    pca = found.get((topk, null)) or found[null, topk]
    assert pca["real"] and "is better than" in pca["sentence"] and "real" in pca["sentence"]
    assert pca["l0"] == pytest.approx(np.sqrt(2 * 4), rel=0.2)
    assert by_name["neurons"]["fvu"]["value"] == pytest.approx(0, abs=1e-9)
    assert by_name["zeros"]["ce_recovered_zero"]["value"] == pytest.approx(0, abs=1e-6)


def test_what_is_written_keeps_to_its_schema(done: artifact.Artifact) -> None:
    text = (done.path / "comparison.json").read_text()
    Comparison.model_validate_json(text)
    schema = json.loads((done.path / "comparison.schema.json").read_text())
    published = Path(__file__).parent.parent / "docs" / "schemas" / "comparison.schema.json"
    assert schema == json.loads(published.read_text())
    assert set(schema["required"]) == set(json.loads(text))


def test_the_csv_has_a_line_for_each(done: artifact.Artifact) -> None:
    with (done.path / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows = read(done)["rows"]
    assert [line["name"] for line in lines] == [row["name"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        for name, one in row["metrics"].items():
            for field, end in ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high")):
                assert (line[field] == "") if one[end] is None else float(line[field]) == one[end]


def test_the_page_needs_no_other_file_and_tells_differences(done: artifact.Artifact) -> None:
    page = Page((done.path / "comparison.html").read_text())
    assert page.loads == [] and "script" not in page.tags
    assert page.tags.count("svg") == 7  # two of dots, three frontiers, densities, directions
    text = (done.path / "comparison.md").read_text()
    assert "fvu: which differences are real" in text and "Marks & Mueller 1_32768 | mlp_out.5 | 0.265" in text
    assert "neurons may be the identity: 100% of the decoder rows are single dimensions" in text
    assert "| rmse |" in text and "differences about" in text  # so many differences would look real by chance


def test_a_budget_ends_it_and_says_so(world: World, tmp_path: Path) -> None:
    config = on_text(world, tmp_path / "c", "zeros", "neurons", nulls=(), n_tokens=3000, budget="0.001s")
    data = read(compare(config, lm=world.lm))
    assert data["stopped"]["because"] == "the budget is spent"
    assert 0 < data["stopped"]["n_tokens"] == data["text"]["n_tokens"] < 3000
    (notice,) = (notice for notice in data["notices"] if "because the budget is spent" in notice)
    assert "; of 0.001s, " in notice and "s went into fitting nulls and" in notice
    assert set(data["stopped"]["spent"]) == {"fitting", "reading"}
    for row in data["rows"]:
        assert row["metrics"]["fvu"]["low"] is not None, "it reads on until there are two documents"


def test_a_budget_counts_the_fitting_of_nulls(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still but for the fitting, which takes an hour."""
    from sememe.compare import verb

    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow(*args: object) -> object:
        now[0] += 3600
        return fit(*args)

    fit = verb.fit
    monkeypatch.setattr(verb, "fit", slow)
    names = ("zeros", "neurons")
    done = compare(
        on_text(world, tmp_path / "c", *names, nulls=(), n_tokens=3000, budget="59min"), lm=world.lm
    )
    stopped = read(done)["stopped"]
    assert stopped["spent"] == {"fitting": 3600, "reading": 0} and stopped["because"] == "the budget is spent"
    assert stopped["n_tokens"] < 3000
    more = compare(
        on_text(world, tmp_path / "d", *names, nulls=(), n_tokens=3000, budget="61min"), lm=world.lm
    )
    assert read(more)["stopped"]["because"] == "all tokens"
    assert (
        "because all tokens were read; of 61min, 3,600 s went into fitting nulls"
        in (more.path / "comparison.md").read_text()
    )


def test_narrow_intervals_end_it_too(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sememe.measure.measured.CHECKED_EVERY", 0.0)
    neurons = world.place / "made" / "neurons"
    save(dictionaries.load(neurons), tmp_path / "twin", note="another artifact")
    config = on_text(world, tmp_path / "c", nulls=(), n_tokens=3000, budget="1h")
    data = read(compare(config.replace(dictionaries=(neurons, tmp_path / "twin")), lm=world.lm))
    assert data["stopped"]["because"] == "the intervals are narrow enough" and data["text"]["n_tokens"] < 3000
    names = ("zeros", "neurons")
    strict = on_text(world, tmp_path / "d", *names, nulls=(), n_tokens=3000, budget="1h", narrow_enough=1e-6)
    assert read(compare(strict, lm=world.lm))["stopped"]["because"] == "all tokens"


@pytest.mark.slow  # a whole comparison
def test_folders_named_like_the_ablations_are_dictionaries_all_the_same(world: World, tmp_path: Path) -> None:
    made = world.place / "made"
    for name, source in (
        ("base", "zeros"),
        ("mean", "neurons"),
        ("zero", "topk/k4-seed0"),
        ("pca k=4", "topk/k2-seed0"),
    ):
        save(dictionaries.load(made / source), tmp_path / "named" / name, note=name)
    config = on_text(world, tmp_path / "c", nulls=("pca",)).replace(dictionaries=(tmp_path / "named",))
    found = {row["name"]: row["metrics"] for row in read(compare(config, lm=world.lm))["rows"]}
    plain = on_text(world, tmp_path / "d", nulls=("pca",)).replace(
        dictionaries=tuple(made / name for name in ("zeros", "neurons", "topk/k4-seed0", "topk/k2-seed0"))
    )
    expected = {row["name"]: row["metrics"] for row in read(compare(plain, lm=world.lm))["rows"]}
    for ours, theirs in (
        ("base (dictionary)", "zeros"), ("mean (dictionary)", "neurons"), ("zero (dictionary)", "k4-seed0"),
        ("pca k=4", "k2-seed0"), ("pca k=4 (null)", "pca k=4"),
    ):  # fmt: skip
        assert found[ours] == expected[theirs], ours


@pytest.mark.parametrize("budget", ["5", "soon", "0min", "-1s"])
def test_a_budget_is_a_duration(tmp_path: Path, budget: str) -> None:
    with pytest.raises(ConfigError, match="a budget must be a number above 0 and s, min or h, got"):
        config_for(tmp_path, budget=budget)


def test_dictionaries_of_other_places_are_measured_on_the_same_documents(
    world: World, tmp_path: Path
) -> None:
    x = open_store(world.store).read(0, ("mlp_out.2",)).activations["mlp_out.2"].float()
    topk = dictionaries.build(TopKConfig(k=3, d_sae=48), 24, 24, autoencoder(world.lm, "mlp_out.2"))
    topk.initialise(x, x, torch.Generator().manual_seed(0))
    save(topk, tmp_path / "below")
    zeros(world.lm, tmp_path / "above", autoencoder(world.lm, "resid_post.1"))
    config = on_text(world, tmp_path / "c", nulls=("pca",)).replace(
        dictionaries=(tmp_path / "below", tmp_path / "above")
    )
    data = read(compare(config, lm=world.lm))
    by_name = {row["name"]: row for row in data["rows"]}
    assert "mlp_out.2" in by_name["below"]["group"] and "resid_post.1" in by_name["above"]["group"]
    zero = by_name["above"]["metrics"]["ce_recovered_zero"]["value"]
    assert zero == pytest.approx(0, abs=1e-6) and by_name["mlp_out.2: pca k=3"]["null"]
    assert any("may live in different bases" in notice for notice in data["notices"])


def test_another_model_or_policy_is_refused(world: World, tmp_path: Path) -> None:
    sites = autoencoder(world.lm)
    other = sites.inputs[0].replace(model_fingerprint="f" * 64, model="else")
    identity(world.lm, tmp_path / "a", sites)
    identity(world.lm, tmp_path / "b", sites.replace(inputs=(other,), outputs=(other,)))
    config = on_text(world, tmp_path / "c").replace(dictionaries=(tmp_path / "a", tmp_path / "b"), store=None)
    with pytest.raises(
        MismatchError, match=r"must belong to one model .*, got .* of a; else \(ffff.*\), of b"
    ):
        compare(config, lm=world.lm)
    save(dictionaries.load(tmp_path / "b"), tmp_path / "b2", note="twin")
    save(dictionaries.load(tmp_path / "a"), tmp_path / "a2", note="twin")
    both = config.replace(dictionaries=(tmp_path / "b", tmp_path / "b2"))
    with pytest.raises(
        MismatchError, match=r"the model must be the one the dictionaries were trained on, else"
    ):
        compare(both, lm=world.lm)
    with pytest.raises(ConfigError, match="a null must be a known one, got 'pcaa'"):
        compare(config.replace(dictionaries=(tmp_path / "a", tmp_path / "a2"), nulls=("pcaa",)), lm=world.lm)
    save(dictionaries.load(tmp_path / "a"), tmp_path / "d", policy={"context_length": 8})
    with pytest.raises(MismatchError, match=r"must have one token policy .* that of a: .*, got .* of d"):
        compare(config.replace(dictionaries=(tmp_path / "a", tmp_path / "d")), lm=world.lm)
    assert not (tmp_path / "c").exists()


def test_intervals_need_two_documents(world: World, tmp_path: Path) -> None:
    few = {"nulls": (), "n_tokens": POLICY.context_length}
    with pytest.raises(
        TextError, match=r"intervals need at least 2 held-out documents, got 1\. Raise n_tokens"
    ):
        compare(on_text(world, tmp_path / "c", "zeros", "neurons", **few), lm=world.lm)
    assert not (tmp_path / "c").exists()
    done = compare(on_text(world, tmp_path / "c", "zeros", "neurons", n_bootstrap=0, **few), lm=world.lm)
    data = read(done)
    assert data["text"]["n_documents"] == 1
    assert all(row["metrics"]["fvu"]["low"] is None for row in data["rows"])
    assert not any(one["real"] for one in data["differences"])


def test_groups_of_one_setting_are_named_in_one_caution():
    def group(n: int) -> dict[str, Any]:
        return {"points": [{"n_seeds": 2}] * n}

    data = {
        "rows": [],
        "frontiers": {"a": group(1), "b": group(1), "far": group(3)},
        "left_out": {"a": "it has one setting", "b": "it has one setting", "far": "its l0 do not reach"},
        "dropped": {},
        "differences": [],
        "stopped": None,
    }
    assert _cautions(data) == [
        "The means over shared l0 are without those of one setting: a, b.",
        "The means over shared l0 are without far: its l0 do not reach.",
    ]
