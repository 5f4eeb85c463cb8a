"""What `sememe toy` does: trainings on planted features, grids of them, and experiments that train no dictionary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from sememe.cli.flags import command
from sememe.cli.kinds import FRESH, architectures, say
from sememe.errors import ConfigError, nearest

__all__: list[str] = []

GRID_KIND = "tied"
"""What a grid trains where no kind is named: tied weights, as the original did."""
_MANY = Annotated[tuple[float, ...], Parameter(consume_multiple=True)]
GRID: dict[str, tuple[Any, Any, str]] = {
    "draw_grid": (
        Annotated[bool, Parameter(name="--grid")],
        False,
        "Train one for every penalty and size, and draw what each finds.",
    ),
    "published": (bool, False, "With --grid: the replication's 17 penalties and 8 sizes; takes hours."),
    "penalties": (_MANY, (), "With --grid: weights of the mean activation over latents."),
    "ratios": (_MANY, (), "With --grid: latents per planted feature."),
}


def toy_app() -> App:
    """`sememe toy KIND`, and the experiments that train no dictionary."""
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
        published: bool = False,
        penalties: tuple[float, ...] = (),
        ratios: tuple[float, ...] = (),
        **options: Any,
    ) -> None:
        planted = ToyConfig.build({name.removeprefix("planted_"): value for name, value in options.items()})
        axes = {name: given for name, given in (("penalties", penalties), ("ratios", ratios)) if given}
        if draw_grid:
            asked = GridConfig.build(
                {"out": config.out, "planted": planted, "train": config, "published": published, **axes}
            )
            made = grid(asked, fresh=fresh)
            say("plots", made.path / "grid.svg")
            return
        for name, given in [*axes.items(), *([("published", (True,))] if published else [])]:
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
        random = {"recall": found.random, "precision": found.random_precision, "found": found.random_found}
        for name, what, style in (
            ("recall", "recall (mmcs planted -> learned)", ".4f"),
            ("precision", "precision (mmcs learned -> planted)", ".4f"),
            ("found", "planted features found (> 0.9)", ".1%"),
        ):
            value, low, high = (getattr(found, f"{name}{end}") for end in ("", "_low", "_high"))
            if math.isnan(value):
                print(f"{what:<36} NaN: {found.cause}")
                continue
            between = "" if math.isnan(low) else f" ({low:{style}} to {high:{style}})"
            print(f"{what:<36} {value:{style}}{between}")
            print(f"{'  of as many random directions':<36} {random[name]:{style}}")
        if source.planted.config.n_children:
            families = absorption(source.planted, dictionary)
            for name, what in (
                ("silent_with_child", "parents silent beside a child"),
                ("silent_alone", "parents silent when alone"),
                ("split", "parents split into their children"),
            ):
                value = getattr(families, name)
                said = f"NaN: {families.causes[name]}" if math.isnan(value) else f"{value:.1%}"
                print(f"{what:<36} {said}")

    planted_options = {
        f"planted_{name}": (field.annotation, field.default, field.description or "")
        for name, field in ToyConfig.model_fields.items()
    }
    for kind, architecture in architectures(TRAINABLE):
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
    _experiments(app)
    app.default(_without_a_kind(app))
    return app


def _without_a_kind(app: App) -> Callable[..., Any]:
    """What `sememe toy` does where its first word is an option: a grid has a kind of its own, the original's."""

    def first_word(
        *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    ) -> Any:
        if "--grid" in words:
            return app([GRID_KIND, *words], exit_on_error=False, print_error=False)
        if not words:
            app.help_print([])
            return None
        kinds = [name for name in app if not name.startswith("-")]
        raise ConfigError(
            "`sememe toy` must go with one of its kinds", repr(words[0]), nearest(words[0], kinds)
        )

    return first_word


def _experiments(app: App) -> None:
    from sememe import experiments as made

    def superposed(config: made.SuperpositionConfig, fresh: bool = False) -> None:
        found = made.superposition(config, fresh=fresh)
        _table(found.path, ("d", "density", "n_carried", "dimensions_per_feature", "interference", "loss"), 2)
        say("plot", found.path / "superposition.svg")

    def layered(config: made.LayersConfig, fresh: bool = False) -> None:
        found = made.layers(config, fresh=fresh)
        rows = [row for row in _rows(found.path) if row["effective_layers"] is not None]
        n, wide = config.stack.n_features, config.stack.n_layers
        print(f"features computed (fvu at most 0.9)           {len(rows)} of {n}")
        if rows:
            effective = sum(row["effective_layers"] for row in rows) / len(rows)
            alone = sum(max(row[f"share_{layer}"] for layer in range(wide)) > ALONE for row in rows)
            print(f"effective layers of a feature, mean of 1 to {wide:<2} {effective:.2f}")
            print(f"features of which one layer has over {ALONE:.0%}     {alone} of {len(rows)}")
        say("plot", found.path / "layers.svg")

    def fitted(config: made.LikenessConfig, fresh: bool = False) -> None:
        found = made.likeness(config, fresh=fresh)
        _table(found.path, ("statistic", "real", "real_again", "fitted"), 1)
        say("table", found.path / "table.csv")

    for name, config, verb, doc in (
        (
            "superposed",
            made.SuperpositionConfig,
            superposed,
            "How many sparse features networks carry in fewer dimensions, by width and density.",
        ),
        ("layered", made.LayersConfig, layered, "Which MLP of a stack computes which feature."),
        (
            "fitted",
            made.LikenessConfig,
            fitted,
            "Fit a generator to a store with a dictionary, and tabulate how its rows differ from real ones.",
        ),
    ):
        app.command(command(config, verb, extra=FRESH, doc=doc), name=name)


ALONE = 0.9
"""Share of a feature from which one layer counts as computing it alone."""


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "table.json").read_text(encoding="utf-8"))["rows"]
    return rows


def _table(folder: Path, columns: tuple[str, ...], n_keys: int) -> None:
    """The table, and below it why numbers are missing; the first columns say of what."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in columns:
        table.add_column(name, justify="left" if name == "statistic" else "right")
    for row in _rows(folder):
        table.add_row(*(_cell(row[name]) for name in columns))
    Console().print(table)
    for row in _rows(folder):
        if row["cause"]:
            print(f"{', '.join(f'{name} {_cell(row[name])}' for name in columns[:n_keys])}: {row['cause']}")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4g}"
