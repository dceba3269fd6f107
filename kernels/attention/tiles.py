"""Lists, made on the device, of the tiles of keys and queries that have work with each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...primitives.attention_edges import TILE, TileBits
from ..launch import config_of, launch
from .arguments import Call
from .visibility import tiles_of_keys, tiles_of_queries


@triton.jit
def attention_tiles_kernel(
    tiles,  # [B, lists, owners, members * others]
    counts,  # [B, lists, owners] int32
    reach,  # [B, num_bits] int64 or None, the routes to whose keys TILE queries have an edge
    present,  # [B, num_bits] int64 or None, the routes of TILE keys
    live,  # [B, lists, members, others] int32 or None, which of the others have any weight
    visibility,  # Visibility
    num_bits,
    num_lists,
    num_owners,
    num_members,
    num_others,
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
    if BY_KEY:
        begin, end = tiles_of_queries(owner * BLOCK_K, visibility, BLOCK_Q, BLOCK_K)
    else:
        begin, end, _, _ = tiles_of_keys(owner * BLOCK_Q, visibility, BLOCK_Q, BLOCK_K)
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


class TileLists(NamedTuple):
    """For each tile of owners the tiles of the others that it has work with, as the kernels of dK, dV and dQ take them.

    Attributes:
        tiles: `[B, lists, owners, members * others]` int16 or int32, in order; tile t of member m is m * others + t.
        counts: `[B, lists, owners]` int32, how many there are.
        by_head: a constant, whether each key head has its own lists (members are its query heads), or all heads share
            one.
    """

    tiles: Tensor
    counts: Tensor
    by_head: tl.constexpr


def list_tiles(
    call: Call,
    bits: TileBits,
    live: Tensor | None,
    config: dict[str, int],
    by_key: bool,
) -> TileLists | None:
    """The lists of each tile of keys (by_key) or of queries; None where it has work with all the tiles it sees.

    Args:
        call: the call.
        bits: where there are edges.
        live: `[B, H, tiles of queries]`, which of them have any weight, or None.
        config: the configuration of the kernel that reads the lists.
        by_key: whether the owners are tiles of keys.
    """
    if bits.reach is None and live is None:
        return None
    (batch, heads, length, _), kv_heads = call.q.shape, call.k.shape[1]
    owners = triton.cdiv(length, config["BLOCK_Q"])
    others = triton.cdiv(call.k.shape[2], config["BLOCK_K"])
    if by_key:
        owners, others = others, owners
    lists, members = (1, 1) if live is None else (kv_heads, heads // kv_heads)
    dtype = torch.int16 if members * others < 2**15 else torch.int32
    tiles = call.q.new_empty(batch, lists, owners, members * others, dtype=dtype)
    counts = call.q.new_empty(batch, lists, owners, dtype=torch.int32)
    launch(
        attention_tiles_kernel,
        (owners * batch * lists,),
        config_of(attention_tiles_kernel, call.q.device),
        tiles=tiles,
        counts=counts,
        reach=bits.reach,
        present=bits.present,
        live=live,
        visibility=call.visibility,
        num_bits=0 if bits.reach is None else bits.reach.shape[1],
        num_lists=lists,
        num_owners=owners,
        num_members=members,
        num_others=others,
        BY_KEY=by_key,
        BLOCK_Q=config["BLOCK_Q"],
        BLOCK_K=config["BLOCK_K"],
        TILE=TILE,
    )
    return TileLists(tiles, counts, tl.constexpr(live is not None))
