"""The commands whose first word is a kind, with the options of that kind alone: train, fit, toy, pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from sememe.cli.flags import command
from sememe.errors import ConfigError

__all__: list[str] = []

FRESH: dict[str, tuple[Any, Any, str]] = {"fresh": (bool, False, "Replace whatever stands at --out.")}


_MANY = Annotated[tuple[float, ...], Parameter(consume_multiple=True)]
GRID: dict[str, tuple[Any, Any, str]] = {
    "draw_grid": (
        Annotated[bool, Parameter(name="--grid")],
        False,
        "Train one for every penalty and size, and draw what each finds.",
    ),
    "penalties": (_MANY, (), "With --grid: weights of the mean activation over latents."),
    "ratios": (_MANY, (), "With --grid: latents per planted feature."),
}


def say(what: str, path: Path) -> None:
    """Where a result lies."""
    print(f"{what}: {path}")


def train_app() -> App:
    """An application with a command for every architecture."""
    from sememe.dictionaries import TRAINABLE
    from sememe.train import TrainConfig, train, train_sweep

    app = App(
        name="train", help="Train a dictionary; the architecture comes first: `sememe train topk --k 64`."
    )
    app.result_action = "return_value"

    def verb(config: TrainConfig, fresh: bool = False) -> None:
        kind = config.architecture.kind
        if config.sweep:
            sweep = train_sweep(config, fresh=fresh)
            for name in sweep.names:
                say(f"{kind} dictionary", sweep.path(name))
        else:
            train(config, fresh=fresh)
            say(f"{kind} dictionary", config.out)

    for kind, architecture in _architectures(TRAINABLE):
        doc = f"Train a {kind} dictionary."
        app.command(
            command(
                TrainConfig,
                verb,
                choices={"architecture": architecture},
                fixed={"architecture.kind": kind},
                extra=FRESH,
                doc=doc,
            ),
            name=kind,
        )
    return app


def fit_app() -> App:
    """An application with a command for every baseline."""
    from sememe.fit import KINDS, FitConfig, fit

    app = App(
        name="fit",
        help="Fit a baseline or a sparse coder to a store's rows; its kind comes first: `sememe fit pca`.",
    )
    app.result_action = "return_value"

    def verb(config: FitConfig, fresh: bool = False) -> None:
        fit(config, fresh=fresh)
        say(f"{config.baseline.kind} dictionary", config.out)

    for kind, options in KINDS.items():
        app.command(
            command(
                FitConfig,
                verb,
                choices={"baseline": options},
                fixed={"baseline.kind": kind},
                extra=FRESH,
                doc=f"Fit {kind} to a store's rows.",
            ),
            name=kind,
        )
    return app


def toy_app() -> App:
    """An application with a command for every architecture, on planted features."""
    from sememe.config import sha256_of
    from sememe.dictionaries import TRAINABLE, Dictionary
    from sememe.grid import GridConfig, grid
    from sememe.toy import PlantedSource, ToyConfig, absorption, recovery
    from sememe.train import TrainConfig, train, train_sweep

    app = App(
        name="toy", help="Train on planted features and see how many are found: `sememe toy topk --k 5`."
    )
    app.result_action = "return_value"

    def verb(
        config: TrainConfig,
        fresh: bool = False,
        draw_grid: bool = False,
        penalties: tuple[float, ...] = (),
        ratios: tuple[float, ...] = (),
        **options: Any,
    ) -> None:
        planted = ToyConfig.build({name.removeprefix("planted_"): value for name, value in options.items()})
        axes = {name: given for name, given in (("penalties", penalties), ("ratios", ratios)) if given}
        if draw_grid:
            made = grid(GridConfig(out=config.out, planted=planted, train=config, **axes), fresh=fresh)
            say("plots", made.path / "grid.svg")
            return
        for name, given in axes.items():
            raise ConfigError(
                f"--{name} must go with --grid", " ".join(map(str, given)), "Drop it, or pass --grid."
            )
        source = PlantedSource(planted)
        parents = {"planted": sha256_of(planted.resolved())}
        about = {"planted": planted.resolved()}
        if config.sweep:
            sweep = train_sweep(config, source=source, parents=parents, extra=about, fresh=fresh)
            for name in sweep.names:
                show(source, sweep.load(name))
                say(f"{config.architecture.kind} dictionary", sweep.path(name))
        else:
            show(source, train(config, source=source, parents=parents, extra=about, fresh=fresh))
            say(f"{config.architecture.kind} dictionary", config.out)

    def show(source: PlantedSource, dictionary: Dictionary) -> None:
        found = recovery(source.planted, dictionary)
        print(f"recall (mmcs planted -> learned)     {found.recall:.4f}")
        print(f"  of as many random directions       {found.random:.4f}")
        print(f"precision (mmcs learned -> planted)  {found.precision:.4f}")
        print(f"planted features found (> 0.9)       {found.found:.1%}")
        if source.planted.config.n_children:
            families = absorption(source.planted, dictionary)
            print(f"parents silent beside a child        {families.silent_with_child:.1%}")
            print(f"parents silent when alone            {families.silent_alone:.1%}")
            print(f"parents split into their children    {families.split:.1%}")

    planted_options = {
        f"planted_{name}": (field.annotation, field.default, field.description or "")
        for name, field in ToyConfig.model_fields.items()
    }
    for kind, architecture in _architectures(TRAINABLE):
        app.command(
            command(
                TrainConfig,
                verb,
                choices={"architecture": architecture},
                fixed={"architecture.kind": kind},
                extra=FRESH
                | planted_options
                | (GRID if "l1_coefficient" in architecture.model_fields else {}),
                doc=f"Train a {kind} dictionary on planted features.",
            ),
            name=kind,
        )
    return app


def pretrain_app() -> App:
    """An application with a command for each kind of blocks."""
    from sememe.lm.build import GPT2Shape, LlamaShape
    from sememe.pretrain import PretrainConfig, pretrain

    app = App(
        name="pretrain", help="Train a small transformer; its blocks come first: `sememe pretrain gpt2`."
    )
    app.result_action = "return_value"

    def verb(config: PretrainConfig, fresh: bool = False) -> None:
        results = pretrain(config, fresh=fresh).extra["results"]
        for name in ("validation_loss", "bigram_loss", "unigram_loss"):
            print(f"{name.replace('_', ' '):<16} {results[name]:.4f} nats per token")
        say(f"model of {results['n_parameters']:,} parameters", config.out)

    for kind, shape in (("gpt2", GPT2Shape), ("llama", LlamaShape)):
        app.command(
            command(
                PretrainConfig,
                verb,
                choices={"architecture": shape},
                fixed={"architecture.kind": kind},
                extra=FRESH,
                doc=f"Train a small transformer with {'GPT-2' if kind == 'gpt2' else 'Llama'} blocks.",
            ),
            name=kind,
        )
    return app


def _architectures(registry: dict[str, Any]) -> list[tuple[str, Any]]:
    """Each kind of dictionary with its config's class."""
    import sys

    found = []
    for kind, cls in registry.items():
        architecture = cls.__annotations__["config"]
        if isinstance(architecture, str):
            architecture = getattr(sys.modules[cls.__module__], architecture)
        found.append((kind, architecture))
    return found
