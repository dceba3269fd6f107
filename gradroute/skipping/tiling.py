"""How features are cut into tiles of one width, so that products over them are grouped without counts on the host."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives.arguments import ActivationMasks
from ..tables import Table
from .rule import MAX_ROUTES

# Features are cut into no more tiles than this. Torch's grouped product takes up to 1023 groups.
MAX_TILES = 64

# Tiles are multiples of this where the width is: 16 bytes of half precision, which torch's grouped product on CUDA asks
# of strides.
ALIGNMENT = 8

# What it costs, as a share of the whole product, that a token stands in one more list: its rows of the operands are
# gathered, and its rows of the products put back. An estimate from bytes, not yet measured: eight passes over
# 16384 × 4096 halves take 0.26 ms of the 14 ms of a gated MLP's backward with d_ff 14336.
COST_OF_SLOT = 0.02


def is_aligned(*widths: int) -> bool:
    """Whether torch's grouped product on CUDA takes matrices of these widths, and tiles of them."""
    return all(width % ALIGNMENT == 0 for width in widths)


class Stratum(NamedTuple):
    """Tiles of one width, each with the routes whose tokens it is made of: one grouped product.

    Attributes:
        tiles: into how many tiles the features are cut.
        of_route: the tiles of each route.
        table: the same as a table `[R, slots]`, whose device copies are kept; `tiles` where a route has no more.
        slots: the most tiles that a route has: a field, because Dynamo of torch 2.10 computes with no property.
        is_full: whether every route has a tile in every slot.
    """

    tiles: int
    of_route: tuple[tuple[int, ...], ...]
    table: Table
    slots: int
    is_full: bool


class Tiling(NamedTuple):
    """Strata that together have every pair of a route and a feature that is live, no pair twice.

    Attributes:
        strata: one, or a coarse one and a fine one.
        work: the share of the whole product's work that is done where every route has as many tokens.
        overlaps: whether some feature is in tiles of both strata, whose sums are then added.
    """

    strata: tuple[Stratum, ...]
    work: float
    overlaps: bool

    @property
    def cost(self) -> float:
        """The work, and what the lists of tokens cost beside it."""
        return self.work + COST_OF_SLOT * sum(stratum.slots for stratum in self.strata)


def may_be_tiled(tables: Collection[Table]) -> bool:
    """Whether some weights are 0, and the routes are no more than have their products left out."""
    return (
        any(table.density < 1 for table in tables) and max(table.num_routes for table in tables) <= MAX_ROUTES
    )


def live_features(tables: Sequence[Table | None], num_routes: int, features: int) -> Tensor:
    """Where no table has weight 0: `[R, features]` bool, on the CPU."""
    live = torch.ones(num_routes, features, dtype=torch.bool, device="cpu")
    for table in tables:
        if table is not None:
            live &= table.weights != 0
    return live


def tiling_of(live: Tensor) -> Tiling | None:
    """The tiling that does least for the features that are live `[R, F]`; None where no tiling saves anything."""
    if not live.numel():
        return None
    return _tiling_of(live.numpy().tobytes(), live.shape[0])


@functools.lru_cache(maxsize=256)
def _tiling_of(values: bytes, num_routes: int) -> Tiling | None:
    """The same. The layers of a model mostly have equal tables: six of SmolLM2 took 2.9 s when each looked anew."""
    live = torch.frombuffer(bytearray(values), dtype=torch.bool).view(num_routes, -1)
    best: Tiling | None = None
    for tiles in _numbers_of_tiles(live.shape[1]):
        for coarse in (None, *(number for number in _numbers_of_tiles(tiles, 1) if number < tiles)):
            tiling = _tiling(live, tiles, coarse)
            if tiling.cost < (1 if best is None else best.cost):
                best = tiling
    return best


def _numbers_of_tiles(features: int, alignment: int | None = None) -> Iterator[int]:
    """Into how many tiles features can be cut; the numbers divide each other's multiples."""
    if alignment is None:
        alignment = ALIGNMENT if features % ALIGNMENT == 0 else 1
    for tiles in range(1, min(features, MAX_TILES) + 1):
        if features % (tiles * alignment) == 0:
            yield tiles


def _tiling(live: Tensor, tiles: int, coarse: int | None) -> Tiling:
    """The tiling of so many tiles; before them, of coarse tiles where all features are live for a route."""
    strata, work = [], 0.0
    covered: list[Tensor] = []
    if coarse is not None:
        whole = live.unflatten(1, (coarse, -1)).all(2)  # [R, coarse]
        live = live & ~whole.repeat_interleave(live.shape[1] // coarse, 1)
        covered.append(whole)
    covered.append(live.unflatten(1, (tiles, -1)).any(2))
    for taken in covered:
        if taken.any():
            strata.append(_stratum(taken))
            work += float(taken.float().mean())
    features = [taken.any(0).repeat_interleave(tiles // taken.shape[1]) for taken in covered]
    overlaps = len(features) > 1 and bool((features[0] & features[1]).any())
    return Tiling(tuple(strata), work, overlaps)


def _stratum(taken: Tensor) -> Stratum:
    """The stratum of the pairs of a route and a tile that are taken `[R, tiles]`."""
    tiles = taken.shape[1]
    of_route = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in taken)
    slots = max(len(row) for row in of_route)
    rows = [[*row, *[tiles] * (slots - len(row))] for row in of_route]
    return Stratum(tiles, of_route, Table(rows), slots, all(len(row) == slots for row in of_route))


def tables_in(tilings: object) -> Iterator[Table]:
    """The tables that a site's tilings hold, of which a device needs copies."""
    if isinstance(tilings, Table):
        yield tilings
    elif isinstance(tilings, tuple):
        for part in tilings:
            yield from tables_in(part)


def masks_of_tiles(stratum: Stratum, masks: ActivationMasks) -> ActivationMasks:
    """The masks on the tiles of a stratum, for the routes of `Entries.routes`, without those that change nothing."""
    groups = ((table_of_tiles(stratum, table) for table in group) for group in masks)
    return ActivationMasks(*(tuple(table for table in group if table is not None) for group in groups))


def table_of_tiles(stratum: Stratum, table: Table | None) -> Table | None:
    """A table `[R, F]` on the tiles of a stratum, `[tiles * R, F / tiles]`: row tile * R + r is route r's.

    None where there is none, and where it is one on all tiles that are taken.
    """
    if table is None:
        return None
    tiles, weights = stratum.tiles, table.weights
    if table.features == 1:
        of_tiles = weights.expand(tiles, -1, 1)
    else:
        of_tiles = weights.unflatten(1, (tiles, -1)).transpose(0, 1)  # [tiles, R, F / tiles]
    taken = ((tile, route) for route, row in enumerate(stratum.of_route) for tile in row)
    if all(bool((of_tiles[pair] == 1).all()) for pair in taken):
        return None
    return Table(of_tiles.flatten(0, 1))
