"""Odd text as a page can show it: what is invisible is named, and what would break markup or direction is replaced."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

#: Kinds of characters that have no glyph: controls, formats (directions, joiners, tags), surrogates, private and
#: unassigned ones, and separators of lines.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
#: What emoji and scripts need between visible characters.
_JOINERS = frozenset({"\u200c", "\u200d"})
#: The words that JSON has for numbers that are not finite.
NOT_FINITE = ("nan", "inf", "-inf")
_NAMED = {"\t": "⇥", "\n": "⏎", "\r": "␍"}


def visible(text: object, *, lines: bool = False) -> str:
    """A text whose every character can be seen, and stand in HTML, XML and JSON.

    Controls, characters that change the direction of writing, lone surrogates and others without a glyph become ⟨U+…⟩;
    joiners stay, because emoji and several scripts are made with them.

    Args:
        text: any text; of other values the one that `str` makes.
        lines: whether tabs and ends of lines stay; otherwise they become arrows.
    """
    return "".join(_shown(character, lines) for character in str(text))


def _shown(character: str, lines: bool) -> str:
    if character in _NAMED:
        return character if lines and character != "\r" else _NAMED[character]
    if character in _JOINERS or unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"⟨U+{ord(character):04X}⟩"


def token(text: str) -> str:
    """A token's text, in which spaces can be seen."""
    return visible(text).replace(" ", "␣") or "⟨empty⟩"


def shortened(text: str, most: int) -> str:
    """A text of `most` characters at most."""
    return text if len(text) <= most else text[: most - 1] + "…"


def number(value: Any, digits: int = 3) -> str:
    """A figure: with `digits` places behind the point; whole ones in groups of three; "–" where there is none."""
    if value is None:
        return "–"
    if value in NOT_FINITE:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return visible(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u2009")
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: Any, digits: int = 3) -> str:
    """A change: a figure with its sign."""
    text = number(value, digits)
    return f"+{text}" if isinstance(value, (int, float)) and value > 0 else text


def with_error(value: Any, error: Any, digits: int = 3, *, change: bool = False) -> str:
    """A figure with its standard error, where there is one."""
    text = (signed if change else number)(value, digits)
    return text if value is None or error is None else f"{text} ± {number(error, digits)}"


def percent(share: float) -> str:
    """A share of a whole."""
    return f"{100 * share:.3g} %"


def bytes_of(count: float) -> str:
    """An amount of memory."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plain(value: Any) -> Any:
    """A value as strict JSON has it: numbers that are not finite become "nan", "inf" and "-inf", tuples lists.

    Raises:
        TypeError: something in it is not plain: a tensor, an object of a class.
    """
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    raise TypeError(
        f"results: got a {type(value).__name__}, expected plain JSON: numbers, texts, lists, mappings"
    )
