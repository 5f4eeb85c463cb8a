"""The verb that runs dictionaries over a text and writes down what every latent does: the atlas.

Knows models, text and dictionaries, and the atlas's schema; how latents are followed is `collect`'s. One
forward per token for all dictionaries, stopped after their last input; or none, where a store holds what it
would give. Memory grows with the text by 8 bytes a document and no more: the collectors are bounded (see
`collect`), and token rows, documents and active latents go to disk until they are picked out and counted.
Interrupted and started again, it goes on from its last snapshot with the same result.

    config.py     the options
    stream.py     the pass over the text, its snapshots
    followed.py   one dictionary of the pass
    controls.py   the nulls
    relations.py  latents beside latents, neurons, other dictionaries
    clusters.py   the map and its groups
    database.py   what was found, as an atlas
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sememe import artifact, dictionaries, tuned
from sememe import lm as language_models
from sememe.atlas import DATABASE, NULL_DICTIONARY, Atlas, open_atlas
from sememe.config import sha256_of
from sememe.dictionaries import Dictionary, Site
from sememe.dictionaries.folders import paths_in
from sememe.errors import ActivationError, ConfigError, MismatchError, TextError
from sememe.interpret.config import RANDOMISED, InterpretConfig
from sememe.interpret.controls import controls
from sememe.interpret.database import lens_layer, write_database
from sememe.interpret.followed import PAIRS
from sememe.interpret.stream import DOCUMENTS, ROWS, SNAPSHOT, Pass, enough_documents
from sememe.lm import LanguageModel
from sememe.store import Store, open_store
from sememe.text import TokenPolicy, fetch, fingerprint
from sememe.tuned import Lens, open_lens

__all__ = ["RANDOMISED", "InterpretConfig", "interpret", "interpret_all", "parents_of"]

VERSION = 7
NULL_FOLDER = "null-{}"


class _Wanted(NamedTuple):
    """An atlas to be made."""

    name: str
    config: InterpretConfig
    """Of this one alone."""
    parents: dict[str, str]
    dictionary: Dictionary
    about: dict[str, Any]
    """What its meta says of the dictionary."""
    folder: Path | None = None
    """Where the dictionary came from, if its checkpoints are there."""


def parents_of(
    config: InterpretConfig, lm_fingerprint: str, dictionary: Path | None = None
) -> dict[str, str]:
    """Fingerprints of what an atlas is made from; of the only dictionary, if none is named."""
    path = dictionary if dictionary is not None else _only(config)
    parents = {"dictionary": artifact.load(path, "dictionary").fingerprint, "model": lm_fingerprint}
    for number, other in enumerate(paths_in(config.against).values() if config.against else ()):
        parents[f"against {number}"] = artifact.load(other, "dictionary").fingerprint
    if config.lens is not None:
        parents["lens"] = tuned.fingerprint_of(config.lens)
    if config.store is not None:
        return parents | {"store": open_store(config.store).fingerprint}
    return parents | {"text": fingerprint(config.text)}


def interpret(config: InterpretConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> Atlas:
    """Make an atlas, or open it if it is there; the nulls' atlases beside it.

    Args:
        config: Which dictionary, over which text, and how many examples to keep.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: config names several dictionaries: `interpret_all` is for those.
        ArtifactError: config.dictionaries is not a dictionary, or another atlas stands at config.out.
        MismatchError: the dictionary belongs to another model, or does not fit the hookpoint.
        HookpointError: the lens has no translator for the layer that the dictionary writes after.
        TextError: the text has too few documents for the examples asked for.
        ActivationError: an activation is NaN or infinite, or no latent ever fires.
    """
    _only(config)
    return next(iter(interpret_all(config, lm=lm, fresh=fresh).values()))


def interpret_all(
    config: InterpretConfig, *, lm: LanguageModel | None = None, fresh: bool = False
) -> dict[str, Atlas]:
    """Make an atlas of each dictionary, in one pass over the text; those that are there are opened.

    Args:
        config: As for `interpret`; of several dictionaries each atlas goes to config.out/NAME.
        lm: As for `interpret`.
        fresh: As for `interpret`.

    Raises:
        SememeError: as `interpret`; MismatchError also if dictionaries have different token policies.
    """
    paths = paths_in(config.dictionaries)
    if config.store is None:
        fetch(config.text)
    print_of = lm.fingerprint if lm is not None else language_models.fingerprint_of(config.model)
    alone = config.replace(nulls=(), n_fit_rows=InterpretConfig.model_fields["n_fit_rows"].default)
    wanted = {}
    for name, path in paths.items():
        out = config.out if len(paths) == 1 else config.out / name
        own = alone.replace(dictionaries=(path,), out=out)
        wanted[name] = (own, parents_of(own, print_of))
    missing = [name for name, (own, parents) in wanted.items() if fresh or not _there(own, parents)]
    nulls_missing = [
        (name, null)
        for name, (own, parents) in wanted.items()
        for null in config.nulls
        if fresh or name in missing or not _there(*_of_null(own, parents, null, config.n_fit_rows))
    ]
    if missing or nulls_missing:
        made = [
            _open(name, *wanted[name]) for name in dict.fromkeys([*missing, *(n for n, _ in nulls_missing)])
        ]
        lm = lm if lm is not None else language_models.load(config.model)
        world = _World.of(config, lm, made)
        world.make([one for one in made if one.name in missing], fresh)
        by_name = {one.name: one for one in made}
        plain = [(by_name[name], null) for name, null in nulls_missing if null != RANDOMISED]
        world.make(_nulls(plain, world, config), fresh)
        shuffled = [by_name[name] for name, null in nulls_missing if null == RANDOMISED]
        if shuffled:
            other = language_models.load(config.model.replace(randomise="layers", randomise_seed=config.seed))
            world._replace(lm=other, store=None).make([_shuffled(one, config) for one in shuffled], fresh)
    return {name: open_atlas(own.out) for name, (own, _) in wanted.items()}


def _only(config: InterpretConfig) -> Path:
    paths = list(paths_in(config.dictionaries).values())
    if len(paths) != 1:
        raise ConfigError(
            "one dictionary must be named where one atlas is wanted",
            f"{len(paths)} of them",
            "Name one, or call interpret_all.",
        )
    return paths[0]


def _there(config: InterpretConfig, parents: dict[str, str]) -> bool:
    identity = artifact.identity_of("atlas", VERSION, config, parents)
    return artifact.find(config.out, "atlas", identity, config, parents) is not None


def _open(name: str, config: InterpretConfig, parents: dict[str, str]) -> _Wanted:
    path = config.dictionaries[0]
    saved, dictionary = artifact.load(path, "dictionary"), dictionaries.load(path)
    if dictionary.sites is None:
        raise MismatchError(
            "the dictionary must say which hookpoints it reads",
            "one that does not",
            "Train it on a language model.",
        )
    about = _about(dictionary, path.name, saved.fingerprint)
    return _Wanted(name, config, parents, dictionary, about, path)


def _about(dictionary: Dictionary, name: str, fingerprint: str) -> dict[str, Any]:
    sites = _inputs(dictionary)
    return {
        "name": name,
        "kind": dictionary.kind,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "hookpoint": ", ".join(site.hookpoint for site in sites),
        "model": sites[0].model,
        "fingerprint": fingerprint,
    }


# -- nulls ---------------------------------------------------------------------------------------------


def _of_null(
    config: InterpretConfig, parents: dict[str, str], null: str, n_fit_rows: int
) -> tuple[InterpretConfig, dict[str, str]]:
    """The config and parents of a null's atlas: it depends on the dictionary for its number of active latents."""
    rows = "" if null == RANDOMISED else f", fitted to {n_fit_rows} rows"
    out = config.out / NULL_FOLDER.format(null)
    kept = {role: parents[role] for role in ("model", "store", "text") if role in parents}
    about = {"null": f"{null}{rows}", "null of": parents["dictionary"]}
    return config.replace(out=out, lens=None, against=()), kept | about


def _nulls(missing: list[tuple[_Wanted, str]], world: _World, config: InterpretConfig) -> list[_Wanted]:
    found = []
    by_dictionary: dict[str, list[str]] = {}
    for one, null in missing:
        by_dictionary.setdefault(one.name, []).append(null)
    owners = {one.name: one for one, _ in missing}
    for name, nulls in by_dictionary.items():
        one = owners[name]
        made = controls(one.dictionary, nulls, config, world.lm, world.policy, world.store)
        for null, dictionary in made.items():
            own, parents = _of_null(one.config, one.parents, null, config.n_fit_rows)
            about = _about(dictionary, NULL_FOLDER.format(null), sha256_of(parents)) | {"null": null}
            found.append(_Wanted(f"{name} {NULL_FOLDER.format(null)}", own, parents, dictionary, about))
    return found


def _shuffled(one: _Wanted, config: InterpretConfig) -> _Wanted:
    """The dictionary itself, to be run on the shuffled model. Norms are others there, so none is an outlier."""
    own, parents = _of_null(one.config, one.parents, RANDOMISED, config.n_fit_rows)
    dictionary = dictionaries.load(one.config.dictionaries[0])
    assert dictionary.sites is not None
    inputs = tuple(site.replace(max_norm=None) for site in dictionary.sites.inputs)
    dictionary.sites = dictionary.sites.replace(inputs=inputs)
    about = one.about | {"name": NULL_FOLDER.format(RANDOMISED), "null": RANDOMISED}
    return _Wanted(f"{one.name} {NULL_FOLDER.format(RANDOMISED)}", own, parents, dictionary, about)


# -- making --------------------------------------------------------------------------------------------


class _World(NamedTuple):
    """What all atlases of a call share."""

    lm: LanguageModel
    policy: TokenPolicy
    store: Store | None
    against: Mapping[str, Dictionary]
    places: Mapping[str, Path]
    """Where those came from: none is looked for in itself."""
    lens: Lens | None

    @classmethod
    def of(cls, config: InterpretConfig, lm: LanguageModel, wanted: list[_Wanted]) -> _World:
        """Everything opened and checked, before the first forward."""
        policies = {}
        for one in wanted:
            check(one.dictionary, lm)
            saved = artifact.load(one.config.dictionaries[0], "dictionary").extra.get("policy")
            policies[one.name] = TokenPolicy.build(saved) if saved else TokenPolicy()
        first = next(iter(policies))
        for name, policy in policies.items():
            if policy != policies[first]:
                raise MismatchError(
                    f"dictionaries of one pass must have one token policy, that of {first} "
                    f"({policies[first].resolved()})",
                    f"{policy.resolved()} of {name}",
                    "Run sememe interpret for each.",
                )
        store = None if config.store is None else open_store(config.store)
        if store is not None:
            for one in wanted:
                check_store(store, one.dictionary, policies[first])
            enough_documents(config, store.n_documents)
        places = paths_in(config.against) if config.against else {}
        against = {name: dictionaries.load(path) for name, path in places.items()}
        for name, other in against.items():
            for one in wanted:
                _check_against(one, name, other)
        lens = None if config.lens is None else open_lens(config.lens, lm)
        if lens is not None:
            for one in wanted:
                if (layer := lens_layer(one.dictionary, lm)) is not None:
                    lens.check(layer)
        return cls(lm, policies[first], store, against, places, lens)

    def make(self, wanted: list[_Wanted], fresh: bool) -> None:
        """One pass, and the atlases of it. The first one's folder holds what the pass writes down on its way."""
        if not wanted:
            return
        building = [_building(one, fresh) for one in wanted]
        with contextlib.ExitStack() as stack:
            works = [stack.enter_context(one) for one in building]
            identities = [_identity(one) for one in wanted]
            followed = {one.name: one.dictionary for one in wanted}
            run = Pass(
                wanted[0].config, self.lm, followed, self.policy, works[0].path, self.store, identities
            )
            stack.callback(run.close)
            try:
                run.run(resume=works[0].resumed)
                run.check()
            except (ActivationError, TextError):
                for work in works:
                    shutil.rmtree(work.path)  # going on would end in the same place
                raise
            silent = []
            for one, own, work, done in zip(wanted, run.followed, works, building, strict=True):
                if not own.collector.n_active.any():
                    silent.append(one.name)
                    continue
                others, lens = self._beside(one)
                write_database(work.path / DATABASE, run, own, one.about, others, one.folder, lens)
                if "null" in one.about:
                    _keep(one, work.path / NULL_DICTIONARY, run.policy)
                work.extra = {
                    "policy": run.policy.resolved(),
                    "n_tokens": own.collector.n_tokens,
                    "n_outliers": own.n_outliers,
                }
                done.whole = True
            if silent:
                raise ActivationError(
                    f"the dictionary {' and '.join(silent)} must fire on some token of the text",
                    f"no activation on {run.n_read:,} tokens",
                    "Leave it out of --nulls."
                    if "null" in wanted[0].about
                    else "Train it longer, or check that it belongs to this model and hookpoint.",
                )

    def _beside(self, one: _Wanted) -> tuple[dict[str, Dictionary], Lens | None]:
        """Dictionaries and lens that an atlas's own config names: those of nulls name none."""
        others = {name: d for name, d in self.against.items() if one.folder != self.places[name]}
        return (others if one.config.against else {}), (self.lens if one.config.lens is not None else None)


def _keep(one: _Wanted, folder: Path, policy: TokenPolicy) -> None:
    """A null's dictionary, which stands nowhere else: texts that were written for its latents are run through it."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(16, one.dictionary.d_in, generator=generator)
    dictionary = one.dictionary.cpu()
    dictionary.save(
        folder, probe, parents=one.parents, extra={"policy": policy.resolved()}, fresh=folder.is_dir()
    )


def _identity(one: _Wanted) -> str:
    """What an atlas in the making is of. Two dictionaries may have the same weights, at different places."""
    sites = None if one.dictionary.sites is None else one.dictionary.sites.resolved()
    return sha256_of([artifact.identity_of("atlas", VERSION, one.config, one.parents), sites])


class _building(contextlib.AbstractContextManager[artifact.Work]):
    """An atlas being built that is finished once it is whole, whatever becomes of the others of its pass."""

    def __init__(self, one: _Wanted, fresh: bool) -> None:
        self.whole = False
        self.inner = artifact.building(
            one.config.out,
            kind="atlas",
            version=VERSION,
            config=one.config,
            parents=one.parents,
            resumable=True,
            fresh=fresh,
            leave_out=(SNAPSHOT, ROWS, DOCUMENTS, f"{PAIRS}-*", f"{DATABASE}.wal"),
        )

    def __enter__(self) -> artifact.Work:
        self.work = self.inner.__enter__()
        return self.work

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        if self.whole:
            self.inner.__exit__(None, None, None)
            return None
        if isinstance(error, ActivationError) and self.work.path.exists():
            shutil.rmtree(self.work.path)  # it would be silent again
        return self.inner.__exit__(kind, error, trace)


def _same_place(a: Dictionary, b: Dictionary) -> bool:
    return _outputs(a) == _outputs(b)


def _outputs(dictionary: Dictionary) -> list[tuple[str, str]]:
    assert dictionary.sites is not None
    return [(site.model_fingerprint, site.hookpoint) for site in dictionary.sites.outputs]


def _check_against(one: _Wanted, name: str, other: Dictionary) -> None:
    if other.sites is None or not _same_place(other, one.dictionary):
        raise MismatchError(
            f"a dictionary that latents are looked for in must write where {one.name} does, "
            + ", ".join(hookpoint for _, hookpoint in _outputs(one.dictionary)),
            f"{name}, which writes to "
            + (
                ", ".join(h for _, h in _outputs(other))
                if other.sites is not None
                else "no hookpoint it names"
            ),
            "Leave it out of --against.",
        )


def check(dictionary: Dictionary, lm: LanguageModel) -> None:
    """That a dictionary reads this model, and that its inputs have the model's widths.

    Raises:
        MismatchError: it does not.
    """
    for site in _inputs(dictionary):
        if site.model_fingerprint != lm.fingerprint:
            raise MismatchError(
                f"the dictionary must belong to the model {lm.name} (fingerprint {lm.fingerprint[:16]})",
                f"one that reads {site.model} ({site.model_fingerprint[:16]})",
                f"Pass --model {site.model}, or a dictionary of {lm.name}.",
            )
        width = lm.width(site.hookpoint)
        if site.stop - site.start != width:
            raise MismatchError(
                f"the dictionary must read all {width} features of {site.hookpoint} of {lm.name}",
                f"d_in {site.stop - site.start}",
                "Use the dictionary with the model and hookpoint it was trained on.",
            )


def check_store(store: Store, dictionary: Dictionary, policy: TokenPolicy) -> None:
    """That a store holds what a dictionary reads.

    Raises:
        HookpointError: the store lacks a hookpoint.
        MismatchError: it is of another model or token policy.
    """
    sites = _inputs(dictionary)
    store.check_hookpoints(site.hookpoint for site in sites)
    for site in sites:
        if site.model_fingerprint != store.info.model_fingerprint:
            raise MismatchError(
                f"the store must be of the dictionary's model (fingerprint {site.model_fingerprint[:16]})",
                f"one of {store.info.model} ({store.info.model_fingerprint[:16]})",
                "Pass the store the dictionary was trained on, or leave --store out.",
            )
    if store.info.policy != policy:
        raise MismatchError(
            f"the store must have the dictionary's token policy {policy.resolved()}",
            str(store.info.policy.resolved()),
            "Pass the store the dictionary was trained on, or leave --store out.",
        )


def _inputs(dictionary: Dictionary) -> tuple[Site, ...]:
    assert dictionary.sites is not None
    return dictionary.sites.inputs
