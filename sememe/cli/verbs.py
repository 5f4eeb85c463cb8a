"""What each command does when it is called: imports its verb, makes its flags, prints its result.

Those whose first word is a kind (`sememe train topk`) are in `kinds.py`, experiments on toys in `toys.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sememe.cli import kinds
from sememe.cli.flags import command
from sememe.cli.kinds import FRESH, say
from sememe.errors import ArtifactError, ConfigError, nearest

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    """Commands are made when asked for, so that only their own verb is imported."""
    if name in _MAKERS:
        return _MAKERS[name]()
    raise AttributeError(f"sememe.cli.verbs has no command {name!r}; {nearest(name, _MAKERS)}")


def _harvest() -> Any:
    from sememe.harvest import HarvestConfig, harvest

    def verb(config: HarvestConfig, fresh: bool = False) -> None:
        store = harvest(config, fresh=fresh)
        say(f"store of {store.info.n_rows:,} rows", config.out)

    return command(
        HarvestConfig, verb, extra=FRESH, doc="Run a language model over a text and store its activations."
    )


def _toy() -> Any:
    from sememe.cli.toys import toy_app

    return toy_app()


def _evaluate() -> Any:
    from sememe.evaluate import EvaluateConfig, evaluate

    def verb(config: EvaluateConfig, fresh: bool = False) -> None:
        evaluate(config, fresh=fresh)
        from sememe.run import print_report

        print_report(config.out)

    return command(
        EvaluateConfig,
        verb,
        positional=("dictionary",),
        extra=FRESH,
        doc="Measure a dictionary on held-out documents.",
    )


def _about_dictionaries(config: Any, verb: Callable[..., Any], name: str, doc: str) -> Any:
    """A command about several dictionaries, which prints what is in its folder and says where the page is."""

    def ask(config: Any, fresh: bool = False) -> None:
        made = verb(config, fresh=fresh)
        import sememe.run

        getattr(sememe.run, f"print_{name}")(made.path)
        say(name, made.path / f"{name}.html")

    return command(config, ask, positional=("dictionaries",), extra=FRESH, doc=doc)


def _compare() -> Any:
    from sememe.compare import CompareConfig, compare

    doc = "Compare dictionaries on the same documents, and by their directions."
    return _about_dictionaries(CompareConfig, compare, "comparison", doc)


def _geometry() -> Any:
    from sememe.geometry import GeometryConfig, geometry

    doc = "Ask where latents lie: among neurons, in other dictionaries, over training."
    return _about_dictionaries(GeometryConfig, geometry, "geometry", doc)


def _report() -> Any:
    from sememe.report import ReportConfig, report

    def verb(config: ReportConfig, fresh: bool = False) -> None:
        report(config, fresh=fresh)
        say("page", config.out)

    return command(
        ReportConfig,
        verb,
        positional=("reports",),
        extra=FRESH,
        doc="Draw one page from one or several reports.",
    )


def _lens() -> Any:
    from sememe.lens import LensConfig, lens
    from sememe.run import print_lens

    def verb(config: LensConfig, fresh: bool = False) -> None:
        lens(config, fresh=fresh)
        print_lens(config.out)
        say("lens", config.out)

    return command(
        LensConfig,
        verb,
        extra=FRESH,
        doc="Train a tuned lens: what a model would say if it stopped at a layer.",
    )


def _interpret() -> Any:
    from sememe.interpret import InterpretConfig, interpret_all

    def verb(config: InterpretConfig, fresh: bool = False) -> None:
        for atlas in interpret_all(config, fresh=fresh).values():
            atlas.close()
            say("atlas", atlas.artifact.place)

    return command(
        InterpretConfig,
        verb,
        positional=("dictionaries",),
        extra=FRESH,
        doc="Make an atlas: where each latent fires, and what it writes.",
    )


def _explain() -> Any:
    from sememe.explain import ExplainConfig, explain, preview

    def verb(config: ExplainConfig, fresh: bool = False, dry_run: bool = False) -> None:
        if dry_run:
            cost = preview(config)
            price = "price not known" if cost.price is None else f"price {cost.price:,.4g}"
            print(
                f"at most {cost.n_calls:,} calls, up to {cost.n_prompt_tokens:,} tokens of prompts and "
                f"{cost.n_completion_tokens:,} of answers, {price}; {cost.n_from_cache:,} of {cost.n_questions:,} "
                "questions need not be asked"
            )
            return
        found = explain(config, fresh=fresh)
        print(found.page())
        say("explanations", config.out)

    return command(
        ExplainConfig,
        verb,
        positional=("atlas",),
        extra=FRESH
        | {
            "dry_run": (
                bool,
                False,
                "Ask nothing: say how many calls, tokens and how much money it would take.",
            )
        },
        doc="Say in words what latents stand for, and score the words.",
    )


def _effects() -> Any:
    from sememe.effects import EffectsConfig, effects

    def verb(config: EffectsConfig, fresh: bool = False) -> None:
        found = effects(config, fresh=fresh)
        for name, value in found.summary.items():
            if value is not None:
                print(f"{name.replace('_', ' '):<20} {value:>10{',' if isinstance(value, int) else '.4f'}}")
        say("effects", config.out)

    return command(
        EffectsConfig,
        verb,
        positional=("atlas",),
        extra=FRESH,
        doc="Measure what each latent does to the predictions, and what made it fire.",
    )


def _prompt() -> Any:
    from sememe.prompt import PromptConfig, print_prompt, prompt

    def verb(config: PromptConfig) -> None:
        print_prompt(prompt(config))
        for name, path in (("rows", config.out), ("page", config.page)):
            if path is not None:
                say(name, path)

    return command(
        PromptConfig,
        verb,
        positional=("prompt",),
        doc="Show which latents fire on a text, how strongly for them, and what each does to the loss.",
    )


def _prompts() -> Any:
    from sememe.prompt import PromptsConfig, prompts

    def verb(config: PromptsConfig, fresh: bool = False) -> None:
        prompts(config, fresh=fresh)
        say("prompts", config.out)

    return command(
        PromptsConfig,
        verb,
        positional=("dictionary",),
        extra=FRESH,
        doc="Run some twenty chosen texts through a dictionary: every latent that fires, token by token.",
    )


def _circuit() -> Any:
    from sememe.circuit import CircuitConfig, circuit

    def verb(config: CircuitConfig, fresh: bool = False) -> None:
        made = circuit(config, fresh=fresh)
        print(made.file("circuit.md").read_text(encoding="utf-8"))
        say("circuit", config.out)

    return command(
        CircuitConfig,
        verb,
        positional=("prompt", "dictionaries"),
        extra=FRESH,
        doc="Draw what feeds what on a prompt: the attribution graph through transcoders.",
    )


def _browse() -> Any:
    from sememe import browse
    from sememe.browse import BrowseConfig, ExportConfig, export
    from sememe.browse.inputs import Inputs

    def verb(
        config: BrowseConfig,
        export_to: Path | None = None,
        fresh: bool = False,
        live: bool = False,
        model: str | None = None,
    ) -> None:
        if model is not None and not live:
            raise ConfigError("--model must go with --live", model, "Drop it, or pass --live.")
        if export_to is None:
            if fresh:
                raise ConfigError("--fresh must go with --export", "none", "Drop it, or pass --export.")
            browse.browse(config, live=_live(config, model) if live else None)
            return
        for name, value in [("live", live or None), *_only_served(config)]:
            if value is not None:
                raise ConfigError(
                    f"--{name} must be left out with --export, which serves nothing",
                    value,
                    "Drop one of them.",
                )
        shown = {name: getattr(config, name) for name in Inputs.model_fields}
        export(ExportConfig.build({**shown, "out": export_to}), fresh=fresh)
        say("site", export_to / "index.html")

    return command(
        BrowseConfig,
        verb,
        positional=("atlas", "against"),
        extra={
            "export_to": (
                Annotated[Path | None, Parameter(name="--export")],
                None,
                "Write a static site into this folder instead of serving; it opens from disk.",
            ),
            "fresh": (bool, False, "With --export: replace whatever stands there."),
            "live": (bool, False, "Load the model in a process of its own, to try texts and to steer."),
            "model": (str | None, None, "With --live: the model, if it is not where it was for the atlas."),
        },
        doc="Look at an atlas in the web browser, or export it as a site.",
    )


def _only_served(config: Any) -> list[tuple[str, Any]]:
    """Options of a page that is served and that a site has no use for, where they were given."""
    names = ("host", "port", "open", "write", "dictionary")
    defaults = type(config).model_fields
    return [(n, v) for n in names if (v := getattr(config, n)) != defaults[n].default]


def _live(config: Any, model: str | None) -> Any:
    """The child process that holds the model: the browser's server never loads torch."""
    import contextlib
    import json
    import sys

    from sememe.atlas import open_atlas
    from sememe.browse import Child
    from sememe.browse.compared import dictionary_folder

    with contextlib.ExitStack() as stack:
        try:
            atlas = stack.enter_context(contextlib.closing(open_atlas(config.atlas)))
        except ArtifactError:
            return None  # the browser says what is wrong, on a page if it can: a model has nothing to answer there
        dictionary = dictionary_folder(atlas, config.dictionary)
        null = atlas.artifact.meta["parents"].get("dictionary") is None
    if dictionary is None:
        raise ConfigError(
            "--live must know the folder of the atlas's dictionary",
            "a null's atlas that does not keep its own"
            if null
            else "none where it was when the atlas was made",
            "Run `sememe interpret` again, which keeps it." if null else "Name it with --dictionary.",
        )
    about = {"atlas": str(config.atlas), "dictionary": str(dictionary), "model": model}
    child = Child([sys.executable, "-m", "sememe.live", json.dumps(about)])
    child.start()
    return child


def _simple(module: str, name: str, doc: str, positional: tuple[str, ...] = ()) -> Any:
    import importlib

    room = importlib.import_module(f"sememe.{module}")
    config = getattr(room, f"{name.capitalize()}Config")
    function = getattr(room, name)

    def verb(config: Any, fresh: bool = False) -> None:
        function(config, fresh=fresh)
        say(name, config.out)

    return command(config, verb, positional=positional, extra=FRESH, doc=doc)


def _trace() -> Any:
    from sememe.trace import TraceConfig, trace

    def verb(config: TraceConfig, fresh: bool = False) -> None:
        found = trace(config, fresh=fresh)
        for name, check in found.extra["checks"].items():
            if check["correlation"] is not None:
                about = f"{name.replace('_', ' ')}, {check['n']} really ablated:"
                print(f"{about:<40} correlation {check['correlation']:.3f}, slope {check['slope']:.3f}")
        say("graph", config.out)

    return command(
        TraceConfig,
        verb,
        positional=("dictionaries",),
        extra=FRESH,
        doc="Trace a number (a logit difference, a loss, a latent's activation) back to latents.",
    )


def _run() -> Any:
    from sememe.run import run

    def run_recipe(
        recipe: Path,
        *,
        out: Annotated[
            Path | None, Parameter(help="Folder for the results; artifacts/NAME[/SCALE] if not given.")
        ] = None,
        scale: Annotated[
            str | None, Parameter(help="Which of the recipe's scales; its first one if not given.")
        ] = None,
        fresh: Annotated[bool, Parameter(help="Make everything again.", negative="")] = False,
    ) -> None:
        """Run a recipe: all its verbs in order, each skipped when its result is there.

        Parameters
        ----------
        recipe
            A .toml file, see runs/.
        """
        run(recipe, out=out, fresh=fresh, scale=scale)

    return run_recipe


def _plan() -> Any:
    from sememe.plan import plan, print_plan, refuse

    def plan_recipe(
        recipe: Path,
        *,
        out: Annotated[
            Path | None, Parameter(help="Folder for the results; artifacts/NAME[/SCALE] if not given.")
        ] = None,
        scale: Annotated[
            str | None, Parameter(help="Which of the recipe's scales; its first one if not given.")
        ] = None,
        fresh: Annotated[bool, Parameter(help="Count everything as to be made again.", negative="")] = False,
    ) -> None:
        """Say what a recipe will take: memory, disk and time of each stage. Starts nothing.

        Parameters
        ----------
        recipe
            A .toml file, see runs/.
        """
        found = plan(recipe, out=out, fresh=fresh, scale=scale)
        print_plan(found)
        refuse(found)

    return plan_recipe


def _models() -> Any:
    def models(
        *,
        fetch: Annotated[tuple[str, ...], Parameter(help="Names to fetch now.", negative="")] = (),
    ) -> None:
        """List the embedded language models and corpora; fetch one."""
        from sememe import lm, text

        for name in fetch:
            if name in lm.EMBEDDED:
                lm.fetch(name)
            else:
                text.fetch(text.TextConfig(corpus=(name,)))
        for name, about in {**lm.EMBEDDED, **text.CORPORA}.items():
            print(f"{name:<18} {about}")

    return models


_MAKERS: dict[str, Callable[[], Any]] = {
    "harvest": _harvest,
    "train_app": kinds.train_app,
    "fit_app": kinds.fit_app,
    "evaluate": _evaluate,
    "compare": _compare,
    "geometry": _geometry,
    "report": _report,
    "lens": _lens,
    "interpret": _interpret,
    "explain": _explain,
    "effects": _effects,
    "prompt": _prompt,
    "prompts": _prompts,
    "circuit": _circuit,
    "browse": _browse,
    "plan_recipe": _plan,
    "run_recipe": _run,
    "models": _models,
    "intervene": lambda: _simple(
        "intervene", "intervene", "Change latents and see what the model says.", ("dictionary",)
    ),
    "trace": _trace,
    "patch": lambda: _simple(
        "patch",
        "patch",
        "Ask how few latents, taken from one run of the model, make another say the same.",
        ("dictionaries",),
    ),
    "scrub": lambda: _simple(
        "scrub",
        "scrub",
        "Test a hypothesised circuit by resampling ablation; measure what latents do to later ones.",
        ("dictionaries",),
    ),
    "concepts": lambda: _simple(
        "concepts",
        "concepts",
        "Ask what latents know of labels: probes, ablations, absorption.",
        ("dictionary",),
    ),
    "erase": lambda: _simple(
        "erase", "erase", "Take a labelled concept out of the activations.", ("dictionary",)
    ),
    "steer": lambda: _simple(
        "steer", "steer", "Turn latents up while the model writes: dose and response.", ("dictionary",)
    ),
    "toy": _toy,
    "pretrain": kinds.pretrain_app,
    "convert": lambda: _simple(
        "convert", "convert", "Read and write other tools' dictionaries.", ("source",)
    ),
    "publish": lambda: _simple(
        "publish", "publish", "Gather results into a folder for a hub.", ("dictionary",)
    ),
}
