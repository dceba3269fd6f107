"""Says on standard error what a run is doing: every case on a line of its own, and below it the stage it is in.

On a terminal a stage takes the place of the one before; elsewhere each is a line, and steps within stages are left out.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable

_INDENT = "  "


def case(name: str, number: int, of: int) -> None:
    """A case begins: its whole name, however long."""
    clear()
    print(f"[{number}/{of}] {name}", file=sys.stderr, flush=True)


def stage(text: str) -> None:
    """A stage of the case begins."""
    if sys.stderr.isatty():
        step(text)
    else:
        print(_INDENT + text, file=sys.stderr, flush=True)


def step(text: str) -> None:
    """A step of a stage begins; it is shown on a terminal alone."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{(_INDENT + text)[:width]}", end="", file=sys.stderr, flush=True)


def clear() -> None:
    """Takes the stage off the terminal, before something else is printed there."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def rounds(numbers: Iterable[int], text: str) -> Iterable[int]:
    """The rounds of a stage, with a bar on a terminal; its description is short, so that nothing of it is cut."""
    clear()
    if not sys.stderr.isatty():
        stage(text)
    from tqdm import tqdm  # the extra `bench` has it; lists and comparisons need no bars

    return tqdm(numbers, desc=_INDENT + text, unit="round", leave=False, disable=None)
