"""The tokens of a batch listed by the tiles that they take part in, where no count need be known on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..routes import Routes
from .tiling import Stratum


class Entries(NamedTuple):
    """Pairs of a token and a tile, sorted by tile: E = T * slots of them, the last of which may be of no tile.

    An entry of no tile stands for a slot that a token's route does not use. Which these are, the device alone knows, so
    they are carried along: their rows are those of some token or were never written, and nothing reads them.

    Attributes:
        tokens: `[E]` int64, the entry's token.
        tile_rows: `[E]` int64, where a matrix `[T, F]` seen as `[T * tiles, F / tiles]` has the entry's features.
        ends: `[tiles]` int32, up to which entry each tile's go.
        is_real: `[E]` bool, whether the entry has a tile.
        places: `[T, slots]` int64, the entries of each token.
        has_tile: `[T, slots]` bool, which of them have a tile.
        routes: of the entries; tables are those that `tiling.table_of_tiles` makes.
        token_routes: of the entries' tokens, for tables as they are.
        stratum: what they are the entries of.
    """

    tokens: Tensor
    tile_rows: Tensor
    ends: Tensor
    is_real: Tensor
    places: Tensor
    has_tile: Tensor
    routes: Routes
    token_routes: Routes
    stratum: Stratum

    def rows(self, matrix: Tensor) -> Tensor:
        """Of `matrix [T, F]` each entry's row `[E, F]`."""
        return matrix.index_select(0, self.tokens)

    def features(self, matrix: Tensor) -> Tensor:
        """Of `matrix [T, F]` each entry's features `[E, F / tiles]`."""
        tiles = self.stratum.tiles
        width = matrix.shape[1] // tiles
        return matrix.contiguous().view(matrix.shape[0] * tiles, width).index_select(0, self.tile_rows)

    def sum_of_tokens(self, rows: Tensor, total: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`[T, F]` in `dtype`, the sums of tokens' entries in `rows [E, F]`, added to a total where there is one."""
        for slot in range(self.stratum.slots):
            summand = rows.index_select(0, self.places[:, slot]).to(dtype)
            if not self.stratum.is_full:
                summand = torch.where(self.has_tile[:, slot, None], summand, 0)
            total = summand if total is None else total + summand
        assert total is not None
        return total

    def put_features(self, features: Tensor, out: Tensor) -> Tensor:
        """`out [T + 1, F]` with the entries' `features [E, F / tiles]`; those of no tile go to its last row."""
        tiles = self.stratum.tiles
        at = torch.where(self.is_real, self.tile_rows, (out.shape[0] - 1) * tiles)
        return out.view(out.shape[0] * tiles, features.shape[1]).index_copy(0, at, features).view(out.shape)


def entries_of(routes: Routes, stratum: Stratum) -> Entries:
    """The entries of a batch; made once for all sites that are cut like this."""
    return routes.derived(("entries", stratum.tiles, stratum.of_route), lambda: _entries(routes, stratum))


def _entries(routes: Routes, stratum: Stratum) -> Entries:
    tiles, slots, device = stratum.tiles, stratum.slots, routes.device
    ids = routes.ids.long()
    keys = stratum.table.on(device).to(torch.int32).index_select(0, ids)  # [T, slots]
    ordered, order = torch.sort(keys.flatten(), stable=True)
    # searchsorted, not bincount: bincount waits for the device to learn its output's size.
    ends = torch.searchsorted(
        ordered, torch.arange(1, tiles + 1, dtype=torch.int32, device=device), out_int32=True
    )
    places = torch.empty_like(order).index_copy(0, order, torch.arange(order.shape[0], device=device))
    tokens = order // slots
    is_real = ordered < tiles
    tile = torch.where(is_real, ordered, 0)
    of_tokens = ids.index_select(0, tokens).to(torch.int32)
    return Entries(
        tokens=tokens,
        tile_rows=tokens * tiles + tile,
        ends=ends,
        is_real=is_real,
        places=places.view(-1, slots),
        has_tile=keys < tiles,
        routes=routes._of_ids(tile * routes.num_routes + of_tokens, tiles * routes.num_routes),
        token_routes=routes._of_ids(of_tokens, routes.num_routes),
        stratum=stratum,
    )
