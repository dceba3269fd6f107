"""Spans of characters in texts: the matches of regular expressions, words, or spans as they are given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .arguments import Values, as_integers, on_host

Integers = npt.NDArray[np.int64]

#: A regular expression, words, the spans of one text, or the spans of each of several texts.
Wanted = str | re.Pattern[str] | Sequence[Any] | Tensor | npt.NDArray[Any]

WORD = re.compile(r"\w")
LETTERS = re.compile(r"\w+")
GROUPED = 3  # how many characters of words are looked at one by one


def spans_of(
    name: str, wanted: object, texts: str | Sequence[str], *, ignore_case: bool, whole_words: bool
) -> list[Integers]:
    """The spans of what is wanted in each of the texts, each `[n, 2]`. See `match_spans`."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    flags = re.IGNORECASE if ignore_case else 0
    if isinstance(wanted, (Tensor, np.ndarray)) and getattr(wanted.dtype, "kind", "i") not in "UO":
        values: Any = wanted
    elif not isinstance(wanted, (str, re.Pattern)):
        if not isinstance(wanted, Iterable):
            raise TypeError(
                f"{name}: got a {type(wanted).__name__}, expected a regular expression, words, or spans [n, 2]"
            )
        values = list(wanted)
        if any(isinstance(one, str) for one in values):
            return _found(_any_word(name, values, whole_words, flags), listed, group=1)
    if not whole_words:
        raise ValueError(f"whole_words: got False, which is for a list of words, but {name} is none")
    if isinstance(wanted, str):
        return _found(_expression(name, wanted, flags), listed)
    if ignore_case:
        raise ValueError(
            f"ignore_case: got True, which is for words and expressions given as strings, but {name} is neither; "
            "compile it with re.IGNORECASE"
        )
    if isinstance(wanted, re.Pattern):
        if not isinstance(wanted.pattern, str):
            raise TypeError(f"{name}: got an expression of bytes, expected one of text")
        return _found(wanted, listed)
    if isinstance(texts, str):
        return [_checked(name, values, texts)]
    if len(values) != len(listed):
        raise ValueError(
            f"{name}: got the spans of {len(values)} texts, expected those of {len(listed)}, one list for each"
        )
    return [
        _checked(f"{name}[{index}]", spans, text)
        for index, (spans, text) in enumerate(zip(values, listed, strict=True))
    ]


def _found(expression: re.Pattern[str], texts: Sequence[str], group: int = 0) -> list[Integers]:
    """The spans of a group of all matches in each text."""
    return [
        np.array([match.span(group) for match in expression.finditer(text)], dtype=np.int64).reshape(-1, 2)
        for text in texts
    ]


def _expression(name: str, expression: str, flags: int) -> re.Pattern[str]:
    if not expression:
        raise ValueError(f"{name}: got an empty string, expected a regular expression")
    try:
        return re.compile(expression, flags)
    except re.error as error:
        raise ValueError(f"{name}: got {expression!r}, expected a regular expression ({error})") from error


def check_flag(name: str, value: object) -> None:
    """Raises unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_word(name: str, word: object) -> None:
    """Raises unless a word is a string with more than white space."""
    if not isinstance(word, str):
        raise TypeError(f"{name}: got {word!r}, expected a string")
    if not word.strip():
        raise ValueError(f"{name}: got {word!r}, expected a word that is not empty")


def _any_word(name: str, words: Sequence[object], whole_words: bool, flags: int) -> re.Pattern[str]:
    """An expression whose first group is the longest of the words at a place; it also finds words that overlap."""
    for index, word in enumerate(words):
        check_word(f"{name}[{index}]", word)
    phrases = {" ".join(cast(str, word).split()) for word in words}
    if flags & re.IGNORECASE:
        phrases = {"".join(map(_without_case, phrase)) for phrase in phrases}
    # A shorter word is hidden by a longer one that begins with it, and that has all of its characters.
    ordered = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    # `\b` would ask for a letter beside the + of C++.
    inner = [phrase for phrase in ordered if whole_words and WORD.match(phrase)]
    outer = [phrase for phrase in ordered if not (whole_words and WORD.match(phrase))]
    parts = [r"(?<!\w)(?:" + _alternatives(inner, 0, whole_words) + ")"] if inner else []
    parts += [_alternatives(outer, 0, whole_words)] if outer else []
    expression = f"({'|'.join(parts)})"
    if whole_words and all(LETTERS.fullmatch(phrase) for phrase in ordered):
        return re.compile(expression, flags)  # such words do not overlap, and a fifth of the time is saved
    return re.compile(f"(?={expression})", flags)


def _without_case(char: str) -> str:
    """One character for all that re.IGNORECASE takes for the same, where that is a single one."""
    folded = char.upper().lower()
    return folded if len(folded) == 1 else char


def _alternatives(phrases: Sequence[str], start: int, whole_words: bool) -> str:
    """An expression for phrases from a place on, the longest first, grouped by their first characters.

    One alternative after the other is tried at every place of a text: for 1,000 words and 1M characters that takes
    13 s, in groups by three characters 0.06 s.
    """
    if start == GROUPED or len(phrases) == 1:
        return "|".join(_written(phrase, start, whole_words) for phrase in phrases)
    groups: dict[str, list[str]] = {}
    for phrase in phrases:
        groups.setdefault(phrase[start : start + 1], []).append(phrase)
    ended = groups.pop("", [])
    alternatives = [
        f"{_literal(char)}(?:{_alternatives(group, start + 1, whole_words)})"
        for char, group in groups.items()
    ]
    return "|".join(alternatives + [_written(phrase, start, whole_words) for phrase in ended])


def _written(phrase: str, start: int, whole_words: bool) -> str:
    after = r"(?!\w)" if whole_words and WORD.match(phrase[-1]) else ""
    return "".join(map(_literal, phrase[start:])) + after


def _literal(char: str) -> str:
    return r"\s+" if char == " " else re.escape(char)


def _checked(name: str, spans: Values, text: str) -> Integers:
    """Spans as they are given, `[n, 2]`, checked against their text."""
    given = on_host(name, as_integers(name, spans)).long()
    if given.numel() == 0 and given.dim() == 1:
        return np.zeros((0, 2), dtype=np.int64)
    if given.dim() != 2 or given.shape[1] != 2:
        raise ValueError(
            f"{name}: got shape {list(given.shape)}, expected [n, 2], start and end of each span"
        )
    wrong = (given[:, 0] < 0) | (given[:, 0] > given[:, 1]) | (given[:, 1] > len(text))
    if bool(wrong.any()):
        index = int(wrong.int().argmax())
        raise ValueError(
            f"{name}: got {tuple(given[index].tolist())} at [{index}], expected 0 <= start <= end <= {len(text)}, the "
            "number of characters in its text"
        )
    return given.numpy()
