"""How far a command is, on standard error: a bar on a terminal where tqdm is installed, otherwise lines."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, TextIO


class Progress:
    """The progress of a number of steps.

    Args:
        total: how many there are.
        unit: what one is called.
        label: what they are steps of.
        lines: without a bar, how many lines tell of them; one a step where that is not given.
    """

    def __init__(self, total: int, unit: str, label: str = "", lines: int | None = None) -> None:
        self.total, self.label, self.done = total, label, 0
        self._lines = total if lines is None else lines
        self._bar: Any = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            tqdm = importlib.import_module("tqdm")  # no dependency, and nothing is missing without it
            self._bar = tqdm.tqdm(total=total, desc=label, unit=unit, leave=False)

    def begin(self, name: str) -> None:
        """The next step begins; lines tell of it now, and not when it ends."""
        if self._bar is not None:
            self._bar.set_description(name)
        else:
            print(f"[{self.done + 1}/{self.total}] {name}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """A step that `begin` announced has ended."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    def step(self) -> None:
        """A step that nothing announced has ended."""
        self.end()
        told = self.done * self._lines // self.total != (self.done - 1) * self._lines // self.total
        if self._bar is None and told:
            print(f"{self.label}: {self.done} of {self.total}", file=sys.stderr, flush=True)

    def write(self, line: str, stream: TextIO) -> None:
        """Writes a line to a stream, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=stream)
        else:
            print(line, file=stream)
        stream.flush()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
