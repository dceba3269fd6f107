"""Visibility: the keys that each query sees, the queries that see each key, and the tiles of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...primitives.attention_pattern import Pattern


class Visibility(NamedTuple):
    """A Pattern as kernels take it, less padding.

    Attributes:
        starts: `[S]` int32 or None, where the document of each position begins.
        stops: `[S]` int32 or None, where it ends.
        window: how many keys back a query sees, or None.
        causal: a constant, whether queries see no later keys.
        num_queries: S_q. The queries are the last of the positions.
        num_keys: S_k.
    """

    starts: Tensor | None
    stops: Tensor | None
    window: int | None
    causal: tl.constexpr
    num_queries: int
    num_keys: int

    @staticmethod
    def of(q: Tensor, k: Tensor, pattern: Pattern, documents: Tensor | None) -> Visibility:
        """The argument for q `[B, H, S_q, D]`, k `[B, G, S_k, D]`, and the bounds of documents `[2, S]` or None."""
        starts, stops = (None, None) if documents is None else documents
        return Visibility(starts, stops, pattern.window, tl.constexpr(pattern.causal), q.shape[2], k.shape[2])


def key_mask_of(pattern: Pattern) -> Tensor | None:
    """The pattern's key mask `[B, S_k]` as int8."""
    return None if pattern.key_mask is None else pattern.key_mask.contiguous().view(torch.int8)


@triton.jit
def seen_keys(rows, visibility):
    """[first, stop) of the keys that each query sees, padding included. Neither end moves back from query to query."""
    num_keys = visibility.num_keys
    position = rows + (num_keys - visibility.num_queries)
    first = position * 0
    stop = first + num_keys
    if visibility.starts is not None:
        inside = (position >= 0) & (position < num_keys)
        first = tl.load(visibility.starts + position, mask=inside, other=0)
        stop = tl.load(visibility.stops + position, mask=inside, other=0)
    if visibility.causal:
        stop = tl.minimum(stop, position + 1)
    if visibility.window is not None:
        first = tl.maximum(first, position - visibility.window + 1)
        if not visibility.causal:
            stop = tl.minimum(stop, position + visibility.window)
    return tl.maximum(first, 0), stop


@triton.jit
def is_seen(key, row, visibility):
    """Whether each query sees each key, padding aside; of shapes that broadcast. Tests only what can be false."""
    first, stop = seen_keys(row, visibility)
    seen = key < stop
    if (visibility.starts is not None) or (visibility.window is not None):
        seen = seen & (key >= first)
    return seen


@triton.jit
def seeing_queries(keys, visibility):
    """[first, stop) of the queries that see each key. Neither end moves back from key to key."""
    first = keys * 0
    stop = first + visibility.num_keys
    if visibility.starts is not None:
        first = tl.load(visibility.starts + keys)
        stop = tl.load(visibility.stops + keys)
    if visibility.causal:
        first = tl.maximum(first, keys)
    if visibility.window is not None:
        stop = tl.minimum(stop, keys + visibility.window)
        if not visibility.causal:
            first = tl.maximum(first, keys - visibility.window + 1)
    past = visibility.num_keys - visibility.num_queries
    return tl.maximum(first - past, 0), tl.minimum(stop - past, visibility.num_queries)


@triton.jit
def tiles_of_keys(start, visibility, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tiles of keys [begin, end) that any query of a tile sees, and [whole, rest) that all of them see whole."""
    last = tl.minimum(start + BLOCK_Q, visibility.num_queries) - 1
    first_start, first_stop = seen_keys(start, visibility)
    last_start, last_stop = seen_keys(last, visibility)
    begin = first_start // BLOCK_K
    end = tl.maximum(tl.cdiv(last_stop, BLOCK_K), begin)
    whole = tl.minimum(tl.maximum(tl.cdiv(last_start, BLOCK_K), begin), end)
    rest = tl.maximum(tl.minimum(first_stop // BLOCK_K, end), whole)
    return begin, end, whole, rest


@triton.jit
def tiles_of_queries(start, visibility, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tiles of queries [begin, end) that see any key of a tile, and [whole, rest) that see all of them."""
    last = tl.minimum(start + BLOCK_K, visibility.num_keys) - 1
    first_start, first_stop = seeing_queries(start, visibility)
    last_start, last_stop = seeing_queries(last, visibility)
    begin = first_start // BLOCK_Q
    end = tl.maximum(tl.cdiv(last_stop, BLOCK_Q), begin)
    whole = tl.minimum(tl.maximum(tl.cdiv(last_start, BLOCK_Q), begin), end)
    rest = tl.maximum(tl.minimum(first_stop // BLOCK_Q, end), whole)
    return begin, end, whole, rest


@triton.jit
def is_key(key_mask, keys, num_keys):
    """Which keys exist and are not padding."""
    present = keys < num_keys
    if key_mask is not None:
        present = present & (tl.load(key_mask + keys, mask=present, other=0) != 0)
    return present
