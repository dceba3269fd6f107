"""Parameters in shards (DTensors): gathered one at a time, and written to where each process has its share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layers.reading import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached: itself, or of a DTensor a copy that is gathered; then all ranks must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, detached, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(values: Tensor, tensor: DTensor) -> DTensor:
    """Values that every rank has whole, sharded as a DTensor is, in memory of their own."""
    from torch.distributed.tensor import DTensor

    share = _share(values, tensor, tensor.placements)
    if share.untyped_storage().nbytes() > share.nbytes:
        share = share.clone()  # a view would keep the whole values alive
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        share, mesh, placements, run_check=False, shape=values.shape, stride=values.stride()
    )


def on_all_ranks(values: Tensor, tensor: Tensor) -> Tensor:
    """The values of the first rank on every rank that has a share of a tensor; of an ordinary tensor the values."""
    if not is_dtensor(tensor):
        return values
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    alike = distribute_tensor(values.to(tensor.device), mesh, [Replicate()] * mesh.ndim)
    return alike.to_local()


def replicated(values: Tensor, tensor: Tensor) -> Tensor:
    """Values that every rank has whole, as a DTensor where the tensor that they are to be computed with is one."""
    if not is_dtensor(tensor):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(values.to(tensor.device), mesh, [Replicate()] * mesh.ndim, run_check=False)


def write(tensor: DTensor, dim: int, index: Tensor, values: Tensor | float) -> None:
    """Overwrites what this rank has of some indices along a dimension, in place; no rank waits for another.

    Args:
        tensor: the DTensor.
        dim: the dimension.
        index: int64 `[n]`, different indices along the dimension of the whole tensor.
        values: a number, or what every rank has whole: the shape of the tensor, with n along the dimension.
    """
    size, share = tensor.shape[dim], local(tensor)
    here = _share(torch.arange(size, device=share.device), tensor, _along(tensor, dim, 0))
    positions = torch.full((size,), -1, dtype=torch.int64, device=share.device).scatter_(
        0, here, torch.arange(len(here), device=share.device)
    )
    positions = positions[index.to(share.device)]
    present = positions >= 0
    if not isinstance(values, Tensor):
        share.index_fill_(dim, positions[present], values)
        return
    values = values.to(share)
    mine = _share(values, tensor, _without(tensor, dim))
    share.index_copy_(dim, positions[present], mine.index_select(dim, present.nonzero().flatten()))


def _share(values: Tensor, tensor: DTensor, placements: Any) -> Tensor:
    """This rank's share of values that every rank has whole, by placements on a DTensor's mesh."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh
    every = DTensor.from_local(values.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return every.redistribute(placements=placements).to_local()


def _along(tensor: DTensor, dim: int, of: int) -> list[Any]:
    """The placements of a vector that is sharded as a DTensor is along one dimension."""
    from torch.distributed.tensor import Replicate

    kept: list[Any] = []
    placements: Any = tensor.placements
    for placement in placements:
        if getattr(placement, "dim", None) != dim:
            kept.append(Replicate())
        elif hasattr(placement, "split_factor"):  # of FSDP2 over tensor parallelism
            kept.append(type(placement)(of, split_factor=placement.split_factor))
        else:
            kept.append(type(placement)(of))
    return kept


def _without(tensor: DTensor, dim: int) -> list[Any]:
    """A DTensor's placements, whole along one dimension."""
    from torch.distributed.tensor import Replicate

    return [Replicate() if getattr(p, "dim", None) == dim else p for p in tensor.placements]
