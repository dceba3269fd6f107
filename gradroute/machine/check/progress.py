"""How far a run is, on standard error: a bar on a terminal where tqdm is installed, otherwise lines."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

# Without a bar there is a line for every tenth of a backend's cases.
LINES = 10


class Progress:
    """The progress of one backend's cases.

    Args:
        label: what is checked.
        total: how many cases there are.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._bar: Any = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            tqdm = importlib.import_module("tqdm")  # no dependency, and nothing is missing without it
            self._bar = tqdm.tqdm(total=total, desc=label, unit="check", leave=False)

    def step(self) -> None:
        """Another case has ended."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()
        elif self.done * LINES // self.total != (self.done - 1) * LINES // self.total:
            print(f"{self.label}: {self.done} of {self.total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
