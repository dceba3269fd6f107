"""dK and dV: a program sums the gradients of one tile of keys over the queries that see it, of all their heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..matrices import Matrix
from ..rounding import dot, rounded
from .arguments import Call, PerQuery
from .configurations import attention_config, block_d, constants, edges_variant
from .edges import edged
from .loads import Heads, head_weights, load_rows, masked_rows, of_head, store_rows
from .softmax import LOG2_E
from .tiles import TileLists
from .visibility import is_key, is_seen, tiles_of_queries


@triton.jit
def attention_dkdv_kernel(
    q,  # Heads [B, H, S, D]
    dz,  # Heads [B, H, S, D]
    per_query,  # PerQuery
    k,  # Heads [B, G, S, D]
    v,  # Heads [B, G, S, D]
    dk,  # Heads [B, G, S, D]
    dv,  # Heads [B, G, S, D]
    routing,  # Routing of [B * S]
    key,  # Weights [R, G] or None
    value,  # Weights [R, G] or None
    score_edges,  # Edges
    value_edges,  # Edges
    num_routes,
    num_tokens,
    lists,  # TileLists of tiles of keys, or None
    visibility,  # Visibility
    key_mask,  # [B, S] int8 or None
    scale,
    num_kv_heads,
    group,
    HEAD_DIM: tl.constexpr,
    IS_BINARY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk = m_key ⊙ scale (E_score ⊙ dS)ᵀ q and dv = m_value ⊙ (E_value ⊙ P)ᵀ do of one tile of keys, over its queries.

    The query heads of a key's head are summed here, in their order. IS_BINARY: every weight is 0 or 1.
    """
    num_queries, num_keys = visibility.num_queries, visibility.num_keys
    num_owners = tl.cdiv(num_keys, BLOCK_K)
    owner = tl.program_id(0) % num_owners
    entry = tl.program_id(0) // num_owners
    start = owner * BLOCK_K
    batch = (entry // num_kv_heads).to(tl.int64)
    kv_head = (entry % num_kv_heads).to(tl.int64)
    keys = start + tl.arange(0, BLOCK_K)
    present = keys < num_keys
    tokens = batch * num_keys + keys
    m_key = head_weights(key, routing, tokens, present, kv_head)
    m_value = head_weights(value, routing, tokens, present, kv_head)
    key_routes = keys * 0
    if score_edges.bits is not None or value_edges.bits is not None:
        key_routes = tl.load(routing.ids + tokens, mask=present, other=0)
    is_present = present
    if key_mask is not None:
        is_present = is_key(key_mask + batch * num_keys, keys, num_keys)
    begin, end = tiles_of_queries(start, visibility, BLOCK_Q, BLOCK_K)
    k_head = Matrix(of_head(k, batch, kv_head), k.stride_s, k.stride_d)
    v_head = Matrix(of_head(v, batch, kv_head), v.stride_s, v.stride_d)
    own = (
        load_rows(k_head, start, present, HEAD_DIM, BLOCK_K, BLOCK_D),
        load_rows(v_head, start, present, HEAD_DIM, BLOCK_K, BLOCK_D),
        keys,
        key_routes,
        is_present,
    )
    q_head = of_head(q, batch, kv_head * group)
    dz_head = of_head(dz, batch, kv_head * group)
    first_row = (batch * num_kv_heads + kv_head) * group * num_queries
    dk_tile = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dv_tile = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    # One loop over all heads of the group: a loop in a loop spills registers.
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    count = end - begin
    if lists is not None:
        if lists.by_head:
            listed = entry.to(tl.int64) * num_owners + owner
            tiles = lists.tiles + listed * group * num_tiles
        else:
            listed = batch * num_owners + owner
            tiles = lists.tiles + listed * num_tiles
        count = tl.load(lists.counts + listed)
    steps = count
    if lists is None or not lists.by_head:
        steps *= group
    if (key is not None) and (value is not None):  # nothing to compute where neither learns
        is_live = tl.maximum(tl.max(tl.abs(m_key)), tl.max(tl.abs(m_value))) > 0.0
        steps = tl.where(is_live, steps, 0)
    count = tl.maximum(count, 1)
    for step in range(steps):
        member = tl.cast(step // count, tl.int64)
        tile = begin + step % count
        if lists is not None:
            if lists.by_head:
                item = tl.load(tiles + step).to(tl.int32)
                member = (item // num_tiles).to(tl.int64)
                tile = item % num_tiles
            else:
                tile = tl.load(tiles + step % count).to(tl.int32)
        other = (
            Matrix(q_head + member * q.stride_h, q.stride_s, q.stride_d),
            Matrix(dz_head + member * dz.stride_h, dz.stride_s, dz.stride_d),
            first_row + member * num_queries,
            batch * num_queries,
        )
        dk_tile, dv_tile = _add_queries(
            dk_tile,
            dv_tile,
            tile * BLOCK_Q,
            own,
            other,
            per_query,
            score_edges,
            value_edges,
            (num_routes, num_tokens),
            visibility,
            key_mask,
            scale,
            HEAD_DIM,
            IS_BINARY,
            PRECISION,
            BLOCK_Q,
            BLOCK_D,
        )
    dk_head = Matrix(of_head(dk, batch, kv_head), dk.stride_s, dk.stride_d)
    dv_head = Matrix(of_head(dv, batch, kv_head), dv.stride_s, dv.stride_d)
    store_rows(dk_head, start, present, masked_rows(scale * dk_tile, m_key, key), HEAD_DIM, BLOCK_K, BLOCK_D)
    store_rows(dv_head, start, present, masked_rows(dv_tile, m_value, value), HEAD_DIM, BLOCK_K, BLOCK_D)


@triton.jit
def _add_queries(
    dk,  # [BLOCK_K, BLOCK_D] fp32, the sum so far
    dv,  # [BLOCK_K, BLOCK_D] fp32, the sum so far
    start,
    own,  # the keys: k, v [BLOCK_K, BLOCK_D], positions, routes, which are present and not padding
    other,  # a head's queries: q and dz (Matrix [S, D]), their first row in per_query, their first token
    per_query,  # PerQuery
    score_edges,  # Edges
    value_edges,  # Edges
    counts,  # R and B * S
    visibility,  # Visibility
    key_mask,
    scale,
    HEAD_DIM: tl.constexpr,
    IS_BINARY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds to dk and dv what the queries of one tile give."""
    k_tile, v_tile, keys, key_routes, is_present = own
    q, dz, first_row, first_token = other
    rows = start + tl.arange(0, BLOCK_Q)
    exists = rows < visibility.num_queries
    q_tile = load_rows(q, start, exists, HEAD_DIM, BLOCK_Q, BLOCK_D)
    log_sum = tl.load(per_query.lse + first_row + rows, mask=exists, other=float("inf")) * LOG2_E
    p = tl.exp2(dot(k_tile, tl.trans(q_tile), None, PRECISION) * (scale * LOG2_E) - log_sum[None, :])
    seen = is_seen(keys[:, None], rows[None, :], visibility)
    if key_mask is not None:
        seen = seen & is_present[:, None]
    p = tl.where(seen, p, 0.0)
    learns = exists
    if per_query.weights is not None:
        weight = tl.load(per_query.weights + first_row + rows, mask=exists, other=0.0)
        learns = weight != 0.0
    dz_tile = load_rows(dz, start, learns, HEAD_DIM, BLOCK_Q, BLOCK_D)
    dp = dot(v_tile, tl.trans(dz_tile), None, PRECISION)
    taught = edged(p, value_edges, counts, first_token + rows, exists, key_routes, True)
    if not IS_BINARY:
        dp *= weight[None, :]
        taught *= weight[None, :]
    dv = dot(rounded(taught, dz_tile.dtype), dz_tile, dv, PRECISION)
    ds = p * (dp - tl.load(per_query.delta + first_row + rows, mask=exists, other=0.0)[None, :])
    ds = edged(ds, score_edges, counts, first_token + rows, exists, key_routes, True)
    dk = dot(rounded(ds, q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


def key_value_gradients(
    call: Call, per_query: PerQuery, lists: TileLists | None, config: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """dK and dV `[B, G, S, D]`."""
    k, v = call.k, call.v
    batch, kv_heads, length, _ = k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    launch(
        attention_dkdv_kernel,
        (triton.cdiv(length, config["BLOCK_K"]) * batch * kv_heads,),
        config,
        q=Heads.of(call.q),
        dz=Heads.of(call.dz),
        per_query=per_query,
        k=Heads.of(k),
        v=Heads.of(v),
        dk=Heads.of(dk),
        dv=Heads.of(dv),
        routing=call.routing,
        key=call.key,
        value=call.value,
        score_edges=call.score_edges,
        value_edges=call.value_edges,
        num_routes=call.num_routes,
        num_tokens=call.num_tokens,
        lists=lists,
        visibility=call.visibility,
        key_mask=call.key_mask,
        scale=call.scale,
        num_kv_heads=kv_heads,
        group=call.q.shape[1] // kv_heads,
        IS_BINARY=call.is_binary,
        **constants(call.q),
    )
    return dk, dv


def dkdv_config(call: Call) -> dict[str, int]:
    """The configuration of dK and dV.

    Masks, padding, documents, edges of several values or of many routes need more registers than the plain call.
    """
    variant = edges_variant(call.score_edges, call.value_edges)
    levels = max(call.score_edges.levels.value, call.value_edges.levels.value)
    others = (
        call.routing.strength,
        call.heads,
        call.forward_heads,
        call.key,
        call.value,
        call.visibility.starts,
        call.key_mask,
    )
    masked = (
        any(other is not None for other in others)
        or levels > 1
        or (variant == ".edges" and call.num_routes > 32)
        or call.q.shape[3] < block_d(call.q)
    )
    return attention_config(attention_dkdv_kernel, call.q, variant, masked and variant != ".gather")
