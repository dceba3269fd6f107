"""One call of the backward, as its passes share it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...primitives.attention_edges import EdgeBits, TileBits
from ...primitives.attention_pattern import Pattern
from ..masks import Routing, Weights
from .configurations import constants
from .edges import Edges
from .loads import Heads, readable
from .visibility import Visibility, key_mask_of


class BackwardArguments(NamedTuple):
    """The op's arguments behind dz, q, k, v, z and lse.

    Attributes:
        ids: `[B * S]` or None.
        strength: `[B * S]`, 0-dim or None.
        heads: the weights of its mask or None, as the next four are.
        forward_heads: the mask of the output.
        query: the mask of dq.
        key: the mask of dk.
        value: the mask of dv.
        score_edges: the edges of scores.
        value_edges: the edges of values.
        key_tiles: the tiles with an edge of scores or of values, for the keys' gradients.
        query_tiles: the tiles with an edge of scores, for the queries' gradients.
        num_routes: R.
        is_binary: whether the weights of heads and forward_heads are 0 or 1.
        pattern: which keys a query sees; documents are those of `documents`.
        documents: `[2, S]` int32 or None, where each position's document begins, and where it ends.
        want_query: whether dq is wanted.
        want_key_value: whether dk and dv are wanted.
    """

    ids: Tensor | None
    strength: Tensor | None
    heads: Tensor | None
    forward_heads: Tensor | None
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    score_edges: EdgeBits
    value_edges: EdgeBits
    key_tiles: TileBits
    query_tiles: TileBits
    num_routes: int
    is_binary: bool
    pattern: Pattern
    documents: Tensor | None
    want_query: bool
    want_key_value: bool


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
        score_edges: the edges of dS.
        value_edges: the edges of P in dv.
        num_routes: R.
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
    score_edges: Edges
    value_edges: Edges
    num_routes: int
    visibility: Visibility
    key_mask: Tensor | None
    scale: float
    is_binary: bool

    @property
    def num_tokens(self) -> int:
        """B * S."""
        return self.k.shape[0] * self.k.shape[2]

    @staticmethod
    def of(dz: Tensor, q: Tensor, k: Tensor, v: Tensor, arguments: BackwardArguments) -> Call:
        """The call that the op's arguments describe."""
        dz, q, k, v = map(readable, (dz, q, k, v))
        return Call(
            q,
            k,
            v,
            dz,
            Routing.of(arguments.ids, arguments.strength),
            Weights.of(arguments.heads),
            Weights.of(arguments.forward_heads),
            Weights.of(arguments.query),
            Weights.of(arguments.key),
            Weights.of(arguments.value),
            Edges.of(*arguments.score_edges),
            Edges.of(*arguments.value_edges),
            arguments.num_routes,
            Visibility.of(q, k, arguments.pattern, arguments.documents),
            key_mask_of(arguments.pattern),
            arguments.pattern.scale,
            arguments.is_binary,
        )


class PerQuery(NamedTuple):
    """The numbers that the kernels of dK, dV and dQ read for each query and head.

    Attributes:
        lse: `[B, H, S]` fp32.
        delta: `[B, H, S]` fp32, rowsum(do ⊙ o).
        weights: `[B, H, S]` fp32, m_forward_heads ⊙ m_heads; None where all are 1.
    """

    lse: Tensor
    delta: Tensor
    weights: Tensor | None


def shared_arguments(call: Call, per_query: PerQuery, lists: NamedTuple) -> dict[str, Any]:
    """What the kernel of dK and dV and that of dQ are both given; lists: the TileLists of one launch."""
    return {
        "q": Heads.of(call.q),
        "dz": Heads.of(call.dz),
        "per_query": per_query,
        "k": Heads.of(call.k),
        "v": Heads.of(call.v),
        "routing": call.routing,
        "score_edges": call.score_edges,
        "num_routes": call.num_routes,
        "num_tokens": call.num_tokens,
        "lists": lists,
        "visibility": call.visibility,
        "key_mask": call.key_mask,
        "scale": call.scale,
        "IS_BINARY": call.is_binary,
        **constants(call.q),
    }
