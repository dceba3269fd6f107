"""Masks as kernels read them: the weights of a tile of tokens, and the masked product."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Routing(NamedTuple):
    """The tokens' routes as every routed kernel takes them.

    Attributes:
        ids: `[T]`, or None where no mask and no edge needs them.
        strength: `[T]`, one value with stride 0, or None.
        strength_stride: 1 or 0.
    """

    ids: Tensor | None
    strength: Tensor | None
    strength_stride: int

    @staticmethod
    def of(ids: Tensor | None, strength: Tensor | None) -> Routing:
        """The argument for ids `[T]` and a strength `[T]`, 0-dim or None."""
        return Routing(ids, strength, int(strength is not None and strength.dim() > 0))


class Weights(NamedTuple):
    """A table as kernels take it.

    Attributes:
        pointer: `[R, cols]` fp32.
        cols: a constant, 1 (broadcast) or the number of features.
    """

    pointer: Tensor
    cols: tl.constexpr

    @staticmethod
    def of(table: Tensor | None) -> Weights | None:
        """The argument for weights `[R, F]` or `[R, 1]`, or None for none."""
        return None if table is None else Weights(table, tl.constexpr(table.shape[1]))


class Tokens(NamedTuple):
    """A tile of tokens, as `load_tokens` reads it.

    Attributes:
        routes: `[BLOCK_T]`.
        strength: `[BLOCK_T, 1]` fp32; without meaning where the routes have no strength.
        present: `[BLOCK_T]`, which tokens exist.
    """

    routes: tl.tensor
    strength: tl.tensor
    present: tl.tensor


@triton.jit
def load_tokens(
    routing,  # Routing
    rows,  # [BLOCK_T] int64, the tokens
    present,  # [BLOCK_T], which of them exist
):
    """The routes and strengths of a tile of tokens."""
    routes = tl.load(routing.ids + rows, mask=present, other=0)
    s = present.to(tl.float32)
    if routing.strength is not None:
        s = tl.load(routing.strength + rows * routing.strength_stride, mask=present, other=0.0).to(tl.float32)
    return Tokens(routes, s[:, None], present)


@triton.jit
def load_weights(
    weights,  # Weights [R, F] or [R, 1]
    routing,  # Routing
    tokens,  # Tokens
    features,  # [BLOCK_F] int64
    inside,  # [BLOCK_F], which of them exist
):
    """m of a tile, fp32: weights[route, feature], interpolated from row 0 by the strength.

    [BLOCK_T, BLOCK_F]; of a broadcast table [BLOCK_T, 1], one weight a token.
    """
    at = weights.pointer + tokens.routes.to(tl.int64)[:, None] * weights.cols
    if weights.cols > 1:
        m = tl.load(at + features[None, :], mask=tokens.present[:, None] & inside[None, :], other=0.0)
    else:
        m = tl.load(at, mask=tokens.present[:, None], other=0.0)
    if routing.strength is not None:
        s = tokens.strength
        if weights.cols > 1:
            base = tl.load(weights.pointer + features, mask=inside, other=0.0)[None, :]
        else:
            base = tl.load(weights.pointer)
        # Interpolated as torch.lerp interpolates, so that a strength of one is exactly no strength.
        m = tl.where(tl.abs(s) < 0.5, base + s * (m - base), m - (m - base) * (1.0 - s))
    return m


@triton.jit
def masked(
    g,  # [BLOCK_T, BLOCK_F] fp32
    weights,  # Weights or None
    routing,  # Routing
    tokens,  # Tokens
    features,  # [BLOCK_F] int64
    inside,  # [BLOCK_F], which of them exist
):
    """m ⊙ g, exactly 0 where m is 0 whatever g is; g itself where there is no table (weights is None)."""
    if weights is not None:
        m = load_weights(weights, routing, tokens, features, inside)
        g = m * tl.where(m == 0.0, 0.0, g)
    return g
