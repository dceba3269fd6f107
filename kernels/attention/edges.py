"""Edges between routes: the product with a table of edges, by tests of bits or by gathered weights."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class EdgeTable(NamedTuple):
    """A table of edges as kernels take it, see gradroute's EdgeBits.

    Attributes:
        bits: `[levels, B * S]` has for each query token a bit per key's route; where a level's bit is set the edge is
            weights[level]. Without levels: the ids `[B * S]`.
        weights: `[levels]`, or None where the only weight is 1. Without levels: the table `[R, R]`.
        levels: a constant, how many levels there are; 0: weights are gathered.
    """

    bits: Tensor
    weights: Tensor | None
    levels: tl.constexpr

    @staticmethod
    def of(bits: Tensor | None, weights: Tensor | None, levels: int) -> EdgeTable | None:
        """The argument for a table's bits, or None where there are none: every edge is 1."""
        return None if bits is None else EdgeTable(bits, weights, tl.constexpr(levels))


class Edges(NamedTuple):
    """Both tables of edges, which share two numbers: with two of each, a kernel has two more values in registers.

    Attributes:
        score: the edges of dS, or None.
        value: the edges of P in dv, or None.
        num_routes: R.
        num_tokens: B * S.
    """

    score: EdgeTable | None
    value: EdgeTable | None
    num_routes: int
    num_tokens: int

    @property
    def levels(self) -> list[int]:
        """The number of levels of the tables that there are."""
        return [table.levels.value for table in (self.score, self.value) if table is not None]


@triton.jit
def edged(
    x,  # [queries, keys], or [keys, queries] where BY_KEY
    table,  # EdgeTable, or None: x itself comes back
    edges,  # Edges
    tokens,  # [queries]
    present,  # [queries], which of them exist
    key_routes,  # [keys]
    BY_KEY: tl.constexpr,
):
    """E ⊙ x, exactly 0 where E is 0 whatever x is."""
    if table is not None:
        if table.levels == 1:
            row = tl.load(table.bits + tokens, mask=present, other=0)
            if table.weights is not None:
                x *= tl.load(table.weights)
            x = tl.where(_has_edge(row, key_routes, BY_KEY), x, 0.0)
        else:
            e = tl.zeros(x.shape, dtype=tl.float32)
            if table.levels == 0:
                row = tl.load(table.bits + tokens, mask=present, other=0) * edges.num_routes
                e = tl.load(table.weights + _outer(row, key_routes, BY_KEY))
            for level in tl.static_range(table.levels):
                row = tl.load(table.bits + level * edges.num_tokens + tokens, mask=present, other=0)
                e = tl.where(_has_edge(row, key_routes, BY_KEY), tl.load(table.weights + level), e)
            x = e * tl.where(e == 0.0, 0.0, x)
    return x


@triton.jit
def _has_edge(row_bits, key_routes, BY_KEY: tl.constexpr):
    routes = key_routes.to(row_bits.dtype)
    if BY_KEY:
        bit = row_bits[None, :] >> routes[:, None]
    else:
        bit = row_bits[:, None] >> routes[None, :]
    return (bit & 1) != 0


@triton.jit
def _outer(row, key_routes, BY_KEY: tl.constexpr):
    if BY_KEY:
        both = row[None, :] + key_routes[:, None]
    else:
        both = row[:, None] + key_routes[None, :]
    return both
