"""The verb that trains a small language model from scratch on a text, as a standard Hugging Face folder.

    text -> tokenizer -> rows of tokens on disk -> model -> AdamW -> folder that `sememe.lm.load` opens

Killed at any moment and started again, it goes on from its last checkpoint with the same bits. Knows how a
model is trained; how one is built is in `sememe.lm.build`. Knows nothing about dictionaries.

    config.py     the options
    rows.py       tokenizer, rows of tokens, n-gram baselines
    training.py   the loop, its state, and what is written at the end
    group.py      several processes that train one model, started by torchrun
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sememe import artifact
from sememe.pretrain.config import PretrainConfig
from sememe.pretrain.group import Group, joined
from sememe.pretrain.rows import Baselines, baselines
from sememe.pretrain.training import SCRATCH, Run
from sememe.text import fetch, fingerprint

__all__ = ["Baselines", "PretrainConfig", "baselines", "pretrain"]

VERSION = 2


def pretrain(config: PretrainConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Train a language model, or open it if it is there.

    Args:
        config: Which, on what, for how long.
        fresh: Replace whatever stands at config.out.
    Returns:
        The folder: a Hugging Face model with its tokenizer, `results.json`, `samples.md` and `metrics.jsonl`.
        `sememe.lm.load` takes it, and its `extra` holds the losses.
    Raises:
        ConfigError: an option is out of range.
        TextError: the corpus gives less than one row.
        ActivationError: the loss is NaN or infinite; the last good checkpoint is kept.
        MismatchError: another model, or a checkpoint of another set-up, stands at config.out.

    Started by `torchrun`, the processes share each step's rows, to the same result as one but for rounding.
    """
    with joined(config.device) as group:
        if group.first:
            return _first(config, group, fresh)
        return _other(config, group)


def _first(config: PretrainConfig, group: Group, fresh: bool) -> artifact.Artifact:
    """The process that writes; alone where it is the only one."""
    fetch(config.text)
    parents = {"text": fingerprint(config.text)}
    identity = artifact.identity_of("model", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "model", identity)):
        group.told(None)
        return done
    with (
        _threads(config),
        artifact.building(
            config.out,
            kind="model",
            version=VERSION,
            config=config,
            parents=parents,
            resumable=True,
            fresh=fresh,
            leave_out=(SCRATCH,),
        ) as work,
    ):
        group.told(str(work.path.resolve()))
        work.extra = Run(config, work.path, group).go()
    group.told(None)
    return artifact.load(config.out, "model")


def _other(config: PretrainConfig, group: Group) -> artifact.Artifact:
    """One of the others: trains in the folder that the first one says, on the same machine or a shared disk."""
    folder = group.told(None)
    if folder is not None:
        with _threads(config):
            Run(config, Path(folder), group).go()
        group.told(None)
    return artifact.load(config.out, "model")


@contextmanager
def _threads(config: PretrainConfig) -> Iterator[None]:
    """CPU threads as asked for, and as they were after."""
    before = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        yield
    finally:
        torch.set_num_threads(before)
