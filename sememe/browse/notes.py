"""What people say of latents: stars, tags, notes, explanations by hand, ratings; a file beside the atlas.

Knows that file and which atlas it belongs to; knows neither HTTP nor the page. An atlas does not change, so its notes
stand beside it, in `NAME.notes.json`: written aside and renamed, so that a reader never sees half of it. They belong
to the dictionary: an atlas of the same dictionary on more text takes them over.
"""

from __future__ import annotations

import threading
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
        self.path, self.write = notes_path(atlas.artifact.path), write
        self._of = {
            "atlas": atlas.artifact.fingerprint,
            "dictionary": str(atlas.artifact.meta["parents"].get("dictionary") or ""),
        }
        self._lock = threading.Lock()
        self.notes: dict[int, Note] = {}
        self.ratings: list[Rating] = []
        if self.path.exists():
            found = read_notes(self.path, atlas)
            self.notes, self.ratings = _understood(found, str(self.path))

    def as_json(self) -> Json:
        """Everything, as it stands in the file."""
        with self._lock:
            return self._json()

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
        with self._lock:
            self._merge({latent: made})
            self._save()
        return _short(made)

    def merge(self, document: Json) -> Json:
        """Take over notes and ratings from a document that was exported: its latents replace ours of the same number.

        Raises:
            ConfigError: it is not such a document.
        """
        if document.get("kind") != "notes":
            raise ConfigError(
                "a file to import must be exported notes", repr(document.get("kind")), "Choose another file."
            )
        notes, ratings = _understood(document, "the file")
        with self._lock:
            self._merge(notes)
            for rating in ratings:
                self._rate(rating)
            self._save()
            return self._json()

    def rate(self, rating: Json) -> Json:
        """Keep a verdict in place of an earlier one of the same queue on the same latent; None takes it back.

        Raises:
            ConfigError: it is not a verdict.
        """
        undo = rating.get("verdict") is None
        made = Rating.build(
            {**rating, "verdict": VERDICTS[0] if undo else rating["verdict"], "changed": _now()}
        )
        with self._lock:
            self._rate(made, undo=undo)
            self._save()
        return {} if undo else _short(made)

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
