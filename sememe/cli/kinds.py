"""The commands whose first word is a kind, with that kind's options alone: train, fit, pretrain; toy is in toys.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cyclopts import App

from sememe import remote
from sememe.cli.flags import command

__all__: list[str] = []

FRESH: dict[str, tuple[Any, Any, str]] = {"fresh": (bool, False, "Replace whatever stands at --out.")}


def say(what: str, path: Path) -> None:
    """Where a result lies."""
    print(f"{what}: {remote.address(path) or path}")


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

    for kind, architecture in architectures(TRAINABLE):
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


def pretrain_app() -> App:
    """An application with a command for each kind of blocks."""
    from sememe.lm.build import PRESETS, GPT2Shape, LlamaShape
    from sememe.pretrain import PretrainConfig, pretrain

    app = App(
        name="pretrain", help="Train a small transformer; its blocks come first: `sememe pretrain gpt2`."
    )
    app.result_action = "return_value"

    def verb(config: PretrainConfig, fresh: bool = False) -> None:
        results = pretrain(config, fresh=fresh).extra["results"]
        if os.environ.get("RANK", "0") != "0":
            return  # one process of several speaks
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
    for preset, made in PRESETS.items():
        app.command(
            command(
                PretrainConfig,
                verb,
                choices={"architecture": type(made)},
                fixed={"architecture": preset},
                extra=FRESH,
                doc=f"Train the one-layer model of {preset}: {made.d_model} wide, {made.d_mlp:,} neurons.",
            ),
            name=preset,
        )
    return app


def architectures(registry: dict[str, Any]) -> list[tuple[str, Any]]:
    """Each kind of dictionary with its config's class."""
    import sys

    found = []
    for kind, cls in registry.items():
        architecture = cls.__annotations__["config"]
        if isinstance(architecture, str):
            architecture = getattr(sys.modules[cls.__module__], architecture)
        found.append((kind, architecture))
    return found
