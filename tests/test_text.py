"""Text: documents, files, mixtures, splits, identity, and what happens when any of it is bad."""

from __future__ import annotations

import bz2
import gzip
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_world import (
    blocks,
    config,
    message,
    sentence,
    write_jsonl,
)

from sememe.errors import ConfigError, TextError
from sememe.text import (
    CORPORA,
    Document,
    TextConfig,
    TokenPolicy,
    attributions,
    cache,
    corpora,
    documents,
    fetch,
    fingerprint,
    split_of,
)
from sememe.text.documents import cut
from sememe.text.mixture import interleave


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A thousand documents of one to three sentences."""
    rows = [
        {"text": " ".join(sentence(1000 * k + n) for k in range(n % 3 + 1)), "title": f"T{n}"}
        for n in range(1000)
    ]
    return write_jsonl(tmp_path / "thousand.jsonl", rows)


# -- documents -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(alphabet="ab .\n。é", max_size=400), st.integers(3, 60))
def test_cutting_loses_nothing_but_white_space(text: str, n: int) -> None:
    pieces = list(cut(text, n))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.strip() and len(piece) <= n for piece in pieces)


def test_cuts_fall_between_paragraphs_lines_sentences_words() -> None:
    assert list(cut("one two\n\nthree four", 12)) == ["one two", "three four"]
    assert list(cut("one two three\nfour five", 16)) == ["one two three", "four five"]
    assert list(cut("It rains. It pours. Go", 20)) == ["It rains.", "It pours. Go"]  # about equally long
    assert list(cut("alpha beta gamma", 12)) == ["alpha beta", "gamma"]
    assert list(cut("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(cut("def f():\n    a\n\n    b\n", 12)) == ["def f():", "    a\n\n    b"]  # indentation stays
    assert list(cut("any length", 0)) == ["any length"]
    assert list(cut("   a", 3)) == ["a"]


@settings(deadline=None)
@given(st.text(min_size=1), st.floats(0, 0.99))
def test_a_split_depends_on_the_text_alone(text: str, fraction: float) -> None:
    side = split_of(text, fraction)
    assert side in ("train", "heldout") and side == split_of(f"  {text}\n", fraction)
    if side == "heldout":  # nested: what a small fraction holds out, a larger one does too
        assert split_of(text, min(fraction * 1.5, 0.999)) == "heldout"


def test_a_split_holds_out_the_fraction_asked_for() -> None:
    sides = Counter(split_of(sentence(n), 0.2) for n in range(5000))
    assert abs(sides["heldout"] / 5000 - 0.2) < 0.02
    assert {split_of(sentence(n), 0.0) for n in range(100)} == {"train"}


def test_splits_are_disjoint_and_whole(corpus: Path) -> None:
    text = config(corpus, heldout_fraction=0.3)
    parts = {side: {d.text: d for d in documents(text, side)} for side in ("train", "heldout", "all")}
    assert len(parts["all"]) == 1000
    assert not parts["train"].keys() & parts["heldout"].keys()
    assert parts["train"].keys() | parts["heldout"].keys() == parts["all"].keys()
    for side in ("train", "heldout"):  # numbers do not depend on the split
        assert all(parts["all"][t].id == d.id for t, d in parts[side].items())
    assert len({d.id for d in parts["all"].values()}) == 1000


def test_equal_documents_of_two_corpora_lie_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": sentence(n)} for n in range(200)]
    one, two = write_jsonl(tmp_path / "one.jsonl", rows), write_jsonl(tmp_path / "two.jsonl", rows[::-1])
    text = config(one, two, heldout_fraction=0.5)
    assert not {d.text for d in documents(text, "train")} & {d.text for d in documents(text, "heldout")}


def test_order_depends_on_the_seed_alone(corpus: Path) -> None:
    first = [d.id for d in documents(config(corpus), "all")]
    assert first == [d.id for d in documents(config(corpus), "all")]
    other = [d.id for d in documents(config(corpus, seed=1), "all")]
    assert first != other and sorted(first) == sorted(other)
    assert first != sorted(first)
    moved = corpus.parent / "elsewhere" / corpus.name
    moved.parent.mkdir()
    shutil.copy(corpus, moved)
    assert [d.id for d in documents(config(moved), "all")] == first


def test_pieces_of_one_document_stay_together_unless_asked(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(sentence(n) for n in range(300)))
    text = config(book, max_document_chars=500, heldout_fraction=0.5)
    pieces = list(documents(text, "all"))
    assert len(pieces) > 20 and len({p.key for p in pieces}) == 1 and all(len(p.text) <= 500 for p in pieces)
    assert [p.tags["piece"] for p in sorted(pieces, key=lambda p: p.id)] == [
        str(n) for n in range(len(pieces))
    ]
    side = split_of(book.read_text(), 0.5)
    empty = "heldout" if side == "train" else "train"
    with pytest.raises(TextError) as error:
        list(documents(text, empty))
    assert f"the {empty} split of" in message(error) and "split_by to 'piece'" in message(error)
    by_piece = text.replace(split_by="piece")
    n_train, n_heldout = (len(list(documents(by_piece, side))) for side in ("train", "heldout"))
    assert n_train + n_heldout == len(pieces) and min(n_train, n_heldout) > 3


# -- files -----------------------------------------------------------------------------------------


def test_every_file_format_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": sentence(n), "title": f"T{n}", "language": "en", "year": n} for n in range(50)]
    lines = write_jsonl(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "d.parquet", tmp_path / "hub" / "train-00000.parquet")
    import fsspec

    with fsspec.open("memory://bucket/e.jsonl", "wb") as file:
        file.write(lines)
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.bz2", "d.parquet", "*.jsonl"]
    expected = None
    for name in [*(tmp_path / name for name in names), "memory://bucket/e.jsonl", f"hf://{tmp_path / 'hub'}"]:
        found = [
            (d.text, d.language, d.title, d.tags)
            for d in documents(config(name, tag_fields=("year",)), "all")
        ]
        expected = expected or sorted(found, key=str)
        assert sorted(found, key=str) == expected and len(found) == 50, name
    assert expected is not None and expected[0][1:] == ("en", f"T{expected[0][3]['year']}", expected[0][3])


def test_folders_are_read_whole_and_hidden_files_left(tmp_path: Path) -> None:
    for name in ("one.txt", "deep/two.md", "deep/three.txt.gz", ".hidden/four.txt", "five.bin"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = f"This is {name}.".encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = {d.text for d in documents(config(tmp_path / "folder"), "all")}
    assert found == {"This is one.txt.", "This is deep/two.md.", "This is deep/three.txt.gz."}


def test_hub_names_are_taken_apart() -> None:
    from sememe.text.sources import HubSource

    def parts(name: str) -> tuple[str, str | None, str | None, str | None]:
        source = HubSource(name)
        return source.dataset, source.revision, source.config_name, source.split

    assert parts("hf://owner/name") == ("owner/name", None, None, "train")
    assert parts("hf://owner/name/test") == ("owner/name", None, None, "test")
    assert parts("hf://owner/name:en/validation") == ("owner/name", None, "en", "validation")
    assert parts("hf://owner/name@abc123:en") == ("owner/name", "abc123", "en", "train")
    assert parts("hf://owner/name@abc123/test") == ("owner/name", "abc123", None, "test")
    with pytest.raises(TextError) as error:
        HubSource("hf://owner/na me")
    assert "hf://owner/name[@revision][:config][/split]" in message(error)


# -- mixtures --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=5), st.integers(0, 5))
def test_interleaving_keeps_every_prefix_in_proportion(weights: list[float], seed: int) -> None:
    def part(index: int) -> Iterator[tuple[int, tuple[int, int]]]:
        for n in itertools.count():
            cost = 1 + (n * 7 + index) % 10
            yield cost, (index, cost)

    drawn = np.zeros(len(weights))
    mixed = interleave([(w, part(i)) for i, w in enumerate(weights)], seed)
    for index, cost in itertools.islice(mixed, 1000):
        drawn[index] += cost
        # No part is ever ahead or behind by more than about one item for each part.
        assert np.abs(drawn - drawn.sum() * np.array(weights) / sum(weights)).max() <= 11 * len(weights)


def test_a_mixture_keeps_its_shares_of_tokens_and_goes_on_when_a_corpus_ends(tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": sentence(n, 100)} for n in range(300)])
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": sentence(n + 1000, 5)} for n in range(300)])
    text = config(long, short, weights=(3, 1), heldout_fraction=0)
    found = blocks(text, n_tokens=4000)
    tokens = Counter()
    for block in found:
        for identity, count in zip(*np.unique(block.doc_ids, return_counts=True), strict=True):
            tokens[block.documents[int(identity)].source] += int(count)
    assert abs(tokens[str(short)] / tokens.total() - 0.25) < 0.04
    everything = {d.id for d in documents(text)}
    assert len(everything) == 600


def test_weights_within_embedded_corpora_add_up() -> None:
    assert abs(sum(CORPORA["default"].values()) - 1) < 1e-9
    assert CORPORA["default"]["wiki-en"] == max(CORPORA["default"].values())
    assert set(CORPORA["default"]) <= set(corpora.PARTS)


# -- identity --------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_the_text_and_nothing_else(corpus: Path) -> None:
    before = fingerprint(config(corpus))
    assert before == fingerprint(config(corpus)) and len(before) == 64
    assert before != fingerprint(config(corpus, seed=1)) and before != fingerprint(
        config(corpus, heldout_fraction=0.2)
    )
    os.utime(corpus, (1, 1))
    assert before == fingerprint(config(corpus))
    content = bytearray(corpus.read_bytes())
    content[len(content) // 2] ^= 1
    corpus.write_bytes(content)
    assert before != fingerprint(config(corpus))


def test_files_of_ones_own_are_attributed_to_oneself(corpus: Path) -> None:
    (entry,) = attributions(config(corpus))
    assert entry.source == str(corpus) and entry.licence == "not stated"


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"corpus": ("kjv", "python"), "weights": (1.0,)}, "one number for each of the 2 corpora"),
        ({"corpus": ("kjv", "python"), "weights": (1.0, 0.0)}, "weights must be > 0"),
        ({"corpus": ("kjv", "kjv")}, "each corpus once"),
        ({"corpus": ()}, "at least one corpus"),
        ({"weights": (1.0,)}, "weights must go with several corpora"),
        ({"messages_field": "turns"}, "messages_field must go with chat_template"),
        ({"chat_template": True, "text_field": "body"}, "text_field must not go with chat_template"),
        ({"split_by": "piece", "max_document_chars": 0}, "must go with max_document_chars > 0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
        ({"split_by": "page"}, "split_by"),
        ({"text_fields": "x"}, "Did you mean 'text_field'"),
    ],
)
def test_bad_text_options(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        TextConfig.build(options)
    assert part in message(error) and error.value.exit_code == 2


def test_options_without_effect_on_embedded_corpora() -> None:
    for options, part in (
        ({"chat_template": True}, "no embedded corpus holds, got 'default'"),
        ({"text_field": "body"}, "text_field must go with files or data sets"),
        ({"tag_fields": ("year",)}, "tag_fields must go with files or data sets"),
    ):
        with pytest.raises(ConfigError) as error:
            fetch(TextConfig(**options))
        assert part in message(error)


def test_bad_policies(corpus: Path) -> None:
    with pytest.raises(ConfigError) as error:
        TokenPolicy(context_length=8, drop_positions=8)
    assert "drop_positions must be below context_length=8" in message(error)
    with pytest.raises(ConfigError) as error:
        blocks(config(corpus), TokenPolicy(bos=True))
    assert "beginning-of-sequence" in message(error)
    with pytest.raises(ConfigError) as error:
        blocks(config(corpus), n_tokens=0)
    assert "n_tokens must be >= 1" in message(error)


@pytest.mark.parametrize(
    "name", ["defalt", "{}/thousnd.jsonl", "{}/nowhere/at/all.txt", "{}/*.txt", "nosuch://bucket/x.txt"]
)
def test_unknown_corpora(name: str, corpus: Path) -> None:
    name = name.format(corpus.parent)
    for call in (fetch, fingerprint, attributions, lambda c: list(documents(c)), lambda c: blocks(c)):
        with pytest.raises(TextError) as error:
            call(config(name))
        text = message(error)
        assert name.split("/")[-1].split("*")[-1] in text
        if name == "defalt":
            assert "Did you mean 'default'" in text
        if name.endswith("thousnd.jsonl"):
            assert f"Did you mean '{corpus}'?" in text


def bad_file(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(TextError) as error:
        list(documents(config(path)))
    return message(error)


def test_bad_files(tmp_path: Path) -> None:
    good = b'{"text": "fine"}\n'
    assert "a.jsonl line 2 must be JSON" in bad_file(tmp_path, "a.jsonl", good + b'{"text": \n')
    missing = bad_file(tmp_path, "b.jsonl", good * 2 + b'{"txt": "x"}\n')
    assert (
        "b.jsonl line 3 must have the field 'text', got txt. Set text_field. Did you mean 'txt'?" in missing
    )
    assert "text of" in bad_file(tmp_path, "c.jsonl", b'{"text": 5}\n')
    assert "c2.jsonl line 1 must be a JSON object, got list" in bad_file(tmp_path, "c2.jsonl", b'["text"]\n')
    undecodable = bad_file(tmp_path, "d.jsonl", good + '{"text": "Zürich"}\n'.encode("latin-1"))
    assert "d.jsonl must be UTF-8 text, got byte 0xfc in line 2" in undecodable
    assert "e.txt must be UTF-8 text, got byte 0xe9 in line 3" in bad_file(
        tmp_path, "e.txt", b"a\nb\ncaf\xe9 noir\n"
    )
    assert "f.parquet must be a parquet file" in bad_file(
        tmp_path, "f.parquet", b"PAR1 and then nothing of the kind"
    )
    assert "g.txt.gz must be readable" in bad_file(tmp_path, "g.txt.gz", gzip.compress(b"words " * 999)[:-20])
    assert "must end in .txt" in bad_file(tmp_path, "h.docx", b"words")
    assert "must hold text, got no document that is not empty" in bad_file(tmp_path, "i.txt", b" \n \n")
    assert "must hold text, got no document" in bad_file(tmp_path, "j.jsonl", b"")
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "k.parquet")
    assert "must have the field 'text', got content" in bad_file(
        tmp_path, "k.parquet", (tmp_path / "k.parquet").read_bytes()
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError) as error:
        list(documents(config(tmp_path / "empty")))
    assert "must hold files that end in" in message(error)


def test_text_shorter_than_a_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "short.jsonl", [{"text": "too short"}])
    with pytest.raises(TextError) as error:
        blocks(config(path, heldout_fraction=0), TokenPolicy(context_length=128))
    assert "at least one row of context_length=128 tokens" in message(
        error
    ) and "tokens. Give more text" in message(error)
    assert blocks(config(path, heldout_fraction=0), TokenPolicy(context_length=128, packing=False))[
        0
    ].ids.shape == (1, 128)
    with pytest.raises(TextError) as error:
        blocks(config(path, heldout_fraction=0), split="heldout")
    assert "the heldout split of" in message(error)


def test_a_hub_data_set_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TextError) as error:
        list(documents(config("hf://nobody/nothing-of-this-name")))
    assert "hf://nobody/nothing-of-this-name must be on the hub and within reach" in message(error)


# -- the real corpora ------------------------------------------------------------------------------


@pytest.mark.model
def test_the_default_corpus_speaks_many_languages_in_its_shares() -> None:
    text = TextConfig()
    fetch(text)
    size: Counter[str] = Counter()
    by_source: Counter[str] = Counter()
    examples: dict[str, list[Document]] = {}
    for document in documents(text):
        n = len(document.text.encode())
        size[str(document.language)] += n
        by_source[document.source] += n
        examples.setdefault(document.source, []).append(document)
        if size.total() > 3_000_000:
            break
    share = {source: n / size.total() for source, n in by_source.items()}
    present = {name: w for name, w in CORPORA["default"].items() if name in share}
    for name, weight in present.items():
        assert abs(share[name] - weight / sum(present.values())) < 0.004, name
    assert {"en", "fr", "es", "de", "da", "he", "code"} <= set(size)
    if shutil.which("apt-get") and not cache.absent(corpora.PARTS["office-ja"]):
        assert {"ja", "ru", "sv", "nb"} <= set(size)
    assert size["en"] > 0.45 * size.total()
    assert all(len(d.text.encode()) <= 3500 for found in examples.values() for d in found)
    assert all(d.title for d in examples["wiki-en"]) and {d.tags["topic"] for d in examples["wiki-en"]} > {
        "People",
        "Arts",
    }
    hebrew = "".join(d.text for d in examples["mishnah"])
    assert sum("\u05d0" <= c <= "\u05ea" for c in hebrew) > 0.7 * len(hebrew) and "\u05b8" not in hebrew
    licences = {a.source: a.licence for a in attributions(text)}
    assert licences["wiki-en"] == "CC BY-SA 4.0" and set(licences) == set(present)


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "title", "words"),
    [
        ("kjv", "Genesis 1", "1 In the beginning God created the heaven and the earth."),
        ("shakespeare", "Hamlet, Act III, Scene I. A room in the Castle.", "To be, or not to be"),
        ("wiki-fr", "Lauren Bacall", "actrice américaine"),
    ],
)
def test_known_passages_are_there(name: str, title: str, words: str) -> None:
    found = [d for d in documents(config(name), "all") if (d.title or "").startswith(title[:20])]
    assert any(words in d.text for d in found)
