"""Plans: sizes that agree with what runs then make, refusals that name a number that fits, and nothing started."""

import re
import time

import pytest
from small_world import write_corpus, write_model, write_recipe

from sememe.cli import _run
from sememe.dictionaries.sparse_coder import KSVDConfig, SparseCoderConfig
from sememe.errors import ResourceError, ShapeError
from sememe.lm import ModelConfig, outline
from sememe.plan import Machine, check, costs, fitting, machine, plan, refuse
from sememe.plan.machine import Speed
from sememe.plan.stages import estimates
from sememe.recipe import read_recipe, stages
from sememe.run import run

VERBS = ["harvest", "train", "evaluate", "interpret", "prompts", "effects", "explain", "export"]
CALIBRATION = machine.SECONDS


LAST = "[interpret]\nmap = false\n[prompts]\n[effects]\nn_latents = 4\nn_top = 2\nn_removals = 0\n[explain]\n"


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    """Three products of each kind, and not as many as fit a third of a second: else it is what each plan takes."""
    monkeypatch.setattr(machine, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("plan")
    write_corpus(place / "corpus.jsonl", n_documents=300)
    write_model(place / "model")
    write_recipe(place, LAST)
    return place


def changed(place, tmp_path, old: str, new: str):
    text = (place / "small.toml").read_text()
    assert old in text
    (tmp_path / "changed.toml").write_text(text.replace(old, new))
    return tmp_path / "changed.toml"


def test_a_plan_has_a_number_for_every_stage_and_starts_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", CALIBRATION)
    started = time.monotonic()
    found = plan(place / "small.toml", out=tmp_path / "out")
    assert [estimate.stage.verb for estimate in found.estimates] == VERBS
    for estimate in found.estimates:
        assert not estimate.done and estimate.needs is not None
        assert estimate.needs.memory > 0 and estimate.needs.disk > 0 and estimate.needs.gpu == 0
        assert 0 < found.seconds(estimate) < 600
    assert not (tmp_path / "out").exists()
    assert found.machine.memory > 0 and min(found.speed) > 0
    assert time.monotonic() - started < 60  # far above the three seconds of the calibration: others may run


@pytest.mark.slow  # runs a whole recipe
def test_sizes_on_disk_are_those_that_a_run_makes(place, tmp_path):
    out = tmp_path / "out"
    found = {e.stage.verb: e for e in plan(place / "small.toml", out=out).estimates}
    run(place / "small.toml", out=out)
    store = sum(file.stat().st_size for file in (out / "store").glob("shard-*"))
    assert found["harvest"].needs.disk == pytest.approx(store, rel=0.1)
    again = plan(place / "small.toml", out=out)
    assert all(e.done and again.seconds(e) == 0 and e.needs.disk == 0 for e in again.estimates)
    fresh = plan(place / "small.toml", out=out, fresh=True)
    assert not any(estimate.done for estimate in fresh.estimates)
    # A dictionary with other options on the store that is there: its rows are known without the model.
    recipe = changed(place, tmp_path, 'model"', 'nowhere"')
    for folder in ("dictionary", "report", "atlas", "effects", "explanations", "site"):
        (out / folder / "meta.json").unlink()
    stored = {e.stage.verb: e for e in plan(recipe, out=out).estimates}
    assert stored["harvest"].done and stored["train"].needs.memory > 0
    assert stored["evaluate"].needs is None and "not at hand" in stored["evaluate"].note


def test_more_of_anything_takes_more(place, tmp_path):
    def needs(old: str, new: str):
        found = plan(changed(place, tmp_path, old, new), out=tmp_path / "out")
        return {e.stage.verb: (found.seconds(e), e.needs) for e in found.estimates}

    base = needs("k = 4", "k = 4")
    wide, long, big = (
        needs("d_sae = 48", "d_sae = 48_000"),
        needs("n_tokens = 6000", "n_tokens = 6_000_000"),
        needs("batch_size = 64", "batch_size = 64_000"),
    )
    for verb in ("train", "evaluate", "interpret", "explain", "export"):
        assert wide[verb][1].memory >= base[verb][1].memory
        assert wide[verb][1].memory + wide[verb][1].disk > base[verb][1].memory + base[verb][1].disk
    assert long["harvest"][1].disk == pytest.approx(1000 * base["harvest"][1].disk, rel=0.01)
    assert long["harvest"][0] > 5 * base["harvest"][0] - 40
    assert big["train"][1].memory > base["train"][1].memory


def test_effects_and_explanations_are_planned_with_what_they_hang_on(place, tmp_path):
    def found(old: str, new: str, verb: str):
        made = plan(changed(place, tmp_path, old, new), out=tmp_path / "out")
        estimate = next(e for e in made.estimates if e.stage.verb == verb)
        return estimate, None if estimate.seconds_at is None else estimate.seconds_at(made.speed)

    before, few = found("n_latents = 4", "n_latents = 4", "effects")
    more, many = found("n_latents = 4", "every = true", "effects")
    assert many > few and more.needs.disk > before.needs.disk
    _, removed = found("n_removals = 0", "n_removals = 2", "effects")
    assert removed > few
    alone, one = found("[explain]", "[explain]", "explain")
    beside, three = found("map = false", 'map = false\nnulls = ["pca", "randomised"]', "explain")
    assert three - one == pytest.approx(2 * 48 / 60) and beside.needs.disk == 3 * alone.needs.disk
    asked, none = found("[explain]", '[explain]\nexplainer = {kind = "endpoint", model = "m"}', "explain")
    assert none is None and "takes to answer is not known" in asked.note and asked.needs is not None


def test_a_store_that_cannot_fit_is_refused_before_anything_starts(place, tmp_path):
    recipe = changed(place, tmp_path, "n_tokens = 6000", "n_tokens = 100_000_000_000_000")
    with pytest.raises(
        ResourceError, match=r"all stages together must fit in the disk that is free, .* GB, got about"
    ) as error:
        run(recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fits = int(re.search(r"n_tokens to at most ([\d,]+)", str(error.value)).group(1).replace(",", ""))
    assert fits > 6000
    smaller = changed(place, tmp_path, "n_tokens = 6000", f"n_tokens = {fits}")
    check(stages(read_recipe(smaller), tmp_path / "out"), tmp_path / "out")


def test_a_dictionary_that_cannot_fit_is_refused_with_the_width_that_does(place, tmp_path):
    recipe = changed(place, tmp_path, "d_sae = 48", "d_sae = 4_000_000_000")
    with pytest.raises(ResourceError, match=r"train must fit in the memory that is free") as error:
        run(recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "d_sae=4,000,000,000" in str(error.value)
    fits = int(re.search(r"d_sae to at most ([\d,]+)", str(error.value)).group(1).replace(",", ""))
    wide = next(e for e in plan(recipe, out=tmp_path / "out").estimates if e.stage.verb == "train")
    knob = next(knob for knob in wide.knobs if knob.name == "d_sae")
    free = plan(recipe, out=tmp_path / "out").machine.memory
    # others on the machine may have taken or given back some meanwhile
    assert knob.bytes_at(fits).memory <= 1.1 * free and free < 1.1 * knob.bytes_at(int(1.2 * fits)).memory


def test_memory_is_asked_per_stage_and_disk_for_all_of_them_together(place, tmp_path):
    found = plan(place / "small.toml", out=tmp_path / "out")
    needs = [estimate.needs for estimate in found.estimates]
    memory, disk = max(n.memory for n in needs), sum(n.disk for n in needs)
    refuse(found._replace(machine=Machine(int(memory) + 1, int(disk) + 1, None)))
    with pytest.raises(ResourceError, match=r"Lower the harvest's n_tokens to at most [\d,]+\."):
        less = disk - 0.1 * needs[0].disk  # of what the harvest writes, which fewer tokens spare
        refuse(found._replace(machine=Machine(int(memory) + 1, int(less), None)))
    with pytest.raises(ResourceError, match=r"must fit in the memory"):
        refuse(found._replace(machine=Machine(int(memory) - 1, int(disk) + 1, None)))
    with pytest.raises(ResourceError, match=r"Use a smaller model, or a larger machine"):
        refuse(found._replace(machine=Machine(1000, int(disk) + 1, None)))


def test_a_model_that_is_not_at_hand_is_said_and_not_fetched(place, tmp_path, capsys):
    recipe = changed(place, tmp_path, 'model"', 'nowhere"')
    found = plan(recipe, out=tmp_path / "out")
    assert [estimate.needs for estimate in found.estimates] == [None] * len(VERBS)
    assert _run(["plan", str(recipe), "--out", str(tmp_path / "out")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not at hand" in out and "what is not known" in out


def test_the_command_prints_the_table_and_then_refuses(place, tmp_path, capsys):
    assert _run(["plan", str(place / "small.toml"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for word in (*VERBS, "memory GB", "GFLOP/s"):
        assert word in out
    recipe = changed(place, tmp_path, "d_sae = 48", "d_sae = 4_000_000_000")
    assert _run(["plan", str(recipe), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "interpret" in printed.out and "Lower d_sae to at most" in printed.err
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_planned_as_one_stage_with_all_its_dictionaries(place, tmp_path):
    recipe = changed(place, tmp_path, "k = 4\n", "")
    one = {e.stage.label: e for e in plan(recipe, out=tmp_path / "out").estimates}
    recipe.write_text(recipe.read_text().replace("epochs = 3", "epochs = 3\nsweep = {k = [2, 4, 8]}"))
    swept = plan(recipe, out=tmp_path / "out")
    many = {e.stage.label: e for e in swept.estimates}
    for label in ("evaluate k2", "export k8"):
        assert many[label].needs == one[label.split()[0]].needs
    # 4 latents of a token go to disk to be paired, not the default's 32
    few, default = many["interpret k4"].needs, one["interpret"].needs
    assert few.memory == default.memory and few.disk < default.disk
    assert many["train"].needs.disk == pytest.approx(3 * one["train"].needs.disk)
    assert many["train"].needs.memory > one["train"].needs.memory
    assert {knob.name for knob in many["train"].knobs} == {"d_sae", "batch_size", "the dictionaries"}


def test_training_on_a_gpu_takes_the_memory_of_the_gpu(place, tmp_path):
    """A device of a stated size: what is over it is refused with a width that fits."""

    def planned(devices: str, d_sae: int = 48):
        recipe = changed(place, tmp_path, "k = 4\n", "")
        text = recipe.read_text().replace("d_sae = 48", f"d_sae = {d_sae}")
        lines = f"epochs = 3\ndevices = [{devices}]\nsweep = {{k = [2, 4, 8]}}"
        recipe.write_text(text.replace("epochs = 3", lines))
        found = plan(recipe, out=tmp_path / "out")
        return found, next(e for e in found.estimates if e.stage.verb == "train")

    _, on_cpu = planned("")
    found, on_one = planned('"cuda"', 4_000_000)
    _, on_two = planned('"cuda:0", "cuda:1"', 4_000_000)
    _, wide_on_cpu = planned("", 4_000_000)
    assert on_cpu.needs.gpu == 0 and on_cpu.seconds_at is not None and on_one.seconds_at is None
    weights = 4.0 * 4_000_000 * (2 * 32 + 1)  # of one of three: 32 features each way, and a bias
    assert on_one.needs.gpu == pytest.approx(12 * weights, rel=0.1) and on_one.needs.gpu > 12 * weights
    assert on_two.needs.gpu == pytest.approx(on_one.needs.gpu * 2 / 3, rel=0.2), (
        "two of three on the fuller one"
    )
    assert on_one.needs.memory < wide_on_cpu.needs.memory
    host = Machine(10**13, 10**13, int(on_one.needs.gpu) + 1)
    refuse(found._replace(machine=host))
    with pytest.raises(ResourceError, match=r"train must fit in the memory of the GPU that is free") as error:
        refuse(found._replace(machine=host._replace(gpu=10**10)))
    fits = int(re.search(r"d_sae to at most ([\d,]+)", str(error.value)).group(1).replace(",", ""))
    assert planned('"cuda"', fits)[1].needs.gpu <= 10**10 < planned('"cuda"', int(1.2 * fits))[1].needs.gpu


def test_a_crosscoder_whose_norms_are_taken_site_by_site_is_planned(place, tmp_path):
    names = '["resid_post.0", "mlp_out.1"]'
    recipe = changed(place, tmp_path, 'hookpoints = ["resid_post.0"]', f"hookpoints = {names}")
    text = recipe.read_text().replace("k = 4\n", 'k = 4\nsite_norms = "l1"\n', 1)
    recipe.write_text(text.replace("epochs = 3", f"epochs = 3\ninputs = {names}"))
    found = estimates(stages(read_recipe(recipe), tmp_path / "out")).stages
    assert found[1].stage.verb == "train" and found[1].needs is not None


def test_a_comparison_of_directions_needs_no_model(place, tmp_path):
    recipe = changed(place, tmp_path, "k = 4\n", "")
    text = recipe.read_text().replace("epochs = 3", "epochs = 3\nsweep = {k = [2, 4]}") + "[compare]\n"
    recipe.write_text(text)
    whole = plan(recipe, out=tmp_path / "out")
    recipe.write_text(text + "directions_only = true\n")
    bare = plan(recipe, out=tmp_path / "out")
    ours, theirs = bare.estimates[-1], whole.estimates[-1]
    assert ours.stage.verb == theirs.stage.verb == "compare" and not ours.knobs and theirs.knobs
    # imports alone, not those of a language model
    assert 0 < bare.seconds(ours) < 5 < whole.seconds(theirs)
    assert ours.needs is not None and ours.needs.memory > 0 and ours.needs.gpu == 0


def test_patching_is_planned_by_its_arms_pairs_and_orders(place, tmp_path):
    text = (place / "small.toml").read_text()
    rate = Speed(1e11, 1e11, 1e11, 1e10)

    def seconds(options: str) -> float:
        (tmp_path / "patched.toml").write_text(f"{text}[patch]\n{options}")
        found = plan(tmp_path / "patched.toml", out=tmp_path / "out").estimates[-1]
        assert (
            found.stage.verb == "patch" and found.needs.memory > costs.BASE and found.seconds_at is not None
        )
        return found.seconds_at(rate) - costs.MODEL_START

    one = seconds('baselines = []\norders = ["attribution"]\n')
    assert seconds('baselines = []\norders = ["attribution"]\nn_pairs = 500\n') == pytest.approx(10 * one)
    assert seconds('baselines = []\norders = ["attribution", "random"]\n') == pytest.approx(2 * one)
    assert seconds('baselines = ["random_rotation"]\norders = ["attribution"]\n') == pytest.approx(2 * one)
    assert seconds('baselines = []\norders = ["acdc"]\nacdc_limit = 11\nn_thresholds = 5\n') == pytest.approx(
        2 * one
    )
    assert seconds('baselines = ["ica"]\norders = ["attribution"]\n') > 2 * one, "which is fitted first"


@pytest.mark.parametrize("rest", ["", "directions_only = true\n"])
def test_dictionaries_of_other_widths_are_not_compared_after_all_training(place, tmp_path, rest):
    recipe = changed(place, tmp_path, '"resid_post.0"]', '"resid_post.0", "mlp_out.1"]')
    text = recipe.read_text().replace("[evaluate]\nn_tokens = 1500\nn_bootstrap = 50\n", "")
    one = 'kind = "topk"\nd_sae = 48\nk = 4\n'
    wide = '[train.both]\ninputs = ["resid_post.0", "mlp_out.1"]\n[train.both.architecture]\n' + one
    narrow = '[train.one]\ninputs = ["mlp_out.1"]\n[train.one.architecture]\n' + one
    text = text.replace("[train.architecture]\n" + one, narrow + wide) + "[compare]\n" + rest
    recipe.write_text(text)
    with pytest.raises(
        ShapeError, match=r"\[compare\] must write outputs of one width, (\d+) like one, got (\d+) of both"
    ):
        plan(recipe, out=tmp_path / "out")
    recipe.write_text(text.replace("[compare]", '[compare]\ndictionaries = ["one", "both"]'))
    with pytest.raises(ShapeError, match=r"Give the one a \[compare.NAME\] table of its own"):
        run(recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def products(kind: str, l0: int, start: float | None = None, settles: float = 0.0) -> float:
    """A planned step over an encoder product, at the shapes and on the machine of docs/benchmarks.md."""
    speed = Speed(encoder=370e9, model=381e9, dense=168e9, bandwidth=31e9)
    size = costs.Dictionary(kind, 512, 512, 8192, 8192 * 1025 + 512, l0, start, settles)
    one, two = (costs.train_seconds([size], speed, 4096, n) for n in (1, 2))
    step = two - one
    return step / (4096 * size.product / speed.encoder)


@pytest.mark.parametrize(
    ("kind", "l0", "measured"), [("jumprelu", 30, 1.55), ("relu", 91, 1.96), ("relu", 320, 3.1)]
)
def test_a_penalised_step_is_planned_as_what_its_sparse_path_was_measured_at(kind, l0, measured):
    assert products(kind, l0) == pytest.approx(measured, rel=0.25)


def test_a_run_that_starts_dense_is_planned_dense_until_few_are_active():
    dense, sparse = products("relu", 4096), products("relu", 64)
    assert dense == pytest.approx(30.9, rel=0.1), "measured with half of the latents active"
    settling = products("relu", 64, start=4096.0, settles=0.3)
    share = 0.3 * 0.55  # l0 falls by 2^6 by equal factors; the first 3.32 of these 6 doublings are above 5%
    assert settling == pytest.approx(share * dense + (1 - share) * sparse, rel=0.1)
    assert products("relu", 64, start=205.0, settles=0.3) < 1.2 * sparse, "biases that start sparse"
    assert products("lista", 64) > 15, "no sparse path: eight float32 products"


def test_what_a_plan_takes_as_the_start_is_what_the_options_say():
    def start(kind: str, **options) -> float:
        from sememe import dictionaries

        config = dictionaries.TRAINABLE[kind].config_class(d_sae=2048, **options)
        return dictionaries.build(config, 8, 8).start_l0()

    assert start("relu") == 0.025 * 2048
    assert start("relu", start_density=0.0) == 1024
    assert start("jumprelu", target_l0=10.0) == 40
    assert start("gated", start_density=0.1) == pytest.approx(204.8)


SPEED = Speed(encoder=370e9, model=381e9, dense=168e9, bandwidth=31e9)


def estimated(place, tmp_path, more: str) -> dict[str, tuple[costs.Bytes, float]]:
    """Stages of the recipe with other tables at its end: what each needs, and its seconds."""
    recipe = tmp_path / "more.toml"
    recipe.write_text((place / "small.toml").read_text().replace("n_bootstrap = 50\n", more))
    found = estimates(stages(read_recipe(recipe), tmp_path / "out")).stages
    return {e.stage.label: (e.needs, e.seconds_at(SPEED)) for e in found}


def test_a_fit_that_holds_its_rows_is_planned_with_their_dense_codes_and_a_time(place, tmp_path):
    fits = [
        'ksvd = {baseline = {kind = "ksvd", d_sae = 4096, k = 4, n_iterations = 10}}',
        'long = {baseline = {kind = "ksvd", d_sae = 4096, k = 4, n_iterations = 20}}',
        'one_batch = {n_rows = 500, baseline = {kind = "ksvd", d_sae = 4096, k = 4, n_iterations = 10}}',
        'rica = {baseline = {kind = "rica", d_sae = 4096}}',
        'pca = {baseline = {kind = "pca"}}',
    ]
    found = estimated(place, tmp_path, "[fit]\n" + "\n".join(fits) + "\n")
    all_rows, few_rows = found["fit ksvd"][0].memory, found["fit one_batch"][0].memory
    n_rows = (6000 // 32 + 1) * 31
    assert all_rows - few_rows >= 2 * 4 * (n_rows - 500) * 4096, (
        "K-SVD: twice a number of every row and direction"
    )
    assert found["fit long"][0] == found["fit ksvd"][0]
    assert found["fit long"][1] - costs.START == pytest.approx(
        2 * (found["fit ksvd"][1] - costs.START), rel=0.01
    )
    assert costs.START <= found["fit pca"][1] < found["fit rica"][1]


def test_rows_that_are_streamed_are_not_planned_as_held():
    one, many = (fitting.streamed_bytes(512, 4096, n, 0.0).memory for n in (8192, 2**20))
    assert one == many
    over = SparseCoderConfig()
    held = fitting.held_bytes(over, 512, 4096, 2**20, 0.0).memory
    learned = fitting.held_bytes(KSVDConfig(d_sae=4096, k=4), 512, 4096, 2**20, 0.0).memory
    assert held - many > 2**20 * 512 * 4 and learned - held > 2 * 4 * 2**20 * 4096


def test_rows_that_nulls_are_fitted_on_are_planned(place, tmp_path):
    """24 bytes for each feature of a shard's rows; and as long as a forward takes, where there is no store."""
    few, many = (
        estimated(place, tmp_path, f"n_fit_rows = {n}\n")["evaluate"] for n in (5_000, 1_000_000_000)
    )
    n_rows = (6000 // 32 + 1) * 31
    assert many[0].memory - few[0].memory == pytest.approx(24 * 32 * (n_rows - 5000))
    outline_, size = (
        outline(ModelConfig(model=str(place / "model"))),
        costs.Dictionary("topk", 32, 32, 64, 4192, 4),
    )
    stored, forwards = (
        costs.evaluate_seconds(
            outline_, size, SPEED, 1000, costs.Arms(1), 1, 32, costs.FitRows(10**6, 512, n)
        )
        for n in (0, 1)
    )
    assert forwards - stored > 10**6 * costs.TEXT_SECONDS


def test_a_run_pays_for_its_reading_its_log_and_its_checkpoints():
    size = costs.Dictionary("topk", 512, 512, 8192, 8192 * 1025 + 512, 32)
    rarely, often = (costs.train_seconds([size], SPEED, 4096, 10**4, n) for n in (10**6, 1))
    assert often - rarely == pytest.approx(10**4 * 4096 * 40 * 512 / 31e9, rel=0.01)
    once, thrice = (costs.reading_seconds(1e9, n, SPEED) for n in (1, 3))
    assert once > 1 and thrice - once == pytest.approx(2 * 6e9 / 31e9)
    assert costs.checkpoint_seconds([size], SPEED, 600, 60) == pytest.approx(
        2 * costs.checkpoint_seconds([size], SPEED, 600, 120)
    )


def test_every_arm_of_an_evaluation_is_planned(place, tmp_path):
    def evaluated(more: str) -> tuple[float, float]:
        nulls = "" if "nulls" in more else "nulls = []\n"
        few = "n_fit_rows = 16\n"  # so that the pass is what takes most
        needs, seconds = estimated(place, tmp_path, nulls + few + more)["evaluate"]
        return needs.memory - costs.BASE, seconds

    bare = evaluated("")
    one = evaluated("leave_out_above = [0.1]\n")
    arm = [after - before for after, before in zip(one, bare, strict=True)]
    assert min(arm) > 0
    dictionary = 4.0 * (48 * (2 * 32 + 1) + 32)
    for more, n_arms, held in (
        ("top_latents = [4, 8]\n", 4, 0.0),
        ("within = 0.01\n", 2 * 6, 0.0),  # 1, 2, 4, 8, 16, 32 of 48
        ('matched_in = "other"\n', 2, dictionary),
        ('nulls = ["pca"]\n', 1, dictionary),
    ):
        found = evaluated(more)
        assert found[1] - bare[1] == pytest.approx(n_arms * arm[1], rel=1e-6), more
        assert found[0] - bare[0] == pytest.approx(n_arms * arm[0] + held, abs=300), more


def test_a_twin_is_planned_as_another_model_beside_the_first(place, tmp_path):
    lm = outline(ModelConfig(model=str(place / "model"), dtype="float32"))
    twins, few = 'twins = ["one", "another"]\n', "nulls = []\nn_fit_rows = 16\n"
    none, both = (estimated(place, tmp_path, few + more)["evaluate"] for more in ("", twins))
    assert both[0].memory - none[0].memory > lm.n_bytes
    assert both[1] - none[1] > costs.MODEL_START
    swept = f"[compare]\n{few}"
    fits = '[fit.pca]\nbaseline = {kind = "pca"}\n'
    none, both = (estimated(place, tmp_path, fits + swept + more)["compare"] for more in ("", twins))
    assert both[0].memory - none[0].memory > lm.n_bytes
    assert both[1] - none[1] > costs.MODEL_START
