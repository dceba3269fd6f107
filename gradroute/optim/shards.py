"""Parameters that are sharded over processes: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Ranks(NamedTuple):
    """The processes that have the shards of a parameter along one dimension.

    Attributes:
        name: the name of their process group.
        size: how many processes there are.
        number: the number of this process among them.
    """

    name: str
    size: int
    number: int


def shards(parameter: Tensor) -> Iterator[tuple[int, Ranks]]:
    """The dimensions along which a parameter is sharded, each with the processes that have the shards."""
    if not is_distributed(parameter):
        return
    mesh = parameter.device_mesh
    for mesh_dim, placement in enumerate(parameter.placements):
        dim, ranks = getattr(placement, "dim", None), mesh.size(mesh_dim)
        if dim is not None and ranks > 1:
            yield dim, Ranks(mesh.get_group(mesh_dim).group_name, ranks, mesh.get_local_rank(mesh_dim))


def reduced(tensor: Tensor, operation: str, group: Ranks) -> Tensor:
    """The sum ("sum") or the largest values ("max") of a tensor over some processes."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(tensor, operation, group.name))


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, found out without that class, whose import takes a second."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    return tensor.to_local() if is_distributed(tensor) else tensor
