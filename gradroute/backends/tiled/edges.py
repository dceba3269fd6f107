"""Edges between routes: which queries and keys are computed together, and with what weights their gradients flow.

All queries of one route give a key the same weight. So queries are taken by classes of routes with the same edges: for
a class keys of weight 0 are left out, and other weights multiply keys and sums `[K, D]` instead of tiles. Queries in
small classes, and all of them where the host may not look at data, take their weights from the tables, tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiling
from .tiling import by_element
from .visibility import Sight

# Routes of fewer tokens are taken together, with their edges applied to every tile: backward of 4096 tokens in one
# thread takes 736 ms apart and 799 together with 64 routes, half of the edges 0, 384 and 760 with 16.
MIN_TOKENS_OF_A_CLASS = 64


class Flow(NamedTuple):
    """How a gradient passes edges.

    Attributes:
        weights: `[K, 1]`, the same for all rows, nowhere 0; None: ones.
        table: `[R, R]` fp32, from which every tile takes its edges; None: they are in `weights`.
    """

    weights: Tensor | None = None
    table: Tensor | None = None


class Reading(NamedTuple):
    """Keys that some queries read, and what these queries teach them.

    Attributes:
        picked: `[K]`, the index of the keys; None: all.
        sight: which of these keys a query sees.
        score: how the gradient of scores flows; None: not at all.
        value: how the gradient of values flows; None: not at all.
    """

    picked: Tensor | None
    sight: Sight
    score: Flow | None
    value: Flow | None


class Part(NamedTuple):
    """Queries whose edges are handled alike: `[S_q]` bool, None for all; with the keys that they read."""

    queries: Tensor | None
    readings: list[Reading]


class Edges(NamedTuple):
    """The edges of some batch elements: ids `[elements, S]` int64, tables `[R, R]` fp32; None: ones."""

    ids: Tensor | None
    score: Tensor | None
    value: Tensor | None

    @staticmethod
    def of(
        ids: Tensor | None, score: Tensor | None, value: Tensor | None, batch: slice, length: int
    ) -> Edges:
        """The edges of these batch elements, from ids `[B * S]` of sequences of this length."""
        if ids is None:
            return Edges(None, None, None)
        return Edges(ids.view(-1, length)[batch].long(), score, value)

    def flows(self) -> tuple[Flow, Flow]:
        """Flows of scores and of values whose edges every tile takes from the tables."""
        return Flow(table=self.score), Flow(table=self.value)

    def whole(self, sight: Sight) -> Part:
        """All queries with all keys that they see."""
        return Part(None, [Reading(None, sight, *self.flows())])

    def parts(self, sight: Sight, want_key_value: bool) -> Iterator[Part]:
        """The queries of each class, then all that are in no class, without those that see no key."""
        seeing = sight.of_keys(None)[1]
        remaining = seeing.first < seeing.end  # [S_q]
        for queries, score, value in self._classes():
            yield Part(queries & remaining, list(_readings(sight, score, value, want_key_value)))
            remaining = remaining & ~queries
        if bool(remaining.any()):
            yield Part(remaining, [Reading(*sight.of_keys(None), *self.flows())])

    def weigh_(self, tile: Tensor, table: Tensor | None, rows: Tensor, keys: Tensor) -> None:
        """E ⊙ tile `[..., n, m]` in place, exactly 0 where E = 0; at the positions rows `[n, 1]` and keys `[m, 1]`."""
        if table is None:
            return
        assert self.ids is not None
        of_rows = self.ids[:, rows]  # [elements, n, 1]
        of_keys = self.ids[:, keys].mT  # [elements, 1, m]
        weights = table[of_rows, of_keys].unsqueeze(1)  # [elements, 1, n, m]
        by_element(tile, weights).mul_(weights).masked_fill_(weights == 0, 0)

    def _classes(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries `[S]` bool with the same edges to every key, and these, `[S]` each; few queries are in no class."""
        if self.ids is None:
            return
        routes, ids = torch.unique(self.ids[0], return_inverse=True)
        if len(routes) ** 2 > tiling.ROWS * tiling.KEYS:
            return
        ones = torch.ones(len(routes), len(routes), dtype=torch.float32, device=ids.device)
        score, value = (ones if table is None else table[routes][:, routes] for table in self[1:])
        _, class_of = torch.unique(
            torch.cat([score, value], 1), dim=0, return_inverse=True
        )  # [routes present]
        for number, size in enumerate(torch.bincount(class_of[ids]).tolist()):
            if size >= MIN_TOKENS_OF_A_CLASS:
                route = int((class_of == number).nonzero()[0])
                yield class_of[ids] == number, score[route, ids], value[route, ids]


def _readings(sight: Sight, score: Tensor, value: Tensor, want_key_value: bool) -> Iterator[Reading]:
    """The readings of queries of one class with edges score `[S]` and value `[S]`: keys by which of them is not 0."""
    scored, valued = score != 0, (value != 0) & want_key_value
    for chosen, has_score, has_value in (
        (scored & valued, True, True),
        (scored & ~valued, True, False),
        (~scored & valued, False, True),
    ):
        if bool(chosen.any()):
            index, seen = sight.of_keys(chosen)
            yield Reading(
                index,
                seen,
                _constant(score, index) if has_score else None,
                _constant(value, index) if has_value else None,
            )


def _constant(weights: Tensor, index: Tensor | None) -> Flow:
    """The flow with these weights `[S]` of the keys at `index`."""
    weights = taken(weights, index)
    return Flow() if bool((weights == 1).all()) else Flow(weights[:, None])


def taken(t: Tensor, index: Tensor | None) -> Tensor:
    """The rows `index` of t `[K, X]`; t itself for all."""
    return t if index is None else t.index_select(0, index)
