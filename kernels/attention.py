"""Attention of one's own: forward with its log-sum-exp, and a backward split into dK with dV, and dQ, without atomics.

Masks are folded in where gradients are loaded and stored; edges between routes are tests of bits. Memory grows with
the sequence. What has no weight is left out exactly: a tile of queries whose heads learn nothing, a tile of keys, and,
from lists made on the device, pairs of tiles without an edge.

Kernels pass each other tuples: `span` = (starts, stops, window, num_queries, num_keys), what decides who sees whom;
`matrix` = (pointer, row stride, column stride), one head's rows `[S, D]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import tokens_of, wanted, weights_on
from ..primitives.attention_edges import TILE, EdgeBits, TileBits
from ..primitives.attention_pattern import PATTERN_SCHEMA, Pattern
from ..primitives.registration import kernel_op
from ..routes import Routes
from .launch import config_of, dot_precision, launch, route_arguments, strides, table_arguments
from .tiles import dot, load_strength, load_weights, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def seen_keys(rows, span, CAUSAL: tl.constexpr):
    """[first, stop) of the keys that each query sees, padding included. Neither end moves back from query to query."""
    starts, stops, window, num_queries, num_keys = span
    position = rows + (num_keys - num_queries)
    first = position * 0
    stop = first + num_keys
    if starts is not None:
        inside = (position >= 0) & (position < num_keys)
        first = tl.load(starts + position, mask=inside, other=0)
        stop = tl.load(stops + position, mask=inside, other=0)
    if CAUSAL:
        stop = tl.minimum(stop, position + 1)
    if window is not None:
        first = tl.maximum(first, position - window + 1)
        if not CAUSAL:
            stop = tl.minimum(stop, position + window)
    return tl.maximum(first, 0), stop


@triton.jit
def is_seen(key, row, span, CAUSAL: tl.constexpr):
    """Whether each query sees each key, padding aside; of shapes that broadcast. Tests only what can be false."""
    starts, _, window, _, _ = span
    first, stop = seen_keys(row, span, CAUSAL)
    seen = key < stop
    if (starts is not None) or (window is not None):
        seen = seen & (key >= first)
    return seen


@triton.jit
def seeing_queries(keys, span, CAUSAL: tl.constexpr):
    """[first, stop) of the queries that see each key. Neither end moves back from key to key."""
    starts, stops, window, num_queries, num_keys = span
    first = keys * 0
    stop = first + num_keys
    if starts is not None:
        first = tl.load(starts + keys)
        stop = tl.load(stops + keys)
    if CAUSAL:
        first = tl.maximum(first, keys)
    if window is not None:
        stop = tl.minimum(stop, keys + window)
        if not CAUSAL:
            first = tl.maximum(first, keys - window + 1)
    past = num_keys - num_queries
    return tl.maximum(first - past, 0), tl.minimum(stop - past, num_queries)


@triton.jit
def tiles_of_keys(start, span, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tiles of keys [begin, end) that a tile of queries sees, all of it those in [whole, rest)."""
    num_queries = span[3]
    first_start, first_stop = seen_keys(start, span, CAUSAL)
    last_start, last_stop = seen_keys(tl.minimum(start + BLOCK_Q, num_queries) - 1, span, CAUSAL)
    begin = first_start // BLOCK_K
    end = tl.maximum(tl.cdiv(last_stop, BLOCK_K), begin)
    whole = tl.minimum(tl.maximum(tl.cdiv(last_start, BLOCK_K), begin), end)
    rest = tl.maximum(tl.minimum(first_stop // BLOCK_K, end), whole)
    return begin, end, whole, rest


@triton.jit
def tiles_of_queries(start, span, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tiles of queries [begin, end) that see a tile of keys."""
    num_keys = span[4]
    first_start, _ = seeing_queries(start, span, CAUSAL)
    _, last_stop = seeing_queries(tl.minimum(start + BLOCK_K, num_keys) - 1, span, CAUSAL)
    begin = first_start // BLOCK_Q
    return begin, tl.maximum(tl.cdiv(last_stop, BLOCK_Q), begin)


@triton.jit
def load_rows(matrix, start, present, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Those of the rows [start, start + BLOCK) of a matrix that are `present`, 0 in place of the others."""
    x, row_stride, col_stride = matrix
    rows, features = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    valid = present[:, None]
    if HEAD_DIM < BLOCK_D:
        valid = valid & (features < HEAD_DIM)[None, :]
    tile = x + tl.cast(start, tl.int64) * row_stride
    return tl.load(tile + rows[:, None] * row_stride + features[None, :] * col_stride, mask=valid, other=0.0)


@triton.jit
def store_rows(
    matrix, start, present, tile, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores the rows of tile [BLOCK, BLOCK_D] fp32 that are `present` as rows [start, start + BLOCK) of a matrix."""
    x, row_stride, col_stride = matrix
    rows, features = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    valid = present[:, None]
    if HEAD_DIM < BLOCK_D:
        valid = valid & (features < HEAD_DIM)[None, :]
    pointers = (
        x
        + tl.cast(start, tl.int64) * row_stride
        + rows[:, None] * row_stride
        + features[None, :] * col_stride
    )
    tl.store(pointers, rounded(tile, x.dtype.element_ty), mask=valid)


@triton.jit
def head_weights(weights, cols: tl.constexpr, ids, strength, strength_stride, tokens, present, head):
    """m of tokens at one head, [BLOCK, 1] fp32; ones where there is no table."""
    m = present.to(tl.float32)[:, None]
    if weights is not None:
        routes = tl.load(ids + tokens, mask=present, other=0)
        s = load_strength(strength, strength_stride, tokens, present)
        column = head + tl.arange(0, 1)
        m = load_weights(weights, cols, strength, s, routes, present, column, column >= 0)
    return m


@triton.jit
def masked_rows(tile, m, weights):
    """m ⊙ tile, exactly 0 where m is 0; the tile itself where there is no table (weights is None)."""
    if weights is not None:
        tile = m * tl.where(m == 0.0, 0.0, tile)
    return tile


@triton.jit
def edged(
    x, edges, num_routes, num_tokens, tokens, present, key_routes, LEVELS: tl.constexpr, BY_KEY: tl.constexpr
):
    """E ⊙ x, exactly 0 where E is 0 whatever x is; x itself where there are no edges.

    Args:
        x: [queries, keys], or [keys, queries] where BY_KEY.
        edges: (bits, values). bits [LEVELS, B * S] has for each query token a bit per key's route; where a level's
            bit is set the edge is values[level], or 1 (None). LEVELS = 0: (ids [B * S], the table [R, R]). (None,
            None): no edges.
        num_routes: R.
        num_tokens: B * S.
        tokens: of the queries, as far as `present`.
        present: [queries].
        key_routes: [keys].
        LEVELS: how many levels there are.
        BY_KEY: whether rows of x are keys.
    """
    bits, values = edges
    if bits is not None:
        if LEVELS == 1:
            row = tl.load(bits + tokens, mask=present, other=0)
            if values is not None:
                x *= tl.load(values)
            x = tl.where(_has_edge(row, key_routes, BY_KEY), x, 0.0)
        else:
            e = tl.zeros(x.shape, dtype=tl.float32)
            if LEVELS == 0:
                row = tl.load(bits + tokens, mask=present, other=0) * num_routes
                e = tl.load(values + _outer(row, key_routes, BY_KEY))
            for level in tl.static_range(LEVELS):
                row = tl.load(bits + level * num_tokens + tokens, mask=present, other=0)
                e = tl.where(_has_edge(row, key_routes, BY_KEY), tl.load(values + level), e)
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


@triton.jit
def is_key(key_mask, keys, num_keys):
    """Which keys exist and are not padding."""
    present = keys < num_keys
    if key_mask is not None:
        present = present & (tl.load(key_mask + keys, mask=present, other=0) != 0)
    return present


@triton.jit
def attention_fwd_kernel(
    q,  # [B, H, S_q, D]
    k,  # [B, G, S_k, D]
    v,  # [B, G, S_k, D]
    z,  # [B, H, S_q, D]
    lse,  # [B, H, S_q] fp32
    ids,  # [B * S_q] or None
    strength,
    strength_stride,
    forward_heads,
    forward_heads_cols: tl.constexpr,
    starts,  # [S] int32 or None, where the document of each position begins
    stops,  # [S] int32 or None, where it ends
    key_mask,  # [B, S_k] int8 or None
    window,
    scale,
    num_heads,
    group,
    num_queries,
    num_keys,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    z_stride_b,
    z_stride_h,
    z_stride_s,
    z_stride_d,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z = m_forward_heads ⊙ softmax(scale q kᵀ) v, and the scores' natural log-sum-exp: +inf where no key is seen.

    The last queries see most keys, so they begin.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    entry = tl.program_id(0) // num_tiles
    start = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_Q
    batch = (entry // num_heads).to(tl.int64)
    head = (entry % num_heads).to(tl.int64)
    span = (starts, stops, window, num_queries, num_keys)
    k_head = (k + batch * k_stride_b + head // group * k_stride_h, k_stride_s, k_stride_d)
    v_head = (v + batch * v_stride_b + head // group * v_stride_h, v_stride_s, v_stride_d)
    rows = start + tl.arange(0, BLOCK_Q)
    present = rows < num_queries
    q_head = (q + batch * q_stride_b + head * q_stride_h, q_stride_s, q_stride_d)
    q_tile = load_rows(q_head, start, present, HEAD_DIM, BLOCK_Q, BLOCK_D)
    begin, end, whole, rest = tiles_of_keys(start, span, CAUSAL, BLOCK_Q, BLOCK_K)
    if key_mask is not None:
        key_mask += batch * num_keys
        whole = end
        rest = end
    m = head_weights(
        forward_heads,
        forward_heads_cols,
        ids,
        strength,
        strength_stride,
        batch * num_queries + rows,
        present,
        head,
    )
    if forward_heads is not None:  # nothing to compute where z is 0
        is_live = tl.max(tl.abs(m)) > 0.0
        end = tl.where(is_live, end, begin)
        whole = tl.where(is_live, whole, begin)
        rest = tl.where(is_live, rest, begin)
    first, stop = seen_keys(rows, span, CAUSAL)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    o = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    log2_scale = scale * LOG2_E
    for tile in range(whole, rest):
        keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_rows(k_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        s = dot(q_tile, tl.trans(k_tile), None, PRECISION) * log2_scale
        v_tile = load_rows(v_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        o, total, top = _add_values(o, total, top, s, v_tile, PRECISION)
    before = whole - begin
    for index in range(before + end - rest):
        tile = tl.where(index < before, begin + index, rest + index - before)
        keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_rows(k_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        s = dot(q_tile, tl.trans(k_tile), None, PRECISION) * log2_scale
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
        s = tl.where(seen & is_key(key_mask, keys, num_keys)[None, :], s, float("-inf"))
        v_tile = load_rows(v_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        o, total, top = _add_values(o, total, top, s, v_tile, PRECISION)
    sees_any = total > 0.0
    total = tl.where(sees_any, total, 1.0)
    z_tile = masked_rows(o / total[:, None], m, forward_heads)
    z_head = (z + batch * z_stride_b + head * z_stride_h, z_stride_s, z_stride_d)
    store_rows(z_head, start, present, z_tile, HEAD_DIM, BLOCK_Q, BLOCK_D)
    log_sum = tl.where(sees_any, LN_2 * (top + tl.log2(total)), float("inf"))
    tl.store(lse + entry.to(tl.int64) * num_queries + rows, log_sum, mask=present)


@triton.jit
def _add_values(o, total, top, s, v_tile, PRECISION: tl.constexpr):
    """One more tile of a running softmax: s [queries, keys] in base 2, -inf where a key is not seen."""
    new_top = tl.maximum(top, tl.max(s, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(top - shift)
    o = dot(rounded(p, v_tile.dtype), v_tile, o * shrink[:, None], PRECISION)
    return o, total * shrink + tl.sum(p, axis=1), new_top


@triton.jit
def attention_delta_kernel(
    dz,  # [B, H, S_q, D]
    z,  # [B, H, S_q, D]
    delta,  # [B, H, S_q] fp32
    weights,  # [B, H, S_q] fp32 or None
    live,  # [B, H, tiles of queries] int32, or None where weights are
    ids,  # [B * S_q] or None
    strength,
    strength_stride,
    heads,
    heads_cols: tl.constexpr,
    forward_heads,
    forward_heads_cols: tl.constexpr,
    num_heads,
    num_queries,
    dz_stride_b,
    dz_stride_h,
    dz_stride_s,
    dz_stride_d,
    z_stride_b,
    z_stride_h,
    z_stride_s,
    z_stride_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """weights = m_forward_heads ⊙ m_heads: do = weights ⊙ dz; delta = rowsum(do ⊙ o) = m_heads ⊙ rowsum(dz ⊙ z).

    live: which tiles of queries have any weight. Rows of weight 0 are not read.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    entry = tl.program_id(0) // num_tiles
    start = tl.program_id(0) % num_tiles * BLOCK_Q
    batch = (entry // num_heads).to(tl.int64)
    head = (entry % num_heads).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_Q)
    present = rows < num_queries
    tokens = batch * num_queries + rows
    m = head_weights(heads, heads_cols, ids, strength, strength_stride, tokens, present, head)
    m_forward = head_weights(
        forward_heads, forward_heads_cols, ids, strength, strength_stride, tokens, present, head
    )
    weight = tl.sum(m * m_forward, axis=1)
    learns = present & (weight != 0.0)
    dz_head = (dz + batch * dz_stride_b + head * dz_stride_h, dz_stride_s, dz_stride_d)
    z_head = (z + batch * z_stride_b + head * z_stride_h, z_stride_s, z_stride_d)
    dz_tile = load_rows(dz_head, start, learns, HEAD_DIM, BLOCK_Q, BLOCK_D).to(tl.float32)
    z_tile = load_rows(z_head, start, learns, HEAD_DIM, BLOCK_Q, BLOCK_D).to(tl.float32)
    row = entry.to(tl.int64) * num_queries + rows
    tl.store(delta + row, tl.sum(m * dz_tile * z_tile, axis=1), mask=present)
    if weights is not None:
        tl.store(weights + row, weight, mask=present)
        tl.store(live + tl.program_id(0), tl.max(learns.to(tl.int32)))


@triton.jit
def attention_tiles_kernel(
    tiles,  # [B, lists, owners, members * others]
    counts,  # [B, lists, owners] int32
    reach,  # [B, num_bits] int64 or None, the routes to whose keys TILE queries have an edge
    present,  # [B, num_bits] int64 or None, the routes of TILE keys
    live,  # [B, lists, members, others] int32 or None, which of the others have any weight
    starts,
    stops,
    window,
    num_bits,
    num_lists,
    num_owners,
    num_members,
    num_others,
    num_queries,
    num_keys,
    CAUSAL: tl.constexpr,
    BY_KEY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For each tile of owners, keys where BY_KEY and else queries, the tiles of the others it has work with, in order.

    Tile t of member m is m * others + t. Members are the query heads of a key's head, or one for all heads.
    """
    owner = tl.program_id(0) % num_owners
    own = (tl.program_id(0) // num_owners).to(tl.int64)
    span = (starts, stops, window, num_queries, num_keys)
    if BY_KEY:
        begin, end = tiles_of_queries(owner * BLOCK_K, span, CAUSAL, BLOCK_Q, BLOCK_K)
    else:
        begin, end, _, _ = tiles_of_keys(owner * BLOCK_Q, span, CAUSAL, BLOCK_Q, BLOCK_K)
    bits = own // num_lists * num_bits
    row = own * num_owners + owner
    tiles += row * num_members * num_others
    count = 0
    for member in range(num_members):
        for chunk in range(begin, end, CHUNK):
            other = chunk + tl.arange(0, CHUNK)
            has_work = other < end
            if reach is not None:
                if BY_KEY:
                    has_edge = _routes_of(reach + bits, other, num_bits, BLOCK_Q, TILE)
                    has_edge &= _routes_of(present + bits, owner, num_bits, BLOCK_K, TILE)
                else:
                    has_edge = _routes_of(reach + bits, owner, num_bits, BLOCK_Q, TILE)
                    has_edge &= _routes_of(present + bits, other, num_bits, BLOCK_K, TILE)
                has_work = has_work & (has_edge != 0)
            if live is not None:
                flags = live + (own * num_members + member) * num_others
                has_work = has_work & (tl.load(flags + other, mask=has_work, other=0) != 0)
            one = has_work.to(tl.int32)
            place = count + tl.cumsum(one, axis=0) - one
            entry = member * num_others + other
            tl.store(tiles + place, entry.to(tiles.dtype.element_ty), mask=has_work)
            count += tl.sum(one, axis=0)
    tl.store(counts + row, count)


@triton.jit
def _routes_of(bits, tile, num_bits, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The bits of tiles of BLOCK tokens, from those of TILE tokens."""
    if BLOCK <= TILE:
        index = tile // (TILE // BLOCK)
        found = tl.load(bits + index, mask=index < num_bits, other=0)
    else:
        first = tile * (BLOCK // TILE)
        found = tl.load(bits + first, mask=first < num_bits, other=0)
        for more in tl.static_range(1, BLOCK // TILE):
            found = found | tl.load(bits + first + more, mask=first + more < num_bits, other=0)
    return found


@triton.jit
def attention_dkdv_kernel(
    q,  # [B, H, S_q, D]
    k,  # [B, G, S_k, D]
    v,  # [B, G, S_k, D]
    dz,  # [B, H, S_q, D]
    dk,  # [B, G, S_k, D]
    dv,  # [B, G, S_k, D]
    lse,  # [B, H, S_q] fp32
    delta,  # [B, H, S_q] fp32
    weights,  # [B, H, S_q] fp32 or None
    ids,  # [B * S] or None
    strength,
    strength_stride,
    key,
    key_cols: tl.constexpr,
    value,
    value_cols: tl.constexpr,
    score_bits,  # see edged
    score_values,
    value_bits,
    value_values,
    tiles,  # [B, G, tiles of keys, group * tiles of queries] or [B, 1, tiles of keys, tiles of queries], or None
    counts,  # [B, G or 1, tiles of keys] int32 or None
    starts,
    stops,
    key_mask,
    window,
    scale,
    num_routes,
    num_tokens,
    num_kv_heads,
    group,
    num_queries,
    num_keys,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    dz_stride_b,
    dz_stride_h,
    dz_stride_s,
    dz_stride_d,
    dk_stride_b,
    dk_stride_h,
    dk_stride_s,
    dk_stride_d,
    dv_stride_b,
    dv_stride_h,
    dv_stride_s,
    dv_stride_d,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCORE_LEVELS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr,
    IS_BINARY: tl.constexpr,
    LISTED_BY_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk = m_key ⊙ scale (E_score ⊙ dS)ᵀ q and dv = m_value ⊙ (E_value ⊙ P)ᵀ do of one tile of keys, over its queries.

    The query heads of a key's head are summed here, in their order. IS_BINARY: every weight is 0 or 1.
    """
    num_owners = tl.cdiv(num_keys, BLOCK_K)
    owner = tl.program_id(0) % num_owners
    entry = tl.program_id(0) // num_owners
    start = owner * BLOCK_K
    batch = (entry // num_kv_heads).to(tl.int64)
    kv_head = (entry % num_kv_heads).to(tl.int64)
    span = (starts, stops, window, num_queries, num_keys)
    keys = start + tl.arange(0, BLOCK_K)
    present = keys < num_keys
    tokens = batch * num_keys + keys
    m_key = head_weights(key, key_cols, ids, strength, strength_stride, tokens, present, kv_head)
    m_value = head_weights(value, value_cols, ids, strength, strength_stride, tokens, present, kv_head)
    key_routes = keys * 0
    if score_bits is not None or value_bits is not None:
        key_routes = tl.load(ids + tokens, mask=present, other=0)
    if key_mask is not None:
        is_present = is_key(key_mask + batch * num_keys, keys, num_keys)
    begin, end = tiles_of_queries(start, span, CAUSAL, BLOCK_Q, BLOCK_K)
    k_head = (k + batch * k_stride_b + kv_head * k_stride_h, k_stride_s, k_stride_d)
    v_head = (v + batch * v_stride_b + kv_head * v_stride_h, v_stride_s, v_stride_d)
    k_tile = load_rows(k_head, start, present, HEAD_DIM, BLOCK_K, BLOCK_D)
    v_tile = load_rows(v_head, start, present, HEAD_DIM, BLOCK_K, BLOCK_D)
    q += batch * q_stride_b + kv_head * group * q_stride_h
    dz += batch * dz_stride_b + kv_head * group * dz_stride_h
    first_row = (batch * num_kv_heads + kv_head) * group * num_queries
    dk_tile = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dv_tile = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    # One loop over all heads of the group: a loop in a loop spills registers.
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    count = end - begin
    if tiles is not None:
        if LISTED_BY_HEAD:
            listed = entry.to(tl.int64) * num_owners + owner
            tiles += listed * group * num_tiles
        else:
            listed = batch * num_owners + owner
            tiles += listed * num_tiles
        count = tl.load(counts + listed)
    steps = count
    if not LISTED_BY_HEAD:
        steps *= group
    if (key is not None) and (value is not None):  # nothing to compute where neither learns
        is_live = tl.maximum(tl.max(tl.abs(m_key)), tl.max(tl.abs(m_value))) > 0.0
        steps = tl.where(is_live, steps, 0)
    count = tl.maximum(count, 1)
    for step in range(steps):
        if LISTED_BY_HEAD:
            item = tl.load(tiles + step).to(tl.int32)
            member = (item // num_tiles).to(tl.int64)
            tile = item % num_tiles
        else:
            member = tl.cast(step // count, tl.int64)
            tile = begin + step % count
            if tiles is not None:
                tile = tl.load(tiles + step % count).to(tl.int32)
        row = first_row + member * num_queries
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        exists = rows < num_queries
        q_head = (q + member * q_stride_h, q_stride_s, q_stride_d)
        q_tile = load_rows(q_head, tile * BLOCK_Q, exists, HEAD_DIM, BLOCK_Q, BLOCK_D)
        log_sum = tl.load(lse + row + rows, mask=exists, other=float("inf")) * LOG2_E
        p = tl.exp2(dot(k_tile, tl.trans(q_tile), None, PRECISION) * (scale * LOG2_E) - log_sum[None, :])
        seen = is_seen(keys[:, None], rows[None, :], span, CAUSAL)
        if key_mask is not None:
            seen = seen & is_present[:, None]
        p = tl.where(seen, p, 0.0)
        learns = exists
        if weights is not None:
            weight = tl.load(weights + row + rows, mask=exists, other=0.0)
            learns = weight != 0.0
        dz_head = (dz + member * dz_stride_h, dz_stride_s, dz_stride_d)
        dz_tile = load_rows(dz_head, tile * BLOCK_Q, learns, HEAD_DIM, BLOCK_Q, BLOCK_D)
        dp = dot(v_tile, tl.trans(dz_tile), None, PRECISION)
        taught = edged(
            p,
            (value_bits, value_values),
            num_routes,
            num_tokens,
            batch * num_queries + rows,
            exists,
            key_routes,
            VALUE_LEVELS,
            True,
        )
        if not IS_BINARY:
            dp *= weight[None, :]
            taught *= weight[None, :]
        dv_tile = dot(rounded(taught, dz_tile.dtype), dz_tile, dv_tile, PRECISION)
        ds = p * (dp - tl.load(delta + row + rows, mask=exists, other=0.0)[None, :])
        ds = edged(
            ds,
            (score_bits, score_values),
            num_routes,
            num_tokens,
            batch * num_queries + rows,
            exists,
            key_routes,
            SCORE_LEVELS,
            True,
        )
        dk_tile = dot(rounded(ds, q_tile.dtype), q_tile, dk_tile, PRECISION)
    dk_head = (dk + batch * dk_stride_b + kv_head * dk_stride_h, dk_stride_s, dk_stride_d)
    dv_head = (dv + batch * dv_stride_b + kv_head * dv_stride_h, dv_stride_s, dv_stride_d)
    store_rows(dk_head, start, present, masked_rows(scale * dk_tile, m_key, key), HEAD_DIM, BLOCK_K, BLOCK_D)
    store_rows(dv_head, start, present, masked_rows(dv_tile, m_value, value), HEAD_DIM, BLOCK_K, BLOCK_D)


@triton.jit
def attention_dq_kernel(
    q,  # [B, H, S_q, D]
    k,  # [B, G, S_k, D]
    v,  # [B, G, S_k, D]
    dz,  # [B, H, S_q, D]
    dq,  # [B, H, S_q, D]
    lse,  # [B, H, S_q] fp32
    delta,  # [B, H, S_q] fp32
    weights,  # [B, H, S_q] fp32 or None
    ids,  # [B * S] or None
    strength,
    strength_stride,
    query,
    query_cols: tl.constexpr,
    score_bits,  # see edged
    score_values,
    tiles,  # [B, 1, tiles of queries, tiles of keys] int16 or None
    counts,  # [B, 1, tiles of queries] int32 or None
    starts,
    stops,
    key_mask,
    window,
    scale,
    num_routes,
    num_tokens,
    num_heads,
    group,
    num_queries,
    num_keys,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    dz_stride_b,
    dz_stride_h,
    dz_stride_s,
    dz_stride_d,
    dq_stride_b,
    dq_stride_h,
    dq_stride_s,
    dq_stride_d,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCORE_LEVELS: tl.constexpr,
    IS_BINARY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq = m_query ⊙ scale (E_score ⊙ dS) k of one tile of queries, over the keys it sees."""
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    entry = tl.program_id(0) // num_tiles
    start = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_Q
    batch = (entry // num_heads).to(tl.int64)
    head = (entry % num_heads).to(tl.int64)
    span = (starts, stops, window, num_queries, num_keys)
    rows = start + tl.arange(0, BLOCK_Q)
    present = rows < num_queries
    tokens = batch * num_queries + rows
    row = entry.to(tl.int64) * num_queries + rows
    m = head_weights(query, query_cols, ids, strength, strength_stride, tokens, present, head)
    weight = present.to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + row, mask=present, other=0.0)
    begin, end, whole, rest = tiles_of_keys(start, span, CAUSAL, BLOCK_Q, BLOCK_K)
    if key_mask is not None:
        key_mask += batch * num_keys
        whole = end
        rest = end
    is_live = (tl.max(tl.abs(m)) > 0.0) & (tl.max(tl.abs(weight)) > 0.0)
    end = tl.where(is_live, end, begin)
    whole = tl.where(is_live, whole, begin)
    rest = tl.where(is_live, rest, begin)
    q_head = (q + batch * q_stride_b + head * q_stride_h, q_stride_s, q_stride_d)
    dz_head = (dz + batch * dz_stride_b + head * dz_stride_h, dz_stride_s, dz_stride_d)
    own = (
        load_rows(q_head, start, present, HEAD_DIM, BLOCK_Q, BLOCK_D),
        load_rows(dz_head, start, weight != 0.0, HEAD_DIM, BLOCK_Q, BLOCK_D),
        tl.load(lse + row, mask=present, other=float("inf")) * LOG2_E,
        tl.load(delta + row, mask=present, other=0.0),
        weight,
        tokens,
        present,
    )
    other = (
        (k + batch * k_stride_b + head // group * k_stride_h, k_stride_s, k_stride_d),
        (v + batch * v_stride_b + head // group * v_stride_h, v_stride_s, v_stride_d),
        ids,
        key_mask,
        batch * num_keys,
    )
    edges = (score_bits, score_values, num_routes, num_tokens)
    seen = seen_keys(rows, span, CAUSAL)
    dq_tile = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    if tiles is None:
        for tile in range(whole, rest):
            dq_tile = _add_keys(
                dq_tile,
                tile * BLOCK_K,
                own,
                other,
                edges,
                seen,
                num_keys,
                scale,
                False,
                HEAD_DIM,
                SCORE_LEVELS,
                IS_BINARY,
                PRECISION,
                BLOCK_K,
                BLOCK_D,
            )
        before = whole - begin
        steps = before + end - rest
        listed = 0
    else:
        listed = batch * num_tiles + start // BLOCK_Q
        before = 0
        steps = tl.where(is_live, tl.load(counts + listed), 0)
        listed *= tl.cdiv(num_keys, BLOCK_K)
    for index in range(steps):
        if tiles is None:
            tile = tl.where(index < before, begin + index, rest + index - before)
        else:
            tile = tl.load(tiles + listed + index).to(tl.int32)
        dq_tile = _add_keys(
            dq_tile,
            tile * BLOCK_K,
            own,
            other,
            edges,
            seen,
            num_keys,
            scale,
            True,
            HEAD_DIM,
            SCORE_LEVELS,
            IS_BINARY,
            PRECISION,
            BLOCK_K,
            BLOCK_D,
        )
    dq_head = (dq + batch * dq_stride_b + head * dq_stride_h, dq_stride_s, dq_stride_d)
    store_rows(dq_head, start, present, masked_rows(scale * dq_tile, m, query), HEAD_DIM, BLOCK_Q, BLOCK_D)


@triton.jit
def _add_keys(
    dq,
    start,
    own,  # the queries: q, dz [BLOCK_Q, BLOCK_D], lse in base 2, delta, weights, tokens, which are present
    other,  # a head's keys: k, v, ids, key mask, first token
    edges,
    seen,  # [first, stop) of the keys that each query sees
    num_keys,
    scale,
    PARTIAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCORE_LEVELS: tl.constexpr,
    IS_BINARY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds to dq what the keys of one tile give."""
    q_tile, dz_tile, log_sum, delta, weight, tokens, present = own
    k, v, ids, key_mask, first_token = other
    score_bits, score_values, num_routes, num_tokens = edges
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
    if score_bits is not None:
        key_routes = tl.load(ids + first_token + keys, mask=keys < num_keys, other=0)
        ds = edged(
            ds,
            (score_bits, score_values),
            num_routes,
            num_tokens,
            tokens,
            present,
            key_routes,
            SCORE_LEVELS,
            False,
        )
    return dot(rounded(ds, k_tile.dtype), k_tile, dq, PRECISION)


class Forward(NamedTuple):
    """What the forward takes after q, k and v: ids `[B * S_q]`, strength, a table, and the fields of Pattern."""

    ids: Tensor | None
    strength: Tensor | None
    forward_heads: Tensor | None
    causal: bool
    window: int | None
    scale: float
    dropout: float
    cu_seqlens: Tensor | None
    key_mask: Tensor | None

    @property
    def pattern(self) -> Pattern:
        """Which keys a query sees."""
        return Pattern(self.causal, self.window, self.scale, self.dropout, self.cu_seqlens, self.key_mask)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: Any,
    pattern: Pattern,
    vendor: str | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `gradroute.backends.composed.attention_forward`. It runs no vendor kernel; saved is the log-sum-exp."""
    z, lse = attention_forward_op(
        q, k, v, *_tokens(routes), *weights_on(q.device, sites.forward_heads), *pattern
    )
    return z, (lse,)


@kernel_op(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? ids, Tensor? strength, Tensor? forward_heads, "
    f"{PATTERN_SCHEMA}) -> (Tensor, Tensor)"
)
def attention_forward_op(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call, head_dim = Forward(*rest), q.shape[3]
    q, k, v = map(_readable, (q, k, v))
    z = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    config = _config(attention_fwd_kernel, q)
    launch(
        attention_fwd_kernel,
        (triton.cdiv(q.shape[2], config["BLOCK_Q"]) * q.shape[0] * q.shape[1],),
        config,
        q=q,
        k=k,
        v=v,
        z=z,
        lse=lse,
        **route_arguments(call.ids, call.strength),
        **table_arguments(forward_heads=call.forward_heads),
        **_span_arguments(q, k, call.pattern),
        key_mask=_bytes(call.key_mask),
        scale=call.scale,
        num_heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        **_strides(q=q, k=k, v=v, z=z),
        CAUSAL=call.causal,
        **_constants(q),
    )
    return z.narrow(3, 0, head_dim), lse


class Backward(NamedTuple):
    """What the backward takes after dz, q, k, v, z and lse.

    Ids `[B * S]`, strength and tables by head; edges (see EdgeBits) and their tiles (see TileBits): those of dK and dV,
    those of dQ; the number of routes; whether the weights of `heads` and `forward_heads` are 0 or 1; the fields of
    Pattern; what is wanted.
    """

    ids: Tensor | None
    strength: Tensor | None
    heads: Tensor | None
    forward_heads: Tensor | None
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    score_bits: Tensor | None
    score_values: Tensor | None
    score_levels: int
    value_bits: Tensor | None
    value_values: Tensor | None
    value_levels: int
    key_reach: Tensor | None
    key_present: Tensor | None
    query_reach: Tensor | None
    query_present: Tensor | None
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


def attention_backward(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    saved: tuple[Tensor, ...],
    routes: Routes | None,
    sites: Any,
    pattern: Pattern,
    vendor: str | None,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.backends.composed.attention_backward`."""
    by_head = (sites.heads, sites.forward_heads)
    strength = None if routes is None else routes.strength
    is_binary = all(table is None or (table.binary and strength is None) for table in by_head)
    shape = (q.shape[0], q.shape[2])
    dq, dk, dv = attention_backward_op(
        dz,
        q,
        k,
        v,
        z,
        *saved,
        *_tokens(routes),
        *weights_on(q.device, *by_head, sites.query, sites.key, sites.value),
        *EdgeBits.of(routes, sites.score_edges),
        *EdgeBits.of(routes, sites.value_edges),
        *TileBits.of(routes, shape, sites.score_edges, sites.value_edges),
        *TileBits.of(routes, shape, sites.score_edges),
        1 if routes is None else routes.num_routes,
        is_binary,
        *pattern,
        want_query,
        want_key_value,
    )
    return wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))


@kernel_op(
    "attention_backward(Tensor dz, Tensor q, Tensor k, Tensor v, Tensor z, Tensor lse, Tensor? ids, Tensor? strength, "
    "Tensor? heads, Tensor? forward_heads, Tensor? query, Tensor? key, Tensor? value, Tensor? score_bits, "
    "Tensor? score_values, int score_levels, Tensor? value_bits, Tensor? value_values, int value_levels, "
    "Tensor? key_reach, Tensor? key_present, Tensor? query_reach, Tensor? query_present, int num_routes, "
    f"bool is_binary, {PATTERN_SCHEMA}, bool want_query, bool want_key_value) -> (Tensor, Tensor, Tensor)"
)
def attention_backward_op(
    dz: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    call, head_dim = Backward(*rest), q.shape[3]
    dz, q, k, v, z = map(_readable, (dz, q, k, v, z))
    delta, weights, live = _delta(dz, q, z, call)
    queries = {"q": q, "dz": dz, "lse": lse, "delta": delta, "weights": weights}
    dq, dk, dv = (x.new_empty(0) for x in (q, k, v))
    if call.want_key_value:
        dk, dv = (gradient.narrow(3, 0, head_dim) for gradient in _dkdv(queries, k, v, live, call))
    if call.want_query:
        dq = _dq(queries, k, v, call).narrow(3, 0, head_dim)
    return dq, dk, dv


def _delta(dz: Tensor, q: Tensor, z: Tensor, call: Backward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """delta and weights `[B, H, S_q]`, and which tiles of queries have any weight; None where all weights are 1."""
    batch, heads, length, _ = q.shape
    config = _config(attention_delta_kernel, q)
    block = _dkdv_config(q, call)["BLOCK_Q"]
    tiles = triton.cdiv(length, block)
    delta = q.new_empty(batch, heads, length, dtype=torch.float32)
    weights = live = None
    if call.heads is not None or call.forward_heads is not None:
        weights = torch.empty_like(delta)
        live = q.new_empty(batch, heads, tiles, dtype=torch.int32)
    launch(
        attention_delta_kernel,
        (tiles * batch * heads,),
        config | {"BLOCK_Q": block},
        dz=dz,
        z=z,
        delta=delta,
        weights=weights,
        live=live,
        **route_arguments(call.ids, call.strength),
        **table_arguments(heads=call.heads, forward_heads=call.forward_heads),
        num_heads=heads,
        num_queries=length,
        **_strides(dz=dz, z=z),
        HEAD_DIM=q.shape[3],
        BLOCK_D=_block_d(q),
    )
    return delta, weights, live


def _tiles(
    q: Tensor,
    k: Tensor,
    reach: Tensor | None,
    present: Tensor | None,
    live: Tensor | None,
    call: Backward,
    config: dict[str, int],
    by_key: bool,
) -> dict[str, Tensor | None]:
    """The tiles that each tile of keys (by_key) or of queries has work with; None where it has with all it sees."""
    if reach is None and live is None:
        return {"tiles": None, "counts": None}
    tiles_of_queries = triton.cdiv(q.shape[2], config["BLOCK_Q"])
    tiles_of_keys = triton.cdiv(k.shape[2], config["BLOCK_K"])
    owners, others = (tiles_of_keys, tiles_of_queries) if by_key else (tiles_of_queries, tiles_of_keys)
    lists, members = (1, 1) if live is None else (k.shape[1], q.shape[1] // k.shape[1])
    dtype = torch.int16 if members * others < 2**15 else torch.int32
    tiles = q.new_empty(q.shape[0], lists, owners, members * others, dtype=dtype)
    counts = q.new_empty(q.shape[0], lists, owners, dtype=torch.int32)
    launch(
        attention_tiles_kernel,
        (owners * q.shape[0] * lists,),
        config_of(attention_tiles_kernel, q.device),
        tiles=tiles,
        counts=counts,
        reach=reach,
        present=present,
        live=live,
        num_bits=0 if reach is None else reach.shape[1],
        **_span_arguments(q, k, call.pattern),
        num_lists=lists,
        num_owners=owners,
        num_members=members,
        num_others=others,
        CAUSAL=call.causal,
        BY_KEY=by_key,
        BLOCK_Q=config["BLOCK_Q"],
        BLOCK_K=config["BLOCK_K"],
        TILE=TILE,
    )
    return {"tiles": tiles, "counts": counts}


def _dkdv(
    queries: dict[str, Any], k: Tensor, v: Tensor, live: Tensor | None, call: Backward
) -> tuple[Tensor, Tensor]:
    q, dz = queries["q"], queries["dz"]
    batch, kv_heads, length, _ = k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    config = _dkdv_config(q, call)
    tiles = _tiles(q, k, call.key_reach, call.key_present, live, call, config, by_key=True)
    launch(
        attention_dkdv_kernel,
        (triton.cdiv(length, config["BLOCK_K"]) * batch * kv_heads,),
        config,
        **queries,
        k=k,
        v=v,
        dk=dk,
        dv=dv,
        **route_arguments(call.ids, call.strength),
        **table_arguments(key=call.key, value=call.value),
        score_bits=call.score_bits,
        score_values=call.score_values,
        value_bits=call.value_bits,
        value_values=call.value_values,
        **tiles,
        **_span_arguments(q, k, call.pattern),
        key_mask=_bytes(call.key_mask),
        scale=call.scale,
        num_routes=call.num_routes,
        num_tokens=batch * length,
        num_kv_heads=kv_heads,
        group=q.shape[1] // kv_heads,
        **_strides(q=q, k=k, v=v, dz=dz, dk=dk, dv=dv),
        SCORE_LEVELS=call.score_levels,
        VALUE_LEVELS=call.value_levels,
        IS_BINARY=call.is_binary,
        LISTED_BY_HEAD=live is not None,
        CAUSAL=call.causal,
        **_constants(q),
    )
    return dk, dv


def _dq(queries: dict[str, Any], k: Tensor, v: Tensor, call: Backward) -> Tensor:
    q, dz = queries["q"], queries["dz"]
    batch, heads, length, _ = q.shape
    dq = torch.empty_like(q)
    config = _config(attention_dq_kernel, q, _edges((call.score_bits, call.score_levels)))
    tiles = _tiles(q, k, call.query_reach, call.query_present, None, call, config, by_key=False)
    launch(
        attention_dq_kernel,
        (triton.cdiv(length, config["BLOCK_Q"]) * batch * heads,),
        config,
        **queries,
        k=k,
        v=v,
        dq=dq,
        **route_arguments(call.ids, call.strength),
        **table_arguments(query=call.query),
        score_bits=call.score_bits,
        score_values=call.score_values,
        **tiles,
        **_span_arguments(q, k, call.pattern),
        key_mask=_bytes(call.key_mask),
        scale=call.scale,
        num_routes=call.num_routes,
        num_tokens=batch * length,
        num_heads=heads,
        group=heads // k.shape[1],
        **_strides(q=q, k=k, v=v, dz=dz, dq=dq),
        SCORE_LEVELS=call.score_levels,
        IS_BINARY=call.is_binary,
        CAUSAL=call.causal,
        **_constants(q),
    )
    return dq


def _tokens(routes: Routes | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if routes is None else tokens_of(routes)


def _readable(t: Tensor) -> Tensor:
    """t `[B, H, S, D]` as the kernels read it, 16 bytes at a time: features dense, rows apart by multiples of 16.

    Triton sees such multiples and no others; without them loads are of single elements, and spill registers. D is
    padded with zeros, which change no score and no value.
    """
    if t.shape[3] % 16:
        return torch.nn.functional.pad(t, (0, -t.shape[3] % 16))
    is_aligned = t.stride(3) == 1 and all(
        stride % 16 == 0 for stride in (*t.stride()[:3], t.storage_offset())
    )
    return t if is_aligned else t.clone(memory_format=torch.contiguous_format)


def _block_d(q: Tensor) -> int:
    """Columns of a tile: the head dimension, padded."""
    return max(16, triton.next_power_of_2(q.shape[3]))


def _config(kernel: Any, q: Tensor, edges: str = "", masked: bool = False) -> dict[str, int]:
    """The shipped configuration for q's head dimension and dtype, and, of halves, for what else needs registers."""
    variant = f".{max(64, _block_d(q))}"
    if q.element_size() == 2:
        variant += edges + (".masked" if masked else "")
    return config_of(kernel, q.device, q.dtype, variant)


def _edges(*levels: tuple[Tensor | None, int]) -> str:
    """How the edges of tables (bits, levels) are read, as configurations name it."""
    given = [count for bits, count in levels if bits is not None]
    if not given:
        return ""
    return ".gather" if 0 in given else ".edges"


def _dkdv_config(q: Tensor, call: Backward) -> dict[str, int]:
    """Masks, padding, documents, edges of several values or of many routes need more registers than the plain call."""
    edges = _edges((call.score_bits, call.score_levels), (call.value_bits, call.value_levels))
    others = (
        call.strength,
        call.heads,
        call.forward_heads,
        call.key,
        call.value,
        call.cu_seqlens,
        call.key_mask,
    )
    masked = (
        any(other is not None for other in others)
        or max(call.score_levels, call.value_levels) > 1
        or (edges == ".edges" and call.num_routes > 32)
        or q.shape[3] < _block_d(q)
    )
    return _config(attention_dkdv_kernel, q, edges, masked and edges != ".gather")


def _constants(q: Tensor) -> dict[str, Any]:
    return {"HEAD_DIM": q.shape[3], "PRECISION": dot_precision(), "BLOCK_D": _block_d(q)}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of tensors `[batch, heads, sequence, features]`."""
    return {
        name: stride
        for own, tensor in tensors.items()
        for name, stride in strides(own, tensor, "bhsd").items()
    }


def _bytes(flags: Tensor | None) -> Tensor | None:
    """Booleans as int8."""
    return None if flags is None else flags.contiguous().view(torch.int8)


def _span_arguments(q: Tensor, k: Tensor, pattern: Pattern) -> dict[str, Any]:
    """What decides who sees whom, less causality and padding."""
    starts = stops = None
    if pattern.cu_seqlens is not None:
        positions = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)
        ends = torch.nn.functional.pad(pattern.cu_seqlens, (0, 1), value=k.shape[2]).to(torch.int32)
        document = torch.searchsorted(ends[1:], positions, right=True)
        starts, stops = ends[document], ends[document + 1]
    return {
        "starts": starts,
        "stops": stops,
        "window": pattern.window,
        "num_queries": q.shape[2],
        "num_keys": k.shape[2],
    }
