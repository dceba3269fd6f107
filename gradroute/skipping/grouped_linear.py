"""The products of a linear layer's backward as grouped products, for tokens that the host has not counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..arguments import ordinary_tensors
from ..primitives.arguments import product_dtype
from ..primitives.protocol import Primitives
from ..routes import Routes
from ..tables import Table
from .entries import entries_of
from .grouped import grouped_rows
from .parts import Rows
from .sums import GroupedTotal
from .tiling import Tiling, live_features, may_be_tiled, table_of_tiles, tiling_of

if TYPE_CHECKING:
    from ..linear import LinearSites


class SideTiling(NamedTuple):
    """How a product is grouped over one of the two sides of the weight.

    Attributes:
        tiling: of the side's features.
        of_outputs: whether the side are the outputs, the weight's rows; else the inputs.
        tables: the table of the product on that side, on the tiles of each stratum.
    """

    tiling: Tiling
    of_outputs: bool
    tables: tuple[Table | None, ...]


class LinearTilings(NamedTuple):
    """How the products of a linear layer are grouped; None where one is made whole."""

    dx: SideTiling | None
    dweight: SideTiling | None


@ordinary_tensors()
def tilings_of(sites: LinearSites) -> LinearTilings | None:
    """The tilings of a linear layer with these effective sites; None where no product is worth grouping."""
    if not may_be_tiled(sites.tables.values()):
        return None
    dx = _better(
        _side(True, (sites.output,), None),
        _side(False, (sites.input,), sites.input),
    )
    dweight = _better(
        _side(True, (sites.output, sites.update_rows), sites.update_rows),
        _side(False, (sites.update_cols,), sites.update_cols),
    )
    return None if dx is None and dweight is None else LinearTilings(dx, dweight)


def _side(of_outputs: bool, live: tuple[Table | None, ...], table: Table | None) -> SideTiling | None:
    tables = [each for each in live if each is not None and each.density < 1]
    if not tables:
        return None
    features = max(each.features for each in tables if each is not None)
    tiling = tiling_of(live_features(tables, tables[0].num_routes, features))
    if tiling is None:
        return None
    return SideTiling(tiling, of_outputs, tuple(table_of_tiles(stratum, table) for stratum in tiling.strata))


def _better(one: SideTiling | None, other: SideTiling | None) -> SideTiling | None:
    if one is None or other is None:
        return other if one is None else one
    return one if one.tiling.cost <= other.tiling.cost else other


def grouped_input_grad(
    g: Tensor, weight: Tensor, routes: Routes, sites: LinearSites, side: SideTiling, primitives: Primitives
) -> Tensor:
    """dx `[T, I]` of g `[T, O]`, masked, and the weight `[O, I]`, over the tiles of one side."""
    if side.of_outputs:
        return primitives.masked_product(
            _over_outputs(g, weight, routes, side.tiling), routes, sites.input, overwrite=True
        )
    tokens, inputs = g.shape[0], weight.shape[1]
    dx = g.new_zeros(tokens + 1, inputs)
    for stratum, table in zip(side.tiling.strata, side.tables, strict=True):
        entries = entries_of(routes, stratum)
        tiles = weight.unflatten(1, (stratum.tiles, -1)).transpose(0, 1)
        part = grouped_rows(entries.rows(g), tiles, entries.ends, False)
        part = primitives.masked_product(part, entries.routes, table, overwrite=True)
        dx = entries.put_features(part, dx)
    return dx[:tokens]


def _over_outputs(g: Tensor, weight: Tensor, routes: Routes, tiling: Tiling) -> Tensor:
    """g W, of the outputs where gradient arrives."""
    is_sum = sum(stratum.slots for stratum in tiling.strata) > 1
    dx: Tensor | None = None
    for stratum in tiling.strata:
        entries = entries_of(routes, stratum)
        weights = weight.unflatten(0, (stratum.tiles, -1))
        rows = grouped_rows(entries.features(g), weights, entries.ends, is_sum)
        dx = entries.sum_of_tokens(rows, dx, product_dtype(g.dtype) if is_sum else g.dtype)
    return g.new_zeros(g.shape[0], weight.shape[1]) if dx is None else dx.to(g.dtype)


def grouped_weight_grad(
    g: Tensor, x: Rows, routes: Routes, sites: LinearSites, side: SideTiling, primitives: Primitives
) -> Tensor:
    """dW `[O, I]` of g `[T, O]`, masked, and x `[T, I]`, over the tiles of one side."""
    total = GroupedTotal(g, (g.shape[1], x.matrix.shape[1]), side.tiling)
    for stratum, table in zip(side.tiling.strata, side.tables, strict=True):
        entries = entries_of(routes, stratum)
        if side.of_outputs:
            g_part = primitives.masked_product(entries.features(g), entries.routes, table, overwrite=True)
            x_part = primitives.masked_product(x.at(entries.tokens), entries.token_routes, sites.update_cols)
            total.add_rows(g_part, x_part, entries.ends)
        else:
            g_part = primitives.masked_product(
                entries.rows(g), entries.token_routes, sites.update_rows, overwrite=True
            )
            x_part = primitives.masked_product(
                entries.features(x.matrix), entries.routes, table, overwrite=True
            )
            total.add_columns(g_part, x_part, entries.ends)
    return total.result()
