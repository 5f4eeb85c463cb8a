"""The verb that asks what each latent does to the model's predictions, and what in the context made it fire.

For examples of an atlas the latent is taken out at its position and the model run on: the change of the loss and of
the likeliest tokens. And the strongest examples are read again without each token before the peak. An artifact of
kind "effects" beside the atlas, which is not changed. Knows an atlas, a dictionary and its model; the forwards are
`downstream`'s.

    config.py     the options
    examples.py   which examples, context by context
    group.py      what a few contexts give
    parts.py      what was found so far, on disk
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.atlas import EFFECTS, NULL_DICTIONARY, REMOVALS, Atlas, dictionary_of, open_atlas
from sememe.downstream import Reruns
from sememe.effects.config import EffectsConfig
from sememe.effects.examples import chosen_latents, groups, read_contexts, read_examples
from sememe.effects.group import measure
from sememe.effects.parts import PARTS, Parts, summary_of, write_tables
from sememe.errors import ActivationError, ArtifactError, MismatchError
from sememe.interrupt import stop_requests
from sememe.lm import LanguageModel, ModelConfig
from sememe.progress import track
from sememe.shuffled import at_home, fingerprint_for, model_for

__all__ = ["Effects", "EffectsConfig", "effects"]

VERSION = 4


class Effects:
    """Finished effects of some of an atlas's latents."""

    def __init__(self, folder: artifact.Artifact) -> None:
        self.artifact = folder

    @property
    def summary(self) -> dict[str, Any]:
        """Counts, mean changes of the loss, and how large rounding alone makes them (`noise`)."""
        summary: dict[str, Any] = self.artifact.extra["summary"]
        return summary

    def rows(self) -> list[dict[str, Any]]:
        """One row per ablation; the columns are those of docs/effects.md."""
        rows: list[dict[str, Any]] = pq.read_table(self.artifact.file(EFFECTS)).to_pylist()
        return rows

    def removals(self) -> list[dict[str, Any]]:
        """One row per token left out of a context."""
        rows: list[dict[str, Any]] = pq.read_table(self.artifact.file(REMOVALS)).to_pylist()
        return rows

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name.replace('_', ' ')}</th><td>{_shown(value)}</td></tr>"
            for name, value in self.summary.items()
        )
        return f"<table><caption>Sememe effects</caption>{rows}</table>"


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def effects(config: EffectsConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> Effects:
    """Measure the effects of some latents, or open them if they are there.

    Args:
        config: Which latents of which atlas.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.
    Raises:
        ArtifactError: config.atlas is not an atlas, or its dictionary is not where it was.
        MismatchError: the atlas is of another dictionary or model, or other effects stand at config.out.
        ConfigError: a latent does not exist.
        ActivationError: none of the latents fires, or an activation is NaN or infinite.
    """
    atlas = open_atlas(config.atlas)
    try:
        chosen = chosen_latents(atlas, config)
        saved = artifact.load(_dictionary_of(atlas, config), "dictionary")
        model = model_for(saved, config.model)
        fingerprint = lm.fingerprint if lm else language_models.fingerprint_of(model)
        _check_model(atlas, saved, model, fingerprint)
        parents = {
            "atlas": atlas.artifact.fingerprint,
            "dictionary": dictionary_of(atlas),
            "model": fingerprint,
        }
        identity = artifact.identity_of("effects", VERSION, config, parents)
        if not fresh and (found := artifact.find(config.out, "effects", identity, config, parents)):
            return Effects(found)
        lm = lm if lm is not None else language_models.load(model)
        reruns = Reruns(lm, at_home(dictionaries.load(saved.path), saved, lm))
        with artifact.building(
            config.out,
            kind="effects",
            version=VERSION,
            config=config,
            parents=parents,
            resumable=True,
            fresh=fresh,
            leave_out=(PARTS,),
        ) as work:
            parts = Parts(work.path, config.snapshot_seconds)
            try:
                _measure(config, atlas, reruns, chosen, parts)
            except ActivationError:
                shutil.rmtree(work.path)  # going on would end in the same place
                raise
            found_all = parts.all()
            write_tables(work.path, found_all, lm.token_text, config.n_after)
            work.extra["summary"] = summary_of(found_all, config.n_after)
            work.extra["latents"] = chosen
    finally:
        atlas.close()
    return Effects(artifact.load(config.out, "effects"))


def _measure(config: EffectsConfig, atlas: Atlas, reruns: Reruns, chosen: list[int], parts: Parts) -> None:
    """Go through the contexts, from where an earlier run ended."""
    examples = read_examples(atlas, config, chosen)
    n_before = parts.n_done_examples
    with (
        track("effects", len(examples.latent), "ablations", done=n_before) as progress,
        stop_requests() as stop,
    ):
        for group in groups(examples, config.batch_rows, config.n_after, parts.n_done):
            inside = examples.take(group.examples)
            found = measure(reruns, config, read_contexts(atlas, group), group.contexts, inside)
            parts.add(found, len(group.contexts), time.monotonic())
            progress.advance(len(inside.latent))
            if stop.is_set():
                parts.save()
                raise KeyboardInterrupt
    parts.save()


def _dictionary_of(atlas: Atlas, config: EffectsConfig) -> Path:
    """The folder of the dictionary the atlas is of.

    Raises:
        ArtifactError: it is not where it was.
        MismatchError: the one that was named is another.
    """
    wanted = dictionary_of(atlas)
    places = [config.dictionary] if config.dictionary is not None else _recorded(atlas)
    there = [place for place in places if artifact.exists(place)]
    if config.dictionary is None:  # beside an atlas of that name there may be something else
        there = [place for place in there if artifact.kind_of(place) == "dictionary"]
    if not there:
        raise ArtifactError(
            f"the dictionary of the atlas {config.atlas} must be at {' or '.join(map(str, places))}",
            "nothing there",
            "Name its folder with --dictionary.",
        )
    found = {place: artifact.load(place, "dictionary").fingerprint for place in there}
    for place, fingerprint in found.items():
        if fingerprint == wanted:
            return place
    raise MismatchError(
        f"the atlas {config.atlas} must be of the dictionary {there[0]} (fingerprint {found[there[0]][:16]})",
        f"an atlas of {wanted[:16]}",
        "Name the dictionary that the atlas was made from, or make the atlas again.",
    )


def _recorded(atlas: Atlas) -> list[Path]:
    """Where the dictionaries of the run that made an atlas were, and may be now: beside it. A null's is inside it."""
    own = atlas.artifact.path / NULL_DICTIONARY
    if artifact.exists(own):
        return [own]
    recorded = [Path(path) for path in atlas.artifact.meta["config"].get("dictionaries", ())]
    near = atlas.artifact.place.parent
    return list(dict.fromkeys((*recorded, *(near / path.name for path in recorded), near / "dictionary")))


def _check_model(atlas: Atlas, saved: artifact.Artifact, model: ModelConfig, fingerprint: str) -> None:
    wanted = fingerprint_for(saved, str(atlas.artifact.meta["parents"].get("model")))
    if wanted != fingerprint:
        raise MismatchError(
            f"the model {model.name()} (fingerprint {fingerprint[:16]}) must be the atlas's",
            f"an atlas of {atlas.meta['dictionary'].get('model', 'another')} ({wanted[:16]})",
            f"Pass --model {atlas.meta['dictionary'].get('model', '')}.",
        )
