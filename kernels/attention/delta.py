"""The backward's first pass: delta of every query and head, their weights, and the tiles of queries that learn."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..matrices import Matrix
from .arguments import Call
from .configurations import attention_config, block_d
from .loads import Heads, head_weights, load_rows, of_head


@triton.jit
def attention_delta_kernel(
    dz,  # Heads [B, H, S, D]
    z,  # Heads [B, H, S, D]
    delta,  # [B, H, S] fp32
    weights,  # [B, H, S] fp32 or None
    live,  # [B, H, tiles of queries] int32, or None where weights are
    routing,  # Routing of [B * S]
    heads,  # Weights [R, H] or None
    forward_heads,  # Weights [R, H] or None
    num_heads,
    num_queries,
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
    m = head_weights(heads, routing, tokens, present, head)
    m_forward = head_weights(forward_heads, routing, tokens, present, head)
    weight = tl.sum(m * m_forward, axis=1)
    learns = present & (weight != 0.0)
    dz_head = Matrix(of_head(dz, batch, head), dz.stride_s, dz.stride_d)
    z_head = Matrix(of_head(z, batch, head), z.stride_s, z.stride_d)
    dz_tile = load_rows(dz_head, start, learns, HEAD_DIM, BLOCK_Q, BLOCK_D).to(tl.float32)
    z_tile = load_rows(z_head, start, learns, HEAD_DIM, BLOCK_Q, BLOCK_D).to(tl.float32)
    row = entry.to(tl.int64) * num_queries + rows
    tl.store(delta + row, tl.sum(m * dz_tile * z_tile, axis=1), mask=present)
    if weights is not None:
        tl.store(weights + row, weight, mask=present)
        tl.store(live + tl.program_id(0), tl.max(learns.to(tl.int32)))


def delta_of(call: Call, z: Tensor, block_q: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """delta and weights `[B, H, S]`, and which tiles of `block_q` queries have any weight; None where all are 1."""
    batch, heads, length, head_dim = call.q.shape
    tiles = triton.cdiv(length, block_q)
    delta = call.q.new_empty(batch, heads, length, dtype=torch.float32)
    weights = live = None
    if call.heads is not None or call.forward_heads is not None:
        weights = torch.empty_like(delta)
        live = call.q.new_empty(batch, heads, tiles, dtype=torch.int32)
    launch(
        attention_delta_kernel,
        (tiles * batch * heads,),
        attention_config(attention_delta_kernel, call.q) | {"BLOCK_Q": block_q},
        dz=Heads.of(call.dz),
        z=Heads.of(z),
        delta=delta,
        weights=weights,
        live=live,
        routing=call.routing,
        heads=call.heads,
        forward_heads=call.forward_heads,
        num_heads=heads,
        num_queries=length,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(call.q),
    )
    return delta, weights, live
