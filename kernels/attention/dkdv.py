"""dK and dV: a program sums the gradients of one tile of keys over the queries that see it, of all their heads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...fake_tensors import has_data
from ..launch import architecture_of, launch, multiprocessors
from ..matrices import Matrix
from ..rounding import dot, rounded
from .arguments import Call, PerQuery, shared_arguments
from .configurations import attention_config, block_d, edges_variant
from .edges import edged
from .loads import Heads, head_weights, load_rows, masked_rows, of_head, store_rows
from .schedule import count_tiles_of_queries, parts_of
from .softmax import LOG2_E
from .tiles import TileLists, list_of, place_of
from .visibility import is_key, is_seen, tiles_of_queries


@triton.jit
def attention_dkdv_kernel(
    q,  # Heads [B, H, S, D]
    dz,  # Heads [B, H, S, D]
    per_query,  # PerQuery
    k,  # Heads [B, G, S, D]
    v,  # Heads [B, G, S, D]
    dk,  # Heads [B, G * parts, S, D]
    dv,  # Heads [B, G * parts, S, D]
    routing,  # Routing of [B * S]
    key,  # Weights [R, G] or None
    value,  # Weights [R, G] or None
    score_edges,  # Edges
    value_edges,  # Edges
    num_routes,
    num_tokens,
    lists,  # TileLists of tiles of keys
    visibility,  # Visibility
    key_mask,  # [B, S] int8 or None
    scale,
    num_kv_heads,
    parts,
    members,
    HEAD_DIM: tl.constexpr,
    IS_BINARY: tl.constexpr,
    IS_HOPPER: tl.constexpr,
    EDGES_LATE: tl.constexpr,
    SAME_EDGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk = m_key ⊙ scale (E_score ⊙ dS)ᵀ q and dv = m_value ⊙ (E_value ⊙ P)ᵀ do of one tile of keys, over its queries.

    The query heads of a key's head are split into `parts`, entries of `members` heads, which are summed here in their
    order. IS_BINARY: every weight is 0 or 1. IS_HOPPER: halves on sm_90, whose products run beside other instructions:
    then dP is under way while P is computed, and only tiles that are not seen whole are tested, in a branch.
    EDGES_LATE: that branch tests edges too, which are 0 or 1. SAME_EDGES: those of scores and values are of one table.
    """
    num_queries, num_keys = visibility.num_queries, visibility.num_keys
    num_entries = num_kv_heads * parts  # of a batch element
    owner, batch, part, keys = _place(lists, num_entries, BLOCK_K)
    start = owner * BLOCK_K
    present = keys < num_keys
    tokens = batch * num_keys + keys
    m_key, m_value = _weights(key, value, routing, tokens, present, part // parts)
    key_routes = keys * 0
    if score_edges.bits is not None or value_edges.bits is not None:
        key_routes = tl.load(routing.ids + tokens, mask=present, other=0)
    is_present = present
    if key_mask is not None:
        is_present = is_key(key_mask + batch * num_keys, keys, num_keys)
    begin, end, whole, rest = tiles_of_queries(start, visibility, BLOCK_Q, BLOCK_K)
    if key_mask is not None:
        whole = end
        rest = end
    k_head = Matrix(of_head(k, batch, part // parts), k.stride_s, k.stride_d)
    v_head = Matrix(of_head(v, batch, part // parts), v.stride_s, v.stride_d)
    own = (
        load_rows(k_head, start, present, HEAD_DIM, BLOCK_K, BLOCK_D),
        load_rows(v_head, start, present, HEAD_DIM, BLOCK_K, BLOCK_D),
        keys,
        key_routes,
        is_present,
    )
    q_head = of_head(q, batch, part * members)
    dz_head = of_head(dz, batch, part * members)
    first_row = (batch * num_entries + part) * members * num_queries
    dk_tile = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dv_tile = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    if lists.tiles is not None:
        first_item, slot = list_of(lists)
        tiles = lists.tiles + first_item
        begin = 0
        end = tl.load(lists.counts + slot)
        if EDGES_LATE:
            num_whole = tl.load(lists.whole_counts + slot)
    steps = end - begin
    if not lists.by_entry:
        steps *= members
    if (key is not None) and (value is not None):  # nothing to compute where neither learns
        is_live = tl.maximum(tl.max(tl.abs(m_key)), tl.max(tl.abs(m_value))) > 0.0
        steps = tl.where(is_live, steps, 0)
    # One loop over all members, each from begin to end: a loop in a loop spills registers.
    place = begin
    member = tl.cast(0, tl.int64)
    for _ in range(steps):
        tile = place
        if lists.tiles is not None:
            tile = tl.load(tiles + place).to(tl.int32)
            if lists.by_entry:
                member = (tile >> lists.tile_bits).to(tl.int64)
                tile &= (1 << lists.tile_bits) - 1
        is_partial = (tile < whole) | (tile >= rest)
        if EDGES_LATE:
            is_partial = place >= num_whole
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
            is_partial,
            own,
            other,
            per_query,
            score_edges,
            score_edges if SAME_EDGES else value_edges,  # the compiler then tests each edge once
            (num_routes, num_tokens),
            visibility,
            key_mask,
            scale,
            HEAD_DIM,
            IS_BINARY,
            IS_HOPPER,
            EDGES_LATE,
            PRECISION,
            BLOCK_Q,
            BLOCK_D,
        )
        place += 1
        if not lists.by_entry:
            is_last = place == end
            member += is_last
            place = tl.where(is_last, begin, place)
    if IS_HOPPER and (lists.by_entry or (key is not None) or (value is not None)):
        # All of this anew: kept in registers during the loop, it would spill others.
        owner, batch, part, keys = _place(lists, num_entries, BLOCK_K)
        start = owner * BLOCK_K
        present = keys < num_keys
        m_key, m_value = _weights(key, value, routing, batch * num_keys + keys, present, part // parts)
    dk_head = Matrix(of_head(dk, batch, part), dk.stride_s, dk.stride_d)
    dv_head = Matrix(of_head(dv, batch, part), dv.stride_s, dv.stride_d)
    store_rows(dk_head, start, present, masked_rows(scale * dk_tile, m_key, key), HEAD_DIM, BLOCK_K, BLOCK_D)
    store_rows(dv_head, start, present, masked_rows(dv_tile, m_value, value), HEAD_DIM, BLOCK_K, BLOCK_D)


@triton.jit
def _place(lists, num_entries, BLOCK_K: tl.constexpr):
    """The program's tile of keys, batch element and entry of it, and the keys."""
    owner, entry = place_of(lists.order, lists.num_owners, lists.num_shared)
    batch = (entry // num_entries).to(tl.int64)
    part = (entry % num_entries).to(tl.int64)
    return owner, batch, part, owner * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def _weights(key, value, routing, tokens, present, kv_head):
    """m_key and m_value of the keys, [BLOCK_K, 1]."""
    m_key = head_weights(key, routing, tokens, present, kv_head)
    return m_key, head_weights(value, routing, tokens, present, kv_head)


@triton.jit
def _add_queries(
    dk,  # [BLOCK_K, BLOCK_D] fp32, the sum so far
    dv,  # [BLOCK_K, BLOCK_D] fp32, the sum so far
    start,
    is_partial,  # whether some query of the tile does not see some key
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
    IS_HOPPER: tl.constexpr,
    EDGES_LATE: tl.constexpr,
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
    if not IS_HOPPER:
        p = tl.where(_seen(keys, rows, is_present, visibility, key_mask), p, 0.0)
    learns = exists
    if per_query.weights is not None:
        weight = tl.load(per_query.weights + first_row + rows, mask=exists, other=0.0)
        learns = weight != 0.0
    dz_tile = load_rows(dz, start, learns, HEAD_DIM, BLOCK_Q, BLOCK_D)
    dp = dot(v_tile, tl.trans(dz_tile), None, PRECISION)
    taught = p
    if not EDGES_LATE:
        taught = edged(taught, value_edges, counts, first_token + rows, exists, key_routes, True)
    if not IS_BINARY:
        dp *= weight[None, :]
        taught *= weight[None, :]
    if not IS_HOPPER:
        dv = dot(rounded(taught, dz_tile.dtype), dz_tile, dv, PRECISION)
    ds = p * (dp - tl.load(per_query.delta + first_row + rows, mask=exists, other=0.0)[None, :])
    if EDGES_LATE:  # of fp32 both would not fit into the registers
        taught = rounded(taught, dz_tile.dtype)
        ds = rounded(ds, q_tile.dtype)
    if IS_HOPPER:
        if is_partial:
            seen = _seen(keys, rows, is_present, visibility, key_mask)
            taught = tl.where(seen, taught, 0.0)
            ds = tl.where(seen, ds, 0.0)
            if EDGES_LATE:
                taught = edged(taught, value_edges, counts, first_token + rows, exists, key_routes, True)
                ds = edged(ds, score_edges, counts, first_token + rows, exists, key_routes, True)
        dv = dot(rounded(taught, dz_tile.dtype), dz_tile, dv, PRECISION)
    if not EDGES_LATE:
        ds = edged(ds, score_edges, counts, first_token + rows, exists, key_routes, True)
    dk = dot(rounded(ds, q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit
def _seen(keys, rows, is_present, visibility, key_mask):
    """Which queries see each key, [keys, queries]."""
    seen = is_seen(keys[:, None], rows[None, :], visibility)
    if key_mask is not None:
        seen = seen & is_present[:, None]
    return seen


def key_value_gradients(
    call: Call, per_query: PerQuery, all_lists: Iterable[TileLists], config: dict[str, int], parts: int
) -> tuple[Tensor, Tensor]:
    """dK and dV `[B, G, S, D]`; each is the sum of as many parts as each key head's query heads are split into.

    The parts are added in their order, in fp32, and rounded once.
    """
    k, v = call.k, call.v
    batch, kv_heads, length, head_dim = k.shape
    if parts == 1:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
    else:
        dk, dv = (
            k.new_empty(batch, kv_heads * parts, length, head_dim, dtype=torch.float32) for _ in range(2)
        )
    for lists in all_lists:
        edges_late = _edges_late(call, lists)
        launch(
            attention_dkdv_kernel,
            (lists.num_programs(batch * kv_heads * parts),),
            config,
            **shared_arguments(call, per_query, lists),
            dk=Heads.of(dk),
            dv=Heads.of(dv),
            key=call.key,
            value=call.value,
            value_edges=call.value_edges,
            num_kv_heads=kv_heads,
            parts=parts,
            members=call.q.shape[1] // (kv_heads * parts),
            IS_HOPPER=_is_hopper(call),
            EDGES_LATE=edges_late,
            SAME_EDGES=edges_late and call.score_edges.bits is call.value_edges.bits,
        )
    if parts > 1:
        dk, dv = (part.view(batch, kv_heads, parts, length, head_dim).sum(2).to(k.dtype) for part in (dk, dv))
    return dk, dv


def _edges_late(call: Call, lists: TileLists) -> bool:
    """Whether tiles with all edges are told apart, which need no test: on sm_90, where every edge is 0 or 1.

    Lists are made by edges where there are both tables alone (`TileBits.of`).
    """
    tables = (call.score_edges, call.value_edges)
    is_listed = lists.tiles is not None and all(edges.given for edges in tables)
    return _is_hopper(call) and is_listed and all(edges.weights is None for edges in tables)


def dkdv_parts(call: Call, config: dict[str, int], is_listed: bool) -> int:
    """Into how many parts the query heads of each key head are split: by the shape and the device's multiprocessors.

    is_listed: whether edges or masks leave out tiles. How many is known on the device alone; the number is that which
    suits a call in which half of the heads have work.
    """
    if not has_data(call.q):
        return 1
    (batch, heads, _, _), kv_heads = call.q.shape, call.k.shape[1]
    visibility, block_q = call.visibility, config["BLOCK_Q"]
    counts = count_tiles_of_queries(
        visibility.num_queries,
        visibility.num_keys,
        visibility.causal.value,
        visibility.window,
        block_q,
        config["BLOCK_K"],
    )
    entries = batch * kv_heads
    if is_listed or visibility.starts is not None:
        entries = triton.cdiv(entries, 2)
    weights = tuple(count * block_q for count in counts)
    return parts_of(weights, entries, heads // kv_heads, multiprocessors(call.q.device))


def _is_hopper(call: Call) -> bool:
    """Whether products are of halves on sm_90, and a window, gathered edges or long heads leave registers for more."""
    return (
        architecture_of(call.q.device) == 90
        and call.q.element_size() == 2
        and block_d(call.q) <= 128
        and call.visibility.window is None
        and edges_variant(call.score_edges, call.value_edges) != ".gather"
    )


def dkdv_config(call: Call) -> dict[str, int]:
    """The configuration of dK and dV.

    Masks, padding, documents, edges of several values or of many routes need more registers than the plain call, and
    so does a window to both sides.
    """
    variant = edges_variant(call.score_edges, call.value_edges)
    levels = max(call.score_edges.levels.value, call.value_edges.levels.value)
    others = (
        call.routing.strength,
        call.heads,
        call.forward_heads,
        call.key,
        call.value,
        call.key_mask,
    )
    has_documents = call.visibility.starts is not None
    is_padded = call.q.shape[3] < block_d(call.q)
    masked = (
        has_documents
        or is_padded
        or any(other is not None for other in others)
        or levels > 1
        or (variant == ".edges" and call.num_routes > 32)
    )
    has_window = call.visibility.window is not None
    is_bounded = has_documents or is_padded or has_window
    if not variant and ((masked and is_bounded) or (has_window and not call.visibility.causal.value)):
        return attention_config(attention_dkdv_kernel, call.q, ".bounded")
    return attention_config(attention_dkdv_kernel, call.q, variant, masked and variant != ".gather")
