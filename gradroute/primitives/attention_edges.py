"""Edges between routes as attention's kernels read them: bits per token, and bits per tile of tokens.

All of them are made from the ids on their device, without a wait, once per batch and table: `Routes.derived` keeps them
for the other layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..routes import Routes
from ..tables import Table

#: The most routes that edges can be between: each has one bit of an int64.
MAX_ROUTES = 64

# How many tokens a tile of bits has: kernels' tiles are multiples of it, or divide it.
TILE = 32

# Beyond this many different weights of a table, kernels gather weights one by one.
MAX_LEVELS = 4


class EdgeBits(NamedTuple):
    """A table of edges by query token.

    Attributes:
        bits: `[levels, B * S]`, int32 up to 32 routes and else int64: bit c says that the edge to keys of route c has
            the level's value. Without levels: the ids `[B * S]`.
        values: `[levels]` fp32, the levels' values; None where the only one is 1. All other edges are 0. Without
            levels: the table `[R, R]`.
        levels: how many there are; 0: weights are gathered.
    """

    bits: Tensor | None
    values: Tensor | None
    levels: int

    @staticmethod
    def of(routes: Routes | None, table: Table | None) -> EdgeBits:
        """The bits of a table; without a table there are none, and no levels."""
        if table is None:
            return EdgeBits(None, None, 0)
        assert routes is not None
        return routes.derived(("edge bits", table.digest), lambda: _edge_bits(routes, table))


def _edge_bits(routes: Routes, table: Table) -> EdgeBits:
    weights = table.on(routes.device)
    levels = [value for value in table.values if value != 0]
    if not 0 < len(levels) <= MAX_LEVELS:
        return EdgeBits(routes.ids, weights, 0)
    dtype = torch.int32 if routes.num_routes <= 32 else torch.int64
    by_route = torch.stack([_packed(weights == value, dtype) for value in levels])  # [levels, R]
    values = None
    if not table.binary:
        values = torch.stack([weights.new_full((), value) for value in levels])
    return EdgeBits(by_route[:, routes.ids.long()], values, len(levels))


def _packed(flags: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Booleans `[..., R]` as bits of one integer `[...]`."""
    routes = torch.arange(flags.shape[-1], device=flags.device)
    return (flags.long() << routes).sum(-1).to(dtype)


class TileBits(NamedTuple):
    """Which tiles of TILE queries and of TILE keys have an edge: where `reach & present` is not 0.

    A pair of tiles is full, all edges between them are 1, where `partial & present` is 0.

    Attributes:
        reach: `[B, tiles]` int64, the routes to whose keys the tile's queries have an edge.
        partial: `[B, tiles]` int64, the routes to whose keys some of the tile's queries have an edge other than 1.
        present: `[B, tiles]` int64, the routes of the tile's tokens.
    """

    reach: Tensor | None
    partial: Tensor | None
    present: Tensor | None

    @staticmethod
    def of(routes: Routes | None, shape: tuple[int, int], *tables: Table | None) -> TileBits:
        """The bits for edges in any of `tables`, and other than 1 in any, and ids `[B, S]` of this shape.

        There are none where a table is None.
        """
        if routes is None or any(table is None for table in tables):
            return TileBits(None, None, None)
        digests = [table.digest for table in tables if table is not None]
        return routes.derived(("tile bits", shape, *digests), lambda: _tile_bits(routes, shape, tables))


def _tile_bits(routes: Routes, shape: tuple[int, int], tables: tuple[Table | None, ...]) -> TileBits:
    batch, length = shape
    tiles = -(-length // TILE)
    ids = torch.nn.functional.pad(routes.ids.view(shape), (0, tiles * TILE - length), value=-1)
    ids = ids.view(batch, tiles, TILE, 1)
    each_route = torch.arange(routes.num_routes, device=ids.device)
    present = (ids == each_route).any(2)  # [B, tiles, R]
    weights = torch.stack([table.on(ids.device) for table in tables if table is not None])
    reach, partial = ((present.float() @ edges.any(0).float()) > 0 for edges in (weights != 0, weights != 1))
    return TileBits(_packed(reach), _packed(partial), _packed(present))
