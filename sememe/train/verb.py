"""The verb itself: finds the source, builds the members, and leaves finished artifacts."""

from __future__ import annotations

from typing import Any

from sememe import artifact, dictionaries, kernels
from sememe.dictionaries import Dictionary, Trainable
from sememe.source import LiveSource, Source, StoreSource
from sememe.store import open_store
from sememe.text import fetch
from sememe.text import fingerprint as text_fingerprint
from sememe.train.config import TrainConfig
from sememe.train.member import Member
from sememe.train.run import Place, Run
from sememe.train.schedule import make_plan

__all__ = ["train"]

VERSION = 1


def train(
    config: TrainConfig,
    *,
    source: Source | None = None,
    parents: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
    fresh: bool = False,
) -> Dictionary:
    """Train a dictionary, or open it if it is there.

    Args:
        config: What, on what, for how long.
        source: Where activations come from; the store at config.store if not given.
        parents: Fingerprints of what the source is made from; the store's if the source is not given.
        extra: More to remember in the dictionary's meta.json (the token policy, for a live source).
        fresh: Replace whatever stands at config.out.

    Returns:
        The finished dictionary, folded: it takes and gives raw activations.

    Raises:
        ConfigError: an option is out of range for this source.
        ActivationError: the loss is NaN or infinite; the last good checkpoint is kept.
        MismatchError: another dictionary, or a checkpoint of another set-up, stands at config.out.
    """
    if source is None and config.live:
        return _train(config, *_live(config, extra or {}), fresh)
    if source is None:
        return _train(config, *_stored(config, extra or {}), fresh)
    return _train(config, source, parents or {}, extra or {}, fresh)


def _train(
    config: TrainConfig, source: Source, parents: dict[str, str], extra: dict[str, Any], fresh: bool
) -> Dictionary:
    identity = artifact.identity_of("dictionary", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "dictionary", identity):
        return dictionaries.load(config.out)
    dictionary = dictionaries.build(config.architecture, source.d_in, source.d_out, source.sites)
    member = Member("dictionary", config, dictionary, make_plan(config, dictionary, source))
    with (
        kernels.threads(config.threads) as threads,
        artifact.building(
            config.out,
            kind="dictionary",
            version=VERSION,
            config=config,
            parents=parents,
            resumable=True,
            fresh=fresh,
            leave_out=("checkpoint.tmp", "checkpoint-*.safetensors"),
        ) as work,
    ):
        Run(config, [Place(member, work.path)], source, work.path, threads).go()
        probe_rows = source.sample(16).x
        work.extra = extra | dictionary.write(work.path, probe_rows) | _summary(dictionary, source)
    return dictionaries.load(config.out)


def _stored(config: TrainConfig, extra: dict[str, Any]) -> tuple[Source, dict[str, str], dict[str, Any]]:
    """A store as a source, and what it is made from."""
    store = open_store(config.store)
    source = StoreSource(store, config.inputs, config.outputs, config.seed)
    about = {"policy": store.info.policy.resolved(), "store": store.info.resolved()}
    return source, {"store": store.fingerprint}, about | extra


def _live(config: TrainConfig, extra: dict[str, Any]) -> tuple[Source, dict[str, str], dict[str, Any]]:
    """A live source and what it is made from. The only path here that loads a language model."""
    from sememe import lm as language_models

    assert config.inputs is not None
    fetch(config.text)
    lm = language_models.load(config.model)
    source = LiveSource(
        lm,
        config.text,
        config.policy,
        config.inputs,
        config.outputs,
        seed=config.seed,
        buffer_mb=config.buffer_mb,
        batch_rows=config.batch_rows,
    )
    parents = {"model": lm.fingerprint, "text": text_fingerprint(config.text)}
    return source, parents, extra | {"policy": config.policy.resolved()}


def _summary(dictionary: Trainable, source: Source) -> dict[str, Any]:
    horizon = source.n_rows
    silent = dictionary.tokens_since_fired
    alive = None if horizon is None else float((silent < horizon).float().mean())
    return {"training": {"frac_alive_last_pass": alive, "scale_in": float(dictionary.scale_in)}}
