"""Documents out of files, folders, URLs and hub data sets, one at a time. Knows formats, not mixtures or tokens.

A source has an order of its own, the same in every pass; `stream` yields (number in that order, document) with
the numbers shuffled through a buffer, so that memory does not grow with the source.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from sememe.config import canonical_json, sha256_of
from sememe.errors import CorruptError, ResourceError, TextError, nearest
from sememe.text.cache import part_record, read_part, rebuild_part
from sememe.text.config import TextConfig
from sememe.text.corpora import CORPORA, Part
from sememe.text.documents import Attribution, RawDocument, Side, cut, key_of, side_of

__all__ = ["FileSource", "HubSource", "PartSource", "Source", "open_source"]

Numbered = tuple[int, RawDocument]

BLOCK_BYTES = 64_000_000  # a longer .txt is more than one document
BUFFER_CHARS = 64_000_000
HASHED_BYTES = 256_000_000  # beyond this, fingerprints sample files instead of reading them whole
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz")


@runtime_checkable
class Source(Protocol):
    """One text: an embedded part, a set of files, or a data set."""

    name: str

    def stream(self, config: TextConfig, side: Side | None) -> Iterator[Numbered]:
        """Its documents on one side of the split (both, if None), shuffled, with their numbers in its own order."""

    def content(self) -> dict[str, Any]:
        """What changes when the text changes; quick to find out."""

    def attribution(self) -> Attribution:
        """Whom to name."""


class PartSource:
    """An embedded part, out of the cache; shuffled whole."""

    def __init__(self, part: Part) -> None:
        self.part, self.name = part, part.name

    def stream(self, config: TextConfig, side: Side | None) -> Iterator[Numbered]:
        """See Source."""
        try:
            table = read_part(self.part)
        except CorruptError:
            rebuild_part(self.part)
            table = read_part(self.part)
        keys = table.column("key").to_pylist()
        numbers = [
            n for n, key in enumerate(keys) if side is None or side_of(key, config.heldout_fraction) == side
        ]
        _random(config, self.name).shuffle(numbers)
        for start in range(0, len(numbers), 256):
            chunk = numbers[start : start + 256]
            for number, row in zip(chunk, table.take(chunk).to_pylist(), strict=True):
                yield (
                    number,
                    RawDocument(
                        row["text"], row["language"], row["title"], json.loads(row["tags"]), row["key"]
                    ),
                )

    def content(self) -> dict[str, Any]:
        """See Source."""
        record = part_record(self.part)
        assert record is not None, f"{self.name} was not fetched"
        return {"part": self.name, "sha256": record["sha256"]}

    def attribution(self) -> Attribution:
        """See Source."""
        return self.part.attribution


class FileSource:
    """Files of any of the formats, on disk or behind an fsspec URL."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fs, self.paths = _find(name)

    def stream(self, config: TextConfig, side: Side | None) -> Iterator[Numbered]:
        """See Source."""
        raws = itertools.chain.from_iterable(self._read(path, config) for path in self.paths)
        yield from _shuffled(_numbered(raws, config, side, self.name), config, self.name)

    def _read(self, path: str, config: TextConfig) -> Iterator[RawDocument]:
        suffix, compression = _format(path)
        with self.fs.open(path, "rb", compression=compression) as file:
            try:
                if suffix == "parquet":
                    yield from _read_parquet(path, file, config)
                elif suffix == "jsonl":
                    yield from _read_jsonl(path, file, config)
                else:
                    yield from _read_text(path, file, config)
            except (OSError, EOFError) as error:
                raise TextError(
                    f"{path} must be readable",
                    f"{type(error).__name__}: {error}",
                    "Mend or leave out the file.",
                ) from None

    def content(self) -> dict[str, Any]:
        """See Source."""
        sizes = {path: int(self.fs.info(path).get("size") or 0) for path in self.paths}
        whole = sum(sizes.values()) <= HASHED_BYTES and _is_local(self.fs)
        files = {path: self._digest(path, size, whole) for path, size in sizes.items()}
        return {"files": files, "order": ORDER}

    def _digest(self, path: str, size: int, whole: bool) -> str:
        if not _is_local(self.fs):
            return f"{size}-{self.fs.checksum(path)}"
        with self.fs.open(path, "rb") as file:
            if whole:
                digest = hashlib.sha256()
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                return digest.hexdigest()
            head = file.read(1 << 20)
            file.seek(max(size - (1 << 20), 0))
            ends = hashlib.sha256(head + file.read(1 << 20)).hexdigest()
        return f"{ends}-{size}-{Path(path).stat().st_mtime_ns}"

    def attribution(self) -> Attribution:
        """See Source."""
        return Attribution(self.name, self.name, "not stated", "", "Files of the person who made this.")


_HUB = re.compile(
    r"hf://(?P<name>[^:@]+)(?:@(?P<revision>[^:/]+))?(?P<colon>:(?P<config>[^/]*))?(?:/(?P<split>[^/]+))?"
)


class HubSource:
    """A data set of the Hugging Face hub, streamed; or a local folder that holds one."""

    def __init__(self, name: str) -> None:
        self.name = name
        match = _HUB.fullmatch(name)
        if match is None:
            raise self._unknown(name)
        self.dataset, self.config_name, self.split = match["name"], match["config"] or None, match["split"]
        self.revision = match["revision"]
        self.local = Path(self.dataset).is_dir()
        if not self.local and not match["colon"] and not self.revision:
            parts = self.dataset.split("/")
            self.dataset, self.split = "/".join(parts[:2]), parts[2] if len(parts) == 3 else self.split
        if not self.local and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.dataset):
            raise self._unknown(name)
        self.split = self.split or "train"

    @staticmethod
    def _unknown(name: str) -> TextError:
        return TextError(
            "a hub data set must be named hf://owner/name[@revision][:config][/split]",
            repr(name),
            "See docs/text.md, or give the path of a folder without hf://.",
        )

    def stream(self, config: TextConfig, side: Side | None) -> Iterator[Numbered]:
        """See Source."""
        raws = (_raw(row, config, f"{self.name} row {n}") for n, row in enumerate(self._rows()))
        yield from _shuffled(_numbered(raws, config, side, self.name), config, self.name)

    def _rows(self) -> Iterator[dict[str, Any]]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.dataset, self.config_name, split=self.split, revision=self.revision, streaming=True
            )
            yield from rows
        except (TextError, GeneratorExit):
            raise
        except Exception as error:
            lines = str(error).splitlines() or [""]
            raise TextError(
                f"the data set {self.name} must be on the hub and within reach",
                f"{type(error).__name__}: {lines[0][:200]}",
                "Check its name, config and split, and the network; or name local files.",
            ) from None

    def content(self) -> dict[str, Any]:
        """See Source. A hub data set is known by its name; pin a revision to be sure of its content."""
        if self.local:
            return {
                "dataset": FileSource(self.dataset).content(),
                "config": self.config_name,
                "split": self.split,
            }
        return {
            "dataset": self.dataset,
            "config": self.config_name,
            "split": self.split,
            "revision": self.revision,
        }

    def attribution(self) -> Attribution:
        """See Source."""
        url = "" if self.local else f"https://huggingface.co/datasets/{self.dataset}"
        return Attribution(self.name, self.dataset, "see the data set's card", url, "")


def open_source(name: str) -> Source:
    """A source that is not an embedded corpus.

    Raises:
        TextError: there is nothing of that name.
        ResourceError: the name's protocol needs a package that is not installed.
    """
    return HubSource(name) if name.startswith("hf://") else FileSource(name)


# -- order -----------------------------------------------------------------------------------------


ORDER = 2  # raised when files come in another order, so that what was made from the old one is stale


def _random(config: TextConfig, name: str) -> random.Random:
    # The folder does not count: the same files elsewhere come in the same order.
    return random.Random(sha256_of({"seed": config.seed, "source": PurePosixPath(name).name}))


def _numbered(
    raws: Iterator[RawDocument], config: TextConfig, side: Side | None, name: str
) -> Iterator[Numbered]:
    """Cut long documents, number the pieces, give them keys, and keep those on one side."""
    number = -1
    for raw in raws:
        key = key_of(raw.text)
        long = (
            bool(config.max_document_chars)
            and len(raw.text) > config.max_document_chars
            and raw.messages is None
        )
        pieces = cut(raw.text, config.max_document_chars) if long else iter([raw.text])
        for index, piece in enumerate(pieces):
            if not piece.strip():
                continue
            number += 1
            own = key_of(piece) if long and config.split_by == "piece" else key
            if side is None or side_of(own, config.heldout_fraction) == side:
                tags = raw.tags | ({"piece": str(index)} if long else {})
                yield number, raw._replace(text=piece, key=own, tags=tags)
    if number < 0:
        raise TextError(
            f"the corpus {name} must hold text",
            "no document that is not empty",
            "Name other files, or check text_field.",
        )


def _shuffled(items: Iterator[Numbered], config: TextConfig, name: str) -> Iterator[Numbered]:
    """Draw at random from a buffer that is kept full, bounded in documents and in characters."""
    rng = _random(config, name)
    buffer: list[Numbered] = []
    chars = 0

    def draw() -> Numbered:
        at = rng.randrange(len(buffer))
        buffer[at], buffer[-1] = buffer[-1], buffer[at]
        return buffer.pop()

    for item in items:
        buffer.append(item)
        chars += len(item[1].text)
        while len(buffer) > config.shuffle_documents or (chars > BUFFER_CHARS and len(buffer) > 1):
            drawn = draw()
            chars -= len(drawn[1].text)
            yield drawn
    while buffer:
        yield draw()


# -- files -----------------------------------------------------------------------------------------


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, (list, tuple)) else (fs.protocol,))


def _format(path: str) -> tuple[str, str | None]:
    compression = None
    stem = path
    for ending in COMPRESSED:
        if path.endswith(ending):
            stem, compression = path[: -len(ending)], "infer"
    return SUFFIXES.get(PurePosixPath(stem).suffix.lower(), ""), compression


def _find(name: str) -> tuple[Any, list[str]]:
    """The files that a path, folder, glob or URL names, in a fixed order that mixes folders."""
    import fsspec

    known = ", ".join(SUFFIXES)
    try:
        fs, path = fsspec.core.url_to_fs(str(Path(name).expanduser()) if "://" not in name else name)
        if any(c in name for c in "*?[") and not fs.exists(path):
            paths = [p for p in fs.glob(path) if _format(p)[0]]
        elif fs.isdir(path):
            paths = [p for p in fs.find(path) if _format(p)[0] and "/." not in p[len(path) :]]
        elif fs.exists(path):
            if not _format(path)[0]:
                raise TextError(
                    f"a text file must end in {known}, or one of these and .gz", name, "Rename or convert it."
                )
            paths = [path]
        else:
            raise _nothing(name)
    except ImportError as error:
        raise ResourceError(f"reading {name} needs another package", str(error), "Install it.") from None
    except (ValueError, OSError) as error:
        raise TextError(
            f"{name} must be a path or URL within reach", f"{type(error).__name__}: {error}", "Check it."
        ) from None
    if not paths:
        raise TextError(f"{name} must hold files that end in {known}", "none", "Name other files.")
    # A fixed order that does not depend on the seed, so that documents keep their numbers.
    return fs, sorted(
        paths, key=lambda p: hashlib.sha256(PurePosixPath(p).name.encode()).digest() + p.encode()
    )


def _nothing(name: str) -> TextError:
    """The error for a name that is nothing, with the embedded corpora and the files beside it as suggestions."""
    path = Path(name).expanduser()
    try:
        beside = [
            entry for entry in sorted(path.parent.iterdir()) if _format(entry.name)[0] or entry.is_dir()
        ]
    except OSError:
        beside = []
    prefix = name[: len(name) - len(path.name)]
    names = [prefix + entry.name for entry in beside]
    return TextError(
        "corpus must name an embedded corpus, a file, a folder, a glob or hf://owner/name",
        repr(name),
        nearest(name, names if prefix and names else [*CORPORA, *names]),
    )


def _read_text(path: str, file: Any, config: TextConfig) -> Iterator[RawDocument]:
    first = 1
    title = PurePosixPath(path).name
    while lines := file.readlines(BLOCK_BYTES):
        block = b"".join(lines)
        try:
            text = block.decode("utf-8-sig" if first == 1 else "utf-8")
        except UnicodeDecodeError as error:
            at = first + block.count(b"\n", 0, error.start)
            raise _undecodable(path, at, error) from None
        first += len(lines)
        if config.chat_template:
            raise TextError(
                "chat_template needs conversations, in .jsonl, .parquet or a data set",
                path,
                "Leave out chat_template.",
            )
        yield RawDocument(text.replace("\r\n", "\n"), None, title, {"file": title})


def _undecodable(path: str, line: int, error: UnicodeDecodeError) -> TextError:
    return TextError(
        f"{path} must be UTF-8 text",
        f"byte 0x{error.object[error.start]:02x} in line {line}",
        "Convert the file (iconv -t utf-8), or leave it out.",
    )


def _read_jsonl(path: str, file: Any, config: TextConfig) -> Iterator[RawDocument]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise _undecodable(path, number, error) from None
        except ValueError as error:
            raise TextError(
                f"{where} must be JSON", str(error), "Mend the line, or leave the file out."
            ) from None
        if not isinstance(row, dict):
            raise TextError(
                f"{where} must be a JSON object", type(row).__name__, 'Give each line as {"text": ...}.'
            )
        yield _raw(row, config, where)


def _read_parquet(path: str, file: Any, config: TextConfig) -> Iterator[RawDocument]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = set(table.schema_arrow.names)
        wanted = [config.messages_field if config.chat_template else config.text_field]
        _require(wanted[0], names, path, config)
        wanted += [n for n in (config.title_field, config.language_field, *config.tag_fields) if n in names]
        number = 0
        for batch in table.iter_batches(batch_size=512, columns=list(dict.fromkeys(wanted))):
            for row in batch.to_pylist():
                yield _raw(row, config, f"{path} row {number}")
                number += 1
    except pa.ArrowException as error:
        raise TextError(
            f"{path} must be a parquet file", str(error).splitlines()[0], "Make or download it again."
        ) from None


def _require(field: str, names: set[str], where: str, config: TextConfig) -> None:
    if field not in names:
        option = "messages_field" if config.chat_template else "text_field"
        hint = nearest(field, sorted(names)) if names else "It has no fields."
        raise TextError(
            f"{where} must have the field {field!r}",
            ", ".join(sorted(names)) or "none",
            f"Set {option}. {hint}",
        )


def _raw(row: dict[str, Any], config: TextConfig, where: str) -> RawDocument:
    field = config.messages_field if config.chat_template else config.text_field
    _require(field, set(row), where, config)
    value, messages = row[field], None
    if config.chat_template:
        if not isinstance(value, list) or not all(
            isinstance(m, dict) and "role" in m and "content" in m for m in value
        ):
            raise TextError(
                f"{field} of {where} must be a list of {{role, content}}", repr(value)[:80], "Mend it."
            )
        messages, value = value, canonical_json(value)
    elif not isinstance(value, str):
        raise TextError(
            f"{field} of {where} must be text", type(value).__name__, "Set text_field to a field of text."
        )
    tags = {name: str(row[name]) for name in config.tag_fields if row.get(name) is not None}
    language, title = row.get(config.language_field), row.get(config.title_field)
    return RawDocument(
        value,
        None if language is None else str(language),
        None if title is None else str(title),
        tags,
        messages=messages,
    )
