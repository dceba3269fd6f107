"""One call of the backward, as its passes share it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...primitives.attention_pattern import Pattern
from ..masks import Routing, Weights
from .edges import Edges, EdgeTable
from .loads import Heads, readable
from .visibility import Visibility, key_mask_of


class BackwardArguments(NamedTuple):
    """What the op takes after dz, q, k, v, z and lse, in the order of its schema.

    Attributes:
        ids: `[B * S]` or None.
        strength: `[B * S]`, 0-dim or None.
        tables: the weights of heads, forward_heads, query, key and value, or None each.
        edges: bits and values of the scores' edges, bits and values of the values' edges, see EdgeBits.
        levels: the number of levels of both.
        tile_bits: reach and present for the keys' gradients, reach and present for the queries', see TileBits.
        num_routes: R.
        is_binary: whether the weights of heads and forward_heads are 0 or 1.
        causal: a field of Pattern, as the next five are.
        window: how many keys back a query sees, or None.
        scale: the factor of the scores.
        dropout: 0, since these kernels drop nothing.
        cu_seqlens: where documents begin and end, or None.
        key_mask: `[B, S_k]` or None.
        want_query: whether dq is wanted.
        want_key_value: whether dk and dv are wanted.
    """

    ids: Tensor | None
    strength: Tensor | None
    tables: list[Tensor | None]
    edges: list[Tensor | None]
    levels: list[int]
    tile_bits: list[Tensor | None]
    num_routes: int
    is_binary: bool
    causal: bool
    window: int | None
    scale: float
    dropout: float
    cu_seqlens: Tensor | None
    key_mask: Tensor | None
    want_query: bool
    want_key_value: bool

    @property
    def pattern(self) -> Pattern:
        """Which keys a query sees."""
        return Pattern(self.causal, self.window, self.scale, self.dropout, self.cu_seqlens, self.key_mask)


class Call(NamedTuple):
    """The tensors that every pass reads, and the arguments that every kernel takes.

    Attributes:
        q: `[B, H, S, D]`, readable, as k, v and dz are.
        k: `[B, G, S, D]`.
        v: `[B, G, S, D]`.
        dz: `[B, H, S, D]`.
        routing: of the tokens `[B * S]`.
        heads: by query head, as forward_heads and query are; by key head: key and value.
        forward_heads: the mask of the output.
        query: the mask of dq.
        key: the mask of dk.
        value: the mask of dv.
        edges: of the scores and of the values.
        visibility: who sees whom.
        key_mask: `[B, S]` int8 or None.
        scale: the factor of the scores.
        is_binary: whether the weights of heads and forward_heads are 0 or 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dz: Tensor
    routing: Routing
    heads: Weights | None
    forward_heads: Weights | None
    query: Weights | None
    key: Weights | None
    value: Weights | None
    edges: Edges
    visibility: Visibility
    key_mask: Tensor | None
    scale: float
    is_binary: bool

    @staticmethod
    def of(dz: Tensor, q: Tensor, k: Tensor, v: Tensor, arguments: BackwardArguments) -> Call:
        """The call that the op's arguments describe."""
        dz, q, k, v = map(readable, (dz, q, k, v))
        heads, forward_heads, query, key, value = arguments.tables
        score_bits, score_values, value_bits, value_values = arguments.edges
        score_levels, value_levels = arguments.levels
        return Call(
            q,
            k,
            v,
            dz,
            Routing.of(arguments.ids, arguments.strength),
            Weights.of(heads),
            Weights.of(forward_heads),
            Weights.of(query),
            Weights.of(key),
            Weights.of(value),
            Edges(
                EdgeTable.of(score_bits, score_values, score_levels),
                EdgeTable.of(value_bits, value_values, value_levels),
                arguments.num_routes,
                num_tokens=k.shape[0] * k.shape[2],
            ),
            Visibility.of(q, k, arguments.pattern),
            key_mask_of(arguments.pattern),
            arguments.scale,
            arguments.is_binary,
        )


class Queries(NamedTuple):
    """What the kernels of dK, dV and dQ read of the queries.

    Attributes:
        q: `[B, H, S, D]`.
        dz: `[B, H, S, D]`.
        lse: `[B, H, S]` fp32.
        delta: `[B, H, S]` fp32, rowsum(do ⊙ o).
        weights: `[B, H, S]` fp32, m_forward_heads ⊙ m_heads; None where all are 1.
    """

    q: Heads
    dz: Heads
    lse: Tensor
    delta: Tensor
    weights: Tensor | None
