"""The verb itself: finds the source, makes the dictionaries, and leaves finished artifacts."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sememe import artifact, dictionaries, kernels
from sememe.dictionaries import Dictionary
from sememe.end_to_end import EndToEnd
from sememe.errors import ConfigError, HookpointError, nearest
from sememe.join import JoinedStore, open_stores
from sememe.probes import cross_entropy_of
from sememe.source import MOST_HELD, Batch, Columns, HoldsOut, LiveSource, Source, StoreSource
from sememe.store import Store
from sememe.text import fetch
from sememe.text import fingerprint as text_fingerprint
from sememe.tracking import read_log
from sememe.train.config import TrainConfig
from sememe.train.crew import Crew, Team, device_of
from sememe.train.dead import second_dictionary
from sememe.train.fits import check_fits
from sememe.train.member import ALONE, Spec
from sememe.train.objective import Objective
from sememe.train.run import LOG, LOGS, N_PROBE_ROWS, Run
from sememe.train.schedule import count_steps
from sememe.train.snapshots import FOLDER
from sememe.train.sweep import INDEX, Sweep, Swept, open_sweep, variants
from sememe.train.watch import WATCHED, Probe, Watch
from sememe.train.workers import Workers

if TYPE_CHECKING:
    from sememe.lm import LanguageModel

__all__ = ["train", "train_sweep"]

VERSION = 6


class _Stream(NamedTuple):
    """Where activations come from, and what an artifact remembers of that."""

    source: Source
    parents: dict[str, str]
    extra: dict[str, Any]
    objective: Objective | None = None


def train(
    config: TrainConfig,
    *,
    source: Source | None = None,
    parents: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
    objective: Objective | None = None,
    probes: Sequence[Probe] = (),
    fresh: bool = False,
) -> Dictionary:
    """Train a dictionary, or open it if it is there.

    Args:
        config: What, on what, for how long.
        source: Where activations come from; the store at config.store if not given.
        parents: Fingerprints of what the source is made from; the store's if the source is not given.
        extra: More to remember in the dictionary's meta.json (the token policy, for a live source).
        objective: What it is trained for on the given source; the dictionary's own loss if not given.
        probes: What to measure on the way, beside the held-out rows; their numbers go to watched.jsonl.
        fresh: Replace whatever stands at config.out.

    Returns:
        The finished dictionary, folded: it takes and gives raw activations.

    Raises:
        ConfigError: an option is out of range for this source, or the config is a sweep's.
        ActivationError: the loss is NaN or infinite, or the source ended early; the last good checkpoint is kept.
        MismatchError: another dictionary, or a checkpoint of another set-up, stands at config.out.
        LockError: another run is writing there.
        ResourceError: it cannot fit in the memory that is free; says which number would.
    """
    if config.sweep:
        raise ConfigError(
            "train makes one dictionary", f"a sweep over {', '.join(config.sweep)}", "Call train_sweep."
        )
    if len(config.devices) > 1:
        raise ConfigError(
            "devices must be one for one dictionary: more share the dictionaries of a sweep",
            ", ".join(config.devices),
            "Name one, or sweep over something.",
        )
    if source is None and objective is not None:
        raise ConfigError(
            "an objective must come with its source",
            "no source",
            "Pass both, or set end_to_end in the config.",
        )
    given = None if source is None else _Stream(source, parents or {}, extra or {}, objective)
    stream = given or _stream(config, config.inputs, config.outputs, extra or {})
    stream = stream._replace(parents=stream.parents | second_dictionary(config, stream.source.d_out))
    identity = artifact.identity_of("dictionary", VERSION, config, stream.parents)
    if not fresh and artifact.find(config.out, "dictionary", identity, config, stream.parents):
        return dictionaries.load(config.out)
    source = stream.source
    spec = Spec(ALONE, config, source.d_in, source.d_out, source.sites, None)
    check_fits(config, [spec], source)
    with (
        _building(config, "dictionary", stream.parents, fresh) as work,
        _trained(config, [spec], {}, stream, work, probes) as team,
    ):
        about = team.write(ALONE, work.path, source.sample(N_PROBE_ROWS), source.n_rows)
        work.extra = stream.extra | about
    return dictionaries.load(config.out)


def train_sweep(
    config: TrainConfig,
    *,
    source: Source | None = None,
    parents: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
    fresh: bool = False,
) -> Sweep:
    """Train the dictionaries of a sweep side by side on one stream, or open them if they are there.

    Each becomes what `train` would make of its own config from the same stream, on a CPU to the same bits.

    Args:
        config: With a sweep; the rest as for `train`.
        source: Where activations come from; the store at config.store if not given.
        parents: Fingerprints of what the source is made from; the store's if the source is not given.
        extra: More to remember in each dictionary's meta.json.
        fresh: Replace whatever stands at config.out.

    Returns:
        The sweep's folder, opened: an index, and a dictionary in a folder of its own for each combination.

    Raises:
        ConfigError: the sweep is over an option that is unknown, shared or without effect; also as for `train`.
        ActivationError, MismatchError, LockError, ResourceError: as for `train`.
    """
    if not config.sweep:
        raise ConfigError(
            "sweep must be given for a sweep", "nothing", "Call train, or pass --sweep k=16,32."
        )
    given = None if source is None else _Stream(source, parents or {}, extra or {})
    stream, members = _opened(config, given, extra or {})
    if len(config.devices) > len(members):
        raise ConfigError(
            f"devices must be no more than the dictionaries ({len(members)})",
            len(config.devices),
            "Name fewer, or sweep over more.",
        )
    specs = _specs(config, members, stream, opened=given is None)
    seconds = {spec.name: second_dictionary(spec.config, spec.d_out) for spec in specs}
    all_parents = stream.parents | {
        f"{role} of {name}": fingerprint for name, own in seconds.items() for role, fingerprint in own.items()
    }
    identity = artifact.identity_of("sweep", VERSION, config, all_parents)
    if not fresh and artifact.find(config.out, "sweep", identity, config, all_parents):
        return open_sweep(config.out)
    check_fits(config, specs, stream.source)
    configs = {member.name: member.config for member in members}
    with (
        _building(config, "sweep", all_parents, fresh) as work,
        _trained(config, specs, configs, stream, work) as team,
    ):
        _write_members(team, members, seconds, stream, work)
    return open_sweep(config.out)


# -- where activations come from -----------------------------------------------------------------------------


def _opened(config: TrainConfig, given: _Stream | None, extra: dict[str, Any]) -> tuple[_Stream, list[Swept]]:
    """A sweep's stream and its members; globs among their hookpoints need the store or the model to be resolved."""
    if given is not None:
        return given, variants(config, _expand_among(given.source))
    lm = None
    if config.live:
        lm = _load(config)
        members = variants(config, lambda pattern: lm.expand((pattern,)))
    else:
        members = variants(config, _expand_in(open_stores([config.store, *config.join])))
    return _stream(config, *_hookpoints(members), extra, lm), members


def _hookpoints(members: list[Swept]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """What the stream must hold: every member's inputs and outputs, once each; as they are where all agree."""
    wanted = {(member.config.inputs, member.config.outputs) for member in members}
    if len(wanted) == 1:
        return wanted.pop()
    names: dict[str, None] = {}
    for member in members:
        names |= dict.fromkeys((*(member.config.inputs or ()), *(member.config.outputs or ())))
    return tuple(names), None


def _stream(
    config: TrainConfig,
    inputs: tuple[str, ...] | None,
    outputs: tuple[str, ...] | None,
    extra: dict[str, Any],
    lm: LanguageModel | None = None,
) -> _Stream:
    """The store at config.store, or the language model as it runs."""
    seed = config.seed if config.data_seed is None else config.data_seed
    if not config.live:
        store = open_stores([config.store, *config.join])
        about = {
            "policy": store.info.policy.resolved(),
            "store": store.info.resolved(),
            "separation": store.separation,
        }
        stored = StoreSource(store, inputs, outputs, seed)
        return _Stream(stored, store.parents, about | extra)
    assert inputs is not None
    fetch(config.text)
    lm = lm or _load(config)
    parents = {"model": lm.fingerprint, "text": text_fingerprint(config.text)}
    about = extra | {"policy": config.policy.resolved(), "separation": config.text.separation("train")}
    if config.end_to_end.objective != "local":
        objective = EndToEnd(config.end_to_end, lm, inputs, outputs or inputs)
        contexts = objective.source(config.text, config.policy, inputs, outputs)
        return _Stream(contexts, parents, about, objective)
    live = LiveSource(
        lm,
        config.text,
        config.policy,
        inputs,
        outputs,
        seed=seed,
        buffer_mb=config.buffer_mb,
        batch_rows=config.batch_rows,
        positions_per_context=config.positions_per_context,
    )
    return _Stream(live, parents, about)


def _load(config: TrainConfig) -> LanguageModel:
    """The only place here that loads a language model."""
    from sememe import lm as language_models

    return language_models.load(config.model)


def _expand_in(store: Store | JoinedStore) -> Callable[[str], tuple[str, ...]]:
    return lambda pattern: _matching(pattern, tuple(store.info.hookpoints), f"the store {store.name}")


def _expand_among(source: Source) -> Callable[[str], tuple[str, ...]]:
    known = () if source.sites is None else tuple(site.hookpoint for site in source.sites.inputs)
    return lambda pattern: _matching(pattern, known, "the source")


def _matching(pattern: str, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    found = tuple(name for name in known if fnmatch.fnmatchcase(name, pattern))
    if not found:
        raise HookpointError(
            f"a sweep's hookpoints must be in {where}", repr(pattern), nearest(pattern, known)
        )
    return found


# -- from the source to artifacts ----------------------------------------------------------------------------


def _specs(config: TrainConfig, members: list[Swept], stream: _Stream, opened: bool) -> list[Spec]:
    """What the members of a sweep are made from.

    Args:
        config: The sweep's.
        members: Which.
        stream: Where their rows come from.
        opened: It was opened for them, and not given by the caller.
    """
    alike = len({(member.config.inputs, member.config.outputs) for member in members}) == 1
    if config.join and not alike:
        raise ConfigError(
            "a sweep over hookpoints needs a single store", f"{len(config.join)} more to join", "Drop --join."
        )
    if opened and alike:  # the stream holds exactly what they want
        specs = [_whole(member, stream.source) for member in members]
    else:
        specs = [_spec(member, stream.source) for member in members]
    if stream.objective is not None and any(spec.columns is not None for spec in specs):
        raise ConfigError(
            "the dictionaries of a sweep must share inputs and outputs to be trained end to end",
            "several",
            "Train each hookpoint by itself.",
        )
    return specs


def _whole(member: Swept, source: Source) -> Spec:
    return Spec(member.name, member.config, source.d_in, source.d_out, source.sites, None)


def _spec(member: Swept, source: Source) -> Spec:
    """What a member is made from, and which part of the stream is its own."""
    config, sites = member.config, source.sites
    asked = (config.inputs, config.outputs)
    whole = sites is not None and (
        tuple(site.hookpoint for site in sites.inputs),
        tuple(site.hookpoint for site in sites.outputs),
    )
    inputs = config.inputs or ()
    if asked == (None, None) or whole == (inputs, config.outputs or inputs):
        return _whole(member, source)
    if sites is None:
        raise ConfigError(
            "inputs must be left out for a source without hookpoints", asked, "Drop them from the sweep."
        )
    columns = Columns(sites, inputs, config.outputs)
    return Spec(member.name, config, columns.d_in, columns.d_out, columns.sites, columns)


@contextmanager
def _building(
    config: TrainConfig, kind: str, parents: dict[str, str], fresh: bool
) -> Iterator[artifact.Work]:
    with artifact.building(
        config.out,
        kind=kind,
        version=VERSION,
        config=config,
        parents=parents,
        resumable=True,
        fresh=fresh,
        leave_out=("checkpoint.tmp", "checkpoint-*.safetensors", LOGS),
        worth_keeping=(LOG, f"{FOLDER}/*/*"),
        goes_on_from=("checkpoint-*.safetensors", f"{FOLDER}/*/*", f"{LOGS}/*/{FOLDER}/*/*"),
    ) as work:
        yield work


@contextmanager
def _trained(
    config: TrainConfig,
    specs: list[Spec],
    configs: dict[str, TrainConfig],
    stream: _Stream,
    work: artifact.Work,
    probes: Sequence[Probe] = (),
) -> Iterator[Team]:
    """The dictionaries after their last step."""
    source = stream.source
    watch = _watch(config, specs, source, probes)
    n_steps = count_steps(config, source.n_rows)
    with kernels.threads(_threads(config)) as threads:
        team: Team
        if len(config.devices) > 1:
            team = Workers(specs, n_steps, config.devices, threads, config.batch_size, work.path)
        else:
            team = Crew(specs, n_steps, device_of((*config.devices, "cpu")[0]), stream.objective)
        with team:
            Run(config, n_steps, team, configs, source, work.path, threads, watch).go()
            yield team


def _watch(config: TrainConfig, specs: list[Spec], source: Source, probes: Sequence[Probe]) -> Watch:
    """What is measured while dictionaries are trained; held-out rows leave the source here."""
    held = _held_out(config, source) if config.watch_rows else None
    by_name: dict[str, list[Probe]] = {spec.name: list(probes) for spec in specs}
    if config.ce_tokens:
        sites = [spec.sites for spec in specs]
        made = cross_entropy_of(source, sites, config.ce_tokens, config.batch_rows)
        for spec, probe in zip(specs, made, strict=True):
            by_name[spec.name].append(probe)
    if held is None and not any(by_name.values()) and _is_set(config, "watch_every"):
        raise ConfigError(
            "watch_every must be left out when nothing is watched",
            f"{config.watch_every} and a {type(source).__name__} that sets no row aside",
            "Drop it, or hand in probes.",
        )
    return Watch(held, by_name, config.watch_every, config.batch_size)


def _held_out(config: TrainConfig, source: Source) -> Batch | None:
    """The rows that are watched; None where a source has none to set aside and none were asked for by name."""
    held = source.hold_out(config.watch_rows) if isinstance(source, HoldsOut) else None
    if held is not None and held.x.shape[0]:
        return held
    if _is_set(config, "watch_rows"):
        why = "has no hold_out(n)" if held is None else f"holds fewer than {MOST_HELD} rows"
        raise ConfigError(
            "watch_rows must be left out, or 0, for a source that can set no rows aside",
            f"{config.watch_rows} and a {type(source).__name__}, which {why}",
            "Drop it, hand in probes, or give the source more rows or that method.",
        )
    return None


def _is_set(config: TrainConfig, name: str) -> bool:
    return bool(getattr(config, name) != TrainConfig.model_fields[name].default)


def _threads(config: TrainConfig) -> int | None:
    """CPU threads of each process: processes on the CPU share its cores."""
    if config.threads is not None or len(config.devices) < 2:
        return config.threads
    return max(1, torch.get_num_threads() // max(1, config.devices.count("cpu")))


def _write_members(
    team: Team,
    members: list[Swept],
    seconds: dict[str, dict[str, str]],
    stream: _Stream,
    work: artifact.Work,
) -> None:
    """A dictionary artifact for each member, and the index of them all."""
    probe_rows = stream.source.sample(N_PROBE_ROWS)
    index = []
    for name, options, config in members:
        place = work.path / name
        own = work.path / LOGS / name
        log = own / LOG
        parents = stream.parents | seconds[name]
        with artifact.building(
            place, kind="dictionary", version=VERSION, config=config, parents=parents, fresh=True
        ) as inner:
            for file in (log, log.with_name(WATCHED)):
                if file.is_file():
                    shutil.copy(file, inner.path / file.name)
            if (own / FOLDER).is_dir():
                shutil.copytree(own / FOLDER, inner.path / FOLDER)
            about = team.write(name, inner.path, probe_rows, stream.source.n_rows)
            inner.extra = stream.extra | about
        made = artifact.load(place, "dictionary")
        index.append(
            {
                "name": name,
                "options": options,
                "seed": config.seed,
                "identity": made.identity,
                "fingerprint": made.fingerprint,
                "metrics": read_log(log)[-1],
                "config": config.resolved(),
            }
        )
    artifact.write_json(work.path / INDEX, {"format_version": 1, "dictionaries": index})
    work.extra = {"dictionaries": [member.name for member in members]}
