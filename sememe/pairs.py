"""Prompts in pairs that differ in one name: for any tokenizer that has the names as single tokens, or out of a file.

Indirect object identification (Wang et al. 2022, arXiv:2211.00593): "When Mary and John went to the shop, John gave a
book to" goes on with " Mary". In the corrupted prompt another name stands where John is named again. Knows a tokenizer;
runs no model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sememe.errors import ConfigError, TextError

__all__ = ["Pair", "by_length", "ioi_pairs", "read_pairs", "single_tokens"]

NAMES = (
    *(
        "Mary",
        "John",
        "Tom",
        "James",
        "Anna",
        "Paul",
        "Peter",
        "Sarah",
        "Emma",
        "Jack",
        "Kate",
        "Laura",
        "Mark",
    ),
    *(
        "David",
        "Lisa",
        "Alice",
        "Bob",
        "Robert",
        "Michael",
        "Daniel",
        "Maria",
        "Julia",
        "Henry",
        "George",
        "William",
    ),
    *(
        "Charles",
        "Jane",
        "Susan",
        "Helen",
        "Martin",
        "Simon",
        "Adam",
        "Eric",
        "Kevin",
        "Brian",
        "Steve",
        "Karen",
    ),
    *(
        "Nancy",
        "Rachel",
        "Grace",
        "Rose",
        "Amy",
        "Alex",
        "Sam",
        "Max",
        "Ben",
        "Louis",
        "Victor",
        "Ruth",
        "Clara",
    ),
)
PLACES = ("shop", "school", "park", "office", "station", "garden", "beach", "market", "library", "hospital")
THINGS = ("book", "drink", "letter", "ring", "ball", "bag", "key", "pen", "gift", "hat")
TEMPLATES = (
    "When {a} and {b} went to the {place}, {again} gave a {thing} to",
    "Then {a} and {b} had a long talk, and after that {again} gave the {thing} to",
    "After {a} and {b} left the {place}, {again} handed the {thing} to",
    "While {a} and {b} were working at the {place}, {again} passed a {thing} to",
    "Yesterday {a} and {b} met at the {place}, where {again} offered the {thing} to",
    "The {place} was quiet when {a} and {b} came in, and {again} brought a {thing} to",
)
LEAST_NAMES = 3
SHOWN = 8
"""Names listed in an error."""


class Pair(NamedTuple):
    """Two prompts of equal length in tokens."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: int | None
    """The token that the clean prompt asks for, if it is known."""
    wrong: int | None
    """The token that it should not be taken for."""
    texts: tuple[str, str]
    """Clean and corrupted."""

    @property
    def first(self) -> int:
        """The first position at which they differ."""
        return next(i for i, (a, b) in enumerate(zip(self.clean, self.corrupted, strict=True)) if a != b)


def single_tokens(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    """Words that are one and the same token after a space wherever they stand in a template, with that token."""
    found = {}
    for word in words:
        tokens = {_after(tokenizer, before, f" {word}") for before in ("When", "and", "to", "the shop,")}
        if len(tokens) == 1 and (token := tokens.pop()) is not None:
            found[word] = token
    return found


def _after(tokenizer: Any, before: str, text: str) -> int | None:
    """The token that a text is after another; None if it is several, or changes those before it."""
    head, whole = _ids(tokenizer, before), _ids(tokenizer, before + text)
    return whole[-1] if len(whole) == len(head) + 1 and whole[:-1] == head else None


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def ioi_pairs(
    tokenizer: Any,
    n: int,
    *,
    corruption: Literal["third", "swap"] = "third",
    names: Sequence[str] = (),
    bos: bool = False,
    seed: int = 0,
) -> list[Pair]:
    """So many pairs, all different, templates in turn; names of a pair are different people.

    Args:
        tokenizer: A Hugging Face tokenizer.
        n: How many.
        corruption: What stands where a name is named again: third, a name that was not named, after which either of the
            two may follow; swap, the other of the two, after which the answer is the other name.
        names: Instead of the built-in ones.
        bos: Begin with the tokenizer's first token, if it has one.
        seed: Of the draws.

    Raises:
        ConfigError: fewer than three of the names are single tokens, or no template works with the tokenizer, or there
            are not so many different pairs.
    """
    known = single_tokens(tokenizer, names or NAMES)
    if len(known) < LEAST_NAMES:
        raise ConfigError(
            f"at least {LEAST_NAMES} of the {len(names or NAMES)} names must be single tokens after a space",
            ", ".join(known) or "none",
            "Name others (--names), or give prompts of your own (--pairs).",
        )
    rng = random.Random(seed)
    first = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    templates = [t for t in TEMPLATES if _fits(tokenizer, t, known)]
    if not templates:
        raise ConfigError(
            f"a template must hold names as the tokenizer's single tokens ({', '.join([*known][:SHOWN])})",
            "none that does",
            "Give prompts of your own (--pairs).",
        )
    found: dict[tuple[str, str], Pair] = {}
    for attempt in range(20 * n + 100):
        if len(found) == n:
            break
        a, b, third = rng.sample(list(known), 3)
        again, answer = rng.choice(((a, b), (b, a)))
        words = {"a": a, "b": b, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        template = templates[attempt % len(templates)]
        clean = template.format(**words, again=again)
        corrupted = template.format(**words, again=third if corruption == "third" else answer)
        ids = tuple(first + _ids(tokenizer, clean)), tuple(first + _ids(tokenizer, corrupted))
        if sum(p != q for p, q in zip(*ids, strict=False)) != 1 or len(ids[0]) != len(ids[1]):
            continue  # a name that is more than one token after a word of this template
        found.setdefault((clean, corrupted), Pair(*ids, known[answer], known[again], (clean, corrupted)))
    if len(found) < n:
        raise ConfigError(
            f"n_pairs must be at most what the names make, {len(found)} here",
            n,
            "Lower it, or name more names.",
        )
    return list(found.values())


def _fits(tokenizer: Any, template: str, known: dict[str, int]) -> bool:
    """Whether other names change the tokens of the names and no others."""
    place = {"place": PLACES[0], "thing": THINGS[0]}
    x, y, z = list(known)[:3]
    one = _ids(tokenizer, template.format(a=x, b=y, again=x, **place))
    two = _ids(tokenizer, template.format(a=y, b=z, again=z, **place))
    if len(one) != len(two):
        return False
    apart = [(p, q) for p, q in zip(one, two, strict=True) if p != q]
    return apart == [(known[x], known[y]), (known[y], known[z]), (known[x], known[z])]


def read_pairs(path: Path, tokenizer: Any, *, bos: bool = False) -> list[Pair]:
    """Pairs of one's own: a JSON object on each line with `clean`, `corrupted`, and perhaps `answer` and `wrong`.

    Args:
        path: A .jsonl file. An answer is text as it follows the prompt (" Mary"), of one token.
        tokenizer: A Hugging Face tokenizer.
        bos: Begin with the tokenizer's first token, if it has one.

    Raises:
        TextError: the file is not there, is not JSONL, or holds fewer than two pairs.
        ConfigError: prompts of a pair are equal or of different length in tokens, or an answer is several tokens.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            "pairs must be a file of JSON lines", f"{path}: {error}", "Name a .jsonl file."
        ) from None
    first = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{path.name}, line {number}"
        clean, corrupted, answer, wrong = _fields(line, where)
        ids = [tuple(first + _ids(tokenizer, text)) for text in (clean, corrupted)]
        if len(ids[0]) != len(ids[1]):
            raise ConfigError(
                f"the prompts of a pair must be of equal length in tokens ({where})",
                f"{len(ids[0])} and {len(ids[1])}",
                "Change the words so that they are.",
            )
        if ids[0] == ids[1]:
            raise ConfigError(
                f"the prompts of a pair must differ ({where})", repr(clean), "Change one of them."
            )
        answers = [_answer(tokenizer, clean, text, where) for text in (answer, wrong)]
        found.append(Pair(ids[0], ids[1], answers[0], answers[1], (clean, corrupted)))
    if len(found) < 2:
        raise TextError(
            f"{path} must hold at least two pairs", len(found), "Add some: intervals are over pairs."
        )
    return found


def _fields(line: str, where: str) -> tuple[str, str, str | None, str | None]:
    try:
        data = json.loads(line)
        answers = data.get("answer"), data.get("wrong")
        clean, corrupted = data["clean"], data["corrupted"]
    except (ValueError, KeyError, TypeError, AttributeError):
        clean = corrupted = None
        answers = None, None
    if not (isinstance(clean, str) and isinstance(corrupted, str) and clean and corrupted):
        raise TextError(
            f"a line must be an object with the texts clean and corrupted ({where})",
            line[:60],
            "Mend the line.",
        )
    return clean, corrupted, answers[0], answers[1]


def _answer(tokenizer: Any, prompt: str, text: str | None, where: str) -> int | None:
    if text is None:
        return None
    token = _after(tokenizer, prompt, text)
    if token is None:
        raise ConfigError(
            f"an answer must be a single token after its prompt ({where})",
            repr(text),
            "Begin it with a space if a word begins there, or choose another.",
        )
    return token


def by_length(pairs: Sequence[Pair]) -> list[list[int]]:
    """Numbers of the pairs, those of equal length in tokens together, the shortest first."""
    groups: dict[int, list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(len(pair.clean), []).append(number)
    return [groups[length] for length in sorted(groups)]
