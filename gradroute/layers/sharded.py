"""RoutedLinear under torch's tensor parallelism: ColwiseParallel and RowwiseParallel.

The ops take local tensors, so a rank computes with its own part of the weight and of the tables, and its result is a
DTensor again, as torch.nn.Linear's is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..linear import LinearSites, routed_linear
from ..routes import Routes
from ..sites import given
from ..tables import Table


def sharded_linear(
    x: Tensor,
    weight: DTensor,
    bias: DTensor | None,
    routes: Routes,
    sites: LinearSites,
    backend: str | None,
) -> Tensor:
    """`routed_linear` of a weight that is sharded by rows (ColwiseParallel) or by columns (RowwiseParallel).

    Args:
        x: `[*tokens, I]`, a DTensor: the same on every rank, or sharded along I where the weight is.
        weight: `[O, I]`.
        bias: `[O]` or None.
        routes: the routes of all tokens, the same on every rank.
        sites: the sites of the whole layer.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: another way of sharding.
        ValueError: features that the ranks cannot share equally.
    """
    if isinstance(x, DTensor) and len(weight.placements) == 1 and x.device_mesh == weight.device_mesh:
        (placement,), (x_placement,) = weight.placements, x.placements
        if placement == Shard(0) and x_placement == Replicate():
            return _by_rows(x, weight, bias, routes, sites, backend)
        if placement == Shard(1) and x_placement in (Shard(x.dim() - 1), Shard(-1)):
            return _by_columns(x, weight, bias, routes, sites, backend)
    got = f"a DTensor {x.placements}" if isinstance(x, DTensor) else "a tensor that is no DTensor"
    raise TypeError(
        f"x: got {got} for a weight {weight.placements}, expected what torch's ColwiseParallel or RowwiseParallel "
        "makes of it over a mesh of one dimension; models are sharded by gradroute.models.tensor_parallel"
    )


def _by_rows(
    x: DTensor,
    weight: DTensor,
    bias: DTensor | None,
    routes: Routes,
    sites: LinearSites,
    backend: str | None,
) -> Tensor:
    """A rank makes its own outputs; its gradient of x is a summand."""
    y = routed_linear(
        x.to_local(grad_placements=[Partial()]),
        weight.to_local(),
        None if bias is None else bias.to_local(),
        routes,
        rank_sites(sites, ("outputs", "bias"), weight, 0),
        backend=backend,
    )
    return DTensor.from_local(y, weight.device_mesh, [Shard(y.dim() - 1)], run_check=False)


def _by_columns(
    x: DTensor,
    weight: DTensor,
    bias: DTensor | None,
    routes: Routes,
    sites: LinearSites,
    backend: str | None,
) -> Tensor:
    """A rank makes its summand of all outputs, of its own inputs. The bias is added to the sum."""
    parts = rank_sites(sites, ("inputs",), weight, 1, without="update_bias")
    local = routed_linear(x.to_local(), weight.to_local(), None, routes, parts, backend=backend)
    mesh = weight.device_mesh
    y = DTensor.from_local(local, mesh, [Partial()], run_check=False)
    if bias is None:
        return y
    total = y.redistribute(placements=[Replicate()]).to_local()
    # A linear layer of no inputs is its bias, and has its masks.
    nothing, no_weight = total.new_empty(*total.shape[:-1], 0), total.new_empty(total.shape[-1], 0)
    own = given(LinearSites, output=sites.output, update_bias=sites.table("update_bias"))
    total = total + routed_linear(nothing, no_weight, bias.to_local(), routes, own, backend=backend)
    return DTensor.from_local(total, mesh, [Replicate()], run_check=False)


def rank_sites(
    sites: LinearSites, widths: tuple[str, ...], weight: DTensor, dim: int, without: str = ""
) -> LinearSites | None:
    """Sites whose tables of these widths have this rank's features alone, derived once; `[R, 1]` is for all of them."""
    rank, ranks = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
    if weight.shape[dim] % ranks:
        raise ValueError(
            f"weight: got {list(weight.shape)} sharded along dimension {dim}, expected a multiple of {ranks} ranks"
        )
    key = ("rank", widths, rank, ranks)
    if key not in sites.groups:
        tables = {
            name: _part(table, rank, ranks) if sites.declared[name]["width"] in widths else table
            for name, table in sites.tables.items()
            if name != without
        }
        sites.groups[key] = given(LinearSites, **tables)
    found: Any = sites.groups[key]
    return found


def _part(table: Table, rank: int, ranks: int) -> Table:
    return table if table.features == 1 else Table(torch.chunk(table.weights, ranks, dim=1)[rank])
