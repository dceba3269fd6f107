"""Progress of a recipe on standard error: tqdm's bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def bar(
    items: Iterable[Item] | None = None,
    *,
    what: str,
    total: int | None = None,
    unit: str = "it",
    quick: bool = False,
) -> Any:
    """A bar around items, or, without them, one whose `update` and `close` are called by hand (a context manager).

    Args:
        items: what is gone through.
        what: what is being done.
        total: how many there are, where items do not say.
        unit: what one is called.
        quick: whether it is shown only where it takes over a second.
    """
    from tqdm import tqdm

    return tqdm(
        items,
        desc=what,
        total=total,
        unit=unit,
        leave=False,
        delay=1 if quick else 0,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log is not a terminal
    )


def say(line: str) -> None:
    """Writes a line to standard error, above the bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
