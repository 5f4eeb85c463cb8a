"""Which documents are drawn together, and by what they are told apart. Knows token blocks; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int

from sememe.config import sha256_of
from sememe.text import TokenBlock

__all__ = ["MAX_VALUES", "Units"]

MAX_UNITS = 1024
"""Bootstrap units; with more documents than this, some units are two or more documents of the same tags."""
MOST_UNITS = 2 * MAX_UNITS
"""Units from which on new combinations of tags are no longer told apart."""
MAX_VALUES = 50
"""Values of a tag that are told apart, the first that are read: units are never shared between them."""
UNKNOWN, OTHERS = "unknown", "(others)"


class Units:
    """Which bootstrap unit each document is, and the tags of each unit: language, source, then the named fields.

    Args:
        fields: Tags by which numbers are asked for, too.
    """

    def __init__(self, fields: tuple[str, ...] = ()) -> None:
        self.fields = fields
        self.of: dict[int, int] = {}
        self.tags: list[tuple[str, ...]] = []
        self._by_tags: dict[tuple[str, ...], list[int]] = {}
        self._values: dict[str, set[str]] = {field: set() for field in fields}

    def __call__(self, block: TokenBlock, part: slice) -> Int[np.ndarray, " positions"]:
        """One unit id per position; 0 for padding, which nothing counts."""
        doc_ids = block.doc_ids[part].reshape(-1)
        distinct, first, inverse = np.unique(doc_ids, return_index=True, return_inverse=True)
        units = np.zeros(distinct.shape[0], dtype=np.int64)
        for at in np.argsort(first):  # in reading order, whatever the batch
            if distinct[at] >= 0:
                units[at] = self._unit(int(distinct[at]), block)
        chosen: Int[np.ndarray, " positions"] = units[inverse.reshape(-1)]
        return chosen

    def _unit(self, doc_id: int, block: TokenBlock) -> int:
        if doc_id not in self.of:
            info = block.documents[doc_id]
            tags = (info.language or UNKNOWN, info.source, *(self._value(f, info.tags) for f in self.fields))
            if (
                tags not in self._by_tags and len(self.tags) >= MOST_UNITS
            ):  # tags beyond language and source are many
                tags = (*tags[:2], *(OTHERS for _ in self.fields))
            alike = self._by_tags.setdefault(tags, [])
            if len(self.tags) < MAX_UNITS or not alike:
                alike.append(len(self.tags))
                self.tags.append(tags)
                self.of[doc_id] = alike[-1]
            else:
                self.of[doc_id] = alike[len(self.of) % len(alike)]
        return self.of[doc_id]

    def _value(self, field: str, tags: Mapping[str, str]) -> str:
        """A document's value of a field; of a field with very many, the later ones are one."""
        value, known = tags.get(field, UNKNOWN), self._values[field]
        if value not in known and len(known - {UNKNOWN}) >= MAX_VALUES and value != UNKNOWN:
            return OTHERS
        known.add(value)
        return value

    def fingerprint(self) -> str:
        """Which document is in which unit: measurements that agree in it can be compared draw by draw."""
        return sha256_of(sorted(self.of.items()))

    def where(self, axis: int, value: str) -> Bool[np.ndarray, " units"]:
        return np.array([tags[axis] == value for tags in self.tags], dtype=bool)
