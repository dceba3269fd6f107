"""Few cases that cover many axes: every combination of a few values of different axes is in one of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_Value = tuple[str, int]  # an axis, and the index of one of its values


def covering(axes: Mapping[str, Sequence[Any]], strength: int = 2, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Few cases, dicts of one value an axis, in which every `strength` values of different axes meet.

    Args:
        axes: the values of every axis.
        strength: how many axes are combined; 1: every value is in some case.
        seed: which of the coverings it is.
    """
    names, generator = list(axes), random.Random(seed)
    missing = {
        pair
        for chosen in itertools.combinations(names, strength)
        for pair in itertools.product(
            *([(name, index) for index in range(len(axes[name]))] for name in chosen)
        )
    }
    while missing:
        row = dict(_row(axes, names, strength, missing, generator))
        yield {name: axes[name][row[name]] for name in names}


def _row(
    axes: Mapping[str, Sequence[Any]],
    names: list[str],
    strength: int,
    missing: set[tuple[_Value, ...]],
    generator: random.Random,
) -> list[_Value]:
    """The next case: it starts from a missing combination and grows by the value that completes most others."""
    row = list(min(missing))
    for name in generator.sample(names, len(names)):
        if any(name == taken for taken, _ in row):
            continue
        options = [(name, index) for index in range(len(axes[name]))]
        generator.shuffle(options)
        completed = [len(_combinations([*row, option], names, strength) & missing) for option in options]
        row.append(options[completed.index(max(completed))])
    missing -= _combinations(row, names, strength)
    return row


def _combinations(row: list[_Value], names: list[str], strength: int) -> set[tuple[_Value, ...]]:
    ordered = sorted(row, key=lambda value: names.index(value[0]))
    return set(itertools.combinations(ordered, strength))
