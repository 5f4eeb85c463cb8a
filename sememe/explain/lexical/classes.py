"""What kind of token a token is: script, case, digits, punctuation, white space, code. Knows strings only."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["CLASSES", "NOTHING", "POSITIONS", "SPECIAL", "classes_of"]

POSITIONS = {f"one of the first {n} tokens of a context": n for n in (8, 32, 128)}
"""Bands of positions, each within the next, by the position at which it ends."""

CLASSES = (
    "the start of a word",
    "a later part of a word",
    "a number",
    "a symbol or punctuation mark",
    "a full stop, question or exclamation mark",
    "a comma, semicolon or colon",
    "a quotation mark",
    "a bracket",
    "a dash",
    "a line break",
    "white space only",
    "indentation",
    "a capitalised word",
    "capitals only",
    "lower-case letters",
    "a single letter",
    "ASCII letters",
    "Latin letters beyond ASCII",
    "Cyrillic letters",
    "Greek letters",
    "Hebrew letters",
    "Arabic letters",
    "Chinese characters",
    "Japanese kana",
    "Korean letters",
    "letters of another script",
    "bytes of a broken character",
    "code",
    "a year",
    "a word of dates (a month, weekday, century or era)",
    "a mathematical or currency sign",
    "a special token",
    *POSITIONS,
    "the start of the document",
)
"""In words, by number. Those of POSITIONS are a place's and not its token's. Neither is the last: it stands for
"nothing" where a previous token is asked for."""

_NUMBER = {name: number for number, name in enumerate(CLASSES)}
SPECIAL = _NUMBER["a special token"]
NOTHING = _NUMBER["the start of the document"]

_SCRIPTS = {
    "CYRILLIC": "Cyrillic letters",
    "GREEK": "Greek letters",
    "HEBREW": "Hebrew letters",
    "ARABIC": "Arabic letters",
    "CJK": "Chinese characters",
    "HIRAGANA": "Japanese kana",
    "KATAKANA": "Japanese kana",
    "HANGUL": "Korean letters",
}
_SPECIAL = re.compile(r"<\|[^|<>]+\|>|</?s>|<(?:bos|eos|pad|unk)>")
_CODE = re.compile(
    r"[A-Za-z]_|_[A-Za-z]|[a-z][A-Z]|[{}=<>]{2}|\(\)|->|=>|::|//|\);|[A-Za-z]\(|\[\]|^\s*[{};=\\#@$]\s*$"
)
_YEAR = re.compile(r"(?:1[0-9]|20)\d\d")
_MONTHS = (
    "January February March April May June July August September October November December "
    "Januar Februar März Mai Juni Juli Oktober Dezember "
    "janvier février mars avril mai juin juillet août septembre octobre novembre décembre "
    "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre "
    "gennaio febbraio aprile maggio giugno luglio settembre ottobre dicembre "
    "января февраля марта апреля мая июня июля августа сентября октября ноября декабря "
    "Jan Feb Apr Jun Jul Aug Sept Sep Oct Nov Dec"
)
_DAYS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Montag Dienstag Mittwoch Donnerstag Freitag Samstag "
    "Sonntag lundi mardi mercredi jeudi vendredi samedi dimanche lunes martes miércoles jueves viernes sábado domingo"
)
_ERAS = (
    "century centuries Century decade decades millennium BC BCE CE AD Jahrhundert Jahrhunderts siècle siglo secolo "
    "века 年 月 日 世紀 世纪"
)
_DATES = frozenset(f"{_MONTHS} {_DAYS} {_ERAS}".split())
_QUOTES = set("\"'`“”„‟‘’‚‛«»‹›「」『』")


def classes_of(raw: bytes) -> int:
    """The classes of a token, as the bits of a number; bit i stands for CLASSES[i].

    >>> [CLASSES[i] for i in range(len(CLASSES)) if classes_of(b" 42") >> i & 1]
    ['a number']
    """
    text = raw.decode("utf-8", errors="replace")
    if _SPECIAL.fullmatch(text):
        return 1 << SPECIAL
    found: set[str] = set()
    body = text.strip()
    letters = [c for c in body if c.isalpha()]
    if "�" in text:
        found.add("bytes of a broken character")
    if "\n" in text or "\r" in text:
        found.add("a line break")
    if text and not body:
        found.add("white space only")
        if "\n" not in text and (len(text) > 1 or text == "\t"):
            found.add("indentation")
    if letters:
        found |= _of_letters(text, body, letters)
    if body and all(c.isnumeric() or c in ".,:/-" for c in body) and any(c.isnumeric() for c in body):
        found.add("a number")
        if _YEAR.fullmatch(body):
            found.add("a year")
    if body in _DATES:
        found.add("a word of dates (a month, weekday, century or era)")
    if body and not any(c.isalnum() or c == "�" for c in body):
        found |= _of_signs(body)
    if _CODE.search(text):
        found.add("code")
    return sum(1 << _NUMBER[name] for name in found)


def _of_letters(text: str, body: str, letters: list[str]) -> set[str]:
    found = {"a later part of a word" if text[0].isalpha() else "the start of a word"}
    if body[0].isupper() and len(letters) > 1 and all(c.islower() for c in letters[1:]):
        found.add("a capitalised word")
    if len(letters) > 1 and all(c.isupper() for c in letters):
        found.add("capitals only")
    if all(c.islower() for c in letters):
        found.add("lower-case letters")
    if len(body) == 1:
        found.add("a single letter")
    for letter in letters:
        if letter.isascii():
            found.add("ASCII letters")
            continue
        script = unicodedata.name(letter, "").split(" ")[0]
        latin = "Latin letters beyond ASCII" if script == "LATIN" else "letters of another script"
        found.add(_SCRIPTS.get(script, latin))
    return found


def _of_signs(body: str) -> set[str]:
    found = {"a symbol or punctuation mark"}
    signs = set(body)
    if signs & set(".!?。！？…"):
        found.add("a full stop, question or exclamation mark")
    if signs & set(",;:，；：、"):
        found.add("a comma, semicolon or colon")
    if signs & _QUOTES:
        found.add("a quotation mark")
    if signs & set("()[]{}（）【】"):
        found.add("a bracket")
    if any(unicodedata.category(c) == "Pd" for c in signs):
        found.add("a dash")
    if any(unicodedata.category(c) in ("Sm", "Sc") for c in signs):
        found.add("a mathematical or currency sign")
    return found
