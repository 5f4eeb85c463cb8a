"""What stages take that read no store: a model from scratch, planted features, grids of them."""

from __future__ import annotations

from collections.abc import Sequence

from sememe import lm
from sememe.grid import GridConfig, trainings
from sememe.lm import ModelConfig, Outline
from sememe.needs import Bytes, Knob, size_of
from sememe.plan import fitting, making
from sememe.plan.estimate import Estimate, members_of
from sememe.plan.machine import Speed
from sememe.pretrain import PretrainConfig
from sememe.recipe import Stage
from sememe.recover import RecoverConfig
from sememe.train import TrainConfig

__all__ = ["gridding", "new_model", "pretraining", "recovering"]

N_TOKENIZER = 50_257
"""Tokens of an existing tokenizer, which is not opened: GPT-2's."""


def new_model(config: PretrainConfig, run: ModelConfig) -> Outline | None:
    """The sizes of the model that a recipe makes, as it will be run later."""
    vocab = N_TOKENIZER if config.tokenizer is not None else config.n_bpe
    return lm.outline_of(config.architecture, vocab, config.context_length, run)


def pretraining(stage: Stage, config: PretrainConfig, model: Outline | None) -> Estimate:
    """Of the model that is made, or of what it will be."""
    found = model or new_model(config, ModelConfig(device=config.device))
    if found is None:
        return Estimate(stage, False, None, None, note=f"no {config.device} here")
    outline = found

    def work(micro_rows: int) -> making.Pretraining:
        length = config.context_length
        n_tokens = config.n_steps * config.batch_rows * length
        return making.Pretraining(
            n_tokens, config.n_validations * config.validation_tokens, micro_rows * length, length
        )

    def needs(micro_rows: int) -> Bytes:
        return making.pretrain_bytes(outline, work(micro_rows))

    micro = config.micro_rows or config.batch_rows

    def seconds(speed: Speed) -> float:
        return making.pretrain_seconds(outline, speed, work(micro))

    return Estimate(stage, False, needs(micro), seconds, (Knob("micro_rows", micro, needs),))


def recovering(stage: Stage, config: RecoverConfig) -> Estimate:
    """Dictionaries of planted features, side by side; or a baseline fitted to their rows."""
    d, n_features = config.planted.d, config.planted.n_features
    if config.fit is not None:
        baseline, n_rows = config.fit.baseline, config.fit.n_rows
        d_sae = baseline.width(d)
        held = fitting.held_bytes(baseline, d, d_sae, n_rows, 0.0)
        return Estimate(
            stage, False, held, lambda speed: fitting.fit_seconds(baseline, speed, d, d_sae, n_rows)
        )
    assert config.train is not None
    members = members_of(config.train)
    return _planted(stage, members, d, n_features, one_stream=True)


def gridding(stage: Stage, config: GridConfig) -> Estimate:
    """Every cell is a training with a stream of its own."""
    return _planted(stage, trainings(config), config.planted.d, config.planted.n_features, one_stream=False)


def _planted(
    stage: Stage, members: Sequence[TrainConfig], d: int, n_features: int, *, one_stream: bool
) -> Estimate:
    sizes = [size_of(member.architecture, d, d) for member in members]
    first = members[0]
    n_steps = max(1, (first.n_tokens or 0) // first.batch_size)
    needs = making.planted_bytes(sizes if one_stream else sizes[-1:], first.batch_size, n_features)

    def seconds(speed: Speed) -> float:
        return making.planted_seconds(
            sizes, speed, first.batch_size, n_steps, n_features, one_stream=one_stream
        )

    return Estimate(stage, False, needs, seconds)
