"""dQ: a program sums the gradients of one tile of queries over the keys that it sees."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..matrices import Matrix
from ..rounding import dot, rounded
from .arguments import Call, PerQuery, shared_arguments
from .configurations import attention_config, block_d, edges_variant
from .edges import edged
from .loads import Heads, head_weights, load_rows, masked_rows, of_head, store_rows
from .softmax import LOG2_E
from .tiles import TileLists, list_of, place_of
from .visibility import is_key, seen_keys, tiles_of_keys


@triton.jit
def attention_dq_kernel(
    q,  # Heads [B, H, S, D]
    dz,  # Heads [B, H, S, D]
    per_query,  # PerQuery
    k,  # Heads [B, G, S, D]
    v,  # Heads [B, G, S, D]
    dq,  # Heads [B, H, S, D]
    routing,  # Routing of [B * S]
    query,  # Weights [R, H] or None
    score_edges,  # Edges
    num_routes,
    num_tokens,
    lists,  # TileLists of tiles of queries, one for all heads
    visibility,  # Visibility
    key_mask,  # [B, S] int8 or None
    scale,
    num_heads,
    group,
    HEAD_DIM: tl.constexpr,
    IS_BINARY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq = m_query ⊙ scale (E_score ⊙ dS) k of one tile of queries, over the keys it sees."""
    num_queries, num_keys = visibility.num_queries, visibility.num_keys
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    owner, entry = place_of(lists.order, num_tiles, lists.num_shared)
    if lists.order is None:  # the last queries see most keys, so they begin
        owner = num_tiles - 1 - owner
    start = owner * BLOCK_Q
    batch = (entry // num_heads).to(tl.int64)
    head = (entry % num_heads).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_Q)
    present = rows < num_queries
    tokens = batch * num_queries + rows
    row = entry.to(tl.int64) * num_queries + rows
    m = head_weights(query, routing, tokens, present, head)
    weight = present.to(tl.float32)
    if per_query.weights is not None:
        weight = tl.load(per_query.weights + row, mask=present, other=0.0)
    begin, end, whole, rest = tiles_of_keys(start, visibility, BLOCK_Q, BLOCK_K)
    if key_mask is not None:
        key_mask += batch * num_keys
        whole = end
        rest = end
    is_live = (tl.max(tl.abs(m)) > 0.0) & (tl.max(tl.abs(weight)) > 0.0)
    tiles = lists.tiles
    if tiles is not None:
        first, slot = list_of(lists)
        tiles += first
        begin = 0
        end = tl.load(lists.counts + slot)
        whole = 0
        rest = 0
        if score_edges.weights is None:
            rest = tl.load(lists.whole_counts + slot)
    end = tl.where(is_live, end, begin)
    whole = tl.where(is_live, whole, begin)
    rest = tl.where(is_live, rest, begin)
    q_head = Matrix(of_head(q, batch, head), q.stride_s, q.stride_d)
    dz_head = Matrix(of_head(dz, batch, head), dz.stride_s, dz.stride_d)
    own = (
        load_rows(q_head, start, present, HEAD_DIM, BLOCK_Q, BLOCK_D),
        load_rows(dz_head, start, weight != 0.0, HEAD_DIM, BLOCK_Q, BLOCK_D),
        tl.load(per_query.lse + row, mask=present, other=float("inf")) * LOG2_E,
        tl.load(per_query.delta + row, mask=present, other=0.0),
        weight,
        tokens,
        present,
        seen_keys(rows, visibility),
    )
    other = (
        Matrix(of_head(k, batch, head // group), k.stride_s, k.stride_d),
        Matrix(of_head(v, batch, head // group), v.stride_s, v.stride_d),
        routing.ids,
        key_mask,
        batch * num_keys,
        num_keys,
    )
    counts = (num_routes, num_tokens)
    dq_tile = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    if (
        score_edges.weights is None
    ):  # else every tile with an edge is tested: a second loop would spill registers
        for place in range(whole, rest):
            dq_tile = _add_keys(
                dq_tile,
                _tile_at(tiles, place) * BLOCK_K,
                own,
                other,
                score_edges,
                counts,
                scale,
                False,
                HEAD_DIM,
                IS_BINARY,
                PRECISION,
                BLOCK_K,
                BLOCK_D,
            )
    before = whole - begin
    for index in range(before + end - rest):
        place = tl.where(index < before, begin + index, rest + index - before)
        dq_tile = _add_keys(
            dq_tile,
            _tile_at(tiles, place) * BLOCK_K,
            own,
            other,
            score_edges,
            counts,
            scale,
            True,
            HEAD_DIM,
            IS_BINARY,
            PRECISION,
            BLOCK_K,
            BLOCK_D,
        )
    dq_head = Matrix(of_head(dq, batch, head), dq.stride_s, dq.stride_d)
    store_rows(dq_head, start, present, masked_rows(scale * dq_tile, m, query), HEAD_DIM, BLOCK_Q, BLOCK_D)


@triton.jit
def _tile_at(tiles, place):
    """The tile at a place of a list, or the place itself where there is none (tiles is None)."""
    tile = place
    if tiles is not None:
        tile = tl.load(tiles + place).to(tl.int32)
    return tile


@triton.jit
def _add_keys(
    dq,  # [BLOCK_Q, BLOCK_D] fp32, the sum so far
    start,
    own,  # the queries: q, dz [BLOCK_Q, BLOCK_D], lse in base 2, delta, weights, tokens, presence, the keys they see
    other,  # a head's keys: k and v (Matrix [S, D]), ids, key mask, first token, how many keys there are
    score_edges,  # Edges
    counts,  # R and B * S
    scale,
    PARTIAL: tl.constexpr,  # whether some query may not see some key of the tile, or have an edge other than 1 to it
    HEAD_DIM: tl.constexpr,
    IS_BINARY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds to dq what the keys of one tile give."""
    q_tile, dz_tile, log_sum, delta, weight, tokens, present, seen = own
    k, v, ids, key_mask, first_token, num_keys = other
    first, stop = seen
    keys = start + tl.arange(0, BLOCK_K)
    k_tile = load_rows(k, start, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
    v_tile = load_rows(v, start, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
    p = tl.exp2(dot(q_tile, tl.trans(k_tile), None, PRECISION) * (scale * LOG2_E) - log_sum[:, None])
    if PARTIAL:
        is_seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
        p = tl.where(is_seen & is_key(key_mask, keys, num_keys)[None, :], p, 0.0)
    dp = dot(dz_tile, tl.trans(v_tile), None, PRECISION)
    if not IS_BINARY:
        dp *= weight[:, None]
    ds = p * (dp - delta[:, None])
    if PARTIAL and (score_edges.bits is not None):
        key_routes = tl.load(ids + first_token + keys, mask=keys < num_keys, other=0)
        ds = edged(ds, score_edges, counts, tokens, present, key_routes, False)
    return dot(rounded(ds, k_tile.dtype), k_tile, dq, PRECISION)


def query_gradients(
    call: Call, per_query: PerQuery, all_lists: Iterable[TileLists], config: dict[str, int]
) -> Tensor:
    """dQ `[B, H, S, D]`."""
    batch, heads = call.q.shape[:2]
    dq = torch.empty_like(call.q)
    for lists in all_lists:
        launch(
            attention_dq_kernel,
            (lists.num_programs(batch * heads),),
            config,
            **shared_arguments(call, per_query, lists),
            dq=Heads.of(dq),
            query=call.query,
            num_heads=heads,
            group=heads // call.k.shape[1],
        )
    return dq


def dq_config(call: Call) -> dict[str, int]:
    """The configuration of dQ.

    Masks beside documents or a window need more registers than the plain call leaves at a head dimension of 128.
    """
    variant = edges_variant(call.score_edges)
    is_bounded = call.visibility.starts is not None or call.visibility.window is not None
    is_masked = any(mask is not None for mask in (call.heads, call.forward_heads, call.query, call.key_mask))
    if not variant and is_bounded and is_masked and block_d(call.q) == 128 and call.q.element_size() == 2:
        variant = ".bounded"
    return attention_config(attention_dq_kernel, call.q, variant)
