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
from .configurations import attention_config, block_d, constants
from .documents import document_bounds
from .loads import Heads, head_weights, load_rows, masked_rows, of_head, readable, store_rows
from .softmax import LN_2, LOG2_E, add_values
from .visibility import Visibility, is_key, key_mask_of, seen_keys, tiles_of_keys

# What keys and values may take of a GPU's cache, which has 40 MB on an A100 and 50 MB on an H100.
CACHE_BYTES = 32 << 20


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
    cached_keys,  # the keys of so many positions, with their values, stay in the cache
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z = m_forward_heads ⊙ softmax(scale q kᵀ) v, and the scores' natural log-sum-exp: +inf where no key is seen."""
    num_queries, num_keys = visibility.num_queries, visibility.num_keys
    heads_at_once = tl.maximum(cached_keys // tl.maximum(num_keys, 1), 1) * group
    entry, tile = place_of_queries(tl.cdiv(num_queries, BLOCK_Q), heads_at_once)
    start = tile * BLOCK_Q
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


@triton.jit
def place_of_queries(num_tiles, heads_at_once):
    """Which head of all batch elements, and which of its tiles of queries, this program is for.

    The last queries see most keys, so they begin: of all heads, so that the programs that start last are short and
    no multiprocessor waits for long. But of so many heads at once as the cache has room for the keys of: all heads of
    4 sequences of 4096 together would read 1 GB of keys and values instead of 64 MB (H = 32, G = 8, D = 128).
    """
    program = tl.program_id(0)
    first = program // (num_tiles * heads_at_once) * heads_at_once
    heads = tl.minimum(heads_at_once, tl.num_programs(0) // num_tiles - first)
    place = program - first * num_tiles
    return first + place % heads, num_tiles - 1 - place // heads


class ForwardArguments(NamedTuple):
    """The op's arguments behind q, k and v.

    Attributes:
        ids: `[B * S_q]` or None.
        strength: `[B * S_q]`, 0-dim or None.
        forward_heads: the weights of the mask of the output, or None.
        pattern: which keys a query sees; documents are those of `documents`.
        documents: `[2, S]` int32 or None, where each position's document begins, and where it ends.
    """

    ids: Tensor | None
    strength: Tensor | None
    forward_heads: Tensor | None
    pattern: Pattern
    documents: Tensor | None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `gradroute.primitives.protocol.Primitives`; saved is what `saved_with` says."""
    ids, strength = (None, None) if routes is None else tokens_of(routes)
    (forward_heads,) = weights_on(q.device, sites.forward_heads)
    documents = document_bounds(routes, pattern.cu_seqlens, k.shape[2])
    arguments = ForwardArguments(ids, strength, forward_heads, pattern, documents)
    z, lse = attention_forward_op(q, k, v, *flat(arguments))
    return z, saved_with(lse, documents)


def saved_with(lse: Tensor, documents: Tensor | None) -> tuple[Tensor, ...]:
    """What `attention_backward` needs beside q, k, v and z: the log-sum-exp `[B, H, S]`, and the bounds of documents.

    The bounds are saved, not found again, because cu_seqlens may be written to before the backward.
    """
    return (lse,) if documents is None else (lse, documents)


@kernel_op(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {schema_of(ForwardArguments)}) -> (Tensor, Tensor)"
)
def attention_forward_op(q: Tensor, k: Tensor, v: Tensor, *fields: Flat) -> tuple[Tensor, Tensor]:
    """The output `[B, H, S_q, D]` and the log-sum-exp `[B, H, S_q]`."""
    call, head_dim = unflat(ForwardArguments, fields), q.shape[3]
    q, k, v = map(readable, (q, k, v))
    z = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    config = forward_config(call, q)
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
        visibility=Visibility.of(q, k, call.pattern, call.documents),
        key_mask=key_mask_of(call.pattern),
        scale=call.pattern.scale,
        num_heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        cached_keys=CACHE_BYTES // (2 * k.shape[3] * k.element_size()),
        **constants(q),
    )
    return z.narrow(3, 0, head_dim), lse


def forward_config(call: ForwardArguments, q: Tensor) -> dict[str, int]:
    """The configuration of the forward.

    Masks, padding, documents and padded heads need more registers than tiles leave at a head dimension of 128.
    """
    others = (call.forward_heads, call.pattern.key_mask, call.documents)
    masked = any(other is not None for other in others) or q.shape[3] < block_d(q)
    return attention_config(attention_fwd_kernel, q, masked=masked and block_d(q) == 128)
