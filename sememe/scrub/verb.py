"""Opens dictionaries, tests the circuit, measures what sources do downstream, and writes numbers and a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sememe import artifact, figures
from sememe import lm as language_models
from sememe.config import sha256_of
from sememe.dictionaries import load
from sememe.dictionaries.base import Dictionary
from sememe.dictionaries.folders import paths_in
from sememe.edits import check
from sememe.errors import ConfigError, MismatchError, TextError
from sememe.lm import LanguageModel
from sememe.measure.checks import check_model, one_policy, policy_of, sites_of
from sememe.scrub.circuit import Place, named, read_circuit
from sememe.scrub.config import ScrubConfig
from sememe.scrub.downstream import Changes, Source, downstream, most_active
from sememe.scrub.inputs import Inputs
from sememe.scrub.scrubbing import Scrubber, scrub_circuit
from sememe.text import TokenPolicy, attributions, fetch, fingerprint

__all__ = ["DOWNSTREAM", "SCRUBBING", "scrub"]

VERSION = 2  # before version 2 activations were taken from positions that the policy drops, too
SCRUBBING = "scrub.json"
DOWNSTREAM = "downstream.parquet"
SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("dictionary", pa.string()),
        ("target", pa.int32()),
        ("mean_change", pa.float32()),
        ("n", pa.int32()),
        ("n_both", pa.int32()),
        ("control", pa.bool_()),
    ]
)


def scrub(config: ScrubConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> artifact.Artifact:
    """Test a hypothesised circuit, measure downstream effects, or open what was found if it is there.

    Args:
        config: Which circuit, on which inputs.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.
    Returns:
        The folder, with scrub.json, scrub.md and scrub.html; with later dictionaries downstream.parquet, too.
    Raises:
        ConfigError: the circuit names what is not there, or an option has no effect.
        MismatchError: a dictionary belongs to another model, writes elsewhere than it reads, or shares its hookpoint or
            policy; or something else stands at config.out.
        TextError: the text is too short, or gives one context only.
        ActivationError: the metric is NaN or infinite.
    """
    saved = {name: artifact.load(path, "dictionary") for name, path in paths_in(config.dictionaries).items()}
    dictionaries = {name: load(one.path) for name, one in saved.items()}
    model_print = lm.fingerprint if lm is not None else language_models.fingerprint_of(config.model)
    for name, one in saved.items():
        _check_one(name, dictionaries[name], one.path, model_print)
    policy = one_policy({name: policy_of(None, one, None) for name, one in saved.items()})
    parents = {f"dictionary: {name}": one.fingerprint for name, one in saved.items()}
    parents["model"] = model_print
    if config.circuit is not None:
        parents["circuit"] = sha256_of(_text_of(config.circuit, "a circuit"))
    if config.pairs is not None:
        parents["pairs"] = sha256_of(_text_of(config.pairs, "pairs"))
    if not config.on_prompts:
        fetch(config.text)
        parents["text"] = fingerprint(config.text)
    identity = artifact.identity_of("scrubbing", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "scrubbing", identity, config, parents)):
        return done
    lm = lm if lm is not None else language_models.load(config.model)
    places = _places(dictionaries, lm)
    with artifact.building(
        config.out, kind="scrubbing", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        data = _measured(config, lm, places, policy, work.path)
        artifact.write_json(work.path / SCRUBBING, data)
        figures.write_scrubbing(work.path, data)
        work.extra = {"dictionaries": [place.name for place in places]}
    return artifact.load(config.out, "scrubbing")


def _text_of(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"{what} must be a file that can be read", f"{path}: {error}", "Name another."
        ) from None


def _check_one(name: str, dictionary: Dictionary, path: Path, model_print: str) -> None:
    sites = sites_of(dictionary, path)
    check_model(sites, model_print)
    if len(sites.inputs) > 1 or sites.inputs != sites.outputs:
        raise MismatchError(
            "a dictionary must read and write one hookpoint, to be scrubbed in one forward",
            f"{name}, of {', '.join(sites.hookpoints)}",
            "Leave it out, or name an autoencoder of one layer.",
        )


def _reached(lm: LanguageModel, names: list[str]) -> list[str]:
    """Hookpoints in the order in which a forward reaches them."""
    order: list[str] = []

    def look(name: str) -> Callable[[Tensor], Tensor]:
        def note(x: Tensor) -> Tensor:
            if name not in order:
                order.append(name)
            return x

        return note

    with torch.no_grad(), lm.edit({name: look(name) for name in names}):
        lm.hidden(torch.zeros(1, 1, dtype=torch.long))
    return order


def _places(dictionaries: dict[str, Dictionary], lm: LanguageModel) -> tuple[Place, ...]:
    """The dictionaries in the order in which a forward reaches them."""
    found: dict[str, Place] = {}
    for name, dictionary in dictionaries.items():
        check(dictionary.to(lm.device), lm)
        assert dictionary.sites is not None
        hookpoint = dictionary.sites.inputs[0].hookpoint
        if hookpoint in found:
            raise MismatchError(
                "each dictionary must have a hookpoint of its own",
                f"{found[hookpoint].name} and {name} at {hookpoint}",
                "Leave one out.",
            )
        found[hookpoint] = Place(name, hookpoint, dictionary)
    order = _reached(lm, list(found))
    return tuple(found[hookpoint] for hookpoint in order)


# -- measuring -----------------------------------------------------------------------------------------------------


def _measured(
    config: ScrubConfig, lm: LanguageModel, places: tuple[Place, ...], policy: TokenPolicy, folder: Path
) -> dict[str, Any]:
    circuit = None if config.circuit is None else read_circuit(config.circuit, places)
    source = _source(config, places)
    inputs = Inputs(config, lm, places, policy)
    data: dict[str, Any] = {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "dictionaries": [
            {"name": place.name, "hookpoint": place.hookpoint, "d_sae": place.dictionary.d_sae}
            for place in places
        ],
        "inputs": "prompts" if config.on_prompts else "text",
        "n_left_out": inputs.n_left_out,
        "attributions": [] if config.on_prompts else [a._asdict() for a in attributions(config.text)],
    }
    if circuit is not None:
        data["circuit"] = scrub_circuit(config, Scrubber(config, inputs), circuit)
    if source is not None:
        latents = config.latents or most_active(inputs, source, config.n_latents)
        data["downstream"] = _downstream(config, inputs, Source(source, latents), folder)
    return data


def _source(config: ScrubConfig, places: tuple[Place, ...]) -> int | None:
    """The place whose latents are taken out; None if no downstream effects are asked for."""
    asked = bool(config.latents or config.source)
    if not asked and (not config.n_latents or (len(places) == 1 and config.circuit is not None)):
        return None
    source = 0 if config.source is None else named(config.source, places)
    if source == len(places) - 1:
        raise ConfigError(
            "downstream effects must have a dictionary of a later hookpoint",
            f"{places[source].name}, the last" if len(places) > 1 else "one dictionary",
            "Name another dictionary, or another --source.",
        )
    d_sae = places[source].dictionary.d_sae
    for latent in config.latents:
        if latent >= d_sae:
            raise ConfigError(
                f"a latent of {places[source].name} must be in [0, {d_sae - 1}]", latent, "Change --latents."
            )
    return source


def _downstream(config: ScrubConfig, inputs: Inputs, source: Source, folder: Path) -> dict[str, Any]:
    """Every edge that is kept as a row of a table; the largest, and sums, as plain JSON data."""
    names = [place.name for place in inputs.places]
    found: list[Changes] = []
    best: list[dict[str, Any]] = []
    largest = {"latents": 0.0, "controls": 0.0}
    n_edges = 0
    with pq.ParquetWriter(folder / DOWNSTREAM, SCHEMA) as table:
        for changes in downstream(
            inputs, source, n_targets=config.n_targets, batch_rows=config.batch_rows, seed=config.seed
        ):
            edges = changes.edges
            columns = {**edges._asdict(), "dictionary": np.array(names, dtype=object)[edges.place]}
            table.write_table(
                pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA})
            )
            found.append(changes._replace(edges=type(edges)(*(column[:0] for column in edges))))
            n_edges += len(edges.source)
            for name, own in (("latents", ~edges.control), ("controls", edges.control)):
                largest[name] = max(largest[name], float(np.abs(edges.mean_change[own]).max(initial=0.0)))
            best += _largest(edges, names, config.n_shown)
            best = sorted(best, key=lambda edge: -abs(edge["mean_change"]))[: config.n_shown]
    total = np.concatenate([changes.total for changes in found])
    n = np.concatenate([changes.n for changes in found])
    fires = n > 0
    later = range(source.place + 1, len(names))
    return {
        "source": names[source.place],
        "latents": [
            {"latent": latent, "n": int(own)} for latent, own in zip(source.latents, n.tolist(), strict=True)
        ],
        "n_edges": n_edges,
        "later": [
            {
                "dictionary": names[number],
                "total": float(total[fires, 0, column].mean()) if fires.any() else None,
                "total_control": float(total[fires, 1, column].mean()) if fires.any() else None,
            }
            for column, number in enumerate(later)
        ],
        "largest": largest,
        "edges": best,
    }


def _largest(edges: Any, names: list[str], n: int) -> list[dict[str, Any]]:
    own = np.flatnonzero(~edges.control)
    order = own[np.argsort(-np.abs(edges.mean_change[own]), kind="stable")[:n]]
    return [
        {
            "source": int(edges.source[i]),
            "dictionary": names[int(edges.place[i])],
            "target": int(edges.target[i]),
            "mean_change": float(edges.mean_change[i]),
            "n": int(edges.n[i]),
            "n_both": int(edges.n_both[i]),
        }
        for i in order
    ]
