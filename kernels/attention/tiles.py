"""Lists, made on the device, of the tiles that have work with each other, and the order of programs that follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...fake_tensors import has_data
from ...primitives.attention_edges import TILE, TileBits
from ..launch import config_of, launch, multiprocessors
from .arguments import Call
from .visibility import tiles_of_keys, tiles_of_queries

# The lists that are in memory at once may take as many bytes a query and head as lse and delta together.
BYTES_PER_QUERY = 8

# They may take this many bytes where that is more, so that short calls make all of them in one launch.
MIN_BYTES = 64 << 20


@triton.jit
def attention_tiles_kernel(
    tiles,  # [programs, members * others] or None
    counts,  # [B, lists, owners] int32
    whole_counts,  # [B, lists, owners] int32, how many of them need no test
    order,  # [programs] int64 or None, the owners of all lists that this launch is for; else all, and it counts
    reach,  # [B, num_bits] int64 or None, the routes to whose keys TILE queries have an edge
    partial,  # [B, num_bits] int64 or None, the routes to whose keys some of TILE queries have an edge other than 1
    present,  # [B, num_bits] int64 or None, the routes of TILE keys
    live,  # [B, lists, members, others] int32 or None, which of the others have any weight
    visibility,  # Visibility
    num_bits,
    num_lists,
    num_owners,
    num_members,
    num_others,
    tile_bits,
    BY_KEY: tl.constexpr,
    IS_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For each tile of owners, keys where BY_KEY and else queries, the tiles of the others it has work with.

    Those that need no test come first: all queries see all keys, and all edges are 1. Both parts are in order.
    Tile t of member m is m << tile_bits | t. Members are the query heads of an entry, or one for all heads. IS_PADDED:
    some keys are padding, so that every tile needs a test.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = row
    if order is not None:
        slot = tl.load(order + row)
    owner = (slot % num_owners).to(tl.int32)
    own = slot // num_owners
    if BY_KEY:
        begin, end, whole, rest = tiles_of_queries(owner * BLOCK_K, visibility, BLOCK_Q, BLOCK_K)
    else:
        begin, end, whole, rest = tiles_of_keys(owner * BLOCK_Q, visibility, BLOCK_Q, BLOCK_K)
    if IS_PADDED:
        rest = whole
    bits = own // num_lists * num_bits
    if tiles is not None:
        tiles += row * num_members * num_others
    count = 0
    for part in range(2):
        for member in range(num_members):
            for chunk in range(begin, end, CHUNK):
                other = chunk + tl.arange(0, CHUNK)
                has_work = other < end
                is_whole = (other >= whole) & (other < rest)
                if reach is not None:
                    queries = other if BY_KEY else owner
                    keys = owner if BY_KEY else other
                    routes = _routes_of(present + bits, keys, num_bits, BLOCK_K, TILE)
                    reached = _routes_of(reach + bits, queries, num_bits, BLOCK_Q, TILE)
                    tested = _routes_of(partial + bits, queries, num_bits, BLOCK_Q, TILE)
                    has_work = has_work & ((reached & routes) != 0)
                    is_whole = is_whole & ((tested & routes) == 0)
                if live is not None:
                    flags = live + (own * num_members + member) * num_others
                    has_work = has_work & (tl.load(flags + other, mask=has_work, other=0) != 0)
                is_listed = has_work & (is_whole == (part == 0))
                one = is_listed.to(tl.int32)
                if tiles is not None:
                    place = count + tl.cumsum(one, axis=0) - one
                    item = (member << tile_bits) + other
                    tl.store(tiles + place, item.to(tiles.dtype.element_ty), mask=is_listed)
                count += tl.sum(one, axis=0)
        if order is None:
            if part == 0:
                tl.store(whole_counts + slot, count)
    if order is None:
        tl.store(counts + slot, count)


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
def place_of(order, num_owners, num_shared):
    """The owner and the entry of this program, see `gradroute.kernels.attention.schedule.launch_order`.

    The order is read anew each time, so that a kernel may ask again instead of keeping what follows in registers.
    """
    program = tl.program_id(0)
    if order is None:
        num_entries = tl.num_programs(0) // num_owners
        owner = program // num_entries
        entry = program % num_entries
    else:
        slot = tl.load(order + program // num_shared, volatile=True).to(tl.int32)
        owner = slot % num_owners
        entry = slot // num_owners * num_shared + program % num_shared
    return owner, entry


@triton.jit
def list_of(lists):
    """Where this program's list begins in lists.tiles, and its place in lists.counts."""
    place = tl.program_id(0) // lists.num_shared
    slot = tl.load(lists.order + place)
    row = place.to(tl.int64) if lists.in_order else slot
    return row * lists.num_items, slot


class TileLists(NamedTuple):
    """What one launch of dK with dV, or of dQ, knows of its tiles of owners before it starts.

    Attributes:
        tiles: `[B * lists * owners, num_items]` int16 or int32, the tiles of the others that each owner has work with,
            those first that need no test; tile t of member m is m << tile_bits | t. In order: `[places, num_items]`, of
            those in `order`. None where each has work with all the tiles it sees.
        counts: `[B, lists, owners]` int32, how many there are.
        whole_counts: `[B, lists, owners]` int32, how many of them need no test: all queries see all keys, and all
            edges of the tables by which the list was made are 1.
        order: `[places]` int64, the owners of all lists that the launch is for, by count, the heaviest first. None
            where the order is known beforehand, and the launch is for all.
        num_items: members * others, how many items a list has room for.
        num_owners: how many tiles of owners there are.
        num_shared: how many entries of a batch element one list serves.
        tile_bits: how many bits of an item are the tile's.
        by_entry: a constant, whether each entry has its own lists (members are its query heads), or all share one.
        in_order: a constant, whether tiles has the lists of this launch alone, as `order` has their owners.
    """

    tiles: Tensor | None
    counts: Tensor | None
    whole_counts: Tensor | None
    order: Tensor | None
    num_items: int
    num_owners: int
    num_shared: int
    tile_bits: int
    by_entry: tl.constexpr
    in_order: tl.constexpr

    def num_programs(self, num_entries: int) -> int:
        """How many programs the launch has; `num_entries` of all batch elements have the same owners."""
        if self.order is None:
            return self.num_owners * num_entries
        return self.order.shape[0] * self.num_shared


def heaviest_first(counts: Tensor) -> Tensor:
    """The order `[B * lists * owners]` int64 of owners with counts `[B, lists, owners]`; equal ones keep theirs."""
    return counts.view(-1).sort(descending=True, stable=True).indices


def lists_at_once(num_lists: int, list_bytes: int, num_queries: int, num_multiprocessors: int) -> int:
    """How many lists are in memory at once, by the shape and the device alone.

    They take at most max(MIN_BYTES, BYTES_PER_QUERY * num_queries) bytes; a list that is larger by itself is alone. No
    list of dK and dV is, which has at most 4 bytes a head and tile of queries, and one of dQ has at most 4 bytes a tile
    of keys: so memory is linear in the queries and in the keys, whatever their edges. Of 32 heads it is 67 MB at most
    for 128k tokens, and 268 MB for 1M. Fewer lists than all are a multiple of the multiprocessors if so many fit, so
    that few of those are idle at the end of a launch.

    Args:
        num_lists: B * lists * owners.
        list_bytes: how many each list has room for.
        num_queries: B * H * S_q.
        num_multiprocessors: the device's.
    """
    fitting = max(MIN_BYTES, BYTES_PER_QUERY * num_queries) // max(list_bytes, 1)
    if fitting >= num_lists:
        return num_lists
    return max(fitting // num_multiprocessors * num_multiprocessors or fitting, 1)


def item_type(members: int, others: int) -> torch.dtype:
    """The type of the items of lists of that many members and tiles of others."""
    return torch.int16 if members << (others - 1).bit_length() <= 2**15 else torch.int32


def list_tiles(
    call: Call,
    bits: TileBits,
    live: Tensor | None,
    config: dict[str, int],
    by_key: bool,
    entries: int,
) -> Iterator[TileLists]:
    """The lists of each tile of keys (by_key) or of queries, for one launch after the other.

    Where they do not fit into memory at once (`lists_at_once`), they are counted first; then each launch has the next
    ones in the order of their counts. It must be made before the next lists are asked for, which take the same memory.

    Args:
        call: the call.
        bits: where there are edges.
        live: `[B, H, tiles of queries]`, which of them have any weight, or None.
        config: the configuration of the kernel that reads the lists.
        by_key: whether the owners are tiles of keys.
        entries: how many programs of a batch element have the same owner, each with equally many query heads.
    """
    batch, heads, length, _ = call.q.shape
    owners, others = _owners_and_others(call, config, by_key)
    is_listed = bits.reach is not None or live is not None
    no = tl.constexpr(False)
    if not (is_listed or call.visibility.starts is not None) or not has_data(call.q):
        yield TileLists(None, None, None, None, 0, owners, entries, 0, no, no)
        return
    lists, members = (1, 1) if live is None else (entries, heads // entries)
    counts, whole_counts = call.q.new_empty(2, batch, lists, owners, dtype=torch.int32)
    tiles, at_once, num_items = None, counts.numel(), members * others
    if is_listed:
        dtype, num_queries = item_type(members, others), batch * heads * length
        list_bytes = num_items * dtype.itemsize
        at_once = lists_at_once(counts.numel(), list_bytes, num_queries, multiprocessors(call.q.device))
        tiles = call.q.new_empty(at_once, num_items, dtype=dtype)
    fits = at_once == counts.numel()
    tile_bits, by_entry = (others - 1).bit_length(), tl.constexpr(live is not None)
    every = TileLists(
        tiles if fits else None,
        counts,
        whole_counts,
        None,
        num_items,
        owners,
        entries // lists,
        tile_bits,
        by_entry,
        no,
    )
    _make_lists(call, bits, live, config, by_key, every)
    order = heaviest_first(counts)
    if fits:
        yield every._replace(order=order)
        return
    for places in order.split(at_once):
        part = every._replace(tiles=tiles, order=places, in_order=tl.constexpr(True))
        _make_lists(call, bits, live, config, by_key, part)
        yield part


def _owners_and_others(call: Call, config: dict[str, int], by_key: bool) -> tuple[int, int]:
    """How many tiles have lists, and of how many others: of keys and of queries (by_key), or the other way round."""
    queries = triton.cdiv(call.q.shape[2], config["BLOCK_Q"])
    keys = triton.cdiv(call.k.shape[2], config["BLOCK_K"])
    return (keys, queries) if by_key else (queries, keys)


def _make_lists(
    call: Call,
    bits: TileBits,
    live: Tensor | None,
    config: dict[str, int],
    by_key: bool,
    lists: TileLists,
) -> None:
    """Writes lists.tiles, if there are any, of the owners in lists.order; without an order of all, and their counts."""
    assert lists.counts is not None
    num_lists = lists.counts.shape[1]
    num_members = 1 if live is None else call.q.shape[1] // num_lists
    launch(
        attention_tiles_kernel,
        (lists.counts.numel() if lists.order is None else lists.order.shape[0],),
        config_of(attention_tiles_kernel, call.q.device),
        tiles=lists.tiles,
        counts=lists.counts,
        whole_counts=lists.whole_counts,
        order=lists.order,
        reach=bits.reach,
        partial=bits.partial,
        present=bits.present,
        live=live,
        visibility=call.visibility,
        num_bits=0 if bits.reach is None else bits.reach.shape[1],
        num_lists=num_lists,
        num_owners=lists.num_owners,
        num_members=num_members,
        num_others=lists.num_items // num_members,
        tile_bits=lists.tile_bits,
        BY_KEY=by_key,
        IS_PADDED=call.key_mask is not None,
        BLOCK_Q=config["BLOCK_Q"],
        BLOCK_K=config["BLOCK_K"],
        TILE=TILE,
    )
