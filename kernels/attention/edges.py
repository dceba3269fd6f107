"""Edges between routes: the product with a table of edges, by tests of bits or by gathered weights."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Edges(NamedTuple):
    """A table of edges as kernels take it, see `gradroute.primitives.attention_edges.EdgeBits`.

    Attributes:
        bits: `[levels, B * S]` has for each query token a bit per key's route; where a level's bit is set the edge is
            weights[level]. Without levels: the ids `[B * S]`. None where there is no table: every edge is 1.
        weights: `[levels]`, or None where the only weight is 1. Without levels: the table `[R, R]`.
        levels: a constant, how many levels there are; 0: weights are gathered.
    """

    bits: Tensor | None
    weights: Tensor | None
    levels: tl.constexpr

    @staticmethod
    def of(bits: Tensor | None, weights: Tensor | None, levels: int) -> Edges:
        """The argument for what EdgeBits holds."""
        return Edges(bits, weights, tl.constexpr(levels))

    @property
    def given(self) -> bool:
        """Whether there is a table."""
        return self.bits is not None


@triton.jit
def edged(
    x,  # [queries, keys], or [keys, queries] where BY_KEY
    edges,  # Edges; without a table x itself comes back
    counts,  # R and B * S
    tokens,  # [queries]
    present,  # [queries], which of them exist
    key_routes,  # [keys]
    BY_KEY: tl.constexpr,
):
    """E ⊙ x, exactly 0 where E is 0 whatever x is."""
    num_routes, num_tokens = counts
    if edges.bits is not None:
        if edges.levels == 1:
            row = tl.load(edges.bits + tokens, mask=present, other=0)
            if edges.weights is not None:
                x *= tl.load(edges.weights)
            x = tl.where(_has_edge(row, key_routes, BY_KEY), x, 0.0)
        else:
            e = tl.zeros(x.shape, dtype=tl.float32)
            if edges.levels == 0:
                row = tl.load(edges.bits + tokens, mask=present, other=0) * num_routes
                e = tl.load(edges.weights + _outer(row, key_routes, BY_KEY))
            for level in tl.static_range(edges.levels):
                row = tl.load(edges.bits + level * num_tokens + tokens, mask=present, other=0)
                e = tl.where(_has_edge(row, key_routes, BY_KEY), tl.load(edges.weights + level), e)
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
