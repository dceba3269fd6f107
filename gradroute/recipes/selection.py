"""Which documents a stage trains on: by the name of their source, or by the routes of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .batches import Row, Rows
from .reading import ConfigError


def retained(rows: Rows, sources: Sequence[str], key: str) -> Rows:
    """The documents of some sources; without sources, those whose tokens all have the base route, 0.

    Args:
        rows: documents with `source` and `route_ids`.
        sources: names of sources.
        key: the config's key of the sources, for the error.

    Raises:
        ConfigError: there are none.
    """
    return _chosen(rows, sources, lambda row: not np.any(row["route_ids"]), key)


def forgotten(rows: Rows, sources: Sequence[str], key: str) -> Rows:
    """The documents of some sources; without sources, those with a token of another route than the base route, 0.

    Raises:
        ConfigError: there are none.
    """
    return _chosen(rows, sources, lambda row: bool(np.any(row["route_ids"])), key)


def drawn(rows: Rows, count: int, seed: int) -> Rows:
    """`count` documents, or all where there are no more, drawn without replacement."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return _taken(rows, [int(index) for index in chosen])


def most_of_each(rows: Rows, most: int | None) -> Rows:
    """The first `most` documents of every source."""
    if most is None:
        return rows
    counts: dict[str, int] = {}
    indices = []
    for index, source in enumerate(_column(rows, "source")):
        counts[source] = counts.get(source, 0) + 1
        if counts[source] <= most:
            indices.append(index)
    return _taken(rows, indices)


def _chosen(rows: Rows, sources: Sequence[str], rule: Callable[[Row], bool], key: str) -> Rows:
    if sources:
        indices = [index for index, source in enumerate(_column(rows, "source")) if source in sources]
    else:
        indices = [index for index, ids in enumerate(_column(rows, "route_ids")) if rule({"route_ids": ids})]
    if not indices:
        expected = (
            "sources with training documents"
            if sources
            else "the sources by name: no document is of that kind"
        )
        raise ConfigError.of(key, list(sources), expected)
    return _taken(rows, indices)


def _column(rows: Rows, name: str) -> Sequence[Any]:
    return rows[name] if hasattr(rows, "select") else [row[name] for row in rows]


def _taken(rows: Rows, indices: list[int]) -> Rows:
    return rows.select(indices) if hasattr(rows, "select") else [rows[index] for index in indices]
