"""What is to be done: a choice of an atlas's latents and examples, context by context. Runs no model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sememe.atlas import Atlas
from sememe.effects.config import EffectsConfig
from sememe.errors import ActivationError, ConfigError

__all__ = ["Contexts", "Examples", "Group", "chosen_latents", "groups", "read_contexts", "read_examples"]


class Examples(NamedTuple):
    """Examples of the chosen latents; one entry each."""

    latent: np.ndarray
    kind: np.ndarray
    """0: top, 1: decile."""
    decile: np.ndarray
    """-1 where it has none."""
    rank: np.ndarray
    context: np.ndarray
    position: np.ndarray
    start: np.ndarray
    document: np.ndarray
    act: np.ndarray

    def take(self, which: np.ndarray | slice) -> Examples:
        """Some of them."""
        return Examples(*(column[which] for column in self))


class Contexts(NamedTuple):
    """Token rows of an atlas."""

    ids: np.ndarray
    documents: np.ndarray
    """-1 at padding."""


def chosen_latents(atlas: Atlas, config: EffectsConfig) -> list[int]:
    """The latents that are looked at, in ascending order.

    Raises:
        ConfigError: a latent does not exist.
        ActivationError: none of them fires on the atlas's text.
    """
    d_sae = int(atlas.meta["dictionary"]["d_sae"])
    for latent in config.latents:
        if latent >= d_sae:
            raise ConfigError(f"a latent must be in [0, {d_sae - 1}]", latent, "Change --latents.")
    alive = [
        int(row["id"])
        for row in atlas.query("SELECT id FROM latents WHERE n_active > 0 ORDER BY density, id")
    ]
    if config.latents:
        found = sorted(set(config.latents) & set(alive))
    elif config.every or config.n_latents >= len(alive):
        found = sorted(alive)
    else:
        places = np.linspace(0, len(alive) - 1, config.n_latents).round().astype(int)
        found = sorted({alive[place] for place in places})
    if not found:
        raise ActivationError(
            "some of the chosen latents must fire on the atlas's text",
            "none that does",
            "Choose others, or make the atlas over more text.",
        )
    return found


def read_examples(atlas: Atlas, config: EffectsConfig, latents: list[int]) -> Examples:
    """The examples to ablate."""
    kinds = "kind = 'top' AND rank < ?" + (" OR kind = 'decile'" if config.deciles else "")
    table = atlas.connection.execute(
        f"""SELECT latent, (kind = 'decile')::TINYINT AS kind, coalesce(decile, -1)::TINYINT AS decile, rank,
        context, position, start, document, act FROM examples
        WHERE latent IN (SELECT unnest(?)) AND ({kinds})
        ORDER BY latent, kind, decile, rank""",
        [latents, config.n_top],
    ).fetchnumpy()
    return Examples(*(np.asarray(table[name]) for name in Examples._fields))


class Group(NamedTuple):
    """Contexts that go through the model together."""

    contexts: np.ndarray
    """Their ids, ascending."""
    length: int
    """The first so many tokens of them are enough."""
    examples: np.ndarray
    """Which examples lie in them."""


def groups(examples: Examples, batch_rows: int, n_after: int, done: int) -> Iterator[Group]:
    """All contexts, those of which little is needed first; `done` of them are left out."""
    contexts, place = np.unique(examples.context, return_inverse=True)
    needed = np.zeros(contexts.shape[0], np.int64)
    np.maximum.at(needed, place, examples.position.astype(np.int64) + n_after + 2)
    order = np.argsort(needed, kind="stable")
    by_context = np.argsort(place, kind="stable")
    ends = np.searchsorted(place, np.arange(contexts.shape[0] + 1), sorter=by_context)
    for start in range(done, contexts.shape[0], batch_rows):
        some = np.sort(order[start : start + batch_rows])
        inside = np.concatenate([by_context[ends[i] : ends[i + 1]] for i in some])
        yield Group(contexts[some], int(needed[some].max()), inside)


def read_contexts(atlas: Atlas, group: Group) -> Contexts:
    """The token rows of some contexts, as far as they are needed."""
    rows = atlas.query(
        "SELECT token_ids, doc_ids FROM contexts WHERE id IN (SELECT unnest(?)) ORDER BY id",
        group.contexts.tolist(),
    )
    names = ("token_ids", "doc_ids")
    return Contexts(*(np.array([row[name][: group.length] for row in rows], np.int64) for name in names))
