"""Texts that (nearly) repeat earlier ones: training documents would else be copies of held-out ones."""

from __future__ import annotations

import re

_RUN = 8  # words


class Repeats:
    """Remembers the runs of eight words of all texts that it was asked about.

    Equality alone would keep a licence once per copyright holder and once per line width.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def has(self, text: str) -> bool:
        """Whether at least half of the text's runs of words stood in earlier texts; remembers them all.

        A text of fewer words is one run. One without words repeats nothing.
        """
        words = re.findall(r"\w+", text.lower())
        runs = {tuple(words[start : start + _RUN]) for start in range(max(1, len(words) - _RUN + 1))}
        repeated = bool(words) and 2 * len(runs & self._seen) >= len(runs)
        self._seen |= runs
        return repeated
