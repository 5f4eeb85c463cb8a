"""Opens dictionaries, asks where their latents lie, and writes numbers, a row per latent, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sememe import artifact, figures, metrics
from sememe import lm as language_models
from sememe.config import sha256_of
from sememe.dictionaries.folders import Opened, open_all
from sememe.errors import ConfigError, MismatchError, ShapeError
from sememe.geometry.between import agreement, pairs
from sememe.geometry.config import GeometryConfig
from sememe.geometry.history import history
from sememe.geometry.latents import Activity, activity, nearest_to_probe, of_weights, summarised
from sememe.geometry.rare import Direction, rare
from sememe.lm import LanguageModel
from sememe.measure.checks import check_model, check_store, sign_notice
from sememe.store import Store, open_store

__all__ = ["GEOMETRY", "geometry"]

VERSION = 4
GEOMETRY = "geometry.json"
LATENTS = "latents"


def geometry(
    config: GeometryConfig, *, lm: LanguageModel | None = None, fresh: bool = False
) -> artifact.Artifact:
    """Ask where latents lie, or open what was found if it is there.

    The artifact holds geometry.json, geometry.html, geometry.md with its plots, and `latents/NUMBER.parquet`, a row per
    latent, for each dictionary.

    Args:
        config: Which ones, and what else is at hand.
        lm: The model, if it is loaded already; else it is loaded from config.model, with embeddings.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: two dictionaries are the same; the probe is no direction.
        ShapeError: dictionaries write outputs of different widths; the probe has another.
        MismatchError: the store or the model is not the dictionaries'; or something else stands at config.out.
        ArtifactError: a folder is not a dictionary.
    """
    opened = open_all(config.dictionaries)
    parents = {f"dictionary: {name}": one.saved.fingerprint for name, one in opened.items()}
    probe = None if config.probe is None else _read_probe(config.probe, opened)
    if probe is not None:
        parents["probe"] = sha256_of(probe.tolist())
    store = None if config.store is None else open_store(config.store)
    if store is not None:
        parents["store"] = store.fingerprint
        for name, one in opened.items():
            _check_sites(name, one, "a store")
            assert one.sites is not None
            check_store(store, one.saved, one.sites)
    if config.embeddings:
        parents["model"] = _model_of(config, opened, lm)
    identity = artifact.identity_of("geometry", VERSION, config, parents)
    found = None if fresh else artifact.find(config.out, "geometry", identity)
    if found is not None:
        return found
    with artifact.building(
        config.out, kind="geometry", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        if config.embeddings and lm is None:
            lm = language_models.load(config.model)
        data, columns = _asked(config, opened, lm if config.embeddings else None, store, probe)
        (work.path / LATENTS).mkdir()
        for number, (name, values) in enumerate(columns.items()):
            data["rows"][number]["latents"] = f"{LATENTS}/{number}.parquet"
            _write_latents(work.path / LATENTS / f"{number}.parquet", name, values)
        artifact.write_json(work.path / GEOMETRY, data)
        figures.write_geometry(work.path, data, {name: _plain(one) for name, one in columns.items()})
        work.extra = {"dictionaries": list(opened)}
    return artifact.load(config.out, "geometry")


# -- what belongs together -----------------------------------------------------------------------------------------


def _check_sites(name: str, one: Opened, what: str) -> None:
    if one.sites is None:
        raise MismatchError(
            f"the dictionary {name} must know its model and hookpoint to be compared with {what}",
            "none (it was trained on bare tensors)",
            "Leave that out.",
        )


def _model_of(config: GeometryConfig, opened: dict[str, Opened], lm: LanguageModel | None) -> str:
    fingerprint = lm.fingerprint if lm is not None else language_models.fingerprint_of(config.model)
    for name, one in opened.items():
        _check_sites(name, one, "embeddings")
        assert one.sites is not None
        check_model(one.sites, fingerprint)
    return fingerprint


def _read_probe(path: Path, opened: dict[str, Opened]) -> Float[Tensor, " d_out"]:
    try:
        read = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            "probe must be a .npy file of numbers", f"{path}: {error}", "Write it with numpy.save."
        ) from None
    d_out = next(iter(opened.values())).dictionary.d_out
    if read.shape != (d_out,) or read.dtype.kind not in "fiu":
        raise ShapeError(
            f"probe must be one direction of d_out={d_out} numbers",
            f"{read.dtype} of shape {read.shape}",
            "Flatten it, or name dictionaries of its hookpoint.",
        )
    made = torch.from_numpy(read.astype(np.float32))
    metrics.probe_rank(made[None], made)  # refuses what is no direction
    return made


# -- asking --------------------------------------------------------------------------------------------------------


def _asked(
    config: GeometryConfig,
    opened: dict[str, Opened],
    lm: LanguageModel | None,
    store: Store | None,
    probe: Float[Tensor, " d_out"] | None,
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """geometry.json, and each dictionary's columns."""
    rows, columns, notices = [], {}, list[str]()
    directions_read: dict[str, Direction] = {}
    directions = {
        name: one.dictionary.decoder_directions().detach().float().cpu() for name, one in opened.items()
    }
    for place, (name, one) in enumerate(opened.items()):
        dictionary = one.dictionary
        latents = of_weights(dictionary, lm, config.seed)
        row: dict[str, Any] = {
            "name": name,
            "kind": dictionary.kind,
            "d_sae": dictionary.d_sae,
            "d_out": dictionary.d_out,
            "fingerprint": one.saved.fingerprint,
            "hookpoints": [] if one.sites is None else list(one.sites.hookpoints),
            "outlier_dimensions": metrics.outlier_dimensions(directions[name]).tolist(),
            "random_outlier_dimensions": metrics.outlier_dimensions(
                metrics.random_rows(dictionary.d_sae, dictionary.d_out, config.seed)
            ).tolist(),
        }
        if store is not None:
            active = activity(dictionary, store, config, name)
            latents.columns["density"], latents.random["density"] = active.density, active.random_density
            row |= _of_activity(directions[name], active)
            cluster, direction = rare(config, dictionary, directions[name], active, place)
            row |= {"rare": cluster} if cluster else {}
            if direction is not None:
                directions_read[name] = direction
            notices += [f"{name} may be {cheat}." for cheat in row["cheats"]]
            if active.n_rows < config.n_rows:
                notices.append(
                    f"{name}: {active.n_rows:,} rows were encoded, as many as the store gives at once."
                )
        row["numbers"] = summarised(latents, config)
        if probe is not None:
            row["probe"] = nearest_to_probe(directions[name], probe, config)
        past = history(one.saved.path, config)
        if past is not None:
            row["history"] = past
        rows.append(row)
        columns[name] = latents.columns
    signed = {name: one.dictionary.signed for name, one in opened.items()}
    notices += sign_notice(signed)
    places = {tuple(row["hookpoints"]) for row in rows}
    models = {site.model_fingerprint for one in opened.values() if one.sites for site in one.sites.outputs}
    if len(places) > 1 or len(models) > 1:
        notices.append(
            "Dictionaries are of different hookpoints or models: their directions may live in different bases, and "
            "what is said of pairs of them means little."
        )
    return {
        "format_version": VERSION,
        "rows": rows,
        "pairs": pairs(directions, signed, config),
        "rare_agreement": _agreement(directions_read),
        "bootstrap": {"n": config.n_bootstrap, "seed": config.seed, "level": 0.95, "unit": "latents"},
        "notices": notices,
    }, columns


def _agreement(directions: dict[str, Direction]) -> dict[str, Any] | None:
    """Of inputs of one width: others' directions cannot be compared."""
    same = len({one.drawn.shape[1] for one in directions.values()}) == 1
    return agreement(directions) if same else None


def _of_activity(W_dec: Float[Tensor, "d_sae d"], active: Activity) -> dict[str, Any]:
    """What rows say, but for the rare cluster: l0, cheats, correlations."""
    return {
        "n_rows": active.n_rows,
        "l0": active.l0.to_json(),
        "cheats": list(metrics.cheats(W_dec, active.density, active.l0.value).named),
        "correlations": {
            name: {key: value.to_json() for key, value in each._asdict().items()}
            for name, each in active.correlations.items()
        },
    }


# -- writing -------------------------------------------------------------------------------------------------------


def _plain(columns: dict[str, Tensor]) -> dict[str, Shaped[np.ndarray, " latents"]]:
    return {name: values.cpu().numpy() for name, values in columns.items()}


def _write_latents(path: Path, name: str, columns: dict[str, Tensor]) -> None:
    values = {"latent": np.arange(next(iter(columns.values())).shape[0]), **_plain(columns)}
    table = pa.table(values).replace_schema_metadata({"dictionary": name})
    pq.write_table(table, path, compression="zstd")
