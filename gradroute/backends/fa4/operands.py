"""What a pass reads beside its tensors: routes, edges and what a query sees by token, and the lists of blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from ...routes import Routes
from .blocks import Blocks
from .passes import Pass
from .spans import Spans

#: The most routes, that of padding included: each has one bit of an int64.
MAX_ROUTES = 64


class Operands(NamedTuple):
    """A pass as the kernel takes it. The padding's keys have a route R of their own, to which no query has an edge.

    Attributes:
        query_routes: `[B, S]` int32.
        key_routes: `[B, S]` int32, R where a key is padding.
        bits: `[B, S]` by query: bit c says that there is an edge to keys of route c; int32 up to 32 routes and else
            int64. None: there is an edge to every key.
        first: `[S]` int32, the first key that a query sees; None: the mask is causal, without a window or documents.
        stop: `[S]` int32, the key behind the last one; None with `first`.
        bias: `[R, R + 1]` fp32, what is added to the score; None: nothing.
        factor: `[R, R + 1]` fp32, what the gradient of the score is multiplied by; None: 1.
        blocks: the lists of blocks.
    """

    query_routes: Tensor
    key_routes: Tensor
    bits: Tensor | None
    first: Tensor | None
    stop: Tensor | None
    bias: Tensor | None
    factor: Tensor | None
    blocks: Blocks

    @staticmethod
    def of(one: Pass, routes: Routes, shape: tuple[int, int], pattern: Pattern) -> Operands:
        """The operands of a pass for ids of shape `[B, S]`; all are kept for the other layers of the batch."""
        return routes.derived_from(
            ("fa4", shape, one.value, one.score, pattern.causal, pattern.window),
            (pattern.cu_seqlens, pattern.key_mask),
            lambda: _operands(one, routes, shape, pattern),
        )


def _operands(one: Pass, routes: Routes, shape: tuple[int, int], pattern: Pattern) -> Operands:
    query_routes = key_routes = routes.ids.view(shape)
    if pattern.key_mask is not None:
        key_routes = query_routes.masked_fill(~pattern.key_mask, routes.num_routes)
    value, score = (
        routes.ids.new_ones(routes.num_routes, routes.num_routes, dtype=torch.float32)
        if table is None
        else table.on(routes.device)
        for table in (one.value, one.score)
    )
    has_edge = None
    if one.has_support or pattern.key_mask is not None:
        has_edge = _with_padding(value != 0)
    spans = Spans.of(pattern, shape[1], routes.device)
    is_plain = pattern.causal and pattern.window is None and pattern.cu_seqlens is None
    divisor = value.where(value != 0, 1.0)
    return Operands(
        query_routes,
        key_routes,
        bits=None if has_edge is None else _bits(has_edge, pattern)[query_routes.long()],
        first=None if is_plain else spans.first,
        stop=None if is_plain else spans.stop,
        bias=_with_padding(divisor.log()) if one.has_bias else None,
        factor=_with_padding(score / divisor) if one.has_factor else None,
        blocks=Blocks.of(spans, query_routes, key_routes, has_edge),
    )


def _with_padding(by_routes: Tensor) -> Tensor:
    """`[R, R]` → `[R, R + 1]`: a column of zeros for the route of padding."""
    return torch.nn.functional.pad(by_routes, (0, 1))


def _bits(has_edge: Tensor, pattern: Pattern) -> Tensor:
    """`[R]`: a bit for each column of `[R, R + 1]`."""
    num_routes = has_edge.shape[0] + (pattern.key_mask is not None)
    column = torch.arange(has_edge.shape[1] - 1, device=has_edge.device)
    bits = (has_edge[:, :-1].long() << column).sum(-1)
    return bits.int() if num_routes <= 32 else bits
