"""The forward: the output, heads masked as it is stored, and the scores' log-sum-exp for the backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...primitives.arguments import tokens_of, weights_on
from ...primitives.attention_pattern import Pattern
from ...primitives.protocol import AttentionTables
from ...primitives.registration import kernel_op
from ...primitives.schema import Flat, flat, schema_of, unflat
from ...routes import Routes
from ..launch import launch
from ..masks import Routing, Weights
from ..matrices import Matrix
from ..rounding import dot
from .configurations import attention_config, constants
from .loads import Heads, head_weights, load_rows, masked_rows, of_head, readable, store_rows
from .softmax import LN_2, LOG2_E, add_values
from .visibility import Visibility, is_key, key_mask_of, seen_keys, tiles_of_keys


@triton.jit
def attention_fwd_kernel(
    q,  # Heads [B, H, S_q, D]
    k,  # Heads [B, G, S_k, D]
    v,  # Heads [B, G, S_k, D]
    z,  # Heads [B, H, S_q, D]
    lse,  # [B, H, S_q] fp32
    routing,  # Routing of [B * S_q]
    forward_heads,  # Weights [R, H] or None
    visibility,  # Visibility
    key_mask,  # [B, S_k] int8 or None
    scale,
    num_heads,
    group,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z = m_forward_heads ⊙ softmax(scale q kᵀ) v, and the scores' natural log-sum-exp: +inf where no key is seen.

    The last queries see most keys, so they begin.
    """
    num_queries, num_keys = visibility.num_queries, visibility.num_keys
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    entry = tl.program_id(0) // num_tiles
    start = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_Q
    batch = (entry // num_heads).to(tl.int64)
    head = (entry % num_heads).to(tl.int64)
    k_head = Matrix(of_head(k, batch, head // group), k.stride_s, k.stride_d)
    v_head = Matrix(of_head(v, batch, head // group), v.stride_s, v.stride_d)
    rows = start + tl.arange(0, BLOCK_Q)
    present = rows < num_queries
    q_head = Matrix(of_head(q, batch, head), q.stride_s, q.stride_d)
    q_tile = load_rows(q_head, start, present, HEAD_DIM, BLOCK_Q, BLOCK_D)
    begin, end, whole, rest = tiles_of_keys(start, visibility, BLOCK_Q, BLOCK_K)
    if key_mask is not None:
        key_mask += batch * num_keys
        whole = end
        rest = end
    m = head_weights(forward_heads, routing, batch * num_queries + rows, present, head)
    if forward_heads is not None:  # nothing to compute where z is 0
        is_live = tl.max(tl.abs(m)) > 0.0
        end = tl.where(is_live, end, begin)
        whole = tl.where(is_live, whole, begin)
        rest = tl.where(is_live, rest, begin)
    first, stop = seen_keys(rows, visibility)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    o = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    log2_scale = scale * LOG2_E
    for tile in range(whole, rest):
        keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_rows(k_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        s = dot(q_tile, tl.trans(k_tile), None, PRECISION) * log2_scale
        v_tile = load_rows(v_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        o, total, top = add_values(o, total, top, s, v_tile, PRECISION)
    before = whole - begin
    for index in range(before + end - rest):
        tile = tl.where(index < before, begin + index, rest + index - before)
        keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_rows(k_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        s = dot(q_tile, tl.trans(k_tile), None, PRECISION) * log2_scale
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
        s = tl.where(seen & is_key(key_mask, keys, num_keys)[None, :], s, float("-inf"))
        v_tile = load_rows(v_head, tile * BLOCK_K, keys < num_keys, HEAD_DIM, BLOCK_K, BLOCK_D)
        o, total, top = add_values(o, total, top, s, v_tile, PRECISION)
    sees_any = total > 0.0
    total = tl.where(sees_any, total, 1.0)
    z_tile = masked_rows(o / total[:, None], m, forward_heads)
    z_head = Matrix(of_head(z, batch, head), z.stride_s, z.stride_d)
    store_rows(z_head, start, present, z_tile, HEAD_DIM, BLOCK_Q, BLOCK_D)
    log_sum = tl.where(sees_any, LN_2 * (top + tl.log2(total)), float("inf"))
    tl.store(lse + entry.to(tl.int64) * num_queries + rows, log_sum, mask=present)


class ForwardArguments(NamedTuple):
    """The op's arguments behind q, k and v.

    Attributes:
        ids: `[B * S_q]` or None.
        strength: `[B * S_q]`, 0-dim or None.
        forward_heads: the weights of the mask of the output, or None.
        pattern: which keys a query sees.
    """

    ids: Tensor | None
    strength: Tensor | None
    forward_heads: Tensor | None
    pattern: Pattern


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    vendor: str | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `gradroute.primitives.protocol.Primitives`. It runs no vendor kernel; saved is the log-sum-exp."""
    ids, strength = (None, None) if routes is None else tokens_of(routes)
    (forward_heads,) = weights_on(q.device, sites.forward_heads)
    z, lse = attention_forward_op(q, k, v, *flat(ForwardArguments(ids, strength, forward_heads, pattern)))
    return z, (lse,)


@kernel_op(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {schema_of(ForwardArguments)}) -> (Tensor, Tensor)"
)
def attention_forward_op(q: Tensor, k: Tensor, v: Tensor, *fields: Flat) -> tuple[Tensor, Tensor]:
    """The output `[B, H, S_q, D]` and the log-sum-exp `[B, H, S_q]`."""
    call, head_dim = unflat(ForwardArguments, fields), q.shape[3]
    q, k, v = map(readable, (q, k, v))
    z = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    config = attention_config(attention_fwd_kernel, q)
    launch(
        attention_fwd_kernel,
        (triton.cdiv(q.shape[2], config["BLOCK_Q"]) * q.shape[0] * q.shape[1],),
        config,
        q=Heads.of(q),
        k=Heads.of(k),
        v=Heads.of(v),
        z=Heads.of(z),
        lse=lse,
        routing=Routing.of(call.ids, call.strength),
        forward_heads=Weights.of(call.forward_heads),
        visibility=Visibility.of(q, k, call.pattern),
        key_mask=key_mask_of(call.pattern),
        scale=call.pattern.scale,
        num_heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        **constants(q),
    )
    return z.narrow(3, 0, head_dim), lse
