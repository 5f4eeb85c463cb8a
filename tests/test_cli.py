"""The command line: quick, torch-free until a verb is called, one short flag per option, errors on one line."""

import subprocess
import sys

import pytest

from sememe.cli import VERBS, _run, app
from sememe.config import Config
from sememe.options import changed, flags_of

CONFIGS = {
    "harvest": "HarvestConfig",
    "train": "TrainConfig",
    "fit": "FitConfig",
    "evaluate": "EvaluateConfig",
    "compare": "CompareConfig",
    "concepts": "ConceptsConfig",
    "geometry": "GeometryConfig",
    "report": "ReportConfig",
    "lens": "LensConfig",
    "interpret": "InterpretConfig",
    "explain": "ExplainConfig",
    "effects": "EffectsConfig",
    "prompt": "PromptConfig",
    "circuit": "CircuitConfig",
    "browse": "BrowseConfig",
    "intervene": "InterveneConfig",
    "trace": "TraceConfig",
    "patch": "PatchConfig",
    "scrub": "ScrubConfig",
    "toy": "ToyConfig",
    "pretrain": "PretrainConfig",
    "convert": "ConvertConfig",
    "publish": "PublishConfig",
}


def test_help_is_quick_and_never_imports_torch():
    code = (
        "import sys\nfrom sememe.cli import app\n"
        "app(['--help'], result_action='return_value')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'duckdb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb, capsys):
    assert _run([verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(CONFIGS))
def test_flags_are_unique_and_documented(verb):
    import importlib

    config = getattr(importlib.import_module(f"sememe.{verb}"), CONFIGS[verb])
    flags = flags_of(config)
    names = [flag.name for flag in flags]
    assert len(names) == len(set(names))
    for flag in flags:
        assert flag.help, f"{verb}: --{flag.name} has no docstring under its field"


def test_short_flags_reach_deep_options(tmp_path, capsys):
    assert _run(["train", "topk", "--k", "5000", "--d-sae", "10", "--store", str(tmp_path / "no")]) == 2
    assert "k must be in [1, d_sae=10], got 5000. Lower k or raise d_sae." in capsys.readouterr().err
    assert _run(["train", "topk", "--k", "5", "--d-sae", "10", "--store", str(tmp_path / "no")]) == 1
    assert "must be a finished store, got nothing there" in capsys.readouterr().err


def test_a_config_that_may_be_left_out_is_there_when_one_of_its_options_is_given():
    from sememe.cli.flags import command
    from sememe.evaluate import EvaluateConfig

    evaluate = command(EvaluateConfig, lambda config: config, positional=("dictionary",), doc="Evaluate.")
    assert evaluate("d").policy is None
    policy = evaluate("d", context_length=64, bos=True).policy
    assert (policy.context_length, policy.bos, policy.drop_positions) == (64, True, 1)
    assert dict(changed(evaluate("d", context_length=64), "policy")) == {"context_length": "64"}
    assert changed(evaluate("d"), "policy") == []


def test_nested_names_get_their_parents_name_when_taken():
    class Inner(Config):
        seed: int = 0
        """Inner."""
        depth: int = 1
        """Depth."""

    class Outer(Config):
        seed: int = 0
        """Outer."""
        inner: Inner = Inner()
        """In."""

    assert {flag.name: flag.path for flag in flags_of(Outer)} == {
        "seed": ("seed",),
        "inner_seed": ("inner", "seed"),
        "depth": ("inner", "depth"),
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["havrest"], 2, "a command must be one of sememe's, got 'havrest'. Did you mean 'harvest'?"),
        (["harvest", "--n-token", "5"], 2, "every option of `sememe harvest` must be known, got --n-token"),
        (["harvest", "--n-tokens", "many"], 2, "--n-tokens must be a valid int, got 'many'."),
        (["harvest", "--n-tokens"], 2, "--n-tokens must have a value, got none."),
        (["harvest", "--n-tokens", "0"], 2, "n_tokens must be >= 1, got 0. Raise it."),
        (["browse", "x", "--port", "99999"], 2, "port must be <= 65535, got 99999. Lower it."),
        (
            ["harvest", "--split", "tran"],
            2,
            "--split must be one of train, heldout, all, got 'tran'. Did you mean 'train'?",
        ),
        (["train", "tpok"], 2, "must go with one of its kinds, got 'tpok'. Did you mean 'topk'"),
        (["train", "topk", "--warmup", "0.9"], 2, "warmup + decay must be <= 1, got 0.9 + 0.3. Lower one of"),
        (["train", "topk", "--live", "--store", "s"], 2, "store must be left out when live, got s."),
        (["train", "topk", "--l1-coefficient", "1"], 2, "--l1-coefficient"),
        (["train", "topk", "--buffer-mb", "7"], 2, "buffer_mb must be left out unless live is set, got 7"),
        (
            ["train", "topk", "--model", "a/b"],
            2,
            "model must be left out unless live is set, got a/b. A store",
        ),
        (
            ["train", "topk", "--context-length", "64"],
            2,
            "context_length must be left out unless live is set, got 64.",
        ),
        (
            ["interpret", "d", "--store", "s", "--corpus", "a.txt", "b.txt"],
            2,
            "corpus must be left out when store is given, got a.txt b.txt.",
        ),
        (["browse", "/nowhere"], 1, "/nowhere"),
        (["run", "/nowhere.toml"], 2, "a recipe must be a file that exists, got /nowhere.toml"),
        (["harvest", "--model", "smollm2-135n", "--n-tokens", "5"], 1, "smollm2-135m"),
        (["harvest", "--corpus", "defualt"], 1, "default"),
    ],
)
def test_errors_are_one_line_with_the_right_code(arguments, code, message, capsys):
    assert _run(arguments) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("sememe: ")]
    assert len(lines) == 1 and message in lines[0], error


def test_completion_can_be_installed():
    assert "complet" in app.generate_completion(shell="bash").lower()


def test_a_sweep_from_the_command_line(tmp_path, capsys):
    common = [
        "toy",
        "topk",
        "--n-tokens",
        "4096",
        "--d-sae",
        "32",
        "--batch-size",
        "256",
        "--planted-d",
        "16",
    ]
    sweep = ["--sweep", "k=2,3", "--sweep", "seed=0,1", "--out", str(tmp_path / "s")]
    assert _run([*common, *sweep]) == 0
    out = capsys.readouterr().out
    for name in ("k2-seed0", "k2-seed1", "k3-seed0", "k3-seed1"):
        assert (
            tmp_path / "s" / name / "meta.json"
        ).is_file() and f"topk dictionary: {tmp_path}/s/{name}" in out
    assert out.count("recall (mmcs") == 4
    assert _run([*common, "--sweep", "ks=2,3", "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err.startswith(
        "sememe: a sweep must be over an option of a topk dictionary, got 'ks'. Did you mean 'k'"
    )


def test_ctrl_c_says_that_the_work_goes_on(monkeypatch, capsys):
    from sememe import artifact

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "load", interrupted)
    assert _run(["explain", "nowhere"]) == 130
    assert capsys.readouterr().err == "sememe: interrupted; the same command goes on where it was.\n"
