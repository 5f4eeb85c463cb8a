"""Text as rows of tokens: packing, order, memory, conversations."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_world import (
    TOKENIZER,
    WORDS,
    blocks,
    config,
    gathered,
    make_tokenizer,
    message,
    sentence,
    write_jsonl,
)

from sememe.errors import ConfigError, TextError
from sememe.text import (
    TokenPolicy,
    documents,
    token_blocks,
    tokens,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A thousand documents of one to three sentences."""
    rows = [
        {"text": " ".join(sentence(1000 * k + n) for k in range(n % 3 + 1)), "title": f"T{n}"}
        for n in range(1000)
    ]
    return write_jsonl(tmp_path / "thousand.jsonl", rows)


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
