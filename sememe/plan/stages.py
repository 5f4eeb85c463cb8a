"""From a recipe's stages to what each takes. Reads configs and what is on disk; loads no model, downloads nothing.

A stage whose numbers hang on a model that is not at hand has none, and a note that says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sememe.compare import CompareConfig
from sememe.config import Config
from sememe.dictionaries.folders import paths_in
from sememe.dictionaries.ica import ICAConfig
from sememe.dictionaries.pca import PCAConfig
from sememe.effects import EffectsConfig
from sememe.errors import ShapeError
from sememe.evaluate import EvaluateConfig, powers_below
from sememe.explain import ExplainConfig
from sememe.fit import STREAMED, FitConfig
from sememe.geometry import GeometryConfig
from sememe.grid import GridConfig
from sememe.harvest import HarvestConfig
from sememe.interpret import RANDOMISED, InterpretConfig
from sememe.lm import Outline
from sememe.needs import Bytes, Knob, store_buffer, training
from sememe.patch import BASELINES, PatchConfig
from sememe.plan import costs, fitting, making
from sememe.plan.costs import Arms, FitRows
from sememe.plan.estimate import Estimate, members_of
from sememe.plan.machine import Speed
from sememe.plan.rows import Known, Rows
from sememe.plan.scratch import gridding, pretraining, recovering
from sememe.pretrain import PretrainConfig
from sememe.prompt import CHOSEN, PromptsConfig
from sememe.recipe import Stage
from sememe.recover import RecoverConfig
from sememe.results import ResultsConfig
from sememe.train import TrainConfig

__all__ = ["Estimate", "Estimates", "Knob", "Shapes", "estimates"]

NEEDS_MODEL = frozenset({"harvest", "evaluate", "interpret", "prompts", "effects", "compare", "patch"})
PLANNED = NEEDS_MODEL | {"train", "fit", "geometry", "explain", "export"}
"""Stages whose needs follow from a store's rows."""


class Shapes(NamedTuple):
    """What a calibration should time: the widest dictionary and the language model of a recipe."""

    d_in: int
    d_sae: int
    model: tuple[int, int, torch.dtype, str] | None
    """Width, inner width, dtype and device; None if its config is not at hand."""


class Estimates(NamedTuple):
    """A recipe's stages, and the shapes of their products."""

    stages: list[Estimate]
    shapes: Shapes


def estimates(stages: Sequence[Stage], fresh: bool = False) -> Estimates:
    """What each stage of a recipe takes; stages that are done take nothing.

    Args:
        stages: The recipe's.
        fresh: Whether everything will be made again.
    """
    planner = _Planner(stages, fresh)
    return Estimates([planner.one(stage) for stage in stages], planner.shapes())


class _Planner(Known):
    """An estimate of each stage, from what is known of the recipe."""

    def one(self, stage: Stage) -> Estimate:
        """One stage."""
        if self._done(stage):
            return Estimate(stage, True, Bytes(0.0), lambda _: 0.0)
        config, model = stage.config, self.model
        if isinstance(config, PretrainConfig):
            return pretraining(stage, config, model)
        if isinstance(config, RecoverConfig):
            return recovering(stage, config)
        if isinstance(config, GridConfig):
            return gridding(stage, config)
        if isinstance(config, ResultsConfig):
            return Estimate(stage, False, Bytes(costs.BASE, costs.COMPARISON_BYTES), lambda _: costs.START)
        if stage.verb not in PLANNED:
            return Estimate(stage, False, None, None, note=f"what {stage.verb} takes is not planned")
        rows = self._rows_for(stage)
        if rows is not None and isinstance(config, CompareConfig) and config.directions_only:
            return self._directions(stage, config, rows)
        if rows is None or (model is None and stage.verb in NEEDS_MODEL):
            return Estimate(
                stage, False, None, None, note=f"the config of {self._model_name()} is not at hand"
            )
        if isinstance(config, TrainConfig):
            return self._train(stage, config, rows)
        if isinstance(config, FitConfig):
            return self._fit(stage, config, rows)
        if isinstance(config, GeometryConfig):
            return self._geometry(stage, config, rows)
        if model is not None and isinstance(config, HarvestConfig):
            return self._harvest(stage, config, model, rows)
        if model is not None and isinstance(config, EvaluateConfig):
            return self._evaluate(stage, config, model, rows)
        if model is not None and isinstance(config, CompareConfig):
            return self._compare(stage, config, model, rows)
        if model is not None and isinstance(config, InterpretConfig):
            return self._interpret(stage, config, model, rows)
        if model is not None and isinstance(config, EffectsConfig):
            return self._effects(stage, config, model, rows)
        if model is not None and isinstance(config, PromptsConfig):
            return self._prompts(stage, config, model, rows)
        if model is not None and isinstance(config, PatchConfig):
            return self._patch(stage, config, model)
        d_sae = self._dictionary(self._train_config(stage.name), rows).d_sae
        if isinstance(config, ExplainConfig):
            return self._explain(stage, config, d_sae)
        seconds = costs.export_seconds(d_sae)
        bytes_at = costs.export_bytes
        return Estimate(stage, False, bytes_at(d_sae), lambda _: seconds, (Knob("d_sae", d_sae, bytes_at),))

    def shapes(self) -> Shapes:
        """The widths of the recipe's products, the largest where there are several."""
        found = [
            self._dictionary(member, rows)
            for stage in self.stages
            if isinstance(stage.config, TrainConfig) and (rows := self._rows_for(stage)) is not None
            for member in members_of(stage.config)
        ]
        d_in, d_sae = max(((d.d_in, d.d_sae) for d in found), key=math.prod, default=(512, 4096))
        model = self.model
        about = None if model is None else (model.d_model, model.d_inner, model.dtype, model.device)
        return Shapes(d_in, d_sae, about)

    # -- stages ------------------------------------------------------------------------------------

    def _harvest(self, stage: Stage, config: HarvestConfig, model: Outline, rows: Rows) -> Estimate:
        names, length = tuple(rows.widths), config.policy.context_length
        widths = sum(rows.widths.values())

        def needs(n_tokens: int, shard_contexts: int, batch_rows: int) -> Bytes:
            share = rows.n_rows / rows.n_tokens
            shard_rows = round(share * length * shard_contexts)
            return costs.harvest_bytes(model, widths, round(share * n_tokens), shard_rows, batch_rows, length)

        def seconds(speed: Speed) -> float:
            n_layers = model.n_layers_read(names)
            return costs.harvest_seconds(model, speed, n_layers, rows.n_tokens, length, rows.n_bytes(names))

        n_tokens, shard, batch = config.n_tokens, config.shard_contexts, config.batch_rows
        knobs = (
            Knob("n_tokens", n_tokens, lambda n: needs(n, shard, batch)),
            Knob("shard_contexts", shard, lambda n: needs(n_tokens, n, batch)),
            Knob("batch_rows", batch, lambda n: needs(n_tokens, shard, n)),
        )
        return Estimate(stage, False, needs(n_tokens, shard, batch), seconds, knobs)

    def _train(self, stage: Stage, config: TrainConfig, rows: Rows) -> Estimate:
        """One dictionary, or all of a sweep, which are trained side by side."""
        members = members_of(config)
        sizes = [self._dictionary(member, rows) for member in members]
        names = [self._names(member, rows) for member in members]
        held = rows.n_bytes(tuple(dict.fromkeys(name for both in names for name in (*both[0], *both[1]))))
        shard = held / rows.n_rows * rows.shard_rows
        buffer = config.buffer_mb * 1e6 if config.live else store_buffer(held, shard)
        n_trained = config.n_tokens or int((config.epochs or 1.0) * rows.n_rows)
        n_steps = max(1, n_trained // config.batch_size)

        needs, knobs = training(sizes, config.batch_size, buffer, config.devices)
        model, n_looks = self.model, 2 + n_trained // config.watch_every

        def seconds(speed: Speed) -> float:
            total = costs.train_seconds(sizes, speed, config.batch_size, n_steps, config.log_every)
            total += costs.watch_seconds(sizes, speed, n_looks * config.watch_rows)
            total += costs.checkpoint_seconds(sizes, speed, total, config.checkpoint_every_seconds)
            if not config.live:
                total += costs.reading_seconds(held, n_trained / rows.n_rows, speed)
            if config.live and model is not None:
                length, n_layers = config.policy.context_length, model.n_layers_read(tuple(rows.widths))
                n_read = n_trained * length // min(config.positions_per_context or length, length)
                total += costs.harvest_seconds(model, speed, n_layers, n_read, length, 0.0)
            if config.ce_tokens and model is not None:
                n_tokens, length = n_looks * config.ce_tokens, rows.policy.context_length
                above = [model.n_layers_above(outputs) for _, outputs in names]
                total += costs.watch_ce_seconds(model, speed, n_tokens, above, length)
            return total

        if any(device.startswith("cuda") for device in config.devices):
            note = "how long a step takes on a GPU was not measured"
            return Estimate(stage, False, needs, None, knobs, note)
        return Estimate(stage, False, needs, seconds, knobs)

    def _fit(self, stage: Stage, config: FitConfig, rows: Rows) -> Estimate:
        """A batch of rows where they are streamed, all of them where they are held."""
        names = tuple(rows.widths) if config.hookpoint is None else (config.hookpoint,)
        d_in = sum(rows.widths[name] for name in names if name in rows.widths)
        shard = rows.n_bytes(names) / rows.n_rows * rows.shard_rows

        d_sae = config.baseline.width(d_in)
        if config.over is not None:
            d_sae = next(
                self._dictionary(member, rows).d_sae
                for other in self.stages
                if isinstance(other.config, TrainConfig)
                for member in members_of(other.config)
                if member.out == config.over
            )

        baseline = config.baseline
        n_rows = 0 if config.over is not None else min(config.n_rows, rows.n_rows)

        def needs(wanted: int) -> Bytes:
            there = min(wanted, rows.n_rows)
            if baseline.kind in STREAMED:
                return fitting.streamed_bytes(d_in, d_sae, there, shard)
            return fitting.held_bytes(baseline, d_in, d_sae, there, shard)

        def seconds(speed: Speed) -> float:
            return fitting.fit_seconds(baseline, speed, d_in, d_sae, n_rows)

        return Estimate(stage, False, needs(n_rows), seconds, (Knob("n_rows", n_rows, needs),))

    def _n_twins(self, config: EvaluateConfig | CompareConfig) -> int:
        """Dictionaries in the twins' folders; of a sweep that is still to be trained, those it will make."""
        trained = {
            stage.path: len(members_of(stage.config))
            for stage in self.stages
            if isinstance(stage.config, TrainConfig)
        }
        return sum(trained.get(path) or len(paths_in((path,))) for path in config.twins)

    def _evaluate(self, stage: Stage, config: EvaluateConfig, model: Outline, rows: Rows) -> Estimate:
        train = self._train_config(stage.name)
        dictionary = self._dictionary(train, rows)
        inputs, outputs = self._names(train, rows)
        length, n_twins = rows.policy.context_length, self._n_twins(config)
        fit = _fit_rows(config, model, rows, (*inputs, *outputs))
        n_parts = len(config.leave_out_above) + 2 * len(config.top_latents)
        matched = int(config.matched_in is not None)

        def arms(d_sae: int) -> Arms:
            within = 0 if config.within is None else 2 * len(powers_below(d_sae))
            return Arms(1 + len(config.nulls), n_parts + 2 * matched + within, n_twins, matched)

        def needs(d_sae: int, batch_rows: int) -> Bytes:
            return costs.evaluate_bytes(model, dictionary.scaled(d_sae), arms(d_sae), batch_rows, length, fit)

        def seconds(speed: Speed) -> float:
            above = model.n_layers_above(outputs)
            measured = arms(dictionary.d_sae)
            n_tokens = config.n_tokens
            found = costs.evaluate_seconds(model, dictionary, speed, n_tokens, measured, above, length, fit)
            budget = config.budget_seconds()
            return found if budget is None else min(found, budget)

        d_sae, batch = dictionary.d_sae, config.batch_rows
        knobs = (
            Knob("batch_rows", batch, lambda n: needs(d_sae, n)),
            Knob("d_sae", d_sae, lambda n: needs(n, batch)),
        )
        return Estimate(stage, False, needs(d_sae, batch), seconds, knobs)

    def _compare(self, stage: Stage, config: CompareConfig, model: Outline, rows: Rows) -> Estimate:
        """As an evaluation of the widest dictionary with an arm for each of the others."""
        members = self._trained_in(config.dictionaries)
        sizes = list(map(self._size, members))
        _check_widths(stage, members, sizes)
        widest = max(sizes, key=lambda one: one.d_sae)
        outputs = {name for member in members for name in self._names(member, self._member_rows(member))[1]}
        n_fitted = len(self._fitted_in(config.dictionaries))
        length, n_twins = rows.policy.context_length, self._n_twins(config)
        fit = _fit_rows(config, model, rows, tuple(outputs))
        arms = Arms(len(members) + n_fitted + 3 * len(config.nulls), n_twins=n_twins)

        def needs(batch_rows: int) -> Bytes:
            return costs.evaluate_bytes(model, widest, arms, batch_rows, length, fit)

        def seconds(speed: Speed) -> float:
            above = model.n_layers_above(tuple(outputs))
            found = costs.evaluate_seconds(model, widest, speed, config.n_tokens, arms, above, length, fit)
            if config.together:  # as three arms that run all layers
                found += costs.evaluate_seconds(
                    model, widest, speed, config.n_tokens, Arms(3), model.n_layers, length, fit
                )
            budget = config.budget_seconds()
            return found if budget is None else min(found, budget)

        knobs = (Knob("batch_rows", config.batch_rows, needs),)
        return Estimate(stage, False, needs(config.batch_rows), seconds, knobs)

    def _directions(self, stage: Stage, config: CompareConfig, rows: Rows) -> Estimate:
        """A comparison that runs no model."""
        sizes = self._sizes_in(config.dictionaries, rows)
        _check_widths(stage, self._trained_in(config.dictionaries), sizes)

        def seconds(speed: Speed) -> float:
            return costs.directions_seconds(sizes, speed)

        return Estimate(stage, False, costs.directions_bytes(sizes), seconds)

    def _geometry(self, stage: Stage, config: GeometryConfig, rows: Rows) -> Estimate:
        sizes = self._sizes_in(config.dictionaries, rows)
        n_rows = 0 if config.store is None else min(config.n_rows, rows.n_rows)

        def seconds(speed: Speed) -> float:
            return making.geometry_seconds(sizes, speed, n_rows)

        return Estimate(stage, False, making.geometry_bytes(sizes, n_rows), seconds)

    def _interpret(self, stage: Stage, config: InterpretConfig, model: Outline, rows: Rows) -> Estimate:
        train = self._train_config(stage.name)
        dictionary = self._dictionary(train, rows)
        inputs, _ = self._names(train, rows)
        length, stored = rows.policy.context_length, config.store is not None
        n_tokens = rows.n_tokens if stored else config.n_tokens
        shard = rows.n_bytes(inputs) / rows.n_rows * rows.shard_rows if stored else 0.0

        def needs(n_read: int, d_sae: int, n_reservoir: int) -> Bytes:
            slots = config.n_top + n_reservoir
            return costs.interpret_bytes(
                model,
                dictionary.scaled(d_sae),
                n_read,
                slots,
                config.n_random,
                config.batch_rows,
                length,
                shard,
                len(config.nulls),
                config.coactive_tokens,
            )

        def seconds(speed: Speed) -> float:
            n_layers = model.n_layers_read(inputs)
            passes = [0 if stored else n_layers] * (1 + bool(set(config.nulls) - {RANDOMISED}))
            passes += [n_layers] * (RANDOMISED in config.nulls)  # a store knows nothing of the shuffled model
            return costs.interpret_seconds(
                model, dictionary, speed, n_tokens, tuple(passes), length, len(config.nulls)
            )

        d_sae, reservoir = dictionary.d_sae, config.n_reservoir
        knobs = (
            Knob("n_tokens", n_tokens, lambda n: needs(n, d_sae, reservoir)),
            Knob("n_reservoir", reservoir, lambda n: needs(n_tokens, d_sae, n)),
            Knob("d_sae", d_sae, lambda n: needs(n_tokens, n, reservoir)),
        )
        return Estimate(stage, False, needs(n_tokens, d_sae, reservoir), seconds, knobs[0 if stored else 1 :])

    def _effects(self, stage: Stage, config: EffectsConfig, model: Outline, rows: Rows) -> Estimate:
        train = self._train_config(stage.name)
        dictionary = self._dictionary(train, rows)
        inputs, outputs = self._names(train, rows)
        length, d_sae = rows.policy.context_length, dictionary.d_sae
        n_latents = len(config.latents) or (d_sae if config.every else min(config.n_latents, d_sae))
        interpret = self._interpreted(stage.name)
        n_contexts = (rows.n_tokens if interpret.store is not None else interpret.n_tokens) // length
        work = costs.EffectsWork(
            n_latents,
            config.n_top,
            config.n_after + 1,
            n_latents * config.n_removals,
            interpret.before,
            n_contexts,
        )

        def needs(batch_rows: int) -> Bytes:
            return costs.effects_bytes(model, dictionary, batch_rows, length, n_latents * config.n_top)

        def seconds(speed: Speed) -> float:
            layers = model.n_layers_above(outputs), model.n_layers_read(inputs)
            return costs.effects_seconds(model, speed, work, *layers, length)

        knobs = (Knob("batch_rows", config.batch_rows, needs),)
        return Estimate(stage, False, needs(config.batch_rows), seconds, knobs)

    def _prompts(self, stage: Stage, config: PromptsConfig, model: Outline, rows: Rows) -> Estimate:
        dictionary = self._dictionary(self._train_config(stage.name), rows)
        n_texts = len(config.texts or CHOSEN)
        needs = costs.prompts_bytes(model, dictionary, n_texts)
        return Estimate(stage, False, needs, lambda speed: costs.prompts_seconds(model, speed, n_texts))

    def _patch(self, stage: Stage, config: PatchConfig, model: Outline) -> Estimate:
        members = self._trained_in(config.dictionaries)
        sizes = list(map(self._size, members))
        inputs, outputs = self._names(members[0], self._member_rows(members[0]))
        own = BASELINES if config.baselines is None and inputs == outputs else config.baselines or ()
        fitted: dict[str, Config] = {"pca": PCAConfig(), "pca_signs": PCAConfig(), "ica": ICAConfig()}
        # a file of pairs is not read before its stage: as many as are made if none is given
        n_pairs, limit = config.n_pairs, config.acdc_limit if "acdc" in config.orders else 0

        def seconds(speed: Speed) -> float:
            width = sizes[0].d_in
            fits = tuple(
                fitting.fit_seconds(fitted[name], speed, width, width, config.n_fit_rows)
                for name in own
                if name in fitted
            )
            n_arms, n_orders = len(sizes) + len(own), len(config.orders)
            work = making.Patching(n_arms, n_pairs, n_orders, limit, config.n_thresholds, fits)
            return making.patch_seconds(model, speed, work, model.n_layers_above(outputs))

        return Estimate(stage, False, making.patch_bytes(model, sizes, n_pairs), seconds)

    def _explain(self, stage: Stage, config: ExplainConfig, d_sae: int) -> Estimate:
        """The atlas and its nulls, one after the other."""
        n_nulls = len(self._interpreted(stage.name).nulls) if config.nulls is None else len(config.nulls)

        def needs(wanted: int) -> Bytes:
            return costs.explain_bytes(wanted, n_nulls)

        knobs = (Knob("d_sae", d_sae, needs),)
        if config.explainer.kind != "lexical":
            note = "how long a language model takes to answer is not known"
            return Estimate(stage, False, needs(d_sae), None, knobs, note)
        seconds = costs.explain_seconds(d_sae, n_nulls)
        return Estimate(stage, False, needs(d_sae), lambda _: seconds, knobs)

    def _interpreted(self, name: str) -> InterpretConfig:
        """What the atlas of a dictionary is made with."""
        return next(
            other.config
            for other in self.stages
            if isinstance(other.config, InterpretConfig) and other.name == name
        )


def _fit_rows(
    config: EvaluateConfig | CompareConfig, model: Outline, rows: Rows, names: Sequence[str]
) -> FitRows:
    """What the mean and the nulls are fitted on, and where from."""
    if config.store is not None:
        return FitRows(min(config.n_fit_rows, rows.n_rows), rows.shard_rows, 0)
    at_once = config.batch_rows * rows.policy.context_length
    return FitRows(config.n_fit_rows, at_once, model.n_layers_read(tuple(names)))


def _check_widths(stage: Stage, members: Sequence[TrainConfig], sizes: Sequence[costs.Dictionary]) -> None:
    """Dictionaries that are compared write outputs of one width; else the comparison would fail after all training."""
    for member, size in zip(members, sizes, strict=False):
        if size.d_out != sizes[0].d_out:
            raise ShapeError(
                f"the dictionaries of [{stage.label}] must write outputs of one width, {sizes[0].d_out} like "
                f"{members[0].out.name}",
                f"{size.d_out} of {member.out.name}",
                "Give the one a [compare.NAME] table of its own.",
            )
