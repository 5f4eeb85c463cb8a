"""Two atlases side by side: for each latent of one, those of the other that are most like it.

Knows `Data` and the weights' file of a dictionary; never loads torch. By the best that there is, and says which:

    neighbours   the nearest decoder directions that `interpret --against` kept in the atlas
    directions   the decoder directions themselves, where both dictionaries' folders are known and write to one place
    tokens       the tokens they fire on, each by its share of the latent's activation: cosine of the two profiles

The first two compare what latents write; the last compares only when they fire, and works between any two models.
"""

from __future__ import annotations

import json
import math
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sememe import artifact
from sememe.atlas import NULL_DICTIONARY, Atlas, dictionary_of
from sememe.browse.data import Data, Json
from sememe.errors import ArtifactError, MismatchError

__all__ = ["Compared", "Side", "dictionary_folder"]

WEIGHTS, DECODER = "weights.safetensors", "W_dec"
BLOCK = 256
"""Latents compared at once: BLOCK x the other's latents x 4 bytes of memory."""
N_LIKE = 8
"""Latents shown that are like one."""

Floats = NDArray[np.float32]


class Side(NamedTuple):
    """An atlas to compare, and where its dictionary is, if that is known."""

    data: Data
    dictionary: Path | None


def dictionary_folder(atlas: Atlas, named: Path | None = None) -> Path | None:
    """The folder of an atlas's dictionary: the one that was named, else where it was when the atlas was made, else
    the one beside the atlas; None if none of these is that dictionary any more. A null's atlas keeps its own (those
    of earlier versions do not).

    Raises:
        ArtifactError: the folder that was named holds no dictionary.
        MismatchError: it holds another one.
    """
    try:
        wanted = dictionary_of(atlas)
    except MismatchError:  # a null's, of an earlier version
        if named is not None:
            raise
        return None
    if named is not None:
        found = artifact.load(named, "dictionary").fingerprint
        if found != wanted:
            raise MismatchError(
                f"the dictionary {named} must be that of the atlas {atlas.artifact.path} (fingerprint {wanted[:16]})",
                f"one of {found[:16]}",
                "Name the atlas's own dictionary, or leave --dictionary out.",
            )
        return named
    own, beside = atlas.artifact.path / NULL_DICTIONARY, atlas.artifact.place.parent / "dictionary"
    for folder in (own, *map(Path, atlas.artifact.meta["config"].get("dictionaries") or ()), beside):
        try:
            if artifact.load(folder, "dictionary").fingerprint == wanted:
                return folder
        except ArtifactError:
            continue
    return None


class Compared:
    """The latents of one atlas beside those of another.

    Args:
        mine: The atlas whose latents are gone through.
        other: The atlas that is searched.
    """

    def __init__(self, mine: Side, other: Side) -> None:
        self.mine, self.other = mine, other
        self._lock = threading.Lock()
        self._pairs: tuple[Json, Json | None] | None = None

    # ---- how -------------------------------------------------------------------------------------------------------

    @cached_property
    def method(self) -> str:
        """neighbours, directions or tokens."""
        if self._kept_name is not None:
            return "neighbours"
        return "directions" if self._comparable else "tokens"

    @cached_property
    def about(self) -> str:
        """The method in words."""
        return {
            "neighbours": "cosine of decoder directions, the nearest that the atlas keeps",
            "directions": "cosine of decoder directions",
            "tokens": "cosine of the tokens they fire on (no directions to compare)",
        }[self.method]

    @cached_property
    def _kept_name(self) -> str | None:
        """What the other dictionary is called among the neighbours that the atlas keeps; None if it is not there."""
        parents = self.mine.data.atlas.artifact.meta["parents"]
        wanted = self.other.data.atlas.artifact.meta["parents"].get("dictionary")
        against = {value for role, value in parents.items() if role.startswith("against ")}
        if wanted is None or wanted not in against:
            return None
        names = [
            name
            for (name,) in self.mine.data._rows(
                "SELECT DISTINCT dictionary FROM neighbours WHERE dictionary IS NOT NULL"
            )
        ]
        if len(names) == 1 and len(against) == 1:
            return str(names[0])
        called = str(self.other.data.atlas.meta["dictionary"].get("name"))
        return called if called in names else None

    @cached_property
    def _comparable(self) -> bool:
        """Whether both dictionaries are known and write to one place; their weights are not read for that."""
        if self.mine.dictionary is None or self.other.dictionary is None:
            return False
        mine, other = (
            artifact.load(folder, "dictionary") for folder in (self.mine.dictionary, self.other.dictionary)
        )
        shapes = [_shape(one.file(WEIGHTS)) for one in (mine, other)]
        if _places(mine) is None or _places(mine) != _places(other) or None in shapes:
            return False
        return len({shape[1] for shape in shapes if shape is not None}) == 1

    @cached_property
    def _directions(self) -> tuple[Floats, Floats]:
        """Unit decoder directions of both, by row of the atlas."""
        assert self.mine.dictionary is not None and self.other.dictionary is not None
        a, b = (
            _unit(artifact.load(one.dictionary, "dictionary"))
            for one in (self.mine, self.other)
            if one.dictionary
        )
        return a[np.asarray(self.mine.data.ids)], b[np.asarray(self.other.data.ids)]

    @cached_property
    def _profiles(self) -> tuple[Any, Any]:
        """What each fires on: (latents, tokens) sparse, rows of unit length, by row of the atlas."""
        from scipy.sparse import csr_matrix

        number: dict[bytes, int] = {}
        made: list[tuple[list[int], list[int], list[float], int]] = []
        for side in (self.mine, self.other):
            rows = side.data._rows(
                "SELECT r.latent, t.bytes, t.text, r.share FROM top_tokens r JOIN tokens t ON t.id = r.token "
                "ORDER BY r.latent, r.rank"
            )
            row_of = {latent: row for row, latent in enumerate(side.data.ids)}
            at: list[int] = []
            column: list[int] = []
            value: list[float] = []
            for latent, raw, text, share in rows:
                token = bytes(raw) or str(text).encode("utf-8", "surrogatepass")
                at.append(row_of[latent])
                column.append(number.setdefault(token, len(number)))
                value.append(share if share is not None and math.isfinite(share) else 0.0)
            made.append((at, column, value, len(row_of)))
        out = []
        for rows_at, columns_at, values, n in made:
            matrix = csr_matrix((values, (rows_at, columns_at)), shape=(n, len(number)), dtype=np.float32)
            norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
            matrix.data /= np.maximum(np.repeat(norms, np.diff(matrix.indptr)), 1e-12)
            out.append(matrix)
        return out[0], out[1]

    # ---- one latent ------------------------------------------------------------------------------------------------

    def of(self, latent: int) -> Json | None:
        """The latents of the other that are most like one, the likest first; None if there is no such latent."""
        data = self.mine.data
        if latent not in data.ids:
            return None
        if self.method == "neighbours":
            found = data._rows(
                "SELECT other, cosine FROM neighbours WHERE latent = ? AND dictionary = ? AND kind = 'decoder' "
                f"ORDER BY rank LIMIT {N_LIKE}",
                latent,
                self._kept_name,
            )
            pairs = [(int(other), float(cosine)) for other, cosine in found]
        else:
            likeness = self._block(slice(data.ids.index(latent), data.ids.index(latent) + 1))[0]
            best = np.argsort(-likeness, kind="stable")[:N_LIKE]
            ids = self.other.data.ids
            pairs = [(ids[int(row)], float(likeness[row])) for row in best if likeness[row] > 0]
        return {
            "method": self.method,
            "other": [other for other, _ in pairs],
            "similarity": [round(value, 4) for _, value in pairs],
        }

    def _block(self, rows: slice) -> Floats:
        """How like some of my latents are to all of the other's, by row: (rows, other)."""
        if self.method == "directions":
            a, b = self._directions
            return np.asarray(a[rows] @ b.T, dtype=np.float32)
        mine, other = self._profiles
        return np.asarray((mine[rows] @ other.T).todense(), dtype=np.float32)

    # ---- all of them -----------------------------------------------------------------------------------------------

    def pairs(self) -> Json:
        """Every latent with the likest of the other, in columns; `mutual` where each is the other's likest.

        None where nothing is like it at all, or (`mutual`) where only one direction is known.
        """
        return self._both()[0]

    def back(self) -> Json | None:
        """The pairs of the other with mine, of the same products; None for neighbours, which are kept one way."""
        return self._both()[1]

    def _both(self) -> tuple[Json, Json | None]:
        with self._lock:
            if self._pairs is None:
                self._pairs = (self._kept(), None) if self.method == "neighbours" else self._computed()
            return self._pairs

    def _kept(self) -> Json:
        found = {
            int(latent): (int(other), float(cosine))
            for latent, other, cosine in self.mine.data._rows(
                "SELECT latent, other, cosine FROM neighbours WHERE dictionary = ? AND kind = 'decoder' AND rank = 0",
                self._kept_name,
            )
        }
        ids = self.mine.data.ids
        best = [found.get(latent) for latent in ids]
        return self._columns(
            [None if one is None else one[0] for one in best],
            [None if one is None else round(one[1], 4) for one in best],
            [None] * len(ids),
        )

    def _computed(self) -> tuple[Json, Json]:
        n, m = len(self.mine.data.ids), len(self.other.data.ids)
        best, value = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.float32)
        back, back_value = np.zeros(m, dtype=np.int64), np.full(m, -np.inf, np.float32)
        for start in range(0, n, BLOCK):
            block = self._block(slice(start, start + BLOCK))
            best[start : start + BLOCK] = block.argmax(axis=1)
            value[start : start + BLOCK] = block.max(axis=1)
            column = block.max(axis=0)
            better = column > back_value
            back[better] = block.argmax(axis=0)[better] + start
            back_value[better] = column[better]
        forth = self._matched(best, value, back[best] == np.arange(n))
        return forth, self._matched(back, back_value, best[back] == np.arange(m), turned=True)

    def _matched(
        self, best: NDArray[np.int64], value: Floats, mutual: NDArray[np.bool_], *, turned: bool = False
    ) -> Json:
        others = (self.mine if turned else self.other).data.ids
        like = value > 0
        return self._columns(
            [others[int(row)] if there else None for row, there in zip(best, like, strict=True)],
            [round(float(one), 4) if there else None for one, there in zip(value, like, strict=True)],
            [bool(m) if there else None for m, there in zip(mutual, like, strict=True)],
            turned=turned,
        )

    def _columns(
        self,
        other: list[int | None],
        similarity: list[float | None],
        mutual: list[bool | None],
        *,
        turned: bool = False,
    ) -> Json:
        return {
            "method": self.method,
            "about": self.about,
            "latent": (self.other if turned else self.mine).data.ids,
            "other": other,
            "similarity": similarity,
            "mutual": mutual,
        }


def _places(dictionary: artifact.Artifact) -> list[Any] | None:
    """Where a dictionary writes: model, hookpoint and slice of each output."""
    sites = dictionary.extra.get("sites")
    if not sites:
        return None
    keys = ("model_fingerprint", "hookpoint", "start", "stop")
    return [[site.get(key) for key in keys] for site in sites["outputs"]]


def _unit(dictionary: artifact.Artifact) -> Floats:
    """Unit decoder directions (d_sae, d_out)."""
    directions = _decoder(dictionary.file(WEIGHTS)).astype(np.float32)
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray(directions / np.maximum(norms, 1e-12), dtype=np.float32)


TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}


def _header(path: Path) -> tuple[Json | None, int]:
    """What a safetensors file says of its decoder, and where its tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get(DECODER), 8 + size


def _shape(path: Path) -> tuple[int, int] | None:
    """The decoder's (d_sae, d_out); None where the file holds none in a type that numpy knows."""
    about, _ = _header(path)
    if about is None or about["dtype"] not in TYPES or len(about["shape"]) != 2:
        return None
    return int(about["shape"][0]), int(about["shape"][1])


def _decoder(path: Path) -> NDArray[Any]:
    """The decoder of a safetensors file; bfloat16 is widened by hand, as numpy has no such type."""
    about, begin = _header(path)
    assert about is not None, "its shape was asked for before"
    start, stop = about["data_offsets"]
    with path.open("rb") as file:
        file.seek(begin + start)
        raw = np.frombuffer(file.read(stop - start), TYPES[about["dtype"]])
    if about["dtype"] == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.reshape(about["shape"])
