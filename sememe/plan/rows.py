"""What is known of a recipe before it runs: its model, the rows of its stores, its dictionaries. Estimates nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sememe import artifact, lm
from sememe.dictionaries import Site, Sites
from sememe.errors import HookpointError, nearest
from sememe.fit import FitConfig
from sememe.harvest import HarvestConfig
from sememe.lm import ModelConfig, Outline
from sememe.needs import Dictionary, size_of
from sememe.plan import costs
from sememe.plan.estimate import members_of
from sememe.plan.scratch import new_model
from sememe.pretrain import PretrainConfig
from sememe.recipe import TWIN, Stage
from sememe.store import StoreInfo
from sememe.text import TokenPolicy
from sememe.train import TrainConfig

__all__ = ["Known", "Rows"]


class Rows(NamedTuple):
    """The rows that a store holds, or will hold."""

    widths: dict[str, int]
    n_rows: int
    n_tokens: int
    shard_rows: int
    policy: TokenPolicy

    def n_bytes(self, names: Sequence[str]) -> float:
        return float(self.n_rows) * (2 * sum(self.widths[name] for name in names) + costs.ROW_IDS)


class Known:
    """What is known of a recipe, each thing found out once."""

    def __init__(self, stages: Sequence[Stage], fresh: bool) -> None:
        self.stages, self.fresh = stages, fresh
        configs = [stage.config for stage in stages]
        self.pretrain = next((one for one in configs if isinstance(one, PretrainConfig)), None)
        harvests = [stage for stage in stages if isinstance(stage.config, HarvestConfig)]
        done = all(self._done(stage) for stage in stages)
        self.model = None if done else self._outline(harvests)
        self.rows = {stage.path: self._rows(stage) for stage in harvests}

    def _done(self, stage: Stage) -> bool:
        return not self.fresh and (stage.path / artifact.META).is_file()

    def _outline(self, harvests: Sequence[Stage]) -> Outline | None:
        """The language model: the one that is there, or the one that the recipe makes first."""
        live = [s.config.model for s in self.stages if isinstance(s.config, TrainConfig) and s.config.live]
        read = [*(_harvest(stage).model for stage in harvests), *live]
        config = read[0] if read else ModelConfig()
        there = lm.outline(config) if read else None
        if there is not None or self.pretrain is None:
            return there
        return new_model(self.pretrain, config)

    def _model_name(self) -> str:
        configs = (getattr(stage.config, "model", None) for stage in self.stages)
        named: list[ModelConfig] = [config for config in configs if isinstance(config, ModelConfig)]
        return named[0].model

    def _rows_for(self, stage: Stage) -> Rows | None:
        """The rows that a stage reads, or that its dictionary was trained on."""
        store = stage.path if stage.verb == "harvest" else getattr(stage.config, "store", None)
        if store in self.rows and not (isinstance(stage.config, TrainConfig) and stage.config.live):
            return self.rows[store]
        if isinstance(stage.config, TrainConfig):
            return self._live_rows(stage.config)
        trained = [s for s in self.stages if isinstance(s.config, TrainConfig) and s.name != TWIN]
        own = [s for s in trained if stage.name == s.name or stage.name.startswith(f"{s.name}/")]
        return self._rows_for((own or trained)[0])

    def _live_rows(self, config: TrainConfig) -> Rows | None:
        """What a live run will read; no store holds it."""
        if self.model is None:
            return None
        members = members_of(config)
        wanted = {name for one in members for name in (*(one.inputs or ()), *(one.outputs or ()))}
        widths = {name: self.model.width(name) for name in self.model.expand(sorted(wanted))}
        n_rows = config.n_tokens or 1
        return Rows(widths, n_rows, n_rows, 1, config.policy)

    def _rows(self, stage: Stage) -> Rows | None:
        """A store's rows: those that are there, or those that the model will give."""
        config = _harvest(stage)
        if self._done(stage):
            info = StoreInfo.build(artifact.load(stage.path, "store").extra, where=str(stage.path))
            widths = {name: point.width for name, point in info.hookpoints.items()}
            return Rows(widths, info.n_rows, info.n_tokens_read, max(info.shard_rows), info.policy)
        if self.model is None:
            return None
        widths = {name: self.model.width(name) for name in self.model.expand(config.hookpoints)}
        length = config.policy.context_length
        kept = length - config.policy.drop_positions
        if config.positions is not None:
            kept = len(set(config.positions))
        kept = min(kept, config.positions_per_context or kept)
        n_contexts = -(-config.n_tokens // length)
        shard_rows = min(config.shard_contexts, n_contexts) * kept
        return Rows(widths, n_contexts * kept, n_contexts * length, shard_rows, config.policy)

    def _train_config(self, name: str) -> TrainConfig:
        """What a dictionary is trained with: a stage's own config, or one of its sweep's."""
        for stage in self.stages:
            if isinstance(stage.config, TrainConfig):
                for member in members_of(stage.config):
                    place = Path(stage.name) / (member.out.name if stage.config.sweep else "")
                    if place == Path(name):
                        return member
        raise AssertionError(f"no stage trains {name!r}")

    def _names(self, config: TrainConfig, rows: Rows) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Hookpoints that a dictionary reads, and those it writes."""
        inputs = config.inputs or tuple(rows.widths)
        for name in (*inputs, *(config.outputs or ())):
            if name not in rows.widths:
                raise HookpointError(
                    "a hookpoint must be in the store", repr(name), nearest(name, rows.widths)
                )
        return inputs, config.outputs or inputs

    def _dictionary(self, config: TrainConfig, rows: Rows) -> Dictionary:
        inputs, outputs = self._names(config, rows)
        d_in, d_out = (sum(rows.widths[name] for name in names) for names in (inputs, outputs))
        sites = Sites(inputs=_sites(inputs, rows), outputs=_sites(outputs, rows))
        return size_of(config.architecture, d_in, d_out, sites)

    def _trained_in(self, paths: Sequence[Path]) -> list[TrainConfig]:
        """The dictionaries that the recipe trains in these folders; twins are counted beside them."""
        trained = [s.config for s in self.stages if isinstance(s.config, TrainConfig) and s.name != TWIN]
        found = [member for one in trained for member in members_of(one)]
        return [member for member in found if {member.out, member.out.parent} & set(paths)]

    def _fitted_in(self, paths: Sequence[Path]) -> list[FitConfig]:
        fitted = [stage.config for stage in self.stages if isinstance(stage.config, FitConfig)]
        return [one for one in fitted if one.out in paths]

    def _member_rows(self, member: TrainConfig) -> Rows:
        """The rows of one dictionary, which are known where those of a stage about it are."""
        rows = self._live_rows(member) if member.live else self.rows[member.store]
        assert rows is not None
        return rows

    def _size(self, member: TrainConfig) -> Dictionary:
        return self._dictionary(member, self._member_rows(member))

    def _sizes_in(self, paths: Sequence[Path], rows: Rows) -> list[Dictionary]:
        """Trained and fitted dictionaries as numbers."""
        found = [self._size(member) for member in self._trained_in(paths)]
        for fitted in self._fitted_in(paths):
            d = rows.widths.get(fitted.hookpoint or next(iter(rows.widths)), 0)
            d_sae = fitted.baseline.width(d)
            k = min(fitted.baseline.k_in_use() or d_sae, d_sae)
            found.append(Dictionary(fitted.baseline.kind, d, d, d_sae, 2 * d * d_sae, k))
        return found


def _sites(names: Sequence[str], rows: Rows) -> tuple[Site, ...]:
    """Hookpoints side by side; of which model does not matter here."""
    stops = list(itertools.accumulate(rows.widths[name] for name in names))
    return tuple(
        Site(model="", model_fingerprint="", hookpoint=name, start=stop - rows.widths[name], stop=stop)
        for name, stop in zip(names, stops, strict=True)
    )


def _harvest(stage: Stage) -> HarvestConfig:
    assert isinstance(stage.config, HarvestConfig)
    return stage.config
