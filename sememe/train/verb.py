"""The verb itself: finds the source, builds the members, and leaves finished artifacts."""

from __future__ import annotations

from typing import Any

from sememe import artifact, dictionaries, kernels
from sememe.dictionaries import Dictionary, Trainable
from sememe.end_to_end import EndToEnd
from sememe.join import open_stores
from sememe.source import LiveSource, Source, StoreSource
from sememe.text import fetch
from sememe.text import fingerprint as text_fingerprint
from sememe.train.by_site import about_sites
from sememe.train.config import TrainConfig
from sememe.train.member import Member
from sememe.train.objective import Objective
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
    objective: Objective | None = None,
    fresh: bool = False,
) -> Dictionary:
    """Train a dictionary, or open it if it is there.

    Args:
        config: What, on what, for how long.
        source: Where activations come from; the store at config.store if not given.
        parents: Fingerprints of what the source is made from; the store's if the source is not given.
        extra: More to remember in the dictionary's meta.json (the token policy, for a live source).
        objective: What it is trained for; the dictionary's own loss, or what config.end_to_end says of a live run,
            if not given.
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
        return _train(config, *_stored(config, extra or {}), objective, fresh)
    return _train(config, source, parents or {}, extra or {}, objective, fresh)


def _train(
    config: TrainConfig,
    source: Source,
    parents: dict[str, str],
    extra: dict[str, Any],
    objective: Objective | None,
    fresh: bool,
) -> Dictionary:
    identity = artifact.identity_of("dictionary", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "dictionary", identity):
        return dictionaries.load(config.out)
    dictionary = dictionaries.build(config.architecture, source.d_in, source.d_out, source.sites)
    member = Member("dictionary", config, dictionary, make_plan(config, dictionary, source), objective)
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
    store = open_stores([config.store, *config.join])
    source = StoreSource(store, config.inputs, config.outputs, config.seed)
    about = {"policy": store.info.policy.resolved(), "store": store.info.resolved()}
    return source, store.parents, about | extra


def _live(
    config: TrainConfig, extra: dict[str, Any]
) -> tuple[Source, dict[str, str], dict[str, Any], Objective | None]:
    """A live source, what it is made from, and the objective. The only path here that loads a language model."""
    from sememe import lm as language_models

    assert config.inputs is not None
    fetch(config.text)
    lm = language_models.load(config.model)
    parents = {"model": lm.fingerprint, "text": text_fingerprint(config.text)}
    about = extra | {"policy": config.policy.resolved()}
    if config.end_to_end.objective != "local":
        objective = EndToEnd(config.end_to_end, lm, config.inputs, config.outputs or config.inputs)
        source = objective.source(config.text, config.policy, config.inputs, config.outputs)
        return source, parents, about, objective
    live = LiveSource(
        lm,
        config.text,
        config.policy,
        config.inputs,
        config.outputs,
        seed=config.seed,
        buffer_mb=config.buffer_mb,
        batch_rows=config.batch_rows,
    )
    return live, parents, about, None


def _summary(dictionary: Trainable, source: Source) -> dict[str, Any]:
    horizon = source.n_rows
    silent = dictionary.tokens_since_fired
    alive = None if horizon is None else float((silent < horizon).float().mean())
    scale_in = dictionary.scale_in.expand(dictionary.d_in).unique_consecutive().tolist()
    about: dict[str, Any] = {"frac_alive_last_pass": alive, "scale_in": scale_in}
    sites = about_sites(dictionary)
    return {"training": about | ({"sites": sites} if sites else {})}
