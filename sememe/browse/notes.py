"""What people say of latents: stars, tags, notes, explanations by hand, ratings; a file beside the atlas.

Knows that file and which atlas it belongs to; knows neither HTTP nor the page. An atlas does not change, so its notes
stand beside it, in `NAME.notes.json`: written aside and renamed, so that a reader never sees half of it. They belong
to the dictionary: an atlas of the same dictionary on more text takes them over. Several servers may write one file:
each reads it again before it changes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Container, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sememe import artifact
from sememe.atlas import Atlas, read_notes
from sememe.config import Config
from sememe.errors import ConfigError

__all__ = ["VERDICTS", "Note", "NotesFile", "Rating", "notes_path"]

FORMAT_VERSION = 1
MAX_TEXT, MAX_TAG, MAX_TAGS, MAX_NOTES = 10_000, 60, 30, 200_000
VERDICTS = ("monosemantic", "unclear", "polysemantic")

Json = dict[str, Any]


class Note(Config):
    """What somebody says of a latent."""

    star: bool = False
    """Worth coming back to."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=MAX_TAG)], ...] = Field(
        default=(), max_length=MAX_TAGS
    )
    """Words to find it by."""
    note: str = Field(default="", max_length=MAX_TEXT)
    """Anything."""
    explanation: str = Field(default="", max_length=MAX_TEXT)
    """What it stands for, by hand: shown instead of any other."""
    changed: str = Field(default="", max_length=40)
    """When, ISO 8601."""

    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.star or self.tags or self.note or self.explanation)


class Rating(Config):
    """One verdict of a rater on one latent."""

    session: str = Field(min_length=1, max_length=200)
    """Which queue: its seed and how it was drawn."""
    source: str = Field(default="", max_length=64)
    """Fingerprint of the atlas that the latent is of."""
    latent: int = Field(ge=0)
    """Which."""
    stratum: str = Field(default="", max_length=100)
    """The part of the dictionary it was drawn from."""
    verdict: Literal["monosemantic", "unclear", "polysemantic"]
    """What it was held to be."""
    changed: str = Field(default="", max_length=40)
    """When, ISO 8601."""


def notes_path(atlas: Path) -> Path:
    """Where an atlas's notes stand."""
    atlas = Path(atlas)
    return atlas.with_name(atlas.name + ".notes.json")


class NotesFile:
    """The notes of one atlas: read from their file, and kept in it if they may be written.

    Args:
        atlas: Whose.
        write: Whether they may change.
    Raises:
        CorruptError: the file is damaged.
        MismatchError: it is of another dictionary.
    """

    def __init__(self, atlas: Atlas, *, write: bool) -> None:
        self.path, self.write, self._atlas = notes_path(atlas.artifact.path), write, atlas
        self._of = {
            "atlas": atlas.artifact.fingerprint,
            "dictionary": str(atlas.artifact.meta["parents"].get("dictionary") or ""),
        }
        self._lock = threading.Lock()
        self.notes: dict[int, Note] = {}
        self.ratings: list[Rating] = []
        self._seen: tuple[int, ...] | None = None
        self._read()

    def as_json(self) -> Json:
        """Everything, as it stands in the file."""
        with self._lock:
            self._read()
            return self._json()

    def _read(self) -> None:
        """Read the file, unless it stands as we last saw it."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        if stamp is None:
            self.notes, self.ratings = {}, []
        else:
            self.notes, self.ratings = _understood(read_notes(self.path, self._atlas), str(self.path))
        self._seen = stamp

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes when somebody replaces the file; None where there is none."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else writes the file meanwhile, and we start from what it holds.

        The lock is on the folder: the file itself is replaced, and one beside it would be left lying about.
        """
        with self._lock:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                self._read()
                yield
            finally:
                os.close(folder)

    def _json(self) -> Json:
        return {
            "kind": "notes",
            "format_version": FORMAT_VERSION,
            **self._of,
            "latents": {str(latent): _short(note) for latent, note in sorted(self.notes.items())},
            "ratings": [_short(rating) for rating in self.ratings],
        }

    def put(self, latent: int, note: Json) -> Json:
        """Replace what is said of a latent; a note that says nothing is taken away.

        Raises:
            ConfigError: the note is not one.
        """
        made = Note.build({**note, "changed": _now()}, "the note")
        with self._alone():
            self._merge({latent: made})
            self._save()
        return _short(made)

    def merge(self, document: Json, ids: Container[int]) -> Json:
        """Take over notes and ratings from a document that was exported: its latents replace ours of the same number.

        Args:
            document: What was exported. One that says whose it is must be of this atlas or its dictionary.
            ids: The atlas's latents.
        Raises:
            ConfigError: it is not such a document, or it is of another dictionary.
        """
        if document.get("kind") != "notes":
            raise ConfigError(
                "a file to import must be exported notes", repr(document.get("kind")), "Choose another file."
            )
        said = {str(document[of]) for of in ("atlas", "dictionary") if document.get(of)}
        if said and not said & {value for value in self._of.values() if value}:
            raise ConfigError(
                f"notes to import must be of this atlas's dictionary "
                f"({self._of['dictionary'][:16] or 'a null, which has none'})",
                f"notes of {str(document.get('dictionary') or document.get('atlas'))[:16]}",
                "Open the atlas that they were exported from, or choose another file.",
            )
        notes, ratings = _understood(document, "the file")
        with self._alone():
            for latent in notes:
                if latent not in self.notes:
                    _there(latent, ids)
            for rating in ratings:
                self._check(rating, ids)
            self._merge(notes)
            for rating in ratings:
                self._rate(rating)
            self._save()
            return self._json()

    def rate(self, rating: Json, ids: Container[int]) -> Json:
        """Keep a verdict in place of an earlier one of the same queue on the same latent; None takes it back.

        Args:
            rating: The verdict.
            ids: The atlas's latents.
        Raises:
            ConfigError: it is not a verdict, or on a latent that is not there.
        """
        undo = rating.get("verdict") is None
        made = Rating.build(
            {**rating, "verdict": VERDICTS[0] if undo else rating["verdict"], "changed": _now()}
        )
        self._check(made, ids)
        with self._alone():
            self._rate(made, undo=undo)
            self._save()
        return {} if undo else _short(made)

    def _check(self, rating: Rating, ids: Container[int]) -> None:
        """Queues may be mixed from two atlases: the other's latents are not ours to know."""
        if rating.source in ("", self._of["atlas"]):
            _there(rating.latent, ids)

    def _merge(self, notes: dict[int, Note]) -> None:
        merged = {latent: note for latent, note in (self.notes | notes).items() if not note.is_empty()}
        if len(merged) > MAX_NOTES:
            raise ConfigError(
                f"at most {MAX_NOTES:,} latents can have notes", len(merged), "Take some away first."
            )
        self.notes = merged

    def _rate(self, rating: Rating, *, undo: bool = False) -> None:
        def key(one: Rating) -> tuple[str, str, int]:
            return one.session, one.source, one.latent

        kept = [one for one in self.ratings if key(one) != key(rating)]
        if len(kept) >= MAX_NOTES:
            raise ConfigError(f"at most {MAX_NOTES:,} ratings can be kept", len(kept), "Export them first.")
        self.ratings = kept if undo else [*kept, rating]

    def _save(self) -> None:
        assert self.write, "the server refuses what may not be written"
        artifact.write_json(self.path, self._json())
        self._seen = self._stamp()


def _understood(document: Json, where: str) -> tuple[dict[int, Note], list[Rating]]:
    latents, ratings = document.get("latents", {}), document.get("ratings", [])
    if not isinstance(latents, dict) or not isinstance(ratings, list):
        raise ConfigError(
            f"{where} must hold latents and ratings", type(latents).__name__, "Export it again."
        )
    notes = {}
    for latent, note in latents.items():
        if not (str(latent).isascii() and str(latent).isdigit() and len(str(latent)) < 10):
            raise ConfigError(f"a latent in {where} must be a number", repr(latent)[:40], "Export it again.")
        notes[int(latent)] = Note.build(_object(note, where), where)
    return notes, [Rating.build(_object(rating, where), where) for rating in ratings]


def _there(latent: int, ids: Container[int]) -> None:
    if latent not in ids:
        raise ConfigError(
            "a latent of notes must be one of the atlas's",
            f"latent {latent}, which it does not have",
            "Open the atlas that they were exported from, or leave it out.",
        )


def _object(value: Any, where: str) -> Json:
    if not isinstance(value, dict):
        raise ConfigError(f"an entry of {where} must be an object", repr(value)[:40], "Export it again.")
    return value


def _short(entry: Config) -> Json:
    """Without what was left at its default."""
    return {
        name: value
        for name, value in entry.resolved().items()
        if value != entry.__class__.model_fields[name].default and value != []
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
